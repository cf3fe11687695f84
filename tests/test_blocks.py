"""Missing bricks shared among workers: each once, in blocks that let all of them end about as soon as can be."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.inference import stored
from microtome.inference.bricks import Bricks, Record
from microtome.inference.layout import Layout, Shapes
from microtome.inference.slabs import Box


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts without resampling, of any tiles, bricks and columns."""
    shape = tuple(draw(st.integers(1, most)) for most in (400, 60, 60))
    tile = tuple(draw(st.integers(1, 40)) for _ in shape)
    brick = tuple(draw(st.integers(least, 30)) for least in (1, 5, 5))
    overlap = draw(st.sampled_from([0.0, 0.25, 0.5]))
    shapes = Shapes(shape_vox=shape, grid=shape, tile_vox=tile, context_vox=(0, 0, 0), overlap=overlap, channels=1, layers=2)
    edges = tuple((*range(0, size, 3 * side), size) for size, side in zip(shape[1:], brick[1:], strict=True))
    return Layout(shapes=shapes, edges=edges, brick=brick, peak_bytes=1)


class Unmarked(Bricks):
    """Bricks of which some are marked, without a store."""

    def __init__(self, layout: Layout, marked: set[str]) -> None:
        self.record = Record(request={}, engine="torch", layout=layout, moments=None)
        self.shape, self.depth = layout.shapes.shape_vox, layout.brick[0]
        self.documents = type("Marked", (), {"marked": lambda self, prefix="": {mark for mark in marked if mark.startswith(prefix)}})()


@given(layouts(), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_are_the_missing_bricks_once_and_end_about_as_soon_as_can_be(layout: Layout, slots: int, data: st.DataObject) -> None:
    names = [f"{column}.{row}" for column in range(len(layout.columns)) for row in range(-(-layout.shapes.shape_vox[0] // layout.brick[0]))]
    marked = set(data.draw(st.lists(st.sampled_from(names), max_size=4)))
    bricks = Unmarked(layout, marked)
    boxes = stored.blocks(bricks, slots)
    found = [mark for box in boxes for mark, _ in bricks.bricks_of(box)]
    assert sorted(found) == sorted(set(names) - marked)
    assert bricks.done() == (len(marked), len(names))

    cost = stored.Cost(layout)

    def ends(boxes: list[Box]) -> float:
        return stored.makespan([cost(box) for box in boxes], slots)

    depth = stored.MOST_DEPTHS * layout.shapes.tile_vox[0]
    assert all(box[0][1] - box[0][0] < depth + layout.brick[0] for box in boxes)
    # No number of bricks a block is much better: a row of tiles at most, where there are few.
    if boxes:
        best = min(ends(bricks.missing(size)) for size in range(1, 1 + max(1, math.ceil(depth / layout.brick[0]))))
        row = max(cost(((0, 1), *column)) for column in layout.columns)
        assert ends(boxes) <= 1.15 * best + row


@given(layouts(), st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_are_counted_without_listing_them(layout: Layout, data: st.DataObject) -> None:
    box = data.draw(st.sampled_from(Unmarked(layout, set()).missing(data.draw(st.integers(1, 5)))))
    assert stored.Cost(layout)(box) == layout.tiles_of(box)


@pytest.mark.parametrize(("costs", "slots", "end"), [([3, 3, 3], 2, 6), ([4, 2, 1, 1], 2, 4), ([5], 3, 5), ([1] * 1000, 2, 501)])
def test_whoever_is_free_takes_the_next_block(costs: list[int], slots: int, end: float) -> None:
    assert stored.makespan(costs, slots) == end


def test_blocks_of_ten_terabytes_are_found_in_seconds() -> None:
    shape = (10_000, 32_768, 32_768)
    shapes = Shapes(shape_vox=shape, grid=shape, tile_vox=(64, 128, 128), context_vox=(0,) * 3, overlap=0.5, channels=1, layers=3)
    edges = tuple((*range(0, size, 1024), size) for size in shape[1:])
    bricks = Unmarked(Layout(shapes=shapes, edges=edges, brick=(64, 128, 128), peak_bytes=1), set())
    boxes = stored.blocks(bricks, 1000)
    assert 4000 < len(boxes) < 200_000
    assert sum(stored.voxels_of(box) for box in boxes) == math.prod(shape)
