"""What speed costs in accuracy: the same trained model and held-out images by each engine, through the command line.

    python -m benchmarks.accuracy RUNS... [--engines torch,torch-bf16,openvino-bf16,openvino-int8]

Each of RUNS is a folder that `benchmarks/ten_minutes.py --out` made: `run/`, and `held_out/` with images and labels. Writes
results/accuracy.json and docs/performance.md. A run of an older microtome needs `microtome train DATA --out RUN --resume` first.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import FIELDS, about, read_results, say, write_results
from benchmarks.startup import microtome
from microtome.data.listing import LISTING
from microtome.images.files import read_image

ENGINES = ("torch", "torch-bf16", "openvino-bf16", "openvino-int8")


def main() -> None:
    """Score every engine on every run; runs that are not named keep their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--engines", default=",".join(ENGINES), help="the first is what the others are compared with")
    parser.add_argument("--out", default="accuracy", help="name of the file in benchmarks/results")
    options = parser.parse_args()
    rows = [row for row in read_results(options.out)[0] if row["work"] not in {run.name for run in options.runs}]
    for run in options.runs:
        rows += scores(run, tuple(options.engines.split(",")))
    write_results(options.out, rows, about("python -m benchmarks.accuracy RUNS"))
    if options.out == "accuracy":
        from tools.performance import write_page

        write_page()


def scores(run: Path, engines: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each engine on one run; one that fails is a row with its error."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            row: dict[str, Any] = {"work": run.name, "engine": engine, **dict.fromkeys(FIELDS[2:])}
            try:
                row |= score(run, engine, Path(folder) / engine)
            except subprocess.CalledProcessError as error:
                row["error"] = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1][:300]
            first = rows[0] if rows else row
            if "dice" in row and "dice" in first:
                row |= {"difference": row["dice"] - first["dice"], "ratio_to_default": first["seconds"] / row["seconds"]}
                row["labels_equal"] = equal_labels(Path(folder) / engine, Path(folder) / engines[0])
            say(f"{run.name:<14} {engine:<16} Dice {row.get('dice')}  {row.get('seconds')} s  {row.get('error', '')}")
            rows.append(row)
    return rows


def score(run: Path, engine: str, out: Path) -> dict[str, float]:
    """Predict and evaluate the held-out images: seconds of `predict`, start included, and the mean Dice."""
    images, labels = held_out(run)
    started = time.perf_counter()
    called("predict", run / "run", images, "--out", out, "--engine", engine)
    seconds = time.perf_counter() - started
    target = out.with_suffix(".json")
    called("evaluate", out, labels, "--json", target)
    summary = json.loads(target.read_text(encoding="utf-8"))["summary"]
    return {"seconds": seconds, "dice": summary["dice"]["mean"]}


def held_out(run: Path) -> tuple[Path, Path]:
    """Images and labels that training has not seen, as `ten_minutes.py` lays them out."""
    plural = run / "held_out" / "images"
    return (plural, run / "held_out" / "labels") if plural.exists() else (run / "held_out" / "image", run / "held_out" / "label")


def equal_labels(folder: Path, reference: Path) -> float:
    """Share of voxels in all files of a folder that have the label of the file of the same name."""
    equal = total = 0
    for file in sorted(path for path in reference.rglob("*") if path.is_file() and path.name != LISTING):
        ours, theirs = (read_image(path).array for path in (folder / file.relative_to(reference), file))
        equal += int(np.count_nonzero(ours == theirs))
        total += ours.size
    return equal / total


def called(*words: object) -> None:
    """Call the command line.

    Raises:
        subprocess.CalledProcessError: it failed; with what it said.
    """
    subprocess.run(microtome(*words), check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main()
