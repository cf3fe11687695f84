"""What is checked of an HDF5 file's heaps of texts, through which the library would walk for ever where an entry leads back."""

import io
import math
import os
import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

# HDF5 file format specification, III.E: a collection, and an object in it; the length of lengths is in the superblock (II.A).
_SUPERBLOCK, _HEAP = b"\x89HDF\r\n\x1a\n", b"GCOL"
_LENGTHS = MappingProxyType({2: "H", 4: "I", 8: "Q"})
# Where superblocks of version 0 and 1, and those of later versions, say it.
_LENGTH_AT, _NEW_LENGTH_AT = 14, 10
_ALIGNED = 8
# An attribute (IV.A.2.m): its version stands 8 or, with the character set, 9 bytes before the name; sizes of name, type and space.
_VERSIONS, _SIZES = MappingProxyType({8: (1, 2), 9: (3,)}), struct.Struct("<2xHHH")
# Of a type, and that of sequences of any length; each is stored as its length, the place of a heap of 8 bytes, and a number in it.
_CLASS, _ANY_LENGTH, _TEXT = 0x0F, 9, struct.Struct("<I12x")
# The number of axes of an extent (IV.A.2.b) is its second byte; where their sides begin, by its version.
_SIDES_AT = MappingProxyType({1: 8, 2: 4})
_PLACE_BYTES, _MOST_KEPT_BYTES = 8, 2**16
# What describes a dataset is read in pieces, of a megabyte at most; one that begins near the end of a good file might reach past it.
_MOST_BEHIND_BYTES = 2**21


class WatchedFile(io.BufferedReader):
    """A file from which h5py reads what describes a dataset; not made for its values, as each read passes through Python.

    Args:
        path: of the file.
        names: of attributes whose lengths will be checked; what has none of them is not kept.
    """

    def __init__(self, path: Path, names: Collection[str] = ()) -> None:
        super().__init__(io.FileIO(path))
        # Of no names, what is nowhere.
        self._names = re.compile(b"|".join(re.escape(name.encode()) + b"\0" for name in sorted(names)) or rb"(?!)")
        self._place_bytes, self._length = 8, _LENGTHS[8]
        self._pieces: list[bytes] = []

    def readinto(self, piece: Any, /) -> int:
        """Fill a piece, with zeros behind the end of the file.

        Raises:
            ValueError: it begins a heap through which nobody comes, or is more than is there; filled, it would take the memory it claims.
        """
        at, view = self.tell(), memoryview(piece).cast("B")
        behind = at + len(view) - os.fstat(self.fileno()).st_size
        if behind > _MOST_BEHIND_BYTES:
            raise ValueError(f"{len(view)} bytes from byte {at} on, {behind} of them behind the end")
        got = super().readinto(view)
        view[got:] = bytes(len(view) - got)
        start = bytes(view[: len(_SUPERBLOCK)])
        if start == _SUPERBLOCK:
            head = os.pread(self.fileno(), _LENGTH_AT + 1, at).ljust(_LENGTH_AT + 1, b"\x08")
            length_at = _LENGTH_AT if head[8] < 2 else _NEW_LENGTH_AT
            self._place_bytes, self._length = head[length_at - 1], _LENGTHS.get(head[length_at], "Q")
        elif start.startswith(_HEAP):
            for offset, step, left in self._steps(at):
                if step == 0:
                    raise ValueError(f"the text at byte {offset} has no length")
                if step > left:
                    # The library adds in 64 bits: nearly 2**64 bytes further is where it stands, or before.
                    raise ValueError(f"the text at byte {offset} leads {step} bytes on, of which its heap has {left}")
        elif len(view) <= _MOST_KEPT_BYTES and self._names.search(view):
            self._pieces.append(bytes(view))
        return len(view)

    def check_lengths(self, name: str) -> None:
        """Check the lengths of texts of an attribute, for which the library takes memory before it looks for them.

        Args:
            name: of an attribute, one of the `names`; those of other objects that were read are checked with it.

        Raises:
            ValueError: a text that is longer than the file.
        """
        size = os.fstat(self.fileno()).st_size
        for piece in self._pieces if self._place_bytes == _PLACE_BYTES else ():
            for found in re.finditer(re.escape(name.encode()) + b"\0", piece):
                longest = max(_lengths(piece, *found.span(), self._length), default=0)
                if longest > size:
                    raise ValueError(f"a text of {longest} bytes as {name}")

    def _steps(self, at: int) -> Iterator[tuple[int, int, int]]:
        """Where each object of a heap begins, how far it is to the next, and how far to the end of the heap."""
        head, entry = struct.Struct(f"<8x{self._length}"), struct.Struct(f"<H6x{self._length}")
        size = head.unpack(os.pread(self.fileno(), head.size, at).ljust(head.size, b"\0"))[0]
        heap = os.pread(self.fileno(), min(size, os.fstat(self.fileno()).st_size), at)
        offset = _aligned(head.size)
        while offset + entry.size <= len(heap):
            number, length = entry.unpack_from(heap, offset)
            # Number 0 is what is free, its own head included.
            step = _aligned(entry.size) + _aligned(length) if number else length
            yield at + offset, step, len(heap) - offset
            offset += step


def _lengths(piece: bytes, at: int, end: int, form: str) -> Iterator[int]:
    """The lengths of texts of the attribute whose name is at a place; none of what is no attribute of texts of any length."""
    head = next((at - before for before in (8, 9) if at >= before and piece[at - before] in _VERSIONS[before]), None)
    if head is None or (sizes := _SIZES.unpack_from(piece, head))[0] != end - at:
        return
    name, kind, space = map(_aligned, sizes) if piece[head] == 1 else sizes
    extent = at + name + kind
    if len(piece) > extent + 1 and piece[at + name] & _CLASS == _ANY_LENGTH:
        sides = struct.Struct(f"<{piece[extent + 1]}{form}")
        start = extent + _SIDES_AT.get(piece[extent], 0)
        count = math.prod(sides.unpack_from(piece, start)) if len(piece) >= start + sides.size else 0
        values = piece[extent + space :][: min(count, len(piece)) * _TEXT.size]
        yield from (length for (length,) in _TEXT.iter_unpack(values[: len(values) // _TEXT.size * _TEXT.size]))


def _aligned(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // _ALIGNED) * _ALIGNED
