"""A case that no memory holds, brought to the plan's grid slab by slab into arrays on disk; a kill costs the slab that was being made.

    file   --read by parts-->        means, sds, extremes                   (before the first slab; kept beside the arrays)
    file   --rows, resampled-->      slabs of image and label, on disk      (each noted when it is there)
    slabs  --read by parts-->        counts, places of classes, quantiles   (once, at the end)

Bit for bit what `preparing.prepare` gives, as long as whole planes fit into a slab (`PLANE_VALUES`). Beyond, planes are cut, sums
differ by their last digits, and the voxels that are drawn are others.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microtome.config import NormalisationConfig, Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.parts import MOST_READ, image_part, looked_at, middle_of, parts_of
from microtome.data.reading import LabelParts
from microtome.files import write_json
from microtome.geometry import Shape
from microtome.images.volume import Volume
from microtome.inference.source import Grey, Moments, Rows, Source
from microtome.preprocess import BAND_ROWS, KERNELS, Resampler, grid_shape, label_band, resample_labels, voxel_size
from microtome.tiling import Span
from microtome.training.arrays import GrowingArray, Scale, grow_array
from microtome.training.direct import Facts, find_classes
from microtome.training.preparing import Prepared, between, grey_values, quantile_places
from microtome.training.statistics import Blocks, Extremes, Worker, count_of, ends_of, fill_of, squares_about, sum_of, sweep

# What the name of the file ends with that says how far a case is.
PROGRESS = ".slabs.json"
# Values of a file's rows that are held at once while a slab is made, all channels together, and values of a slab: as float32, with
# copies of both, what `SLAB_BYTES` says (measured: docs/log.md).
PLANE_VALUES, SLAB_VALUES = 2**27, 2**25
SLAB_BYTES = 3 * 2**29
# Voxels along each side of the part by which it is told how small a case gets.
_MIDDLE = 160


class Slab(NamedTuple):
    """What is made and written at once.

    Attributes:
        name: of the array.
        box: (*S) on the plan's grid.
    """

    name: str
    box: tuple[slice, ...]


@dataclass(frozen=True)
class _Work:
    """A case on its way: where it comes from, and the arrays that it goes to."""

    plan: Plan
    volume: Volume
    label: LabelParts
    grid: Shape
    image_to: GrowingArray
    label_to: GrowingArray

    @property
    def resampled(self) -> bool:
        """Whether the grid is not the file's own."""
        return self.grid != self.volume.shape_vox


def prepare_by_slabs(dataset: Dataset, case: Case, plan: Plan, stem: Path, rng: np.random.Generator) -> tuple[Facts, Shape]:
    """Write a case's image and label beside `stem`, from where an earlier call was killed; what must be known of it, and the image's shape.

    Args:
        dataset: that the case is of.
        case: one that `roads.road_of` sends this way.
        plan: grid, grey values.
        stem: ends with the kind of array; `stem` with PROGRESS says how far it is, and means nothing once the case is marked as complete.
        rng: draws the voxels that are noted; from the same state the same as of the whole.

    Raises:
        DataError: a file is damaged.
        RunError: the disk is full.
    """
    volume, label = dataset.open_image(case), dataset.open_label(case)
    grid = grid_shape(volume.shape_vox, voxel_size(volume, plan), plan)
    progress, types = stem.with_suffix(PROGRESS), (_image_type(volume, grid), np.dtype(np.int8 if len(plan.classes) <= 128 else np.int16))
    form = [list(grid), volume.channels, *map(str, types), PLANE_VALUES, SLAB_VALUES]
    paths = [stem.with_suffix(f".{name}{stem.suffix}") for name in ("image", "label")]
    done, table = _known(progress, form) if all(path.exists() for path in paths) else (0, None)
    shapes = ((volume.channels, *grid), grid)
    image_to, label_to = (
        grow_array(path, shape, dtype, plan.dims, again=table is not None) for path, shape, dtype in zip(paths, shapes, types, strict=True)
    )
    work = _Work(plan, volume, label, grid, image_to, label_to)
    moments = _measured(work) if table is None else tuple(Moments(*row) for row in table)
    for number, _ in enumerate(_written(work, moments, done), start=done):
        write_json(progress, {"form": form, "done": number, "moments": [list(row) for row in moments]})
    return _facts(work, moments, rng), shapes[0]


def is_begun(stem: Path) -> bool:
    """Whether slabs of a case may lie beside `stem`."""
    return stem.with_suffix(PROGRESS).exists()


def remove_progress(stem: Path) -> None:
    """Forget how far a case is, once it is marked as complete."""
    stem.with_suffix(PROGRESS).unlink(missing_ok=True)


def middle(dataset: Dataset, case: Case, plan: Plan) -> Prepared:
    """The part in the middle of a case, prepared by itself."""
    volume, label = dataset.open_image(case), dataset.open_label(case)
    box = middle_of(volume, (_MIDDLE,) * len(volume.shape_vox))
    part = image_part(volume, box)
    shape = grid_shape(part.shape_vox, voxel_size(volume, plan), plan)
    image, scale = grey_values(part.array, shape, plan)
    return Prepared(image, resample_labels(label[box], shape), None, scale)


def _image_type(volume: Volume, grid: Shape) -> np.dtype[Any]:
    """Of the image as it is stored: the file's where the grid is its own and float32 holds it, as in `preparing.grey_values`."""
    dtype = volume.pixels.dtype
    if grid != volume.shape_vox or dtype.kind not in "iub" or dtype.itemsize > 2:
        return np.dtype(np.float32)
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype


def _known(progress: Path, form: list[Any]) -> tuple[int, list[list[float]] | None]:
    """Slabs that are written, and the moments; 0 and None where nothing of this form is."""
    try:
        found = json.loads(progress.read_text(encoding="utf-8"))
        return (int(found["done"]), found["moments"]) if found["form"] == form else (0, None)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _measured(work: _Work) -> tuple[Moments, ...]:
    """Of each channel what its grey values depend on; what they do not depend on is 0, and not measured."""
    volume, config = work.volume, work.plan.normalisation
    boxes = list(parts_of(volume.shape_vox, volume.chunk_vox, MOST_READ // volume.channels))
    fill = fill_of(volume, boxes)
    count, zeros = math.prod(volume.shape_vox), [0.0] * len(fill)
    means, sds, extremes = zeros, zeros, [Extremes() for _ in fill]
    clipped = work.resampled and work.plan.interpolation == "cubic"
    workers: list[tuple[list[tuple[slice, ...]], Sequence[Worker]]] = [(boxes, extremes)] if clipped else []
    if config.kind == "image":
        sums = [Blocks(sum_of) for _ in fill]
        sweep(volume, fill, (boxes, sums), *workers)
        means = [each.total() / count for each in sums]
        squares = [Blocks(squares_about(mean)) for mean in means]
        sweep(volume, fill, (boxes, squares))
        sds = [math.sqrt(each.total() / count) for each in squares]
    elif clipped:
        sweep(volume, fill, *workers)
    ends = [(each.low, each.high) if clipped else (0.0, 0.0) for each in extremes]
    return tuple(Moments(float(f), mean, sd, low, high) for f, mean, sd, (low, high) in zip(fill, means, sds, ends, strict=True))


def slabs_of(work_grid: Shape, file_shape: Shape, target: GrowingArray, chunk_rows: int, interpolation: str) -> list[list[Slab]]:
    """The slabs of an array by part of its plane, those of a part from the first row to the last.

    Args:
        work_grid: S of the array.
        file_shape: S of the file.
        target: its shape is (C, *S) or S; boxes are multiples of its sides where that leaves them small enough.
        chunk_rows: rows of the file that are read at once.
        interpolation: how far rows reach.
    """
    dims = len(work_grid)
    channels, sides = math.prod(target.shape[:-dims]), target.sides[-dims:]
    factors = [old / new for old, new in zip(file_shape, work_grid, strict=True)]
    reach = KERNELS["cubic" if interpolation == "cubic" else "linear"][1]
    rows = BAND_ROWS / 2 * factors[0] + 2 * reach * max(1.0, factors[0]) + chunk_rows
    most = int(PLANE_VALUES / (rows * channels * max(1.0, math.prod(factors[1:]))))
    if math.prod(min(side, size) for side, size in zip(sides[1:], work_grid[1:], strict=True)) > most:
        sides = (1,) * dims
    name = "image" if len(target.shape) > dims else "label"
    found = []
    for plane in parts_of(work_grid[1:], sides[1:], max(1, min(most, SLAB_VALUES // (channels * sides[0])))):
        height = max(1, SLAB_VALUES // (channels * count_of([plane]) * sides[0])) * sides[0]
        starts = range(0, work_grid[0], height)
        found.append([Slab(name, (slice(start, min(work_grid[0], start + height)), *plane)) for start in starts])
    return found


def _written(work: _Work, moments: tuple[Moments, ...], done: int) -> Iterator[None]:
    """Makes and writes the slabs after the first `done`; gives way after each, and before the first."""
    yield
    chunk, plan = work.volume.chunk_vox[0], work.plan
    parts = slabs_of(work.grid, work.volume.shape_vox, work.image_to, chunk, plan.interpolation)
    parts += slabs_of(work.grid, work.volume.shape_vox, work.label_to, work.label.volume.chunk_vox[0], "linear")
    for slabs in parts:
        left = slabs[done:]
        done = max(0, done - len(slabs))
        if not left:
            continue
        plane = [(side.start, side.stop) for side in left[0].box[1:]]
        rows = _image_rows(work, moments, plane) if left[0].name == "image" else _LabelRows(work.label, work.grid, plane)
        for slab in left:
            low, high = slab.box[0].start, slab.box[0].stop
            if isinstance(rows, Source):
                work.image_to.write((slice(0, rows.channels), *slab.box), rows.rows(low, high, low))
            else:
                work.label_to.write(slab.box, rows.rows(low, high))
            yield


def _image_rows(work: _Work, moments: tuple[Moments, ...], plane: Sequence[Span]) -> Source:
    """Rows of the image as they are stored: grey values, or on the file's own grid its values."""
    config = work.plan.normalisation if work.resampled else NormalisationConfig(kind="none")
    return Source(work.volume, work.grid, work.plan, Grey(config, moments), plane)


class _LabelRows:
    """Rows of a label on the plan's grid, of a part of its plane, from the first to the last."""

    def __init__(self, label: LabelParts, grid: Shape, plane: Sequence[Span]) -> None:
        self._label, self._plane = label, tuple(plane)
        self._resampler = None if tuple(grid) == label.shape else Resampler(label.shape, grid, 1, plane=self._plane)
        self._source_plane = self._plane if self._resampler is None else self._resampler.source_plane
        self._read: Rows | None = None

    def rows(self, low: int, high: int) -> np.ndarray:
        """Rows low..high, (rows, *plane) int16; those before are not asked for again."""
        resampler = self._resampler
        if resampler is None:
            return self._file_rows(low, high)
        made, row = [], low
        while row < high:
            band = resampler.band_of(row)
            part = np.empty((len(band.weights), *(b - a for a, b in self._plane)), np.int16)
            label_band(resampler, band, self._file_rows(band.low, band.high), part)
            made.append(part[row - band.first : min(high, band.last) - band.first])
            row = band.last
        return np.concatenate(made)

    def _file_rows(self, low: int, high: int) -> np.ndarray:
        """Rows of the file, with what is left of those before them; a chunk is read once."""
        if self._read is None:
            self._read = Rows(low)
        self._read.drop(low)
        if self._read.past < high:
            depth = self._label.volume.chunk_vox[0]
            past = min(self._label.shape[0], -(-high // depth) * depth)
            box = (slice(self._read.past, past), *(slice(a, b) for a, b in self._source_plane))
            self._read.add(self._label[box][None])
        rows: np.ndarray = self._read.get(low, high)[0]
        return rows


@dataclass(frozen=True)
class _Stored:
    """A label that was written, of which parts are read."""

    volume: Volume
    written: GrowingArray

    @property
    def shape(self) -> Shape:
        """S."""
        return self.written.shape

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        found: np.ndarray = self.written[part].astype(np.int16)
        return found


def _facts(work: _Work, moments: tuple[Moments, ...], rng: np.random.Generator) -> Facts:
    """What must be known of a case whose arrays are there."""
    image = replace(work.volume, pixels=work.image_to, chunk_vox=work.image_to.sides[1:])
    counts, voxels = find_classes(_Stored(replace(image, chunk_vox=work.label_to.sides), work.label_to), rng)
    boxes = looked_at(image)[0]
    below, above, _ = quantile_places(count_of(boxes))
    ends = ends_of(image, np.zeros(image.channels, np.float32), boxes, (below, above))
    scale = None if work.resampled else _scale(work.plan.normalisation, moments)
    return Facts(voxels, counts, between(ends, count_of(boxes), scale), scale, np.empty(0))


def _scale(config: NormalisationConfig, moments: tuple[Moments, ...]) -> Scale | None:
    """What makes the file's values grey values."""
    if config.kind == "none":
        return None
    if config.kind == "dataset":
        return Scale.of(np.array([config.low, config.high, config.mean, config.sd]))
    unlimited = np.full(len(moments), np.inf)
    return Scale.of(np.array([-unlimited, unlimited, [one.mean for one in moments], [one.sd for one in moments]]))
