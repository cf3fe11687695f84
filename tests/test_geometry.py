import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.geometry import (
    affine_from_spacing,
    anisotropy,
    format_shape,
    resampled_shape,
    same_grid,
    spacing_of,
)

spacings = st.floats(1e-3, 1e3)
sizes = st.integers(1, 60)


@st.composite
def affines(draw: st.DrawFn, dims: int = 3) -> np.ndarray:
    """A rotated, shifted, scaled (and perhaps mirrored) affine."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    turn, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    affine = np.eye(dims + 1)
    affine[:-1, :-1] = turn * np.array([draw(spacings) for _ in range(dims)])
    affine[:-1, -1] = rng.normal(size=dims) * 100
    return affine


@given(st.lists(spacings, min_size=2, max_size=3).map(tuple))
@settings(max_examples=30, deadline=None)
def test_spacing_comes_back_from_its_affine(spacing: tuple[float, ...]) -> None:
    assert spacing_of(affine_from_spacing(spacing)) == pytest.approx(spacing)


@given(st.tuples(sizes, sizes), st.tuples(spacings, spacings), st.tuples(spacings, spacings))
@settings(max_examples=60, deadline=None)
def test_a_resampled_shape_covers_the_extent_to_half_a_voxel(
    shape: tuple[int, ...], spacing: tuple[float, ...], new: tuple[float, ...]
) -> None:
    for size, old, step, result in zip(shape, spacing, new, resampled_shape(shape, spacing, new), strict=True):
        assert result == 1 if size * old < 0.5 * step else abs(result * step - size * old) <= 0.5001 * step
        assert result >= 1


def test_resampled_shapes_computed_by_hand() -> None:
    assert resampled_shape((10, 20, 20), (3.0, 1.0, 1.0), (1.0, 1.0, 2.0)) == (30, 20, 10)
    assert resampled_shape((1, 1), (0.1, 0.1), (5.0, 5.0)) == (1, 1)
    with pytest.raises(ValueError, match="zip"):
        resampled_shape((4, 4), (1.0, 1.0), (1.0, 1.0, 1.0))


@given(affines(), st.tuples(sizes, sizes, sizes))
@settings(max_examples=40, deadline=None)
def test_a_grid_is_itself_and_not_one_shifted_by_a_fifth_of_a_voxel(affine: np.ndarray, shape: tuple[int, ...]) -> None:
    shifted = affine.copy()
    shifted[0, -1] += 0.2 * min(spacing_of(affine))
    nearly = affine.copy()
    nearly[0, -1] += 0.01 * min(spacing_of(affine))
    assert same_grid(affine, affine, shape)
    assert not same_grid(affine, shifted, shape)
    assert same_grid(affine, nearly, shape)
    assert same_grid(affine, shifted, shape, tolerance_vox=0.3)


def test_a_small_error_of_spacing_adds_up_over_a_large_volume() -> None:
    a, b = affine_from_spacing((1.0, 1.0)), affine_from_spacing((1.0, 1.001))
    assert same_grid(a, b, (10, 10))
    assert not same_grid(a, b, (10, 1000))


def test_a_grid_of_which_nothing_is_known_is_no_ones() -> None:
    assert not same_grid(affine_from_spacing((1.0, 1.0)), np.full((3, 3), np.nan), (4, 4))


def test_words_for_shapes_and_ratios() -> None:
    assert format_shape((96, 160, 160)) == "96×160×160"
    assert anisotropy((2.5, 0.5, 0.5)) == 5
    assert math.isclose(anisotropy((0.7, 0.7)), 1)
