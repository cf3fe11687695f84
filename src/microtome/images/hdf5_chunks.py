"""What is checked of the chunks of an HDF5 dataset: the library unpacks each as a whole, to its end, whatever size it should have."""

import math
import zlib
from pathlib import Path
from types import MappingProxyType
from typing import Any

from microtome.errors import DataError
from microtome.images.parts import MOST_CHUNK_BYTES

# Filters that pack, by their numbers, and the most bytes that come of one: of szip the chunk says it, and it is held to that.
_DEFLATE, _SZIP, _LZF = 1, 4, 32000
_GROWTH = MappingProxyType({_DEFLATE: 1032, _LZF: 88})
# Chunks that cannot become more than this are not looked into.
_UNSUSPECTED_BYTES = 2**29
_PIECE_BYTES = 2**22
# Checksums and the like beside the values of a chunk.
_MORE_BYTES = 2**16


def check_claims(path: Path, dataset: Any) -> None:
    """Refuse a dataset whose chunks are too large, or packed several times over.

    Raises:
        DataError: names the claim and the limit.
    """
    size = _chunk_bytes(dataset)
    if size > MOST_CHUNK_BYTES:
        raise DataError(
            path,
            expected=f"chunks of at most {MOST_CHUNK_BYTES} bytes",
            got=f"{size} bytes",
            do="check that the file is whole, or repack it: h5repack -l CHUNK=64x64x64 OLD.h5 NEW.h5",
            code="D003",
        )
    packings = [number for number in _filters(dataset) if number in (_DEFLATE, _SZIP, _LZF)]
    if len(packings) > 1:
        got = f"{len(packings)} (filters {', '.join(map(str, packings))})"
        raise DataError(path, expected="chunks that are packed once", got=got, do="do not trust this file", code="D003")


class Chunks:
    """The chunks of a dataset that could become more than they should, each looked into before it is first read.

    Args:
        path: for errors.
        dataset: of an open file, which is not read by another thread meanwhile.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self._dataset = dataset
        self._most = _chunk_bytes(dataset) + _MORE_BYTES
        packing = next((number for number in _filters(dataset) if number in _GROWTH), 0)
        self._packing, self._skipped = packing, 1 << _filters(dataset).index(packing) if packing else 0
        self._suspects: dict[tuple[int, ...], int] | None = None

    def check(self, part: tuple[slice, ...] | None = None) -> None:
        """Let the chunks that a part of the dataset touches pass; all of them without a part.

        Raises:
            DataError: one of them becomes more than a chunk.
        """
        if self._suspects is None:
            self._suspects = self._listed()
        sides = self._dataset.chunks or ()
        for corner, size in list(self._suspects.items()):
            if part is None or _touched(corner, sides, part):
                self._check_one(corner, size)
                del self._suspects[corner]

    def _listed(self) -> dict[tuple[int, ...], int]:
        """Places and packed sizes of chunks that could become too much; once, as it walks through the file's list of chunks."""
        found: dict[tuple[int, ...], int] = {}
        least = _UNSUSPECTED_BYTES // _GROWTH.get(self._packing, 1)

        def visit(chunk: Any) -> None:
            if chunk.size > least and not chunk.filter_mask & self._skipped:
                found[tuple(chunk.chunk_offset)] = chunk.size

        if self._packing:
            self._dataset.id.chunk_iter(visit)
        return found

    def _check_one(self, corner: tuple[int, ...], size: int) -> None:
        """Unpack one chunk, a piece at a time, as far as it should go."""
        if self._packing == _LZF:
            if size * _GROWTH[_LZF] > 2 * MOST_CHUNK_BYTES:
                raise self._refused(corner, size, f"may become {size * _GROWTH[_LZF]}")
            return
        unpacker, done = zlib.decompressobj(), 0
        packed = self._dataset.id.read_direct_chunk(corner)[1]
        while packed and not unpacker.eof:
            done += len(unpacker.decompress(packed, _PIECE_BYTES))
            if done > self._most:
                raise self._refused(corner, size, f"become more than {done}")
            packed = unpacker.unconsumed_tail

    def _refused(self, corner: tuple[int, ...], size: int, what: str) -> DataError:
        expected = f"a chunk at {list(corner)} of at most {self._most} bytes"
        do = "check that the file is whole, or repack it: h5repack -f GZIP=1 OLD.h5 NEW.h5"
        return DataError(self.path, expected=expected, got=f"{size} packed ones that {what}", do=do, code="D003")


def _chunk_bytes(dataset: Any) -> int:
    """Bytes of an unpacked chunk; 0 of a dataset that lies in one piece."""
    return math.prod(dataset.chunks) * int(dataset.dtype.itemsize) if dataset.chunks else 0


def _filters(dataset: Any) -> list[int]:
    """The numbers of a dataset's filters, in their order."""
    packing = dataset.id.get_create_plist()
    return [int(packing.get_filter(index)[0]) for index in range(packing.get_nfilters())]


def _touched(corner: tuple[int, ...], sides: tuple[int, ...], part: tuple[slice, ...]) -> bool:
    """Whether a chunk has a voxel of a part, which has a start and an end along each axis."""
    return all(low < one.stop and one.start < low + side for low, side, one in zip(corner, sides, part, strict=True))
