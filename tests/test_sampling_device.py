"""The warp in tensor operations of a device, here the CPU's, against the warp of the CPU."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.config import AugmentConfig
from microtome.training.device_warp import sampling_grid, warp_on_device
from microtome.training.sampling import Pool, Sample, change_values, draw_sample, load_sample, read_crop
from microtome.training.store import StoredCase
from microtome.training.warp import Patch, Warp, draw_warp
from tests.small import SPICED_2D, one_thread, small_plan, small_plan_3d, stored_case

__all__ = ["one_thread"]

CPU = torch.device("cpu")
# Coordinates of both ways agree to this many voxels; a label may differ where one lies so near to the middle between two voxels.
NEAR = 2e-4
ALWAYS: dict[str, Any] = {name: 1.0 for name in AugmentConfig.model_fields if name.endswith("_p")}
POINTS_2D = AugmentConfig(flip_axes=(0, 1), elastic_points=(3, 3), elastic_sd=(4.0, 4.0), elastic_kind="bicubic", **ALWAYS)
SPICED_3D = AugmentConfig(
    flip_axes=(0, 1, 2), rotation_deg=(180.0, 30.0, 30.0), elastic_spacing=(6.0, 8.0, 8.0), elastic_sd=(1.0, 1.0, 1.0), **ALWAYS
)
PLANS = {
    "2D": small_plan(augment=SPICED_2D.model_copy(update=ALWAYS)),
    "2D bicubic": small_plan(augment=POINTS_2D),
    "as planned": small_plan(),
    "sections": small_plan(spacing_mm=(4.0, 1.0, 1.0), augment=SPICED_2D.model_copy(update=ALWAYS)),
    "3D": small_plan_3d(augment=SPICED_3D),
    "3D thin": small_plan_3d(augment=SPICED_3D),
    "3D as planned": small_plan_3d(),
}
SHAPES = {"3D": (24, 40, 36), "sections": (5, 50, 44), "3D thin": (1, 30, 20), "3D as planned": (14, 12, 30)}


def cases(kind: str) -> list[StoredCase]:
    """Two images of white noise, one with three times the contrast, each with labels and weights."""
    rng = np.random.default_rng(5)
    shape = SHAPES.get(kind, (50, 44))
    made = []
    for scale in (1.0, 3.0):
        image = scale * rng.normal(size=(1, *shape)).astype(np.float32)
        case = stored_case(rng.integers(-1, 3, shape), image)
        made.append(replace(case, weight_map=rng.uniform(1, 9, shape).astype(np.float16)))
    return made


CASES = {kind: cases(kind) for kind in PLANS}


def on_device(sample: Sample, kind: str) -> Patch:
    crop = read_crop(sample, CASES[kind], PLANS[kind].patch_vox)
    patch = warp_on_device(crop.patch, sample.warp, crop.centre, PLANS[kind].patch_vox)
    return patch._replace(image=change_values(sample, patch.image, CASES[kind]))


@given(kind=st.sampled_from(list(PLANS)), step=st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_a_sample_made_on_a_device_is_the_one_made_on_the_cpu(kind: str, step: int) -> None:
    plan = PLANS[kind]
    sample = draw_sample(Pool.of(CASES[kind]), plan, step, 0)
    ours, theirs = on_device(sample, kind), load_sample(sample, CASES[kind], plan.patch_vox)
    assert (ours.image.dtype, ours.label.dtype) == (torch.float32, torch.int16)
    # Of white noise, which changes by several sd from voxel to voxel.
    assert (ours.image - theirs.image).abs().max() < 2e-3
    assert (ours.image - theirs.image).abs().mean() < 2e-5
    assert ours.weight is not None
    assert theirs.weight is not None
    assert (ours.weight - theirs.weight).abs().max() < 8 * 3 * NEAR
    crop = read_crop(sample, CASES[kind], plan.patch_vox)
    place = sample.warp.coordinates(crop.centre, plan.patch_vox)
    to_middle = np.abs(place - np.floor(place) - 0.5).min(0)
    assert np.array_equal(ours.label[to_middle > NEAR], theirs.label[to_middle > NEAR])
    assert (to_middle > NEAR).mean() > 0.98 or sample.warp.bend is None


@given(seed=st.integers(0, 10**6), volume=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_grid_reads_where_the_warp_s_coordinates_say(seed: int, volume: bool) -> None:
    rng = np.random.default_rng(seed)
    patch, crop = ((9, 12, 10), (14, 1, 13)) if volume else ((20, 31), (25, 18))
    warp = draw_warp(rng, SPICED_3D if volume else SPICED_2D, patch, (1.0,) * len(patch))
    centre = rng.uniform(-5, 30, len(patch))
    grid = sampling_grid(warp, centre, patch, crop, device=CPU)
    assert grid.shape == (1, *patch, len(patch))
    in_voxels = (grid[0].flip(-1).numpy() + 1) * (np.maximum(np.array(crop) - 1, 1) / 2)
    assert np.abs(np.moveaxis(in_voxels, -1, 0) - warp.coordinates(centre, patch)).max() < NEAR


def test_a_patch_that_is_not_moved_is_the_crop_to_the_last_label() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(2, 21, 30)).astype(np.float32))
    label = torch.from_numpy(rng.integers(-1, 32000, (21, 30)).astype(np.int16))
    moved = warp_on_device(Patch(image, label), Warp(np.eye(2)), np.array([10.0, 14.5]), (21, 30))
    assert torch.equal(moved.label, label)
    assert (moved.image - image).abs().max() < 1e-4
    assert moved.weight is None


@pytest.mark.parametrize("axis", [0, 1])
def test_outside_the_label_is_not_annotated_and_the_weight_1(axis: int) -> None:
    shape = tuple(1 if other == axis else 9 for other in range(2))
    crop = Patch(torch.ones(1, *shape), torch.full(shape, 4, dtype=torch.int16), torch.full(shape, 7.0))
    patch = tuple(5 if other == axis else 9 for other in range(2))
    centre = (np.array(shape) - 1) / 2
    moved = warp_on_device(crop, Warp(np.eye(2)), centre, patch)
    assert moved.weight is not None
    middle = [2 if other == axis else slice(None) for other in range(2)]
    assert (moved.label[tuple(middle)] == 4).all()
    assert (moved.label == 4).sum() == 9
    assert ((moved.weight == 7) == (moved.label == 4)).all()
    assert ((moved.weight == 1) == (moved.label == -1)).all()
    assert (moved.image == 1).all()
