"""Series of DICOM files that the tests write with pydicom; SimpleITK reads them too."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from microtome.errors import ConfigError, DataError, DataWarning
from microtome.images import dicom_seg
from microtome.images.dicom_seg import are_separate
from microtome.images.files import label_suffix, open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.image import Limits
from tests.dicom_series import VOLUME, by_simpleitk, dataset, enhanced, oblique, series

RNG = np.random.default_rng(1)


@settings(max_examples=8, deadline=None)
@given(angle=st.floats(-3, 3), tilt=st.floats(-1.4, 1.4), step=st.floats(0.3, 9), seed=st.integers(0, 9))
def test_a_series_is_read_as_simpleitk_reads_it(tmp_path_factory, angle, tilt, step, seed):
    folder = tmp_path_factory.mktemp("d") / "series"
    series(folder, directions=oblique(angle, tilt), step=step, names=np.random.default_rng(seed).permutation(6))
    volume = open_volume(folder)
    expected, affine = by_simpleitk(folder)
    np.testing.assert_array_equal(volume.load().array[0], expected)
    np.testing.assert_array_equal(expected, VOLUME)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
    np.testing.assert_allclose(volume.spacing_mm, (step, 0.75, 0.5), rtol=1e-4)
    assert (volume.axes, volume.format, volume.spacing_known, volume.chunk_vox) == ("CZYX", "dicom", True, (1, 8, 10))
    assert volume.pixels.dtype == np.int16


def test_the_place_of_a_voxel_is_what_the_standard_says(tmp_path):
    directions = oblique()
    positions = series(tmp_path / "s", directions=directions)
    volume = open_volume(tmp_path / "s")
    lps = positions[4] + directions[0] * 0.5 * 7 + directions[1] * 0.75 * 3
    np.testing.assert_allclose((volume.affine @ [4, 3, 7, 1])[:3], lps * [-1, -1, 1], atol=1e-6)


def test_a_gantry_that_is_tilted_shears_the_volume(tmp_path):
    series(tmp_path / "s", ImagePositionPatient=lambda number: [0, 0.4 * number, 3 * number])
    volume = open_volume(tmp_path / "s")
    np.testing.assert_allclose(volume.affine[:3, 0], [0, -0.4, 3])
    assert volume.spacing_mm[0] == pytest.approx(np.hypot(0.4, 3))


def test_any_part_is_decoded_from_the_slices_it_touches_alone(tmp_path):
    series(tmp_path / "s")
    volume = open_volume(tmp_path / "s")
    for path in volume.extra["source"][4:]:
        os.truncate(path, path.stat().st_size - 40)
    for part in ((slice(0, 1), slice(1, 4), slice(2, 5), slice(3, None)), (slice(0, 1), slice(2, 2), slice(None), slice(None))):
        np.testing.assert_array_equal(volume.pixels[part], VOLUME[None][part])
    with pytest.raises(DataError) as caught:
        volume.load()
    assert caught.value.where == str(volume.extra["source"][4])


def test_many_threads_read_one_series(tmp_path):
    series(tmp_path / "s")
    volume = open_volume(tmp_path / "s")
    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(lambda z: volume.pixels[:, z % 6 : z % 6 + 1, :, :], range(48)))
    for z, part in enumerate(parts):
        np.testing.assert_array_equal(part[0, 0], VOLUME[z % 6])


def test_a_file_of_a_series_stands_for_it_among_other_series(tmp_path):
    series(tmp_path / "s")
    other = dataset(VOLUME[0] * 0, SeriesInstanceUID="9.9", SeriesDescription="scout", ImagePositionPatient=[0, 0, 0])
    other.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    other.save_as(tmp_path / "s" / "other.dcm", enforce_file_format=True)
    (tmp_path / "s" / "notes.txt").write_text("not DICOM")
    np.testing.assert_array_equal(read_image(tmp_path / "s" / "IM3.dcm").array[0], VOLUME)
    words = (
        r"expected one series of images, got 2: 1\.2\.3 \(no description, 6 slices\); 9\.9 \(scout, 1 slices\); give one file of the series"
    )
    with pytest.raises(DataError, match=words):
        open_volume(tmp_path / "s")
    assert open_volume(tmp_path / "s" / "other.dcm").shape_vox == (1, 8, 10)


def test_a_slice_that_is_missing_is_named_by_its_neighbours(tmp_path):
    series(tmp_path / "s", names=range(6))
    (tmp_path / "s" / "IM3.dcm").unlink()
    with pytest.raises(DataError, match=r"expected slices 3 mm apart, got 6 mm between IM2\.dcm and IM4\.dcm"):
        open_volume(tmp_path / "s")


@pytest.mark.parametrize(("shift", "fine"), [(0.02, True), (0.05, False)])
def test_distances_may_differ_by_one_in_a_hundred(tmp_path, shift, fine):
    series(tmp_path / "s", ImagePositionPatient=lambda number: [0, 0, 3 * number + (shift if number == 2 else 0)])
    if fine:
        assert open_volume(tmp_path / "s").spacing_mm[0] == pytest.approx(3)
    else:
        with pytest.raises(DataError, match="expected slices 3 mm apart"):
            open_volume(tmp_path / "s")


def test_two_slices_at_one_position_are_refused(tmp_path):
    series(tmp_path / "s", names=range(6), ImagePositionPatient=lambda number: [0, 0, 3 * (number // 2)])
    with pytest.raises(DataError, match=r"expected one slice at each position, got IM\d\.dcm and IM\d\.dcm both at"):
        open_volume(tmp_path / "s")


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"ImageOrientationPatient": lambda n: [1, 0, 0, 0, 1, 0] if n else [1, 0, 0, 0, 0, 1]}, "expected directions"),
        ({"PixelSpacing": lambda n: [1, 1] if n else [2, 2]}, "expected pixels of"),
        ({"ImagePositionPatient": lambda n: [0, 0, n] if n else None}, "a position|none: these are pictures"),
        ({"PhotometricInterpretation": lambda n: "MONOCHROME2" if n else "MONOCHROME1"}, "expected 8×10 MONOCHROME"),
        ({"PixelSpacing": [0, 1]}, "sizes above 0"),
        ({"ImagePositionPatient": None}, "none: these are pictures, or time points"),
    ],
)
def test_slices_that_do_not_belong_together_are_refused(tmp_path, elements, words):
    series(tmp_path / "s", **elements)
    with pytest.raises(DataError, match=words) as caught:
        open_volume(tmp_path / "s")
    assert "IM" in caught.value.where


def test_slices_of_two_sizes_are_refused(tmp_path):
    series(tmp_path / "s")
    dataset(VOLUME[0, :5], ImagePositionPatient=[0, 0, -9], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]).save_as(
        tmp_path / "s" / "z.dcm", enforce_file_format=True
    )
    with pytest.raises(DataError, match=r"z\.dcm: expected 8×10 MONOCHROME2, 16 of 16 bits signed, as IM0\.dcm, got 5×10"):
        open_volume(tmp_path / "s")


UNSIGNED = RNG.integers(0, 4096, (6, 8, 10)).astype(np.uint16)


@pytest.mark.parametrize(
    ("volume", "elements", "dtype"),
    [
        (UNSIGNED, {}, np.uint16),
        (UNSIGNED.astype(np.uint8), {}, np.uint8),
        (UNSIGNED, {"RescaleSlope": 1, "RescaleIntercept": 0}, np.uint16),
        (UNSIGNED, {"RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}, np.int16),
        (UNSIGNED, {"RescaleSlope": 1, "RescaleIntercept": -1024}, np.int32),
        (VOLUME, {"RescaleSlope": 1, "RescaleIntercept": 24, "BitsStored": 12, "HighBit": 11}, np.int16),
        (UNSIGNED, {"RescaleSlope": 0.5, "RescaleIntercept": 3}, np.float32),
        (UNSIGNED, {"RescaleSlope": 1, "RescaleIntercept": 0.25}, np.float32),
        (UNSIGNED, {"RescaleSlope": lambda number: 1 + number, "RescaleIntercept": 0}, np.float32),
    ],
)
def test_values_are_rescaled_in_a_type_that_holds_them(tmp_path, volume, elements, dtype):
    series(tmp_path / "s", volume, **elements)
    image, header = read_image(tmp_path / "s"), probe_image(tmp_path / "s")
    slope = elements.get("RescaleSlope", 1)
    slopes = [slope(number) if callable(slope) else slope for number in range(6)]
    expected = volume * np.array(slopes)[:, None, None] + elements.get("RescaleIntercept", 0)
    assert image.array.dtype == dtype
    assert header.dtype == image.array.dtype.name
    np.testing.assert_array_equal(image.array[0], expected)
    if len(set(slopes)) == 1:
        np.testing.assert_allclose(by_simpleitk(tmp_path / "s")[0], expected)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
def test_a_rescaling_to_infinity_is_refused(tmp_path, name):
    made = dataset(VOLUME[0], RescaleSlope=1, RescaleIntercept=0)
    # pydicom writes what it would not make of a number.
    made[name] = RawDataElement(made[name].tag, "DS", 6, b"1e999 ", 0, False, True)
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match=r"a\.dcm: expected finite places and rescaling, .*1e999"):
        open_volume(tmp_path / "a.dcm")


@pytest.mark.parametrize("stored", [0, 17, 65535])
def test_more_bits_than_a_value_has_are_refused(tmp_path, stored):
    made = dataset(VOLUME[0])
    made.BitsStored = stored
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(
        DataError, match=rf"a\.dcm: expected grey values or RGB colours, got MONOCHROME2 with 1 samples of {stored} of 16 bits"
    ):
        open_volume(tmp_path / "a.dcm")


def test_low_values_that_are_bright_are_turned_round(tmp_path):
    series(tmp_path / "s", UNSIGNED, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read_image(tmp_path / "s").array[0], 4095 - UNSIGNED)
    series(tmp_path / "t", VOLUME, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_image(tmp_path / "t").array[0], -1 - VOLUME)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_slices_that_are_packed_are_unpacked(tmp_path, syntax):
    volume = np.repeat(np.repeat(UNSIGNED, 8, 1), 8, 2)
    made = dataset(volume[0], ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    if syntax == RLELossless:
        made.compress(syntax)
    else:
        from openjpeg.utils import encode_array
        from pydicom.encaps import encapsulate

        made.PixelData = encapsulate([encode_array(volume[0], bits_stored=16, photometric_interpretation=2)])
        made["PixelData"].VR = "OB"
        made.file_meta.TransferSyntaxUID = syntax
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.dcm").array[0, 0], volume[0])


def deflated(path, made):
    """The same file as pydicom deflates it."""
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    made.save_as(path, enforce_file_format=True)
    return path


def test_slices_whose_elements_are_deflated_are_read(tmp_path):
    path = deflated(tmp_path / "a.dcm", dataset(VOLUME[0]))
    np.testing.assert_array_equal(read_image(path).array[0], VOLUME[0])


def test_a_deflated_bomb_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_seg, "_UNSUSPECTED_BYTES", 2**22)
    words = r"bomb\.dcm: expected a deflated data set of at most 6\d{6} bytes, got one that becomes more"
    just = deflated(tmp_path / "just.dcm", dataset(np.zeros((1024, 1024), np.int16)))
    assert not read_image(just).array.any()
    bomb = deflated(tmp_path / "bomb.dcm", dataset(np.zeros((8192, 8192), np.int16)))
    tracemalloc.start()
    try:
        for read in (probe_image, read_image, open_volume):
            with pytest.raises(DataError, match=words):
                read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_compression_that_nothing_unpacks_is_named_with_what_to_install(tmp_path, monkeypatch):
    made = dataset(VOLUME[0])
    made.compress(RLELossless)
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    with pytest.raises(DataError, match=r'a\.dcm: expected a decoder of RLE Lossless, got none.*pip install "microtome\[medical\]"'):
        open_volume(tmp_path / "a.dcm")


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colours_without_a_place_are_a_picture_of_three_channels(tmp_path, photometric):
    colours = np.full((8, 10, 3), (200, 30, 90), np.uint8)
    made = dataset(colours, PixelSpacing=None, PhotometricInterpretation=photometric)
    if photometric == "YBR_FULL":
        from pydicom.pixels.processing import convert_color_space

        made.PixelData = convert_color_space(colours, "RGB", "YBR_FULL").tobytes()
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image = read_image(tmp_path / "a.dcm")
    assert (image.axes, image.spacing_known, image.spacing_mm, image.array.shape) == ("CYX", False, (1.0, 1.0), (3, 8, 10))
    np.testing.assert_allclose(image.array[:, 3, 3], [200, 30, 90], atol=2)
    # A picture's labels are a picture: NIfTI would make them a volume of one section, which no mask of it is.
    assert label_suffix(image) == ".tif"
    write_labels(tmp_path / "a.tif", image.array[0] // 100, image)
    assert open_volume(tmp_path / "a.tif").shape_vox == image.shape_vox


def test_a_picture_has_the_pixels_of_its_detector(tmp_path):
    dataset(UNSIGNED[0], PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.1]).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image = read_image(tmp_path / "a.dcm")
    assert (image.spacing_mm, image.spacing_known) == ((0.2, 0.1), True)
    np.testing.assert_array_equal(image.array, UNSIGNED[:1])


def test_one_slice_is_as_thick_as_it_says(tmp_path):
    series(tmp_path / "s", VOLUME[:1], SliceThickness=2.5)
    volume = open_volume(tmp_path / "s")
    assert (volume.shape_vox, volume.spacing_mm) == ((1, 8, 10), (2.5, 0.75, 0.5))


def test_a_file_of_many_frames_is_a_volume(tmp_path):
    enhanced(tmp_path / "a.dcm", [3, 0, 5, 1, 4, 2])
    series(tmp_path / "s", directions=oblique(), ImagePositionPatient=lambda n: (np.cross(*oblique()) * 3 * n).round(9).tolist())
    image, reference = read_image(tmp_path / "a.dcm"), read_image(tmp_path / "s")
    np.testing.assert_array_equal(image.array[0], VOLUME.astype(int) - 10)
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-6)
    assert image.extra["frames"] == [1, 3, 5, 0, 4, 2]


def test_frames_without_positions_are_refused(tmp_path):
    made = dataset(VOLUME[0], NumberOfFrames=6)
    made.PixelData = VOLUME.tobytes()
    made["PixelData"].VR = "OW"
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match=r"a\.dcm: expected a position for each frame, got 6 frames and no positions"):
        open_volume(tmp_path / "a.dcm")


@pytest.mark.parametrize("elements", [{"PhotometricInterpretation": "PALETTE COLOR"}, {"BitsAllocated": 64}])
def test_pixels_that_are_neither_grey_nor_colours_are_refused(tmp_path, elements):
    made = dataset(UNSIGNED[0])
    for name, value in elements.items():
        setattr(made, name, value)
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match=r"a\.dcm: expected grey values or RGB colours"):
        open_volume(tmp_path / "a.dcm")


def test_a_table_of_values_is_left_with_a_warning(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [1, 0, 16], "US", [0]
    made = dataset(UNSIGNED[0], ModalityLUTSequence=[table])
    for name in ("LUTDescriptor", "LUTData"):
        made.ModalityLUTSequence[0][name].VR = "US"
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.warns(DataWarning, match=r"a\.dcm: its look-up table"):
        open_volume(tmp_path / "a.dcm")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_slice_that_was_cut_off_is_an_error_with_its_name(tmp_path, share):
    series(tmp_path / "s", np.zeros((6, 64, 64), np.int16), names=range(6))
    path = tmp_path / "s" / "IM2.dcm"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError) as caught:
        open_volume(tmp_path / "s")
    assert caught.value.where == str(path)


def test_a_header_that_claims_more_than_the_file_has_is_an_error(tmp_path):
    dataset(UNSIGNED[0], Rows=60_000, Columns=60_000, NumberOfFrames=None).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    made = pydicom.dcmread(tmp_path / "a.dcm")
    made.Rows = made.Columns = 60_000
    made.save_as(tmp_path / "a.dcm")
    with pytest.raises(DataError, match=r"a\.dcm: expected 72000\d{5} bytes, got \d+: it was cut off"):
        open_volume(tmp_path / "a.dcm")
    series(tmp_path / "s")
    with pytest.raises(DataError, match="max_side"):
        open_volume(tmp_path / "s", limits=Limits(max_side=9))
    with pytest.raises(DataError, match="max_voxels"):
        read_image(tmp_path / "s", limits=Limits(max_voxels=9))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", [open_volume, read_image, lambda path: open_volume(path.parent), lambda path: are_separate(path.parent)])
def test_an_element_that_claims_four_gigabytes_has_no_more_read_than_the_file_holds(tmp_path, read):
    series(tmp_path / "s", names=range(6))
    path = tmp_path / "s" / "IM2.dcm"
    whole = path.read_bytes()
    element = whole.index(b"\x20\x00\x0e\x00UI")
    # The number of the series, as bytes of any kind, whose length has 32 bits.
    claim = b"\x20\x00\x0e\x00UN\0\0" + (2**32 - 16).to_bytes(4, "little")
    path.write_bytes(whole[:element] + claim + whole[element + 8 :])
    tracemalloc.start()
    with suppress(DataError):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def attempt(path):
    """What reading gives: an image, or the error that a user may see."""
    try:
        return read_image(path, limits=Limits(max_voxels=10**6))
    except DataError as error:
        return error


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_data_error_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("d") / "a.dcm"
    dataset(VOLUME[0], ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]).save_as(path, enforce_file_format=True)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[132 + data.draw(st.integers(0, 2**16)) % (len(content) - 132)] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    outcome = attempt(path)
    assert outcome.where == str(path) if isinstance(outcome, DataError) else outcome.format == "dicom"


def test_a_folder_without_images_is_refused(tmp_path):
    made = dataset(VOLUME[0])
    del made.Rows, made.PixelData
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match="expected one series of images, got none in 1 DICOM files"):
        open_volume(tmp_path)
    with pytest.raises(DataError, match=r"a\.dcm: expected an image, got CT without pixels"):
        open_volume(tmp_path / "a.dcm")


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    series(tmp_path / "s")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r'expected the package pydicom.*pip install "microtome\[medical\]"'):
        open_volume(tmp_path / "s")


def test_an_image_of_a_series_may_become_nifti_in_the_same_place(tmp_path):
    series(tmp_path / "s", directions=oblique())
    write_image(tmp_path / "a.nii.gz", read_image(tmp_path / "s"))
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii.gz").affine[:, [2, 1, 0, 3]], by_simpleitk(tmp_path / "s")[1], atol=1e-3)
