"""A prediction by many processes, on this machine or on many: blocks of bricks, handed out by dask.distributed.

    this process              scheduler                    workers
    missing bricks     -->    a queue of blocks     -->    image read, tiles, slab; bricks written, then marked
    voxels done        <--    which block ended     <--    nothing, or what went wrong

Only places, boxes and errors travel. Whoever dies, what is marked stays: a block that is handed out again begins at its first
brick without a mark, and so does the same command after this process or the scheduler died.
"""

import asyncio
import concurrent.futures
import json
import logging
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from typing import Any
from uuid import uuid4

from microtome.errors import ConfigError, DataError, DataWarning, MicrotomeError, RunError, ShortOfMemoryError, missing_extra
from microtome.images.stores import name_of
from microtome.images.volume import url_of
from microtome.inference.bricks import Bricks, recorded
from microtome.inference.processor import threads
from microtome.inference.slabs import Box
from microtome.inference.stored import Job, OnVoxels, Worker, blocks, voxels_of

Say = Callable[[str], None]
LOCAL = "local:"
# What libraries read once, when they are imported.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# glibc gives threads other than the first small heaps, and each larger tensor fresh pages: twice the time, measured.
ARENAS = "MALLOC_ARENA_MAX"
CONNECT_SECONDS, LOOK_SECONDS, TURN_SECONDS = 30, 10, 0.05
MOST_MISSED = 6


def fill_on_cluster(address: str, job: Job, bricks: Bricks, *, on_voxels: OnVoxels, say: Say) -> None:
    """Compute and write all bricks that are missing, by the workers of a cluster.

    Args:
        address: `local:N` for N processes of this machine; or a scheduler's, `tcp://host:8786`, or the file that it wrote, `*.json`.
        job: what is computed. Its places must be the same for all workers.
        bricks: the job's store.
        on_voxels: is told (done, of) as blocks end.
        say: is told of workers, blocks and the dashboard, a line each.

    Raises:
        ConfigError: no such address, or workers without this version of microtome or with too little memory.
        DataError: what a worker found wrong with image, model or store.
        RunError: the scheduler was lost, or a block could not be computed; what is done is kept.
    """
    if not bricks.missing():
        return
    bricks.halt(False)
    short: ShortOfMemoryError | None = None
    with _connected(address, say) as client:
        with _talking(address, bricks):
            _check_versions(client)
            boxes = blocks(bricks, _wait_for_threads(client, bricks, say))
            futures = _submitted(client, _order_of(job), boxes)
        of, done = sum(voxels_of(box) for box in boxes), 0
        say(f"{_count(len(boxes), 'block')}, the largest of {max(voxels_of(box) for box in boxes) / 1e6:.3g} million voxels")
        for future in _ended(client, futures, say):
            box = futures.pop(future)
            with _talking(address, bricks):
                short = _raise_failure(future, box, bricks) or short
            done += voxels_of(box)
            on_voxels(done, of)
    if short is not None:
        bricks.halt(False)
        raise short
    finished, total = bricks.done()
    if finished < total:
        got, do = f"{finished} of {total} bricks there", "let all workers reach one and the same store, and run the same command again"
        raise RunError(name_of(bricks.place), expected="all that the workers wrote", got=got, do=do, code="R008")


def check_address(address: str) -> None:
    """Refuse words that name no cluster, before any time is spent.

    Raises:
        ConfigError: neither `local:N` nor a scheduler's address or file.
    """
    if address.startswith(LOCAL):
        workers = address.removeprefix(LOCAL)
        if not workers.isdecimal() or int(workers) < 1:
            expected = f"{LOCAL} and a number of workers"
            raise ConfigError("--cluster", expected=expected, got=f"`{address}`", do=f"give {LOCAL}2", code="C030")
    elif "://" not in address and not address.endswith(".json"):
        do = f"give {LOCAL}2, tcp://host:8786, or the file of `dask scheduler --scheduler-file`"
        raise ConfigError("--cluster", expected="the address of a cluster", got=f"`{address}`", do=do, code="C030")


# What a worker does.


@dataclass(frozen=True)
class Order:
    """A job as it is sent to workers.

    Attributes:
        key: of this call alone, for which a process opens model, image and store once; they may be others in the next call.
        version: of microtome, which has to be the worker's too.
        job: with places that do not depend on a working folder.
    """

    key: str
    version: str
    job: Job = field(compare=False)


def fill_block(order: Order, box: Box) -> MicrotomeError | None:
    """Compute and write what is missing of a box: what a worker is sent. What it found wrong comes back, and no other worker tries."""
    try:
        _check_version(f"worker {platform.node()}", order.version, version("microtome"))
        _worker_of(order).fill_missing(box)
    except MicrotomeError as error:
        return error.on(platform.node())
    return None


def dask_setup(worker: Any) -> None:
    """What Dask calls as a worker of this machine begins: Ctrl-C is for the process that started it, which ends it."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _worker_of(order: Order) -> Worker:
    """This thread's worker for a job; engines are not made for two threads at once."""
    kept = _kept(order.key)
    thread = get_ident()
    if thread not in kept:
        if recorded(order.job.place) is None:
            got, do = "nothing there", "choose an --out that all workers reach under the same name"
            raise DataError(name_of(order.job.place), expected="the store that this prediction was begun in", got=got, do=do, code="D028")
        with warnings.catch_warnings():
            # Who ran the command was told already.
            warnings.simplefilter("ignore", DataWarning)
            kept[thread] = Worker(order.job)
    return kept[thread]


@lru_cache(maxsize=1)
def _kept(key: str) -> dict[int, Worker]:
    """The workers of this process for a job, a thread each; those of the job before are let go."""
    del key
    return {}


def _order_of(job: Job) -> Order:
    """The job for workers that run in other folders."""
    images = tuple(_absolute(path) for path in job.case.images)
    job = replace(job, bundle=_absolute(job.bundle), place=_absolute(job.place), case=replace(job.case, images=images))
    return Order(uuid4().hex, version("microtome"), job)


def _absolute(place: Path) -> Path:
    """A place as any process of its machine finds it."""
    return place if url_of(place) is not None else place.absolute()


# What this process does.


@contextmanager
def _connected(address: str, say: Say) -> Iterator[Any]:
    """A client of the cluster at an address; one of this machine is started and ends with it."""
    try:
        dask: Any = import_module("distributed")
    except ImportError:
        raise missing_extra(f"--cluster {address}", "dask.distributed", "cluster") from None
    check_address(address)
    if address.startswith(LOCAL):
        with _local(dask, int(address.removeprefix(LOCAL)), say) as client:
            yield client
        return
    place = _scheduler_at(address)
    with _quiet():
        try:
            client = dask.Client(place, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            do = "start `dask scheduler` and `dask worker`, and give the address that the scheduler shows (docs/cluster.md)"
            raise RunError(f"--cluster {address}", expected="a scheduler of Dask", got=_line(error), do=do, code="R010") from None
        with client:
            with suppress(KeyError, OSError):  # where it is lost meanwhile, what is asked of it next tells
                say(f"scheduler at {place}; dashboard, if bokeh is installed there: {client.dashboard_link}")
            yield client


def _scheduler_at(address: str) -> str:
    """The scheduler's address, from its file if that is what was given."""
    if address.endswith(".json"):
        try:
            return str(json.loads(Path(address).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            do = "wait until the scheduler has written it, or give the scheduler's address"
            raise ConfigError(f"--cluster {address}", expected="the file of a scheduler", got=_line(error), do=do, code="C030") from None
    return address


@contextmanager
def _local(dask: Any, workers: int, say: Say) -> Iterator[Any]:
    """A cluster of processes of this machine, which share its cores; killed at once if anything goes wrong, Ctrl-C too."""
    each, board = max(1, threads() // workers), find_spec("bokeh") is not None
    settings = {"scheduler.worker-saturation": 1.0, "worker.profile.enabled": False, "worker.preload": [__name__]}
    settings = {f"distributed.{name}": value for name, value in settings.items()}
    # The layout bounds the memory of a worker, and Dask holds nothing that it could write to the disk instead.
    words = {"memory_limit": 0, "scheduler_kwargs": {"dashboard": board}, "dashboard_address": "127.0.0.1:0"}
    with _quiet(), _environment({**dict.fromkeys(THREAD_VARIABLES, str(each)), ARENAS: "1"}), import_module("dask").config.set(settings):
        try:
            cluster = dask.LocalCluster(n_workers=workers, threads_per_worker=1, silence_logs=logging.CRITICAL, **words)
        except (OSError, RuntimeError) as error:
            do = "give fewer workers, or call from a script with `if __name__ == '__main__':`"
            raise RunError(f"--cluster {LOCAL}{workers}", expected="workers that start", got=_line(error), do=do, code="R010") from error
        with cluster, dask.Client(cluster, set_as_default=False) as client:
            link = f"dashboard: {cluster.dashboard_link}" if board else "no dashboard (pip install bokeh)"
            say(f"{_count(workers, 'worker')} of {_count(each, 'thread')}; {link}")
            try:
                yield client
            except BaseException:  # Ctrl-C as well: nobody waits for the blocks under way
                _kill(cluster)
                raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own words left out: of what matters it raises errors too, and those reach people in a line."""
    loggers = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] == "distributed"}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, level in levels.items():
            loggers[name].setLevel(level)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that are started meanwhile; whatever was set in between is undone."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _kill(cluster: Any) -> None:
    """End the workers of a local cluster without waiting for what they compute."""
    for nanny in list(cluster.workers.values()):
        nanny.auto_restart = False
        with suppress(OSError, AssertionError, TimeoutError):
            cluster.sync(nanny.kill, timeout=0.01)


def _check_versions(client: Any) -> None:
    """Refuse a cluster of another microtome: it could compute something else, or fail in ways that tell nobody why.

    Raises:
        ConfigError: names the first place.
    """
    found = client.get_versions(packages=["microtome"])
    workers = {f"worker {place}": about for place, about in found["workers"].items()}
    for place, about in {"the scheduler": found["scheduler"], **workers}.items():
        if isinstance(about, Mapping):
            _check_version(place, version("microtome"), about["packages"].get("microtome"))


def _check_version(place: str, wanted: str, found: str | None) -> None:
    """Refuse another version than is wanted."""
    if found != wanted:
        expected = f"microtome {wanted}, as where the command runs"
        do = "give scheduler, workers and this command one environment or one container image"
        raise ConfigError(place, expected=expected, got=found or "none installed", do=do, code="C031")


def _wait_for_threads(client: Any, bricks: Bricks, say: Say) -> int:
    """How many blocks the workers compute at once, as soon as there are any.

    Raises:
        ConfigError: their memory is limited to less than a block takes.
    """
    if not (found := client.nthreads()):
        say("no workers yet; waiting for the first")
    while not found:
        time.sleep(10 * TURN_SECONDS)
        found = client.nthreads()
    if None in client.run(os.getenv, ARENAS, on_error="ignore").values():
        say(f"workers without {ARENAS}=1 in their environment: computing on a CPU may take twice as long")
    each = bricks.record.layout.peak_bytes
    for place, worker in client.scheduler_info()["workers"].items():
        limit, needed = worker["memory_limit"], worker["nthreads"] * each
        # Beyond four fifths Dask gives a worker no more work, and it would wait for ever.
        if limit and needed > 0.8 * limit:
            got = f"{limit / 1e9:.2f} GB for {worker['nthreads']} threads of {each / 1e9:.2f} GB each"
            do = "start workers with --nthreads 1 and --memory-limit 0"
            raise ConfigError(f"worker {place}", expected="memory for a block a thread", got=got, do=do, code="C032")
    say(f"{_count(len(found), 'worker')}, {_count(sum(found.values()), 'block')} at once")
    return sum(found.values())


def _submitted(client: Any, order: Order, boxes: list[Box]) -> dict[Any, Box]:
    """A future for each block; who forgets it, lets the scheduler forget the block."""
    keys = [f"block-{order.key}-{number}" for number in range(len(boxes))]
    return dict(zip(client.map(partial(fill_block, order), boxes, key=keys, pure=False), boxes, strict=True))


def _ended(client: Any, futures: Mapping[Any, Box], say: Say) -> Iterator[Any]:
    """The futures as they end, however that is.

    Raises:
        RunError: all workers of this machine died, and none came back.
    """
    ended = import_module("distributed").as_completed(list(futures), loop=client.loop)
    looked, missed = time.monotonic(), 0
    while ended.count():
        for future in ended.next_batch(block=False):
            yield future
            looked, missed = time.monotonic(), 0
        time.sleep(TURN_SECONDS)
        if time.monotonic() - looked < LOOK_SECONDS:
            continue
        with suppress(OSError):
            missed = 0 if client.nthreads() else missed + 1
        looked = time.monotonic()
        if missed == 1:
            say("no workers are left; waiting for new ones")
        if missed > MOST_MISSED and client.cluster is not None:
            got, do = "none, and none comes back", "see whether memory is short, and run the same command again"
            raise RunError("--cluster", expected="workers of this machine", got=got, do=do, code="R009")


@contextmanager
def _talking(address: str, bricks: Bricks) -> Iterator[None]:
    """Turn a connection that breaks into an error that tells what to do.

    Raises:
        RunError: the scheduler was lost.
    """
    try:
        yield
    except (OSError, asyncio.CancelledError, concurrent.futures.CancelledError) as error:
        got = "the connection to it was lost"
        raise RunError(f"--cluster {address}", expected="a scheduler until the end", got=got, do=_again(bricks), code="R009") from error


def _raise_failure(future: Any, box: Box, bricks: Bricks) -> ShortOfMemoryError | None:
    """Raise what went wrong with a block, if anything did; a lack of memory is raised when all others have ended, as they are told to.

    Raises:
        MicrotomeError: what a worker found wrong.
        RunError: its workers died, or anything else.
    """
    if future.status != "error":
        failure = future.result()
        if isinstance(failure, ShortOfMemoryError):
            bricks.halt(True)
            return failure
        if failure is not None:
            raise failure
        return None
    error, do = future.exception(), _again(bricks)
    got = _line(error)
    if isinstance(error, import_module("distributed").KilledWorker):
        got = f"{error.allowed_failures + 1} workers, each of which died of it"
        do = f"give workers more memory (their logs say more), then {do}"
    where = f"{name_of(bricks.place)}, block {' × '.join(f'{a}:{b}' for a, b in box)}"
    raise RunError(where, expected="a block that can be computed", got=got, do=do, code="R007") from error


def _again(bricks: Bricks) -> str:
    """What to do once the reason is gone."""
    return "run the same command again; {} of {} bricks are done".format(*bricks.done())


def _count(number: int, what: str) -> str:
    """So many of something."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _line(error: BaseException | None) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
