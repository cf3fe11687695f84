"""Training without a copy: the same crops, counts, scale and samples as from prepared arrays, from readings that stay small."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from microtome import fingerprint
from microtome.config import LossConfig, NormalisationConfig, Plan
from microtome.data import dataset as datasets
from microtome.data import parts
from microtome.data.case import Planes
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.parts import check_fits, looked_at, parts_of
from microtome.data.quality import case_thumbnails, inspect_dataset
from microtome.errors import DataError
from microtome.fingerprint import take_fingerprint
from microtome.geometry import affine_from_spacing
from microtome.images.volume import Volume
from microtome.preprocess import BLOCK_VALUES, mean_and_sd
from microtome.training import direct, roads
from microtome.training.arrays import Scale
from microtome.training.direct import DirectImage, gather
from microtome.training.preparing import quantiles
from microtome.training.roads import road_of
from microtome.training.sampling import Pool, draw_sample, load_sample
from microtome.training.statistics import Blocks
from microtome.training.store import StoredCase, store_cases
from tests.containers import hdf5, ome_zarr, zarr_array
from tests.folders import text
from tests.small import small_plan_3d

pytestmark = pytest.mark.filterwarnings("ignore::microtome.errors.DataWarning")

SHAPE = (12, 40, 44)
KINDS = ("zarr", "hdf5", "npy", "folders")


def image(kind: type = np.uint16, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Grey values; those of floats are of both signs."""
    values = np.random.default_rng(seed).normal(100, 40, shape)
    return values.astype(kind) if np.issubdtype(kind, np.floating) else values.clip(0).astype(kind)


def label(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Two classes, one of them of more voxels than are noted, and a rim that nobody annotated."""
    found = np.zeros(shape, np.uint8)
    found[3:9, 5:30, 5:30] = 1
    found[:, :3] = 255
    return found


def folder(root: Path, kind: str, grey: np.ndarray, truth: np.ndarray) -> Dataset:
    """A dataset of one case in the given kind of file, described so that 255 is not annotated."""
    if kind == "zarr":
        ome_zarr(root / "a.ome.zarr", grey, {"cells": truth})
    elif kind == "hdf5":
        hdf5(root / "a.h5", {"raw": grey, "label": truth})
    else:
        for name, array in (("images", grey), ("labels", truth)):
            (root / name).mkdir(parents=True)
            if kind == "npy":
                np.save(root / name / "a.npy", array)
            else:
                zarr_array(root / name / "a.zarr", array)
    text(root / "microtome.yaml", "classes: {background: 0, tubule: 1}\nnot_annotated: 255\nspacing_mm: [1, 1, 1]\n")
    return open_dataset(root)


def plan(**changes: Any) -> Plan:
    return small_plan_3d(**{"spacing_mm": (1.0, 1.0, 1.0), "patch_vox": (8, 16, 16), **changes})


def both(dataset: Dataset, cases: Any, a_plan: Plan, root: Path) -> tuple[list[StoredCase], list[StoredCase]]:
    """The cases copied, and read from where they are."""
    return (
        store_cases(dataset, cases, a_plan, root / "copied", road="whole"),
        store_cases(dataset, cases, a_plan, root / "direct", road="direct"),
    )


def assert_alike(copied: StoredCase, here: StoredCase) -> None:
    """All that is drawn by and all that is drawn is the same, bit for bit."""
    whole = (slice(None),) * len(copied.shape_vox)
    for one, other in zip(copied.crop(whole), here.crop(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    section = (5, slice(2, 9), slice(30, 44))
    for one, other in zip(copied.crop(section)[:2], here.crop(section)[:2], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert dict(copied.class_counts) == dict(here.class_counts)
    assert copied.weight == here.weight
    assert copied.dense == here.dense
    for k in copied.class_voxels:
        np.testing.assert_array_equal(copied.class_voxels[k], here.class_voxels[k])
    np.testing.assert_array_equal(copied.quantiles, here.quantiles)
    if copied.scale is None:
        assert here.scale is None
    else:
        np.testing.assert_array_equal(np.stack(copied.scale), np.stack(here.scale or ()))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of four sections, as chunks have them, so that there are several."""
    monkeypatch.setattr(parts, "MOST_READ", 8000)
    monkeypatch.setattr(direct, "MOST_READ", 8000)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, small_parts: None) -> None:
    """Every volume is too large to be read at once."""
    monkeypatch.setattr(parts, "MOST_WHOLE", 100)
    monkeypatch.setattr(datasets, "MOST_WHOLE", 100)
    monkeypatch.setattr(parts, "_SMALL_BYTES", 0)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_direct_case_is_the_copied_one_bit_for_bit(tmp_path: Path, kind: str, dtype: type) -> None:
    dataset = folder(tmp_path / "data", kind, image(dtype), label())
    copied, here = both(dataset, dataset.cases, plan(), tmp_path)
    assert_alike(copied[0], here[0])
    assert isinstance(here[0].image, DirectImage)
    assert [path.suffix for path in (tmp_path / "direct").iterdir()] == [".npz"]


@pytest.mark.parametrize(
    "normalisation",
    [NormalisationConfig(kind="none"), NormalisationConfig(kind="dataset", low=(20.0,), high=(180.0,), mean=(100.0,), sd=(30.0,))],
)
def test_other_normalisations_are_the_same_too(tmp_path: Path, normalisation: NormalisationConfig) -> None:
    dataset = folder(tmp_path / "data", "zarr", image(np.float32), label())
    copied, here = both(dataset, dataset.cases, plan(normalisation=normalisation), tmp_path)
    assert_alike(copied[0], here[0])


@pytest.mark.usefixtures("small_parts")
def test_samples_drawn_from_either_are_the_same(tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", "zarr", image(), label())
    a_plan = plan()
    copied, here = both(dataset, dataset.cases, a_plan, tmp_path)
    for step in range(6):
        samples = [draw_sample(Pool.of(cases), a_plan, step, 0) for cases in (copied, here)]
        np.testing.assert_array_equal(samples[0].centre, samples[1].centre)
        one, other = (load_sample(sample, cases, a_plan.patch_vox) for sample, cases in zip(samples, (copied, here), strict=True))
        np.testing.assert_array_equal(one.image.numpy(), other.image.numpy())
        np.testing.assert_array_equal(one.label.numpy(), other.label.numpy())


@pytest.mark.usefixtures("small_parts")
def test_sections_and_planes_of_a_stack_are_those_of_the_copy(tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", "hdf5", image(), label())
    case = replace(dataset.cases[0], name="a[3:10]", sections=(3, 10), planes=Planes(shown=((0, 4), (0, 9), (1, 8)), hidden=((2, 6),)))
    copied, here = both(dataset, [case], plan(), tmp_path)
    assert_alike(copied[0], here[0])
    assert not copied[0].dense
    np.testing.assert_array_equal(dataset.read_label(case), here[0].crop((slice(None),) * 3)[1])


def test_values_that_are_not_finite_become_the_mean_of_the_others(tmp_path: Path) -> None:
    grey = image(np.float32)
    grey[0, 0, :5], grey[2, 7, 7] = np.nan, np.inf
    dataset = folder(tmp_path / "data", "zarr", grey, label())
    copied, here = both(dataset, dataset.cases, plan(), tmp_path)
    whole = (slice(None),) * 3
    np.testing.assert_allclose(copied[0].crop(whole)[0], here[0].crop(whole)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(copied[0].quantiles, here[0].quantiles, rtol=1e-5, atol=1e-6)
    assert np.isfinite(here[0].crop(whole)[0]).all()


def test_resumed_run_reads_no_case_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = folder(tmp_path / "data", "zarr", image(), label())
    first = store_cases(dataset, dataset.cases, plan(), tmp_path / "cache", road="direct")
    monkeypatch.setattr("microtome.training.store.gather", lambda *_: pytest.fail("gathered again"))
    again = store_cases(dataset, dataset.cases, plan(), tmp_path / "cache")
    assert_alike(first[0], again[0])


def test_only_cases_beyond_a_share_of_the_memory_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = folder(tmp_path / "data", "zarr", image(), label())
    case, needed = dataset.cases[0], math.prod(SHAPE) * (2 + 2)
    monkeypatch.setattr(roads, "working_bytes", lambda *_: 0)
    for free, expected in ((4 * needed, "whole"), (4 * needed - 1, "direct")):
        monkeypatch.setattr(roads, "free_memory_bytes", lambda free=free: free)
        assert road_of(dataset, case, plan()) == expected
    assert road_of(dataset, case, plan(), "whole") == "whole"


def test_case_that_neither_fits_nor_can_be_read_by_parts_is_refused_with_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, a_plan = folder(tmp_path / "data", "zarr", image(), label()), plan(loss=LossConfig(border_weight=10.0))
    assert road_of(dataset, dataset.cases[0], a_plan, "direct") == "whole"
    monkeypatch.setattr(roads, "free_memory_bytes", lambda: 50_000)
    with pytest.raises(DataError, match=r"84480 bytes.*its border weights need all of the label at once") as caught:
        store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_sample_of_parts_estimates_what_all_of_them_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.tile(np.arange(44) % 2, (24, 40, 1)).astype(np.uint8)
    dataset = folder(tmp_path / "data", "zarr", image(shape=truth.shape), truth)
    monkeypatch.setattr(parts, "SAMPLE_READ", 512)
    facts = [gather(dataset, dataset.cases[0], plan(), np.random.default_rng(0), most=truth.size // 2) for _ in range(2)]
    assert sum(facts[0].counts.values()) == truth.size
    assert facts[0].counts[1] == pytest.approx(truth.size / 2, rel=0.15)
    for k, places in facts[0].voxels.items():
        assert (truth[tuple(places.T)] == k).all()
        np.testing.assert_array_equal(places, facts[1].voxels[k])
    # Means are never of a sample.
    grey = image(shape=truth.shape)
    assert facts[0].scale is not None
    np.testing.assert_allclose(facts[0].scale.mean, [grey.mean()], rtol=1e-6)


class Counting:
    """Pixels that note how much is read at once, and how much in all."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.most, self.read = array, array.shape, array.dtype, 0, 0

    def __getitem__(self, part: Any) -> np.ndarray:
        found: np.ndarray = self.array[part]
        self.most, self.read = max(self.most, found.size), self.read + found.size
        return found


def counted(array: np.ndarray, chunk: tuple[int, ...]) -> tuple[Counting, Volume]:
    """An array as a volume that counts what is read of it."""
    pixels = Counting(array)
    spacing = (1.0,) * (array.ndim - 1)
    return pixels, Volume(
        pixels=pixels, spacing_mm=spacing, affine=affine_from_spacing(spacing), axes="CZYX", path=Path("a"), format="zarr", chunk_vox=chunk
    )


@settings(max_examples=25, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
        st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
        elements=st.integers(0, 100),
    ),
    most=st.integers(8, 600),
    factor=st.sampled_from([1.0, -0.37]),
)
def test_gathered_statistics_are_those_of_the_whole(array: np.ndarray, most: int, factor: float) -> None:
    if array.dtype.kind == "f":
        array = array * array.dtype.type(factor)
    pixels, volume = counted(array, (2, 4, 4))
    a_plan = plan(normalisation=NormalisationConfig(kind="image"), channels=len(array))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_READ", most)
        patch.setattr(direct, "MOST_READ", most)
        _, scale, ends = direct._grey(volume, a_plan, 10**9)
    assert scale is not None
    mean, sd = zip(*(mean_and_sd(channel) for channel in array.astype(np.float32)), strict=True)
    # Fewer values than one block: whatever the order of the parts, sums differ by rounding only.
    np.testing.assert_allclose(scale.mean, np.array(mean, np.float32), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scale.sd, np.array(sd, np.float32), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(direct.between(ends, math.prod(array.shape[1:])), quantiles(array.astype(np.float32)))
    assert pixels.most <= max(most, len(array) * 2 * 4 * 4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, BLOCK_VALUES + 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_sums_do_not_depend_on_how_values_are_cut(sizes: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(3, 5, sum(sizes)).astype(np.float32)
    blocks = Blocks(lambda block: float(block.sum(dtype=np.float64)))
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        blocks.add(part)
    assert blocks.total() / values.size == mean_and_sd(values)[0]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 30), min_size=2, max_size=3),
    chunk=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    most=st.integers(1, 5000),
    seen=st.one_of(st.none(), st.integers(1, 30_000)),
)
def test_parts_partition_a_volume_or_sample_it_without_repetition(shape: list[int], chunk: list[int], most: int, seen: int | None) -> None:
    times = np.zeros(shape, int)
    sizes = []
    for box in parts_of(tuple(shape), tuple(chunk[: len(shape)]), most, seen):
        times[box] += 1
        sizes.append(times[box].size)
    assert times.max() == 1
    if seen is None:
        assert times.min() == 1
    assert max(sizes) <= max(most, math.prod(chunk[: len(shape)]))


def test_whole_planes_come_in_the_order_of_the_file() -> None:
    boxes = list(parts_of((10, 20, 30), (4, 8, 8), most=3000))
    assert [(box[0].start, box[0].stop) for box in boxes] == [(0, 4), (4, 8), (8, 10)]
    assert all(box[1:] == (slice(0, 20), slice(0, 30)) for box in boxes)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_large_cases_are_inspected_by_parts_with_the_numbers_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    grey = image()
    by_parts = folder(tmp_path / "data", kind, grey, label())
    row = inspect_dataset(by_parts).rows[0]
    monkeypatch.setattr(datasets, "MOST_WHOLE", 2**28)
    monkeypatch.setattr(parts, "MOST_WHOLE", 2**28)
    at_once = open_dataset(tmp_path / "data")
    assert inspect_dataset(at_once).rows[0] == row
    assert (row.low, row.high) == (grey.min(), grey.max())
    assert dict(by_parts.class_counts) == dict(at_once.class_counts)
    assert by_parts.legend == at_once.legend


@pytest.mark.usefixtures("large")
def test_large_cases_are_never_loaded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = folder(tmp_path / "data", "zarr", image(), label())
    monkeypatch.setattr(Volume, "load", lambda _: pytest.fail("loaded as a whole"))
    monkeypatch.setattr(fingerprint, "VALUES_OF_LARGE", 6000)
    dataset = open_dataset(tmp_path / "data")
    inspection = inspect_dataset(dataset)
    assert inspection.ok
    assert case_thumbnails(dataset, inspection)[0].section == SHAPE[0] // 2
    found = take_fingerprint(dataset, dataset.cases)
    assert found.mean[0] == pytest.approx(100, abs=4)
    assert found.shape_vox == SHAPE
    assert found.section_lag == 1
    assert 1 < found.thinnest_vox < 30
    # A part of a stack is as large.
    half = replace(dataset.cases[0], name="a[6:12]", sections=(6, 12))
    assert take_fingerprint(dataset, [half]).shape_vox == (6, 40, 44)
    store_cases(dataset, dataset.cases, plan(), tmp_path / "cache", road="direct")[0].crop((slice(0, 2), slice(0, 9), slice(0, 9)))


@pytest.mark.usefixtures("large")
def test_annotated_sections_of_a_large_label_are_found_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.full(SHAPE, 255, np.uint8)
    truth[2, 30, 3], truth[5:8, :4] = 1, 0
    dataset = folder(tmp_path / "data", "zarr", image(), truth)
    monkeypatch.setattr(Volume, "load", lambda _: pytest.fail("loaded as a whole"))
    np.testing.assert_array_equal(np.flatnonzero(dataset.annotated_sections(dataset.cases[0])), [2, 5, 6, 7])
    monkeypatch.undo()
    np.testing.assert_array_equal(np.flatnonzero(dataset.annotated_sections(dataset.cases[0])), [2, 5, 6, 7])


@pytest.mark.usefixtures("large")
def test_what_was_only_sampled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MOST_SEEN", 8000)
    monkeypatch.setattr(parts, "SAMPLE_READ", 512)
    truth = np.tile(np.arange(44) % 2, (12, 40, 1)).astype(np.uint8)
    limited: Callable[[Volume], Any] = lambda volume: looked_at(volume, 8000)  # noqa: E731 - the default was bound before
    for module in ("labels", "quality"):
        monkeypatch.setattr(f"microtome.data.{module}.looked_at", limited)
    dataset = folder(tmp_path / "data", "zarr", image(), truth)
    codes = {finding.code: finding.message for finding in inspect_dataset(dataset).findings}
    assert "12×40×44 voxels are too many to count" in codes["sampled-label"]
    assert "are too many to read" in codes["sampled-image"]
    assert sum(dataset.class_counts["a"][:2]) == pytest.approx(truth.size, rel=0.01)


def test_image_that_the_memory_does_not_hold_is_refused_with_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = folder(tmp_path / "data", "zarr", image(), label())
    monkeypatch.setattr(parts, "free_memory_bytes", lambda: 40_000)
    with pytest.raises(DataError, match=r"a\.ome\.zarr: expected an image that fits.*got 42240 bytes"):
        dataset.read_image(dataset.cases[0])
    # Some of its sections fit.
    assert dataset.read_image(replace(dataset.cases[0], name="a[0:2]", sections=(0, 2))).shape_vox == (2, 40, 44)
    # Each of two files of channels would fit alone.
    path = dataset.cases[0].images[0]
    monkeypatch.setattr(parts, "free_memory_bytes", lambda: 50_000)
    check_fits(path)
    with pytest.raises(DataError, match="got 84480 bytes"):
        check_fits(path, path)
    png = tmp_path / "small.png"
    png.write_bytes(b"x")
    check_fits(png)


def test_scale_of_a_constant_channel_divides_by_nothing(tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", "zarr", np.full(SHAPE, 7, np.uint8), label())
    copied, here = both(dataset, dataset.cases, plan(), tmp_path)
    assert_alike(copied[0], here[0])
    assert isinstance(here[0].scale, Scale)
    assert here[0].crop((slice(0, 2),) * 3)[0].max() == 0
