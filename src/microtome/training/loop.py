"""The training loop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.config import Plan
from microtome.errors import MicrotomeError, RunError
from microtome.machine import is_short_of_memory
from microtome.training.checkpoint import Progress, TrainState, has_checkpoint
from microtome.training.clock import Clock, stop_requests, stopped_at
from microtome.training.compiled import fast_kernels
from microtome.training.feeding import Batch, Batches
from microtome.training.gradients import Gradients
from microtome.training.ranks import ALONE, Ranks, positions, seed_of_step
from microtome.training.store import StoredCase

Event = Mapping[str, Any]
SECONDS_BETWEEN_CHECKPOINTS = 120.0
# Steps on a GPU between two readings of losses: each reading waits for it, and leaves it idle until the next step is queued.
STEPS_BETWEEN_READINGS = 10
# Share of the time left that validations may take, but for the last one.
MOST_VALIDATING = 0.2


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls; everything that knows files or terminals is behind these.

    Attributes:
        log: takes each event (a step, a validation, a new schedule).
        validate: predicts validation cases with `state.average`; returns "score" and what else is to be logged.
        save: writes the checkpoint; with True also the model, as the best so far.
        seconds_left: seconds that steps and validations may still take; None: no limit.
        replan: takes the plan by which the run goes on where memory was too short for it as it was.
    """

    log: Callable[[Event], None]
    validate: Callable[[TrainState], dict[str, Any]]
    save: Callable[[TrainState, bool], None]
    seconds_left: Callable[[], float | None]
    replan: Callable[[Plan], None] = lambda plan: None


def train_steps(
    state: TrainState,
    cases: Sequence[StoredCase],
    plan: Plan,
    device: torch.device,
    hooks: Hooks,
    *,
    ranks: Ranks = ALONE,
    read_every: int | None = None,
) -> Clock:
    """Train from where `state` is to the end of its schedule; returns where the time went.

    Losses are read from the device every `read_every` steps, and before anything is validated, saved or fitted to the time left:
    a loss or gradient that is not finite ends the run there. On a CPU (each step is read) that is before it reaches the weights;
    on a GPU steps that were queued before the reading may follow it, but their weights are never scored, saved or returned.

    Args:
        state: moved in place.
        cases: to draw patches from.
        plan: of the run; its number of steps is that of `state`.
        device: where the network of `state` is.
        hooks: what to call.
        ranks: the processes that train together; each calls this with the same state and plan.
        read_every: None: 1 on a CPU, where reading costs nothing, else STEPS_BETWEEN_READINGS.

    Raises:
        RunError: the loss is not finite, memory is too short for one patch, or somebody stopped the run (StoppedError); the last
            checkpoint, if there is one, is good.
    """
    progress, clock, saved = state.progress, Clock(), state.progress.step
    losses = Losses(plan.batch, clock, hooks, read_every or (1 if device.type == "cpu" else STEPS_BETWEEN_READINGS))
    parameters = list(state.network.parameters())
    border = state.network.context_vox
    left = ranks.first(hooks.seconds_left())
    adding = Gradients(state.network, plan, device, left, on_smaller=partial(memory_was_short, hooks, progress), ranks=ranks)
    state.network.train()
    feeding = Batches(cases, plan, device, border, positions=positions(plan, ranks))

    def again() -> Batch:
        feeding.move(positions(adding.plan, ranks))
        return answered(feeding.get(progress.step), border)

    with fast_kernels(device), feeding as batches, adding as add_gradients, stop_requests() as stopped:
        while progress.step < progress.steps:
            rate = learning_rate(progress.step, progress.steps, plan)
            for group in state.optimiser.param_groups:
                group["lr"] = rate
            # Dropout too is a function of the step alone.
            torch.manual_seed(seed_of_step(plan.seed, progress.step, ranks.rank))
            batch = answered(made(batches, progress.step, hooks), border)

            with clock.network():
                loss = add_gradients(batch, again)
                length = torch.nn.utils.clip_grad_norm_(parameters, plan.optimiser.clip_norm or math.inf)
                losses.add(loss, length, progress.step, rate)
                if losses.are_due():
                    losses.read(saved)
                state.optimiser.step()
                state.optimiser.zero_grad(set_to_none=True)
                update_average(state, plan)

            progress.step += 1
            losses.log()

            asked, left, unsaved = ranks.any(stopped()), ranks.first(hooks.seconds_left()), ranks.first(clock.since_save())
            if left is not None and left <= 0:
                progress.steps = progress.step
            # The last step is validated even if somebody stops the run there: nothing would do it after --resume.
            validating = progress.step == progress.steps or (progress.step >= progress.next_validation and not asked)
            fitting = not validating and left is not None and is_early_fit(progress.step) and not asked
            saving = not (validating or fitting) and (asked or unsaved > SECONDS_BETWEEN_CHECKPOINTS)
            if validating or fitting or saving:
                losses.read(saved)
                losses.log()
            is_best = validating and validate_now(state, hooks)
            if validating or fitting:
                reschedule(progress, plan, clock, hooks, clock.since_step() if validating else 0.0)
                ranks.follow(progress)
            if validating or saving:
                hooks.save(state, is_best)
                clock.saved()
                saved = progress.step
            # A request that came since this was asked waits for the end of the next step: what is unsaved would be lost.
            if (validating or saving) and ranks.any(stopped()):
                raise stopped_at(progress.step, progress.steps)
    return clock


class Losses:
    """The losses and the lengths of gradients of the last steps, which the device may not have computed yet.

    Args:
        batch: patches a step.
        clock: tells what the steps took.
        hooks: take the events.
        every: steps after which they are due to be read.
    """

    def __init__(self, batch: int, clock: Clock, hooks: Hooks, every: int) -> None:
        self.batch, self.clock, self.hooks, self.every = batch, clock, hooks, every
        self.unread: list[tuple[Tensor, dict[str, Any]]] = []
        self.known: list[dict[str, Any]] = []

    def add(self, loss: Tensor, length: Tensor, step: int, rate: float) -> None:
        """Take the loss and the length of the gradient of the step after `step` others."""
        self.unread.append((torch.stack([loss, length]), {"event": "step", "step": step + 1, "loss": math.nan, "learning_rate": rate}))

    def are_due(self) -> bool:
        """Whether as many steps as may be are unread."""
        return len(self.unread) >= self.every

    def read(self, saved: int) -> None:
        """Wait for the device and take over all numbers; `saved` is the step of the last checkpoint.

        Raises:
            RunError: one is not finite: the first such step is named, and the steps before it are logged.
        """
        values = torch.stack([pair for pair, _ in self.unread]).tolist() if self.unread else []
        events, self.unread = [event for _, event in self.unread], []
        for event, (loss, slope) in zip(events, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(slope)):
                self.log()
                raise not_finite(loss, slope, event["step"], saved)
            self.known.append({**event, "loss": loss})

    def log(self) -> None:
        """Log the steps that were read, in order, each with the mean speed of those that were read together."""
        if self.known:
            speed = self.batch / self.clock.steps_done(len(self.known))
            events, self.known = self.known, []
            for event in events:
                self.hooks.log({**event, "samples_per_second": speed})


def made(batches: Batches, step: int, hooks: Hooks) -> Batch:
    """The batch of a step; where memory is too short for it, made a second time, which changes no bit of it.

    Raises:
        Exception: whatever went wrong with a sample; of memory the second time.
    """
    try:
        return batches.get(step)
    except Exception as error:  # libraries have no common class for it; what else it is goes on
        if not is_short_of_memory(error):
            raise
        said = " ".join(str(error).split())[:160] or "no more memory"
    # Only here is memory given back: the error held the frames in which patches were made.
    hooks.log({"event": "memory", "step": step, "message": f"memory ran out ({said}) while patches were made: they are made again"})
    return batches.get_again(step)


def memory_was_short(hooks: Hooks, progress: Progress, plan: Plan, line: str) -> None:
    """The run goes on by a plan that takes less memory: noted, and said."""
    hooks.replan(plan)
    hooks.log({"event": "memory", "step": progress.step, "message": line})


def validate_now(state: TrainState, hooks: Hooks) -> bool:
    """Score the averaged weights and note the score; whether it is the best so far, or as good."""
    progress, result = state.progress, hooks.validate(state)
    is_best = progress.best is None or result["score"] >= progress.best
    if is_best:
        progress.best, progress.best_step = result["score"], progress.step
    hooks.log({"event": "validation", "step": progress.step, **result})
    progress.validations += 1
    return bool(is_best)


def learning_rate(step: int, steps: int, plan: Plan) -> float:
    """Rises from 0 over `plan.warmup` steps, then falls to the end as the schedule says.

    cosine: half a cosine to 0; poly: (1 - share)^power; steps: divided by 10 after each share of `decay_at`.
    """
    config = plan.optimiser
    # Of the planned steps: a schedule that is fitted anew must not move the rate back and forth.
    warmup = min(plan.warmup, plan.steps // 4)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    factors = {
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "poly": (1 - share) ** config.power,
        "steps": 0.1 ** sum(share >= place for place in config.decay_at),
        "constant": 1.0,
    }
    return config.learning_rate * float(factors[config.schedule])


def update_average(state: TrainState, plan: Plan) -> None:
    """Move the averaged weights towards the current ones; the average spans `averaging` of the steps done so far.

    A span that grows with the run forgets the first, bad weights without a constant to be tuned to its length.
    """
    span = max(1.0, plan.optimiser.averaging * state.progress.step)
    averages, currents = list(state.average.state_dict().values()), list(state.network.state_dict().values())
    with torch.no_grad():
        # All tensors in one call: on a GPU each would be a kernel of its own.
        means, values = ([t for t in tensors if t.is_floating_point()] for tensors in (averages, currents))
        torch._foreach_lerp_(means, values, 1 / span)
        for average, current in zip(averages, currents, strict=True):
            if not average.is_floating_point():
                average.copy_(current)


def is_early_fit(step: int) -> bool:
    """Whether the schedule is fitted before any validation: the rehearsal may have met a busier or idler machine."""
    return step in (20, 60)


def reschedule(progress: Progress, plan: Plan, clock: Clock, hooks: Hooks, validation_seconds: float) -> None:
    """Fit the steps to the time left, if time is limited, and spread the validations to come over them."""
    to_come = max(1, plan.validations - progress.validations)
    left = hooks.seconds_left()
    if left is not None and validation_seconds:
        # Slow networks would spend minutes on being looked at.
        to_come = max(1, min(to_come, int(MOST_VALIDATING * left / validation_seconds)))
    if left is not None and progress.step < progress.steps:
        seconds = max(0.0, left - to_come * validation_seconds)
        progress.steps = progress.step + max(1, int(seconds / clock.seconds_a_step()))
        hooks.log({"event": "schedule", "step": progress.step, "steps": progress.steps})
    progress.next_validation = progress.step + -(-(progress.steps - progress.step) // to_come)


def answered(batch: Batch, border: int) -> Batch:
    """The batch with labels and weights only of the middle that a network without padding answers for."""
    weight_BS = None if batch.weight is None else crop_border(batch.weight, border)
    return batch._replace(label=crop_border(batch.label, border), weight=weight_BS)


def crop_border(label_BS: Tensor, border: int) -> Tensor:
    """Labels of the middle that a network without padding answers for."""
    if border == 0:
        return label_BS
    return label_BS[(slice(None), *[slice(border, -border)] * (label_BS.dim() - 1))]


@contextmanager
def memory_told(folder: Path, checkpoint: Path) -> Iterator[None]:
    """A lack of memory anywhere inside of it is one line for people, of the run in `folder` whose last checkpoint is `checkpoint`.

    Raises:
        RunError: memory ran out.
    """
    try:
        yield
    except Exception as error:  # libraries have no common class for a lack of memory; what else it is goes on
        if isinstance(error, MicrotomeError) or not is_short_of_memory(error):
            raise
        raise memory_ended(folder, error, saved=has_checkpoint(checkpoint)) from error


def memory_ended(folder: Path, error: Exception, *, saved: bool) -> RunError:
    """What to say of memory that was short beside the network: for the optimiser, for patches, for images, for scores.

    What was done of a step is unknown, so nothing of it is kept.

    Args:
        folder: of the run.
        error: what a library said.
        saved: whether there is a checkpoint.
    """
    got = " ".join(str(error).split())[:160] or "no more memory"
    plan, do = folder / "plan.yaml", "close other programs, then give the same command again"
    if plan.exists():
        kept = "the last checkpoint is good" if saved else "no step was saved yet"
        # Not 1: batch norm would take its statistics of single patches.
        do = f"close other programs, or set a smaller micro_batch in {plan}; then the same command with --resume ({kept})"
    return RunError(
        folder,
        expected="memory for all that a training does beside its network",
        got=got,
        do=do,
        code="R125",
    )


def not_finite(loss: float, slope: float, step: int, saved: int) -> RunError:
    """What to say of a loss that is no number, or of a gradient of such a length.

    Args:
        loss: of the step.
        slope: length of its gradient.
        step: its number, from 1.
        saved: the step of the last checkpoint; 0: there is none.
    """
    kept = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
    return RunError(
        f"step {step}",
        expected="a finite loss and gradient",
        got=f"a loss of {loss} with a gradient of length {slope}",
        do="change plan.yaml first, as an unchanged plan ends here again (lower optimiser.learning_rate, or set precision: fp32), "
        f"then --resume; {kept}",
        code="R003",
    )
