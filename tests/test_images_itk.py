"""NRRD and MetaImage, written by SimpleITK, pynrrd's plain text, and us; places are compared with NIfTI's."""

import gzip
import re
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its makers write it
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import ConfigError, DataError
from microtome.geometry import affine_from_spacing
from microtome.images.files import label_suffix, open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.image import Image, Limits
from tests.forked import ran
from tests.resident import grows_by_at_most, packed_zeros

RNG = np.random.default_rng(0)
ARRAY = RNG.integers(0, 60_000, (5, 6, 7)).astype(np.uint16)
PLAIN = {
    "array": ARRAY[None],
    "spacing_mm": (1.0, 1.0, 1.0),
    "affine": np.eye(4),
    "axes": "CZYX",
    "path": Path("x.tif"),
    "format": "tiff",
}
NAMES = ["a.nrrd", "a.mha", "a.mhd", "a.nhdr"]


def rotation(angles):
    """A rotation about x, y and z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def patient(array=ARRAY, angles=(0.3, -0.2, 0.9), spacing=(0.5, 0.75, 3.0), origin=(-11, 22, 33), mirrored=False):
    """A SimpleITK image at an oblique place."""
    picture = sitk.GetImageFromArray(array)
    picture.SetSpacing(spacing)
    picture.SetOrigin(origin)
    picture.SetDirection((rotation(angles) @ np.diag([1, 1, -1 if mirrored else 1])).ravel().tolist())
    return picture


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    packed=st.booleans(),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 9)] * 3),
    origin=st.tuples(*[st.floats(-200, 200)] * 3),
    mirrored=st.booleans(),
)
def test_the_same_patient_has_the_same_place_as_in_nifti(tmp_path_factory, name, packed, angles, spacing, origin, mirrored):
    folder = tmp_path_factory.mktemp("i")
    picture = patient(ARRAY, angles, spacing, origin, mirrored)
    sitk.WriteImage(picture, str(folder / name), packed)
    sitk.WriteImage(picture, str(folder / "a.nii.gz"))
    image, nifti = read_image(folder / name), read_image(folder / "a.nii.gz")
    np.testing.assert_array_equal(image.array, nifti.array)
    np.testing.assert_allclose(image.affine, nifti.affine, atol=1e-3)
    np.testing.assert_allclose(image.spacing_mm, spacing[::-1], rtol=1e-6)
    assert (image.axes, image.spacing_known, image.format) == ("CZYX", True, "nrrd" if name in ("a.nrrd", "a.nhdr") else "metaimage")
    # The corner of the last voxel, as ITK itself computes it.
    lps = picture.TransformIndexToPhysicalPoint((6, 5, 4))
    np.testing.assert_allclose((image.affine @ [4, 5, 6, 1])[:3], [-lps[0], -lps[1], lps[2]], atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize(("name", "packed"), [(name, packed) for name in NAMES for packed in (False, True)])
def test_any_part_is_that_part_of_what_simpleitk_reads(tmp_path, name, packed, dtype):
    array = RNG.integers(0, 99, (5, 6, 7)).astype(dtype)
    sitk.WriteImage(patient(array), str(tmp_path / name), packed)
    volume = open_volume(tmp_path / name)
    assert type(volume.pixels).__name__ == ("Lazy" if packed else "Mapped")
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))
    part = volume.pixels[:, 1:4, :, 2:5]
    assert part.dtype == reference.dtype == volume.pixels.dtype
    np.testing.assert_array_equal(part, reference[None, 1:4, :, 2:5])
    header, image = probe_image(tmp_path / name), read_image(tmp_path / name)
    assert (header.channels, *header.shape_vox, header.dtype) == (*image.array.shape, image.array.dtype.name)
    np.testing.assert_array_equal(image.array[0], array)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_vectors_and_a_fourth_axis_are_channels(tmp_path, name, packed):
    array = RNG.integers(0, 99, (5, 6, 7, 3)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / name), packed)
    np.testing.assert_array_equal(read_image(tmp_path / name).array, np.moveaxis(array, -1, 0))
    fourth = sitk.JoinSeries([patient(ARRAY), patient(ARRAY + 1)])
    sitk.WriteImage(fourth, str(tmp_path / name), packed)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.array, [ARRAY, ARRAY + 1])
    sitk.WriteImage(patient(), str(tmp_path / "b.nii"))
    np.testing.assert_allclose(image.affine, read_image(tmp_path / "b.nii").affine, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_picture_has_two_axes_and_its_place(tmp_path, name, packed):
    picture = sitk.GetImageFromArray(ARRAY[0])
    picture.SetSpacing((0.5, 2.0))
    picture.SetOrigin((3.0, 4.0))
    sitk.WriteImage(picture, str(tmp_path / name), packed)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.array, ARRAY[:1])
    assert (image.axes, image.spacing_mm) == ("CYX", (2.0, 0.5))
    assert image.affine.tolist() == [[2, 0, 4], [0, 0.5, 3], [0, 0, 1]]
    write_image(tmp_path / f"b{Path(name).suffix}", image)
    again = sitk.ReadImage(str(tmp_path / f"b{Path(name).suffix}"))
    assert (again.GetSpacing(), again.GetOrigin(), again.GetDirection()) == ((0.5, 2.0), (3.0, 4.0), (1, 0, 0, 1))


@pytest.mark.parametrize("name", ["b.nrrd", "b.mha", "b.seg.nrrd"])
@pytest.mark.parametrize("channels", [1, 2])
def test_what_is_written_lies_where_it_was(tmp_path, name, channels):
    sitk.WriteImage(patient(), str(tmp_path / "a.nrrd"))
    sitk.WriteImage(patient(), str(tmp_path / "a.nii.gz"))
    for source in ("a.nrrd", "a.nii.gz"):
        image = read_image(tmp_path / source)
        stacked = Image(**{**vars(image), "array": np.concatenate([image.array] * channels)})
        write_image(tmp_path / name, stacked)
        again = sitk.ReadImage(str(tmp_path / name))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(again), ARRAY if channels == 1 else np.stack([ARRAY] * 2, -1))
        for ours, theirs in zip(
            (again.GetSpacing(), again.GetOrigin(), again.GetDirection()),
            (patient().GetSpacing(), patient().GetOrigin(), patient().GetDirection()),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(read_image(tmp_path / name).affine, image.affine, atol=1e-4)


def test_labels_keep_place_and_format_and_may_become_nifti(tmp_path):
    for name, suffix in (("a.nrrd", ".nrrd"), ("a.mha", ".mha"), ("a.mhd", ".mha")):
        sitk.WriteImage(patient(), str(tmp_path / name))
        image = read_image(tmp_path / name)
        assert label_suffix(image) == suffix
        write_labels(tmp_path / f"b{suffix}", (ARRAY > 9) * 300, image)
        again = sitk.ReadImage(str(tmp_path / f"b{suffix}"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(again), (ARRAY > 9) * 300)
        np.testing.assert_allclose(again.GetDirection(), patient().GetDirection(), atol=1e-7)
        write_image(tmp_path / "c.nii.gz", image)
        sitk.WriteImage(patient(), str(tmp_path / "d.nii.gz"))
        np.testing.assert_allclose(nib.load(tmp_path / "c.nii.gz").affine, nib.load(tmp_path / "d.nii.gz").affine, atol=1e-4)


def test_stacks_of_other_formats_are_written_with_their_voxel_size(tmp_path):
    spacing = (3.0, 0.75, 0.5)
    image = Image(
        array=np.array(ARRAY[None] > 9),
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes="CZYX",
        path=Path("a.tif"),
        format="tiff",
    )
    write_image(tmp_path / "a.nrrd", image)
    again = sitk.ReadImage(str(tmp_path / "a.nrrd"))
    assert again.GetSpacing() == (0.5, 0.75, 3.0)
    assert again.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), ARRAY > 9)


def test_halves_of_pairs_are_not_written(tmp_path):
    sitk.WriteImage(patient(), str(tmp_path / "a.mha"))
    with pytest.raises(DataError, match=r"a name ending in \.nrrd or \.mha, got `b\.mhd`"):
        write_image(tmp_path / "b.mhd", read_image(tmp_path / "a.mha"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mha"]


def nrrd(path, data, **fields):
    """A NRRD file by hand."""
    values = {"type": "uchar", "dimension": "3", "sizes": "4 3 2", "endian": "little", "encoding": "raw"} | fields
    text = "NRRD0004\n# a remark: with colons\n" + "".join(
        f"{name.replace('_', ' ')}: {value}\n" for name, value in values.items() if value
    )
    path.write_bytes(text.encode() + b"\n" + data)
    return path


VALUES = np.arange(24, dtype=np.uint8)


def test_encodings_that_only_simpleitk_knows_are_read(tmp_path):
    text = nrrd(tmp_path / "a.nrrd", " ".join(map(str, VALUES)).encode(), encoding="ascii")
    skipping = nrrd(tmp_path / "b.nrrd", b"xyz" + VALUES.tobytes(), byte_skip="3")
    packed = nrrd(tmp_path / "c.nrrd", gzip.compress(VALUES.tobytes(), mtime=0), encoding="gzip")
    for path in (text, skipping, packed):
        np.testing.assert_array_equal(read_image(path).array.ravel(), VALUES)
        assert open_volume(path).spacing_known is False
    (tmp_path / "a.mha").write_text(
        "ObjectType = Image\nNDims = 2\nBinaryData = False\nDimSize = 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n1 2 3 4\n"
    )
    assert read_image(tmp_path / "a.mha").array.tolist() == [[[1, 2], [3, 4]]]


def meta(path, data, **fields):
    """A MetaImage of 3 x 2 numbers of 16 bits by hand, whose text has 200 bytes, so that `HeaderSize = 200` is where it ends."""
    values = {"ObjectType": "Image", "NDims": "2", "DimSize": "3 2", "ElementType": "MET_SHORT"} | fields
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    last = "ElementDataFile = LOCAL\n"
    path.write_bytes((text + "Comment = " + "x" * (189 - len(text) - len(last)) + "\n" + last).encode() + data)
    return path


SIX = np.array([[1, -2, 3], [4, 5, 600]], np.int16)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"HeaderSize": "203"}, b"abc" + SIX.tobytes()),
        ({"HeaderSize": "-1"}, b"abcde" + SIX.tobytes()),
        ({"HeaderSize": "0"}, SIX.tobytes() + b"abc"),
        ({"HeaderSize": "203", "CompressedData": "True"}, b"abc" + zlib.compress(SIX.tobytes())),
        ({"BinaryData": "False"}, b"1 -2 3\n4 5 600\n"),
    ],
)
def test_voxels_of_a_metaimage_are_where_its_header_size_says(tmp_path, fields, data):
    path = meta(tmp_path / "a.mha", data, **fields)
    np.testing.assert_array_equal(read_image(path).array[0], SIX)
    np.testing.assert_array_equal(open_volume(path).pixels[:, 1:, 1:], SIX[None, 1:, 1:])


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        # Of these the library reads 6 numbers of 12, and says nothing.
        (
            {"BinaryData": "False", "ElementNumberOfChannels": "2"},
            b"1 2 3 4 5 6 7 8 9 10 11 12 ",
            "expected binary voxels of several channels, got BinaryData = False, ElementNumberOfChannels = 2",
        ),
        (
            {"CompressedData": "True", "BinaryData": "False"},
            zlib.compress(SIX.tobytes()),
            "expected binary voxels where they are packed, got BinaryData = False, CompressedData = True",
        ),
        (
            {"CompressedData": "True", "HeaderSize": "-1"},
            zlib.compress(SIX.tobytes()),
            "expected voxels that are packed behind a header of known size, got CompressedData = True, HeaderSize = -1",
        ),
        ({"CompressedData": "True", "HeaderSize": "200"}, zlib.compress(SIX[:1].tobytes()), "expected 12 bytes, got 6: it was cut off"),
        ({"HeaderSize": "203"}, SIX.tobytes(), "expected 215 bytes, got 212: it was cut off"),
        ({"HeaderSize": "-1", "DimSize": "300 2"}, SIX.tobytes(), "expected 1200 bytes, got 2"),
    ],
)
def test_voxels_of_a_metaimage_that_are_not_all_there_are_refused(tmp_path, fields, data, message):
    path = meta(tmp_path / "a.mha", data, **fields)
    for look in (read_image, lambda one: open_volume(one).pixels[:, :1, :1]):
        with pytest.raises(DataError, match=re.escape(f"a.mha: {message}")):
            look(path)


@pytest.mark.parametrize(
    "line",
    [
        # The library takes the next line's value for it: 248 axes, which end the process.
        "NDims \nCompressedDataSize = 248",
        "BinaryData ElementDataFile = /etc/passwd\n= False",
    ],
)
def test_lines_of_a_metaimage_without_one_name_and_one_value_are_refused(tmp_path, line):
    path = meta(tmp_path / "a.mha", SIX.tobytes())
    path.write_bytes(path.read_bytes().replace(b"NDims = 2", line.encode() + b"\nNDims = 2"))
    first = line.partition("\n")[0].strip()
    # In a process of its own, which it ended before.
    code = "import sys, pathlib\nfrom microtome.images.files import read_image\nread_image(pathlib.Path(sys.argv[1]))"
    done = ran(code, str(path))
    assert f"a.mha: expected a header of plain lines, each field once, got the line {first!r}" in done.stderr


def test_fields_of_a_metaimage_that_nobody_knows_may_have_names_of_several_words(tmp_path):
    path = meta(tmp_path / "a.mha", SIX.tobytes())
    path.write_bytes(path.read_bytes().replace(b"NDims = 2", b"Patient Name : A B\n\nNDims = 2"))
    np.testing.assert_array_equal(read_image(path).array[0], SIX)


def test_the_unit_of_a_nrrd_is_heeded(tmp_path):
    fields = {"space_dimension": "3", "space_directions": "(2,0,0) (0,3,0) (0,0,4)", "space_units": '"um" "um" "um"'}
    volume = open_volume(nrrd(tmp_path / "a.nrrd", VALUES.tobytes(), **fields))
    assert volume.spacing_mm == pytest.approx((4e-3, 3e-3, 2e-3))
    assert volume.spacing_known


def test_big_endian_files_are_read_in_this_machines_order(tmp_path):
    array = np.arange(24, dtype=">u2")
    volume = open_volume(nrrd(tmp_path / "a.nrrd", array.tobytes(), type="ushort", endian="big"))
    np.testing.assert_array_equal(volume.pixels[:, :, :, :].ravel(), array)
    assert volume.pixels.dtype.isnative
    head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\nDimSize = 4 3 2\nElementType = MET_USHORT\n"
    (tmp_path / "a.mha").write_bytes(head.encode() + b"ElementDataFile = LOCAL\n" + array.tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "a.mha").array.ravel(), array)


SEGMENTS = (
    "Segment0_ID:=a\nSegment0_LabelValue:={0}\nSegment0_Layer:=0\nSegment0_Name:=liver: left\n"
    "Segment1_ID:=b\nSegment1_LabelValue:={1}\nSegment1_Layer:={2}\nSegment1_Name:=tumour\n"
)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_segmentation_of_slicer_is_a_label_map(tmp_path, encoding):
    pack = {"raw": bytes, "gzip": gzip.compress}[encoding]
    one = VALUES % 3 * 2
    path = tmp_path / "a.seg.nrrd"
    nrrd(path, b"", encoding=encoding)
    path.write_bytes(path.read_bytes()[:-1] + SEGMENTS.format(2, 4, 0).encode() + b"\n" + pack(one.tobytes()))
    image = read_image(path)
    np.testing.assert_array_equal(image.array.ravel(), one)
    assert image.extra["classes"] == {2: "liver: left", 4: "tumour"}
    layers = np.stack([VALUES > 11, VALUES > 8], axis=-1).astype(np.uint8)
    nrrd(path, b"", encoding=encoding, sizes="2 4 3 2", dimension="4", kinds="list domain domain domain")
    path.write_bytes(path.read_bytes()[:-1] + SEGMENTS.format(1, 1, 1).encode() + b"\n" + pack(layers.tobytes()))
    image = read_image(path)
    assert image.array.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(image.array.ravel(), np.where(VALUES > 11, 1, np.where(VALUES > 8, 2, 0)))
    assert image.extra["classes"] == {1: "liver: left", 2: "tumour"}
    assert (probe_image(path).channels, probe_image(path).dtype) == (1, "uint16")


META = "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 4 3 2\nElementType = MET_UCHAR\nElementDataFile = {}\n"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "LIST\n../secret\n", "s%02d 1 2 1", "C:\\secret"])
@pytest.mark.parametrize("kind", ["nrrd", "metaimage"])
def test_voxels_outside_of_the_folder_are_refused(tmp_path, kind, name):
    (tmp_path / "secret").write_bytes(VALUES.tobytes())
    folder = tmp_path / "sub"
    folder.mkdir()
    if kind == "nrrd":
        path = nrrd(folder / "a.nhdr", b"", data_file=name)
    else:
        path = folder / "a.mhd"
        path.write_text(META.format(name))
    with pytest.raises(DataError, match=r"a\.(nhdr|mhd): expected voxels in one file beside it, got"):
        read_image(path)


@pytest.mark.parametrize("kind", ["nrrd", "metaimage"])
def test_a_link_to_voxels_outside_of_the_folder_is_refused_and_one_within_it_is_followed(tmp_path, kind):
    folder = tmp_path / "sub"
    folder.mkdir()
    for place in (tmp_path / "secret", folder / "a.raw"):
        place.write_bytes(VALUES.tobytes())
    path = nrrd(folder / "a.nhdr", b"", data_file="link") if kind == "nrrd" else folder / "a.mhd"
    if kind == "metaimage":
        path.write_text(META.format("link"))
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"a\.(nhdr|mhd): expected voxels in one file beside it, got `link`, a link to another folder;"):
        read_image(path)
    (folder / "link").unlink()
    (folder / "link").symlink_to("a.raw")
    np.testing.assert_array_equal(read_image(path).array.ravel(), VALUES)


@pytest.mark.parametrize("field", ["data_file", "datafile", "Data_File", "DATAFILE"])
def test_each_way_to_write_the_name_of_the_data_is_seen(tmp_path, field):
    with pytest.raises(DataError, match="voxels in one file beside it"):
        read_image(nrrd(tmp_path / "a.nhdr", b"", **{field: "../secret"}))


def test_a_file_of_voxels_that_is_missing_is_named(tmp_path):
    (tmp_path / "a.mhd").write_text(META.format("a.raw"))
    with pytest.raises(DataError, match=r"a\.mhd: expected its voxels in a\.raw, got no such file"):
        open_volume(tmp_path / "a.mhd")
    (tmp_path / "a.mhd").write_text(META.partition("ElementDataFile")[0])
    with pytest.raises(DataError, match=r"a\.mhd: expected a line ElementDataFile"):
        open_volume(tmp_path / "a.mhd")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_voxels_that_was_cut_off_is_an_error_that_names_both_files(tmp_path, packed):
    sitk.WriteImage(patient(RNG.integers(0, 60_000, (9, 20, 20)).astype("u2")), str(tmp_path / "a.mhd"), packed)
    voxels = tmp_path / ("a.zraw" if packed else "a.raw")
    voxels.write_bytes(voxels.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"a\.mhd: expected 7200 bytes in {voxels.name}, got \d+: it was cut off") as caught:
        read_image(tmp_path / "a.mhd")
    assert caught.value.code == "D002"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_file_that_was_cut_off_is_an_error(tmp_path, name, packed, share):
    sitk.WriteImage(patient(RNG.integers(0, 60_000, (9, 20, 20)).astype("u2")), str(tmp_path / name), packed)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"{name}: expected"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_wrong_checksum_is_an_error(tmp_path, name):
    sitk.WriteImage(patient(), str(tmp_path / name), True)
    whole = bytearray((tmp_path / name).read_bytes())
    whole[-6 if name == "a.nrrd" else -2] ^= 1
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(DataError, match=rf"{name}: expected a whole"):
        read_image(tmp_path / name)


def test_complex_values_and_two_axes_of_channels_are_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY.astype(np.complex64)), str(tmp_path / "a.nrrd"))
    with pytest.raises(DataError, match=r"a\.nrrd: expected real numbers, got values of complex"):
        open_volume(tmp_path / "a.nrrd")
    vectors = sitk.GetImageFromArray(np.zeros((5, 6, 7, 2), np.uint8), isVector=True)
    sitk.WriteImage(sitk.JoinSeries([vectors, vectors]), str(tmp_path / "b.mha"))
    with pytest.raises(DataError, match=r"b\.mha: expected 2 or 3 axes, and one of channels, got 2 components of 2×5×6×7"):
        open_volume(tmp_path / "b.mha")


def test_limits_are_for_sides_by_part_and_for_voxels_of_the_whole(tmp_path):
    sitk.WriteImage(patient(), str(tmp_path / "a.nrrd"))
    sitk.WriteImage(patient(), str(tmp_path / "b.nrrd"), True)
    assert open_volume(tmp_path / "a.nrrd", limits=Limits(max_voxels=9)).shape_vox == ARRAY.shape
    for name, limits in (("a.nrrd", Limits(max_side=6)), ("b.nrrd", Limits(max_voxels=9)), ("b.nrrd", Limits(max_side=6))):
        with pytest.raises(DataError, match=rf"{name}: expected at most"):
            open_volume(tmp_path / name, limits=limits)
    huge = nrrd(tmp_path / "c.nrrd", gzip.compress(VALUES.tobytes()), encoding="gzip", sizes="2000 2000 2000")
    with pytest.raises(DataError, match="max_expansion"):
        open_volume(huge)


TURNED = {"space_dimension": "3", "space_directions": "(1,0,0) (0,1,0) (0,0,1)"}
NO_PLACES = [
    {"spacings": "0 1 1"},
    {"spacings": "nan 1 1"},
    {"spacings": "1 inf 1"},
    {"spacings": "1 1 -inf"},
    TURNED | {"space_directions": "(0,0,0) (0,1,0) (0,0,1)"},
    TURNED | {"space_directions": "(1,0,0) (0,nan,0) (0,0,1)"},
    TURNED | {"space_directions": "(1,0,0) (0,1,0) (0, 0, inf)"},
    TURNED | {"space_origin": "(nan,0,0)"},
    TURNED | {"space_origin": "(0,-inf,0)"},
    TURNED | {"space_directions": "(1,0,0) (0,1,0) (1,1,0)"},
]
NO_META_PLACES = [
    {"ElementSpacing": "0 1 1"},
    {"ElementSpacing": "nan 1 1"},
    {"ElementSpacing": "1 1e999 1"},
    {"ElementSize": "0 0 0"},
    {"Offset": "inf 0 0"},
    {"Offset": "0 0 -1e999"},
    {"TransformMatrix": "nan 0 0 0 1 0 0 0 1"},
    {"TransformMatrix": "1 0 0 0 0 0 0 0 1"},
]


def refused_everywhere(path, words):
    """Each way to look at a file says the same, in one line with its name."""
    for read in (probe_image, open_volume, read_image):
        with pytest.raises(DataError, match=words) as caught:
            read(path)
        assert caught.value.where == str(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("fields", NO_PLACES)
def test_a_nrrd_whose_place_is_not_finite_or_whose_voxels_have_no_size_is_refused(tmp_path, fields, encoding):
    data = {"raw": bytes, "gzip": gzip.compress}[encoding](VALUES.tobytes())
    path = nrrd(tmp_path / "a.nrrd", data, encoding=encoding, **fields)
    refused_everywhere(path, r"expected finite (spacings above 0|space directions, not 0|space origin|voxel sizes above 0)")


@pytest.mark.parametrize("fields", NO_META_PLACES)
def test_a_metaimage_whose_place_is_not_finite_or_whose_voxels_have_no_size_is_refused(tmp_path, fields):
    head, _, name = META.format("LOCAL").partition("ElementType")
    lines = "".join(f"{field} = {value}\n" for field, value in fields.items())
    (tmp_path / "a.mha").write_bytes(f"{head}{lines}ElementType{name}".encode() + VALUES.tobytes())
    refused_everywhere(tmp_path / "a.mha", r"expected (finite voxel sizes above 0|NDims first, then \d finite numbers)")


def test_an_axis_of_channels_needs_no_voxel_size(tmp_path):
    fields = {"dimension": "4", "sizes": "2 4 3 1", "kinds": "vector domain domain domain", "spacings": "nan 2 3 4"}
    image = read_image(nrrd(tmp_path / "a.nrrd", VALUES.tobytes(), **fields))
    assert (image.channels, image.spacing_mm) == (2, (4.0, 3.0, 2.0))


def packed_volume(folder, kind, sizes, data):
    """A NRRD or MetaImage of bytes that are packed by deflate."""
    if kind == "nrrd":
        return nrrd(folder / "a.nrrd", data, encoding="gzip", sizes=sizes)
    head = META.format("LOCAL").replace("4 3 2", sizes).replace("BinaryData = True\n", "BinaryData = True\nCompressedData = True\n")
    (folder / "a.mha").write_bytes(head.encode() + data)
    return folder / "a.mha"


@pytest.mark.parametrize("kind", ["nrrd", "metaimage"])
def test_voxels_that_unpack_to_a_gigabyte_are_unpacked_no_further_than_the_header_says(tmp_path, kind):
    path = packed_volume(tmp_path, kind, "4 3 2", packed_zeros(1024, 31 if kind == "nrrd" else 15))
    with grows_by_at_most(2**26):
        assert read_image(path).array.shape == (1, 2, 3, 4)


@pytest.mark.parametrize("kind", ["nrrd", "metaimage"])
def test_a_tiny_packed_file_that_claims_a_gigabyte_is_refused_before_memory_is_taken(tmp_path, kind):
    path = packed_volume(tmp_path, kind, "1024 1024 1024", packed_zeros(1, 31 if kind == "nrrd" else 15))
    with grows_by_at_most(2**26):
        for read in (open_volume, read_image):
            with pytest.raises(
                DataError, match=r"a\.\w+: expected a file of \d+ bytes to hold at most 2000 times as many \(max_expansion\)"
            ):
                read(path)


def attempt(path):
    """What reading gives: an image, or the error that a user may see."""
    try:
        return read_image(path, limits=Limits(max_voxels=10**6))
    except DataError as error:
        return error


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_a_data_error_and_nothing_else(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("d") / name
    sitk.WriteImage(patient(), str(path), data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(12, 400))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    outcome = attempt(path)
    assert outcome.where.startswith(str(path.parent)) if isinstance(outcome, DataError) else outcome.array.dtype.kind in "iuf"


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = nrrd(tmp_path / "a.nrrd", VALUES.tobytes())
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r'expected the package SimpleITK.*pip install "microtome\[medical\]"'):
        open_volume(path)


def test_segments_that_are_no_numbers_are_damage(tmp_path):
    write_image(tmp_path / "a.nrrd", Image(**PLAIN))
    text = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(text.replace(b"\n\n", b"\nSegment0_ID:=a\nSegment0_Layer:=x\n\n", 1))
    with pytest.raises(DataError, match=r"a\.nrrd"):
        open_volume(tmp_path / "a.nrrd")


def test_unpacking_holds_little_beside_the_voxels(tmp_path):
    side = 2**9
    write_image(tmp_path / "a.mha", Image(**PLAIN | {"array": np.zeros((1, 128, side, side), np.uint8)}))
    tracemalloc.start()
    array = open_volume(tmp_path / "a.mha").pixels[:, :1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (array.shape, peak < 2**25 + 2**24 + 2**22) == ((1, 1, side, side), True)
