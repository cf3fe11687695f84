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
from typing import Any

import numpy as np

from microtome.config import Plan
from microtome.data.dataset import Case, Dataset
from microtome.errors import RunError
from microtome.files import atomic_path
from microtome.geometry import Shape
from microtome.preprocess import grid_shape, normalise, resample, resample_labels, voxel_size

# Enough to draw from for thousands of steps; more only costs memory.
VOXELS_A_CLASS = 2000
# A file that is mapped is one that is open, and many systems let a process open 1024 (macOS: 256).
MOST_OPEN = 128
# Cases that are prepared, and held in memory, at once.
MOST_THREADS = 4


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
    """

    name: str
    image: MappedArray | np.ndarray
    label: MappedArray | np.ndarray
    class_voxels: Mapping[int, np.ndarray]
    class_counts: Mapping[int, int]
    weight: float

    @property
    def shape_vox(self) -> Shape:
        """The spatial shape."""
        return tuple(self.label.shape)

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


def prepare(dataset: Dataset, case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, *S) float32 and label (*S) int16 of a case on the plan's grid."""
    image = dataset.read_image(case)
    shape = grid_shape(image.shape_vox, voxel_size(image, plan), plan)
    array = resample(normalise(image.array, plan.normalisation), shape)
    return array, resample_labels(dataset.read_label(case), shape)


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
    return voxels * (4 * plan.channels + 2) + noted * 4 * len(shape)


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
    settings = f"{case.name} {plan.dims} {plan.spacing_mm} {plan.normalisation} {plan.seed}"
    return hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()


def _is_stored(stem: Path) -> bool:
    """Whether a case is complete: the file that is written last is there."""
    return stem.with_suffix(".voxels.npz").exists()


def _store(dataset: Dataset, case: Case, plan: Plan, stem: Path, rng: np.random.Generator) -> None:
    """Write one case: image, label, and last where its classes are."""
    image, label = prepare(dataset, case, plan)
    for suffix, array in ((".image.npy", image), (".label.npy", label)):
        with atomic_path(stem.with_suffix(suffix)) as part, part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    counts = class_counts(label)
    voxels = {f"{k}": draw_voxels(rng, label, k) for k in counts}
    table = np.array(list(counts.items()), np.int64).reshape(-1, 2)
    with atomic_path(stem.with_suffix(".voxels.npz")) as part, part.open("wb") as file:
        np.savez(file, counts=table, allow_pickle=False, **voxels)


def _map(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped into memory."""
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _open(case: Case, stem: Path, opened: Callable[[Path], np.ndarray]) -> StoredCase:
    """A case that was stored."""
    image, label = (MappedArray(path, opened(path).shape, opened) for path in (stem.with_suffix(f".{n}.npy") for n in ("image", "label")))
    with np.load(stem.with_suffix(".voxels.npz"), allow_pickle=False) as file:
        counts = {int(k): int(count) for k, count in file["counts"]}
        voxels = {k: file[str(k)] for k in counts}
    # Parts of one stack are drawn by their size; separate images equally often, whatever their size.
    weight = float(sum(counts.values())) if case.sections else 1.0
    return StoredCase(case.name, image, label, voxels, counts, weight)


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
