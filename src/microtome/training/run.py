"""A Dataset and a Plan -> a run folder: model, checkpoints, log, validation, scores, report."""

import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from microtome.bundle import Bundle, load_bundle, save_bundle
from microtome.config import Plan, dump_yaml, load_yaml, parse_config
from microtome.data.dataset import Dataset
from microtome.data.planes import plane_name
from microtome.data.split import leaks, split_dataset
from microtome.errors import ConfigError, DataError, RunError
from microtome.evaluation.report import build_report
from microtome.files import write_json, write_text
from microtome.geometry import format_shape
from microtome.inference.devices import pick_device, to_device
from microtome.inference.predictor import Predictor
from microtome.inference.restore import arrays_of
from microtome.inference.torch_engine import trained_engine
from microtome.machine import recycle_memory
from microtome.models.network import Network
from microtome.models.registry import build
from microtome.plan import step_bytes
from microtome.training.checkpoint import TrainState, load_checkpoint, new_state, save_checkpoint
from microtome.training.clock import Clock
from microtome.training.completion import complete_model
from microtome.training.loop import Event, Hooks, train_steps, validate_now
from microtome.training.rehearsal import free_memory
from microtome.training.store import store_cases
from microtome.training.validation import Validation
from microtome.training.warp import compiled

# Share of the minutes kept for the end before the first validation has shown what one case takes.
FIRST_RESERVE = 0.06
# Of the report, and of samples and graph for other engines.
REPORT_SECONDS = 12.0
# The end may not take more than this; where all validation cases take longer, some are scored.
MOST_RESERVE = 0.25
# A run that has less left when it could begin to train would be no training.
LEAST_TRAINING = 0.05


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
        plan: as `make_plan` returns it, or `read_plan`; to resume, that of `out`, which may be changed: it is written there.
        out: the run folder; must be new or empty, unless `resume`.
        device: "auto", "cpu", "cuda".
        resume: go on from the last checkpoint in `out`.
        on_event: sees each line of `log.jsonl` as it is written.
        started: `time.perf_counter()` from which the minutes count; None: now.

    Raises:
        ConfigError: `out` holds another run, or nothing to resume.
        RunError: the loss is not finite, the disk is full, the minutes are too few to train in, somebody stopped the
            run; what was saved is good.
    """
    recycle_memory()
    began = time.perf_counter() if started is None else started
    check_folder(Path(out), resume=resume)
    session = _Session(dataset, plan, Path(out), device, on_event)
    session.started = began
    session.open(resume)
    if session.state.progress.step >= session.state.progress.steps:
        on_event({"event": "complete", "step": session.state.progress.step})
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
    if dataset.channel_names and len(dataset.channel_names) != plan.channels:
        got = f"{len(dataset.channel_names)}"
        raise ConfigError(dataset.root, expected=f"{plan.channels} channels as in the plan", got=got, do="plan anew for this data")


def _check_patch(network: Network, plan: Plan) -> None:
    """Refuse a patch that the network cannot take, before any image is prepared for it."""
    for axis, size in enumerate(plan.patch_vox):
        if not network.valid_size(size, axis):
            near = " or ".join(map(str, sorted(set(network.nearest_sizes(size, axis)))))
            raise ConfigError(
                "patch_vox", expected=f"{near} along axis {axis} for {plan.network.name}", got=str(size), do="change the plan"
            )


def _check_memory(plan: Plan, device: torch.device) -> None:
    """Refuse a plan that would fill the memory and be ended by the system, without a word, in its first step."""
    free = free_memory(device)
    needed = step_bytes(plan)
    if needed > free:
        got = f"about {needed / 2**30:.1f} GB for {plan.batch} patches of {format_shape(plan.patch_vox)}"
        do = "make micro_batch, batch or patch_vox smaller, or set checkpointing: true"
        raise ConfigError("plan", expected=f"at most the {free / 2**30:.1f} GB that are free", got=got, do=do)


class _Session:
    """One process's work on a run folder."""

    def __init__(self, dataset: Dataset, plan: Plan, folder: Path, device: str, on_event: Callable[[Event], None]) -> None:
        self.dataset, self.plan, self.folder, self.on_event = dataset, plan, folder, on_event
        self.device = pick_device(device)
        self.started = time.perf_counter()
        _check_plan(dataset, plan)
        self.split = split_dataset(dataset, plan.fold, plan.seed, plan.holdout)
        self.leaks = leaks(self.split)
        self.validation = Validation(dataset=dataset, cases=self.split.validation, plan=plan, device=self.device, folder=folder)
        self.clock, self.seconds_before = Clock(), 0.0
        torch.manual_seed(plan.seed)
        network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
        _check_patch(network, plan)
        _check_memory(plan, self.device)
        self.state = new_state(to_device(network, self.device, plan.dims), plan)
        self.hooks = Hooks(log=self.log, validate=self.validation.score, save=self.save, seconds_left=self.seconds_left)

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
        for finding in self.leaks:
            self.on_event({"event": "finding", "step": 0, "severity": finding.severity, "message": finding.message})
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
        finished = self._is_finished()
        if self.plan.minutes is None:
            progress.steps = max(self.plan.steps, progress.step)
        elif progress.step and not finished and (left := self.seconds_left()) is not None:
            # What the steps took before tells how many fit into what is left, or into minutes that were added.
            progress.steps = progress.step + max(0, int(left * progress.step / progress.seconds))
        progress.next_validation = min(max(progress.next_validation, progress.step + 1), max(progress.steps, 1))
        # The log first: were the plan with more minutes there beside an end, the run would be taken for finished.
        self._shorten_log(ended=finished and progress.step >= progress.steps)
        write_text(self.folder / "plan.yaml", dump_yaml(self.plan))

    def _shorten_log(self, *, ended: bool) -> None:
        """Take out lines after the checkpoint, whose steps are made again, and the end of a run that goes on."""
        log = self.folder / "log.jsonl"
        if log.exists():
            events = [(line, _event(line)) for line in log.read_text(encoding="utf-8").splitlines()]
            kept = [line for line, (kind, step) in events if step <= self.state.progress.step and (ended or kind != "end")]
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
        held_out = before.get("held_out", self._held_out())
        if held_out != self._held_out():
            expected, do = f"the held-out slices {held_out}", "bring the annotation back, or start a new run"
            raise ConfigError(path, expected=expected, got=str(self._held_out()), do=do)

    def _held_out(self) -> dict[str, list[str]]:
        """The planes of each case that it trains without."""
        return {case.name: [plane_name(plane) for plane in case.planes.hidden] for case in self.split.train if case.planes}

    def _describe(self) -> None:
        """Write what the run is about before it begins."""
        write_text(self.folder / "plan.yaml", dump_yaml(self.plan))
        document = {
            "root": str(self.dataset.root),
            "layout": self.dataset.layout,
            "legend": self.dataset.legend.to_json(),
            "train": [case.name for case in self.split.train],
            "validation": [case.name for case in self.split.validation],
            "held_out": self._held_out(),
            "findings": [
                {"severity": f.severity, "code": f.code, "case": f.case, "message": f.message, "files": [str(p) for p in f.files]}
                for f in (*self.dataset.findings, *self.leaks)
            ],
        }
        write_json(self.folder / "dataset.json", document)

    def train(self) -> None:
        """All steps that are left."""
        if self.state.progress.step >= self.state.progress.steps:
            return
        before = self.seconds_left()

        def on_case(done: int, of: int) -> None:
            self.on_event({"event": "prepared", "step": 0, "done": done, "of": of})

        cases = store_cases(self.dataset, self.split.train, self.plan, self.folder / "cache", on_case)
        if not cases:
            raise DataError(
                self.dataset.root, expected="annotated voxels to learn from", got="none", do="run `microtome inspect` on the folder"
            )
        self._check_minutes(before, len(cases))
        self.clock = train_steps(self.state, cases, self.plan, self.device, self.hooks)

    def _check_minutes(self, before: float | None, cases: int) -> None:
        """Refuse to begin a training that would be over at once because preparing the cases took its time."""
        minutes, left = self.plan.minutes, self.seconds_left()
        if minutes is None or before is None or left is None or self.state.progress.step:
            return
        least = LEAST_TRAINING * minutes * 60
        if left < least <= before:
            raise RunError(
                self.folder,
                expected=f"at least {LEAST_TRAINING:.0%} of {minutes:g} minutes left to train in",
                got=f"{max(0.0, left):.0f} s, as preparing {cases} cases took {(before - left) / 60:.2g} minutes",
                do="give more --minutes with --resume; what was prepared is kept",
            )

    def finish(self) -> None:
        """Predict the validation cases with the best weights, score them, write the report, remove what only training needed."""
        progress, subset, temperature = self.state.progress, None, 1.0
        if progress.best is None:
            # The minutes were over before the first validation, and the process was gone.
            self.save(self.state, validate_now(self.state, self.hooks))
        if self.split.validation:
            # Not whatever engine is fastest here: a score is of the trained network in the arithmetic that it was trained in.
            bundle = load_bundle(self.folder)
            predictor = Predictor(bundle, device=self.device.type, engine=trained_engine(bundle, self.device))
            metrics = self.validation.score_all(predictor, self._seconds_for_end(), self.on_event)
            if metrics:
                write_json(self.folder / "metrics.json", metrics)
                subset = metrics["conventions"].get("validation_subset")
                temperature = metrics.get("calibration", {}).get("temperature", 1.0)
        # After the scores, which it must not cost.
        if problem := complete_model(self.folder, self.dataset, self.split.train, temperature):
            self.on_event({"event": "finding", "step": progress.step, "severity": "warning", "message": problem})
        reason = "the minutes are over" if self.plan.minutes else "all steps are done"
        if self.plan.minutes and progress.step < self.plan.steps / 2:
            reason = f"the minutes were over after {progress.step} of {self.plan.steps} planned steps: give more, or an idler machine"
        share = round(self.clock.network_seconds / max(1e-9, time.perf_counter() - self.started), 4)
        said = {"validation_subset": subset} if subset else {}
        self.log({"event": "end", "step": progress.step, "reason": reason, "network_share": share, **said})
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
            network = state.average
            bundle = Bundle(
                plan=self.plan,
                legend=self.dataset.legend,
                weights=arrays_of(network.state_dict()),
                sizes=network.sizes,
                context_vox=network.context_vox,
                provenance=provenance,
            )
            save_bundle(self.folder / "model", bundle)
        state.progress.seconds = self.seconds()
        save_checkpoint(self.checkpoint, state)

    def seconds_left(self) -> float | None:
        """Seconds until training must end, so that the last prediction and the report fit into the minutes."""
        if self.plan.minutes is None:
            return None
        total, case_seconds = self.plan.minutes * 60, self.state.progress.case_seconds
        reserve = FIRST_RESERVE * total
        if case_seconds is not None:
            reserve = min(1.5 * case_seconds * len(self.split.validation) + self._report_seconds(total), MOST_RESERVE * total)
        return total - self.seconds() - reserve

    def _seconds_for_end(self) -> float:
        """Seconds that the last prediction may take: its share of the minutes, or more where more are left."""
        if self.plan.minutes is None:
            return math.inf
        total = self.plan.minutes * 60
        return max(MOST_RESERVE * total, total - self.seconds()) - self._report_seconds(total)

    @staticmethod
    def _report_seconds(total: float) -> float:
        """What the report may take of so many seconds."""
        return min(REPORT_SECONDS, FIRST_RESERVE * total)


def environment(device: torch.device) -> dict[str, str | int | bool]:
    """What a person needs to know to run this again."""
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "compiled_warp": compiled(),
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


def _event(line: str) -> tuple[str, float]:
    """Kind and step of a log line; the step is infinite for a line that was cut off."""
    try:
        event = json.loads(line)
        return str(event["event"]), float(event["step"])
    except (ValueError, KeyError, TypeError):
        return "", math.inf
