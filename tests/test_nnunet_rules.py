"""nnU-Net's planning rules on numbers worked out by hand."""

import math
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microtome.errors import ConfigError
from microtome.nnunet_rules import (
    BUDGETS,
    Budget,
    batch_size,
    divisors,
    feature_maps,
    initial_patch,
    level_widths,
    plan_patch,
    pooling_plan,
    residual_units,
)

PATCHES = st.integers(2, 3).flatmap(lambda dims: st.tuples(*[st.integers(1, 300)] * dims))


def spacings(dims: int) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.sampled_from([0.3, 0.5, 1.0, 1.9, 2.0, 5.0])] * dims)


def test_widths_double_up_to_320_in_3d_and_512_in_2d_and_units_end_in_sixes() -> None:
    assert level_widths(6, 3) == (32, 64, 128, 256, 320, 320)
    assert level_widths(8, 2) == (32, 64, 128, 256, 512, 512, 512, 512)
    assert residual_units(8) == (1, 3, 4, 6, 6, 6, 6, 6)


def test_a_cube_of_128_is_halved_five_times_to_4() -> None:
    assert pooling_plan((128,) * 3, (1.0,) * 3) == (((1, 1, 1), *((2, 2, 2),) * 5), ((3, 3, 3),) * 6, (128,) * 3)


def test_a_coarse_axis_is_pooled_and_convolved_once_its_voxels_are_less_than_twice_the_finest() -> None:
    """Spacing 5 : 1: the plane is halved to 2 and 4 (5 / 4 < 2) first, as 5 / 2 is not less than 2."""
    strides, kernels, patch = pooling_plan((16, 64, 64), (5.0, 1.0, 1.0))
    # Sizes: 16x64x64, 16x32x32, 16x16x16, then 8x8x8, then 4x4x4.
    assert strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert patch == (16, 64, 64)


def test_exactly_twice_the_finest_is_still_coarse() -> None:
    assert pooling_plan((32, 32), (2.0, 1.0)).strides[1] == (1, 2)
    assert pooling_plan((32, 32), (1.99, 1.0)).strides[1] == (2, 2)


def test_a_kernel_stays_3_when_its_axis_is_coarse_again_and_the_deepest_is_always_3() -> None:
    """The second axis is too short to be halved; the first grows coarser than it and keeps its kernel."""
    strides, kernels, _ = pooling_plan((64, 7), (1.0, 1.0))
    assert strides == ((1, 1), (2, 1), (2, 1), (2, 1))
    assert kernels == ((3, 3),) * 4
    assert pooling_plan((7, 64), (9.0, 1.0)).kernels == ((1, 3), (1, 3), (1, 3), (3, 3))


def test_a_single_axis_must_have_12_voxels_where_two_need_8() -> None:
    assert len(pooling_plan((11, 7), (1.0, 1.0)).strides) == 1
    assert len(pooling_plan((12, 7), (1.0, 1.0)).strides) == 2
    assert len(pooling_plan((8, 8), (1.0, 1.0)).strides) == 2
    assert len(pooling_plan((7, 7), (1.0, 1.0)).strides) == 1


def test_an_odd_patch_is_halved_rounding_up_and_padded_to_what_it_must_be_a_multiple_of() -> None:
    """36, 50, 35 go to 18, 25, 18, to 9, 13, 9, to 5, 7, 5: three times each, so multiples of 8."""
    strides, _, patch = pooling_plan((36, 50, 35), (1.0, 1.0, 1.0))
    assert (divisors(strides), patch) == ((8, 8, 8), (40, 56, 40))


@given(patch=PATCHES, data=st.data())
def test_every_plan_pads_by_less_than_a_step_and_leaves_no_axis_below_4_voxels(patch: tuple[int, ...], data: st.DataObject) -> None:
    spacing = data.draw(spacings(len(patch)))
    strides, kernels, padded = pooling_plan(patch, spacing)
    assert len(strides) == len(kernels)
    assert set(strides[0]) == {1}
    for n, wide, step in zip(patch, padded, divisors(strides), strict=True):
        assert wide % step == 0
        assert 0 <= wide - n < step
        assert wide // step >= min(n, 4)


def test_the_feature_maps_of_a_128_cube_with_3_classes_are_those_of_the_authors() -> None:
    topology = pooling_plan((128,) * 3, (1.0,) * 3)
    assert feature_maps(topology, 3, residual=False) == 453_694_976
    assert feature_maps(topology, 3, residual=True) == 558_319_104


def test_the_feature_maps_of_a_small_patch_are_those_counted_by_hand() -> None:
    """8 x 8, two levels of 32 and 64 channels, 2 classes: encoder and decoder 2 convolutions each, one up, one head."""
    topology = pooling_plan((8, 8), (1.0, 1.0))
    assert feature_maps(topology, 2, residual=False) == 64 * (2 * 32 + 32 + 2 * 32 + 2) + 16 * 2 * 64
    # Stem and one unit of two; three units and one shortcut; up, one convolution and the head.
    assert feature_maps(topology, 2, residual=True) == 64 * (32 + 2 * 32 + 32 + 32 + 2) + 16 * (6 + 1) * 64


def test_the_first_patch_is_a_cube_in_mm_of_256_cubed_voxels_clipped_to_the_median_image() -> None:
    assert initial_patch((1.0, 1.0, 1.0), (500, 500, 500)) == (256, 256, 256)
    # 8 x 1 x 1 mm: the cube's side is 256 * 8^(1/3) = 512 mm.
    assert initial_patch((8.0, 1.0, 1.0), (500, 600, 300)) == (64, 512, 300)
    assert initial_patch((0.5, 0.5), (3000, 1000)) == (2048, 1000)


def test_a_small_volume_is_taken_whole_and_fills_the_budget_with_its_batch() -> None:
    """40 x 56 x 40 and 4 levels: 560e6 / 19,212,200 * 2 = 58; 5 % of 260 images of 63,000 voxels are 9 patches."""
    plain = BUDGETS["plain"]
    topology, estimate = plan_patch((1.0, 1.0, 1.0), (36, 50, 35), 3, plain)
    assert (topology.patch_vox, estimate) == ((40, 56, 40), 19_212_200)
    voxels = 260 * 36 * 50 * 35
    assert batch_size(topology.patch_vox, estimate, plain, dataset_voxels=voxels) == 9
    assert batch_size(topology.patch_vox, estimate, replace(plain, share=1), dataset_voxels=voxels) == 58
    assert batch_size(topology.patch_vox, estimate, plain, dataset_voxels=voxels, memory_gb=1) == round(58.3 / 8)
    assert batch_size(topology.patch_vox, estimate, plain, dataset_voxels=1) == 2


def reference(maps: float) -> Budget:
    """A budget of that many values of feature maps, to be compared as they are."""
    return Budget(residual=False, reference=MappingProxyType({2: maps / 6, 3: maps}), memory_gb=8, share=1)


def plain_maps(*patch_vox: int) -> int:
    return feature_maps(pooling_plan(patch_vox, (1.0,) * len(patch_vox)), 3, residual=False)


def test_a_large_volume_loses_steps_on_the_axis_that_is_largest_relative_to_the_median_image() -> None:
    """Of equal axes the last: a side of 64 would lose 16 and be 48, which is a multiple of 8 only, so that it loses 8."""
    spacing, median = (1.0, 1.0, 1.0), (64, 64, 64)
    assert plan_patch(spacing, median, 3, reference(plain_maps(64, 64, 64)))[0].patch_vox == (64, 64, 64)
    assert plan_patch(spacing, median, 3, reference(plain_maps(64, 64, 64) - 1))[0].patch_vox == (64, 64, 56)
    assert plan_patch(spacing, median, 3, reference(plain_maps(64, 64, 56) - 1))[0].patch_vox == (64, 56, 56)
    # Here the middle axis is padded from 60 to 64 and so is larger than its image.
    assert plan_patch(spacing, (64, 60, 64), 3, reference(plain_maps(64, 64, 64) - 1))[0].patch_vox == (64, 56, 64)


def test_a_step_is_that_of_the_smaller_patch_so_that_no_size_is_skipped() -> None:
    """A side of 256 is halved 6 times to 4; 256 - 64 = 192 only 5 times, so that the step is 32 and 224 comes next."""
    allowed = reference(plain_maps(256, 256) - 1)
    assert plan_patch((1.0, 1.0), (256, 256), 3, allowed)[0].patch_vox == (256, 224)


def test_an_axis_that_cannot_be_shortened_is_left_for_one_that_can() -> None:
    allowed = reference(plain_maps(1, 64, 64) - 1)
    assert plan_patch((1.0, 1.0, 1.0), (1, 64, 64), 3, allowed)[0].patch_vox == (1, 64, 56)


def test_a_2d_patch_of_the_plain_network_may_reach_6_times_the_reference_and_then_has_a_batch_of_2() -> None:
    plain = BUDGETS["plain"]
    topology, estimate = plan_patch((1.0, 1.0), (2000, 2000), 2, plain)
    assert 85e6 * 3 < estimate <= 85e6 * 6
    assert batch_size(topology.patch_vox, estimate, plain, dataset_voxels=1e12) == 2
    assert plan_patch((1.0, 1.0), (2000, 2000), 2, BUDGETS["resenc_m"])[1] <= 135e6


@given(name=st.sampled_from(sorted(BUDGETS)), gigabytes=st.sampled_from([0.5, 4.0, 24.0]), data=st.data())
def test_every_planned_patch_fits_its_budget_and_its_own_pooling(name: str, gigabytes: float, data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([2, 3]))
    spacing = data.draw(spacings(dims))
    median = data.draw(st.tuples(*[st.integers(1, 700)] * dims))
    budget = BUDGETS[name]
    topology, estimate = plan_patch(spacing, median, 3, budget, memory_gb=gigabytes)
    most = budget.allowed(dims, gigabytes) * (1 if budget.residual else {2: 6, 3: 1}[dims])
    assert estimate == feature_maps(topology, 3, residual=budget.residual) <= most
    assert pooling_plan(topology.patch_vox, spacing) == topology
    batch = batch_size(topology.patch_vox, estimate, budget, dataset_voxels=1e9, memory_gb=gigabytes)
    assert batch == 2 or batch * math.prod(topology.patch_vox) <= budget.share * 1e9 * 1.5


def test_memory_that_no_patch_fits_into_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory for feature maps of a patch, got 7, and a patch of 1×1×1 has"):
        plan_patch((1.0, 1.0, 1.0), (64, 64, 64), 2, BUDGETS["plain"], memory_gb=1e-7)
