"""The experiments: each description is complete, has been run as it stands, and is on the page as it came out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments import pages, run
from microtome.config import Plan
from microtome.models.registry import NETWORKS
from tests.small import one_thread, small_plan  # noqa: F401 - a fixture

DESCRIPTIONS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(run.HERE.glob("*.yaml"))}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_says_claim_setting_and_what_came_out(name: str) -> None:
    described = DESCRIPTIONS[name]
    assert all(described[part] for part in ("title", "claim", "setting", "found", "columns", "seeds", "runs"))
    assert set(described["columns"]) <= set(pages.WORDS)
    assert all(run.merged(described["all"], each)["network"] in NETWORKS for each in described["runs"])


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_run_of_a_description_has_its_results(name: str) -> None:
    rows = run.read_results(name)["rows"]
    wanted = {(each["name"], seed) for each in DESCRIPTIONS[name]["runs"] for seed in DESCRIPTIONS[name]["seeds"]}
    assert {(row["name"], row["seed"]) for row in rows} == wanted


def test_the_page_shows_the_results() -> None:
    assert pages.PAGE.read_text(encoding="utf-8") == pages.page(), "run `python -m experiments.pages`"


def test_what_a_run_says_goes_over_what_all_say() -> None:
    assert run.merged({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 4}, "e": 5}) == {"a": 1, "b": {"c": 2, "d": 4}, "e": 5}


def test_a_changed_plan_is_checked() -> None:
    plan = run.changed(small_plan(), {"batch": 3, "loss": {"dice": 0.5}})
    assert isinstance(plan, Plan)
    assert (plan.batch, plan.loss.dice, plan.loss.cross_entropy) == (3, 0.5, 1)
    with pytest.raises(ValueError, match="batch"):
        run.changed(small_plan(), {"batch": 0})


def test_objects_that_were_merged_count_as_missed() -> None:
    truth = np.zeros((8, 12), int)
    truth[1:4, 1:5], truth[1:4, 5:9], truth[6:8, 1:4] = 1, 2, 3
    assert run.f1_of_objects(truth, truth != 0) == pytest.approx(2 * 1 / (3 + 2))
    apart = truth.copy()
    apart[:, 5] = 0
    # The second has 9 of its 12 pixels left.
    assert run.f1_of_objects(truth, apart) == 1


@pytest.mark.filterwarnings("ignore::microtome.errors.DataWarning")
def test_a_run_makes_data_trains_predicts_and_scores(tmp_path: Path) -> None:
    data: dict[str, Any] = {"kind": "cells", "shape": [48, 48], "count": 4, "images": 2, "unseen": 2, "objects": True}
    plan = {"network": {"widths": [4, 8]}, "patch_vox": [32, 32], "batch": 2, "loss": {"border_weight": 10}}
    row = run.run_one({"data": data, "seed": 0, "steps": 2, "network": "unet_same", "plan": plan}, tmp_path)
    assert {"iou", "dice", "f1_objects", "train_seconds", "predict_seconds"} == set(row)
    assert 0 <= row["iou"] <= row["dice"] <= 1
