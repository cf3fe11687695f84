"""Prediction by many workers: the bytes of one process, blocks that fit the workers, and one line for whatever goes wrong."""

import json
import math
import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.bundle import load_bundle
from microtome.data.case import Case
from microtome.errors import ConfigError, DataError, MicrotomeError, RunError
from microtome.inference import cluster, stored
from microtome.inference.bricks import Bricks
from microtome.inference.cluster import Order, fill_block, fill_on_cluster
from microtome.inference.finishing import Options
from microtome.inference.predict import Wanted
from microtome.inference.predictor import Predictor
from microtome.inference.slabs import Box
from microtome.inference.storing import write_store
from tests.forked import forked_workers
from tests.small import one_thread  # noqa: F401 - a fixture
from tests.stores import small_bundle, write_volume_store

dask: Any = pytest.importorskip("dask")
distributed: Any = pytest.importorskip("distributed")
SHAPE = (46, 40, 36)
ALL = Options(probabilities="uint8", uncertainty=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("run"), dims=3)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    return write_volume_store(tmp_path_factory.mktemp("in") / "a.ome.zarr", array, chunk=(8, 16, 16))


@contextmanager
def two_workers(killed: int = 1) -> Iterator[Any]:
    """A cluster of two processes, where a block may kill so many workers and none more."""
    words = {"memory_limit": 0, "dashboard_address": "127.0.0.1:0", "silence_logs": 60}
    with (
        forked_workers(),
        dask.config.set({"distributed.scheduler.allowed-failures": killed}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **words) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster."""
    with two_workers() as made:
        yield made.scheduler_address


@pytest.fixture(autouse=True)
def _small_bricks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BRICKS", {2: (16, 16), 3: (4, 16, 16)})


def predict(run: Path, image: Path, place: Path, address: str, options: Options = ALL, **words: Any) -> Path:
    predictor = Predictor(load_bundle(run), engine="torch")
    return write_store(predictor, Case(name="a", images=(image,)), place, replace(options, cluster=address), **words)


def begun(run: Path, image: Path, place: Path) -> tuple[stored.Job, Bricks]:
    """A store in which nothing is done yet."""
    predictor, case = Predictor(load_bundle(run), engine="torch"), Case(name="a", images=(image,))
    bricks, _ = stored.open_store(predictor, case, place, Wanted(uncertainty=True))
    return stored.job_of(predictor, case, bricks), bricks


def contents(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() if path.is_file() else b"" for path in store.rglob("*")}


def fill(address: str, job: stored.Job, bricks: Bricks) -> None:
    fill_on_cluster(address, job, bricks, on_voxels=lambda done, of: None, say=lambda line: None)


def line_of(error: type[MicrotomeError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The same bytes.


def test_two_workers_leave_the_bytes_of_one_process(
    run: Path, image: Path, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microtome.inference import layout

    # Little memory, so that there are columns.
    monkeypatch.setattr(layout, "MARGIN_BYTES", 0)
    monkeypatch.setattr(layout, "USUAL_BYTES", 10)
    here = predict(run, image, tmp_path / "here.ome.zarr", "")
    said: list[str] = []
    voxels: list[tuple[int, int]] = []
    # A relative place, as people type it; workers run elsewhere.
    monkeypatch.chdir(tmp_path)
    words: dict[str, Any] = {"say": said.append, "on_voxels": lambda *now: voxels.append(now)}
    there = predict(run, image, Path("there.ome.zarr"), scheduler, **words)
    assert contents(there) == contents(here)
    assert len(json.loads((there / ".microtome" / "record.json").read_text())["layout"]["edges"][0]) > 2
    assert "2 workers, 2 blocks at once" in said
    assert "workers without MALLOC_ARENA_MAX=1 in their environment: computing on a CPU may take twice as long" in said
    assert len(voxels) >= 4
    assert [done for done, _ in voxels] == sorted({done for done, _ in voxels})
    assert voxels[-1] == (math.prod(SHAPE), math.prod(SHAPE))


def test_workers_of_this_machine_come_and_go_with_the_call(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before, said = dict(os.environ), list[str]()
    children = set(multiprocessing.active_children())
    # New ones, as they get variables that a fork would read too late.
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        there = predict(run, image, tmp_path / "there.ome.zarr", "local:2", Options(), say=said.append)
    assert contents(there) == contents(predict(run, image, tmp_path / "here.ome.zarr", "", Options()))
    assert "2 workers of 1 thread; no dashboard (pip install bokeh)" in said
    assert not any("MALLOC_ARENA_MAX" in line for line in said)
    assert dict(os.environ) == before
    assert set(multiprocessing.active_children()) == children


def test_a_block_that_was_begun_goes_on_at_its_first_missing_brick(run: Path, image: Path, tmp_path: Path) -> None:
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    (whole,) = bricks.missing()
    marks = [bricks.bricks_of(whole)[number] for number in (0, 1, 5)]
    worker = stored.Worker(job)
    for _, box in marks:
        list(worker.fill(box))
    files = [tmp_path / "a.ome.zarr" / "labels" / "prediction" / "0" / mark.partition(".")[2] / "0" / "0" for mark, _ in marks]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    assert bricks.done() == (3, 12)
    assert fill_block(cluster._order_of(job), whole) is None
    assert bricks.done() == (12, 12)
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == before


def test_what_a_cluster_halted_and_one_process_ended_is_halted_no_more(run: Path, image: Path, tmp_path: Path) -> None:
    place = tmp_path / "a.ome.zarr"
    options = Options(uncertainty=True)
    predictor, case = Predictor(load_bundle(run), engine="torch"), Case(name="a", images=(image,))
    bricks, _ = stored.open_store(predictor, case, place, Wanted(uncertainty=True), request={"clean-up and instances": options.words})
    bricks.halt(True)
    assert list((place / ".microtome").glob("halt*")) != []
    predict(run, image, place, "", options)
    assert list((place / ".microtome").glob("halt*")) == []


def test_nothing_is_started_where_nothing_is_missing(run: Path, image: Path, tmp_path: Path) -> None:
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    stored.fill_here(stored.Worker(job))
    fill("tcp://nobody.invalid:1", job, bricks)


# What travels.


def test_orders_are_small_and_name_places_as_any_folder_finds_them(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, _ = begun(run, image, Path("a.ome.zarr"))
    order = cluster._order_of(job)
    assert order.job.place == tmp_path / "a.ome.zarr"
    bucket = replace(job, place=Path("s3:/bucket/a.ome.zarr"))
    assert cluster._order_of(bucket).job.place == bucket.place
    assert len(pickle.dumps(order)) < 6000


def test_a_thread_opens_model_image_and_store_once_a_call(run: Path, image: Path, tmp_path: Path) -> None:
    job, _ = begun(run, image, tmp_path / "a.ome.zarr")
    order = cluster._order_of(job)
    assert cluster._worker_of(order) is cluster._worker_of(pickle.loads(pickle.dumps(order)))  # noqa: S301 - as Dask sends it
    # In the next call another image may lie in the same place.
    assert cluster._worker_of(order) is not cluster._worker_of(cluster._order_of(job))


# What goes wrong.


def test_a_damaged_image_ends_the_job_with_its_own_line_and_what_was_done_stays(
    run: Path, image: Path, tmp_path: Path, scheduler: str
) -> None:
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    damaged, place = write_volume_store(tmp_path / "a.ome.zarr", array, chunk=(8, 16, 16)), tmp_path / "out.ome.zarr"
    chunk = damaged / "0" / "5" / "0" / "0"
    whole = chunk.read_bytes()
    job, bricks = begun(run, damaged, place)
    chunk.write_bytes(whole[: len(whole) // 2])
    line = line_of(DataError, lambda: fill(scheduler, job, bricks))
    assert str(damaged) in line
    assert f"(on {cluster.platform.node()})" in line
    assert 0 < bricks.done()[0] < 12
    chunk.write_bytes(whole)
    fill(scheduler, job, bricks)
    assert bricks.missing() == []
    other, others = begun(run, damaged, tmp_path / "other.ome.zarr")
    stored.fill_here(stored.Worker(other))
    assert contents(place) == contents(tmp_path / "other.ome.zarr")
    assert others.done() == (12, 12)


def deadly(order: Order, box: Box) -> MicrotomeError | None:
    """A block whose first rows kill whoever computes them."""
    return os._exit(1) if box[0][0] == 0 else fill_block(order, box)


def broken(order: Order, box: Box) -> None:
    """A block that meets what nobody foresaw."""
    raise ZeroDivisionError(f"rows of\n{box[0][0]}")


def cannot_be_computed(address: str, run: Path, image: Path, place: Path) -> str:
    """The line of a call whose blocks fail."""
    job, bricks = begun(run, image, place)
    line = line_of(RunError, lambda: fill(address, job, bricks))
    assert line.startswith(f"{place}, block ")
    assert re.search(r"run the same command again; \d+ of 12 bricks are done$", line)
    return line


def test_a_block_that_kills_its_workers_ends_in_one_line(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "fill_block", deadly)
    # Of its own, as Dask may give up workers that die as they begin.
    with two_workers() as made:
        line = cannot_be_computed(made.scheduler_address, run, image, tmp_path / "a.ome.zarr")
    assert "block 0:" in line
    assert "got 2 workers, each of which died of it; give workers more memory" in line


def test_what_nobody_foresaw_in_a_block_ends_in_one_line(
    run: Path, image: Path, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "fill_block", broken)
    assert "got ZeroDivisionError: rows of " in cannot_be_computed(scheduler, run, image, tmp_path / "a.ome.zarr")


def asleep(order: Order, box: Box) -> None:
    """A block that takes longer than its worker lives."""
    time.sleep(60)


def test_workers_that_never_come_back_are_not_waited_for(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("fill_block", asleep), ("LOOK_SECONDS", 0.05), ("MOST_MISSED", 2)):
        monkeypatch.setattr(cluster, name, value)
    said = list[str]()
    # The block goes from the one that ends first to the other, which then ends too.
    with two_workers(killed=2) as made, distributed.Client(made, set_as_default=False) as client:
        order = cluster._order_of(begun(run, image, tmp_path / "a.ome.zarr")[0])
        ended = cluster._ended(client, cluster._submitted(client, order, [((0, 1),)]), said.append)
        made.scale(0)
        assert "got none, and none comes back" in line_of(RunError, lambda: next(ended))
    assert said == ["no workers are left; waiting for new ones"]


def test_a_scheduler_that_is_lost_just_after_it_was_found_is_one_line(
    run: Path, image: Path, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise OSError("Timed out")

    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    monkeypatch.setattr(distributed.Client, "dashboard_link", property(lost))
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "_check_versions", lost)
        line = line_of(RunError, lambda: fill(scheduler, job, bricks))
    assert line.startswith(f"--cluster {scheduler}: expected a scheduler until the end, got the connection to it was lost; ")
    # Its page alone is no reason to stop.
    fill(scheduler, job, bricks)
    assert bricks.done() == (12, 12)


def idle(order: Order, box: Box) -> None:
    """A worker that says it is done and wrote nothing where we look."""


def test_bricks_that_are_not_where_they_should_be_are_noticed(
    run: Path, image: Path, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    monkeypatch.setattr(cluster, "fill_block", idle)
    assert "got 0 of 12 bricks there; let all workers reach one and the same store" in line_of(
        RunError, lambda: fill(scheduler, job, bricks)
    )


def test_a_worker_that_does_not_see_the_store_writes_no_other(run: Path, image: Path, tmp_path: Path) -> None:
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    order = cluster._order_of(replace(job, place=tmp_path / "elsewhere.ome.zarr"))
    failure = fill_block(order, bricks.missing()[0])
    assert failure is not None
    assert isinstance(failure, DataError)
    assert "expected the store that this prediction was begun in, got nothing there (on " in str(failure)
    assert failure.code == "D028"
    assert not (tmp_path / "elsewhere.ome.zarr").exists()


def test_another_version_is_refused_by_who_asks_and_by_who_works(
    run: Path, image: Path, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    own = cluster.version("microtome")
    monkeypatch.setattr(cluster, "version", lambda name: "99.9")
    line = line_of(ConfigError, lambda: fill(scheduler, job, bricks))
    assert f"the scheduler: expected microtome 99.9, as where the command runs, got {own}; give scheduler, workers" in line
    order = replace(cluster._order_of(job), version="0.0")
    failure = fill_block(order, bricks.missing()[0])
    assert isinstance(failure, ConfigError)
    assert bricks.done()[0] == 0


class FakeClient:
    """What a client is asked, answered."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answer = self.answers[name]
        return lambda *_, **__: answer.pop(0) if isinstance(answer, list) else answer


def test_a_worker_without_microtome_is_named() -> None:
    has, lacks = ({"packages": {"microtome": found}} for found in (cluster.version("microtome"), None))
    client = FakeClient(get_versions={"scheduler": has, "workers": {"tcp://a:1": has, "tcp://b:2": lacks, "tcp://c:3": "gone"}})
    line = line_of(ConfigError, lambda: cluster._check_versions(client))
    assert line.startswith("worker tcp://b:2: expected microtome ")
    assert "got none installed" in line


def test_workers_are_waited_for_and_too_little_memory_is_refused(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    monkeypatch.setattr(cluster, "TURN_SECONDS", 0.001)
    peak, said = bricks.record.layout.peak_bytes, list[str]()
    info = {"workers": {"tcp://a:1": {"memory_limit": 0, "nthreads": 9}, "tcp://b:2": {"memory_limit": 3 * peak, "nthreads": 2}}}
    client = FakeClient(nthreads=[{}, {}, {"tcp://a:1": 9, "tcp://b:2": 2}], scheduler_info=info, run={"tcp://a:1": "1"})
    assert cluster._wait_for_threads(client, bricks, said.append) == 11
    assert said == ["no workers yet; waiting for the first", "2 workers, 11 blocks at once"]
    info["workers"]["tcp://b:2"]["nthreads"] = 3
    client = FakeClient(nthreads={"tcp://b:2": 3}, scheduler_info=info, run={})
    assert line_of(ConfigError, lambda: cluster._wait_for_threads(client, bricks, said.append)).startswith(
        "worker tcp://b:2: expected memory"
    )


@pytest.mark.parametrize(
    "address", ["local:", "local:0", "local:two", "local:-1", "somewhere:8786", "", "missing.json", "list.json", "half.json"]
)
def test_what_is_no_address_is_one_line(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("half.json").write_text('{"address": "tcp:')
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    assert line_of(ConfigError, lambda: fill(address, job, bricks)).startswith("--cluster")


def test_nobody_at_the_address_is_one_line(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.3)
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    line = line_of(RunError, lambda: fill("tcp://127.0.0.1:9", job, bricks))
    assert line.startswith("--cluster tcp://127.0.0.1:9: expected a scheduler of Dask")
    assert "start `dask scheduler` and `dask worker`" in line


def test_without_the_extra_the_install_command_is_told(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, bricks = begun(run, image, tmp_path / "a.ome.zarr")
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    assert 'pip install "microtome[cluster]"' in line_of(ConfigError, lambda: fill("local:2", job, bricks))
