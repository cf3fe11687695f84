"""Stored cases: on the plan's grid, memory-mapped, taken up again after an interruption, never half of one."""

import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from microtome.config import LossConfig, NormalisationConfig
from microtome.data.case import Planes
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import RunError
from microtome.preprocess import normalise, resample, resample_labels
from microtome.training import store
from microtome.training.store import VOXELS_A_CLASS, class_counts, nearest, prepare, quantiles, store_cases, stored_bytes, weigh_borders
from tests.folders import nifti, png, text
from tests.small import small_plan, small_plan_3d

RNG_SEED = 0
BORDERS = LossConfig(border_weight=10.0)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = write_demo_data(tmp_path_factory.mktemp("data"), DemoConfig(picture_vox=(48, 56), volume_vox=(16, 20, 24), pictures=4))
    return open_dataset(data.cells)


@pytest.fixture(scope="module")
def tubules(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = write_demo_data(tmp_path_factory.mktemp("data"), DemoConfig(picture_vox=(48, 56), volume_vox=(16, 20, 24), pictures=1))
    return open_dataset(data.tubules)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that are preprocessed."""
    names: list[str] = []

    def counting(dataset: Dataset, case: Any, plan: Any) -> Any:
        names.append(case.name)
        return prepare(dataset, case, plan)

    monkeypatch.setattr(store, "prepare", counting)
    return names


def test_a_stored_case_is_the_normalised_image_and_the_label(cells: Dataset, tmp_path: Path) -> None:
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert [case.name for case in stored] == [case.name for case in cells.labelled]
    for case, source in zip(stored, cells.labelled, strict=True):
        assert isinstance(case.image[:], np.memmap)
        assert isinstance(case.label[:], np.memmap)
        assert (case.image[:].dtype, case.label[:].dtype) == (np.float32, np.int16)
        assert np.array_equal(case.image[:], normalise(cells.read_image(source).array, small_plan().normalisation))
        assert np.array_equal(case.label[:], cells.read_label(source))
        assert (case.shape_vox, case.dense, case.weight) == ((48, 56), True, 1.0)


def test_memory_maps_cannot_be_written(cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)[0]
    with pytest.raises(ValueError, match="read-only"):
        case.image[:][0, 0, 0] = 1


def test_cases_are_brought_to_the_plan_s_spacing(cells: Dataset, tmp_path: Path) -> None:
    plan = small_plan(spacing_mm=(2.0, 4.0))
    case, source = store_cases(cells, cells.labelled[:1], plan, tmp_path)[0], cells.labelled[0]
    assert case.shape_vox == (24, 14)
    assert np.allclose(case.image[:], resample(normalise(cells.read_image(source).array, plan.normalisation), (24, 14)))
    assert np.array_equal(case.label[:], resample_labels(cells.read_label(source), (24, 14)))


def test_pictures_are_resized_to_the_one_shape_that_the_plan_asks_for(cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(resize_vox=(20, 30), loss=BORDERS), tmp_path)[0]
    assert case.image.shape == (1, 20, 30)
    assert case.weight_map is not None
    assert case.label.shape == case.weight_map.shape == (20, 30)
    assert np.array_equal(
        case.image[:], resample(normalise(cells.read_image(cells.labelled[0]).array, small_plan().normalisation), (20, 30))
    )


def test_sections_are_not_mixed_for_a_2d_network(tubules: Dataset, tmp_path: Path) -> None:
    plan = small_plan(classes=("background", "tubule"), spacing_mm=(0.1, 0.00352, 0.00352))
    assert store_cases(tubules, tubules.labelled[:1], plan, tmp_path)[0].shape_vox == (16, 10, 12)


def test_voxels_of_each_class_are_noted_where_they_lie(tubules: Dataset, tmp_path: Path) -> None:
    for case in store_cases(tubules, tubules.labelled, small_plan_3d(), tmp_path):
        assert not case.dense
        assert set(case.class_voxels) == {0, 1}
        for k, voxels in case.class_voxels.items():
            assert (case.label[tuple(voxels.T)] == k).all()
            assert len(np.unique(voxels, axis=0)) == len(voxels) == min(VOXELS_A_CLASS, (case.label[:] == k).sum())
            assert (voxels.dtype, case.class_counts[k]) == (np.int32, (case.label[:] == k).sum())


def test_of_a_large_class_some_voxels_from_everywhere_are_noted(tmp_path: Path) -> None:
    label = np.zeros((100, 120), np.int16)
    label[:, 60:] = 255
    png(tmp_path / "images" / "a.png", label)
    png(tmp_path / "labels" / "a.png", label)
    dataset = open_dataset(tmp_path)
    first, again = (store_cases(dataset, dataset.labelled, small_plan(), tmp_path / "cache")[0].class_voxels for _ in range(2))
    assert [len(first[k]) for k in (0, 1)] == [VOXELS_A_CLASS] * 2
    assert first[0].mean(0) == pytest.approx([49.5, 29.5], abs=3)
    assert np.array_equal(first[1], again[1])


def test_what_an_interrupted_run_stored_is_taken(cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    store_cases(cells, cells.labelled[:2], small_plan(), tmp_path)
    assert len(prepared) == 2
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert sorted(prepared) == sorted(case.name for case in cells.labelled)


@pytest.mark.parametrize("last", ["image.npy", "label.npy", "voxels.npz"])
def test_a_case_of_which_a_file_is_missing_is_stored_again(last: str, cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    prepared.clear()
    # What a kill leaves: the files before, half of one under a temporary name.
    files = [next(tmp_path.glob(f"00001*.{name}")) for name in ("image.npy", "label.npy", "voxels.npz")]
    while (file := files.pop()) and not file.name.endswith(last):
        file.unlink()
    file.rename(file.with_name(f".part-x-{file.name}"))
    for before in files:
        before.write_bytes(b"of another day")
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert prepared == [cells.labelled[1].name]
    assert stored[1].shape_vox == (48, 56)
    assert stored[1].image.shape == (1, 48, 56)


def test_where_the_classes_are_is_found_once(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store_cases(cells, cells.labelled, small_plan(), tmp_path)

    def fail(*_: Any) -> None:
        raise AssertionError("a voxel was looked at again")

    monkeypatch.setattr(store, "class_counts", fail)
    monkeypatch.setattr(store, "draw_voxels", fail)
    for case, again in zip(first, store_cases(cells, cells.labelled, small_plan(), tmp_path), strict=True):
        assert case.class_counts == again.class_counts
        assert all(np.array_equal(case.class_voxels[k], again.class_voxels[k]) for k in case.class_counts)


@given(label=arrays(np.int16, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.sampled_from([-1, 0, 1, 5, 32767])))
@settings(max_examples=30, deadline=None)
def test_voxels_are_counted_by_class(label: np.ndarray) -> None:
    expected = {int(k): int(count) for k, count in zip(*np.unique(label[label >= 0], return_counts=True), strict=True)}
    assert class_counts(label) == expected


def test_no_more_files_are_open_than_are_allowed_and_all_can_be_read(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_OPEN", 2)
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    for case, source in [*zip(stored, cells.labelled, strict=True)] * 2:
        assert np.array_equal(case.image[:], normalise(cells.read_image(source).array, small_plan().normalisation))
        assert np.array_equal(case.label[:, 3:9], cells.read_label(source)[:, 3:9])
        open_files = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
        assert sum(str(tmp_path) in name for name in open_files) <= 2


def test_two_hundred_files_are_stored_and_read_where_a_process_may_open_fewer(tmp_path: Path) -> None:
    for number in range(100):
        for folder in ("images", "labels"):
            png(tmp_path / "data" / folder / f"{number}.png", np.arange(16).reshape(4, 4) % 2)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from microtome.data.dataset import open_dataset; from microtome.training.store import store_cases\n"
        "from tests.small import small_plan\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (170, 170))\n"
        "dataset = open_dataset(Path(sys.argv[1]))\n"
        "stored = store_cases(dataset, dataset.labelled, small_plan(), Path(sys.argv[2]))\n"
        "print(len(stored), sum(int(case.label[:].sum()) for case in stored), sum(case.image[0, 0].size for case in stored))\n"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "data"), str(tmp_path / "cache")]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["100", "800", "400"]


def test_no_more_cases_are_prepared_at_once_than_fit_into_memory(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def slow(*arguments: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return prepare(*arguments)

    monkeypatch.setattr(store, "prepare", slow)
    monkeypatch.setattr(store.os, "cpu_count", lambda: 64)
    store_cases(cells, cells.labelled * 4, small_plan(), tmp_path)
    assert 1 < most <= 4


@pytest.mark.parametrize("spacing_mm", [(0.00204, 0.00176, 0.00176), (0.004, 0.00352, 0.00704)])
@pytest.mark.parametrize("loss", [LossConfig(), BORDERS])
def test_the_bytes_of_a_case_are_known_from_its_header(
    spacing_mm: tuple[float, ...], loss: LossConfig, tubules: Dataset, tmp_path: Path
) -> None:
    plan = small_plan_3d(spacing_mm=spacing_mm, loss=loss)
    whole = tubules.labelled[0]
    cases = [whole, replace(whole, name=f"{whole.name}[2:11]", sections=(2, 11))]
    for case in cases:
        store_cases(tubules, [case], plan, tmp_path / case.name)
        size = sum(path.stat().st_size for path in (tmp_path / case.name).iterdir())
        # Headers, and classes of which fewer voxels are annotated than may be noted.
        assert size - 2000 <= stored_bytes(tubules, case, plan) <= size + 2 * 2000 * 12


def test_what_will_not_fit_on_the_disk_is_refused_before_any_work(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: list[str]
) -> None:
    needed = sum(stored_bytes(cells, case, small_plan()) for case in cells.labelled)
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: free)
    with pytest.raises(RunError, match=rf"expected {needed} free bytes for 4 prepared cases.*got {needed - 1} .*--resume"):
        store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert prepared == []
    free.free = needed
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    # What is there needs no room any more.
    free.free = 0
    assert len(store_cases(cells, cells.labelled, small_plan(), tmp_path)) == 4


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"spacing_mm": (2.0, 2.0)}, "image"),
        ({"stated_spacing_mm": (2.0, 2.0)}, "image"),
        ({"resize_vox": (24, 24)}, "image"),
        ({"normalisation": NormalisationConfig(kind="dataset", low=(0,), high=(9,), mean=(5,), sd=(2,))}, "image"),
        ({"loss": BORDERS}, "weight_map"),
        ({"loss": LossConfig(border_weight=5.0)}, "weight_map"),
        ({"loss": LossConfig(border_weight=10.0, border_sigma=2.0)}, "weight_map"),
        ({"loss": LossConfig(border_weight=10.0, balance_classes=True)}, "weight_map"),
    ],
)
def test_what_was_stored_for_another_plan_is_not_taken(
    cells: Dataset, tmp_path: Path, change: dict[str, Any], kind: str, prepared: list[str]
) -> None:
    plan = small_plan(loss=LossConfig() if change.get("loss") == BORDERS else BORDERS)
    before = store_cases(cells, cells.labelled[:1], plan, tmp_path)[0]
    after = store_cases(cells, cells.labelled[:1], plan.model_copy(update=change), tmp_path)[0]
    assert len(prepared) == 2
    old, new = ((array if array is None else array[:]) for array in (getattr(before, kind), getattr(after, kind)))
    assert not np.array_equal(old, new)


def test_what_the_arrays_do_not_depend_on_does_not_have_them_made_again(cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    for change in ({}, {"steps": 9, "batch": 1}, {"loss": LossConfig(border_sigma=2.0, dice_squares=True)}):
        store_cases(cells, cells.labelled[:1], small_plan(**change), tmp_path)
    assert len(prepared) == 1


def test_what_was_stored_with_other_planes_or_sections_is_not_taken(tubules: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    case = tubules.labelled[0]
    for part in (case, replace(case, planes=Planes(hidden=((0, 3),))), replace(case, planes=Planes(hidden=((0, 4),)))):
        store_cases(tubules, [part], small_plan_3d(), tmp_path)
    store_cases(tubules, [replace(case, sections=(0, 9))], small_plan_3d(), tmp_path)
    assert len(prepared) == 4


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_no_half(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, array: np.ndarray, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(RunError, match=r"image\.npy.*No space left on device"):
        store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cases_without_annotation_are_dropped(tmp_path: Path) -> None:
    text(tmp_path / "microtome.yaml", "classes: {ground: 0, cell: 1}\nnot_annotated: 255\n")
    for name, value in (("a", 0), ("b", 255), ("c", 1)):
        png(tmp_path / "images" / f"{name}.png", np.arange(64).reshape(8, 8))
        png(tmp_path / "labels" / f"{name}.png", np.full((8, 8), value))
    dataset = open_dataset(tmp_path)
    stored = store_cases(dataset, dataset.labelled, small_plan(), tmp_path / "cache")
    assert [case.name for case in stored] == ["a", "c"]
    assert [case.dense for case in stored] == [True, True]


def test_parts_of_one_stack_weigh_by_what_is_annotated(tmp_path: Path) -> None:
    label = np.random.default_rng(RNG_SEED).integers(0, 2, (12, 6, 8))
    nifti(tmp_path / "images" / "a.nii.gz", label.astype(np.float32))
    nifti(tmp_path / "labels" / "a.nii.gz", label.astype(np.uint8))
    dataset = open_dataset(tmp_path)
    parts = [replace(dataset.labelled[0], name=f"a[{a}:{b}]", sections=(a, b)) for a, b in ((0, 3), (3, 12))]
    stored = store_cases(dataset, parts, small_plan_3d(spacing_mm=(1.0, 1.0, 1.0)), tmp_path / "cache")
    assert [case.shape_vox for case in stored] == [(3, 6, 8), (9, 6, 8)]
    assert [case.weight for case in stored] == [3 * 48, 9 * 48]


def test_any_voxel_of_a_dense_case_may_be_drawn_and_only_annotated_ones_of_a_sparse_case(tubules: Dataset, tmp_path: Path) -> None:
    case = store_cases(tubules, tubules.labelled[:1], small_plan_3d(), tmp_path)[0]
    rng = np.random.default_rng(0)
    assert all(case.label[tuple(case.draw_annotated(rng))] >= 0 for _ in range(200))
    dense = replace(case, class_counts={0: math.prod(case.shape_vox)})
    drawn = np.array([dense.draw_annotated(rng) for _ in range(400)])
    assert (drawn.min(0) == 0).all()
    assert (drawn.max(0) == np.array(case.shape_vox) - 1).all()


def test_real_volumes_are_stored_at_their_spacing(data_folder: Any, tmp_path: Path) -> None:
    dataset = open_dataset(data_folder("hippocampus"))
    plan = small_plan_3d(classes=dataset.legend.names, spacing_mm=(2.0, 1.0, 1.0))
    case = store_cases(dataset, dataset.labelled[:1], plan, tmp_path)[0]
    source = dataset.read_label(dataset.labelled[0])
    assert case.shape_vox == (round(source.shape[0] / 2), *source.shape[1:])
    assert set(case.class_voxels) == set(range(len(dataset.legend.names)))
    assert abs(case.image[:].mean()) < 0.05


# ---- quantiles ----


@given(image=arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)), elements=st.floats(-9, 9, width=32)))
@settings(max_examples=40, deadline=None)
def test_quantiles_are_numpy_s(image: np.ndarray) -> None:
    table = quantiles(image)
    assert (table.shape, table.dtype) == ((len(image), 257), np.float32)
    assert np.allclose(table, np.quantile(image.reshape(len(image), -1).astype(np.float64), np.linspace(0, 1, 257), axis=1).T, atol=1e-5)
    assert (np.diff(table) >= 0).all()


def test_a_stored_case_knows_the_quantiles_of_its_whole_image(cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)[0]
    assert np.array_equal(case.quantiles, quantiles(case.image[:]))
    assert (case.quantiles[:, 0], case.quantiles[:, -1]) == (case.image[:].min(), case.image[:].max())


# ---- border weights ----


def touching(folder: Path, description: str = "instances: true", values: tuple[int, int, int] = (0, 1, 2)) -> Dataset:
    """A picture of 8 x 12 on which two objects touch, the left one a column larger; with the values of ground, left and right."""
    label = np.array(values)[np.repeat(np.array([[0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]), 8, axis=0)]
    png(folder / "images" / "a.png", np.arange(96).reshape(8, 12))
    png(folder / "labels" / "a.png", label)
    text(folder / "microtome.yaml", description)
    return open_dataset(folder)


def test_without_border_weights_there_is_no_map(tmp_path: Path) -> None:
    dataset = touching(tmp_path)
    assert prepare(dataset, dataset.labelled[0], small_plan()).weight is None
    assert store_cases(dataset, dataset.labelled, small_plan(), tmp_path / "cache")[0].weight_map is None
    assert not [*(tmp_path / "cache").glob("*.weight.npy")]


def test_a_gap_of_background_parts_objects_that_touch_and_weighs_most(tmp_path: Path) -> None:
    dataset = touching(tmp_path)
    case = store_cases(dataset, dataset.labelled, small_plan(loss=BORDERS), tmp_path / "cache")[0]
    assert case.weight_map is not None
    # The larger of the two gives its rim.
    assert case.label[3].tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    weight = case.weight_map[:]
    assert (weight.dtype, weight.shape) == (np.float16, (8, 12))
    # Both 1 voxel away: 1 + 10 exp(-2² / 50); from the left edge 1 and 6 voxels.
    assert weight[3, 5] == pytest.approx(1 + 9.2312, abs=0.005)
    assert weight[3, 0] == pytest.approx(1 + 10 * math.exp(-(7**2) / 50), abs=0.005)
    assert (weight[:, 1:5] == 1).all()
    assert case.class_counts == {0: 8 * 4, 1: 8 * 8}


def test_objects_keep_their_numbers_on_another_grid(tmp_path: Path) -> None:
    dataset = touching(tmp_path)
    label, weight = prepare(dataset, dataset.labelled[0], small_plan(loss=BORDERS, stated_spacing_mm=(1.0, 1.0), spacing_mm=(0.5, 0.5)))[1:]
    assert label[7].tolist() == [0, 0, *[1] * 9, 0, *[1] * 8, 0, 0, 0, 0]
    assert weight is not None
    assert weight[7, 11] == pytest.approx(1 + 9.2312, abs=0.005)


def test_values_are_taken_from_under_the_middle_of_each_new_voxel() -> None:
    values = np.arange(12).reshape(3, 4)
    assert nearest(values, (3, 8))[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest(values, (1, 2)).tolist() == [[5, 7]]
    assert nearest(values, (3, 4)) is values


def test_without_instances_the_connected_parts_of_classes_are_the_objects_and_the_label_stays_as_it_is(tmp_path: Path) -> None:
    description = "classes: {left: 1, ground: 5, right: 6}\nbackground: ground\ninstances: false\n"
    dataset = touching(tmp_path, description, (5, 1, 6))
    assert dataset.legend.background == 1
    _, label, weight = prepare(dataset, dataset.labelled[0], small_plan(loss=BORDERS, classes=("left", "ground", "right")))
    # Two classes that touch are told apart by their names: a gap would be a false label.
    assert label[3].tolist() == [1, 0, 0, 0, 0, 0, 2, 2, 2, 2, 1, 1]
    assert weight is not None
    # 1 voxel from the one and 6 from the other.
    assert weight[3, 0] == pytest.approx(1 + 10 * math.exp(-(7**2) / 50), abs=0.005)
    assert (weight[:, 1:10] == 1).all()


def test_where_no_class_is_background_nothing_is_a_border() -> None:
    label = np.repeat(np.array([[0, 0, 1, 1, 2, 2, -1]], np.int16), 4, axis=0)
    kept, weight = weigh_borders(label, None, small_plan(loss=LossConfig(border_weight=10.0, balance_classes=True)), None)
    assert np.array_equal(kept, label)
    assert (weight == 1).all()


def test_what_is_not_annotated_stays_so_and_weighs_as_much_as_any() -> None:
    label = np.repeat(np.array([[-1, -1, 1, 1, 0, 1, 1, -1]], np.int16), 5, axis=0)
    before = label.copy()
    parted, weight = weigh_borders(label, None, small_plan(loss=BORDERS), 0)
    assert np.array_equal(parted, before)
    assert np.array_equal(label, before)
    assert (weight[label == -1] == 1).all()
    assert (weight[label == 0] > 10).all()
    # Nor does a gap annotate what is not, where the objects do not say so.
    objects = np.repeat(np.array([[0, 1, 1, 1, 2, 2, 2, 0]]), 5, axis=0)
    assert np.array_equal(weigh_borders(np.full((5, 8), -1, np.int16), objects, small_plan(loss=BORDERS), 0)[0], np.full((5, 8), -1))


def test_sections_of_a_stack_are_weighed_one_by_one_for_a_2d_network() -> None:
    rng = np.random.default_rng(RNG_SEED)
    objects = rng.integers(0, 2, (4, 5, 6)).repeat(4, 1).repeat(4, 2) * rng.integers(1, 4, (4, 5, 6)).repeat(4, 1).repeat(4, 2)
    label = (objects > 0).astype(np.int16)
    plan = small_plan(loss=LossConfig(border_weight=10.0, balance_classes=True), spacing_mm=(9.0, 1.0, 2.0))
    parted, weight = weigh_borders(label, objects, plan, 0)
    for section in range(4):
        alone = weigh_borders(label[section], objects[section], plan, 0)
        assert np.array_equal(parted[section], alone[0])
        assert np.array_equal(weight[section], alone[1])
    assert not np.array_equal(parted, weigh_borders(label, objects, small_plan_3d(loss=plan.loss, spacing_mm=plan.spacing_mm), 0)[0])


def test_a_weight_too_large_for_its_type_is_the_largest_that_fits() -> None:
    label = np.zeros((600, 600), np.int16)
    label[0, 0] = 1
    weight = weigh_borders(label, None, small_plan(loss=LossConfig(border_weight=1.0, balance_classes=True)), 0)[1]
    assert weight[0, 0] == 65504 < 600**2 / 2
    assert np.isfinite(weight).all()
