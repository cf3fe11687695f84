"""What a bundle carries to judge other engines by: one input with torch's answer, and inputs to choose int8 scales by."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from microtome.bundle import Samples
from microtome.config import Plan
from microtome.data.dataset import NOT_ANNOTATED, Case, Dataset
from microtome.geometry import Shape
from microtome.models.network import Network
from microtome.preprocess import grid_shape, normalise, resample, resample_labels, voxel_size
from microtome.tiling import Span, read_mirrored

# Sides of the golden input, by the number of axes, and its voxels: about a patch. The default network
# answers it on one thread in about a second.
GOLDEN_SIDE: Mapping[int, int] = MappingProxyType({2: 256, 3: 64})
GOLDEN_VOXELS: Mapping[int, int] = MappingProxyType({2: 1 << 16, 3: 1 << 18})
# Of the golden input and its logits, which grow with the classes.
MOST_GOLDEN_BYTES = 8_000_000
CALIBRATION_PATCHES: Mapping[int, int] = MappingProxyType({2: 8, 3: 4})
MOST_CASES = 4
MOST_VOXELS = 1 << 20
# Of all samples together, so that the model stays a file that is passed on.
MOST_BYTES = 32_000_000
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


def samples_of(dataset: Dataset, cases: Sequence[Case], plan: Plan, network: Network) -> Samples:
    """Parts of training cases as prediction sees them, around a foreground voxel or anywhere, and what the network says of one.

    The same plan and cases give the same samples.

    Args:
        dataset: that the cases belong to.
        cases: of training; the first, the last and some between are read.
        plan: of the training.
        network: the trained one, in any mode on any device; a copy of it answers, in float32 on the CPU.
    """
    chosen = [cases[number] for number in np.unique(np.linspace(0, len(cases) - 1, MOST_CASES).astype(int))]
    golden_vox = golden_shape(plan, network)
    patch_vox, count = calibration_shape(plan, network, golden_vox)
    rng = np.random.default_rng([plan.seed, 0])
    golden_CS, patches = None, []
    for number, case in enumerate(chosen):
        image_CS, foreground = _prepared(dataset, case, plan)
        if golden_CS is None:
            golden_CS = next(_parts(image_CS, foreground, golden_vox, rng))
        parts = _parts(image_CS, foreground, patch_vox, rng)
        patches += [next(parts) for _ in range(number, count, len(chosen))]
    assert golden_CS is not None, "training has a case"
    golden_CS = golden_CS.astype(np.float32)
    return Samples(golden_CS, answer(network, golden_CS), tuple(patches))


def answer(network: Network, image_CS: np.ndarray) -> np.ndarray:
    """Logits (K, *S') of a network for an input (C, *S), by float32 arithmetic on the CPU; the network stays as it is."""
    oracle = copy.deepcopy(network).to("cpu", torch.float32).eval()
    with torch.inference_mode():
        logits_KS: np.ndarray = oracle(torch.from_numpy(image_CS)[None])[0].numpy()
    return logits_KS


def golden_shape(plan: Plan, network: Network) -> Shape:
    """About 256 (2D) or 64 (3D) a side, in sizes that the network takes, or the patch's where that is smaller.

    As large as a patch, because a small crop around one object is mostly border, where any other arithmetic changes labels first.
    Many classes, or sizes that the network does not take, make it smaller.
    """
    side, voxel_bytes = GOLDEN_SIDE[plan.dims], 2 * plan.channels + 4 * len(plan.classes)
    most = min(GOLDEN_VOXELS[plan.dims], MOST_GOLDEN_BYTES // voxel_bytes)
    shape = [min(network.nearest_sizes(side, axis)[1], patch) for axis, patch in enumerate(plan.patch_vox)]
    while math.prod(shape) > most:
        below = [network.nearest_sizes(size - 1, axis)[0] for axis, size in enumerate(shape)]
        shorter = [axis for axis, size in enumerate(below) if size < shape[axis]]
        if not shorter:
            break
        axis = max(shorter, key=lambda axis: shape[axis])
        shape[axis] = below[axis]
    return tuple(shape)


def calibration_shape(plan: Plan, network: Network, golden_vox: Shape) -> tuple[Shape, int]:
    """The size of calibration inputs, and how many: the patch, made smaller until all fit, then fewer."""
    count = CALIBRATION_PATCHES[plan.dims]
    voxel_bytes = 2 * plan.channels
    # The golden logits are the largest part beside: float32, one a class.
    room = MOST_BYTES - math.prod(golden_vox) * (voxel_bytes + 4 * len(plan.classes))
    most = min(MOST_VOXELS, room // (voxel_bytes * count))
    shape = list(plan.patch_vox)
    while math.prod(shape) > most:
        halves = [network.nearest_sizes(size // 2, axis)[1] for axis, size in enumerate(shape)]
        shorter = [axis for axis, half in enumerate(halves) if half < shape[axis]]
        if not shorter:
            break
        axis = max(shorter, key=lambda axis: shape[axis])
        shape[axis] = halves[axis]
    return tuple(shape), min(count, max(1, room // (voxel_bytes * math.prod(shape))))


def _prepared(dataset: Dataset, case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """A case's image (C, *S) as the network sees it, and the places (N,) of its foreground, or of all that is annotated, in flat order."""
    image, truth = dataset.read_pair(case)
    grid = grid_shape(image.shape_vox, voxel_size(image, plan), plan)
    label, background = resample_labels(truth, grid), dataset.legend.background
    foreground = np.flatnonzero((label != NOT_ANNOTATED) & (label != background))
    if not len(foreground):
        foreground = np.flatnonzero(label != NOT_ANNOTATED)
    prepared_CS = resample(normalise(image.array, plan.normalisation), grid, plan.interpolation)
    return prepared_CS, foreground


def _parts(image_CS: np.ndarray, foreground: np.ndarray, shape_vox: Shape, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Parts (C, *shape) float16 of an image without end: around a foreground voxel, anywhere, around a foreground voxel, ..."""
    sizes = image_CS.shape[1:]
    around = len(foreground) > 0
    while True:
        # One place is unravelled, not all: the indices of a large volume would take several times its memory.
        voxel = np.array(np.unravel_index(foreground[rng.integers(len(foreground))], sizes)) if around else rng.integers(sizes)
        around = not around and len(foreground) > 0
        part = image_CS
        if len(sizes) > len(shape_vox):
            part = image_CS[:, voxel[0]]
        box = tuple(_span(int(at), side, size) for at, side, size in zip(voxel[-len(shape_vox) :], shape_vox, part.shape[1:], strict=True))
        # Grey values that are left as they are in the file may be larger than float16 holds.
        yield np.clip(read_mirrored(part, box), -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16)


def _span(at: int, side: int, size: int) -> Span:
    """A span of `side` around a voxel: inside of the image if it is as large, else around its middle."""
    first = min(max(at - side // 2, 0), size - side) if size >= side else -((side - size) // 2)
    return first, first + side
