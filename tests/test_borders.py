"""The border map against all pairs of voxels, against the paper's numbers, and what drawing borders may and may not do to objects."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from microtome.data.synthetic import cells
from microtome.training.borders import REACH_SIGMAS, border_weights, objects_of, separated

MAPS = st.one_of(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)).flatmap(
    # Mostly background, or every voxel would be its neighbours' border.
    lambda shape: hnp.arrays(np.int32, shape, elements=st.sampled_from([0, 0, 0, 0, 0, -1, 1, 2, 3, 70_000]))
)
SIDES = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 3.0])] * 3)


def all_pairs(objects: np.ndarray, spacing: tuple[float, ...], w0: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """The weights without balance, and d1 + d2 (infinite where there are fewer than two objects), voxel by voxel over all voxels."""
    weights, sums = np.zeros(objects.shape), np.full(objects.shape, np.inf)
    scale = np.array(spacing) / min(spacing)
    inside = [(np.array(place), int(objects[place])) for place in np.ndindex(objects.shape) if objects[place] > 0]
    for place in np.ndindex(objects.shape):
        weights[place] = 1 if objects[place] >= 0 else 0
        distances: dict[int, float] = {}
        for other, number in inside:
            length = float(np.sqrt((((other - np.array(place)) * scale) ** 2).sum()))
            distances[number] = min(length, distances.get(number, math.inf))
        if objects[place] == 0 and len(distances) > 1:
            sums[place] = sum(sorted(distances.values())[:2])
            weights[place] += w0 * math.exp(-(sums[place] ** 2) / (2 * sigma**2))
    return weights, sums


def touching(objects: np.ndarray) -> int:
    """Pairs of voxels of different objects that are neighbours by a side, an edge or a corner."""
    padded, found = np.pad(objects, 1), 0
    for shift in itertools.product((-1, 0, 1), repeat=objects.ndim):
        other = np.roll(padded, shift, range(objects.ndim))
        found += np.count_nonzero((padded > 0) & (other > 0) & (padded != other))
    return found


@pytest.mark.parametrize(("apart", "weight"), [(2, 9.2312), (5, 6.0653), (10, 1.3534)])
def test_weights_are_those_of_the_formula_at_the_paper_s_w0_and_sigma(apart: int, weight: float) -> None:
    # Every voxel between two objects side by side has d1 + d2 = how far apart they are.
    objects = np.zeros((3, apart + 11), np.int32)
    objects[:, 5], objects[:, 5 + apart] = 1, 2
    weights = border_weights(objects, (1.0, 1.0), w0=10, sigma_vox=5, balance=False)
    assert weights.dtype == np.float32
    assert weights[:, 6 : 5 + apart] == pytest.approx(1 + weight, abs=5e-5)
    assert (weights[objects > 0] == 1).all()
    # Two voxels outside of both the sum is larger by 4.
    assert weights[1, 3] == pytest.approx(1 + 10 * math.exp(-((apart + 4) ** 2) / 50), abs=1e-5)


@given(objects=MAPS, sides=SIDES, sigma=st.sampled_from([0.4, 1.0, 5.0]))
@settings(max_examples=120, deadline=None)
def test_weights_are_those_of_all_pairs_within_reach_and_nothing_is_added_beyond(
    objects: np.ndarray, sides: tuple[float, ...], sigma: float
) -> None:
    spacing = sides[: objects.ndim]
    found = border_weights(objects, spacing, w0=10, sigma_vox=sigma, balance=False)
    expected, sums = all_pairs(objects, spacing, 10, sigma)
    reach = REACH_SIGMAS * sigma
    assert found[sums < reach - 1e-6] == pytest.approx(expected[sums < reach - 1e-6], abs=1e-5)
    assert (found[sums > reach + 1e-6] == (objects[sums > reach + 1e-6] >= 0)).all()
    assert found == pytest.approx(expected, abs=4e-4 * 10)


def test_weights_of_many_objects_are_those_of_a_distance_transform_for_each() -> None:
    objects = separated(cells((96, 128), seed=3, count=40).instances)
    numbers = np.unique(objects[objects > 0])
    assert len(numbers) > 25
    distances = np.stack([ndimage.distance_transform_edt(objects != number, sampling=(1.5, 1)) for number in numbers])
    expected = 1 + (objects == 0) * 10 * np.exp(-(np.sort(distances, axis=0)[:2].sum(0) ** 2) / (2 * 2.5**2))
    found = border_weights(objects, (0.3, 0.2), w0=10, sigma_vox=2.5, balance=False)
    assert found == pytest.approx(expected, abs=10 * math.exp(-(REACH_SIGMAS**2) / 2) + 1e-5)
    assert np.count_nonzero(found > 5) > 100


def test_lengths_are_in_sides_of_the_finest_voxel() -> None:
    objects = np.zeros((5, 5, 5), np.int32)
    objects[1], objects[3] = 1, 2
    # Along the axis with voxels three times as long, the middle is 3 from either.
    weights = border_weights(objects, (0.6, 0.2, 0.2), w0=10, sigma_vox=5, balance=False)
    assert weights[2] == pytest.approx(1 + 10 * math.exp(-(6**2) / 50), abs=1e-5)


def test_balanced_classes_weigh_the_same_in_sum_and_1_on_average() -> None:
    objects = np.array([[1, 0, 0, 0], [-1, -1, 0, 0], [2, 0, 0, 0]])
    weights = border_weights(objects, (1.0, 1.0), w0=0, sigma_vox=5, balance=True)
    # 2 of 10 annotated voxels are objects.
    assert set(weights[objects > 0].tolist()) == {2.5}
    assert set(weights[objects == 0].tolist()) == {0.625}
    assert set(weights[objects < 0].tolist()) == {0}


@pytest.mark.parametrize("value", [-1, 0, 7])
@pytest.mark.parametrize("balance", [False, True])
def test_an_image_of_one_kind_has_the_same_weight_everywhere(value: int, balance: bool) -> None:
    objects = np.full((4, 5), value)
    weights = border_weights(objects, (1.0, 1.0), w0=10, sigma_vox=5, balance=balance)
    assert set(weights.ravel().tolist()) == {0.0 if value < 0 else 1.0}


def test_one_object_alone_has_no_border() -> None:
    objects = np.zeros((9, 9), np.int32)
    objects[4, 4] = 1
    assert (border_weights(objects, (1.0, 1.0), w0=10, sigma_vox=5, balance=False) == 1).all()


@given(objects=MAPS)
@settings(max_examples=60, deadline=None)
def test_separated_objects_do_not_touch_and_keep_their_numbers(objects: np.ndarray) -> None:
    apart = separated(objects)
    assert apart.dtype == objects.dtype
    assert touching(apart) == 0
    assert set(np.unique(apart[apart != objects])) <= {0}
    assert ((apart == -1) == (objects == -1)).all()
    # Nothing is taken away without need: each voxel that became background has another object beside it.
    for place in zip(*np.nonzero(apart != objects), strict=True):
        box = tuple(slice(max(0, i - 1), i + 2) for i in place)
        assert set(np.unique(objects[box])) - {-1, 0, objects[place]}


@pytest.mark.parametrize("larger", [1, 2])
def test_the_gap_is_one_voxel_of_the_larger_object(larger: int) -> None:
    objects = np.full((4, 8), 3 - larger, np.int16)
    objects[:, :5] = larger
    assert separated(objects)[0].tolist() == [larger] * 4 + [0] + [3 - larger] * 3
    even = np.full((4, 8), 2, np.int16)
    even[:, :4] = 1
    assert separated(even)[0].tolist() == [1] * 4 + [0] + [2] * 3


def test_no_cell_of_a_picture_is_lost_between_borders() -> None:
    objects = cells((96, 128), seed=3, count=40).instances
    apart = separated(objects)
    assert touching(objects) > 0
    assert set(np.unique(apart)) == set(np.unique(objects))
    assert np.count_nonzero(apart) > 0.7 * np.count_nonzero(objects)


def test_objects_of_are_the_pieces_of_each_class() -> None:
    label = np.array([[1, 1, 0, 2, 2], [0, 0, 0, 1, 0], [2, -1, 1, 0, 0]], np.int16)
    # The ones in the second and the third row touch by a corner; the twos above are another class.
    expected = [[1, 1, 0, 3, 3], [0, 0, 0, 2, 0], [4, -1, 2, 0, 0]]
    found = objects_of(label)
    assert found.dtype == np.int32
    assert found.tolist() == expected


@given(label=hnp.arrays(np.int16, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.integers(-1, 2)))
@settings(max_examples=40, deadline=None)
def test_objects_of_one_number_have_one_class_and_hang_together(label: np.ndarray) -> None:
    objects = objects_of(label)
    assert ((objects > 0) == (label > 0)).all()
    assert ((objects == -1) == (label == -1)).all()
    assert sorted(set(np.unique(objects)) - {-1, 0}) == list(range(1, objects.max(initial=0) + 1))
    for number in range(1, objects.max(initial=0) + 1):
        assert len(np.unique(label[objects == number])) == 1
        assert ndimage.label(objects == number, structure=np.ones((3,) * label.ndim))[1] == 1
    same = [k for k in (1, 2) if touching(np.where(label == k, objects, 0))]
    assert same == []
