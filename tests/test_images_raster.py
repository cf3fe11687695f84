"""PNG, JPEG, BMP and GIF against Pillow, and PNG's 16 bits against themselves."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from microtome.errors import DataError, DataWarning
from microtome.geometry import affine_from_spacing
from microtome.images.files import label_suffix, probe_image, read_image, write_image, write_labels
from microtome.images.image import Image, Limits

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)


def picture_of(array):
    """An image (C, Y, X) as a reader without a scale gives it."""
    return Image(
        array=array,
        spacing_mm=(1.0, 1.0),
        affine=affine_from_spacing((1.0, 1.0)),
        axes="CYX",
        path=Path("a.png"),
        format="png",
        spacing_known=False,
    )


def saved(pil, path, **options):
    pil.save(path, **options)
    return path


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9))))
def test_a_png_gives_back_every_value(tmp_path_factory, array):
    path = tmp_path_factory.mktemp("p") / "a.png"
    write_image(path, picture_of(array))
    again, header = read_image(path), probe_image(path)
    np.testing.assert_array_equal(again.array, array)
    assert again.array.dtype == array.dtype
    assert (again.format, again.spacing_known, again.spacing_mm) == ("png", False, (1.0, 1.0))
    assert (header.shape_vox, header.channels, header.dtype) == (again.shape_vox, again.channels, again.array.dtype.name)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_as_pillow_does(tmp_path, orientation, suffix):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = saved(PIL.Image.fromarray(COLOURS), tmp_path / f"a{suffix}", exif=exif)
    with PIL.Image.open(path) as pil:
        expected = np.asarray(PIL.ImageOps.exif_transpose(pil))
    image = read_image(path)
    np.testing.assert_array_equal(image.array, expected.transpose(2, 0, 1))
    assert probe_image(path).shape_vox == image.shape_vox == ((20, 30) if orientation < 5 else (30, 20))


def test_an_orientation_that_stands_behind_the_pixels_is_foretold_by_the_probe(tmp_path):
    whole = imagecodecs.png_encode(COLOURS)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path = tmp_path / "a.png"
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    assert probe_image(path).shape_vox == (30, 20)
    np.testing.assert_array_equal(read_image(path).array, np.rot90(COLOURS, -1).transpose(2, 0, 1))


def test_damaged_exif_is_a_warning_and_the_picture_upright(tmp_path):
    path = saved(PIL.Image.fromarray(COLOURS), tmp_path / "a.png", exif=b"Exif\0\0not a TIFF header")
    with pytest.warns(DataWarning, match=r"a\.png: its EXIF data are damaged"):
        assert read_image(path).shape_vox == (20, 30)


def test_an_orientation_outside_one_to_eight_changes_nothing(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 0
    path = saved(PIL.Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(path).array, COLOURS.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "channels", "dtype"),
    [
        ("L", 1, "uint8"),
        ("LA", 1, "uint8"),
        ("RGB", 3, "uint8"),
        ("RGBA", 3, "uint8"),
        ("I;16", 1, "uint16"),
        ("1", 1, "uint8"),
        ("P", 3, "uint8"),
    ],
)
def test_each_mode_of_png_gives_its_colour_channels_without_alpha(tmp_path, mode, channels, dtype):
    pil = PIL.Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else PIL.Image.fromarray(COLOURS).convert(mode)
    image, header = read_image(saved(pil, tmp_path / "a.png")), probe_image(tmp_path / "a.png")
    assert (image.channels, image.array.dtype.name) == (channels, dtype)
    assert (header.channels, header.dtype, header.shape_vox) == (channels, dtype, (20, 30))
    with PIL.Image.open(tmp_path / "a.png") as again:
        plain = np.asarray(again.convert("RGB") if mode in ("P", "RGBA") else again.convert("L") if mode == "LA" else again)
    np.testing.assert_array_equal(image.array, plain.reshape(20, 30, -1).transpose(2, 0, 1))
    assert image.array.flags.writeable


def test_one_bit_gives_zero_and_one(tmp_path):
    bits = np.array([[True, False, True]])
    image = read_image(saved(PIL.Image.fromarray(bits), tmp_path / "a.png"), palette="indices")
    assert image.array.tolist() == [[[1, 0, 1]]]


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_sixteen_bits_of_several_channels_are_exact(tmp_path, samples):
    pixels = RNG.integers(0, 2**16, (7, 5, samples)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    image, header = read_image(tmp_path / "a.png"), probe_image(tmp_path / "a.png")
    colours = {2: 1, 3: 3, 4: 3}[samples]
    np.testing.assert_array_equal(image.array, pixels[..., :colours].transpose(2, 0, 1))
    assert (header.channels, header.dtype) == (colours, "uint16")


@pytest.mark.parametrize("suffix", [".png", ".gif", ".bmp"])
def test_a_palette_gives_colours_or_indices_and_is_kept(tmp_path, suffix):
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    pil = PIL.Image.fromarray(indices).convert("P")
    pil.putpalette([0, 0, 0, 255, 0, 0, 0, 9, 200])
    path = saved(pil, tmp_path / f"a{suffix}")
    colours, raw = read_image(path), read_image(path, palette="indices")
    np.testing.assert_array_equal(raw.array[0], indices)
    assert colours.array[:, 0].T.tolist() == [[0, 0, 0], [255, 0, 0], [0, 9, 200]]
    assert raw.extra["palette"][:3].tolist() == [[0, 0, 0], [255, 0, 0], [0, 9, 200]]
    assert probe_image(path).channels == 3


def test_a_transparent_palette_colour_is_still_its_colour(tmp_path):
    pil = PIL.Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    pil.putpalette([7, 8, 9, 1, 2, 3])
    path = saved(pil, tmp_path / "a.png", transparency=bytes([0, 128]))
    assert read_image(path).array[:, 0].T.tolist() == [[7, 8, 9], [1, 2, 3]]


def test_an_index_beyond_the_palette_is_black(tmp_path):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header) + chunk(b"PLTE", bytes([5, 6, 7])) + chunk(b"IDAT", zlib.compress(bytes([0, 0, 9]))) + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert read_image(tmp_path / "a.png").array[:, 0].T.tolist() == [[5, 6, 7], [0, 0, 0]]


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    path = saved(PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    image = read_image(path)
    assert probe_image(path).channels == image.channels == 3
    red = image.array.reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(red, [255, 0, 0], atol=3)


def test_only_the_first_picture_of_a_gif_is_read_and_said_so(tmp_path):
    first, second = PIL.Image.new("L", (4, 3), 10), PIL.Image.new("L", (4, 3), 200)
    path = saved(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    with pytest.warns(DataWarning, match=r"a\.gif: holds more than one picture"):
        image = read_image(path)
    assert np.unique(image.array).tolist() == [10]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif"])
def test_a_picture_that_was_cut_off_is_an_error_with_its_name(tmp_path, suffix, share):
    whole = io.BytesIO()
    PIL.Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(whole, {".jpg": "JPEG"}.get(suffix, suffix[1:].upper()))
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    with pytest.raises(DataError, match=rf"cut\{suffix}.*damaged data") as caught:
        read_image(path)
    assert caught.value.where == str(path)


def test_a_sixteen_bit_colour_png_that_was_cut_off_is_an_error(tmp_path):
    whole = imagecodecs.png_encode(RNG.integers(0, 2**16, (40, 40, 3)).astype(np.uint16))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png"):
        read_image(tmp_path / "cut.png")


def png_claiming(path, width, height):
    """A small PNG whose header claims another size."""
    whole = bytearray(imagecodecs.png_encode(np.zeros((4, 4), np.uint8)))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(("side", "limit"), [(60_000, "max_expansion"), (100_000, "max_voxels")])
def test_a_png_bomb_is_refused_before_memory_is_taken(tmp_path, side, limit):
    path = png_claiming(tmp_path / "bomb.png", side, side)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"bomb\.png.*{limit}.*{side}×{side}"):
        read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("name", [b"IDAT", b"eXIf"])
def test_a_chunk_that_claims_four_gigabytes_has_no_more_read_than_the_file_holds(tmp_path, name):
    whole = imagecodecs.png_encode(COLOURS)
    # The pixels themselves, or what stands behind them.
    at = whole.index(b"IDAT") - 4 if name == b"IDAT" else len(whole) - 12
    (tmp_path / "a.png").write_bytes(whole[:at] + struct.pack(">I", 2**32 - 16) + name + whole[at + 8 :])
    tracemalloc.start()
    if name == b"IDAT":
        # Its pixels are all there.
        np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, COLOURS.transpose(2, 0, 1))
    else:
        warned = pytest.warns(DataWarning, match=r"a\.png: its EXIF data are damaged")
        with warned, pytest.raises(DataError, match=r"a\.png: expected a whole PNG file"):
            read_image(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_picture_that_pillow_calls_a_bomb_is_read_within_our_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(COLOURS))
    with pytest.raises(PIL.Image.DecompressionBombError):
        PIL.Image.open(path)
    np.testing.assert_array_equal(read_image(path).array, COLOURS.transpose(2, 0, 1))
    with pytest.raises(DataError, match="max_voxels"):
        read_image(path, limits=Limits(max_voxels=100))
    assert PIL.Image.MAX_IMAGE_PIXELS == 100


def test_probing_decodes_no_pixels(tmp_path):
    # The pixel data of this file are damaged, which only decoding them can find.
    whole = bytearray(imagecodecs.png_encode(RNG.integers(0, 256, (50, 50)).astype(np.uint8)))
    whole[100:200] = bytes(100)
    (tmp_path / "a.png").write_bytes(whole)
    assert probe_image(tmp_path / "a.png").shape_vox == (50, 50)
    with pytest.raises(DataError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".gif", ".png"])
def test_labels_of_a_picture_are_a_png_of_the_smallest_type(tmp_path, suffix):
    image = read_image(saved(PIL.Image.fromarray(COLOURS).convert("L"), tmp_path / f"a{suffix}"))
    assert label_suffix(image) == ".png"
    for high, dtype in ((255, "uint8"), (256, "uint16")):
        labels = np.zeros((20, 30), np.int64)
        labels[3, 4] = high
        write_labels(tmp_path / "b.png", labels, image)
        again = read_image(tmp_path / "b.png", palette="indices")
        assert again.array.dtype == dtype
        np.testing.assert_array_equal(again.array[0], labels)


def test_colour_labels_are_an_rgb_png(tmp_path):
    image = picture_of(np.zeros((1, 20, 30), np.uint8))
    write_labels(tmp_path / "b.png", COLOURS.transpose(2, 0, 1), image)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png").array, COLOURS.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "array",
    [np.zeros((1, 2, 2), np.float32), np.zeros((2, 2, 2), np.uint8), np.zeros((1, 2, 2, 2), np.uint8), np.full((1, 2, 2), -1, np.int16)],
)
def test_what_a_png_cannot_hold_is_an_error_that_names_a_way_out(tmp_path, array):
    with pytest.raises(DataError, match=r"a\.png.*write a \.tif"):
        write_image(tmp_path / "a.png", picture_of(array))
    assert not list(tmp_path.iterdir())
