"""A few real steps on this machine, so that a plan knows what the minutes buy."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypedDict, Unpack

import torch

from microtome.config import Plan
from microtome.data.dataset import Dataset
from microtome.data.split import split_dataset
from microtome.errors import ConfigError
from microtome.fingerprint import take_fingerprint
from microtome.inference.devices import has_bf16, pick_device, to_device
from microtome.machine import free_memory_bytes, recycle_memory
from microtome.models.registry import build, find
from microtome.plan import draft_plan
from microtome.step_memory import SMALLEST_BATCH, Resources, save_memory
from microtome.training.compiled import fast_kernels
from microtome.training.feeding import Batch
from microtome.training.gradients import add_gradients
from microtome.training.loop import crop_border
from microtome.training.recipes import apply_recipe, check_dims, find_recipe
from microtome.training.recompute import recomputing

# Share of a run's minutes for steps; the rest is reading, validation, the final prediction and the report.
SHARE_OF_STEPS = 0.92
# Of as many samples, more and smaller steps teach more: batches are made smaller until there are so many (docs/log.md).
FEWEST_STEPS = 1000
# Timing goes on no longer than this, after every precision has been timed once.
MOST_SECONDS = 6.0


class Wishes(TypedDict, total=False):
    """What a person may ask of a plan.

    Attributes:
        network: a name that `microtome networks` lists; without it the recipe's.
        recipe: "default" or a paper's: one of `training.recipes.RECIPES`.
        dims: 2 or 3, whatever the images look like.
        seed: of everything random in the run; 0 if not given.
        fold: "K/N" or "all"; "1/5" if not given.
        holdout: "cases", or "slices" to validate on annotated slices of sparsely annotated volumes.
    """

    network: str | None
    recipe: str
    dims: int | None
    seed: int
    fold: str
    holdout: str


def make_plan(
    dataset: Dataset,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    memory_gb: float | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
    **wishes: Unpack[Wishes],
) -> Plan:
    """A plan for this dataset, this machine and these minutes (or exactly `steps` steps), every choice with its reason.

    Args:
        dataset: as `open_dataset` returns it; only cases that train under `fold` are looked at.
        minutes: wall time of the whole run.
        steps: optimiser steps, instead of minutes.
        memory_gb: memory that training may use; None: most of what is free.
        device: "auto", "cpu" or "cuda".
        say: takes a line before what may take long.
        wishes: network, recipe, dims, seed, fold, holdout; see `Wishes`.

    Raises:
        ConfigError: a name that is not known, or wishes that the images or each other do not allow.
    """
    network, recipe, dims = wishes.get("network"), wishes.get("recipe", "default"), wishes.get("dims")
    seed, fold, holdout = wishes.get("seed", 0), wishes.get("fold", "1/5"), wishes.get("holdout", "cases")
    chosen = find_recipe(recipe, network)
    name = find(network or (chosen.networks or ("modern_unet",))[0]).name
    if dims is not None and dims not in chosen.dims:
        expected = f"{' or '.join(map(str, chosen.dims))} for the recipe {recipe}"
        raise ConfigError("dims", expected=expected, got=str(dims), do="leave it out, or choose another --recipe", code="C039")
    if only_pictures(dataset):
        # Volumes fit a recipe in 2D too: it sees their sections one by one.
        check_dims(chosen, 2)
    recycle_memory()
    where = pick_device(device)
    memory = int(memory_gb * 2**30) if memory_gb else free_memory(where)
    resources = Resources(minutes=minutes, memory_bytes=memory, gpu=where.type == "cuda", bf16=has_bf16(where))
    say("looking at the images ...")
    facts = take_fingerprint(dataset, split_dataset(dataset, fold, seed, holdout).train)
    plan = draft_plan(facts, resources, network=name, dims=chosen.dims if dims is None else (dims,), seed=seed, fold=fold)
    if dims not in (None, plan.dims):
        raise ConfigError("dims", expected=f"{plan.dims} for these images", got=str(dims), do="leave it out", code="C040")
    plan = save_memory(apply_recipe(chosen, plan, facts, resources), resources).model_copy(update={"holdout": holdout})
    if steps is not None:
        return _with(plan, "steps", steps, "as asked")
    say("timing a few training steps on this machine ...")
    return fit_to_minutes(plan, resources, where)


def only_pictures(dataset: Dataset) -> bool:
    """Whether all labelled images that can be read have two axes."""
    return {len(header.shape_vox) for header in dataset.headers.values()} == {2}


def fit_to_minutes(plan: Plan, resources: Resources, device: torch.device) -> Plan:
    """The plan with the precision that is faster here, and batch and steps for the minutes, by timing real steps.

    Another precision takes other memory, and a smaller batch is shared out otherwise: micro-batches and what is computed twice
    are then chosen anew.
    """
    began, minutes = time.perf_counter(), resources.minutes
    precisions = ("bf16", "fp32") if plan.precision == "bf16" else ("fp32",)
    # A few patches say whether the batch will be made smaller: on a slow machine a step of all takes longer than a short training.
    open_batch = minutes is not None and plan.recipe == "default" and plan.batch > SMALLEST_BATCH
    sample = plan.model_copy(update={"batch": SMALLEST_BATCH}) if open_batch else plan
    seconds = sampled = step_seconds(sample, device, precisions)
    # A busy machine can spoil a timing; hardware that multiplies bfloat16 is believed unless it is clearly slower.
    best = precisions[0] if seconds[precisions[0]] < 1.25 * seconds[precisions[-1]] else precisions[-1]
    if len(precisions) == 2:
        times = f"bfloat16 takes {seconds['bf16']:.2f} s for a step of {sample.batch} patches, float32 {seconds['fp32']:.2f} s"
        plan = save_memory(_with(plan, "precision", best, times), resources)
    if minutes is None:
        about = f"about {_minutes(round(plan.steps * seconds[best] / 60))} at {seconds[best]:.2f} s a step"
        return _with(plan, "steps", plan.steps, f"no minutes were given; {about}")
    budget = minutes * 60 * SHARE_OF_STEPS
    fitting = int(sample.batch * budget / seconds[best] / FEWEST_STEPS)
    if open_batch and fitting >= SMALLEST_BATCH:
        # More patches at a time take less each: the whole batch may do.
        seconds = step_seconds(plan, device, (best,))
        fitting = int(plan.batch * budget / seconds[best] / FEWEST_STEPS)
    if open_batch and fitting < plan.batch:
        reason = f"{plan.batch} would fit into memory, but {_minutes(minutes)} would then be too few steps"
        plan = save_memory(_with(plan, "batch", max(SMALLEST_BATCH, fitting), reason), resources)
        seconds = step_seconds(plan, device, (best,)) if plan.batch != sample.batch else sampled
    # Where steps are slow, timing them has taken its part of the minutes.
    count = max(1, int((budget - (time.perf_counter() - began)) / seconds[best]))
    return _with(plan, "steps", count, f"{_minutes(minutes)} at {seconds[best]:.2f} s a step on this machine, less validation and report")


def step_seconds(plan: Plan, device: torch.device, precisions: Sequence[str], repeats: int = 3) -> dict[str, float]:
    """Shortest wall time of a training step on random patches in each precision, after one step to warm up.

    The shortest, and the precisions in turn, because other programs on the machine can only make a step slower. Ends early
    when steps take long enough to be timed well by one or two.
    """
    step = _Rehearsal(plan, device)
    times: dict[str, list[float]] = {name: [] for name in precisions}
    with fast_kernels(device), recomputing(step.network, plan.patch_vox) if plan.checkpointing else nullcontext():
        warm = step.seconds(precisions[0])
        for name in list(precisions) * repeats:
            if not times[name] or warm + sum(map(sum, times.values())) < MOST_SECONDS:
                times[name].append(step.seconds(name))
    return {name: min(values) for name, values in times.items()}


class _Rehearsal:
    """A network and a random batch of a plan, to be stepped and thrown away."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
        self.plan, self.device = plan, device
        self.network = to_device(network, device, plan.dims).train()
        layout = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(plan.batch, plan.channels, *plan.patch_vox, generator=generator)
        label = torch.randint(len(plan.classes), (plan.batch, *plan.patch_vox), generator=generator).to(torch.int16)
        label = crop_border(label.to(device), network.context_vox)
        self.batch = Batch(image.to(device, memory_format=layout), label, None)

    def seconds(self, precision: str) -> float:
        """Wall time of one forward and backward pass of the whole batch, as the plan takes it."""
        started = time.perf_counter()
        add_gradients(self.network, self.batch, self.plan.model_copy(update={"precision": precision}))
        # Reading a gradient waits for the device.
        next(self.network.parameters()).grad.sum().item()  # type: ignore[union-attr]
        self.network.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory_bytes()


def _minutes(count: float) -> str:
    """`1 minute`, `2.5 minutes`."""
    return f"{count:g} minute{'' if count == 1 else 's'}"


def _with(plan: Plan, field: str, value: object, reason: str) -> Plan:
    """The plan with one value changed and its reason noted."""
    return plan.model_copy(update={field: value, "reasons": {**plan.reasons, field: reason}})
