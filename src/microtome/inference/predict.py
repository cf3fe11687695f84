"""An image of any size -> labels: tiles along the slowest axis, a slab of logits at a time.

Weighted logits of overlapping tiles are added up in a slab as deep as one tile. Rows that no tile to come can touch
are divided by their weights, brought to the original grid a few rows at a time, turned into labels and freed, so that
memory holds a slab of all classes, never all classes of the whole image, nor any of the original grid.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from microtome.config import Plan
from microtome.geometry import Shape, Spacing
from microtome.preprocess import CHUNK_VALUES, Band, Resampler, grid_shape, normalise, resample
from microtome.tiling import Tile, blend_weights, cover, read_mirrored

Engine = Callable[[np.ndarray], np.ndarray]


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
    prepared = resample(normalise(array, plan.normalisation), grid_shape(shape, spacing_mm, plan), plan.interpolation)
    if len(shape) == plan.dims:
        return _labels(prepared, shape, plan, network, engine)
    return np.stack([_labels(prepared[:, z], shape[1:], plan, network, engine) for z in range(shape[0])])


def _labels(prepared: np.ndarray, shape_vox: Shape, plan: Plan, network: Sized, engine: Engine) -> np.ndarray:
    """Classes (*S) on the original grid of a prepared image (C, *grid)."""
    labels = np.empty(shape_vox, np.int16)
    grid = tuple(prepared.shape[1:])
    # A common factor of all classes changes no winner, unless voxels of different factors are then interpolated.
    slabs = logit_slabs(prepared, plan, network, engine, divided=grid != tuple(shape_vox))
    for first, logits_KS in on_grid(slabs, grid, shape_vox):
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


def logit_slabs(
    prepared: np.ndarray, plan: Plan, network: Sized, engine: Engine, *, divided: bool = True
) -> Iterator[tuple[int, np.ndarray]]:
    """Blended logits of a prepared image (C, *S), from the first row to the last: (first row, (K, rows, *S[1:])).

    Args:
        prepared: float32, on the plan's grid.
        plan: of the network.
        network: what sizes it takes.
        engine: a tile's image (C, *read) -> its logits (K, *blend).
        divided: False leaves the sums undivided by their weights: enough to tell the best class.

    Yields:
        arrays that the next step overwrites: copy what is to be kept.
    """
    shape = prepared.shape[1:]
    tile = choose_tile(shape, plan, network)
    parts = cover(shape, tile, overlap=plan.overlap, context_vox=(network.context_vox,) * len(shape))
    if len(parts) == 1:
        logits_KS = engine(read_mirrored(prepared, parts[0].read))
        inside = tuple(slice(-first, size - first) for (first, _), size in zip(parts[0].blend, shape, strict=True))
        yield 0, logits_KS[(slice(None), *inside)]
        return
    slab = _Slab(shape, tile, classes=len(plan.classes), divided=divided)
    for part in parts:
        yield from slab.advance(max(part.blend[0][0], 0))
        slab.add(part, engine(read_mirrored(prepared, part.read)))
    yield from slab.advance(shape[0])


class _Slab:
    """Sums of weighted logits, and of the weights, for the rows that tiles can still touch.

    Row r of the image lies at r modulo the slab's depth, so that no row is ever moved.
    """

    def __init__(self, shape_vox: Shape, tile: Shape, *, classes: int, divided: bool) -> None:
        self.shape, self.first, self.depth = shape_vox, 0, min(tile[0], shape_vox[0])
        self.tile_weights = blend_weights(tile)
        self.logits = np.zeros((classes, self.depth, *shape_vox[1:]), np.float32)
        self.weights = np.zeros((self.depth, *shape_vox[1:]), np.float32) if divided else None

    def add(self, tile: Tile, logits_KS: np.ndarray) -> None:
        """Add the part of a tile's output that lies inside of the image."""
        inside = [(max(a, 0), min(b, n)) for (a, b), n in zip(tile.blend, self.shape, strict=True)]
        source = [slice(a - t, b - t) for (a, b), (t, _) in zip(inside, tile.blend, strict=True)]
        logits_KS, weights = logits_KS[(slice(None), *source)], self.tile_weights[tuple(source)]
        rest = tuple(slice(a, b) for a, b in inside[1:])
        # Products of a few rows of one class at a time stay in the processor's cache.
        few = max(1, CHUNK_VALUES // 8 // math.prod(weights.shape[1:]))
        products = np.empty((min(few, len(weights)), *weights.shape[1:]), np.float32)
        for first, past in self._places(*inside[0], few):
            rows = slice(first - inside[0][0], past - inside[0][0])
            place = (slice(first % self.depth, first % self.depth + past - first), *rest)
            if self.weights is not None:
                self.weights[place] += weights[rows]
            for sums, logits in zip(self.logits, logits_KS, strict=True):
                sums[place] += np.multiply(logits[rows], weights[rows], out=products[: past - first])

    def advance(self, row: int) -> Iterator[tuple[int, np.ndarray]]:
        """Hand out the rows before `row`, which no later tile touches, and make room for as many new ones."""
        for first, past in self._places(self.first, row, self.depth):
            place = slice(first % self.depth, first % self.depth + past - first)
            logits = self.logits[:, place]
            if self.weights is not None:
                logits /= self.weights[place]
                self.weights[place] = 0
            yield first, logits
            logits[...] = 0
        self.first = max(row, self.first)

    def _places(self, first: int, past: int, most: int) -> Iterator[tuple[int, int]]:
        """Rows first..past in pieces of at most `most`, none of which runs over the slab's end."""
        while first < past:
            until = min(past, first + most, first - first % self.depth + self.depth)
            yield first, until
            first = until


def on_grid(slabs: Iterator[tuple[int, np.ndarray]], grid: Shape, shape_vox: Shape) -> Iterator[tuple[int, np.ndarray]]:
    """Slabs of logits on the network's grid, linearly interpolated to the original grid a few rows at a time, once complete.

    The next step overwrites what was handed out.
    """
    if tuple(grid) == tuple(shape_vox):
        yield from slabs
        return
    resampler: Resampler | None = None
    waiting: deque[Band] = deque()
    # Rows of slabs before that some output still needs, from row `base` on.
    kept, base = np.empty(0), 0
    for first, part in slabs:
        if resampler is None:
            resampler = Resampler(grid, shape_vox, len(part), values=CHUNK_VALUES)
            waiting.extend(resampler.rows)
            kept = part[:, :0]
        past = first + part.shape[1]
        while waiting and waiting[0].high <= past:
            band = waiting.popleft()
            rows = part[:, max(band.low - first, 0) : band.high - first]
            if band.low < first:
                rows = np.concatenate([kept[:, band.low - base :], rows], axis=1)
            yield band.first, resampler(band, rows)
        low = waiting[0].low if waiting else past
        kept, base = (part[:, low - first :].copy(), low) if low >= first else (np.concatenate([kept[:, low - base :], part], axis=1), low)


def best_class(logits_KS: np.ndarray) -> np.ndarray:
    """Index of the largest logit at each voxel, int16; the first of equals.

    A running maximum, because NumPy's argmax over a leading axis walks memory across its grain; a few rows at a time,
    so that they stay in the processor's cache from class to class.
    """
    classes, depth, *plane = logits_KS.shape
    result = np.empty((depth, *plane), np.int16)
    rows = min(depth, max(1, CHUNK_VALUES // 8 // max(1, math.prod(plane))))
    kind = np.uint8 if classes <= 256 else np.int16
    best, leads = np.empty((rows, *plane), np.float32), np.empty((rows, *plane), bool)
    number, index = np.empty((rows, *plane), kind), np.empty((rows, *plane), kind)
    for start in range(0, depth, rows):
        part = logits_KS[:, start : start + rows]
        few = slice(0, part.shape[1])
        best[few], index[few] = part[0], 0
        for k, layer in enumerate(part[1:], start=1):
            np.greater(layer, best[few], out=leads[few])
            # Later classes have larger numbers: the largest number that ever led is the last that did. No masked writing.
            np.multiply(leads[few], kind(k), out=number[few])
            np.maximum(index[few], number[few], out=index[few])
            np.maximum(best[few], layer, out=best[few])
        result[start : start + rows] = index[few]
    return result
