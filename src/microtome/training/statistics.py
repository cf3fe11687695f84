"""Numbers over values that come part by part: sums to the last bit those of the whole, quantiles exactly; no value is kept."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from microtome.images.volume import Volume
from microtome.preprocess import BLOCK_VALUES

# Values whose histogram is taken at a time: NumPy counts 64-bit numbers.
_COUNTED = 2**20


class Worker(Protocol):
    """What is told all values of a channel."""

    def add(self, values: np.ndarray) -> None:
        """The next values (N,) float32."""


def sum_of(block: np.ndarray) -> float:
    """The sum of a block of values, as `preprocess.mean_and_sd` takes it."""
    return float(block.sum(dtype=np.float64))


def squares_about(mean: float) -> Callable[[np.ndarray], float]:
    """The sum of squared differences from a mean, as `preprocess.mean_and_sd` takes it."""
    return lambda block: float(np.square(block - np.float64(mean)).sum())


def fill_of(volume: Volume, every: Iterable[tuple[slice, ...]]) -> np.ndarray:
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


class Blocks:
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


class Upper:
    """A histogram of float32 values by the upper half of their bits, in the order of the values."""

    def __init__(self) -> None:
        self.counts = np.zeros(2**16, np.int64)

    def add(self, values: np.ndarray) -> None:
        """The next values (N,)."""
        for keys in _keys(values):
            self.counts += np.bincount(keys >> np.uint32(16), minlength=2**16)


class Lower:
    """The values at some places of the order of all values, exactly: in the few bins of the upper half, a histogram of the lower."""

    def __init__(self, upper: Upper, places: np.ndarray) -> None:
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


class Extremes:
    """The smallest and the largest value."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """The next values (N,)."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def ends_of(volume: Volume, fill: np.ndarray, boxes: list[tuple[slice, ...]], places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The values (C, 2, N) float32 at two sets of places (N,) in the order of all values of some boxes, from two readings of them."""
    uppers = [Upper() for _ in fill]
    sweep(volume, fill, (boxes, uppers))
    lowers = [Lower(upper, np.union1d(*places)) for upper in uppers]
    sweep(volume, fill, (boxes, lowers))
    return np.array([[lower.values(place) for place in places] for lower in lowers], np.float32)


def _keys(values: np.ndarray) -> Iterator[np.ndarray]:
    """Float32 values (N,) as uint32 of the same order, some at a time; -0 is 0."""
    for start in range(0, values.size, _COUNTED):
        bits = (values[start : start + _COUNTED] + np.float32(0)).view(np.uint32)
        yield np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def sweep(volume: Volume, fill: np.ndarray, *tasks: tuple[list[tuple[slice, ...]], Sequence[Worker]]) -> None:
    """Give each task's workers, one a channel, the values of its boxes in their order; boxes that tasks share are read once."""
    for boxes in {id(boxes): boxes for boxes, _ in tasks}.values():
        workers = [each for own, each in tasks if own is boxes]
        for box in boxes:
            part = filled(volume.pixels[(slice(None), *box)], fill)
            for number, channel in enumerate(part):
                flat = channel.reshape(-1).astype(np.float32, copy=False)
                for each in workers:
                    each[number].add(flat)


def _as_float32(values: np.ndarray) -> np.ndarray:
    """The values as float32; what it cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def filled(values: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """A part (C, ...) with finite values; integers as they are, all others as float32."""
    if values.dtype.kind in "iub":
        return values
    values = _as_float32(values)
    for channel, instead in zip(values, fill, strict=True):
        np.copyto(channel, instead, where=~np.isfinite(channel))
    return values


def count_of(boxes: Iterable[tuple[slice, ...]]) -> int:
    """Voxels of some boxes."""
    return sum(math.prod(side.stop - side.start for side in box) for box in boxes)
