"""A Dataset and a Plan -> a run folder: model, checkpoints, log, validation, scores, report."""

import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome.bundle import Bundle, save_bundle
from microtome.config import Plan, dump_yaml, load_yaml, parse_config
from microtome.data.dataset import Dataset
from microtome.data.split import split_dataset
from microtome.errors import ConfigError, DataError, RunError
from microtome.evaluation.metrics import dice
from microtome.evaluation.report import build_report
from microtome.evaluation.scores import CaseScore, score_case, summarise
from microtome.files import write_json, write_text
from microtome.images.files import label_suffix, write_labels
from microtome.inference.engines import TorchEngine, pick_device, recycle_memory, to_device
from microtome.inference.predict import predict_labels
from microtome.inference.predictor import Predictor, list_prediction, load, safe_name
from microtome.models.registry import build
from microtome.preprocess import voxel_size
from microtome.training.checkpoint import TrainState, load_checkpoint, new_state, save_checkpoint
from microtome.training.loop import Event, Hooks, train_steps
from microtome.training.store import store_cases

# Cases that are predicted at each validation during training; the last one, on the best weights, takes all.
MOST_VALIDATED = 24
# Share of the minutes kept for the end before the first validation has shown what one case takes.
FIRST_RESERVE = 0.06
REPORT_SECONDS = 8.0


def train(
    dataset: Dataset,
    plan: Plan,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    started: float | None = None,
) -> Path:
    """Train, validate, keep the best, write the report; returns the run folder.

    Args:
        dataset: as `open_dataset` returns it.
        plan: as `make_plan` returns it, or `read_plan`.
        out: the run folder; must be new or empty, unless `resume`.
        device: "auto", "cpu", "cuda".
        resume: go on from the last checkpoint in `out`, with the plan that lies there.
        on_event: sees each line of `log.jsonl` as it is written.
        started: `time.perf_counter()` from which the minutes count; None: now.

    Raises:
        ConfigError: `out` holds another run, or nothing to resume.
        RunError: the loss is not finite, the disk is full, somebody stopped the run; what was saved is good.
    """
    recycle_memory()
    began = time.perf_counter() if started is None else started
    check_folder(Path(out), resume=resume)
    session = _Session(dataset, plan, Path(out), device, on_event)
    session.started = began
    session.open(resume)
    session.train()
    session.finish()
    return session.folder


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse, before any work, a folder that holds another run, or one to resume that holds none."""
    if resume and not (folder / "plan.yaml").exists():
        raise ConfigError(folder, expected="a run folder with plan.yaml", got="none", do="check --out, or leave out --resume")
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            folder, expected="a new or empty folder", got="one with files in it", do="give another --out, or --resume to go on"
        )


def read_plan(path: Path) -> Plan:
    """A plan from a YAML file, as `microtome plan --out` writes it and a person may have changed it."""
    return parse_config(Plan, load_yaml(path), path)


def _check_plan(dataset: Dataset, plan: Plan) -> None:
    """Refuse a plan that was made for other data."""
    if plan.classes != dataset.legend.names:
        got = f"a plan for {', '.join(plan.classes)}"
        raise ConfigError(dataset.root, expected=f"the classes {', '.join(dataset.legend.names)}", got=got, do="plan anew for this data")
    axes = {len(header.shape_vox) for header in dataset.headers.values()}
    if axes - {len(plan.spacing_mm)}:
        got = f"images with {sorted(axes)} axes"
        raise ConfigError(dataset.root, expected=f"{len(plan.spacing_mm)} axes as in the plan", got=got, do="plan anew for this data")


class _Session:
    """One process's work on a run folder."""

    def __init__(self, dataset: Dataset, plan: Plan, folder: Path, device: str, on_event: Callable[[Event], None]) -> None:
        self.dataset, self.plan, self.folder, self.on_event = dataset, plan, folder, on_event
        self.device = pick_device(device)
        self.started = time.perf_counter()
        _check_plan(dataset, plan)
        self.split = split_dataset(dataset, plan.fold, plan.seed)
        self.case_seconds: float | None = None
        self.seconds_before = 0.0
        torch.manual_seed(plan.seed)
        network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
        self.state = new_state(to_device(network, self.device, plan.dims), plan)

    @property
    def checkpoint(self) -> Path:
        """The file that holds the whole state."""
        return self.folder / "checkpoints" / "last.safetensors"

    def seconds(self) -> float:
        """Wall time of the run so far, over all its processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def open(self, resume: bool) -> None:
        """Make the folder, or take it up where it was left."""
        if resume:
            self._resume()
        # A run killed between its first files lacks this one.
        if not (self.folder / "dataset.json").exists():
            self._describe()
        write_json(self.folder / "environment.json", environment(self.device))

    def _resume(self) -> None:
        """Bring the state and the log to the last checkpoint; a run killed before its first starts at step 0."""
        self._check_split()
        progress = self.state.progress
        if self.checkpoint.exists():
            load_checkpoint(self.checkpoint, self.state)
            progress = self.state.progress
            self.seconds_before = progress.seconds
        if self.plan.minutes is None:
            progress.steps = max(self.plan.steps, progress.step)
        elif progress.step and not self._is_finished() and (left := self.seconds_left()):
            # What the steps took before tells how many fit into what is left, or into minutes that were added.
            progress.steps = progress.step + max(0, int(left * progress.step / progress.seconds))
        progress.next_validation = min(max(progress.next_validation, progress.step + 1), max(progress.steps, 1))
        write_text(self.folder / "plan.yaml", dump_yaml(self.plan))
        log = self.folder / "log.jsonl"
        if log.exists():
            # Lines after the checkpoint belong to steps that are made again.
            kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= progress.step]
            write_text(log, "".join(line + "\n" for line in kept))

    def _is_finished(self) -> bool:
        """Whether the run came to its end and was not given more minutes since."""
        log = self.folder / "log.jsonl"
        ended = log.exists() and '"event": "end"' in log.read_text(encoding="utf-8")
        return ended and self.plan.minutes == read_plan(self.folder / "plan.yaml").minutes

    def _check_split(self) -> None:
        """Refuse to go on with other cases than the run began with: what it learned from must not become what it is scored on."""
        path = self.folder / "dataset.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for part, cases in (("train", self.split.train), ("validation", self.split.validation)):
            changed = {case.name for case in cases} ^ set(before.get(part, [case.name for case in cases]))
            if changed:
                got = f"{len(changed)} others ({sorted(changed)[0]}, ...)"
                raise ConfigError(path, expected=f"the same cases in `{part}`", got=got, do="bring the data back, or start a new run")

    def _describe(self) -> None:
        """Write what the run is about before it begins."""
        write_text(self.folder / "plan.yaml", dump_yaml(self.plan))
        document = {
            "root": str(self.dataset.root),
            "layout": self.dataset.layout,
            "legend": self.dataset.legend.to_json(),
            "train": [case.name for case in self.split.train],
            "validation": [case.name for case in self.split.validation],
            "findings": [
                {"severity": f.severity, "code": f.code, "case": f.case, "message": f.message, "files": [str(p) for p in f.files]}
                for f in self.dataset.findings
            ],
        }
        write_json(self.folder / "dataset.json", document)

    def train(self) -> None:
        """All steps that are left."""
        cases = store_cases(self.dataset, self.split.train, self.plan, self.folder / "cache")
        if not cases:
            raise DataError(
                self.dataset.root, expected="annotated voxels to learn from", got="none", do="run `microtome inspect` on the folder"
            )
        hooks = Hooks(log=self.log, validate=self.validate, save=self.save, seconds_left=self.seconds_left)
        self.clock = train_steps(self.state, cases, self.plan, self.device, hooks)

    def finish(self) -> None:
        """Predict all validation cases with the best weights, score them, write the report, remove what only training needed."""
        if self.split.validation:
            rows, unknown = self._predict_validation(load(self.folder, device=self.device.type))
            if rows:
                write_json(self.folder / "metrics.json", summarise(rows, self.dataset.legend, in_voxels=unknown))
        progress = self.state.progress
        reason = "the minutes are over" if self.plan.minutes else "all steps are done"
        share = round(self.clock.network_seconds / max(1e-9, time.perf_counter() - self.started), 4)
        self.log({"event": "end", "step": progress.step, "reason": reason, "network_share": share})
        build_report(self.folder, dataset=self.dataset)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def log(self, event: Event) -> None:
        """Append one line to the log."""
        event = {**event, "seconds": round(self.seconds(), 2)}
        try:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            got = str(error.strerror or error)
            raise RunError(
                self.folder / "log.jsonl", expected="a log that can be written", got=got, do="free space, then --resume"
            ) from error
        self.on_event(event)

    def save(self, state: TrainState, is_best: bool) -> None:
        """The model first, if it is the best: a checkpoint never names a best that is not there."""
        if is_best:
            provenance = {"step": state.progress.step, "score": state.progress.best, "data": str(self.dataset.root), **versions()}
            weights = state.average.state_dict()
            save_bundle(self.folder / "model", Bundle(plan=self.plan, legend=self.dataset.legend, weights=weights, provenance=provenance))
        state.progress.seconds = self.seconds()
        save_checkpoint(self.checkpoint, state)

    def seconds_left(self) -> float | None:
        """Seconds until training must end, so that the last prediction and the report fit into the minutes."""
        if self.plan.minutes is None:
            return None
        total = self.plan.minutes * 60
        reserve = FIRST_RESERVE * total
        if self.case_seconds is not None:
            reserve = 1.5 * self.case_seconds * len(self.split.validation) + min(REPORT_SECONDS, FIRST_RESERVE * total)
        return total - self.seconds() - reserve

    def validate(self, state: TrainState) -> dict[str, Any]:
        """Mean Dice of the foreground over some validation cases, predicted whole, as `predict` would."""
        if not self.split.validation:
            return {"score": 0.0, "dice": None, "classes": {}}
        engine = TorchEngine(network=state.average, device=self.device, precision=self.plan.precision)
        count = len(self.split.validation)
        chosen = [self.split.validation[i] for i in np.unique(np.linspace(0, count - 1, min(count, MOST_VALIDATED)).round().astype(int))]
        began, table = time.perf_counter(), []
        for case in chosen:
            image, truth = self.dataset.read_image(case), self.dataset.read_label(case)
            labels = predict_labels(image.array, voxel_size(image, self.plan), plan=self.plan, network=state.average, engine=engine)  # type: ignore[arg-type]
            annotated = truth >= 0
            table.append([dice((truth == k) & annotated, (labels == k) & annotated) for k in range(len(self.plan.classes))])
        self.case_seconds = (time.perf_counter() - began) / len(chosen)
        means = [_mean([row[k] for row in table]) for k in range(len(self.plan.classes))]
        score = _mean([means[k] for k in self.dataset.legend.foreground])
        classes = {name: None if math.isnan(value) else round(value, 5) for name, value in zip(self.plan.classes, means, strict=True)}
        score = 0.0 if math.isnan(score) else score
        return {"score": score, "dice": round(score, 5), "classes": classes}

    def _predict_validation(self, predictor: Predictor) -> tuple[list[CaseScore], list[str]]:
        """Write the predictions of all validation cases; their scores, and the cases whose voxel size is unknown."""
        rows: list[CaseScore] = []
        unknown = []
        out = self.folder / "validation"
        for number, case in enumerate(self.split.validation, start=1):
            image, truth = self.dataset.read_image(case), self.dataset.read_label(case)
            labels = predictor(image)
            path = out / (safe_name(case.name) + label_suffix(image))
            write_labels(path, self.dataset.legend.encode(labels), like=image)
            list_prediction(out, path, case, predictor.bundle)
            if (truth >= 0).any():
                rows += score_case(truth, labels, image.spacing_mm, self.dataset.legend, case=case.name)
            if not image.spacing_known:
                unknown.append(case.name)
            self.on_event({"event": "predicted", "case": case.name, "done": number, "of": len(self.split.validation)})
        return rows, unknown


def environment(device: torch.device) -> dict[str, str | int]:
    """What a person needs to know to run this again."""
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("microtome", "torch", "numpy", "scipy")}}


def _processor() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="ignore").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _step_of(line: str) -> float:
    """The step of a log line; infinite for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
