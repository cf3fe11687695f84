"""Tiles that cover an image of any size; pure geometry, no arrays of pixels.

image along one axis      |----------------------------------|
tile 0   read         <===[=========]===>                         <> context, mirrored outside
blend            [=========]                             where its output is added
write            [======]                                its own part: writes partition the image
tile 1   blend                  [=========]
write                   [=====]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from microtome.geometry import Shape

Span = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """One tile: three boxes, each a (first, past-the-end) pair along every axis of S.

    Attributes:
        read: what the network is given; may reach outside of the image, where it is mirrored.
        blend: where the network's output lies; may reach outside when the image is smaller than a tile.
        write: the part that this tile answers for; all writes together are the image, once.
    """

    read: tuple[Span, ...]
    blend: tuple[Span, ...]
    write: tuple[Span, ...]


def starts(size: int, tile: int, overlap: float) -> list[int]:
    """First indices of the fewest tiles that cover `size` voxels with at least this share of overlap, evenly spread."""
    if size <= tile:
        return [-((tile - size) // 2)]
    # 20 * (1 - 0.9) is a hair below 2.
    step = max(1, int(tile * (1 - overlap) + 1e-9))
    count = 1 + -(-(size - tile) // step)
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def cover(
    shape_vox: Shape, tile_vox: Shape, *, overlap: float = 0.5, context_vox: Shape | None = None, box: Sequence[Span] | None = None
) -> list[Tile]:
    """Tiles in the order of the slowest axis.

    Args:
        shape_vox: the image, S.
        tile_vox: the network's output size, S (its input is larger by the context on both sides).
        overlap: share of a tile that the next one covers too, at least.
        context_vox: border that the network loses on each side along each axis.
        box: only those whose output touches this box, the same tiles as among all.
    """
    context_vox = context_vox or (0,) * len(shape_vox)
    axes = [_axis_tiles(*sizes, overlap) for sizes in zip(shape_vox, tile_vox, context_vox, strict=True)]
    if box is not None:
        axes = [
            [spans for spans in axis if spans[1][0] < past and first < spans[1][1]] for axis, (first, past) in zip(axes, box, strict=True)
        ]
    return [Tile(*(tuple(part) for part in zip(*spans, strict=True))) for spans in product(*axes)]


def _axis_tiles(size: int, tile: int, context: int, overlap: float) -> list[tuple[Span, Span, Span]]:
    """(read, blend, write) of each tile along one axis; writes meet in the middle of an overlap."""
    first = starts(size, tile, overlap)
    cuts = [0, *((a + tile + b) // 2 for a, b in pairwise(first)), size]
    return [((s - context, s + tile + context), (s, s + tile), (cuts[i], cuts[i + 1])) for i, s in enumerate(first)]


def blocks_of(shape_vox: Shape, block_vox: Shape) -> Iterator[tuple[slice, ...]]:
    """Boxes (*S) that make up an array once, cut at multiples of a block's sides, in the order of the slowest axis."""
    for place in np.ndindex(*(-(-size // side) for size, side in zip(shape_vox, block_vox, strict=True))):
        yield tuple(slice(i * side, min(size, (i + 1) * side)) for i, side, size in zip(place, block_vox, shape_vox, strict=True))


def blend_weights(tile_vox: Shape, sigma: float = 1 / 8) -> np.ndarray:
    """Weights (*S) of a tile's voxels, a Gaussian of sd `sigma` x side, 1 in the middle, nowhere 0; float32."""
    weights = np.ones((), np.float64)
    for side in tile_vox:
        offset = (np.arange(side) - (side - 1) / 2) / (side * sigma)
        weights = np.multiply.outer(weights, np.exp(-(offset**2) / 2))
    # Far corners of large 3D tiles underflow in bf16 sums; 1e-3 keeps every voxel covered.
    result: np.ndarray = np.maximum(weights / weights.max(), 1e-3).astype(np.float32)
    return result


def read_mirrored(array: np.ndarray, box: tuple[Span, ...]) -> np.ndarray:
    """A copy of a box (*S) of `array` (..., *S); outside, the array is mirrored at its border voxels, again and again."""
    lead = array.ndim - len(box)
    inside = [(max(a, 0), min(b, n)) for (a, b), n in zip(box, array.shape[lead:], strict=True)]
    if inside == list(box):
        window = (slice(None),) * lead + tuple(slice(a, b) for a, b in box)
        return np.array(array[window], order="C")
    for axis, (a, b) in enumerate(box):
        array = array.take(folded(np.arange(a, b), array.shape[lead + axis]), axis=lead + axis)
    return array


def folded(index: np.ndarray, size: int) -> np.ndarray:
    """Indices folded into 0..size-1: ... 2 1 [0 1 2 .. n-1] n-2 n-3 ..."""
    if size == 1:
        return np.zeros_like(index)
    turned = np.abs(index) % (2 * size - 2)
    result: np.ndarray = np.minimum(turned, 2 * size - 2 - turned)
    return result
