import doctest
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import ndimage
from skimage.metrics import hausdorff_distance
from skimage.segmentation import find_boundaries

from microtome.evaluation import metrics
from microtome.evaluation.bootstrap import mean_interval

NAN = math.nan
# MONAI warns when it is imported, for its own dependencies.
monai_warns = pytest.mark.filterwarnings("ignore")


def square(low: int, high: int, size: int = 12) -> np.ndarray:
    """A filled square in a picture."""
    mask = np.zeros((size, size), bool)
    mask[low:high, low:high] = True
    return mask


def distances(truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...] | None = None) -> metrics.SurfaceDistances:
    return metrics.surface_distances(truth, prediction, spacing or (1.0,) * truth.ndim)


def all_scores(truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Every metric of the table of empty masks."""
    surface = distances(truth, prediction)
    return {
        "dice": metrics.dice(truth, prediction),
        "iou": metrics.iou(truth, prediction),
        "nsd": metrics.nsd(surface, 1.0),
        "precision": metrics.precision(truth, prediction),
        "recall": metrics.recall(truth, prediction),
        "hd95_mm": metrics.hd95_mm(surface),
        "assd_mm": metrics.assd_mm(surface),
    }


@st.composite
def blob_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Two overlapping smooth random masks that are not empty, 2D or 3D, and a spacing."""
    shape = draw(st.sampled_from([(23, 17), (40, 9), (6, 15, 12), (11, 10, 9)]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, *[1.5] * len(shape)))
    smooth[1] += draw(st.sampled_from([0.0, 0.5, 2.0])) * smooth[0]
    masks = [field > np.quantile(field, draw(st.sampled_from([0.3, 0.7, 0.95]))) for field in smooth]
    spacing = tuple(draw(st.sampled_from([0.5, 1.0, 3.7])) for _ in shape)
    return masks[0], masks[1], spacing


def all_pairs_mm(start: np.ndarray, goal: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The slow obvious way: surfaces by erosion, the smallest of all distances."""
    edges = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in (start, goal)]
    return np.linalg.norm(edges[0][:, None] - edges[1][None], axis=-1).min(axis=1)


def test_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted >= 6
    assert result.failed == 0


def test_overlap_of_two_hand_counted_masks() -> None:
    truth = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], bool)
    prediction = np.array([[0, 0, 1, 1], [0, 0, 0, 1]], bool)
    assert metrics.dice(truth, prediction) == pytest.approx(2 * 2 / (4 + 3))
    assert metrics.iou(truth, prediction) == pytest.approx(2 / 5)
    assert metrics.precision(truth, prediction) == pytest.approx(2 / 3)
    assert metrics.recall(truth, prediction) == pytest.approx(2 / 4)


def test_pixel_accuracy_ignores_what_is_not_annotated_and_counts_no_class_as_wrong() -> None:
    truth = np.array([0, 0, 1, 2, -1, -1])
    assert metrics.pixel_accuracy(truth, np.array([0, 1, 1, -1, -1, 2])) == pytest.approx(2 / 4)
    assert math.isnan(metrics.pixel_accuracy(np.full(3, -1), np.zeros(3, int)))


@pytest.mark.parametrize(("spacing", "expected"), [((1.0, 1.0, 1.0), 24.0), ((2.5, 0.5, 0.5), 15.0), ((50.0, 4.0, 4.0), 19_200.0)])
def test_volume_is_voxels_times_their_size(spacing: tuple[float, ...], expected: float) -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[1:3, 1:4, 1:5] = True
    assert metrics.volume_mm3(mask, spacing) == pytest.approx(expected)


FULL, NONE = square(3, 8), np.zeros((12, 12), bool)
EMPTINESS = {
    "both empty": (NONE, NONE, dict.fromkeys(("dice", "iou", "nsd", "precision", "recall", "hd95_mm", "assd_mm"), NAN)),
    "truth empty": (NONE, FULL, {"dice": 0, "iou": 0, "nsd": 0, "precision": 0, "recall": NAN, "hd95_mm": NAN, "assd_mm": NAN}),
    "prediction empty": (FULL, NONE, {"dice": 0, "iou": 0, "nsd": 0, "precision": NAN, "recall": 0, "hd95_mm": NAN, "assd_mm": NAN}),
    "none empty": (FULL, FULL, {"dice": 1, "iou": 1, "nsd": 1, "precision": 1, "recall": 1, "hd95_mm": 0, "assd_mm": 0}),
}


@pytest.mark.parametrize("row", EMPTINESS)
def test_every_row_of_the_table_of_empty_masks(row: str) -> None:
    truth, prediction, expected = EMPTINESS[row]
    assert all_scores(truth, prediction) == pytest.approx(expected, nan_ok=True)


def test_the_surface_distances_to_an_empty_mask_are_infinite() -> None:
    surface = distances(FULL, NONE)
    assert np.isinf(surface.truth_to_prediction_mm).all()
    assert surface.truth_to_prediction_mm.size == 16
    assert surface.prediction_to_truth_mm.size == 0


def test_a_square_moved_by_two_voxels_has_hand_computed_distances() -> None:
    truth = square(3, 8)
    moved = np.roll(truth, 2, axis=1)
    surface = distances(truth, moved, (1.0, 0.5))
    # Truth column 3 (5 voxels) is 2 columns = 1 mm from column 5, columns 4 to 7 of the upper and lower edge 1, 0, 0, 0
    # columns, and of column 7 the three inner voxels are 1 row (1 mm) from an edge row, the middle one 2 columns (1 mm) away.
    expected = sorted([1.0] * 5 + [0.5] * 2 + [0.0] * 6 + [1.0] * 3)
    assert sorted(surface.truth_to_prediction_mm) == pytest.approx(expected)
    assert sorted(surface.prediction_to_truth_mm) == pytest.approx(expected)
    assert metrics.hd95_mm(surface) == pytest.approx(1.0)
    assert metrics.assd_mm(surface) == pytest.approx((5 * 1 + 2 * 0.5 + 3 * 1) / 16)
    assert metrics.nsd(surface, 0.5) == pytest.approx(8 / 16)


def test_two_points_are_as_far_apart_as_the_spacing_says() -> None:
    truth, prediction = np.zeros((4, 6, 6), bool), np.zeros((4, 6, 6), bool)
    truth[0, 1, 1] = prediction[2, 4, 5] = True
    surface = distances(truth, prediction, (3.0, 1.0, 0.5))
    expected = math.sqrt(6**2 + 3**2 + 2**2)
    assert metrics.hd95_mm(surface) == metrics.assd_mm(surface) == pytest.approx(expected)
    assert metrics.nsd(surface, 6.9) == 0
    assert metrics.nsd(surface, 7.0) == 1


def test_hd95_is_the_larger_of_the_two_directed_percentiles() -> None:
    surface = metrics.SurfaceDistances(truth_to_prediction_mm=np.arange(101.0), prediction_to_truth_mm=np.zeros(400))
    assert metrics.hd95_mm(surface) == pytest.approx(95.0)
    assert metrics.assd_mm(surface) == pytest.approx(5050 / 501)


def test_a_distance_that_exceeds_the_tolerance_by_rounding_is_within_it() -> None:
    truth, prediction = np.eye(1, 9, 2, dtype=bool)[0], np.eye(1, 9, 3, dtype=bool)[0]
    spacing_of_a_32_bit_header = (float(np.float32(0.7)) + 1e-7,)
    assert metrics.nsd(distances(truth, prediction, spacing_of_a_32_bit_header), 0.7) == 1
    assert metrics.nsd(distances(truth, prediction, (0.71,)), 0.7) == 0


def test_a_stack_of_one_section_scores_like_the_picture() -> None:
    truth, prediction = square(2, 9), square(3, 11)
    flat, stack = distances(truth, prediction, (0.7, 0.7)), distances(truth[None], prediction[None], (5.0, 0.7, 0.7))
    assert_allclose(stack.truth_to_prediction_mm, flat.truth_to_prediction_mm)
    assert_allclose(stack.prediction_to_truth_mm, flat.prediction_to_truth_mm)


def test_a_single_voxel_is_a_mask() -> None:
    surface = distances(np.ones((1, 1), bool), np.ones((1, 1), bool))
    assert surface.truth_to_prediction_mm.tolist() == [0.0]


@pytest.mark.parametrize("function", [metrics.dice, metrics.iou, metrics.precision, metrics.recall, metrics.pixel_accuracy, distances])
def test_shapes_that_differ_are_refused_and_not_broadcast(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="4×5 but prediction is 1×5"):
        function(np.ones((4, 5), bool), np.ones((1, 5), bool))


def test_spacing_and_tolerance_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1.0, 1.0, 1.0\).* 2 axes"):
        metrics.surface_distances(FULL, FULL, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"-0\.5"):
        metrics.nsd(distances(FULL, FULL), -0.5)


@given(blob_pairs())
@settings(max_examples=40, deadline=None)
def test_surface_distances_equal_those_of_all_pairs(pair: tuple[np.ndarray, np.ndarray, tuple[float, ...]]) -> None:
    truth, prediction, spacing = pair
    surface = distances(truth, prediction, spacing)
    assert_allclose(surface.truth_to_prediction_mm, all_pairs_mm(truth, prediction, spacing), rtol=1e-12)
    assert_allclose(surface.prediction_to_truth_mm, all_pairs_mm(prediction, truth, spacing), rtol=1e-12)


@given(blob_pairs(), st.sampled_from([0.4, 1.0, 3.7, 5.0]))
@settings(max_examples=25, deadline=None)
@monai_warns
def test_scores_equal_those_of_monai(pair: tuple[np.ndarray, np.ndarray, tuple[float, ...]], tolerance: float) -> None:
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_iou,
        compute_surface_dice,
    )

    truth, prediction, spacing = pair
    y, y_pred = (torch.from_numpy(mask)[None, None] for mask in (truth, prediction))
    surface = distances(truth, prediction, spacing)
    # MONAI computes in 32 bits; its tolerance gets our slack.
    assert metrics.dice(truth, prediction) == pytest.approx(float(compute_dice(y_pred, y)), rel=1e-6)
    assert metrics.iou(truth, prediction) == pytest.approx(float(compute_iou(y_pred, y)), rel=1e-6)
    theirs = float(compute_hausdorff_distance(y_pred, y, percentile=95, spacing=spacing))
    assert metrics.hd95_mm(surface) == pytest.approx(theirs, rel=1e-5)
    theirs = float(compute_average_surface_distance(y_pred, y, symmetric=True, spacing=spacing))
    assert metrics.assd_mm(surface) == pytest.approx(theirs, rel=1e-5)
    theirs = float(compute_surface_dice(y_pred, y, [tolerance * (1 + 1e-6)], spacing=list(spacing)))
    assert metrics.nsd(surface, tolerance) == pytest.approx(theirs, rel=1e-6)


@given(blob_pairs())
@settings(max_examples=25, deadline=None)
def test_scores_equal_those_of_scikit_image(pair: tuple[np.ndarray, np.ndarray, tuple[float, ...]]) -> None:
    truth, prediction, _ = pair
    surface = distances(truth, prediction)
    # find_boundaries does not count the border of the image, so both masks get a rim of nothing.
    edges = [find_boundaries(np.pad(mask, 1), connectivity=1, mode="inner") for mask in (truth, prediction)]
    largest = max(surface.truth_to_prediction_mm.max(), surface.prediction_to_truth_mm.max())
    assert largest == pytest.approx(hausdorff_distance(edges[0], edges[1]))
    means = surface.truth_to_prediction_mm.mean(), surface.prediction_to_truth_mm.mean()
    assert max(means) == pytest.approx(hausdorff_distance(edges[0], edges[1], method="modified"))


@given(blob_pairs())
@settings(max_examples=15, deadline=None)
def test_exchanging_truth_and_prediction_exchanges_precision_and_recall_and_nothing_else(
    pair: tuple[np.ndarray, np.ndarray, tuple[float, ...]],
) -> None:
    truth, prediction, _ = pair
    there, back = all_scores(truth, prediction), all_scores(prediction, truth)
    assert back == pytest.approx({**there, "precision": there["recall"], "recall": there["precision"]}, nan_ok=True)


def test_the_interval_of_few_hand_made_cases() -> None:
    mean, low, high = mean_interval(np.array([0.2, NAN, 0.8]))
    # Four equally likely resamples: 0.2, 0.5, 0.5, 0.8.
    assert (mean, low, high) == pytest.approx((0.5, 0.2, 0.8))


def test_the_interval_is_that_of_the_normal_approximation_for_many_cases() -> None:
    values = np.random.default_rng(3).normal(0.8, 0.1, 400)
    mean, low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert mean_interval(values) == (mean, low, high)


@pytest.mark.parametrize(("values", "mean"), [([], NAN), ([NAN, NAN], NAN), ([NAN, 0.7], 0.7)])
def test_fewer_than_two_cases_have_no_interval(values: list[float], mean: float) -> None:
    assert mean_interval(np.array(values)) == pytest.approx((mean, NAN, NAN), nan_ok=True)


def test_groups_are_drawn_as_wholes() -> None:
    # Three equally likely means: the patient of two cases twice, both patients, the patient of one case twice.
    values, groups = np.array([0.0, 0.3, NAN, 0.9]), ["a", "a", "c", "b"]
    mean, low, high = mean_interval(values, groups)
    assert (mean, low, high) == pytest.approx((0.4, 0.15, 0.9))


def test_twice_the_same_cases_in_groups_are_no_surer_than_once() -> None:
    values = np.random.default_rng(3).normal(0.8, 0.1, 50)
    names = [str(number) for number in range(50)]
    once = mean_interval(values, names)
    assert once == pytest.approx(mean_interval(values), abs=0.005)
    assert mean_interval(np.tile(values, 2), names * 2) == pytest.approx(once)
    _, low, high = mean_interval(np.tile(values, 2))
    assert high - low < 0.8 * (once[2] - once[1])


def test_a_single_group_has_no_interval() -> None:
    assert mean_interval(np.array([0.2, 0.4]), ["a", "a"]) == pytest.approx((0.3, NAN, NAN), nan_ok=True)


def test_a_section_annotated_alone_has_its_surface_at_its_outline_only() -> None:
    annotated = np.zeros((5, 9, 9), bool)
    annotated[2] = True
    truth, prediction = np.zeros((5, 9, 9), bool), np.zeros((5, 9, 9), bool)
    truth[2, 2:7, 2:7] = True
    prediction[2, 2:7, 2:6] = True
    sparse = metrics.surface_distances(truth, prediction, (1.0, 1.0, 1.0), annotated=annotated)
    flat = metrics.surface_distances(truth[2], prediction[2], (1.0, 1.0))
    np.testing.assert_array_equal(np.sort(sparse.truth_to_prediction_mm), np.sort(flat.truth_to_prediction_mm))
    assert sparse.truth_to_prediction_mm.size == 16
    every = metrics.surface_distances(truth, prediction, (1.0, 1.0, 1.0), annotated=np.ones((5, 9, 9), bool))
    dense = metrics.surface_distances(truth, prediction, (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(every.truth_to_prediction_mm, dense.truth_to_prediction_mm)
    assert dense.truth_to_prediction_mm.size == 25


def test_a_mask_that_fills_all_that_is_annotated_has_no_surface() -> None:
    annotated = np.zeros((5, 5), bool)
    annotated[2, 1:4] = True
    distances = metrics.surface_distances(annotated, annotated, (1.0, 1.0), annotated=annotated)
    assert not distances.defined
    assert math.isnan(metrics.hd95_mm(distances))
