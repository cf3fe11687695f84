"""Stored cases: on the plan's grid, memory-mapped, taken up again after an interruption, never half of one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.config import NormalisationConfig
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import RunError
from microtome.preprocess import normalise, resample, resample_labels
from microtome.training import store
from microtome.training.store import VOXELS_A_CLASS, prepare, store_cases
from tests.folders import nifti, png, text
from tests.small import small_plan, small_plan_3d

RNG_SEED = 0


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
        assert isinstance(case.image, np.memmap)
        assert isinstance(case.label, np.memmap)
        assert (case.image.dtype, case.label.dtype) == (np.float32, np.int16)
        assert np.array_equal(case.image, normalise(cells.read_image(source).array, small_plan().normalisation))
        assert np.array_equal(case.label, cells.read_label(source))
        assert (case.shape_vox, case.dense, case.weight) == ((48, 56), True, 1.0)


def test_memory_maps_cannot_be_written(cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)[0]
    with pytest.raises(ValueError, match="read-only"):
        case.image[0, 0, 0] = 1


def test_cases_are_brought_to_the_plan_s_spacing(cells: Dataset, tmp_path: Path) -> None:
    plan = small_plan(spacing_mm=(2.0, 4.0))
    case, source = store_cases(cells, cells.labelled[:1], plan, tmp_path)[0], cells.labelled[0]
    assert case.shape_vox == (24, 14)
    assert np.allclose(case.image, resample(normalise(cells.read_image(source).array, plan.normalisation), (24, 14)))
    assert np.array_equal(case.label, resample_labels(cells.read_label(source), (24, 14)))


def test_sections_are_not_mixed_for_a_2d_network(tubules: Dataset, tmp_path: Path) -> None:
    plan = small_plan(classes=("background", "tubule"), spacing_mm=(0.1, 0.00352, 0.00352))
    assert store_cases(tubules, tubules.labelled[:1], plan, tmp_path)[0].shape_vox == (16, 10, 12)


def test_voxels_of_each_class_are_noted_where_they_lie(tubules: Dataset, tmp_path: Path) -> None:
    for case in store_cases(tubules, tubules.labelled, small_plan_3d(), tmp_path):
        assert not case.dense
        assert set(case.class_voxels) == {0, 1}
        for k, voxels in case.class_voxels.items():
            assert (case.label[tuple(voxels.T)] == k).all()
            assert len(np.unique(voxels, axis=0)) == len(voxels) == min(VOXELS_A_CLASS, (case.label == k).sum())


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


def test_a_case_without_its_label_is_stored_again(cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    prepared.clear()
    # What a kill leaves: the image, half of a label under a temporary name.
    label, image = next(tmp_path.glob("00001*.label.npy")), next(tmp_path.glob("00001*.image.npy"))
    label.with_name(f".part-x-{label.name}").write_bytes(label.read_bytes()[:100])
    label.unlink()
    image.write_bytes(b"half")
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert prepared == [cells.labelled[1].name]
    assert stored[1].shape_vox == (48, 56)
    assert stored[1].image.shape == (1, 48, 56)


@pytest.mark.parametrize(
    "change", [{"spacing_mm": (2.0, 2.0)}, {"normalisation": NormalisationConfig(kind="dataset", low=(0,), high=(9,), mean=(5,), sd=(2,))}]
)
def test_what_was_stored_for_another_plan_is_not_taken(cells: Dataset, tmp_path: Path, change: dict[str, Any], prepared: list[str]) -> None:
    before = store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)[0]
    after = store_cases(cells, cells.labelled[:1], small_plan(**change), tmp_path)[0]
    assert len(prepared) == 2
    assert not np.array_equal(before.image, after.image)
    store_cases(cells, cells.labelled[:1], small_plan(steps=9, batch=1), tmp_path)
    assert len(prepared) == 2


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
    dense = replace(case, dense=True)
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
    assert abs(case.image.mean()) < 0.05
