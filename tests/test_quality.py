"""Each fault that a folder can have is found with its file's name, and a good folder has none."""

import io
import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import tifffile

from microtome.data.case import Case
from microtome.data.checks import CaseRow, class_shares, findings_of, format_share
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.legend import Legend
from microtome.data.quality import Inspection, case_severities, case_table, case_thumbnails, inspect_dataset, inspection_html
from microtome.data.split import Split
from microtome.data.thumbnails import class_colours, draw_thumbnail
from microtome.errors import DataWarning
from microtome.geometry import affine_from_spacing
from microtome.images.image import Image

Inject = Callable[[Path], None]


def picture(number: int, shape: tuple[int, ...] = (40, 48)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


def mask(shape: tuple[int, int] = (40, 48), value: int = 255) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[10:25, 12:30] = value
    return array


def save_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)


def save_nifti(path: Path, array_ZYX: np.ndarray, spacing_zyx: tuple[float, ...] = (2, 1, 1), origin: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing_zyx[::-1], 1.0])
    affine[:3, 3] = origin
    nib.save(nib.Nifti1Image(array_ZYX.T, affine), path)


def volume(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(8, 12, 14)).astype(np.float32)


def volume_label() -> np.ndarray:
    label = np.zeros((8, 12, 14), np.uint8)
    label[2:5, 3:8, 4:9] = 1
    return label


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six grey pictures c0 to c5 with masks of 0 and 255."""
    for number in range(6):
        save_png(tmp_path / "images" / f"c{number}.png", picture(number))
        save_png(tmp_path / "masks" / f"c{number}.png", mask())
    return tmp_path


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Four float volumes v0 to v3 of 2 x 1 x 1 mm with labels 0 and 1."""
    for number in range(4):
        save_nifti(tmp_path / "images" / f"v{number}.nii.gz", volume(number))
        save_nifti(tmp_path / "labels" / f"v{number}.nii.gz", volume_label())
    return tmp_path


def inspect(folder: Path) -> Inspection:
    return inspect_dataset(open_dataset(folder))


def describe(folder: Path, text: str) -> None:
    (folder / "microtome.yaml").write_text(text)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(folder: Path) -> None:
    array = volume(2)
    array[1, 2, 3], array[4, 5, 6] = np.nan, np.inf
    save_nifti(folder / "images" / "v2.nii.gz", array)


def jpeg_mask(folder: Path) -> None:
    (folder / "masks" / "c3.png").unlink()
    PIL.Image.fromarray(mask()).save(folder / "masks" / "c3.jpg", quality=60)


def five_channels(folder: Path) -> None:
    (folder / "images" / "c3.png").unlink()
    tifffile.imwrite(folder / "images" / "c3.tif", picture(3, (5, 40, 48)), metadata={"axes": "CYX"})


def all_unannotated(folder: Path) -> None:
    describe(folder, "classes: {background: 0, cell: 255}\nnot_annotated: 100")
    save_png(folder / "masks" / "c3.png", np.full((40, 48), 100, np.uint8))


def unknown_value(folder: Path) -> None:
    describe(folder, "classes: {background: 0, cell: 255}")
    strange = mask()
    strange[0, :5] = 7
    save_png(folder / "masks" / "c3.png", strange)


def no_foreground(folder: Path) -> None:
    describe(folder, "classes: {background: 0, cell: 255}")
    for number in range(6):
        save_png(folder / "masks" / f"c{number}.png", np.zeros((40, 48), np.uint8))


def large(folder: Path) -> None:
    save_png(folder / "images" / "c3.png", picture(3, (160, 48)))
    save_png(folder / "masks" / "c3.png", mask((160, 48)))


def empty_blue(folder: Path) -> None:
    for number in range(6):
        colour = picture(number, (40, 48, 3))
        colour[..., 2] = 0
        save_png(folder / "images" / f"c{number}.png", colour)


def rare(folder: Path) -> None:
    describe(folder, "classes: {background: 0, cell: 255, speck: 9}")
    label = mask()
    label[0, 0] = 9
    save_png(folder / "masks" / "c3.png", label)


def thick_sections(folder: Path) -> None:
    for number in range(4):
        for kind, array in (("images", volume(number)), ("labels", volume_label())):
            save_nifti(folder / kind / f"v{number}.nii.gz", array, (5, 1, 1))


def odd_spacing(folder: Path) -> None:
    save_nifti(folder / "images" / "v2.nii.gz", volume(2), (2, 1, 2.5))
    save_nifti(folder / "labels" / "v2.nii.gz", volume_label(), (2, 1, 2.5))


def picture_among_volumes(folder: Path) -> None:
    save_png(folder / "images" / "flat.png", picture(9))
    save_png(folder / "labels" / "flat.png", mask(value=1))


PICTURE_FAULTS: dict[str, tuple[str, str, Inject]] = {
    "an image without a label": ("warning unpaired-image", "extra.png", lambda f: save_png(f / "images" / "extra.png", picture(9))),
    "a label without an image": ("warning unpaired-label", "extra.png", lambda f: save_png(f / "masks" / "extra.png", mask())),
    "half an image": ("error unreadable", "c3.png", lambda f: truncate(f / "images" / "c3.png")),
    "an image that is text": ("error unreadable", "c3.png", lambda f: (f / "images" / "c3.png").write_text("hello")),
    "a label that is text": ("error unreadable", "c3.png", lambda f: (f / "masks" / "c3.png").write_text("hello")),
    "half a label": ("error unreadable", "c3.png", lambda f: (f / "masks" / "c3.png").write_bytes(b"\x89PNG\r\n\x1a\nabc")),
    "a label of another size": ("error grid-mismatch", "c3.png", lambda f: save_png(f / "masks" / "c3.png", mask((39, 48)))),
    "a value out of the legend": ("error label-not-in-legend", "c3.png", unknown_value),
    "nothing annotated": ("error nothing-annotated", "masks/c3.png", all_unannotated),
    "no foreground anywhere": ("error no-foreground", "masks/c0.png", no_foreground),
    "an empty mask": ("warning empty-mask", "masks/c3.png", lambda f: save_png(f / "masks" / "c3.png", np.zeros((40, 48), np.uint8))),
    "a blank image": ("warning constant-image", "c3.png", lambda f: save_png(f / "images" / "c3.png", np.full((40, 48), 9, np.uint8))),
    "the same image twice": (
        "warning duplicate-image",
        "images/c3.png, images/c4.png",
        lambda f: save_png(f / "images/c4.png", picture(3)),
    ),
    "a mask saved as JPEG": ("warning jpeg-ringed-mask", "c3.jpg", jpeg_mask),
    "five channels among one": ("error mixed-channels", "c3.tif", five_channels),
    "a class that nothing has": ("warning missing-class", "wall", lambda f: describe(f, "classes: {background: 0, cell: 255, wall: 3}")),
    "a rare class": ("note rare-class", "speck", rare),
    "a large image": ("note size-outlier", "images/c3.png (160×48)", large),
    "16 bits among 8": ("note mixed-types", "c3.png", lambda f: save_png(f / "images" / "c3.png", picture(3).astype(np.uint16) * 200)),
    "an empty channel": ("note constant-channel", "images/c0.png", empty_blue),
}

VOLUME_FAULTS: dict[str, tuple[str, str, Inject]] = {
    "NaN and infinity": ("error not-finite", "images/v2.nii.gz: 2 values", poison),
    "a label somewhere else": (
        "error grid-mismatch",
        "v2.nii.gz",
        lambda f: save_nifti(f / "labels" / "v2.nii.gz", volume_label(), origin=7),
    ),
    "a label of another spacing": (
        "error grid-mismatch",
        "v2.nii.gz",
        lambda f: save_nifti(f / "labels" / "v2.nii.gz", volume_label(), (4, 1, 1)),
    ),
    "half a volume": ("error unreadable", "v2.nii.gz", lambda f: truncate(f / "images" / "v2.nii.gz")),
    "an odd spacing": ("warning spacing-outlier", "images/v2.nii.gz (2 × 1 × 2.5 mm)", odd_spacing),
    "thick sections": ("note anisotropic", "5 times", thick_sections),
    "a picture among volumes": ("error mixed-dimensions", "flat.png", picture_among_volumes),
}


def check_fault(folder: Path, expected: str, text: str) -> None:
    inspection = inspect(folder)
    said = {f"{finding.severity} {finding.code}": finding.message for finding in inspection.findings}
    assert expected in said, said
    assert text in said[expected]
    assert "\n" not in said[expected]
    errors = [f for f in inspection.findings if f.severity == "error"]
    assert [f"error {f.code}" for f in errors] == [expected] * expected.startswith("error")
    assert inspection.ok is not expected.startswith("error")


@pytest.mark.parametrize("fault", PICTURE_FAULTS)
def test_a_fault_among_pictures_is_found_and_nothing_else_is_an_error(pictures: Path, fault: str) -> None:
    expected, text, inject = PICTURE_FAULTS[fault]
    inject(pictures)
    check_fault(pictures, expected, text)


@pytest.mark.parametrize("fault", VOLUME_FAULTS)
def test_a_fault_among_volumes_is_found_and_nothing_else_is_an_error(volumes: Path, fault: str) -> None:
    expected, text, inject = VOLUME_FAULTS[fault]
    inject(volumes)
    check_fault(volumes, expected, text)


def test_good_pictures_have_no_finding(pictures: Path) -> None:
    inspection = inspect(pictures)
    assert inspection.findings == ()
    assert inspection.ok
    assert [row.name for row in inspection.rows] == [f"c{n}" for n in range(6)]


def test_good_volumes_have_no_finding_and_rows_tell_what_is_in_them(volumes: Path) -> None:
    inspection = inspect(volumes)
    assert inspection.findings == ()
    row = inspection.rows[1]
    assert (row.shape_vox, row.channels, row.dtype, row.where) == ((8, 12, 14), 1, "float32", "images/v1.nii.gz")
    assert row.spacing_mm == pytest.approx((2, 1, 1))
    assert row.low == pytest.approx(volume(1).min())
    assert row.high == pytest.approx(volume(1).max())
    # 3 x 5 x 5 voxels of 8 x 12 x 14 are of class 1.
    assert row.voxels == (1344 - 75, 75)
    assert row.shares == pytest.approx((1269 / 1344, 75 / 1344))
    assert row.annotated == 1


def test_several_faults_are_all_found_and_the_other_cases_are_still_read(pictures: Path) -> None:
    truncate(pictures / "images" / "c1.png")
    (pictures / "masks" / "c2.png").write_text("hello")
    save_png(pictures / "masks" / "c4.png", mask((39, 48)))
    inspection = inspect(pictures)
    assert sorted((f.code, f.case) for f in inspection.findings) == [("grid-mismatch", "c4"), ("unreadable", "c1"), ("unreadable", "c2")]
    assert [row.name for row in inspection.rows] == ["c0", "c2", "c3", "c4", "c5"]
    assert [row.voxels is None for row in inspection.rows] == [False, True, False, True, False]


def test_the_same_image_in_both_parts_of_a_split_is_a_leak(pictures: Path) -> None:
    save_png(pictures / "images" / "c4.png", picture(3))
    dataset = open_dataset(pictures)
    inspection = inspect_dataset(dataset, Split(train=dataset.cases[:4], validation=dataset.cases[4:]))
    assert [(f.severity, f.code) for f in inspection.findings] == [("error", "leak")]
    assert "images/c3.png, images/c4.png" in inspection.findings[0].message
    apart = inspect_dataset(dataset, Split(train=dataset.cases[:2], validation=dataset.cases[2:]))
    assert [(f.severity, f.code) for f in apart.findings] == [("warning", "duplicate-image")]


def test_a_case_that_the_split_cuts_is_in_both_parts(pictures: Path) -> None:
    dataset = open_dataset(pictures)
    case = dataset.cases[0]
    parts = [replace(case, name=f"c0[{a}:{b}]", sections=(a, b)) for a, b in ((0, 30), (30, 40))]
    inspection = inspect_dataset(dataset, Split(train=(parts[0],), validation=(parts[1],)))
    assert [row.part for row in inspection.rows] == ["train + validation", "", "", "", "", ""]


def test_whatever_a_reader_raises_becomes_a_finding(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Dataset.read_image

    def fails(dataset: Dataset, case: Case) -> Image:
        if case.name == "c2":
            raise RuntimeError("codec\nfell over")
        return plain(dataset, case)

    monkeypatch.setattr(Dataset, "read_image", fails)
    finding = inspect(pictures).findings[0]
    assert (finding.code, finding.case) == ("unreadable", "c2")
    assert finding.message == "images/c2.png: cannot be read (codec fell over); export it again or leave the case out"


def test_an_unreadable_image_without_a_label_is_a_warning(pictures: Path) -> None:
    (pictures / "masks" / "c3.png").unlink()
    (pictures / "images" / "c3.png").write_text("hello")
    inspection = inspect(pictures)
    assert {(f.severity, f.code) for f in inspection.findings} == {("warning", "unreadable"), ("warning", "unpaired-image")}


def test_each_image_is_read_once_and_at_most_four_at_a_time(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lock = Dataset.read_image, threading.Lock()
    read: list[str] = []
    threads: set[int] = set()

    def counted(dataset: Dataset, case: Case) -> Image:
        with lock:
            read.append(case.name)
            threads.add(threading.get_ident())
        return plain(dataset, case)

    monkeypatch.setattr(Dataset, "read_image", counted)
    inspect(pictures)
    assert sorted(read) == [f"c{n}" for n in range(6)]
    assert len(threads) <= 4


def test_a_wrong_suffix_is_a_note_and_no_warning_escapes(pictures: Path) -> None:
    (pictures / "images" / "c3.png").rename(pictures / "images" / "c3.jpg")
    findings = inspect(pictures).findings
    assert [(f.severity, f.code) for f in findings] == [("note", "assumed")]
    assert "c3.jpg" in findings[0].message


@pytest.mark.parametrize("name", ["hippocampus", "oxford_pets", "dsb2018"])
def test_real_folders_have_no_errors_and_only_notes(data_folder: Callable[[str], Path], name: str) -> None:
    inspection = inspect(data_folder(name))
    assert inspection.ok
    assert {f.severity for f in inspection.findings} <= {"note"}
    assert len(inspection.rows) == {"hippocampus": 200, "oxford_pets": 96, "dsb2018": 34}[name]


def test_the_pet_that_is_no_jpeg_is_noted(data_folder: Callable[[str], Path]) -> None:
    inspection = inspect(data_folder("oxford_pets"))
    assert [f.severity for f in inspection.findings if "Abyssinian_5.jpg" in f.message] == ["note"]


def test_the_stack_without_a_voxel_size_gets_a_warning(data_folder: Callable[[str], Path]) -> None:
    with pytest.warns(DataWarning, match=r"train-volume.tif: no voxel size"):
        dataset = open_dataset(data_folder("isbi2012"))
    inspection = inspect_dataset(dataset)
    assert [(f.severity, f.code) for f in inspection.findings] == [("warning", "no-spacing")]
    assert inspection.rows[0].shape_vox == (25, 512, 512)


def test_json_holds_everything_and_no_nan(volumes: Path) -> None:
    poison(volumes)
    (volumes / "images" / "v3.nii.gz").write_text("hello")
    document = json.loads(json.dumps(inspect(volumes).to_json(), allow_nan=False))
    assert document["ok"] is False
    assert document["legend"]["names"] == ["background", "foreground"]
    assert [case["case"] for case in document["cases"]] == ["v0", "v1", "v2"]
    assert document["cases"][0]["classes"]["foreground"] == pytest.approx(75 / 1344)
    assert document["cases"][0]["spacing_mm"] == pytest.approx([2, 1, 1])
    assert {f["code"] for f in document["findings"]} == {"not-finite", "unreadable"}
    # A file that says hello is no NIfTI: the page is that of the reader's own error.
    assert {f["code"]: f["page"] for f in document["findings"]} == {"not-finite": "MT-D068", "unreadable": "MT-D005"}
    assert all(set(f) == {"severity", "code", "page", "case", "message", "files"} for f in document["findings"])


def test_the_table_leaves_out_columns_that_say_nothing(pictures: Path) -> None:
    table = case_table(inspect(pictures))
    assert table.titles == ("case", "size", "channels", "type", "spacing (mm)", "values", "classes")
    # 15 x 18 of 40 x 48 pixels are foreground.
    assert table.rows[0] == ("c0", "40×48", "1", "uint8", "not known", "0 – 255", "background 85.9 %, foreground 14.1 %")
    dataset = open_dataset(pictures)
    split = Split(train=dataset.cases[:3], validation=dataset.cases[3:5])
    assert [row[1] for row in case_table(inspect_dataset(dataset, split)).rows] == ["train"] * 3 + ["validation"] * 2 + ["–"]


def test_sparse_labels_get_a_column(pictures: Path) -> None:
    describe(pictures, "classes: {background: 0, cell: 255}\nnot_annotated: 100")
    label = mask()
    label[20:] = 100
    save_png(pictures / "masks" / "c1.png", label)
    table = case_table(inspect(pictures))
    column = table.titles.index("annotated")
    assert [row[column] for row in table.rows[:3]] == ["100 %", "50.0 %", "100 %"]


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.1234, "12.3 %"), (0.00041, "0.041 %"), (0.99996, "99.9 %"), (0.0096, "1.0 %")]
)
def test_a_share_never_reads_as_none_or_all_unless_it_is(share: float, text: str) -> None:
    assert format_share(share) == text


def row(name: str, **changes: object) -> CaseRow:
    plain = CaseRow(
        name=name,
        where=f"{name}.png",
        where_label=f"{name}_mask.png",
        files=(Path(f"{name}.png"),),
        part="",
        shape_vox=(40, 48),
        channels=1,
        dtype="uint8",
        spacing_mm=(1.0, 1.0),
        spacing_known=False,
        low=0,
        high=255,
        not_finite=0,
        constant=(),
        voxels=(1000, 920),
        fingerprint=name,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


LEGEND = Legend(names=("background", "cell"), values=((0,), (1,)), background=0)


def test_shares_of_classes_are_over_all_voxels_of_all_cases() -> None:
    assert class_shares([row("a", voxels=(30, 10)), row("b", voxels=(0, 60)), row("c", voxels=None)], 2) == (0.3, 0.7)
    assert class_shares([row("a", voxels=(0, 0))], 2) == (0, 0)


def test_a_side_of_just_the_ratio_is_no_outlier() -> None:
    usual = [row(f"u{n}", shape_vox=(8, 8, 8), spacing_mm=(1.0, 1.0, 1.0), spacing_known=True) for n in range(3)]
    twice = replace(usual[0], name="twice", where="twice", fingerprint="t", spacing_mm=(2.0, 1.0, 1.0))
    assert findings_of((*usual, twice), LEGEND) == []
    more = replace(twice, spacing_mm=(2.01, 1.0, 1.0))
    assert [f.code for f in findings_of((*usual, more), LEGEND)] == ["spacing-outlier"]
    assert findings_of((*usual, replace(more, spacing_known=False)), LEGEND) == []


def test_a_hundred_equal_faults_make_one_finding_that_names_the_first_and_has_all_files() -> None:
    rows = [row(f"e{n}", voxels=(1920, 0)) for n in range(100)]
    found = findings_of((row("full"), *rows), LEGEND)
    assert [f.code for f in found] == ["empty-mask"]
    assert found[0].message.startswith("e0_mask.png, e1_mask.png, e2_mask.png, e3_mask.png and 96 more:")
    assert len(found[0].files) == 100


@pytest.mark.parametrize(
    ("shape_vox", "said"),
    [
        ((1, 1), "thin.png: only 1 pixel wide and 1 pixel high; export it again, or leave the case out"),
        ((48, 1), "thin.png: only 1 pixel wide; export it again, or leave the case out"),
        ((1, 48), "thin.png: only 1 pixel high; export it again, or leave the case out"),
        ((9, 1, 1), "thin.png: only 1 voxel wide and 1 voxel high; export it again, or leave the case out"),
        ((1, 40, 48), None),
        ((2, 2), None),
    ],
)
def test_an_image_of_a_single_pixel_a_row_or_a_column_is_said_to_be_that(shape_vox: tuple[int, ...], said: str | None) -> None:
    constant = (0,) if shape_vox == (1, 1) else ()
    thin = row("thin", shape_vox=shape_vox, spacing_mm=(1.0,) * len(shape_vox), voxels=None, constant=constant)
    found = [finding for finding in findings_of((row("a"), row("b"), thin), LEGEND) if finding.severity == "warning"]
    assert [finding.message for finding in found] == [said] * (said is not None)


def test_two_blank_images_are_blank_and_not_called_the_same() -> None:
    blank = [row(name, fingerprint="same", constant=(0,), low=0, high=0) for name in "ab"]
    assert [f.code for f in findings_of((row("c"), *blank), LEGEND)] == ["constant-image"]


def test_without_a_background_no_label_is_empty() -> None:
    legend = Legend(names=("pet", "border"), values=((1,), (3,)), background=None)
    assert findings_of((row("a", voxels=(1920, 0)), row("b")), legend) == []


def test_no_cases_at_all_have_no_findings() -> None:
    assert findings_of((), LEGEND) == []


def image(array: np.ndarray, spacing_mm: tuple[float, ...] = (1.0, 1.0)) -> Image:
    axes = "CYX" if array.ndim == 3 else "CZYX"
    return Image(array=array, spacing_mm=spacing_mm, affine=affine_from_spacing(spacing_mm), axes=axes, path=Path("x.png"), format="png")


def pixels(png: bytes) -> np.ndarray:
    return np.array(PIL.Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_a_thumbnail_outlines_the_class_tints_it_and_leaves_the_background() -> None:
    grey = np.full((1, 40, 40), 100, np.uint8)
    grey[0, 0, :2] = 0, 200
    label = np.zeros((40, 40), np.int16)
    label[10:30, 10:30] = 1
    colours = class_colours(2, 0)
    drawn = pixels(draw_thumbnail("a", image(grey), label, colours, side_px=40).png)
    assert colours == (None, (255, 140, 0))
    assert np.abs(drawn[10, 10:30] - (255, 140, 0)).max() <= 3
    assert np.ptp(drawn[5, 20]) == 0
    assert np.ptp(drawn[20, 20]) > 5
    assert drawn[20, 20, 0] > drawn[20, 20, 2]


def test_what_is_not_annotated_is_darker() -> None:
    grey = picture(1, (1, 40, 40))
    label = np.zeros((40, 40), np.int16)
    label[:, 20:] = -1
    drawn = pixels(draw_thumbnail("a", image(grey), label, (None, (255, 0, 0)), side_px=40).png)
    assert drawn[:, 20:].mean() < 0.6 * drawn[:, :20].mean()


def test_the_section_with_the_most_foreground_is_shown_and_the_middle_one_without_any() -> None:
    array = np.random.default_rng(0).integers(0, 9, (1, 10, 20, 20)).astype(np.uint8)
    label = np.zeros((10, 20, 20), np.int16)
    spacing = (1.0, 1.0, 1.0)
    colours = class_colours(2, 0)
    assert draw_thumbnail("a", image(array, spacing), label, colours).section == 5
    assert draw_thumbnail("a", image(array, spacing), None, colours).section == 5
    label[7, 2:9, 2:9] = 1
    label[3, 2:4, 2:4] = 1
    assert draw_thumbnail("a", image(array, spacing), label, colours).section == 7


def test_a_painted_section_is_shown_before_those_that_others_cross() -> None:
    array = np.zeros((1, 10, 20, 20), np.uint8)
    label = np.full((10, 20, 20), -1, np.int16)
    label[:, 4] = 1
    label[2] = 0
    label[2, 8:10, 8:10] = 1
    assert draw_thumbnail("a", image(array, (1.0, 1.0, 1.0)), label, class_colours(2, 0)).section == 2


def test_a_thumbnail_keeps_the_shape_in_millimetres() -> None:
    assert draw_thumbnail("a", image(np.zeros((1, 10, 20)), (2.0, 1.0)), None, ()).size == (264, 264)
    assert draw_thumbnail("a", image(np.zeros((1, 10, 20))), None, (), side_px=100).size == (100, 50)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_image_with_nothing_to_see_still_has_a_thumbnail(value: float) -> None:
    assert pixels(draw_thumbnail("a", image(np.full((1, 30, 30), value, np.float32)), None, ()).png).max() == 0


def test_a_label_of_another_shape_is_left_out_of_the_thumbnail() -> None:
    drawn = draw_thumbnail("a", image(picture(0)[None]), mask((39, 48)).astype(np.int16), class_colours(2, 0))
    assert np.ptp(pixels(drawn.png), axis=-1).max() <= 8


def test_background_has_no_colour_and_colours_come_round() -> None:
    colours = class_colours(11, 2)
    assert [n for n, colour in enumerate(colours) if colour is None] == [2]
    assert colours[0] == colours[9]
    assert len(set(colours[:9])) == 9


def test_pictures_of_cases_with_findings_come_first_and_others_are_spread(pictures: Path) -> None:
    save_png(pictures / "masks" / "c4.png", np.zeros((40, 48), np.uint8))
    save_png(pictures / "masks" / "c5.png", mask((39, 48)))
    dataset = open_dataset(pictures)
    inspection = inspect_dataset(dataset)
    assert case_severities(inspection) == {"c5": "error", "c4": "warning"}
    assert [t.case for t in case_thumbnails(dataset, inspection, limit=4)] == ["c5", "c4", "c0", "c2"]
    assert [t.case for t in case_thumbnails(dataset, inspection, limit=1)] == ["c5"]
    assert len(case_thumbnails(dataset, inspection)) == 6


def test_the_page_is_whole_by_itself_and_shows_everything(pictures: Path) -> None:
    save_png(pictures / "masks" / "c4.png", np.zeros((40, 48), np.uint8))
    (pictures / "images" / "c5.png").write_text("hello")
    dataset = open_dataset(pictures)
    inspection = inspect_dataset(dataset)
    html = inspection_html(inspection, case_thumbnails(dataset, inspection))
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|<script|https?://', html)
    assert html.count("data:image/png;base64,") == 5
    assert "Mend the errors below" in html
    assert html.index(">Error<") < html.index(">Warning<")
    assert all(text in html for text in ("images/c5.png", "masks/c4.png", "background", "foreground", "40×48", "85.9 %"))


def test_names_cannot_break_out_of_the_page(tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "<script>alert(1)<"
    shutil.copytree(pictures / "images", folder / "images")
    shutil.copytree(pictures / "masks", folder / "masks")
    for kind in ("images", "masks"):
        (folder / kind / "c3.png").rename(folder / kind / '"><img src=x>.png')
    dataset = open_dataset(folder)
    inspection = inspect_dataset(dataset)
    html = inspection_html(inspection, case_thumbnails(dataset, inspection))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;img src=x&gt;" in html


def test_a_page_without_pictures_or_readable_cases_still_comes_out(pictures: Path) -> None:
    for number in range(6):
        truncate(pictures / "images" / f"c{number}.png")
    inspection = inspect(pictures)
    assert inspection.rows == ()
    html = inspection_html(inspection)
    assert html.count("c3.png") >= 1
    assert "no image could be read" in html
