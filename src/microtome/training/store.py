"""Cases brought to the plan's grid and grey values once, kept as memory-mapped arrays on disk."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from microtome.config import Plan
from microtome.data.dataset import Case, Dataset
from microtome.files import atomic_path
from microtome.geometry import Shape
from microtome.preprocess import grid_shape, normalise, resample, resample_labels, voxel_size

# Enough to draw from for thousands of steps; more only costs memory.
VOXELS_A_CLASS = 2000


@dataclass(frozen=True)
class StoredCase:
    """One case on disk, ready to be sampled.

    Attributes:
        name: the case's name.
        image: (C, *S) float32, memory-mapped.
        label: (*S) int16, memory-mapped, -1 where not annotated.
        class_voxels: for each class that it holds, up to 2000 voxel indices (N, D) drawn from all of them.
        dense: whether every voxel is annotated.
        weight: how often it is drawn, relative to others.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    class_voxels: dict[int, np.ndarray]
    dense: bool
    weight: float

    @property
    def shape_vox(self) -> Shape:
        """The spatial shape."""
        return tuple(self.label.shape)

    @cached_property
    def _annotated(self) -> np.ndarray:
        """Voxels to draw from: every class by its share of the drawn ones."""
        return np.concatenate(list(self.class_voxels.values()))

    def draw_annotated(self, rng: np.random.Generator) -> np.ndarray:
        """A voxel index (D,): any voxel of a dense case, else an annotated one, of large classes no more often than of 2000 voxels."""
        if self.dense:
            return np.array([rng.integers(size) for size in self.shape_vox])
        voxel: np.ndarray = self._annotated[int(rng.integers(len(self._annotated)))]
        return voxel


def store_cases(dataset: Dataset, cases: Sequence[Case], plan: Plan, folder: Path) -> list[StoredCase]:
    """Preprocess cases into `folder` (or take what lies there from an interrupted run) and open them.

    Runs on all cores, one case a thread; each file appears only when complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stems = [folder / f"{number:05d}-{_key(case, plan)}" for number, case in enumerate(cases)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case, stem: _store(dataset, case, plan, stem), cases, stems))
    stored = [_open(case, stem, [plan.seed, number]) for number, (case, stem) in enumerate(zip(cases, stems, strict=True))]
    return [case for case in stored if case.class_voxels]


def prepare(dataset: Dataset, case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, *S) float32 and label (*S) int16 of a case on the plan's grid."""
    image = dataset.read_image(case)
    shape = grid_shape(image.shape_vox, voxel_size(image, plan), plan)
    array = resample(normalise(image.array, plan.normalisation), shape)
    return array, resample_labels(dataset.read_label(case), shape)


def _key(case: Case, plan: Plan) -> str:
    """What the stored arrays depend on, in a file's name: after a change of the plan they are not taken for the new ones."""
    settings = f"{case.name} {plan.dims} {plan.spacing_mm} {plan.normalisation}"
    return hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()


def _store(dataset: Dataset, case: Case, plan: Plan, stem: Path) -> None:
    """Write one case as two .npy files, the label last: where it is, the case is complete."""
    if stem.with_suffix(".label.npy").exists():
        return
    image, label = prepare(dataset, case, plan)
    for suffix, array in ((".image.npy", image), (".label.npy", label)):
        with atomic_path(stem.with_suffix(suffix)) as part, part.open("wb") as file:
            np.save(file, array, allow_pickle=False)


def _open(case: Case, stem: Path, seed: Sequence[int]) -> StoredCase:
    """Map one stored case into memory and note where its classes are."""
    image = np.load(stem.with_suffix(".image.npy"), mmap_mode="r", allow_pickle=False)
    label = np.load(stem.with_suffix(".label.npy"), mmap_mode="r", allow_pickle=False)
    voxels = _class_voxels(np.random.default_rng(seed), label)
    annotated = int((label >= 0).sum())
    # Parts of one stack are drawn by their size; separate images equally often, whatever their size.
    weight = float(annotated) if case.sections else 1.0
    return StoredCase(case.name, image, label, voxels, annotated == label.size, weight)


def _class_voxels(rng: np.random.Generator, label: np.ndarray) -> dict[int, np.ndarray]:
    """Indices of some voxels of each class of a label map."""
    flat = np.asarray(label).ravel()
    found = {}
    for k in np.unique(flat[flat >= 0]):
        places = np.flatnonzero(flat == k)
        if len(places) > VOXELS_A_CLASS:
            places = rng.choice(places, VOXELS_A_CLASS, replace=False)
        found[int(k)] = np.stack(np.unravel_index(places, label.shape), axis=1)
    return found
