"""Twenty steps on made cells give the losses that they gave before: a change of numbers is then meant, or found here.

The losses depend on torch's version, so there is a file a version. After a change that is meant to change them (or to add
a version), write the file anew and say why in the change's fragment:

    python -m tests.test_golden
"""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from microtome.config import OptimiserConfig
from microtome.data.synthetic import cells
from microtome.preprocess import normalise
from microtome.training.loop import Hooks, train_steps
from tests.small import one_thread, small_plan, stored_case
from tests.test_checkpoint import fresh

__all__ = ["one_thread"]

STEPS = 20
ASSETS = Path(__file__).parent / "assets"
GOLDEN = ASSETS / f"losses_torch_{torch.__version__.partition('+')[0]}.json"
# Different processors add up in different orders; over twenty steps that has grown to less than this.
TOLERANCE = 1e-4


def losses() -> list[float]:
    """The loss of each step, of a network with batch norm and two supervised levels, with all augmentation."""
    plan = small_plan(steps=STEPS, patch_vox=(48, 48), batch=3, optimiser=OptimiserConfig(learning_rate=1e-3))
    pictures = [cells((64, 72), seed=seed, count=6) for seed in range(3)]
    cases = [stored_case(picture.label, normalise(picture.image[None], plan.normalisation)) for picture in pictures]
    # A third is annotated on its left half only.
    label = np.array(cases[2].label)
    label[:, 36:] = -1
    cases[2] = stored_case(label, cases[2].image)
    found: list[float] = []

    def log(event: Any) -> None:
        if event["event"] == "step":
            found.append(event["loss"])

    hooks = Hooks(log=log, validate=lambda state: {"score": 0.0}, save=lambda state, is_best: None, seconds_left=lambda: None)
    # Not every machine has a compiler, and twenty steps make more of the compiled warp's rounding than the tolerance.
    with mock.patch.dict(os.environ, MICROTOME_COMPILED="0"):
        train_steps(fresh(plan), cases, plan, torch.device("cpu"), hooks)
    return found


def test_twenty_steps_give_the_losses_that_they_gave_before() -> None:
    if not GOLDEN.exists():
        pytest.skip(f"no losses for this torch: {GOLDEN} is not there (write it: python -m tests.test_golden)")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    assert len(golden) == STEPS
    assert losses() == pytest.approx(golden, abs=TOLERANCE)


def test_the_golden_losses_are_those_of_a_network_that_learns() -> None:
    for path in ASSETS.glob("losses_torch_*.json"):
        golden = json.loads(path.read_text(encoding="utf-8"))["losses"]
        assert sum(golden[-5:]) < 0.9 * sum(golden[:5]), path


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"losses": [round(value, 7) for value in losses()]}, indent=1) + "\n", encoding="utf-8")
