"""The training loop."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.config import Plan
from microtome.errors import RunError
from microtome.inference.devices import arithmetic
from microtome.training.checkpoint import Progress, TrainState
from microtome.training.losses import segmentation_loss
from microtome.training.sampling import Batches
from microtome.training.store import StoredCase

Event = Mapping[str, Any]
SECONDS_BETWEEN_CHECKPOINTS = 120.0
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
    """

    log: Callable[[Event], None]
    validate: Callable[[TrainState], dict[str, Any]]
    save: Callable[[TrainState, bool], None]
    seconds_left: Callable[[], float | None]


def train_steps(state: TrainState, cases: Sequence[StoredCase], plan: Plan, device: torch.device, hooks: Hooks) -> "Clock":
    """Train from where `state` is to the end of its schedule; returns where the time went.

    Raises:
        RunError: the loss is not finite, or somebody stopped the run; the last checkpoint, if there is one, is good.
    """
    progress, clock, saved = state.progress, Clock(), state.progress.step
    parameters = list(state.network.parameters())
    border = getattr(state.network, "context_vox", 0)
    state.network.train()
    with Batches(cases, plan, device, border) as batches, stop_requests() as stopped:
        while progress.step < progress.steps:
            rate = learning_rate(progress.step, progress.steps, plan)
            for group in state.optimiser.param_groups:
                group["lr"] = rate
            # Dropout too is a function of the step alone.
            torch.manual_seed(plan.seed * 1_000_003 + progress.step)
            batch = batches.get(progress.step)

            with clock.network():
                with arithmetic(device, plan.precision):
                    outputs = state.network(batch.image)
                outputs = outputs if isinstance(outputs, list) else [outputs]
                weight_BS = None if batch.weight is None else crop_border(batch.weight, border)
                loss = segmentation_loss(outputs, crop_border(batch.label, border), plan.loss, weight_BS)
                loss.backward()  # type: ignore[no-untyped-call]
                length = torch.nn.utils.clip_grad_norm_(parameters, plan.optimiser.clip_norm or math.inf)
                # On a GPU this is the one point of a step at which the processor waits for it.
                value, slope = torch.stack([loss.detach(), length]).tolist()
                check_finite(value, slope, progress.step, saved)
                state.optimiser.step()
                state.optimiser.zero_grad(set_to_none=True)
                update_average(state, plan)

            progress.step += 1
            seconds = clock.step_done()
            hooks.log(
                {"event": "step", "step": progress.step, "loss": value, "learning_rate": rate, "samples_per_second": plan.batch / seconds}
            )

            left = hooks.seconds_left()
            if left is not None and left <= 0:
                progress.steps = progress.step
            # The last step is validated even if somebody stops the run there: nothing would do it after --resume.
            if progress.step == progress.steps or (progress.step >= progress.next_validation and not stopped()):
                is_best = validate_now(state, hooks)
                reschedule(progress, plan, clock, hooks, clock.since_step())
                hooks.save(state, is_best)
                clock.saved()
                saved = progress.step
            elif left is not None and is_early_fit(progress.step) and not stopped():
                reschedule(progress, plan, clock, hooks, 0.0)
            elif stopped() or clock.since_save() > SECONDS_BETWEEN_CHECKPOINTS:
                hooks.save(state, False)
                clock.saved()
                saved = progress.step
            if stopped():
                raise RunError(
                    f"step {progress.step}", expected=f"{progress.steps} steps", got="a request to stop", do="continue with --resume"
                )
    return clock


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
    with torch.no_grad():
        for average, current in zip(state.average.state_dict().values(), state.network.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(current, 1 / span)
            else:
                average.copy_(current)


def is_early_fit(step: int) -> bool:
    """Whether the schedule is fitted before any validation: the rehearsal may have met a busier or idler machine."""
    return step in (20, 60)


def reschedule(progress: Progress, plan: Plan, clock: "Clock", hooks: Hooks, validation_seconds: float) -> None:
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


def crop_border(label_BS: Tensor, border: int) -> Tensor:
    """Labels of the middle that a network without padding answers for."""
    if border == 0:
        return label_BS
    return label_BS[(slice(None), *[slice(border, -border)] * (label_BS.dim() - 1))]


def check_finite(loss: float, slope: float, step: int, saved: int) -> None:
    """Stop before a loss that is no number, or a gradient of such a length, reaches the weights.

    Args:
        loss: of the step.
        slope: length of its gradient.
        step: steps done before it.
        saved: the step of the last checkpoint; 0: there is none.
    """
    if not (math.isfinite(loss) and math.isfinite(slope)):
        kept = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
        raise RunError(
            f"step {step + 1}",
            expected="a finite loss and gradient",
            got=f"a loss of {loss} with a gradient of length {slope}",
            do=f"{kept}: change plan.yaml first, as an unchanged plan ends here again "
            "(lower optimiser.learning_rate, or set precision: fp32), then --resume",
        )


class Clock:
    """Where wall time goes."""

    def __init__(self) -> None:
        self.start = self.last = self.last_save = time.perf_counter()
        self.network_seconds = 0.0
        self.step_seconds: list[float] = []

    @contextmanager
    def network(self) -> Iterator[None]:
        """Counts its body as forward + backward + optimiser step."""
        begin = time.perf_counter()
        yield
        self.network_seconds += time.perf_counter() - begin

    def step_done(self) -> float:
        """Seconds since the last step ended, or since `since_step` was asked."""
        now = time.perf_counter()
        self.step_seconds.append(now - self.last)
        self.last = now
        return self.step_seconds[-1]

    def since_step(self) -> float:
        """Seconds of what came after a step, which are then not counted to the next one."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def seconds_a_step(self) -> float:
        """Mean of the latest steps: what the next ones will take if the machine stays as busy as it is."""
        latest = self.step_seconds[-50:]
        return sum(latest) / len(latest)

    def saved(self) -> None:
        """A checkpoint was written now."""
        self.last_save = time.perf_counter()

    def since_save(self) -> float:
        """Seconds since the last checkpoint."""
        return time.perf_counter() - self.last_save


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C or SIGTERM came; the step then ends and the state is saved.

    A second Ctrl-C leaves at once, as Python does by itself. Only the main thread can listen to signals; one that is
    handled by a program around this one, outside of Python, is left to it: its handler could not be put back.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def on_signal(number: int, _: object) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler)

    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, on_signal) for number in ours}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
