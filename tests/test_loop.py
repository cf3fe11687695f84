"""The training loop: resumes bit for bit, keeps the best, stops when asked, keeps to the minutes."""

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.config import NetworkConfig, OptimiserConfig, Plan
from microtome.errors import RunError
from microtome.training import clock as clock_module
from microtome.training import gradients, loop
from microtome.training.checkpoint import Progress, TrainState, load_checkpoint, save_checkpoint
from microtome.training.clock import Clock, stop_requests
from microtome.training.loop import Hooks, crop_border, learning_rate, reschedule, train_steps, update_average
from tests.small import one_thread, small_plan, small_plan_3d, squares, stored_case
from tests.test_checkpoint import assert_same, contents, fresh

__all__ = ["one_thread"]

CPU = torch.device("cpu")
CASES = [squares(seed) for seed in range(2)]
UNET = NetworkConfig(name="unet", widths=(4, 8))


class Killed(BaseException):
    """What a kill does to the loop: it goes no further."""


class Recorder:
    """Hooks that note what they are called with, and write checkpoints to a file."""

    def __init__(self, path: Path, scores: Callable[[int], float] = lambda number: 0.5) -> None:
        self.path, self.scores = path, scores
        self.events: list[Mapping[str, Any]] = []
        self.best: list[bool] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self.seconds_left: Callable[[], float | None] = lambda: None

    def log(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == "step":
            self.on_step(event["step"])

    def validate(self, state: TrainState) -> dict[str, Any]:
        assert not state.average.training
        return {"score": self.scores(len(self.best)), "dice": 0.5, "classes": {}}

    def save(self, state: TrainState, is_best: bool) -> None:
        self.best.append(is_best)
        save_checkpoint(self.path, state)

    def hooks(self) -> Hooks:
        return Hooks(log=self.log, validate=self.validate, save=self.save, seconds_left=lambda: self.seconds_left())

    def steps_of(self, kind: str) -> list[int]:
        return [event["step"] for event in self.events if event["event"] == kind]


def straight(plan: Plan, path: Path, cases: list[Any] | None = None) -> tuple[TrainState, Recorder]:
    state, recorder = fresh(plan), Recorder(path)
    train_steps(state, cases or CASES, plan, CPU, recorder.hooks())
    return state, recorder


# ---- resuming ----


@pytest.mark.parametrize(
    "plan",
    [
        small_plan(),
        small_plan(optimiser=OptimiserConfig(name="sgd", learning_rate=0.01)),
        small_plan(network=UNET),
        small_plan(batch=1, precision="bf16"),
        small_plan_3d(),
        small_plan(network=UNET, batch=3, micro_batch=2, checkpointing=True),
    ],
    ids=["adamw", "sgd", "dropout", "bf16", "3D", "micro-batches, computed twice"],
)
def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_as_one_that_was_not(plan: Plan, tmp_path: Path) -> None:
    cases = CASES if plan.dims == 2 else [stored_case(squares(0, 24).label[None].repeat(18, 0))]
    expected, unbroken = straight(plan, tmp_path / "straight.safetensors", cases)
    killed = Recorder(tmp_path / "last.safetensors")

    def kill(step: int) -> None:
        if step == 5:
            raise Killed

    killed.on_step = kill
    with pytest.raises(Killed):
        train_steps(fresh(plan), cases, plan, CPU, killed.hooks())
    # Another process: other initial weights, another state of the global generator.
    torch.manual_seed(12345)
    state = fresh(plan, seed=99)
    load_checkpoint(tmp_path / "last.safetensors", state)
    assert state.progress.step == 3
    resumed = Recorder(tmp_path / "last.safetensors")
    train_steps(state, cases, plan, CPU, resumed.hooks())
    assert resumed.steps_of("step") == [4, 5, 6]
    assert_same(contents(expected), contents(state))
    losses = {event["step"]: event["loss"] for event in unbroken.events if event["event"] == "step"}
    assert [event["loss"] for event in resumed.events if event["event"] == "step"] == [losses[step] for step in (4, 5, 6)]
    assert replace(state.progress, seconds=0) == replace(expected.progress, seconds=0)


def test_two_runs_from_one_seed_are_the_same_and_from_two_are_not(tmp_path: Path) -> None:
    first, again = (straight(small_plan(), tmp_path / "a.safetensors")[0] for _ in range(2))
    assert_same(contents(first), contents(again))
    other, _ = straight(small_plan(seed=4), tmp_path / "a.safetensors")
    assert not torch.equal(contents(first)["network/heads.0.weight"], contents(other)["network/heads.0.weight"])


def test_dropout_differs_from_step_to_step(tmp_path: Path) -> None:
    plan = small_plan(network=UNET, optimiser=OptimiserConfig(learning_rate=1e-30), steps=4, foreground=0, augment=small_plan().augment)
    case = stored_case(torch.zeros(32, 32).numpy(), torch.ones(1, 32, 32).numpy())
    _, recorder = straight(plan, tmp_path / "a.safetensors", [case])
    losses = [event["loss"] for event in recorder.events if event["event"] == "step"]
    assert len(set(losses)) == 4


def test_training_learns(tmp_path: Path) -> None:
    _, recorder = straight(small_plan(steps=40, optimiser=OptimiserConfig(learning_rate=0.02)), tmp_path / "a.safetensors")
    losses = [event["loss"] for event in recorder.events if event["event"] == "step"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_finished_run_goes_no_further(tmp_path: Path) -> None:
    state, _ = straight(small_plan(), tmp_path / "a.safetensors")
    before, recorder = contents(state), Recorder(tmp_path / "a.safetensors")
    train_steps(state, CASES, small_plan(), CPU, recorder.hooks())
    assert recorder.events == []
    assert_same(before, contents(state))


# ---- what a step logs, the schedule of validations, the best ----


def test_each_step_logs_its_loss_rate_and_speed(tmp_path: Path) -> None:
    plan = small_plan()
    _, recorder = straight(plan, tmp_path / "a.safetensors")
    steps = [event for event in recorder.events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event["learning_rate"] for event in steps] == [learning_rate(step, 6, plan) for step in range(6)]
    assert all(event.keys() == {"event", "step", "loss", "learning_rate", "samples_per_second"} for event in steps)
    assert all(event["loss"] > 0 and event["samples_per_second"] > 0 for event in steps)


@pytest.mark.parametrize(
    ("steps", "validations", "expected"), [(10, 4, [3, 6, 8, 10]), (6, 2, [3, 6]), (6, 1, [6]), (3, 9, [1, 2, 3]), (7, 3, [3, 5, 7])]
)
def test_validations_are_spread_evenly_and_the_last_step_has_one(steps: int, validations: int, expected: list[int], tmp_path: Path) -> None:
    _, recorder = straight(small_plan(steps=steps, validations=validations), tmp_path / "a.safetensors")
    assert recorder.steps_of("validation") == expected


def test_the_best_is_the_best_and_the_latest_of_equals(tmp_path: Path) -> None:
    scores = [0.3, 0.2, 0.5, 0.5, 0.4]
    recorder = Recorder(tmp_path / "a.safetensors", scores=lambda number: scores[number])
    state = fresh(small_plan(steps=5, validations=5))
    train_steps(state, CASES, small_plan(steps=5, validations=5), CPU, recorder.hooks())
    assert recorder.best == [True, False, True, True, False]
    assert (state.progress.best, state.progress.best_step, state.progress.validations) == (0.5, 4, 5)


def test_a_checkpoint_is_written_between_validations_when_the_last_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = tick(monkeypatch, step=50.0)
    recorder = Recorder(tmp_path / "a.safetensors")
    plan = small_plan(steps=10, validations=1)
    saved: list[int] = []
    save = recorder.save
    recorder.save = lambda state, is_best: (saved.append(state.progress.step), save(state, is_best))[1]  # type: ignore[method-assign]
    train_steps(fresh(plan), CASES, plan, CPU, recorder.hooks())
    assert now.now == 500
    # Every third step is more than 120 seconds after the one that was saved.
    assert saved == [3, 6, 9, 10]
    assert recorder.best == [False, False, False, True]


# ---- minutes ----


def tick(monkeypatch: pytest.MonkeyPatch, step: float = 1.0) -> SimpleNamespace:
    """A clock by which a step takes `step` seconds and nothing else takes any."""
    clock = SimpleNamespace(now=0.0)
    loss = gradients.segmentation_loss

    def slow(*arguments: Any) -> Any:
        clock.now += step
        return loss(*arguments)

    monkeypatch.setattr(gradients, "segmentation_loss", slow)
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def timed(plan: Plan, path: Path, clock: SimpleNamespace, *, minutes: float, validation: float) -> tuple[TrainState, Recorder]:
    """A run whose validations take so many seconds."""

    def score(number: int) -> float:
        clock.now += validation
        return 0.5

    state, recorder = fresh(plan), Recorder(path, score)
    recorder.seconds_left = lambda: minutes * 60 - clock.now
    train_steps(state, CASES, plan, CPU, recorder.hooks())
    return state, recorder


def test_steps_are_fitted_to_the_minutes_at_each_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = tick(monkeypatch)
    plan = small_plan(steps=20, validations=4, batch=1, network=UNET)
    state, recorder = timed(plan, tmp_path / "a.safetensors", clock, minutes=1, validation=3)
    # At step 5, 8 s are gone: of the 52 s left 3 x 3 are for validations, the other 43 for steps of 1 s.
    assert [event["steps"] for event in recorder.events if event["event"] == "schedule"] == [48, 48, 48]
    assert recorder.steps_of("validation") == [5, 20, 34, 48]
    assert (state.progress.step, clock.now) == (48, 60)


def test_a_run_that_was_planned_too_long_ends_in_time_and_is_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = tick(monkeypatch, step=5.0)
    plan = small_plan(steps=1000, validations=2, batch=1, network=UNET)
    state, recorder = timed(plan, tmp_path / "a.safetensors", clock, minutes=1, validation=1)
    assert (state.progress.step, state.progress.steps) == (12, 12)
    assert recorder.steps_of("validation") == [12]
    assert clock.now == 61


def test_a_run_of_so_many_steps_is_never_rescheduled(tmp_path: Path) -> None:
    _, recorder = straight(small_plan(), tmp_path / "a.safetensors")
    assert recorder.steps_of("schedule") == []


@given(
    step=st.integers(1, 1000),
    more=st.integers(0, 1000),
    done=st.integers(0, 12),
    left=st.none() | st.floats(-100, 1e5),
    cost=st.floats(0.001, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_schedule_always_leads_on_and_to_its_end(step: int, more: int, done: int, left: float | None, cost: float) -> None:
    plan, clock = small_plan(validations=10), Clock()
    clock.step_seconds = [cost]
    progress = Progress(step=step, steps=step + more, validations=done)
    hooks = Hooks(log=lambda event: None, validate=lambda state: {}, save=lambda state, is_best: None, seconds_left=lambda: left)
    reschedule(progress, plan, clock, hooks, 1.0)
    if more == 0:
        assert progress.steps == step
    else:
        assert step < progress.next_validation <= progress.steps
        assert progress.steps == step + more if left is None else True
    if left is not None and more:
        assert progress.steps - step <= max(1, left / cost + 1)


# ---- stopping ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_the_step_saves_and_raises(number: signal.Signals, tmp_path: Path) -> None:
    plan, recorder = small_plan(), Recorder(tmp_path / "a.safetensors")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    recorder.on_step = lambda step: signal.raise_signal(number) if step == 2 else None
    with pytest.raises(RunError, match=r"step 2: expected 6 steps, got a request to stop; continue with --resume"):
        train_steps(fresh(plan), CASES, plan, CPU, recorder.hooks())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    state = fresh(plan, seed=1)
    load_checkpoint(tmp_path / "a.safetensors", state)
    train_steps(state, CASES, plan, CPU, Recorder(tmp_path / "a.safetensors").hooks())
    assert_same(contents(straight(plan, tmp_path / "b.safetensors")[0]), contents(state))


def test_a_request_at_a_validation_s_step_is_answered_without_waiting_for_it(tmp_path: Path) -> None:
    plan, recorder = small_plan(), Recorder(tmp_path / "a.safetensors")
    recorder.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    with pytest.raises(RunError, match="step 3"):
        train_steps(fresh(plan), CASES, plan, CPU, recorder.hooks())
    assert recorder.steps_of("validation") == []
    assert recorder.best == [False]


def test_a_request_at_the_last_step_still_gets_its_validation(tmp_path: Path) -> None:
    plan, recorder = small_plan(), Recorder(tmp_path / "a.safetensors")
    recorder.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 6 else None
    with pytest.raises(RunError, match="step 6"):
        train_steps(fresh(plan), CASES, plan, CPU, recorder.hooks())
    assert recorder.steps_of("validation") == [3, 6]
    assert recorder.best == [True, True]


def test_a_request_after_the_last_look_for_one_waits_for_the_next_step_and_saves_it(tmp_path: Path) -> None:
    plan, recorder = small_plan(steps=1000, validations=1, batch=1, network=UNET), Recorder(tmp_path / "a.safetensors")
    hooks = recorder.hooks()

    def log(event: Mapping[str, Any]) -> None:
        recorder.log(event)
        if event["event"] == "schedule":
            # Whether to save was decided before.
            signal.raise_signal(signal.SIGTERM)

    recorder.seconds_left = lambda: 1000.0
    with pytest.raises(RunError, match="step 21"):
        train_steps(fresh(plan), CASES, plan, CPU, replace(hooks, log=log))
    state = fresh(plan)
    load_checkpoint(tmp_path / "a.safetensors", state)
    assert state.progress.step == 21


def test_a_second_request_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "_SAME_SECONDS", -1.0)
    with stop_requests() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_handled_outside_of_python_is_left_to_its_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    before, interrupted, getsignal = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else getsignal(number))
    with stop_requests() as stopped:
        assert getsignal(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGINT)
        assert stopped()
    assert getsignal(signal.SIGTERM) is before
    assert getsignal(signal.SIGINT) is interrupted


def test_a_thread_trains_without_listening_to_signals(tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(straight(small_plan(), tmp_path / "a.safetensors")[0].progress.step))
    thread.start()
    thread.join(60)
    assert done == [6]


# ---- what must not reach the weights ----


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights(tmp_path: Path) -> None:
    plan, recorder, state = small_plan(steps=10, validations=5), Recorder(tmp_path / "a.safetensors"), fresh(small_plan())
    state.progress.steps, state.progress.next_validation = 10, 2
    weights: dict[str, torch.Tensor] = {}

    def poison(step: int) -> None:
        weights.update(contents(state))
        if step == 2:
            CASES_POISONED[0].image[:] = float("nan")

    CASES_POISONED = [squares(5)]
    recorder.on_step = poison
    with pytest.raises(RunError, match=r"step 3: expected a finite loss and gradient, got a loss of nan.*learning_rate.*--resume"):
        train_steps(state, CASES_POISONED, plan, CPU, recorder.hooks())
    after = contents(state)
    assert all(torch.equal(after[name], t) for name, t in weights.items() if "running" not in name and "num_batches" not in name)
    other = fresh(plan, seed=1)
    load_checkpoint(tmp_path / "a.safetensors", other)
    assert other.progress.step == 2
    assert all(t.isfinite().all() for t in contents(other).values())
    # After --resume without a change it ends there again, and still knows of which step the checkpoint is.
    with pytest.raises(
        RunError, match=r"step 3: .*change plan\.yaml first, as an unchanged plan .* then --resume; the last checkpoint is of step 2"
    ):
        train_steps(other, CASES_POISONED, plan, CPU, Recorder(tmp_path / "a.safetensors").hooks())


def test_a_gradient_that_is_no_number_stops_the_run_although_the_loss_is_one(tmp_path: Path) -> None:
    plan, state = small_plan(), fresh(small_plan())
    next(state.network.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    before = contents(state)["network/heads.0.weight"]
    expected = r"step 1: expected a finite loss and gradient.*gradient of length (nan|inf); change plan\.yaml .*there is no checkpoint yet"
    with pytest.raises(RunError, match=expected):
        train_steps(state, CASES, plan, CPU, Recorder(tmp_path / "a.safetensors").hooks())
    assert torch.equal(contents(state)["network/heads.0.weight"], before)


# ---- losses that are read together ----


def test_reading_losses_together_changes_neither_weights_nor_log_but_its_speeds(tmp_path: Path) -> None:
    plan = small_plan(steps=7, validations=2)
    expected, each = straight(plan, tmp_path / "each.safetensors")
    state, together = fresh(plan), Recorder(tmp_path / "together.safetensors")
    train_steps(state, CASES, plan, CPU, together.hooks(), read_every=3)
    assert_same(contents(expected), contents(state))
    assert together.best == each.best
    without_speed = [[{k: v for k, v in event.items() if k != "samples_per_second"} for event in r.events] for r in (each, together)]
    assert without_speed[0] == without_speed[1]
    speeds = [event["samples_per_second"] for event in together.events if event["event"] == "step"]
    # Read after step 3, before the validation of step 4, and at the end: 7 is the sixth since the first reading.
    assert speeds[0] == speeds[1] == speeds[2]
    assert speeds[4] == speeds[5] == speeds[6]


def poisoned(plan: Plan, path: Path, read_every: int) -> tuple[Recorder, str]:
    """A run whose loss is no number from its third step on, and what it says in the end."""
    recorder, case, loss, calls = Recorder(path), squares(5), gradients.segmentation_loss, [0]

    def third(*arguments: Any) -> Any:
        calls[0] += 1
        return loss(*arguments) * (float("nan") if calls[0] >= 3 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "segmentation_loss", third)
        with pytest.raises(RunError) as caught:
            train_steps(fresh(plan), [case], plan, CPU, recorder.hooks(), read_every=read_every)
    return recorder, str(caught.value)


@pytest.mark.parametrize("read_every", [1, 2, 4, 100])
def test_the_step_whose_loss_is_no_number_is_named_and_nothing_after_it_is_logged_or_saved(read_every: int, tmp_path: Path) -> None:
    recorder, message = poisoned(small_plan(steps=12, validations=2), tmp_path / "a.safetensors", read_every)
    assert message.startswith("step 3: expected a finite loss and gradient, got a loss of nan")
    assert "no checkpoint yet" in message
    assert recorder.steps_of("step") == [1, 2]
    assert recorder.best == []
    assert recorder.steps_of("validation") == []
    assert not (tmp_path / "a.safetensors").exists()


def test_weights_after_such_a_loss_are_not_saved_though_a_checkpoint_is_due_at_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    _, message = poisoned(small_plan(steps=12, validations=1), tmp_path / "a.safetensors", 100)
    assert "the last checkpoint is of step 2" in message
    state = fresh(small_plan())
    load_checkpoint(tmp_path / "a.safetensors", state)
    assert state.progress.step == 2
    assert all(tensor.isfinite().all() for tensor in contents(state).values())


def test_a_request_to_stop_reads_what_is_unread_before_it_saves(tmp_path: Path) -> None:
    plan, recorder = small_plan(steps=9, validations=1), Recorder(tmp_path / "a.safetensors")
    recorder.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None
    with pytest.raises(RunError, match="step 4: expected 9 steps, got a request to stop"):
        train_steps(fresh(plan), CASES, plan, CPU, recorder.hooks(), read_every=4)
    assert recorder.steps_of("step") == [1, 2, 3, 4]
    assert recorder.best == [False]


# ---- the small rules ----


def test_the_rate_rises_over_the_warmup_then_falls_as_half_a_cosine() -> None:
    plan = small_plan(steps=20, warmup=4, optimiser=OptimiserConfig(learning_rate=1.0))
    rates = [learning_rate(step, 20, plan) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[8] == pytest.approx(0.5 + 0.25 * 2**0.5)
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_the_warmup_of_a_short_run_is_a_quarter_of_it_and_a_new_schedule_does_not_change_it() -> None:
    plan = small_plan(steps=8, warmup=50, optimiser=OptimiserConfig(learning_rate=1.0))
    for steps in (8, 100):
        assert [learning_rate(step, steps, plan) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert learning_rate(30, 20, plan) == 0
    assert learning_rate(0, 1, small_plan(steps=1, optimiser=OptimiserConfig(learning_rate=1.0))) == 1.0


def test_the_average_moves_by_one_over_its_span() -> None:
    plan = small_plan(optimiser=OptimiserConfig(averaging=0.5))
    state = fresh(plan)
    current, average = next(state.network.parameters()), next(state.average.parameters())
    with torch.no_grad():
        for step, value in enumerate((8.0, 4.0, 2.0, 1.0, 5.0)):
            current.fill_(value)
            state.progress.step = step
            update_average(state, plan)
            # Spans 1, 1, 1, 1.5, 2: the first three are taken whole.
            expected = (8.0, 4.0, 2.0, 2 - 1 / 1.5, (2 - 1 / 1.5 + 5) / 2)[step]
            assert average.flatten()[0].item() == pytest.approx(expected)


def test_without_averaging_the_average_is_the_network(tmp_path: Path) -> None:
    state, _ = straight(small_plan(optimiser=OptimiserConfig(averaging=0)), tmp_path / "a.safetensors")
    tensors = contents(state)
    for name, tensor in tensors.items():
        if name.startswith("network/"):
            assert torch.equal(tensor, tensors[name.replace("network/", "average/")])


@pytest.mark.parametrize("shape", [(2, 10, 12), (1, 8, 10, 12)])
def test_a_border_is_cut_from_every_side(shape: tuple[int, ...]) -> None:
    label = torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert crop_border(label, 0) is label
    middle = crop_border(label, 3)
    assert middle.shape == (shape[0], *(n - 6 for n in shape[1:]))
    assert torch.equal(middle, label[(slice(None), *(slice(3, n - 3) for n in shape[1:]))])


def test_the_clock_counts_validations_to_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(now=10.0)
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now.now))
    clock = Clock()
    with clock.network():
        now.now += 2
    now.now += 1
    assert clock.steps_done() == 3
    now.now += 7
    assert clock.since_step() == 7
    now.now += 5
    assert clock.steps_done() == 5
    assert clock.seconds_a_step() == 4
    now.now += 8
    # Four steps that were read together.
    assert clock.steps_done(4) == 2
    assert clock.step_seconds == [3, 5, 2, 2, 2, 2]
    assert clock.network_seconds == 2
    assert clock.since_save() == 23
    clock.saved()
    assert clock.since_save() == 0
