"""How well objects were found and told apart: pure functions on one sparse table of overlaps, a float out.

In a map of objects (*S) every object has a number of its own, in any order and with any gaps; 0 is background, and nothing
is counted where the truth is negative, as nobody annotated it. Undefined is NaN, never a guess ("empty": without an object):

| | both empty | truth empty | prediction empty |
|---|---|---|---|
| `ap`, `mean_ap`, `pq`, `rq` | NaN | 0 | 0 |
| `sq` | NaN | NaN | NaN |
| `seg` | NaN | NaN | 0 |
| `arand` | NaN | NaN | 1 |
| `v_rand`, `v_info` | NaN | NaN | 0 |
| `voi_split`, `voi_merge` | 0 | as defined | as defined |

`sq` is also NaN where no object is matched. Where nothing is annotated all are NaN.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from microtome.geometry import format_shape

# From this IoU on an object overlaps no two others as much, so that a match needs no choice.
UNIQUE_IOU = 0.5
# Of `mean_ap`; exact decimals, so that an IoU of 11/20 is not above 0.55.
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Voxels looked at at a time.
CHUNK_VOX = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """How many annotated voxels each segment of the truth shares with each segment of the prediction.

    Attributes:
        truth_ids: (T,) the numbers of the truth's objects, ascending.
        prediction_ids: (P,) the numbers of the prediction's objects, ascending.
        table: (T + 1, P + 1) voxels, sparse; row 0 and column 0 are the background.
    """

    truth_ids: np.ndarray
    prediction_ids: np.ndarray
    table: sparse.csr_array

    @property
    def truth_sizes(self) -> np.ndarray:
        """Annotated voxels of each object of the truth, (T,)."""
        return np.asarray(self.table.sum(axis=1))[1:]

    @property
    def prediction_sizes(self) -> np.ndarray:
        """Annotated voxels of each object of the prediction, (P,)."""
        return np.asarray(self.table.sum(axis=0))[1:]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Pairs of a true and a predicted object, each in one pair at most.

    Attributes:
        truth: (pairs,) places in `truth_ids`.
        prediction: (pairs,) places in `prediction_ids`.
        iou: (pairs,) of each pair.
    """

    truth: np.ndarray
    prediction: np.ndarray
    iou: np.ndarray


def count_overlaps(truth: np.ndarray, prediction: np.ndarray) -> Overlaps:
    """The table from which everything here is computed.

    Args:
        truth: numbers of objects (*S), of any integer type; 0 background, negative where not annotated.
        prediction: the same; a negative value is no object.

    Raises:
        ValueError: other shapes, or values that are no integers.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {format_shape(truth.shape)} but prediction is {format_shape(prediction.shape)}; they must be equal")
    for name, array in (("truth", truth), ("prediction", prediction)):
        if array.dtype.kind not in "biu":
            raise ValueError(f"{name} must hold whole numbers of objects, got {array.dtype}")
    # Objects are solid: along the last axis there are far fewer runs of one pair of numbers than voxels.
    runs = [_runs(*_chunk(truth, prediction, start)) for start in range(0, max(truth.size, 1), CHUNK_VOX)]
    truth_runs, prediction_runs, lengths = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    truth_ids, rows = _numbered(truth_runs)
    prediction_ids, columns = _numbered(prediction_runs)
    shape = (len(truth_ids) + 1, len(prediction_ids) + 1)
    table = sparse.coo_array((lengths.astype(np.int64), (rows, columns)), shape=shape).tocsr()
    return Overlaps(truth_ids=truth_ids, prediction_ids=prediction_ids, table=table)


def match(overlaps: Overlaps, iou: float = UNIQUE_IOU) -> Matches:
    """As many pairs of objects with more than this IoU as there can be.

    From 0.5 on no object has more than that with two others and the pairs are the only ones possible. Below, a maximum
    matching is found, so that no pair is lost because another one took its object first.

    References:
        Hopcroft, Karp 1973, doi:10.1137/0202019 (the maximum matching).
    """
    if not 0 <= iou < 1:
        raise ValueError(f"iou must be at least 0 and below 1, got {iou}")
    shared = overlaps.table[1:, 1:].tocoo()
    unions = overlaps.truth_sizes[shared.row] + overlaps.prediction_sizes[shared.col] - shared.data
    ious = shared.data / unions
    good = ious > iou
    rows, columns, ious = shared.row[good], shared.col[good], ious[good]
    if iou < UNIQUE_IOU and rows.size:
        partner = csgraph.maximum_bipartite_matching(sparse.csr_array((ious, (rows, columns)), shape=shared.shape), perm_type="column")
        chosen = partner[rows] == columns
        rows, columns, ious = rows[chosen], columns[chosen], ious[chosen]
    return Matches(truth=rows, prediction=columns, iou=ious)


def ap(overlaps: Overlaps, iou: float = UNIQUE_IOU) -> float:
    """Average precision at one IoU, `TP / (TP + FP + FN)`, in [0, 1]: objects are matched one to one above that IoU.

    So do the Data Science Bowl 2018 and StarDist use the word; it is not the area under a curve of precision and recall.

    >>> ap(count_overlaps(np.array([1, 1, 0, 2]), np.array([7, 7, 7, 0])))
    0.5

    References:
        Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7.
        Schmidt, Weigert, Broaddus, Myers 2018, doi:10.1007/978-3-030-00934-2_30.
    """
    found = len(match(overlaps, iou).iou)
    return _ratio(found, len(overlaps.truth_ids) + len(overlaps.prediction_ids) - found)


def mean_ap(overlaps: Overlaps) -> float:
    """The mean of `ap` over the IoUs 0.5, 0.55, ..., 0.95, in [0, 1].

    References:
        Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7.
    """
    return float(np.mean([ap(overlaps, iou) for iou in THRESHOLDS]))


def sq(overlaps: Overlaps) -> float:
    """Segmentation quality: the mean IoU of the objects matched above 0.5, in (0.5, 1]; NaN if none is.

    References:
        Kirillov, He, Girshick, Rother, Dollár 2019, doi:10.1109/CVPR.2019.00963.
    """
    ious = match(overlaps).iou
    return float(ious.mean()) if ious.size else math.nan


def rq(overlaps: Overlaps) -> float:
    """Recognition quality: the F1 score of objects matched above an IoU of 0.5, `2 TP / (2 TP + FP + FN)`, in [0, 1].

    References:
        Kirillov, He, Girshick, Rother, Dollár 2019, doi:10.1109/CVPR.2019.00963.
    """
    return _ratio(2 * len(match(overlaps).iou), len(overlaps.truth_ids) + len(overlaps.prediction_ids))


def pq(overlaps: Overlaps) -> float:
    """Panoptic quality of one class, `SQ x RQ`: the sum of the matched objects' IoU over `TP + FP/2 + FN/2`, in [0, 1].

    What the paper does with regions of no known class is not needed: voxels that are not annotated are not in the table.

    References:
        Kirillov, He, Girshick, Rother, Dollár 2019, doi:10.1109/CVPR.2019.00963.
    """
    return _ratio(2 * float(match(overlaps).iou.sum()), len(overlaps.truth_ids) + len(overlaps.prediction_ids))


def seg(overlaps: Overlaps) -> float:
    """SEG of the Cell Tracking Challenge: the mean Jaccard index of the true objects, in [0, 1]; NaN if there is none.

    A true object is compared with the predicted one that covers more than half of it, and counts 0 without one. Objects
    that nobody drew cost nothing here.

    >>> seg(count_overlaps(np.array([1, 1, 0, 2, 2, 2]), np.array([7, 7, 7, 0, 8, 8])))
    0.6666666666666666

    References:
        Maška et al. 2014, doi:10.1093/bioinformatics/btu080.
        Ulman et al. 2017, doi:10.1038/nmeth.4473.
    """
    shared = overlaps.table[1:, 1:].tocoo()
    sizes = overlaps.truth_sizes
    unions = sizes[shared.row] + overlaps.prediction_sizes[shared.col] - shared.data
    covered = 2 * shared.data > sizes[shared.row]
    return _ratio(float((shared.data / unions)[covered].sum()), len(sizes))


def arand(overlaps: Overlaps) -> float:
    """Adapted Rand error, in [0, 1], best 0: 1 minus the F score of the Rand precision and recall where the truth has objects.

    Counted are pairs of different voxels: of those in one object of the truth, and of those in one segment of the prediction,
    how many are both. The predicted background is one segment, as in scikit-image; `v_rand` takes it apart. A prediction
    without any object has found nothing and counts as 1, though one object would be equal to such a background. NaN also
    where all objects on both sides are single voxels.

    References:
        Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142; as in scikit-image `adapted_rand_error`.
    """
    if len(overlaps.truth_ids) and not len(overlaps.prediction_ids):
        return 1.0
    inside = overlaps.table[1:]
    both, truth, prediction = (_pairs(each) for each in (inside.data, inside.sum(axis=1), inside.sum(axis=0)))
    return 1 - _ratio(2 * both, truth + prediction)


def voi_split(overlaps: Overlaps) -> float:
    """What cutting objects apart costs, in bits, best 0: the entropy of the prediction where the truth is known, H(P|T).

    The background is a segment like any other on both sides, as in scikit-image; so objects lost in it count as well.

    References:
        Meilă 2007, doi:10.1016/j.jmva.2006.11.013; as in scikit-image `variation_of_information`.
    """
    return _conditional_bits(overlaps.table)


def voi_merge(overlaps: Overlaps) -> float:
    """What running objects together costs, in bits, best 0: the entropy of the truth where the prediction is known, H(T|P).

    The variation of information is `voi_split + voi_merge`.

    References:
        Meilă 2007, doi:10.1016/j.jmva.2006.11.013; as in scikit-image `variation_of_information`.
    """
    return _conditional_bits(overlaps.table.T.tocsr())


def v_rand(overlaps: Overlaps) -> float:
    """Foreground-restricted Rand score V^Rand with weights of one half, in [0, 1], best 1.

    `sum p_ij² / (½ sum s_j² + ½ sum t_i²)` over voxels in objects of the truth, where p is the joint, t and s are the
    shares of the segments. Each voxel of the predicted background is a segment of its own, as in the challenge's program.
    Borders are not thinned first: thin those of the prediction for the number V^Rand(thinned) of the ISBI 2012 table.

    References:
        Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142.
    """
    if not len(overlaps.prediction_ids):
        return 0.0 if len(overlaps.truth_ids) else math.nan
    joint, truth, prediction, alone = _foreground(overlaps)
    both = _squares(joint) + alone
    return _ratio(2 * both, _squares(prediction) + alone + _squares(truth))


def v_info(overlaps: Overlaps) -> float:
    """Foreground-restricted information theoretic score V^Info with weights of one half, in [0, 1], best 1.

    `I(S;T) / (½ H(S) + ½ H(T))` over voxels in objects of the truth; the predicted background as in `v_rand`. Where both
    sides are one and the same segment, without any entropy, it is 1.

    References:
        Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142.
    """
    if not len(overlaps.prediction_ids):
        return 0.0 if len(overlaps.truth_ids) else math.nan
    joint, truth, prediction, alone = _foreground(overlaps)
    total = int(truth.sum())
    h_joint, h_prediction = _entropy_bits(joint, total, alone), _entropy_bits(prediction, total, alone)
    h_truth = _entropy_bits(truth, total)
    if total and h_truth + h_prediction == 0:
        return 1.0
    # Differences of equal sums in another order are off by parts in 1e16.
    return min(1.0, max(0.0, _ratio(2 * (h_truth + h_prediction - h_joint), h_truth + h_prediction))) if total else math.nan


def _chunk(truth: np.ndarray, prediction: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Some voxels of both maps in their order, one axis; booleans as numbers."""
    flat = (array.reshape(-1)[start : start + CHUNK_VOX] for array in (truth, prediction))
    first, second = (array.view(np.uint8) if array.dtype == bool else array for array in flat)
    return first, second


def _runs(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs (n,) of voxels (voxels,) with one pair of numbers where the truth is annotated: its two numbers, its length."""
    changes = (truth[1:] != truth[:-1]) | (prediction[1:] != prediction[:-1])
    begins = np.append(0, np.flatnonzero(changes) + 1)[: truth.size]
    lengths = np.diff(begins, append=truth.size)
    truth, prediction = truth[begins], prediction[begins]
    known = truth >= 0
    return truth[known], np.maximum(prediction[known], 0), lengths[known]


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values (n,) other than 0, ascending, and for each value given 0 if it is 0, else its place in them plus 1."""
    unique, places = np.unique(np.concatenate([values, np.zeros(1, values.dtype)]), return_inverse=True)
    return unique[1:], places[:-1]


def _foreground(overlaps: Overlaps) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Voxels in objects of the truth: of each overlap, true and predicted object, and how many no predicted object has."""
    inside = overlaps.table[1:]
    joint = inside[:, 1:]
    return joint.data, np.asarray(inside.sum(axis=1)), np.asarray(joint.sum(axis=0)), int(inside.sum() - joint.sum())


def _conditional_bits(table: sparse.csr_array) -> float:
    """The entropy of the column of a voxel when its row is known, in bits; NaN of an empty table."""
    counts = table.tocoo()
    rows = np.asarray(table.sum(axis=1))[counts.row]
    return _ratio(float((counts.data * np.log2(rows / counts.data)).sum()), int(table.sum()))


def _entropy_bits(sizes: np.ndarray, total: int, alone: int = 0) -> float:
    """The entropy in bits of segments (n,) of these sizes, and of so many more of one voxel, of `total` voxels in all."""
    sizes = sizes[sizes > 0]
    return _ratio(float((sizes * np.log2(total / sizes)).sum()) + (alone * math.log2(total) if alone else 0.0), total)


def _squares(sizes: np.ndarray) -> float:
    """The sum of squares; in float64, as that of integers may overflow."""
    return float(np.square(sizes, dtype=np.float64).sum())


def _pairs(sizes: np.ndarray) -> float:
    """Twice the number of pairs of different voxels within segments of these sizes."""
    return _squares(sizes) - float(np.sum(sizes))


def _ratio(part: float, whole: float) -> float:
    """`part / whole`, NaN where there is no whole."""
    return part / whole if whole else math.nan
