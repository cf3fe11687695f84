"""The whole road on built-in data: sparse 3D annotation -> training -> dense prediction -> scores -> report, then 2D cells."""

import time
from collections.abc import Sequence
from pathlib import Path

from microtome.data.dataset import open_dataset
from microtome.data.synthetic import DemoConfig, DemoData, write_demo_data
from microtome.errors import ConfigError
from microtome.evaluation.evaluate import evaluate
from microtome.evaluation.pages import environment, scores_html
from microtome.files import write_json, write_text
from microtome.inference.predict_files import predict_files
from microtome.inference.predictor import load
from microtome.terminal import Terminal
from microtome.training.initial import Start
from microtome.training.rehearsal import make_plan
from microtome.training.run import train

# Of the minutes, for each of the two trainings; the rest is data, prediction and scores.
SHARE_3D, SHARE_2D = 0.55, 0.35


def run_demo(out: Path, minutes: float, terminal: Terminal, config: DemoConfig | None = None) -> None:
    """Make the data, train on it, predict what no one annotated, score it against the truth, say where the reports are.

    Args:
        out: folder for data, runs, predictions and scores; `demo-2` where `demo` is taken.
        minutes: wall time of the two trainings, about.
        terminal: says what is going on.
        config: how much data; None: as much as two cores learn from in minutes.

    """
    out = _free(out)
    terminal.say("making two volumes of tubules annotated in 8 sections each, one unseen volume, and pictures of cells ...")
    data = write_demo_data(out / "data", config)
    terminal.say("")
    terminal.say("3D: a network that learns from a few annotated sections")
    _train(data.tubules, out / "runs" / "tubules", minutes * SHARE_3D, terminal)
    terminal.say("")
    terminal.say("2D: cells")
    _train(data.cells, out / "runs" / "cells", minutes * SHARE_2D, terminal)
    terminal.say("")
    lines = _scores(data, out)
    for line in lines:
        terminal.say(line)
    write_text(out / "report.html", _index(lines))
    terminal.say(f"report: {(out / 'report.html').resolve()}")


def _free(out: Path) -> Path:
    """`out`, or the first of `out-2`, `out-3`, ... that holds nothing yet."""
    candidates = [out, *(out.with_name(f"{out.name}-{number}") for number in range(2, 1000))]
    for candidate in candidates:
        if not candidate.exists() or (candidate.is_dir() and not any(candidate.iterdir())):
            return candidate
    raise ConfigError(out, expected="a new folder", got=f"{len(candidates)} that are taken", do="give another --out", code="C005")


def _index(lines: Sequence[str]) -> str:
    """A page that leads to the reports and scores."""
    pages = [(f"runs/{name}/report.html", f"training report: {name}") for name in ("tubules", "cells")]
    pages += [(f"scores/{name}.html", f"scores: {name}") for name in ("tubules_dense", "tubules_unseen", "cells_unseen")]
    return environment().get_template("index.html").render(title="microtome demo", lines=lines, pages=pages)


def _train(folder: Path, run: Path, minutes: float, terminal: Terminal) -> None:
    """Plan and train as `microtome train` does."""
    started = time.perf_counter()
    dataset = open_dataset(folder)
    terminal.say_dataset(dataset)
    plan = make_plan(dataset, minutes=minutes, say=terminal.say)
    terminal.say_plan(plan)
    with terminal.training(plan) as on_event:
        train(dataset, plan, run, on_event=on_event, start=Start(started))


def _scores(data: DemoData, out: Path) -> list[str]:
    """Predict and score what training did not see; a line for each comparison."""
    rows = (
        ("tubules", data.tubules / "images", data.tubules_truth, "tubules_dense", "all voxels of the two sparsely annotated volumes"),
        ("tubules", data.tubules_unseen, data.tubules_unseen_truth, "tubules_unseen", "a volume without any annotation"),
        ("cells", data.cells_unseen, data.cells_unseen_truth, "cells_unseen", "pictures of cells without masks"),
    )
    lines = []
    for run, images, truth, name, words in rows:
        folder = out / "predictions" / name
        predict_files(load(out / "runs" / run), [images], folder)
        result = evaluate(folder, truth)
        write_json(out / "scores" / f"{name}.json", result)
        write_text(out / "scores" / f"{name}.html", scores_html(result))
        lines.append(f"dense IoU {result['summary']['iou']['mean']:.3f}  Dice {result['summary']['dice']['mean']:.3f}  {words}")
    return lines
