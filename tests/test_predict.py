import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, conv3d

from microtome.config import NetworkConfig, NormalisationConfig, Plan
from microtome.inference import predict, slabs
from microtome.inference.layout import choose_tile
from microtome.inference.predict import Task, best_class, in_memory, layout_for, logit_rows, predict_labels
from microtome.inference.slabs import Restoring
from microtome.inference.source import Grey
from microtome.inference.torch_engine import TorchEngine
from microtome.models.registry import build
from tests.oracles import logits_whole, predict_logits_whole, resample_whole

# Where the best class leads by less than this, the order of additions may decide.
TIE = 1e-3


@dataclass(frozen=True)
class FakeNetwork:
    """Sizes minimum, minimum + step, ...; `engine` loses `context_vox` on each side, or pads with zeros."""

    context_vox: int = 0
    step: int = 1
    minimum: int = 1

    def nearest_sizes(self, n: int, axis: int) -> tuple[int, int]:
        over = max(0, n - self.minimum)
        return self.minimum + over // self.step * self.step, self.minimum - (-over // self.step) * self.step

    def engine(self, channels: int, classes: int, dims: int, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
        """A random convolution; refuses tiles that the network would refuse."""
        reach = self.context_vox or 1
        kernel = torch.randn(classes, channels, *(2 * reach + 1,) * dims, generator=torch.Generator().manual_seed(seed))
        convolve, padding = (conv2d if dims == 2 else conv3d), 0 if self.context_vox else reach

        def run(image_CS: np.ndarray) -> np.ndarray:
            assert image_CS.dtype == np.float32
            assert image_CS.flags.c_contiguous
            assert all(self.nearest_sizes(n, axis) == (n, n) for axis, n in enumerate(image_CS.shape[1:]))
            result: np.ndarray = convolve(torch.from_numpy(image_CS)[None], kernel, padding=padding)[0].numpy()
            return result

        return run


def plan_of(dims: int, patch: tuple[int, ...], **changes: Any) -> Plan:
    names = ("nothing", "cell", "wall", "gap")
    values = {"channels": 1, "classes": 2, "spacing_mm": (1.0,) * dims, "batch": 1, "steps": 1, "overlap": 0.5} | changes
    return Plan(dims=dims, patch_vox=patch, **values | {"classes": names[: values["classes"]]})  # type: ignore[arg-type]


@st.composite
def tasks(draw: st.DrawFn) -> tuple[np.ndarray, tuple[float, ...], Plan, FakeNetwork, int]:
    """(image, spacing, plan, network, seed): 2D, 3D, and a 2D network on a volume."""
    dims, axes = draw(st.sampled_from([(2, 2), (3, 3), (2, 3)]))
    context, step = draw(st.sampled_from([0, 0, 1, 2])), draw(st.sampled_from([1, 2, 4]))
    network = FakeNetwork(context, step, minimum=2 * context + step)
    most = 24 if axes == 2 else 9
    shape = tuple(draw(st.integers(1, most)) for _ in range(axes))
    patch = tuple(network.nearest_sizes(draw(st.integers(1, 10)), axis)[1] for axis in range(dims))
    sides = st.sampled_from([0.5, 1.0, 1.0, 1.4])
    plan = plan_of(
        dims,
        patch,
        channels=draw(st.integers(1, 2)),
        classes=draw(st.integers(2, 4)),
        batch=draw(st.integers(1, 3)),
        overlap=draw(st.sampled_from([0.0, 0.25, 0.5, 0.7])),
        spacing_mm=tuple(draw(sides) for _ in range(axes)),
        interpolation=draw(st.sampled_from(["linear", "cubic"])),
    )
    seed = draw(st.integers(0, 999))
    image = np.random.default_rng(seed).integers(0, 255, (plan.channels, *shape)).astype(np.uint8)
    return image, tuple(draw(sides) for _ in range(axes)), plan, network, seed


def logit_slabs(
    prepared: np.ndarray, plan: Plan, network: FakeNetwork, engine: Callable[[np.ndarray], np.ndarray], *, divided: bool = True
) -> Iterator[tuple[int, np.ndarray]]:
    """Blended logits of an image that is on the network's grid already, (first row, (K, rows, *S[1:]))."""
    plain = plan.model_copy(update={"spacing_mm": (1.0,) * (prepared.ndim - 1)})
    volume = in_memory(prepared)
    layout = layout_for(volume, plain.spacing_mm, plain, network)
    wanted = predict.Wanted(uncertainty=divided)
    task = Task(volume=volume, plan=plain, layout=layout, grey=Grey(NormalisationConfig(kind="none"), None), engine=engine, wanted=wanted)
    box = tuple((0, size) for size in prepared.shape[1:])
    return logit_rows(task, box)


def on_grid(parts: Iterator[tuple[int, np.ndarray]], grid: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    return Restoring(grid, shape, tuple((0, size) for size in shape))(parts)


# the whole road


@given(tasks())
@settings(max_examples=120, deadline=None)
def test_labels_are_those_of_the_whole_image_at_once(task: tuple[np.ndarray, tuple[float, ...], Plan, FakeNetwork, int]) -> None:
    image, spacing, plan, network, seed = task
    engine = network.engine(plan.channels, len(plan.classes), plan.dims, seed)
    labels = predict_labels(image, spacing, plan=plan, network=network, engine=engine)
    assert labels.dtype == np.int16
    assert labels.shape == image.shape[1:]
    logits = predict_logits_whole(
        image, spacing, plan, tile_of=lambda shape: choose_tile(shape, plan, network), context=network.context_vox, engine=engine
    )
    first, second = np.sort(logits, axis=0)[::-1][:2]
    clear = first - second > TIE
    np.testing.assert_array_equal(labels[clear], logits.argmax(axis=0)[clear])
    # A constant image may tie everywhere; noise hardly ever does.
    assert np.ptp(image) == 0 or image[0].size < 50 or clear.mean() > 0.9


@given(tasks())
@settings(max_examples=60, deadline=None)
def test_slabs_are_the_blended_logits_row_after_row_and_none_is_deeper_than_a_tile(
    task: tuple[np.ndarray, tuple[float, ...], Plan, FakeNetwork, int],
) -> None:
    image, _, plan, network, seed = task
    prepared = image.astype(np.float32).reshape(plan.channels, *image.shape[-plan.dims :][:-1], -1)[..., : image.shape[-1]] / 255
    prepared = np.ascontiguousarray(prepared)
    engine = network.engine(plan.channels, len(plan.classes), plan.dims, seed)
    tile = choose_tile(prepared.shape[1:], plan, network)
    rows, parts = 0, []
    for first, logits_KS in logit_slabs(prepared, plan, network, engine):
        assert first == rows
        assert 0 < logits_KS.shape[1] <= tile[0]
        rows += logits_KS.shape[1]
        parts.append(logits_KS.copy())
    wanted = logits_whole(prepared, tile, plan.overlap, network.context_vox, engine)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (3, 3), (1, 1, 1), (1, 9, 9)])
def test_images_smaller_than_a_tile_keep_their_shape(shape: tuple[int, ...]) -> None:
    network = FakeNetwork(context_vox=2, step=4, minimum=8)
    plan = plan_of(len(shape), (8,) * len(shape))
    image = np.random.default_rng(0).normal(size=(1, *shape))
    labels = predict_labels(image, (1.0,) * len(shape), plan=plan, network=network, engine=network.engine(1, 2, len(shape)))
    assert labels.shape == shape


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_without_padding_tiles_leave_no_seams(context: int, overlap: float) -> None:
    network = FakeNetwork(context_vox=context, step=1, minimum=2 * context + 1)
    prepared = np.random.default_rng(0).normal(size=(1, 40, 33)).astype(np.float32)
    engine = network.engine(1, 3, 2)
    pieces = plan_of(2, (12, 10), classes=3, overlap=overlap)
    whole = plan_of(2, (60, 60), classes=3, overlap=overlap)
    assert choose_tile((40, 33), pieces, network) != (40, 33)
    assert choose_tile((40, 33), whole, network) == (40, 33)
    tiled, untiled = (
        np.concatenate([s.copy() for _, s in logit_slabs(prepared, plan, network, engine)], axis=1) for plan in (pieces, whole)
    )
    np.testing.assert_allclose(tiled, untiled, atol=2e-5)


@pytest.mark.parametrize(("name", "dims"), [("modern_unet", 2), ("modern_unet", 3), ("unet", 2), ("unet3d", 3)])
def test_real_networks_label_an_image_of_any_size(name: str, dims: int) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(name=name, widths=(2, 4))
    network = build(name, dims=dims, in_channels=1, classes=2, config=config).eval()
    patch = tuple(network.nearest_sizes(2 * network.context_vox + 8, axis)[1] for axis in range(dims))
    plan = plan_of(dims, patch, network=config, spacing_mm=(1.3,) * dims)
    image = np.random.default_rng(0).normal(size=(1, *(23, 17, 11)[:dims]))
    engine = TorchEngine(network=network, device=torch.device("cpu"))
    labels = predict_labels(image, (1.0,) * dims, plan=plan, network=network, engine=engine)
    logits = predict_logits_whole(
        image, (1.0,) * dims, plan, tile_of=lambda shape: choose_tile(shape, plan, network), context=network.context_vox, engine=engine
    )
    clear = np.abs(logits[0] - logits[1]) > TIE
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], logits.argmax(axis=0)[clear])


# memory


def test_memory_holds_a_slab_of_all_classes_and_never_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    advance = slabs._Slab.advance

    def watched(self: Any, row: int) -> Any:
        kept.append(self.logits.shape[1])
        return advance(self, row)

    monkeypatch.setattr(slabs._Slab, "advance", watched)
    network, classes = FakeNetwork(), 16
    plan = plan_of(2, (16, 96), spacing_mm=(1.0, 1.0), overlap=0.25).model_copy(update={"classes": tuple(map(str, range(classes)))})
    prepared = np.zeros((1, 2000, 96), np.float32)
    engine = network.engine(1, classes, 2)
    tracemalloc.start()
    rows = sum(part.shape[1] for _, part in on_grid(logit_slabs(prepared, plan, network, engine), (2000, 96), (3000, 144)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 3000
    assert max(kept) == 16
    # A tenth of all logits on the image's grid; most of it is the matrix and the list of tiles.
    assert peak < 0.1 * 4 * classes * 3000 * 144


@given(st.lists(st.integers(1, 12), min_size=2, max_size=3).map(tuple), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_slabs_brought_to_another_grid_are_the_whole_brought_there(grid: tuple[int, ...], depth: int, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 16)) for _ in grid)
    logits = np.random.default_rng(0).normal(size=(2, *grid)).astype(np.float32)

    def slabs() -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, grid[0], depth):
            slab = logits[:, first : first + depth].copy()
            yield first, slab
            # What was handed out belongs to the giver again, as in `logit_slabs`.
            slab[...] = np.nan

    rows, parts = 0, []
    for first, part in on_grid(slabs(), grid, shape):
        assert first == rows
        rows += part.shape[1]
        parts.append(part.copy())
    np.testing.assert_allclose(np.concatenate(parts, axis=1), resample_whole(logits, shape), atol=1e-5)


def test_labels_of_14_classes_need_one_slab_and_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, grid, shape = 14, (240, 48, 48), (300, 64, 64)
    plan = plan_of(3, (16, 24, 24), overlap=0.5).model_copy(update={"classes": tuple(map(str, range(classes)))})
    logits = np.random.default_rng(0).normal(size=(classes, 16, 24, 24)).astype(np.float32)
    # So that what is held for speed alone is small beside what has to be held.
    for module in (predict, slabs):
        monkeypatch.setattr(module, "CHUNK_VALUES", 1 << 16)
    peaks = []
    for target in (grid, shape):
        image = np.zeros((1, *target), np.uint8)
        spacing = tuple(a / b for a, b in zip(grid, target, strict=True))
        tracemalloc.start()
        labels = predict_labels(image, spacing, plan=plan, network=FakeNetwork(), engine=lambda image_CS: logits)
        peaks.append(tracemalloc.get_traced_memory()[1] - labels.nbytes)
        tracemalloc.stop()
        assert len(np.unique(labels)) == classes
    slab = 4 * classes * 16 * 48 * 48
    # One MB for tiles, matrices and rows of the image; three more for rows of it in floating point and a few rows of logits.
    # All logits would be 31 and 69 MB.
    assert peaks[0] < slab + 1.0e6
    assert peaks[1] < slab + 4.0e6


def test_sums_undivided_have_the_same_best_class_and_one_tile_needs_no_sums() -> None:
    network = FakeNetwork()
    prepared = np.random.default_rng(0).normal(size=(1, 30, 23)).astype(np.float32)
    engine = network.engine(1, 3, 2)
    for patch, same in (((12, 10), False), ((30, 23), True)):
        plan = plan_of(2, patch, classes=3)
        both = [
            np.concatenate([slab.copy() for _, slab in logit_slabs(prepared, plan, network, engine, divided=divided)], axis=1)
            for divided in (True, False)
        ]
        np.testing.assert_array_equal(best_class(both[0]), best_class(both[1]))
        assert np.array_equal(*both) == same
    np.testing.assert_array_equal(both[0], engine(prepared))


# tiles


@given(st.data(), st.integers(0, 3), st.sampled_from([1, 2, 8]), st.integers(1, 20))
@settings(max_examples=120, deadline=None)
def test_a_tile_fits_the_network_and_the_budget_of_a_step(data: st.DataObject, context: int, step: int, batch: int) -> None:
    dims = data.draw(st.sampled_from([2, 3]))
    network = FakeNetwork(context, step, minimum=2 * context + step)
    patch = tuple(network.nearest_sizes(data.draw(st.integers(1, 64)), axis)[1] for axis in range(dims))
    shape = tuple(data.draw(st.integers(1, 3000)) for _ in range(dims))
    plan = plan_of(dims, patch, batch=batch)
    tile = choose_tile(shape, plan, network)
    reads = [n + 2 * context for n in tile]
    assert all(network.nearest_sizes(n, axis) == (n, n) for axis, n in enumerate(reads))
    assert np.prod(reads) <= np.prod(patch) * batch
    # Not larger than what holds the image.
    assert all(
        n <= network.nearest_sizes(size + 2 * context, axis)[1] - 2 * context
        for axis, (n, size) in enumerate(zip(tile, shape, strict=True))
    )


def test_an_image_that_a_step_could_hold_is_one_tile() -> None:
    network = FakeNetwork(step=8, minimum=8)
    assert choose_tile((30, 90), plan_of(2, (64, 64), batch=1), network) == (32, 96)
    assert choose_tile((200, 200), plan_of(2, (64, 64), batch=1), network) == (64, 64)
    assert choose_tile((200, 200), plan_of(2, (64, 64), batch=4), network) == (128, 128)


# classes


@given(st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_best_class_is_the_first_of_the_largest(classes: int, seed: int) -> None:
    logits = np.random.default_rng(seed).integers(0, 3, (classes, 6, 7)).astype(np.float32)
    before = logits.copy()
    result = best_class(logits)
    np.testing.assert_array_equal(result, logits.argmax(axis=0))
    assert result.dtype == np.int16
    np.testing.assert_array_equal(logits, before)


def test_more_classes_than_a_byte_counts_keep_their_numbers() -> None:
    logits = np.zeros((300, 2, 300), np.float32)
    logits[np.arange(300), :, np.arange(300)] = 1
    np.testing.assert_array_equal(best_class(logits), [range(300)] * 2)


def test_a_coarse_grid_of_one_tile_comes_back_in_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "CHUNK_VALUES", 3 * 90 * 7)
    coarse = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
    parts = [(first, rows.copy()) for first, rows in on_grid(iter([(0, coarse)]), (20, 30), (60, 90))]
    assert max(rows.shape[1] for _, rows in parts) == 7
    assert [first for first, _ in parts] == list(range(0, 60, 7))
    np.testing.assert_allclose(np.concatenate([rows for _, rows in parts], axis=1), resample_whole(coarse, (60, 90)), atol=1e-5)
