"""Where a patch comes from: bounds that hold every coordinate, and the part of a case that is enough to make the patch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.config import AugmentConfig
from microtome.training.warp import Bend, Patch, Warp, draw_warp, warp_patch
from tests.small import NOTHING

KINDS = [None, "bspline", "bicubic"]


def movement(seed: int, patch: tuple[int, ...], kind: str | None) -> Warp:
    """Turned, scaled and bent, thick sections among it."""
    dims, rng = len(patch), np.random.default_rng(seed)
    config: dict[str, Any] = {"rotation_deg": (180.0,) * (1 if dims == 2 else 3), "flip_axes": tuple(range(dims)), "scale": (0.5, 2.0)}
    config |= {"rotation_p": 1.0, "scale_p": 1.0}
    if kind is not None:
        field = ("elastic_points", rng.integers(1, 5, dims)) if rng.random() < 0.5 else ("elastic_spacing", rng.uniform(2, 20, dims))
        config |= {field[0]: tuple(field[1].tolist()), "elastic_sd": (3.0,) * dims, "elastic_p": 1.0, "elastic_kind": kind}
    return draw_warp(rng, AugmentConfig(**{**NOTHING.model_dump(), **config}), patch, tuple(rng.uniform(0.5, 3, dims).tolist()))


def shapes(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(least, most), min_size=2, max_size=3).map(tuple)


@given(patch=shapes(1, 24), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_the_bounds_hold_every_coordinate(patch: tuple[int, ...], seed: int, kind: str | None) -> None:
    warp, centre = movement(seed, patch, kind), np.random.default_rng(seed).uniform(-50, 50, len(patch))
    low, high = warp.bounds(centre, patch)
    source = warp.coordinates(centre, patch).reshape(len(patch), -1)
    assert (low <= source.min(1) + 1e-3).all()
    assert (high >= source.max(1) - 1e-3).all()
    if kind is None:
        assert np.abs(low - source.min(1)).max() < 1e-3
        assert np.abs(high - source.max(1)).max() < 1e-3


@pytest.mark.parametrize("patch", [(512, 512), (128, 128, 64)])
def test_the_bounds_of_an_elastic_patch_are_a_few_voxels_wider_than_it(patch: tuple[int, ...]) -> None:
    dims = len(patch)
    bent = {"elastic_spacing": (32.0,) * dims, "elastic_sd": (4.0,) * dims, "elastic_p": 1.0}
    slack = []
    for seed in range(5):
        warp = draw_warp(np.random.default_rng(seed), AugmentConfig(**{**NOTHING.model_dump(), **bent}), patch, (1.0,) * dims)
        low, high = warp.bounds(np.zeros(dims), patch)
        source = warp.coordinates(np.zeros(dims), patch).reshape(dims, -1)
        slack += [*(source.min(1) - low), *(high - source.max(1))]
    assert 0 < np.mean(slack) < 2 * 4.0


def test_a_bicubic_field_may_overshoot_its_points_and_the_bounds_know() -> None:
    control = np.tile(np.array([-1.0, 1.0, 1.0, -1.0]), (2, 4, 1))
    warp = Warp(np.eye(2), Bend(control, (10.0, 10.0), "bicubic"))
    field = warp.coordinates(np.zeros(2), (31, 31)) - Warp(np.eye(2)).coordinates(np.zeros(2), (31, 31))
    assert field.max() > 1.1
    low, high = warp.bounds(np.zeros(2), (31, 31))
    assert (low <= -15).all()
    assert (high >= warp.coordinates(np.zeros(2), (31, 31)).reshape(2, -1).max(1)).all()


@given(case=shapes(3, 30), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), weighted=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_part_of_a_case_gives_the_patch_that_the_whole_case_gives(
    case: tuple[int, ...], seed: int, kind: str | None, weighted: bool
) -> None:
    rng = np.random.default_rng(seed)
    patch = tuple(int(n) for n in rng.integers(1, 12, len(case)))
    warp, centre = movement(seed, patch, kind), rng.uniform(-10, np.array(case) + 10)
    image, label = rng.uniform(-1, 1, (1, *case)).astype(np.float32), rng.integers(-1, 3, case).astype(np.int16)
    weight = torch.from_numpy(rng.uniform(0, 5, case).astype(np.float32)) if weighted else None
    whole = Patch(torch.from_numpy(image), torch.from_numpy(label), weight)
    box = warp.box(centre, patch, case)
    part = Patch(whole.image[(slice(None), *box)], whole.label[box], None if weight is None else weight[box])
    one, other = warp_patch(whole, warp, centre, patch), warp_patch(part, warp, centre - [side.start for side in box], patch)
    source = warp.coordinates(centre, patch)
    sure = torch.from_numpy((np.abs(source - np.floor(source) - 0.5) > 1e-3).all(0))
    assert (one.image - other.image).abs().max() < 2e-3
    assert torch.equal(one.label[sure], other.label[sure])
    if one.weight is not None and other.weight is not None:
        assert (one.weight - other.weight).abs().max() < 1e-2


def test_the_part_is_small_where_the_patch_is() -> None:
    box = Warp(np.eye(2)).box(np.array([50.5, 40.5]), (10, 20), (100, 100))
    assert box == (slice(45, 57), slice(30, 52))
    # Beyond the edge of the case what is mirrored is asked for too, as deep as the patch stands out.
    assert Warp(np.eye(2)).box(np.array([-20.0, 40.5]), (11, 20), (100, 100))[0] == slice(0, 27)
