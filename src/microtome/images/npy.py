"""NumPy's own file of one array <-> Volume, Image: mapped into memory, whatever its size."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import DataError
from microtome.files import atomic_path
from microtome.geometry import Shape, affine_from_spacing
from microtome.images.image import Header, Image, Limits, decoding, native
from microtome.images.parts import Mapped, limits_of_parts, mapped
from microtome.images.volume import Volume

_MOST_HEADER_BYTES = 2**16
_MOST_AXES = 4
_MOST_SAMPLES = 4


def open_npy(path: Path, limits: Limits) -> Volume:
    """An array of the axes (Y, X), (Z, Y, X) or (C, Z, Y, X), in either order of memory. Its spacing is not known.

    An axis that is the last, of 4 or less, and the only one so short is C: (Y, X, C), (Z, Y, X, C).
    Truth values become 0 and 1, numbers of more than 64 bits float64.

    Raises:
        DataError: damaged, cut off, no plain numbers, other axes, or beyond `limits`.
    """
    with decoding(path, "NPY"):
        array = _mapped(path)
    dtype = image_type(path, array.dtype)
    channels_last = samples_last(array.shape)
    array_CS = np.moveaxis(array, -1, 0) if channels_last else array if array.ndim == _MOST_AXES else array[None]
    spacing = (1.0,) * (array_CS.ndim - 1)
    header = Header(
        shape_vox=array_CS.shape[1:],
        channels=len(array_CS),
        dtype=dtype.name,
        spacing_mm=spacing,
        spacing_known=False,
        format="npy",
    )
    limits_of_parts(limits).check(path, header)
    # A plane along the axis that changes slowest in the file is read at once.
    slowest_last = array.flags.f_contiguous and not array.flags.c_contiguous
    shape = array_CS.shape[1:]
    return Volume(
        pixels=Mapped(array_CS, lambda part: native(part.astype(dtype, copy=False)), dtype),
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes="CZYX" if array_CS.ndim == _MOST_AXES else "CYX",
        path=path,
        format="npy",
        chunk_vox=(*shape[:-1], 1) if slowest_last else (1, *shape[1:]),
        spacing_known=False,
    )


def write_npy(path: Path, image: Image) -> None:
    """Write the values of an image, in one step; one channel has no axis of its own.

    Up to 4 channels of a picture come last, as `open_npy` reads them. The file has no place for anything else: spacing is lost,
    and more channels of a picture are read back as sections.
    """
    array = image.array[0] if image.channels == 1 else image.array
    last = np.moveaxis(image.array, 0, -1)
    if last.ndim == _MOST_AXES - 1 and image.channels > 1 and samples_last(last.shape):
        array = np.ascontiguousarray(last)
    with atomic_path(path) as part, part.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _mapped(path: Path) -> np.ndarray:
    """The array where it lies in the file. NumPy's own way to map one counts bytes in 64 bits, where claims may overflow."""
    with path.open("rb") as start:
        # Of the header's length that the file claims, NumPy would take the memory before it reads.
        file = io.BytesIO(start.read(_MOST_HEADER_BYTES))
        version = np.lib.format.read_magic(file)
        # Version 3 differs from 2 in names of fields alone, which are refused.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        offset = file.tell()
    image_type(path, dtype)
    if not 2 <= len(shape) <= _MOST_AXES or min(shape) < 1:
        got = f"an array of {len(shape)} axes {shape}"
        raise DataError(path, expected="the axes YX, ZYX or CZYX", got=got, do="save one image a file", code="D009")
    array = mapped(path, dtype, offset, shape[::-1] if fortran_order else shape)
    return array.T if fortran_order else array


def samples_last(shape: Shape) -> bool:
    """Whether the last axis of an array without names is one of channels: the only one of 4 or less, behind two others at least."""
    return len(shape) > 2 and shape[-1] <= _MOST_SAMPLES < min(shape[:-1])


def image_type(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of `Image.array` for an array of plain numbers.

    Raises:
        DataError: records, objects, texts, times or complex numbers.
    """
    if dtype.kind not in "biuf" or dtype.names is not None:
        raise DataError(path, expected="real numbers", got=f"{dtype} values", do="save a plain array of integers or floats", code="D008")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float64) if dtype.itemsize > 8 else dtype.newbyteorder("=")
