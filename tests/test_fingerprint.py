"""Fingerprints of folders whose every number is known, and of real data."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from microtome.data.dataset import open_dataset
from microtome.data.split import split_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import DataError, DataWarning
from microtome.fingerprint import CASES_READ, Fingerprint, section_lag, take_fingerprint, thinnest_class
from tests.folders import nifti, png, text, tiff


def stripes(shape: tuple[int, ...], width: int, axis: int = -1) -> np.ndarray:
    """Two classes in stripes of this width."""
    return (np.indices(shape)[axis] // width % 2).astype(np.int16)


def fingerprint(folder: Path) -> Fingerprint:
    dataset = open_dataset(folder)
    return take_fingerprint(dataset, dataset.labelled)


def pictures(folder: Path, arrays: list[np.ndarray], label: np.ndarray | None = None) -> Path:
    """A folder of these images, all with one label map of 0 and 255."""
    for number, array in enumerate(arrays):
        png(folder / "images" / f"{number:02d}.png", array)
        png(folder / "labels" / f"{number:02d}.png", 255 * stripes(array.shape[:2], 4) if label is None else label)
    return folder


# ---- thinnest class ----


@given(width=st.integers(1, 12), periods=st.integers(2, 5), axis=st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None)
def test_a_stripe_between_two_others_is_as_thin_as_it_is_wide(width: int, periods: int, axis: int) -> None:
    shape = [16, 16]
    # Wide, thin, wide, thin, ... wide: each thin stripe has both its borders within the picture.
    line = np.array(([0] * 3 * width + [1] * width) * periods + [0] * 3 * width, np.int16)
    shape[axis] = len(line)
    label = np.broadcast_to(line[:, None] if axis == 0 else line, shape)
    assert thinnest_class(label) == pytest.approx(width)


def test_a_disc_is_about_as_thin_as_its_radius() -> None:
    y, x = np.indices((101, 101)) - 50
    # Of a disc 2 x area / perimeter is r; a pixel border is 4 / pi longer than the circle.
    assert thinnest_class(((y**2 + x**2) <= 30**2).astype(np.int16)) == pytest.approx(30 * np.pi / 4, rel=0.05)


def test_borders_to_what_is_not_annotated_and_to_the_edge_do_not_count() -> None:
    label = np.full((20, 20), -1, np.int16)
    label[:, 4:6], label[:, 10:16] = 0, 1
    assert thinnest_class(label) == np.inf
    label[:, 6:10] = 1
    # Class 0: 2 x 40 / 20 borders; class 1: 2 x 200 / 20.
    assert thinnest_class(label) == 4


def test_one_class_alone_has_no_border() -> None:
    assert thinnest_class(np.zeros((8, 8), np.int16)) == np.inf
    assert thinnest_class(np.full((8, 8), -1, np.int16)) == np.inf


def test_of_a_volume_planes_from_all_over_it_count() -> None:
    label = np.zeros((40, 16, 32), np.int16)
    label[20:] = stripes((20, 16, 32), 4)
    assert 3.5 < thinnest_class(label) < 8.5


# ---- section lag ----


@pytest.mark.parametrize("thickness", [1, 4, 8])
def test_sections_as_thick_as_several_pixels_are_as_unlike_as_pixels_so_far_apart(thickness: int) -> None:
    tissue = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20 * thickness, 120, 120)), 6)
    assert section_lag(tissue[::thickness]) == pytest.approx(thickness, abs=max(1, thickness / 4))


def test_a_section_or_a_constant_volume_tells_nothing() -> None:
    assert section_lag(np.random.default_rng(0).normal(size=(1, 20, 20))) == 1
    assert section_lag(np.ones((9, 20, 20))) == 1


# ---- whole folders ----


def test_every_number_of_a_folder_of_pictures(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(100, 200, dtype=np.uint8), (40, 1))
    facts = fingerprint(pictures(tmp_path, [ramp, ramp, ramp[:20]]))
    assert (facts.cases, facts.channels, facts.shape_vox, facts.spacing_mm) == (3, 1, (40, 100), (1.0, 1.0))
    assert (facts.spacing_varies, facts.spacing_low_mm, facts.section_lag, facts.left_right_axis) == (False, (1.0, 1.0), None, None)
    assert facts.formats == {"png"}
    assert len(facts.classes) == 2
    # The outer stripes border on one other: 2 x area / border of 25 stripes of 4 with 24 borders.
    assert facts.thinnest_vox == pytest.approx(4, rel=0.1)
    assert facts.low == pytest.approx(np.percentile(ramp, 0.5), abs=0.1)
    assert facts.high == pytest.approx(np.percentile(ramp, 99.5), abs=0.1)
    assert facts.mean == pytest.approx([149.5])
    assert facts.sd == pytest.approx([ramp.std()], rel=1e-4)
    assert facts.brightness_varies == pytest.approx(0)
    assert not facts.hounsfield


def test_brightness_that_differs_between_images_is_measured_in_their_own_spread(tmp_path: Path) -> None:
    base = np.tile(np.array([0, 20], np.uint8), (16, 8))
    facts = fingerprint(pictures(tmp_path, [base, base + 40]))
    # Means 10 and 50 (sd 20), each with an inner sd of 10; together they have sd sqrt(100 + 400).
    assert facts.brightness_varies == pytest.approx(2)
    assert facts.mean == (30,)
    assert facts.sd == pytest.approx([np.sqrt(500)], rel=1e-5)


def test_colours_are_measured_channel_by_channel(tmp_path: Path) -> None:
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[..., 0], colour[..., 1], colour[:, ::2, 2] = 10, 200, 100
    facts = fingerprint(pictures(tmp_path, [colour, colour]))
    assert facts.channels == 3
    assert facts.mean == (10, 200, 50)
    assert facts.sd == pytest.approx([0, 0, 50])


def test_spacing_of_volumes_median_and_tenth_percentile(tmp_path: Path) -> None:
    for number, z in enumerate((2.0, 4.0, 5.0)):
        label = stripes((9, 10, 12), 3)
        nifti(tmp_path / "images" / f"{number}.nii.gz", label.astype(np.float32), spacing_mm=(z, 0.5, 0.5))
        nifti(tmp_path / "labels" / f"{number}.nii.gz", label.astype(np.uint8), spacing_mm=(z, 0.5, 0.5))
    facts = fingerprint(tmp_path)
    assert facts.spacing_mm == (4.0, 0.5, 0.5)
    assert facts.spacing_low_mm == pytest.approx((2.4, 0.5, 0.5))
    assert facts.spacing_varies
    assert facts.spacing_known
    # World x runs along the last array axis here.
    assert facts.left_right_axis == 2


def test_ct_numbers_are_known_by_their_air(tmp_path: Path) -> None:
    volume = np.full((9, 10, 12), -1000, np.int16)
    volume[3:6] = 40
    nifti(tmp_path / "images" / "a.nii.gz", volume)
    nifti(tmp_path / "labels" / "a.nii.gz", (volume > 0).astype(np.uint8))
    assert fingerprint(tmp_path).hounsfield


def test_voxels_without_a_value_are_left_out(tmp_path: Path) -> None:
    volume = np.full((9, 10, 12), 7, np.float32)
    volume[3:6] = 9
    volume[0] = np.nan
    nifti(tmp_path / "images" / "a.nii.gz", volume)
    nifti(tmp_path / "labels" / "a.nii.gz", (volume > 8).astype(np.uint8))
    facts = fingerprint(tmp_path)
    assert facts.mean == pytest.approx([(5 * 7 + 3 * 9) / 8])
    assert (facts.low, facts.high) == ((7,), (9,))


def test_a_stack_without_spacing_is_told_to_be_one(tmp_path: Path) -> None:
    tiff(tmp_path / "images" / "a.tif", np.random.default_rng(0).integers(0, 255, (9, 32, 32)).astype(np.uint8))
    tiff(tmp_path / "labels" / "a.tif", stripes((9, 32, 32), 4).astype(np.uint8))
    with pytest.warns(DataWarning, match="no voxel size"):
        dataset = open_dataset(tmp_path)
    assert not take_fingerprint(dataset, dataset.labelled).spacing_known
    text(tmp_path / "microtome.yaml", "spacing_mm: [4, 1, 1]\n")
    facts = fingerprint(tmp_path)
    assert facts.spacing_known
    assert facts.spacing_mm == (4, 1, 1)


def test_sparse_volumes_of_the_demo(tmp_path: Path) -> None:
    data = write_demo_data(tmp_path, DemoConfig(volume_vox=(20, 32, 40), picture_vox=(32, 32), pictures=1))
    facts = fingerprint(data.tubules)
    assert (facts.shape_vox, facts.classes) == ((20, 32, 40), ("background", "tubule"))
    assert facts.spacing_mm == (0.00204, 0.00176, 0.00176)
    assert np.isfinite(facts.thinnest_vox)


def test_parts_of_a_stack_count_their_own_sections(tmp_path: Path) -> None:
    label = stripes((30, 16, 16), 4)
    nifti(tmp_path / "images" / "a.nii.gz", label.astype(np.float32))
    nifti(tmp_path / "labels" / "a.nii.gz", label.astype(np.uint8))
    dataset = open_dataset(tmp_path)
    split = split_dataset(dataset, "1/5")
    facts = take_fingerprint(dataset, split.train)
    assert facts.shape_vox == (24, 16, 16)
    assert facts.cases == 1


def test_of_many_cases_a_dozen_is_read_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(pictures(tmp_path, [np.tile(np.arange(16, dtype=np.uint8), (16, 1))] * 30))
    names: list[str] = []
    read = type(dataset).read_image
    monkeypatch.setattr(type(dataset), "read_image", lambda self, case: (names.append(case.name), read(self, case))[1])
    assert take_fingerprint(dataset, dataset.labelled).cases == 30
    assert len(names) == CASES_READ
    assert {names[0], names[-1]} == {dataset.labelled[0].name, dataset.labelled[-1].name}


def test_no_cases_are_refused(tmp_path: Path) -> None:
    dataset = open_dataset(pictures(tmp_path, [np.zeros((16, 16), np.uint8)]))
    with pytest.raises(DataError, match="expected labelled cases to train on, got none"):
        take_fingerprint(dataset, [])


def test_pictures_beside_volumes_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, [np.zeros((9, 12), np.uint8)])
    nifti(tmp_path / "images" / "v.nii.gz", np.zeros((9, 10, 12), np.uint8))
    nifti(tmp_path / "labels" / "v.nii.gz", 255 * stripes((9, 10, 12), 4).astype(np.uint8))
    dataset = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"only 2D images or only volumes, got v of 9×10×12 beside 00 of 9×12"):
        take_fingerprint(dataset, dataset.labelled)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hippocampus", {"channels": 1, "hounsfield": False, "left_right_axis": 2}),
        ("isbi2012", {"channels": 1, "hounsfield": False, "left_right_axis": None}),
    ],
)
def test_real_data(name: str, expected: dict[str, Any], data_folder: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        dataset = open_dataset(data_folder(name))
        facts = take_fingerprint(dataset, dataset.labelled[:3])
    assert {field: getattr(facts, field) for field in expected} == expected
    assert 1 < facts.thinnest_vox < 100
