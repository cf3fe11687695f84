"""Rows of results and the files that hold them: FILE.json is a list of rows, FILE.about.json says where, when and how they were made."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.limits import limit_of
from microtome.files import write_json

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results"
# Weights, images, labels between runs: can be made again at any time, so git does not see them.
CACHE = REPOSITORY / "build" / "benchmarks"
# What every row has; rows may have more.
FIELDS = ("work", "engine", "seconds", "ratio_to_default", "labels_equal", "limit_ratio")
PACKAGES = ("microtome", "torch", "numpy", "scipy", "openvino", "onnxruntime", "nncf", "tensorstore")


Runs = Sequence[Mapping[str, Any]]


def row_of(work: str, engine: str, runs: Runs, default: Runs, rates: Mapping[str, float]) -> dict[str, Any]:
    """The row of one engine at one work: medians over its runs, compared with the default's.

    Args:
        work: its name.
        engine: its name.
        runs: what the child processes said, one a round; `error` where one failed.
        default: the same of the default engine.
        rates: measured limits, as `limits.measure_limits` gives them.
    """
    good = [run for run in runs if "seconds" in run]
    row: dict[str, Any] = {"work": work, "engine": engine, **dict.fromkeys(FIELDS[2:])}
    failed = [run for run in runs if "error" in run]
    if failed:
        row["error"] = str(failed[0]["error"])
    if not good:
        return row
    seconds = [run["seconds"] for run in good]
    row["seconds"] = statistics.median(seconds)
    base = [run["seconds"] for run in default if "seconds" in run]
    if base:
        row["ratio_to_default"] = statistics.median(base) / row["seconds"]
    row["labels_equal"] = next((run["labels_equal"] for run in good if run.get("labels_equal") is not None), None)
    row |= limits_of(good[0], row["seconds"], rates)
    row |= {"rounds": len(good), "low": min(seconds), "high": max(seconds)}
    for name in ("peak_mb", "tree_mb", "first_seconds"):
        values = [run[name] for run in good if run.get(name) is not None]
        if values:
            row[name] = statistics.median(values)
    if good[0].get("note"):
        row["note"] = good[0]["note"]
    return row


def limits_of(run: Mapping[str, Any], seconds: float, rates: Mapping[str, float]) -> dict[str, Any]:
    """Share of the limit that a run reaches: its operations (or bytes) a second over the best rate of its precision."""
    limit = limit_of(rates, str(run.get("precision", "")))
    if limit is None or not run.get("operations"):
        return {}
    return {"limit_ratio": run["operations"] / seconds / limit[1], "limit": limit[0]}


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with four significant digits, as noise leaves no more; shares of equal labels keep six, as they are close to 1."""
    digits = {"labels_equal": 6}
    return {name: float(f"{value:.{digits.get(name, 4)}g}") if isinstance(value, float) else value for name, value in row.items()}


def about(command: str, rates: Mapping[str, Any] | None = None, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Machine, versions, date and command of a file of results."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions,
        **({} if rates is None else {"limits": dict(rates)}),
    }


def machine() -> str:
    """Processor, cores and memory in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="ignore").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {memory / 2**30:.0f} GB, {platform.system()}"


def write_results(name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write `name`.json, the rows alone, and `name`.about.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", [rounded(row) for row in rows])
    write_json(folder / f"{name}.about.json", dict(facts))


def read_results(name: str, folder: Path = RESULTS) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and facts of a file of results; both empty if it has not been made."""
    rows, facts = folder / f"{name}.json", folder / f"{name}.about.json"
    if not rows.exists():
        return [], {}
    return json.loads(rows.read_text(encoding="utf-8")), json.loads(facts.read_text(encoding="utf-8"))


def say(*words: object) -> None:
    """Progress, for people, on stderr: stdout belongs to results."""
    print(*words, file=sys.stderr, flush=True)
