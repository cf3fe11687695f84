"""Where torch computes: device, precision, memory layout. The only place that knows them, with the torch engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from microtome import machine
from microtome.errors import ConfigError


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (where not, bf16 is slower than float32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return machine.processor_has_bf16()


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
        raise ConfigError("device", expected="auto, cpu or cuda", got=f"`{name}`", do="give another --device", code="C024") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", expected="auto, cpu or cuda", got=f"`{name}`", do="give another --device", code="C024")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", expected="a GPU that torch can use", got=f"`{name}` and none", do="give --device cpu", code="C024")
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(
            "device",
            expected=f"one of {torch.cuda.device_count()} GPUs, counted from 0",
            got=f"`{name}`",
            do="give --device cuda",
            code="C024",
        )
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
