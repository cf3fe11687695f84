"""Logits of overlapping tiles -> blended logits, a slab at a time: of a whole image, or of any box of it.

Weighted logits are added up in a slab as deep as one tile. Rows that no tile to come can touch are divided by their weights,
brought to the original grid a few rows at a time, handed out and freed, so that memory holds a slab of all classes, never all
classes of the whole image. A voxel gets the same tiles in the same order in whichever box it is computed: the same sums, bit for bit.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from microtome.geometry import Shape
from microtome.preprocess import CHUNK_VALUES, Band, Resampler
from microtome.tiling import Span, Tile, blend_weights

Box = tuple[Span, ...]
# (first row, logits (L, rows, *plane)): the next step overwrites them.
Slabs = Iterator[tuple[int, np.ndarray]]


def blended(answers: Iterable[tuple[Tile, np.ndarray]], box: Box, tile_vox: Shape, *, alone: bool, divided: bool = True) -> Slabs:
    """Blended logits of a box, from its first row to its last.

    Args:
        answers: all tiles that touch the box, as `cover` has them, each with its logits (L, *tile).
        box: inside of the image, on the grid of the tiles.
        tile_vox: the shape of every tile's output.
        alone: no two tiles overlap, and each is as large as the plane.
        divided: False leaves the sums undivided by their weights: enough to tell the best class.
    """
    if alone:
        for tile, logits_LS in answers:
            inside = [(max(a, first), min(b, past)) for (a, b), (first, past) in zip(tile.blend, box, strict=True)]
            yield inside[0][0], logits_LS[(slice(None), *(slice(a - t, b - t) for (a, b), (t, _) in zip(inside, tile.blend, strict=True)))]
        return
    slab: _Slab | None = None
    for tile, logits_LS in answers:
        if slab is None:
            slab = _Slab(box, tile_vox, layers=len(logits_LS), divided=divided)
        yield from slab.advance(tile.blend[0][0])
        slab.add(tile, logits_LS)
    assert slab is not None, "some tile touches every box"
    yield from slab.advance(box[0][1])


class _Slab:
    """Sums of weighted logits, and of the weights, for the rows that tiles can still touch.

    Row r lies at r modulo the slab's depth, so that no row is ever moved.
    """

    def __init__(self, box: Box, tile: Shape, *, layers: int, divided: bool) -> None:
        self.box, self.first = box, box[0][0]
        self.depth = min(tile[0], box[0][1] - box[0][0])
        plane = tuple(b - a for a, b in box[1:])
        self.tile_weights = blend_weights(tile)
        self.logits = np.zeros((layers, self.depth, *plane), np.float32)
        self.weights = np.zeros((self.depth, *plane), np.float32) if divided else None

    def add(self, tile: Tile, logits_LS: np.ndarray) -> None:
        """Add the part of a tile's output that lies in the box."""
        inside = [(max(a, first), min(b, past)) for (a, b), (first, past) in zip(tile.blend, self.box, strict=True)]
        source = [slice(a - t, b - t) for (a, b), (t, _) in zip(inside, tile.blend, strict=True)]
        logits_LS, weights = logits_LS[(slice(None), *source)], self.tile_weights[tuple(source)]
        rest = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(inside[1:], self.box[1:], strict=True))
        # Products of a few rows of one class at a time stay in the processor's cache.
        few = max(1, CHUNK_VALUES // 8 // max(1, math.prod(weights.shape[1:])))
        products = np.empty((min(few, len(weights)), *weights.shape[1:]), np.float32)
        for first, past in self._places(*inside[0], few):
            rows = slice(first - inside[0][0], past - inside[0][0])
            place = (slice(first % self.depth, first % self.depth + past - first), *rest)
            if self.weights is not None:
                self.weights[place] += weights[rows]
            for sums, logits in zip(self.logits, logits_LS, strict=True):
                sums[place] += np.multiply(logits[rows], weights[rows], out=products[: past - first])

    def advance(self, row: int) -> Slabs:
        """Hand out the rows before `row`, which no later tile touches, and make room for as many new ones."""
        for first, past in self._places(self.first, min(row, self.box[0][1]), self.depth):
            place = slice(first % self.depth, first % self.depth + past - first)
            logits = self.logits[:, place]
            if self.weights is not None:
                logits /= self.weights[place]
                self.weights[place] = 0
            yield first, logits
            logits[...] = 0
        self.first = max(row, self.first)

    def _places(self, first: int, past: int, most: int) -> Iterator[Span]:
        """Rows first..past in pieces of at most `most`, none of which runs over the slab's end."""
        while first < past:
            until = min(past, first + most, first - first % self.depth + self.depth)
            yield first, until
            first = until


class Restoring:
    """How a box of the original grid is made of logits on the network's grid.

    Args:
        grid: the network's.
        shape_vox: the original one.
        box: inside of the original; its rows begin and end with bricks.
        brick: rows of the original grid that are made together, if it is made in several boxes.

    Attributes:
        needed: the box of the network's grid that it takes.
    """

    def __init__(self, grid: Shape, shape_vox: Shape, box: Box, brick: int | None = None) -> None:
        self.box, self.needed, self.brick = box, box, brick
        self.same = tuple(grid) == tuple(shape_vox)
        self._grid, self._shape = grid, shape_vox
        if self.same:
            return
        # One layer is enough to learn which samples are needed.
        found = Resampler(grid, shape_vox, 1, plane=box[1:], brick=brick)
        bands = [band for band in found.rows if band.first < box[0][1] and band.last > box[0][0]]
        self.needed = ((min(band.low for band in bands), max(band.high for band in bands)), *found.source_plane)

    def __call__(self, slabs: Slabs) -> Slabs:
        """Slabs of `needed` -> rows of `box`, linearly interpolated a few at a time, once complete; the next step overwrites them."""
        return slabs if self.same else self._restored(slabs)

    def _restored(self, slabs: Slabs) -> Slabs:
        resampler: Resampler | None = None
        waiting: deque[Band] = deque()
        # Rows of slabs before that some output still needs, from row `base` on.
        kept, base = np.empty(0), 0
        begin, end = self.box[0]
        for first, part in slabs:
            if resampler is None:
                resampler = Resampler(self._grid, self._shape, len(part), values=CHUNK_VALUES, plane=self.box[1:], brick=self.brick)
                waiting.extend(band for band in resampler.rows if band.first < end and band.last > begin)
                kept = part[:, :0]
            past = first + part.shape[1]
            while waiting and waiting[0].high <= past:
                band = waiting.popleft()
                rows = part[:, max(band.low - first, 0) : band.high - first]
                if band.low < first:
                    rows = np.concatenate([kept[:, band.low - base :], rows], axis=1)
                made = resampler(band, rows)
                low, high = max(band.first, begin), min(band.last, end)
                yield low, made[:, low - band.first : high - band.first]
            low = waiting[0].low if waiting else past
            kept, base = (
                (part[:, low - first :].copy(), low) if low >= first else (np.concatenate([kept[:, low - base :], part], axis=1), low)
            )
