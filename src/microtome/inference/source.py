"""A volume that is read part by part -> what a network is given: grey values on the plan's grid, a few rows at a time.

    volume   --read-->   grey values   --resampled-->   rows on the grid   --cut, mirrored-->   a tile

Whatever the size of the volume, memory holds the rows that a row of tiles needs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from microtome.config import NormalisationConfig, Plan
from microtome.data.parts import parts_of
from microtome.geometry import Shape
from microtome.images.volume import Volume
from microtome.preprocess import BLOCK_VALUES, Resampler
from microtome.tiling import Span, folded

# Values that are read at a time at most, where chunks are not larger; fewer to be measured, as that takes several arrays more.
MOST_READ, MOST_MEASURED = 1 << 26, 1 << 22


class Moments(NamedTuple):
    """What is known of one channel's grey values, as float32 has them.

    Attributes:
        fill: what stands for values that are not finite: the mean of the others.
        mean: of all, those that were filled included.
        sd: of the same.
        low: the smallest.
        high: the largest.
    """

    fill: float
    mean: float
    sd: float
    low: float
    high: float


class Rows:
    """Some successive rows of an array (L, rows, ...), added at one end and dropped at the other."""

    def __init__(self, first: int = 0) -> None:
        self.first = self.past = first
        self._parts: list[np.ndarray] = []

    def add(self, part: np.ndarray) -> None:
        """Append rows, which are kept and not copied."""
        self._parts.append(part)
        self.past += part.shape[1]

    def get(self, low: int, high: int) -> np.ndarray:
        """Rows low..high, all of which are here; not to be written to."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts, axis=1)]
        return self._parts[0][:, low - self.first : high - self.first]

    def drop(self, low: int) -> None:
        """Forget the rows before `low`; their memory goes once whole parts, or half of one, are of no use."""
        while self._parts and self.first + self._parts[0].shape[1] <= low:
            self.first += self._parts.pop(0).shape[1]
        if self._parts and 2 * (low - self.first) >= self._parts[0].shape[1]:
            self._parts[0] = self._parts[0][:, low - self.first :].copy()
            self.first = low


def measure(volume: Volume, grid: Shape, plan: Plan) -> tuple[Moments, ...] | None:
    """Moments of each of the plan's channels of a volume, from one reading of all of it; None where nothing that the plan does needs them.

    Means and sums of squares of parts are merged, in float64.

    References:
        Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", doi:10.1080/00031305.1983.10483115.
    """
    ranges = plan.interpolation == "cubic" and tuple(grid) != volume.shape_vox
    if plan.normalisation.kind in ("none", "dataset") and volume.pixels.dtype.kind in "iub" and not ranges:
        return None
    merged = [_Merged() for _ in range(volume.channels)]
    # One channel after the other would read chunks that hold several again and again.
    for box in parts_of(volume.shape_vox, volume.chunk_vox, MOST_MEASURED // volume.channels):
        with np.errstate(over="ignore"):
            part = volume.pixels[(slice(None), *box)].astype(np.float32)
        for total, values in zip(merged, part.reshape(volume.channels, -1), strict=True):
            for first in range(0, values.size, BLOCK_VALUES):
                total.add(values[first : first + BLOCK_VALUES])
    found = tuple(total.moments() for total in merged)
    # Grey shown to a network of colours is the same in each of them.
    return found * plan.channels if len(found) < plan.channels else found


class _Merged:
    """Count, mean, sum of squared differences, smallest and largest of the finite values so far; and how many are not finite."""

    def __init__(self) -> None:
        self.count, self.others, self.mean, self.squares = 0, 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Merge some values."""
        finite = values[np.isfinite(values)]
        self.others += values.size - finite.size
        if not finite.size:
            return
        mean = float(finite.mean(dtype=np.float64))
        squares = float(np.square(finite - np.float64(mean)).sum())
        total, apart = self.count + finite.size, mean - self.mean
        self.squares += squares + apart * apart * self.count * finite.size / total
        self.mean += apart * finite.size / total
        self.count = total
        self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def moments(self) -> Moments:
        """What is known at the end."""
        if not self.count:
            return Moments(0.0, 0.0, 0.0, 0.0, 0.0)
        fill, total = float(np.float32(self.mean)), self.count + self.others
        mean = (self.mean * self.count + fill * self.others) / total
        squares = self.squares + (self.mean - mean) ** 2 * self.count + (fill - mean) ** 2 * self.others
        return Moments(fill, mean, math.sqrt(squares / total), self.low, self.high)


class Grey(NamedTuple):
    """How values of a file become grey values; the operations of `preprocess.normalise` on a part as on the whole.

    Attributes:
        config: the plan's.
        moments: of each channel; None where they are not needed.
    """

    config: NormalisationConfig
    moments: tuple[Moments, ...] | None

    def __call__(self, part: np.ndarray) -> np.ndarray:
        """`(C, ...)` of any type -> float32, a copy."""
        with np.errstate(over="ignore"):
            values = part.astype(np.float32)
        for number, channel in enumerate(values):
            if self.moments is not None and part.dtype.kind not in "iub":
                np.copyto(channel, np.float32(self.moments[number].fill), where=~np.isfinite(channel))
            self._scale(number, channel)
        return values

    def limits(self, number: int) -> tuple[np.float32, np.float32]:
        """The smallest and the largest grey value of a channel, where its moments were measured."""
        assert self.moments is not None, "measured where the image is brought to another grid by splines"
        ends = np.array([self.moments[number].low, self.moments[number].high], np.float32)
        self._scale(number, ends)
        return ends[0], ends[1]

    def _scale(self, number: int, channel: np.ndarray) -> None:
        """Normalise one channel in place."""
        config = self.config
        if config.kind == "none":
            return
        if config.kind == "dataset":
            np.clip(channel, config.low[number], config.high[number], out=channel)
            mean, sd = config.mean[number], config.sd[number]
        else:
            assert self.moments is not None, "they were measured"
            mean, sd = self.moments[number].mean, self.moments[number].sd
        channel -= np.float32(mean)
        if np.float32(sd) > 0:
            channel /= np.float32(sd)


class Source:
    """Rows of a volume on the plan's grid, of a part of its plane, from the first to the last.

    Args:
        volume: of as many channels as the plan, or grey where the plan has three.
        grid: its shape on the plan's grid, axes of S.
        plan: which interpolation, how many channels.
        grey: what values become.
        plane: on the grid, axes of S but the first: what `tile` may ask for.
    """

    def __init__(self, volume: Volume, grid: Shape, plan: Plan, grey: Grey, plane: Sequence[Span]) -> None:
        self.volume, self.grid, self.grey, self.plane = volume, grid, grey, tuple(plane)
        self.channels = plan.channels
        self._clips = plan.interpolation == "cubic"
        same = tuple(grid) == volume.shape_vox
        self._resampler = None if same else Resampler(volume.shape_vox, grid, self.channels, plan.interpolation, plane=self.plane)
        self._source_plane = self.plane if self._resampler is None else self._resampler.source_plane
        self._read, self._made = Rows(), Rows()
        self._started = False

    @classmethod
    def whole(cls, volume: Volume, grid: Shape, plan: Plan, grey: Grey) -> Self:
        """All of the plane."""
        return cls(volume, grid, plan, grey, [(0, size) for size in grid[1:]])

    def tile(self, box: Sequence[Span], keep_from: int) -> np.ndarray:
        """What the network is given for a box on the grid, mirrored outside of it: (C, *box) float32, contiguous.

        Args:
            box: its first axis does not begin before an earlier `keep_from`.
            keep_from: the first row that this or a later call needs.
        """
        index = [folded(np.arange(a, b), size) for (a, b), size in zip(box, self.grid, strict=True)]
        low, high = int(index[0].min()), int(index[0].max()) + 1
        rows = self.rows(low, high, keep_from)
        firsts = (low, *(a for a, _ in self.plane))
        part = rows
        for axis, (places, first) in enumerate(zip(index, firsts, strict=True), start=1):
            start, past = int(places[0]) - first, int(places[-1]) + 1 - first
            straight = past - start == len(places) and bool((np.diff(places) == 1).all())
            part = part[(slice(None),) * axis + (slice(start, past),)] if straight else part.take(places - first, axis)
        return np.array(part, order="C")

    def rows(self, low: int, high: int, keep_from: int) -> np.ndarray:
        """Rows low..high on the grid, (C, rows, *plane) float32; rows before `keep_from` are forgotten."""
        resampler = self._resampler
        if not self._started:
            # What is asked for first is where this begins: rows of other parts of the volume are never read.
            self._started = True
            self._made = Rows(keep_from) if resampler is None else Rows(resampler.band_of(keep_from).first)
            self._read = Rows(keep_from if resampler is None else resampler.band_of(keep_from).low)
        if resampler is None:
            self._read.drop(keep_from)
            self._extend(high)
            return self._read.get(low, high)
        self._made.drop(keep_from)
        while self._made.past < high:
            band = resampler.band_of(self._made.past)
            self._read.drop(band.low)
            self._extend(band.high)
            self._made.add(self._clipped(resampler(band, self._read.get(band.low, band.high)).copy()))
        return self._made.get(low, high)

    def _extend(self, high: int) -> None:
        """Read up to row `high`, or to the end of its chunk."""
        if self._read.past >= high:
            return
        depth, size = self.volume.chunk_vox[0], self.volume.shape_vox[0]
        whole = min(size, -(-high // depth) * depth)
        plane = math.prod(b - a for a, b in self._source_plane) * self.channels
        past = whole if (whole - self._read.past) * plane <= MOST_READ else high
        box = (slice(self._read.past, past), *(slice(a, b) for a, b in self._source_plane))
        part = self.volume.pixels[(slice(None), *box)]
        if len(part) < self.channels:
            part = np.repeat(part, self.channels, axis=0)
        self._read.add(self.grey(part))

    def _clipped(self, rows: np.ndarray) -> np.ndarray:
        """Rows kept within what their channel has: a cubic spline overshoots at steps."""
        if self._clips:
            for number, channel in enumerate(rows):
                np.clip(channel, *self.grey.limits(number), out=channel)
        return rows
