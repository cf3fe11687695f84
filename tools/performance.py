"""Writes docs/performance.md from the files in benchmarks/results.

`python -m tools.performance` writes it, `python -m tools.performance --check` says whether it is current.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from tools.layers import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
TARGETS = REPOSITORY / "benchmarks" / "targets.yaml"
PAGE = REPOSITORY / "docs" / "performance.md"
# Results that have a chapter, in this order.
CHAPTERS: Mapping[str, tuple[str, str]] = {
    "latest": (
        "Ours alone",
        """\
Each engine runs in a process of its own, all of them in turn, in rounds; a number is the median of its rounds. `default` is plain PyTorch
as people write it: float32, eager, contiguous, torch's own instance norm, `torch.inference_mode`, memory given back to the system as
usual. "times default" is its time over the row's. "labels equal" is the share of voxels that get the default's class. "of the limit" is
the row's operations a second (a multiply-add counts two, padding counts as if it were image, a training step is three forward passes)
over the best rate of that precision in the table of limits; where memory is the limit, the bytes that must move at least over the rate of
a copy. It can exceed 100 %, as engines skip what is multiplied with padding.

`unet_same` has 31.0 million parameters. `unet3d` is unpadded, with the widths and the input of its paper (527 billion operations; a padded
one of 96 × 96 × 96 has 1649). `modern_unet` has the sizes that a plan of ten minutes gives it. Weights: some 50 steps on blobs.""",
    ),
    "peers": (
        "Beside nnU-Net, MONAI, TorchIO and batchgeneratorsv2",
        """\
The first engine of each table is the one that the others are compared with. All have the same network, weights, patch (64 × 128 × 128),
overlap (0.5) and threads, and none mirrors. "File to file" is a program's own command from its start to a label file on disk: NIfTI,
voxels of 0.8 mm, brought to 1 mm (128 × 205 × 205) and back. nnU-Net and ours resample and normalise alike; MONAI's users take linear
interpolation, which gives another image and so other labels. "peak" is the memory of the largest process, which flatters programs that
start several; the targets above count all of a program's processes together.""",
    ),
    "memory": (
        "Memory of ever longer volumes",
        """\
`make bench-memory`: `microtome predict` of an OME-Zarr of 8-bit voxels into another, by a thin network in tiles of 32 × 128 × 128. The
peak is the process's largest resident set as the kernel counted it; "the process with its network" is the peak of the same command for a
volume of one tile.""",
    ),
    "scaling": (
        "More workers",
        """\
`python -m benchmarks.scaling`: the same volume by one and by two workers of one thread each; [cluster.md](cluster.md) says what follows
for a thousand.""",
    ),
    "gpu": ("On a GPU", ""),
    "accuracy": (
        "What speed costs in accuracy",
        """\
The same trained model and the same held-out images by each engine, through `microtome predict` and `microtome evaluate`. Wanted: a Dice
within 0.002 of torch in float32.""",
    ),
}
RATES = {"memory copy": "GB/s (read + written)", "fresh memory": "GB/s"}


def main(words: list[str]) -> int:
    """Write the page, or with `--check` say whether it is current; 1 if it is not."""
    if "--check" not in words:
        write_page()
        return 0
    current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
    if not current:
        print(f"{PAGE.relative_to(REPOSITORY)}: not current; run `python -m tools.performance`")
    return int(not current)


def write_page() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page(results: Path = RESULTS) -> str:
    """The page as the results and targets make it."""
    found = {name: read(results, name) for name in CHAPTERS}
    parts = [INTRODUCTION, targets_table({name: rows for name, (rows, _) in found.items()})]
    for name, (title, words) in CHAPTERS.items():
        rows, about = found[name]
        if rows:
            parts += [f"## {title}\n", f"{words}\n" if words else "", made_by(about)]
            parts += [limits_table(about["limits"])] if about.get("limits") else []
            parts += [OTHER_TABLES[name](rows)] if name in OTHER_TABLES else tables(rows)
    return "\n".join(part for part in parts if part)


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Peaks of predicting ever longer volumes."""
    lines = ["| volume | classes | peak, MB | of it the process with its network, MB | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        sizes = f"{row['peak_bytes'] / 2**20:.0f} | {row['base_bytes'] / 2**20:.0f}"
        lines.append(f"| {shape} | {row['classes']} | {sizes} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """\
<!-- made by `python -m tools.performance` from benchmarks/results; change the benchmarks, not this page -->
# How fast it is

Every number here was measured by the command that stands beside it, and can be measured again on another machine: `make bench` (ours
alone, about twenty minutes), `make bench-peers` (beside other programs, in an environment of its own that `make peers` makes),
`make bench-gpu`. What was tried and did not help is in [log.md](log.md).
"""


def read(results: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, and how they were made; both empty if nobody has made them."""
    rows, about = (results / f"{name}.json", results / f"{name}.about.json")
    if not rows.exists():
        return [], {}
    said = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    return json.loads(rows.read_text(encoding="utf-8")), said


def made_by(about: Mapping[str, Any]) -> str:
    """Command, date, machine and versions in a line each."""
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return f"`{about.get('command', '?')}`, {about.get('date', '?')}; {about.get('machine', '?')}; {versions}.\n"


def targets_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each target beside what was measured."""
    lines = ["## Targets\n", "| | target | reached |", "|---|---|---|"]
    for target in yaml.safe_load(TARGETS.read_text(encoding="utf-8")):
        rows = found.get(target["file"], [])
        value = measured(rows, target["work"], target["engine"], target["field"])
        if "over" in target:
            # A share of what another engine took for the same.
            whole = measured(rows, target["work"], target["over"], target["field"])
            value = None if value is None or whole is None else value / whole
        lines.append(f"| {target['what']} | {goal(target)} | {reached(target, value)} |")
    return "\n".join(lines) + "\n"


def measured(rows: Sequence[Mapping[str, Any]], work: str, engine: str, field: str) -> float | None:
    """A number of the row of an engine at a work; None where it was not measured."""
    row = next((row for row in rows if (row["work"], row["engine"]) == (work, engine)), {})
    return row.get(field)


def goal(target: Mapping[str, Any]) -> str:
    """`at least 4`."""
    return f"at least {target['at_least']:g}" if "at_least" in target else f"at most {target['at_most']:g}"


def reached(target: Mapping[str, Any], value: float | None) -> str:
    """The number, and `no` where it misses the target."""
    if value is None:
        return "not measured"
    hit = value >= target["at_least"] if "at_least" in target else value <= target["at_most"]
    return f"{value:.3g}" if hit else f"{value:.3g}: no"


def limits_table(limits: Mapping[str, Any]) -> str:
    """What the machine could do, as measured in the same run."""
    lines = [f"| limit, {limits.get('threads', '?')} threads | |", "|---|---|"]
    for name, rate in limits.get("rates", {}).items():
        lines.append(f"| {name} | {rate / 1e9:.3g} {RATES.get(name, '10⁹ operations/s')} |")
    lines += [f"| {name} | not measured: {cell(why)} |" for name, why in limits.get("skipped", {}).items()]
    return "\n".join(lines) + "\n"


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each work, in the order of the rows."""
    return [table(work, list(group)) for work, group in groupby(rows, key=lambda row: str(row["work"]))]


def table(work: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The engines of one work; columns that no row has are left out."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "seconds": lambda row: number(row.get("seconds")),
        "times default": lambda row: number(row.get("ratio_to_default"), 3),
        "labels equal": lambda row: share(row.get("labels_equal"), 4),
        "of the limit": lambda row: share(row.get("limit_ratio"), 0),
        "lowest to highest": lambda row: (
            f"{number(row.get('low'))} to {number(row.get('high'))} ({row.get('rounds')})" if row.get("rounds") else ""
        ),
        "MB": lambda row: number(row.get("peak_mb"), 0),
        "": lambda row: cell(row.get("note") or "") + (f"failed: {cell(row['error'])}" if row.get("error") else ""),
    }
    kept = {name: make for name, make in columns.items() if any(make(row) for row in rows)}
    lines = [f"### {work}\n", f"| engine | {' | '.join(kept)} |", "|---|" + "---|" * len(kept)]
    lines += [f"| {row['engine']} | {' | '.join(make(row) for make in kept.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Dice of each engine on each dataset."""
    lines = ["| data | engine | Dice | difference | failed |", "|---|---|---|---|---|"]
    for row in rows:
        dice, off = row.get("dice"), row.get("difference")
        words = [f"{dice:.4f}" if dice is not None else "", f"{off:+.4f}" if off is not None else "", cell(row.get("error") or "")]
        lines.append(f"| {row['work']} | {row['engine']} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent for what people read; whole numbers with 0 digits."""
    if value is None:
        return ""
    if digits == 0:
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1000 else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2e}"


def share(value: float | None, digits: int) -> str:
    """A share as a percentage."""
    return "" if value is None else f"{100 * value:.{digits}f} %"


def cell(text: str) -> str:
    """Text that keeps a table whole."""
    return " ".join(str(text).split()).replace("|", "\\|")


# Results whose rows are not those of engines.
OTHER_TABLES = MappingProxyType({"accuracy": accuracy_table, "memory": memory_table})

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
