"""What is checked of the chunks of an HDF5 dataset, as the library unpacks each to its end and believes that it then has a whole one.

Of a chunk that is shorter than it should be, unpacked or as it is stored, the library hands out the memory behind it, whatever is there,
or reads past the end of that and ends the interpreter; of one whose checksum does not fit in it, it takes a size below 0. So each chunk
that a part touches is unpacked here first, once, and has to be exactly as long as a chunk. Nothing of that is done when a file
is opened, and nothing again for a chunk that was read before; the first time, chunks packed by deflate take about 1.6 times as long.
A process for each file, which could die in our place, would cost more, and not see what is merely filled with other memory.
"""

import math
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import imagecodecs
import numpy as np

from microtome.errors import DataError
from microtome.images.parts import MOST_CHUNK_BYTES, cut_off

# Filters by their numbers: those that change no length, a checksum, and those that pack; N-Bit does neither where it has nothing to save.
_SHUFFLE, _CHECKSUM, _NBIT, _SCALE = 2, 3, 5, 6
_DEFLATE, _SZIP, _LZF = 1, 4, 32000
_PACKERS = (_DEFLATE, _SZIP, _LZF)
_CHECKSUM_BYTES = _SZIP_BYTES = 4
# Where the parameters of filters say how much comes of them: values and bytes of each, or bytes.
_TOLD = MappingProxyType({_NBIT: (2, 4), _SCALE: (2, 4), _LZF: (2,)})
# What filters of other lengths may add to a chunk that they could not make smaller.
_MORE_BYTES = 2**16


def check_claims(path: Path, dataset: Any) -> None:
    """Refuse a dataset whose chunks are too large, packed several times over, or of another size to their filters.

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
    filters = _filters(dataset)
    packings = [number for number, _ in filters if number in _PACKERS]
    if len(packings) > 1:
        got = f"{len(packings)} (filters {', '.join(map(str, packings))})"
        raise DataError(path, expected="chunks that are packed once", got=got, do="do not trust this file", code="D003")
    for number, values in filters:
        told = [values[at] for at in _TOLD.get(number, ()) if at < len(values)]
        # LZF may leave it open, as it tries with more where that was too little.
        if told and math.prod(told) != size and (number, *told) != (_LZF, 0):
            got = f"filter {number}, which makes {math.prod(told)} of them"
            raise DataError(path, expected=f"chunks of {size} bytes", got=got, do="copy or export it again", code="D002")


class Chunks:
    """The chunks of a dataset, each looked into before it is first read.

    Args:
        path: for errors.
        dataset: of an open file, which is not read by another thread meanwhile.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self._dataset = dataset
        self._size, self._filters = _chunk_bytes(dataset), _filters(dataset)
        # Their first voxels (chunks, axes), sorted; their sizes and masks of filters that they were spared; and which are still to be
        # looked into.
        self._corners, self._stored, self._left = np.empty((0, 0), np.int64), np.empty((0, 2), np.int64), np.empty(0, bool)
        self._listed = not dataset.chunks

    def check(self, part: tuple[slice, ...] | None = None) -> None:
        """Let the chunks that a part of the dataset touches pass; all of them without a part.

        Raises:
            DataError: one of them is, or becomes, more or less than a chunk, or is there twice.
        """
        if not self._listed:
            self._list()
            self._listed = True
        for at in self._touched(part) if self._left.any() else ():
            self._check_one(self._corners[at].tolist(), *self._stored[at].tolist())
            self._left[at] = False

    def _list(self) -> None:
        """Once, as it walks through the file's list of chunks."""
        corners, stored = array("Q"), array("Q")

        def visit(chunk: Any) -> None:
            corners.extend(chunk.chunk_offset)
            stored.extend((chunk.size, chunk.filter_mask))

        self._dataset.id.chunk_iter(visit)
        corners_NA = np.array(corners, np.int64).reshape(-1, self._dataset.ndim)
        order = np.lexsort(corners_NA.T[::-1])
        self._corners, self._stored = corners_NA[order], np.array(stored, np.int64).reshape(-1, 2)[order]
        self._left = np.ones(len(order), bool)
        # Which of them would be found would depend on how it is looked for.
        twice = (self._corners[1:] == self._corners[:-1]).all(axis=1)
        if twice.any():
            got = f"two at {self._corners[1:][twice][0].tolist()}"
            raise DataError(self.path, expected="chunks at different places", got=got, do="copy or export it again", code="D011")

    def _touched(self, part: tuple[slice, ...] | None) -> Iterable[int]:
        """Numbers of chunks with a voxel of a part, which has a start and an end along each axis, that are still to be looked into."""
        if part is None:
            return map(int, np.flatnonzero(self._left))
        sides = self._dataset.chunks
        first = np.searchsorted(self._corners[:, 0], part[0].start - sides[0], "right")
        last = np.searchsorted(self._corners[:, 0], part[0].stop)
        corners, touched = self._corners[first:last], self._left[first:last].copy()
        for axis, (side, one) in enumerate(zip(sides, part, strict=True)):
            touched &= (corners[:, axis] < one.stop) & (one.start < corners[:, axis] + side)
        return map(int, first + np.flatnonzero(touched))

    def _check_one(self, corner: list[int], size: int, mask: int) -> None:
        """Look into one chunk of so many bytes in the file."""
        filters = [one for bit, one in enumerate(self._filters) if not mask >> bit & 1 and not _changes_nothing(*one)]
        kinds = [number for number, _ in filters]
        packing = next((at for at, kind in enumerate(kinds) if kind in _PACKERS), len(kinds))
        # In the order in which they were applied: what was made of the values, and what of the packed chunk.
        wanted = self._size + _CHECKSUM_BYTES * kinds[:packing].count(_CHECKSUM)
        left = size - _CHECKSUM_BYTES * kinds[packing + 1 :].count(_CHECKSUM)
        known = set(kinds) <= {_CHECKSUM, *_PACKERS}
        if left <= 0 or (left != wanted and known and packing == len(kinds)):
            raise self._damaged(corner, size, wanted if packing == len(kinds) else 0)
        if size > (whole := self._dataset.file.id.get_filesize()):
            raise cut_off(self.path, size, whole)
        if packing < len(kinds):
            most = wanted if known else wanted + _MORE_BYTES
            unpacked = self._unpacked(corner, kinds[packing], left, most)
            if unpacked != wanted and known:
                raise self._damaged(corner, unpacked, wanted)

    def _unpacked(self, corner: list[int], kind: int, left: int, most: int) -> int:
        """How many bytes a packed chunk becomes.

        Raises:
            DataError: more than it should.
        """
        packed = self._dataset.id.read_direct_chunk(tuple(corner))[1][:left]
        if kind == _SZIP:
            # It says so, and is unpacked into as much.
            return int.from_bytes(packed[:_SZIP_BYTES], "little")
        try:
            return len(
                imagecodecs.deflate_decode(packed, out=most) if kind == _DEFLATE else imagecodecs.lzf_decode(packed, header=False, out=most)
            )
        except (imagecodecs.DeflateError, imagecodecs.LzfError) as error:
            if "INSUFFICIENT" not in str(error) and "large enough" not in str(error):
                raise
        expected = f"a chunk at {corner} of at most {most} bytes"
        do = "check that the file is whole, or repack it: h5repack -f GZIP=1 OLD.h5 NEW.h5"
        raise DataError(self.path, expected=expected, got=f"{left} packed ones that become more", do=do, code="D003") from None

    def _damaged(self, corner: list[int], got: int, wanted: int) -> DataError:
        expected = f"a chunk at {corner} of {wanted or 'some'} bytes"
        return DataError(self.path, expected=expected, got=f"{got}", do="copy or export it again", code="D002")


def _chunk_bytes(dataset: Any) -> int:
    """Bytes of an unpacked chunk; 0 of a dataset that lies in one piece."""
    return math.prod(dataset.chunks) * int(dataset.id.get_type().get_size()) if dataset.chunks else 0


def _filters(dataset: Any) -> list[tuple[int, tuple[int, ...]]]:
    """The numbers of a dataset's filters and their parameters, in their order."""
    packing = dataset.id.get_create_plist()
    return [(int(number), tuple(values)) for number, _, values, _ in map(packing.get_filter, range(packing.get_nfilters()))]


def _changes_nothing(number: int, values: tuple[int, ...]) -> bool:
    """Whether a filter leaves the length of a chunk as it is."""
    return number == _SHUFFLE or (number == _NBIT and len(values) > 1 and values[1] != 0)
