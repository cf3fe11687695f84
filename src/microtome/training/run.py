"""A Dataset and a Plan -> a run folder: model, checkpoints, log, validation, scores, report."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from microtome.bundle import Bundle, load_bundle, save_bundle
from microtome.config import Plan
from microtome.data.dataset import Dataset
from microtome.data.split import cut_case, leaks, split_dataset
from microtome.errors import ConfigError, DataError, LeftAtOnceError, RunError
from microtome.evaluation.report import build_report
from microtome.files import remove_folder, write_json
from microtome.inference.devices import pick_device, to_device
from microtome.inference.predictor import Predictor
from microtome.inference.restore import arrays_of
from microtome.inference.torch_engine import trained_engine
from microtome.lock import run_lock
from microtome.machine import recycle_memory
from microtome.models.registry import build
from microtome.training.checkpoint import TrainState, digest, has_checkpoint, load_latest, new_state, previous_checkpoint, save_checkpoint
from microtome.training.clock import Clock, stopped_at
from microtome.training.completion import complete_model
from microtome.training.deterministic import same_bits
from microtome.training.folder import RunFolder, check_folder, environment
from microtome.training.initial import FILE, Start, Weights, begin_with, keep_initial, kept_initial
from microtome.training.loop import Event, Hooks, memory_told, train_steps, validate_now
from microtome.training.provenance import origin
from microtome.training.ranks import ALONE, Ranks
from microtome.training.refusals import check_memory, check_patch, check_plan
from microtome.training.store import store_cases
from microtome.training.validation import Validation

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
    start: Start = Start(),  # noqa: B008 - frozen
    ranks: Ranks = ALONE,
) -> Path:
    """Train, validate, keep the best, write the report; returns the run folder.

    Args:
        dataset: as `open_dataset` returns it.
        plan: as `make_plan` returns it, or `read_plan`; to resume, that of `out`, which may be changed: it is written there.
        out: the run folder; must be new or empty, unless `resume`.
        device: "auto", "cpu", "cuda".
        resume: go on from the last checkpoint in `out`.
        on_event: sees each line of `log.jsonl` as it is written.
        start: from when the minutes count, weights to begin with (a run that is resumed has a copy), whether bits must be the same.
        ranks: the processes that train together (`processes.joined`), each of which calls this; the first one writes `out`.

    Raises:
        ConfigError: `out` holds another run, or nothing to resume.
        DataError: weights to begin with fit nowhere.
        RunError: the loss is not finite, the disk is full, the minutes are too few to train in, another process uses `out`, memory ran out,
            somebody stopped the run (StoppedError); what was saved is good.
        LeftAtOnceError: somebody asked twice; KeyboardInterrupt where it was by Ctrl-C.
    """
    recycle_memory()
    began = time.perf_counter() if start.clock is None else start.clock
    if ranks.is_first:
        check_folder(Path(out), resume=resume)
    same = same_bits(pick_device(ranks.device(device)), wanted=start.deterministic)
    with same, run_lock(Path(out)) if ranks.is_first else nullcontext() as killed, memory_told(Path(out), RunFolder(Path(out)).checkpoint):
        initial = kept_initial(Path(out) / FILE) if resume else start.weights
        session = _Session(dataset, plan, Path(out), ranks.device(device), on_event, initial=initial, ranks=ranks)
        session.started = began
        session.open(resume)
        if killed is not None:
            session.warn(f"{killed.words} was ended in the middle; the run goes on from what it saved")
        if session.state.progress.step >= session.state.progress.steps:
            session.on_event({"event": "complete", "step": session.state.progress.step})
        try:
            session.train()
            session.finish()
        except LeftAtOnceError:
            raise
        except SystemExit as error:
            # Of a request to stop that came beside the steps: what was prepared and saved is kept.
            raise stopped_at(session.state.progress.step, session.state.progress.steps) from error
    return session.folder


class _Session:
    """One process's work on a run folder."""

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        folder: Path,
        device: str,
        on_event: Callable[[Event], None],
        *,
        initial: Weights | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.dataset, self.plan, self.folder, self.ranks = dataset, plan, folder, ranks
        self.on_event = on_event if ranks.is_first else lambda event: None
        self.files = RunFolder(folder)
        self.device = pick_device(device)
        self.started = time.perf_counter()
        check_plan(dataset, plan)
        self.split = split_dataset(dataset, plan.fold, plan.seed, plan.holdout)
        self.split_findings = [*leaks(self.split), *cut_case(self.split, dataset)]
        self.validation = Validation(
            dataset=dataset, cases=self.split.validation, plan=plan, device=self.device, folder=folder, ranks=ranks
        )
        self.clock, self.seconds_before = Clock(), 0.0
        # Of a run that is resumed with other files: fingerprints of those that it began with, by part.
        self.begun_with: dict[str, str] = {}
        torch.manual_seed(plan.seed)
        network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
        check_patch(network, plan)
        check_memory(plan, self.device, ranks)
        self.initial = begin_with(network, initial)
        self.state = new_state(to_device(network, self.device, plan.dims), plan)
        self.hooks = Hooks(log=self.log, validate=self.validation.score, save=self.save, seconds_left=self.seconds_left, replan=self.replan)

    def seconds(self) -> float:
        """Wall time of the run so far, over all its processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def open(self, resume: bool) -> None:
        """Make the folder, or take it up where it was left; one process does, the others then take what it has."""
        if self.ranks.is_first:
            self._open(resume)
        self.ranks.wait()
        if not self.ranks.is_first and has_checkpoint(self.files.checkpoint):
            load_latest(self.files.checkpoint, self.state)
        self.ranks.follow(self.state.progress)
        self.ranks.refuse_others(lambda: digest(self.state), self.folder)

    def _open(self, resume: bool) -> None:
        """Make the folder, or take it up where it was left."""
        self.files.sweep()
        if resume:
            self._resume()
        else:
            keep_initial(self.folder / FILE, self.state.network, self.initial)
            if self.initial is not None:
                self.on_event({"event": "finding", "step": 0, "severity": "note", "message": f"begins with {self.initial.record['words']}"})
        for finding in self.split_findings:
            self.on_event({"event": "finding", "step": 0, "severity": finding.severity, "message": finding.message})
        if not self.files.is_described():
            self.files.describe(self.dataset, self.plan, self.split, self.split_findings, self._fingerprints)
        write_json(self.folder / "environment.json", environment(self.device))

    def _resume(self) -> None:
        """Bring the state and the log to the last checkpoint; a run killed before its first starts at step 0."""
        changed = self._changed(self.files.check_split(self.split))
        progress = self.state.progress
        if has_checkpoint(self.files.checkpoint):
            if problem := load_latest(self.files.checkpoint, self.state):
                self.warn(problem)
            progress = self.state.progress
            if self.plan.minutes is None and self.plan.steps < progress.step:
                expected, do = f"steps of {progress.step} or more, which are made", "train for fewer steps with another --out"
                raise ConfigError(self.folder / "plan.yaml", expected=expected, got=str(self.plan.steps), do=do, code="C045")
            self.seconds_before = progress.seconds
            self._check_best()
        finished = self.files.is_finished(self.plan)
        if self.plan.minutes is None:
            progress.steps = self.plan.steps
        elif progress.step and not finished and (left := self.seconds_left()) is not None:
            # What the steps took before tells how many fit into what is left, or into minutes that were added.
            progress.steps = progress.step + max(0, int(left * progress.step / progress.seconds))
        progress.next_validation = min(max(progress.next_validation, progress.step + 1), max(progress.steps, 1))
        # The log first: were the plan with more minutes there beside an end, the run would be taken for finished.
        self.files.shorten_log(progress.step, progress.validations, ended=finished and progress.step >= progress.steps)
        self.files.write_plan(self.plan)
        self.begun_with = {**changed, **self.files.changed_before()}
        if changed:
            self.warn(f"{_changed_words(changed)}; put the files back, or train anew with another --out", show=self.log)

    def _changed(self, before: Mapping[str, str]) -> dict[str, str]:
        """The parts whose files are others under the same names: what follows is then no longer the run that was begun."""
        now = self._fingerprints
        return {part: before[part] for part in now if before.get(part, now[part]) != now[part]}

    def _check_best(self) -> None:
        """See that the best that the checkpoint knows is the model; a damaged one would be found when all steps are done."""
        progress = self.state.progress
        try:
            bundle = load_bundle(self.folder)
            # All of them are read, and held to their hash.
            dict(bundle.weights)
        except DataError as error:
            if progress.best is None:
                return
            if progress.best_step == progress.step:
                self._save_model()
                self.warn(f"{error.where}: {error.got}; it is written again")
            else:
                progress.best = None
                self.warn(f"{error.where}: {error.got}; the best of the validations to come takes its place")
            return
        step, score = bundle.provenance.get("step"), bundle.provenance.get("score")
        if not isinstance(step, int) or not isinstance(score, float) or (step, score) == (progress.best_step, progress.best):
            return
        if progress.best is not None and progress.best_step == progress.step and step < progress.step:
            # A kill came between the checkpoint and its model.
            self._save_model()
            return
        # The checkpoint that knew of it is lost: it was scored as any other.
        progress.best, progress.best_step = score, step
        self.warn(f"{bundle.folder}: the model of step {step} is not the best that the checkpoint knows; it counts as the best so far")

    def warn(self, message: str, *, show: Callable[[Event], None] | None = None) -> None:
        """Show what somebody should know; by `log` where it is to be known later too."""
        (show or self.on_event)({"event": "finding", "step": self.state.progress.step, "severity": "warning", "message": message})

    def train(self) -> None:
        """All steps that are left."""
        if self.state.progress.step >= self.state.progress.steps:
            return
        before = self.seconds_left()

        def on_case(done: int, of: int) -> None:
            self.on_event({"event": "prepared", "step": 0, "done": done, "of": of})

        # One process prepares them, the others find them prepared.
        if not self.ranks.is_first:
            self.ranks.wait()
        cases = store_cases(self.dataset, self.split.train, self.plan, self.folder / "cache", on_case)
        if self.ranks.is_first:
            self.ranks.wait()
        if not cases:
            raise DataError(
                self.dataset.root,
                expected="annotated voxels to learn from",
                got="none",
                do="run `microtome inspect` on the folder",
                code="D033",
            )
        self._check_minutes(before, len(cases))
        self.clock = train_steps(self.state, cases, self.plan, self.device, self.hooks, ranks=self.ranks)

    def _check_minutes(self, before: float | None, cases: int) -> None:
        """Refuse to begin a training that would be over at once because preparing the cases took its time."""
        minutes, left = self.plan.minutes, self.seconds_left()
        if not self.ranks.is_first or minutes is None or before is None or left is None or self.state.progress.step:
            return
        least = LEAST_TRAINING * minutes * 60
        if left < least <= before:
            raise RunError(
                self.folder,
                expected=f"at least {LEAST_TRAINING:.0%} of {minutes:g} minutes left to train in",
                got=f"{max(0.0, left):.0f} s, as preparing {cases} cases took {(before - left) / 60:.2g} minutes",
                do="give more --minutes with --resume; what was prepared is kept",
                code="R005",
            )

    def finish(self) -> None:
        """Predict the validation cases with the best weights, score them, write the report, remove what only training needed."""
        progress, subset, temperature = self.state.progress, None, 1.0
        if progress.best is None:
            # The minutes were over before the first validation, and the process was gone.
            self.save(self.state, validate_now(self.state, self.hooks))
        if not self.ranks.is_first:
            return
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
            self.warn(problem)
        reason = "the minutes are over" if self.plan.minutes else "all steps are done"
        if self.plan.minutes and progress.step < self.plan.steps / 2:
            reason = f"the minutes were over after {progress.step} of {self.plan.steps} planned steps: give more, or an idler machine"
        share = round(self.clock.network_seconds / max(1e-9, time.perf_counter() - self.started), 4)
        said = {"validation_subset": subset} if subset else {}
        # A run that was killed between this line and its report says it once.
        say = self.on_event if self.files.has_ended() else self.log
        say({"event": "end", "step": progress.step, "reason": reason, "network_share": share, **said})
        build_report(self.folder, dataset=self.dataset)
        remove_folder(self.folder / "cache")
        with suppress(OSError):
            previous_checkpoint(self.files.checkpoint).unlink()

    def log(self, event: Event) -> None:
        """Add an event to the log, with the seconds of the run, and show it; one process does."""
        if not self.ranks.is_first:
            return
        event = {**event, "seconds": round(self.seconds(), 2)}
        self.files.append(event)
        self.on_event(event)

    def save(self, state: TrainState, is_best: bool) -> None:
        """The log first: a checkpoint never tells of steps that it lacks. The model, if it is the best, last: `_check_best` can make it.

        One process writes; the others go on when it has, so that none ends before all is saved.
        """
        if self.ranks.is_first:
            self._save(state, is_best)
        self.ranks.wait()

    def _save(self, state: TrainState, is_best: bool) -> None:
        """Write log, checkpoint and model."""
        self.files.keep_log()
        # Now it has learned from other files, or was chosen by them; before its first step they could be put back.
        if self.begun_with:
            self.files.note_changed(self.begun_with, _changed_words(self.begun_with))
        state.progress.seconds = self.seconds()
        save_checkpoint(self.files.checkpoint, state)
        if is_best:
            self._save_model()

    def _save_model(self) -> None:
        """Write the averaged weights as the model."""
        state = self.state
        provenance = {"step": state.progress.step, "score": state.progress.best, **self._origin}
        if self.begun_with:
            provenance["data_changed_since"] = dict(self.begun_with)
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

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What stays the same of a model's provenance; label files are read for it, once."""
        begun = {} if self.initial is None else {"initial_weights": dict(self.initial.record)}
        return origin(self.dataset, self.split, self.plan) | begun

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """By which the data of both parts are known again; not of a part with a file that cannot be read just now."""
        found = {"train": self._origin["training_data"], "validation": self._origin["validation_data"]}
        return {part: data["fingerprint"] for part, data in found.items() if not data.get("unreadable")}

    def replan(self, plan: Plan) -> None:
        """Go on by another plan, from now on and after --resume."""
        self.plan = plan
        if self.ranks.is_first:
            self.files.write_plan(plan)

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


def _changed_words(parts: Iterable[str]) -> str:
    """That other files took the place of those that a run began with."""
    words = "` and `".join(parts)
    said = f"images or labels of `{words}` have changed under the same names since the run began: "
    return f"{said}what it learned and scored before is of other data"
