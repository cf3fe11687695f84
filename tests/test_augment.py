"""Augmentation: a record applied twice gives the same; image and label move together; splines, rotations and blur against SciPy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.interpolate import BSpline

from microtome.config import AugmentConfig
from microtome.training.intensity import Intensity, draw_intensity, draw_other, match_histogram
from microtome.training.store import quantiles
from microtome.training.warp import Bend, Patch, Warp, bspline_weights, draw_warp, keys_weights, resample_patch
from tests.small import NOTHING

ALWAYS: dict[str, Any] = {name: 1.0 for name in AugmentConfig.model_fields if name.endswith("_p")}
EVERYTHING_2D = AugmentConfig(flip_axes=(0, 1), rotation_deg=(180,), elastic_spacing=(8, 8), elastic_sd=(1, 1), **ALWAYS)
EVERYTHING_3D = AugmentConfig(
    flip_axes=(0, 1, 2), rotation_deg=(180.0, 30.0, 30.0), elastic_spacing=(6.0, 8.0, 8.0), elastic_sd=(0.5, 1.0, 1.0), **ALWAYS
)


def but(config: AugmentConfig, **changes: Any) -> AugmentConfig:
    """The config with some settings changed, checked."""
    return AugmentConfig(**{**config.model_dump(), **changes})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(seed: int = 0, shape: tuple[int, ...] = (2, 24, 30)) -> torch.Tensor:
    """(C, *S) of mean 0 and sd 1."""
    return torch.from_numpy(rng(seed).normal(size=shape).astype(np.float32))


def warped(warp: Warp, image: torch.Tensor, label: torch.Tensor, patch: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The patch in the middle of an image."""
    centre = (np.array(label.shape) - 1) / 2
    moved = resample_patch(Patch(image, label), warp.coordinates(centre, patch or tuple(label.shape)))
    return moved.image.numpy(), moved.label.numpy()


# ---- spatial ----


@pytest.mark.parametrize("shape", [(24, 30), (8, 12, 10)])
def test_drawing_nothing_gives_the_crop_back(shape: tuple[int, ...]) -> None:
    image, label = picture(shape=(2, *shape)), torch.from_numpy(rng(1).integers(-1, 3, shape).astype(np.int16))
    warp = draw_warp(rng(), NOTHING, shape, (1.0,) * len(shape))
    assert np.array_equal(warp.matrix, np.eye(len(shape)))
    assert warp.bend is None
    moved, moved_label = warped(warp, image, label)
    assert np.abs(moved - image.numpy()).max() < 1e-5
    assert np.array_equal(moved_label, label.numpy())


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(7, 9, 5), (8, 12, 10)])
def test_a_flip_is_numpy_s_flip(axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    image, label = picture(shape=(1, *shape)), torch.from_numpy(rng(1).integers(-1, 3, shape).astype(np.int16))
    matrix = np.diag([-1.0 if axis in axes else 1.0 for axis in range(3)])
    moved, moved_label = warped(Warp(matrix), image, label)
    assert np.abs(moved - np.flip(image.numpy(), [axis + 1 for axis in axes])).max() < 1e-5
    assert np.array_equal(moved_label, np.flip(label.numpy(), axes))


def test_each_axis_that_may_flips_half_of_the_time_and_no_other() -> None:
    config = but(NOTHING, flip_axes=(1,))
    signs = np.array([np.diag(draw_warp(rng(seed), config, (8, 8), (1.0, 1.0)).matrix) for seed in range(400)])
    assert (signs[:, 0] == 1).all()
    assert set(signs[:, 1]) == {-1.0, 1.0}
    assert abs((signs[:, 1] == -1).mean() - 0.5) < 0.1


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_rotations_keep_distances_in_mm_however_anisotropic_the_voxels(seed: int) -> None:
    spacing = np.array([3.0, 0.7, 0.5])
    config = but(NOTHING, rotation_deg=(180.0, 180.0, 180.0), rotation_p=1.0)
    matrix = draw_warp(rng(seed), config, (8, 16, 16), tuple(spacing)).matrix
    in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
    assert np.allclose(in_mm.T @ in_mm, np.eye(3), atol=1e-12)
    assert np.linalg.det(in_mm) == pytest.approx(1)
    assert not np.allclose(matrix, np.eye(3))


def test_rotation_angles_keep_to_their_limits_and_axes() -> None:
    config = but(NOTHING, rotation_deg=(40.0, 0.0, 0.0), rotation_p=1.0)
    matrices = [draw_warp(rng(seed), config, (8, 8, 8), (1.0, 1.0, 1.0)).matrix for seed in range(200)]
    assert all(np.allclose(m[0], [1, 0, 0]) and np.allclose(m[:, 0], [1, 0, 0]) for m in matrices)
    angles = np.rad2deg([np.arctan2(m[2, 1], m[1, 1]) for m in matrices])
    assert 30 < np.abs(angles).max() <= 40
    assert angles.min() < -30 < 30 < angles.max()


def test_a_quarter_turn_is_numpy_s_rot90() -> None:
    image, label = picture(shape=(1, 9, 9)), torch.from_numpy(rng(1).integers(0, 3, (9, 9)).astype(np.int16))
    moved, moved_label = warped(Warp(np.array([[0.0, -1.0], [1.0, 0.0]])), image, label)
    turned = [np.rot90(image.numpy()[0], k) for k in (1, 3)]
    match = [np.abs(moved[0] - other).max() < 1e-5 for other in turned]
    assert sum(match) == 1
    assert np.array_equal(moved_label, np.rot90(label.numpy(), (1, 3)[match.index(True)]))


def test_magnification_by_2_shows_the_middle_half_twice_as_large() -> None:
    config = but(NOTHING, scale=(2.0, 2.0), scale_p=1.0)
    matrix = draw_warp(rng(), config, (8, 8), (1.0, 1.0)).matrix
    assert np.allclose(matrix, np.eye(2) / 2)
    label = torch.zeros(21, 21, dtype=torch.int16)
    label[8:13, 8:13] = 1
    _, moved = warped(Warp(matrix), picture(shape=(1, 21, 21)), label)
    # 5 voxels cover 2 x 5 - 1 or 2 x 5 + 1 sampling points, as the rounding of halves goes.
    assert 81 <= moved.sum() <= 121


def test_scales_are_as_often_below_1_as_above() -> None:
    config = but(NOTHING, scale=(0.5, 2.0), scale_p=1.0)
    scales = 1 / np.array([draw_warp(rng(seed), config, (8, 8), (1.0, 1.0)).matrix[0, 0] for seed in range(300)])
    assert 0.5 <= scales.min() < 0.6
    assert 1.8 < scales.max() <= 2.0
    assert abs((scales > 1).mean() - 0.5) < 0.1


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_magnification_is_the_same_along_every_axis_however_anisotropic_the_voxels(seed: int) -> None:
    matrix = draw_warp(rng(seed), but(NOTHING, scale_p=1.0), (8, 16, 16), (3.0, 1.0, 1.0)).matrix
    assert np.allclose(matrix, matrix[0, 0] * np.eye(3))
    assert 0.8 <= 1 / matrix[0, 0] <= 1.25


# ---- elastic ----


def bend_of(config: AugmentConfig, patch: tuple[int, ...], seed: int = 0) -> Bend:
    """What a config draws where the deformation is certain."""
    bend = draw_warp(rng(seed), but(config, elastic_p=1.0), patch, (1.0,) * len(patch)).bend
    assert bend is not None
    return bend


def field_of(bend: Bend, patch: tuple[int, ...]) -> np.ndarray:
    """Displacement (D, *patch) of each voxel."""
    eye, still = np.eye(len(patch)), np.zeros(len(patch))
    return Warp(eye, bend).coordinates(still, patch) - Warp(eye).coordinates(still, patch)


@pytest.mark.parametrize(("points", "size", "gap"), [(4, 7, 6.0), (6, 32, 10.5), (10, 50, 8.0), (4, 1, 1.0), (4, 2, 1.0)])
def test_the_spline_weights_are_scipy_s(points: int, size: int, gap: float) -> None:
    weights = bspline_weights(points, size, gap)
    # A cubic B-spline that peaks at control point 1 has its knots from -1 to 3, and so on.
    where = 1 + np.arange(size) / gap
    expected = np.stack(
        [np.nan_to_num(BSpline.basis_element(k + np.arange(-2, 3), extrapolate=False)(where)) for k in range(points)], axis=1
    )
    assert np.allclose(weights, expected, atol=1e-12)
    assert np.allclose(weights.sum(1), 1)


def keys(points: np.ndarray, x: float) -> float:
    """Keys' cubic convolution with a = -1/2 of values on whole numbers, those on the edges repeated: the four terms as printed."""
    i = min(int(x), len(points) - 1)
    c = [points[min(max(i + k, 0), len(points) - 1)] for k in (-1, 0, 1, 2)]
    s = x - i
    outer = c[0] * (-(s**3) + 2 * s**2 - s) / 2 + c[3] * (s**3 - s**2) / 2
    return float(outer + c[1] * (3 * s**3 - 5 * s**2 + 2) / 2 + c[2] * (-3 * s**3 + 4 * s**2 + s) / 2)


def test_the_bicubic_weights_are_keys_s() -> None:
    points = rng().normal(size=6)
    places = np.arange(23) / 4.4
    assert keys_weights(6, 23, 4.4) @ points == pytest.approx([keys(points, x) for x in places])


@pytest.mark.parametrize("shape", [(21, 31), (11, 16, 13)])
def test_a_bicubic_field_is_keys_s_along_one_axis_after_the_other(shape: tuple[int, ...]) -> None:
    config = but(NOTHING, elastic_points=(3,) * len(shape), elastic_sd=(10.0,) * len(shape), elastic_kind="bicubic")
    bend = bend_of(config, shape)
    expected = bend.control
    for axis, n in enumerate(shape, start=1):
        places = np.arange(n) / ((n - 1) / 2)
        expected = np.apply_along_axis(lambda line, x=places: np.array([keys(line, value) for value in x]), axis, expected)
    field = field_of(bend, shape)
    assert np.abs(field - expected).max() < 1e-4
    # It passes through the points, which lie on corners, edges and the middle.
    corners = field[(slice(None), *np.ix_(*[(0, n - 1) for n in shape]))]
    assert np.abs(corners - bend.control[(slice(None), *(slice(None, None, 2) for _ in shape))]).max() < 1e-4


def test_a_parabola_is_met_by_the_bicubic_field_away_from_the_edges() -> None:
    points = (np.arange(7.0) - 2) ** 2
    assert keys_weights(7, 31, 5.0)[5:26] @ points == pytest.approx((np.arange(5, 26) / 5.0 - 2) ** 2)


@pytest.mark.parametrize("shape", [(20, 33), (9, 16, 12)])
@pytest.mark.parametrize("across", [False, True])
def test_a_bent_patch_lies_where_scipy_s_spline_says(shape: tuple[int, ...], across: bool) -> None:
    dims = len(shape)
    config = EVERYTHING_2D if dims == 2 else EVERYTHING_3D
    if across:
        config = but(config, elastic_spacing=(), elastic_points=(2, 3, 2)[-dims:])
    warp = draw_warp(rng(3), config, shape, (2.0, 1.0, 1.0)[-dims:])
    assert warp.bend is not None
    centre = np.arange(dims) + 10.25
    where = np.stack(np.meshgrid(*[1 + np.arange(n) / gap for n, gap in zip(shape, warp.bend.gap_vox, strict=True)], indexing="ij"))
    bend = np.stack([ndimage.map_coordinates(layer, where, order=3, prefilter=False, mode="constant") for layer in warp.bend.control])
    offset = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"))
    expected = centre.reshape(-1, *[1] * dims) + np.einsum("ij,j...->i...", warp.matrix, offset + bend)
    assert np.abs(bend).max() > 0.3
    assert np.abs(warp.coordinates(centre, shape) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["bspline", "bicubic"])
def test_control_points_that_agree_shift_the_whole_patch(kind: Any) -> None:
    control = np.broadcast_to(np.array([1.0, -2.0]).reshape(2, 1, 1), (2, 6, 5))
    assert np.allclose(field_of(Bend(control, (4.0, 4.0), kind), (12, 9)), np.array([1.0, -2.0]).reshape(2, 1, 1), atol=1e-5)


def test_control_points_lie_as_far_apart_as_asked_and_move_by_their_sd() -> None:
    config = but(NOTHING, elastic_spacing=(16.0, 4.0), elastic_sd=(3.0, 0.5))
    drawn = [bend_of(config, (64, 62), seed) for seed in range(40)]
    # From voxel 0 to beyond voxels 63 and 61, and one more on both sides.
    assert all((bend.gap_vox, bend.control.shape) == ((16.0, 4.0), (2, 5 + 2, 17 + 2)) for bend in drawn)
    assert np.stack([bend.control for bend in drawn]).std(axis=(0, 2, 3)) == pytest.approx([3.0, 0.5], rel=0.1)


@pytest.mark.parametrize(("kind", "ring"), [("bspline", 2), ("bicubic", 0)])
def test_control_points_cover_the_patch_from_edge_to_edge(kind: str, ring: int) -> None:
    config = but(NOTHING, elastic_points=(2, 3, 1), elastic_sd=(15.0, 15.0, 15.0), elastic_kind=kind)
    bend = bend_of(config, (9, 21, 8))
    assert bend.control.shape == (3, 2 + ring, 3 + ring, 1 + ring)
    assert bend.gap_vox[:2] == (8.0, 10.0)
    field = field_of(bend, (9, 21, 8))
    # One point along X: the whole line moves alike.
    assert np.abs(np.diff(field, axis=3)).max() < 1e-5
    assert np.abs(np.diff(field, axis=1)).max() > 0.5


def test_where_the_sd_is_0_nothing_moves_along_that_axis() -> None:
    config = but(NOTHING, elastic_points=(2, 2, 2), elastic_sd=(0.0, 15.0, 15.0))
    field = field_of(bend_of(config, (8, 10, 12)), (8, 10, 12))
    assert (field[0] == 0).all()
    assert np.abs(field[1:]).max() > 3


@pytest.mark.parametrize("kind", ["bspline", "bicubic"])
def test_thick_sections_bend_like_the_tissue_they_are_cut_from(kind: str) -> None:
    """Spacing (3, 1, 1) mm beside cubes of 1 mm, 31 mm of tissue: the same draw moves the same points by the same millimetres."""
    thick = but(NOTHING, elastic_spacing=(10 / 3, 10.0, 10.0), elastic_sd=(4 / 3, 4.0, 4.0), elastic_kind=kind)
    cubes = but(thick, elastic_spacing=(10.0, 10.0, 10.0), elastic_sd=(4.0, 4.0, 4.0))
    in_mm = field_of(bend_of(thick, (11, 31, 31)), (11, 31, 31)) * np.array([3.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
    assert np.abs(in_mm - field_of(bend_of(cubes, (31, 31, 31)), (31, 31, 31))[:, ::3]).max() < 1e-3
    assert in_mm.std(axis=(1, 2, 3)).min() > 0.5


def test_rotation_scale_and_bend_of_thick_sections_together_are_those_of_tissue() -> None:
    thick = but(NOTHING, elastic_spacing=(10 / 3, 10.0, 10.0), elastic_sd=(4 / 3, 4.0, 4.0), rotation_deg=(180.0,) * 3, **ALWAYS)
    cubes = but(thick, elastic_spacing=(10.0, 10.0, 10.0), elastic_sd=(4.0, 4.0, 4.0))
    sides = np.array([3.0, 1.0, 1.0])
    places = draw_warp(rng(7), thick, (11, 31, 31), (3.0, 1.0, 1.0)).coordinates(np.zeros(3), (11, 31, 31)) * sides.reshape(3, 1, 1, 1)
    expected = draw_warp(rng(7), cubes, (31, 31, 31), (1.0, 1.0, 1.0)).coordinates(np.zeros(3), (31, 31, 31))
    assert np.abs(places - expected[:, ::3]).max() < 1e-3


def test_what_one_movement_is_set_to_does_not_change_the_draws_of_the_others() -> None:
    config = but(EVERYTHING_2D, scale=(2.0, 2.0))
    without = draw_warp(rng(5), but(config, rotation_p=0.0), (32, 32), (1.0, 1.0))
    both = draw_warp(rng(5), config, (32, 32), (1.0, 1.0))
    assert both.bend is not None
    assert without.bend is not None
    assert np.array_equal(both.bend.control, without.bend.control)
    assert not np.allclose(both.matrix, without.matrix)
    unscaled = draw_warp(rng(5), but(config, scale_p=0.0), (32, 32), (1.0, 1.0))
    assert np.allclose(unscaled.matrix, 2 * both.matrix)
    # Only a rotation, of the side that both flipped to, is between them.
    turn = both.matrix @ np.linalg.inv(without.matrix)
    assert np.allclose(turn @ turn.T, np.eye(2))
    assert np.linalg.det(turn) == pytest.approx(1)


# ---- sampling ----


@given(seed=st.integers(0, 10**6), volume=st.booleans())
@settings(max_examples=25, deadline=None)
def test_image_and_label_move_together(seed: int, volume: bool) -> None:
    shape = (20, 24, 22) if volume else (48, 52)
    config, spacing = (EVERYTHING_3D, (2.0, 1.0, 1.0)) if volume else (EVERYTHING_2D, (1.0, 1.0))
    # Broad stripes, the image showing the number of each.
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    label = torch.from_numpy(((axes[0] // 9 + axes[-1] // 9) % 3).astype(np.int16))
    warp = draw_warp(rng(seed), config, shape, spacing)
    moved, moved_label = warped(warp, label[None].float(), label)
    inside = moved_label >= 0
    assert inside.mean() > 0.2
    # Where linear interpolation met one class alone, it shows its number; that is most of the patch.
    clear = inside & (np.abs(moved[0] - np.rint(moved[0])) < 1e-3)
    assert (moved[0][clear].round() == moved_label[clear]).mean() > 0.97
    assert clear.sum() > 0.4 * inside.sum()
    # And it is never further off than the steepest stripe is wide.
    centre = (np.array(shape) - 1) / 2
    source = np.rint(warp.coordinates(centre, shape)).astype(int)
    within = np.all([(line >= 0) & (line < n) for line, n in zip(source, shape, strict=True)], axis=0)
    picked = label.numpy()[tuple(np.clip(line, 0, n - 1) for line, n in zip(source, shape, strict=True))]
    assert (picked == moved_label)[within & inside].mean() > 0.999


def test_outside_the_label_is_not_annotated_and_the_image_a_mirror() -> None:
    image = torch.arange(6.0).repeat(4, 1)[None]
    label = torch.ones(4, 6, dtype=torch.int16)
    moved, moved_label = warped(Warp(np.eye(2)), image, label, patch=(4, 12))
    assert moved[0, 0] == pytest.approx([3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2], abs=1e-5)
    assert moved_label[0].tolist() == [-1] * 3 + [1] * 6 + [-1] * 3


def test_outside_of_a_single_section_is_not_annotated_either() -> None:
    image, label = picture(shape=(1, 1, 6, 6)), torch.ones(1, 6, 6, dtype=torch.int16)
    moved, moved_label = warped(Warp(np.eye(3)), image, label, patch=(5, 6, 6))
    assert (moved_label[2] == 1).all()
    assert (moved_label[[0, 1, 3, 4]] == -1).all()
    assert np.isfinite(moved).all()


def test_weights_are_sampled_on_the_same_grid_and_are_1_outside() -> None:
    label = torch.ones(4, 6, dtype=torch.int16)
    weight = torch.arange(6.0).repeat(4, 1) + 5
    still = Warp(np.eye(2)).coordinates(np.array([1.5, 2.5]), (4, 12))
    moved = resample_patch(Patch(picture(shape=(1, 4, 6)), label, weight), still + np.array([0.0, 0.25], np.float32).reshape(2, 1, 1))
    assert moved.weight is not None
    # A quarter of the way to the next; at the last one to what is outside.
    assert moved.weight[1].tolist() == pytest.approx([1, 1, 2, 5.25, 6.25, 7.25, 8.25, 9.25, 7.75, 1, 1, 1], abs=1e-4)
    section = resample_patch(
        Patch(picture(shape=(1, 1, 4, 6)), label[None], weight[None]), Warp(np.eye(3)).coordinates(np.array([0, 1.5, 2.5]), (3, 4, 6))
    )
    assert section.weight is not None
    assert (section.weight[[0, 2]] == 1).all()
    assert torch.allclose(section.weight[1], weight, atol=1e-4)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_image_and_weight_move_together(seed: int) -> None:
    image = picture(seed, (1, 30, 34))
    label = torch.ones(30, 34, dtype=torch.int16)
    source = draw_warp(rng(seed), EVERYTHING_2D, (30, 34), (1.0, 1.0)).coordinates(np.array([14.5, 16.5]), (30, 34))
    moved = resample_patch(Patch(image, label, image[0]), source)
    inside = torch.from_numpy(np.all([(line >= 0) & (line <= n - 1) for line, n in zip(source, (30, 34), strict=True)], axis=0))
    assert moved.weight is not None
    assert (moved.weight - moved.image[0])[inside].abs().max() < 1e-4


def test_labels_of_any_class_number_survive_and_none_is_invented() -> None:
    label = torch.from_numpy(rng(0).choice(np.array([-1, 0, 7, 255, 3000], np.int16), (30, 30)))
    warp = draw_warp(rng(5), EVERYTHING_2D, (30, 30), (1.0, 1.0))
    _, moved = warped(warp, picture(shape=(1, 30, 30)), label)
    assert set(np.unique(moved)) == {-1, 0, 7, 255, 3000}


# ---- grey values ----


def test_neutral_values_do_nothing() -> None:
    image = picture()
    assert torch.equal(Intensity().apply(image), image)
    assert torch.equal(Intensity(blur_sd=(0.0, 0.1), low_resolution=(1.0, 1.0)).apply(image), image)


def test_of_probability_0_is_never_drawn() -> None:
    for seed in range(30):
        drawn = draw_intensity(rng(seed), NOTHING, (3.0, 1.0, 1.0))
        assert drawn == Intensity(noise_seed=drawn.noise_seed)
        assert draw_other(rng(seed), NOTHING, 0, 5) is None


@pytest.mark.parametrize("sds", [(0.4, 1.7), (1.0, 1.0), (0.0, 1.3), (0.33, 1.0, 1.0)])
def test_blur_is_scipy_s_gaussian_with_mirrored_borders(sds: tuple[float, ...]) -> None:
    image = picture(shape=(2, 24, 30) if len(sds) == 2 else (1, 12, 14, 16))
    expected = image.numpy()
    for axis, sd in enumerate(sds, start=1):
        expected = ndimage.gaussian_filter1d(expected, sd, axis, mode="mirror", radius=max(1, round(3 * sd))) if sd else expected
    assert np.abs(Intensity(blur_sd=sds).apply(image).numpy() - expected).max() < 1e-5


def test_a_blur_that_float32_cannot_tell_from_none_is_left_out() -> None:
    image = picture()
    narrow = ndimage.gaussian_filter1d(image.numpy().astype(np.float64), 0.17, 1, mode="mirror", radius=1)
    assert np.abs(narrow - image.numpy()).max() < 5e-7
    assert not torch.equal(Intensity(blur_sd=(0.25, 0.0)).apply(image), image)


def test_blur_of_an_axis_of_one_voxel_leaves_it() -> None:
    image = picture(shape=(1, 1, 20))
    expected = ndimage.gaussian_filter1d(image.numpy()[0, 0], 1.0, mode="mirror", radius=3)
    assert np.abs(Intensity(blur_sd=(1.0, 1.0)).apply(image).numpy()[0, 0] - expected).max() < 1e-5


def test_blur_and_low_resolution_are_drawn_in_units_of_the_finest_axis() -> None:
    config = but(NOTHING, blur_p=1.0, low_resolution_p=1.0, blur_sd=1.5, low_resolution=4.0)
    factors = []
    for seed in range(60):
        cubes, thick = (draw_intensity(rng(seed), config, spacing) for spacing in ((1.0, 1.0, 1.0), (3.0, 1.0, 0.5)))
        sd, factor = cubes.blur_sd[0], cubes.low_resolution[0]
        assert cubes.blur_sd == (sd, sd, sd)
        # As wide in mm along each axis: that of the finest, 0.5 mm.
        assert np.multiply(thick.blur_sd, (3.0, 1.0, 0.5)) == pytest.approx([0.5 * sd] * 3)
        # The simulated voxels, factor x 0.5 mm, or the axis's own where those are larger.
        assert np.multiply(thick.low_resolution, (3.0, 1.0, 0.5)) == pytest.approx([max(side, factor / 2) for side in (3, 1, 0.5)])
        factors.append(thick.low_resolution)
    assert {row[0] for row in factors} == {1.0}
    assert any(row[1] == 1 for row in factors)
    assert any(row[1] > 1.5 for row in factors)


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_keepsmean_and_sd_of_each_channel_and_bends_the_rest(gamma: float) -> None:
    image = picture() * torch.tensor([1.0, 3.0])[:, None, None] + torch.tensor([0.0, 5.0])[:, None, None]
    changed = Intensity(gamma=gamma).apply(image)
    assert torch.allclose(changed.mean((1, 2)), image.mean((1, 2)), atol=1e-5)
    assert torch.allclose(changed.std((1, 2)), image.std((1, 2)), rtol=1e-4)
    middle = torch.quantile(changed.flatten(1), 0.5, dim=1) - torch.quantile(image.flatten(1), 0.5, dim=1)
    # A power below 1 lifts middle tones.
    assert (middle > 0).all() if gamma < 1 else (middle < 0).all()
    order = image.flatten(1).argsort(1)
    assert (changed.flatten(1).gather(1, order).diff(dim=1) >= 0).all()


def test_gamma_of_the_negative_bends_the_other_way() -> None:
    image = picture()
    changed = Intensity(gamma_inverted=1.5).apply(image)
    assert torch.allclose(-changed, Intensity(gamma=1.5).apply(-image))
    assert (torch.quantile(changed.flatten(1), 0.5, dim=1) > torch.quantile(image.flatten(1), 0.5, dim=1)).all()


def test_gamma_leaves_a_constant_channel_constant() -> None:
    image = torch.full((1, 6, 6), 2.5)
    assert torch.allclose(Intensity(gamma=1.4).apply(image), image)


def test_contrast_and_brightness_scale_and_shift() -> None:
    image = picture()
    assert torch.allclose(Intensity(contrast=1.2, brightness=-0.3).apply(image), 1.2 * image - 0.3)


def test_noise_is_a_function_of_its_seed_and_as_strong_as_asked() -> None:
    image = torch.zeros(1, 100, 100)
    first, again, other = (Intensity(noise_sd=0.1, noise_seed=seed).apply(image) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.1, rel=0.05)


def test_low_resolution_shows_fewer_voxels_on_the_same_grid() -> None:
    image = picture(shape=(1, 32, 32))
    changed = Intensity(low_resolution=(1.0, 2.0)).apply(image)
    assert changed.shape == image.shape
    # Between the 16 points of an axis it is linear: differences hardly change from voxel to voxel.
    assert changed.diff(dim=2).std() < 0.5 * image.diff(dim=2).std()
    # The other axis keeps every row: each is what it would be alone.
    assert torch.allclose(changed[:, 5:6], Intensity(low_resolution=(1.0, 2.0)).apply(image[:, 5:6]), atol=1e-6)
    ramp = torch.arange(32.0).expand(1, 32, 32)
    assert (Intensity(low_resolution=(2.0, 2.0)).apply(ramp) - ramp).abs().max() <= 1


# ---- the histogram of another image ----


def test_a_matched_image_has_the_quantiles_of_the_other() -> None:
    skewed = np.stack([rng(1).gamma(2.0, size=(40, 50)), rng(2).uniform(-1, 1, (40, 50))]).astype(np.float32)
    image = picture(shape=(2, 40, 50))
    matched = match_histogram(image, quantiles(image.numpy()), quantiles(skewed))
    places = np.linspace(0, 1, 100)
    for own, other in zip(matched.numpy(), skewed, strict=True):
        # Between 257 quantiles of 2000 values it is linear, coarsest in the long tail.
        assert np.quantile(own, places) == pytest.approx(np.quantile(other, places), abs=0.15)
        assert np.quantile(own, places)[5:95] == pytest.approx(np.quantile(other, places)[5:95], abs=0.02)
        assert (own.min(), own.max()) == pytest.approx((other.min(), other.max()))
    order = image.flatten(1).argsort(1)
    assert (matched.flatten(1).gather(1, order).diff(dim=1) >= 0).all()


def test_a_histogram_matched_to_itself_stays_even_with_many_equal_values() -> None:
    image = picture(shape=(1, 40, 50)).clamp(min=0.3)
    table = quantiles(image.numpy())
    assert (table[0, :100] == table[0, 0]).all()
    assert torch.allclose(match_histogram(image, table, table), image, atol=1e-5)


def test_equal_values_take_the_highest_of_their_ranks() -> None:
    own = np.array([[0.0, 0.0, 0.0, 1.0, 2.0]])
    other = np.array([[10.0, 20.0, 30.0, 40.0, 60.0]])
    matched = match_histogram(torch.tensor([[-1.0, 0.0, 0.5, 1.5, 2.0, 3.0]]), own, other)
    assert matched[0].tolist() == pytest.approx([10, 30, 35, 50, 60, 60])


def test_every_other_image_is_as_likely_and_an_image_never_its_own() -> None:
    config = but(NOTHING, histogram_p=0.5)
    drawn = [draw_other(rng(seed), config, 1, 4) for seed in range(1200)]
    assert drawn.count(None) / 1200 == pytest.approx(0.5, abs=0.05)
    assert [drawn.count(other) / 1200 for other in range(4)] == pytest.approx([1 / 6, 0, 1 / 6, 1 / 6], abs=0.04)
    assert draw_other(rng(), but(NOTHING, histogram_p=1.0), 0, 1) is None


@pytest.mark.parametrize("config", [EVERYTHING_2D, EVERYTHING_3D])
def test_a_record_applied_twice_gives_the_same(config: AugmentConfig) -> None:
    dims = len(config.elastic_spacing)
    shape = (24, 30) if dims == 2 else (8, 12, 10)
    image, label = picture(shape=(2, *shape)), torch.zeros(shape, dtype=torch.int16)
    warp, intensity = draw_warp(rng(4), config, shape, (1.0,) * dims), draw_intensity(rng(4), config, (1.0,) * dims)
    before = image.clone()
    first, again = (intensity.apply(torch.from_numpy(warped(warp, image, label)[0])) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(image, before)
    assert not torch.allclose(first, image, atol=0.1)


def test_drawing_is_a_function_of_the_generator() -> None:
    first, again, other = (draw_warp(rng(seed), EVERYTHING_2D, (24, 30), (1.0, 1.0)) for seed in (1, 1, 2))
    assert np.array_equal(first.matrix, again.matrix)
    assert first.bend is not None
    assert again.bend is not None
    assert np.array_equal(first.bend.control, again.bend.control)
    assert not np.array_equal(first.matrix, other.matrix)
    assert draw_intensity(rng(1), EVERYTHING_2D, (1.0, 1.0)) == draw_intensity(rng(1), EVERYTHING_2D, (1.0, 1.0))


def test_grey_values_change_as_often_and_as_much_as_the_config_says() -> None:
    ranges = (
        ("blur_sd", (), 0.2, 0.3, 1.0),
        ("low_resolution", (), 0.3, 1, 2),
        ("gamma_inverted", 1, 0.1, 0.7, 1.5),
        ("gamma", 1, 0.4, 0.7, 1.5),
        ("contrast", 1, 0.5, 0.75, 1.25),
        ("brightness", 0, 0.15, -0.3, 0.3),
        ("noise_sd", 0, 0.25, 0, 0.1),
    )
    chances = {f"{name.removesuffix('_sd')}_p": chance for name, _, chance, _, _ in ranges}
    config = AugmentConfig(contrast=0.25, brightness=0.3, gamma=(0.7, 1.5), noise_sd=0.1, blur_sd=1.0, low_resolution=2.0, **chances)
    drawn = [draw_intensity(rng(seed), config, (1.0, 1.0)) for seed in range(1000)]
    for name, neutral, chance, low, high in ranges:
        changed = np.array([np.max(getattr(record, name)) for record in drawn if getattr(record, name) != neutral])
        assert abs(len(changed) / 1000 - chance) < 0.05, name
        assert low <= changed.min() < low + 0.2 * (high - low), name
        assert high - 0.2 * (high - low) < changed.max() <= high, name


def test_one_grey_value_setting_does_not_change_the_draws_of_the_others() -> None:
    always = draw_intensity(rng(3), EVERYTHING_2D, (1.0, 1.0))
    for name, neutral in (("blur", ()), ("low_resolution", ()), ("gamma_inverted", 1.0), ("gamma", 1.0), ("contrast", 1.0), ("noise", 0.0)):
        without = draw_intensity(rng(3), but(EVERYTHING_2D, **{f"{name}_p": 0.0}), (1.0, 1.0))
        field = f"{name}_sd" if name in ("blur", "noise") else name
        assert without == replace(always, **{field: neutral}), name
