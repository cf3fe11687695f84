"""What is checked of an HDF5 file's heaps of texts, through which the library would walk for ever where an entry has no length."""

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

# HDF5 file format specification, III.E: a collection, and an object in it; the length of lengths is in the superblock (II.A).
_SUPERBLOCK, _HEAP = b"\x89HDF\r\n\x1a\n", b"GCOL"
_LENGTHS = MappingProxyType({2: "H", 4: "I", 8: "Q"})
# Where superblocks of version 0 and 1, and those of later versions, say it.
_LENGTH_AT, _NEW_LENGTH_AT = 14, 10
_ALIGNED = 8


class WatchedFile(io.BufferedReader):
    """A file from which h5py reads what describes a dataset; not made for its values, as each read passes through Python."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._length = _LENGTHS[8]

    def readinto(self, piece: Any, /) -> int:
        """Fill a piece, with zeros behind the end of the file.

        Raises:
            ValueError: it begins a heap through which nobody comes.
        """
        at, view = self.tell(), memoryview(piece).cast("B")
        got = super().readinto(view)
        view[got:] = bytes(len(view) - got)
        start = bytes(view[: len(_SUPERBLOCK)])
        if start == _SUPERBLOCK:
            head = os.pread(self.fileno(), _LENGTH_AT + 1, at)
            self._length = _LENGTHS.get(head[_LENGTH_AT if head[8:9] < b"\2" else _NEW_LENGTH_AT] if len(head) > _LENGTH_AT else 8, "Q")
        elif start.startswith(_HEAP):
            for offset, step in self._steps(at):
                if step == 0:
                    raise ValueError(f"the text at byte {offset} has no length")
        return len(view)

    def _steps(self, at: int) -> Iterator[tuple[int, int]]:
        """Where each object of a heap begins, and how far it is to the next."""
        head, entry = struct.Struct(f"<8x{self._length}"), struct.Struct(f"<H6x{self._length}")
        size = head.unpack(os.pread(self.fileno(), head.size, at).ljust(head.size, b"\0"))[0]
        heap = os.pread(self.fileno(), min(size, os.fstat(self.fileno()).st_size), at)
        offset = _aligned(head.size)
        while offset + entry.size <= len(heap):
            number, length = entry.unpack_from(heap, offset)
            # Number 0 is what is free, its own head included.
            step = _aligned(entry.size) + _aligned(length) if number else length
            yield at + offset, step
            offset += step


def _aligned(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // _ALIGNED) * _ALIGNED
