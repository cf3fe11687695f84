"""`make soak`: kills, faults of the disk and hostile files, more of them than tests have time for; benchmarks/results/soak.json.

    python -m tools.soak [--only kills] [--seconds 60]

Hostile files are read on a core of their own, all the time; the other parts follow each other on a second one, each in a process
of its own, and lend it to the hostile files while they wait, and when they are done.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from microtome.files import write_json
from tools.layers import REPOSITORY

# Names the file that tells hostile files that a second core is free.
_JOINED = "MICROTOME_SOAK_JOINED"
RESULT = REPOSITORY / "benchmarks" / "results" / "soak.json"
# Of all parts together, with a minute for what they need to start and to end.
SECONDS = 1740.0
# A shorter look leaves the numbers of the last soak as they are.
LEAST_SECONDS = 600.0
Rows = list[dict[str, Any]]


def kills(seconds: float) -> Rows:
    """Trainings killed at random instants."""
    return list(importlib.import_module("tests.kills_soak").run(seconds))


def faults(seconds: float) -> Rows:
    """Trainings on a disk that fails at each of their calls, and killed at each."""
    return list(importlib.import_module("tests.kills_soak").run_faults(seconds))


def predictions(seconds: float) -> Rows:
    """Predictions into stores, their schedulers and their workers, killed."""
    return tests("predictions", "tests/test_resume_prediction.py", seconds)


def processes(seconds: float) -> Rows:
    """Trainings of several processes: volumes, and jobs that are asked to stop."""
    return tests("processes", "tests/test_processes.py", seconds)


def tests(part: str, file: str, seconds: float) -> Rows:
    """The tests of a file that are for a soak; what is begun is brought to its end, however long it takes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-n", "0", "-m", "soak", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1", file]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=4 * seconds + 300, check=False)
        rows = _rows_of(part, ElementTree.parse(report)) if report.exists() else []
    if done.returncode and not any(row["failed"] for row in rows):
        rows.append(_row(part, "tests", found=[done.stdout[-2000:]]))
    return rows


def fuzzing(seconds: float) -> Rows:
    """Mutants of files of each format that is read; on a second core, too, with what the other parts leave of it."""
    joined = os.environ.get(_JOINED)
    return list(importlib.import_module("tests.fuzz_soak").run(seconds, joined=Path(joined) if joined else None))


class Part(NamedTuple):
    """A part of the soak, and the share of the time that it may take."""

    name: str
    share: float
    run: Callable[[float], Rows]


# What the others leave of 1 is for hostile files too, which want about 40 minutes of one core.
PARTS = (
    Part("fuzz", 1.0, fuzzing),
    Part("predictions", 0.35, predictions),
    Part("kills", 0.12, kills),
    Part("processes", 0.06, processes),
    Part("faults", 0.12, faults),
)


def main() -> int:
    """Run the parts, print a table; 1 if anything failed."""
    names = tuple(part.name for part in PARTS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=names, action="append", help="this part alone; may be given again")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        write_json(given.out, next(part for part in PARTS if part.name == given.part).run(given.seconds))
        return 0
    chosen = [part for part in PARTS if part.name in (given.only or names)]
    alone = len(chosen) == 1
    begun = time.monotonic()
    rows = run_all([(part.name, given.seconds * (1.0 if alone else part.share)) for part in chosen])
    print(table(rows))
    print(f"{time.monotonic() - begun:.0f} s; {sum(row['failed'] for row in rows)} failed")
    if not given.only and given.seconds >= LEAST_SECONDS:
        facts = importlib.import_module("benchmarks.rows").about("python -m tools.soak")
        write_json(RESULT, {**facts, "seconds": round(time.monotonic() - begun), "rows": rows})
    return int(any(row["failed"] for row in rows))


def run_all(parts: Sequence[tuple[str, float]]) -> Rows:
    """Parts with their seconds: the first beside all others, which follow each other; the rows of all.

    The first has the first core, and what the others leave of the second one, which is its own when the file that `_JOINED` names appears.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        joined = Path(folder) / "joined"
        first = pool.submit(in_process, *parts[0], None, joined)
        others = [in_process(*part, cores[1] if len(cores) > 1 else None) for part in parts[1:]]
        joined.touch()
        return [row for rows in (first.result(), *others) for row in rows]


def in_process(part: str, seconds: float, core: int | None, joined: Path | None = None) -> Rows:
    """The rows of a part that runs in a process of its own; one that says that it failed where it did not come to its end."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, "-m", "tools.soak", "--part", part, "--seconds", str(seconds), "--out", str(out)]
        # Processes that this one starts stay on its core, and count it alone.
        pinned = ["taskset", "--cpu-list", str(core), *words] if core is not None and _has_taskset() else words
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUNS_A_PAGE": "256", **({_JOINED: str(joined)} if joined else {})}
        try:
            done = subprocess.run(
                pinned, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=5 * seconds + 600, check=False
            )
        except subprocess.TimeoutExpired as error:
            return [_row(part, "all of it", seconds=error.timeout, found=["it did not end in its time"])]
        if not out.exists():
            return [_row(part, "all of it", seconds=time.monotonic() - begun, found=[done.stderr[-2000:]])]
        return list(json.loads(out.read_text(encoding="utf-8")))


def table(rows: Rows) -> str:
    """The rows for people, each with what was found wrong below it."""
    lines = [f"{'part':<12} {'what':<62} {'tried':>8} {'failed':>6} {'seconds':>8}"]
    for row in rows:
        tried = f"{row['tried']}/{row['of']}" if row.get("of") else f"{row['tried']}"
        lines.append(f"{row['part']:<12} {row['what']:<62} {tried:>8} {row['failed']:>6} {row['seconds']:>8.0f}")
        lines += [f"    {line}" for line in row["findings"]]
    return "\n".join(lines)


def _rows_of(part: str, report: "ElementTree.ElementTree[Any]") -> Rows:
    """The rows of tests: what each says that it tried, or that it failed."""
    rows = []
    for case in report.iter("testcase"):
        wrong = [str(each.get("message"))[:2000] for kind in ("failure", "error") for each in case.iter(kind)]
        seconds = float(case.get("time") or 0)
        told = [(str(each.get("name")), int(str(each.get("value")))) for each in case.iter("property")]
        for name, count in told or [(str(case.get("name")), 1)]:
            if wrong or case.find("skipped") is None:
                rows.append(_row(part, name, tried=count, seconds=seconds, found=wrong))
    return rows


def _row(part: str, what: str, *, tried: int = 0, seconds: float = 0.0, found: Sequence[str] = ()) -> dict[str, Any]:
    """One row; what was found is what failed."""
    return {"part": part, "what": what, "tried": tried, "failed": len(found), "seconds": round(seconds, 1), "findings": list(found)}


def _has_taskset() -> bool:
    """Whether this machine has the command that keeps a process on a core."""
    return any((Path(folder) / "taskset").exists() for folder in os.get_exec_path())


if __name__ == "__main__":
    sys.exit(main())
