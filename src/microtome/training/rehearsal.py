"""A few real steps on this machine, so that a plan knows what the minutes buy."""

import os
import statistics
import time
from pathlib import Path

import torch

from microtome.config import Plan
from microtome.data.dataset import Dataset
from microtome.data.split import split_dataset
from microtome.fingerprint import take_fingerprint
from microtome.inference.engines import arithmetic, pick_device, processor_has_bf16, recycle_memory, to_device
from microtome.models.registry import build
from microtome.plan import Resources, draft_plan
from microtome.training.loop import crop_border
from microtome.training.losses import segmentation_loss

# Share of a run's minutes for steps; the rest is reading, validation, the final prediction and the report.
SHARE_OF_STEPS = 0.92
# With fewer steps than this a network has hardly left its initial state; batches are halved first.
FEWEST_STEPS = 400


def make_plan(
    dataset: Dataset,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    memory_gb: float | None = None,
    network: str = "modern_unet",
    device: str = "auto",
    seed: int = 0,
    fold: str = "1/5",
) -> Plan:
    """A plan for this dataset, this machine and these minutes (or exactly `steps` steps), every choice with its reason.

    Args:
        dataset: as `open_dataset` returns it; only cases that train under `fold` are looked at.
        minutes: wall time of the whole run.
        steps: optimiser steps, instead of minutes.
        memory_gb: memory that training may use; None: most of what is free.
        network: a name that `microtome networks` lists.
        device: "auto", "cpu" or "cuda".
        seed: of everything random in the run.
        fold: "K/N" or "all".
    """
    recycle_memory()
    where = pick_device(device)
    memory = int(memory_gb * 2**30) if memory_gb else free_memory(where)
    resources = Resources(minutes=minutes, memory_bytes=memory, gpu=where.type == "cuda", bf16=processor_has_bf16(where))
    facts = take_fingerprint(dataset, split_dataset(dataset, fold, seed).train)
    plan = draft_plan(facts, resources, network=network, seed=seed, fold=fold)
    if steps is not None:
        return _with(plan, "steps", steps, "as asked")
    return fit_to_minutes(plan, minutes, where)


def fit_to_minutes(plan: Plan, minutes: float | None, device: torch.device) -> Plan:
    """The plan with the precision that is faster here, and batch and steps for the minutes, by timing real steps."""
    seconds = step_seconds(plan, device)
    if plan.precision == "bf16":
        exact = step_seconds(plan.model_copy(update={"precision": "fp32"}), device)
        if exact <= seconds:
            plan = _with(plan, "precision", "fp32", f"bf16 is no faster here ({seconds:.2f} s against {exact:.2f} s a step)")
            seconds = exact
        else:
            plan = _with(plan, "precision", "bf16", f"bfloat16 takes {seconds:.2f} s a step where float32 takes {exact:.2f} s")
    if minutes is None:
        return _with(
            plan, "steps", plan.steps, f"no minutes were given; about {plan.steps * seconds / 60:.0f} minutes at {seconds:.2f} s a step"
        )
    budget = minutes * 60 * SHARE_OF_STEPS
    while budget / seconds < FEWEST_STEPS and plan.batch > 2:
        plan = _with(plan, "batch", plan.batch // 2, f"halved, so that {minutes:g} minutes hold enough steps")
        seconds = step_seconds(plan, device)
    count = max(1, int(budget / seconds))
    return _with(plan, "steps", count, f"{minutes:g} minutes at {seconds:.2f} s a step on this machine, less validation and report")


def step_seconds(plan: Plan, device: torch.device, repeats: int = 3) -> float:
    """Median wall time of a training step of this plan on random patches, after one step to warm up."""
    network = to_device(
        build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network),
        device,
        plan.dims,
    )
    network.train()
    layout = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(plan.batch, plan.channels, *plan.patch_vox, generator=generator).to(device, memory_format=layout)
    label = torch.randint(len(plan.classes), (plan.batch, *plan.patch_vox), generator=generator).to(torch.int16).to(device)
    label = crop_border(label, getattr(network, "context_vox", 0))
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with arithmetic(device, plan.precision):
            outputs = network(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss = segmentation_loss(outputs, label, plan.dice_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        # Reading a gradient waits for the device.
        next(network.parameters()).grad.sum().item()  # type: ignore[union-attr]
        network.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30


def _with(plan: Plan, field: str, value: object, reason: str) -> Plan:
    """The plan with one value changed and its reason noted."""
    return plan.model_copy(update={field: value, "reasons": {**plan.reasons, field: reason}})
