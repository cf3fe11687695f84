"""What runs a finished network: device, precision, memory layout. The only place that knows them.

`torch` in float32 is the oracle; the others must agree with it.
"""

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from microtome.errors import ConfigError

# glibc's numbers of mallopt's parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def recycle_memory() -> bool:
    """Keep freed memory in the process instead of giving every activation back to the kernel; True if that was possible.

    glibc returns each large block to the kernel, which clears it anew page by page for the next layer: touching fresh
    memory is over ten times slower than touching recycled memory. Costs 10 to 60 % more resident memory. Call it before
    the first large tensor; MICROTOME_RECYCLE_MEMORY=0 switches it off. Nothing happens outside of glibc.
    """
    if not sys.platform.startswith("linux") or os.environ.get("MICROTOME_RECYCLE_MEMORY") == "0":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    accepted = libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 1 << 16)
    return all(accepted)


def processor_has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (where not, bf16 is slower than float32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return False
    text = flags.read_text(encoding="ascii", errors="ignore")
    return "avx512_bf16" in text or "amx_bf16" in text


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device, or none on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", expected="auto, cpu or cuda", got=f"`{name}`", do="give another --device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", expected="a GPU that torch can use", got=f"`{name}` and none", do="give --device cpu")
    return device


def to_device(network: nn.Module, device: torch.device, dims: int) -> nn.Module:
    """The network on its device, channels last: convolutions then read memory in one sweep."""
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    return network.to(device).to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Network arithmetic in this precision ("fp32" or "bf16"); weights stay float32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


@dataclass(frozen=True, kw_only=True)
class TorchEngine:
    """A network in evaluation mode, ready to be given arrays.

    Attributes:
        network: built by `models.registry.build`.
        device: where it lies.
        precision: "fp32" or "bf16".
        mirror_axes: axes of S over whose mirrored versions the output is averaged; empty: none.
    """

    network: nn.Module
    device: torch.device
    precision: str = "fp32"
    mirror_axes: tuple[int, ...] = ()

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S') float32 of one tile (C, *S); S' is S less the network's border on both sides."""
        image_BCS = torch.from_numpy(image_CS).unsqueeze(0).to(self.device)
        passes = [axes for n in range(len(self.mirror_axes) + 1) for axes in itertools.combinations(self.mirror_axes, n)]
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            total_BKS = self._mirrored(image_BCS, passes[0])
            for axes in passes[1:]:
                total_BKS += self._mirrored(image_BCS, axes)
        logits_KS: np.ndarray = (total_BKS / len(passes))[0].cpu().numpy()
        return logits_KS

    def _mirrored(self, image_BCS: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The output for the mirrored input, mirrored back."""
        flip = [axis + 2 for axis in axes]
        logits_BKS: Tensor = self.network(image_BCS.flip(flip) if flip else image_BCS)
        return (logits_BKS.flip(flip) if flip else logits_BKS).float()
