"""A sample is a pure function of (seed, step, position in the batch): nothing here keeps state.

A run therefore resumes at any step bit for bit, and who computes a sample, or when, changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from microtome.config import Plan
from microtome.geometry import Shape
from microtome.training.intensity import Intensity, draw_intensity, draw_other, match_histogram
from microtome.training.store import StoredCase
from microtome.training.warp import Patch, Warp, draw_warp, warp_patch


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


class Crop(NamedTuple):
    """The part of a case that a sample is made of.

    Attributes:
        patch: image, label and weight of that part, before any change.
        centre: (D,) where the middle of the sample lies in it, in voxels from its first.
    """

    patch: Patch
    centre: np.ndarray


def read_crop(sample: Sample, cases: Sequence[StoredCase], patch_vox: Shape) -> Crop:
    """What the sample needs of its case, and no more; nothing is computed."""
    case = cases[sample.case]
    box = sample.warp.box(sample.centre, patch_vox, case.shape_vox[-len(patch_vox) :])
    image, label, weight = case.crop(box if sample.section is None else (sample.section, *box))
    part = Patch(torch.from_numpy(image), torch.from_numpy(label), None if weight is None else torch.from_numpy(weight))
    return Crop(part, sample.centre - [side.start for side in box])


def load_sample(sample: Sample, cases: Sequence[StoredCase], patch_vox: Shape) -> Patch:
    """Image (C, *patch), label (*patch) and, where cases have a weight map, weight of a sample; reads only the part that it needs."""
    crop = read_crop(sample, cases, patch_vox)
    patch = warp_patch(crop.patch, sample.warp, crop.centre, patch_vox)
    return patch._replace(image=change_values(sample, patch.image, cases))


def change_values(sample: Sample, image_CS: Tensor, cases: Sequence[StoredCase]) -> Tensor:
    """The grey values of a sample's patch, on whatever device it lies: another case's histogram, then the intensity."""
    if sample.other is not None:
        image_CS = match_histogram(image_CS, cases[sample.case].quantiles, cases[sample.other].quantiles)
    return sample.intensity.apply(image_CS)


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
