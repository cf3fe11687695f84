import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.inference.devices import arithmetic, has_bf16, pick_device, to_device
from microtome.inference.torch_engine import TorchEngine
from microtome.machine import recycle_memory
from microtome.models.registry import NETWORKS, build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return to_device(build("modern_unet", dims=2, in_channels=2, classes=3, config=NetworkConfig(widths=(4, 8))).eval(), CPU, 2)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_an_engine_gives_what_the_network_gives(network: nn.Module) -> None:
    array = image(2, 16, 12)
    result = TorchEngine(network=network, device=CPU)(array)
    assert result.dtype == np.float32
    assert result.shape == (3, 16, 12)
    with torch.no_grad():
        np.testing.assert_allclose(result, network(torch.from_numpy(array)[None])[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_the_mean_of_mirrored_versions_is_that_computed_by_hand(network: nn.Module, axes: tuple[int, ...]) -> None:
    array = image(2, 16, 12)
    engine = TorchEngine(network=network, device=CPU)
    results = []
    for flips in itertools.product(*[(False, True)] * len(axes)):
        turned = [axis + 1 for axis, flip in zip(axes, flips, strict=True) if flip]
        results.append(np.flip(engine(np.ascontiguousarray(np.flip(array, turned))), turned))
    assert len(results) == 2 ** len(axes)
    mirrored = TorchEngine(network=network, device=CPU, tta="mirror", mirror_axes=axes)(array)
    np.testing.assert_allclose(mirrored, np.mean(results, axis=0), atol=1e-5)
    # The network is not symmetric: without averaging the result is another.
    assert np.abs(mirrored - results[0]).max() > 1e-3


def test_mirrored_in_3d_the_output_of_a_mirrored_image_is_mirrored() -> None:
    torch.manual_seed(1)
    network = build("modern_unet", dims=3, in_channels=1, classes=2, config=NetworkConfig(widths=(4, 8))).eval()
    engine = TorchEngine(network=to_device(network, CPU, 3), device=CPU, tta="mirror", mirror_axes=(0, 1, 2))
    array = image(1, 4, 6, 8)
    for axis in (1, 2, 3):
        np.testing.assert_allclose(engine(np.ascontiguousarray(np.flip(array, axis))), np.flip(engine(array), axis), atol=1e-5)


def test_a_network_without_padding_loses_its_border_mirrored_or_not() -> None:
    network = build("unet", dims=2, in_channels=1, classes=2, config=NetworkConfig(widths=(2, 4))).eval()
    size = network.nearest_sizes(30, 0)[1]
    for axes in ((), (0, 1)):
        result = TorchEngine(network=network, device=CPU, tta="mirror", mirror_axes=axes)(image(1, size, size))
        assert result.shape == (2, size - 2 * network.context_vox, size - 2 * network.context_vox)


def test_bfloat16_is_close_to_float32_and_not_the_same(network: nn.Module) -> None:
    array = image(2, 32, 32)
    exact = TorchEngine(network=network, device=CPU)(array)
    rounded = TorchEngine(network=network, device=CPU, precision="bf16")(array)
    assert rounded.dtype == np.float32
    difference = np.abs(rounded - exact).max() / np.abs(exact).max()
    # 8 bits of precision, through a handful of layers.
    assert 0 < difference < 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_with_weights_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    dims = NETWORKS[name].dims[0]
    network = build(name, dims=dims, in_channels=1, classes=2, config=NetworkConfig(widths=(4, 8, 8))).eval()
    array = image(1, *(network.nearest_sizes(24, axis)[1] for axis in range(dims)))
    exact = TorchEngine(network=network, device=CPU)(array)
    engine = TorchEngine(network=to_device(network, CPU, dims).to(torch.bfloat16), device=CPU)
    assert engine.name == "torch-bf16"
    rounded = engine(array)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.2


def test_what_stands_in_for_the_network_is_called_for_every_version(network: nn.Module) -> None:
    seen = []

    def forward(image_BCS: torch.Tensor) -> torch.Tensor:
        seen.append(image_BCS.shape)
        return network(image_BCS)

    array = image(2, 16, 12)
    engine = TorchEngine(network=network, device=CPU)
    mirrored = engine.averaged("mirror", (0, 1), (1.0, 1.0))
    np.testing.assert_array_equal(replace(mirrored, forward=forward)(array), mirrored(array))
    assert seen == [(1, 2, 16, 12)] * 4
    assert (engine.tta, mirrored.name) == ("none", "torch")


def test_arithmetic_is_put_back_and_weights_stay_float32(network: nn.Module) -> None:
    with arithmetic(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    with arithmetic(CPU, "fp32"):
        assert not torch.is_autocast_enabled("cpu")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_on_its_device_is_channels_last_and_says_the_same(dims: int) -> None:
    torch.manual_seed(0)
    network = build("modern_unet", dims=dims, in_channels=2, classes=2, config=NetworkConfig(widths=(4, 8))).eval()
    array = torch.from_numpy(image(1, 2, *(8,) * dims))
    with torch.no_grad():
        before = network(array)
        moved = to_device(network, CPU, dims)
        np.testing.assert_allclose(moved(array).numpy(), before.numpy(), atol=1e-5)
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    convolution = next(p for p in moved.parameters() if p.dim() == dims + 2 and p.shape[1] > 1)
    assert convolution.is_contiguous(memory_format=layout)


def test_recycling_of_memory_may_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_RECYCLE_MEMORY", "0")
    assert recycle_memory() is False


def test_recycling_of_memory_happens_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert recycle_memory() is False


def test_recycling_of_memory_says_whether_it_was_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """A C library whose mallopt takes some of the settings."""

        def __init__(self, accepted: int) -> None:
            self.calls: list[int] = []
            self.accepted = accepted

        def mallopt(self, parameter: int, value: int) -> int:
            self.calls.append(parameter)
            return int(len(self.calls) <= self.accepted)

    monkeypatch.delenv("MICROTOME_RECYCLE_MEMORY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    for accepted, possible in ((3, True), (1, False), (0, False)):
        library = Library(accepted)
        monkeypatch.setattr("ctypes.CDLL", lambda name, library=library: library)
        assert recycle_memory() is possible
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert recycle_memory() is False


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "mps"])
def test_a_device_that_does_not_exist_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda, got") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_refused_where_there_is_none_and_taken_where_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == CPU
    with pytest.raises(ConfigError, match="got `cuda` and none; give --device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="expected one of 2 GPUs, counted from 0, got `cuda:2`"):
        pick_device("cuda:2")


def test_bfloat16_is_looked_up_in_the_processors_own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, has in (("fpu avx2", False), ("fpu avx512_bf16", True), ("amx_bf16 amx_tile", True)):
        monkeypatch.setattr("pathlib.Path.read_text", lambda self, flags=flags, **_: f"flags : {flags}\n")
        assert has_bf16(CPU) is has
    monkeypatch.setattr("pathlib.Path.exists", lambda self: False)
    assert has_bf16(CPU) is False
