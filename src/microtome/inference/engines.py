"""What runs a finished network: device, precision, memory layout. The only place that knows them.

`torch` in float32 is the oracle; the others must agree with it.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from microtome.errors import ConfigError
from microtome.geometry import Spacing
from microtome.inference.averaging import TTA, mirrored_mean, rotated_mean
from microtome.models.network import Network

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


N = TypeVar("N", bound=nn.Module)


def to_device(network: N, device: torch.device, dims: int) -> N:
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
        tta: what the output is averaged over: "none", "mirror" (versions mirrored along `mirror_axes`), "rotations".
        mirror_axes: axes of S that may be mirrored.
        spacing_mm: voxel size of the network's grid, of which the last two count: what is turned is millimetres.
    """

    network: Network
    device: torch.device
    precision: str = "fp32"
    tta: TTA = "none"
    mirror_axes: tuple[int, ...] = ()
    spacing_mm: Spacing = (1.0, 1.0)

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S') float32 of one tile (C, *S); S' is S less the network's border on both sides."""
        image_BCS = torch.from_numpy(image_CS).unsqueeze(0).to(self.device)
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            if self.tta == "rotations":
                sizes, border = self.network.nearest_sizes, self.network.context_vox
                logits_BKS = rotated_mean(self.network, image_BCS, sizes, border, spacing_mm=self.spacing_mm)
            else:
                logits_BKS = mirrored_mean(self.network, image_BCS, self.mirror_axes if self.tta == "mirror" else ())
        logits_KS: np.ndarray = logits_BKS[0].cpu().numpy()
        return logits_KS
