"""Patches straight from chunked stores: what training must know of a case that no memory holds, and views of its image and label.

    store   --read by parts-->   counts, places of classes, mean and sd, quantiles   (once; kept in one small file)
    store   --a part-->          what `preparing.prepare` would have stored there    (each patch; nothing is copied)

Bit for bit what the ordinary road gives, as long as a chunk's depth of whole planes is no more than `parts.MOST_READ` values: then
parts come in the order of the whole. Beyond, sums differ by their last digits, and the voxels that are drawn are others.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.parts import MOST_READ, MOST_SEEN, looked_at, parts_of
from microtome.data.reading import LabelParts
from microtome.errors import DataError
from microtome.geometry import Shape, format_shape
from microtome.images.volume import Volume
from microtome.machine import free_memory_bytes
from microtome.preprocess import BLOCK_VALUES
from microtome.training.arrays import Scale
from microtome.training.preparing import VOXELS_A_CLASS, between, class_counts, grids_of, quantile_places, scale_of

# Share of the free memory that image and label take before no copy of them is made.
DIRECT_SHARE = 0.25
# Values whose histogram is taken at a time: NumPy counts 64-bit numbers.
_COUNTED = 2**20


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
        values: np.ndarray = _filled(self.volume.pixels[box], self.fill[box[0]])[kept]
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


def goes_direct(dataset: Dataset, case: Case, plan: Plan, wanted: bool | None = None) -> bool:
    """Whether a case is read from its own store: it can be, and a copy of it would take more than a quarter of the free memory.

    Args:
        dataset: that the case is of.
        case: a labelled one.
        plan: its grid must be the file's own, and its loss must need no weight map.
        wanted: True or False decides whatever the size; True does not make possible what is not.

    Raises:
        DataError: it is no case for this road, and the memory does not hold it; says why.
    """
    if wanted is False:
        return False
    grids, free = grids_of(dataset, case, plan), free_memory_bytes()
    # The label is held as int16.
    needed = math.prod(grids.old) * (dataset.header(case).channels * grids.value_bytes + 2)
    if not wanted and needed <= DIRECT_SHARE * free:
        return False
    obstacle = _obstacle(dataset, case, plan)
    if obstacle and needed > free:
        got = f"{needed} bytes ({needed / 1e9:.1f} GB), and {obstacle}"
        expected = f"a case that fits in the free memory ({free} bytes), or one of which patches can be read from its file"
        raise DataError(case.images[0], expected=expected, got=got, do="change that, or cut the case into parts", code="D049")
    return not obstacle


def _obstacle(dataset: Dataset, case: Case, plan: Plan) -> str:
    """Why a case cannot be read from its own store, in words; empty where it can."""
    grids = grids_of(dataset, case, plan)
    if plan.loss.border_weight:
        return "its border weights need all of the label at once"
    if grids.old != grids.new:
        return f"its {format_shape(grids.old)} voxels have to be brought to {format_shape(grids.new)}"
    if not dataset.is_parted(case):
        return f"image and label are not one Zarr, N5, precomputed, HDF5 or NPY each (the image is {dataset.header(case).format})"
    return ""


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
        case: one that `goes_direct`.
        plan: how grey values are scaled.
        rng: draws the voxels that are noted; from the same state the same as on the ordinary road.
        most: values of more than which classes and quantiles are told from a fixed sample of parts; mean and sd never are.
    """
    volume, label = dataset.open_image(case), dataset.open_label(case)
    counts, voxels = _classes(label, rng, most)
    fill, scale, ends = _grey(volume, plan, most)
    return Facts(voxels, counts, between(ends, _count(looked_at(volume, most)[0]), scale), scale, fill)


def _classes(label: LabelParts, rng: np.random.Generator, most: int) -> tuple[dict[int, int], dict[int, np.ndarray]]:
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
        counts = _estimated(counts, _count(boxes), math.prod(label.shape))
    return counts, voxels


def _places(label: LabelParts, boxes: Sequence[tuple[slice, ...]], wanted: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
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
    fill = _fill(volume, every)
    if share < 1 and plan.normalisation.kind != "image":
        every = []
    below, above, _ = quantile_places(_count(boxes))
    uppers, sums = [_Upper() for _ in fill], [_Blocks(lambda block: float(block.sum(dtype=np.float64))) for _ in fill]
    _sweeps(volume, fill, (boxes, uppers), (every, sums))
    count = math.prod(volume.shape_vox)
    means = [each.total() / count for each in sums]
    lowers, squares = [_Lower(upper, np.union1d(below, above)) for upper in uppers], [_Blocks(_squares_about(mean)) for mean in means]
    _sweeps(volume, fill, (boxes, lowers), (every, squares))
    sds = [math.sqrt(each.total() / count) for each in squares]
    ends = np.array([[lower.values(below), lower.values(above)] for lower in lowers], np.float32)
    if plan.normalisation.kind != "image":
        return fill, scale_of(np.empty((len(fill), 0)), plan.normalisation), ends
    unlimited = np.full(len(fill), np.inf)
    return fill, Scale.of(np.array([-unlimited, unlimited, means, sds])), ends


def _squares_about(mean: float) -> Callable[[np.ndarray], float]:
    """The sum of squared differences from a mean, as `preprocess.mean_and_sd` takes it."""
    return lambda block: float(np.square(block - np.float64(mean)).sum())


def _fill(volume: Volume, every: Iterable[tuple[slice, ...]]) -> np.ndarray:
    """What stands for values that are not finite, (C,) float32: the mean of the others, as in `preprocess.normalise`."""
    if volume.pixels.dtype.kind in "iub":
        return np.zeros(volume.channels, np.float32)
    total, count = np.zeros(volume.channels), np.zeros(volume.channels)
    for box in every:
        for number, channel in enumerate(_as_float32(volume.pixels[(slice(None), *box)])):
            finite = channel[np.isfinite(channel)]
            total[number] += finite.sum(dtype=np.float64)
            count[number] += finite.size
    return (total / np.maximum(count, 1)).astype(np.float32)


class _Blocks:
    """A sum over the values that come, in blocks of `BLOCK_VALUES` however they are cut: to the last bit that of `mean_and_sd`."""

    def __init__(self, work: Callable[[np.ndarray], float]) -> None:
        self._work, self._found, self._rest = work, list[float](), np.empty(0, np.float32)

    def add(self, values: np.ndarray) -> None:
        """The next values (N,)."""
        if self._rest.size:
            missing = BLOCK_VALUES - self._rest.size
            self._rest, values = np.concatenate([self._rest, values[:missing]]), values[missing:]
            if self._rest.size < BLOCK_VALUES:
                return
            self._found.append(self._work(self._rest))
        whole = values.size // BLOCK_VALUES * BLOCK_VALUES
        self._found += [self._work(values[start : start + BLOCK_VALUES]) for start in range(0, whole, BLOCK_VALUES)]
        self._rest = values[whole:].copy()

    def total(self) -> float:
        """The sum over all that came."""
        return sum([*self._found, self._work(self._rest)] if self._rest.size else self._found)


class _Upper:
    """A histogram of float32 values by the upper half of their bits, in the order of the values."""

    def __init__(self) -> None:
        self.counts = np.zeros(2**16, np.int64)

    def add(self, values: np.ndarray) -> None:
        """The next values (N,)."""
        for keys in _keys(values):
            self.counts += np.bincount(keys >> np.uint32(16), minlength=2**16)


class _Lower:
    """The values at some places of the order of all values, exactly: in the few bins of the upper half, a histogram of the lower."""

    def __init__(self, upper: _Upper, places: np.ndarray) -> None:
        ends = np.cumsum(upper.counts)
        bins = np.searchsorted(ends, places, side="right")
        self._bins, rows = np.unique(bins, return_inverse=True)
        left = places - (ends[bins] - upper.counts[bins])
        self._wanted = {place: (row, rest) for place, row, rest in zip(places.tolist(), rows.tolist(), left.tolist(), strict=True)}
        self._row_of = np.full(2**16, -1, np.int32)
        self._row_of[self._bins] = np.arange(len(self._bins))
        self._counts = np.zeros((len(self._bins), 2**16), np.int64)

    def add(self, values: np.ndarray) -> None:
        """The next values (N,)."""
        for keys in _keys(values):
            rows = self._row_of[keys >> np.uint32(16)]
            here = rows >= 0
            np.add.at(self._counts, (rows[here], keys[here] & np.uint32(0xFFFF)), 1)

    def values(self, places: np.ndarray) -> np.ndarray:
        """The values (N,) float32 at places (N,), each one of those that were asked for."""
        found = [self._wanted[place] for place in places.tolist()]
        # A row at a time: all of them together may be a quarter of a gigabyte.
        lower = [int(np.searchsorted(np.cumsum(self._counts[row]), left, side="right")) for row, left in found]
        keys = [int(self._bins[row]) << 16 | key for (row, _), key in zip(found, lower, strict=True)]
        ordered = np.array(keys, np.uint32)
        return np.where(ordered >> 31, ordered ^ np.uint32(2**31), ~ordered).astype(np.uint32).view(np.float32)


def _keys(values: np.ndarray) -> Iterator[np.ndarray]:
    """Float32 values (N,) as uint32 of the same order, some at a time; -0 is 0."""
    for start in range(0, values.size, _COUNTED):
        bits = (values[start : start + _COUNTED] + np.float32(0)).view(np.uint32)
        yield np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def _sweeps(volume: Volume, fill: np.ndarray, *tasks: tuple[list[tuple[slice, ...]], Sequence[_Blocks | _Upper | _Lower]]) -> None:
    """Give each task's workers, one a channel, the values of its boxes in their order; boxes that tasks share are read once."""
    for boxes in {id(boxes): boxes for boxes, _ in tasks}.values():
        workers = [each for own, each in tasks if own is boxes]
        for box in boxes:
            part = _filled(volume.pixels[(slice(None), *box)], fill)
            for number, channel in enumerate(part):
                flat = channel.reshape(-1).astype(np.float32, copy=False)
                for each in workers:
                    each[number].add(flat)


def _as_float32(values: np.ndarray) -> np.ndarray:
    """The values as float32; what it cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _filled(values: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """A part (C, ...) with finite values; integers as they are, all others as float32."""
    if values.dtype.kind in "iub":
        return values
    values = _as_float32(values)
    for channel, instead in zip(values, fill, strict=True):
        np.copyto(channel, instead, where=~np.isfinite(channel))
    return values


def _slices(part: Any, shape: Shape) -> tuple[tuple[slice, ...], tuple[slice | int, ...]]:
    """A part of slices and numbers as slices alone, and what is kept of what these give."""
    parts = part if isinstance(part, tuple) else (part,)
    parts = (*parts, *(slice(None),) * (len(shape) - len(parts)))
    starts = [int(one) % size if not isinstance(one, slice) else 0 for one, size in zip(parts, shape, strict=True)]
    box = tuple(one if isinstance(one, slice) else slice(start, start + 1) for one, start in zip(parts, starts, strict=True))
    return box, tuple(slice(None) if isinstance(one, slice) else 0 for one in parts)


def _count(boxes: Iterable[tuple[slice, ...]]) -> int:
    """Voxels of some boxes."""
    return sum(math.prod(side.stop - side.start for side in box) for box in boxes)
