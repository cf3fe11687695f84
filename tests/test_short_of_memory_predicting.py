"""Prediction where memory runs out: smaller tiles, everything anew, and what a prediction with these tiles from the start gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microtome.bundle import load_bundle
from microtome.config import NetworkConfig
from microtome.data.case import Case
from microtome.errors import RunError, ShortOfMemoryError
from microtome.images.files import open_volume
from microtome.inference import predict as predict_module
from microtome.inference.asked import Options
from microtome.inference.bricks import recorded
from microtome.inference.finishing import predict_maps
from microtome.inference.layout import choose_tile
from microtome.inference.predict import TileMemory, in_memory, layout_for, predict_labels
from microtome.inference.predictor import Predictor
from microtome.inference.slabs import Box
from microtome.inference.stored import Worker
from microtome.inference.storing import write_store
from microtome.inference.torch_engine import TorchEngine
from microtome.machine import is_short_of_memory, shortage_of
from tests.small import one_thread, small_plan, small_plan_3d
from tests.stores import small_bundle, write_volume_store
from tests.test_checkpoint import fresh
from tests.test_predict import FakeNetwork, plan_of
from tests.test_resume_prediction import contents
from tests.test_short_of_memory import SHORT

__all__ = ["one_thread"]

THREE_LEVELS = NetworkConfig(widths=(4, 4, 4, 4), strides=((1, 1, 1), *[(2, 2, 2)] * 3), kernels=((3, 3, 3),) * 4)
SHAPE = (40, 20, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("run"), dims=3)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    return write_volume_store(tmp_path_factory.mktemp("in") / "a.ome.zarr", array, chunk=(20, 20, 20))


@contextmanager
def room_for(
    monkeypatch: pytest.MonkeyPatch, voxels: int, error: Callable[[], Exception] = SHORT["CUDA"], *, from_call: int = 0
) -> Iterator[list[int]]:
    """Networks that run out of memory with larger tiles, from one call on; the list has the voxels of each tile that was shown."""
    seen: list[int] = []
    plain = TorchEngine.__call__

    def call(self: TorchEngine, image_CS: np.ndarray) -> np.ndarray:
        seen.append(image_CS[0].size)
        if len(seen) > from_call and image_CS[0].size > voxels:
            raise error()
        return plain(self, image_CS)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "__call__", call)
        yield seen


def by_tile(predictor: Predictor, image: Path, tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The labels of a prediction with tiles of this size from the start."""
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "choose_tile", lambda *_, **__: tile)
        return predict_maps(predictor, open_volume(image), Options())["labels"]


def store_values(place: Path) -> np.ndarray:
    return open_volume(place / "labels" / "prediction").pixels[0:1, 0:99, 0:99, 0:99][0]


def test_a_tile_is_halved_along_its_longest_side_as_far_as_the_network_takes_it() -> None:
    # Of 8 voxels at least, and multiples of 8.
    network, plan = fresh(small_plan_3d(network=THREE_LEVELS)).network, plan_of(3, (16, 32, 32), batch=1)
    halved = [choose_tile((200, 200, 200), plan, network, halvings=number) for number in range(7)]
    assert halved == [(16, 32, 32), (16, 16, 32), (16, 16, 16), (8, 16, 16), (8, 8, 16), (8, 8, 8), (8, 8, 8)]


@pytest.mark.parametrize("kind", ["CPU", "CUDA", "Python"])
def test_the_labels_are_those_of_the_smaller_tile_from_the_start(
    kind: str, run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(load_bundle(run), engine="torch")
    said: list[str] = []
    with room_for(monkeypatch, 1100, SHORT[kind]) as seen:
        labels = predict_maps(predictor, open_volume(image), Options(), say=said.append)["labels"]
    assert seen[:3] == [8 * 16 * 16, 8 * 8 * 16, 8 * 8 * 16]
    [line] = said
    assert "predicted anew with tiles of 8×8×16 instead of 8×16×16" in line
    np.testing.assert_array_equal(labels, by_tile(predictor, image, (8, 8, 16), monkeypatch))
    assert 0 < labels.mean() < 1


def test_a_lack_beside_the_network_ends_in_smaller_tiles_too(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, volume, said = Predictor(load_bundle(run), engine="torch"), open_volume(image), []
    plain = predict_module.Source.tile
    calls: list[int] = []

    def tile(self: Any, *words: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("Unable to allocate 3.00 GiB for an array")
        return plain(self, *words)

    monkeypatch.setattr(predict_module.Source, "tile", tile)
    labels = predict_maps(predictor, volume, Options(), say=said.append)["labels"]
    assert ["Unable to allocate 3.00 GiB" in line for line in said] == [True]
    np.testing.assert_array_equal(labels, by_tile(predictor, image, (8, 8, 16), monkeypatch))


def test_the_smallest_tile_is_reached_and_one_line_says_so(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, said = Predictor(load_bundle(run), engine="torch"), []
    with (
        room_for(monkeypatch, 0),
        pytest.raises(RunError, match=r"expected memory for the smallest tile .* tiles of .*CUDA out of") as caught,
    ):
        predict_maps(predictor, open_volume(image), Options(), say=said.append)
    assert caught.value.code == "R123"
    assert len(said) > 1


def test_other_errors_are_passed_on(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(load_bundle(run), engine="torch")
    with room_for(monkeypatch, 0, lambda: RuntimeError("a mistake")), pytest.raises(RuntimeError, match="a mistake"):
        predictor(image)


def test_the_validation_of_a_training_takes_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan()
    network = fresh(plan).network.eval()
    engine = TorchEngine(network=network, device=torch.device("cpu"))
    array = np.random.default_rng(0).normal(size=(1, 100, 100)).astype(np.float32)
    with room_for(monkeypatch, 600) as seen:
        labels = predict_labels(array, (1.0, 1.0), plan=plan, network=network, engine=engine)
    assert max(seen[-4:]) == 16 * 32
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "choose_tile", lambda *_, **__: (16, 32))
        np.testing.assert_array_equal(labels, predict_labels(array, (1.0, 1.0), plan=plan, network=network, engine=engine))


def test_less_memory_is_promised_with_each_halving_of_what_is_large() -> None:
    volume, plan = in_memory(np.zeros((1, 64, 4096, 4096), np.uint8)), plan_of(3, (32, 128, 128), batch=1)
    peaks = [layout_for(volume, (1.0,) * 3, plan, FakeNetwork(step=16), tile=TileMemory(halvings=number)).peak_bytes for number in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[3] < peaks[0] / 4


# Stores.


def test_a_store_is_begun_anew_with_the_smaller_tile_and_equals_one_that_had_it_from_the_start(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, case = Predictor(load_bundle(run), engine="torch"), Case(name="a", images=(image,))
    said: list[str] = []
    monkeypatch.setattr("microtome.inference.stored.BRICKS", {3: (8, 20, 20)})
    # When some bricks are written already.
    with room_for(monkeypatch, 1100, from_call=20):
        write_store(predictor, case, tmp_path / "short.ome.zarr", Options(), say=said.append)
    assert ["predicted anew with tiles of 8×8×16" in line for line in said].count(True) == 1
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "choose_tile", lambda *_, **__: (8, 8, 16))
        write_store(predictor, case, tmp_path / "small.ome.zarr", Options())
    found, wanted = (store_values(tmp_path / f"{name}.ome.zarr") for name in ("short", "small"))
    np.testing.assert_array_equal(found, wanted)
    record = recorded(tmp_path / "short.ome.zarr")
    assert record is not None
    assert record.layout.shapes.tile_vox == (8, 8, 16)
    assert contents(tmp_path / "short.ome.zarr").keys() == contents(tmp_path / "small.ome.zarr").keys()


def test_a_call_that_is_killed_after_that_goes_on_with_the_tile_that_is_recorded(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, place = Case(name="a", images=(image,)), tmp_path / "a.ome.zarr"
    monkeypatch.setattr("microtome.inference.stored.BRICKS", {3: (8, 20, 20)})

    class Killed(BaseException):
        pass

    def kill(done: int, of: int) -> None:
        if tiles and tiles[-1] == 8 * 8 * 16 and 2 * done > of:
            raise Killed

    with room_for(monkeypatch, 1100, from_call=20) as tiles, pytest.raises(Killed):
        write_store(Predictor(load_bundle(run), engine="torch"), case, place, Options(), on_voxels=kill)
    with room_for(monkeypatch, 10**9) as tiles:
        write_store(Predictor(load_bundle(run), engine="torch"), case, place, Options())
    assert set(tiles) == {8 * 8 * 16}
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "choose_tile", lambda *_, **__: (8, 8, 16))
        wanted = predict_maps(Predictor(load_bundle(run), engine="torch"), open_volume(image), Options())["labels"]
    np.testing.assert_array_equal(store_values(place), wanted * 3)


def test_workers_of_a_cluster_stop_and_all_begin_anew_with_the_smaller_tile(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are computed here one after the other, as a cluster's worker and its scheduler do it elsewhere."""
    from microtome.inference import cluster

    case, place, said = Case(name="a", images=(image,)), tmp_path / "a.ome.zarr", []
    monkeypatch.setattr("microtome.inference.stored.BRICKS", {3: (8, 20, 20)})

    class Future:
        status = "finished"

        def __init__(self, work: Callable[[], Any]) -> None:
            self.work = work

        def result(self) -> Any:
            return self.work()

    @contextmanager
    def connected(*_: Any) -> Iterator[object]:
        yield object()

    def submitted(_: object, order: Any, boxes: list[Box]) -> dict[Future, Box]:
        return {Future(partial(cluster.fill_block, order, box)): box for box in boxes}

    monkeypatch.setattr(cluster, "_connected", connected)
    monkeypatch.setattr(cluster, "_check_versions", lambda client: None)
    monkeypatch.setattr(cluster, "_wait_for_threads", lambda *_: 2)
    monkeypatch.setattr(cluster, "_submitted", submitted)
    monkeypatch.setattr(cluster, "_ended", lambda client, futures, say: list(futures))
    with room_for(monkeypatch, 1100, from_call=20) as seen:
        write_store(Predictor(load_bundle(run), engine="torch"), case, place, Options(cluster="local:2"), say=said.append)
    assert ["predicted anew with tiles of 8×8×16" in line for line in said].count(True) == 1
    # After the lack no tile of the old size is begun, but for the first of a block under way.
    assert set(seen[22:]) == {8 * 8 * 16}
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "choose_tile", lambda *_, **__: (8, 8, 16))
        wanted = predict_maps(Predictor(load_bundle(run), engine="torch"), open_volume(image), Options())["labels"]
    np.testing.assert_array_equal(store_values(place), wanted * 3)
    assert not list((place / ".microtome").rglob("halt*"))


def test_a_worker_says_in_an_error_that_travels_that_its_memory_was_short() -> None:
    import pickle

    class Short:
        bricks = type("Bricks", (), {"place": Path("a.ome.zarr"), "missing": lambda self, box: [box], "halted": False})()

        def fill(self, box: Box) -> Iterator[int]:
            raise MemoryError("no more")
            yield 0

    with pytest.raises(ShortOfMemoryError, match="expected memory for a tile, got no more") as caught:
        Worker.fill_missing(Short(), ((0, 1),))  # type: ignore[arg-type]
    assert is_short_of_memory(pickle.loads(pickle.dumps(caught.value)).on("node7"))  # noqa: S301 - made here


# What the libraries of graphs say.


@pytest.mark.parametrize("words", ["std::bad_alloc", "Failed to allocate memory for requested buffer of size 34359738368"])
def test_a_graph_s_library_that_has_too_little_memory_is_understood(words: str) -> None:
    from microtome.inference.openvino_engine import unusable

    def fail(said: str) -> None:
        raise unusable(Path("graph.onnx"), "openvino", RuntimeError(said))

    assert shortage_of(partial(fail, words)) == words
    with pytest.raises(RunError, match="a graph that openvino can run"):
        shortage_of(partial(fail, "unsupported operation"))
