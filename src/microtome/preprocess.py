"""An image -> network input, and labels to the network's grid; the same for training and prediction."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from microtome.config import NormalisationConfig, Plan
from microtome.errors import DataError
from microtome.geometry import Shape, Spacing, resampled_shape
from microtome.images.image import Image

# Images of one kind hardly differ more than this in voxel size; a unit mistaken for another does.
MOST_RESAMPLED = 16.0


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
            # float64 sums: float32 loses digits over 10^8 voxels of a 16-bit image.
            mean, sd = float(target.mean(dtype=np.float64)), float(target.std(dtype=np.float64))
        target -= np.float32(mean)
        if np.float32(sd) > 0:
            target /= np.float32(sd)
    return result


def voxel_size(image: Image, plan: Plan) -> Spacing:
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
        raise DataError(image.path, expected=expected, got=f"{sizes} mm", do="correct the file's voxel size or unit")
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


def resampling_matrix(size: int, new_size: int) -> sparse.csr_array:
    """Linear interpolation of `size` samples at `new_size` places over the same extent, as a matrix (new_size, size).

    Voxel edges stay where they are. When it shrinks, the triangle widens with the factor, so that what cannot be
    shown is averaged instead of aliased. Rows sum to 1; samples beyond the border repeat the border.
    """
    factor = size / new_size
    width = max(factor, 1.0)
    centre = (np.arange(new_size) + 0.5) * factor - 0.5
    reach = int(np.ceil(width))
    index = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 2)[None, :]
    weight = np.maximum(0.0, 1.0 - np.abs(index - centre[:, None]) / width)
    weight /= weight.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(new_size), index.shape[1])
    entries = sparse.coo_array((weight.ravel(), (rows, index.clip(0, size - 1).ravel())), shape=(new_size, size))
    matrix = sparse.csr_array(entries.astype(np.float32))
    # Zeros would cost half of all multiplications, and let prediction wait for rows that it does not need.
    matrix.eliminate_zeros()
    return matrix


def resample(array: np.ndarray, new_shape_vox: Shape) -> np.ndarray:
    """`(C, *S)` -> float32 (C, *new S) by linear interpolation along one axis after the other."""
    array = np.asarray(array, np.float32)
    for axis, (size, new_size) in enumerate(zip(array.shape[1:], new_shape_vox, strict=True), start=1):
        if size != new_size:
            array = apply_along(resampling_matrix(size, new_size), array, axis)
    return array


def apply_along(matrix: sparse.csr_array, array: np.ndarray, axis: int) -> np.ndarray:
    """The matrix (n, m) applied to axis `axis`, of length m, of an array."""
    moved = np.moveaxis(array, axis, 0)
    product = matrix @ np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
    return np.ascontiguousarray(np.moveaxis(product.reshape(-1, *moved.shape[1:]), 0, axis))


def resample_labels(labels: np.ndarray, new_shape_vox: Shape) -> np.ndarray:
    """Labels (*S) int16 on a new grid: at each voxel the value that covers most of it; -1 counts as a value."""
    if labels.shape == tuple(new_shape_vox):
        return labels
    values = np.unique(labels)
    best = np.full(new_shape_vox, -1.0, np.float32)
    result = np.empty(new_shape_vox, np.int16)
    for value in values:
        share = resample((labels == value)[None], new_shape_vox)[0]
        np.copyto(result, value, where=share > best)
        np.maximum(best, share, out=best)
    return result


def crop_box(array_shape: Sequence[int], low: Sequence[float], high: Sequence[float]) -> tuple[slice, ...]:
    """The smallest box of whole voxels, inside of the array, that holds low..high with one voxel to spare."""
    box = []
    for size, a, b in zip(array_shape, low, high, strict=True):
        first = min(max(int(np.floor(a)) - 1, 0), size - 1)
        last = max(min(int(np.ceil(b)) + 1, size - 1), first)
        box.append(slice(first, last + 1))
    return tuple(box)
