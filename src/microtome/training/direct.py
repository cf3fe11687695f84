"""Patches straight from chunked stores: what training must know of a case that no memory holds, and views of its image and label.

    store   --read by parts-->   counts, places of classes, mean and sd, quantiles   (once; kept in one small file)
    store   --a part-->          what `preparing.prepare` would have stored there    (each patch; nothing is copied)

Bit for bit what the ordinary road gives, as long as a chunk's depth of whole planes is no more than `parts.MOST_READ` values: then
parts come in the order of the whole. Beyond, sums differ by their last digits, and the voxels that are drawn are others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.parts import MOST_READ, MOST_SEEN, looked_at, parts_of
from microtome.data.reading import LabelParts
from microtome.geometry import Shape
from microtome.images.volume import Volume
from microtome.training.arrays import Scale
from microtome.training.preparing import VOXELS_A_CLASS, between, class_counts, quantile_places, scale_of
from microtome.training.statistics import Blocks, Lower, Upper, count_of, fill_of, filled, squares_about, sum_of, sweep


class Facts(NamedTuple):
    """What training must know of a case before it draws.

    Attributes:
        voxels: for each class that it holds, up to 2000 voxel indices (N, D).
        counts: how many voxels of each class it holds; an estimate where a sample was counted.
        quantiles: (C, 257) float32 of the grey values.
        scale: what makes the values of `DirectImage` the network's grey values; None: they are.
        fill: (C,) what stands for values that are not finite.
    """

    voxels: Mapping[int, np.ndarray]
    counts: Mapping[int, int]
    quantiles: np.ndarray
    scale: Scale | None
    fill: np.ndarray


@dataclass(frozen=True)
class DirectImage:
    """The image of a case (C, *S) in its own store, parts of which are read when they are asked for.

    Attributes:
        volume: of the store.
        fill: (C,) what stands for values that are not finite.
    """

    volume: Volume
    fill: np.ndarray

    @property
    def shape(self) -> Shape:
        """(C, *S)."""
        return tuple(self.volume.pixels.shape)

    def __getitem__(self, part: Any) -> np.ndarray:
        box, kept = _slices(part, self.shape)
        values: np.ndarray = filled(self.volume.pixels[box], self.fill[box[0]])[kept]
        return values


@dataclass(frozen=True)
class DirectLabel:
    """The label of a case (*S) int16 in its own store, -1 where not annotated.

    Attributes:
        parts: classes by part.
    """

    parts: LabelParts

    @property
    def shape(self) -> Shape:
        """S."""
        return self.parts.shape

    def __getitem__(self, part: Any) -> np.ndarray:
        box, kept = _slices(part, self.shape)
        return np.asarray(self.parts[box][kept])


def open_views(dataset: Dataset, case: Case, fill: np.ndarray) -> tuple[DirectImage, DirectLabel]:
    """A case's image and label where they are; the fill as `gather` found it.

    Raises:
        DataError: one of them cannot be opened, or they are not on one grid.
    """
    return DirectImage(dataset.open_image(case), fill), DirectLabel(dataset.open_label(case))


def gather(dataset: Dataset, case: Case, plan: Plan, rng: np.random.Generator, most: int = MOST_SEEN) -> Facts:
    """What must be known of a case, from some readings of all of it, part by part.

    Args:
        dataset: that the case is of.
        case: one that `roads.road_of` sends this way.
        plan: how grey values are scaled.
        rng: draws the voxels that are noted; from the same state the same as on the ordinary road.
        most: values of more than which classes and quantiles are told from a fixed sample of parts; mean and sd never are.
    """
    volume, label = dataset.open_image(case), dataset.open_label(case)
    counts, voxels = find_classes(label, rng, most)
    fill, scale, ends = _grey(volume, plan, most)
    return Facts(voxels, counts, between(ends, count_of(looked_at(volume, most)[0]), scale), scale, fill)


class Labelled(Protocol):
    """A label map of which parts are read."""

    @property
    def volume(self) -> Volume:
        """What it lies in: its chunks say in which parts it is read."""

    @property
    def shape(self) -> Shape:
        """S."""

    def __getitem__(self, part: tuple[slice, ...], /) -> np.ndarray:
        """Classes (*part) int16, -1 where not annotated."""


def find_classes(label: Labelled, rng: np.random.Generator, most: int = MOST_SEEN) -> tuple[dict[int, int], dict[int, np.ndarray]]:
    """How many voxels each class has, and some of them drawn as `draw_voxels` does: by their number among those of the class."""
    boxes, share = looked_at(label.volume, most)
    counts: dict[int, int] = {}
    for box in boxes:
        for k, count in class_counts(label[box]).items():
            counts[k] = counts.get(k, 0) + count
    counts = dict(sorted(counts.items()))
    wanted = {
        k: rng.choice(count, VOXELS_A_CLASS, replace=False) if count > VOXELS_A_CLASS else np.arange(count) for k, count in counts.items()
    }
    voxels = _places(label, boxes, wanted)
    if share < 1:
        counts = _estimated(counts, count_of(boxes), math.prod(label.shape))
    return counts, voxels


def _places(label: Labelled, boxes: Sequence[tuple[slice, ...]], wanted: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Indices (N, D) int32 of voxels of each class, given their numbers (N,) among all of it in the order of the boxes."""
    orders = {k: np.argsort(numbers, kind="stable") for k, numbers in wanted.items()}
    found = {k: np.empty((len(numbers), len(label.shape)), np.int32) for k, numbers in wanted.items()}
    before = dict.fromkeys(wanted, 0)
    for box in boxes:
        starts = [side.start for side in box]
        # A section at a time: indices are 8 bytes each.
        for row, section in enumerate(label[box]):
            for k, numbers in wanted.items():
                places = np.flatnonzero(section == k)
                first, last = np.searchsorted(numbers[orders[k]], [before[k], before[k] + len(places)])
                chosen = orders[k][first:last]
                flat = places[numbers[chosen] - before[k]]
                found[k][chosen] = np.stack([np.full(len(flat), row), *np.unravel_index(flat, section.shape)], axis=1) + starts
                before[k] += len(places)
    return found


def _estimated(counts: Mapping[int, int], seen: int, voxels: int) -> dict[int, int]:
    """Counts of a sample as those of the whole; where all of the sample is annotated, so is the whole."""
    whole = {k: max(1, round(count * voxels / seen)) for k, count in counts.items()}
    if counts and sum(counts.values()) == seen:
        largest = max(whole, key=lambda k: whole[k])
        whole[largest] += voxels - sum(whole.values())
    return whole


def _grey(volume: Volume, plan: Plan, most: int) -> tuple[np.ndarray, Scale | None, np.ndarray]:
    """Fill (C,), scale, and the values (C, 2, 257) float32 in the file between which each quantile lies."""
    boxes, share = looked_at(volume, most)
    every = boxes if share == 1 else list(parts_of(volume.shape_vox, volume.chunk_vox, MOST_READ // volume.channels))
    fill = fill_of(volume, every)
    if share < 1 and plan.normalisation.kind != "image":
        every = []
    below, above, _ = quantile_places(count_of(boxes))
    uppers, sums = [Upper() for _ in fill], [Blocks(sum_of) for _ in fill]
    sweep(volume, fill, (boxes, uppers), (every, sums))
    count = math.prod(volume.shape_vox)
    means = [each.total() / count for each in sums]
    lowers, squares = [Lower(upper, np.union1d(below, above)) for upper in uppers], [Blocks(squares_about(mean)) for mean in means]
    sweep(volume, fill, (boxes, lowers), (every, squares))
    sds = [math.sqrt(each.total() / count) for each in squares]
    ends = np.array([[lower.values(below), lower.values(above)] for lower in lowers], np.float32)
    if plan.normalisation.kind != "image":
        return fill, scale_of(np.empty((len(fill), 0)), plan.normalisation), ends
    unlimited = np.full(len(fill), np.inf)
    return fill, Scale.of(np.array([-unlimited, unlimited, means, sds])), ends


def _slices(part: Any, shape: Shape) -> tuple[tuple[slice, ...], tuple[slice | int, ...]]:
    """A part of slices and numbers as slices alone, and what is kept of what these give."""
    parts = part if isinstance(part, tuple) else (part,)
    parts = (*parts, *(slice(None),) * (len(shape) - len(parts)))
    starts = [int(one) % size if not isinstance(one, slice) else 0 for one, size in zip(parts, shape, strict=True)]
    box = tuple(one if isinstance(one, slice) else slice(start, start + 1) for one, start in zip(parts, starts, strict=True))
    return box, tuple(slice(None) if isinstance(one, slice) else 0 for one in parts)
