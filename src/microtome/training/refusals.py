"""What a plan is refused for before any image is prepared: other data, a patch that the network cannot take, memory that is not there."""

import torch

from microtome.config import Plan
from microtome.data.dataset import Dataset
from microtome.errors import ConfigError
from microtome.geometry import format_shape
from microtome.models.network import Network
from microtome.step_memory import step_bytes
from microtome.training.ranks import Ranks, most_at_once
from microtome.training.rehearsal import free_memory


def check_plan(dataset: Dataset, plan: Plan) -> None:
    """Refuse a plan that was made for other data.

    Raises:
        ConfigError: says what does not fit.
    """
    if plan.classes != dataset.legend.names:
        got = f"a plan for {', '.join(plan.classes)}"
        raise ConfigError(
            dataset.root, expected=f"the classes {', '.join(dataset.legend.names)}", got=got, do="plan anew for this data", code="C041"
        )
    axes = {len(header.shape_vox) for header in dataset.headers.values()}
    if axes - {len(plan.spacing_mm)}:
        got = f"images with {sorted(axes)} axes"
        raise ConfigError(
            dataset.root, expected=f"{len(plan.spacing_mm)} axes as in the plan", got=got, do="plan anew for this data", code="C041"
        )
    if dataset.channel_names and len(dataset.channel_names) != plan.channels:
        got = f"{len(dataset.channel_names)}"
        raise ConfigError(
            dataset.root, expected=f"{plan.channels} channels as in the plan", got=got, do="plan anew for this data", code="C041"
        )


def check_patch(network: Network, plan: Plan) -> None:
    """Refuse a patch that the network cannot take, before any image is prepared for it.

    Raises:
        ConfigError: says what does not fit.
    """
    for axis, size in enumerate(plan.patch_vox):
        if not network.valid_size(size, axis):
            near = " or ".join(map(str, sorted(set(network.nearest_sizes(size, axis)))))
            raise ConfigError(
                "patch_vox", expected=f"{near} along axis {axis} for {plan.network.name}", got=str(size), do="change the plan", code="C036"
            )


def check_memory(plan: Plan, device: torch.device, ranks: Ranks) -> None:
    """Refuse a plan that would fill the memory and be ended by the system, without a word, in its first step.

    Raises:
        ConfigError: says what does not fit.
    """
    free = free_memory(device) // (ranks.beside if device.type == "cpu" else 1)
    needed = step_bytes(plan.model_copy(update={"micro_batch": most_at_once(plan.batch, plan.micro_batch, ranks.count)}))
    if needed > free:
        got = f"about {needed / 2**30:.1f} GB for {plan.batch} patches of {format_shape(plan.patch_vox)}"
        do = "make micro_batch, batch or patch_vox smaller, or set checkpointing: true"
        raise ConfigError("plan", expected=f"at most the {free / 2**30:.1f} GB that are free", got=got, do=do, code="C042")
