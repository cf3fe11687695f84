"""Prediction part by part: any box of a volume is, bit for bit, what the whole has there; and what memory it is promised to take."""

import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome import machine
from microtome.config import NormalisationConfig
from microtome.data.parts import parts_of
from microtome.errors import ConfigError
from microtome.inference import layout as layouts
from microtome.inference.layout import choose_tile
from microtome.inference.predict import Task, Wanted, finished_rows, in_memory, layout_for, predict_whole
from microtome.inference.source import Grey, Source, measure
from microtome.preprocess import grid_shape, normalise, resample
from tests.oracles import mirrored_box, predict_logits_whole
from tests.test_predict import FakeNetwork, plan_of, tasks

Drawn = tuple[np.ndarray, tuple[float, ...], Any, FakeNetwork, int]


class Watched:
    """Pixels that note which rows were read, and how many values at most at once."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.read, self.largest = array, np.zeros(array.shape[1], int), 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def __getitem__(self, part: Any) -> np.ndarray:
        found = self.array[part]
        self.read[part[1]] += 1
        self.largest = max(self.largest, found.size)
        found.flags.writeable = False
        return found


def task_of(drawn: Drawn, wanted: Wanted, bricks: tuple[int, ...] | None = None, **changes: Any) -> Task:
    image, spacing, plan, network, seed = drawn
    volume = in_memory(image)
    layout = layout_for(volume, spacing, plan, network, wanted=wanted, bricks=bricks, **changes)
    grey = Grey(plan.normalisation, measure(volume, layout.shapes.grid, plan))
    engine = network.engine(plan.channels, len(plan.classes), plan.dims, seed)
    return Task(volume=volume, plan=plan, layout=layout, grey=grey, engine=engine, wanted=wanted)


ALL = Wanted(probabilities="float16", uncertainty=True, foreground=0, temperature=1.7)


@given(tasks(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_box_is_what_the_whole_has_there_bit_for_bit(drawn: Drawn, data: st.DataObject) -> None:
    shape = drawn[0].shape[1:]
    bricks = tuple(data.draw(st.integers(1, size)) for size in shape)
    task = task_of(drawn, ALL, bricks)
    whole = predict_whole(task)
    first = data.draw(st.integers(0, -(-shape[0] // bricks[0]) - 1)) * bricks[0]
    past = min(shape[0], first + bricks[0] * data.draw(st.integers(1, 3)))
    row = first
    for start, finished in finished_rows(task, ((first, past), *task.layout.columns[0])):
        assert start == row
        for name, rows in finished.items():
            axis = rows.ndim - len(shape)
            row = start + rows.shape[axis]
            place = (slice(None),) * axis + (slice(start, row), *(slice(a, b) for a, b in task.layout.columns[0]))
            np.testing.assert_array_equal(rows, whole[name][place])
    assert row == past


@given(tasks(), st.data())
@settings(max_examples=60, deadline=None)
def test_columns_change_nothing_and_probabilities_are_those_of_the_whole_at_once(drawn: Drawn, data: st.DataObject) -> None:
    image, spacing, plan, network, _ = drawn
    task = task_of(drawn, ALL)
    edges = tuple(tuple(sorted({0, size, *data.draw(st.lists(st.integers(1, max(1, size - 1)), max_size=2))})) for size in image.shape[2:])
    cut = replace(task, layout=replace(task.layout, edges=edges))
    whole, parts = predict_whole(task), predict_whole(cut)
    logits = predict_logits_whole(
        image, spacing, plan, tile_of=lambda shape: choose_tile(shape, plan, network), context=network.context_vox, engine=task.engine
    )
    chances = np.exp(logits / 1.7 - (logits / 1.7).max(axis=0))
    chances /= chances.sum(axis=0)
    np.testing.assert_allclose(parts["probabilities"], chances, atol=3e-3)
    np.testing.assert_allclose(parts["foreground"] / 255, 1 - chances[0], atol=5e-3)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(chances > 0, chances * np.log(chances), 0).sum(axis=0) / np.log(len(chances))
    np.testing.assert_allclose(parts["uncertainty"] / 255, entropy, atol=8e-3)
    # Where the plane of a column is resampled, products of other widths round otherwise.
    clear = np.diff(np.sort(logits, axis=0)[-2:], axis=0)[0] > 1e-3
    np.testing.assert_array_equal(parts["labels"][clear], whole["labels"][clear])


@given(tasks(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_tile_of_the_source_is_cut_from_the_whole_prepared_image(drawn: Drawn, data: st.DataObject) -> None:
    image, spacing, plan, _, seed = drawn
    rng = np.random.default_rng(seed)
    if data.draw(st.booleans()):
        image = image.astype(np.float32)
        image[rng.random(image.shape) < 0.1] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    channels = plan.channels
    config = data.draw(
        st.sampled_from(
            [
                NormalisationConfig(kind="none"),
                NormalisationConfig(kind="image"),
                NormalisationConfig(
                    kind="dataset", mean=(100.0,) * channels, sd=(40.0,) * channels, low=(10.0,) * channels, high=(200.0,) * channels
                ),
            ]
        )
    )
    plan = plan.model_copy(update={"normalisation": config})
    grid = grid_shape(image.shape[1:], spacing, plan)
    prepared = resample(normalise(image, config), grid, plan.interpolation)
    pixels = Watched(image)
    chunk = tuple(data.draw(st.integers(1, size)) for size in image.shape[1:])
    volume = replace(in_memory(image), pixels=pixels, chunk_vox=chunk)
    grey = Grey(config, measure(volume, grid, plan))
    source = Source(volume, grid, plan, grey, [(0, size) for size in grid[1:]])
    for first in range(-2, grid[0] + 2, 3):
        box = ((first, first + 4), *((-1, size + 2) for size in grid[1:]))
        needed = [min(max(first, 0), max(0, grid[0] - 6))]
        tile = source.tile(box, min(needed[0], 0 if grid[0] < 9 else needed[0]))
        np.testing.assert_allclose(tile, mirrored_box(prepared, box), atol=2e-4, rtol=2e-4)


def test_the_rows_of_other_boxes_are_never_read() -> None:
    image = np.random.default_rng(0).integers(0, 255, (1, 90, 12, 12)).astype(np.uint8)
    network, plan = FakeNetwork(), plan_of(3, (6, 12, 12), normalisation=NormalisationConfig(kind="none"))
    pixels = Watched(image)
    volume = replace(in_memory(image), pixels=pixels)
    layout = layout_for(volume, (1.0,) * 3, plan, network, bricks=(10, 12, 12))
    engine = network.engine(1, 2, 3)
    task = Task(volume=volume, plan=plan, layout=layout, grey=Grey(plan.normalisation, None), engine=engine)
    assert sum(rows["labels"].shape[0] for _, rows in finished_rows(task, ((40, 50), (0, 12), (0, 12)))) == 10
    assert pixels.read[:30].sum() == pixels.read[60:].sum() == 0
    assert pixels.read[40:50].tolist() == [1] * 10


def test_reading_goes_on_in_another_thread_and_its_error_comes_out() -> None:
    names = set()

    class Broken(Watched):
        def __getitem__(self, part: Any) -> np.ndarray:
            names.add(threading.current_thread().name.partition("_")[0])
            if part[1].stop > 40:
                raise OSError("gone")
            return super().__getitem__(part)

    image = np.zeros((1, 90, 12, 12), np.uint8)
    network, plan = FakeNetwork(), plan_of(3, (6, 12, 12), normalisation=NormalisationConfig(kind="none"))
    volume = replace(in_memory(image), pixels=Broken(image))
    layout = layout_for(volume, (1.0,) * 3, plan, network)
    task = Task(volume=volume, plan=plan, layout=layout, grey=Grey(plan.normalisation, None), engine=network.engine(1, 2, 3))
    with pytest.raises(OSError, match="gone"):
        list(finished_rows(task, ((0, 90), (0, 12), (0, 12))))
    assert names == {"reading"}


@given(st.lists(st.integers(1, 30), min_size=2, max_size=3), st.integers(1, 400), st.data())
@settings(max_examples=80, deadline=None)
def test_parts_make_up_the_volume_once_and_keep_to_chunks(sides: list[int], most: int, data: st.DataObject) -> None:
    shape = tuple(sides)
    chunk = tuple(data.draw(st.integers(1, 12)) for _ in shape)
    seen = np.zeros(shape, int)
    for box in parts_of(shape, chunk, most):
        seen[box] += 1
        assert all(part.start % side == 0 for part, side in zip(box, chunk, strict=True))
        # At most as asked for, or one chunk.
        assert seen[box].size <= max(most, np.prod([min(c, n) for c, n in zip(chunk, shape, strict=True)]))
    assert (seen == 1).all()


# memory


def test_columns_are_cut_when_one_slab_is_too_much_and_the_promise_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MARGIN_BYTES", 2**20)
    classes, shape = 40, (48, 128, 128)
    plan = plan_of(3, (16, 32, 32)).model_copy(update={"classes": tuple(map(str, range(classes)))})
    answer = np.random.default_rng(0).normal(size=(classes, 16, 32, 32)).astype(np.float32)
    volume, network = in_memory(np.zeros((1, *shape), np.uint8)), FakeNetwork()
    grey = Grey(NormalisationConfig(kind="none"), None)
    whole: np.ndarray | None = None
    for limit, columns in ((None, 1), (40_000_000, 2), (20_000_000, 8)):
        layout = layout_for(volume, (1.0,) * 3, plan, network, limit_bytes=limit, bricks=(16, 32, 32))
        assert len(layout.columns) == columns
        assert f"in {columns} columns" in layout.words or columns == 1
        task = Task(volume=volume, plan=plan, layout=layout, grey=grey, engine=lambda image_CS: answer.copy())
        labels = np.empty(shape, np.uint8)
        tracemalloc.start()
        for box in layout.boxes():
            for first, finished in finished_rows(task, box):
                rows = finished["labels"]
                labels[(slice(first, first + len(rows)), *(slice(a, b) for a, b in box[1:]))] = rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert limit is None or peak < limit
        # The estimate is no fantasy either.
        assert 0.35 * layout.peak_bytes < peak < layout.peak_bytes
        whole = labels if whole is None else whole
        np.testing.assert_array_equal(labels, whole)


def test_a_memory_that_is_too_small_is_refused_with_the_least_that_is_not() -> None:
    plan = plan_of(3, (16, 32, 32)).model_copy(update={"classes": tuple(map(str, range(40)))})
    volume, network = in_memory(np.zeros((1, 96, 128, 128), np.uint8)), FakeNetwork()
    with pytest.raises(ConfigError, match=r"the least that it takes is 0\.0") as caught:
        layout_for(volume, (1.0,) * 3, plan, network, limit_bytes=10_000_000, bricks=(16, 32, 32))
    least = float(str(caught.value).split("takes is ")[1].split(" GB")[0])
    layout_for(volume, (1.0,) * 3, plan, network, limit_bytes=round(least * 1e9 + 1e7), bricks=(16, 32, 32))


def test_tiles_of_a_petabyte_are_counted_without_a_list_of_them() -> None:
    plan = plan_of(3, (64, 128, 128))
    shape = (100_000, 100_000, 100_000)
    pixels = np.broadcast_to(np.zeros((), np.uint8), (1, *shape))
    layout = layout_for(in_memory(pixels), (1.0,) * 3, plan, FakeNetwork(), bricks=(64, 128, 128))
    assert layout.peak_bytes < 2**31
    assert len(layout.shapes.tiles(((500, 600), (0, 128), (0, 128)))) < 100


def test_of_two_tiles_that_fit_the_one_that_computes_less_is_taken() -> None:
    # A grown tile is as wide as the plane: in narrow columns it is computed for each of them.
    plan = plan_of(3, (8, 32, 32)).model_copy(update={"classes": tuple(map(str, range(40))), "batch": 16})
    volume, network = in_memory(np.zeros((1, 96, 128, 128), np.uint8)), FakeNetwork()
    small = layout_for(volume, (1.0,) * 3, plan.model_copy(update={"batch": 1}), network, limit_bytes=10**10)
    assert layout_for(volume, (1.0,) * 3, plan, network, limit_bytes=10**10).shapes.tile_vox != small.shapes.tile_vox
    chosen = [layout_for(volume, (1.0,) * 3, plan, network, limit_bytes=limit * 10**6) for limit in range(110, 400, 20)]
    for layout in chosen:
        rival = layout_for(
            volume, (1.0,) * 3, plan.model_copy(update={"batch": 1}), network, limit_bytes=max(layout.peak_bytes, 110 * 10**6)
        )
        if rival.peak_bytes <= layout.peak_bytes:
            assert computed(layout) <= computed(rival)


def computed(layout: layouts.Layout) -> int:
    return layout.tile_count() * int(np.prod(layout.shapes.tile_vox))


def test_tiles_of_all_columns_are_counted_along_each_axis() -> None:
    plan = plan_of(3, (8, 32, 32))
    layout = layout_for(in_memory(np.zeros((1, 96, 128, 130), np.uint8)), (1.0,) * 3, plan, FakeNetwork())
    cut = replace(layout, edges=((0, 40, 128), (0, 32, 100, 130)))
    assert layouts.Cost(cut).all_boxes(cut) == cut.tile_count() > layout.tile_count()


def test_a_chunk_too_large_to_be_kept_does_not_narrow_the_columns() -> None:
    plan = plan_of(3, (32, 128, 128))
    pixels = np.broadcast_to(np.zeros((), np.uint8), (1, 4096, 512, 512))
    volume = replace(in_memory(pixels), chunk_vox=(4096, 512, 1))
    assert len(layout_for(volume, (1.0,) * 3, plan, FakeNetwork()).columns) == 1


def test_memory_is_known_where_the_kernel_keeps_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < machine.resident_bytes() <= machine.resident_bytes(most=True)
    status = tmp_path / "status"
    monkeypatch.setattr(machine, "_STATUS", status)
    assert machine.resident_bytes(most=True) == 0
    status.write_text("Name:\tpython\nVmRSS:\t    12 kB\n", encoding="ascii")
    assert machine.resident_bytes(most=True) == machine.resident_bytes() == 12 * 1024
