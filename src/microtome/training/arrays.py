"""Arrays on disk of which parts are read: a memory-mapped file, or a folder of compressed chunks where the disk is small.

Both give `array[part]` as NumPy does for whole numbers and slices of step 1, and both appear on disk only when complete.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import tensorstore as ts

from microtome.errors import RunError
from microtome.files import atomic_folder, atomic_path, not_written
from microtome.geometry import Shape
from microtome.tiling import blocks_of

# The two kinds of array, as the end of their names.
MAPPED, SHARDED = ".npy", ".zarr"
# A file that is mapped is one that is open, and many systems let a process open 1024 (macOS: 256).
MOST_OPEN = 128
# Types that image values may be exact in, the smallest first.
IMAGE_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.float16)
# How a chunked array is cut, by the axes of the network: sides of a chunk, which is read as a whole, sides of a shard, which
# is a file, and how many channels or sections one file holds. A shard of 16 million voxels is compressed in memory.
_CHUNKS: Mapping[int, tuple[int, int, int]] = MappingProxyType({2: (256, 2048, 4), 3: (32, 256, 1)})
# Threads that read and unpack chunks, for all arrays of a process together: the patches are made by many threads already.
_CHUNK_THREADS = 2
# Values of an array that are compressed to learn how small it gets.
_SAMPLE_VALUES = 2**24


class Scale(NamedTuple):
    """How values in a file become the network's grey values, `(clip(x, low, high) - mean) / sd`; each (C,) float32.

    The same operations in the same order as `preprocess.normalise`, so that a part comes out bit for bit as it is in the whole.
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> Self:
        """From the rows of a (4, C) table: low, high, mean, sd."""
        return cls(*np.asarray(table, np.float32))

    def apply(self, image_CS: np.ndarray) -> None:
        """Change float32 values (C, *S) in place; a channel whose sd is 0 is not divided."""
        for number, (low, high, mean, sd) in enumerate(zip(*self, strict=True)):
            channel_S = image_CS[number, ...]
            if low > -np.inf or high < np.inf:
                np.clip(channel_S, low, high, out=channel_S)
            channel_S -= mean
            if sd > 0:
                channel_S /= sd


def smallest(values: np.ndarray, types: tuple[type, ...] = IMAGE_TYPES) -> np.ndarray:
    """The same finite values (S), to the last bit, in the first of these types that is smaller and holds all of them."""
    if values.dtype == np.bool_:
        return values.view(np.uint8)
    low, high = values.min(), values.max()
    for kind in types:
        if np.dtype(kind).itemsize >= values.dtype.itemsize:
            continue
        limits = np.iinfo(kind) if np.issubdtype(kind, np.integer) else np.finfo(kind)
        if limits.min <= low and high <= limits.max and _holds(kind, values):
            return values.astype(kind)
    return values


def _holds(kind: type, values: np.ndarray) -> bool:
    """Whether values that lie within a type's limits survive it; a section at a time, as most say no in the first."""
    if np.issubdtype(values.dtype, np.integer):
        return True
    sections = values.reshape(-1, *values.shape[-2:])
    # Bytes are compared: -0.0 equals 0.0, and would come back as it.
    return all(bool(part.astype(kind).astype(part.dtype).tobytes() == part.tobytes()) for part in sections)


@dataclass(frozen=True)
class MappedArray:
    """An array in a .npy file that is mapped into memory when a part of it is read, and closed when it was long not read.

    Attributes:
        path: the file.
        shape: of the array.
        opened: maps a file, or gives the mapping that was made of it before.
    """

    path: Path
    shape: Shape
    opened: Callable[[Path], np.ndarray]

    def __getitem__(self, part: Any) -> np.ndarray:
        found: np.ndarray = self.opened(self.path)[part]
        return found


@dataclass(frozen=True)
class ShardedArray:
    """A zarr array (version 3) of compressed chunks, many to a file, of which those that a part touches are read and unpacked.

    Attributes:
        path: the folder.
        shape: of the array.
        opened: opens a folder, or gives what was opened before.
    """

    path: Path
    shape: Shape
    opened: Callable[[Path], ts.TensorStore]

    def __getitem__(self, part: Any) -> np.ndarray:
        try:
            found: np.ndarray = self.opened(self.path)[_counted(part, self.shape)].read().result()
        except ValueError as error:
            # The library has one type for all that goes wrong below it: damaged chunks, a folder that is gone.
            got = " ".join(str(error).split())[:300]
            raise RunError(
                self.path, expected="a whole stored array", got=got, do="remove this folder, then --resume", code="R006"
            ) from error
        return found


StoredArray = MappedArray | ShardedArray


class Arrays:
    """Opens stored arrays, the last ones read staying open; holds the threads that unpack chunks."""

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        context = _context()
        self._map = lru_cache(most_open)(_map)
        self._open = lru_cache(most_open)(lambda path: _open(path, context))

    def find(self, stem: Path, name: str, shape: Shape) -> StoredArray:
        """The array of this name that was written beside `stem`, whichever kind it is; nothing is opened yet."""
        folder = stem.with_suffix(f".{name}{SHARDED}")
        if folder.exists():
            return ShardedArray(folder, shape, self._open)
        return MappedArray(stem.with_suffix(f".{name}{MAPPED}"), shape, self._map)


def write_array(path: Path, array: np.ndarray, dims: int) -> None:
    """Write an array as the kind that its path ends with, in one step.

    Args:
        path: ends with MAPPED or SHARDED.
        array: (..., *S).
        dims: axes that patches are cut along, the last ones.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    if path.suffix == MAPPED:
        with atomic_path(path, array.nbytes) as part, part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        return
    with atomic_folder(path) as folder:
        _write_chunks({"driver": "file", "path": f"{folder}/"}, array, dims)


@dataclass(frozen=True)
class GrowingFile:
    """A .npy file that is written box by box, and read so meanwhile; nothing of it stays mapped, so that it counts as no memory of ours.

    Attributes:
        path: the file; it has its final name, and what makes it whole is somebody else's mark.
        shape: of the array.
        dtype: of its values.
        sides: what boxes are best multiples of.
    """

    path: Path
    shape: Shape
    dtype: np.dtype[Any]
    sides: Shape

    @classmethod
    def create(cls, path: Path, shape: Shape, dtype: np.dtype[Any]) -> Self:
        """A new file, of zeros."""
        with _writing(path):
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        return cls(path, shape, dtype, (1,) * len(shape))

    def write(self, box: tuple[slice, ...], values: np.ndarray) -> None:
        """Put values into a box of slices that have a start and an end; they are on the disk when it returns.

        Written and not mapped: of a full disk a mapping tells by a signal that ends the process.
        """
        whole = next((n for n in reversed(range(len(self.shape))) if values.shape[n] != self.shape[n]), 0)
        with _writing(self.path), self.path.open("r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            first = file.tell()
            for place in np.ndindex(values.shape[:whole]):
                index = (*(side.start + n for side, n in zip(box, place, strict=False)), *(side.start for side in box[whole:]))
                file.seek(first + int(np.ravel_multi_index(index, self.shape)) * self.dtype.itemsize)
                file.write(np.ascontiguousarray(values[place], self.dtype).data)
            file.flush()
            os.fsync(file.fileno())

    def __getitem__(self, part: Any) -> np.ndarray:
        return np.array(_map(self.path)[part])


@dataclass(frozen=True)
class GrowingStore:
    """A zarr array (version 3) that is written box by box, and read so meanwhile; attributes as those of `GrowingFile`."""

    path: Path
    shape: Shape
    dtype: np.dtype[Any]
    sides: Shape

    @classmethod
    def create(cls, path: Path, shape: Shape, dtype: np.dtype[Any], dims: int) -> Self:
        """A new array, of zeros."""
        with _writing(path):
            _created({"driver": "file", "path": f"{path}/"}, shape, dtype, dims)
        return cls(path, shape, dtype, _cut(shape, dims)[1])

    def write(self, box: tuple[slice, ...], values: np.ndarray) -> None:
        """Put values into a box; they are on the disk when it returns. A box that cuts shards has them read and written again."""
        with _writing(self.path):
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path}/"}}
            ts.open(spec, context=_context()).result()[box].write(values.astype(self.dtype, copy=False)).result()

    def __getitem__(self, part: Any) -> np.ndarray:
        found: np.ndarray = _open(self.path, _context())[_counted(part, self.shape)].read().result()
        return found


GrowingArray = GrowingFile | GrowingStore


def grow_array(path: Path, shape: Shape, dtype: np.dtype[Any], dims: int, *, again: bool) -> GrowingArray:
    """An array of the kind that its path ends with, to be written box by box; with `again` one that lies there, else a new one.

    Raises:
        RunError: the disk is full, or the folder cannot be written; later of every write too.
    """
    if path.suffix == MAPPED:
        return GrowingFile(path, shape, dtype, (1,) * len(shape)) if again else GrowingFile.create(path, shape, dtype)
    return GrowingStore(path, shape, dtype, _cut(shape, dims)[1]) if again else GrowingStore.create(path, shape, dtype, dims)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while an array is written into a line that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        # The library has one type for all that goes wrong below it.
        raise not_written(path, error, "a folder that can be written") from error


def packed_bytes(array: np.ndarray, dims: int) -> int:
    """About how many bytes an array takes as SHARDED, told from its middle: edges hold less, so that it is rather too many."""
    sample = array
    while sample.size > _SAMPLE_VALUES:
        axis = int(np.argmax(sample.shape))
        size = sample.shape[axis]
        sample = sample.take(range(size // 4, size // 4 + size // 2), axis)
    store = _write_chunks({"driver": "memory"}, sample, dims).kvstore
    assert store is not None, "a zarr array is kept in some store"
    taken = sum(len(store.read(key).result().value) for key in store.list().result())
    return math.ceil(taken * (array.size / sample.size))


def _map(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped into memory."""
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _open(path: Path, context: ts.Context) -> ts.TensorStore:
    """A chunked array, read only."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return ts.open(spec, read=True, context=context).result()


def _context() -> ts.Context:
    """Limits: no chunks are kept unpacked, since the next patch lies elsewhere and the kernel keeps the files; few threads."""
    threads = {"limit": _CHUNK_THREADS}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": threads, "file_io_concurrency": threads})


def _counted(part: Any, shape: Shape) -> tuple[int | slice, ...]:
    """A part with its places counted from 0, as the library takes -1 for a place before the first."""
    parts = part if isinstance(part, tuple) else (part,)
    return tuple(
        slice(*one.indices(size)[:2]) if isinstance(one, slice) else int(one) + (size if one < 0 else 0)
        for one, size in zip(parts, shape, strict=False)
    )


def _cut(shape: Shape, dims: int) -> tuple[Shape, Shape]:
    """Sides of a chunk and of a shard, a shard no larger than the array needs."""
    chunk, shard, beside = _CHUNKS[dims]
    before = len(shape) - dims
    chunks = (1,) * before + (chunk,) * dims
    most = (beside,) * before + (shard,) * dims
    return chunks, tuple(min(m, -(-size // c) * c) for size, c, m in zip(shape, chunks, most, strict=True))


def _write_chunks(kvstore: dict[str, str], array: np.ndarray, dims: int) -> ts.TensorStore:
    """Write an array shard by shard, so that no more than one is held in memory beside it."""
    store = _created(kvstore, array.shape, array.dtype, dims)
    for box in blocks_of(array.shape, _cut(array.shape, dims)[1]):
        store[box].write(array[box]).result()
    return store


def _created(kvstore: dict[str, str], shape: Shape, dtype: np.dtype[Any], dims: int) -> ts.TensorStore:
    """An array of compressed chunks that holds zeros."""
    chunks, shards = _cut(shape, dims)
    order = {"name": "bytes", "configuration": {"endian": "little"}}
    packing = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": dtype.itemsize}
    inner = {
        "chunk_shape": chunks,
        "codecs": [order, {"name": "blosc", "configuration": packing}],
        # A checksum: an index that was cut off would name places beyond it.
        "index_codecs": [order, {"name": "crc32c"}],
    }
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    return ts.open(spec, create=True, delete_existing=True, context=_context()).result()
