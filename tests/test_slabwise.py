"""Cases prepared slab by slab: those prepared at once, taken up again where they were killed, never half of one."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.config import LossConfig, NormalisationConfig, Plan, dump_yaml
from microtome.data import parts
from microtome.data.case import Planes
from microtome.data.dataset import Dataset, open_dataset
from microtome.errors import DataError, DataWarning, RunError
from microtome.images.volume import Volume
from microtome.preprocess import normalise, resample, resample_labels
from microtome.training import roads, slabwise, store
from microtome.training.arrays import MAPPED, SHARDED, GrowingFile, grow_array
from microtome.training.direct import Facts
from microtome.training.preparing import stored_bytes
from microtome.training.roads import road_of
from microtome.training.slabwise import PROGRESS, slabs_of
from microtome.training.store import StoredCase, store_cases
from tests.containers import hdf5, ome_zarr
from tests.folders import nifti, text
from tests.forked import ran
from tests.small import small_plan, small_plan_3d

pytestmark = pytest.mark.filterwarnings("ignore::microtome.errors.DataWarning")

SHAPE = (12, 40, 44)
DATASET = NormalisationConfig(kind="dataset", low=(20.3,), high=(180.7,), mean=(99.9,), sd=(33.3,))
DESCRIPTION = "classes: {background: 0, tubule: 1, fibre: 2}\nnot_annotated: 255\nspacing_mm: [1, 1, 1]\n"
NAMES = ("background", "tubule", "fibre")


def grey_of(kind: type = np.uint16, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Grey values; those of floats are of both signs."""
    values = np.random.default_rng(seed).normal(100, 40, shape)
    return values.astype(kind) if np.issubdtype(kind, np.floating) else values.clip(0, 250).astype(kind)


def truth_of(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Three classes in blobs, and a third of the blobs that nobody annotated."""
    coarse = np.random.default_rng(seed).choice([0, 1, 2, 255], [-(-size // 3) for size in shape]).astype(np.uint8)
    for axis in range(len(shape)):
        coarse = coarse.repeat(3, axis)
    return np.ascontiguousarray(coarse[tuple(slice(size) for size in shape)])


def folder(root: Path, grey: np.ndarray, truth: np.ndarray, kind: str = "zarr") -> Dataset:
    """A dataset of one case in the given kind of file."""
    if kind == "zarr":
        ome_zarr(root / "a.ome.zarr", grey, {"cells": truth})
    elif kind == "hdf5":
        hdf5(root / "a.h5", {"raw": grey, "label": truth})
    else:
        for name, array in (("images", grey), ("labels", truth)):
            nifti(root / name / f"a.{kind}", array)
    text(root / "microtome.yaml", DESCRIPTION)
    return open_dataset(root)


def plan(**changes: Any) -> Plan:
    return small_plan_3d(**{"classes": NAMES, "spacing_mm": (1.0, 1.0, 1.0), "patch_vox": (8, 16, 16), **changes})


def both(dataset: Dataset, cases: Any, a_plan: Plan, root: Path) -> tuple[StoredCase, StoredCase]:
    """The first case prepared at once, and slab by slab."""
    return (
        store_cases(dataset, cases, a_plan, root / "whole", road="whole")[0],
        store_cases(dataset, cases, a_plan, root / "slabs", road="slabs")[0],
    )


def all_of(case: StoredCase) -> tuple[np.ndarray, ...]:
    image, label, _ = case.crop((slice(None),) * len(case.shape_vox))
    return image, label


def assert_alike(whole: StoredCase, slabs: StoredCase) -> None:
    """All that is drawn by and all that is drawn is the same, bit for bit."""
    for one, other in zip(all_of(whole), all_of(slabs), strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    assert dict(whole.class_counts) == dict(slabs.class_counts)
    assert (whole.weight, whole.dense) == (slabs.weight, slabs.dense)
    for k in whole.class_voxels:
        np.testing.assert_array_equal(whole.class_voxels[k], slabs.class_voxels[k])
    np.testing.assert_array_equal(whole.quantiles, slabs.quantiles)
    assert (whole.scale is None) == (slabs.scale is None)
    if whole.scale is not None:
        np.testing.assert_array_equal(np.stack(whole.scale), np.stack(slabs.scale or ()))


@pytest.fixture(params=[MAPPED, SHARDED])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Cases are stored as this kind of array, whatever the disk has room for."""
    monkeypatch.setattr(store, "_choose_kind", lambda *_: request.param)
    return str(request.param)


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of one or two sections, and files read by few."""
    monkeypatch.setattr(slabwise, "SLAB_VALUES", 4000)
    monkeypatch.setattr(slabwise, "MOST_READ", 8000)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("spacing_mm", [(0.7, 2.3, 1.0), (2.0, 0.8, 1.7)])
def test_a_case_by_slabs_is_the_whole_one_bit_for_bit(kind: str, interpolation: Any, spacing_mm: Any, tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", grey_of(), truth_of())
    a_plan = plan(interpolation=interpolation, spacing_mm=spacing_mm)
    whole, slabs = both(dataset, dataset.cases, a_plan, tmp_path)
    assert_alike(whole, slabs)
    assert slabs.image.path.suffix == kind
    image, label = all_of(slabs)
    np.testing.assert_array_equal(image, resample(normalise(grey_of()[None], a_plan.normalisation), image.shape[1:], interpolation))
    expected = truth_of().astype(np.int16)
    np.testing.assert_array_equal(label, resample_labels(np.where(expected == 255, -1, expected), label.shape))


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("normalisation", [NormalisationConfig(kind="none"), DATASET], ids=lambda config: config.kind)
def test_other_types_and_normalisations_are_the_same_too(dtype: type, normalisation: NormalisationConfig, tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", grey_of(dtype), truth_of(), "hdf5")
    for spacing_mm in ((1.5, 1.5, 1.5), (1.0, 1.0, 1.0)):
        a_plan = plan(normalisation=normalisation, interpolation="cubic", spacing_mm=spacing_mm)
        assert_alike(*both(dataset, dataset.cases, a_plan, tmp_path / str(spacing_mm[0])))


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_shape_cut_into_any_slabs_is_the_whole_up_to_rounding(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("cut")
    shape = tuple(data.draw(st.integers(1, 14), f"side {axis}") for axis in range(3))
    spacing = tuple(data.draw(st.sampled_from([0.5, 0.8, 1.0, 1.3, 2.0, 3.1]), f"spacing {axis}") for axis in range(3))
    seed, kind = data.draw(st.integers(0, 99), "seed"), data.draw(st.sampled_from([MAPPED, SHARDED]), "kind")
    grey, truth = grey_of(np.int16, shape, seed), truth_of(shape, seed)
    truth.flat[0] = 1
    dataset = folder(root / "data", grey, truth, "nii")
    a_plan = plan(interpolation=data.draw(st.sampled_from(["linear", "cubic"]), "interpolation"), spacing_mm=spacing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_choose_kind", lambda *_: kind)
        patch.setattr(slabwise, "PLANE_VALUES", data.draw(st.sampled_from([1, 300, 3000, 2**27]), "plane"))
        patch.setattr(slabwise, "SLAB_VALUES", data.draw(st.integers(150, 900), "slab"))
        found = store_cases(dataset, dataset.cases, a_plan, root / "slabs", road="slabs")
    expected = store_cases(dataset, dataset.cases, a_plan, root / "whole", road="whole")
    assert len(found) == len(expected)
    for slabs, whole in zip(found, expected, strict=True):
        (image, label), (expected_image, expected_label) = all_of(slabs), all_of(whole)
        # Sums of the same products in another order.
        np.testing.assert_allclose(image, expected_image, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(label, expected_label)
        assert dict(slabs.class_counts) == dict(whole.class_counts)
        np.testing.assert_allclose(slabs.quantiles, whole.quantiles, rtol=1e-5, atol=1e-5)


@given(
    grid=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    factor=st.sampled_from([0.5, 1.0, 7.0]),
    plane=st.sampled_from([50, 2000, 10**6]),
    most=st.integers(1, 5000),
    sides=st.sampled_from([1, 8]),
)
@settings(max_examples=40, deadline=None)
def test_slabs_are_a_partition_and_none_is_larger_than_it_may_be(grid: list[int], factor: float, plane: int, most: int, sides: int) -> None:
    shape, file_shape = tuple(grid), tuple(max(1, round(size * factor)) for size in grid)
    target = GrowingFile(Path("a.npy"), (2, *shape), np.dtype(np.float32), (1, *(sides,) * len(shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabwise, "PLANE_VALUES", plane)
        patch.setattr(slabwise, "SLAB_VALUES", most)
        found = slabs_of(shape, file_shape, target, 1, "cubic")
    times = np.zeros(shape, int)
    for slabs in found:
        assert len({str(slab.box[1:]) for slab in slabs}) == 1
        for slab in slabs:
            assert slab.name == "image"
            times[slab.box] += 1
            assert times[slab.box].size * 2 <= max(most, 2 * sides ** len(shape))
    assert (times == 1).all()


@pytest.mark.usefixtures("thin")
def test_values_that_are_not_finite_become_the_mean_of_the_others(tmp_path: Path) -> None:
    grey = grey_of(np.float32)
    grey[0, 0, :5], grey[2, 7, 7] = np.nan, np.inf
    dataset = folder(tmp_path / "data", grey, truth_of())
    whole, slabs = both(dataset, dataset.cases, plan(interpolation="cubic", spacing_mm=(2.0, 2.0, 2.0)), tmp_path)
    assert np.isfinite(all_of(slabs)[0]).all()
    np.testing.assert_allclose(all_of(whole)[0], all_of(slabs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("thin")
def test_sections_and_planes_of_a_stack_are_those_of_the_whole_road(tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", grey_of(), np.minimum(truth_of(), 2))
    case = replace(dataset.cases[0], name="a[3:10]", sections=(3, 10), planes=Planes(shown=((0, 4), (0, 9), (1, 8)), hidden=((2, 6),)))
    whole, slabs = both(dataset, [case], plan(spacing_mm=(0.5, 2.0, 2.0)), tmp_path)
    assert_alike(whole, slabs)
    assert not slabs.dense
    assert (all_of(slabs)[1] == -1).any()


@pytest.mark.usefixtures("thin")
def test_sections_are_not_mixed_for_a_2d_network(kind: str, tmp_path: Path) -> None:
    dataset = folder(tmp_path / "data", grey_of(), truth_of())
    a_plan = small_plan(classes=NAMES, spacing_mm=(1.0, 1.5, 1.3), interpolation="cubic")
    whole, slabs = both(dataset, dataset.cases, a_plan, tmp_path)
    assert_alike(whole, slabs)
    assert slabs.shape_vox == (12, 27, 34)


def test_files_that_are_not_packed_are_read_by_parts_too_and_packed_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roads, "free_memory_bytes", lambda: 60_000)
    a_plan = plan(spacing_mm=(2.0, 2.0, 2.0))
    plain = folder(tmp_path / "plain", grey_of(), truth_of(), "nii")
    assert road_of(plain, plain.cases[0], a_plan) == "slabs"
    assert_alike(*both(plain, plain.cases, a_plan, tmp_path))
    packed = folder(tmp_path / "packed", grey_of(), truth_of(), "nii.gz")
    with pytest.raises(DataError, match=r"84480 bytes.*a\.nii\.gz can be read only as a whole"):
        road_of(packed, packed.cases[0], a_plan)


def test_a_case_goes_by_slabs_only_where_preparing_it_at_once_would_take_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, a_plan = folder(tmp_path / "data", grey_of(), truth_of()), plan(spacing_mm=(2.0, 2.0, 2.0))
    for share, expected in ((0.6, "whole"), (0.61, "slabs")):
        monkeypatch.setattr(roads, "free_memory_bytes", lambda: 10**9)
        monkeypatch.setattr(roads, "working_bytes", lambda *_, share=share: int(share * 10**9))
        assert road_of(dataset, dataset.cases[0], a_plan) == expected
    weighed = a_plan.model_copy(update={"loss": LossConfig(border_weight=10.0)})
    assert road_of(dataset, dataset.cases[0], weighed) == "whole"


@pytest.mark.usefixtures("thin")
def test_a_case_that_goes_by_slabs_is_never_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = folder(tmp_path / "data", grey_of(), truth_of())
    monkeypatch.setattr(Volume, "load", lambda _: pytest.fail("loaded as a whole"))
    monkeypatch.setattr(Dataset, "read_image", lambda *_: pytest.fail("read as a whole"))
    monkeypatch.setattr(Dataset, "read_label", lambda *_: pytest.fail("read as a whole"))
    assert store_cases(dataset, dataset.cases, plan(spacing_mm=(2.0, 2.0, 2.0)), tmp_path / "cache", road="slabs")[0].shape_vox == (
        6,
        20,
        22,
    )


def test_the_memory_that_slabs_take_does_not_grow_with_the_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("PLANE_VALUES", 50_000), ("SLAB_VALUES", 15_000), ("MOST_READ", 20_000)):
        monkeypatch.setattr(slabwise, name, most)
    # Their histograms are the same whatever the volume, and would hide the rest.
    monkeypatch.setattr(slabwise, "_facts", lambda *_: Facts({0: np.zeros((1, 3))}, {0: 1}, np.zeros((1, 257)), None, np.empty(0)))
    peaks = []
    for rows in (130, 520):
        dataset = folder(tmp_path / str(rows), grey_of(shape=(rows, 24, 24)), truth_of((rows, 24, 24)), "nii")
        tracemalloc.start()
        store_cases(dataset, dataset.cases, plan(interpolation="cubic", spacing_mm=(0.8, 1.5, 1.0)), tmp_path / f"{rows}c", road="slabs")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]


# ---- killed ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KILLED = (
    "import os, sys; from pathlib import Path\n"
    "from microtome.config import Plan; from microtome.yaml_files import load_yaml; from microtome.data.dataset import open_dataset\n"
    "from microtome.training import slabwise, store\n"
    "data, out, kind, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])\n"
    "slabwise.SLAB_VALUES = 4000; store._choose_kind = lambda *_: kind\n"
    "def killing(write):\n"
    "    def part(*arguments, **named):\n"
    "        global left; left -= 1; found = write(*arguments, **named)\n"
    "        return os._exit(9) if left == 0 else found\n"
    "    return part\n"
    "slabwise.write_json = killing(slabwise.write_json); store._write_facts = killing(store._write_facts)\n"
    "from microtome.training import arrays\n"
    "arrays.GrowingFile.write = killing(arrays.GrowingFile.write); arrays.GrowingStore.write = killing(arrays.GrowingStore.write)\n"
    "dataset = open_dataset(data)\n"
    "store.store_cases(dataset, dataset.labelled, Plan(**load_yaml(Path(sys.argv[5]))), out, road='slabs')\n"
)


# Killed after a slab of the image that is not noted, after the note of one of the label, and after the mark that the case is complete;
# in chunks image and label are a slab each.
@pytest.mark.parametrize(
    ("kind", "calls", "complete"),
    [(MAPPED, 4, False), (MAPPED, 11, False), (MAPPED, 14, True), (SHARDED, 3, False), (SHARDED, 6, True)],
    indirect=["kind"],
)
def test_a_killed_case_goes_on_at_its_last_slab_and_gives_the_same_bytes(
    kind: str, calls: int, complete: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, a_plan = folder(tmp_path / "data", grey_of(), truth_of()), plan(spacing_mm=(1.0, 1.5, 1.5), interpolation="cubic")
    (tmp_path / "plan.yaml").write_text(dump_yaml(a_plan))
    killed = tmp_path / "killed"
    arguments = [str(dataset.root), str(killed), kind, str(calls), str(tmp_path / "plan.yaml")]
    done = ran(KILLED, *arguments)
    assert done.returncode == 9, done.stderr
    assert bool([*killed.glob("*.voxels.npz")]) is complete
    noted = json.loads(next(killed.glob(f"*{PROGRESS}")).read_text())["done"]
    monkeypatch.setattr(slabwise, "SLAB_VALUES", 4000)
    written: list[Any] = []
    for target in slabwise.GrowingArray.__args__:
        write = target.write
        monkeypatch.setattr(target, "write", lambda self, box, values, write=write: (written.append(box), write(self, box, values))[1])
    store_cases(dataset, dataset.labelled, a_plan, tmp_path / "at once", road="slabs")
    of = len(written)
    store_cases(dataset, dataset.labelled, a_plan, killed, road="slabs")
    assert len(written) == of + (0 if complete else of - noted)
    names = {name for name in contents(killed) if not name.endswith(PROGRESS)}
    assert {name: contents(killed)[name] for name in names} == contents(tmp_path / "at once")


@pytest.mark.usefixtures("thin")
def test_half_a_case_is_not_gone_on_with_for_another_plan_file_or_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, a_plan, cache = folder(tmp_path / "data", grey_of(), truth_of()), plan(spacing_mm=(2.0, 2.0, 2.0)), tmp_path / "cache"

    def half() -> set[Path]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slabwise, "_facts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store_cases(dataset, dataset.cases, a_plan, cache, road="slabs")
        return set(cache.iterdir())

    files = half()
    assert len(files) == 3
    expected = store_cases(dataset, dataset.cases, a_plan, tmp_path / "whole", road="whole")[0]
    other = plan(spacing_mm=(2.0, 2.0, 1.0))
    assert store_cases(dataset, dataset.cases, other, cache, road="slabs")[0].shape_vox == (6, 20, 44)
    assert not files & set(cache.iterdir())
    half()
    assert_alike(expected, store_cases(dataset, dataset.cases, a_plan, cache, road="whole")[0])
    assert not [*cache.glob(f"*{PROGRESS}")]
    for path in cache.iterdir():
        path.unlink()
    # Nor where it was cut into other slabs, or its notes are damaged.
    half()
    monkeypatch.setattr(slabwise, "SLAB_VALUES", 999)
    assert_alike(expected, store_cases(dataset, dataset.cases, a_plan, cache, road="slabs")[0])
    next(cache.glob("*.npz")).unlink()
    half()
    next(cache.glob(f"*{PROGRESS}")).write_text("{")
    assert_alike(expected, store_cases(dataset, dataset.cases, a_plan, cache, road="slabs")[0])


# ---- room on the disk ----


@pytest.mark.usefixtures("thin")
def test_the_bytes_that_slabs_take_are_asked_for_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blobs, which compress.
    dataset, a_plan = folder(tmp_path / "data", truth_of(), truth_of()), plan(spacing_mm=(1.0, 0.5, 1.0))
    needed = stored_bytes(dataset, dataset.cases[0], a_plan)
    assert needed >= 12 * 80 * 44 * 5
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    monkeypatch.setattr(store, "run_within", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(RunError, match=r"expected \d+ free bytes \(1 prepared cases take .* got 99 .*too few; free space and --resume"):
        store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache", road="slabs")
    monkeypatch.undo()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.warns(DataWarning, match="they are stored compressed"):
        packed = store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache", road="slabs")[0]
    assert packed.image.path.suffix == SHARDED
    assert_alike(store_cases(dataset, dataset.cases, a_plan, tmp_path / "whole", road="whole")[0], packed)


@pytest.mark.usefixtures("thin")
def test_what_lies_there_of_half_a_case_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, a_plan = folder(tmp_path / "data", grey_of(), truth_of()), plan(spacing_mm=(1.0, 0.5, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(slabwise, "_facts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache", road="slabs")
    lying = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").iterdir())
    room = stored_bytes(dataset, dataset.cases[0], a_plan) - lying
    assert 0 < room < 60_000
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    case = store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache", road="slabs")[0]
    assert case.image.path.suffix == MAPPED


@pytest.mark.usefixtures("thin")
def test_a_disk_that_fills_between_slabs_is_a_line_and_the_run_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, a_plan = folder(tmp_path / "data", grey_of(), truth_of()), plan(spacing_mm=(1.0, 0.5, 1.0))
    flush, calls = slabwise.write_json, []

    def filling(path: Path, value: Any) -> None:
        calls.append(value["done"])
        flush(path, value)
        if len(calls) == 3:
            monkeypatch.setattr("microtome.training.arrays.os.fsync", full)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slabwise, "write_json", filling)
    with pytest.raises(
        RunError, match=r"\.image\.npy: expected room for 1 more prepared cases, at most \d+ bytes .*No space left.*--resume"
    ):
        store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache", road="slabs")
    monkeypatch.undo()
    monkeypatch.setattr(slabwise, "SLAB_VALUES", 4000)
    monkeypatch.setattr(slabwise, "write_json", lambda path, value: (calls.append(value["done"]), flush(path, value)))
    case = store_cases(dataset, dataset.cases, a_plan, tmp_path / "cache", road="slabs")[0]
    assert calls[:4] == [0, 1, 2, 2]
    assert_alike(store_cases(dataset, dataset.cases, a_plan, tmp_path / "whole", road="whole")[0], case)


# ---- arrays that grow ----


@pytest.mark.parametrize("suffix", [MAPPED, SHARDED])
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_boxes_written_one_after_the_other_are_the_array(
    suffix: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("grown")
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(4))
    sides = tuple(data.draw(st.integers(-(-size // 2), size)) for size in shape)
    array = np.random.default_rng(0).integers(-99, 99, shape).astype(np.int16)
    grown = grow_array(root / f"a{suffix}", shape, array.dtype, 3, again=False)
    assert not grown[(slice(None),) * 4].any()
    for number, box in enumerate(parts.parts_of(shape, sides, 1)):
        if number == 3:
            grown = grow_array(root / f"a{suffix}", shape, array.dtype, 3, again=True)
        grown.write(box, array[box])
    np.testing.assert_array_equal(grown[(slice(None),) * 4], array)
    assert math.prod(grown.shape) == array.size
