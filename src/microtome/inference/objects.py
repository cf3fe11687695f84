"""Connected parts of a volume of any size, numbered block by block; the numbers do not depend on the blocks.

    block by block   ->   pieces   --joined where blocks meet-->   objects   --numbered by their first voxel-->   1..N

Memory holds a few blocks, and some numbers for each piece. A volume in memory is one block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import ndimage, sparse

from microtome.errors import RunError
from microtome.geometry import Shape
from microtome.tiling import blocks_of

Box = tuple[slice, ...]
# What SciPy's graphs count with.
MOST_PIECES = 2**31 - 2
# Voxels whose places are listed at a time.
MOST_LISTED = 1 << 20


class Readable(Protocol):
    """Values (*S) of which boxes are read: an array in memory or mapped into it, or a chunked store."""

    @property
    def shape(self) -> Shape:
        """The sides S."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of what is read."""

    def __getitem__(self, box: Any, /) -> np.ndarray:
        """A box, of one slice an axis: an array in memory, not to be written to."""


class Writable(Readable, Protocol):
    """Values (*S) of which boxes are read and written."""

    def __setitem__(self, box: Any, values: Any, /) -> None:
        """Write a box, of one slice an axis."""


@dataclass(frozen=True)
class Objects:
    """What is known of the objects 1..N of a volume, in that order.

    Attributes:
        values: (N,) the value that all voxels of an object had; 1 where a mask was labelled.
        sizes_vox: (N,) voxels of each, int64.
        boxes_vox: (N, axes, 2) the first voxel and the one past the last along each axis, int64.
    """

    values: np.ndarray
    sizes_vox: np.ndarray
    boxes_vox: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


def label_blocks(
    values_of: Callable[[Box], np.ndarray], shape_vox: Shape, out: Writable, block_vox: Shape, *, connectivity: int = 1
) -> Objects:
    """Number the connected parts of equal value, 1..N in the raster order of their first voxels, whatever the blocks.

    Parts of different values that touch are different objects. Besides a few blocks, memory holds about a hundred bytes for each
    piece, a piece being what a block holds of an object, and sixteen for each pair of pieces that meet.

    Args:
        values_of: a box -> its values, a mask or integers (*S); what is 0 or less belongs to no object. Called once a block.
        shape_vox: the whole volume, S.
        out: unsigned integers (*S); what is in it before does not matter.
        block_vox: sides of a block; those of the volume where it is in memory, those of the store's chunks, or multiples, else.
        connectivity: 1 joins voxels by their faces, 2 by edges too, 3 by corners too; not more than there are axes.

    Raises:
        RunError: there are more pieces than `out` can number.
    """
    structure = ndimage.generate_binary_structure(len(shape_vox), connectivity)
    pieces = _Pieces(shape_vox, structure, int(np.iinfo(out.dtype).max))
    for box in blocks_of(shape_vox, block_vox):
        out[box] = pieces.add(values_of(box), box).astype(out.dtype)
    pairs = _meeting(out, block_vox, structure)
    number, objects = pieces.joined(pairs)
    renumber(out, number, block_vox)
    return objects


def renumber(out: Writable, number: np.ndarray, block_vox: Shape) -> None:
    """Replace each value v of `out` by `number[v]`; nothing is read or written where that changes nothing."""
    number = number.astype(out.dtype)
    if np.array_equal(number, np.arange(len(number))):
        return
    for box in blocks_of(out.shape, block_vox):
        part = out[box]
        if part.any():
            out[box] = number[part]


def values_at(array: Readable, places: np.ndarray, block_vox: Shape) -> np.ndarray:
    """The values at some places (P,), positions in the raster order of the whole array; each block is read once at most."""
    place = np.stack(np.unravel_index(places, array.shape))
    found = np.empty(len(places), array.dtype)
    counts = [-(-size // side) for size, side in zip(array.shape, block_vox, strict=True)]
    block = np.ravel_multi_index(tuple(place // np.reshape(block_vox, (-1, 1))), counts)
    order = np.argsort(block, kind="stable")
    for some in np.split(order, np.flatnonzero(np.diff(block[order])) + 1) if len(order) else []:
        corner = place[:, some[0]] // block_vox * block_vox
        box = tuple(slice(a, min(size, a + side)) for a, side, size in zip(corner, block_vox, array.shape, strict=True))
        found[some] = array[box][tuple(place[:, some] - corner[:, None])]
    return found


def first_voxels(pieces_S: np.ndarray, count: int, box: Box, shape_vox: Shape) -> np.ndarray:
    """The position of the first voxel of the pieces 1..count of a block, in the raster order of the whole volume; int64 (count,)."""
    first = np.zeros(count + 1, np.int64)
    rows = max(1, MOST_LISTED // max(1, pieces_S[0].size))
    # From the last row to the first: of places that are assigned to the same piece the last one stays.
    for row in reversed(range(0, len(pieces_S), rows)):
        part = pieces_S[row : row + rows].ravel()
        inside = np.flatnonzero(part)[::-1]
        first[part[inside]] = inside + row * pieces_S[0].size
    local = np.unravel_index(first[1:], pieces_S.shape)
    place = tuple(index + side.start for index, side in zip(local, box, strict=True))
    return np.asarray(np.ravel_multi_index(place, shape_vox), np.int64)


def rank_by_first(group: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups 0..G-1 of the pieces (P,) and the pieces' first voxels -> (number 1..G of each group by its first voxel, order of groups)."""
    groups = int(group.max(initial=-1)) + 1
    earliest = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(earliest, group, first)
    order = np.argsort(earliest)
    number = np.empty(groups, np.int64)
    number[order] = np.arange(1, groups + 1)
    return number, order


class _Pieces:
    """The pieces of the blocks so far: 1..count in the order in which they were found."""

    def __init__(self, shape_vox: Shape, structure: np.ndarray, most: int) -> None:
        self.count = 0
        self._shape, self._structure, self._most = shape_vox, structure, min(most, MOST_PIECES)
        axes = len(shape_vox)
        self._values, self._sizes, self._first = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        self._boxes = [np.empty((0, axes, 2), np.int64)]

    def add(self, values_S: np.ndarray, box: Box) -> np.ndarray:
        """Number the pieces of a block, from the next free number on; int64 (*S), 0 outside of them."""
        pieces_S, values = _label_values(values_S, self._structure)
        count = len(values)
        # The numbers of pieces are written before it is known which are one object.
        if self.count + count > self._most:
            raise too_many(self.count + count, self._most)
        start = np.array([side.start for side in box])
        self._values.append(values)
        self._sizes.append(np.bincount(pieces_S.ravel(), minlength=count + 1)[1:])
        self._first.append(first_voxels(pieces_S, count, box, self._shape))
        found = [[(side.start, side.stop) for side in inside] for inside in ndimage.find_objects(pieces_S)]
        self._boxes.append(np.array(found, np.int64).reshape(count, len(box), 2) + start[:, None])
        numbered = pieces_S.astype(np.int64)
        numbered[numbered > 0] += self.count
        self.count += count
        return numbered

    def joined(self, pairs: np.ndarray) -> tuple[np.ndarray, Objects]:
        """Pairs of pieces (2, P) that meet -> (the number of each piece's object, 0 for piece 0; the objects)."""
        values = np.concatenate(self._values)
        a, b = pairs[:, values[pairs[0] - 1] == values[pairs[1] - 1]] - 1
        graph = sparse.coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.count, self.count))
        groups, group = sparse.csgraph.connected_components(graph, directed=False) if self.count else (0, np.empty(0, np.int64))
        number, order = rank_by_first(group, np.concatenate(self._first))
        sizes, boxes_vox = np.zeros(groups, np.int64), np.concatenate(self._boxes)
        np.add.at(sizes, group, np.concatenate(self._sizes))
        low, high = (np.full((groups, boxes_vox.shape[1]), end) for end in (np.iinfo(np.int64).max, 0))
        np.minimum.at(low, group, boxes_vox[..., 0])
        np.maximum.at(high, group, boxes_vox[..., 1])
        value = np.zeros(groups, np.int64)
        value[group] = values
        objects = Objects(values=value[order], sizes_vox=sizes[order], boxes_vox=np.stack([low, high], axis=-1)[order])
        return np.concatenate([[0], number[group]]), objects


def too_many(pieces: int, most: int) -> RunError:
    """The error for more pieces of objects than can be numbered."""
    return RunError(
        "objects",
        expected=f"at most {most} pieces",
        got=f"{pieces} or more",
        do="remove the noise first, or raise the threshold",
        code="R012",
    )


def _label_values(values_S: np.ndarray, structure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected pieces 1..P of equal value in a block -> (int32 (*S), their values (P,))."""
    if values_S.dtype == bool:
        pieces_S, count = ndimage.label(values_S, structure)
        return pieces_S, np.ones(count, np.int64)
    pieces_S, values = np.zeros(values_S.shape, np.int32), [np.empty(0, np.int64)]
    total = 0
    for value in np.unique(values_S):
        if value > 0:
            part, count = ndimage.label(values_S == value, structure)
            np.add(part, total, out=pieces_S, where=part > 0)
            values.append(np.full(count, value, np.int64))
            total += count
    return pieces_S, np.concatenate(values)


def _meeting(out: Writable, block_vox: Shape, structure: np.ndarray) -> np.ndarray:
    """Pairs (2, P) of pieces that are neighbours across a face, an edge or a corner of blocks, each pair once."""
    found = [np.empty(0, np.uint64)]
    for axis in range(len(block_vox)):
        steps = [step for step in np.argwhere(structure) - 1 if step[axis] == 1]
        for box in blocks_of(out.shape, block_vox):
            if box[axis].stop < out.shape[axis]:
                found.append(_across(out, box, axis, steps))
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)]).astype(np.int64)


def _across(out: Writable, box: Box, axis: int, steps: list[np.ndarray]) -> np.ndarray:
    """Pairs of pieces, each packed into one number, on both sides of the face at the end of a block along an axis."""
    # Neighbours by an edge or a corner lie a voxel beside the face.
    beside = 1 if len(steps) > 1 else 0
    slab = [slice(max(0, side.start - beside), min(size, side.stop + beside)) for side, size in zip(box, out.shape, strict=True)]
    slab[axis] = slice(box[axis].stop - 1, box[axis].stop + 1)
    pieces_S = out[tuple(slab)].astype(np.uint64)
    packed = []
    for step in steps:
        here = tuple(slice(max(0, -s), size - max(0, s)) for s, size in zip(step, pieces_S.shape, strict=True))
        there = tuple(slice(max(0, s), size - max(0, -s)) for s, size in zip(step, pieces_S.shape, strict=True))
        a, b = pieces_S[here], pieces_S[there]
        both = (a > 0) & (b > 0)
        packed.append(np.unique(a[both] << np.uint64(32) | b[both]))
    return np.unique(np.concatenate(packed))
