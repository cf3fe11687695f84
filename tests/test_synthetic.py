"""Made data: it is the same each time, no threshold solves it, and it lies on disk as `open_dataset` reads it."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from microtome.data.dataset import open_dataset
from microtome.data.synthetic import (
    TUBULE_SPACING_MM,
    DemoConfig,
    DemoData,
    cells,
    sparse_annotation,
    tubules,
    write_demo_data,
)
from microtome.errors import ConfigError
from microtome.images.files import read_image


def best_threshold_iou(image: np.ndarray, label: np.ndarray) -> float:
    """The highest IoU that any one threshold on the grey value reaches, bright being foreground."""
    ious = [np.sum((image >= t) & (label == 1)) / np.sum((image >= t) | (label == 1)) for t in range(1, 256)]
    return float(max(ious))


def test_tubules_are_a_function_of_shape_and_seed() -> None:
    first, again, other = tubules((24, 32, 32), seed=3), tubules((24, 32, 32), seed=3), tubules((24, 32, 32), seed=4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    assert not np.array_equal(first.label, other.label)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tubules_fill_a_tenth_to_a_fifth_and_no_threshold_finds_them(seed: int) -> None:
    volume = tubules(seed=seed)
    assert 0.10 <= np.mean(volume.label == 1) <= 0.20
    # Far above what marking everything gives (the share itself) and far below a solved task.
    assert 0.25 < best_threshold_iou(volume.image, volume.label) < 0.6


def test_a_tubule_is_a_bright_wall_around_a_dark_lumen() -> None:
    volume = tubules(seed=0)
    depth = ndimage.distance_transform_edt(volume.label)
    wall = volume.image[(depth > 0) & (depth <= 2)].mean()
    lumen, outside = volume.image[depth > 4].mean(), volume.image[volume.label == 0].mean()
    assert wall > 1.5 * lumen
    assert lumen < 1.5 * outside


def test_some_things_as_bright_as_a_tubule_are_none() -> None:
    volume = tubules(seed=0)
    smooth = ndimage.gaussian_filter(volume.image.astype(float), 1)
    bright, count = ndimage.label(smooth > np.median(smooth[volume.label == 1]))
    in_tubules = set(np.unique(bright[ndimage.binary_dilation(volume.label, iterations=2)]))
    sizes = ndimage.sum_labels(np.ones(bright.shape), bright, range(count + 1))
    distractors = [n for n in range(1, count + 1) if n not in in_tubules and sizes[n] >= 15]
    assert len(distractors) >= 5


def test_a_large_volume_is_as_full_as_a_small_one() -> None:
    assert 0.10 <= np.mean(tubules((96, 160, 160), seed=5).label == 1) <= 0.20


@given(shape=st.tuples(*[st.integers(16, 40)] * 3), seed=st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_tubules_of_any_shape_and_seed_hold_both_classes(shape: tuple[int, int, int], seed: int) -> None:
    volume = tubules(shape, seed)
    assert volume.image.shape == volume.label.shape == shape
    assert (volume.image.dtype, volume.label.dtype) == (np.uint8, np.int16)
    assert set(np.unique(volume.label)) == {0, 1}
    assert volume.image.std() > 3


def test_a_volume_of_96_voxels_a_side_takes_less_than_two_seconds() -> None:
    start = time.process_time()
    tubules((96, 96, 96))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("shape", [(64, 96), (8, 96, 96)])
def test_a_shape_without_room_for_tubules_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="3 sizes of at least 16"):
        tubules(shape)


def test_three_three_two_slices_leave_what_is_counted_by_hand() -> None:
    label = np.ones((64, 96, 96), np.int16)
    sparse = sparse_annotation(label, (3, 3, 2), seed=1)
    # What is not on a slice lies on none of 61 xy, 93 xz and 94 yz sections.
    assert np.sum(sparse == -1) == 61 * 93 * 94
    assert sparse.dtype == np.int16


@given(data=st.data(), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_annotated_voxels_keep_their_label_and_form_whole_slices(data: st.DataObject, seed: int) -> None:
    shape = data.draw(st.tuples(*[st.integers(4, 9)] * 3))
    slices = data.draw(st.tuples(*[st.integers(0, 3)] * 3).filter(any))
    label = np.random.default_rng(seed).integers(0, 4, shape)
    sparse = sparse_annotation(label, slices, seed)
    annotated = sparse != -1
    assert np.array_equal(sparse[annotated], label[annotated])
    whole = [annotated.all(axis=tuple({0, 1, 2} - {axis})).sum() for axis in range(3)]
    assert tuple(whole) == slices


def test_slices_stay_apart_and_are_spread_over_the_axis() -> None:
    kept = np.flatnonzero(sparse_annotation(np.zeros((90, 4, 4), int), (3, 0, 0), seed=5)[:, 0, 0] == 0)
    assert [int(n) // 30 for n in kept] == [0, 1, 2]
    assert np.diff(kept).min() >= 15


@pytest.mark.parametrize("slices", [(0, 0, 0), (1, 1), (5, 0, 0), (-1, 1, 1)])
def test_slices_that_cannot_be_are_refused(slices: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="4×4×4"):
        sparse_annotation(np.zeros((4, 4, 4), int), slices)


def test_cells_are_a_function_of_their_arguments() -> None:
    first, again, other = cells(seed=1), cells(seed=1), cells(seed=2)
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cells_are_numbered_touch_and_escape_a_threshold(seed: int) -> None:
    picture = cells(seed=seed)
    count = picture.instances.max()
    assert np.array_equal(np.unique(picture.instances), np.arange(count + 1))
    assert 30 <= count <= 40
    assert np.array_equal(picture.label, picture.instances > 0)
    left, right = picture.instances[:, :-1], picture.instances[:, 1:]
    touching = {tuple(sorted(pair)) for pair in zip(left.flat, right.flat, strict=True) if 0 < pair[0] != pair[1] > 0}
    assert len(touching) >= 5
    assert best_threshold_iou(picture.image, picture.label) < 0.75


def test_about_a_fifth_of_the_cells_is_less_than_half_as_bright_as_the_usual_one() -> None:
    pictures = [cells(seed=seed) for seed in range(6)]
    means = np.concatenate([ndimage.mean(p.image, p.instances, range(1, p.instances.max() + 1)) for p in pictures])
    background = np.mean([p.image[p.label == 0].mean() for p in pictures])
    above = means - background
    assert 0.1 < np.mean(above < 0.5 * np.median(above)) < 0.4


@given(height=st.integers(32, 70), width=st.integers(32, 70), count=st.integers(1, 12))
@settings(max_examples=12, deadline=None)
def test_cells_of_any_shape_have_the_right_types(height: int, width: int, count: int) -> None:
    picture = cells((height, width), seed=height, count=count)
    assert picture.image.shape == picture.label.shape == picture.instances.shape == (height, width)
    assert (picture.image.dtype, picture.label.dtype, picture.instances.dtype) == (np.uint8, np.int16, np.int32)
    assert picture.instances.max() <= count


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    config = DemoConfig(volume_vox=(16, 24, 32), slices=(1, 2, 1), picture_vox=(64, 48), pictures=4)
    return write_demo_data(tmp_path_factory.mktemp("demo"), config)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_demo_pairs_images_with_labels_and_keeps_truth_apart(demo: DemoData) -> None:
    assert names(demo.tubules) == ["images", "labels", "microtome.yaml"]
    seen = ["tubules_1.tif", "tubules_2.tif"]
    assert names(demo.tubules / "images") == names(demo.tubules / "labels") == names(demo.tubules_truth) == seen
    assert names(demo.tubules_unseen) == names(demo.tubules_unseen_truth) == ["tubules_3.tif"]
    assert names(demo.cells / "images") == names(demo.cells / "masks") == [f"cells_0{n}.png" for n in (1, 2, 3, 4)]
    assert names(demo.cells_unseen) == names(demo.cells_unseen_truth) == ["cells_05.png"]


def test_the_sparse_labels_agree_with_the_dense_truth(demo: DemoData) -> None:
    sparse = read_image(demo.tubules / "labels" / "tubules_2.tif").array[0]
    dense = read_image(demo.tubules_truth / "tubules_2.tif").array[0]
    annotated = sparse != 255
    assert np.sum(~annotated) == 15 * 22 * 31
    assert np.array_equal(sparse[annotated], dense[annotated])
    assert set(np.unique(dense)) == {0, 1}


def test_the_demo_opens_as_a_dataset_without_findings(demo: DemoData) -> None:
    tubule_data, cell_data = open_dataset(demo.tubules), open_dataset(demo.cells)
    assert tubule_data.legend.names == ("background", "tubule")
    assert [len(tubule_data.labelled), len(cell_data.labelled)] == [2, 4]
    assert [f for f in (*tubule_data.findings, *cell_data.findings) if f.severity != "note"] == []
    case = tubule_data.cases[0]
    assert set(np.unique(tubule_data.read_label(case))) == {-1, 0, 1}
    assert tubule_data.read_image(case).spacing_mm == pytest.approx(TUBULE_SPACING_MM)
    assert set(np.unique(cell_data.read_label(cell_data.cases[0]))) == {0, 1}


def test_the_demo_is_the_same_bytes_each_time(demo: DemoData, tmp_path: Path) -> None:
    again = write_demo_data(tmp_path, DemoConfig(volume_vox=(16, 24, 32), slices=(1, 2, 1), picture_vox=(64, 48), pictures=4))
    for path in sorted(demo.cells.rglob("*.png")):
        assert (again.cells / path.relative_to(demo.cells)).read_bytes() == path.read_bytes()
    first, second = (read_image(data.tubules_unseen / "tubules_3.tif") for data in (demo, again))
    assert np.array_equal(first.array, second.array)
