"""An image of any size -> labels: tiles along the slowest axis, a slab of logits at a time.

Weighted logits of overlapping tiles are added up in a slab as deep as one tile. Rows that no tile to come can touch
are divided by their weights, brought to the original grid, turned into labels and freed, so that memory holds
a slab of all classes, never all classes of the whole image.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from microtome.config import Plan
from microtome.geometry import Shape, Spacing
from microtome.preprocess import apply_along, grid_shape, normalise, resample, resampling_matrix
from microtome.tiling import Tile, blend_weights, cover, read_mirrored

Engine = Callable[[np.ndarray], np.ndarray]

# Logits that are brought to the original grid at a time: 64 MB of float32.
CHUNK_VALUES = 1 << 24


class Sized(Protocol):
    """What a network tells about the sizes that it takes."""

    context_vox: int

    def nearest_sizes(self, n: int, axis: int) -> tuple[int, int]:
        """The nearest sizes that fit, below or equal and above or equal."""


def predict_labels(array: np.ndarray, spacing_mm: Spacing, *, plan: Plan, network: Sized, engine: Engine) -> np.ndarray:
    """Class of each voxel: `(C, *S)` in the file's grey values -> (*S) int16 on the same grid.

    A 2D network sees a volume section by section.
    """
    shape = tuple(array.shape[1:])
    prepared = resample(normalise(array, plan.normalisation), grid_shape(shape, spacing_mm, plan))
    if len(shape) == plan.dims:
        return _labels(prepared, shape, plan, network, engine)
    return np.stack([_labels(prepared[:, z], shape[1:], plan, network, engine) for z in range(shape[0])])


def _labels(prepared: np.ndarray, shape_vox: Shape, plan: Plan, network: Sized, engine: Engine) -> np.ndarray:
    """Classes (*S) on the original grid of a prepared image (C, *grid)."""
    labels = np.empty(shape_vox, np.int16)
    slabs = logit_slabs(prepared, plan, network, engine)
    for first, logits_KS in on_grid(slabs, prepared.shape[1:], shape_vox):
        labels[first : first + logits_KS.shape[1]] = best_class(logits_KS)
    return labels


def choose_tile(shape_vox: Shape, plan: Plan, network: Sized) -> Shape:
    """The network's output size for this image: the whole image if a training step held as many voxels, else less.

    What fitted into memory with gradients for `batch` patches fits without them for one tile of that size.
    """
    context = network.context_vox

    def fitting(size: int, axis: int) -> int:
        return network.nearest_sizes(size + 2 * context, axis)[1] - 2 * context

    tile = [min(fitting(patch - 2 * context, i), fitting(shape_vox[i], i)) for i, patch in enumerate(plan.patch_vox)]
    budget = np.prod(plan.patch_vox) * plan.batch
    while True:
        # Grow the axis that is cut into most tiles; fewer seams, less computed twice.
        cuts = [(size / side, i) for i, (size, side) in enumerate(zip(shape_vox, tile, strict=True)) if side < size]
        if not cuts:
            return tuple(tile)
        axis = max(cuts)[1]
        larger = [min(fitting(2 * n, i), fitting(shape_vox[i], i)) if i == axis else n for i, n in enumerate(tile)]
        if np.prod([n + 2 * context for n in larger]) > budget or larger == tile:
            return tuple(tile)
        tile = larger


def logit_slabs(prepared: np.ndarray, plan: Plan, network: Sized, engine: Engine) -> Iterator[tuple[int, np.ndarray]]:
    """Blended logits of a prepared image (C, *S): (first row, (K, rows, *S[1:])) from the first row to the last."""
    shape = prepared.shape[1:]
    tile = choose_tile(shape, plan, network)
    weights = blend_weights(tile)
    context = (network.context_vox,) * len(shape)
    slab = _Slab(shape, tile[0], classes=len(plan.classes))
    for part in cover(shape, tile, overlap=plan.overlap, context_vox=context):
        yield from slab.advance(max(part.blend[0][0], 0))
        slab.add(part, engine(read_mirrored(prepared, part.read)), weights)
    yield from slab.advance(shape[0])


class _Slab:
    """Sums of weighted logits, and of the weights, for the rows that tiles can still touch."""

    def __init__(self, shape_vox: Shape, depth: int, classes: int) -> None:
        self.shape, self.first = shape_vox, 0
        rows = min(depth, shape_vox[0])
        self.logits = np.zeros((classes, rows, *shape_vox[1:]), np.float32)
        self.weights = np.zeros((rows, *shape_vox[1:]), np.float32)

    def add(self, tile: Tile, logits_KS: np.ndarray, weights: np.ndarray) -> None:
        """Add the part of a tile's output that lies inside of the image."""
        inside = [(max(a, 0), min(b, n)) for (a, b), n in zip(tile.blend, self.shape, strict=True)]
        source = tuple(slice(a - t, b - t) for (a, b), (t, _) in zip(inside, tile.blend, strict=True))
        offset = (self.first, *[0] * (len(inside) - 1))
        target = tuple(slice(a - o, b - o) for (a, b), o in zip(inside, offset, strict=True))
        self.logits[(slice(None), *target)] += logits_KS[(slice(None), *source)] * weights[source]
        self.weights[target] += weights[source]

    def advance(self, row: int) -> Iterator[tuple[int, np.ndarray]]:
        """Hand out the rows before `row`, which no later tile touches, and make room for as many new ones."""
        done = row - self.first
        if done <= 0:
            return
        done = min(done, self.weights.shape[0])
        yield self.first, self.logits[:, :done] / self.weights[:done]
        keep = self.weights.shape[0] - done
        for array, axis in ((self.logits, 1), (self.weights, 0)):
            moved = np.moveaxis(array, axis, 0)
            moved[:keep] = moved[done:].copy()
            moved[keep:] = 0
        self.first = row


def on_grid(slabs: Iterator[tuple[int, np.ndarray]], grid: Shape, shape_vox: Shape) -> Iterator[tuple[int, np.ndarray]]:
    """Slabs of logits on the network's grid, linearly interpolated to the original grid, as soon as they are complete."""
    if tuple(grid) == tuple(shape_vox):
        yield from slabs
        return
    matrices = [resampling_matrix(a, b) for a, b in zip(grid, shape_vox, strict=True)]
    # Last source row that each output row needs; rows wait until it has come.
    needs = np.maximum.reduceat(matrices[0].indices, matrices[0].indptr[:-1])
    waiting: np.ndarray | None = None
    base = written = 0
    for first, part in slabs:
        waiting = part if waiting is None else np.concatenate([waiting, part], axis=1)
        ready = int(np.searchsorted(needs, first + part.shape[1]))
        if ready == written:
            continue
        while written < ready:
            # A few rows at a time, or a coarse grid of one tile would become all classes of the whole image.
            until = min(ready, written + max(1, CHUNK_VALUES // (len(waiting) * math.prod(shape_vox[1:]))))
            rows = apply_along(matrices[0][written:until][:, base : base + waiting.shape[1]], waiting, 1)
            for axis, matrix in enumerate(matrices[1:], start=2):
                rows = apply_along(matrix, rows, axis)
            yield written, rows
            written = until
        if written < len(needs):
            # Everything before the first row that is still needed can go.
            keep = int(matrices[0][[written]].indices.min()) - base
            waiting, base = waiting[:, keep:], base + keep


def best_class(logits_KS: np.ndarray) -> np.ndarray:
    """Index of the largest logit at each voxel, int16; the first of equals.

    A running maximum, because NumPy's argmax over a leading axis walks memory across its grain.
    """
    best = logits_KS[0].copy()
    result = np.zeros(best.shape, np.int16)
    for k, layer in enumerate(logits_KS[1:], start=1):
        result[layer > best] = k
        np.maximum(best, layer, out=best)
    return result
