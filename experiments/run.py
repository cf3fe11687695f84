"""Small versions of what the papers claim, run again from their descriptions; results go to docs/reproductions.md.

    python -m experiments.run [skips norms dimensions slices small_object borders window precision] [--out runs/experiments]

Each `experiments/NAME.yaml` says what a paper claims, how the data are made, and what is trained. Everything follows
from the seeds in it; results of one machine and thread count are the same each time.
"""

import argparse
import json
import platform
import shutil
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import ndimage

import microtome
from experiments.data import Folders, write_data
from experiments.pages import write_page
from microtome.config import Plan
from microtome.errors import DataWarning
from microtome.files import write_json
from microtome.images.files import read_image
from microtome.inference.predict_files import predict_files
from microtome.inference.predictor import Predictor
from microtome.training.folder import versions

HERE = Path(__file__).parent


def main() -> None:
    """Run the experiments that are asked for, one after the other, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in HERE.glob("*.yaml")))
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--steps", type=int, default=None, help="instead of the description's: to try it out; nothing is recorded")
    options = parser.parse_args()
    warnings.simplefilter("ignore", DataWarning)
    for name in options.names:
        result = run_experiment(name, options.out / name, options.steps)
        if options.steps is None:
            write_json(HERE / "results" / f"{name}.json", result)
    if options.steps is None:
        write_page()


def read_results(name: str) -> dict[str, Any]:
    """What came out when the experiment was last run."""
    result: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return result


def run_experiment(name: str, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Every run of one description, for every seed: rows of scores."""
    described = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = []
    for run in described["runs"]:
        for seed in described["seeds"]:
            settings = merged(described["all"], run) | {"seed": seed} | ({} if steps is None else {"steps": steps})
            row = {"name": run["name"], "seed": seed, **run_one(settings, out / f"{run['name']}_{seed}".replace(" ", "_"))}
            print(json.dumps({"experiment": name, **row}), flush=True)
            rows.append(row)
    machine = {"cores": torch.get_num_threads(), "processor": _processor(), **versions(), "date": datetime.now(UTC).date().isoformat()}
    return {"experiment": name, "rows": rows, "machine": machine}


def run_one(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Make the data, train, predict what training has not seen, score it."""
    shutil.rmtree(out, ignore_errors=True)
    folders = write_data(settings["data"], out, settings["data"].get("seed", settings["seed"]))
    dataset = microtome.open_dataset(folders.train)
    plan = microtome.make_plan(
        dataset, steps=settings["steps"], network=settings["network"], dims=settings.get("dims"), seed=settings["seed"], fold="all"
    )
    plan = changed(plan, settings.get("plan", {}))
    started = time.perf_counter()
    microtome.train(dataset, plan, out / "run")
    seconds = time.perf_counter() - started
    predictor = microtome.load(out / "run", engine="torch")
    started = time.perf_counter()
    predict_files(predictor, [folders.images], out / "predictions")
    images = len(list(folders.truth.iterdir()))
    scored = score(folders, out / "predictions")
    row = {**scored, "train_seconds": round(seconds, 1), "predict_seconds": round((time.perf_counter() - started) / images, 3)}
    row |= {f"loss_{step}": loss_at(out / "run" / "log.jsonl", step) for step in settings.get("losses_at", ())}
    if settings.get("windows"):
        row["window_seconds"] = round(window_seconds(predictor, folders), 1)
    return row


def loss_at(log: Path, step: int, window: int = 20) -> float | None:
    """The mean loss of the last steps up to this one, as that of one step is mostly its batch's; None where there are none."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step" and step - window < event["step"] <= step]
    return round(float(np.mean(losses)), 4) if losses else None


def merged(all_runs: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What holds for all runs, with what this run says instead; groups are merged field by field."""
    result = dict(all_runs)
    for name, value in run.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, dict) else value
    return result


def changed(plan: Plan, changes: dict[str, Any]) -> Plan:
    """The plan with some values changed, groups of settings field by field, and all checked anew."""
    return Plan.model_validate(merged(plan.model_dump(), changes))


def score(folders: Folders, predictions: Path) -> dict[str, float]:
    """Mean scores over the images, and where objects are known how many of them were found one by one."""
    result = microtome.evaluate(predictions, folders.truth)
    row = {name: round(result["summary"][name]["mean"], 4) for name in ("iou", "dice")}
    if folders.objects is not None:
        pairs = [(path, predictions / path.name) for path in sorted(folders.objects.iterdir())]
        row["f1_objects"] = round(float(np.mean([f1_of_objects(*(read_image(p).array[0] for p in pair)) for pair in pairs])), 4)
    return row


def f1_of_objects(truth: np.ndarray, prediction: np.ndarray) -> float:
    """F1 of connected components of a prediction that cover a true object with an IoU above 1/2; merged objects count as missed."""
    found, number = ndimage.label(prediction > 0)
    objects = int(truth.max())
    together = np.zeros((objects + 1, number + 1))
    np.add.at(together, (truth.ravel().astype(int), found.ravel()), 1)
    union = together.sum(1, keepdims=True) + together.sum(0, keepdims=True) - together
    matched = int((together[1:, 1:] / np.maximum(union[1:, 1:], 1) > 0.5).sum())
    return 2 * matched / max(1, objects + number)


def window_seconds(predictor: Predictor, folders: Folders) -> float:
    """Seconds an image by one window a pixel, the paper's way, on the first unseen image."""
    image = read_image(sorted(folders.images.iterdir())[0]).array.astype(np.float32)
    border = predictor.engine.network.context_vox
    padded = np.pad(image, [(0, 0), (border, border), (border, border)], mode="reflect")
    started = time.perf_counter()
    with torch.inference_mode():
        predictor.engine.network.forward_windows(torch.from_numpy(padded)[None])  # type: ignore[operator]
    return time.perf_counter() - started


def _processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
