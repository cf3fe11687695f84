"""Training where memory runs out: smaller micro-batches, the same step again, and the result of a run begun with them."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome import machine
from microtome.config import LossConfig, NetworkConfig, OptimiserConfig, Plan
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import RunError
from microtome.machine import is_short_of_memory
from microtome.models.network import Network
from microtome.training import feeding, run
from microtome.training.checkpoint import TrainState
from microtome.training.folder import read_plan
from microtome.training.gradients import Gradients, add_gradients, smaller_steps
from microtome.training.loop import train_steps
from microtome.training.run import train
from tests.forked import ran
from tests.small import NOTHING, TINY_2D, one_thread, small_plan, small_plan_3d, squares, stored_case
from tests.test_checkpoint import assert_same, contents, fresh
from tests.test_loop import CASES, CPU, Recorder, straight
from tests.test_loop_gradients import made
from tests.test_run import assert_same_weights, lines

__all__ = ["one_thread"]

SGD = OptimiserConfig(name="sgd", learning_rate=0.01)
DROPOUT = NetworkConfig(name="unet", widths=(4, 8))
PLANS = {
    "batch norm": small_plan(batch=4, steps=3),
    "dropout": small_plan(batch=4, steps=3, network=DROPOUT),
    "3D": small_plan_3d(batch=4, steps=2),
}
VOLUMES = [stored_case(squares(seed, 24).label[None].repeat(18, 0)) for seed in range(2)]
# As torch 2.13 words them; the last is what C++ below engines says.
SHORT: dict[str, Callable[[], Exception]] = {
    "CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
    ),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB."),
    "cuDNN": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Python": MemoryError,
    "C++": lambda: RuntimeError("std::bad_alloc"),
    "oneDNN": lambda: RuntimeError("could not create a primitive"),
}


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of libraries that tell no reason: memory is short to be seen."""
    monkeypatch.setattr(machine, "room_bytes", lambda: 2**29)


def last_layer(network: Network) -> nn.Module:
    """The layer that is run last: when it fails, running statistics have moved and dropout has drawn."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)][-1]


@contextmanager
def room_for(network: Network, patches: int, error: Callable[[], Exception] = SHORT["CPU"], *, from_call: int = 0) -> Iterator[list[int]]:
    """A network that runs out of memory with more patches at once, from one call on; the list has what it was shown."""
    seen: list[int] = []

    def check(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(len(inputs[0]))
        if len(seen) > from_call and len(inputs[0]) > patches:
            raise error()

    handle = last_layer(network).register_forward_hook(check)
    try:
        yield seen
    finally:
        handle.remove()


def short_run(plan: Plan, path: Path, patches: int, **words: Any) -> tuple[TrainState, Recorder, list[Plan], list[int]]:
    """A run in which memory is enough for so many patches at once."""
    state, recorder, plans = fresh(plan), Recorder(path), []
    hooks = recorder.hooks()
    hooks = type(hooks)(**{**vars(hooks), "replan": plans.append})
    cases = CASES if plan.dims == 2 else VOLUMES
    with room_for(state.network, patches, **words) as seen:
        train_steps(state, cases, plan, CPU, hooks)
    return state, recorder, plans, seen


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("kind", SHORT)
def test_what_libraries_say_of_too_little_memory_is_understood(kind: str) -> None:
    assert is_short_of_memory(SHORT[kind]())


def test_other_errors_are_not_taken_for_it() -> None:
    for error in (RuntimeError("expected scalar type Half"), ValueError("out of memory"), OSError(28, "No space left on device")):
        assert not is_short_of_memory(error)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("words", ["could not create a primitive", "could not execute a primitive", "could not create a memory object"])
def test_a_fault_without_a_reason_is_a_lack_of_memory_only_where_little_is_left(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_short_of_memory(RuntimeError(words))
    monkeypatch.setattr(machine, "room_bytes", lambda: max(2**30, machine.resident_bytes(most=True)))
    assert not is_short_of_memory(RuntimeError(words))
    # A large process asks for much at once.
    monkeypatch.setattr(machine, "resident_bytes", lambda *, most: 2**33 if most else 0)
    monkeypatch.setattr(machine, "room_bytes", lambda: 2**33 - 1)
    assert is_short_of_memory(RuntimeError(words))
    assert not is_short_of_memory(ValueError(words))


def test_the_room_of_a_process_is_what_it_may_take_of_what_is_free() -> None:
    code = (
        "import resource; from microtome import machine; free = machine.room_bytes();"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, -1)); print(free > 2**26, machine.room_bytes() <= 2**24)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True True\n"


@pytest.mark.parametrize("name", PLANS)
def test_the_run_is_bit_for_bit_that_of_one_begun_with_the_smaller_micro_batch(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    cases = None if plan.dims == 2 else VOLUMES
    state, recorder, plans, seen = short_run(plan, tmp_path / "short", 1)
    wanted, other = straight(plan.model_copy(update={"micro_batch": 1}), tmp_path / "straight", cases)
    assert_same(contents(state), contents(wanted))
    assert seen[:6] == [4, 2, 1, 1, 1, 1]
    assert [made.micro_batch for made in plans] == [2, 1]
    losses = [[event["loss"] for event in part.events if event["event"] == "step"] for part in (recorder, other)]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("kind", SHORT)
def test_whoever_says_it_the_step_is_taken_again(kind: str) -> None:
    plan = small_plan(batch=2)
    network = fresh(plan).network.train()
    with room_for(network, 1, SHORT[kind]) as seen, Gradients(network, plan, CPU) as gradients:
        gradients(made(2))
    assert seen == [2, 1, 1]
    assert gradients.plan.micro_batch == 1


def test_what_ran_out_in_the_middle_is_what_a_run_resumed_with_the_smaller_plan_gives(tmp_path: Path) -> None:
    plan = small_plan(batch=4, steps=6, network=DROPOUT)
    state, recorder, _, _ = short_run(plan, tmp_path / "short", 2, from_call=3)
    [event] = [event for event in recorder.events if event["event"] == "memory"]
    assert event["step"] == 3
    assert "can't allocate memory" in event["message"]
    assert "micro_batch was 4 and is 2 of 4 patches; the step is taken again" in event["message"]
    # Three steps by the plan as it was, the others by the smaller one.
    wanted, half = fresh(plan), Recorder(tmp_path / "half")

    class Enough(BaseException):
        pass

    def stop(step: int) -> None:
        if step == 3:
            raise Enough

    half.on_step = stop
    with pytest.raises(Enough):
        train_steps(wanted, CASES, plan, CPU, half.hooks())
    half.on_step = lambda step: None
    train_steps(wanted, CASES, plan.model_copy(update={"micro_batch": 2}), CPU, half.hooks())
    assert_same(contents(state), contents(wanted))


def test_a_lack_in_the_backward_pass_leaves_no_half_of_a_gradient(tmp_path: Path) -> None:
    plan = small_plan(batch=2, network=TINY_2D)
    batch = made(2)

    def fail(_: nn.Module, __: Any, outputs: tuple[Tensor, ...]) -> None:
        if len(outputs[0]) > 1:
            raise SHORT["CPU"]()

    # When it comes to this layer, those after it have their gradient already.
    network, other = (fresh(plan).network.train() for _ in range(2))
    for net in (network, other):
        [module for module in net.modules() if isinstance(module, nn.Conv2d)][1].register_full_backward_hook(fail)
    torch.manual_seed(1)
    with Gradients(network, plan, CPU) as gradients:
        loss = gradients(batch)
    torch.manual_seed(1)
    wanted = add_gradients(other, batch, plan.model_copy(update={"micro_batch": 1}))
    assert loss.item() == wanted.item()
    found, expected = ({name: p.grad for name, p in net.named_parameters()} for net in (network, other))
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # type: ignore[arg-type]
    assert_same(dict(network.named_buffers()), dict(other.named_buffers()))


def test_after_single_patches_come_activations_computed_twice_and_then_one_line(tmp_path: Path) -> None:
    plan = small_plan(batch=2)
    said: list[str] = []
    network = fresh(plan).network.train()
    with (
        room_for(network, 0),
        Gradients(network, plan, CPU, on_smaller=lambda _, line: said.append(line)) as gradients,
        pytest.raises(RunError, match=r"memory: expected room for a training step of one patch of 32×32, got .*can't allocate") as caught,
    ):
        gradients(made(2))
    assert ["micro_batch was 2 and is 1" in said[0], "activations are computed twice" in said[1], len(said)] == [True, True, 2]
    assert caught.value.code == "R122"
    assert "patch_vox smaller" in caught.value.do
    assert [parameter.grad for parameter in network.parameters() if parameter.grad is not None] == []


def test_activations_computed_twice_change_no_bit_of_the_result(tmp_path: Path) -> None:
    plan = small_plan(batch=1, network=DROPOUT, steps=3)
    state, recorder, plans = fresh(plan), Recorder(tmp_path / "short"), []

    def check(_: nn.Module, __: Any, output: Tensor) -> None:
        if not plans:
            raise SHORT["CUDA"]()

    hooks = recorder.hooks()
    last_layer(state.network).register_forward_hook(check)
    train_steps(state, CASES, plan, CPU, type(hooks)(**{**vars(hooks), "replan": plans.append}))
    assert [made.checkpointing for made in plans] == [True]
    assert_same(contents(state), contents(straight(plan, tmp_path / "straight")[0]))


def test_other_errors_of_a_step_are_passed_on_and_no_plan_is_changed() -> None:
    plan = small_plan()
    network, plans = fresh(plan).network.train(), []
    with (
        room_for(network, 0, lambda: RuntimeError("expected scalar type Half but found Float")),
        Gradients(network, plan, CPU, on_smaller=lambda plan, _: plans.append(plan)) as gradients,
        pytest.raises(RuntimeError, match="expected scalar type"),
    ):
        gradients(made(2))
    assert plans == []


@pytest.mark.parametrize(("batch", "micro", "expected"), [(8, 0, 4), (8, 4, 2), (5, 0, 3), (3, 0, 2), (2, 9, 1)])
def test_half_of_an_odd_number_is_the_larger_half(batch: int, micro: int, expected: int) -> None:
    smaller = smaller_steps(small_plan(batch=batch, micro_batch=micro))
    assert smaller is not None
    assert smaller.micro_batch == expected
    assert "as memory ran out" in smaller.reasons["micro_batch"]


def test_with_no_batch_norm_and_cross_entropy_the_weights_are_the_whole_batch_s_but_for_rounding(tmp_path: Path) -> None:
    # Dice takes its ratios within a micro-batch, and batch norm its statistics: with these the result is another one, as good.
    network = TINY_2D.model_copy(update={"norm": "instance"})
    plan = small_plan(batch=4, network=network, loss=LossConfig(dice=0), steps=4, optimiser=SGD, augment=NOTHING)
    state, _, plans, _ = short_run(plan, tmp_path / "short", 1)
    whole = straight(plan, tmp_path / "whole")[0]
    assert plans[-1].micro_batch == 1
    for name, values in whole.network.state_dict().items():
        torch.testing.assert_close(state.network.state_dict()[name], values, rtol=0, atol=1e-6, msg=name)


# ---- a whole run ----


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5)
    return open_dataset(write_demo_data(tmp_path_factory.mktemp("data"), config).cells)


@pytest.fixture(scope="module")
def unbroken(cells: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cells, small_plan(classes=cells.legend.names), tmp_path_factory.mktemp("unbroken") / "run")


def test_the_plan_of_a_run_holds_what_fits_and_a_resumed_run_goes_by_it(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microtome.training import gradients

    plan = small_plan(classes=cells.legend.names, batch=4)
    wanted = train(cells, plan.model_copy(update={"micro_batch": 2}), tmp_path / "wanted")
    shown: list[int] = []
    plain = gradients.segmentation_loss

    def short(outputs: list[Tensor], *rest: Any, **words: Any) -> Tensor:
        shown.append(len(outputs[0]))
        if len(outputs[0]) > 2:
            raise SHORT["CPU"]()
        return plain(outputs, *rest, **words)

    monkeypatch.setattr(gradients, "segmentation_loss", short)

    class Killed(BaseException):
        pass

    def kill(event: Any) -> None:
        if (event["event"], event["step"]) == ("step", 5):
            raise Killed

    with pytest.raises(Killed):
        train(cells, plan, tmp_path / "run", on_event=kill)
    kept = read_plan(tmp_path / "run" / "plan.yaml")
    assert kept.micro_batch == 2
    assert kept.reasons["micro_batch"] == "2 of 4 patches at a time, as memory ran out with 4"
    [event] = [event for event in lines(tmp_path / "run") if event["event"] == "memory"]
    assert event["step"] == 0
    assert shown[0] == 4
    shown.clear()
    folder = train(cells, kept, tmp_path / "run", resume=True)
    assert set(shown) == {2}
    assert_same_weights(folder, wanted)


def test_patches_that_memory_was_too_short_for_are_made_again_and_the_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(batch=2, steps=3)
    wanted, _ = straight(plan, tmp_path / "straight")
    plain, asked = feeding.load_sample, []

    def short(*words: Any) -> Any:
        asked.append(1)
        # Once, at the second step, when its first patch is there.
        if len(asked) == 4:
            raise SHORT["CPU"]()
        return plain(*words)

    monkeypatch.setattr(feeding, "load_sample", short)
    state, recorder = straight(plan, tmp_path / "short")
    assert_same(contents(state), contents(wanted))
    assert len(asked) == 8
    [event] = [event for event in recorder.events if event["event"] == "memory"]
    assert event["step"] == 1
    assert "while patches were made: they are made again" in event["message"]


def test_patches_that_are_made_again_are_made_one_by_one_when_those_of_before_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, threads, here = small_plan(batch=4), threading.Lock(), threading.local()
    drawn, plain, both, going_on = feeding.draw_sample, feeding.load_sample, threading.Barrier(2), threading.Event()
    at_once, most = 0, 0

    def drawn_at(cases: Any, plan: Any, step: int, position: int, border: int) -> Any:
        here.position = position
        return drawn(cases, plan, step, position, border)

    def short(*words: Any) -> Any:
        nonlocal at_once, most
        with threads:
            at_once += 1
            most = max(most, at_once)
        try:
            if here.position <= 1 and not going_on.is_set():
                # Of two at once the one that is asked for first fails, and the other goes on until it is waited for.
                both.wait(60)
                if here.position == 0:
                    raise SHORT["CPU"]()
                assert going_on.wait(60)
            return plain(*words)
        finally:
            with threads:
                at_once -= 1

    def waited(futures: Any) -> None:
        nonlocal most
        going_on.set()
        wait(futures)
        assert at_once == 0
        most = 0

    with feeding.Batches(CASES, plan, CPU) as batches:
        wanted = batches.get(1)
        monkeypatch.setattr(feeding, "draw_sample", drawn_at)
        monkeypatch.setattr(feeding, "load_sample", short)
        monkeypatch.setattr(feeding, "wait", waited)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            batches.get(1)
        found = batches.get_again(1)
    assert most == 1
    assert torch.equal(found.image, wanted.image)
    assert torch.equal(found.label, wanted.label)


def test_memory_that_ends_before_there_is_a_run_is_one_line(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 9.31 GiB")

    monkeypatch.setattr(run, "new_state", short)
    with pytest.raises(
        RunError, match=r"got Unable to allocate 9\.31 GiB; close other programs, then give the same command again$"
    ) as caught:
        train(cells, small_plan(classes=cells.legend.names), tmp_path / "run")
    assert caught.value.code == "R125"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["the optimiser", "a validation"])
def test_memory_that_ends_beside_the_network_is_one_line_and_resume_gives_the_unbroken_run(
    place: str, cells: Dataset, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 9.31 GiB")

    def when_saved(event: Any) -> None:
        # After the first validation, of two, there is a checkpoint.
        if event["event"] == "step" and event["step"] == 4:
            owner, name = (torch.optim.AdamW, "step") if place == "the optimiser" else (Dataset, "read_pair")
            monkeypatch.setattr(owner, name, short)

    plan, folder = small_plan(classes=cells.legend.names), tmp_path / "run"
    with pytest.raises(RunError) as caught:
        train(cells, plan, folder, on_event=when_saved)
    monkeypatch.undo()
    assert caught.value.code == "R125"
    assert str(caught.value) == (
        f"{folder}: expected memory for all that a training does beside its network, got Unable to allocate 9.31 GiB; close other "
        f"programs, or set a smaller micro_batch in {folder / 'plan.yaml'}; then the same command with --resume (the last checkpoint "
        "is good)"
    )
    assert_same_weights(train(cells, read_plan(folder / "plan.yaml"), folder, resume=True), unbroken)


# ---- memory that is really short ----

PROGRAM = """
import ctypes, json, resource, sys
import torch
from torch import Tensor
from microtome.training.gradients import Gradients, add_gradients
from tests.small import small_plan
from tests.test_checkpoint import fresh
from microtome.training.feeding import Batch
torch.set_num_threads(1)
# M_ARENA_MAX: no address space for threads of their own.
ctypes.CDLL(None).mallopt(-8, 1)
# oneDNN asks for memory of its own to write code into, and crashes where it gets none.
torch.backends.mkldnn.set_flags(False)
plan = small_plan(batch=8, patch_vox=(128, 128))
generator = torch.Generator().manual_seed(0)
batch = Batch(torch.randn(8, 1, *plan.patch_vox, generator=generator), torch.zeros(8, *plan.patch_vox, dtype=torch.int16), None)
small = plan.model_copy(update={"micro_batch": 1})
# Once by single patches, so that what these take is in the process already.
wanted = fresh(plan).network.train()
loss = add_gradients(wanted, batch, small).item()
network = fresh(plan).network.train()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20, resource.RLIM_INFINITY))
said = []
with Gradients(network, plan, torch.device("cpu"), on_smaller=lambda plan, line: said.append(line)) as gradients:
    again = gradients(batch).item()
    micro = gradients.plan.micro_batch
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
other = fresh(plan).network.train()
expected = add_gradients(other, batch, plan.model_copy(update={"micro_batch": micro})).item()
same = all(torch.equal(a.grad, b.grad) for a, b in zip(network.parameters(), other.parameters()))
print(json.dumps({"said": said, "micro": micro, "same": same and again == expected}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS ends memory on Linux alone")
def test_a_process_that_may_take_no_more_memory_halves_its_micro_batches_and_computes_the_same() -> None:
    ended = ran(PROGRAM, "40")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["said"]
    assert all("memory ran out" in line for line in told["said"])
    assert told["micro"] in (1, 2, 4)
    assert told["same"]
