import math
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.config import NormalisationConfig, Plan
from microtome.errors import DataError
from microtome.geometry import affine_from_spacing
from microtome.images.image import Image
from microtome.preprocess import BLOCK_VALUES, crop_box, grid_shape, normalise, voxel_size

IMAGE = NormalisationConfig()


def plan_of(spacing_mm: tuple[float, ...], dims: int) -> Plan:
    names: Any = ("nothing", "cell")
    values: dict[str, Any] = {"dims": dims, "patch_vox": (8,) * dims, "spacing_mm": spacing_mm}
    return Plan(channels=1, classes=names, batch=1, steps=1, **values)


# the grid


def test_a_network_of_sections_never_mixes_them() -> None:
    assert grid_shape((7, 20, 20), (3.0, 1.0, 1.0), plan_of((1.0, 2.0, 2.0), dims=2)) == (7, 10, 10)
    assert grid_shape((7, 20, 20), (3.0, 1.0, 1.0), plan_of((1.0, 2.0, 2.0), dims=3)) == (21, 10, 10)
    assert grid_shape((20, 20), (1.0, 1.0), plan_of((2.0, 2.0), dims=2)) == (10, 10)


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


def test_a_volume_of_many_blocks_has_mean_0_and_sd_1_and_no_copy_in_float64() -> None:
    size = 20 * BLOCK_VALUES + 17
    array = np.random.default_rng(0).normal(30000, 5, (1, size)).astype(np.float32)
    tracemalloc.start()
    result = normalise(array, IMAGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wanted = (array - np.float32(array.mean(dtype=np.float64))) / np.float32(array.std(dtype=np.float64))
    np.testing.assert_allclose(result, wanted, rtol=1e-6)
    # The result, a mask of what is finite, and blocks.
    assert peak < (4 + 1) * size + 32 * BLOCK_VALUES


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
