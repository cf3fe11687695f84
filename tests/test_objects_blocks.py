"""Objects numbered in blocks against SciPy and scikit-image on the whole: the same arrays, whatever the blocks."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from microtome.errors import RunError
from microtome.inference import objects as module
from microtome.inference.objects import label_blocks, renumber, values_at
from microtome.tiling import blocks_of

SHAPES = st.one_of(
    hnp.array_shapes(min_dims=1, max_dims=1, max_side=20),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=14),
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=8),
)


@st.composite
def volumes(draw: st.DrawFn, elements: tuple[int, ...] = (0, 0, 0, 1, 1)) -> tuple[np.ndarray, tuple[int, ...]]:
    """Random values, many of them 0, and the sides of blocks, some larger than the volume."""
    shape = draw(SHAPES)
    # The generator's seed is drawn, not every voxel: full-sized noise is what joins pieces over and over again.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    block = tuple(draw(st.integers(1, size + 2)) for size in shape)
    return rng.choice(np.array(elements, np.int16), shape), block


def in_raster_order(labels: np.ndarray) -> np.ndarray:
    """The same objects, numbered by their first voxels, one after the other."""
    numbers: dict[int, int] = {0: 0}
    return np.array([numbers.setdefault(int(label), len(numbers)) for label in labels.ravel()]).reshape(labels.shape)


def spiral(side: int) -> np.ndarray:
    """One path, a voxel wide, that turns inward with a voxel between its turns: the hardest object to join."""
    mask = np.zeros((side, side), bool)
    place, step = np.array([0, 0]), np.array([0, 1])
    mask[0, 0] = True
    for length in [side - 1, *itertools.chain.from_iterable((n, n) for n in range(side - 1, 1, -2))]:
        for _ in range(length):
            place = place + step
            mask[tuple(place)] = True
        step = np.array([step[1], -step[0]])
    return mask


@given(volumes(), st.integers(1, 3), st.sampled_from([np.uint32, np.uint64]))
@settings(max_examples=150, deadline=None)
def test_a_mask_in_blocks_is_numbered_as_the_whole(
    volume: tuple[np.ndarray, tuple[int, ...]], connectivity: int, dtype: type[np.unsignedinteger]
) -> None:
    values, block = volume
    connectivity = min(connectivity, values.ndim)
    mask = values > 0
    expected, count = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity))
    # What is in it before must not matter.
    out = np.full(mask.shape, 77, dtype)
    objects = label_blocks(lambda box: mask[box], mask.shape, out, block, connectivity=connectivity)
    assert len(objects) == count
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out, skimage_label(mask, connectivity=connectivity))
    assert objects.sizes_vox.tolist() == np.bincount(expected.ravel(), minlength=count + 1)[1:].tolist()
    assert [[(s.start, s.stop) for s in box] for box in ndimage.find_objects(expected)] == [
        [tuple(side) for side in box] for box in objects.boxes_vox.tolist()
    ]


@given(volumes(elements=(-1, 0, 0, 1, 1, 2, 2, 900)), st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_objects_of_different_values_that_touch_stay_apart(volume: tuple[np.ndarray, tuple[int, ...]], connectivity: int) -> None:
    values, block = volume
    connectivity = min(connectivity, values.ndim)
    out = np.zeros(values.shape, np.uint32)
    objects = label_blocks(lambda box: values[box], values.shape, out, block, connectivity=connectivity)
    # Where an axis has one voxel scikit-image numbers in another order.
    expected = in_raster_order(skimage_label(np.maximum(values, 0), connectivity=connectivity, background=0))
    np.testing.assert_array_equal(out, expected)
    assert [int(values[out == number][0]) for number in range(1, len(objects) + 1)] == objects.values.tolist()
    assert (out > 0).sum() == objects.sizes_vox.sum()


@pytest.mark.parametrize("block", [(1, 1), (3, 50), (7, 5), (50, 50)])
def test_a_spiral_is_one_object_in_any_blocks(block: tuple[int, int]) -> None:
    mask = spiral(31)
    assert ndimage.label(mask)[1] == 1
    out = np.zeros(mask.shape, np.uint32)
    objects = label_blocks(lambda box: mask[box], mask.shape, out, block)
    assert len(objects) == 1
    np.testing.assert_array_equal(out, mask)
    assert objects.boxes_vox.tolist() == [[[0, 31], [0, 31]]]


@pytest.mark.parametrize("connectivity", [1, 2, 3])
def test_objects_that_meet_at_a_corner_of_blocks_are_joined_as_asked(connectivity: int) -> None:
    for corner in itertools.product((0, 1), repeat=3):
        mask = np.zeros((4, 4, 4), bool)
        mask[1, 1, 1] = mask[tuple(1 + c for c in corner)] = True
        out = np.zeros(mask.shape, np.uint32)
        objects = label_blocks(lambda box, mask=mask: mask[box], mask.shape, out, (2, 2, 2), connectivity=connectivity)
        assert len(objects) == (1 if sum(corner) <= connectivity else 2)


def test_nothing_is_numbered_where_nothing_is(tmp_path: Path) -> None:
    out = np.memmap(tmp_path / "out", np.uint32, "w+", shape=(5, 6))
    objects = label_blocks(lambda box: np.zeros((5, 6), bool)[box], (5, 6), out, (2, 4))
    assert (len(objects), objects.boxes_vox.shape, out.any()) == (0, (0, 2, 2), False)


def test_numbers_that_do_not_fit_are_refused_and_not_wrapped_around() -> None:
    mask = np.zeros((32, 32), bool)
    mask[::2, ::2] = True
    with pytest.raises(RunError, match=r"at most 255 pieces, got 256 or more"):
        label_blocks(lambda box: mask[box], mask.shape, np.zeros(mask.shape, np.uint8), (32, 32))
    mask[0, 0] = False
    assert len(label_blocks(lambda box: mask[box], mask.shape, np.zeros(mask.shape, np.uint8), (32, 32))) == 255


class Watched:
    """An array that notes the largest box that is asked for and how often a box is."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.largest, self.reads = array, 0, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        part = self.array[box]
        self.largest, self.reads = max(self.largest, part.size), self.reads + 1
        return part.copy()

    def __setitem__(self, box: tuple[slice, ...], values: np.ndarray) -> None:
        self.largest = max(self.largest, math.prod(side.stop - side.start for side in box))
        self.array[box] = values


def test_no_more_than_a_block_is_touched_at_a_time() -> None:
    rng = np.random.default_rng(1)
    mask = Watched(ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 2) > 0.02)
    out = Watched(np.zeros(mask.shape, np.uint32))
    objects = label_blocks(lambda box: mask[box], mask.shape, out, (8, 8, 8), connectivity=3)
    assert mask.reads == 125
    assert max(mask.largest, out.largest) <= 8**3
    np.testing.assert_array_equal(out.array, ndimage.label(mask.array, np.ones((3, 3, 3)))[0])
    properties = regionprops(out.array)
    assert [p.area for p in properties] == objects.sizes_vox.tolist()
    assert [p.bbox for p in properties] == [(*box[:, 0], *box[:, 1]) for box in objects.boxes_vox]


def test_rows_are_listed_a_few_at_a_time_with_the_same_first_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(2).random((30, 7, 5)) > 0.6
    expected = ndimage.label(mask)[0]
    monkeypatch.setattr(module, "MOST_LISTED", 80)
    for block in [(30, 7, 5), (11, 4, 2)]:
        out = np.zeros(mask.shape, np.uint32)
        label_blocks(lambda box: mask[box], mask.shape, out, block)
        np.testing.assert_array_equal(out, expected)


@given(volumes(elements=(0, 3, 5, 9)), st.integers(0, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_values_at_places_are_those_of_the_whole(volume: tuple[np.ndarray, tuple[int, ...]], count: int, seed: int) -> None:
    values, block = volume
    places = np.random.default_rng(seed).integers(0, values.size, count)
    np.testing.assert_array_equal(values_at(values, places, block), values.ravel()[places])


@given(volumes(elements=(0, 1, 2, 3)))
@settings(max_examples=40, deadline=None)
def test_blocks_partition_the_volume_and_renumbering_reaches_all_of_it(volume: tuple[np.ndarray, tuple[int, ...]]) -> None:
    values, block = volume
    times = np.zeros(values.shape, int)
    for box in blocks_of(values.shape, block):
        times[box] += 1
    assert (times == 1).all()
    out = values.astype(np.uint32)
    renumber(out, np.array([0, 30, 20, 10]), block)
    np.testing.assert_array_equal(out, np.array([0, 30, 20, 10])[values])
