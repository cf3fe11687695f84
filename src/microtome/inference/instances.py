"""Foreground probabilities of a volume of any size -> its objects, those that touch apart; the result does not depend on the blocks.

    probability   ->   height: depth inside of the object   ->   basins: each voxel climbs to a summit
                  ->   basins without a neck between them are one object   ->   1..N by first voxels

A watershed in which nothing is flooded. Every voxel points to its highest neighbour, so a basin is known from its neighbourhood and
from where its blocks meet, in a volume of any size. Heights look no further than `reach_vox`, so a block needs a border of that width
and no more: the blocks change how much is computed twice and not one voxel of what comes out.

References:
    Beucher, Lantuéjoul 1979, "Use of watersheds in contour detection" (the flooding of distances).
    Meyer 1994, "Topographic distance and watershed lines", doi:10.1016/0165-1684(94)90060-4 (basins as paths of steepest slope).
    Cousty et al. 2009, "Watershed cuts: minimum spanning forests and the drop of water principle", doi:10.1109/TPAMI.2008.173.
    Grimaud 1992, "New measure of contrast: the dynamics", doi:10.1117/12.60650 (which summits count).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from microtome.errors import ConfigError
from microtome.geometry import Shape, Spacing
from microtome.inference.objects import (
    MOST_PIECES,
    Box,
    Objects,
    Readable,
    Writable,
    first_voxels,
    label_blocks,
    rank_by_first,
    renumber,
    too_many,
    values_at,
)
from microtome.tiling import blocks_of

# Voxels beside a block through which paths are followed; with fewer, more paths have to be followed into the next block later.
CLIMB_VOX = 8


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """When two parts that touch are two objects. Lengths are in sides of the finest voxel.

    Attributes:
        threshold: probability from which on a voxel belongs to an object.
        seed_threshold: probability, less that of a border, from which on it belongs to the inside, which depth is measured in.
        depth_vox: a part has a summit of its own if it is deeper than its neck by this much, and
        neck: if its neck is narrower than this share of the part.
        reach_vox: depth that is told from more depth; necks wider than twice this are not seen.
        smoothing_vox: standard deviation of the Gaussian that depth is smoothed with.
        min_size_vox: objects of fewer voxels are left out.
    """

    threshold: float = 0.5
    seed_threshold: float = 0.5
    depth_vox: float = 0.5
    neck: float = 0.85
    reach_vox: int = 32
    smoothing_vox: float = 1.0
    min_size_vox: int = 0

    def __post_init__(self) -> None:
        limits = {
            "threshold": (0 < self.threshold <= 1, "above 0, 1 at most"),
            "seed_threshold": (self.threshold <= self.seed_threshold <= 1, f"threshold ({self.threshold}) or more, 1 at most"),
            "depth_vox": (self.depth_vox > 0, "above 0"),
            "neck": (0 < self.neck <= 1, "above 0, 1 at most"),
            "reach_vox": (1 <= self.reach_vox < math.inf, "1 or more"),
            "smoothing_vox": (0 <= self.smoothing_vox < math.inf, "0 or more"),
            "min_size_vox": (self.min_size_vox >= 0, "0 or more"),
        }
        for name, (good, expected) in limits.items():
            if not good:
                raise ConfigError(f"splitting: {name}", expected=expected, got=f"{getattr(self, name)}", do="change it", code="C022")


def segment_instances(
    foreground: Readable,
    out: Writable,
    rules: Splitting,
    *,
    block_vox: Shape,
    border: Readable | None = None,
    spacing_mm: Spacing | None = None,
) -> int:
    """Number the objects 1..N in the raster order of their first voxels; how many there are. The same whatever the blocks.

    Objects are parts of `foreground >= threshold` that are connected by faces. Where there is nothing to split, they are its
    connected components. Besides a block with its border, memory holds about a hundred bytes for each basin in each block.

    Args:
        foreground: uint8 (*S), probability of being inside of an object times 255; that of its border is a part of it.
        out: unsigned integers (*S); what is in it before does not matter.
        rules: when two parts are two objects.
        block_vox: sides of a block; those of the volume where it is in memory.
        border: uint8 (*S), probability of being the border of an object times 255, from a network that learned borders.
        spacing_mm: voxel size along S; without it voxels are cubes.

    Raises:
        RunError: there are more pieces of basins than `out` can number.
    """
    spacing = np.array(spacing_mm or (1.0,) * len(out.shape))
    heights = _Heights(foreground, border, rules, tuple(spacing / spacing.min()))
    basins = _Basins(out.shape, int(np.iinfo(out.dtype).max))
    for box in blocks_of(out.shape, block_vox):
        out[box] = basins.add(*heights(box), box).astype(out.dtype)
    number = basins.numbered(out, block_vox, rules)
    renumber(out, number, block_vox)
    return int(number.max())


def instances_of_labels(labels: Readable, out: Writable, *, background: int, block_vox: Shape, connectivity: int = 1) -> Objects:
    """Number the connected components of each class of `labels`, 1..N by their first voxels; `values` of what is returned are the classes.

    Parts of different classes that touch are different objects. Negative labels (not annotated) belong to none.
    """

    def objects_of(box: Box) -> np.ndarray:
        part = labels[box].astype(np.int64) + 1
        part[part == background + 1] = 0
        return part

    objects = label_blocks(objects_of, out.shape, out, block_vox, connectivity=connectivity)
    return Objects(objects.values - 1, objects.sizes_vox, objects.boxes_vox)


class _Heights:
    """The height of the voxels of a block and around it: a function of what lies within `halo` of each voxel, and of nothing else."""

    def __init__(self, foreground: Readable, border: Readable | None, rules: Splitting, sides: Spacing) -> None:
        self._foreground, self._border, self._rules, self._sides = foreground, border, rules, sides
        # Whether any voxel of an object may lie outside of what depth is measured in: not to be answered block by block.
        self._rims = border is not None or rules.seed_threshold > rules.threshold
        self._sigma = [rules.smoothing_vox / side for side in sides]
        self._radius = [math.ceil(3 * sigma) for sigma in self._sigma]
        self._halo = [math.floor(rules.reach_vox / side) + radius for side, radius in zip(sides, self._radius, strict=True)]

    def __call__(self, box: Box) -> tuple[np.ndarray, Box]:
        """(height float32 of a block and `CLIMB_VOX` around it, minus infinity outside of objects; where that lies)."""
        shape = self._foreground.shape
        wide = _widened(box, [CLIMB_VOX] * len(box), shape)
        read = _widened(wide, self._halo, shape)
        foreground = self._foreground[read]
        mask = foreground >= math.ceil(self._rules.threshold * 255)
        height = np.full(mask.shape, -np.inf, np.float32)
        if mask.any():
            inner = foreground.astype(np.float32)
            if self._border is not None:
                inner -= self._border[read]
            np.copyto(height, self._smoothed(mask, inner), where=mask)
        inside = tuple(slice(w.start - r.start, w.stop - r.start) for w, r in zip(wide, read, strict=True))
        return height[inside], wide

    def _smoothed(self, mask: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """Depth in what is surely inside, weighted by the probability, less the distance of other voxels to it."""
        solid = mask & (inner >= math.ceil(self._rules.seed_threshold * 255))
        depth = self._distance(solid) * (inner / np.float32(255))
        if self._rims:
            depth -= self._distance(~solid)
        # A width of 0 leaves an axis as it is.
        smooth: np.ndarray = ndimage.gaussian_filter(depth, self._sigma, radius=self._radius, mode="nearest")
        return smooth

    def _distance(self, mask: np.ndarray) -> np.ndarray:
        """Distance of each voxel of the mask to the nearest one outside, `reach_vox` at most; float32."""
        if mask.all():
            return np.full(mask.shape, self._rules.reach_vox, np.float32)
        distance: np.ndarray = ndimage.distance_transform_edt(mask, sampling=self._sides)
        near: np.ndarray = np.minimum(distance, self._rules.reach_vox, dtype=np.float32, casting="same_kind")
        return near


def _widened(box: Box, by: list[int], shape_vox: Shape) -> Box:
    """A box with so many voxels more on both sides along each axis, as far as the volume goes."""
    return tuple(slice(max(0, side.start - n), min(size, side.stop + n)) for side, n, size in zip(box, by, shape_vox, strict=True))


def _parents(height: np.ndarray) -> np.ndarray:
    """The flat index of the highest of each voxel and its neighbours by faces, of equally high ones the first; outside of objects itself.

    By height, then by place, all voxels are in one order: paths never circle, and a flat top ends in some summits of the same height.
    """
    flat = np.arange(height.size).reshape(height.shape)
    best, parent = np.full(height.shape, -np.inf, np.float32), flat.copy()
    axes = range(height.ndim)
    for axis, step in [*((a, -1) for a in axes), (0, 0), *((a, 1) for a in reversed(axes))]:
        size = height.shape[axis]
        here = (slice(None),) * axis + (slice(max(0, -step), size - max(0, step)),)
        there = (slice(None),) * axis + (slice(max(0, step), size - max(0, -step)),)
        higher = height[there] > best[here]
        np.copyto(best[here], height[there], where=higher)
        np.copyto(parent[here], flat[there], where=higher)
    parent[height == -np.inf] = flat[height == -np.inf]
    return parent


def _followed(parent: np.ndarray) -> np.ndarray:
    """Where the paths end that lead from each index (P,) to its parent, and on."""
    while True:
        further = parent[parent]
        if np.array_equal(further, parent):
            return parent
        parent = further


class _Basins:
    """What blocks found: pieces of basins, numbered 1..count, and the passes between them.

    A path that leaves what its block knows ends there for now, at a voxel of another block, which tells later where it leads.
    """

    def __init__(self, shape_vox: Shape, most: int) -> None:
        self.count = 0
        self._shape, self._most = shape_vox, min(most, MOST_PIECES)
        integers, floats = np.empty(0, np.int64), np.empty(0, np.float32)
        # For each piece: the place of its summit in the volume, whether the path goes on there, its height, voxels, first voxel.
        self._summits, self._open, self._heights = [integers], [np.empty(0, bool)], [floats]
        self._sizes, self._first = [integers], [integers]
        # For each pass: the two pieces (2, P) and its height.
        self._passes, self._saddles = [np.empty((2, 0), np.int64)], [floats]

    def add(self, height: np.ndarray, wide: Box, box: Box) -> np.ndarray:
        """Number the pieces of a block from its heights and those around it; int64 (*S) of the block, 0 outside of objects."""
        if not (height > -np.inf).any():
            return np.zeros(tuple(side.stop - side.start for side in box), np.int64)
        edge = np.zeros(height.shape, bool)
        for axis, (side, size) in enumerate(zip(wide, self._shape, strict=True)):
            lines = np.moveaxis(edge, axis, 0)
            lines[0] |= side.start > 0
            lines[-1] |= side.stop < size
        flat = np.arange(height.size)
        end = _followed(np.where(edge.ravel(), flat, _parents(height).ravel())).reshape(height.shape)
        core = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True))
        # A voxel more at the far sides: passes to the next blocks belong to this one.
        near = tuple(slice(side.start, side.stop + 1) for side in core)
        inside = height > -np.inf
        summits = np.unique(end[near][inside[near]])
        if self.count + len(summits) > self._most:
            raise too_many(self.count + len(summits), self._most)
        local = np.zeros(height.size, np.int64)
        local[summits] = np.arange(1, len(summits) + 1)
        pieces = np.where(inside[near], local[end[near]], 0)
        self._add_passes(pieces, height[near], tuple(side.stop - side.start for side in box))
        place = np.unravel_index(summits, height.shape)
        self._summits.append(np.ravel_multi_index(tuple(i + side.start for i, side in zip(place, wide, strict=True)), self._shape))
        self._open.append(edge.ravel()[summits])
        self._heights.append(height.ravel()[summits])
        pieces = pieces[tuple(slice(0, side.stop - side.start) for side in box)]
        self._sizes.append(np.bincount(pieces.ravel(), minlength=len(summits) + 1)[1:])
        self._first.append(first_voxels(pieces, len(summits), box, self._shape))
        numbered = np.where(pieces > 0, pieces + self.count, 0)
        self.count += len(summits)
        return numbered

    def _add_passes(self, pieces: np.ndarray, height: np.ndarray, block: Shape) -> None:
        """The highest voxels between each two pieces of a block and the voxel beyond its far sides."""
        keys, saddles = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        many = int(pieces.max(initial=0)) + 1
        for axis in range(pieces.ndim):
            here = tuple(slice(0, min(n, size - (a == axis))) for a, (n, size) in enumerate(zip(block, pieces.shape, strict=True)))
            there = tuple(slice(1, side.stop + 1) if a == axis else side for a, side in enumerate(here))
            a, b = pieces[here], pieces[there]
            meet = (a > 0) & (b > 0) & (a != b)
            keys.append(np.minimum(a[meet], b[meet]) * many + np.maximum(a[meet], b[meet]))
            saddles.append(np.minimum(height[here][meet], height[there][meet]))
        key, saddle = _highest(np.concatenate(keys), np.concatenate(saddles))
        self._passes.append(np.stack([key // many, key % many]) - 1 + self.count)
        self._saddles.append(saddle)

    def numbered(self, out: Readable, block_vox: Shape, rules: Splitting) -> np.ndarray:
        """The number of each piece's object, 0 for piece 0 and for those of objects that are too small; `out` holds the pieces."""
        summits, basin = np.unique(np.concatenate(self._summits), return_inverse=True)
        heights, open_end = np.empty(len(summits)), np.zeros(len(summits), bool)
        heights[basin] = np.concatenate(self._heights)
        open_end[basin] = np.concatenate(self._open)
        leads = np.arange(len(summits))
        # A voxel that one block does not see beyond may be the summit of its own, and then leads to itself.
        ends = np.flatnonzero(open_end)
        leads[ends] = basin[values_at(out, summits[ends], block_vox).astype(np.int64) - 1]
        basin = _followed(leads)[basin]
        pairs = basin[np.concatenate(self._passes, axis=1)]
        merged = _merged(heights, pairs, np.concatenate(self._saddles).astype(np.float64), rules)[basin]
        return self._ranked(np.unique(merged, return_inverse=True)[1], rules.min_size_vox)

    def _ranked(self, group: np.ndarray, min_size_vox: int) -> np.ndarray:
        """Objects 0..G-1 of the pieces -> numbers in the order of first voxels, none left out but those of small objects."""
        sizes_piece, first = np.concatenate(self._sizes), np.concatenate(self._first)
        # Pieces that only the neighbours of a block belong to have no voxel in it.
        first[sizes_piece == 0] = np.iinfo(np.int64).max
        number, order = rank_by_first(group, first)
        sizes = np.zeros(len(number), np.int64)
        np.add.at(sizes, group, sizes_piece)
        stay = sizes[order] >= min_size_vox
        dense = np.where(stay, np.cumsum(stay), 0)
        return np.concatenate([[0], dense[number[group] - 1]])


def _highest(keys: np.ndarray, saddles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct keys, the largest of the saddles of each)."""
    found, index = np.unique(keys, return_inverse=True)
    highest = np.full(len(found), -np.inf, saddles.dtype)
    np.maximum.at(highest, index, saddles)
    return found, highest


def _merged(heights: np.ndarray, pairs: np.ndarray, saddles: np.ndarray, rules: Splitting) -> np.ndarray:
    """For each basin the one that stands for its object: from the highest pass on, basins that it hardly separates are one.

    Which basins come first among equal ones is told by their places, so that the order of the blocks does not matter.
    """
    pairs, saddles = pairs[:, pairs[0] != pairs[1]], saddles[pairs[0] != pairs[1]]
    key, saddles = _highest(pairs.min(axis=0) * len(heights) + pairs.max(axis=0), saddles)
    pairs = np.stack([key // max(1, len(heights)), key % max(1, len(heights))])
    # Summits only rise when basins merge, and the higher they are the lower a pass must be: others cannot merge later either.
    hopeful = np.flatnonzero(_is_one(heights[pairs].min(axis=0), saddles, rules))
    hopeful = hopeful[np.lexsort((key[hopeful], -saddles[hopeful]))]
    root, summit = list(range(len(heights))), heights.tolist()
    for a, b, saddle in zip(*pairs[:, hopeful].tolist(), saddles[hopeful].tolist(), strict=True):
        a, b = _root(root, a), _root(root, b)
        if a != b and _is_one(min(summit[a], summit[b]), saddle, rules):
            root[max(a, b)] = min(a, b)
            summit[min(a, b)] = max(summit[a], summit[b])
    return _followed(np.array(root, np.int64))


def _is_one(low: Any, saddle: Any, rules: Splitting) -> Any:
    """Whether a pass is too high for the lower summit beside it to be of another object; a summit outside of what is surely inside is none.

    Numbers or arrays of them.
    """
    return (low <= 0) | (saddle > low - rules.depth_vox) | (saddle > low * rules.neck)


def _root(root: list[int], item: int) -> int:
    """What stands for the set of an item; the path to it gets shorter."""
    while root[item] != item:
        root[item] = root[root[item]]
        item = root[item]
    return item
