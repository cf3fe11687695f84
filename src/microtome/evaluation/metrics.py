"""How far a prediction is from the truth: pure functions, NumPy in, a float out.

A mask is a boolean array (*S) of one to three axes; where both masks have been cut to what is
annotated, these functions need not know of it. Undefined is NaN, never a guess:

| | both empty | truth empty | prediction empty |
|---|---|---|---|
| `dice`, `iou`, `nsd` | NaN | 0 | 0 |
| `precision` | NaN | 0 | NaN |
| `recall` | NaN | NaN | 0 |
| `hd95_mm`, `assd_mm` | NaN | NaN | NaN |

A mask that fills all that is annotated around it has no surface and counts as empty for `nsd`, `hd95_mm`, `assd_mm`.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from microtome.geometry import Spacing, format_shape

# A spacing that went through 32-bit headers is off by parts in ten million, and so are its distances.
TOLERANCE_SLACK = 1e-6


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Twice the intersection over the sum of the sizes, `2|T∩P| / (|T|+|P|)`, in [0, 1]; NaN if both are empty.

    >>> dice(np.array([1, 1, 0]), np.array([0, 1, 0]))
    0.6666666666666666

    References:
        Dice 1945, doi:10.2307/1932409.
    """
    both, only_truth, only_prediction = _counts(truth, prediction)
    return _ratio(2 * both, 2 * both + only_truth + only_prediction)


def iou(truth: np.ndarray, prediction: np.ndarray) -> float:
    """The intersection over the union, `|T∩P| / |T∪P|`, in [0, 1]; NaN if both are empty.

    >>> iou(np.array([1, 1, 0]), np.array([0, 1, 0]))
    0.5

    References:
        Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.
    """
    both, only_truth, only_prediction = _counts(truth, prediction)
    return _ratio(both, both + only_truth + only_prediction)


def precision(truth: np.ndarray, prediction: np.ndarray) -> float:
    """The share of the prediction that is true, `|T∩P| / |P|`, in [0, 1]; NaN if the prediction is empty.

    >>> precision(np.array([1, 1, 0]), np.array([0, 1, 0]))
    1.0
    """
    both, _, only_prediction = _counts(truth, prediction)
    return _ratio(both, both + only_prediction)


def recall(truth: np.ndarray, prediction: np.ndarray) -> float:
    """The share of the truth that was found, `|T∩P| / |T|`, in [0, 1]; NaN if the truth is empty.

    >>> recall(np.array([1, 1, 0]), np.array([0, 1, 0]))
    0.5
    """
    both, only_truth, _ = _counts(truth, prediction)
    return _ratio(both, both + only_truth)


def pixel_accuracy(truth: np.ndarray, prediction: np.ndarray) -> float:
    """The share of annotated voxels that have the right class, in [0, 1]; NaN if nothing is annotated.

    Args:
        truth: label map (*S), negative where not annotated.
        prediction: label map (*S); a negative value is the right class nowhere.

    >>> pixel_accuracy(np.array([0, 1, 2, -1]), np.array([0, 1, 1, 1]))
    0.6666666666666666
    """
    _check_shapes(truth, prediction)
    annotated = truth >= 0
    return _ratio(_count((truth == prediction) & annotated), _count(annotated))


def volume_mm3(mask: np.ndarray, spacing_mm: Spacing) -> float:
    """The volume of a mask (*S) in mm³; of a 2D mask its area in mm².

    >>> volume_mm3(np.ones((2, 2, 2)), (3.0, 0.5, 0.5))
    6.0
    """
    return _count(mask) * math.prod(spacing_mm)


@dataclass(frozen=True, kw_only=True)
class SurfaceDistances:
    """How far each surface voxel of one mask is from the nearest surface voxel of the other, in mm.

    Attributes:
        truth_to_prediction_mm: (number of the truth's surface voxels,), infinite if the prediction is empty.
        prediction_to_truth_mm: (number of the prediction's surface voxels,), infinite if the truth is empty.
    """

    truth_to_prediction_mm: np.ndarray
    prediction_to_truth_mm: np.ndarray

    @property
    def defined(self) -> bool:
        """Whether both masks have a surface, so that distances between them exist."""
        return bool(self.truth_to_prediction_mm.size and self.prediction_to_truth_mm.size)


def surface_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing_mm: Spacing, *, annotated: np.ndarray | None = None
) -> SurfaceDistances:
    """Distances between the surfaces of two masks (*S), both ways, between voxel centres.

    A surface voxel belongs to the mask and has a face-neighbour that does not; beyond the border of the
    image nothing belongs to the mask. An axis of one voxel has no neighbours and no border (a stack of one
    section is a picture). An empty mask has no surface.

    Args:
        truth: boolean, nowhere true where nothing is annotated.
        prediction: the same.
        spacing_mm: voxel size along S.
        annotated: boolean (*S); a neighbour that is not annotated shows no border, as nobody knows what it is. Without
            this every voxel of a single annotated section would be surface, and all distances near 0. None: all is.

    References:
        Maurer, Qi, Raghavan 2003, doi:10.1109/TPAMI.2003.1177156 (the exact distance transform used).
    """
    _check_shapes(truth, prediction)
    if len(spacing_mm) != truth.ndim:
        raise ValueError(f"spacing_mm {spacing_mm} must have a value for each of the {truth.ndim} axes")
    # The last axis stays even if it is one voxel, so that a single voxel is still a mask.
    thick = [axis for axis, size in enumerate(truth.shape) if size > 1] or [truth.ndim - 1]
    flat = tuple(axis for axis in range(truth.ndim) if axis not in thick)
    spacing = tuple(spacing_mm[axis] for axis in thick)
    masks = np.squeeze(truth, flat).astype(bool), np.squeeze(prediction, flat).astype(bool)
    # All surface voxels are inside the joint box, so cropping to it changes no distance; one voxel more shows their neighbours.
    box = _bounding_box(masks[0] | masks[1], margin_vox=0 if annotated is None else 1)
    unknown = None if annotated is None else ~np.squeeze(annotated, flat)[box]
    surfaces = _surface(masks[0][box], unknown), _surface(masks[1][box], unknown)
    return SurfaceDistances(
        truth_to_prediction_mm=_directed_mm(surfaces[0], surfaces[1], spacing),
        prediction_to_truth_mm=_directed_mm(surfaces[1], surfaces[0], spacing),
    )


def hd95_mm(distances: SurfaceDistances) -> float:
    """The 95 % Hausdorff distance in mm, at least 0; NaN if either mask is empty.

    The larger of the two 95th percentiles (linear interpolation), truth to prediction and back; some
    programs pool both directions first and report less.

    References:
        Huttenlocher, Klanderman, Rucklidge 1993, doi:10.1109/34.232073; as in MONAI `compute_hausdorff_distance`.
    """
    if not distances.defined:
        return math.nan
    directed = distances.truth_to_prediction_mm, distances.prediction_to_truth_mm
    return max(float(np.percentile(values, 95)) for values in directed)


def assd_mm(distances: SurfaceDistances) -> float:
    """The average symmetric surface distance in mm, at least 0; NaN if either mask is empty.

    The mean over all surface voxels of both masks together, not the mean of the two directed means.

    References:
        Heimann et al. 2009, doi:10.1109/TMI.2009.2013851.
    """
    if not distances.defined:
        return math.nan
    return float(np.concatenate([distances.truth_to_prediction_mm, distances.prediction_to_truth_mm]).mean())


def nsd(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """The normalised surface distance: the share of both surfaces within `tolerance_mm` of the other, in [0, 1].

    NaN if both masks are empty, 0 if one is. Surface voxels are counted, not weighted by area.

    References:
        Nikolov et al. 2018, arXiv:1809.04430.
    """
    if tolerance_mm < 0:
        raise ValueError(f"tolerance_mm must not be negative, got {tolerance_mm}")
    directed = distances.truth_to_prediction_mm, distances.prediction_to_truth_mm
    limit_mm = tolerance_mm * (1 + TOLERANCE_SLACK)
    within = sum(_count(values <= limit_mm) for values in directed)
    return _ratio(within, sum(values.size for values in directed))


def _directed_mm(start: np.ndarray, goal: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
    """The distance of each voxel of `start` (*S) to the nearest voxel of `goal` (*S), in mm."""
    if not goal.any():
        return np.full(_count(start), np.inf)
    # Only the index of the nearest voxel is asked for: distances of all voxels would take twice the time and memory.
    nearest = ndimage.distance_transform_edt(~goal, sampling=spacing_mm, return_distances=False, return_indices=True)
    squares = np.zeros(_count(start))
    for axis, index in enumerate(np.nonzero(start)):
        squares += np.square((index - nearest[axis][start]) * spacing_mm[axis])
    return np.asarray(np.sqrt(squares))


def _surface(mask: np.ndarray, unknown: np.ndarray | None = None) -> np.ndarray:
    """The voxels of a mask (*S) with a known face-neighbour outside it; beyond the array's border all is outside."""
    inner = mask.copy()
    inside = mask if unknown is None else mask | unknown
    for axis in range(mask.ndim):
        along, neighbour = np.moveaxis(inner, axis, 0), np.moveaxis(inside, axis, 0)
        along[1:] &= neighbour[:-1]
        along[:-1] &= neighbour[1:]
        along[:1] = along[-1:] = False
    return np.asarray(mask & ~inner)


def _bounding_box(mask: np.ndarray, margin_vox: int = 0) -> tuple[slice, ...]:
    """The smallest box around a mask (*S) and a margin as far as there is one; empty slices if the mask is."""
    box = []
    for axis in range(mask.ndim):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(filled[0]) - margin_vox, 0), int(filled[-1]) + 1 + margin_vox) if filled.size else slice(0, 0))
    return tuple(box)


def _counts(truth: np.ndarray, prediction: np.ndarray) -> tuple[int, int, int]:
    """How many voxels both masks have, only the truth, only the prediction."""
    _check_shapes(truth, prediction)
    both = _count(np.logical_and(truth, prediction))
    return both, _count(truth) - both, _count(prediction) - both


def _count(mask: np.ndarray) -> int:
    """How many voxels a mask has."""
    return int(np.count_nonzero(mask))


def _ratio(part: int, whole: int) -> float:
    """`part / whole`, NaN where there is no whole."""
    return part / whole if whole else math.nan


def _check_shapes(truth: np.ndarray, prediction: np.ndarray) -> None:
    """Two arrays are compared voxel by voxel or not at all: broadcasting would score something else."""
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {format_shape(truth.shape)} but prediction is {format_shape(prediction.shape)}; they must be equal")
