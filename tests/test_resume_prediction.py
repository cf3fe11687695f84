"""A prediction into a store, killed at any instant: what was done is kept, and in the end no byte tells of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from dask.__main__ import main as dask_line

from microtome.bundle import load_bundle
from microtome.data.case import Case
from microtome.errors import ConfigError, RunError
from microtome.images.files import open_volume
from microtome.images.stores import Documents
from microtome.inference import cluster
from microtome.inference.bricks import Bricks
from microtome.inference.finishing import Options, predict_maps
from microtome.inference.predictor import Predictor
from microtome.inference.storing import write_store
from tests.forked import FORKS, forked_workers, forks
from tests.small import one_thread  # noqa: F401 - a fixture
from tests.stores import small_bundle, write_volume_store

# Bricks of 64 rows, one chunk each.
SHAPE, BRICKS = (30 * 64 - 21, 15, 16), 30
SCRIPTS = Path(sys.executable).parent
Contents = dict[str, bytes]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("run"), dims=3)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    return write_volume_store(tmp_path_factory.mktemp("in") / "a.ome.zarr", array, chunk=(50, 16, 16))


@pytest.fixture(scope="module")
def unbroken(run: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, float]:
    """What a run that nobody disturbs leaves, and the seconds that it takes."""
    place = tmp_path_factory.mktemp("unbroken") / "a.ome.zarr"
    # The first child waits for what the others find imported.
    started_child(run, image, place).join()
    seconds = []
    for number in range(2):
        begun = time.monotonic()
        child = started_child(run, image, place.with_name(f"{number}.ome.zarr"))
        child.join()
        assert child.exitcode == 0
        seconds.append(time.monotonic() - begun)
    found = contents(place)
    assert found == contents(place.with_name("0.ome.zarr"))
    labels = predict_maps(Predictor(load_bundle(run), engine="torch"), open_volume(image), Options())["labels"]
    np.testing.assert_array_equal(open_volume(place / "labels" / "prediction").pixels[0:1, 0:9999, 0:99, 0:99][0], labels * 3)
    return found, min(seconds)


def predict(run: Path, image: Path, place: Path) -> None:
    """What the killed processes do: the whole road of `microtome predict`."""
    torch.set_num_threads(1)
    write_store(Predictor(load_bundle(run), engine="torch"), Case(name="a", images=(image,)), place, Options())


def started_child(run: Path, image: Path, place: Path) -> BaseProcess:
    child = FORKS.Process(target=predict, args=(run, image, place))
    child.start()
    return child


def contents(store: Path) -> Contents:
    """Every file with its bytes, hidden ones and those of writers too, and every folder."""
    return {path.relative_to(store).as_posix(): path.read_bytes() if path.is_file() else b"" for path in store.rglob("*")}


def marks(place: Path) -> set[str]:
    return Documents(place).marked()


def stamps(place: Path, of: set[str]) -> dict[str, tuple[int, int]]:
    """For marked bricks, which file holds the chunk and when it was written: another one if it is written again."""
    found = {mark: (place / "labels" / "prediction" / "0" / mark.partition(".")[2] / "0" / "0").stat() for mark in of}
    return {mark: (stat.st_mtime_ns, stat.st_ino) for mark, stat in found.items()}


def seeded() -> np.random.Generator:
    """Of instants, other ones each time; the seed is for whoever reads of a failure."""
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201 - shown by pytest
    return np.random.default_rng(seed)


def is_whole(file: Path) -> bool:
    """Whether Dask has written the file of its scheduler, and not just opened it."""
    try:
        return bool(json.loads(file.read_text())["address"])
    except (OSError, ValueError):
        return False


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


# One process.


def kill_again_and_again(start: Callable[[], BaseProcess], place: Path, kills: int, unbroken: tuple[Contents, float]) -> None:
    """Kill a process that often at random instants, and let it go on; what was marked before is not written again."""
    rng, (wanted, seconds) = seeded(), unbroken
    hits = 0
    while True:
        before = stamps(place, marks(place))
        child = start()
        child.join(rng.uniform(0, seconds) if hits < kills else None)
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            hits += 1
            assert stamps(place, set(before) & marks(place)) == {mark: before[mark] for mark in set(before) & marks(place)}
            continue
        assert child.exitcode == 0
        assert contents(place) == wanted
        if hits == kills:
            return
        # It came to its end before it was hit.
        shutil.rmtree(place)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.soak)])
def test_a_process_killed_at_any_instant(
    run: Path, image: Path, unbroken: tuple[Contents, float], tmp_path: Path, kills: int, record_property: Record
) -> None:
    kill_again_and_again(partial(started_child, run, image, tmp_path / "a.ome.zarr"), tmp_path / "a.ome.zarr", kills, unbroken)
    record_property("kills of a prediction", kills)


def test_a_kill_while_the_marks_go_costs_no_brick(
    run: Path, image: Path, unbroken: tuple[Contents, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.ome.zarr"

    def killed(self: Documents, prefix: str = "") -> None:
        (place / ".microtome" / "marks" / "0.7").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Documents, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            predict(run, image, place)
    with monkeypatch.context() as patched:
        patched.setattr(Bricks, "fill", lambda self, task, box: pytest.fail(f"{box} is computed again"))
        predict(run, image, place)
    assert contents(place) == unbroken[0]


# Many processes.


def words_of(run: Path, image: Path, out: Path, cluster: str) -> list[str]:
    return [str(SCRIPTS / "microtome"), "predict", str(run), str(image), "--out", str(out), "--engine", "torch", "--cluster", cluster]


def dask(words: tuple[str, ...], log: Path) -> None:
    """Dask's own command line."""
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.argv = ["dask", *words]
    dask_line()


@contextmanager
def started_dask(*words: str, log: Path) -> Iterator[BaseProcess]:
    """A process of Dask's command line, forked, as it takes seconds to import all that a worker needs; killed in the end."""
    process = FORKS.Process(target=dask, args=(words, log))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def scheduler_and_workers(folder: Path) -> Iterator[tuple[Path, BaseProcess]]:
    """A scheduler with two workers, each a process; the scheduler's file and the scheduler."""
    file = folder / "scheduler.json"
    with started_dask(
        "scheduler", "--scheduler-file", str(file), "--port", "0", "--no-dashboard", log=folder / "scheduler.log"
    ) as scheduler:
        wait_until(partial(is_whole, file))
        words = ("worker", "--scheduler-file", str(file), "--no-nanny", "--nthreads", "1", "--memory-limit", "0", "--no-dashboard")
        with started_dask(*words, log=folder / "worker-1.log"), started_dask(*words, log=folder / "worker-2.log"):
            yield file, scheduler


def predicted(run: Path, image: Path, place: Path, cluster: str) -> list[str]:
    """Predict from this process, by a cluster; what was said."""
    said: list[str] = []
    options = Options(cluster=cluster)
    write_store(Predictor(load_bundle(run), engine="torch"), Case(name="a", images=(image,)), place, options, say=said.append)
    return said


@pytest.mark.parametrize("kills", [pytest.param(20, marks=pytest.mark.soak)])
def test_a_scheduler_killed_at_any_instant_ends_in_one_line_and_the_same_command_goes_on(
    run: Path,
    image: Path,
    unbroken: tuple[Contents, float],
    tmp_path: Path,
    kills: int,
    record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One that is gone before it is connected to is waited for half a minute.
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 10)
    place, rng = tmp_path / "a.ome.zarr", seeded()
    ends: list[str] = []
    while True:
        before, folder = stamps(place, marks(place)), tmp_path / f"scheduler-{time.time_ns()}"
        folder.mkdir()
        with scheduler_and_workers(folder) as (file, scheduler):
            # Connecting takes about as long as computing.
            timer = threading.Timer(rng.uniform(0, 2.5 * unbroken[1]), scheduler.kill)
            if len(ends) < kills:
                timer.start()
            end, said = "", list[str]()
            try:
                said = predicted(run, image, place, str(file))
            except (RunError, ConfigError) as error:
                end = str(error)
                scheduler.join(1)
            finally:
                timer.cancel()
                timer.join() if timer.is_alive() else None
            assert not end or not scheduler.is_alive(), end
            if end:
                ends.append(end)
                continue
        # Of a run whose scheduler was killed at its end nothing is left to compute.
        assert len(before) == BRICKS or any("scheduler at tcp://" in line or "finished already" in line for line in said)
        assert stamps(place, set(before)) == before
        assert contents(place) == unbroken[0]
        if len(ends) >= kills:
            break
        # It came to its end before the scheduler was hit.
        shutil.rmtree(place)
    known = re.compile(r"; (run the same command again; \d+ of 30 bricks are done|start `dask scheduler`)")
    assert [end for end in ends if not known.search(end)] == []
    record_property("kills of the scheduler of a prediction", len(ends))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_workers_killed_at_any_instant_are_replaced_and_nothing_is_lost(
    run: Path, image: Path, unbroken: tuple[Contents, float], tmp_path: Path, kills: int, record_property: Record
) -> None:
    place, rng, killed, ended = tmp_path / "a.ome.zarr", seeded(), [], threading.Event()

    def kill() -> None:
        while len(killed) < kills and not ended.wait(rng.uniform(0, unbroken[1])):
            if workers := [child.pid for child in forks()]:
                killed.append(int(rng.choice(workers)))
                with suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    while len(killed) < kills:
        ended.clear()
        thread = threading.Thread(target=kill)
        thread.start()
        try:
            # A block that four workers died of is not tried a fifth time: the same command goes on.
            with forked_workers(), suppress(RunError):
                predicted(run, image, place, "local:2")
                assert contents(place) == unbroken[0]
                if len(killed) < kills:
                    shutil.rmtree(place)
        finally:
            ended.set()
            thread.join()
    with forked_workers():
        predicted(run, image, place, "local:2")
    assert contents(place) == unbroken[0]
    record_property("kills of workers of a prediction", len(killed))


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="whoever started the tests has Ctrl-C ignored")
def test_the_command_with_its_own_workers_killed_and_repeated(
    run: Path, image: Path, unbroken: tuple[Contents, float], tmp_path: Path
) -> None:
    place, words = tmp_path / "a.ome.zarr", words_of(run, image, tmp_path, "local:2")
    for number in (0, 1):
        # Ctrl-C in a terminal reaches the whole group; SIGKILL nobody but the process itself.
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        marked = len(marks(place)) + 1
        wait_until(lambda marked=marked: len(marks(place)) >= marked)
        children = psutil.Process(process.pid).children(recursive=True)
        before, asked = stamps(place, marks(place)), time.monotonic()
        os.killpg(process.pid, signal.SIGINT) if number == 0 else process.kill()
        said = process.communicate()[0].decode()
        assert time.monotonic() - asked < 10
        assert process.returncode == (130 if number == 0 else -signal.SIGKILL)
        assert "Traceback" not in said
        assert "Process Dask" not in said
        assert len(children) >= 2
        wait_until(lambda children=children: not any(child.is_running() for child in children), 10)
        assert stamps(place, set(before)) == before
    # What a cluster began, one process ends.
    child = started_child(run, image, place)
    child.join()
    assert child.exitcode == 0
    assert contents(place) == unbroken[0]
