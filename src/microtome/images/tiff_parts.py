"""TIFF by part: only the pages, tiles and strips that a part touches are read and decoded."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import DataWarning
from microtome.geometry import Shape, affine_from_spacing
from microtome.images.image import Limits, decoding
from microtome.images.parts import Bytes, Lazy, Mapped, bounds, limits_of_parts, mapped
from microtome.images.tiff import Plan, decode_tiff, describe_tiff, opened_tiff
from microtome.images.tiff_checks import check_whole
from microtome.images.volume import Pixels, Volume

# Kinds of series whose pages are the planes of the array one after the other.
_PLAIN_KINDS = frozenset({"uniform", "generic", "shaped", "imagej", "ome", "svs"})
_JPEG = frozenset({6, 7, 34892, 33007})  # compressions whose tiles share tables


def open_tiff(path: Path, limits: Limits) -> Volume:
    """What `read_tiff` gives, as a volume: the same values, geometry and header.

    Values that lie in the file as they are, one after the other, are mapped into memory. Palettes, CMYK and pages of
    different kinds are decoded as a whole when they are first touched.

    Raises:
        DataError: as `read_tiff`; the number of voxels counts only where all of them are decoded.
    """
    with opened_tiff(path) as tiff:
        plan = describe_tiff(path, tiff, "colours")
        limits_of_parts(limits).check(path, plan.header)
        check_whole(path, plan.series, limits)
        pixels: Pixels | None = _mapped(path, tiff, plan) or _paged(path, tiff, plan)
        if pixels is None:
            limits.check(path, plan.header)
            pixels = Lazy((plan.header.channels, *plan.header.shape_vox), np.dtype(plan.header.dtype), lambda: _whole(path))
        for fault in plan.faults:
            warnings.warn(f"{path}: {fault}", DataWarning, stacklevel=3)
    spacing = plan.header.spacing_mm
    return Volume(
        pixels=pixels,
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes="CZYX" if len(spacing) == 3 else "CYX",
        path=path,
        format="tiff",
        chunk_vox=_chunk(plan, pixels),
        spacing_known=plan.header.spacing_known,
        extra=plan.extra,
    )


def _whole(path: Path) -> np.ndarray:
    """All of it; what had to be assumed was said when it was opened."""
    with opened_tiff(path) as tiff:
        return decode_tiff(describe_tiff(path, tiff, "colours"))


def _chunk(plan: Plan, pixels: Pixels) -> Shape:
    """The tile or strip of a page that is decoded at once; a page where all lies open."""
    tile = _tile(plan.series.keyframe) if isinstance(pixels, _Pages) else plan.header.shape_vox[-2:]
    return (*(1,) * (len(plan.header.shape_vox) - 2), *tile)


def _mapped(path: Path, tiff: Any, plan: Plan) -> Mapped | None:
    """The values where they lie in the file, if they do so in one piece and in their final form."""
    series, dims = plan.series, len(plan.header.shape_vox)
    channel_axes = [size for axis in plan.order[:-dims] if (size := plan.file_shape[axis]) > 1]
    if not _is_plain(tiff, plan) or series.dataoffset is None or len(channel_axes) > 1:
        return None
    dtype = np.dtype(tiff.byteorder + series.dtype.char)
    array = mapped(path, dtype, series.dataoffset, plan.file_shape).transpose(plan.order)
    # With one axis of channels at most, this moves no value.
    return Mapped(array.reshape(-1, *plan.header.shape_vox)[: plan.kept])


def _is_plain(tiff: Any, plan: Plan) -> bool:
    """Whether a series is made of pages of this file, one after the other, whose values are those of the image."""
    series, shape = plan.series, plan.header.shape_vox
    return (
        not plan.coloured
        and not plan.cmyk
        and series.kind in _PLAIN_KINDS
        and all(page.parent is tiff for page in series.pages)
        and (series.keyframe.imagelength, series.keyframe.imagewidth) == shape[-2:]
        # Bits are no bytes yet.
        and series.dtype.name == plan.header.dtype
    )


def _paged(path: Path, tiff: Any, plan: Plan) -> "_Pages | None":
    """The pages, if they are of one kind and each of their tiles or strips can be decoded by itself."""
    series, key = plan.series, plan.series.keyframe
    # Predictors of what is not compressed are undone for a page as a whole, as are the JPEG pictures of one vendor.
    tiles = key.imagedepth == 1 and key.jpegheader is None and (key.compression != 1 or key.predictor == key.fillorder == 1)
    values, count = len(series.pages) * math.prod(key.shaped), math.prod(key.chunked)
    if not tiles or not _is_plain(tiff, plan) or values != math.prod(plan.file_shape):
        return None
    if key.is_contiguous and any(sum(page.databytecounts) != key.nbytes for page in series.pages):
        # As a whole it is read by its size, strip by strip it would be by what the file says of each.
        return None
    alike = all(page.hash == key.hash and len(page.dataoffsets) == len(page.databytecounts) == count for page in series.pages)
    return _Pages(path, plan) if alike else None


def _tile(key: Any) -> tuple[int, int]:
    """Rows and columns of what is decoded at once."""
    if key.is_tiled:
        return int(key.tilelength), int(key.tilewidth)
    return min(int(key.rowsperstrip), int(key.imagelength)), int(key.imagewidth)


def _places(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Where a mask is true."""
    return [tuple(map(int, place)) for place in np.argwhere(mask)]


class _Pages:
    """Pixels of pages of one kind, of which tiles or strips are decoded when they are asked for."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.shape: Shape = (plan.header.channels, *plan.header.shape_vox)
        self.dtype = np.dtype(plan.header.dtype)
        # Offsets and sizes are in memory: the file that tifffile opened may be closed.
        self._pages = list(plan.series.pages)
        for page in self._pages:
            page.keyframe.init_decode()
        self._read = Bytes(path)
        # Which plane of samples, counted through the whole file, is at each channel and section.
        lying = [1 if i in plan.order[-2:] else size for i, size in enumerate(plan.file_shape)]
        planes = np.arange(math.prod(lying)).reshape(lying).transpose(plan.order)
        self._planes_CZ = planes.reshape(-1, math.prod(self.shape[1:-2]))[: plan.kept]

    def __getitem__(self, part: Any) -> np.ndarray:
        limits = bounds(part, self.shape)
        sizes = [high - low for low, high in limits]
        out = np.empty(sizes, self.dtype)
        planes_CZ = out.reshape(sizes[0], math.prod(sizes[1:-2]), *sizes[-2:])
        sections = limits[1] if len(limits) == 4 else (0, 1)
        numbers_CZ = self._planes_CZ[slice(*limits[0]), slice(*sections)]
        separate, contiguous = self._pages[0].keyframe.shaped[::4]
        with decoding(self.path, "TIFF"):
            # Samples that lie pixel by pixel are decoded once for all channels.
            for group in np.unique(numbers_CZ // contiguous) if out.size else ():
                page, plane = divmod(int(group), separate)
                targets = {int(numbers_CZ[at]) % contiguous: planes_CZ[at] for at in _places(numbers_CZ // contiguous == group)}
                self._fill(self._pages[page], plane, limits[-2:], targets)
        return out

    def _fill(self, page: Any, plane: int, area: tuple[tuple[int, int], ...], targets: dict[int, np.ndarray]) -> None:
        """Decode the tiles of one plane that an area touches, into one array for each of their samples."""
        tile, key = _tile(page.keyframe), page.keyframe
        across = [-(-size // side) for size, side in zip(key.shaped[2:4], tile, strict=True)]
        rows, columns = (range(low // side, -(-high // side)) for (low, high), side in zip(area, tile, strict=True))
        for row in rows:
            for column in columns:
                tile_YXS = self._decoded(page, (plane * across[0] + row) * across[1] + column)
                starts = (row * tile[0], column * tile[1])
                ends = [min(first + side, size) for first, side, size in zip(starts, tile, key.shaped[2:4], strict=True)]
                shared = [(max(low, first), min(high, end)) for (low, high), first, end in zip(area, starts, ends, strict=True)]
                there = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(shared, area, strict=True))
                here = tuple(slice(a - first, b - first) for (a, b), first in zip(shared, starts, strict=True))
                for sample, target in targets.items():
                    target[there] = key.nodata if tile_YXS is None else tile_YXS[here][..., sample]

    def _decoded(self, page: Any, number: int) -> np.ndarray | None:
        """A tile or strip of a page by its number, (Y, X, samples); None of one that is not stored."""
        key = page.keyframe
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        if offset <= 0 or count <= 0:
            return None
        more = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if key.compression in _JPEG else {}
        segment, _, _ = key.decode(self._read(offset, count), number, **more)
        tile_YXS: np.ndarray = segment[0]
        return tile_YXS
