"""A training step: forward, loss, backward, clip, optimiser; as people write it and as the product does it."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import SETTINGS, Setting, as_shipped, built, case, operations, plan_of
from benchmarks.timing import timed
from microtome.inference.devices import arithmetic, to_device
from microtome.machine import recycle_memory
from microtome.training.loop import crop_border
from microtome.training.losses import segmentation_loss

# The backward pass computes two products for each of the forward pass: for the inputs and for the weights.
PASSES = 3


def train(setting: str, engine: str) -> dict[str, Any]:
    """Time a step of batch 1. Engines: default, recycled memory, microtome-fp32, microtome-bf16."""
    recycle_memory()
    chosen = SETTINGS[setting]
    ours, precision = engine.startswith("microtome"), "bf16" if engine.endswith("bf16") else "fp32"
    image, label = case(chosen)
    image_BCS, label_BS = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
    network: nn.Module = built(chosen)
    label_BS = crop_border(label_BS, network.context_vox)  # type: ignore[arg-type]
    device = torch.device("cpu")
    if ours:
        network = to_device(network, device, chosen.dims)
        image_BCS = image_BCS.contiguous(memory_format=torch.channels_last if chosen.dims == 2 else torch.channels_last_3d)
    else:
        as_shipped(network)
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        with arithmetic(device, precision):
            outputs = network(image_BCS)
        loss(outputs, label_BS, chosen).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    answer: dict[str, Any] = timed(step, budget_seconds=3, most=3)
    return answer | {"operations": PASSES * operations(chosen), "precision": precision}


def loss(outputs: Tensor | list[Tensor], label_BS: Tensor, setting: Setting) -> Tensor:
    """Cross-entropy and Dice, the same for every engine."""
    return segmentation_loss(outputs if isinstance(outputs, list) else [outputs], label_BS, plan_of(setting).loss)
