"""One case -> what training draws from: image and label on the plan's grid in their smallest exact types, weights, places."""

import math
from typing import NamedTuple

import numpy as np

from microtome.config import NormalisationConfig, Plan
from microtome.data.dataset import NOT_ANNOTATED, Case, Dataset
from microtome.geometry import Shape
from microtome.preprocess import grid_shape, mean_and_sd, normalise, resample, resample_labels, voxel_size
from microtome.training.arrays import Scale, smallest
from microtome.training.borders import border_weights, objects_of, separated

# Enough to draw from for thousands of steps; more only costs memory.
VOXELS_A_CLASS = 2000
# Points of the table of a channel's quantiles, the smallest and the largest value among them.
QUANTILES = 257
# Memory that preparing takes whatever the size of the case: rows of a grid between two axes, buffers of readers.
WORKING_FLOOR = 2**22


class Prepared(NamedTuple):
    """A case on the plan's grid.

    Attributes:
        image: (C, *S) in the smallest type that is exact.
        label: (*S) int16, -1 where not annotated.
        weight: (*S) float16, how much each voxel counts in the loss; None where the plan has no border weights.
        scale: what makes the image's values the network's grey values; None: they are.
    """

    image: np.ndarray
    label: np.ndarray
    weight: np.ndarray | None = None
    scale: Scale | None = None


def prepare(dataset: Dataset, case: Case, plan: Plan) -> Prepared:
    """A case on the plan's grid."""
    image = dataset.read_image(case)
    shape = grid_shape(image.shape_vox, voxel_size(image, plan), plan)
    array, scale = grey_values(image.array, shape, plan)
    # The file's values are not needed any more, and the label takes as much memory again.
    del image
    label = resample_labels(dataset.read_label(case), shape)
    if not plan.loss.border_weight:
        return Prepared(array, label, None, scale)
    found = dataset.read_instances(case)
    objects = None if found is None else nearest(found, shape)
    return Prepared(array, *weigh_borders(label, objects, plan, dataset.legend.background), scale)


def grey_values(array: np.ndarray, shape_vox: Shape, plan: Plan) -> tuple[np.ndarray, Scale | None]:
    """An image (C, *S) on a grid, and what makes its values the network's grey values; None where they already are.

    Where the grid is the image's own, the values stay those of the file, which most often are whole numbers of 1 or 2 bytes.
    Their means and sds are found here, as those of a part are others.
    """
    if array.shape[1:] != tuple(shape_vox):
        return smallest(resample(normalise(array, plan.normalisation), shape_vox, plan.interpolation)), None
    if array.dtype.kind not in "iub" or array.dtype.itemsize > 2:
        array = normalise(array, NormalisationConfig(kind="none"))
    return smallest(np.ascontiguousarray(array)), scale_of(array, plan.normalisation)


def scale_of(array: np.ndarray, config: NormalisationConfig) -> Scale | None:
    """What `normalise` does to a finite image (C, *S) whose values float32 holds, as numbers for each channel; None: nothing."""
    if config.kind == "none":
        return None
    if config.kind == "dataset":
        return Scale.of(np.array([config.low, config.high, config.mean, config.sd]))
    # The sums of `normalise` itself, or the last digits would differ.
    mean, sd = zip(*(mean_and_sd(channel) for channel in array), strict=True)
    unlimited = np.full(len(array), np.inf)
    return Scale.of(np.array([-unlimited, unlimited, mean, sd]))


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


def quantiles(image_CS: np.ndarray, scale: Scale | None = None) -> np.ndarray:
    """257 evenly spaced quantiles of each channel of an image's grey values, (C, 257) float32, linear between its sorted values."""
    count = math.prod(image_CS.shape[1:])
    below, above, _ = quantile_places(count)
    ends = np.empty((len(image_CS), 2, QUANTILES), np.float32)
    for pair, channel in zip(ends, image_CS, strict=True):
        # A sort of the whole is several times faster than NumPy's search for so many quantiles.
        values = np.sort(channel, axis=None)
        pair[:] = values[below], values[above]
    return between(ends, count, scale)


def quantile_places(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of so many sorted values: the places below and above each quantile, and how far it lies from the one to the other; (257,) each."""
    place = np.linspace(0, count - 1, QUANTILES)
    below = place.astype(int)
    return below, np.minimum(below + 1, count - 1), place - below


def between(ends: np.ndarray, count: int, scale: Scale | None = None) -> np.ndarray:
    """The quantiles (C, 257) float32 of so many values, from those below and above each of them (C, 2, 257) float32, scaled in place."""
    share = quantile_places(count)[2]
    if scale is not None:
        # Scaling keeps the order of values, so the few are scaled and not the many.
        scale.apply(ends)
    found: np.ndarray = ends[:, 0] * (1 - share) + ends[:, 1] * share
    return found.astype(np.float32)


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


def stored_bytes(dataset: Dataset, case: Case, plan: Plan) -> int:
    """How many bytes a case takes on disk, uncompressed, at most; from its header."""
    grids = grids_of(dataset, case, plan)
    voxels = math.prod(grids.new)
    # Of several files only the first's type is known.
    own = min(4, grids.value_bytes) if grids.old == grids.new and len(case.images) == 1 else 4
    each = own * plan.channels + (1 if len(plan.classes) <= 128 else 2) + (2 if plan.loss.border_weight else 0)
    noted = min(voxels, VOXELS_A_CLASS * len(plan.classes))
    return voxels * each + noted * 4 * len(grids.new) + 4 * QUANTILES * plan.channels


def working_bytes(dataset: Dataset, case: Case, plan: Plan) -> int:
    """About how much memory a case takes at most while it is prepared; from its header.

    Measured by `tracemalloc`: see tests/test_preparing.py.
    """
    grids, channels = grids_of(dataset, case, plan), plan.channels
    read, made = math.prod(grids.file), math.prod(grids.new)
    # The reader's bytes and the array of them, or the array and its grey values.
    image = max(2 * grids.value_bytes, grids.value_bytes + 4) * channels * read + 4 * channels * made
    label = 12 * read + 4 * channels * made
    # Indices of the voxels of a class are 8 bytes each.
    found = (4 * channels + 14) * made
    borders = 0
    if plan.loss.border_weight:
        borders = (4 * channels + 6) * made + 100 * math.prod(grids.new[-plan.dims :])
    return max(image, label, found, borders) + WORKING_FLOOR


class Grids(NamedTuple):
    """Shapes along S of a case's file, of the case in it and on the plan's grid, and the bytes of a value in the file."""

    file: Shape
    old: Shape
    new: Shape
    value_bytes: int


def grids_of(dataset: Dataset, case: Case, plan: Plan) -> Grids:
    """The sizes of a case, from its header."""
    header = dataset.header(case)
    shape = header.shape_vox
    if case.sections:
        shape = (case.sections[1] - case.sections[0], *shape[1:])
    assumed = header.spacing_mm if header.spacing_known else plan.assumed_spacing_mm or header.spacing_mm
    spacing_mm = plan.stated_spacing_mm or dataset.config.spacing_mm or assumed
    return Grids(header.shape_vox, shape, grid_shape(shape, spacing_mm, plan), np.dtype(header.dtype).itemsize)
