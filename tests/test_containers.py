"""Files and stores that hold image and label: found, paired, refused where they leave a choice, and never descended into."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from microtome.data.containers import contents_of, image_of
from microtome.data.dataset import Dataset, list_images, open_dataset
from microtome.data.names import image_files, is_image_place, outer_of, stamp_of, stem_of
from microtome.data.quality import inspect_dataset
from microtome.data.split import split_dataset
from microtome.errors import DataError
from tests.containers import hdf5, ome_zarr, zarr_array
from tests.folders import nifti, png, text

pytestmark = pytest.mark.filterwarnings("ignore::microtome.errors.DataWarning")


def volume(seed: int = 0, shape: tuple[int, ...] = (6, 20, 24)) -> np.ndarray:
    """Grey values that no two seeds share."""
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint16)


def label(seed: int = 0, shape: tuple[int, ...] = (6, 20, 24)) -> np.ndarray:
    """A block of class 1 in background."""
    found = np.zeros(shape, np.uint8)
    found[1:4, 4 : 10 + seed, 3:15] = 1
    return found


def pair(seed: int = 0) -> dict[str, np.ndarray]:
    return {"raw": volume(seed), "label": label(seed)}


def arrays(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a case."""
    case = next(case for case in dataset.cases if case.name == name)
    return dataset.read_image(case).array[0], dataset.read_label(case)


@pytest.mark.parametrize(
    ("image", "truth"),
    [
        ("raw", "label"),
        ("image", "mask"),
        ("images", "labels"),
        ("volumes/raw", "volumes/labels/neuron_ids"),
        ("data", "gt"),
        ("t/a", "t/seg"),
    ],
)
def test_hdf5_files_are_cases_by_the_words_of_their_datasets(tmp_path: Path, image: str, truth: str) -> None:
    for seed, name in enumerate(("one", "two")):
        hdf5(tmp_path / f"{name}.h5", {image: volume(seed), truth: label(seed)})
    dataset = open_dataset(tmp_path)
    assert dataset.layout == f"HDF5 files with {image} + {truth}"
    assert [case.name for case in dataset.cases] == ["one", "two"]
    found, classes = arrays(dataset, "two")
    np.testing.assert_array_equal(found, volume(1))
    np.testing.assert_array_equal(classes, label(1))


def test_files_of_one_name_in_folders_of_their_own_are_named_by_these(tmp_path: Path) -> None:
    for seed, patient in enumerate(("p1", "p2")):
        hdf5(tmp_path / patient / "mri.h5", pair(seed))
    assert [case.name for case in open_dataset(tmp_path).cases] == ["p1/mri", "p2/mri"]
    assert [case.name for case in list_images(tmp_path)] == ["p1/mri", "p2/mri"]


def test_single_file_or_store_is_a_dataset_of_one_case(tmp_path: Path) -> None:
    file = hdf5(tmp_path / "cells.h5", pair())
    store = ome_zarr(tmp_path / "nuclei.ome.zarr", volume(1), {"nuclei": label(1)})
    for path, name, seed in ((file, "cells", 0), (store, "nuclei", 1)):
        dataset = open_dataset(path)
        assert [case.name for case in dataset.labelled] == [name]
        np.testing.assert_array_equal(arrays(dataset, name)[1], label(seed))
        # Its only case is cut in two for validation, each part read alone.
        split = split_dataset(dataset, "1/2")
        assert [dataset.read_image(case).shape_vox[0] for case in (*split.train, *split.validation)] == [3, 3]
        np.testing.assert_array_equal(np.concatenate([dataset.read_label(case) for case in (*split.train, *split.validation)]), label(seed))
    assert open_dataset(store).layout == "Zarr stores with labels/nuclei"


def test_single_file_without_a_label_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"alone\.h5: expected a folder of images and labels, got a \.h5 without a label in it") as caught:
        open_dataset(hdf5(tmp_path / "alone.h5", {"raw": volume()}))
    assert "\n" not in str(caught.value)


def test_several_labels_are_a_choice_that_microtome_yaml_makes(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        ome_zarr(tmp_path / f"{name}.ome.zarr", volume(seed), {"cells": label(seed), "nuclei": label(3)})
    with pytest.raises(DataError, match=r"a\.ome\.zarr: expected one part of it as the labels, got 2 \(labels/cells, labels/nuclei\)"):
        open_dataset(tmp_path)
    text(tmp_path / "microtome.yaml", "labels: nuclei\n")
    dataset = open_dataset(tmp_path)
    np.testing.assert_array_equal(arrays(dataset, "b")[1], label(3))
    assert dataset.layout == "Zarr stores with labels/nuclei"
    assert [case.name for case in list_images(tmp_path)] == ["a", "b"]
    text(tmp_path / "microtome.yaml", "labels: axons\n")
    with pytest.raises(DataError, match="label `axons` inside of the files, got labels/cells, labels/nuclei"):
        open_dataset(tmp_path)


def test_several_images_are_a_choice_unless_one_has_a_usual_name(tmp_path: Path) -> None:
    both = {"image_a": volume(1), "image_b": volume(2), "label": label()}
    hdf5(tmp_path / "x.h5", both)
    with pytest.raises(DataError, match=r"one part of it as the images, got 2 \(image_a, image_b\)"):
        open_dataset(tmp_path)
    text(tmp_path / "microtome.yaml", "images: image_b\n")
    np.testing.assert_array_equal(arrays(open_dataset(tmp_path), "x")[0], volume(2))
    assert list_images(tmp_path)[0].images == (tmp_path / "x.h5" / "image_b",)
    hdf5(tmp_path / "x.h5", {**both, "raw": volume(5)})
    (tmp_path / "microtome.yaml").unlink()
    np.testing.assert_array_equal(arrays(open_dataset(tmp_path), "x")[0], volume(5))


def test_container_without_a_label_is_an_unlabelled_case_of_one_note(tmp_path: Path) -> None:
    hdf5(tmp_path / "a.h5", pair())
    hdf5(tmp_path / "b.h5", {"raw": volume(1)})
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 40)
    dataset = open_dataset(tmp_path)
    assert [case.name for case in dataset.labelled] == ["a"]
    note = next(finding for finding in dataset.findings if finding.code == "unlabelled-images")
    assert "2 images have no labels" in note.message


def test_arrays_in_groups_of_a_plain_store_pair_like_datasets(tmp_path: Path) -> None:
    zarr_array(tmp_path / "x.zarr" / "volumes" / "raw", volume())
    zarr_array(tmp_path / "x.zarr" / "volumes" / "labels" / "ids", label())
    text(tmp_path / "x.zarr" / ".zgroup", {"zarr_format": 2})
    contents = contents_of(tmp_path / "x.zarr")
    assert contents is not None
    assert (contents.images, contents.labels) == (("volumes/raw",), ("volumes/labels/ids",))
    np.testing.assert_array_equal(arrays(open_dataset(tmp_path), "x")[1], label())


def test_stores_pair_by_name_with_stores_and_are_not_descended_into(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        ome_zarr(tmp_path / "images" / f"{name}.ome.zarr", volume(seed))
        zarr_array(tmp_path / "labels" / f"{name}.zarr", label(seed))
    # What looks like an image deep inside of a store is none.
    png(tmp_path / "images" / "a.ome.zarr" / "0" / "preview.png")
    assert [path.name for path in image_files(tmp_path)] == ["a.ome.zarr", "b.ome.zarr", "a.zarr", "b.zarr"]
    dataset = open_dataset(tmp_path)
    assert "paired by name" in dataset.layout
    found, classes = arrays(dataset, "b")
    np.testing.assert_array_equal(found, volume(1))
    np.testing.assert_array_equal(classes, label(1))
    assert inspect_dataset(dataset).ok


@pytest.mark.parametrize("kind", ["npy", "h5", "nii.gz"])
def test_images_and_labels_of_one_format_in_two_folders(tmp_path: Path, kind: str) -> None:
    for folder, make in (("images", volume), ("labels", label)):
        for seed, name in enumerate(("a", "b")):
            path = tmp_path / folder / f"{name}.{kind}"
            path.parent.mkdir(exist_ok=True)
            if kind == "npy":
                np.save(path, make(seed))
            elif kind == "h5":
                hdf5(path, {"data": make(seed)})
            else:
                nifti(path, make(seed))
    dataset = open_dataset(tmp_path)
    assert [case.name for case in dataset.labelled] == ["a", "b"]
    np.testing.assert_array_equal(arrays(dataset, "b")[0], volume(1))


def test_pairs_may_name_parts_of_files_and_stores(tmp_path: Path) -> None:
    hdf5(tmp_path / "a.h5", {"x": volume(), "y": label()})
    zarr_array(tmp_path / "b.zarr", volume(1))
    zarr_array(tmp_path / "c.zarr", label(1))
    text(tmp_path / "microtome.yaml", "pairs: {a.h5/x: a.h5/y, b.zarr: c.zarr}\n")
    dataset = open_dataset(tmp_path)
    assert sorted(case.name for case in dataset.labelled) == ["b", "x"]
    np.testing.assert_array_equal(arrays(dataset, "x")[1], label())
    text(tmp_path / "microtome.yaml", "pairs: {a.h5/x: ../a.h5/y}\n")
    with pytest.raises(DataError, match="inside"):
        open_dataset(tmp_path)


def test_label_of_another_shape_in_the_same_file_is_named(tmp_path: Path) -> None:
    hdf5(tmp_path / "a.h5", {"raw": volume(), "label": label(0, (6, 20, 23))})
    findings = inspect_dataset(open_dataset(tmp_path)).findings
    assert [finding.code for finding in findings if finding.severity == "error"] == ["grid-mismatch"]


def test_images_to_predict_are_raw_data_whatever_they_lie_in(tmp_path: Path) -> None:
    file, store = hdf5(tmp_path / "a.h5", pair()), ome_zarr(tmp_path / "b.ome.zarr", volume(1), {"cells": label(1)})
    png(tmp_path / "c.png")
    found = {case.name: case.images for case in list_images(tmp_path)}
    assert found == {"a": (file / "raw",), "b": (store,), "c": (tmp_path / "c.png",)}
    assert list_images(store)[0].images == (store,)
    assert [(case.name, case.images) for case in list_images(file / "label")] == [("a", (file / "label",))]
    assert [(case.name, case.images) for case in list_images(store / "labels" / "cells")] == [("b", (store / "labels" / "cells",))]
    with pytest.raises(DataError, match="nothing there"):
        list_images(tmp_path / "d.ome.zarr")


def test_urls_are_taken_as_they_are_typed() -> None:
    case = list_images(Path("s3://bucket/folder/brain.ome.zarr"))[0]
    assert (case.name, case.images) == ("brain", (Path("s3:/bucket/folder/brain.ome.zarr"),))


def test_folder_of_dicom_files_is_one_image_named_with_its_dots(tmp_path: Path) -> None:
    series = tmp_path / "1.2.840.113"
    for number in range(3):
        text(series / f"{number}", "x")
        (series / f"{number}").write_bytes(b"\0" * 128 + b"DICM" + bytes([number]))
    assert image_files(tmp_path) == [series]
    assert stem_of(series) == "1.2.840.113"
    before = stamp_of(series)
    (series / "1").write_bytes(b"\0" * 128 + b"DICM" + b"longer")
    assert stamp_of(series) != before


def test_stamps_change_with_a_store_and_with_the_file_that_a_path_leads_into(tmp_path: Path) -> None:
    store, file = ome_zarr(tmp_path / "a.ome.zarr", volume()), hdf5(tmp_path / "a.h5", pair())
    before = stamp_of(store), stamp_of(file / "raw")
    assert before == (stamp_of(store), stamp_of(file / "raw"))
    assert stamp_of(file / "raw")[1:] == (file.stat().st_size, file.stat().st_mtime_ns)
    attributes = store / ".zattrs"
    content = json.loads(attributes.read_text())
    attributes.write_text(json.dumps({**content, "more": 1}))
    hdf5(file, {**pair(), "more": volume(4)})
    assert stamp_of(store) != before[0]
    assert stamp_of(file / "raw") != before[1]
    (store / "0" / "9.9.9").write_bytes(b"x")
    assert stamp_of(store)[1] == before[0][1] + 1


@pytest.mark.parametrize(
    ("path", "outer"),
    [
        ("a.h5/raw", "a.h5"),
        ("x/a.ome.zarr/labels/b", "x/a.ome.zarr"),
        ("x/a.zarr/b.zarr", "x/a.zarr"),
        ("x/y", "x/y"),
        ("x/y.png", "x/y.png"),
    ],
)
def test_outer_container_is_the_first_with_a_suffix(path: str, outer: str) -> None:
    assert outer_of(Path(path)) == Path(outer)


def test_places_of_images(tmp_path: Path) -> None:
    file = hdf5(tmp_path / "a.h5", pair())
    (tmp_path / "plain").mkdir()
    assert [is_image_place(path) for path in (file, file / "raw", tmp_path / "plain", tmp_path / "no.h5" / "raw")] == [
        True,
        True,
        False,
        False,
    ]


def test_metadata_that_is_no_json_makes_no_container(tmp_path: Path) -> None:
    text(tmp_path / "a.zarr" / ".zgroup", "{")
    text(tmp_path / "a.zarr" / ".zattrs", "[" * 100_000)
    contents = contents_of(tmp_path / "a.zarr")
    assert contents is not None
    assert (contents.images, contents.labels) == ((), ())
    assert image_of(tmp_path / "a.zarr") == tmp_path / "a.zarr"
    assert contents_of(tmp_path) is None
    nib.save(nib.Nifti1Image(volume(), np.eye(4)), tmp_path / "v.nii")
    assert image_of(tmp_path / "v.nii") == tmp_path / "v.nii"
