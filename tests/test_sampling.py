"""Samples: a pure function of seed, step and position; from where annotations are; read as crops."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.config import Plan
from microtome.training.sampling import Pool, Sample, draw_sample, load_sample
from microtome.training.store import StoredCase
from tests.small import NOTHING, small_plan, small_plan_3d, squares, stored_case

CASES = [squares(seed) for seed in range(3)]
POOL = Pool.of(CASES)
# Patches of one voxel: the label is then that of the drawn voxel.
DOT = small_plan(patch_vox=(1, 1), augment=NOTHING, foreground=1.0)


class Recorder:
    """An array that notes how many values are taken from it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.taken = array, array.shape, 0

    def __getitem__(self, key: Any) -> np.ndarray:
        part: np.ndarray = self.array[key]
        self.taken += part.size
        return part


def same(a: Sample, b: Sample) -> bool:
    arrays = [(a.centre, b.centre), (a.warp.matrix, b.warp.matrix)]
    arrays += [(a.warp.bend.control, b.warp.bend.control)] if a.warp.bend is not None and b.warp.bend is not None else []
    bent = (a.warp.bend is None) == (b.warp.bend is None)
    rest = (a.case, a.section, a.intensity, a.other) == (b.case, b.section, b.intensity, b.other)
    return bent and rest and all(np.array_equal(*pair) for pair in arrays)


def drawn_labels(cases: list[StoredCase], plan: Plan, count: int, *, border: int = 0) -> list[np.ndarray]:
    pool = Pool.of(cases)
    return [load_sample(draw_sample(pool, plan, step, 0, border), cases, plan.patch_vox).label.numpy() for step in range(count)]


@given(step=st.integers(0, 10**6), position=st.integers(0, 64), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_sample_is_a_function_of_seed_step_and_position(step: int, position: int, seed: int) -> None:
    plan = small_plan(seed=seed)
    first = draw_sample(POOL, plan, step, position)
    draw_sample(POOL, plan, step + 1, position)
    assert same(first, draw_sample(POOL, plan, step, position))
    for other in (draw_sample(POOL, plan, step + 1, position), draw_sample(POOL, plan, step, position + 1)):
        assert not same(first, other)
    assert not same(first, draw_sample(POOL, small_plan(seed=seed + 1), step, position))


def test_neither_order_nor_threads_change_a_sample() -> None:
    plan = small_plan()
    places = [(step, position) for step in range(6) for position in range(2)]

    def load(place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return load_sample(draw_sample(POOL, plan, *place), CASES, plan.patch_vox)[:2]

    in_order = [load(place) for place in places]
    backwards = [load(place) for place in reversed(places)][::-1]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(load, places))
    for one, two, three in zip(in_order, backwards, at_once, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_loading_reads_the_crop_and_no_more() -> None:
    label = np.zeros((200, 300), np.int16)
    case = stored_case(label)
    image, labels = Recorder(case.image), Recorder(label)
    watched = replace(case, image=image, label=labels)
    plan = small_plan(augment=NOTHING)
    load_sample(draw_sample(Pool.of([case]), plan, 0, 0), [watched], plan.patch_vox)
    # A voxel to spare on each side.
    assert 32**2 <= image.taken <= 34**2
    assert labels.taken == image.taken


def test_a_2d_network_reads_one_section_of_a_volume() -> None:
    volume = np.zeros((5, 40, 44), np.int16)
    image = np.arange(5, dtype=np.float32)[None, :, None, None] * np.ones((1, 5, 40, 44), np.float32)
    case = stored_case(volume, image)
    watched = Recorder(image)
    plan = small_plan(augment=NOTHING, spacing_mm=(4.0, 1.0, 1.0))
    seen = set()
    for step in range(40):
        sample = draw_sample(Pool.of([case]), plan, step, 0)
        loaded, label, _ = load_sample(sample, [replace(case, image=watched)], plan.patch_vox)
        assert (loaded - sample.section).abs().max() < 1e-5  # type: ignore[operator]
        assert label.shape == (32, 32)
        seen.add(sample.section)
    assert seen == set(range(5))
    # Of the section only the crop, with a voxel to spare on each side.
    assert 40 * 32 * 32 < watched.taken <= 40 * 34 * 34


def test_a_2d_network_sees_only_annotated_sections() -> None:
    label = np.full((9, 40, 40), -1, np.int16)
    label[2, 5:9] = 0
    label[7, 30:] = 1
    plan = small_plan(augment=NOTHING, spacing_mm=(4.0, 1.0, 1.0))
    case = stored_case(label)
    assert {draw_sample(Pool.of([case]), plan, step, 0).section for step in range(60)} == {2, 7}


def test_classes_are_drawn_evenly_however_rare() -> None:
    common, rare = np.zeros((50, 50), np.int16), np.zeros((50, 50), np.int16)
    common[:25] = 1
    rare[3, 4] = 2
    cases = [stored_case(common), stored_case(common), stored_case(rare)]
    values = np.array([label.item() for label in drawn_labels(cases, DOT, 600)])
    shares = [(values == k).mean() for k in range(3)]
    # Three standard deviations of a share of a third among 600.
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)


def test_half_of_the_patches_lie_on_an_even_class_the_rest_anywhere() -> None:
    label = np.zeros((60, 60), np.int16)
    label[:6, :6] = 1
    plan = small_plan(patch_vox=(1, 1), augment=NOTHING, foreground=0.5)
    values = np.array([part.item() for part in drawn_labels([stored_case(label)], plan, 600)])
    assert (values == 1).mean() == pytest.approx(0.5 * 0.5 + 0.5 * 0.01, abs=0.06)
    never = small_plan(patch_vox=(1, 1), augment=NOTHING, foreground=0.0)
    assert np.mean([part.item() for part in drawn_labels([stored_case(label)], never, 600)]) < 0.04


def test_cases_are_drawn_by_their_weight() -> None:
    label = np.zeros((40, 40), np.int16)
    cases = [stored_case(label, weight=weight) for weight in (1.0, 3.0)]
    plan = small_plan(foreground=0.0)
    assert np.mean([draw_sample(Pool.of(cases), plan, step, 0).case for step in range(600)]) == pytest.approx(0.75, abs=0.06)


def test_in_a_sparse_case_a_class_is_drawn_by_its_voxels_however_few_of_them_are_noted() -> None:
    label = np.zeros((100, 100), np.int16)
    label[:2, :50], label[-1, -1] = 1, -1
    case = stored_case(label)
    assert case.class_counts == {0: 9899, 1: 100}
    noted = replace(case, class_voxels={k: voxels[::41] for k, voxels in case.class_voxels.items()})
    for drawn_from in (case, noted):
        rng = np.random.default_rng(0)
        voxels = np.array([drawn_from.draw_annotated(rng) for _ in range(3000)])
        values = label[tuple(voxels.T)]
        assert set(values) == {0, 1}
        # Three standard deviations of a share of 1 % among 3000.
        assert (values == 1).mean() == pytest.approx(0.01, abs=0.0055)
        # From everywhere, not from the first that are noted.
        assert voxels[values == 0].mean(0) == pytest.approx([50, 50], abs=4)
    assert all((noted.class_voxels[0] == voxel).all(1).any() for voxel in voxels[values == 0])


def test_a_pool_knows_which_cases_hold_a_class() -> None:
    cases = [stored_case(np.full((4, 4), k), weight=weight) for k, weight in ((2, 1.0), (0, 2.0), (2, 1.0), (-1, 0.0))]
    pool = Pool.of(cases)
    assert [(k, holders.tolist()) for k, holders in pool.holders] == [(0, [1]), (2, [0, 2])]
    assert pool.shares.tolist() == [0.25, 0.5, 0.25, 0]


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_every_patch_of_a_sparse_case_holds_annotation(foreground: float) -> None:
    label = np.full((120, 150), -1, np.int16)
    label[0, 0], label[119, 70], label[60, 149] = 0, 1, 0
    plan = small_plan(augment=NOTHING, foreground=foreground)
    labels = drawn_labels([stored_case(label)], plan, 60)
    assert all((part >= 0).any() for part in labels)
    assert {int(k) for part in labels for k in part[part >= 0]} == {0, 1}
    # Off-centre too: the drawn voxel is found at many places of the patch.
    places = {tuple(np.argwhere(part >= 0)[0]) for part in labels}
    assert len(places) > 20


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_what_a_network_without_padding_answers_for_holds_annotation(foreground: float) -> None:
    label = np.full((120, 150), -1, np.int16)
    label[0, 0], label[119, 70], label[60, 149] = 0, 1, 0
    plan = small_plan(augment=NOTHING, foreground=foreground, patch_vox=(44, 44))
    middles = [part[16:-16, 16:-16] for part in drawn_labels([stored_case(label)], plan, 60, border=16)]
    assert all(part.shape == (12, 12) and (part >= 0).any() for part in middles)
    assert {int(k) for part in middles for k in part[part >= 0]} == {0, 1}


def test_dense_patches_reach_every_corner_and_stay_inside() -> None:
    label = np.zeros((50, 70), np.int16)
    plan = small_plan(augment=NOTHING, foreground=0.0)
    centres = np.array([draw_sample(Pool.of([stored_case(label)]), plan, step, 0).centre for step in range(400)])
    low, high = np.array([15.5, 15.5]), np.array([49, 69]) - 15.5
    assert (centres >= low).all()
    assert (centres <= high).all()
    assert np.abs(centres.min(0) - low).max() < 1.5
    assert np.abs(centres.max(0) - high).max() < 1.5


def test_a_patch_that_is_not_bent_shows_the_image_itself() -> None:
    case = squares(size=47)
    plan = small_plan(augment=NOTHING)
    for step in range(10):
        sample = draw_sample(Pool.of([case]), plan, step, 0)
        image, label, _ = load_sample(sample, [case], plan.patch_vox)
        y, x = (sample.centre - 15.5).astype(int)
        assert np.abs(image.numpy() - case.image[:, y : y + 32, x : x + 32]).max() < 1e-5
        assert np.array_equal(label, case.label[y : y + 32, x : x + 32])


@pytest.mark.parametrize("shape", [(5, 7), (32, 5), (1, 40)])
def test_an_image_smaller_than_the_patch_lies_in_its_middle(shape: tuple[int, int]) -> None:
    label = np.ones(shape, np.int16)
    plan = small_plan(augment=NOTHING)
    image, part, _ = load_sample(draw_sample(Pool.of([stored_case(label)]), plan, 0, 0), [stored_case(label)], plan.patch_vox)
    assert (part >= 0).sum() == np.prod(np.minimum(shape, 32))
    rows, columns = np.flatnonzero((part >= 0).any(1)), np.flatnonzero((part >= 0).any(0))
    assert abs(rows[0] + rows[-1] - 31) <= 1
    assert abs(columns[0] + columns[-1] - 31) <= 1
    assert image.isfinite().all()
    assert image.shape == (1, 32, 32)


def test_a_patch_takes_the_histogram_of_another_case() -> None:
    rng = np.random.default_rng(0)
    cases = [stored_case(np.zeros((40, 40)), rng.uniform(low, low + 1, (1, 40, 40)).astype(np.float32)) for low in (0, 10, 20)]
    plan = small_plan(augment=NOTHING.model_copy(update={"histogram_p": 1.0}))
    pool, seen = Pool.of(cases), set()
    for step in range(30):
        sample = draw_sample(pool, plan, step, 0)
        image = load_sample(sample, cases, plan.patch_vox).image
        # Where the values lie in their own range is where they lie in the other's.
        plain = load_sample(replace(sample, other=None), cases, plan.patch_vox).image
        assert sample.other is not None
        assert (image - 10 * sample.other - (plain - 10 * sample.case)).abs().max() < 0.1
        seen.add((sample.case, sample.other))
    assert seen == {(own, other) for own in range(3) for other in range(3) if own != other}


def test_how_a_patch_is_bent_changes_nothing_else_that_is_drawn() -> None:
    plan = small_plan()
    finer = small_plan(augment=plan.augment.model_copy(update={"elastic_spacing": (4.0, 4.0)}))
    for step in range(20):
        a, b = draw_sample(POOL, plan, step, 0), draw_sample(POOL, finer, step, 0)
        assert same(replace(a, warp=replace(a.warp, bend=None)), replace(b, warp=replace(b.warp, bend=None)))


def test_patches_of_volumes_come_with_all_augmentation() -> None:
    label = np.random.default_rng(0).integers(0, 2, (20, 40, 40)).astype(np.int16)
    plan = small_plan_3d()
    image, part, _ = load_sample(draw_sample(Pool.of([stored_case(label)]), plan, 1, 0), [stored_case(label)], plan.patch_vox)
    assert image.shape == (1, 16, 16, 16)
    assert set(np.unique(part)) <= {-1, 0, 1}
