"""Tiles by a CUDA graph, as far as it can be seen without a GPU; tests/test_gpu.py has the rest."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from microtome.inference import cuda_graphs
from microtome.inference.cuda_graphs import REPEATS, RepeatedTiles, graphed, plain_forward
from microtome.inference.tf32 import tensor_float32
from microtome.models.registry import build
from tests.small import TINY_2D, TINY_3D, one_thread

__all__ = ["one_thread"]

CPU = torch.device("cpu")


def network(dims: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = TINY_2D if dims == 2 else TINY_3D
    return build("modern_unet", dims=dims, in_channels=1, classes=2, config=config).eval()


def tile(*shape: int) -> torch.Tensor:
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1))


def on_gpu(shape: tuple[int, ...]) -> Any:
    """What `graphed` asks of a tile on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), shape=shape, dim=lambda: len(shape))


@pytest.mark.parametrize("shape", [(32, 32), (8, 16, 16)])
def test_on_a_cpu_every_tile_is_computed_by_the_network_itself(shape: tuple[int, ...]) -> None:
    plain = network(len(shape))
    call = graphed(plain, tile(*shape), compile_first=True)
    for size in (shape, tuple(2 * n for n in shape)):
        logits = call(tile(*size))
        with torch.no_grad():
            assert torch.equal(logits, plain(tile(*size)))
        assert not logits.requires_grad


def test_precision_is_that_asked_for() -> None:
    plain = network()
    full, half = (plain_forward(plain, CPU, precision)(tile(32, 32)) for precision in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 0.1 * full.abs().max()


def test_where_no_graph_can_be_recorded_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Any:
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(cuda_graphs, "_Graph", refused)
    plain = network()
    with pytest.warns(UserWarning, match=r"no CUDA graph for tiles of \(1, 1, 32, 32\).*not permitted$") as seen:
        call = graphed(plain, on_gpu((1, 1, 32, 32)))
    assert len(seen) == 1
    assert call.__qualname__.startswith("plain_forward")  # type: ignore[attr-defined]


def test_the_graph_is_recorded_from_the_compiled_network_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(cuda_graphs, "_Graph", lambda *values: values)
    monkeypatch.setattr(cuda_graphs, "plain_forward", lambda called, *_: recorded.append(called) or called)
    monkeypatch.setattr(torch, "compile", lambda called, **words: ("compiled", called, words))
    plain = network()
    graphed(plain, on_gpu((1, 1, 32, 32)))
    assert recorded == [plain, plain]
    graphed(plain, on_gpu((1, 1, 32, 32)), compile_first=True)
    # The plain pass for other sizes stays uncompiled: each of them would be compiled anew.
    assert recorded[2:] == [plain, ("compiled", plain, {"dynamic": False})]


def test_float32_is_exact_in_prediction_and_the_setting_is_put_back() -> None:
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, seen = convolutions.fp32_precision, []

    class Watched(nn.Module):
        def forward(self, image_BCS: torch.Tensor) -> torch.Tensor:
            seen.append(convolutions.fp32_precision)
            return image_BCS

    with tensor_float32(True):
        plain_forward(Watched(), CPU, "fp32")(tile(8, 8))
        assert convolutions.fp32_precision == "tf32"
    assert seen == ["ieee"]
    with pytest.raises(KeyError), tensor_float32(False):
        raise KeyError
    assert convolutions.fp32_precision == before


def test_rounded_weights_are_not_kept_for_another_call() -> None:
    class Watched(nn.Module):
        def forward(self, image_BCS: torch.Tensor) -> torch.Tensor:
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()
            return image_BCS

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_forward(Watched(), CPU, "bf16")(tile(8, 8))
        assert torch.is_autocast_cache_enabled()


def test_a_graph_is_recorded_when_tiles_of_one_size_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[int, ...]] = []

    def record(network: nn.Module, image_BCS: torch.Tensor, *, precision: str) -> Any:
        recorded.append(tuple(image_BCS.shape[2:]))
        return lambda _: f"graph in {precision}"

    monkeypatch.setattr(cuda_graphs, "graphed", record)
    plain = network()
    tiles = RepeatedTiles(plain, "bf16")
    expected = plain_forward(plain, CPU, "bf16")(tile(32, 32))
    for _ in range(REPEATS - 1):
        assert torch.equal(tiles(tile(32, 32)), expected)
    # Another size in between, and counting begins anew.
    tiles(tile(16, 16))
    for _ in range(REPEATS - 1):
        assert torch.equal(tiles(tile(32, 32)), expected)
    assert recorded == []
    assert [tiles(tile(32, 32)) for _ in range(3)] == ["graph in bf16"] * 3
    assert recorded == [(32, 32)]
    assert torch.equal(tiles(tile(16, 16)), plain_forward(plain, CPU, "bf16")(tile(16, 16)))
    for _ in range(REPEATS):
        tiles(tile(16, 16).double().float())
    assert recorded == [(32, 32), (16, 16)]


def test_a_size_without_a_graph_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    plain = network()

    def refuse(network: nn.Module, image_BCS: torch.Tensor, *, precision: str) -> Any:
        tried.append(1)
        return plain_forward(network, CPU, precision)

    monkeypatch.setattr(cuda_graphs, "graphed", refuse)
    tiles = RepeatedTiles(plain)
    for _ in range(3 * REPEATS):
        tiles(tile(16, 16))
    assert tried == [1]
