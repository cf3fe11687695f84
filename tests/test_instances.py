"""Objects that touch: the same in any blocks, components where nothing is to be split, and real nuclei, which components run together."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed

from microtome.data.synthetic import cells
from microtome.errors import ConfigError, RunError
from microtome.inference import instances as module
from microtome.inference.instances import Splitting, instances_of_labels, segment_instances
from microtome.training.borders import separated


def segmented(foreground: np.ndarray, rules: Splitting | None = None, block: tuple[int, ...] | None = None, **options: Any) -> np.ndarray:
    """Numbered objects, of one block unless told otherwise."""
    out = np.full(foreground.shape, 99, np.uint32)
    count = segment_instances(foreground, out, rules or Splitting(), block_vox=block or foreground.shape, **options)
    assert count == out.max(initial=0)
    return out


def discs(shape: tuple[int, ...], *centres_and_radius: tuple[float, ...]) -> np.ndarray:
    """255 inside of balls, 0 elsewhere; each is given as its centre, then its radius."""
    grid = np.indices(shape)
    inside = [sum((grid[a] - c[a]) ** 2 for a in range(len(shape))) <= c[-1] ** 2 for c in centres_and_radius]
    return np.where(np.any(inside, axis=0), 255, 0).astype(np.uint8)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two maps hold the same objects, whatever their numbers."""
    pairs = {(int(x), int(y)) for x, y in zip(a.ravel(), b.ravel(), strict=True)}
    return len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs}) and (a > 0).tolist() == (b > 0).tolist()


def ap50(found: np.ndarray, truth: np.ndarray) -> float:
    """TP / (TP + FP + FN) with a match where the overlap is more than half of the union, pair by pair."""
    hits = 0
    for number in np.unique(truth[truth > 0]):
        mine = truth == number
        for other in np.unique(found[mine & (found > 0)]):
            hits += np.count_nonzero(mine & (found == other)) > np.count_nonzero(mine | (found == other)) / 2
    return hits / (len(np.unique(found[found > 0])) + len(np.unique(truth[truth > 0])) - hits)


@st.composite
def probabilities(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Smooth foreground and border maps, some of them flat in parts, and the sides of blocks."""
    shape = draw(st.one_of(hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), hnp.array_shapes(min_dims=3, max_dims=3, max_side=14)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = []
    for middle in (draw(st.integers(80, 220)), 40):
        smooth = ndimage.gaussian_filter(rng.normal(size=shape), draw(st.sampled_from([0.0, 1.0, 2.0])))
        maps.append(np.clip(middle + 90 * smooth / (smooth.std() + 1e-9), 0, 255))
    # With few levels many neighbours are equally high.
    levels = draw(st.sampled_from([1, 64, 255]))
    foreground, border = ((np.round(part / levels) * levels).clip(0, 255).astype(np.uint8) for part in maps)
    return foreground, border, tuple(draw(st.integers(1, size + 3)) for size in shape)


RULES = st.builds(
    Splitting,
    seed_threshold=st.sampled_from([0.5, 0.8]),
    depth_vox=st.sampled_from([0.1, 0.5, 2.0]),
    neck=st.sampled_from([0.6, 0.85, 1.0]),
    reach_vox=st.sampled_from([1, 3, 32]),
    smoothing_vox=st.sampled_from([0.0, 1.0, 1.7]),
    min_size_vox=st.sampled_from([0, 5]),
)


@given(probabilities(), RULES, st.booleans(), st.sampled_from([1, 2, 8]), st.sampled_from([(1.0, 1.0, 1.0), (3.0, 1.0, 0.7)]))
@settings(max_examples=120, deadline=None)
def test_the_blocks_change_nothing(
    maps: tuple[np.ndarray, np.ndarray, tuple[int, ...]], rules: Splitting, with_border: bool, climb: int, spacing: tuple[float, ...]
) -> None:
    foreground, border, block = maps
    # Blocks of single voxels are slow, and those of a few meet in all the ways that there are.
    block = tuple(max(side, 2 if foreground.ndim == 2 else 4) for side in block)
    options = {"border": border if with_border else None, "spacing_mm": spacing[: foreground.ndim]}
    whole = segmented(foreground, rules, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CLIMB_VOX", climb)
        np.testing.assert_array_equal(segmented(foreground, rules, block, **options), whole)


@given(probabilities(), st.booleans(), st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_objects_are_components_where_no_neck_counts(
    maps: tuple[np.ndarray, np.ndarray, tuple[int, ...]], with_border: bool, smoothing: float
) -> None:
    foreground, border, _ = maps
    rules = Splitting(depth_vox=1e9, smoothing_vox=smoothing)
    found = segmented(foreground, rules, border=border if with_border else None)
    np.testing.assert_array_equal(found, ndimage.label(foreground >= 128)[0])


@given(probabilities(), RULES)
@settings(max_examples=60, deadline=None)
def test_objects_are_connected_parts_of_the_foreground_numbered_by_their_first_voxels(
    maps: tuple[np.ndarray, np.ndarray, tuple[int, ...]], rules: Splitting
) -> None:
    foreground, border, _ = maps
    found = segmented(foreground, rules, border=border)
    numbers, first, sizes = np.unique(found[found > 0], return_index=True, return_counts=True)
    assert numbers.tolist() == list(range(1, len(numbers) + 1))
    assert (np.diff(first) > 0).all()
    assert not (found[foreground < 128] > 0).any()
    assert (sizes >= rules.min_size_vox).all()
    # Nothing but objects that are too small is left out, and no object is in two places.
    assert skimage_label(found, connectivity=1).max(initial=0) == len(numbers)
    if not rules.min_size_vox:
        assert (found[foreground >= 128] > 0).all()


def landscape(seed: int, rules: Splitting) -> tuple[np.ndarray, np.ndarray]:
    """Random blobs and the heights that are made of them, minus infinity outside."""
    rng = np.random.default_rng(seed)
    foreground = np.clip(150 + 60 * ndimage.gaussian_filter(rng.normal(size=(60, 70)), 3) / 0.09, 0, 255).astype(np.uint8)
    height, _ = module._Heights(foreground, None, rules, (1.0, 1.0))((slice(0, 60), slice(0, 70)))
    return foreground, height.astype(np.float64)


def uphill(height: np.ndarray, place: tuple[int, ...]) -> tuple[int, ...]:
    """Where a walk ends that goes on to the highest neighbour as long as that is higher."""
    while True:
        steps = [tuple(p + step * (a == axis) for a, p in enumerate(place)) for axis in range(height.ndim) for step in (-1, 1)]
        inside = [step for step in steps if all(0 <= p < size for p, size in zip(step, height.shape, strict=True))]
        best = max(inside, key=lambda step: height[step])
        if height[best] <= height[place]:
            return place
        place = best


@pytest.mark.parametrize("seed", range(3))
def test_voxels_belong_to_where_a_walk_uphill_ends_and_mostly_to_what_a_flood_gives(seed: int) -> None:
    rules = Splitting(depth_vox=1e-6, neck=1.0)
    foreground, height = landscape(seed, rules)
    found = segmented(foreground, rules)
    mask = height > -np.inf
    ends = np.full(height.shape, 0)
    for place in map(tuple, np.argwhere(mask)):
        ends[place] = 1 + np.ravel_multi_index(uphill(height, place), height.shape)
    assert found.max() > 10
    assert same_partition(found, ends)
    # A flood may reach a shoulder from either side at the same height: it agrees but for these.
    summits = (height == ndimage.maximum_filter(height, footprint=ndimage.generate_binary_structure(2, 1))) & mask
    seeds = np.where(summits, found, 0).astype(np.int32)
    assert np.mean((watershed(-np.where(mask, height, 0), seeds, mask=mask) == found)[mask]) > 0.9


@pytest.mark.parametrize("depth", [0.05, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_summits_count_by_their_dynamics(seed: int, depth: float) -> None:
    # Regional maxima of the heights after reconstruction from what lies `depth` below them (Grimaud 1992).
    rules = Splitting(depth_vox=depth, neck=1.0)
    foreground, height = landscape(seed, rules)
    mask = height > -np.inf
    known, face = np.where(mask, height, -9), ndimage.generate_binary_structure(2, 1)
    domes = reconstruction(known - depth, known, footprint=face)
    tops, count = ndimage.label(local_maxima(domes, footprint=face) & mask)
    found = segmented(foreground, rules)
    assert found.max() == count
    # Each object holds one of them.
    assert sorted(int(found[tops == top].max()) for top in range(1, count + 1)) == list(range(1, count + 1))


@pytest.mark.parametrize(("apart", "count"), [(0, 1), (8, 1), (17, 2), (19, 2)])
def test_discs_that_overlap_are_two_from_a_narrow_neck_on(apart: int, count: int) -> None:
    foreground = discs((30, 50), (15, 14, 10), (15, 14 + apart, 10))
    assert ndimage.label(foreground)[1] == 1
    found = segmented(foreground)
    assert found.max() == count
    if count == 2:
        # The cut runs halfway between the centres.
        columns = np.nonzero(found == 1)[1], np.nonzero(found == 2)[1]
        assert columns[0].max() <= 14 + apart / 2 + 1
        assert columns[1].min() >= 14 + apart / 2 - 1


def test_balls_are_told_apart_by_millimetres_and_not_by_voxels() -> None:
    # Two balls of 10 mm in planes 4 mm apart, 17 mm from each other.
    grid = np.indices((12, 30, 50)) * np.array([4.0, 1.0, 1.0])[:, None, None, None]
    inside = [((grid - np.array([22, 15, x])[:, None, None, None]) ** 2).sum(axis=0) <= 100 for x in (14, 31)]
    foreground = np.where(inside[0] | inside[1], 255, 0).astype(np.uint8)
    found = segmented(foreground, spacing_mm=(4.0, 1.0, 1.0))
    assert found.max() == 2
    assert np.array_equal(found, segmented(foreground, block=(5, 9, 9), spacing_mm=(0.4, 0.1, 0.1)))
    near = min(np.count_nonzero((found == n) & inside[n - 1]) / np.count_nonzero(inside[n - 1]) for n in (1, 2))
    assert near > 0.9


def test_a_dip_of_the_probability_parts_what_the_outline_does_not() -> None:
    foreground = np.zeros((20, 40), np.uint8)
    foreground[4:16, 3:37] = 250
    assert segmented(foreground).max() == 1
    foreground[4:16, 19:21] = 130
    assert ndimage.label(foreground >= 128)[1] == 1
    found = segmented(foreground)
    assert found.max() == 2
    assert set(np.unique(found[4:16, 3:19])) == {1}
    assert set(np.unique(found[4:16, 21:37])) == {2}


def test_a_learned_border_parts_objects_and_belongs_to_them() -> None:
    foreground, border = np.zeros((20, 40), np.uint8), np.zeros((20, 40), np.uint8)
    foreground[4:16, 3:37] = 255
    border[4:16, 14:26] = 255
    found = segmented(foreground, border=border)
    assert found.max() == 2
    assert ((found > 0) == (foreground > 0)).all()
    assert set(np.unique(found[4:16, 3:20])) == {1}
    assert set(np.unique(found[4:16, 20:37])) == {2}


def test_an_object_that_nothing_is_sure_of_is_still_one() -> None:
    foreground = discs((40, 40), (12, 12, 8), (28, 28, 8)) // 255 * 160
    foreground[28, 28] = 255
    found = segmented(foreground, Splitting(seed_threshold=0.9))
    np.testing.assert_array_equal(found, ndimage.label(foreground)[0])
    assert found.max() == 2


@pytest.mark.parametrize("block", [(16, 16), (7, 100), (33, 20)])
def test_an_object_larger_than_any_block_and_its_border_stays_whole(block: tuple[int, int]) -> None:
    foreground = np.full((90, 110), 255, np.uint8)
    foreground[40:43, :50] = 0
    foreground[40:43, 60:] = 0
    rules = Splitting(reach_vox=5)
    found = segmented(foreground, rules, block)
    np.testing.assert_array_equal(found, segmented(foreground, rules))
    # A passage of 10 between halls of 40: with depth told up to 5 it is as wide as they are, with 32 it is a neck.
    assert found.max() == 1
    assert segmented(foreground, Splitting(reach_vox=32), block).max() == 2


def test_objects_too_small_go_and_numbers_close_up() -> None:
    foreground = discs((30, 60), (5, 5, 2), (15, 20, 8), (15, 50, 1), (24, 35, 4))
    assert segmented(foreground).max() == 4
    found = segmented(foreground, Splitting(min_size_vox=20))
    assert np.unique(found).tolist() == [0, 1, 2]
    assert (found[15, 20], found[24, 35], found[5, 5], found[15, 50]) == (1, 2, 0, 0)


@pytest.mark.parametrize("value", [0, 127, 128, 255])
def test_all_or_nothing(value: int) -> None:
    found = segmented(np.full((9, 8, 7), value, np.uint8), block=(4, 4, 4))
    assert (found == (value >= 128)).all()


def test_files_are_enough_and_what_they_held_does_not_matter(tmp_path: Path) -> None:
    truth = cells((160, 160), seed=3, count=25).instances
    foreground = np.memmap(tmp_path / "in", np.uint8, "w+", shape=truth.shape)
    foreground[:] = probability(truth)
    out = np.memmap(tmp_path / "out", np.uint64, "w+", shape=truth.shape)
    out[:] = 2**63
    segment_instances(foreground, out, Splitting(), block_vox=(64, 48))
    np.testing.assert_array_equal(out, segmented(np.array(foreground)))


def test_pieces_that_do_not_fit_are_refused() -> None:
    foreground = np.zeros((40, 40), np.uint8)
    foreground[::2, ::2] = 255
    with pytest.raises(RunError, match=r"at most 255 pieces, got 400"):
        segment_instances(foreground, np.zeros((40, 40), np.uint8), Splitting(), block_vox=(40, 40))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threshold", bad) for bad in (0, -0.1, 1.1, math.nan)),
        *(("seed_threshold", bad) for bad in (0.4, 1.01, math.nan)),
        *(("depth_vox", bad) for bad in (0, -1, math.nan)),
        *(("neck", bad) for bad in (0, 1.5, math.nan)),
        *(("reach_vox", bad) for bad in (0, math.inf)),
        *(("smoothing_vox", bad) for bad in (-1, math.inf)),
        ("min_size_vox", -1),
    ],
)
def test_rules_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"splitting: {name}: expected .*, got {value}"):
        Splitting(**{name: value})


@given(hnp.arrays(np.int16, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=st.sampled_from([-1, 0, 1, 2, 2])), st.data())
@settings(max_examples=60, deadline=None)
def test_instances_of_labels_are_the_components_of_each_class(labels: np.ndarray, data: st.DataObject) -> None:
    background = data.draw(st.sampled_from([0, 2]))
    block = tuple(data.draw(st.integers(1, size)) for size in labels.shape)
    out = np.full(labels.shape, 5, np.uint32)
    objects = instances_of_labels(labels, out, background=background, block_vox=block)
    shifted = np.where((labels < 0) | (labels == background), 0, labels + 1)
    assert same_partition(out, skimage_label(shifted, connectivity=1, background=0))
    for number, value, size in zip(range(1, len(objects) + 1), objects.values, objects.sizes_vox, strict=True):
        assert set(labels[out == number].tolist()) == {int(value)}
        assert np.count_nonzero(out == number) == size
    numbers, first = np.unique(out[out > 0], return_index=True)
    assert numbers.tolist() == list(range(1, len(objects) + 1))
    assert (np.diff(first) > 0).all()


def probability(truth: np.ndarray, sd: float = 1.5) -> np.ndarray:
    """What a network might say of these objects: foreground, a little less of it between those that touch, blurred."""
    return (ndimage.gaussian_filter((separated(truth) > 0).astype(np.float32), sd) * 255).astype(np.uint8)


def numbered_masks(folder: Path) -> np.ndarray:
    """One object a file."""
    truth = np.zeros(0)
    for number, file in enumerate(sorted(folder.iterdir()), 1):
        with Image.open(file) as image:
            mask = np.asarray(image.convert("L")) > 0
        truth = np.where(mask, number, truth if number > 1 else 0)
    return truth


def test_real_nuclei_that_touch_are_told_apart(data_folder: Callable[[str], Path]) -> None:
    scores = []
    folders = sorted((data_folder("dsb2018") / "stage1_train").iterdir(), key=lambda folder: -len(list((folder / "masks").iterdir())))
    maps = (numbered_masks(folder / "masks") for folder in folders)
    # The fullest of the small images.
    for truth in itertools.islice((truth for truth in maps if truth.shape == (256, 256)), 4):
        foreground = probability(truth)
        found = segmented(foreground)
        np.testing.assert_array_equal(segmented(foreground, block=(100, 90)), found)
        scores.append((ap50(found, truth), ap50(ndimage.label(foreground >= 128)[0], truth)))
    ours, components = np.mean(scores, axis=0)
    assert ours > components + 0.1
    assert ours > 0.8
