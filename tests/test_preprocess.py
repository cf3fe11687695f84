import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from microtome.config import NormalisationConfig, Plan
from microtome.errors import DataError
from microtome.geometry import affine_from_spacing
from microtome.images.image import Image
from microtome.preprocess import (
    apply_along,
    crop_box,
    grid_shape,
    normalise,
    resample,
    resample_labels,
    resampling_matrix,
    voxel_size,
)
from tests.oracles import dense_matrix, resample_whole

IMAGE = NormalisationConfig()
sizes = st.integers(1, 40)


def plan_of(spacing_mm: tuple[float, ...], dims: int) -> Plan:
    names: Any = ("nothing", "cell")
    values: dict[str, Any] = {"dims": dims, "patch_vox": (8,) * dims, "spacing_mm": spacing_mm}
    return Plan(channels=1, classes=names, batch=1, steps=1, **values)


# resampling


@given(sizes, sizes)
@settings(max_examples=120, deadline=None)
def test_a_resampling_matrix_is_the_dense_one_and_its_rows_sum_to_one(size: int, new_size: int) -> None:
    matrix = resampling_matrix(size, new_size)
    assert matrix.shape == (new_size, size)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.toarray(), dense_matrix(size, new_size), atol=1e-6)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert (matrix.data > 0).all()


@given(sizes)
@settings(max_examples=20, deadline=None)
def test_the_same_size_is_the_identity(size: int) -> None:
    np.testing.assert_array_equal(resampling_matrix(size, size).toarray(), np.eye(size))


@given(sizes, sizes, st.floats(-1e3, 1e3))
@settings(max_examples=60, deadline=None)
def test_a_constant_stays_itself(size: int, new_size: int, value: float) -> None:
    result = resampling_matrix(size, new_size) @ np.full(size, value, np.float32)
    np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)


@given(st.integers(8, 60), st.integers(4, 60))
@settings(max_examples=60, deadline=None)
def test_a_ramp_stays_a_ramp_of_the_same_edges_away_from_the_border(size: int, new_size: int) -> None:
    factor = size / new_size
    centres = (np.arange(new_size) + 0.5) * factor - 0.5
    result = resampling_matrix(size, new_size) @ np.arange(size, dtype=np.float32)
    reach = max(factor, 1.0)
    interior = (centres - reach >= 0) & (centres + reach <= size - 1)
    # The sampled triangle of a width that is no whole number is not quite even about its centre.
    allowed = 1e-4 if factor <= 1 else 0.5
    np.testing.assert_allclose(result[interior], centres[interior], atol=allowed)
    assert (np.diff(result) > -1e-4).all()


@given(st.integers(4, 30), st.sampled_from([2, 3, 4]))
@settings(max_examples=20, deadline=None)
def test_a_ramp_shrunk_by_a_whole_number_stays_exact_away_from_the_border(new_size: int, factor: int) -> None:
    result = resampling_matrix(new_size * factor, new_size) @ np.arange(new_size * factor, dtype=np.float32)
    centres = (np.arange(new_size) + 0.5) * factor - 0.5
    np.testing.assert_allclose(result[1:-1], centres[1:-1], rtol=1e-5)


@given(st.lists(st.integers(1, 12), min_size=2, max_size=3).map(tuple), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_enlarging_agrees_with_torch_everywhere(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    new = tuple(data.draw(st.integers(n, 3 * n)) for n in shape)
    image = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    wanted = interpolate(torch.from_numpy(image)[None], size=new, mode=mode, align_corners=False)[0].numpy()
    # Torch places samples in float32: an error of 1e-6 of a voxel, times the jumps of white noise.
    np.testing.assert_allclose(resample(image, new), wanted, atol=1e-4)


@pytest.mark.parametrize("new", [(23, 17), (31, 49), (64, 20), (16, 25)])
def test_shrinking_agrees_with_torch_away_from_the_border(new: tuple[int, int]) -> None:
    image = np.random.default_rng(0).normal(size=(1, 64, 50)).astype(np.float32)
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


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.data())
@settings(max_examples=40, deadline=None)
def test_axis_after_axis_is_the_whole_at_once(shape: tuple[int, ...], data: st.DataObject) -> None:
    new = tuple(data.draw(st.integers(1, 12)) for _ in shape)
    image = np.random.default_rng(1).normal(size=(2, *shape))
    result = resample(image, new)
    assert result.dtype == np.float32
    assert result.shape == (2, *new)
    np.testing.assert_allclose(result, resample_whole(image, new), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_matrix_is_applied_to_one_axis(axis: int) -> None:
    array = np.random.default_rng(2).normal(size=(4, 5, 6)).astype(np.float32)
    result = apply_along(resampling_matrix(array.shape[axis], 7), array, axis)
    wanted = np.moveaxis(np.tensordot(dense_matrix(array.shape[axis], 7), array, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(result, wanted, atol=1e-5)
    assert result.flags.c_contiguous


def test_a_network_of_sections_never_mixes_them() -> None:
    assert grid_shape((7, 20, 20), (3.0, 1.0, 1.0), plan_of((1.0, 2.0, 2.0), dims=2)) == (7, 10, 10)
    assert grid_shape((7, 20, 20), (3.0, 1.0, 1.0), plan_of((1.0, 2.0, 2.0), dims=3)) == (21, 10, 10)
    assert grid_shape((20, 20), (1.0, 1.0), plan_of((2.0, 2.0), dims=2)) == (10, 10)


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


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_each_voxel_gets_the_value_that_covers_most_of_it(seed: int) -> None:
    labels = np.random.default_rng(seed).integers(-1, 3, (6, 7)).astype(np.int16)
    result = resample_labels(labels, (4, 11))
    shares = {value: resample_whole((labels == value)[None].astype(float), (4, 11))[0] for value in range(-1, 3)}
    most = np.max(list(shares.values()), axis=0)
    for value, share in shares.items():
        assert (share[result == value] >= most[result == value] - 1e-6).all()


def test_enlarged_labels_are_repeated() -> None:
    labels = np.array([[-1, 5], [2, 2]], np.int16)
    np.testing.assert_array_equal(resample_labels(labels, (6, 6)), labels.repeat(3, axis=0).repeat(3, axis=1))
    np.testing.assert_array_equal(resample_labels(labels, (2, 2)), labels)


# grey values


@given(st.integers(0, 999), st.sampled_from(["uint8", "int16", "uint16", "int32", "uint64", "float16", "float32", "float64", ">i2", ">f4"]))
@settings(max_examples=60, deadline=None)
def test_every_type_comes_out_with_mean_0_and_sd_1_for_each_channel(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    array = (rng.normal(size=(2, 9, 8)) * [[[20]], [[3]]] + 60).clip(0, 120).astype(dtype)
    result = normalise(array, IMAGE)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(1, 2)), 1, atol=1e-5)
    order = np.argsort(array[0].ravel(), kind="stable")
    assert (np.diff(result[0].ravel()[order]) >= 0).all()


def test_the_given_array_is_left_alone() -> None:
    array = np.array([[[1.0, np.nan, 3.0]]], np.float32)
    before = array.copy()
    normalise(array, IMAGE)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_finite_number_becomes_the_mean_of_the_rest(bad: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = normalise(np.array([[[2.0, bad, 4.0]], [[1.0, 2.0, 3.0]]]), IMAGE)
    np.testing.assert_allclose(result[0, 0], np.array([-1, 0, 1]) / math.sqrt(2 / 3), rtol=1e-6)
    np.testing.assert_allclose(result[1, 0], np.array([-1, 0, 1]) / math.sqrt(2 / 3), rtol=1e-6)


def test_a_channel_without_a_finite_number_becomes_zero() -> None:
    assert not normalise(np.full((1, 3, 3), np.nan), IMAGE).any()


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.integers(1, 400))
@settings(max_examples=80, deadline=None)
def test_a_constant_channel_becomes_zero(value: float, count: int) -> None:
    assert not normalise(np.full((1, count, 3), value, np.float32), IMAGE).any()


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_whatever_the_values_the_result_is_finite(values: list[float]) -> None:
    assert np.isfinite(normalise(np.array([[values]], np.float32), IMAGE)).all()


def test_values_of_the_dataset_are_clipped_shifted_and_scaled_a_channel_at_a_time() -> None:
    config = NormalisationConfig(kind="dataset", low=(0.0, -100.0), high=(10.0, 100.0), mean=(5.0, 0.0), sd=(2.0, 50.0))
    result = normalise(np.array([[[-7, 5, 99]], [[-200, 0, 25]]], np.int16), config)
    np.testing.assert_allclose(result, [[[-2.5, 0, 2.5]], [[-2, 0, 0.5]]])


def test_a_dataset_without_spread_is_only_shifted() -> None:
    config = NormalisationConfig(kind="dataset", low=(0.0,), high=(9.0,), mean=(5.0,), sd=(0.0,))
    np.testing.assert_allclose(normalise(np.array([[[5, 7]]]), config), [[[0, 2]]])


# boxes


@given(st.integers(1, 30), st.floats(-50, 50), st.floats(0, 20))
@settings(max_examples=100, deadline=None)
def test_a_crop_box_lies_inside_and_holds_the_range_with_a_voxel_to_spare(size: int, low: float, length: float) -> None:
    (box,) = crop_box((size,), (low,), (low + length,))
    assert 0 <= box.start < box.stop <= size
    for index in range(size):
        if low - 1 <= index <= low + length + 1:
            assert box.start <= index < box.stop


def test_a_crop_box_computed_by_hand() -> None:
    assert crop_box((10, 10, 10), (2.5, -3.0, 40.0), (4.2, 1.0, 50.0)) == (slice(1, 7), slice(0, 3), slice(9, 10))


# the size of a voxel


def picture(spacing_mm: tuple[float, ...], *, known: bool) -> Image:
    array = np.zeros((1, *[4] * len(spacing_mm)))
    affine = affine_from_spacing(spacing_mm)
    return Image(array=array, spacing_mm=spacing_mm, affine=affine, axes="CYX", path=Path("a.tif"), format="tiff", spacing_known=known)


def test_a_voxel_is_as_large_as_stated_else_as_its_file_says_else_as_assumed() -> None:
    plan = plan_of((2.0, 2.0), 2)
    assert voxel_size(picture((1.0, 3.0), known=True), plan) == (1.0, 3.0)
    assert voxel_size(picture((1.0, 1.0), known=False), plan) == (1.0, 1.0)
    assumed = plan.model_copy(update={"assumed_spacing_mm": (4.0, 4.0)})
    assert voxel_size(picture((1.0, 1.0), known=False), assumed) == (4.0, 4.0)
    assert voxel_size(picture((1.0, 3.0), known=True), assumed) == (1.0, 3.0)
    stated = assumed.model_copy(update={"stated_spacing_mm": (5.0, 5.0)})
    assert voxel_size(picture((1.0, 3.0), known=True), stated) == (5.0, 5.0)


@pytest.mark.parametrize("spacing_mm", [(0.0005, 0.0005), (1000.0, 1000.0)])
def test_a_size_that_can_only_be_a_mistake_of_unit_is_refused_by_name(spacing_mm: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"a\.tif: expected voxels about as large as the plan's"):
        voxel_size(picture(spacing_mm, known=True), plan_of((1.0, 1.0), 2))


def test_sections_of_a_stack_may_lie_at_any_distance() -> None:
    image = picture((50.0, 1.0, 1.0), known=True)
    assert voxel_size(image, plan_of((1.0, 1.0, 1.0), 2)) == (50.0, 1.0, 1.0)
