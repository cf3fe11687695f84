"""A case prepared: exact types and the numbers that scale them, quantiles, classes, border weights, and what it all takes."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from microtome.config import LossConfig, NormalisationConfig
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.preprocess import normalise, resample
from microtome.training.preparing import (
    WORKING_FLOOR,
    class_counts,
    draw_voxels,
    grey_values,
    nearest,
    prepare,
    quantiles,
    scale_of,
    stored_bytes,
    weigh_borders,
    working_bytes,
)
from microtome.training.store import store_cases
from tests.folders import nifti, png, text
from tests.small import small_plan, small_plan_3d

RNG_SEED = 0
BORDERS = LossConfig(border_weight=10.0)


@pytest.fixture(scope="module")
def tubules(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = write_demo_data(tmp_path_factory.mktemp("data"), DemoConfig(picture_vox=(48, 56), volume_vox=(16, 20, 24), pictures=1))
    return open_dataset(data.tubules)


# ---- grey values ----

NORMALISATIONS = (
    NormalisationConfig(),
    NormalisationConfig(kind="none"),
    NormalisationConfig(kind="dataset", low=(3.3, -1e9), high=(200.1, 77.7), mean=(50.123, 3.0), sd=(7.7, 0.0)),
)
# More values than are added up at once, so that the order of additions shows.
SHAPE = (2, 9, 90, 100)


def image_of(kind: Any, seed: int = RNG_SEED) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 30, SHAPE).clip(0, 127).astype(kind)


def grey(array: np.ndarray, config: NormalisationConfig) -> np.ndarray:
    """The image by way of what is stored."""
    stored, scale = grey_values(array, array.shape[1:], small_plan_3d(channels=2, normalisation=config))
    image = np.array(stored, np.float32)
    if scale is not None:
        scale.apply(image)
    return image


@pytest.mark.parametrize(
    "kind", [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.float16, np.float32, np.float64]
)
@pytest.mark.parametrize("config", NORMALISATIONS, ids=lambda config: config.kind)
def test_stored_values_scaled_are_bit_for_bit_the_normalised_image(kind: Any, config: NormalisationConfig) -> None:
    for seed in range(4):
        array = image_of(kind, seed)
        assert grey(array, config).tobytes() == normalise(array, config).tobytes()
    # Sections in another order in memory, as a cut or turned file has them.
    assert grey(array[:, ::2].swapaxes(2, 3), config).tobytes() == normalise(array[:, ::2].swapaxes(2, 3), config).tobytes()


def test_whole_numbers_that_float32_does_not_hold_are_those_that_the_network_sees() -> None:
    array = image_of(np.int32) * 1_000_003 + 1
    assert not np.array_equal(array, array.astype(np.float32))
    assert grey(array, NORMALISATIONS[0]).tobytes() == normalise(array, NORMALISATIONS[0]).tobytes()


@pytest.mark.parametrize("config", NORMALISATIONS, ids=lambda config: config.kind)
def test_what_is_not_a_number_is_filled_before_it_is_stored(config: NormalisationConfig) -> None:
    array = image_of(np.float32)
    array[0, :3] = [np.nan, np.inf, -np.inf][0]
    array[1, 2, 3] = np.inf
    found = grey(array, config)
    assert np.isfinite(found).all()
    assert found.tobytes() == normalise(array, config).tobytes()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (image_of(np.uint8), np.uint8),
        (image_of(np.uint16), np.uint8),
        (image_of(np.uint16) + np.uint16(300), np.uint16),
        (image_of(np.int16) - np.int16(127), np.int8),
        (image_of(np.int32) * 300, np.uint16),
        (image_of(np.float64).round(), np.uint8),
        (image_of(np.float64).round() / 2, np.float16),
        (image_of(np.float64), np.float32),
    ],
)
def test_values_are_stored_in_the_smallest_type_that_is_exact(array: np.ndarray, expected: Any) -> None:
    stored, scale = grey_values(array, array.shape[1:], small_plan_3d(channels=2))
    assert stored.dtype == expected
    assert np.array_equal(stored, array.astype(np.float32))
    assert scale is not None
    assert scale.mean == pytest.approx(array.reshape(2, -1).mean(1), rel=1e-6)
    assert scale.sd == pytest.approx(array.reshape(2, -1).std(1), rel=1e-6)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_resampled_image_is_stored_as_grey_values(interpolation: Any) -> None:
    array, plan = image_of(np.uint8), small_plan_3d(channels=2, interpolation=interpolation)
    stored, scale = grey_values(array, (9, 45, 50), plan)
    assert scale is None
    assert stored.dtype == np.float32
    assert np.array_equal(stored, resample(normalise(array, plan.normalisation), (9, 45, 50), interpolation))


# ---- sizes ----


@pytest.mark.parametrize("spacing_mm", [(0.00204, 0.00176, 0.00176), (0.004, 0.00352, 0.00704)])
@pytest.mark.parametrize("loss", [LossConfig(), BORDERS])
def test_the_bytes_of_a_case_are_known_from_its_header(
    spacing_mm: tuple[float, ...], loss: LossConfig, tubules: Dataset, tmp_path: Path
) -> None:
    plan = small_plan_3d(spacing_mm=spacing_mm, loss=loss)
    whole = tubules.labelled[0]
    cases = [whole, replace(whole, name=f"{whole.name}[2:11]", sections=(2, 11))]
    for case in cases:
        store_cases(tubules, [case], plan, tmp_path / case.name)
        size = sum(path.stat().st_size for path in (tmp_path / case.name).iterdir())
        # Headers, and classes of which fewer voxels are annotated than may be noted.
        assert size - 2000 <= stored_bytes(tubules, case, plan) <= size + 2 * 2000 * 12


def two_blobs(folder: Path, kind: Any) -> Dataset:
    """A volume of 24 x 64 x 64 with three classes, two of which are objects."""
    label = np.zeros((24, 64, 64), np.uint8)
    label[4:20, 10:50, 10:30], label[4:20, 10:50, 35:55] = 1, 2
    image = np.random.default_rng(RNG_SEED).normal(100, 20, label.shape)
    nifti(folder / "images" / "a.nii.gz", image.astype(kind))
    nifti(folder / "labels" / "a.nii.gz", label)
    return open_dataset(folder)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.0, 1.0, 0.5), (2.0, 2.0, 2.0), (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("loss", [LossConfig(), BORDERS])
def test_the_memory_that_a_case_takes_is_about_known_from_its_header(
    kind: Any, spacing_mm: tuple[float, ...], loss: LossConfig, tmp_path: Path
) -> None:
    dataset = two_blobs(tmp_path, kind)
    plan = small_plan_3d(classes=dataset.legend.names, spacing_mm=spacing_mm, loss=loss)
    tracemalloc.start()
    try:
        found = prepare(dataset, dataset.labelled[0], plan)
        quantiles(found.image, found.scale)
        for k in class_counts(found.label):
            draw_voxels(np.random.default_rng(0), found.label, k)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.9 * peak <= working_bytes(dataset, dataset.labelled[0], plan) <= 3 * peak + WORKING_FLOOR


def test_a_whole_number_takes_a_byte_of_disk_where_the_file_says_so(tmp_path: Path) -> None:
    sizes = []
    for number, kind in enumerate((np.uint8, np.int16, np.float64)):
        dataset = two_blobs(tmp_path / str(number), kind)
        plan = small_plan_3d(classes=dataset.legend.names, spacing_mm=(1.0, 1.0, 1.0))
        sizes.append(stored_bytes(dataset, dataset.labelled[0], plan))
        resampled = stored_bytes(dataset, dataset.labelled[0], plan.model_copy(update={"spacing_mm": (2.0, 1.0, 1.0)}))
        assert resampled < 24 * 64 * 64 / 2 * 5 + 100_000
    voxels = 24 * 64 * 64
    assert [size - sizes[0] for size in sizes] == [0, voxels, 3 * voxels]
    many = plan.model_copy(update={"classes": tuple(map(str, range(129)))})
    assert stored_bytes(dataset, dataset.labelled[0], many) > sizes[-1] + voxels


# ---- classes ----


@given(label=arrays(np.int16, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.sampled_from([-1, 0, 1, 5, 32767])))
@settings(max_examples=30, deadline=None)
def test_voxels_are_counted_by_class(label: np.ndarray) -> None:
    expected = {int(k): int(count) for k, count in zip(*np.unique(label[label >= 0], return_counts=True), strict=True)}
    assert class_counts(label) == expected


# ---- quantiles ----


@given(image=arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)), elements=st.floats(-9, 9, width=32)))
@settings(max_examples=40, deadline=None)
def test_quantiles_are_numpy_s(image: np.ndarray) -> None:
    table = quantiles(image)
    assert (table.shape, table.dtype) == ((len(image), 257), np.float32)
    assert np.allclose(table, np.quantile(image.reshape(len(image), -1).astype(np.float64), np.linspace(0, 1, 257), axis=1).T, atol=1e-5)
    assert (np.diff(table) >= 0).all()


@pytest.mark.parametrize("config", NORMALISATIONS, ids=lambda config: config.kind)
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_quantiles_of_stored_values_are_those_of_the_grey_values(kind: Any, config: NormalisationConfig) -> None:
    array = image_of(kind)
    assert quantiles(array, scale_of(array, config)).tobytes() == quantiles(normalise(array, config)).tobytes()


# ---- border weights ----


def touching(folder: Path, description: str = "instances: true", values: tuple[int, int, int] = (0, 1, 2)) -> Dataset:
    """A picture of 8 x 12 on which two objects touch, the left one a column larger; with the values of ground, left and right."""
    label = np.array(values)[np.repeat(np.array([[0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]), 8, axis=0)]
    png(folder / "images" / "a.png", np.arange(96).reshape(8, 12))
    png(folder / "labels" / "a.png", label)
    text(folder / "microtome.yaml", description)
    return open_dataset(folder)


def test_without_border_weights_there_is_no_map(tmp_path: Path) -> None:
    dataset = touching(tmp_path)
    assert prepare(dataset, dataset.labelled[0], small_plan()).weight is None
    assert store_cases(dataset, dataset.labelled, small_plan(), tmp_path / "cache")[0].weight_map is None
    assert not [*(tmp_path / "cache").glob("*.weight.npy")]


def test_a_gap_of_background_parts_objects_that_touch_and_weighs_most(tmp_path: Path) -> None:
    dataset = touching(tmp_path)
    case = store_cases(dataset, dataset.labelled, small_plan(loss=BORDERS), tmp_path / "cache")[0]
    assert case.weight_map is not None
    # The larger of the two gives its rim.
    assert case.label[3].tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    weight = case.weight_map[:]
    assert (weight.dtype, weight.shape) == (np.float16, (8, 12))
    # Both 1 voxel away: 1 + 10 exp(-2² / 50); from the left edge 1 and 6 voxels.
    assert weight[3, 5] == pytest.approx(1 + 9.2312, abs=0.005)
    assert weight[3, 0] == pytest.approx(1 + 10 * math.exp(-(7**2) / 50), abs=0.005)
    assert (weight[:, 1:5] == 1).all()
    assert case.class_counts == {0: 8 * 4, 1: 8 * 8}


def test_objects_keep_their_numbers_on_another_grid(tmp_path: Path) -> None:
    dataset = touching(tmp_path)
    label, weight = prepare(dataset, dataset.labelled[0], small_plan(loss=BORDERS, stated_spacing_mm=(1.0, 1.0), spacing_mm=(0.5, 0.5)))[
        1:3
    ]
    assert label[7].tolist() == [0, 0, *[1] * 9, 0, *[1] * 8, 0, 0, 0, 0]
    assert weight is not None
    assert weight[7, 11] == pytest.approx(1 + 9.2312, abs=0.005)


def test_values_are_taken_from_under_the_middle_of_each_new_voxel() -> None:
    values = np.arange(12).reshape(3, 4)
    assert nearest(values, (3, 8))[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest(values, (1, 2)).tolist() == [[5, 7]]
    assert nearest(values, (3, 4)) is values


def test_without_instances_the_connected_parts_of_classes_are_the_objects_and_the_label_stays_as_it_is(tmp_path: Path) -> None:
    description = "classes: {left: 1, ground: 5, right: 6}\nbackground: ground\ninstances: false\n"
    dataset = touching(tmp_path, description, (5, 1, 6))
    assert dataset.legend.background == 1
    _, label, weight, _ = prepare(dataset, dataset.labelled[0], small_plan(loss=BORDERS, classes=("left", "ground", "right")))
    # Two classes that touch are told apart by their names: a gap would be a false label.
    assert label[3].tolist() == [1, 0, 0, 0, 0, 0, 2, 2, 2, 2, 1, 1]
    assert weight is not None
    # 1 voxel from the one and 6 from the other.
    assert weight[3, 0] == pytest.approx(1 + 10 * math.exp(-(7**2) / 50), abs=0.005)
    assert (weight[:, 1:10] == 1).all()


def test_where_no_class_is_background_nothing_is_a_border() -> None:
    label = np.repeat(np.array([[0, 0, 1, 1, 2, 2, -1]], np.int16), 4, axis=0)
    kept, weight = weigh_borders(label, None, small_plan(loss=LossConfig(border_weight=10.0, balance_classes=True)), None)
    assert np.array_equal(kept, label)
    assert (weight == 1).all()


def test_what_is_not_annotated_stays_so_and_weighs_as_much_as_any() -> None:
    label = np.repeat(np.array([[-1, -1, 1, 1, 0, 1, 1, -1]], np.int16), 5, axis=0)
    before = label.copy()
    parted, weight = weigh_borders(label, None, small_plan(loss=BORDERS), 0)
    assert np.array_equal(parted, before)
    assert np.array_equal(label, before)
    assert (weight[label == -1] == 1).all()
    assert (weight[label == 0] > 10).all()
    # Nor does a gap annotate what is not, where the objects do not say so.
    objects = np.repeat(np.array([[0, 1, 1, 1, 2, 2, 2, 0]]), 5, axis=0)
    assert np.array_equal(weigh_borders(np.full((5, 8), -1, np.int16), objects, small_plan(loss=BORDERS), 0)[0], np.full((5, 8), -1))


def test_sections_of_a_stack_are_weighed_one_by_one_for_a_2d_network() -> None:
    rng = np.random.default_rng(RNG_SEED)
    objects = rng.integers(0, 2, (4, 5, 6)).repeat(4, 1).repeat(4, 2) * rng.integers(1, 4, (4, 5, 6)).repeat(4, 1).repeat(4, 2)
    label = (objects > 0).astype(np.int16)
    plan = small_plan(loss=LossConfig(border_weight=10.0, balance_classes=True), spacing_mm=(9.0, 1.0, 2.0))
    parted, weight = weigh_borders(label, objects, plan, 0)
    for section in range(4):
        alone = weigh_borders(label[section], objects[section], plan, 0)
        assert np.array_equal(parted[section], alone[0])
        assert np.array_equal(weight[section], alone[1])
    assert not np.array_equal(parted, weigh_borders(label, objects, small_plan_3d(loss=plan.loss, spacing_mm=plan.spacing_mm), 0)[0])


def test_a_weight_too_large_for_its_type_is_the_largest_that_fits() -> None:
    label = np.zeros((600, 600), np.int16)
    label[0, 0] = 1
    weight = weigh_borders(label, None, small_plan(loss=LossConfig(border_weight=1.0, balance_classes=True)), 0)[1]
    assert weight[0, 0] == 65504 < 600**2 / 2
    assert np.isfinite(weight).all()
