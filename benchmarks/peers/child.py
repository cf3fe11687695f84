"""One work by one program in a process of its own, as `benchmarks.child`, in the peers' environment."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import child
from benchmarks.timing import timed

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "prepare": "benchmarks.peers.volumes:prepare",
        "predict": "benchmarks.peers.volumes:predict",
        "augment": "benchmarks.peers.augmentation:peer_augment",
        "train": "benchmarks.peers.child:train",
        "help": "benchmarks.peers.child:ask_help",
    }
)


def train(setting: str, engine: str) -> dict[str, Any]:
    """Time a training step of the same network by nnU-Net or by us."""
    if engine == "nnU-Net":
        from benchmarks.peers.nnunet import their_step

        return their_step(setting)
    from benchmarks.step import train as our_step

    return our_step(setting, engine)


def ask_help(engine: str) -> dict[str, Any]:
    """Time asking a program for help."""
    programs = Path(sys.executable).parent
    words = {"nnU-Net": ["nnUNetv2_predict", "-h"], "microtome": ["microtome", "--help"]}[engine]
    measured: dict[str, Any] = timed(
        lambda: subprocess.run([str(programs / words[0]), *words[1:]], capture_output=True, check=True), most=3
    )
    return measured


if __name__ == "__main__":
    child.answer(KINDS)
