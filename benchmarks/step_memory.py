"""Memory of a training step for each voxel of a batch and each channel of the finest level: what `plan.BYTES_A_VOXEL` rounds up.

    python benchmarks/step_memory.py

Each row is a process of its own, because memory that a process has taken it keeps.
"""

import json
import resource
import subprocess
import sys

ROWS = [(2, 256, 8, "bf16"), (2, 256, 8, "fp32"), (2, 512, 4, "bf16"), (3, 56, 4, "bf16"), (3, 56, 4, "fp32"), (3, 80, 2, "bf16")]


def main() -> None:
    """Print a row for each configuration."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return
    for row in ROWS:
        command = [sys.executable, __file__, json.dumps(row)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print("{dims}D side {side} batch {batch} {precision}: {bytes:.0f} bytes a voxel and channel, {peak_mb} MB in all".format(**result))


def measure(dims: int, side: int, batch: int, precision: str) -> dict[str, object]:
    """Peak resident memory of three steps, less what the process held before."""
    import torch

    from microtome.config import NetworkConfig, Plan
    from microtome.inference.engines import recycle_memory
    from microtome.plan import Resources, choose_network
    from microtome.training.rehearsal import step_seconds

    recycle_memory()
    patch = (side,) * dims
    network: NetworkConfig = choose_network("modern_unet", patch, (1.0,) * dims, Resources(minutes=10, memory_bytes=2**34))[0]
    plan = Plan(dims=dims, channels=1, classes=("a", "b"), spacing_mm=(1.0,) * dims, network=network, patch_vox=patch, batch=batch, steps=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step_seconds(plan, torch.device("cpu"), (precision,), repeats=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values = (peak - before) / (batch * side**dims * network.widths[0])
    return {"dims": dims, "side": side, "batch": batch, "precision": precision, "bytes": values, "peak_mb": peak // 2**20}


if __name__ == "__main__":
    main()
