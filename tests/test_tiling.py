import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.tiling import Tile, blend_weights, cover, read_mirrored, starts
from tests.oracles import mirrored_box

overlaps = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])


@st.composite
def covers(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[Tile]]:
    """(shape, tile, context, tiles) in 1 to 3 axes."""
    dims = draw(st.integers(1, 3))
    most = {1: 200, 2: 40, 3: 14}[dims]
    shape, tile = (tuple(draw(st.integers(1, most)) for _ in range(dims)) for _ in range(2))
    context = tuple(draw(st.integers(0, 5)) for _ in range(dims))
    # A large overlap of many axes has thousands of tiles.
    overlap = draw(overlaps if dims == 1 else st.sampled_from([0.0, 0.25, 0.5]))
    return shape, tile, context, cover(shape, tile, overlap=overlap, context_vox=context)


def inside(box: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(max(a, 0), min(b, n)) for (a, b), n in zip(box, shape, strict=True))


@given(covers())
@settings(max_examples=80, deadline=None)
def test_writes_are_the_image_once_and_blends_cover_it(
    made: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[Tile]],
) -> None:
    shape, tile, context, tiles = made
    written, blended = np.zeros(shape, int), np.zeros(shape, int)
    for part in tiles:
        # Slices of a box outside of the image would not be counted.
        assert all(0 <= a < b <= n for (a, b), n in zip(part.write, shape, strict=True))
        written[tuple(slice(a, b) for a, b in part.write)] += 1
        blended[inside(part.blend, shape)] += 1
        for axis in range(len(shape)):
            (read, blend, write), border = (box[axis] for box in (part.read, part.blend, part.write)), context[axis]
            assert blend[0] <= write[0] < write[1] <= blend[1]
            assert (blend[0] - border, blend[1] + border) == read
            assert blend[1] - blend[0] == tile[axis]
            assert shape[axis] < tile[axis] or 0 <= blend[0] <= blend[1] <= shape[axis]
    assert (written == 1).all()
    assert (blended >= 1).all()


@given(covers())
@settings(max_examples=40, deadline=None)
def test_tiles_come_in_the_order_of_the_slowest_axis(
    made: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[Tile]],
) -> None:
    firsts = [tuple(a for a, _ in part.blend) for part in made[-1]]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) == len(firsts)


@given(st.integers(1, 500), st.integers(1, 100), overlaps)
@settings(max_examples=150, deadline=None)
def test_tiles_overlap_at_least_as_asked_are_evenly_spread_and_as_few_as_can_be(size: int, tile: int, overlap: float) -> None:
    first = starts(size, tile, overlap)
    steps = np.diff(first)
    if size <= tile:
        assert len(first) == 1
        # In the middle, to a voxel.
        assert abs(-first[0] - (tile - size - -first[0])) <= 1
        return
    assert first[0] == 0
    assert first[-1] == size - tile
    assert steps.max() - steps.min() <= 1
    assert steps.min() >= 1
    # Tiles move on by one voxel at least, whatever overlap was asked.
    allowed = max(1, math.floor(tile * (1 - overlap) + 1e-9))
    assert steps.max() <= allowed
    assert (len(first) - 2) * allowed < size - tile


def test_tiles_computed_by_hand() -> None:
    tiles = cover((10,), (4,), overlap=0.25, context_vox=(2,))
    assert [part.blend for part in tiles] == [((0, 4),), ((3, 7),), ((6, 10),)]
    assert [part.write for part in tiles] == [((0, 3),), ((3, 6),), ((6, 10),)]
    assert [part.read for part in tiles] == [((-2, 6),), ((1, 9),), ((4, 12),)]
    assert cover((3,), (8,)) == [Tile(read=((-2, 6),), blend=((-2, 6),), write=((0, 3),))]


def test_sizes_of_other_numbers_of_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        cover((10, 10), (4,))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mirrored_box_is_that_of_a_padded_array(data: st.DataObject) -> None:
    dims, lead = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    shape = tuple(data.draw(st.sampled_from([1, 1, 2, 3, 5, 8])) for _ in range(lead + dims))
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    box = []
    for _ in range(dims):
        first = data.draw(st.integers(-30, 30))
        box.append((first, first + data.draw(st.integers(1, 20))))
    # The oracle can only cut what its padding reaches.
    result = read_mirrored(array, tuple(box))
    np.testing.assert_array_equal(result, mirrored_box(array, tuple(box)))
    assert result.dtype == np.float32
    assert result.flags.c_contiguous


def test_mirroring_computed_by_hand() -> None:
    array = np.array([10, 11, 12])
    assert read_mirrored(array, ((-5, 8),)).tolist() == [11, 10, 11, 12, 11, 10, 11, 12, 11, 10, 11, 12, 11]
    assert read_mirrored(np.array([7]), ((-3, 4),)).tolist() == [7] * 7
    assert read_mirrored(array, ((100, 103),)).tolist() == [10, 11, 12]


@pytest.mark.parametrize("box", [((0, 4), (0, 5)), ((1, 3), (0, 5)), ((-1, 4), (0, 6))])
def test_a_box_is_a_copy_whatever_its_place(box: tuple[tuple[int, int], ...]) -> None:
    array = np.zeros((4, 5))
    read_mirrored(array, box)[:] = 1
    assert not array.any()


def test_a_box_of_a_mapped_file_may_be_written_to() -> None:
    array = np.zeros((1, 4))
    array.flags.writeable = False
    assert read_mirrored(array, ((0, 4),)).flags.writeable


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3).map(tuple))
@settings(max_examples=40, deadline=None)
def test_blend_weights_are_largest_in_the_middle_even_and_nowhere_zero(tile: tuple[int, ...]) -> None:
    weights = blend_weights(tile)
    assert weights.shape == tile
    assert weights.dtype == np.float32
    assert weights.max() == 1
    assert weights.min() >= np.float32(1e-3)
    assert weights[tuple(n // 2 for n in tile)] == 1
    for axis in range(len(tile)):
        np.testing.assert_allclose(np.flip(weights, axis), weights, rtol=1e-6)


def test_blend_weights_are_a_gaussian_of_an_eighth_of_the_side() -> None:
    weights = blend_weights((17,))
    assert weights[8] == 1
    assert weights[8 + 4] == pytest.approx(math.exp(-((4 / (17 / 8)) ** 2) / 2), rel=1e-6)
    assert weights[0] == pytest.approx(1e-3)
