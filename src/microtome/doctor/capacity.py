"""What torch sees of the machine: its GPUs, its arithmetic, and how large a 3D patch there is room for."""

from typing import Any

import torch

from microtome.inference.devices import has_bf16, pick_device
from microtome.plan import choose_network
from microtome.step_memory import FULL_SHARE, SMALLEST_BATCH, Resources, patch_bytes
from microtome.training.rehearsal import free_memory
from microtome.training.warp import compiled

# Memory goes with the voxels: what one size takes tells what others do.
SAMPLE_SIDE = 128
# What networks of five halvings take.
MULTIPLE = 32
# A patch this large is an image.
LARGEST_SIDE = 512


def seen_by_torch() -> dict[str, Any]:
    """The facts, as JSON takes them.

    `gpus` has name, bytes and whether bfloat16 is multiplied for each; `patch_vox` is the side of the largest cube that `microtome
    plan` would allow for training with the memory that is free now; `cuda` the version that torch was built for, "" for none.
    """
    device = pick_device()
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "",
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "compiled_warp": compiled(),
        "patch_vox": largest_patch(free_memory(device), bf16=has_bf16(device), gpu=device.type == "cuda"),
    }


def _gpu(number: int) -> dict[str, Any]:
    """One GPU."""
    device = torch.device("cuda", number)
    free, total = torch.cuda.mem_get_info(device)
    return {"name": torch.cuda.get_device_name(device), "free_bytes": free, "total_bytes": total, "bf16": has_bf16(device)}


def largest_patch(memory_bytes: int, *, bf16: bool, gpu: bool) -> int:
    """Side in voxels of the largest cube of one channel and two classes of which a step fits, activations computed twice.

    A multiple of 32, at most 512; 0 where not even 32 fits. It is the planner's own rule (`step_memory.fit_patch`).
    """
    resources = Resources(minutes=None, memory_bytes=memory_bytes, gpu=gpu, bf16=bf16)
    sample = (SAMPLE_SIDE,) * 3
    network, _ = choose_network("modern_unet", sample, (1.0, 1.0, 1.0), resources)
    taken = SMALLEST_BATCH * patch_bytes(sample, network, "bf16" if bf16 else "fp32", 2, checkpointing=True)
    side = SAMPLE_SIDE * (FULL_SHARE * memory_bytes / taken) ** (1 / 3)
    return min(LARGEST_SIDE, int(side) // MULTIPLE * MULTIPLE)
