"""Timing a call in a process, and running the processes of all variants in turn."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.rows import CACHE, REPOSITORY, row_of, say

# A child that takes longer than this has hung.
MOST_SECONDS = 600
# Weights are trained and graphs written once.
PREPARING_SECONDS = 1800
# Variants whose process takes longer than this are run in two rounds at most: the whole has to end in twenty minutes or so.
SLOW_SECONDS = 12


# (work, engine) -> what its processes said, one a round.
Found = dict[tuple[str, str], list[dict[str, Any]]]


class Work(NamedTuple):
    """Something to be timed with several engines.

    Attributes:
        name: as rows call it.
        request: what the child process is asked, but for the engine.
        engines: by name; the first is the default that the others are compared with.
        threads: of the child; 0: as many as there are cores.
    """

    name: str
    request: Mapping[str, Any]
    engines: tuple[str, ...]
    threads: int = 0


def timed(call: Callable[[], object], budget_seconds: float = 1.5, most: int = 5) -> dict[str, float]:
    """Median wall time of a call after a first one, which is told apart: it compiles, allocates, reads."""
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    times: list[float] = []
    while not times or (sum(times) < budget_seconds and len(times) < most):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return {"seconds": median(times), "first_seconds": first}


def one_core() -> None:
    """Keep this process on one core, whatever threads its libraries start; where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def run_child(
    request: Mapping[str, Any], threads: int = 0, module: str = "benchmarks.child", limit_seconds: float = MOST_SECONDS
) -> dict[str, Any]:
    """What a fresh process says to a request; {"error": ...} if it fails or hangs."""
    count = str(threads or os.cpu_count() or 1)
    recycle = "0" if request.get("engine") == "default" else "1"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MICROTOME_RECYCLE_MEMORY": recycle,
        "MICROTOME_CACHE": str(CACHE / "cache"),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", module, json.dumps(dict(request))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {limit_seconds:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        why = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"error": (why[-1] if why else f"exit code {done.returncode}")[:300]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def run_rounds(works: Sequence[Work], rounds: int, run: Callable[[Work, str], dict[str, Any]], slow_seconds: float = SLOW_SECONDS) -> Found:
    """Every engine of every work, once a round, all works before any is repeated, so that a busy minute spoils no variant alone.

    A failure is kept as {"error": ...} and not tried again.
    """
    found: Found = {(work.name, engine): [] for work in works for engine in work.engines}
    began = time.perf_counter()
    for number in range(rounds):
        for work in works:
            for engine in work.engines:
                before = found[work.name, engine]
                if any("error" in one for one in before) or (number > 1 and before[0]["process_seconds"] > slow_seconds):
                    continue
                started = time.perf_counter()
                answer = run(work, engine)
                answer["process_seconds"] = time.perf_counter() - started
                before.append(answer)
                words = answer.get("error") or f"{answer['seconds']:.4g} s"
                say(f"[{time.perf_counter() - began:5.0f} s] round {number + 1}/{rounds}  {work.name:<36} {engine:<20} {words}")
    return found


def rows_of(works: Sequence[Work], found: Found, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of all works, in order."""
    return [
        row_of(work.name, engine, found[work.name, engine], found[work.name, work.engines[0]], rates)
        for work in works
        for engine in work.engines
    ]
