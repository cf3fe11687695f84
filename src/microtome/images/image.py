"""What every reader returns and every writer takes: an array with its place in the world."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microtome.errors import DataError, MicrotomeError
from microtome.geometry import Shape, Spacing, format_shape

Palette = Literal["colours", "indices"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """Pixels and where they are.

    Attributes:
        array: (C, *S), S = (Y, X) or (Z, Y, X), in the file's own dtype unless the file scales it.
        spacing_mm: voxel size along each axis of S; 1 where the file does not say.
        affine: (N+1, N+1), a voxel index in the order of S -> mm (see `geometry`).
        axes: the order of `array`'s axes: "CYX" or "CZYX".
        path: the file it came from.
        format: what the file really is, whatever its suffix: "png", "jpeg", "tiff", "nifti", ...
        spacing_known: False where the spacing of 1 is an assumption.
        extra: what a writer needs to give back the same file (header, palette, kind of TIFF).
    """

    array: np.ndarray
    spacing_mm: Spacing
    affine: np.ndarray
    axes: str
    path: Path
    format: str
    spacing_known: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def shape_vox(self) -> Shape:
        """The spatial shape S."""
        return tuple(self.array.shape[1:])

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return int(self.array.shape[0])


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its image before a pixel is decoded; `read_image` gives exactly this.

    Attributes:
        shape_vox: the spatial shape S.
        channels: the number of channels C.
        dtype: numpy's name of the array's type, such as "uint8".
        spacing_mm: voxel size along each axis of S; 1 where the file does not say.
        spacing_known: False where the spacing of 1 is an assumption.
        format: what the file really is, whatever its suffix.
        affine: as in `Image`; None of a format that has nothing but a spacing.
    """

    shape_vox: Shape
    channels: int
    dtype: str
    spacing_mm: Spacing
    spacing_known: bool
    format: str
    # Arrays have no single answer to whether they are equal; the other fields do.
    affine: np.ndarray | None = field(default=None, compare=False)

    @property
    def claimed_bytes(self) -> int:
        """The memory that the decoded image takes."""
        return math.prod(self.shape_vox) * self.channels * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a header may claim; checked before anything is allocated for the pixels.

    Attributes:
        max_voxels: values of the whole image, channels counted.
        max_side: voxels along one axis.
        max_channels: channels of one image.
        max_expansion: decoded bytes for each byte of the file. Deflate, in PNG and `.nii.gz`, ends at 1032.
        unsuspected_bytes: an image that decodes to no more than this is never an expansion bomb: an empty
            mask may well be a thousandth of a thousandth of its size.
    """

    max_voxels: int = 2**33
    max_side: int = 2**20
    max_channels: int = 4096
    max_expansion: float = 2000
    unsuspected_bytes: int = 2**29

    def check(self, path: Path, header: Header) -> None:
        """Let a header that may be believed pass.

        Raises:
            DataError: the image is empty, or beyond a limit; names the file, the claim and the limit.
        """
        values = math.prod(header.shape_vox) * header.channels
        if min(header.shape_vox) < 1 or header.channels < 1:
            self._refuse(path, "at least one voxel along each axis", header)
        if values > self.max_voxels:
            self._refuse(path, f"at most {self.max_voxels} values (max_voxels)", header)
        if max(header.shape_vox) > self.max_side:
            self._refuse(path, f"at most {self.max_side} voxels along an axis (max_side)", header)
        if header.channels > self.max_channels:
            self._refuse(path, f"at most {self.max_channels} channels (max_channels)", header)
        size = max(1, path.stat().st_size)
        if header.claimed_bytes > max(self.unsuspected_bytes, self.max_expansion * size):
            self._refuse(path, f"a file of {size} bytes to hold at most {self.max_expansion:g} times as many (max_expansion)", header)

    def _refuse(self, path: Path, expected: str, header: Header) -> None:
        got = f"a header that claims {header.channels} channels of {format_shape(header.shape_vox)} {header.dtype}"
        raise DataError(path, expected=expected, got=got, do="check that the file is whole, or read it with other Limits", code="D003")


@contextmanager
def decoding(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError that names the file.

    Raises:
        DataError: the file is damaged, or does not fit in memory.
    """
    try:
        yield
    except (MicrotomeError, Warning):
        raise
    except MemoryError:
        raise DataError(
            path, expected="an image that fits in memory", got="too little memory", do="cut it into parts", code="D004"
        ) from None
    except Exception as error:  # decoders raise nearly every built-in type on damaged bytes, and types of their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        got = f"damaged data ({reason[:200]})"
        raise DataError(path, expected=f"a whole {kind} file", got=got, do="copy or export it again, or remove it", code="D002") from error


def native(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order, contiguous and writable; no copy where they already are."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
