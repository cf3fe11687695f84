"""The processor that engines compute on: its name, the threads they may take, whether a GPU may be beside it. No torch."""

import os
import platform
import sys
from pathlib import Path

from microtome.threads import usable_cores

# What drivers of GPUs that torch knows as `cuda` put there: NVIDIA's own, WSL's, AMD's.
_GPU_MARKS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def threads() -> int:
    """Threads for one engine: OMP_NUM_THREADS where it is set, as torch takes it; else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return usable_cores()


def processor_name() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="ignore").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def may_have_gpu() -> bool:
    """Whether it is worth asking torch for a GPU: asking costs the seconds that importing torch takes. Windows leaves no mark."""
    return sys.platform == "win32" or any(Path(mark).exists() for mark in _GPU_MARKS)
