"""Results of the experiments -> docs/reproductions.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from microtome.files import write_text

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reproductions.md"
WORDS = {"iou": "IoU", "dice": "Dice", "f1_objects": "F1 of objects", "train_seconds": "seconds to train"}
WORDS |= {f"loss_{step}": f"loss at step {step}" for step in (50, 150, 300)}
WORDS |= {"predict_seconds": "seconds a picture", "window_seconds": "seconds a picture, window by window"}


def write_page() -> None:
    """Write the page."""
    write_text(PAGE, page())


def page() -> str:
    """The page with the table of every experiment that has been run."""
    parts = [INTRODUCTION]
    for path in sorted(HERE.glob("*.yaml")):
        results = HERE / "results" / f"{path.stem}.json"
        if results.exists():
            described = yaml.safe_load(path.read_text(encoding="utf-8"))
            parts.append(section(path.stem, described, json.loads(results.read_text(encoding="utf-8"))))
    return "\n".join(parts)


INTRODUCTION = """\
# What the papers claim, in small versions run here

Each claim has a description in `experiments/`. `python -m experiments.run NAME` makes its data, trains, predicts what training has
not seen and scores it; without a name it does so for all. The numbers are means over the seeds, with the lowest and the highest
in brackets. They are of small networks on data made on the spot, trained for a minute or two on two cores: they can show a
direction, not a paper's figure. What came out is reported also where it contradicts the paper.
"""


def section(name: str, described: dict[str, Any], result: dict[str, Any]) -> str:
    """Claim, setting, table, and what it shows."""
    columns = described["columns"]
    lines = [f"## {described['title']}", "", f"**Claim.** {described['claim']}", "", f"**Here.** {described['setting']}", ""]
    lines += [f"| {' | '.join(['', *(WORDS[column] for column in columns)])} |", "|---|" + "---|" * len(columns)]
    for run in described["runs"]:
        rows = [row for row in result["rows"] if row["name"] == run["name"]]
        if rows:
            lines.append(f"| {' | '.join([run['name'], *(cell([row.get(column) for row in rows]) for column in columns)])} |")
    machine = result["machine"]
    threads = f"{machine['cores']} thread{'s' if machine['cores'] > 1 else ''}"
    made = f"{machine['processor']}, {threads}, torch {machine['torch']}, {machine['date']}"
    count = len(described["seeds"])
    words = f"{count} seed{'s' if count > 1 else ''}; {made}; `python -m experiments.run {name}`"
    found = [] if "found" not in described else [f"**What came out.** {described['found']}", ""]
    return "\n".join([*lines, "", *found, f"<sub>{words}</sub>", ""])


def cell(values: list[float | None]) -> str:
    """Mean, and the range where there is more than one seed."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    digits = 3 if max(known) < 10 else 0
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f}–{max(known):.{digits}f})"


if __name__ == "__main__":
    write_page()
