"""PNG, JPEG, BMP and GIF <-> Image: pictures without a scale."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO

import imagecodecs
import numpy as np
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Exif
from PIL.Image import Image as Picture
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from microtome.errors import DataError, DataWarning
from microtome.files import atomic_path
from microtome.geometry import affine_from_spacing
from microtome.images.image import Header, Image, Limits, Palette, decoding, native
from microtome.images.parts import BoundedFile

# The plugins themselves, not PIL.Image.open: it refuses by a global limit of its own, we by `Limits`.
_PLUGINS: MappingProxyType[str, type[ImageFile]] = MappingProxyType(
    {"png": PngImageFile, "jpeg": JpegImageFile, "bmp": BmpImageFile, "gif": GifImageFile}
)
_ORIENTATION_TAG = 0x0112
_PLAIN_MODES = MappingProxyType({"1": (1, "uint8"), "L": (1, "uint8"), "LA": (1, "uint8"), "I;16": (1, "uint16"), "I": (1, "int32")})
# PNGs of 16 bits and several channels, of which Pillow keeps only the upper 8 bits: its raw mode -> colour channels.
_DEEP_PNG = MappingProxyType({"LA;16B": 1, "RGB;16B": 3, "RGBA;16B": 3})
_UNSCALED = (1.0, 1.0)


def probe_raster(path: Path, kind: str) -> Header:
    """What `read_raster` will give, from the file's header. `kind` is one of png, jpeg, bmp, gif."""
    with _opened(path, kind) as (picture, file):
        return _header(picture, kind, "colours", _orientation(path, picture, file))


def read_raster(path: Path, kind: str, palette: Palette, limits: Limits) -> Image:
    """One picture: grey (1, Y, X) or colour (3, Y, X), upright as its EXIF orientation says.

    Grey of 1 bit gives 0 and 1, of 16 bits its exact values. Alpha is dropped: what it hides is still what
    was recorded. A palette gives its colours or, for label maps, the raw indices, and is kept in
    `extra["palette"]` (n, 3) uint8 either way. CMYK becomes RGB. Only the first picture of a GIF is read.

    Raises:
        DataError: damaged, or beyond `limits`.
    """
    with _opened(path, kind) as (picture, file):
        orientation = _orientation(path, picture, file)
        header = _header(picture, kind, palette, orientation)
        limits.check(path, header)
        if getattr(picture, "is_animated", False):
            warnings.warn(f"{path}: holds more than one picture; only the first is read", DataWarning, stacklevel=2)
        extra = {"palette": _palette(picture)} if picture.mode in ("P", "PA") else {}
        pixels = _deep_png(file) if _deep_channels(picture) else _pixels(picture, palette)
    pixels = pixels[..., : header.channels] if pixels.ndim == 3 else pixels[..., None]
    array = native(np.moveaxis(_upright(pixels, orientation), -1, 0))
    affine = affine_from_spacing(_UNSCALED)
    return Image(array=array, spacing_mm=_UNSCALED, affine=affine, axes="CYX", path=path, format=kind, spacing_known=False, extra=extra)


def write_png(path: Path, array: np.ndarray) -> None:
    """Write (1 or 3, Y, X) as a grey or RGB PNG of 8 or 16 bits, in one step.

    Raises:
        DataError: another number of axes or channels, or a type that PNG does not know.
    """
    if array.ndim != 3 or array.shape[0] not in (1, 3) or array.dtype not in (np.uint8, np.uint16):
        got = f"{array.dtype} of shape {array.shape}"
        raise DataError(path, expected="1 or 3 channels YX of uint8 or uint16 for a PNG", got=got, do="write a .tif instead", code="D007")
    pixels = array[0] if array.shape[0] == 1 else np.moveaxis(array, 0, -1)
    with atomic_path(path) as part:
        # A copy, because the encoder refuses the free strides that numpy leaves to axes of length 1.
        part.write_bytes(imagecodecs.png_encode(pixels.copy(order="C")))


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[ImageFile, IO[bytes]]]:
    """The picture with its header read and its pixels not, and the open file below it."""
    with decoding(path, kind.upper()), BoundedFile(path) as file, _PLUGINS[kind](file) as picture:
        yield picture, file


def _header(picture: ImageFile, kind: str, palette: Palette, orientation: int) -> Header:
    """Shape, channels and type after the conversions that reading does."""
    width, height = picture.size
    shape = (width, height) if orientation >= 5 else (height, width)
    if picture.mode in ("P", "PA"):
        channels, dtype = (1 if palette == "indices" else 3), "uint8"
    else:
        channels, dtype = _PLAIN_MODES.get(picture.mode, (3, "uint8"))
    if deep := _deep_channels(picture):
        channels, dtype = deep, "uint16"
    return Header(shape_vox=shape, channels=channels, dtype=dtype, spacing_mm=_UNSCALED, spacing_known=False, format=kind)


def _pixels(picture: ImageFile, palette: Palette) -> np.ndarray:
    """(Y, X) or (Y, X, C), alpha still among the channels."""
    picture.load()
    if picture.mode in ("P", "PA"):
        values = np.asarray(picture)
        indices = values[..., 0] if values.ndim == 3 else values
        return indices if palette == "indices" else _full(_palette(picture))[indices]
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode in _PLAIN_MODES or picture.mode in ("RGB", "RGBA", "RGBX"):
        return np.asarray(picture)
    return np.asarray(picture.convert("RGB"))


def _palette(picture: ImageFile) -> np.ndarray:
    """The palette's colours, (n, 3) uint8."""
    return np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)


def _full(palette: np.ndarray) -> np.ndarray:
    """The palette with black for the indices beyond its end, (256, 3): damaged files use them."""
    return np.vstack([palette, np.zeros((256 - len(palette), 3), np.uint8)])


def _deep_channels(picture: ImageFile) -> int:
    """Colour channels of a PNG of which Pillow would lose half the bits; 0 for every other picture."""
    # A PNG has one tile, whose argument is the way in which the file stores a pixel.
    return _DEEP_PNG.get(str(picture.tile[0].args), 0) if isinstance(picture, PngImageFile) and picture.tile else 0


def _deep_png(file: IO[bytes]) -> np.ndarray:
    """All 16 bits of a PNG, (Y, X, C) uint16."""
    file.seek(0)
    pixels: np.ndarray = imagecodecs.png_decode(file.read())
    return pixels


def _orientation(path: Path, picture: ImageFile, file: IO[bytes]) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        # Not PngImageFile's own method, which decodes all pixels to see what follows them.
        exif = Picture.getexif(picture)
        late = _late_exif(file) if isinstance(picture, PngImageFile) and not exif else b""
        if late:
            exif = Exif()
            exif.load(late)
        value = exif.get(_ORIENTATION_TAG, 1)
    except (SyntaxError, struct.error, ValueError, TypeError, LookupError, OSError):
        warnings.warn(f"{path}: its EXIF data are damaged; the picture is read as upright", DataWarning, stacklevel=2)
        return 1
    return value if value in range(1, 9) else 1


def _late_exif(file: IO[bytes]) -> bytes:
    """The eXIf chunk of a PNG, which may stand after the pixels; found without decoding them."""
    position = file.tell()
    file.seek(8)
    found = b""
    while not found and len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        if name == b"eXIf":
            found = file.read(length)
        file.seek(length + 4, 1)
    file.seek(position)
    return found


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(Y, X, C) turned as the EXIF orientation says (Exif 3.0, 4.6.5.1: which edges the first row and column are)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
