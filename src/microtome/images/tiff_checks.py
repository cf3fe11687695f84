"""What is checked of a TIFF file before and after tifffile looks at it: its chain of pages, its ends, and the files that it names."""

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any
from xml.etree import ElementTree

from microtome.errors import DataError
from microtome.geometry import format_shape
from microtome.images.image import Limits
from microtome.images.parts import cut_off

_MAX_PAGES = 2**22
_HEADER_BYTES = 8
_TYPE_BYTES = MappingProxyType({1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 16: 8})
# Description (OME's and ImageJ's metadata), strips, tiles, resolution, palette: without them it is another image.
_VITAL_TAGS = (270, 273, 279, 324, 325, 282, 283, 320)


def check_pages(path: Path, file: IO[bytes]) -> None:
    """Follow the offsets from page to page until 0, and those of the tags that say where and how large the pixels are.

    Raises:
        DataError: an offset behind the end of the file, a circle, or absurdly many pages.
    """
    order = "<" if (head := file.read(16))[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    number, link, entry = (struct.Struct(order + form) for form in (("Q", "Q", "HHQ8s") if big else ("H", "I", "HHI4s")))
    size = path.stat().st_size
    offset = link.unpack_from(head, 8 if big else 4)[0]
    seen: set[int] = set()
    while offset:
        if offset in seen or len(seen) >= _MAX_PAGES:
            raise DataError(path, expected="pages in a row", got=f"page {len(seen)} before page 0", do="export it again", code="D011")
        seen.add(offset)
        file.seek(offset)
        count = number.unpack(_exactly(path, file, number.size, size))[0]
        for tag, kind, values, place in entry.iter_unpack(_exactly(path, file, count * entry.size, size)):
            length = values * _TYPE_BYTES.get(kind, 1)
            if tag in _VITAL_TAGS and length > len(place) and link.unpack(place)[0] + length > size:
                raise cut_off(path, link.unpack(place)[0] + length, size)
        offset = link.unpack(_exactly(path, file, link.size, size))[0]


def _exactly(path: Path, file: IO[bytes], length: int, size: int) -> bytes:
    """The next `length` bytes of a file of `size` bytes."""
    if (end := file.tell() + length) > size:
        raise cut_off(path, end, size)
    return file.read(length)


def check_companions(path: Path, tiff: Any) -> None:
    """Refuse OME-XML that names files outside of the folder, before tifffile opens them, or absurdly many planes.

    Raises:
        DataError: names the file that is elsewhere, or how many planes.
    """
    if not tiff.is_ome:
        return
    root = ElementTree.fromstring(tiff.ome_metadata or "")
    # tifffile makes a list of them, of as many as are named.
    pixels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"]
    planes = [math.prod(int(element.get(f"Size{axis}", 1)) for axis in "CZT") for element in pixels]
    if max(planes, default=0) > _MAX_PAGES:
        got = f"{max(planes)} in its OME-XML"
        raise DataError(path, expected=f"at most {_MAX_PAGES} planes", got=got, do="copy or export it again", code="D011")
    # Of the file itself the name does not count.
    others = (element for element in root.iter() if element.get("FileName") and element.text != root.get("UUID", ""))
    _check_beside(path, (Path(str(element.get("FileName"))) for element in others))


def _check_beside(path: Path, files: Iterable[Path]) -> None:
    """Refuse a file outside of the folder, by its name or by a link that leads out."""
    # As tifffile has it: a link to the first file stands for that file.
    folder = path.resolve().parent
    for file in files:
        if not (folder / file).resolve().is_relative_to(folder):
            got = repr(str(file))[:200]
            raise DataError(path, expected="planes in files of its folder", got=got, do="save all planes in one file", code="D012")


def check_whole(path: Path, series: Any, limits: Limits) -> None:
    """Refuse a file that ends before its pixels do, as some decoders fill the rest with grey, and pages of files that are elsewhere.

    Raises:
        DataError: cut off, without a plane, strip or tile that it names, with planes outside of its folder, or tiles beyond `limits`.
    """
    # Other metadata than OME's (Micro-Manager's) lead to further files too.
    _check_beside(path, {Path(page.parent.filehandle.path) for page in series.pages if page is not None})
    _check_tile(path, series.keyframe, limits)
    for page in series.pages:
        if page is None:
            raise DataError(path, expected="all planes", got="a plane that its OME-XML names is missing", do="export it again", code="D002")
        size = page.parent.filehandle.size
        ends = [(start, start + length) for start, length in zip(page.dataoffsets, page.databytecounts, strict=False)]
        if (end := max((last for _, last in ends), default=0)) > size:
            raise cut_off(path, end, size)
        _check_in_one_piece(path, page, ends)
        _check_covered(path, page)


def _check_tile(path: Path, key: Any, limits: Limits) -> None:
    """Refuse a tile that becomes far more than the file is large, however small the image that is cut out of it."""
    claimed = math.prod(key.chunks) * key.dtype.itemsize if key.is_tiled else 0
    if claimed > max(limits.unsuspected_bytes, limits.max_expansion * path.stat().st_size):
        got = f"a tile of {format_shape(key.chunks)} {key.dtype.name}"
        expected = f"a file of {path.stat().st_size} bytes to hold at most {limits.max_expansion:g} times as many (max_expansion)"
        raise DataError(path, expected=expected, got=got, do="check that the file is whole, or read it with other Limits", code="D003")


def _check_in_one_piece(path: Path, page: Any, ends: Sequence[tuple[int, int]]) -> None:
    """Refuse pixels that tifffile would read in one go from where they are not.

    It does so with every page of a series whose first page lies in one piece. Of a strip among others, an offset of 0 says that it
    was not stored; of pixels in one piece, the header of the file would be read for them.
    """
    if not page.keyframe.is_contiguous:
        return
    if ends and ends[0][0] < _HEADER_BYTES:
        got = f"pixels at byte {ends[0][0]}"
        raise DataError(path, expected="pixels behind the header", got=got, do="export it again: they were not stored", code="D002")
    if page.is_frame and not (page.keyframe.is_stk or page.keyframe.is_lsm):
        for (_, last), (start, _) in pairwise(ends):
            if last != start:
                got = f"a page with strips at bytes {last} and {start}"
                raise DataError(path, expected="strips one after the other, as its first page", got=got, do="export it again", code="D002")


def _check_covered(path: Path, page: Any) -> None:
    """Refuse strips or tiles that are fewer than make up a page.

    Of what none of them holds, tifffile gives the memory as it was. That happens where a word for how samples lie, or a number of
    rows, is none that it knows; where offsets are missing, it gives zeros, as for a tile that was never written, which has an offset.
    """
    key = page.keyframe
    # Read by its size, in one piece, or by the marks in the one JPEG picture of a vendor's page.
    if key.is_contiguous or key.jpegheader is not None or 0 in key.shaped:
        return
    separate, depth, length, width, _ = key.shaped
    sides = (key.tiledepth, key.tilelength, key.tilewidth) if key.is_tiled else (1, key.rowsperstrip, width)
    pieces = separate * math.prod(-(-size // side) for size, side in zip((depth, length, width), sides, strict=True))
    what = "tiles" if key.is_tiled else "strips"
    if pieces != math.prod(key.chunked):
        got = f"a header that leads to {math.prod(key.chunked)} (planar configuration {int(key.planarconfig)})"
        raise DataError(path, expected=f"{pieces} {what} a page", got=got, do="export it again", code="D011")
    if (there := min(len(page.dataoffsets), len(page.databytecounts))) < pieces:
        raise DataError(path, expected=f"{pieces} {what} a page", got=f"{there}", do="copy or export it again", code="D002")
