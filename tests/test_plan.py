"""The rules of planning one by one, from fingerprints whose every number is chosen; and plans that can be trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.appearance import choose_augment, choose_normalisation
from microtome.config import NetworkConfig, Plan, dump_yaml
from microtome.data.dataset import open_dataset
from microtome.errors import ConfigError
from microtome.fingerprint import Fingerprint, take_fingerprint
from microtome.geometry import Shape
from microtome.models.registry import build
from microtome.plan import choose_batch, choose_dims, choose_network, choose_patch, choose_precision, choose_spacing, draft_plan
from microtome.step_memory import FULL_SHARE, SMALLEST_BATCH, Resources, patch_bytes, save_memory, step_bytes
from microtome.training.folder import read_plan
from tests.small import one_thread

__all__ = ["one_thread"]

GB = 2**30
LAPTOP = Resources(minutes=10, memory_bytes=8 * GB)
GPU = Resources(minutes=60, memory_bytes=24 * GB, gpu=True, bf16=True)
CELLS = Fingerprint(
    cases=20,
    channels=1,
    classes=("background", "cell"),
    shape_vox=(256, 256),
    spacing_mm=(1.0, 1.0),
    spacing_low_mm=(1.0, 1.0),
    spacing_varies=False,
    spacing_known=False,
    formats=frozenset({"png"}),
    jpeg_share=0.0,
    thinnest_vox=10.0,
    section_lag=None,
    low=(0.0,),
    high=(255.0,),
    mean=(100.0,),
    sd=(40.0,),
    brightness_varies=0.2,
    hounsfield=False,
    left_right_axis=None,
)
VOLUMES = replace(
    CELLS, shape_vox=(96, 128, 128), spacing_mm=(1.0, 1.0, 1.0), spacing_low_mm=(1.0, 1.0, 1.0), spacing_known=True, section_lag=1.0
)
STACK = replace(VOLUMES, shape_vox=(30, 512, 512), spacing_mm=(50.0, 4.0, 4.0), spacing_low_mm=(50.0, 4.0, 4.0))
SCANS = replace(VOLUMES, formats=frozenset({"nifti"}), left_right_axis=2)
COLOURS: dict[str, Any] = {"channels": 3, "low": (0.0,) * 3, "high": (255.0,) * 3, "mean": (120.0,) * 3, "sd": (60.0,) * 3}
PHOTOGRAPHS = replace(CELLS, formats=frozenset({"jpeg"}), jpeg_share=1.0, **COLOURS)
EVERY = {"cells": CELLS, "volumes": VOLUMES, "stack": STACK, "scans": SCANS, "photographs": PHOTOGRAPHS}


def takes(plan: Plan) -> bool:
    """Whether the plan's network takes its patch and answers for some of it."""
    with torch.device("meta"):
        network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
    border = 2 * network.context_vox
    return all(network.valid_size(n, axis) and n > border for axis, n in enumerate(plan.patch_vox))


# ---- 2D or 3D ----


@pytest.mark.parametrize(
    ("changes", "expected", "word"),
    [
        ({}, 3, "about as close"),
        ({"shape_vox": (256, 256)}, 2, "two-dimensional"),
        ({"shape_vox": (7, 512, 512)}, 2, "only 7 sections"),
        ({"shape_vox": (8, 512, 512)}, 3, "about as close"),
        ({"spacing_mm": (4.0, 1.0, 1.0)}, 3, "ratio 4.0"),
        ({"spacing_mm": (4.2, 1.0, 1.0)}, 2, "4 times as far apart"),
        # A coarse axis within the section, or fine sections: nothing is gained by taking sections apart.
        ({"spacing_mm": (1.0, 1.0, 8.0)}, 3, "ratio 0.1"),
        ({"spacing_mm": (0.1, 1.0, 1.0)}, 3, "ratio 0.1"),
        ({"spacing_known": False, "section_lag": 12.0}, 2, "how unlike"),
        ({"spacing_known": False, "section_lag": 3.0, "spacing_mm": (9.0, 1.0, 1.0)}, 3, "how unlike"),
    ],
)
def test_volumes_are_3d_and_thick_sections_2d(changes: dict[str, Any], expected: int, word: str) -> None:
    dims, reason = choose_dims(replace(VOLUMES, **changes))
    assert dims == expected
    assert word in reason


def test_a_network_of_one_kind_decides_for_volumes_but_makes_no_volume_of_a_picture() -> None:
    assert choose_dims(VOLUMES, (2,))[0] == 2
    assert choose_dims(STACK, (3,))[0] == 3
    assert choose_dims(CELLS, (3,))[0] == 2
    with pytest.raises(ConfigError, match=r"unet3d: expected 3D images, got 2D"):
        draft_plan(CELLS, LAPTOP, network="unet3d")


# ---- voxel size ----


def test_volumes_keep_their_median_voxel() -> None:
    assert choose_spacing(replace(VOLUMES, spacing_mm=(2.5, 1.0, 1.0)), 3, 56)[0] == (2.5, 1.0, 1.0)


def test_along_a_coarse_axis_the_tenth_percentile_is_taken() -> None:
    coarse = replace(VOLUMES, spacing_mm=(3.5, 1.0, 0.9), spacing_low_mm=(2.0, 0.5, 0.5))
    spacing, reason = choose_spacing(coarse, 3, 56)
    assert spacing == (2.0, 1.0, 0.9)
    assert "10th percentile" in reason
    # But never finer than the other axes.
    assert choose_spacing(replace(coarse, spacing_low_mm=(0.2, 0.2, 0.2)), 3, 56)[0] == (1.0, 1.0, 0.9)


@pytest.mark.parametrize(
    ("side", "thinnest", "factor"),
    [
        (256, 100.0, 1),  # the patch shows all of it
        (512, 100.0, 2),  # twice as large a pixel shows all of it
        (2560, 12.0, 2),  # thin things keep 6 pixels
        (2560, 6.0, 1),
        (2560, 3.0, 1),
        (2560, 7.0, 1),  # for a sixth it is not worth it
        (2560, np.inf, 1),  # nothing is known
    ],
)
def test_large_pictures_are_seen_coarser_as_long_as_thin_things_stay(side: int, thinnest: float, factor: float) -> None:
    facts = replace(CELLS, shape_vox=(side // 2, side), thinnest_vox=thinnest, spacing_mm=(0.5, 0.5))
    spacing, reason = choose_spacing(facts, 2, 256)
    assert spacing == (0.5 * factor, 0.5 * factor)
    assert (f"{factor} times" in reason) == (factor > 1)
    assert "inf" not in reason


def test_sections_of_a_stack_keep_their_distance() -> None:
    spacing, _ = choose_spacing(replace(STACK, thinnest_vox=24.0), 2, 256)
    assert spacing == (50.0, 8.0, 8.0)


# ---- patch ----


@given(
    shape=st.lists(st.integers(1, 4000), min_size=2, max_size=3),
    minutes=st.sampled_from([None, 1, 10, 600]),
    gpu=st.booleans(),
)
@settings(max_examples=300, deadline=1000)
def test_a_patch_is_within_the_image_and_the_budget_and_no_axis_is_cut_below_a_shorter_one(
    shape: list[int], minutes: float | None, gpu: bool
) -> None:
    resources = Resources(minutes=minutes, memory_bytes=8 * GB, gpu=gpu)
    patch, reason = choose_patch(tuple(shape), (1.0,) * len(shape), resources)
    assert all(1 <= n <= size for n, size in zip(patch, shape, strict=True))
    largest = choose_patch((10**5,) * len(shape), (1.0,) * len(shape), resources)[0]
    assert len(set(largest)) == 1
    # Sizes are rounded up, along each axis.
    assert np.prod([n - 1 for n in patch]) <= np.prod(largest)
    cut = [n for n, size in zip(patch, shape, strict=True) if n < size]
    assert all(n >= max(patch) - 1 for n in cut)
    assert (reason == "covers the median image") == (patch == tuple(shape))


@pytest.mark.parametrize(
    ("shape", "gpu", "expected"),
    [
        ((100, 200), False, (100, 200)),
        ((1000, 1000), False, (256, 256)),
        ((64, 2000), False, (64, 1024)),
        ((1000, 1000), True, (512, 512)),
        ((200, 200, 200), False, (56, 56, 56)),
        ((14, 200, 200), False, (14, 112, 112)),
        ((400, 64, 512), True, (182, 64, 182)),
    ],
)
def test_patches_worked_out_by_hand(shape: Shape, gpu: bool, expected: Shape) -> None:
    assert choose_patch(shape, (1.0,) * len(shape), GPU if gpu else LAPTOP)[0] == expected


def test_patience_buys_larger_patches() -> None:
    sides = [choose_patch((2000, 2000), (1.0, 1.0), Resources(minutes=minutes, memory_bytes=8 * GB))[0][0] for minutes in (1, 10, 60, None)]
    assert sides == sorted(sides)
    assert sides[0] < sides[1] < sides[2] == sides[3]


# ---- network ----


@pytest.mark.parametrize("resources", [LAPTOP, GPU])
def test_isotropic_patches_are_halved_along_all_axes_until_they_are_small(resources: Resources) -> None:
    config, reason = choose_network("modern_unet", (64, 64, 64), (1.0, 1.0, 1.0), resources)
    assert config.strides == ((1, 1, 1), *((2, 2, 2),) * 4)
    assert config.kernels == ((3, 3, 3),) * 5
    base = 32 if resources.gpu else 24
    assert config.widths == tuple(min(base * 2**level, 320) for level in range(5))
    assert "4×4×4" in reason


def test_coarse_axes_are_pooled_later_and_have_kernels_of_1_until_then() -> None:
    config, _ = choose_network("modern_unet", (16, 128, 128), (4.0, 1.0, 1.0), LAPTOP)
    # Sides of a voxel: 4 1 1, then 4 2 2, 4 4 4, 8 8 8.
    assert config.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert config.kernels[:4] == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))


@pytest.mark.parametrize("patch", [(12, 12), (1, 40), (3, 3), (5, 5, 5)])
def test_images_smaller_than_any_network_still_get_two_levels(patch: Shape) -> None:
    config, _ = choose_network("modern_unet", patch, (1.0,) * len(patch), LAPTOP)
    assert len(config.strides) >= 2
    build("modern_unet", dims=len(patch), in_channels=1, classes=2, config=config)


def test_other_networks_keep_the_sizes_of_their_paper() -> None:
    assert choose_network("unet", (256, 256), (1.0, 1.0), LAPTOP)[0] == NetworkConfig(name="unet")


# ---- batch, precision ----


def test_batches_hold_about_as_many_voxels_whatever_the_patch() -> None:
    network = NetworkConfig(widths=(24, 48))
    sizes = {side: choose_batch((side, side), network, LAPTOP, "fp32", 2)[0] for side in (512, 256, 200, 64)}
    assert sizes == {512: 4, 256: 8, 200: 13, 64: 16}
    assert choose_batch((56, 56, 56), network, LAPTOP, "fp32", 2)[0] == 4


def test_less_memory_makes_smaller_batches_and_says_so() -> None:
    network = NetworkConfig(widths=(24, 48))
    made = [choose_batch((256, 256), network, Resources(minutes=10, memory_bytes=int(gb * GB)), "fp32", 2) for gb in (8, 1.5, 0.8, 0.1)]
    batches = [batch for batch, _ in made]
    assert batches[0] == 8
    assert SMALLEST_BATCH < batches[1] < 8
    assert "fits into 1.5 GB" in made[1][1]
    # Fewer would make unsteady statistics: they are seen in parts, or computed twice.
    assert batches[2] == SMALLEST_BATCH
    assert "unsteady" in made[2][1]
    assert batches[3] == 1
    assert "make patch_vox smaller" in made[3][1]


def test_half_precision_holds_more() -> None:
    network, small = NetworkConfig(widths=(24, 48)), Resources(minutes=10, memory_bytes=GB)
    assert choose_batch((256, 256), network, small, "bf16", 2)[0] > choose_batch((256, 256), network, small, "fp32", 2)[0]


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bf16_where_there_is_hardware_for_it(bf16: bool, expected: str) -> None:
    assert choose_precision(replace(LAPTOP, bf16=bf16))[0] == expected


# ---- normalisation ----


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (CELLS, "image"),
        (SCANS, "image"),
        (replace(SCANS, hounsfield=True), "dataset"),
        (PHOTOGRAPHS, "dataset"),
        (replace(PHOTOGRAPHS, brightness_varies=1.5), "image"),
    ],
)
def test_grey_values_that_mean_something_keep_it(facts: Fingerprint, kind: str) -> None:
    config, _ = choose_normalisation(facts)
    assert config.kind == kind
    if kind == "dataset":
        assert (config.low, config.high, config.mean, config.sd) == (facts.low, facts.high, facts.mean, facts.sd)


def test_a_channel_without_spread_is_not_divided_by_nothing() -> None:
    config, _ = choose_normalisation(replace(PHOTOGRAPHS, sd=(0.0, 1.0, 2.0)))
    assert config.sd == (1e-6, 1.0, 2.0)


# ---- augmentation ----


@pytest.mark.parametrize(
    ("facts", "dims", "flips", "angles"),
    [
        (CELLS, 2, (0, 1), (180,)),
        (VOLUMES, 3, (0, 1, 2), (180, 30, 30)),
        (PHOTOGRAPHS, 2, (1,), (20,)),
        (SCANS, 3, (2,), (20, 20, 20)),
        (replace(SCANS, left_right_axis=0), 3, (0,), (20, 20, 20)),
        # Sections of a scan: axes count from the section's first.
        (SCANS, 2, (1,), (20,)),
        (replace(SCANS, left_right_axis=0), 2, (), (20,)),
        (replace(SCANS, classes=("background", "left_kidney")), 3, (), (20, 20, 20)),
        (replace(SCANS, classes=("background", "Right-Hippocampus")), 3, (), (20, 20, 20)),
        (replace(CELLS, classes=("background", "lung left")), 2, (), (20,)),
        (replace(PHOTOGRAPHS, classes=("background", "left")), 2, (), (20,)),
        # A cleft is no left.
        (replace(CELLS, classes=("background", "cleft")), 2, (0, 1), (180,)),
    ],
)
def test_what_is_shown_decides_what_may_be_mirrored_and_turned(
    facts: Fingerprint, dims: int, flips: tuple[int, ...], angles: tuple[float, ...]
) -> None:
    config, _ = choose_augment(facts, (64,) * dims, (1.0,) * dims)
    assert (config.flip_axes, config.rotation_deg) == (flips, angles)


def test_control_points_are_as_far_apart_in_mm_along_each_axis() -> None:
    config, _ = choose_augment(VOLUMES, (20, 80, 80), (4.0, 1.0, 1.0))
    assert config.elastic_spacing == (5.0, 20.0, 20.0)
    assert config.elastic_sd == (5 / 8, 20 / 8, 20 / 8)
    assert choose_augment(CELLS, (512, 512), (0.3, 0.3))[0].elastic_spacing == pytest.approx((32.0, 32.0))
    assert choose_augment(CELLS, (16, 16), (1.0, 1.0))[0].elastic_spacing == (8.0, 8.0)


# ---- whole plans ----


@pytest.mark.parametrize("resources", [LAPTOP, GPU, Resources(minutes=None, memory_bytes=GB // 2)], ids=["laptop", "gpu", "small"])
@pytest.mark.parametrize("name", EVERY)
def test_every_plan_can_be_built_and_takes_its_patch(name: str, resources: Resources) -> None:
    plan = draft_plan(EVERY[name], resources)
    assert takes(plan)
    assert plan.batch >= 1
    assert plan.minutes == resources.minutes
    assert len(plan.spacing_mm) == len(EVERY[name].shape_vox)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("unet", "cells"),
        ("unet", "stack"),
        ("unet", "volumes"),
        ("unet_same", "cells"),
        ("unet_same", "photographs"),
        ("unet3d", "volumes"),
    ],
)
def test_the_papers_networks_get_sizes_that_they_take(network: str, name: str) -> None:
    plan = draft_plan(EVERY[name], LAPTOP, network=network)
    assert takes(plan)
    assert plan.network == NetworkConfig(name=network)


@given(
    shape=st.lists(st.integers(1, 700), min_size=2, max_size=3),
    spacing=st.lists(st.floats(0.01, 50), min_size=3, max_size=3),
    thinnest=st.floats(1, 100) | st.just(np.inf),
    gb=st.floats(0.1, 64),
    gpu=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_no_image_is_too_odd_for_a_plan(shape: list[int], spacing: list[float], thinnest: float, gb: float, gpu: bool) -> None:
    size = tuple(float(f"{value:.6g}") for value in spacing[: len(shape)])
    base = CELLS if len(shape) == 2 else VOLUMES
    facts = replace(base, shape_vox=tuple(shape), spacing_mm=size, spacing_low_mm=size, thinnest_vox=thinnest)
    plan = draft_plan(facts, Resources(minutes=5, memory_bytes=int(gb * GB), gpu=gpu))
    assert takes(plan)


@pytest.mark.parametrize("name", EVERY)
def test_every_value_of_a_plan_is_given_or_the_default_or_has_a_reason(name: str) -> None:
    plan = draft_plan(EVERY[name], LAPTOP)
    given_or_timed = {"channels", "classes", "minutes", "steps", "seed", "fold", "reasons"}
    for field, info in Plan.model_fields.items():
        known = field in given_or_timed or getattr(plan, field) == info.default or plan.reasons.get(field)
        assert known, field
    assert set(plan.reasons) <= set(Plan.model_fields)
    assert all(reason and "nan" not in reason for reason in plan.reasons.values())


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_written_down_and_read_again_is_the_same(name: str, tmp_path: Path) -> None:
    plan = draft_plan(EVERY[name], GPU, seed=7, fold="2/3")
    path = tmp_path / "plan.yaml"
    path.write_text(dump_yaml(plan), encoding="utf-8")
    assert read_plan(path) == plan


def test_a_plan_is_written_a_value_and_a_reason_a_line(tmp_path: Path) -> None:
    plan = draft_plan(CELLS, LAPTOP)
    text = dump_yaml(plan)
    lines = text.splitlines()
    reasons = lines[lines.index("reasons:") + 1 :]
    assert [line.partition(":")[0] for line in reasons] == [f"  {name}" for name in plan.reasons]
    assert all(line.startswith(f"  {name}: ") for line, name in zip(reasons, plan.reasons, strict=True))
    assert "{" not in text.replace("{}", "")
    assert f"patch_vox: [{', '.join(map(str, plan.patch_vox))}]" in lines
    # As it was written before: the same plan.
    flow = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    assert flow != text
    for number, written in enumerate((flow, text)):
        (tmp_path / f"{number}.yaml").write_text(written, encoding="utf-8")
        assert read_plan(tmp_path / f"{number}.yaml") == plan


def test_a_plan_with_an_unknown_word_is_refused_by_file_and_word(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_yaml(draft_plan(CELLS, LAPTOP)).replace("batch:", "bach:"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"plan\.yaml.*ba"):
        read_plan(path)


def test_a_plan_for_real_volumes(data_folder: Any) -> None:
    dataset = open_dataset(data_folder("hippocampus"))
    plan = draft_plan(take_fingerprint(dataset, dataset.labelled[:4]), LAPTOP)
    assert plan.dims == 3
    assert takes(plan)
    # Small enough to be seen whole.
    assert "covers the median image" in plan.reasons["patch_vox"]


# ---- rules that a review asked for ----


@pytest.mark.parametrize("memory_gb", [4, 8, 24, 140])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("facts", [CELLS, VOLUMES])
def test_batch_norm_never_sees_fewer_than_four_patches(memory_gb: int, gpu: bool, facts: Fingerprint) -> None:
    large = replace(facts, shape_vox=tuple(4 * n for n in facts.shape_vox))
    plan = draft_plan(large, Resources(minutes=600, memory_bytes=memory_gb * GB, gpu=gpu, bf16=True))
    assert plan.network.norm == "batch"
    assert plan.batch >= 4


def test_a_hundred_classes_take_memory_too() -> None:
    few, many = (draft_plan(replace(CELLS, classes=tuple(map(str, range(k)))), replace(LAPTOP, memory_bytes=GB)) for k in (2, 100))
    assert many.batch * np.prod(many.patch_vox) < few.batch * np.prod(few.patch_vox)


def test_a_slide_is_never_seen_more_than_four_times_as_coarse() -> None:
    slide = replace(CELLS, shape_vox=(10_000, 10_000), thinnest_vox=120.0)
    plan = draft_plan(slide, LAPTOP)
    assert plan.spacing_mm == (4 * CELLS.spacing_mm[0], 4 * CELLS.spacing_mm[1])


def test_a_large_volume_of_thick_classes_is_seen_coarser_until_a_patch_shows_two_hundredths_of_it() -> None:
    scan = replace(SCANS, shape_vox=(300, 512, 512), spacing_mm=(1.0, 1.0, 1.0), spacing_low_mm=(1.0, 1.0, 1.0), thinnest_vox=24.0)
    plan = draft_plan(scan, LAPTOP)
    assert plan.spacing_mm == pytest.approx((2.08, 2.08, 2.08))
    assert "2% of a volume" in plan.reasons["spacing_mm"]
    thin = draft_plan(replace(scan, thinnest_vox=5.0), LAPTOP)
    assert thin.spacing_mm == (1.0, 1.0, 1.0)


def test_a_patch_is_a_cube_of_tissue_and_no_rod() -> None:
    patch, _ = choose_patch((100, 512, 512), (3.5, 1.0, 1.0), LAPTOP)
    sides_mm = np.array(patch) * (3.5, 1.0, 1.0)
    assert sides_mm.max() / sides_mm.min() < 1.1
    assert np.prod(patch) == pytest.approx(56**3, rel=0.1)


@pytest.mark.parametrize(
    "names", [("LeftLung", "RightLung"), ("kidney_L", "kidney_R"), ("left_kidney",), ("Right-Hippocampus",), ("lh", "rh")]
)
def test_classes_of_one_side_are_never_mirrored(names: tuple[str, ...]) -> None:
    assert choose_augment(replace(SCANS, classes=("background", *names)), (32, 32, 32), (1.0,) * 3)[0].flip_axes == ()


def test_classes_of_no_side_are_mirrored() -> None:
    names = ("background", "liver", "tumor", "Clear cell")
    assert choose_augment(replace(SCANS, classes=names), (32, 32, 32), (1.0,) * 3)[0].flip_axes == (2,)


def test_three_scans_are_no_colours() -> None:
    scans = replace(SCANS, **{**COLOURS, "high": (1200.0,) * 3}, brightness_varies=0.5)
    assert choose_normalisation(scans)[0].kind == "image"
    assert choose_normalisation(replace(PHOTOGRAPHS, brightness_varies=0.5))[0].kind == "dataset"


def test_pixels_stay_pixels_where_no_training_image_states_its_size() -> None:
    unknown = replace(CELLS, spacing_known=False, spacing_mm=(1.0, 1.0))
    assert draft_plan(unknown, LAPTOP).stated_spacing_mm == (1.0, 1.0)
    assert draft_plan(replace(unknown, spacing_known=True), LAPTOP).stated_spacing_mm == ()
    assert draft_plan(replace(unknown, stated_spacing_mm=(0.5, 0.5)), LAPTOP).stated_spacing_mm == (0.5, 0.5)


def test_networks_of_the_papers_learn_at_a_careful_rate() -> None:
    assert draft_plan(CELLS, LAPTOP, network="unet_same").optimiser.learning_rate < draft_plan(CELLS, LAPTOP).optimiser.learning_rate


# ---- when memory is short ----

PATCH = {
    "dims": 2,
    "patch_vox": (64, 64),
    "batch": 8,
    "classes": ("background", "cell"),
    "spacing_mm": (1.0, 1.0),
    "channels": 1,
    "steps": 1,
}
NORMED = Plan(**PATCH, network=NetworkConfig(name="unet_same", widths=(8, 16, 32)))
FREE = Plan(**PATCH, network=NetworkConfig(name="nnunet_plain", widths=(8, 16, 32)))


def saved(plan: Plan, patches: float, *, twice: bool = False) -> Plan:
    """The plan for a memory that so many of its patches fill, with activations kept or computed twice."""
    each = patch_bytes(plan.patch_vox, plan.network, plan.precision, 2, checkpointing=twice)
    return save_memory(plan, Resources(minutes=None, memory_bytes=int(patches * each / FULL_SHARE) + 1))


@pytest.mark.parametrize("plan", [NORMED, FREE])
def test_a_step_that_fits_is_left_as_it_is(plan: Plan) -> None:
    assert saved(plan, 8) == plan
    assert saved(plan, 1000) == plan
    drafted = plan.model_copy(update={"micro_batch": 2, "checkpointing": True, "reasons": {"micro_batch": "a", "checkpointing": "b"}})
    assert saved(drafted, 8) == plan


@pytest.mark.parametrize(("patches", "micro"), [(7.9, 4), (4, 4), (3.9, 3), (2, 2), (1, 1)])
def test_without_batch_norm_the_batch_is_seen_in_parts_as_even_as_can_be(patches: float, micro: int) -> None:
    plan = saved(FREE, patches)
    assert (plan.batch, plan.micro_batch, plan.checkpointing) == (8, micro, False)
    assert f"{micro} of 8 patches" in plan.reasons["micro_batch"]


def test_activations_are_computed_twice_only_where_one_patch_does_not_fit_otherwise() -> None:
    plan = saved(FREE, 1, twice=True)
    assert (plan.micro_batch, plan.checkpointing) == (1, True)
    assert "1 instead of 0" in plan.reasons["checkpointing"]


def test_batch_norm_sees_four_patches_if_computing_twice_makes_room_for_them() -> None:
    assert (saved(NORMED, 4).micro_batch, saved(NORMED, 4).checkpointing) == (4, False)
    assert (saved(NORMED, 3.9).micro_batch, saved(NORMED, 3.9).checkpointing) == (4, True)
    assert (saved(NORMED, 4, twice=True).micro_batch, saved(NORMED, 4, twice=True).checkpointing) == (4, True)
    # No more can be done for it: fewer at a time are better than none.
    assert (saved(NORMED, 2, twice=True).micro_batch, saved(NORMED, 2, twice=True).checkpointing) == (2, True)
    assert saved(NORMED, 0.1).micro_batch == 1


@given(gb=st.floats(0.05, 16), name=st.sampled_from(["modern_unet", "unet_same", "unet3d", "vnet"]), minutes=st.sampled_from([1, 10, None]))
@settings(max_examples=12, deadline=None)
def test_a_step_of_a_drafted_plan_fits_or_is_of_one_patch(gb: float, name: str, minutes: float | None) -> None:
    resources = Resources(minutes=minutes, memory_bytes=int(gb * GB))
    plan = draft_plan(VOLUMES if name == "unet3d" else CELLS, resources, network=name)
    fits = step_bytes(plan) <= FULL_SHARE * resources.memory_bytes
    assert fits or min(plan.batch, plan.micro_batch or plan.batch) == 1
    assert ("micro_batch" in plan.reasons) == (plan.micro_batch > 0)
    assert ("checkpointing" in plan.reasons) == plan.checkpointing
    assert plan.batch >= SMALLEST_BATCH or not fits


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_needs_neither_where_memory_is_plenty(name: str) -> None:
    plan = draft_plan(EVERY[name], replace(LAPTOP, memory_bytes=64 * GB))
    assert (plan.micro_batch, plan.checkpointing) == (0, False)


def test_activations_are_computed_twice_before_the_patch_is_made_smaller() -> None:
    large = replace(VOLUMES, shape_vox=(300, 300, 300))
    plenty = draft_plan(large, LAPTOP)
    needed = 4 * patch_bytes(plenty.patch_vox, plenty.network, plenty.precision, 2) / FULL_SHARE
    short = draft_plan(large, replace(LAPTOP, memory_bytes=int(0.9 * needed)))
    assert short.checkpointing
    assert (short.patch_vox, short.batch) == (plenty.patch_vox, 4)
    shorter = draft_plan(large, replace(LAPTOP, memory_bytes=int(0.3 * needed)))
    assert shorter.checkpointing
    assert np.prod(shorter.patch_vox) < np.prod(plenty.patch_vox)
    assert "computed twice" in shorter.reasons["patch_vox"]
