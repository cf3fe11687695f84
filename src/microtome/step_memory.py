"""Memory of a training step, as its network's layers say, and what is made smaller where there is less of it.

The network is followed without values (`models.trace`); each size and network once.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from microtome.config import NetworkConfig, Plan
from microtome.fingerprint import Fingerprint
from microtome.geometry import Shape, format_shape
from microtome.models.network import Network
from microtome.models.registry import build
from microtome.models.segments import recomputed_values
from microtome.models.trace import trace

# Bytes that a training step holds for each value that a layer puts out: measured with autograd's saved activations, gradients
# and workspace (benchmarks/step_memory.py).
BYTES_A_VALUE = MappingProxyType({"bf16": 5.0, "fp32": 7.5})
# The loss holds logits, probabilities, their products with the labels and gradients of each class in float32.
BYTES_A_CLASS = 40
# Fewer patches than this are no batch: the statistics of batch norm would be those of one image.
SMALLEST_BATCH = 4
# Share of a side by which a patch may be smaller than wanted to be of a size that the network takes.
ROUNDED_DOWN = 0.15
# Of the memory there is; the rest is for the optimiser, the images, and what the estimate does not know.
FULL_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What there is to spend.

    Attributes:
        minutes: wall time of the whole run; None: as long as the plan's steps take.
        memory_bytes: memory that training may use.
        gpu: whether a GPU does the work.
        bf16: whether the processor multiplies bfloat16 in hardware.
    """

    minutes: float | None
    memory_bytes: int
    gpu: bool = False
    bf16: bool = False


def fit_patch(
    patch_vox: Shape, network: NetworkConfig, data: Fingerprint, resources: Resources, *, precision: str, reason: str
) -> tuple[Shape, str]:
    """The nearest size that the network takes, or the largest that fits into memory with all that `save_memory` can do."""
    built = _built(network, len(patch_vox), data.channels, len(data.classes))
    border = 2 * built.context_vox
    fitted = tuple(_fitting(built.nearest_sizes(n + border, axis), n + border) for axis, n in enumerate(patch_vox))
    if border:
        reason += f", and the border of {built.context_vox} that this network needs on every side"
    wanted = fitted
    # A network of one of the papers has no widths to be planned: there one patch has to do.
    patches = SMALLEST_BATCH if network.widths and _batch_normed(built) else 1
    room = FULL_SHARE * resources.memory_bytes
    sizes = list(_ever_smaller(built, wanted))
    # The network is followed for few of them: smaller ones take less.
    first = bisect_left(
        sizes, True, key=lambda size: patches * patch_bytes(size, network, precision, len(data.classes), checkpointing=True) <= room
    )
    fitted = sizes[min(first, len(sizes) - 1)]
    if fitted != wanted:
        words = f"made smaller than {format_shape(wanted)}, so that {patches} fit into {resources.memory_bytes / 2**30:.1f} GB"
        reason = f"{words} with activations computed twice"
    return fitted, f"{format_shape(fitted)}: {reason}; a size that the network can halve" if fitted != patch_vox else reason


def _ever_smaller(built: Network, patch_vox: Shape) -> Iterator[Shape]:
    """The patch, then each time the next smaller size of its longest axis that the network takes, while there is one."""
    axis: int | None = 0
    while axis is not None:
        yield patch_vox
        smaller = [built.nearest_sizes(n - 1, axis)[0] for axis, n in enumerate(patch_vox)]
        axis = max((i for i, n in enumerate(patch_vox) if smaller[i] < n), key=patch_vox.__getitem__, default=None)
        patch_vox = tuple(smaller[i] if i == axis else n for i, n in enumerate(patch_vox))


def _fitting(sizes: tuple[int, int], wanted: int) -> int:
    """The smaller of two sizes that fit if it is nearly the wanted one, else the larger.

    A patch larger than the images is computed for voxels that nobody annotated; what a slightly smaller one leaves out of one
    sample is in the next, and prediction takes the whole image at once where a step could hold it.
    """
    smaller, larger = sizes
    return smaller if wanted * (1 - ROUNDED_DOWN) <= smaller <= wanted else larger


@lru_cache(maxsize=256)
def patch_bytes(patch_vox: Shape, network: NetworkConfig, precision: str, classes: int, *, checkpointing: bool = False) -> float:
    """Memory of one patch in a training step, about: what each layer of the network puts out, and probabilities of the loss."""
    built = _built(network, len(patch_vox), 1, classes)
    sizes = tuple(built.nearest_sizes(n, axis)[1] for axis, n in enumerate(patch_vox))
    graph = trace(built, (1, *sizes))
    values = recomputed_values(built, graph) if checkpointing else graph.values
    return values * BYTES_A_VALUE[precision] + float(np.prod(sizes)) * classes * BYTES_A_CLASS


def step_bytes(plan: Plan) -> float:
    """Memory of a training step of a plan, about, but for weights and optimiser."""
    together = min(plan.micro_batch or plan.batch, plan.batch)
    return together * patch_bytes(plan.patch_vox, plan.network, plan.precision, len(plan.classes), checkpointing=plan.checkpointing)


def save_memory(plan: Plan, resources: Resources) -> Plan:
    """The plan as it is if a step of it fits; else in micro-batches, and where those do not do with activations computed twice.

    Micro-batches only cost a little speed, but batch norm takes its statistics from each: with it they hold SMALLEST_BATCH
    patches or more, but for even parts, where computing twice makes room for that.
    """
    reasons = {field: reason for field, reason in plan.reasons.items() if field not in ("micro_batch", "checkpointing")}
    plan = plan.model_copy(update={"micro_batch": 0, "checkpointing": False, "reasons": reasons})
    room, free, needed = FULL_SHARE * resources.memory_bytes, f"{resources.memory_bytes / 2**30:.1f} GB", step_bytes(plan)
    if needed <= room:
        return plan
    once, twice = int(room * plan.batch / needed), int(room / step_bytes(plan.model_copy(update={"batch": 1, "checkpointing": True})))
    least = min(SMALLEST_BATCH, plan.batch) if _batch_normed(_built(plan.network, plan.dims, 1, len(plan.classes))) else 1
    checkpointing = once < least and twice > once
    parts = -(-plan.batch // max(1, twice if checkpointing else once))
    micro_batch = -(-plan.batch // parts) if parts > 1 else 0
    if micro_batch:
        reasons["micro_batch"] = f"{micro_batch} of {plan.batch} patches at a time, as all take about {needed / 2**30:.1f} of {free}"
    if checkpointing:
        reasons["checkpointing"] = f"slower by about a quarter, but patches that fit into {free} at a time are {twice} instead of {once}"
    return plan.model_copy(update={"micro_batch": micro_batch, "checkpointing": checkpointing, "reasons": reasons})


@lru_cache(maxsize=16)
def _built(network: NetworkConfig, dims: int, channels: int, classes: int) -> Network:
    """A network of shapes alone, the same one for all who ask: not to be followed by two threads at once."""
    with torch.device("meta"):
        return build(network.name, dims=dims, in_channels=channels, classes=classes, config=network)


def _batch_normed(network: Network) -> bool:
    return any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in network.modules())
