"""Augmentation: a record applied twice gives the same; image and label move together; splines, rotations and blur against SciPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.interpolate import BSpline

from microtome.config import AugmentConfig
from microtome.training.augment import Intensity, Warp, bspline_basis, draw_intensity, draw_warp, resample_patch

NOTHING = AugmentConfig(rotation_p=0, scale_p=0, elastic_p=0, intensity_p=0)
EVERYTHING_2D = AugmentConfig(
    flip_axes=(0, 1),
    rotation_deg=(180,),
    elastic_spacing=(8, 8),
    elastic_sd=(1, 1),
    rotation_p=1,
    scale_p=1,
    elastic_p=1,
    intensity_p=1,
)
EVERYTHING_3D = EVERYTHING_2D.model_copy(
    update={"flip_axes": (0, 1, 2), "rotation_deg": (180.0, 30.0, 30.0), "elastic_spacing": (6.0, 8.0, 8.0), "elastic_sd": (0.5, 1.0, 1.0)}
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(seed: int = 0, shape: tuple[int, ...] = (2, 24, 30)) -> torch.Tensor:
    """(C, *S) of mean 0 and sd 1."""
    return torch.from_numpy(rng(seed).normal(size=shape).astype(np.float32))


def warped(warp: Warp, image: torch.Tensor, label: torch.Tensor, patch: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The patch in the middle of an image."""
    centre = (np.array(label.shape) - 1) / 2
    moved, moved_label = resample_patch(image, label, warp.coordinates(centre, patch or tuple(label.shape)))
    return moved.numpy(), moved_label.numpy()


# ---- spatial ----


@pytest.mark.parametrize("shape", [(24, 30), (8, 12, 10)])
def test_drawing_nothing_gives_the_crop_back(shape: tuple[int, ...]) -> None:
    image, label = picture(shape=(2, *shape)), torch.from_numpy(rng(1).integers(-1, 3, shape).astype(np.int16))
    warp = draw_warp(rng(), NOTHING, shape, (1.0,) * len(shape))
    assert np.array_equal(warp.matrix, np.eye(len(shape)))
    assert warp.control is None
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
    config = NOTHING.model_copy(update={"flip_axes": (1,)})
    signs = np.array([np.diag(draw_warp(rng(seed), config, (8, 8), (1.0, 1.0)).matrix) for seed in range(400)])
    assert (signs[:, 0] == 1).all()
    assert set(signs[:, 1]) == {-1.0, 1.0}
    assert abs((signs[:, 1] == -1).mean() - 0.5) < 0.1


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_rotations_keep_distances_in_mm_however_anisotropic_the_voxels(seed: int) -> None:
    spacing = np.array([3.0, 0.7, 0.5])
    config = NOTHING.model_copy(update={"rotation_deg": (180.0, 180.0, 180.0), "rotation_p": 1.0})
    matrix = draw_warp(rng(seed), config, (8, 16, 16), tuple(spacing)).matrix
    in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
    assert np.allclose(in_mm.T @ in_mm, np.eye(3), atol=1e-12)
    assert np.linalg.det(in_mm) == pytest.approx(1)
    assert not np.allclose(matrix, np.eye(3))


def test_rotation_angles_keep_to_their_limits_and_axes() -> None:
    config = NOTHING.model_copy(update={"rotation_deg": (40.0, 0.0, 0.0), "rotation_p": 1.0})
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
    config = NOTHING.model_copy(update={"scale": (2.0, 2.0), "scale_p": 1.0})
    matrix = draw_warp(rng(), config, (8, 8), (1.0, 1.0)).matrix
    assert np.allclose(matrix, np.eye(2) / 2)
    label = torch.zeros(21, 21, dtype=torch.int16)
    label[8:13, 8:13] = 1
    _, moved = warped(Warp(matrix), picture(shape=(1, 21, 21)), label)
    # 5 voxels cover 2 x 5 - 1 or 2 x 5 + 1 sampling points, as the rounding of halves goes.
    assert 81 <= moved.sum() <= 121


def test_scales_are_as_often_below_1_as_above() -> None:
    config = NOTHING.model_copy(update={"scale": (0.5, 2.0), "scale_p": 1.0})
    scales = 1 / np.array([draw_warp(rng(seed), config, (8, 8), (1.0, 1.0)).matrix[0, 0] for seed in range(300)])
    assert 0.5 <= scales.min() < 0.6
    assert 1.8 < scales.max() <= 2.0
    assert abs((scales > 1).mean() - 0.5) < 0.1


@pytest.mark.parametrize(("points", "size"), [(4, 7), (5, 32), (9, 50), (4, 1), (4, 2)])
def test_the_spline_basis_is_scipy_s(points: int, size: int) -> None:
    basis = bspline_basis(points, size)
    # A cubic B-spline that peaks at control point 1 has its knots from -1 to 3, and so on.
    where = 1 + np.linspace(0, points - 3, size) if size > 1 else np.array([1.0])
    expected = np.stack(
        [np.nan_to_num(BSpline.basis_element(k + np.arange(-2, 3), extrapolate=False)(where)) for k in range(points)], axis=1
    )
    assert np.allclose(basis, expected, atol=1e-12)
    assert np.allclose(basis.sum(1), 1)


@pytest.mark.parametrize("shape", [(20, 33), (9, 16, 12)])
def test_a_bent_patch_lies_where_scipy_s_spline_says(shape: tuple[int, ...]) -> None:
    dims = len(shape)
    config = (EVERYTHING_2D if dims == 2 else EVERYTHING_3D).model_copy(update={"rotation_p": 1.0})
    warp = draw_warp(rng(3), config, shape, (2.0, 1.0, 1.0)[-dims:])
    assert warp.control is not None
    centre = np.arange(dims) + 10.25
    places = [1 + np.linspace(0, points - 3, n) for points, n in zip(warp.control.shape[1:], shape, strict=True)]
    where = np.stack(np.meshgrid(*places, indexing="ij"))
    bend = np.stack([ndimage.map_coordinates(layer, where, order=3, prefilter=False, mode="constant") for layer in warp.control])
    offset = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"))
    expected = centre.reshape(-1, *[1] * dims) + np.einsum("ij,j...->i...", warp.matrix, offset + bend)
    assert np.abs(bend).max() > 0.3
    assert np.abs(warp.coordinates(centre, shape) - expected).max() < 1e-4


def test_control_points_that_agree_shift_the_whole_patch() -> None:
    control = np.broadcast_to(np.array([1.0, -2.0]).reshape(2, 1, 1), (2, 6, 5))
    shifted = Warp(np.eye(2), control).coordinates(np.zeros(2), (12, 9))
    still = Warp(np.eye(2)).coordinates(np.zeros(2), (12, 9))
    assert np.allclose(shifted - still, np.array([1.0, -2.0]).reshape(2, 1, 1), atol=1e-5)


def test_control_points_lie_as_far_apart_as_asked_and_move_by_their_sd() -> None:
    config = NOTHING.model_copy(update={"elastic_spacing": (16.0, 4.0), "elastic_sd": (3.0, 0.5), "elastic_p": 1.0})
    drawn = [draw_warp(rng(seed), config, (64, 64), (1.0, 1.0)).control for seed in range(40)]
    assert all(control is not None and control.shape == (2, 64 // 16 + 3, 64 // 4 + 3) for control in drawn)
    sd = np.stack(drawn).std(axis=(0, 2, 3))  # type: ignore[arg-type]
    assert sd == pytest.approx([3.0, 0.5], rel=0.1)


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


def test_labels_of_any_class_number_survive_and_none_is_invented() -> None:
    label = torch.from_numpy(rng(0).choice(np.array([-1, 0, 7, 255, 3000], np.int16), (30, 30)))
    warp = draw_warp(rng(5), EVERYTHING_2D, (30, 30), (1.0, 1.0))
    _, moved = warped(warp, picture(shape=(1, 30, 30)), label)
    assert set(np.unique(moved)) == {-1, 0, 7, 255, 3000}


# ---- grey values ----


def test_neutral_values_do_nothing() -> None:
    image = picture()
    assert torch.equal(Intensity().apply(image), image)
    assert draw_intensity(rng(0), NOTHING) == replace(Intensity(), noise_seed=draw_intensity(rng(0), NOTHING).noise_seed)


@pytest.mark.parametrize("sd", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("shape", [(2, 24, 30), (1, 12, 14, 16)])
def test_blur_is_scipy_s_gaussian_with_mirrored_borders(sd: float, shape: tuple[int, ...]) -> None:
    image = picture(shape=shape)
    expected = np.stack([ndimage.gaussian_filter(layer, sd, mode="mirror", radius=max(1, round(3 * sd))) for layer in image.numpy()])
    assert np.abs(Intensity(blur_sd=sd).apply(image).numpy() - expected).max() < 1e-5


def test_blur_of_an_axis_of_one_voxel_leaves_it() -> None:
    image = picture(shape=(1, 1, 20))
    expected = ndimage.gaussian_filter1d(image.numpy()[0, 0], 1.0, mode="mirror", radius=3)
    assert np.abs(Intensity(blur_sd=1.0).apply(image).numpy()[0, 0] - expected).max() < 1e-5


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_keeps_mean_and_sd_of_each_channel_and_bends_the_rest(gamma: float) -> None:
    image = picture() * torch.tensor([1.0, 3.0])[:, None, None] + torch.tensor([0.0, 5.0])[:, None, None]
    changed = Intensity(gamma=gamma).apply(image)
    assert torch.allclose(changed.mean((1, 2)), image.mean((1, 2)), atol=1e-5)
    assert torch.allclose(changed.std((1, 2)), image.std((1, 2)), rtol=1e-4)
    middle = torch.quantile(changed.flatten(1), 0.5, dim=1) - torch.quantile(image.flatten(1), 0.5, dim=1)
    # A power below 1 lifts middle tones.
    assert (middle > 0).all() if gamma < 1 else (middle < 0).all()
    order = image.flatten(1).argsort(1)
    assert (changed.flatten(1).gather(1, order).diff(dim=1) >= 0).all()


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
    changed = Intensity(low_resolution=2.0).apply(image)
    assert changed.shape == image.shape
    # Between the 16 points of an axis it is linear: differences hardly change from voxel to voxel.
    assert changed.diff(dim=2).std() < 0.5 * image.diff(dim=2).std()
    ramp = torch.arange(32.0).expand(1, 32, 32)
    assert (Intensity(low_resolution=2.0).apply(ramp) - ramp).abs().max() <= 1


@pytest.mark.parametrize("config", [EVERYTHING_2D, EVERYTHING_3D])
def test_a_record_applied_twice_gives_the_same(config: AugmentConfig) -> None:
    dims = len(config.elastic_spacing)
    shape = (24, 30) if dims == 2 else (8, 12, 10)
    image, label = picture(shape=(2, *shape)), torch.zeros(shape, dtype=torch.int16)
    warp, intensity = draw_warp(rng(4), config, shape, (1.0,) * dims), draw_intensity(rng(4), config)
    before = image.clone()
    first, again = (intensity.apply(torch.from_numpy(warped(warp, image, label)[0])) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(image, before)
    assert not torch.allclose(first, image, atol=0.1)


def test_drawing_is_a_function_of_the_generator() -> None:
    first, again, other = (draw_warp(rng(seed), EVERYTHING_2D, (24, 30), (1.0, 1.0)) for seed in (1, 1, 2))
    assert np.array_equal(first.matrix, again.matrix)
    assert first.control is not None
    assert again.control is not None
    assert np.array_equal(first.control, again.control)
    assert not np.array_equal(first.matrix, other.matrix)
    assert draw_intensity(rng(1), EVERYTHING_2D) == draw_intensity(rng(1), EVERYTHING_2D)


def test_grey_values_change_as_often_and_as_much_as_the_config_says() -> None:
    config = AugmentConfig(intensity_p=0.2, contrast=0.25, brightness=0.3, gamma=(0.7, 1.5), noise_sd=0.1, blur_sd=1.0, low_resolution=2.0)
    drawn = [draw_intensity(rng(seed), config) for seed in range(1000)]
    for name, neutral, low, high in (
        ("blur_sd", 0, 0.3, 1.0),
        ("low_resolution", 1, 1, 2),
        ("gamma", 1, 0.7, 1.5),
        ("contrast", 1, 0.75, 1.25),
        ("brightness", 0, -0.3, 0.3),
        ("noise_sd", 0, 0, 0.1),
    ):
        changed = np.array([getattr(record, name) for record in drawn if getattr(record, name) != neutral])
        assert abs(len(changed) / 1000 - 0.2) < 0.05, name
        assert low <= changed.min() < low + 0.2 * (high - low), name
        assert high - 0.2 * (high - low) < changed.max() <= high, name
