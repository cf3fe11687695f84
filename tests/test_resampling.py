import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from skimage.transform import resize
from torch.nn.functional import interpolate

from microtome import preprocess
from microtome.plan import choose_interpolation
from microtome.preprocess import Resampler, apply_bands, resample, resample_labels, resampling_bands
from tests.oracles import cubic_matrix, dense_matrix, resample_whole

sizes = st.integers(1, 40)
kinds = st.sampled_from(["linear", "cubic"])
# Any less, and a cubic kernel is wider than a voxel.
STILL_EXACT = 4 / 3


def whole_matrix(size: int, new_size: int, kind: Any = "linear", rows: int = preprocess.BAND_ROWS) -> np.ndarray:
    """All bands in one matrix (new_size, size)."""
    matrix = np.zeros((new_size, size), np.float32)
    for band in resampling_bands(size, new_size, kind, rows=rows):
        matrix[band.first : band.last, band.low : band.high] = band.weights
    return matrix


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# matrices


@given(sizes, sizes, kinds, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_bands_are_the_dense_matrix_and_its_rows_sum_to_one(size: int, new_size: int, kind: str, rows: int) -> None:
    matrix = whole_matrix(size, new_size, kind, rows)
    wanted = (cubic_matrix if kind == "cubic" else dense_matrix)(size, new_size)
    np.testing.assert_allclose(matrix, wanted, atol=1e-6)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


@given(sizes, sizes, st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_bands_hold_each_row_once_and_no_column_of_zeros_at_their_ends(size: int, new_size: int, rows: int) -> None:
    bands = resampling_bands(size, new_size, rows=rows)
    assert [band.first for band in bands] == list(range(0, new_size, rows))
    assert bands[-1].last == new_size
    for band in bands:
        assert band.weights.dtype == np.float32
        assert 0 <= band.low < band.high <= size
        assert band.weights[:, 0].any()
        assert band.weights[:, -1].any()


@given(sizes, kinds)
@settings(max_examples=40, deadline=None)
def test_the_same_size_is_the_identity(size: int, kind: str) -> None:
    np.testing.assert_allclose(whole_matrix(size, size, kind), np.eye(size), atol=1e-7)


@given(sizes, sizes, st.floats(-1e3, 1e3), kinds)
@settings(max_examples=60, deadline=None)
def test_a_constant_stays_itself(size: int, new_size: int, value: float, kind: Any) -> None:
    result = resample(np.full((1, size), value, np.float32), (new_size,), kind)
    np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)


@given(st.integers(8, 60), st.integers(4, 60))
@settings(max_examples=60, deadline=None)
def test_a_ramp_stays_a_ramp_of_the_same_edges_away_from_the_border(size: int, new_size: int) -> None:
    factor = size / new_size
    centres = (np.arange(new_size) + 0.5) * factor - 0.5
    result = resample(np.arange(size)[None], (new_size,))[0]
    reach = max(factor, 1.0)
    interior = (centres - reach >= 0) & (centres + reach <= size - 1)
    # The sampled triangle of a width that is no whole number is not quite even about its centre.
    allowed = 1e-4 if factor <= 1 else 0.5
    np.testing.assert_allclose(result[interior], centres[interior], atol=allowed)
    assert (np.diff(result) > -1e-4).all()


@given(st.integers(40, 80), st.integers(30, 160))
@settings(max_examples=60, deadline=None)
def test_a_cubic_ramp_is_exact_away_from_the_border(size: int, new_size: int) -> None:
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    result = resample(np.arange(size)[None], (new_size,), "cubic")[0]
    # The border's kink rings on as 0.27 to the power of the distance; a widened kernel is even about its centre only nearly.
    allowed = 1e-4 if size / new_size < STILL_EXACT else 0.05
    reach = 8 * max(1.0, size / new_size)
    interior = (centres > reach) & (centres < size - 1 - reach)
    np.testing.assert_allclose(result[interior], centres[interior], atol=allowed)


@given(st.integers(4, 30), st.sampled_from([2, 3, 4]))
@settings(max_examples=20, deadline=None)
def test_a_ramp_shrunk_by_a_whole_number_stays_exact_away_from_the_border(new_size: int, factor: int) -> None:
    result = resample(np.arange(new_size * factor)[None], (new_size,))[0]
    centres = (np.arange(new_size) + 0.5) * factor - 0.5
    np.testing.assert_allclose(result[1:-1], centres[1:-1], rtol=1e-5)


def test_a_cubic_kernel_widens_without_a_jump() -> None:
    widths = [preprocess._stretch(factor, "cubic") for factor in np.linspace(0.5, 4, 701)]
    assert widths[0] == 1
    assert preprocess._stretch(STILL_EXACT, "cubic") == pytest.approx(1)
    assert preprocess._stretch(1.5, "cubic") == pytest.approx(1.5)
    assert widths[-1] == 4
    assert np.diff(widths).min() >= 0
    assert np.diff(widths).max() < 0.02


# arrays


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """2D and 3D shapes, some axes of one voxel, and others that SciPy's spline without averaging reaches from there."""
    shape = tuple(draw(st.integers(1, 40)) for _ in range(draw(st.sampled_from([2, 3]))))
    return shape, tuple(draw(st.integers(-(-3 * n // 4), 2 * n + 3)) for n in shape)


@given(grids(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_cubic_agrees_with_scipy_everywhere(grid: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    shape, new = grid
    image = noise((1, *shape), seed)
    factors = [m / n for n, m in zip(shape, new, strict=True)]
    wanted = zoom(image[0].astype(float), factors, order=3, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resample(image, new, "cubic")[0], np.clip(wanted, image.min(), image.max()), atol=1e-5)


@pytest.mark.parametrize(("shape", "new"), [((40, 35), (33, 61)), ((20, 31, 16), (16, 25, 13)), ((16, 25, 13), (20, 31, 16))])
def test_cubic_agrees_with_the_resize_of_scikit_image_overshoot_and_all(shape: tuple[int, ...], new: tuple[int, ...]) -> None:
    image = noise((2, *shape), seed=1)
    image[1] = image[1] > 0
    wanted = np.stack([resize(channel, new, order=3, mode="edge", anti_aliasing=False) for channel in image])
    result = resample(image, new, "cubic")
    np.testing.assert_allclose(result, wanted, atol=1e-5)
    # Without the limits a spline through 0 and 1 overshoots both.
    assert result[1].min() == 0
    assert result[1].max() == 1


@pytest.mark.parametrize("factor", [1.5, 2, 3])
def test_what_cannot_be_shown_is_averaged_and_what_can_is_kept(factor: float) -> None:
    size = 240
    new = round(size / factor)
    places, middle = np.arange(size), slice(new // 4, -(new // 4))
    centres = (np.arange(new) + 0.5) * factor - 0.5
    finest = 0.5 / factor
    waves = np.stack([np.cos(2 * np.pi * share * finest * places) for share in (1.3, 0.6)])
    # Far from the middle, so that the limits of the overshoot are none here.
    waves[:, 0], waves[:, -1] = 2, -2
    wanted = np.cos(2 * np.pi * 0.6 * finest * centres)
    cubic, linear = (resample(waves, (new,), kind)[:, middle] for kind in ("cubic", "linear"))
    assert np.abs(cubic[0]).max() < 0.25
    assert np.abs(cubic[1] - wanted[middle]).max() < 0.06
    # Linear averaging lets as much through, and takes far more away.
    assert np.abs(linear[1] - wanted[middle]).max() > 0.2


@given(st.lists(st.integers(1, 12), min_size=2, max_size=3).map(tuple), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_linear_enlarging_agrees_with_torch_everywhere(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    new = tuple(data.draw(st.integers(n, 3 * n)) for n in shape)
    image = noise((2, *shape), seed)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    wanted = interpolate(torch.from_numpy(image)[None], size=new, mode=mode, align_corners=False)[0].numpy()
    # Torch places samples in float32: an error of 1e-6 of a voxel, times the jumps of white noise.
    np.testing.assert_allclose(resample(image, new), wanted, atol=1e-4)


@pytest.mark.parametrize("new", [(23, 17), (31, 49), (64, 20), (16, 25)])
def test_linear_shrinking_agrees_with_torch_away_from_the_border(new: tuple[int, int]) -> None:
    image = noise((1, 64, 50))
    wanted = interpolate(torch.from_numpy(image)[None], size=new, mode="bilinear", align_corners=False, antialias=True)[0].numpy()
    result = resample(image, new)
    # At the border torch leaves out samples that are not there, and we repeat the last one that is.
    inner = tuple(slice(0, None) if n == m else slice(2, -2) for n, m in zip((64, 50), new, strict=True))
    np.testing.assert_allclose(result[(0, *inner)], wanted[(0, *inner)], atol=1e-4)
    assert np.abs(result - wanted).max() < 0.6


def test_values_computed_by_hand() -> None:
    np.testing.assert_allclose(resample(np.array([[[0.0, 4.0]]]), (1, 4)), [[[0, 1, 3, 4]]])
    np.testing.assert_allclose(resample(np.array([[[0.0, 0.0, 8.0, 0.0]]]), (1, 2)), [[[1, 3]]])
    np.testing.assert_allclose(resample(np.array([[[1.0, 2.0, 6.0]]]), (2, 1)), [[[3.0], [3.0]]])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.data(), kinds)
@settings(max_examples=60, deadline=None)
def test_axis_after_axis_is_the_whole_at_once(shape: tuple[int, ...], data: st.DataObject, kind: Any) -> None:
    new = tuple(data.draw(st.integers(1, 12)) for _ in shape)
    image = np.random.default_rng(1).normal(size=(2, *shape))
    result = resample(image, new, kind)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, resample_whole(image, new, kind), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_an_image_that_keeps_its_shape_keeps_every_bit(kind: Any) -> None:
    image = noise((2, 7, 5))
    assert resample(image, (7, 5), kind) is image
    # An axis that stays is not multiplied by a matrix either.
    alone = resample(image[:, :, :1], (7, 4), kind)
    np.testing.assert_array_equal(alone, image[:, :, :1].repeat(4, axis=2))


@given(st.sampled_from([1, 30, 700, 1 << 19]), st.sampled_from([40, 1 << 18]), kinds)
@settings(max_examples=20, deadline=None)
def test_how_much_is_done_at_a_time_changes_nothing(values: int, products: int, kind: Any) -> None:
    image = noise((2, 45, 20, 17))
    new = (70, 13, 31)
    resampler = Resampler(image.shape[1:], new, 2, kind, values=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "SERIAL_PRODUCTS", products)
        rows = [resampler(band, image[:, band.low : band.high]).copy() for band in resampler.rows]
    assert max(part.shape[1] for part in rows) <= preprocess.MOST_ROWS
    whole = np.concatenate(rows, axis=1)
    low, high = image.min(axis=(1, 2, 3), keepdims=True), image.max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(whole.clip(low, high), resample(image, new, kind), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_a_matrix_is_applied_to_one_axis(axis: int) -> None:
    array = noise((4, 5, 6), seed=2)
    shape = list(array.shape)
    shape[axis] = 7
    result = apply_bands(resampling_bands(array.shape[axis], 7), array, axis, np.empty(shape, np.float32))
    wanted = np.moveaxis(np.tensordot(dense_matrix(array.shape[axis], 7), array, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("new", [(200, 130, 130), (120, 80, 90)])
def test_memory_holds_input_output_and_some_rows(kind: Any, new: tuple[int, ...]) -> None:
    image = noise((1, 160, 110, 110))
    # Whole volumes between two axes would be another 8 to 14 MB each.
    assert peak_bytes(lambda: resample(image, new, kind)) < 4 * np.prod(new) + 7e6


# labels


@given(st.lists(st.integers(1, 10), min_size=2, max_size=3).map(tuple), st.integers(0, 99), st.data())
@settings(max_examples=50, deadline=None)
def test_labels_keep_their_values_and_what_is_not_annotated(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    values = np.array([-1, 0, 3, 300], np.int16)
    labels = np.random.default_rng(seed).choice(values, shape)
    new = tuple(data.draw(st.integers(1, 14)) for _ in shape)
    result = resample_labels(labels, new)
    assert result.shape == new
    assert result.dtype == np.int16
    assert set(np.unique(result)) <= set(np.unique(labels))
    for value in np.unique(labels):
        assert (resample_labels(np.full_like(labels, value), new) == value).all()


@given(st.integers(0, 99), st.sampled_from([(4, 11), (12, 14), (3, 21), (5, 5)]))
@settings(max_examples=40, deadline=None)
def test_each_voxel_gets_the_value_that_covers_most_of_it_and_the_lowest_of_equals(seed: int, new: tuple[int, int]) -> None:
    labels = np.random.default_rng(seed).integers(-1, 3, (6, 7)).astype(np.int16)
    shares = np.stack([resample_whole((labels == value)[None].astype(float), new)[0] for value in range(-1, 3)])
    # Equal to ten digits: in float64 they differ by less, and by more where they are not equal.
    np.testing.assert_array_equal(resample_labels(labels, new), shares.round(10).argmax(axis=0) - 1)


def test_enlarged_labels_are_repeated() -> None:
    labels = np.array([[-1, 5], [2, 2]], np.int16)
    np.testing.assert_array_equal(resample_labels(labels, (6, 6)), labels.repeat(3, axis=0).repeat(3, axis=1))
    np.testing.assert_array_equal(resample_labels(labels, (2, 2)), labels)


# plans


def test_a_new_plan_is_cubic_and_says_whether_training_images_are_touched() -> None:
    one: Any = SimpleNamespace(spacing_mm=(1.0, 1.0), spacing_varies=False)
    many: Any = SimpleNamespace(spacing_mm=(1.0, 1.0), spacing_varies=True)
    kept, coarser, mixed = (
        choose_interpolation(data, spacing) for data, spacing in ((one, (1.0, 1.0)), (one, (2.0, 2.0)), (many, (1.0, 1.0)))
    )
    assert {kept[0], coarser[0], mixed[0]} == {"cubic"}
    assert "one voxel size" in kept[1]
    assert coarser == mixed != kept
