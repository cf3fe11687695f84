"""A folder is opened, its cases are read, and what is wrong with them is an error or a finding that names the file."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import nifti, png, text, tiff

from microtome.data import labels, reading
from microtome.data.dataset import Case, Dataset, fit_channels, open_dataset, read_case_image
from microtome.data.inputs import list_images
from microtome.data.split import split_dataset
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.geometry import affine_from_spacing, same_grid
from microtome.images.files import read_image, write_image

LABEL = np.array([[0, 255, 255], [0, 0, 255]])


def folder(root: Path, *names: str) -> Path:
    """images/ and masks/ with these cases."""
    for name in names:
        png(root / "images" / f"{name}.png", np.arange(6).reshape(2, 3))
        png(root / "masks" / f"{name}.png", LABEL)
    return root


def volumes(root: Path, *names: str, **geometry: float) -> Path:
    """images/ and labels/ with these NIfTI cases."""
    for name in names:
        nifti(root / "images" / f"{name}.nii.gz", np.arange(24, dtype=np.float32).reshape(2, 3, 4), spacing_mm=(3, 2, 1), **geometry)
        nifti(root / "labels" / f"{name}.nii.gz", np.arange(24).reshape(2, 3, 4).astype(np.uint8) // 12, spacing_mm=(3, 2, 1), **geometry)
    return root


def codes_of(dataset: Dataset) -> list[tuple[str, str]]:
    return [(finding.severity, finding.code) for finding in dataset.findings]


def test_masks_become_classes(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path, "b", "a"))
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert [case.group for case in dataset.labelled] == ["a", "b"]
    assert dataset.read_label(dataset.cases[0]).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert dataset.read_label(dataset.cases[0]).dtype == np.int16
    assert dataset.read_image(dataset.cases[0]).array.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert dataset.read_instances(dataset.cases[0]) is None
    assert dataset.class_counts == {"a": (3, 3, 0), "b": (3, 3, 0)}
    assert dataset.headers["a"].shape_vox == (2, 3)
    assert (dataset.channel_names, dataset.findings) == (("grey",), ())


def test_a_path_may_be_a_string_and_must_be_a_folder(tmp_path: Path) -> None:
    assert open_dataset(str(folder(tmp_path, "a"))).root == tmp_path  # type: ignore[arg-type]
    with pytest.raises(DataError, match="got nothing there"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match="got a file"):
        open_dataset(tmp_path / "images" / "a.png")


def test_case_without_a_label_cannot_be_read_for_one(tmp_path: Path) -> None:
    png(folder(tmp_path, "a") / "images" / "b.png")
    dataset = open_dataset(tmp_path)
    assert [case.name for case in dataset.labelled] == ["a"]
    with pytest.raises(DataError, match="b: expected a labelled case"):
        dataset.read_label(dataset.cases[1])


def test_unreadable_files_are_findings_and_their_cases_are_not_trained_on(tmp_path: Path) -> None:
    text(folder(tmp_path, "a", "b", "c") / "masks" / "a.png", "not a picture")
    text(tmp_path / "images" / "b.png", "not a picture")
    dataset = open_dataset(tmp_path)
    assert codes_of(dataset) == [("error", "unreadable")] * 2
    assert [finding.case for finding in dataset.findings] == ["b", "a"]
    assert [case.name for case in dataset.labelled] == ["c"]
    assert dataset.unreadable == {"a", "b"}
    text(tmp_path / "masks" / "b.png", "")
    text(tmp_path / "masks" / "c.png", "")
    with pytest.raises(DataError, match=r"masks/a\.png"):
        open_dataset(tmp_path)


def test_what_a_reader_assumes_is_a_note_and_no_warning(tmp_path: Path) -> None:
    png(tmp_path / "masks" / "a.png")
    (png(tmp_path / "a.png")).rename(tmp_path / "a.jpg")
    dataset = open_dataset(tmp_path)
    assert codes_of(dataset) == [("note", "assumed"), ("error", "one-class")]
    assert "suffix says jpeg" in dataset.findings[0].message


# Shapes and places agree.


def test_label_of_another_shape_is_an_error_with_both(tmp_path: Path) -> None:
    png(folder(tmp_path, "a") / "masks" / "a.png", np.zeros((2, 4)) + LABEL[:, :1])
    dataset = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"^a: expected the shape of \S+/images/a\.png, 2×3, got 2×4 in \S+/masks/a\.png; export"):
        dataset.read_label(dataset.cases[0])


def test_label_on_its_side_hints_at_exif(tmp_path: Path) -> None:
    png(folder(tmp_path, "a") / "masks" / "a.png", LABEL.T)
    dataset = open_dataset(tmp_path)
    with pytest.raises(DataError, match="EXIF"):
        dataset.read_label(dataset.cases[0])


def test_label_elsewhere_in_the_world_is_an_error(tmp_path: Path) -> None:
    root = volumes(tmp_path, "a")
    assert open_dataset(root).read_label(open_dataset(root).cases[0]).shape == (2, 3, 4)
    nifti(root / "labels" / "a.nii.gz", np.arange(24).reshape(2, 3, 4).astype(np.uint8), spacing_mm=(3, 2, 1), origin_mm=5)
    dataset = open_dataset(root)
    with pytest.raises(
        DataError, match=r"image and label in the same place.*got \S+/a\.nii\.gz with origin \(5, 5, 5\), spacing 3 × 2 × 1"
    ):
        dataset.read_label(dataset.cases[0])
    nifti(root / "labels" / "a.nii.gz", np.zeros((2, 3, 5), np.uint8))
    with pytest.raises(DataError, match="expected the shape"):
        dataset.read_label(dataset.cases[0])


# Channels.


def test_channel_files_are_stacked(tmp_path: Path) -> None:
    for channel in (0, 1):
        nifti(tmp_path / "imagesTr" / f"a_000{channel}.nii.gz", channel + 5)
    nifti(tmp_path / "labelsTr" / "a.nii.gz", np.arange(24).reshape(2, 3, 4).astype(np.uint8) % 2)
    document = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    text(tmp_path / "dataset.json", document)
    dataset = open_dataset(tmp_path)
    assert dataset.channel_names == ("CT", "PET")
    assert dataset.legend.names == ("background", "organ")
    image = dataset.read_image(dataset.cases[0])
    assert image.array.shape == (2, 2, 3, 4)
    assert image.array[:, 0, 0, 0].tolist() == [5, 6]
    nifti(tmp_path / "imagesTr" / "a_0001.nii.gz", 5, origin_mm=9)
    with pytest.raises(DataError, match="channels in the same place"):
        dataset.read_image(dataset.cases[0])


def test_fourth_axis_of_a_volume_is_channels(tmp_path: Path) -> None:
    nifti(tmp_path / "imagesTr" / "a.nii.gz", np.arange(48, dtype=np.int16).reshape(2, 3, 4, 2))
    nifti(tmp_path / "labelsTr" / "a.nii.gz", np.arange(24).reshape(2, 3, 4).astype(np.uint8) % 2)
    training = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    text(tmp_path / "dataset.json", {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "bg", "1": "fg"}, "training": training})
    dataset = open_dataset(tmp_path)
    assert dataset.channel_names == ("T1", "T2")
    assert dataset.read_image(dataset.cases[0]).array[:, 0, 0, 1].tolist() == [2, 3]


def test_grey_among_colour_pictures_becomes_colour(tmp_path: Path) -> None:
    png(folder(tmp_path, "a", "b") / "images" / "b.png", np.full((2, 3, 3), 7))
    dataset = open_dataset(tmp_path)
    assert dataset.channel_names == ("red", "green", "blue")
    assert dataset.read_image(dataset.cases[0]).array[:, 1, 2].tolist() == [5, 5, 5]
    assert codes_of(dataset) == [("note", "mixed-channels")]
    assert "a.png" in dataset.findings[0].message


def test_channels_that_do_not_fit_are_named(tmp_path: Path) -> None:
    image = read_image(png(tmp_path / "a.png", np.zeros((2, 3, 3))))
    with pytest.raises(DataError, match=r"a\.png: expected 2 channels, as the other images have, got 3"):
        fit_channels(image, 2)
    assert fit_channels(image, 3) is image


# Spacing and sections.


def test_stated_spacing_stretches_the_affine_and_keeps_its_origin(tmp_path: Path) -> None:
    text(volumes(tmp_path, "a", origin_mm=10) / "microtome.yaml", "spacing_mm: [6, 2, 0.5]")
    image = open_dataset(tmp_path).read_image(open_dataset(tmp_path).cases[0])
    assert image.spacing_mm == (6, 2, 0.5)
    assert (image.affine @ [1, 1, 1, 1])[:3].tolist() == [10.5, 12, 16]


def test_stated_spacing_of_other_axes_is_refused(tmp_path: Path) -> None:
    text(folder(tmp_path, "a") / "microtome.yaml", "spacing_mm: [1, 1, 1]")
    with pytest.raises(ConfigError, match="a size for each of the 2 axes"):
        open_dataset(tmp_path).read_image(open_dataset(tmp_path).cases[0])


def test_stack_without_spacing_warns_once_a_dataset(tmp_path: Path) -> None:
    for name in "ab":
        tiff(tmp_path / "images" / f"{name}.tif", np.zeros((5, 4, 4), np.uint8))
        tiff(tmp_path / "labels" / f"{name}.tif", np.arange(80, dtype=np.uint8).reshape(5, 4, 4) % 2)
    with pytest.warns(DataWarning, match=r"a\.tif and 1 more: no voxel size") as caught:
        dataset = open_dataset(tmp_path)
    assert len(caught) == 1
    assert codes_of(dataset) == [("warning", "no-spacing")]
    text(tmp_path / "microtome.yaml", "spacing_mm: [5, 1, 1]")
    assert open_dataset(tmp_path).findings == ()


def test_sections_are_cut_from_image_and_label_alike(tmp_path: Path) -> None:
    dataset = open_dataset(volumes(tmp_path, "a"))
    whole = dataset.cases[0]
    part = Case(name="a[1:2]", images=whole.images, labels=whole.labels, sections=(1, 2))
    image = dataset.read_image(part)
    assert image.array.shape == (1, 1, 3, 4)
    assert np.array_equal(image.array, dataset.read_image(whole).array[:, 1:2])
    assert np.array_equal(dataset.read_label(part), dataset.read_label(whole)[1:2])
    # Section 1 begins one voxel of 3 mm further along Z.
    assert (image.affine @ [0, 0, 0, 1])[2] == 3
    assert same_grid(read_case_image(part).affine, image.affine, image.shape_vox)


def test_a_file_name_in_another_encoding_is_refused_before_anything_is_trained_or_predicted(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        png(tmp_path / folder / "b.png", np.eye(4))
        (tmp_path / folder / "b.png").rename(os.fsdecode(os.fsencode(tmp_path / folder) + b"/b\xe4r.png"))
    for read in (open_dataset, list_images):
        with pytest.raises(DataError, match=r"images/b\\udce4r.png: expected a name in UTF-8"):
            read(tmp_path)


def test_pictures_and_volumes_do_not_go_together(tmp_path: Path) -> None:
    folder(volumes(tmp_path / "x", "v").parent / "y", "p")
    dataset = open_dataset(tmp_path)
    assert ("error", "mixed-dimensions") in codes_of(dataset)
    assert {path.name for path in dataset.findings[-1].files} == {"v.nii.gz", "p.png"}


def test_files_with_and_without_a_voxel_size_do_not_go_together(tmp_path: Path) -> None:
    folder(tmp_path, "a", "b")
    for part in ("images", "masks"):
        (tmp_path / part / "b.png").unlink()
    image = read_image(tmp_path / "images" / "a.png")
    known = replace(image, spacing_mm=(0.002, 0.002), affine=affine_from_spacing((0.002, 0.002)), spacing_known=True)
    write_image(tmp_path / "images" / "b.tif", known)
    write_image(tmp_path / "masks" / "b.tif", replace(known, array=LABEL[None].astype(np.uint8)))
    dataset = open_dataset(tmp_path)
    [finding] = [finding for finding in dataset.findings if finding.code == "mixed-spacing"]
    assert finding.severity == "error"
    assert finding.message.startswith("1 of 2 images state no voxel size (a.png), others do (b.tif: 0.002 × 0.002 mm); state `spacing_mm`")
    text(tmp_path / "microtome.yaml", "spacing_mm: [0.002, 0.002]")
    assert codes_of(open_dataset(tmp_path)) == []


def test_the_place_of_a_label_is_checked_without_decoding_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(volumes(tmp_path, "a"))
    decoded: list[str] = []
    for module in (reading, labels):
        monkeypatch.setattr(
            module, "read_image", lambda path, **options: (decoded.append(path.parent.name), read_image(path, **options))[1]
        )
    assert dataset.read_label(dataset.cases[0]).shape == (2, 3, 4)
    assert decoded == ["labels"]


# Objects.


def test_kaggle_masks_become_objects_and_one_class(tmp_path: Path) -> None:
    root = tmp_path / "stage1_train" / "1f"
    png(root / "images" / "1f.png", np.zeros((2, 3, 3)))
    png(root / "masks" / "a.png", np.array([[255, 0, 0], [0, 0, 0]]))
    png(root / "masks" / "b.png", np.array([[255, 255, 0], [0, 0, 0]]))
    dataset = open_dataset(tmp_path)
    case = dataset.cases[0]
    objects = dataset.read_instances(case)
    assert objects is not None
    assert (objects.tolist(), objects.dtype) == ([[1, 2, 0], [0, 0, 0]], np.int32)
    assert dataset.read_label(case).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert dataset.legend.names == ("background", "nucleus")
    assert dataset.class_counts["1f"] == (4, 2, 0)
    assert codes_of(dataset) == [("note", "overlapping-masks")]
    assert dataset.findings[0].message.startswith("masks overlap in one case (")
    text(tmp_path / "microtome.yaml", "instances: false")
    dataset = open_dataset(tmp_path)
    assert (dataset.legend.kind, dataset.read_instances(case)) == ("values", None)
    assert dataset.read_label(case).tolist() == [[1, 1, 0], [0, 0, 0]]


def test_numbered_objects_keep_their_numbers(tmp_path: Path) -> None:
    tiff(tmp_path / "img.tif", np.zeros((6, 7), np.uint8))
    numbers = np.arange(42, dtype=np.uint16).reshape(6, 7)
    tiff(tmp_path / "mask.tif", numbers)
    text(tmp_path / "microtome.yaml", "not_annotated: 41")
    dataset = open_dataset(tmp_path)
    objects = dataset.read_instances(dataset.cases[0])
    assert np.array_equal(objects, np.where(numbers == 41, -1, numbers.astype(np.int32)))
    assert dataset.class_counts == {"img": (1, 40, 1)}
    # Numbers that int32 cannot hold keep their order.
    tiff(tmp_path / "mask.tif", np.where(numbers == 0, 0, numbers.astype(np.uint32) + 2**31 + 41))
    again = open_dataset(tmp_path)
    assert np.array_equal(again.read_instances(again.cases[0]), numbers)


# Legends that need more than one file.


def test_palettes_among_rgb_masks_are_read_as_colours(tmp_path: Path) -> None:
    folder(tmp_path, "a", "b")
    png(tmp_path / "masks" / "a.png", np.array([[0, 1, 1], [0, 0, 1]]), palette=[0, 0, 0, 255, 0, 0])
    rgb = np.zeros((2, 3, 3), np.uint8)
    rgb[1, 1] = (255, 0, 0)
    png(tmp_path / "masks" / "b.png", rgb)
    dataset = open_dataset(tmp_path)
    assert dataset.legend.values == (((0, 0, 0),), ((255, 0, 0),))
    assert dataset.read_label(dataset.cases[0]).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert dataset.class_counts == {"a": (3, 3, 0), "b": (5, 1, 0)}


def test_stated_colours_read_a_palette_as_colours(tmp_path: Path) -> None:
    folder(tmp_path, "a")
    png(tmp_path / "masks" / "a.png", np.array([[0, 1, 2], [0, 0, 1]]), palette=[0, 0, 0, 255, 0, 0, 9, 9, 9])
    text(tmp_path / "microtome.yaml", "classes: {sky: '#000000', road: '#ff0000'}\nnot_annotated: ['#090909']")
    dataset = open_dataset(tmp_path)
    assert dataset.read_label(dataset.cases[0]).tolist() == [[0, 1, -1], [0, 0, 1]]
    assert (dataset.legend.names, dataset.class_counts["a"]) == (("sky", "road"), (3, 2, 1))


def test_not_annotated_of_the_description_joins_the_names_of_dataset_json(tmp_path: Path) -> None:
    nifti(tmp_path / "imagesTr" / "a.nii.gz")
    nifti(tmp_path / "labelsTr" / "a.nii.gz", np.arange(24).reshape(2, 3, 4).astype(np.uint8) % 3)
    training = [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    text(tmp_path / "dataset.json", {"modality": {"0": "CT"}, "labels": {"0": "bg", "1": "organ", "2": "unsure"}, "training": training})
    assert open_dataset(tmp_path).legend.names == ("bg", "organ", "unsure")
    text(tmp_path / "microtome.yaml", "not_annotated: 2")
    dataset = open_dataset(tmp_path)
    assert (dataset.legend.names, dataset.legend.ignored) == (("bg", "organ"), (2,))
    text(tmp_path / "microtome.yaml", "classes: {nothing: [0, 2], liver: 1}")
    assert open_dataset(tmp_path).legend.names == ("nothing", "liver")


# Groups.


@pytest.mark.parametrize("document", ["groups: {p1: [p1_a, p1_b]}", "group_by: '^(p\\d)_'"])
def test_groups_are_stated_or_read_from_names(tmp_path: Path, document: str) -> None:
    text(folder(tmp_path, "p1_a", "p1_b", "q") / "microtome.yaml", document)
    assert [case.group for case in open_dataset(tmp_path).cases] == ["p1", "p1", "q"]


def test_cases_are_named_as_they_are_typed_though_a_mac_stores_accents_as_two_letters(tmp_path: Path) -> None:
    stored, typed = "pru\u0308fung", "pr\u00fcfung"
    text(folder(tmp_path, stored, "a", "b") / "microtome.yaml", f"groups: {{one: [{typed}, a]}}\nvalidation: [b]")
    dataset = open_dataset(tmp_path)
    assert {case.name: case.group for case in dataset.cases} == {"a": "one", "b": "b", stored: "one"}
    text(tmp_path / "microtome.yaml", f"validation: [{typed}]")
    assert [case.name for case in split_dataset(open_dataset(tmp_path)).validation] == [stored]


@pytest.mark.parametrize("document", ["groups: {p: [a, z]}", "validation: [z]"])
def test_case_that_nobody_has_is_named(tmp_path: Path, document: str) -> None:
    text(folder(tmp_path, "a") / "microtome.yaml", document)
    with pytest.raises(ConfigError, match="to name cases out of a, got 'z'"):
        open_dataset(tmp_path)


# Real data.


def open_quietly(path: Path) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return open_dataset(path)


def test_hippocampus_is_two_folders_of_volumes(data_folder: Callable[[str], Path]) -> None:
    dataset = open_dataset(data_folder("hippocampus"))
    assert (len(dataset.labelled), dataset.findings) == (200, ())
    assert dataset.layout == "images/ + labels/, paired by name"
    assert dataset.legend.names == ("background", "label 1", "label 2")
    case = dataset.labelled[0]
    image, label = dataset.read_image(case), dataset.read_label(case)
    assert label.shape == image.shape_vox
    assert [int((label == index).sum()) for index in (0, 1, 2, -1)] == list(dataset.class_counts[case.name])


def test_isbi_is_a_pair_of_stacks_in_one_folder(data_folder: Callable[[str], Path]) -> None:
    with pytest.warns(DataWarning, match=r"train-volume\.tif: no voxel size"):
        dataset = open_dataset(data_folder("isbi2012"))
    [case] = dataset.labelled
    assert (case.name, [path.name for path in case.labels]) == ("train-volume", ["train-labels.tif"])
    assert dataset.read_image(case).array.shape == (1, 25, 512, 512)
    assert dataset.legend.values == ((0,), (255,))
    assert sum(dataset.class_counts[case.name]) == 25 * 512 * 512


def test_pets_have_their_masks_one_folder_deeper(data_folder: Callable[[str], Path]) -> None:
    dataset = open_dataset(data_folder("oxford_pets"))
    assert (len(dataset.labelled), dataset.layout) == (96, "images/ + annotations/trimaps/, paired by name")
    assert (dataset.legend.values, dataset.legend.background) == (((1,), (2,), (3,)), None)
    assert dataset.channel_names == ("red", "green", "blue")
    assert codes_of(dataset) == [("note", "assumed")]
    assert "Abyssinian_5.jpg" in dataset.findings[0].message


@pytest.mark.parametrize("name", ["dsb2018", "dsb2018/stage1_train"])
def test_nuclei_have_a_mask_file_each(data_folder: Callable[[str], Path], name: str) -> None:
    dataset = open_dataset(data_folder(name))
    assert (len(dataset.labelled), sum(len(case.labels) for case in dataset.cases)) == (34, 1598)
    assert dataset.legend.names == ("background", "nucleus")
    objects = dataset.read_instances(dataset.cases[0])
    assert objects is not None
    assert objects.max() == len(dataset.cases[0].labels)
    assert np.array_equal(objects > 0, dataset.read_label(dataset.cases[0]) == 1)


def test_stardist_is_pairs_in_one_folder(data_folder: Callable[[str], Path]) -> None:
    dataset = open_quietly(data_folder("stardist"))
    pairs = [(case.images[0].name, case.labels[0].name) for case in dataset.labelled]
    assert pairs == [("img2d.tif", "mask2d.tif"), ("img3d.tif", "mask3d.tif")]
    assert dataset.legend.kind == "instances"
    assert ("error", "mixed-dimensions") in codes_of(dataset)


def test_a_pattern_of_groups_that_misses_cases_is_a_warning(tmp_path: Path) -> None:
    for name in ("mouse1_a", "mouse1_b", "rat_c"):
        png(tmp_path / "images" / f"{name}.png", np.arange(16).reshape(4, 4))
        png(tmp_path / "masks" / f"{name}.png", np.eye(4) * 255)
    text(tmp_path / "microtome.yaml", 'group_by: "(mouse[0-9]+)_"')
    dataset = open_dataset(tmp_path)
    found = [finding for finding in dataset.findings if finding.code == "group-by-misses"]
    assert [finding.severity for finding in found] == ["warning"]
    assert "matches 2 of 3 cases (not rat_c)" in found[0].message
    text(tmp_path / "microtome.yaml", 'group_by: "([a-z]+)"')
    assert not [finding for finding in open_dataset(tmp_path).findings if finding.code == "group-by-misses"]


@pytest.mark.parametrize("pattern", ["x" * 300, "images/**x.png", "a/" + "y" * 255])
def test_a_glob_that_no_disk_and_no_glob_takes_is_one_line(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "microtome.yaml").write_text(f"images: '{pattern}'\nlabels: 'masks/*.png'\n")
    with pytest.raises(DataError, match=r"microtome\.yaml: expected a glob whose parts have fewer than \d+ bytes"):
        open_dataset(tmp_path)
