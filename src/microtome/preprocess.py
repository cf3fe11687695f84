"""An image -> network input, and labels to the network's grid; the same for training and prediction."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from microtome.config import NormalisationConfig, Plan
from microtome.errors import DataError
from microtome.geometry import Shape, Spacing, resampled_shape
from microtome.images.image import Image
from microtome.images.volume import Volume

# Images of one kind hardly differ more than this in voxel size; a unit mistaken for another does.
MOST_RESAMPLED = 16.0
# Rows of a resampling matrix that are one dense product: fewer would make calls, more would multiply zeros.
BAND_ROWS = 16
MOST_ROWS = 32
# Values of an array between two axes: what stays in a processor's own cache.
CHUNK_VALUES = 1 << 19
# Multiplications up to which OpenBLAS stays in one thread. Waking its other threads costs more than these small products,
# several times as much where another program keeps the cores busy.
SERIAL_PRODUCTS = 1 << 18
# Weights below are no more than float32 rounding.
NEGLIGIBLE = 1e-8
ROUNDING = 1e-6
# Values that are summed at a time, in float64.
BLOCK_VALUES = 1 << 16

Interpolation = Literal["linear", "cubic"]
# First index, and the one past the last.
Interval = tuple[int, int]


class Band(NamedTuple):
    """Some rows of a resampling matrix, and the only samples that they need.

    Attributes:
        first: index of the first row.
        low: index of the first sample.
        high: past the last sample.
        weights: (rows, high - low) float32.
    """

    first: int
    low: int
    high: int
    weights: np.ndarray

    @property
    def last(self) -> int:
        """Past the last row."""
        return self.first + len(self.weights)


def normalise(array: np.ndarray, config: NormalisationConfig) -> np.ndarray:
    """`(C, *S)` of any type -> float32 of about mean 0 and sd 1 for each channel; of kind "none" as in the file.

    Non-finite voxels (outside of a scanner's field of view) become the channel's mean. A constant channel becomes 0.
    """
    result = np.empty(array.shape, np.float32)
    for channel, (source, target) in enumerate(zip(array, result, strict=True)):
        # What float32 cannot hold becomes infinite, and is filled like what was infinite before.
        with np.errstate(over="ignore"):
            np.copyto(target, source)
        if not np.issubdtype(array.dtype, np.integer):
            _fill_non_finite(target)
        if config.kind == "none":
            continue
        if config.kind == "dataset":
            np.clip(target, config.low[channel], config.high[channel], out=target)
            mean, sd = config.mean[channel], config.sd[channel]
        else:
            mean, sd = mean_and_sd(target)
        target -= np.float32(mean)
        if np.float32(sd) > 0:
            target /= np.float32(sd)
    return result


def mean_and_sd(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation with float64 sums: float32 loses digits over 10^8 voxels of a 16-bit image.

    A block at a time, as a float64 copy of a whole volume takes twice its memory and three times as long.
    """
    flat = values.reshape(-1)
    blocks = [flat[start : start + BLOCK_VALUES] for start in range(0, flat.size, BLOCK_VALUES)]
    mean = sum(float(block.sum(dtype=np.float64)) for block in blocks) / flat.size
    squares = sum(float(np.square(block - np.float64(mean)).sum()) for block in blocks)
    return mean, math.sqrt(squares / flat.size)


def voxel_size(image: Image | Volume, plan: Plan) -> Spacing:
    """The spacing along S that an image is taken to have: as stated for all, else its own, else as assumed for those without.

    Training and prediction both ask here, or a network would see another scale than it learned from.

    Raises:
        DataError: so far from the plan's that it is a mistake of unit; the resampled image would be a speck or fill the memory.
    """
    if plan.stated_spacing_mm:
        return plan.stated_spacing_mm
    if plan.resize_vox:
        return image.spacing_mm
    spacing_mm = image.spacing_mm if image.spacing_known else plan.assumed_spacing_mm or image.spacing_mm
    factors = [own / target for own, target in zip(spacing_mm[-plan.dims :], plan.spacing_mm[-plan.dims :], strict=True)]
    if not all(1 / MOST_RESAMPLED <= factor <= MOST_RESAMPLED for factor in factors):
        sizes = " × ".join(f"{value:g}" for value in spacing_mm)
        expected = f"voxels about as large as the plan's, {' × '.join(f'{value:g}' for value in plan.spacing_mm)} mm"
        raise DataError(image.path, expected=expected, got=f"{sizes} mm", do="correct the file's voxel size or unit", code="D048")
    return spacing_mm


def grid_shape(shape_vox: Shape, spacing_mm: Spacing, plan: Plan) -> Shape:
    """The shape of an image at the plan's spacing, or the one that every image is resized to.

    Sections of a stack are never mixed for a 2D network.
    """
    if plan.resize_vox:
        return (*shape_vox[: len(shape_vox) - plan.dims], *plan.resize_vox)
    target = list(plan.spacing_mm)
    if len(shape_vox) > plan.dims:
        target[0] = spacing_mm[0]
    return resampled_shape(shape_vox, spacing_mm, tuple(target))


def _fill_non_finite(channel: np.ndarray) -> None:
    """Replace NaN and infinities in place by the mean of the rest."""
    finite = np.isfinite(channel)
    if not finite.all():
        channel[~finite] = channel[finite].mean(dtype=np.float64) if finite.any() else 0.0


def resampling_bands(
    size: int, new_size: int, interpolation: Interpolation = "linear", *, rows: int = BAND_ROWS, brick: int | None = None
) -> list[Band]:
    """The matrix (new_size, size) that brings `size` samples to `new_size` places over the same extent, in dense bands of rows.

    Voxel edges stay where they are, samples beyond the border repeat the border, and rows sum to 1. "linear" is the triangle;
    "cubic" the cardinal cubic B-spline, which is the spline's evaluation times the inverse of its prefilter, exact to
    float32 because it falls as 0.27^n. When the image shrinks the kernel widens (`_stretch`), so that what cannot be shown
    is averaged instead of aliased. No band crosses a multiple of `brick`, so that bricks come out the same, bit for bit, alone or not.

    References:
        Unser 1999, "Splines: a perfect fit for signal and image processing", doi:10.1109/79.799930.
    """
    kernel, support = KERNELS[interpolation]
    factor = size / new_size
    stretch = _stretch(factor, interpolation)
    centre = (np.arange(new_size) + 0.5) * factor - 0.5
    reach = int(np.ceil(support * stretch))
    bands = []
    starts = [
        first for start in range(0, new_size, brick or new_size) for first in range(start, min(start + (brick or new_size), new_size), rows)
    ]
    for first, past in pairwise([*starts, new_size]):
        middle = centre[first:past, None]
        index = np.floor(middle).astype(int) + np.arange(-reach, reach + 2)
        weight = kernel((index - middle) / stretch)
        # Zeros would let prediction wait for rows that it does not need, and widen the band.
        row, tap = np.nonzero(np.abs(weight) > NEGLIGIBLE)
        places = index[row, tap].clip(0, size - 1)
        low, high = int(places.min()), int(places.max()) + 1
        dense = np.zeros((len(middle), high - low))
        np.add.at(dense, (row, places - low), weight[row, tap])
        dense /= dense.sum(axis=1, keepdims=True)
        bands.append(Band(first, low, high, dense.astype(np.float32)))
    return bands


def _triangle(offset: np.ndarray) -> np.ndarray:
    """Weight of a sample at that many voxels from the place: linear interpolation."""
    weight: np.ndarray = np.maximum(0.0, 1.0 - np.abs(offset))
    return weight


def _cardinal(offset: np.ndarray) -> np.ndarray:
    """Weight of a sample at that many voxels from the place in cubic B-spline interpolation: 1 at 0, 0 at other whole numbers."""
    nearest = np.floor(offset)
    total = np.zeros_like(offset)
    for knot in (nearest - 1, nearest, nearest + 1, nearest + 2):
        distance = np.abs(offset - knot)
        spline = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.maximum(0.0, 2 - distance) ** 3 / 6)
        # Impulse response of the prefilter: all samples' part in the coefficient of this knot.
        total += math.sqrt(3) * (math.sqrt(3) - 2) ** np.abs(knot) * spline
    return total


def _stretch(factor: float, interpolation: Interpolation) -> float:
    """Width of the kernel in voxels of the image that is shrunk by `factor`; 1 when enlarging.

    The cubic kernel stays the exact spline up to 4/3, as so little is lost that averaging would only blur, and is as wide
    as a new voxel from 3/2 on (docs/decisions/0015).
    """
    return max(1.0, factor if interpolation == "linear" else min(factor, 3 * factor - 3))


# Kernels, and how many voxels far they reach.
KERNELS = MappingProxyType({"linear": (_triangle, 1), "cubic": (_cardinal, 14)})


def apply_band(band: Band, source: np.ndarray, target: np.ndarray, axis: int) -> None:
    """Write a band's matrix times `source` (its samples low..high along `axis`) into `target` (its rows along `axis`)."""
    source, target = np.moveaxis(source, axis, -2), np.moveaxis(target, axis, -2)
    step = max(1, SERIAL_PRODUCTS // band.weights.size)
    for start in range(0, source.shape[-1], step):
        part = slice(start, start + step)
        np.matmul(band.weights, source[..., part], out=target[..., part])


def apply_bands(bands: Sequence[Band], array: np.ndarray, axis: int, out: np.ndarray) -> np.ndarray:
    """The whole matrix of all bands applied to one axis of an array; written into `out`, and that returned."""
    whole = (slice(None),) * (axis % array.ndim)
    for band in bands:
        apply_band(band, array[(*whole, slice(band.low, band.high))], out[(*whole, slice(band.first, band.last))], axis)
    return out


class Resampler:
    """Brings arrays `(layers, *S)` to another grid, some rows of the first axis of S at a time.

    Two buffers serve all rows: fresh memory for each would be cleared by the kernel, page by page, for longer than the work takes.

    Args:
        shape_vox: S.
        new_shape_vox: of the other grid.
        layers: channels or classes.
        interpolation: as `resampling_bands` has it.
        values: about as many lie between two axes.
        plane: the part of the other grid's plane that is wanted, a (first, past-the-end) pair for each axis of S but the first.
        brick: rows of the other grid that are made together or not at all; no band crosses a multiple of it.

    Attributes:
        rows: bands of the first axis; what each call needs, and what comes of it.
        plane: the part of the other grid's plane that comes of it.
        source_plane: the part of the first grid's plane that it needs.
    """

    def __init__(
        self,
        shape_vox: Shape,
        new_shape_vox: Shape,
        layers: int,
        interpolation: Interpolation = "linear",
        *,
        values: int = CHUNK_VALUES,
        plane: Sequence[Interval] | None = None,
        brick: int | None = None,
    ) -> None:
        self.plane = tuple((0, size) for size in new_shape_vox[1:]) if plane is None else tuple(plane)
        self._planes, self.source_plane = _plane_bands(shape_vox, new_shape_vox, self.plane, interpolation)
        largest = max(math.prod(b - a for a, b in spans) for spans in (self.plane, self.source_plane))
        # A cubic row needs 28 others: one row at a time would read the whole image 28 times.
        fewest = 1 if interpolation == "linear" else BAND_ROWS // 2
        rows = min(max(fewest, values // max(1, layers * largest)), MOST_ROWS)
        self.rows = resampling_bands(shape_vox[0], new_shape_vox[0], interpolation, rows=rows, brick=brick)
        self._still = shape_vox[0] == new_shape_vox[0]
        self._buffers = [np.empty(0, np.float32), np.empty(0, np.float32)]

    def __call__(self, band: Band, source: np.ndarray) -> np.ndarray:
        """The rows of a band, (layers, rows, *plane) float32, of its samples, (layers, high - low, *source_plane).

        The next call overwrites them.
        """
        array = source
        if not self._still:
            array = self._buffer((len(source), len(band.weights), *source.shape[2:]), 0)
            apply_band(band, source, array, 1)
        for number, (axis, bands) in enumerate(self._planes, start=1):
            shape = (*array.shape[:axis], bands[-1].last, *array.shape[axis + 1 :])
            array = apply_bands(bands, array, axis, self._buffer(shape, number % 2))
        return array

    def band_of(self, row: int) -> Band:
        """The band that a row of the other grid lies in."""
        return self.rows[bisect_right(self.rows, row, key=lambda band: band.first) - 1]

    def _buffer(self, shape: Shape, which: int) -> np.ndarray:
        """An array in the first or second buffer."""
        size = math.prod(shape)
        if self._buffers[which].size < size:
            self._buffers[which] = np.empty(size, np.float32)
        return self._buffers[which][:size].reshape(shape)


def _plane_bands(
    shape_vox: Shape, new_shape_vox: Shape, plane: Sequence[Interval], interpolation: Interpolation
) -> tuple[list[tuple[int, list[Band]]], tuple[Interval, ...]]:
    """(axis of (layers, *S), bands) of those axes of a plane that change, and the part of the first grid's plane that they need."""
    changed, needed = [], []
    for axis, wanted in enumerate(plane, start=1):
        size, new_size = shape_vox[axis], new_shape_vox[axis]
        if size == new_size:
            needed.append(wanted)
            continue
        bands, samples = within(resampling_bands(size, new_size, interpolation), wanted)
        changed.append((new_size / size, axis, bands))
        needed.append(samples)
    # The axis that shrinks most comes first and leaves the others the least work.
    return [(axis + 1, bands) for _, axis, bands in sorted(changed, key=lambda found: found[:2])], tuple(needed)


def within(bands: Sequence[Band], wanted: Interval) -> tuple[list[Band], Interval]:
    """The bands cut to some rows of their matrix, rows and samples counted from the first that are left; and these samples."""
    first, past = wanted
    cut = []
    for band in bands:
        rows = slice(max(first - band.first, 0), max(past - band.first, 0))
        weights = band.weights[rows]
        if len(weights):
            cut.append(Band(band.first + rows.start - first, band.low, band.high, weights))
    low, high = min(band.low for band in cut), max(band.high for band in cut)
    return [band._replace(low=band.low - low, high=band.high - low) for band in cut], (low, high)


def resample(array: np.ndarray, new_shape_vox: Shape, interpolation: Interpolation = "linear") -> np.ndarray:
    """`(C, *S)` -> float32 (C, *new S); the image itself where the shape stays.

    Beside input and output, memory holds some rows. A cubic spline overshoots at steps; like scikit-image's, it is kept
    within each channel's own lowest and highest value.
    """
    array = np.asarray(array, np.float32)
    if array.shape[1:] == tuple(new_shape_vox):
        return array
    result = np.empty((len(array), *new_shape_vox), np.float32)
    resampler = Resampler(array.shape[1:], new_shape_vox, len(array), interpolation)
    for band in resampler.rows:
        result[:, band.first : band.last] = resampler(band, array[:, band.low : band.high])
    if interpolation == "cubic":
        for source, target in zip(array, result, strict=True):
            np.clip(target, source.min(), source.max(), out=target)
    return result


def resample_labels(labels: np.ndarray, new_shape_vox: Shape) -> np.ndarray:
    """Labels (*S) int16 on a new grid: at each voxel the value that covers most of it, the lowest of equals; -1 counts as a value."""
    if labels.shape == tuple(new_shape_vox):
        return labels
    result = np.empty(new_shape_vox, np.int16)
    resampler = Resampler(labels.shape, new_shape_vox, 1)
    for band in resampler.rows:
        label_band(resampler, band, labels[band.low : band.high], result[band.first : band.last])
    return result


def label_band(resampler: Resampler, band: Band, source: np.ndarray, target: np.ndarray) -> None:
    """Write the rows of a band of `resample_labels`, (rows, *plane), of its samples (high - low, *source_plane)."""
    values = np.unique(source)
    target[...] = values[0]
    if len(values) == 1:
        return
    best = np.full(target.shape, -1.0, np.float32)
    for value in values:
        share = resampler(band, (source == value).astype(np.float32)[None])[0]
        # Equal shares differ by rounding, which depends on the machine.
        better = share > best + ROUNDING
        np.copyto(target, value, where=better)
        np.copyto(best, share, where=better)


def crop_box(array_shape: Sequence[int], low: Sequence[float], high: Sequence[float]) -> tuple[slice, ...]:
    """The smallest box of whole voxels, inside of the array, that holds low..high with one voxel to spare."""
    box = []
    for size, a, b in zip(array_shape, low, high, strict=True):
        first = min(max(int(np.floor(a)) - 1, 0), size - 1)
        last = max(min(int(np.ceil(b)) + 1, size - 1), first)
        box.append(slice(first, last + 1))
    return tuple(box)
