"""DICOM as training data: series with masks or segmentations, pictures of one file each, and parts of a single series."""

import shutil
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pytest

from microtome.data.dataset import Dataset, list_images, open_dataset
from microtome.data.names import image_files, is_image_place, store_of
from microtome.data.split import split_dataset
from microtome.errors import DataError
from microtome.images.files import label_suffix, open_volume, read_image, write_image, write_labels
from tests.dicom_series import VOLUME, dataset, oblique, series
from tests.folders import nifti, png, text

pytestmark = pytest.mark.filterwarnings("ignore::microtome.errors.DataWarning")
LABEL = np.zeros(VOLUME.shape, np.uint8)
LABEL[2:4, 2:6, 3:8] = 1


def without_empty_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let segmentations be written as most programs do: with the planes that hold something alone."""
    whole = highdicom.seg.Segmentation
    monkeypatch.setattr(highdicom.seg, "Segmentation", lambda **given: whole(**given | {"omit_empty_frames": True}))


def segmented(root: Path, cases: int = 2) -> Dataset:
    """Series in a folder each, and their segmentations side by side."""
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for number in range(cases):
        series(root / "images" / f"c{number}", VOLUME + number, oblique(), SeriesInstanceUID=f"1.2.{number}")
        write_labels(root / "labels" / f"c{number}.dcm", LABEL, open_volume(root / "images" / f"c{number}"))
    return open_dataset(root)


@pytest.mark.parametrize("cases", [1, 2])
def test_segmentations_side_by_side_are_a_label_each(tmp_path: Path, cases: int) -> None:
    found = segmented(tmp_path, cases)
    assert [case.labels[0].name for case in found.cases] == ["c0.dcm", "c1.dcm"][:cases]
    for case in found.labelled:
        np.testing.assert_array_equal(found.read_label(case), LABEL)
    assert not is_image_place(tmp_path / "labels")
    assert is_image_place(tmp_path / "images" / "c0")


def test_planes_that_a_segmentation_leaves_out_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_empty_planes(monkeypatch)
    found = segmented(tmp_path)
    assert open_volume(tmp_path / "labels" / "c0.dcm").shape_vox == (2, *VOLUME.shape[1:])
    np.testing.assert_array_equal(found.read_label(found.labelled[0]), LABEL)


def test_parts_of_a_label_are_those_of_the_whole_where_planes_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_empty_planes(monkeypatch)
    found = segmented(tmp_path)
    parts = found.open_label(found.labelled[1])
    np.testing.assert_array_equal(parts[1:3, 2:, :7], LABEL[1:3, 2:, :7])


def test_planes_of_another_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_empty_planes(monkeypatch)
    segmented(tmp_path)
    # The same series, half a section further on.
    for path in sorted((tmp_path / "images" / "c1").iterdir()):
        path.unlink()
    series(tmp_path / "images" / "c1", VOLUME, oblique(), step=4.5, SeriesInstanceUID="1.2.1")
    found = open_dataset(tmp_path)
    with pytest.raises(DataError, match="c1"):
        found.read_label(found.cases[1])


def test_pictures_of_one_file_each_are_cases(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        made = dataset(VOLUME[number], SeriesInstanceUID=f"1.2.{number}")
        made.save_as(tmp_path / "images" / f"x{number}.dcm", enforce_file_format=True)
        png(tmp_path / "masks" / f"x{number}.png", LABEL[number + 1])
    found = open_dataset(tmp_path)
    assert [case.name for case in found.labelled] == ["x0", "x1", "x2"]
    assert [case.images[0].name for case in list_images(tmp_path / "images")] == ["x0.dcm", "x1.dcm", "x2.dcm"]
    np.testing.assert_array_equal(found.read_image(found.cases[1]).array[0], VOLUME[1])


def test_slices_of_several_series_in_one_folder_stay_one_place_that_is_refused_by_name(tmp_path: Path) -> None:
    series(tmp_path / "s", names=[0, 2, 4, 6, 8, 10])
    series(tmp_path / "s", names=[1, 3, 5, 7, 9, 11], SeriesInstanceUID="1.2.4")
    assert image_files(tmp_path) == [tmp_path / "s"]
    with pytest.raises(DataError, match=r"2: 1\.2\.3 .*; 1\.2\.4 "):
        open_volume(tmp_path / "s")


def test_a_series_with_a_segmentation_beside_its_slices_stays_a_series(tmp_path: Path) -> None:
    series(tmp_path / "s", VOLUME[:1])
    shutil.copytree(tmp_path / "s", tmp_path / "of_one")
    series(tmp_path / "s")
    for name in ("s", "of_one"):
        volume = open_volume(tmp_path / name)
        write_labels(tmp_path / name / "A.dcm", np.ones(volume.shape_vox, int), volume)
        assert store_of(tmp_path / name) == "dicom"


def test_damaged_files_do_not_make_pictures_of_a_series(tmp_path: Path) -> None:
    series(tmp_path / "s")
    (tmp_path / "s" / "A.dcm").write_bytes(bytes(128) + b"DICM" + bytes(range(200)))
    assert store_of(tmp_path / "s") == "dicom"


def test_labels_of_some_sections_of_a_series_lie_where_these_are(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    series(tmp_path / "images" / "c0")
    whole = open_volume(tmp_path / "images" / "c0")
    write_image(tmp_path / "labels" / "c0.nii.gz", whole.with_array(LABEL[None]))
    found = open_dataset(tmp_path)
    (part,) = split_dataset(found, "1/2").validation
    assert part.sections is not None
    first, past = part.sections
    for image in (found.read_image(part), found.open_image(part)):
        path = tmp_path / f"part{label_suffix(image)}"
        write_labels(path, found.read_label(part), image)
        again = read_image(path)
        np.testing.assert_array_equal(again.array[0], LABEL[first:past])
        np.testing.assert_allclose(again.affine[:3, 3], (whole.affine @ [first, 0, 0, 1])[:3], atol=1e-4)


@pytest.mark.parametrize("suffix", [".npy", ".h5", ".ome.zarr", ".tif"])
def test_masks_in_nifti_need_no_patient_on_the_images_side(tmp_path: Path, suffix: str) -> None:
    mask = read_image(nifti(tmp_path / "labels" / "a.nii.gz", LABEL, spacing_mm=(3, 0.75, 0.5), origin_mm=20))
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / f"a{suffix}", replace(mask, array=VOLUME[None], format="none", extra={}))
    found = open_dataset(tmp_path)
    np.testing.assert_array_equal(found.read_label(found.labelled[0]), LABEL)


def test_a_folder_a_patient_with_slices_and_a_mask_is_a_case_whatever_lies_beside_the_slices(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"p{number}").mkdir()
        series(tmp_path / f"p{number}" / "dicom", VOLUME + number)
        text(tmp_path / f"p{number}" / "dicom" / "A licence.txt", "nobody's")
        mask = replace(read_image(tmp_path / f"p{number}" / "dicom"), array=LABEL[None])
        write_image(tmp_path / f"p{number}" / "mask.nii.gz", mask)
    found = open_dataset(tmp_path)
    assert [case.name for case in found.labelled] == ["p0/dicom", "p1/dicom"]
    np.testing.assert_array_equal(found.read_image(found.labelled[1]).array[0], VOLUME + 1)


@pytest.mark.parametrize("patients", [1, 2])
def test_series_deep_in_the_folders_of_an_archive_are_named_by_their_patient(tmp_path: Path, patients: int) -> None:
    (tmp_path / "labels").mkdir()
    for number in range(patients):
        folder = tmp_path / "images" / f"p{number}" / "study"
        folder.mkdir(parents=True)
        series(folder / "CT", VOLUME + number)
        write_image(tmp_path / "labels" / f"p{number}.nii.gz", replace(read_image(folder / "CT"), array=LABEL[None]))
    found = open_dataset(tmp_path)
    assert [case.labels[0].name for case in found.labelled] == [f"p{number}.nii.gz" for number in range(patients)]
    names = [f"p{number}" for number in range(patients)]
    assert names == [case.name for case in found.cases] == [case.name for case in list_images(tmp_path / "images")]
    np.testing.assert_array_equal(found.read_image(found.labelled[-1]).array[0], VOLUME + patients - 1)
