"""A sample is a pure function of (seed, step, position in the batch): nothing here keeps state.

A run therefore resumes at any step bit for bit, and who computes a sample, or when, changes nothing.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from microtome.config import Plan
from microtome.geometry import Shape
from microtome.preprocess import crop_box
from microtome.training.intensity import Intensity, draw_intensity, draw_other, match_histogram
from microtome.training.store import StoredCase
from microtome.training.warp import Patch, Warp, draw_warp, resample_patch


@dataclass(frozen=True)
class Sample:
    """What is drawn for one patch.

    Attributes:
        case: index into the pool's cases.
        section: index along the slowest axis where a 2D network sees sections of a volume, else None.
        centre: (D,) voxel of the case under the middle of the patch.
        warp: the spatial change.
        intensity: the change of grey values.
        other: index of the case whose histogram the grey values take before, or None.
    """

    case: int
    section: int | None
    centre: np.ndarray
    warp: Warp
    intensity: Intensity
    other: int | None = None


@dataclass(frozen=True)
class Pool:
    """The cases to draw from, and what is drawn by, found once.

    Attributes:
        cases: all of them.
        shares: the probability of each case, by its weight.
        holders: for each class that is annotated anywhere, in order: the class and the cases (N,) that hold it.
    """

    cases: tuple[StoredCase, ...]
    shares: np.ndarray
    holders: tuple[tuple[int, np.ndarray], ...]

    @classmethod
    def of(cls, cases: Sequence[StoredCase]) -> Self:
        """The pool of these cases."""
        weights = np.array([case.weight for case in cases])
        found: dict[int, list[int]] = {}
        for number, case in enumerate(cases):
            for k in case.class_voxels:
                found.setdefault(k, []).append(number)
        return cls(tuple(cases), weights / weights.sum(), tuple((k, np.array(found[k])) for k in sorted(found)))

    def draw_case(self, rng: np.random.Generator) -> int:
        """A case, by its weight."""
        return int(rng.choice(len(self.cases), p=self.shares))

    def draw_class_voxel(self, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """A case and a voxel of a class drawn evenly among the classes that any case holds."""
        k, holders = self.holders[int(rng.integers(len(self.holders)))]
        number = int(holders[int(rng.integers(len(holders)))])
        voxels = self.cases[number].class_voxels[k]
        return number, voxels[int(rng.integers(len(voxels)))]


def draw_sample(pool: Pool, plan: Plan, step: int, position: int, border: int = 0) -> Sample:
    """The sample at this place of the run.

    With probability `plan.foreground` a class is drawn evenly among those annotated anywhere, then a case that has
    it, then a voxel of it: rare classes are seen as often as common ones. Otherwise the patch lies anywhere, or,
    in a case that is annotated in parts, around any annotated voxel. A network without padding answers only for the
    middle of its patch, `border` voxels less on each side: that middle is what is placed, the rest may be mirrored.
    """
    rng = np.random.default_rng([plan.seed, step, position])
    by_class = rng.random() < plan.foreground
    if by_class:
        number, voxel = pool.draw_class_voxel(rng)
    else:
        number = pool.draw_case(rng)
        voxel = pool.cases[number].draw_annotated(rng)
    case, dims = pool.cases[number], plan.dims
    section = int(voxel[0]) if len(case.shape_vox) > dims else None
    shape_vox = case.shape_vox[-dims:]
    seen_vox = tuple(n - 2 * border for n in plan.patch_vox)
    centre = _place(rng, voxel[-dims:], shape_vox, seen_vox, free=case.dense and not by_class)
    intensity = draw_intensity(rng, plan.augment, plan.spacing_mm[-dims:])
    other = draw_other(rng, plan.augment, number, len(pool.cases))
    # The movement comes last: how many control points are drawn then changes nothing else.
    return Sample(number, section, centre, draw_warp(rng, plan.augment, plan.patch_vox, plan.spacing_mm), intensity, other)


def load_sample(sample: Sample, cases: Sequence[StoredCase], patch_vox: Shape) -> Patch:
    """Image (C, *patch), label (*patch) and, where cases have a weight map, weight of a sample; reads only the part that it needs."""
    case = cases[sample.case]
    source = sample.warp.coordinates(sample.centre, patch_vox)
    flat = source.reshape(len(patch_vox), -1)
    box = crop_box(case.shape_vox[-len(patch_vox) :], flat.min(1).tolist(), flat.max(1).tolist())
    corner = np.array([side.start for side in box], np.float32).reshape(-1, *[1] * len(patch_vox))
    part: tuple[slice | int, ...] = box if sample.section is None else (sample.section, *box)
    image, label, weight = case.crop(part)
    crop = Patch(torch.from_numpy(image), torch.from_numpy(label), None if weight is None else torch.from_numpy(weight))
    patch = resample_patch(crop, source - corner)
    image_CS = patch.image
    if sample.other is not None:
        image_CS = match_histogram(image_CS, case.quantiles, cases[sample.other].quantiles)
    return patch._replace(image=sample.intensity.apply(image_CS))


class Batch(NamedTuple):
    """The patches of a step.

    Attributes:
        image: (B, C, *patch) float32, channels last.
        label: (B, *patch) int16, -1 where not annotated.
        weight: (B, *patch) float32, how much each voxel counts in the loss; None: all alike.
    """

    image: Tensor
    label: Tensor
    weight: Tensor | None


class Batches:
    """Batches by step number, their samples made by a pool of threads.

    On a GPU the next steps' samples are made while it computes. On a CPU a step's samples are made when it begins: the
    cores are busy with the network otherwise, and a thread beside it would only take its share of them.
    """

    def __init__(self, cases: Sequence[StoredCase], plan: Plan, device: torch.device, border: int = 0) -> None:
        self.drawn_from, self.plan, self.device, self.border = Pool.of(cases), plan, device, border
        self.ahead = 0 if device.type == "cpu" else 3
        self.waiting: dict[int, list[Future[Patch]]] = {}
        threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2), initializer=_one_thread_each)
        list(self.pool.map(lambda _: None, range(2)))
        # The call in the workers also limits the library behind large products, for all threads: give it back.
        torch.set_num_threads(threads)

    def get(self, step: int) -> Batch:
        """The batch of a step, on the device."""
        for number in range(step, step + self.ahead + 1):
            if number not in self.waiting:
                self.waiting[number] = [self.pool.submit(self._load, number, position) for position in range(self.plan.batch)]
        patches = [future.result() for future in self.waiting.pop(step)]
        layout = torch.channels_last if self.plan.dims == 2 else torch.channels_last_3d
        image = torch.stack([patch.image for patch in patches]).to(self.device, memory_format=layout)
        label = torch.stack([patch.label for patch in patches]).to(self.device)
        weights = [patch.weight for patch in patches if patch.weight is not None]
        return Batch(image, label, torch.stack(weights).to(self.device) if weights else None)

    def _load(self, step: int, position: int) -> Patch:
        """One sample of one step."""
        sample = draw_sample(self.drawn_from, self.plan, step, position, self.border)
        return load_sample(sample, self.drawn_from.cases, self.plan.patch_vox)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def _one_thread_each() -> None:
    """A sample's operations are too small to be shared out: two threads would mostly wait for each other."""
    torch.set_num_threads(1)


def _place(rng: np.random.Generator, voxel: np.ndarray, shape_vox: Shape, patch_vox: Shape, *, free: bool) -> np.ndarray:
    """The middle of a patch that holds `voxel` (or lies anywhere, if `free`), inside of the image where it fits.

    The patch begins at a whole voxel: between voxels, interpolation would blur even a patch that is not bent.
    """
    centre = np.empty(len(shape_vox))
    for axis, (size, patch) in enumerate(zip(shape_vox, patch_vox, strict=True)):
        room = size - patch
        if room <= 0:
            corner = room // 2
        elif free:
            corner = int(rng.integers(room + 1))
        else:
            # A drawn voxel is seen off-centre too, or the network learns that the middle is special.
            corner = int(np.clip(round(voxel[axis] - (patch - 1) / 2 + rng.uniform(-patch / 4, patch / 4)), 0, room))
        centre[axis] = corner + (patch - 1) / 2
    return centre
