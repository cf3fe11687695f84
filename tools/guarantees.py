"""The numbers of docs/guarantees.md, from benchmarks/results/soak.json, which `make soak` writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tools.layers import REPOSITORY

PAGE = REPOSITORY / "docs" / "guarantees.md"
RESULT = REPOSITORY / "benchmarks" / "results" / "soak.json"
BEGIN, END = "<!-- made by `make docs` from benchmarks/results/soak.json -->\n", "<!-- end of what was made -->\n"
NONE = "`make soak` writes this table. It has not been run to its end yet.\n"
# The parts of a soak, in the words of the page.
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "kills": "Trainings, killed",
        "faults": "Trainings, with a fault at a call to the disk",
        "predictions": "Predictions, killed",
        "processes": "Trainings of several processes",
        "fuzz": "Hostile files, read",
    }
)


def pages() -> dict[Path, str]:
    """The page with its table as the last soak left it."""
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{PAGE} has no lines {BEGIN.strip()!r} and {END.strip()!r} around its table")
    made = _made(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.exists() else NONE
    return {PAGE: before + start + made + end + after}


def _made(result: Mapping[str, Any]) -> str:
    """When and where the last soak ran, and a table of its rows."""
    rows = result["rows"]
    failed, tried = (sum(row[name] for row in rows) for name in ("failed", "tried"))
    told = f"`make soak` on {result['date']}, {result['seconds'] / 60:.0f} minutes, {result['machine']}: {failed:,} of {tried:,} failed.\n"
    lines = [f"| {TITLES.get(row['part'], row['part'])} | {row['what']} | {row['tried']:,} | {row['failed']:,} |" for row in rows]
    return "\n".join([told, "| what | how | tried | failed |", "|---|---|---|---|", *lines]) + "\n"
