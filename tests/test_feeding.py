"""Batches: the same whoever makes them and when; what goes wrong in a thread is heard of; nothing hangs."""

import os
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from microtome.config import Plan
from microtome.training import feeding
from microtome.training.feeding import AHEAD, Batch, Batches
from microtome.training.sampling import Pool, draw_sample, load_sample
from microtome.training.store import StoredCase
from microtome.training.transfer import Lane, sent
from tests.small import NOTHING, one_thread, small_plan, small_plan_3d, squares, stored_case

__all__ = ["one_thread"]

CPU = torch.device("cpu")
CASES = [squares(seed) for seed in range(3)]


class Slow:
    """An array that takes its time to be read, and notes in which threads."""

    def __init__(self, array: np.ndarray, seconds: float) -> None:
        self.array, self.shape, self.seconds = array, array.shape, seconds
        self.readers: list[str] = []

    def __getitem__(self, part: Any) -> np.ndarray:
        self.readers.append(threading.current_thread().name)
        time.sleep(self.seconds)
        found: np.ndarray = self.array[part]
        return found


class Broken(Slow):
    """An array that cannot be read."""

    def __getitem__(self, part: Any) -> np.ndarray:
        raise OSError("the disk is gone")


def fed(plan: Plan, steps: list[int], *, cases: list[StoredCase] = CASES, ahead: int = 0, on_device: bool = False) -> list[Batch]:
    with Batches(cases, plan, CPU, on_device=on_device) as batches:
        batches.ahead = ahead
        return [batches.get(step) for step in steps]


def assert_equal(one: Batch, two: Batch) -> None:
    for a, b in zip(one, two, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, AHEAD])
def test_neither_what_is_made_ahead_nor_the_order_changes_a_batch(ahead: int, on_device: bool) -> None:
    plan = small_plan(batch=3)
    expected = fed(plan, [0, 1, 2, 3, 4], on_device=on_device)
    order = [3, 0, 4, 2, 1]
    for step, batch in zip(order, fed(plan, order, ahead=ahead, on_device=on_device), strict=True):
        assert_equal(batch, expected[step])
    assert not torch.equal(expected[0].image, expected[1].image)


def test_samples_of_a_batch_are_those_of_its_step_and_positions() -> None:
    plan, pool = small_plan(batch=3), Pool.of(CASES)
    (batch,) = fed(plan, [5])
    patches = [load_sample(draw_sample(pool, plan, 5, position), CASES, plan.patch_vox) for position in range(3)]
    assert torch.equal(batch.image, torch.stack([patch.image for patch in patches]))
    assert torch.equal(batch.label, torch.stack([patch.label for patch in patches]))


@pytest.mark.parametrize("plan", [small_plan(batch=4), small_plan_3d(batch=4)], ids=["2D", "3D"])
def test_the_device_s_way_gives_the_batches_of_the_cpu_s(plan: Plan) -> None:
    cases = CASES
    if plan.dims == 3:
        label = np.random.default_rng(0).integers(-1, 2, (20, 24, 28))
        cases = [replace(stored_case(label), weight_map=np.random.default_rng(1).uniform(1, 5, label.shape).astype(np.float16))]
    layout = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
    ways = [fed(plan, [0, 1, 2], cases=cases, on_device=on_device) for on_device in (False, True)]
    for theirs, ours in zip(*ways, strict=True):
        assert (ours.image - theirs.image).abs().max() < 2e-3
        # Not a voxel in a thousand lies so near to the middle between two labels that rounding decides.
        assert (ours.label != theirs.label).float().mean() < 1e-3
        assert ours.image.is_contiguous(memory_format=layout)
        assert (ours.weight is None) == (plan.dims == 2)
        assert ours.weight is None or (ours.weight - theirs.weight).abs().max() < 5e-3  # type: ignore[operator]


def test_the_next_steps_are_read_while_one_is_used() -> None:
    read: list[tuple[int, int]] = []
    with Batches(CASES, small_plan(batch=2), CPU) as batches:
        batches.ahead = 2
        make = batches._make
        batches._make = lambda step, position: read.append((step, position)) or make(step, position)  # type: ignore[method-assign]
        batches.get(0)
        assert list(batches.waiting) == [1, 2]
        batches.get(1)
        assert list(batches.waiting) == [2, 3]
    # Each sample once, and those still waiting at the end may have been left out.
    assert len(set(read)) == len(read)
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} <= set(read) <= {(step, position) for step in range(4) for position in range(2)}


def test_on_a_cpu_nothing_is_made_ahead_and_on_a_gpu_something_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "Lane", lambda device: None)
    for device, ahead, on_device in ((CPU, 0, False), (torch.device("cuda"), AHEAD, True)):
        with Batches(CASES, small_plan(), device) as batches:
            assert (batches.ahead, batches.on_device) == (ahead, on_device)


def test_samples_are_read_in_threads_and_all_of_them_end_with_the_batches() -> None:
    slow = Slow(CASES[0].image[:], 0.2)
    before = set(threading.enumerate())
    with Batches([replace(CASES[0], image=slow)], small_plan(batch=2), CPU) as batches:
        batches.ahead = 3
        batches.get(0)
        assert set(threading.enumerate()) - before
    assert threading.main_thread().name not in slow.readers
    assert set(threading.enumerate()) == before
    # What was still waiting for a thread is not read at all; at most two samples were in hand.
    assert len(slow.readers) < 8


def test_an_error_in_a_thread_is_heard_of_at_its_step_and_ends_nothing_else() -> None:
    broken = replace(CASES[1], image=Broken(CASES[1].image[:], 0))
    cases, plan = [CASES[0], broken], small_plan(batch=1)
    whole = [draw_sample(Pool.of(cases), plan, step, 0).case == 0 for step in range(12)]
    assert {*whole} == {True, False}
    with Batches(cases, plan, CPU) as batches:
        batches.ahead = AHEAD
        for step, readable in enumerate(whole):
            if readable:
                assert batches.get(step).image.shape == (1, 1, 32, 32)
            else:
                with pytest.raises(OSError, match="the disk is gone"):
                    batches.get(step)


def test_an_error_of_the_caller_ends_the_threads() -> None:
    before = set(threading.enumerate())

    def stopped() -> None:
        with Batches(CASES, small_plan(), CPU) as batches:
            batches.ahead = AHEAD
            batches.get(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(("cores", "batch", "ahead", "threads"), [(1, 8, 0, 2), (16, 8, 0, 8), (16, 2, AHEAD, 6), (4, 8, AHEAD, 4)])
def test_as_many_threads_as_there_are_cores_and_work_for(
    cores: int, batch: int, ahead: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(feeding, "Lane", lambda device: None)
    before = threading.active_count()
    with Batches(CASES, small_plan(batch=batch), CPU if ahead == 0 else torch.device("cuda")):
        # All of them run from the start: the last may not limit the caller's threads later.
        assert threading.active_count() - before == threads


def test_a_batch_is_channels_last_and_of_the_right_types() -> None:
    with Batches(CASES, small_plan(batch=4), CPU) as batches:
        image, label, _ = batches.get(0)
    assert (image.shape, label.shape) == ((4, 1, 32, 32), (4, 32, 32))
    assert (image.dtype, label.dtype) == (torch.float32, torch.int16)
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_the_pool_of_threads_leaves_torch_s_own_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Batches(CASES, small_plan(batch=8), CPU) as batches:
            batches.get(0)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("volume", [False, True])
def test_weights_come_with_the_patch_and_its_batch(volume: bool) -> None:
    label = np.random.default_rng(0).integers(0, 2, (6, 40, 44)).astype(np.int16)
    weight = np.random.default_rng(1).uniform(1, 9, label.shape).astype(np.float16)
    case = stored_case(label) if volume else stored_case(label[0])
    case = replace(case, weight_map=weight if volume else weight[0])
    plan = small_plan(augment=NOTHING, batch=3, spacing_mm=(4.0, 1.0, 1.0) if volume else (1.0, 1.0))
    with Batches([case], plan, CPU) as batches:
        batch = batches.get(4)
    assert batch.weight is not None
    assert (batch.weight.shape, batch.weight.dtype) == ((3, 32, 32), torch.float32)
    for position, part in enumerate(batch.weight):
        sample = draw_sample(Pool.of([case]), plan, 4, position)
        y, x = (sample.centre - 15.5).astype(int)
        assert np.abs(part.numpy() - weight[sample.section or 0, y : y + 32, x : x + 32]).max() < 1e-3


# ---- the copy to a GPU, with a GPU that only writes down what it is asked ----


class Event:
    """A point of a stream."""


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, device: Any = None) -> None:
        self.waited: list[Event] = []

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


class Made:
    """A tensor in a GPU's memory."""

    def __init__(self) -> None:
        self.used_by: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_by.append(stream)


def test_the_network_s_queue_waits_for_a_sample_and_its_memory_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: network)
    lane, image, label = Lane(torch.device("cuda")), Made(), Made()
    done = lane.mark()
    lane.receive(done, image, label, None)  # type: ignore[arg-type]
    assert network.waited == [done]
    assert image.used_by == label.used_by == [network]
    assert lane.stream.waited == []  # type: ignore[union-attr]


def test_what_is_asked_in_a_lane_goes_into_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    class Entering:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            entered.append(self.stream)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Entering)
    lane = Lane(torch.device("cuda"))
    with pytest.raises(KeyError), lane.entered():
        raise KeyError
    assert entered == [lane.stream, None]


def test_a_gpu_is_sent_pinned_memory_without_waiting_and_a_cpu_the_tensor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Host:
        def __init__(self, pinned: bool = False) -> None:
            self.pinned = pinned

        def pin_memory(self) -> "Host":
            return Host(pinned=True)

        def to(self, device: torch.device, non_blocking: bool = False) -> tuple[str, bool, bool]:
            return device.type, self.pinned, non_blocking

    assert sent(Host(), torch.device("cuda")) == ("cuda", True, True)  # type: ignore[arg-type, comparison-overlap]
    values = torch.arange(3.0)
    assert sent(values, CPU) is values


def test_on_a_cpu_a_lane_waits_for_nothing() -> None:
    lane = Lane(CPU)
    with lane.entered():
        values = torch.ones(2)
    assert lane.mark() is None
    lane.receive(None, values)
