"""OME-Zarr, Zarr, N5 and Neuroglancer's precomputed -> Volume, read chunk by chunk from a folder or a URL.

    place -> its metadata -> one array, and for each of its axes a name, a scale and a unit -> (C, *S) and millimetres

Nothing is read but metadata until a part is asked for, whatever the size of the store.
"""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from microtome.errors import DataError, DataWarning
from microtome.geometry import Shape, affine_from_spacing, format_shape
from microtome.images import stores
from microtome.images.image import Limits
from microtome.images.metadata import FINDERS, MM_PER_UNIT, Found, kind_of
from microtome.images.parts import MOST_CHUNK_BYTES
from microtome.images.stores import name_of, reading, writing
from microtome.images.volume import Volume, url_of

# A reader has the list of the chunks in a shard as a whole.
_MOST_SHARD_CHUNKS = 2**24


class ChunkedArray:
    """An array in a chunked store, of which parts are read and written; several threads may at once.

    Attributes:
        where: the store, for messages.
    """

    def __init__(self, store: ts.TensorStore, where: Path, *, most_values: int | None = None) -> None:
        """Wrap an open store.

        Args:
            store: any axes; origins are taken as 0.
            where: for messages.
            most_values: of a part; None for no limit.
        """
        self.where = where
        self._store = store.translate_to[(0,) * store.rank]
        self._most = most_values

    @property
    def shape(self) -> Shape:
        """Of all axes."""
        return tuple(int(size) for size in self._store.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values, in this machine's byte order."""
        return np.dtype(self._store.dtype.numpy_dtype)

    @property
    def chunks(self) -> Shape:
        """Sides of what is read and decoded at once; 1 along an axis that the store does not have."""
        return _sides(self._store.chunk_layout.read_chunk)

    @property
    def shards(self) -> Shape:
        """Sides of what is written at once: chunks, or whole shards of them."""
        return _sides(self._store.chunk_layout.write_chunk)

    def __getitem__(self, part: Any, /) -> np.ndarray:
        """A part, of as many slices of step 1 as there are axes. Chunks that are not there are the fill value, as these formats have it.

        Raises:
            DataError: more values than `most_values`, a damaged chunk, or no answer.
        """
        bounds = self._bounds(part)
        shape = tuple(max(0, high - low) for low, high in bounds)
        if self._most is not None and math.prod(shape) > self._most:
            got = f"a part of {format_shape(shape)}"
            raise DataError(
                name_of(self.where),
                expected=f"at most {self._most} values at a time (max_voxels)",
                got=got,
                do="read it in parts",
                code="D003",
            )
        if 0 in shape:
            return np.empty(shape, self.dtype)
        with reading(self.where):
            return np.asarray(self._store[tuple(slice(*bound) for bound in bounds)].read(order="C").result())

    def __setitem__(self, part: Any, values: np.ndarray, /) -> None:
        """Write a part; it is in the store when this returns. Parts that share a chunk must not be written at once from two processes.

        Raises:
            RunError: the disk is full, rights lack, or a server does not answer.
        """
        where = tuple(slice(*bound) for bound in self._bounds(part))
        with writing(self.where):
            self._store[where].write(np.asarray(values, self.dtype)).result()

    def _bounds(self, part: Any) -> list[tuple[int, int]]:
        """First and past the last index along each axis; as NumPy, what lies outside is cut off."""
        slices = part if isinstance(part, tuple) else (part,)
        assert len(slices) == self._store.rank, f"{len(slices)} slices for {self._store.rank} axes"
        bounds = [one.indices(size) for one, size in zip(slices, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in bounds), f"steps of {part}"
        return [(low, max(low, high)) for low, high, _ in bounds]


def kind_of_url(url: str) -> str:
    """What lies at a URL, by its documents: "zarr", "n5" or "precomputed".

    Raises:
        DataError: none of them, or no answer.
    """
    return kind_of(Path(url))


def open_chunked(path: Path, limits: Limits) -> Volume:
    """Open the image at a place: a store, or a group, level, label map or array within one (`x.ome.zarr/1`, `x.ome.zarr/labels/cells`).

    OME-Zarr 0.1 to 0.5: the finest level. Of a store without an image of its own, its only series, label map or array.
    A time axis of one step goes. Zarr without OME's metadata: YX, ZYX or CZYX by the number of axes, unless they are named. N5: the
    same, its axes turned round as its first one is the fastest. Precomputed: the finest scale, CZYX.

    Without a unit the spacing is the scale as it stands, as if in millimetres, and is not known.

    Args:
        path: a folder, or a URL kept in a path.
        limits: `max_side` and `max_channels` hold now, `max_voxels` for each part that is read.

    Raises:
        DataError: damaged, not an image, several images of which none is named, or beyond a limit.

    Warns:
        DataWarning: scales without a unit.
    """
    kind = kind_of(path)
    with reading(path):
        found = FINDERS[kind](path)
        spec = {**found.spec, "kvstore": stores.kvstore_of(found.place), "recheck_cached_data": "open"}
        store = ts.open(spec, read=True, context=stores.context()).result()
    return _volume(replace(found, extra={"url": url_of(path), **found.extra}), store, path, kind, limits)


# From array to volume.


def _volume(found: Found, store: ts.TensorStore, path: Path, kind: str, limits: Limits) -> Volume:
    """The array with its axes in our order, and its place in the world."""
    with reading(path):
        names = _checked_names(found.names, store, path)
        space = sorted((axis for axis, name in enumerate(names) if name in "zyx"), key=lambda axis: "zyx".index(names[axis]))
        channel = [axis for axis, name in enumerate(names) if name == "c"]
        kept = [*channel, *space]
        spacing_mm, origin_mm, known = _measures(found, space, path)
        single = store.translate_to[(0,) * store.rank][tuple(slice(None) if axis in kept else 0 for axis in range(store.rank))]
        turned = single.transpose([sorted(kept).index(axis) for axis in kept])
        pixels = ChunkedArray(turned if channel else turned[ts.newaxis], path, most_values=limits.max_voxels)
    _check(pixels, store, path, limits)
    affine = affine_from_spacing(spacing_mm)
    affine[:-1, -1] = origin_mm
    return Volume(
        pixels=pixels,
        spacing_mm=spacing_mm,
        affine=affine,
        axes="CZYX" if len(space) == 3 else "CYX",
        path=path,
        format=kind,
        chunk_vox=tuple(min(side, size) for side, size in zip(pixels.chunks, pixels.shape, strict=True))[1:],
        spacing_known=known,
        extra=found.extra,
    )


def _checked_names(names: str, store: ts.TensorStore, path: Path) -> str:
    """The names of the axes, those of space among z, y, x.

    Raises:
        DataError: not as many as the array has, an image of one axis, or more than one time point.
    """
    if len(names) != store.rank or len(set(names) & set("zyx")) not in {2, 3} or any(names.count(name) > 1 for name in "czyx"):
        got = f"axes {names or 'without names'} of {format_shape(tuple(store.shape)) or 'one value'}"
        raise DataError(
            name_of(path), expected="axes among t, c, z, y, x, at least two of space", got=got, do="export it with such axes", code="D023"
        )
    for name, size in zip(names, store.shape, strict=True):
        if name not in "czyx" and size != 1:
            what = "time points" if name == "t" else "steps along an axis that is neither t, c, z, y nor x"
            raise DataError(
                name_of(path),
                expected="one image",
                got=f"{size} {what}",
                do=f"export one of 0 to {size - 1} as a store of its own",
                code="D009",
            )
    return names


def _measures(found: Found, space: list[int], path: Path) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Spacing and origin in mm along the axes of space, and whether they are known."""
    units = [found.units[axis].lower() if found.units else "" for axis in space]
    known = all(unit in MM_PER_UNIT for unit in units)
    factors = [MM_PER_UNIT[unit] if known else 1.0 for unit in units]
    sides = [float(found.scale[axis]) if found.scale else 1.0 for axis in space]
    spacing_mm = tuple(side * factor for side, factor in zip(sides, factors, strict=True))
    origin_mm = tuple((float(found.origin[axis]) if found.origin else 0.0) * factor for axis, factor in zip(space, factors, strict=True))
    if min(spacing_mm) <= 0 or not all(map(math.isfinite, spacing_mm + origin_mm)):
        got = f"sides {sides} from {origin_mm}"
        raise DataError(name_of(path), expected="finite places and voxel sizes above 0", got=got, do="correct its metadata", code="D010")
    if not known and any(side != 1 for side in sides):
        got = ", ".join(sorted({f"`{unit}`" if unit else "none" for unit in units if unit not in MM_PER_UNIT}))
        message = f"{name_of(path)}: its scale has no unit of length (found {got}); the voxel size is not known"
        warnings.warn(message, DataWarning, stacklevel=4)
    return spacing_mm, origin_mm, known


def _check(pixels: ChunkedArray, store: ts.TensorStore, path: Path, limits: Limits) -> None:
    """Let metadata that may be believed pass.

    Raises:
        DataError: no voxel, no number, or a size beyond a limit.
    """
    outer, inner = (math.prod(_sides(grid)) for grid in (store.chunk_layout.write_chunk, store.chunk_layout.read_chunk))
    decoded = inner * pixels.dtype.itemsize
    wrong = (
        (min(pixels.shape) < 1, "at least one voxel along each axis", format_shape(pixels.shape)),
        (pixels.dtype.kind not in "biuf", "whole or real numbers", str(pixels.dtype)),
        (max(pixels.shape[1:]) > limits.max_side, f"at most {limits.max_side} voxels along an axis (max_side)", format_shape(pixels.shape)),
        (pixels.shape[0] > limits.max_channels, f"at most {limits.max_channels} channels (max_channels)", format_shape(pixels.shape)),
        (decoded > MOST_CHUNK_BYTES, f"chunks of at most {MOST_CHUNK_BYTES} bytes", f"{decoded} bytes"),
        (outer // inner > _MOST_SHARD_CHUNKS, f"shards of at most {_MOST_SHARD_CHUNKS} chunks", f"{outer // inner} chunks"),
    )
    for refused, expected, got in wrong:
        if refused:
            raise DataError(
                name_of(path), expected=expected, got=got, do="check its metadata, or export it with other chunks and axes", code="D023"
            )


def _sides(grid: ts.ChunkLayout.Grid) -> Shape:
    """The sides of a chunk; 1 along an axis that the store itself does not have."""
    return tuple(int(side or 1) for side in grid.shape or ())
