"""Checkpoints: everything comes back bit for bit; what is damaged or of another network is refused."""

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from microtome.config import NetworkConfig, OptimiserConfig, Plan
from microtome.errors import DataError, RunError
from microtome.inference.devices import to_device
from microtome.models.registry import build
from microtome.training import checkpoint
from microtome.training.checkpoint import (
    Progress,
    TrainState,
    load_checkpoint,
    load_latest,
    new_state,
    previous_checkpoint,
    save_checkpoint,
)
from microtome.training.loop import update_average
from microtome.training.losses import segmentation_loss
from tests.small import TINY_3D, one_thread, small_plan, small_plan_3d

__all__ = ["one_thread"]

PLANS = {
    "adamw, batch norm": small_plan(),
    "sgd": small_plan(optimiser=OptimiserConfig(name="sgd", learning_rate=0.01)),
    "adam": small_plan(optimiser=OptimiserConfig(name="adam", learning_rate=0.01)),
    "rmsprop": small_plan(optimiser=OptimiserConfig(name="rmsprop", learning_rate=0.01)),
    "sgd without momentum": small_plan(optimiser=OptimiserConfig(name="sgd", momentum=0)),
    "3D, instance norm": small_plan_3d(network=TINY_3D.model_copy(update={"norm": "instance"})),
    "dropout": small_plan(network=NetworkConfig(name="unet", widths=(4, 8)), patch_vox=(32, 32)),
}


def fresh(plan: Plan, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
    return new_state(to_device(network, torch.device("cpu"), plan.dims), plan)


def stepped(plan: Plan, steps: int = 3) -> TrainState:
    """A state after a few real steps."""
    state = fresh(plan)
    advance(state, plan, steps)
    return state


def advance(state: TrainState, plan: Plan, steps: int) -> None:
    """Real steps from where the state is, each on a batch of its own number."""
    for step in range(state.progress.step, state.progress.step + steps):
        torch.manual_seed(step)
        generator = torch.Generator().manual_seed(step)
        image = torch.randn(2, plan.channels, *plan.patch_vox, generator=generator)
        outputs = state.network(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        label = torch.randint(2, (2, *outputs[0].shape[2:]), generator=generator)
        segmentation_loss(outputs, label).backward()
        state.optimiser.step()
        state.optimiser.zero_grad()
        update_average(state, plan)
        state.progress.step += 1


def contents(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of a state by name."""
    found = {f"network/{name}": t for name, t in state.network.state_dict().items()}
    found |= {f"average/{name}": t for name, t in state.average.state_dict().items()}
    for number, values in state.optimiser.state_dict()["state"].items():
        found |= {f"optimiser/{number}/{name}": t for name, t in values.items() if isinstance(t, Tensor)}
    return {name: t.detach().clone() for name, t in found.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("name", PLANS)
def test_everything_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    state = stepped(PLANS[name])
    state.progress = Progress(step=3, steps=17, best=0.1 + 0.2, best_step=2, validations=1, next_validation=9, seconds=1.5)
    save_checkpoint(tmp_path / "last.safetensors", state)
    other = fresh(PLANS[name], seed=1)
    load_checkpoint(tmp_path / "last.safetensors", other)
    assert_same(contents(state), contents(other))
    assert other.progress == state.progress
    # The moments are there, not only empty dictionaries that agree.
    assert any(key.startswith("optimiser/") for key in contents(other)) == (name != "sgd without momentum")
    assert any("running_mean" in key for key in contents(other)) == (name not in ("3D, instance norm", "dropout"))


@pytest.mark.parametrize("name", PLANS)
def test_steps_after_a_checkpoint_are_those_of_a_run_that_was_never_stopped(name: str, tmp_path: Path) -> None:
    straight, other = stepped(PLANS[name], 4), fresh(PLANS[name], seed=1)
    save_checkpoint(tmp_path / "last.safetensors", stepped(PLANS[name], 2))
    load_checkpoint(tmp_path / "last.safetensors", other)
    advance(other, PLANS[name], 2)
    assert_same(contents(straight), contents(other))


def test_average_and_network_are_kept_apart(tmp_path: Path) -> None:
    state = stepped(PLANS["adamw, batch norm"].model_copy(update={"optimiser": OptimiserConfig(averaging=0.9)}))
    tensors = contents(state)
    name = "heads.0.weight"
    assert not torch.equal(tensors[f"network/{name}"], tensors[f"average/{name}"])
    assert not state.average.training
    assert not any(p.requires_grad for p in state.average.parameters())
    assert all(p.requires_grad for p in state.network.parameters())


def test_a_state_before_its_first_step_comes_back(tmp_path: Path) -> None:
    state, other = fresh(PLANS["sgd"]), fresh(PLANS["sgd"], seed=1)
    save_checkpoint(tmp_path / "last.safetensors", state)
    load_checkpoint(tmp_path / "last.safetensors", other)
    assert_same(contents(state), contents(other))
    assert other.progress == Progress(steps=6, next_validation=3)


@given(
    progress=st.builds(
        Progress,
        step=st.integers(0, 10**9),
        steps=st.integers(0, 10**9),
        best=st.none() | st.floats(0, 1),
        best_step=st.integers(0, 10**9),
        validations=st.integers(0, 1000),
        next_validation=st.integers(0, 10**9),
        seconds=st.floats(0, 1e9),
        validated=st.integers(0, 24),
        case_seconds=st.none() | st.floats(0, 1e6),
    )
)
@settings(max_examples=10, deadline=None)
def test_any_progress_comes_back(progress: Progress, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("progress") / "last.safetensors"
    state, other = fresh(PLANS["dropout"]), fresh(PLANS["dropout"])
    state.progress = progress
    save_checkpoint(path, state)
    load_checkpoint(path, other)
    assert dataclasses.asdict(other.progress) == dataclasses.asdict(progress)


def test_weights_and_only_weights_decay() -> None:
    state = fresh(small_plan(optimiser=OptimiserConfig(weight_decay=0.3)))
    decayed, kept = state.optimiser.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(state.network.parameters()))


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({"name": "adamw", "momentum": 0.8}, torch.optim.AdamW, {"betas": (0.8, 0.999)}),
        ({"name": "sgd", "momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ({"name": "sgd", "momentum": 0.0}, torch.optim.SGD, {"momentum": 0.0, "nesterov": False}),
    ],
)
def test_the_optimiser_is_the_plan_s(settings: dict[str, object], kind: type, expected: dict[str, object]) -> None:
    optimiser = fresh(small_plan(optimiser=OptimiserConfig.model_validate(settings))).optimiser
    assert isinstance(optimiser, kind)
    assert {name: optimiser.param_groups[0][name] for name in expected} == expected


@pytest.mark.parametrize(("steps", "validations", "first"), [(6, 2, 3), (7, 2, 4), (3, 5, 1), (100, 1, 100)])
def test_the_first_validation_comes_after_its_share_of_the_steps(steps: int, validations: int, first: int) -> None:
    assert fresh(small_plan(steps=steps, validations=validations)).progress.next_validation == first


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b'\x10\0\0\0\0\0\0\0{"a":'])
def test_a_damaged_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"last\.safetensors: expected a checkpoint"):
        load_checkpoint(path, fresh(PLANS["sgd"]))


def test_half_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, stepped(PLANS["sgd"], 1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="expected a checkpoint"):
        load_checkpoint(path, fresh(PLANS["sgd"]))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a checkpoint"):
        load_checkpoint(tmp_path / "last.safetensors", fresh(PLANS["sgd"]))


def test_a_checkpoint_of_another_network_or_optimiser_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, stepped(PLANS["adamw, batch norm"]))
    for other in ("dropout", "3D, instance norm"):
        with pytest.raises(DataError, match=r"a checkpoint of this plan.*plan\.yaml"):
            load_checkpoint(path, fresh(PLANS[other]))
    with pytest.raises(DataError, match=r"a checkpoint of this plan.*plan\.yaml"):
        load_checkpoint(path, fresh(PLANS["sgd"]))


def test_a_model_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="a checkpoint of this plan"):
        load_checkpoint(path, fresh(PLANS["sgd"]))


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    state = stepped(PLANS["sgd"], 1)
    save_checkpoint(path, state)
    before = contents(state)

    def full(tensors: object, document: object) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_serialised", full)
    with pytest.raises(RunError, match=r"last\.safetensors.*No space left on device"):
        save_checkpoint(path, stepped(PLANS["sgd"], 2))
    # The one before it is not the one that is gone.
    assert sorted(tmp_path.iterdir()) == [path, previous_checkpoint(path)]
    for file in tmp_path.iterdir():
        other = fresh(PLANS["sgd"], seed=5)
        load_checkpoint(file, other)
        assert_same(before, contents(other))


@pytest.mark.parametrize("name", PLANS)
def test_the_file_is_byte_for_byte_what_the_library_writes(name: str, tmp_path: Path) -> None:
    tensors, document = checkpoint._contents(stepped(PLANS[name]))
    assert b"".join(checkpoint._serialised(tensors, document)) == save(tensors, metadata={"microtome": json.dumps(document)})


def test_every_type_and_shape_is_written_as_the_library_writes_it() -> None:
    tensors = {f"{kind}{shape}": torch.ones(shape, dtype=kind) for kind in checkpoint._TYPES for shape in ((), (0,), (3,), (2, 1, 5))}
    assert b"".join(checkpoint._serialised(tensors, {"a": "ü"})) == save(tensors, metadata={"microtome": json.dumps({"a": "ü"})})


def saved_twice(folder: Path) -> Path:
    """Checkpoints of steps 1 and 2."""
    path, state = folder / "last.safetensors", stepped(PLANS["sgd"], 1)
    save_checkpoint(path, state)
    advance(state, PLANS["sgd"], 1)
    save_checkpoint(path, state)
    return path


def test_every_flipped_byte_is_noticed_and_said_in_one_line(tmp_path: Path) -> None:
    path = saved_twice(tmp_path)
    whole, other = path.read_bytes(), fresh(PLANS["sgd"])
    header = int.from_bytes(whole[:8], "little") + 8
    places = {*range(0, header, 37), *range(header - 16, header), *range(header, len(whole), 1001), len(whole) - 1}
    # Spaces that make the header's length a multiple of 8 say nothing.
    told = header - len(whole[8:header]) + len(whole[8:header].rstrip())
    for place in sorted(places - set(range(told, header))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"last\.safetensors: expected ") as caught:
            load_checkpoint(path, other)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    load_checkpoint(path, other)


def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(tmp_path: Path) -> None:
    path = saved_twice(tmp_path)
    assert load_latest(path, fresh(PLANS["sgd"])) is None
    path.write_bytes(path.read_bytes()[:-1])
    state = fresh(PLANS["sgd"])
    said = load_latest(path, state)
    assert said is not None
    assert said.startswith(f"{path}: a damaged file")
    assert said.endswith("the run goes on from the checkpoint before it, of step 1")
    assert_same(contents(state), contents(stepped(PLANS["sgd"], 1)))
    path.unlink()
    assert "of step 1" in str(load_latest(path, state))
    previous_checkpoint(path).write_bytes(b"")
    with pytest.raises(DataError, match=r"previous\.safetensors: expected a checkpoint, got a damaged file"):
        load_latest(path, state)


def test_where_files_have_one_name_only_the_last_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    path = saved_twice(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    state = fresh(PLANS["sgd"])
    assert load_latest(path, state) is None
    assert state.progress.step == 2


def test_a_checkpoint_without_a_hash_is_of_the_first_version_and_is_read(tmp_path: Path) -> None:
    state, other = stepped(PLANS["sgd"]), fresh(PLANS["sgd"], seed=1)
    tensors, document = checkpoint._contents(state)
    save_file(tensors, tmp_path / "last.safetensors", metadata={"microtome": json.dumps(document)})
    load_checkpoint(tmp_path / "last.safetensors", other)
    assert_same(contents(state), contents(other))
