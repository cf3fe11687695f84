"""TIFF, ImageJ's and OME's, written by tifffile and by us."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError, DataWarning
from microtome.geometry import affine_from_spacing
from microtome.images.files import label_suffix, open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.image import Image, Limits

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 1000, (5, 12, 14)).astype(np.uint16)


def image_of(array, spacing_mm, *, known=True, **extra):
    """An image (C, *S) as if read from a TIFF."""
    return Image(
        array=array,
        spacing_mm=spacing_mm,
        affine=affine_from_spacing(spacing_mm),
        axes="CZYX"[-array.ndim :] if array.ndim == 4 else "CYX",
        path=Path("a.tif"),
        format="tiff",
        spacing_known=known,
        extra=extra,
    )


@st.composite
def images(draw):
    """Any (C, *S) with any spacing, of any type that TIFF can hold."""
    dims = draw(st.sampled_from([2, 3]))
    shape = draw(st.tuples(st.integers(1, 5), *[st.integers(2, 9)] * dims))
    dtype = draw(st.sampled_from(["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"]))
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 100, shape).astype(dtype)
    spacing_mm = draw(st.tuples(*[st.floats(1e-6, 50)] * dims))
    kind = draw(st.sampled_from(["ome", "imagej", "plain"]))
    return image_of(array, spacing_mm, known=draw(st.booleans()), tiff_kind=kind)


@settings(max_examples=80, deadline=None)
@given(images())
def test_a_tiff_gives_back_values_type_and_spacing(tmp_path_factory, image):
    path = tmp_path_factory.mktemp("t") / "a.tif"
    write_image(path, image)
    again = read_image(path)
    np.testing.assert_array_equal(again.array, image.array)
    assert again.array.dtype == image.array.dtype
    assert again.axes == image.axes
    assert again.spacing_known == image.spacing_known
    np.testing.assert_allclose(again.spacing_mm, image.spacing_mm if image.spacing_known else 1.0, rtol=1e-6)
    np.testing.assert_allclose(again.affine, affine_from_spacing(again.spacing_mm))
    header = probe_image(path)
    assert (header.shape_vox, header.channels, header.dtype) == (again.shape_vox, again.channels, again.array.dtype.name)
    assert (header.spacing_mm, header.spacing_known, header.format) == (again.spacing_mm, again.spacing_known, "tiff")


@settings(max_examples=30, deadline=None)
@given(images())
def test_labels_of_a_tiff_have_its_spacing_and_the_smallest_type(tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("t")
    write_image(folder / "a.tif", image)
    image = read_image(folder / "a.tif")
    labels = np.zeros(image.shape_vox, np.int64)
    labels.flat[-1] = 300
    write_labels(folder / "b.tif", labels, image)
    again = read_image(folder / "b.tif")
    np.testing.assert_array_equal(again.array[0], labels)
    assert (again.array.dtype, again.spacing_known) == (np.uint16, image.spacing_known)
    np.testing.assert_allclose(again.spacing_mm, image.spacing_mm, rtol=1e-6)
    assert again.extra["tiff_kind"] == image.extra["tiff_kind"]


# Shape in the file, how it is written, and the file's axis for each axis of the image (C first; None: length 1).
AXES = [
    ((12, 14), {}, (None, 0, 1)),
    ((12, 14, 3), {"photometric": "rgb"}, (2, 0, 1)),
    ((3, 12, 14), {"photometric": "rgb", "planarconfig": "separate"}, (0, 1, 2)),
    ((12, 14, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, (2, 0, 1)),
    ((5, 12, 14), {"photometric": "minisblack"}, (None, 0, 1, 2)),
    ((5, 12, 14), {"photometric": "minisblack", "metadata": None}, (None, 0, 1, 2)),
    ((1, 12, 14), {"photometric": "minisblack", "metadata": None}, (0, 1, 2)),
    ((5, 12, 14), {"imagej": True, "metadata": {"axes": "ZYX"}}, (None, 0, 1, 2)),
    ((5, 12, 14), {"imagej": True, "metadata": {"axes": "CYX"}}, (0, 1, 2)),
    ((5, 2, 12, 14), {"imagej": True, "metadata": {"axes": "ZCYX"}}, (1, 0, 2, 3)),
    ((5, 12, 14, 3), {"photometric": "rgb"}, (3, 0, 1, 2)),
    ((2, 5, 12, 14), {"ome": True, "photometric": "minisblack", "metadata": {"axes": "CZYX"}}, (0, 1, 2, 3)),
    ((5, 2, 12, 14), {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZCYX"}}, (1, 0, 2, 3)),
    ((5, 12, 14, 3), {"ome": True, "photometric": "rgb", "metadata": {"axes": "ZYXS"}}, (3, 0, 1, 2)),
]


@pytest.mark.parametrize(("shape", "options", "sources"), AXES)
def test_axes_of_a_file_become_channels_and_sections(tmp_path, shape, options, sources):
    array = RNG.integers(0, 256, shape).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    image, header = read_image(tmp_path / "a.tif"), probe_image(tmp_path / "a.tif")
    expected = array.transpose([axis for axis in sources if axis is not None])
    np.testing.assert_array_equal(image.array, expected[None] if sources[0] is None else expected)
    assert (header.channels, *header.shape_vox) == image.array.shape


def test_one_time_point_is_no_axis(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[None, :, None], imagej=True, metadata={"axes": "TZCYX"})
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, STACK[None])


@pytest.mark.parametrize(("photometric", "samples"), [("rgb", 4), ("minisblack", 2)])
def test_samples_that_are_declared_alpha_are_dropped(tmp_path, photometric, samples):
    array = RNG.integers(0, 256, (12, 14, samples)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric, planarconfig="contig", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, array[..., :-1].transpose(2, 0, 1))
    assert probe_image(tmp_path / "a.tif").channels == samples - 1


def test_time_points_are_refused_with_what_to_do(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(DataError, match=r"a\.tif: expected one time point, got 5 time points.*set its axes to ZYX"):
        read_image(tmp_path / "a.tif")


def test_two_axes_of_sections_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 5, 12, 14), np.uint16), photometric="minisblack", metadata={"axes": "QZYX"})
    with pytest.raises(DataError, match=r"a\.tif: expected one stack of sections"):
        read_image(tmp_path / "a.tif")


def test_colours_that_were_saved_as_rows_are_read_as_colours_with_a_warning(tmp_path):
    colours = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="minisblack")
    with pytest.warns(DataWarning, match=r"a\.tif: its last axis of 3"):
        image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.array, colours.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "options",
    [{"byteorder": ">"}, {"compression": "lzw"}, {"compression": "zlib", "predictor": True}, {"bigtiff": True}, {"tile": (16, 16)}],
)
def test_each_way_to_store_the_same_pixels_gives_the_same_array(tmp_path, options):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", **options)
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.array[0], STACK)
    assert image.array.dtype.isnative


def test_jpeg_inside_a_tiff_is_decoded(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((32, 32, 3), (200, 30, 90), np.uint8), photometric="rgb", compression="jpeg")
    np.testing.assert_allclose(read_image(tmp_path / "a.tif").array[:, 9, 9], [200, 30, 90], atol=4)


def test_bits_become_zero_and_one(tmp_path):
    bits = RNG.random((6, 9)) > 0.5
    PIL.Image.fromarray(bits).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.array[0], bits)
    assert image.array.dtype.name == probe_image(tmp_path / "a.tif").dtype == "uint8"


def test_a_palette_gives_colours_or_indices_and_is_kept(tmp_path):
    indices = np.array([[0, 1], [2, 0]], np.uint8)
    table = np.zeros((3, 256), np.uint16)
    table[:, 1], table[:, 2] = (0xFF00, 0, 0), (0, 0x1200, 0x3400)
    tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=table)
    colours, raw = read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.tif", palette="indices")
    np.testing.assert_array_equal(raw.array[0], indices)
    assert colours.array.reshape(3, 4).T.tolist() == [[0, 0, 0], [255, 0, 0], [0, 0x12, 0x34], [0, 0, 0]]
    assert raw.extra["palette"][1].tolist() == [255, 0, 0]
    assert probe_image(tmp_path / "a.tif").channels == 3


def test_the_look_up_table_of_imagej_does_not_change_what_was_recorded(tmp_path):
    # A green table, as ImageJ saves an 8-bit image that is shown in green.
    table = np.zeros((3, 256), np.uint16)
    table[1] = np.arange(256) * 257
    grey = RNG.integers(0, 256, (6, 7)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="palette", colormap=table, description="ImageJ=1.53t\nimages=1\n", metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, grey[None])


def test_cmyk_becomes_rgb(tmp_path):
    PIL.Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.array[:, 0, 0].tolist() == [255, 0, 0]
    assert probe_image(tmp_path / "a.tif").channels == 3


UM = 1e-3
SCALES = [
    ({"resolution": (1, 1)}, None),
    ({"resolution": (72, 72), "resolutionunit": "inch"}, None),
    ({"resolution": (300, 300), "resolutionunit": "inch"}, None),
    ({"resolution": (118.11, 118.11), "resolutionunit": "centimeter"}, None),  # 300 dpi
    ({"resolution": (1, 1), "resolutionunit": "centimeter"}, None),
    ({"resolution": (20_000, 10_000), "resolutionunit": "centimeter"}, (1 * UM, 0.5 * UM)),
    ({"resolution": (25_400, 25_400), "resolutionunit": "inch"}, (1 * UM, 1 * UM)),
    ({"imagej": True, "resolution": (2, 4)}, None),
    ({"imagej": True, "resolution": (2, 4), "metadata": {"unit": "pixel"}}, None),
    ({"imagej": True, "resolution": (2, 4), "metadata": {"unit": "um"}}, (0.25 * UM, 0.5 * UM)),
    ({"imagej": True, "resolution": (2, 4), "metadata": {"unit": "\\u00b5m"}}, (0.25 * UM, 0.5 * UM)),
    ({"imagej": True, "resolution": (0.25, 0.25), "metadata": {"unit": "nm"}}, (4e-6, 4e-6)),
    ({"imagej": True, "resolution": (1, 1), "metadata": {"unit": "mm"}}, (1, 1)),
    ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 2}}, (2 * UM, 0.5 * UM)),
    (
        {
            "ome": True,
            "metadata": {"axes": "YX", "PhysicalSizeX": 4, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 5, "PhysicalSizeYUnit": "nm"},
        },
        (5e-6, 4e-6),
    ),
    ({"ome": True, "metadata": {"axes": "YX"}}, None),
    ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 2, "PhysicalSizeXUnit": "pixel"}}, None),
]


@pytest.mark.parametrize(("options", "spacing_mm"), SCALES)
def test_the_scale_of_a_picture_is_what_its_program_wrote_or_unknown(tmp_path, options, spacing_mm):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], **options)
    image = read_image(tmp_path / "a.tif")
    assert image.spacing_known == (spacing_mm is not None)
    np.testing.assert_allclose(image.spacing_mm, spacing_mm or (1, 1), rtol=1e-6)


def test_imagej_and_ome_say_the_distance_of_sections(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, resolution=(4, 4), metadata={"axes": "ZYX", "unit": "micron", "spacing": -2.0})
    with pytest.warns(DataWarning, match=r"a\.tif: its distance of sections, -2\.0, is taken without its sign"):
        assert read_image(tmp_path / "a.tif").spacing_mm == pytest.approx((2 * UM, 0.25 * UM, 0.25 * UM))
    sizes = {"PhysicalSizeX": 1, "PhysicalSizeY": 1, "PhysicalSizeZ": 50, "PhysicalSizeZUnit": "nm"}
    tifffile.imwrite(tmp_path / "b.tif", STACK, ome=True, metadata={"axes": "ZYX"} | sizes)
    assert read_image(tmp_path / "b.tif").spacing_mm == pytest.approx((0.05 * UM, UM, UM))


def test_a_distance_of_sections_that_is_missing_is_assumed_with_a_warning(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, resolution=(4, 4), metadata={"axes": "ZYX", "unit": "micron"})
    with pytest.warns(DataWarning, match=r"a\.tif: does not say the distance of its sections; 1 micron"):
        assert read_image(tmp_path / "a.tif").spacing_mm == pytest.approx((UM, 0.25 * UM, 0.25 * UM))
    tifffile.imwrite(tmp_path / "b.tif", STACK, photometric="minisblack", resolution=(20_000, 20_000), resolutionunit="centimeter")
    with pytest.warns(DataWarning, match=r"b\.tif: does not say its voxel size along Z"):
        image = read_image(tmp_path / "b.tif")
    assert image.spacing_mm == pytest.approx((0.5 * UM,) * 3)
    assert image.spacing_known


def test_an_orientation_tag_and_further_images_are_left_with_a_warning(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], extratags=[(274, "H", 1, 6, True)])
    with pytest.warns(DataWarning, match=r"a\.tif: its orientation tag 6 is not applied"):
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array[0], STACK[0])
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(STACK[0])
        writer.write(STACK[0, :5, :5])
    with pytest.warns(DataWarning, match=r"b\.tif: holds 2 images of different shapes"):
        assert read_image(tmp_path / "b.tif").shape_vox == (12, 14)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "lzw"},
        {"compression": "jpeg"},
        {"metadata": None},
        {"imagej": True},
        {"ome": True},
        {"tile": (16, 16)},
    ],
)
def test_a_stack_that_was_cut_off_is_an_error_and_never_a_shorter_stack(tmp_path, options, share):
    stack = RNG.integers(0, 256, (6, 64, 64)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: max(8, int(len(whole) * share))])
    with pytest.raises(DataError, match=r"cut\.tif") as caught:
        read_image(tmp_path / "cut.tif")
    assert caught.value.where.endswith("cut.tif")


def test_a_large_imagej_stack_with_one_page_entry_is_read_whole_or_not_at_all(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array[0], STACK)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.tif: expected all planes, got 1 of the 5"):
        read_image(tmp_path / "cut.tif")


def looks(path):
    """What each way to look at the values of a file gives."""
    volume = open_volume(path)
    return read_image(path).array, volume.pixels[tuple(slice(0, size) for size in volume.pixels.shape)]


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"ome": True, "metadata": {"axes": "YX"}}])
def test_pixels_that_would_begin_at_the_header_are_refused(tmp_path, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK[0], **options)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["StripOffsets"].overwrite(0)
    for look in (read_image, open_volume):
        with pytest.raises(DataError, match=r"a\.tif: expected pixels behind the header, got pixels at byte 0"):
            look(path)


def test_strips_that_lie_elsewhere_than_those_of_the_first_page_are_refused(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, STACK, ome=True, metadata={"axes": "ZYX"}, rowsperstrip=6)
    np.testing.assert_array_equal(looks(path), [STACK[None]] * 2)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        first, second = tiff.pages[1].tags["StripOffsets"].value
        tiff.pages[1].tags["StripOffsets"].overwrite((second, first))
    for look in (read_image, open_volume):
        with pytest.raises(DataError, match=rf"expected strips one after the other, .*at bytes {second + 168} and {first}"):
            look(path)


def test_pixels_in_one_piece_are_those_of_their_size_whatever_the_file_says_of_their_bytes(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for plane in STACK[:2]:
            file.write(plane, metadata=None, contiguous=False)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        # Page by page, as there are tags between.
        assert tiff.series[0].dataoffset is None
        assert tiff.pages[1].is_contiguous
        tiff.pages[1].tags["StripByteCounts"].overwrite(20)
    np.testing.assert_array_equal(looks(path), [STACK[None, :2]] * 2)


def test_a_tile_of_gigabytes_for_a_small_picture_is_refused_before_it_is_made(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK[0], tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["TileLength"].overwrite(2**26)
    for look in (read_image, open_volume):
        with pytest.raises(DataError, match=r"a\.tif: expected a file of \d+ bytes to hold at most 2000 .*, got a tile of .*67108864"):
            look(path)


def test_planes_by_the_billion_in_ome_xml_are_refused_before_they_are_listed(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, STACK, ome=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path, mode="r+") as tiff:
        described = tiff.pages[0].tags["ImageDescription"]
        described.overwrite(described.value.replace(f'SizeZ="{len(STACK)}"', 'SizeZ="8589934588"'))
    for look in (probe_image, read_image, open_volume):
        with pytest.raises(DataError, match=r"a\.ome\.tif: expected at most 4194304 planes, got 8589934588 in its OME-XML"):
            look(path)


def test_planes_of_samples_that_no_strip_holds_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK[:3], photometric="rgb", planarconfig="separate", compression="zlib", rowsperstrip=4)
    np.testing.assert_array_equal(looks(path), [STACK[:3]] * 2)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["PlanarConfiguration"].overwrite(32770)
    for look in (read_image, open_volume):
        with pytest.raises(
            DataError, match=r"a\.tif: expected 9 strips a page, got a header that leads to 3 \(planar configuration 32770\)"
        ):
            look(path)


@pytest.mark.parametrize(
    ("options", "tag", "got"),
    [
        ({"rowsperstrip": 4}, "StripOffsets", "expected 3 strips a page, got 2"),
        ({"rowsperstrip": 4}, "StripByteCounts", "expected 3 strips a page, got 2"),
        ({"tile": (16, 16)}, "TileOffsets", "expected 4 tiles a page, got 3"),
    ],
)
def test_strips_and_tiles_that_are_missing_are_refused(tmp_path, options, tag, got):
    path, plane = tmp_path / "a.tif", np.tile(STACK[0], (1, 1) if "rowsperstrip" in options else (2, 2))
    tifffile.imwrite(path, plane, compression="zlib", **options)
    np.testing.assert_array_equal(looks(path), [plane[None]] * 2)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        one = tiff.pages[0].tags[tag]
        one.overwrite(one.value[:-1])
    for look in (read_image, open_volume):
        with pytest.raises(DataError, match=rf"a\.tif: {got}"):
            look(path)


def test_pages_that_form_a_circle_are_an_error(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], metadata=None)
    whole = bytearray((tmp_path / "a.tif").read_bytes())
    first = int.from_bytes(whole[4:8], "little")
    after = first + 2 + 12 * int.from_bytes(whole[first : first + 2], "little")
    whole[after : after + 4] = first.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.tif: expected pages in a row"):
        read_image(tmp_path / "a.tif")


OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="i">'
    '<Pixels ID="p" DimensionOrder="XYZCT" Type="uint8" SizeX="8" SizeY="8" SizeZ="2" SizeC="1" SizeT="1">'
    '<TiffData IFD="0" FirstZ="0" PlaneCount="1"><UUID FileName="{}">urn:uuid:1</UUID></TiffData>'
    '<TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID FileName="{}">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
)


def pair(folder, second, own="a.ome.tif"):
    """An OME-TIFF of zeros whose second section is in another file."""
    folder.mkdir(exist_ok=True)
    tifffile.imwrite(folder / "a.ome.tif", np.zeros((8, 8), np.uint8), description=OME.format(own, second), metadata=None)
    return folder / "a.ome.tif"


@pytest.mark.parametrize("second", ["../x.tif", "{}/x.tif", "link.tif", "linked/x.tif", "../in/../x.tif"])
def test_planes_outside_of_the_folder_are_refused_before_their_file_is_opened(tmp_path, monkeypatch, second):
    tifffile.imwrite(tmp_path / "x.tif", np.full((8, 8), 7, np.uint8))
    path = pair(tmp_path / "in", second.format(tmp_path))
    (tmp_path / "in" / "link.tif").symlink_to(tmp_path / "x.tif")
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    opened = []

    def noting(self, file, *arguments, _original=tifffile.TiffFile.__init__, **options):
        opened.append(str(file))
        _original(self, file, *arguments, **options)

    monkeypatch.setattr(tifffile.TiffFile, "__init__", noting)
    for read in (probe_image, open_volume, read_image):
        with pytest.raises(DataError, match=r"a\.ome\.tif: expected planes in files of its folder, got '.*(x|link)\.tif'") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert set(opened) == {str(path)}


@pytest.mark.parametrize("own", ["a.ome.tif", "/where/it/was/written/a.ome.tif"])
def test_planes_in_a_file_of_the_folder_are_read(tmp_path, own):
    tifffile.imwrite(tmp_path / "b.tif", np.full((8, 8), 7, np.uint8))
    assert read_image(pair(tmp_path, "b.tif", own)).array[0, :, 0, 0].tolist() == [0, 7]


def test_a_tiff_bomb_is_refused_before_memory_is_taken(tmp_path):
    tifffile.imwrite(tmp_path / "bomb.tif", np.zeros((64, 64), np.uint8), compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(50_000)
        tiff.pages[0].tags["ImageLength"].overwrite(50_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.tif.*max_expansion.*50000×50000"):
        read_image(tmp_path / "bomb.tif")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    with pytest.raises(DataError, match="max_voxels"):
        read_image(tmp_path / "bomb.tif", limits=Limits(max_voxels=10**9))


def test_complex_values_and_wide_integers_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4), np.complex64))
    with pytest.raises(DataError, match=r"a\.tif.*complex64"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"b\.tif.*int64"):
        write_image(tmp_path / "b.tif", image_of(np.zeros((1, 4, 4), np.int64), (1.0, 1.0)))


@pytest.mark.parametrize(("dtype", "stored"), [(np.float16, "float32"), (np.bool_, "uint8")])
def test_types_that_tiff_lacks_are_widened(tmp_path, dtype, stored):
    write_image(tmp_path / "a.tif", image_of(np.ones((1, 4, 4), dtype), (1.0, 1.0)))
    assert read_image(tmp_path / "a.tif").array.dtype == stored


def test_colour_labels_of_a_stack_are_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    image = read_image(tmp_path / "a.tif")
    colours = RNG.integers(0, 256, (3, 5, 12, 14)).astype(np.uint8)
    write_labels(tmp_path / "b.tif", colours, image)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").array, colours)
    with tifffile.TiffFile(tmp_path / "b.tif") as tiff:
        assert (tiff.series[0].axes, tiff.pages[0].photometric.name) == ("ZYXS", "RGB")


def test_imagej_opens_what_is_written_as_a_calibrated_stack(tmp_path):
    write_image(tmp_path / "a.tif", image_of(STACK[None], (2 * UM, 0.5 * UM, 0.25 * UM)))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        metadata, page = tiff.imagej_metadata, tiff.pages[0]
        assert (metadata["slices"], metadata["unit"], metadata["spacing"]) == (5, "micron", 2.0)
        assert page.resolution == (4, 2)


def test_the_real_stacks_are_read_and_their_labels_come_back(data_folder, tmp_path):
    isbi, stardist = data_folder("isbi2012"), data_folder("stardist")
    for path, shape, dtype in (
        (isbi / "train-volume.tif", (25, 512, 512), "uint8"),
        (isbi / "train-labels.tif", (25, 512, 512), "uint8"),
        (stardist / "img3d.tif", (31, 61, 57), "uint16"),
        (stardist / "mask2d.tif", (512, 512), "uint16"),
    ):
        image, header = read_image(path), probe_image(path)
        assert (image.shape_vox, image.channels, image.array.dtype.name) == (shape, 1, dtype)
        assert (header.shape_vox, header.channels, header.dtype) == (shape, 1, dtype)
        assert not image.spacing_known
        np.testing.assert_array_equal(image.array[0], tifffile.imread(path))
    write_labels(tmp_path / "b.tif", image.array[0].astype(np.int32), image)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").array, image.array)
    assert label_suffix(image) == ".tif"


def test_a_stack_of_one_section_is_read_back_as_a_picture(tmp_path):
    image = image_of(STACK[None, :1], (3.0, 1.0, 1.0))
    write_image(tmp_path / "a.tif", image)
    assert read_image(tmp_path / "a.tif").array.shape == (1, 12, 14)
    write_image(tmp_path / "b.tif", dataclasses.replace(image, spacing_known=False))
    assert read_image(tmp_path / "b.tif").axes == "CYX"
