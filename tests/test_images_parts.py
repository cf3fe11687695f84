"""TIFF, NIfTI and NPY by part: any part of a volume is that part of the whole image, and only what it touches is decoded."""

import gzip
import itertools
import os
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError, DataWarning
from microtome.images.files import open_volume, read_image
from microtome.images.image import Limits
from microtome.images.parts import Lazy, bounds
from microtome.images.tiff_parts import open_tiff

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 70, 90)).astype(np.uint8)
STACK = RNG.integers(0, 60_000, (5, 70, 90)).astype(np.uint16)
COLOURS = RNG.integers(0, 256, (5, 70, 90, 3)).astype(np.uint8)
FOUR = RNG.integers(0, 60_000, (2, 5, 70, 90)).astype(np.uint16)

GREYS = {"photometric": "minisblack"}
RGB = {"photometric": "rgb"}
TILED = {"tile": (32, 48)}
# What is written and how; then whether it is mapped, decoded by pages, or decoded as a whole.
TIFFS = {
    "plain": (STACK, GREYS, "Mapped"),
    "without metadata": (STACK, GREYS | {"metadata": None}, "Mapped"),
    "big-endian": (STACK, GREYS | {"byteorder": ">"}, "Mapped"),
    "picture": (STACK[0], GREYS, "Mapped"),
    "strips": (STACK[0], GREYS | {"compression": "zlib", "rowsperstrip": 11}, "_Pages"),
    "lzw": (STACK, GREYS | {"compression": "lzw", "rowsperstrip": 16, "byteorder": ">"}, "_Pages"),
    "predictor": (STACK, GREYS | {"compression": "zlib", "predictor": True, "rowsperstrip": 16}, "_Pages"),
    "zstd floats": (STACK.astype("f4"), GREYS | {"compression": "zstd", "predictor": 3}, "_Pages"),
    "tiles": (STACK, GREYS | TILED, "_Pages"),
    "packed tiles": (STACK, GREYS | TILED | {"compression": "zlib"}, "_Pages"),
    "bigtiff": (STACK, GREYS | TILED | {"bigtiff": True, "compression": "zlib"}, "_Pages"),
    "jpeg": (GREY, GREYS | TILED | {"compression": "jpeg"}, "_Pages"),
    "jpeg colours": (COLOURS, RGB | TILED | {"compression": "jpeg"}, "_Pages"),
    "jpeg strips": (COLOURS[0], RGB | {"compression": "jpeg", "rowsperstrip": 16}, "_Pages"),
    "webp": (COLOURS, RGB | TILED | {"compression": "webp"}, "_Pages"),
    "colours": (COLOURS[0], RGB, "Mapped"),
    "colour stack": (COLOURS, RGB | {"compression": "zlib"}, "_Pages"),
    "colour planes": (COLOURS[0].transpose(2, 0, 1), RGB | TILED | {"planarconfig": "separate", "compression": "zlib"}, "_Pages"),
    "alpha": (
        RNG.integers(0, 256, (70, 90, 4)).astype("u1"),
        RGB | TILED | {"extrasamples": ["unassalpha"], "compression": "zlib"},
        "_Pages",
    ),
    "mapped alpha": (RNG.integers(0, 256, (70, 90, 4)).astype("u1"), RGB | {"extrasamples": ["unassalpha"]}, "Mapped"),
    "imagej": (STACK, {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um", "spacing": 2.0}, "resolution": (2, 2)}, "Mapped"),
    "imagej hyperstack": (FOUR.swapaxes(0, 1), {"imagej": True, "metadata": {"axes": "ZCYX"}, "compression": "zlib"}, "_Pages"),
    "imagej one entry": (STACK, {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX"}}, "Mapped"),
    "imagej one time": (STACK[None, :, None], {"imagej": True, "metadata": {"axes": "TZCYX"}, "compression": "zlib"}, "_Pages"),
    "ome": (FOUR, GREYS | TILED | {"ome": True, "metadata": {"axes": "CZYX"}, "compression": "zlib"}, "_Pages"),
    "ome sections first": (FOUR.swapaxes(0, 1), GREYS | {"ome": True, "metadata": {"axes": "ZCYX"}}, "Mapped"),
    "ome colours": (COLOURS, RGB | {"ome": True, "metadata": {"axes": "ZYXS"}, "compression": "zlib"}, "_Pages"),
    "aperio": (COLOURS[0], RGB | TILED | {"compression": "jpeg", "description": "Aperio Image Library v1", "metadata": None}, "_Pages"),
    "bits": (GREY[0] > 99, {}, "Lazy"),
    "palette": (GREY[0], {"photometric": "palette", "colormap": RNG.integers(0, 65536, (3, 256)).astype("u2")}, "Lazy"),
    "cmyk": (RNG.integers(0, 256, (70, 90, 4)).astype("u1"), {"photometric": "separated"}, "Lazy"),
    "tiles of voxels": (STACK, GREYS | {"tile": (16, 32, 48), "volumetric": True, "compression": "zlib"}, "Lazy"),
}


def parts_of(shape, count=12, seed=0):
    """Random boxes of a shape, and the whole."""
    rng = np.random.default_rng(seed)
    ends = (np.sort(rng.integers(0, size + 1, (count, 2)), axis=1) for size in shape)
    boxes = [tuple(slice(int(a), int(b)) for a, b in box) for box in zip(*ends, strict=True)]
    return [*boxes, (slice(None),) * len(shape), (slice(-3, None),) * len(shape)]


def assert_parts_equal(volume, image):
    """Header, geometry and any part are those of the whole image."""
    assert (volume.pixels.shape, volume.pixels.dtype) == (image.array.shape, image.array.dtype)
    assert (volume.spacing_mm, volume.spacing_known, volume.axes) == (image.spacing_mm, image.spacing_known, image.axes)
    assert (volume.format, volume.path) == (image.format, image.path)
    assert len(volume.chunk_vox) == len(volume.shape_vox)
    assert volume.extra.keys() == image.extra.keys()
    np.testing.assert_array_equal(volume.affine, image.affine)
    for part in parts_of(image.array.shape):
        found = volume.pixels[part]
        assert found.dtype == image.array.dtype
        np.testing.assert_array_equal(found, image.array[part])
    whole = volume.load()
    np.testing.assert_array_equal(whole.array, image.array)
    assert whole.array.flags.writeable


@pytest.mark.parametrize("kind", TIFFS)
def test_any_part_of_a_tiff_is_that_part_of_the_whole(tmp_path, kind):
    array, options, how = TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    volume = open_volume(tmp_path / "a.tif")
    assert type(volume.pixels).__name__ == how
    assert_parts_equal(volume, read_image(tmp_path / "a.tif"))


@st.composite
def layouts(draw):
    """Any array and way to store it of those that TIFF's writer knows."""
    axes = draw(st.sampled_from(["YX", "ZYX", "CYX", "ZCYX", "CZYX", "YXS", "ZYXS"]))
    sizes = {"C": 2, "S": 3, "Z": draw(st.integers(1, 4)), "Y": draw(st.integers(1, 50)), "X": draw(st.integers(1, 50))}
    dtype = draw(st.sampled_from(["u1", "i2", "u4", "f4", "f8"]))
    array = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 99, [sizes[axis] for axis in axes]).astype(dtype)
    options = {"compression": draw(st.sampled_from([None, "zlib", "lzw", "packbits"])), "byteorder": draw(st.sampled_from("<>"))}
    if draw(st.booleans()):
        options["tile"] = draw(st.sampled_from([(16, 16), (32, 16), (64, 64)]))
    else:
        options["rowsperstrip"] = draw(st.integers(1, 60))
    options["bigtiff"] = draw(st.booleans())
    return array, options | {"photometric": "rgb" if "S" in axes else "minisblack", "metadata": {"axes": axes}, "ome": True}


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_any_part_of_any_layout_of_tiff_is_that_part_of_the_whole(tmp_path_factory, layout):
    array, options = layout
    path = tmp_path_factory.mktemp("t") / "a.tif"
    tifffile.imwrite(path, array, **options)
    assert_parts_equal(open_volume(path), read_image(path))


def test_a_picture_of_bits_written_by_another_library_is_read(tmp_path):
    PIL.Image.fromarray(GREY[0] > 99).save(tmp_path / "a.tif", compression="group4")
    assert_parts_equal(open_volume(tmp_path / "a.tif"), read_image(tmp_path / "a.tif"))


def test_tiles_that_were_never_written_are_zero(tmp_path):
    tiles = (None if number % 2 else GREY[0, :32, :48] for number in range(6))
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=(70, 90), dtype=np.uint8, tile=(32, 48), compression="zlib", photometric="minisblack")
    volume = open_volume(tmp_path / "a.tif")
    assert volume.chunk_vox == (32, 48)
    assert_parts_equal(volume, read_image(tmp_path / "a.tif"))


def test_what_is_assumed_of_a_tiff_is_said_once_when_it_is_opened(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY[0] > 99, extratags=[(274, "H", 1, 6, True)])
    with pytest.warns(DataWarning, match=r"a\.tif: its orientation tag 6 is not applied") as caught:
        volume = open_volume(tmp_path / "a.tif")
    assert len(caught) == 1
    assert volume.pixels[:, :3, :3].shape == (1, 3, 3)


@pytest.mark.parametrize("options", [{}, TILED, {"compression": "zlib"}, {"compression": "jpeg"}, {"imagej": True}, {"ome": True}])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_stack_that_was_cut_off_is_an_error_when_it_is_opened(tmp_path, options, share):
    tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="minisblack", **options)
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: max(8, int(len(whole) * share))])
    with pytest.raises(DataError, match=r"a\.tif"):
        open_tiff(tmp_path / "a.tif", Limits())


def test_a_file_that_is_cut_after_it_was_opened_is_an_error(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", compression="zlib")
    volume = open_volume(tmp_path / "a.tif")
    os.truncate(tmp_path / "a.tif", 5000)
    with pytest.raises(DataError, match=r"a\.tif: expected \d+ bytes, got 5000: it was cut off"):
        volume.load()


def test_damaged_tiles_are_an_error_that_names_the_file(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], photometric="minisblack", compression="zlib")
    volume = open_volume(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    offset = volume.pixels._pages[0].dataoffsets[0]
    content[offset : offset + 8] = b"\xff" * 8
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tif: expected a whole TIFF file, got damaged data"):
        open_volume(tmp_path / "a.tif").load()


def test_many_threads_read_one_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", tile=(16, 16), compression="zlib")
    volume = open_volume(tmp_path / "a.tif")
    parts = parts_of((1, *STACK.shape), 60)
    with ThreadPoolExecutor(8) as threads:
        for part, found in zip(parts, threads.map(volume.pixels.__getitem__, parts), strict=True):
            np.testing.assert_array_equal(found, STACK[None][part])


@pytest.mark.parametrize("options", [{}, {"tile": (64, 64), "compression": "zlib"}])
def test_a_part_of_a_tiff_takes_the_memory_of_that_part(tmp_path, options):
    array = np.zeros((1, 64, 1024, 1024), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array[0], photometric="minisblack", **options)
    volume = open_volume(tmp_path / "a.tif", limits=Limits(max_voxels=10**6))
    volume.pixels[:, :1, :1, :1]
    tracemalloc.start()
    assert volume.pixels[:, 60:, 100:200, 100:200].shape == (1, 4, 100, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_limits_hold_for_sides_always_and_for_voxels_where_all_are_decoded(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", GREY[0] > 99)
    assert open_volume(tmp_path / "a.tif", limits=Limits(max_voxels=9)).shape_vox == STACK.shape
    for name, limits in (("a.tif", Limits(max_side=60)), ("b.tif", Limits(max_voxels=9))):
        with pytest.raises(DataError, match=rf"{name}: expected at most"):
            open_volume(tmp_path / name, limits=limits)
    with pytest.raises(DataError, match=r"a\.tif: expected at most 9 values"):
        read_image(tmp_path / "a.tif", limits=Limits(max_voxels=9))


NIFTIS = list(
    itertools.product(["u1", ">i2", "f4", "f8", "i8"], [(4, 5, 6), (7, 8), (3, 4, 5, 2)], [(1.0, 0.0), (2.5, -7.0)], [".nii", ".nii.gz"])
)


@pytest.mark.parametrize(("dtype", "shape", "scale", "suffix"), NIFTIS)
def test_any_part_of_a_nifti_is_that_part_of_the_whole(tmp_path, dtype, shape, scale, suffix):
    path = tmp_path / f"a{suffix}"
    nifti = nib.Nifti1Image(RNG.integers(0, 99, shape).astype(dtype), np.diag([2.0, 3, 4, 1]), dtype=np.dtype(dtype))
    if dtype.startswith(">"):
        nifti = nib.Nifti1Image(np.asarray(nifti.dataobj), nifti.affine, nifti.header.as_byteswapped(">"))
    nifti.header.set_slope_inter(*scale)
    nifti.to_filename(path)
    volume = open_volume(path)
    assert type(volume.pixels).__name__ == ("Mapped" if suffix == ".nii" else "Lazy")
    assert_parts_equal(volume, read_image(path))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_colours_of_a_nifti_are_channels_of_the_volume(tmp_path, suffix):
    colours = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = 7
    nib.Nifti1Image(colours, np.eye(4)).to_filename(tmp_path / f"a{suffix}")
    volume = open_volume(tmp_path / f"a{suffix}")
    assert volume.channels == 3
    assert_parts_equal(volume, read_image(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_that_was_cut_off_is_an_error(tmp_path, suffix):
    nib.Nifti1Image(GREY, np.eye(4)).to_filename(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(DataError, match=r"a\.nii"):
        open_volume(tmp_path / f"a{suffix}").load()


def test_the_limits_of_a_packed_nifti_are_those_of_the_whole(tmp_path):
    nib.Nifti1Image(GREY, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii").write_bytes(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    with pytest.raises(DataError, match=r"a\.nii\.gz: expected at most 9 values"):
        open_volume(tmp_path / "a.nii.gz", limits=Limits(max_voxels=9))
    assert open_volume(tmp_path / "b.nii", limits=Limits(max_voxels=9)).shape_vox == GREY.shape[::-1]


def test_a_warning_of_a_nifti_comes_once(tmp_path):
    nifti = nib.Nifti1Image(GREY, None)
    nifti.header["pixdim"][1:4] = (0, 1, 1)
    nifti.to_filename(tmp_path / "a.nii.gz")
    content = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    content[80:84] = bytes(4)
    content[252:256] = bytes(4)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content, mtime=0))
    with pytest.warns(DataWarning, match=r"a\.nii\.gz: voxel size 0 along X") as caught:
        volume = open_volume(tmp_path / "a.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volume.load()
    assert len(caught) == 1


def test_what_is_decoded_as_a_whole_is_decoded_once_by_many_threads():
    started, calls = threading.Barrier(8), []

    def decode():
        calls.append(1)
        return GREY[None]

    pixels = Lazy((1, *GREY.shape), GREY.dtype, decode)

    def read(z):
        started.wait()
        return pixels[:, z % 5 : z % 5 + 1, :, :].sum()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == [GREY[z % 5].sum() for z in range(8)]
    assert calls == [1]


def test_a_decoder_that_fails_is_asked_again():
    answers = [DataError("a", expected="b", got="c", do="d"), GREY[None]]

    def decode():
        answer = answers.pop(0)
        if isinstance(answer, DataError):
            raise answer
        return answer

    pixels = Lazy((1, *GREY.shape), GREY.dtype, decode)
    with pytest.raises(DataError):
        pixels[:, :1, :1, :1]
    assert pixels[:, :1, :1, :1].item() == GREY[0, 0, 0]


@given(st.integers(1, 9), st.none() | st.integers(-12, 12), st.none() | st.integers(-12, 12))
def test_bounds_of_a_part_are_those_of_a_slice(size, low, high):
    ((first, past),) = bounds((slice(low, high),), (size,))
    assert list(range(size))[low:high] == list(range(first, past))


@pytest.mark.parametrize("part", [3, (slice(0, 2), 1), (slice(0, 4, 2), slice(None)), (slice(None),), ...])
def test_a_part_that_is_no_box_is_refused(part):
    with pytest.raises(IndexError, match="expected 2 slices of step 1"):
        bounds(part, (5, 5))
