"""Slow, obvious versions of what the package does in pieces: whole arrays, float64, loops."""

import itertools
from collections.abc import Callable

import numpy as np
from scipy.interpolate import make_interp_spline

from microtome.config import Plan
from microtome.geometry import Shape, Spacing
from microtome.preprocess import grid_shape, normalise

Span = tuple[int, int]


def mirrored_box(array: np.ndarray, box: tuple[Span, ...]) -> np.ndarray:
    """A box (*S) of `array` (..., *S), cut out of the array after it was padded as far as the box reaches."""
    lead = array.ndim - len(box)
    widths = [(max(0, -a), max(0, b - n)) for (a, b), n in zip(box, array.shape[lead:], strict=True)]
    padded = np.pad(array, [(0, 0)] * lead + widths, mode="reflect")
    return padded[(slice(None),) * lead + tuple(slice(a + w, b + w) for (a, b), (w, _) in zip(box, widths, strict=True))]


def dense_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation as a matrix (new_size, size), entry by entry."""
    matrix = np.zeros((new_size, size))
    factor = size / new_size
    width = max(factor, 1.0)
    for row in range(new_size):
        centre = (row + 0.5) * factor - 0.5
        for place in range(int(np.floor(centre - width)), int(np.ceil(centre + width)) + 1):
            matrix[row, min(max(place, 0), size - 1)] += max(0.0, 1 - abs(place - centre) / width)
    return matrix / matrix.sum(axis=1, keepdims=True)


def cubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Cubic B-spline interpolation as a matrix (new_size, size): the spline through a single 1, sampled at every place."""
    reach = 40
    cardinal = make_interp_spline(np.arange(-reach, reach + 1), np.eye(2 * reach + 1)[reach], k=3)
    matrix = np.zeros((new_size, size))
    factor = size / new_size
    width = 1.0 if factor < 4 / 3 else factor if factor > 3 / 2 else 3 * factor - 3
    for row in range(new_size):
        centre = (row + 0.5) * factor - 0.5
        for place in range(int(centre - 30 * width), int(centre + 30 * width) + 1):
            matrix[row, min(max(place, 0), size - 1)] += cardinal((place - centre) / width)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resample_whole(array: np.ndarray, new_shape_vox: Shape, interpolation: str = "linear") -> np.ndarray:
    """(C, *S) -> (C, *new S), all axes by dense matrices; cubic values stay in the range of their channel."""
    spatial = tuple(range(1, array.ndim))
    low, high = array.min(axis=spatial, keepdims=True), array.max(axis=spatial, keepdims=True)
    for axis, new_size in enumerate(new_shape_vox, start=1):
        if array.shape[axis] != new_size:
            matrix = (cubic_matrix if interpolation == "cubic" else dense_matrix)(array.shape[axis], new_size)
            array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    return np.clip(array, low, high)


def logits_whole(prepared: np.ndarray, tile: Shape, overlap: float, context: int, engine: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Blended logits (K, *S) of a prepared image (C, *S), added up in arrays as large as the image and its surroundings."""
    shape = prepared.shape[1:]
    firsts = [_first_voxels(size, side, overlap) for size, side in zip(shape, tile, strict=True)]
    margin = [max(0, side - size) for size, side in zip(shape, tile, strict=True)]
    total: np.ndarray | float = 0.0
    for first in itertools.product(*firsts):
        box = tuple((a - context, a + side + context) for a, side in zip(first, tile, strict=True))
        logits = engine(np.ascontiguousarray(mirrored_box(prepared, box))).astype(np.float64)
        weight = np.ones(tile)
        for axis, side in enumerate(tile):
            bell = np.exp(-(((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2) / 2)
            weight *= (bell / bell.max()).reshape([-1 if axis == a else 1 for a in range(len(tile))])
        weight = np.maximum(weight, 1e-3)
        sums = np.zeros((len(logits) + 1, *(size + 2 * m for size, m in zip(shape, margin, strict=True))))
        place = tuple(slice(a + m, a + m + side) for a, m, side in zip(first, margin, tile, strict=True))
        sums[(slice(None), *place)] = np.concatenate([logits * weight, weight[None]])
        total = total + sums
    assert isinstance(total, np.ndarray)
    inside = tuple(slice(m, m + size) for m, size in zip(margin, shape, strict=True))
    total = total[(slice(None), *inside)]
    return total[:-1] / total[-1]


def predict_logits_whole(
    array: np.ndarray,
    spacing_mm: Spacing,
    plan: Plan,
    *,
    tile_of: Callable[[Shape], Shape],
    context: int,
    engine: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Logits (K, *S) of an image (C, *S) on its own grid; a section after the other where the network has an axis less."""
    shape = array.shape[1:]
    grid = grid_shape(shape, spacing_mm, plan)
    prepared = resample_whole(normalise(array, plan.normalisation), grid, plan.interpolation).astype(np.float32)

    def of_one(image: np.ndarray, target: Shape) -> np.ndarray:
        return resample_whole(logits_whole(image, tile_of(image.shape[1:]), plan.overlap, context, engine), target)

    if len(shape) == plan.dims:
        return of_one(prepared, shape)
    return np.stack([of_one(prepared[:, z], shape[1:]) for z in range(shape[0])], axis=1)


def _first_voxels(size: int, side: int, overlap: float) -> list[int]:
    """Where tiles begin: as few as overlap enough, evenly spread; one that is too large lies in the middle."""
    if size <= side:
        return [-((side - size) // 2)]
    count = 2
    while (size - side) / (count - 1) > max(1, int(side * (1 - overlap) + 1e-9)):
        count += 1
    return [round(i * (size - side) / (count - 1)) for i in range(count)]
