import doctest
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.metrics import adapted_rand_error, variation_of_information

from microtome.evaluation import instance_metrics as metrics
from microtome.evaluation.instance_metrics import THRESHOLDS, Overlaps, count_overlaps, match

NAN = math.nan
ALL: dict[str, Callable[[Overlaps], float]] = {
    function.__name__: function
    for function in (
        metrics.ap,
        metrics.mean_ap,
        metrics.sq,
        metrics.rq,
        metrics.pq,
        metrics.seg,
        metrics.arand,
        metrics.voi_split,
        metrics.voi_merge,
        metrics.v_rand,
        metrics.v_info,
    )
}
ERRORS = ("arand", "voi_split", "voi_merge")


def all_scores(truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    overlaps = count_overlaps(truth, prediction)
    return {name: function(overlaps) for name, function in ALL.items()}


def row(*numbers: int) -> np.ndarray:
    return np.array(numbers)


@st.composite
def object_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two related maps of objects that touch and overlap, 2D or 3D, each with an object at least, some voxels not annotated."""
    shape = draw(st.sampled_from([(9, 11), (3, 5, 7), (14, 5)]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, *[1.0] * len(shape)))
    smooth[1] += draw(st.sampled_from([0.0, 1.0, 4.0])) * smooth[0]
    levels = (np.quantile(field, np.linspace(0, 1, draw(st.integers(2, 7)))[1:-1]) for field in smooth)
    truth, prediction = (np.digitize(field, level) for field, level in zip(smooth, levels, strict=True))
    truth.flat[0] = prediction.flat[1] = 1
    truth[rng.random(shape) < draw(st.sampled_from([0.0, 0.3]))] = -1
    truth.flat[2] = 2
    return truth, prediction


def sets_of(objects: np.ndarray, known: np.ndarray) -> list[set[int]]:
    """Each object as the set of its annotated voxels: the slow obvious way."""
    flat, known = objects.ravel().tolist(), known.ravel().tolist()
    found: dict[int, set[int]] = {}
    for place, number in enumerate(flat):
        if number > 0 and known[place]:
            found.setdefault(number, set()).add(place)
    return list(found.values())


def iou_table(truth: list[set[int]], prediction: list[set[int]]) -> np.ndarray:
    return np.array([[len(t & p) / len(t | p) for p in prediction] for t in truth]).reshape(len(truth), len(prediction))


def most_pairs(allowed: np.ndarray) -> int:
    """How many pairs a one-to-one assignment can have, by the Hungarian method on the dense table."""
    rows, columns = linear_sum_assignment(-allowed.astype(float))
    return int(allowed[rows, columns].sum())


def alone(objects: np.ndarray) -> np.ndarray:
    """Each voxel of the background with a number of its own."""
    return np.where(objects == 0, objects.max() + 1 + np.arange(objects.size).reshape(objects.shape), objects)


def bits(values: list[object]) -> float:
    """The entropy of values that are counted one by one."""
    counts = Counter(values)
    return -sum(n / len(values) * math.log2(n / len(values)) for n in counts.values())


# by hand


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(metrics).failed == 0
    assert doctest.testmod(metrics).attempted >= 2


def test_the_table_counts_voxels_of_each_pair_and_keeps_the_numbers() -> None:
    overlaps = count_overlaps(row(0, 5, 5, 9, 9, -1, -3), row(0, 0, 70, 70, 70, 70, 8))
    assert overlaps.truth_ids.tolist() == [5, 9]
    assert overlaps.prediction_ids.tolist() == [70]
    assert overlaps.table.toarray().tolist() == [[1, 0], [1, 1], [0, 2]]
    assert overlaps.truth_sizes.tolist() == [2, 2]
    assert overlaps.prediction_sizes.tolist() == [3]


def test_a_case_that_is_computed_by_hand() -> None:
    # 4 voxels of object 1, three found by 1; 4 of object 2, cut in halves; 2 of object 3, missed; one voxel invented.
    truth = row(1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0)
    prediction = row(1, 1, 1, 0, 4, 4, 5, 5, 0, 0, 0, 9)
    scores = all_scores(truth, prediction)
    assert scores["ap"] == pytest.approx(1 / (1 + 3 + 2))
    # At 0.5 to 0.7 there is that one match of IoU 3/4, which is not above 0.75 itself.
    assert scores["mean_ap"] == pytest.approx(5 / 10 / 6)
    assert scores["sq"] == pytest.approx(3 / 4)
    assert scores["rq"] == pytest.approx(2 / 7)
    assert scores["pq"] == pytest.approx(3 / 4 * 2 / 7)
    # Neither half covers more than half of object 2.
    assert scores["seg"] == pytest.approx((3 / 4) / 3)
    # Pairs: together in both 3+1+1 and the two of object 3 in the background; in the truth 6+6+1; in the prediction 3+1+1+3.
    assert scores["arand"] == pytest.approx(1 - 2 * 6 / (13 + 8))
    # Squares over ten voxels of the foreground, three of them alone.
    assert scores["v_rand"] == pytest.approx(2 * (9 + 4 + 4 + 3) / ((9 + 4 + 4 + 3) + (16 + 16 + 4)))


def test_an_iou_of_exactly_the_threshold_is_no_match() -> None:
    assert metrics.ap(count_overlaps(row(1, 1), row(3, 4))) == 0
    twenty = np.ones(20, int)
    eleven = np.where(np.arange(20) < 11, 1, 0)
    assert metrics.ap(count_overlaps(twenty, eleven), 0.55) == 0
    assert metrics.ap(count_overlaps(twenty, eleven), 0.5) == 1
    assert len(THRESHOLDS) == 10
    assert metrics.mean_ap(count_overlaps(twenty, eleven)) == pytest.approx(1 / 10)


def test_below_one_half_no_match_is_lost_to_a_greedy_choice() -> None:
    # Prediction 1 overlaps both true objects, 2 only the first: taking the best pair first would leave one object alone.
    truth, prediction = row(1, 1, 1, 1, 1, 2, 2, 0, 0), row(2, 2, 1, 1, 1, 1, 0, 0, 0)
    ious = iou_table(*(sets_of(each, np.ones(9, bool)) for each in (truth, prediction)))
    assert ious.max() == ious[0, 1] == 0.5
    found = match(count_overlaps(truth, prediction), 0.15)
    assert sorted(zip(found.truth.tolist(), found.prediction.tolist(), strict=True)) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("iou", [-0.1, 1.0, NAN])
def test_an_iou_that_nothing_is_above_is_refused(iou: float) -> None:
    with pytest.raises(ValueError, match=str(iou)):
        metrics.ap(count_overlaps(row(1), row(1)), iou)


@pytest.mark.parametrize(
    ("truth", "prediction", "words"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "2×3.*3×2"),
        (np.zeros(2), np.zeros(2, int), "float64"),
        (row(1), row(1) * 1j, "complex"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(truth: np.ndarray, prediction: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        count_overlaps(truth, prediction)


# emptiness: a test for each row of the table

EMPTY, SOME = row(0, 0, 0, 0), row(1, 1, 0, 2)


@pytest.mark.parametrize(
    ("names", "both", "truth_empty", "prediction_empty"),
    [
        (("ap", "mean_ap", "pq", "rq"), NAN, 0, 0),
        (("sq",), NAN, NAN, NAN),
        (("seg",), NAN, NAN, 0),
        (("arand",), NAN, NAN, 1),
        (("v_rand", "v_info"), NAN, NAN, 0),
        (("voi_split",), 0, 1.5, 0),
        (("voi_merge",), 0, 0, 1.5),
    ],
)
def test_every_row_of_the_table_of_emptiness(names: tuple[str, ...], both: float, truth_empty: float, prediction_empty: float) -> None:
    cases = ((EMPTY, EMPTY, both), (EMPTY, SOME, truth_empty), (SOME, EMPTY, prediction_empty))
    for truth, prediction, expected in cases:
        scores = all_scores(truth, prediction)
        assert [scores[name] for name in names] == pytest.approx([expected] * len(names), nan_ok=True)


@pytest.mark.parametrize("shape", [(4,), (0, 3)])
def test_without_an_annotated_voxel_nothing_is_defined(shape: tuple[int, ...]) -> None:
    scores = all_scores(np.full(shape, -1), np.ones(shape, int))
    assert all(math.isnan(value) for value in scores.values())


def test_one_object_found_in_whole_is_perfect_though_it_has_no_entropy() -> None:
    assert metrics.v_info(count_overlaps(row(1, 1, 1), row(8, 8, 8))) == 1
    assert metrics.v_rand(count_overlaps(row(1, 1, 1), row(8, 8, 8))) == 1
    # And single voxels make no pair.
    assert math.isnan(metrics.arand(count_overlaps(row(1, 2), row(4, 3))))


# against other programs and the slow obvious way


@given(object_pairs())
@settings(max_examples=40, deadline=None)
def test_rand_error_and_variation_of_information_are_those_of_scikit_image(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = (each[pair[0] >= 0] for each in pair)
    overlaps = count_overlaps(*pair)
    if (prediction > 0).any():
        with np.errstate(invalid="ignore", divide="ignore"):
            error = adapted_rand_error(truth, prediction)[0]
        assert metrics.arand(overlaps) == pytest.approx(error, nan_ok=True)
    expected = variation_of_information(truth, prediction)
    assert (metrics.voi_split(overlaps), metrics.voi_merge(overlaps)) == pytest.approx(tuple(expected), abs=1e-12)


@given(object_pairs())
@settings(max_examples=40, deadline=None)
def test_matching_metrics_are_those_of_sets_of_voxels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    known = pair[0] >= 0
    truth, prediction = (sets_of(each, known) for each in pair)
    ious, overlaps = iou_table(truth, prediction), count_overlaps(*pair)
    for iou in (0.1, 0.3, 0.5, 0.75):
        found = most_pairs(ious > iou)
        assert metrics.ap(overlaps, iou) == pytest.approx(found / (len(truth) + len(prediction) - found))
    good = ious[ious > 0.5]
    assert metrics.pq(overlaps) == pytest.approx(good.sum() / (good.size + (len(truth) + len(prediction) - 2 * good.size) / 2))
    assert metrics.pq(overlaps) == pytest.approx(metrics.sq(overlaps) * metrics.rq(overlaps) if good.size else 0)
    jaccard = [sum(len(t & p) / len(t | p) for p in prediction if len(t & p) > len(t) / 2) for t in truth]
    assert metrics.seg(overlaps) == pytest.approx(np.mean(jaccard))


@given(object_pairs())
@settings(max_examples=25, deadline=None)
def test_the_challenges_scores_are_those_of_counting_pairs_and_entropies(pair: tuple[np.ndarray, np.ndarray]) -> None:
    inside = pair[0] > 0
    truth, prediction = pair[0][inside].tolist(), alone(pair[1])[inside].tolist()
    overlaps = count_overlaps(*pair)
    # Every voxel with every voxel, itself included.
    together = [(a == b, c == d) for (a, c), (b, d) in itertools.product(zip(truth, prediction, strict=True), repeat=2)]
    both, in_truth, in_prediction = sum(a and b for a, b in together), sum(a for a, _ in together), sum(b for _, b in together)
    h_truth, h_prediction, h_joint = bits(truth), bits(prediction), bits(list(zip(truth, prediction, strict=True)))
    if len(overlaps.prediction_ids):
        assert metrics.v_rand(overlaps) == pytest.approx(2 * both / (in_truth + in_prediction))
        entropy = h_truth + h_prediction
        expected = 2 * (entropy - h_joint) / entropy if entropy else 1
        assert metrics.v_info(overlaps) == pytest.approx(expected, abs=1e-9)


# what must not change a number


@given(object_pairs(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_other_numbers_for_the_same_objects_change_nothing(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    renamed = []
    for objects in pair:
        names = rng.choice(2**62, size=objects.max() + 1, replace=False)
        renamed.append(np.where(objects > 0, names[objects.clip(0)], objects))
    assert all_scores(*pair) == pytest.approx(all_scores(*renamed), nan_ok=True, abs=1e-12)


@given(object_pairs())
@settings(max_examples=25, deadline=None)
def test_a_map_is_perfect_beside_itself(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth = pair[0]
    scores = all_scores(truth, truth)
    if math.isnan(scores["arand"]):
        scores["arand"] = 0.0
    assert scores == pytest.approx({name: 0.0 if name in ERRORS else 1.0 for name in ALL}, abs=1e-12)


@given(object_pairs())
@settings(max_examples=25, deadline=None)
def test_matching_is_symmetric_and_splits_one_way_are_merges_the_other(pair: tuple[np.ndarray, np.ndarray]) -> None:
    one, other = np.maximum(pair[0], 0), pair[1]
    forth, back = all_scores(one, other), all_scores(other, one)
    for name in ("ap", "mean_ap", "sq", "rq", "pq"):
        assert forth[name] == pytest.approx(back[name], nan_ok=True)
    assert forth["voi_split"] == pytest.approx(back["voi_merge"])


@given(object_pairs(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_what_is_predicted_where_nothing_is_annotated_changes_nothing(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    truth, prediction = pair
    noise = np.random.default_rng(seed).integers(-1, 9, truth.shape)
    assert all_scores(truth, prediction) == pytest.approx(all_scores(truth, np.where(truth < 0, noise, prediction)), nan_ok=True)


def test_a_negative_prediction_is_background_and_no_way_out() -> None:
    truth, prediction = row(1, 1, 2, 2, 0), row(1, 1, -1, -1, -1)
    assert all_scores(truth, prediction) == all_scores(truth, prediction.clip(0))
    assert metrics.ap(count_overlaps(truth, prediction)) == 0.5


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.uint16, np.uint32, np.int32, np.uint64, np.int64])
def test_any_integer_type_will_do(kind: type[np.generic]) -> None:
    truth, prediction = row(0, 1, 1, 0), row(1, 1, 0, 0)
    assert all_scores(truth.astype(kind), prediction.astype(kind)) == pytest.approx(all_scores(truth, prediction), nan_ok=True)


def test_the_largest_numbers_stay_apart() -> None:
    top = np.uint64(2**64 - 1)
    overlaps = count_overlaps(np.array([top, top - np.uint64(1), 0], np.uint64), np.array([1, 2, 0], np.uint8))
    assert overlaps.truth_ids.tolist() == [2**64 - 2, 2**64 - 1]
    assert metrics.ap(overlaps) == 1


def test_a_map_of_many_parts_is_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, prediction = np.random.default_rng(0).integers(-1, 9, (2, 33, 7))
    whole = count_overlaps(truth, prediction)
    monkeypatch.setattr(metrics, "CHUNK_VOX", 10)
    parts = count_overlaps(truth.T.copy().T, prediction)
    assert np.array_equal(whole.table.toarray(), parts.table.toarray())
    assert whole.table.sum() == np.count_nonzero(truth >= 0)


def test_ten_thousand_objects_need_no_dense_table() -> None:
    truth = np.arange(1, 10_001).repeat(4).reshape(200, 200) * 1_000_003
    overlaps = count_overlaps(truth, truth)
    assert overlaps.table.nnz == 10_000
    assert metrics.mean_ap(overlaps) == metrics.ap(overlaps, 0.2) == metrics.v_rand(overlaps) == 1


# real data


@pytest.mark.parametrize("name", ["mask2d.tif", "mask3d.tif"])
def test_real_nuclei_beside_a_moved_copy_score_as_scikit_image_says(data_folder: Callable[[str], Path], name: str) -> None:
    truth = tifffile.imread(data_folder("stardist") / name).astype(int)
    prediction = np.roll(truth, 2, axis=-1)
    prediction[prediction == np.unique(truth)[3]] = 0
    prediction[np.isin(prediction, np.unique(truth)[5:7])] = truth.max() + 1
    overlaps = count_overlaps(truth, prediction)
    assert len(overlaps.truth_ids) > 20
    assert metrics.arand(overlaps) == pytest.approx(adapted_rand_error(truth, prediction)[0], rel=1e-12)
    assert (metrics.voi_split(overlaps), metrics.voi_merge(overlaps)) == pytest.approx(tuple(variation_of_information(truth, prediction)))
    # Of pairs of different voxels scikit-image's error is that of the challenge, once the background is taken apart.
    assert metrics.v_rand(overlaps) == pytest.approx(1 - adapted_rand_error(truth, alone(prediction))[0], abs=2e-3)
    assert 0.2 < metrics.mean_ap(overlaps) < metrics.ap(overlaps) < 1
    assert 0.5 < metrics.seg(overlaps) < 1
