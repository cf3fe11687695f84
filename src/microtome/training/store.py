"""Cases brought to the plan's grid and grey values once, kept as memory-mapped arrays on disk."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microtome.config import Plan
from microtome.data.dataset import NOT_ANNOTATED, Case, Dataset
from microtome.errors import RunError
from microtome.files import atomic_path
from microtome.geometry import Shape
from microtome.preprocess import grid_shape, normalise, resample, resample_labels, voxel_size
from microtome.training.borders import border_weights, objects_of, separated

# Enough to draw from for thousands of steps; more only costs memory.
VOXELS_A_CLASS = 2000
# A file that is mapped is one that is open, and many systems let a process open 1024 (macOS: 256).
MOST_OPEN = 128
# Cases that are prepared, and held in memory, at once.
MOST_THREADS = 4
# Points of the table of a channel's quantiles, the smallest and the largest value among them.
QUANTILES = 257


@dataclass(frozen=True)
class MappedArray:
    """An array in a .npy file that is mapped into memory when a part of it is read, and closed when it was long not read.

    Attributes:
        path: the file.
        shape: of the array.
        opened: maps a file, or gives the mapping that was made of it before.
    """

    path: Path
    shape: Shape
    opened: Callable[[Path], np.ndarray]

    def __getitem__(self, part: Any) -> np.ndarray:
        found: np.ndarray = self.opened(self.path)[part]
        return found


@dataclass(frozen=True)
class StoredCase:
    """One case on disk, ready to be sampled.

    Attributes:
        name: the case's name.
        image: (C, *S) float32.
        label: (*S) int16, -1 where not annotated.
        class_voxels: for each class that it holds, up to 2000 voxel indices (N, D) drawn from all of them.
        class_counts: how many voxels of each of these classes it really holds.
        weight: how often it is drawn, relative to others.
        quantiles: (C, 257) float32 of the image, from its smallest to its largest value.
        weight_map: (*S) float16, how much each voxel counts in the loss; None: all alike.
    """

    name: str
    image: MappedArray | np.ndarray
    label: MappedArray | np.ndarray
    class_voxels: Mapping[int, np.ndarray]
    class_counts: Mapping[int, int]
    weight: float
    quantiles: np.ndarray
    weight_map: MappedArray | np.ndarray | None = None

    @property
    def shape_vox(self) -> Shape:
        """The spatial shape."""
        return tuple(self.label.shape)

    def crop(self, part: tuple[slice | int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Image (C, *part) float32 in the network's grey values, label (*part) int16 and weight (*part) float32 of a part, all copies."""
        image_CS = np.array(self.image[(slice(None), *part)], np.float32)
        weight_S = None if self.weight_map is None else np.array(self.weight_map[part], np.float32)
        return image_CS, np.array(self.label[part], np.int16), weight_S

    @cached_property
    def dense(self) -> bool:
        """Whether every voxel is annotated."""
        return sum(self.class_counts.values()) == math.prod(self.shape_vox)

    def draw_annotated(self, rng: np.random.Generator) -> np.ndarray:
        """A voxel index (D,): any voxel of a dense case; else a class, by how many voxels it really has, and one of those noted of it."""
        if self.dense:
            return np.array([rng.integers(size) for size in self.shape_vox])
        classes, counts = zip(*self.class_counts.items(), strict=True)
        ends = np.cumsum(counts)
        place = int(rng.integers(ends[-1]))
        number = int(np.searchsorted(ends, place, side="right"))
        noted, count = self.class_voxels[classes[number]], counts[number]
        # The noted ones stand for equal shares of all.
        voxel: np.ndarray = noted[(place - int(ends[number]) + count) * len(noted) // count]
        return voxel


def store_cases(dataset: Dataset, cases: Sequence[Case], plan: Plan, folder: Path) -> list[StoredCase]:
    """Preprocess cases into `folder` (or take what lies there from an interrupted run); those that hold annotations.

    A few cases at once, each in a thread of its own; each file appears only when complete.

    Raises:
        RunError: they will not fit on the disk; nothing was begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stems = [folder / f"{number:05d}-{_key(case, plan)}" for number, case in enumerate(cases)]
    _check_space(dataset, [case for case, stem in zip(cases, stems, strict=True) if not _is_stored(stem)], plan, folder)
    opened = lru_cache(MOST_OPEN)(_map)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:

        def store(number: int) -> StoredCase:
            if not _is_stored(stems[number]):
                _store(dataset, cases[number], plan, stems[number], np.random.default_rng([plan.seed, number]))
            return _open(cases[number], stems[number], opened)

        stored = list(pool.map(store, range(len(cases))))
    return [case for case in stored if case.class_voxels]


class Prepared(NamedTuple):
    """A case on the plan's grid.

    Attributes:
        image: (C, *S) float32.
        label: (*S) int16, -1 where not annotated.
        weight: (*S) float16, how much each voxel counts in the loss; None where the plan has no border weights.
    """

    image: np.ndarray
    label: np.ndarray
    weight: np.ndarray | None = None


def prepare(dataset: Dataset, case: Case, plan: Plan) -> Prepared:
    """A case on the plan's grid, in the network's grey values."""
    image = dataset.read_image(case)
    shape = grid_shape(image.shape_vox, voxel_size(image, plan), plan)
    array = resample(normalise(image.array, plan.normalisation), shape)
    label = resample_labels(dataset.read_label(case), shape)
    if not plan.loss.border_weight:
        return Prepared(array, label)
    found = dataset.read_instances(case)
    objects = None if found is None else nearest(found, shape)
    return Prepared(array, *weigh_borders(label, objects, plan, dataset.legend.background))


def nearest(values_S: np.ndarray, new_shape_vox: Shape) -> np.ndarray:
    """Values on a new grid of the same extent, each voxel that of the old one under its centre: object numbers have no mean."""
    for axis, (size, new_size) in enumerate(zip(values_S.shape, new_shape_vox, strict=True)):
        if size != new_size:
            values_S = values_S.take(((np.arange(new_size) + 0.5) * size / new_size).astype(int), axis)
    return values_S


def weigh_borders(label_S: np.ndarray, objects_S: np.ndarray | None, plan: Plan, background: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The label with gaps of background between touching objects, and the weight of each voxel, float16, most in the gaps.

    Without objects the label stays as it is: what touches there are pieces of different classes, which need no gap to be told
    apart, and a gap would be a false label.

    A 2D network's stack is weighed a section at a time, as it sees nothing else.

    Args:
        label_S: on the plan's grid.
        objects_S: the objects on the same grid; None: the connected parts of all classes but the background.
        plan: with the settings of its loss.
        background: the class that a gap becomes; None: every class is one of objects.
    """
    loss, spacing_mm = plan.loss, plan.spacing_mm[-plan.dims :]
    labels = np.array(label_S).reshape(-1, *label_S.shape[-plan.dims :])
    weights = np.empty(labels.shape, np.float16)
    for number, label in enumerate(labels):
        objects = _pieces(label, background) if objects_S is None else objects_S.reshape(labels.shape)[number]
        apart = objects if objects_S is None else separated(objects)
        label[(objects > 0) & (apart == 0) & (label != NOT_ANNOTATED)] = background or 0
        found = border_weights(apart, spacing_mm, w0=loss.border_weight, sigma_vox=loss.border_sigma, balance=loss.balance_classes)
        # Nothing is learned where nothing is annotated, but a sample between there and here would take half of its weight.
        found[label == NOT_ANNOTATED] = 1
        weights[number] = np.minimum(found, np.finfo(np.float16).max)
    return labels.reshape(label_S.shape), weights.reshape(label_S.shape)


def _pieces(label_S: np.ndarray, background: int | None) -> np.ndarray:
    """The connected parts of all classes but the background, which `objects_of` takes to be 0."""
    shifted_S = np.where(label_S == NOT_ANNOTATED, NOT_ANNOTATED, label_S + 1)
    if background is not None:
        shifted_S[label_S == background] = 0
    return objects_of(shifted_S)


def stored_bytes(dataset: Dataset, case: Case, plan: Plan) -> int:
    """How many bytes a case will take on disk, from its header."""
    # Parts of one stack carry its name with their sections behind it.
    header = dataset.headers[case.name if case.name in dataset.headers else case.name.rpartition("[")[0]]
    shape = header.shape_vox
    if case.sections:
        shape = (case.sections[1] - case.sections[0], *shape[1:])
    assumed = header.spacing_mm if header.spacing_known else plan.assumed_spacing_mm or header.spacing_mm
    spacing = plan.stated_spacing_mm or dataset.config.spacing_mm or assumed
    voxels = math.prod(grid_shape(shape, spacing, plan))
    noted = min(voxels, VOXELS_A_CLASS * len(plan.classes))
    each = 4 * plan.channels + (4 if plan.loss.border_weight else 2)
    return voxels * each + noted * 4 * len(shape) + 4 * QUANTILES * plan.channels


def _check_space(dataset: Dataset, cases: Sequence[Case], plan: Plan, folder: Path) -> None:
    """Refuse before hours of work what would fill the disk at their end."""
    needed = sum(stored_bytes(dataset, case, plan) for case in cases)
    free = shutil.disk_usage(folder).free
    if needed > free:
        expected = f"{needed} free bytes for {len(cases)} prepared cases ({needed / 1e9:.1f} GB)"
        got = f"{free} ({free / 1e9:.1f} GB)"
        raise RunError(folder, expected=expected, got=got, do="free space and --resume, or give another --out")


def _key(case: Case, plan: Plan) -> str:
    """What the stored arrays depend on, in a file's name: after a change of the plan they are not taken for the new ones."""
    grid = (plan.dims, plan.spacing_mm, plan.stated_spacing_mm, plan.assumed_spacing_mm, plan.resize_vox)
    loss = plan.loss
    borders = (loss.border_weight, loss.border_sigma, loss.balance_classes) if loss.border_weight else ()
    settings = repr((case.name, case.sections, case.planes, grid, plan.normalisation, borders, plan.seed))
    return hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()


def _is_stored(stem: Path) -> bool:
    """Whether a case is complete: the file that is written last is there."""
    return stem.with_suffix(".voxels.npz").exists()


def _store(dataset: Dataset, case: Case, plan: Plan, stem: Path, rng: np.random.Generator) -> None:
    """Write one case: image, label, and last where its classes are."""
    image, label, weight = prepare(dataset, case, plan)
    arrays = [(".image.npy", image), (".label.npy", label)]
    for suffix, array in [*arrays, (".weight.npy", weight)] if weight is not None else arrays:
        with atomic_path(stem.with_suffix(suffix)) as part, part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    counts = class_counts(label)
    voxels = {f"{k}": draw_voxels(rng, label, k) for k in counts}
    table = np.array(list(counts.items()), np.int64).reshape(-1, 2)
    with atomic_path(stem.with_suffix(".voxels.npz")) as part, part.open("wb") as file:
        np.savez(file, counts=table, quantiles=quantiles(image), allow_pickle=False, **voxels)


def _map(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped into memory."""
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _open(case: Case, stem: Path, opened: Callable[[Path], np.ndarray]) -> StoredCase:
    """A case that was stored."""

    def mapped(name: str) -> MappedArray:
        path = stem.with_suffix(f".{name}.npy")
        return MappedArray(path, opened(path).shape, opened)

    with np.load(stem.with_suffix(".voxels.npz"), allow_pickle=False) as file:
        counts = {int(k): int(count) for k, count in file["counts"]}
        voxels = {k: file[str(k)] for k in counts}
        table = file["quantiles"]
    # Parts of one stack are drawn by their size; separate images equally often, whatever their size.
    weight = float(sum(counts.values())) if case.sections else 1.0
    weight_map = mapped("weight") if stem.with_suffix(".weight.npy").exists() else None
    return StoredCase(case.name, mapped("image"), mapped("label"), voxels, counts, weight, table, weight_map)


def quantiles(image_CS: np.ndarray) -> np.ndarray:
    """257 evenly spaced quantiles of each channel of an image, (C, 257) float32, linear between its sorted values."""
    table = np.empty((len(image_CS), QUANTILES), np.float32)
    for row, channel in zip(table, image_CS, strict=True):
        # A sort of the whole is several times faster than NumPy's search for so many quantiles.
        values = np.sort(channel, axis=None)
        place = np.linspace(0, len(values) - 1, QUANTILES)
        below = place.astype(int)
        above, share = np.minimum(below + 1, len(values) - 1), place - below
        row[:] = values[below] * (1 - share) + values[above] * share
    return table


def class_counts(label: np.ndarray) -> dict[int, int]:
    """How many voxels of each class a label map (*S) int16 holds; -1 is none."""
    total = np.zeros(2**15 + 1, np.int64)
    for part in label.reshape(len(label), -1):
        # A section at a time, shifted by one: the count is of 64-bit numbers, of which a volume's would fill the memory.
        found = np.bincount(part.astype(np.int32) + 1)
        total[: len(found)] += found
    return {int(k): int(total[k + 1]) for k in np.flatnonzero(total[1:])}


def draw_voxels(rng: np.random.Generator, label: np.ndarray, k: int) -> np.ndarray:
    """Indices (N, D) int32 of some voxels of a class of a label map (*S)."""
    places = np.flatnonzero(label == k)
    if len(places) > VOXELS_A_CLASS:
        places = rng.choice(places, VOXELS_A_CLASS, replace=False)
    return np.stack(np.unravel_index(places, label.shape), axis=1).astype(np.int32)
