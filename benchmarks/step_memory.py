"""Memory of a training step for each value that a layer of the network puts out: what `step_memory.BYTES_A_VALUE` rounds up.

    python benchmarks/step_memory.py

Each row is a process of its own, because memory that a process has taken it keeps.
"""

import json
import resource
import subprocess
import sys

ROWS = [
    ("modern_unet", 2, 256, 8, "bf16"),
    ("modern_unet", 2, 256, 8, "fp32"),
    ("modern_unet", 3, 56, 4, "bf16"),
    ("modern_unet", 3, 56, 4, "fp32"),
    ("unet", 2, 380, 2, "bf16"),
    ("unet_same", 2, 160, 8, "bf16"),
    ("unet3d", 3, 108, 1, "bf16"),
    ("vnet", 3, 64, 2, "bf16"),
    ("attention_unet", 3, 64, 2, "bf16"),
    ("r2unet", 2, 128, 4, "bf16"),
    ("resunet", 2, 224, 4, "bf16"),
    ("dense_unet", 2, 224, 3, "bf16"),
    ("unetpp", 2, 256, 2, "bf16"),
    ("nnunet_resenc", 2, 256, 4, "bf16"),
]


def main() -> None:
    """Print a row for each configuration."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return
    for row in ROWS:
        command = [sys.executable, __file__, json.dumps(row)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print("{name} {dims}D side {side} batch {batch} {precision}: {bytes:.2f} bytes a value, {peak_mb} MB in all".format(**result))


def measure(name: str, dims: int, side: int, batch: int, precision: str) -> dict[str, object]:
    """Peak resident memory of three steps, less what the process held before."""
    import torch

    from microtome.config import NetworkConfig, Plan
    from microtome.machine import recycle_memory
    from microtome.models.registry import build
    from microtome.models.trace import trace
    from microtome.plan import choose_network
    from microtome.step_memory import Resources
    from microtome.training.rehearsal import step_seconds

    recycle_memory()
    patch = (side,) * dims
    network: NetworkConfig = choose_network(name, patch, (1.0,) * dims, Resources(minutes=10, memory_bytes=2**34))[0]
    plan = Plan(dims=dims, channels=1, classes=("a", "b"), spacing_mm=(1.0,) * dims, network=network, patch_vox=patch, batch=batch, steps=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step_seconds(plan, torch.device("cpu"), (precision,), repeats=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    built = build(name, dims=dims, in_channels=1, classes=2, config=network)
    # The weights and their gradients are not the batch's.
    weights = 8 * sum(parameter.numel() for parameter in built.parameters())
    each = (peak - before - weights) / (batch * trace(built, (1, *patch)).values)
    return {"name": name, "dims": dims, "side": side, "batch": batch, "precision": precision, "bytes": each, "peak_mb": peak // 2**20}


if __name__ == "__main__":
    main()
