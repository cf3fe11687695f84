"""A bundle -> one ONNX graph of dynamic sizes, which OpenVINO and ONNX Runtime both read.

Tracing writes down what one input did. Three modules decide by the size of what they see, and are put in words that hold for all
sizes before: `Convolution3d` (pads itself where there are few sections), `InstanceNorm` (is batch norm of one sample), and
CANet's `ContextFlow` (pools to a share of the size). All else in `models/` traces as it is; tests/test_models_onnx.py runs the
graph of each network at a size that it was not traced at.
"""

import copy
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from microtome.bundle import Bundle, Samples
from microtome.errors import ConfigError, DataError, RunError
from microtome.files import atomic_path
from microtome.inference.graphs import FILES, file_hash, graph_folder, record_graph
from microtome.inference.onnxruntime_engine import OnnxRuntimeEngine
from microtome.inference.openvino_engine import OpenVinoEngine
from microtome.inference.restore import restore
from microtome.models.blocks import Convolution3d, InstanceNorm
from microtome.models.canet import ContextFlow
from microtome.models.network import Network

# Read by OpenVINO and ONNX Runtime alike for years, and it has all that the networks need.
OPSET = 17
# Largest difference from torch's logits, as a share of the largest of them. Float32 sums in another order: up to 7e-5 was
# measured (instance norm in OpenVINO, 3D), a graph that is wrong is off by far more.
AGREEMENT = 1e-3
# A protocol buffer, which an ONNX file is, cannot be larger.
MOST_BYTES = 2_000_000_000


def write_graph(bundle: Bundle) -> Path:
    """Write the ONNX graph of a saved bundle, checked against what the float32 network answered; returns the file.

    Input `image` (1, C, *S), output `logits` (1, K, *S'), both float32, for every S that the network takes.

    Raises:
        ConfigError: onnx, or an engine to check the graph with, is not installed; the bundle was never saved; the network is
            too large for one file.
        DataError: the bundle has no golden input to check the graph by, or the graph does not say what the network says; nothing
            is written.
        RunError: torch cannot write the graph, no engine can run it, or there is no folder for it.
    """
    if not find_spec("onnx"):
        raise _missing("onnx")
    folder = graph_folder(bundle)
    if bundle.samples is None:
        where, do = bundle.folder or "bundle", "bring it up to date with `microtome train --resume` on its run"
        raise DataError(where, expected="a golden input in the bundle, to check its graph by", got="none", do=do, code="D056")
    network = restore(bundle)
    with atomic_path(folder / FILES["onnx"][0]) as part:
        export(network, part)
        check_graph(part, bundle.samples)
        written = file_hash(part)
    return record_graph(folder, bundle, "onnx", (written,), ("torch", "onnx"))


def export(network: Network, path: Path) -> None:
    """Write a network in evaluation mode as an ONNX graph of dynamic sizes; the network stays as it is.

    Raises:
        ConfigError: more weights than an ONNX file holds.
        RunError: torch has no words for it.
    """
    weight_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    if weight_bytes > MOST_BYTES:
        got = f"{weight_bytes / 1e9:.1f} GB"
        raise ConfigError(
            network.spec.name, expected="at most 2 GB of weights for an ONNX graph", got=got, do="use --engine torch", code="C038"
        )
    plain = copy.deepcopy(network).cpu().eval()
    for module in list(plain.modules()):
        for name, child in module.named_children():
            setattr(module, name, _plain(child, network.dims))
    axes = dict(enumerate("ZYX"[-network.dims :], start=2))
    with warnings.catch_warnings(), torch.no_grad():
        # Comparisons of sizes, in the checks that each network begins with: the answers are checked at another size.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # Of the exporter's own age, and of calls inside of it.
        warnings.simplefilter("ignore", DeprecationWarning)
        # Instance norm has no other mode than that of training, which it is named by.
        warnings.filterwarnings("ignore", "ONNX export mode is set to TrainingMode.EVAL", UserWarning)
        try:
            torch.onnx.export(
                plain,
                (torch.zeros(1, network.in_channels, *network.sizes.minimum),),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                # Of other names at the output, which may lack a border.
                dynamic_axes={"image": axes, "logits": {axis: f"{name}_out" for axis, name in axes.items()}},
            )
        except RuntimeError as error:
            got = " ".join(str(error).split())[:200]
            raise RunError(
                network.spec.name, expected="a network that torch can write as a graph", got=got, do="use --engine torch", code="R011"
            ) from None


def check_graph(path: Path, samples: Samples) -> None:
    """Hold a graph to the answer of the float32 network.

    Raises:
        ConfigError: neither ONNX Runtime nor OpenVINO is installed.
        DataError: other logits than the samples', by more than 1e-3 of the largest.
        RunError: the engine cannot run it.
    """
    logits_KS = run_graph(path, samples.golden_CS)
    if logits_KS.shape != samples.logits_KS.shape:
        raise DataError(path, expected=f"logits {samples.logits_KS.shape}", got=str(logits_KS.shape), do="use --engine torch", code="D057")
    largest = float(np.abs(samples.logits_KS).max())
    difference = float(np.abs(logits_KS - samples.logits_KS).max())
    # Said this way round, it also catches a NaN.
    if not difference <= AGREEMENT * max(largest, 1e-6):
        expected = f"logits as torch computes them (the largest is {largest:.3g})"
        raise DataError(path, expected=expected, got=f"a difference of {difference:.3g}", do="use --engine torch", code="D057")


def run_graph(path: Path, image_CS: np.ndarray) -> np.ndarray:
    """Logits (K, *S') float32 of a graph for one input (C, *S) float32, by the engine that is installed.

    Raises:
        ConfigError: neither is.
        RunError: it cannot run the graph.
    """
    if find_spec("onnxruntime"):
        return OnnxRuntimeEngine(path)(image_CS)
    if find_spec("openvino"):
        return OpenVinoEngine(path, "openvino")(image_CS)
    raise _missing("onnxruntime or openvino")


def _plain(module: nn.Module, dims: int) -> nn.Module:
    """A module that computes the same, in words that the exporter understands for all sizes."""
    if isinstance(module, InstanceNorm):
        norm = (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(len(module.weight), module.eps, affine=True)
        norm.weight, norm.bias = module.weight, module.bias
        return norm.eval()
    if isinstance(module, ContextFlow):
        return _TracedFlow(module)
    if isinstance(module, Convolution3d):
        unbranched: nn.Module = module
        unbranched.forward = partial(nn.Conv3d.forward, module)
    return module


class _TracedFlow(nn.Module):
    """CANet's `ContextFlow` with its adaptive mean as two matrix products: ONNX has no adaptive pooling to a computed size."""

    def __init__(self, flow: ContextFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, c4_BCS: Tensor, flow_BCS: Tensor) -> Tensor:
        joined_BCS = torch.cat([c4_BCS, flow_BCS], dim=1)
        # While it is traced, each size is a tensor, and stays one in this arithmetic; `as_tensor` is for plain calls.
        high, wide = (_means(torch.as_tensor(n), self.flow.pool) for n in joined_BCS.shape[2:])
        pooled_BCS: Tensor = self.flow.layers(high @ joined_BCS @ wide.T)
        return nn.functional.interpolate(pooled_BCS, size=c4_BCS.shape[2:], mode="bilinear", align_corners=False)


def _means(size: Tensor, pool: int) -> Tensor:
    """The matrix (n, size) that takes means of `size` values, n = size // pool but at least 1, as adaptive pooling takes them."""
    count = torch.clamp(size // pool, min=1)
    number, place = torch.arange(count), torch.arange(size)  # type: ignore[call-overload]
    first, end = number * size // count, ((number + 1) * size + count - 1) // count
    inside: Tensor = ((place >= first[:, None]) & (place < end[:, None])).float()
    return inside / inside.sum(dim=1, keepdim=True)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        "graph", expected=f"the package {package}", got="none installed", do='run: pip install "microtome[fast]"', code="C002"
    )
