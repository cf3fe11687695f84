"""What is timed before a plan is fitted to the minutes is what will run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microtome.config import NetworkConfig, Plan
from microtome.data.dataset import open_dataset
from microtome.models.network import Network
from microtome.step_memory import FULL_SHARE, Resources, patch_bytes, save_memory, step_bytes
from microtome.training import gradients, rehearsal
from microtome.training.rehearsal import fit_to_minutes, make_plan, step_seconds
from tests.folders import png
from tests.small import TINY_2D, one_thread, small_plan

__all__ = ["one_thread"]

CPU = torch.device("cpu")


def test_each_precision_is_timed_and_is_that_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    loss = gradients.segmentation_loss
    monkeypatch.setattr(gradients, "segmentation_loss", lambda outputs, *rest: (seen.append(outputs[0].dtype), loss(outputs, *rest))[1])
    seconds = step_seconds(small_plan(), CPU, ("bf16", "fp32"), repeats=1)
    assert set(seconds) == {"bf16", "fp32"}
    assert all(value > 0 for value in seconds.values())
    # One to warm up, then each.
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("micro", "sizes"), [(0, [5]), (2, [2, 2, 1])])
def test_micro_batches_are_timed_as_they_will_run(micro: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = Network.__call__

    def note(network: Network, image_BCS: torch.Tensor) -> Any:
        seen.append(len(image_BCS))
        return forward(network, image_BCS)

    monkeypatch.setattr(Network, "__call__", note)
    step_seconds(small_plan(batch=5, micro_batch=micro), CPU, ("fp32",), repeats=1)
    # A step to warm up, and one that counts.
    assert seen == sizes * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_will_be_computed_twice_are(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = torch.nn.BatchNorm2d.forward

    def note(norm: torch.nn.BatchNorm2d, features_BCS: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(norm, features_BCS)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", note)
    plan = small_plan(network=NetworkConfig(name="unet_same", widths=(4, 8, 8)), checkpointing=checkpointing)
    step_seconds(plan, CPU, ("fp32",), repeats=1)
    once = 2 * 10
    assert len(calls) > once if checkpointing else len(calls) == once


def test_a_network_without_padding_is_timed_on_its_middle() -> None:
    plan = small_plan(network=NetworkConfig(name="unet", widths=(4, 8)), patch_vox=(32, 32))
    assert step_seconds(plan, CPU, ("fp32",), repeats=1)["fp32"] > 0


def test_what_takes_long_in_planning_is_said_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, grey in (("a", 0), ("b", 90)):
        png(tmp_path / "images" / f"{name}.png", np.arange(256).reshape(16, 16) // 2 + grey)
        png(tmp_path / "masks" / f"{name}.png", np.arange(256).reshape(16, 16) // 128)
    said: list[str] = []

    def timed(plan: Plan, *_: Any) -> dict[str, float]:
        said.append("timed")
        return {"bf16": 1.0, "fp32": 1.0}

    monkeypatch.setattr(rehearsal, "step_seconds", timed)
    dataset = open_dataset(tmp_path)
    looking, timing = "looking at the images ...", "timing a few training steps on this machine ..."
    make_plan(dataset, minutes=60, device="cpu", memory_gb=2, say=said.append)
    assert said == [looking, timing, "timed", "timed"]
    said.clear()
    make_plan(dataset, steps=1, device="cpu", memory_gb=2, say=said.append)
    assert said == [looking]


def fitted(
    plan: Plan, minutes: float | None, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, memory_bytes: float = 2**40
) -> Plan:
    """The plan for the minutes, on a machine whose steps take so long for each patch."""
    monkeypatch.setattr(rehearsal, "step_seconds", lambda plan, *_: {name: value * plan.batch for name, value in seconds.items()})
    return fit_to_minutes(plan, Resources(minutes=minutes, memory_bytes=int(memory_bytes)), CPU)


def test_bf16_is_taken_back_where_it_is_clearly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(precision="bf16", network=TINY_2D)
    assert fitted(plan, None, {"bf16": 1.3, "fp32": 1.0}, monkeypatch).precision == "fp32"
    assert fitted(plan, None, {"bf16": 1.2, "fp32": 1.0}, monkeypatch).precision == "bf16"


def test_a_batch_is_made_smaller_for_more_steps_but_not_below_four(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(batch=16)
    made = [fitted(plan, minutes, {"fp32": 0.1}, monkeypatch) for minutes in (60, 15, 1)]
    assert [each.batch for each in made] == [16, 8, 4]
    assert [each.steps for each in made] == [pytest.approx(m * 60 * 0.92 / (0.1 * b), rel=0.02) for m, b in ((60, 16), (15, 8), (1, 4))]


@pytest.mark.parametrize(("minutes", "batches"), [(1, [4]), (15, [4, 16, 8]), (60, [4, 16]), (None, [16])])
def test_a_whole_batch_is_timed_only_where_it_will_be_taken(
    minutes: float | None, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def timing(plan: Plan, *_: Any) -> dict[str, float]:
        timed.append(plan.batch)
        return {"fp32": 0.1 * plan.batch}

    monkeypatch.setattr(rehearsal, "step_seconds", timing)
    made = fit_to_minutes(small_plan(batch=16), Resources(minutes=minutes, memory_bytes=2**40), CPU)
    assert timed == batches
    assert made.batch == batches[-1]


def test_a_batch_whose_patches_take_less_together_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second a step, however many patches: a thousand steps of them all fit, and by the time of four a quarter would.
    monkeypatch.setattr(rehearsal, "step_seconds", lambda plan, *_: {"fp32": 1.0})
    made = fit_to_minutes(small_plan(batch=16), Resources(minutes=20, memory_bytes=2**40), CPU)
    assert (made.batch, made.steps) == (16, pytest.approx(20 * 60 * 0.92, abs=2))


def test_a_smaller_batch_is_shared_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(batch=8, network=NetworkConfig(name="nnunet_plain", widths=(4, 8)))
    memory_bytes = 4.5 * patch_bytes(plan.patch_vox, plan.network, "fp32", 2) / FULL_SHARE
    plan = save_memory(plan, Resources(minutes=None, memory_bytes=int(memory_bytes)))
    assert plan.micro_batch == 4
    made = fitted(plan, 10, {"fp32": 0.11}, monkeypatch, memory_bytes)
    # Not 4 and 1.
    assert (made.batch, made.micro_batch) == (5, 3)
    assert made.reasons["micro_batch"].startswith("3 of 5 patches")


def test_float32_instead_of_bfloat16_keeps_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(batch=8, precision="bf16", network=NetworkConfig(name="nnunet_plain", widths=(4, 8)))
    memory_bytes = 1.01 * step_bytes(plan) / FULL_SHARE
    made = fitted(plan, None, {"bf16": 2.0, "fp32": 1.0}, monkeypatch, memory_bytes)
    assert (made.precision, made.micro_batch) == ("fp32", 4)
    assert step_bytes(made) <= FULL_SHARE * memory_bytes
