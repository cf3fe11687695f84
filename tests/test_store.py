"""Stored cases: parts are those of the normalised whole from either store, taken up again after an interruption, never half of one."""

import errno
import math
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome import machine
from microtome.config import LossConfig, NormalisationConfig, dump_yaml
from microtome.data.case import Planes
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import DataWarning, RunError
from microtome.machine import free_memory_bytes
from microtome.preprocess import normalise, resample, resample_labels
from microtome.training import arrays, store
from microtome.training.arrays import MAPPED, SHARDED
from microtome.training.preparing import VOXELS_A_CLASS, prepare, quantiles, stored_bytes
from microtome.training.store import StoredCase, run_within, store_cases
from tests.folders import nifti, png, text
from tests.forked import ran
from tests.small import small_plan, small_plan_3d

RNG_SEED = 0
BORDERS = LossConfig(border_weight=10.0)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = write_demo_data(tmp_path_factory.mktemp("data"), DemoConfig(picture_vox=(48, 56), volume_vox=(16, 20, 24), pictures=4))
    return open_dataset(data.cells)


@pytest.fixture(scope="module")
def tubules(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = write_demo_data(tmp_path_factory.mktemp("data"), DemoConfig(picture_vox=(48, 56), volume_vox=(16, 20, 24), pictures=1))
    return open_dataset(data.tubules)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that are preprocessed."""
    names: list[str] = []

    def counting(dataset: Dataset, case: Any, plan: Any) -> Any:
        names.append(case.name)
        return prepare(dataset, case, plan)

    monkeypatch.setattr(store, "prepare", counting)
    return names


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Cases are stored as this kind of array, whatever the disk has room for."""
    monkeypatch.setattr(store, "_choose_kind", lambda *_: request.param)
    return str(request.param)


def both_kinds(test: Callable[..., None]) -> Callable[..., None]:
    """The test once with either kind of array."""
    return pytest.mark.parametrize("kind", [MAPPED, SHARDED], indirect=True)(test)


def whole(case: StoredCase) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All of a case, as its parts come."""
    return case.crop((slice(None),) * len(case.shape_vox))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and its folders."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stored_case_is_the_normalised_image_and_the_label(cells: Dataset, tmp_path: Path) -> None:
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert [case.name for case in stored] == [case.name for case in cells.labelled]
    for case, source in zip(stored, cells.labelled, strict=True):
        assert isinstance(case.image[:], np.memmap)
        assert isinstance(case.label[:], np.memmap)
        # Pictures of 8 bits and labels of 2 classes, as they are in their files.
        assert (case.image[:].dtype, case.label[:].dtype) == (np.uint8, np.int8)
        assert np.array_equal(case.image[:], cells.read_image(source).array)
        image, label, weight = whole(case)
        assert (image.dtype, label.dtype, weight) == (np.float32, np.int16, None)
        assert np.array_equal(image, normalise(cells.read_image(source).array, small_plan().normalisation))
        assert np.array_equal(label, cells.read_label(source))
        assert np.array_equal(case.quantiles, quantiles(image))
        assert (case.shape_vox, case.dense, case.weight) == ((48, 56), True, 1.0)


@both_kinds
@pytest.mark.parametrize("normalisation", ["image", "none", "dataset"])
@pytest.mark.parametrize("spacing_mm", [(0.00204, 0.00176, 0.00176), (0.00408, 0.00176, 0.00264)], ids=["unchanged", "resampled"])
def test_any_part_is_bit_for_bit_that_of_the_whole(
    normalisation: Any, spacing_mm: tuple[float, ...], kind: str, tubules: Dataset, tmp_path: Path
) -> None:
    fixed = {"low": (30.3,), "high": (170.7,), "mean": (99.9,), "sd": (33.3,)} if normalisation == "dataset" else {}
    config = NormalisationConfig(kind=normalisation, **fixed)
    plan = small_plan_3d(spacing_mm=spacing_mm, normalisation=config, loss=BORDERS)
    case = store_cases(tubules, tubules.labelled[:1], plan, tmp_path)[0]
    assert case.image.path.suffix == kind
    image = resample(normalise(tubules.read_image(tubules.labelled[0]).array, config), case.shape_vox, plan.interpolation)
    prepared = prepare(tubules, tubules.labelled[0], plan)
    assert prepared.weight is not None

    @given(data=st.data())
    @settings(max_examples=20, deadline=None)
    def check(data: st.DataObject) -> None:
        corners = [data.draw(st.integers(0, size - 1)) for size in case.shape_vox]
        sides = [slice(a, data.draw(st.integers(a + 1, size))) for a, size in zip(corners, case.shape_vox, strict=True)]
        for part in ((*sides,), (corners[0], *sides[1:])):
            found = case.crop(part)
            assert found[0].tobytes() == image[(slice(None), *part)].tobytes()
            assert np.array_equal(found[1], prepared.label[part])
            assert np.array_equal(found[2], prepared.weight[part].astype(np.float32))
            assert [array.dtype for array in found] == [np.float32, np.int16, np.float32]

    check()


@both_kinds
def test_parts_are_copies(kind: str, cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(normalisation=NormalisationConfig(kind="none"), loss=BORDERS), tmp_path)[0]
    before = [array.copy() for array in whole(case)]
    for array in whole(case):
        array[...] = 99
    assert all(np.array_equal(a, b) for a, b in zip(before, whole(case), strict=True))
    assert case.image.path.suffix == kind


def test_many_classes_take_two_bytes(tmp_path: Path) -> None:
    label = np.arange(256).reshape(16, 16)
    for name in ("images", "labels"):
        png(tmp_path / name / "a.png", label)
    text(tmp_path / "microtome.yaml", {"classes": {f"class {k}": k for k in range(256)}})
    dataset = open_dataset(tmp_path)
    case = store_cases(dataset, dataset.labelled, small_plan(classes=dataset.legend.names), tmp_path / "cache")[0]
    assert case.label[:].dtype == np.int16
    assert np.array_equal(whole(case)[1], label)


def test_memory_maps_cannot_be_written(cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)[0]
    with pytest.raises(ValueError, match="read-only"):
        case.image[:][0, 0, 0] = 1


def test_cases_are_brought_to_the_plan_s_spacing(cells: Dataset, tmp_path: Path) -> None:
    plan = small_plan(spacing_mm=(2.0, 4.0))
    case, source = store_cases(cells, cells.labelled[:1], plan, tmp_path)[0], cells.labelled[0]
    assert case.shape_vox == (24, 14)
    assert np.array_equal(whole(case)[0], resample(normalise(cells.read_image(source).array, plan.normalisation), (24, 14)))
    assert np.array_equal(case.label[:], resample_labels(cells.read_label(source), (24, 14)))


def test_pictures_are_resized_to_the_one_shape_that_the_plan_asks_for(cells: Dataset, tmp_path: Path) -> None:
    case = store_cases(cells, cells.labelled[:1], small_plan(resize_vox=(20, 30), loss=BORDERS), tmp_path)[0]
    assert case.image.shape == (1, 20, 30)
    assert case.weight_map is not None
    assert case.label.shape == case.weight_map.shape == (20, 30)
    assert np.array_equal(
        whole(case)[0], resample(normalise(cells.read_image(cells.labelled[0]).array, small_plan().normalisation), (20, 30))
    )


def test_sections_are_not_mixed_for_a_2d_network(tubules: Dataset, tmp_path: Path) -> None:
    plan = small_plan(classes=("background", "tubule"), spacing_mm=(0.1, 0.00352, 0.00352))
    assert store_cases(tubules, tubules.labelled[:1], plan, tmp_path)[0].shape_vox == (16, 10, 12)


def test_voxels_of_each_class_are_noted_where_they_lie(tubules: Dataset, tmp_path: Path) -> None:
    for case in store_cases(tubules, tubules.labelled, small_plan_3d(), tmp_path):
        assert not case.dense
        assert set(case.class_voxels) == {0, 1}
        for k, voxels in case.class_voxels.items():
            assert (case.label[tuple(voxels.T)] == k).all()
            assert len(np.unique(voxels, axis=0)) == len(voxels) == min(VOXELS_A_CLASS, (case.label[:] == k).sum())
            assert (voxels.dtype, case.class_counts[k]) == (np.int32, (case.label[:] == k).sum())


def test_of_a_large_class_some_voxels_from_everywhere_are_noted(tmp_path: Path) -> None:
    label = np.zeros((100, 120), np.int16)
    label[:, 60:] = 255
    png(tmp_path / "images" / "a.png", label)
    png(tmp_path / "labels" / "a.png", label)
    dataset = open_dataset(tmp_path)
    first, again = (store_cases(dataset, dataset.labelled, small_plan(), tmp_path / "cache")[0].class_voxels for _ in range(2))
    assert [len(first[k]) for k in (0, 1)] == [VOXELS_A_CLASS] * 2
    assert first[0].mean(0) == pytest.approx([49.5, 29.5], abs=3)
    assert np.array_equal(first[1], again[1])


def test_what_an_interrupted_run_stored_is_taken(cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    store_cases(cells, cells.labelled[:2], small_plan(), tmp_path)
    assert len(prepared) == 2
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert sorted(prepared) == sorted(case.name for case in cells.labelled)


@pytest.mark.parametrize("last", ["image.npy", "label.npy", "voxels.npz"])
def test_a_case_of_which_a_file_is_missing_is_stored_again(last: str, cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    prepared.clear()
    # What a kill leaves: the files before, half of one under a temporary name.
    files = [next(tmp_path.glob(f"00001*.{name}")) for name in ("image.npy", "label.npy", "voxels.npz")]
    while (file := files.pop()) and not file.name.endswith(last):
        file.unlink()
    file.rename(file.with_name(f".part-x-{file.name}"))
    for before in files:
        before.write_bytes(b"of another day")
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert prepared == [cells.labelled[1].name]
    assert stored[1].shape_vox == (48, 56)
    assert stored[1].image.shape == (1, 48, 56)


def test_where_the_classes_are_is_found_once(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store_cases(cells, cells.labelled, small_plan(), tmp_path)

    def fail(*_: Any) -> None:
        raise AssertionError("a voxel was looked at again")

    monkeypatch.setattr(store, "class_counts", fail)
    monkeypatch.setattr(store, "draw_voxels", fail)
    for case, again in zip(first, store_cases(cells, cells.labelled, small_plan(), tmp_path), strict=True):
        assert case.class_counts == again.class_counts
        assert all(np.array_equal(case.class_voxels[k], again.class_voxels[k]) for k in case.class_counts)


def test_no_more_files_are_open_than_are_allowed_and_all_can_be_read(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays.Arrays.__init__, "__defaults__", (2,))
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    for case, source in [*zip(stored, cells.labelled, strict=True)] * 2:
        assert np.array_equal(whole(case)[0], normalise(cells.read_image(source).array, small_plan().normalisation))
        assert np.array_equal(case.label[:, 3:9], cells.read_label(source)[:, 3:9])
        open_files = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
        assert sum(str(tmp_path) in name for name in open_files) <= 2


def test_two_hundred_files_are_stored_and_read_where_a_process_may_open_fewer(tmp_path: Path) -> None:
    for number in range(100):
        for folder in ("images", "labels"):
            png(tmp_path / "data" / folder / f"{number}.png", np.arange(16).reshape(4, 4) % 2)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from microtome.data.dataset import open_dataset; from microtome.training.store import store_cases\n"
        "from tests.small import small_plan\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (170, 170))\n"
        "dataset = open_dataset(Path(sys.argv[1]))\n"
        "stored = store_cases(dataset, dataset.labelled, small_plan(), Path(sys.argv[2]))\n"
        "print(len(stored), sum(int(case.label[:].sum()) for case in stored), sum(case.image[0, 0].size for case in stored))\n"
    )
    done = ran(program, str(tmp_path / "data"), str(tmp_path / "cache"))
    assert done.stdout.split() == ["100", "800", "400"], done.stderr


def at_once(sizes: list[int], memory: int, monkeypatch: pytest.MonkeyPatch, cores: int = 64) -> tuple[list[set[int]], list[int]]:
    """The sets of numbers that were worked on at the same time, and the numbers in the order in which they were done."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    now: set[int] = set()
    seen, order, lock = [], [], threading.Lock()

    def work(number: int) -> None:
        with lock:
            now.add(number)
            seen.append(set(now))
        time.sleep(0.005)
        with lock:
            now.discard(number)

    run_within(memory, dict(enumerate(sizes)), work, order.append)
    return seen, order


@pytest.mark.parametrize("seed", range(4))
def test_no_more_is_done_at_once_than_fits_into_memory_and_on_the_cores(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.random.default_rng(seed).integers(1, 60, 30).tolist()
    seen, order = at_once(sizes, 100, monkeypatch, cores=4)
    assert all(sum(sizes[n] for n in numbers) <= 100 and len(numbers) <= 4 for numbers in seen)
    assert max(map(len, seen)) > 1
    assert sorted(order) == list(range(30))


def test_what_is_larger_than_the_memory_is_done_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = at_once([10, 10, 500, 10, 10], 100, monkeypatch)
    assert [numbers for numbers in seen if 2 in numbers] == [{2}]
    assert max(map(len, seen)) == 2


def test_without_memory_or_cores_one_is_done_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, cores in ((0, 64), (10**9, 1)):
        seen, order = at_once([1, 2, 3], memory, monkeypatch, cores)
        assert seen == [{0}, {1}, {2}]
        assert order == [0, 1, 2]


def test_after_an_error_nothing_more_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise RunError("there", expected="this", got="that", do="nothing")

    with pytest.raises(RunError, match="there"):
        run_within(100, dict.fromkeys(range(9), 1), work, lambda number: None)
    assert begun == [0, 1]


def test_a_case_counts_as_what_its_header_says(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(store, "run_within", lambda memory, sizes, work, done: found.append((memory, dict(sizes))) or [*map(work, sizes)])
    monkeypatch.setattr(store, "free_memory_bytes", lambda: 1000)
    store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert found == [(600, {n: store.working_bytes(cells, case, small_plan()) for n, case in enumerate(cells.labelled)})]


def test_how_far_it_is_is_told_of_the_cases_that_had_to_be_prepared(cells: Dataset, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for count in (1, 4, 4):
        store_cases(cells, cells.labelled[:count], small_plan(), tmp_path, lambda done, of: told.append((done, of)))
    assert told == [(1, 1), (1, 3), (2, 3), (3, 3)]


@both_kinds
def test_the_files_are_the_same_however_many_are_prepared_at_once(
    kind: str, cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores in (1, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        store_cases(cells, cells.labelled, small_plan(loss=BORDERS), tmp_path / str(cores))
    assert contents(tmp_path / "1") == contents(tmp_path / "8")
    assert any(kind in name for name in contents(tmp_path / "1"))


@pytest.mark.parametrize(("kind", "writes"), [(MAPPED, 5), (SHARDED, 4)])
def test_a_killed_preparation_taken_up_again_gives_the_same_bytes(
    kind: str, writes: int, cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(loss=BORDERS)
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan))
    program = (
        "import os, sys; from pathlib import Path; import numpy as np\n"
        "from microtome.config import Plan; from microtome.yaml_files import load_yaml; from microtome.data.dataset import open_dataset\n"
        "from microtome.training import arrays, store\n"
        "data, out, kind, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])\n"
        "store.usable_cores = lambda: 1; store._choose_kind = lambda *_: kind\n"
        "def killing(write):\n"
        "    def part(*arguments):\n"
        "        global left; left -= 1; found = write(*arguments)\n"
        "        return os._exit(9) if left == 0 else found\n"
        "    return part\n"
        "arrays._write_chunks = killing(arrays._write_chunks)\n"
        "np.save = (lambda write: lambda *a, **k: write(*a))(killing(np.save))\n"
        "dataset = open_dataset(data)\n"
        "store.store_cases(dataset, dataset.labelled, Plan(**load_yaml(Path(sys.argv[5]))), out)\n"
    )
    arguments = [str(cells.root), str(tmp_path / "killed"), kind, str(writes), str(tmp_path / "plan.yaml")]
    done = ran(program, *arguments)
    assert done.returncode == 9, done.stderr
    # One case is whole, and of the next there is a part under a temporary name.
    assert len([*(tmp_path / "killed").glob("*.voxels.npz")]) == 1
    assert [*(tmp_path / "killed").glob(".part-*")]
    monkeypatch.setattr(store, "_choose_kind", lambda *_: kind)
    for name in ("killed", "at once"):
        store_cases(cells, cells.labelled, plan, tmp_path / name)
    assert contents(tmp_path / "killed") == contents(tmp_path / "at once")


def test_what_will_not_fit_on_the_disk_even_compressed_is_refused_before_any_work(
    tubules: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    monkeypatch.setattr(store, "run_within", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(RunError, match=r"expected (\d+) free bytes .* got 99 .*too few; free space and --resume") as caught:
        store_cases(tubules, tubules.labelled, small_plan_3d(), tmp_path)
    needed = int(caught.value.expected.split()[0])
    assert f"{needed - 99} too few" in caught.value.got
    # Noise compresses little, labels much.
    whole = sum(stored_bytes(tubules, case, small_plan_3d()) for case in tubules.labelled)
    assert 0.3 * whole < needed < 1.15 * whole
    assert list(tmp_path.iterdir()) == []


def test_cases_are_compressed_where_the_disk_has_no_room_for_them_as_they_are(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(stored_bytes(cells, case, small_plan()) for case in cells.labelled)
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: free)
    mapped = store_cases(cells, cells.labelled, small_plan(), tmp_path / "mapped")
    free.free = needed - 1
    monkeypatch.setattr(store, "packed_bytes", lambda array, dims: array.nbytes // 2)
    with pytest.warns(DataWarning, match=r"4 prepared cases take 0\.0 GB, compressed about .* free: they are stored compressed"):
        sharded = store_cases(cells, cells.labelled, small_plan(), tmp_path / "sharded")
    for case, other in zip(mapped, sharded, strict=True):
        assert (case.image.path.suffix, other.image.path.suffix) == (MAPPED, SHARDED)
        assert all(np.array_equal(a, b) for a, b in zip(whole(case)[:2], whole(other)[:2], strict=True))
        assert np.array_equal(case.quantiles, other.quantiles)
    # What is there needs no room any more, and nothing is said.
    free.free = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store_cases(cells, cells.labelled, small_plan(), tmp_path / "sharded")) == 4


def test_a_run_taken_up_with_less_disk_keeps_what_is_there_and_compresses_the_rest(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_cases(cells, cells.labelled[:2], small_plan(), tmp_path)
    monkeypatch.setattr(store, "_choose_kind", lambda *_: SHARDED)
    stored = store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert [case.image.path.suffix for case in stored] == [MAPPED, MAPPED, SHARDED, SHARDED]
    for case, source in zip(stored, cells.labelled, strict=True):
        assert np.array_equal(whole(case)[0], normalise(cells.read_image(source).array, small_plan().normalisation))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"spacing_mm": (2.0, 2.0)}, 0),
        ({"stated_spacing_mm": (2.0, 2.0)}, 0),
        ({"resize_vox": (24, 24)}, 0),
        ({"normalisation": NormalisationConfig(kind="dataset", low=(0,), high=(9,), mean=(5,), sd=(2,))}, 0),
        ({"loss": BORDERS}, 2),
        ({"loss": LossConfig(border_weight=5.0)}, 2),
        ({"loss": LossConfig(border_weight=10.0, border_sigma=2.0)}, 2),
        ({"loss": LossConfig(border_weight=10.0, balance_classes=True)}, 2),
    ],
)
def test_what_was_stored_for_another_plan_is_not_taken(
    cells: Dataset, tmp_path: Path, change: dict[str, Any], place: int, prepared: list[str]
) -> None:
    plan = small_plan(loss=LossConfig() if change.get("loss") == BORDERS else BORDERS)
    old = whole(store_cases(cells, cells.labelled[:1], plan, tmp_path)[0])[place]
    files = set(tmp_path.iterdir())
    new = whole(store_cases(cells, cells.labelled[:1], plan.model_copy(update=change), tmp_path)[0])[place]
    assert len(prepared) == 2
    assert not np.array_equal(old, new)
    # They would only take room.
    assert not files & set(tmp_path.iterdir())


def test_what_the_arrays_do_not_depend_on_does_not_have_them_made_again(cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    for change in ({}, {"steps": 9, "batch": 1}, {"loss": LossConfig(border_sigma=2.0, dice_squares=True)}):
        store_cases(cells, cells.labelled[:1], small_plan(**change), tmp_path)
    assert len(prepared) == 1


def test_a_label_that_was_corrected_meanwhile_is_prepared_anew_and_only_that(tmp_path: Path, prepared: list[str]) -> None:
    data = write_demo_data(tmp_path / "data", DemoConfig(picture_vox=(48, 56), volume_vox=(16, 20, 24), pictures=2))
    dataset, folder = open_dataset(data.cells), tmp_path / "cache"
    store_cases(dataset, dataset.labelled, small_plan(), folder)
    png(dataset.labelled[1].labels[0], np.zeros((48, 56)))
    cases = {case.name: case for case in store_cases(dataset, dataset.labelled, small_plan(), folder)}
    names = [case.name for case in dataset.labelled]
    assert sorted(prepared) == sorted([*names, names[1]])
    assert not whole(cases[names[1]])[1].any()


def test_what_was_stored_with_other_values_for_the_classes_is_not_taken(cells: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    legend = cells.legend
    turned = replace(cells, legend=replace(legend, kind="values", values=legend.values[::-1]))
    for dataset in (cells, replace(cells, legend=replace(legend, reason="another")), turned):
        store_cases(dataset, dataset.labelled[:1], small_plan(), tmp_path)
    assert len(prepared) == 2


def test_what_another_version_stored_is_not_taken(
    cells: Dataset, tmp_path: Path, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2, 2):
        monkeypatch.setattr(store, "FORMAT", version)
        store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)
    assert len(prepared) == 2


def test_what_was_stored_with_other_planes_or_sections_is_not_taken(tubules: Dataset, tmp_path: Path, prepared: list[str]) -> None:
    case = tubules.labelled[0]
    for part in (case, replace(case, planes=Planes(hidden=((0, 3),))), replace(case, planes=Planes(hidden=((0, 4),)))):
        store_cases(tubules, [part], small_plan_3d(), tmp_path)
    store_cases(tubules, [replace(case, sections=(0, 9))], small_plan_3d(), tmp_path)
    assert len(prepared) == 4


@both_kinds
def test_a_disk_that_fills_is_an_error_that_says_what_is_missing_and_the_run_goes_on_from_there(
    kind: str, cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: list[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    target, name = (arrays, "_write_chunks") if kind == SHARDED else (np, "save")
    write, calls = getattr(target, name), []

    def filling(where: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(where)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(where, *arguments, **options)

    monkeypatch.setattr(target, name, filling)
    # Image and label of two cases fit.
    left = sum(stored_bytes(cells, case, small_plan()) for case in cells.labelled[2:])
    expected = rf"00002-\w+\.image\{kind}: expected room for 2 more prepared cases, at most {left} bytes .*No space left .*then --resume"
    with pytest.raises(RunError, match=expected):
        store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert {path.name[:5] for path in tmp_path.iterdir()} == {"00000", "00001"}
    monkeypatch.setattr(target, name, write)
    assert len(store_cases(cells, cells.labelled, small_plan(), tmp_path)) == 4
    assert prepared == [case.name for case in (*cells.labelled[:3], *cells.labelled[2:])]


def test_a_disk_that_fails_while_images_are_prepared_is_not_said_to_be_full(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np, "save", broken)
    with pytest.raises(RunError, match=r"\.image\.npy: expected a folder that can be written, got Input/output error") as caught:
        store_cases(cells, cells.labelled, small_plan(), tmp_path)
    assert caught.value.code == "R001"


def test_what_is_not_of_this_run_is_left_alone(cells: Dataset, tmp_path: Path) -> None:
    for name in ("notes.txt", "00001.nii.gz", "00000-0123456.image.npy"):
        text(tmp_path / name, "mine")
    text(tmp_path / ".part-0-00000-01234567.image.zarr" / "0.0", "half")
    text(tmp_path / "00000-01234567.image.npy", "of another plan")
    store_cases(cells, cells.labelled[:1], small_plan(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "00001.nii.gz", "00000-0123456.image.npy"} < names
    assert not names & {".part-0-00000-01234567.image.zarr", "00000-01234567.image.npy"}


def test_cases_without_annotation_are_dropped(tmp_path: Path) -> None:
    text(tmp_path / "microtome.yaml", "classes: {ground: 0, cell: 1}\nnot_annotated: 255\n")
    for name, value in (("a", 0), ("b", 255), ("c", 1)):
        png(tmp_path / "images" / f"{name}.png", np.arange(64).reshape(8, 8))
        png(tmp_path / "labels" / f"{name}.png", np.full((8, 8), value))
    dataset = open_dataset(tmp_path)
    stored = store_cases(dataset, dataset.labelled, small_plan(), tmp_path / "cache")
    assert [case.name for case in stored] == ["a", "c"]
    assert [case.dense for case in stored] == [True, True]


def test_parts_of_one_stack_weigh_by_what_is_annotated(tmp_path: Path) -> None:
    label = np.random.default_rng(RNG_SEED).integers(0, 2, (12, 6, 8))
    nifti(tmp_path / "images" / "a.nii.gz", label.astype(np.float32))
    nifti(tmp_path / "labels" / "a.nii.gz", label.astype(np.uint8))
    dataset = open_dataset(tmp_path)
    parts = [replace(dataset.labelled[0], name=f"a[{a}:{b}]", sections=(a, b)) for a, b in ((0, 3), (3, 12))]
    stored = store_cases(dataset, parts, small_plan_3d(spacing_mm=(1.0, 1.0, 1.0)), tmp_path / "cache")
    assert [case.shape_vox for case in stored] == [(3, 6, 8), (9, 6, 8)]
    assert [case.weight for case in stored] == [3 * 48, 9 * 48]


def test_any_voxel_of_a_dense_case_may_be_drawn_and_only_annotated_ones_of_a_sparse_case(tubules: Dataset, tmp_path: Path) -> None:
    case = store_cases(tubules, tubules.labelled[:1], small_plan_3d(), tmp_path)[0]
    rng = np.random.default_rng(0)
    assert all(case.label[tuple(case.draw_annotated(rng))] >= 0 for _ in range(200))
    dense = replace(case, class_counts={0: math.prod(case.shape_vox)})
    drawn = np.array([dense.draw_annotated(rng) for _ in range(400)])
    assert (drawn.min(0) == 0).all()
    assert (drawn.max(0) == np.array(case.shape_vox) - 1).all()


def test_real_volumes_are_stored_at_their_spacing(data_folder: Any, tmp_path: Path) -> None:
    dataset = open_dataset(data_folder("hippocampus"))
    plan = small_plan_3d(classes=dataset.legend.names, spacing_mm=(2.0, 1.0, 1.0))
    case = store_cases(dataset, dataset.labelled[:1], plan, tmp_path)[0]
    source = dataset.read_label(dataset.labelled[0])
    assert case.shape_vox == (round(source.shape[0] / 2), *source.shape[1:])
    assert set(case.class_voxels) == set(range(len(dataset.legend.names)))
    assert abs(whole(case)[0].mean()) < 0.05


# ---- memory ----


def kernel_says(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The free memory where these are the kernel's files."""
    for name, content in files.items():
        text(folder / name.lstrip("/"), content)
    monkeypatch.setattr(machine, "Path", lambda path: folder / path.lstrip("/"))
    return free_memory_bytes()


def test_free_memory_is_what_the_system_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"}
    assert kernel_says(tmp_path, files, monkeypatch) == 5000 * 1024
    assert kernel_says(tmp_path, {**files, "/sys/fs/cgroup/memory.max": "max\n"}, monkeypatch) == 5000 * 1024


def test_a_container_has_what_its_limit_leaves_and_its_files_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemAvailable:    5000 kB\n", "/sys/fs/cgroup/memory.max": "2000000\n"}
    assert kernel_says(tmp_path, files, monkeypatch) == 2_000_000
    files |= {"/sys/fs/cgroup/memory.current": "1500000\n", "/sys/fs/cgroup/memory.stat": "anon 1\nfile 900000\nshmem 100000\n"}
    assert kernel_says(tmp_path, files, monkeypatch) == 2_000_000 - (1_500_000 - 800_000)
    assert kernel_says(tmp_path, {**files, "/sys/fs/cgroup/memory.max": "600000\n"}, monkeypatch) == 0


def test_where_the_kernel_does_not_say_half_of_what_is_built_in_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_says(tmp_path, {}, monkeypatch) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
