"""A training that is killed on purpose: `python -m microtome.doctor.dying DATA PLAN RUN STEP` ends itself, without a word, after STEP."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microtome.data.dataset import open_dataset
from microtome.training.folder import read_plan
from microtome.training.run import train


def main(words: Sequence[str]) -> None:
    """Train on the processor until the step is done and logged; nothing of ours runs after that."""
    data, plan, out, step = words

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == int(step):
            # Windows has no signal that cannot be caught; what it makes of this one is the same.
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    train(open_dataset(Path(data)), read_plan(Path(plan)), Path(out), device="cpu", on_event=kill)


if __name__ == "__main__":
    main(sys.argv[1:])
