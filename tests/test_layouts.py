"""Folders as people have them: what is an image, what a label, and that names alone decide which belong together."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from folders import nifti, png, text
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.data.case import Case, Layout
from microtome.data.dataset import list_images
from microtome.data.description import DatasetConfig, load_description
from microtome.data.layouts import find_layout
from microtome.data.names import key_of, natural, role_of, unique_names
from microtome.errors import ConfigError, DataError


def layout_of(root: Path) -> Layout:
    return find_layout(root, *load_description(root))


def pairs_of(root: Path) -> dict[str, list[str]]:
    """Case -> its files below the root, images first; an unlabelled case has one of them only."""
    return {case.name: [path.relative_to(root).as_posix() for path in (*case.images, *case.labels)] for case in layout_of(root).cases}


def codes_of(root: Path) -> list[tuple[str, str]]:
    return [(finding.severity, finding.code) for finding in layout_of(root).findings]


def make(root: Path, *names: str) -> Path:
    for name in names:
        (nifti if name.endswith((".nii", ".nii.gz")) else png)(root / name)
    return root


@pytest.mark.parametrize(
    ("name", "role", "key"),
    [
        ("train-volume", "image", "train"),
        ("train-labels", "label", "train"),
        ("img2d", "image", "2d"),
        ("mask2d", "label", "2d"),
        ("001mask", "label", "001"),
        ("Case_07_SEG", "label", "case_07"),
        ("case_07", "", "case_07"),
        ("ground_truth_3", "label", "3"),
        ("imagesTr", "image", "tr"),
        ("SegmentationClass", "label", "class"),
        ("JPEGImages", "image", "jpeg"),
        ("cellMask_3", "label", "cell_3"),
        ("image_mask_3", "label", "3"),
        ("a_1_2", "", "a_1_2"),
        ("a_12", "", "a_12"),
        # Words within words, and letters within hashes, are no roles.
        ("masked_rawhide", "", "masked_rawhide"),
        ("imagenet_5", "", "imagenet_5"),
        ("segment_5", "", "segment_5"),
        ("0RZDK5GT7", "", "0rzdk5gt7"),
    ],
)
def test_words_of_a_name_give_its_role_and_the_rest_its_key(name: str, role: str, key: str) -> None:
    assert (role_of(name), key_of(name)) == (role, key)


def test_accents_stored_as_one_letter_or_as_two_are_the_same_name() -> None:
    # macOS writes the second form: e and a combining accent.
    one, two = "z\u00e9bra", "ze\u0301bra"
    assert one != two
    assert key_of(one) == key_of(two) == one
    root = Path("/data")
    assert unique_names(root, [root / f"a/{one}.png", root / f"b/{two}.png"]) == [f"a/{one}", f"b/{two}"]


def test_natural_order_counts_as_people_do() -> None:
    assert sorted(["c_10", "c_9", "c_09", "b_11"], key=natural) == ["b_11", "c_09", "c_9", "c_10"]


def test_names_are_stems_until_two_are_equal() -> None:
    root = Path("/data")
    assert unique_names(root, [root / "a/x.png", root / "b/y.nii.gz"]) == ["x", "y"]
    assert unique_names(root, [root / "a/x.png", root / "b/X.png"]) == ["a/x", "b/X"]
    assert unique_names(root, [root / "x.png", root / "x.jpg"]) == ["x.png", "x.jpg"]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/a.png", "masks/a.png"),
        ("images/a.png", "labels/a.png"),
        ("images/a.jpg", "annotations/a.png"),
        ("images/a.png", "annotations/trimaps/a.png"),
        ("images/a.png", "masks/manual/a.png"),
        ("images/a.png", "segmentations/a.png"),
        ("images/a.png", "gt/a.png"),
        ("image/a.png", "label/a.png"),
        ("leftImg8bit/train/a.png", "gtFine/train/a.png"),
        ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
        ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz"),
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"),
        ("train/images/a.png", "train/masks/a.png"),
        ("images/train/a.png", "masks/train/a.png"),
        ("train/a.jpg", "train_masks/a_mask.png"),
        ("data/raw/a.png", "data/raw_seg/a.png"),
        ("scans/a.png", "masks/a.png"),
        ("images/a.png", "masks/a_mask.png"),
        ("images/a.png", "masks/A_seg.png"),
        ("images/a.png", "masks/mask_a.png"),
        ("images/a_image.png", "masks/a_label.png"),
        ("images/a.png", "masks/a_labels.png"),
        ("images/a.png", "masks/a_gt.png"),
        ("images/a.png", "masks/a_segmentation.png"),
        ("a.png", "a_mask.png"),
        ("a.png", "mask-a.png"),
        ("img_a.png", "seg_a.png"),
        ("volume-0.nii", "segmentation-0.nii"),
        ("img2d.png", "mask2d.png"),
        ("case_1/imaging.nii.gz", "case_1/segmentation.nii.gz"),
        ("benign/benign (1).png", "benign/benign (1)_mask.png"),
    ],
)
def test_image_finds_its_label(tmp_path: Path, image: str, label: str) -> None:
    make(tmp_path, image, label)
    assert list(pairs_of(tmp_path).values()) == [[image, label]]
    assert codes_of(tmp_path) == []


def test_pairs_go_by_name_and_never_by_position(tmp_path: Path) -> None:
    make(tmp_path, *(f"images/{name}.png" for name in "abc"), *(f"masks/{name}.png" for name in "bcd"))
    assert pairs_of(tmp_path) == {"a": ["images/a.png"], "b": ["images/b.png", "masks/b.png"], "c": ["images/c.png", "masks/c.png"]}
    unpaired = layout_of(tmp_path).findings
    assert [(f.code, f.case, [path.name for path in f.files]) for f in unpaired] == [
        ("unpaired-label", "", ["d.png"]),
        ("unpaired-image", "a", ["a.png"]),
    ]
    assert "masks/d.png has no image" in unpaired[0].message
    assert "images/a.png has no label" in unpaired[1].message


stems = st.text("ab_1", min_size=1, max_size=4).filter(lambda name: key_of(name) != "")


@settings(max_examples=30, deadline=None)
@given(images=st.sets(stems, min_size=1, max_size=5), labels=st.sets(stems, min_size=1, max_size=5), suffix=st.sampled_from(["", "_mask"]))
def test_exactly_the_common_keys_are_paired(images: set[str], labels: set[str], suffix: str) -> None:
    # One file a key, because two of one key are ambiguous and tested below.
    by_key = {key_of(name): name for name in sorted(images)}, {key_of(name): name for name in sorted(labels)}
    common = by_key[0].keys() & by_key[1].keys()
    with TemporaryDirectory() as folder:
        # Two images at least: masks of other names beside a single one are its instances.
        root = make(
            Path(folder),
            "images/zz.png",
            *(f"images/{n}.png" for n in by_key[0].values()),
            *(f"masks/{n}{suffix}.png" for n in by_key[1].values()),
        )
        if not common:
            with pytest.raises(DataError, match="no agreement"):
                layout_of(root)
            return
        labelled = {case.images[0].stem: case.labels[0].stem for case in layout_of(root).cases if case.labels}
    assert labelled == {by_key[0][key]: by_key[1][key] + suffix for key in common}


def test_two_labels_for_one_image_are_an_error_that_names_them(tmp_path: Path) -> None:
    make(tmp_path, "images/a.png", "images/b.png", "labels/a.png", "labels/a_mask.png", "labels/b.png")
    assert pairs_of(tmp_path)["a"] == ["images/a.png"]
    [finding] = layout_of(tmp_path).findings
    assert (finding.severity, finding.code, finding.case) == ("error", "ambiguous-pair", "a")
    assert [path.name for path in finding.files] == ["a.png", "a.png", "a_mask.png"]
    assert "labels/a_mask.png" in finding.message


def test_only_ambiguous_pairs_make_no_dataset(tmp_path: Path) -> None:
    make(tmp_path, "JPEGImages/a.jpg", "SegmentationClass/a.png", "SegmentationObject/a.png")
    with pytest.raises(DataError, match=r"more than one candidate: JPEGImages/a.jpg, SegmentationClass/a.png, SegmentationObject/a.png"):
        layout_of(tmp_path)
    text(tmp_path / "microtome.yaml", "labels: SegmentationClass")
    assert pairs_of(tmp_path) == {"a": ["JPEGImages/a.jpg", "SegmentationClass/a.png"]}


def test_train_and_val_do_not_mix(tmp_path: Path) -> None:
    make(tmp_path, "train/images/a.png", "train/masks/a.png", "val/images/a.png", "val/masks/b.png")
    assert pairs_of(tmp_path) == {"train/images/a": ["train/images/a.png", "train/masks/a.png"], "val/images/a": ["val/images/a.png"]}
    assert codes_of(tmp_path) == [("warning", "unpaired-label"), ("note", "unlabelled-images")]


def test_images_for_testing_are_unlabelled_cases_and_no_warning(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/a.nii.gz", "imagesTs/b.nii.gz", "imagesTs/._b.nii.gz")
    assert list(pairs_of(tmp_path)) == ["imagesTr/a", "imagesTs/a", "imagesTs/b"]
    assert codes_of(tmp_path) == [("note", "unlabelled-images")]


def test_hidden_folders_and_what_archivers_leave_are_not_read(tmp_path: Path) -> None:
    make(tmp_path, "images/a.png", "masks/a.png", ".cache/images/b.png", "__MACOSX/images/c.png", "images/._a.png")
    assert list(pairs_of(tmp_path)) == ["a"]


def test_linked_folders_are_entered_and_circles_end(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "a.png")
    make(tmp_path / "data", "masks/a.png")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "data")
    assert pairs_of(tmp_path / "data") == {"a": ["images/a.png", "masks/a.png"]}


def test_channels_in_files_of_their_own_make_one_case(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/a_0001.nii.gz", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert pairs_of(tmp_path) == {"a": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"]}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["images/a.png", "annotations/trimaps/a.png"], "images/ + annotations/trimaps/, paired by name"),
        (["a.png", "a_mask.png"], "image and label side by side in one folder, paired by name (a.png + a_mask.png)"),
        (
            ["p1/im.png", "p1/seg.png", "p2/im.png", "p2/seg.png"],
            "image and label side by side in 2 folders, paired by name (im.png + seg.png)",
        ),
        (["d/1/images/x.png", "d/1/masks/y.png", "d/1/masks/z.png"], "a folder an image, with one mask file an instance"),
    ],
)
def test_layout_is_told_in_a_sentence(tmp_path: Path, files: list[str], sentence: str) -> None:
    assert layout_of(make(tmp_path, *files)).sentence == sentence


# One mask an instance.


def test_kaggle_folders_have_a_mask_file_an_instance(tmp_path: Path) -> None:
    make(tmp_path, "stage1_train/1f/images/1f.png", "stage1_train/1f/masks/b.png", "stage1_train/1f/masks/a.png")
    make(tmp_path, "stage1_train/2e/images/2e.png", "stage1_train/2e/masks/c.png", "stage1_test/3d/images/3d.png")
    for root, names in ((tmp_path, ["1f", "2e", "3d"]), (tmp_path / "stage1_train", ["1f", "2e"])):
        layout = layout_of(root)
        assert [case.name for case in layout.cases] == names
        assert [len(case.labels) for case in layout.cases] == [2, 1, 0][: len(names)]
        assert (layout.per_instance, layout.object_name) == (True, "nucleus")


def test_single_folder_of_one_image_and_its_masks_is_one_case(tmp_path: Path) -> None:
    layout = layout_of(make(tmp_path, "images/scan.png", "masks/1.png", "masks/2.png"))
    assert [len(case.labels) for case in layout.cases] == [2]
    assert layout.object_name == "object"


def test_several_images_beside_several_masks_are_no_instances(tmp_path: Path) -> None:
    layout = layout_of(make(tmp_path, "x/images/a.png", "x/images/b.png", "x/masks/a.png", "x/masks/b.png"))
    assert not layout.per_instance
    assert [len(case.labels) for case in layout.cases] == [1, 1]


# What is refused.


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "got an empty folder"),
        (["notes.txt", "scan.czi"], "got no image that can be read, but notes.txt, scan.czi"),
        (["images/a.png", "images/b.png"], "got 2 images and no labels: images/a.png, images/b.png; add a folder labels/"),
        (["images/a.png", "masks/z.png"], r"got no agreement between images \(images/a.png\) and labels \(masks/z.png\)"),
    ],
)
def test_folder_that_is_no_dataset_is_told_what_it_holds_and_what_to_do(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        text(tmp_path / name, "x")
    with pytest.raises(DataError, match=words) as caught:
        layout_of(tmp_path)
    assert "images/ + labels/" in str(caught.value)


# dataset.json.

MSD = {
    "name": "Hippocampus",
    "modality": {"0": "MRI", "1": "T2"},
    "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
    "training": [{"image": "./imagesTr/h_1.nii.gz", "label": "./labelsTr/h_1.nii.gz"}],
    "test": ["./imagesTs/h_2.nii.gz"],
}
VERSION2 = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "organ": 1, "ignore": 2}, "file_ending": ".nii.gz"}


def test_decathlon_names_its_files_classes_and_channels(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/h_1.nii.gz", "imagesTr/._h_1.nii.gz", "labelsTr/h_1.nii.gz", "imagesTs/h_2.nii.gz")
    text(tmp_path / "dataset.json", MSD)
    assert pairs_of(tmp_path) == {"h_1": ["imagesTr/h_1.nii.gz", "labelsTr/h_1.nii.gz"], "h_2": ["imagesTs/h_2.nii.gz"]}
    layout = layout_of(tmp_path)
    assert layout.sentence == "Medical Segmentation Decathlon (dataset.json)"
    assert layout.declared.classes == {"background": (0,), "Anterior": (1,), "Posterior": (2,)}
    assert layout.channel_names == ("MRI", "T2")
    assert layout.findings == ()


def test_first_version_of_nnunet_leaves_the_channel_out_of_its_list(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/h_1_0000.nii.gz", "imagesTr/h_1_0001.nii.gz", "labelsTr/h_1.nii.gz", "imagesTs/h_2_0000.nii.gz")
    text(tmp_path / "dataset.json", MSD)
    assert pairs_of(tmp_path)["h_1"] == ["imagesTr/h_1_0000.nii.gz", "imagesTr/h_1_0001.nii.gz", "labelsTr/h_1.nii.gz"]
    assert pairs_of(tmp_path)["h_2"] == ["imagesTs/h_2_0000.nii.gz"]
    assert layout_of(tmp_path).sentence == "nnU-Net raw data, version 1 (dataset.json)"


def test_second_version_of_nnunet_goes_by_folders_and_file_ending(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz", "imagesTr/other_0000.png")
    make(tmp_path, "imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/c.nii.gz", "imagesTr/d_0000.nii.gz")
    text(tmp_path / "dataset.json", VERSION2)
    assert pairs_of(tmp_path)["a"] == ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"]
    layout = layout_of(tmp_path)
    assert [(finding.code, finding.case) for finding in layout.findings] == [
        ("unpaired-image", "b"),
        ("unpaired-label", "c"),
        ("missing-channel", "d"),
    ]
    assert layout.declared.classes == {"background": (0,), "organ": (1,)}
    assert layout.declared.ignored == (2,)
    assert layout.channel_names == ("CT", "PET")


def test_second_version_of_nnunet_may_list_its_files(tmp_path: Path) -> None:
    make(tmp_path, "scans/p1_t1.nii.gz", "scans/p1_t2.nii.gz", "truth/one.nii.gz")
    listed = {"patient": {"images": ["scans/p1_t1.nii.gz", "scans/p1_t2.nii.gz"], "label": "truth/one.nii.gz"}}
    text(tmp_path / "dataset.json", VERSION2 | {"dataset": listed})
    assert pairs_of(tmp_path) == {"patient": ["scans/p1_t1.nii.gz", "scans/p1_t2.nii.gz", "truth/one.nii.gz"]}


def test_file_that_dataset_json_names_and_nobody_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/h_1.nii.gz", "labelsTr/h_1.nii.gz")
    missing = {"image": "./imagesTr/h_9.nii.gz", "label": "./labelsTr/h_1.nii.gz"}
    text(tmp_path / "dataset.json", MSD | {"training": [MSD["training"][0], missing]})  # type: ignore[index]
    [finding] = layout_of(tmp_path).findings
    assert (finding.severity, finding.code, finding.case) == ("error", "missing-file", "h_9")
    assert "h_9.nii.gz" in finding.message
    assert list(pairs_of(tmp_path)) == ["h_1"]


def test_case_that_dataset_json_names_twice_is_an_error_that_names_it(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/h_1.nii.gz", "labelsTr/h_1.nii.gz", "labelsTr/other.nii.gz")
    again = {"image": "./imagesTr/h_1.nii.gz", "label": "./labelsTr/other.nii.gz"}
    text(tmp_path / "dataset.json", MSD | {"training": [MSD["training"][0], again], "test": []})  # type: ignore[index]
    [finding] = layout_of(tmp_path).findings
    assert (finding.severity, finding.code, finding.case) == ("error", "repeated-case", "h_1")
    assert finding.message == "dataset.json names the case h_1 twice; the first is used"
    assert pairs_of(tmp_path) == {"h_1": ["imagesTr/h_1.nii.gz", "labelsTr/h_1.nii.gz"]}


def test_regions_are_refused_by_name_unless_classes_are_stated(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    text(tmp_path / "dataset.json", VERSION2 | {"labels": {"background": 0, "whole tumour": [1, 2]}})
    with pytest.raises(DataError, match=r"the region 'whole tumour': \[1, 2\]; give .*; regions are not supported yet"):
        layout_of(tmp_path)
    text(tmp_path / "microtome.yaml", "classes: {background: 0, tumour: [1, 2]}")
    assert list(pairs_of(tmp_path)) == ["a"]


@pytest.mark.parametrize("name", ["../outside.nii.gz", "/etc/passwd", "link.nii.gz", "imagesTr/../../outside.nii.gz", "a\0b.nii.gz"])
def test_documents_name_no_file_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    root = make(tmp_path / "data", "labelsTr/a.nii.gz", "imagesTr/a.nii.gz")
    nifti(tmp_path / "outside.nii.gz")
    (root / "link.nii.gz").symlink_to(tmp_path / "outside.nii.gz")
    text(root / "dataset.json", MSD | {"training": [{"image": name, "label": "./labelsTr/a.nii.gz"}]})
    with pytest.raises(DataError, match="expected names of files inside"):
        layout_of(root)
    text(root / "dataset.json", VERSION2 | {"dataset": {"a": {"images": [name], "label": "labelsTr/a.nii.gz"}}})
    with pytest.raises(DataError, match="expected names of files inside"):
        layout_of(root)
    (root / "dataset.json").unlink()
    for config in (DatasetConfig(pairs={name: ("labelsTr/a.nii.gz",)}), DatasetConfig(labels=name)):
        with pytest.raises(DataError, match="expected names of files inside"):
            find_layout(root, config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected valid JSON"),
        (MSD | {"training": ["x"]}, "expected `training` entries"),
        (MSD | {"labels": 3}, "expected `labels` as"),
        (MSD | {"labels": {"a": "b"}}, "whole numbers in `labels`, got 'a': 'b'"),
        (VERSION2 | {"dataset": {"a": 1}}, "got a: 1"),
        (VERSION2 | {"dataset": {"a": {"images": [], "label": "l"}}}, "expected `dataset` entries as"),
        (VERSION2 | {"dataset": {"a": {"images": [3], "label": "l"}}}, "expected `dataset` entries as"),
        (MSD | {"labels": {"a": 1.5}}, "whole numbers in `labels`, got 'a': 1.5"),
        (MSD | {"labels": {"a": float("inf")}}, "expected valid JSON, got Infinity"),
        (MSD | {"labels": {"a": 2**63}}, "whole numbers in `labels`, got 'a': 9223372036854775808"),
        (MSD | {"training": [{"image": "x" * 300, "label": "labelsTr/h_1.nii.gz"}]}, "expected names of files inside"),
        (VERSION2, "expected labelled cases"),
    ],
)
def test_damaged_dataset_json_is_named(tmp_path: Path, content: object, words: str) -> None:
    make(tmp_path, "imagesTr/h_1.nii.gz", "labelsTr/h_1.nii.gz")
    text(tmp_path / "dataset.json", content)
    with pytest.raises(DataError, match=words) as caught:
        layout_of(tmp_path)
    assert "dataset.json" in str(caught.value)


def test_dataset_json_of_another_program_is_passed_over(tmp_path: Path) -> None:
    text(make(tmp_path, "images/a.png", "masks/a.png") / "dataset.json", {"annotations": []})
    assert pairs_of(tmp_path) == {"a": ["images/a.png", "masks/a.png"]}


# microtome.yaml.


def test_stated_pairs_are_taken_as_stated(tmp_path: Path) -> None:
    make(tmp_path, "p.png", "q.png", "one.png", "two.png")
    text(tmp_path / "microtome.yaml", "pairs: {p.png: two.png, q.png: [one.png]}")
    assert pairs_of(tmp_path) == {"p": ["p.png", "two.png"], "q": ["q.png", "one.png"]}
    text(tmp_path / "microtome.yaml", "pairs: {p.png: gone.png}")
    with pytest.raises(DataError, match=r"'gone\.png'.*no such file"):
        layout_of(tmp_path)


def test_stated_names_are_typed_though_a_mac_stores_accents_as_two_letters(tmp_path: Path) -> None:
    make(tmp_path, "no\u0308/p.png", "no\u0308/te\u0301.png")
    text(tmp_path / "microtome.yaml", "pairs: {n\u00f6/p.png: n\u00f6/t\u00e9.png}")
    assert pairs_of(tmp_path) == {"p": ["no\u0308/p.png", "no\u0308/te\u0301.png"]}
    # Where both are there, the one that is stated is meant.
    make(tmp_path, "n\u00f6/p.png", "n\u00f6/t\u00e9.png")
    assert pairs_of(tmp_path) == {"p": ["n\u00f6/p.png", "n\u00f6/t\u00e9.png"]}


def test_stated_names_that_two_files_could_have_are_neither(tmp_path: Path) -> None:
    # Three forms of one name: the letter, the sign that stands for it (Angstrom), and a letter with a ring.
    make(tmp_path, "\u212b.png", "A\u030a.png", "t.png")
    text(tmp_path / "microtome.yaml", "pairs: {\u00c5.png: t.png}")
    with pytest.raises(DataError, match="no such file"):
        layout_of(tmp_path)


@pytest.mark.parametrize(
    ("document", "image", "label"),
    [
        ("{images: scans, labels: truth}", "scans/a.png", "truth/a.png"),
        ("{images: scans/, labels: truth/}", "scans/a.png", "truth/a.png"),
        ("{images: 'scans/*_t1.png', labels: 'scans/*_tumour.png'}", "scans/a_t1.png", "scans/a_tumour.png"),
        ("{images: 'p*/t1/scan.png', labels: 'p*/tumour.png'}", "p1/t1/scan.png", "p1/tumour.png"),
        ("{images: volume.png, labels: truth.png}", "volume.png", "truth.png"),
        ("{labels: '*/truth.png'}", "p1/image.png", "p1/truth.png"),
        ("{images: masks_of_gods}", "masks_of_gods/a.png", "labels/a.png"),
    ],
)
def test_stated_sides_are_paired_by_name(tmp_path: Path, document: str, image: str, label: str) -> None:
    make(tmp_path, image, label)
    text(tmp_path / "microtome.yaml", document)
    assert list(pairs_of(tmp_path).values()) == [[image, label]]


def test_folders_that_a_glob_stars_are_the_cases(tmp_path: Path) -> None:
    make(tmp_path, "p1/t1/scan.png", "p1/truth.png", "p2/t1/scan.png", "p2/truth.png", "p2/t2/scan.png")
    config = DatasetConfig(images="p*/t1/scan.png", labels="p*/truth.png")
    pairs = [(case.images[0].parts[-3], case.labels[0].parts[-2]) for case in find_layout(tmp_path, config).cases]
    assert pairs == [("p1", "p1"), ("p2", "p2")]


def test_stated_side_that_is_empty_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "images/a.png", "masks/a.png")
    with pytest.raises(DataError, match="expected images for `labels: truth/"):
        find_layout(tmp_path, DatasetConfig(labels="truth/*.png"))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("clases: [a, b]", "unknown name `clases`; did you mean `classes`"),
        ("group_by: '('", "group_by: a regular expression"),
        ("group_by: 'abc'", "bracket around the group"),
        ("group_by: '(a+)+b'", "which could take for ever"),
        ("spacing_mm: [1, 0]", "two or three positive numbers"),
        ("classes: {a: 1, b: 1}", "one class for 1, not both 'a' and 'b'"),
        ("classes: [a, a]", "each name once"),
        ("classes: {a: 1.5}", 'a whole number or a colour in quotes \\("#ff8800"\\), not 1.5'),
        # YAML takes an unquoted colour for a comment.
        ("classes: {a: 0, b: }", "a colour in quotes"),
        ("groups: {p: [a], q: [a]}", "one group for 'a'"),
        ("validation_sections: [5, 5]", "first, past the last"),
        ("not_annotated: none", "a whole number"),
        ("[1]", "expected names with values"),
    ],
)
def test_faults_in_microtome_yaml_are_named(tmp_path: Path, document: str, words: str) -> None:
    text(tmp_path / "microtome.yaml", document)
    with pytest.raises(ConfigError, match=words) as caught:
        load_description(tmp_path)
    assert "microtome.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("document", "classes"),
    [
        ("{background: 0, cell: [1, 2]}", {"background": (0,), "cell": (1, 2)}),
        ("{0: background, 255: cell}", {"background": (0,), "cell": (255,)}),
        ("{sky: '#0080ff', road: ['#000000', 7]}", {"sky": (0, 128, 255)} | {"road": ((0, 0, 0), 7)}),
        ("[background, cell]", {"background": (), "cell": ()}),
    ],
)
def test_classes_may_be_written_in_four_ways(tmp_path: Path, document: str, classes: dict[str, object]) -> None:
    text(tmp_path / "microtome.yml", f"classes: {document}\nnot_annotated: 9")
    config, named_by = load_description(tmp_path)
    expected = {name: ((0, 128, 255),) if name == "sky" else values for name, values in classes.items()}
    assert config.classes == expected
    assert config.not_annotated == (9,)
    assert named_by.endswith("microtome.yml")


# Images without labels, for prediction.


def names_of(cases: tuple[Case, ...]) -> dict[str, list[str]]:
    return {case.name: [path.name for path in case.images] for case in cases}


def test_listing_takes_the_image_side_only(tmp_path: Path) -> None:
    make(tmp_path, "images/a.png", "images/b.png", "masks/a.png")
    assert names_of(list_images(tmp_path)) == {"a": ["a.png"], "b": ["b.png"]}
    assert names_of(list_images(tmp_path / "masks")) == {"a": ["a.png"]}
    assert names_of(list_images(tmp_path / "images" / "b.png")) == {"b": ["b.png"]}


def test_listing_groups_channels_only_where_there_are_as_many(tmp_path: Path) -> None:
    make(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b.nii.gz", "IMG_0007.png")
    assert names_of(list_images(tmp_path, channels=2)) == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b.nii.gz"],
        "IMG_0007": ["IMG_0007.png"],
    }
    assert list(names_of(list_images(tmp_path, channels=3))) == ["IMG_0007", "a_0000", "a_0001", "b"]


def test_listing_drops_the_number_of_a_single_channel(tmp_path: Path) -> None:
    assert names_of(list_images(make(tmp_path, "a_0000.nii.gz", "IMG_0007.png"))) == {"IMG_0007": ["IMG_0007.png"], "a": ["a_0000.nii.gz"]}


def test_listing_follows_microtome_yaml(tmp_path: Path) -> None:
    make(tmp_path, "scans/a.png", "truth/a.png")
    text(tmp_path / "microtome.yaml", "{images: scans, labels: truth}")
    assert names_of(list_images(tmp_path)) == {"a": ["a.png"]}
    text(tmp_path / "microtome.yaml", "pairs: {scans/a.png: truth/a.png}")
    assert [case.images[0].parent.name for case in list_images(tmp_path)] == ["scans"]


def test_listing_keeps_a_label_word_that_labels_nothing(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "a_mask.png", "no_mask_3.png")
    assert list(names_of(list_images(tmp_path))) == ["a", "no_mask_3"]


def test_listing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no image in it"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="got nothing there"):
        list_images(tmp_path / "gone")
