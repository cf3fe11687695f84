"""The graph of every network says what the network says, at sizes that it was not traced at, in both engines that read it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.inference import export as module
from microtome.inference.export import export
from microtome.inference.openvino_engine import openvino_core
from microtome.inference.telemetry import import_quietly
from microtome.models.network import Network
from microtome.models.registry import NETWORKS, build
from tests.small import one_thread

__all__ = ["one_thread"]

openvino, onnxruntime = import_quietly("openvino"), import_quietly("onnxruntime")

WIDTHS = (4, 8, 8)
FORMS: list[tuple[str, int, dict[str, Any]]] = [
    (name, dims, {"variant": variant} if variant else {})
    for name, entry in NETWORKS.items()
    for dims in entry.dims
    # FC-DenseNet's differ in nothing but their numbers of layers.
    for variant in (entry.variants[-1:] if name == "dense_unet" else entry.variants or ("",))
]
# What settings change in a forward pass: other norms, shortcuts, flat kernels and strides, heads that are for training only.
FORMS += [
    ("modern_unet", 2, {"norm": "instance", "residual": True, "supervised_levels": 2}),
    ("modern_unet", 3, {"norm": "instance", "kernels": ((1, 3, 3), (3, 3, 3), (5, 3, 3)), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2))}),
    ("unet3d", 3, {"batch_statistics": True}),
    ("unetpp", 2, {"supervised_levels": 2}),
]


def network_of(name: str, dims: int, settings: dict[str, Any]) -> Network:
    """A small network whose norms do something."""
    torch.manual_seed(0)
    widths = () if name == "sliding_window" else WIDTHS
    network = build(name, dims=dims, in_channels=2, classes=3, config=NetworkConfig(widths=widths, **settings)).eval()
    for parameter, value in network.state_dict().items():
        if parameter.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dim() == 1:
            value.add_(torch.randn(value.shape) / 4)
    return network


def sizes_of(network: Network) -> list[tuple[int, ...]]:
    """A size that is larger than the smallest along each axis by another length; of volumes one with as few sections as can be, too."""
    low, step = network.sizes.minimum, network.sizes.step
    larger = tuple(n + (axis + 1) * by for axis, (n, by) in enumerate(zip(low, step, strict=True)))
    return [larger, (low[0], *larger[1:])][: network.dims - 1]


def by_onnxruntime(path: Path, image_BCS: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits_BKS: np.ndarray = session.run(None, {"image": image_BCS})[0]
    return logits_BKS


def by_openvino(path: Path, image_BCS: np.ndarray) -> np.ndarray:
    core = openvino_core()
    model = core.read_model(path)
    model.reshape(image_BCS.shape)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    logits_BKS: np.ndarray = compiled(image_BCS)[0]
    return logits_BKS


@pytest.mark.parametrize(("name", "dims", "settings"), FORMS, ids=lambda value: value if isinstance(value, str) else None)
def test_the_graph_says_what_the_network_says(name: str, dims: int, settings: dict[str, Any], tmp_path: Path) -> None:
    network = network_of(name, dims, settings)
    export(network, tmp_path / "graph.onnx")
    for shape in sizes_of(network):
        image_BCS = torch.randn(1, 2, *shape)
        with torch.inference_mode():
            expected = network(image_BCS).numpy()
        for engine in (by_onnxruntime, by_openvino):
            # Float32 sums in another order; OpenVINO's instance norm is the least exact of all.
            found = engine(tmp_path / "graph.onnx", image_BCS.numpy())
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_convolution_pads_itself_in_the_graph_however_few_sections_it_was_traced_with(tmp_path: Path) -> None:
    network = network_of("modern_unet", 3, {})
    assert network.sizes.minimum == (4, 4, 4)
    export(network, tmp_path / "graph.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]
    assert nodes.count("Conv") == 11
    assert "Pad" not in nodes


def test_a_network_stays_as_it_is_when_it_is_exported(tmp_path: Path) -> None:
    network = network_of("modern_unet", 3, {"norm": "instance"})
    image_BCS = torch.randn(1, 2, *network.sizes.minimum)
    before = network(image_BCS)
    export(network, tmp_path / "graph.onnx")
    assert torch.equal(network(image_BCS), before)
    assert not any(isinstance(part, nn.InstanceNorm3d) for part in network.modules())


def test_weights_are_written_once(tmp_path: Path) -> None:
    # Recurrent layers: the same weights in three places of the graph.
    network = build("r2unet", dims=2, in_channels=1, classes=2, config=NetworkConfig(widths=(32, 64, 96)))
    export(network, tmp_path / "graph.onnx")
    weight_bytes = sum(value.nbytes for value in network.state_dict().values())
    assert (tmp_path / "graph.onnx").stat().st_size < 1.05 * weight_bytes


def test_weights_that_fit_in_no_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="expected at most 2 GB of weights"):
        export(network_of("unet", 2, {}), tmp_path / "graph.onnx")
    assert not list(tmp_path.iterdir())
