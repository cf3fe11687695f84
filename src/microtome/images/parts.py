"""Pixels that stay in their file until a part of them is asked for: what the readers of several formats share."""

import io
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import DataError
from microtome.geometry import Shape
from microtome.images.image import Limits, native

# Of what is decoded at once, however small the part that is asked for.
MOST_CHUNK_BYTES = 2**30
# Reads of so many bytes need no look at where the file ends.
_SMALL_READ_BYTES = 2**16


def limits_of_parts(limits: Limits) -> Limits:
    """What a header may claim of an image that is never decoded as a whole: sides and channels count, the number of voxels does not."""
    return replace(limits, max_voxels=sys.maxsize, max_expansion=math.inf)


def bounds(part: Any, shape: Shape) -> tuple[tuple[int, int], ...]:
    """First and past-the-last index along each axis, of as many slices of step 1 as there are axes.

    Raises:
        IndexError: a part of another kind.
    """
    slices = part if isinstance(part, tuple) else (part,)
    if len(slices) != len(shape) or any(not isinstance(one, slice) or one.step not in (None, 1) for one in slices):
        raise IndexError(f"expected {len(shape)} slices of step 1, got {part}")
    limits = (one.indices(size)[:2] for one, size in zip(slices, shape, strict=True))
    return tuple((low, max(low, high)) for low, high in limits)


class Lazy:
    """Pixels that are decoded as a whole, once, when the first part is asked for.

    Args:
        shape: (C, *S) that decoding will give.
        dtype: and of which type.
        decode: gives the array.
    """

    def __init__(self, shape: Shape, dtype: np.dtype[Any], decode: Callable[[], np.ndarray]) -> None:
        self.shape, self.dtype = shape, dtype
        self._decode: Callable[[], np.ndarray] | None = decode
        self._array = np.empty(0, dtype)
        self._lock = threading.Lock()

    def __getitem__(self, part: Any) -> np.ndarray:
        with self._lock:
            if self._decode is not None:
                array = self._decode()
                assert (array.shape, array.dtype) == (self.shape, self.dtype), "as the header promised"
                # What decoded it may hold the file; it goes with it.
                self._array, self._decode = array, None
        found: np.ndarray = self._array[part]
        return found


class Mapped:
    """Pixels that are mapped into memory from where they lie in a file.

    Args:
        array: (C, *S), a view of a mapping, in any byte order.
        finish: what becomes of the values of a part; their type changes to this machine's byte order without it.
        dtype: of what `finish` gives.
    """

    def __init__(self, array: np.ndarray, finish: Callable[[np.ndarray], np.ndarray] | None = None, dtype: Any = None) -> None:
        self.shape: Shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype.newbyteorder("=") if dtype is None else dtype)
        self._array, self._finish = array, finish or native

    def __getitem__(self, part: Any) -> np.ndarray:
        bounds(part, self.shape)
        return self._finish(np.asarray(self._array[part]))


def mapped(path: Path, dtype: np.dtype[Any], offset: int, shape: Shape) -> np.ndarray:
    """An array that lies in a file from `offset` on, in C order, not to be written to.

    Raises:
        DataError: the file ends before the array does.
    """
    size, end = path.stat().st_size, offset + math.prod(shape) * dtype.itemsize
    if end > size:
        raise cut_off(path, end, size)
    # The whole of the file as bytes: values need not begin at a multiple of their size.
    values = np.memmap(path, np.uint8, "r")[offset:end]
    return np.ndarray(shape, dtype, values)


def cut_off(path: Path, wanted: int, size: int) -> DataError:
    """The error for a file that ends too early."""
    return DataError(path, expected=f"{wanted} bytes", got=f"{size}: it was cut off", do="copy, download or export it again", code="D002")


class BoundedFile(io.BufferedReader):
    """A file for libraries that read as many bytes as a header names: what is behind its end is neither there nor asked for.

    A read takes the memory that it asks for before it knows how much there is.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, at most `size`; fewer at the end of the file, all that are left without a number."""
        asked = -1 if size is None else size
        return super().read(asked if asked <= _SMALL_READ_BYTES else min(asked, max(0, self._size - self.tell())))


class Bytes:
    """An open file of which many threads read pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def __call__(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on.

        Raises:
            DataError: the file ends before.
        """
        pieces = []
        while count > 0 and (piece := os.pread(self._handle, count, offset)):
            pieces.append(piece)
            offset, count = offset + len(piece), count - len(piece)
        if count > 0:
            raise cut_off(self.path, offset + count, offset)
        return b"".join(pieces)
