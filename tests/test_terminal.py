"""What a terminal shows of scores."""

import numpy as np
import pytest

from microtome.data.legend import Legend
from microtome.evaluation.scores import score_case, summarise
from microtome.terminal import Terminal, print_scores
from microtome.training.recipes import RECIPES
from tests.test_recipes import data_for, plan_of

LEGEND = Legend(names=("ground", "cell"), values=((0,), (1,)), background=0)


def test_a_distance_that_leaves_cases_out_says_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.zeros((8, 8), int)
    truth[2:5, 2:5] = 1
    moved = np.roll(truth, 1, axis=0)
    rows = score_case(truth, moved, (1.0, 1.0), LEGEND, case="found")
    rows += [row for number in range(10) for row in score_case(truth, 0 * truth, (1.0, 1.0), LEGEND, case=f"missed {number}")]
    print_scores(summarise(rows, LEGEND))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "hd95_mm 1.000 (10 undefined)" in lines
    [cell] = [line for line in lines if line.startswith("cell ")]
    assert cell.count("1.000 (10 undefined)") == 1
    # Of a case without a prediction Dice is 0 and defined.
    [dice] = [line for line in lines if line.startswith("dice ")]
    assert "undefined" not in dice


def test_scores_that_are_all_defined_say_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.eye(6, dtype=int)
    print_scores(summarise([row for name in "ab" for row in score_case(truth, truth, (1.0, 1.0), LEGEND, case=name)], LEGEND))
    shown = capsys.readouterr().out
    assert "undefined" not in shown
    assert "1.000 [1.000, 1.000]" in shown


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "default"])
def test_a_recipe_is_printed_with_its_source_and_every_value_that_it_set(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(name, data_for(name))
    Terminal().say_plan(plan)
    shown = capsys.readouterr().err
    assert f"recipe {name}: {RECIPES[name].title}: {RECIPES[name].source}\n" in shown
    for field in ("network", "patch_vox", "batch", "loss", "augment", "optimiser", "warmup" if name != "unet3d2016" else "loss"):
        assert f"  {field}" in shown
        assert plan.reasons[field] in shown
