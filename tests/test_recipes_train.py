"""Every recipe goes the whole road: planned, trained for two steps, loaded, and predicting in the image's own size."""

from pathlib import Path
from typing import Any

import pytest

from microtome.config import NetworkConfig, Plan
from microtome.data.dataset import open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.inference.predictor import load
from microtome.training.recipes import RECIPES
from microtome.training.rehearsal import make_plan
from microtome.training.run import train
from tests.small import one_thread  # noqa: F401 - a fixture

# The papers' networks made narrow and shallow; all else is the recipe's.
SMALL: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("default", {}, ()),
    ("unet2015", {"widths": (4, 8)}, (60, 60)),
    ("pets2022", {"widths": (4, 8)}, ()),
    ("unet3d2016", {"widths": (4, 8)}, (28, 28, 28)),
    ("vnet2016", {"widths": (4, 8)}, (16, 24, 32)),
    ("nnunet", {}, ()),
)


def small_form(plan: Plan, widths: dict[str, Any], patch: tuple[int, ...]) -> Plan:
    network = plan.network
    if plan.recipe == "nnunet":
        network = network.model_copy(update={"widths": (4,) * len(network.strides)})
    elif widths:
        network = NetworkConfig(**network.model_dump() | widths)
    return Plan.model_validate(
        plan.model_dump() | {"network": network, "patch_vox": patch or plan.patch_vox, "validations": 1, "warmup": 0}
    )


@pytest.mark.parametrize(("name", "widths", "patch"), SMALL, ids=[name for name, *_ in SMALL])
def test_it_trains_and_predicts(name: str, widths: dict[str, Any], patch: tuple[int, ...], tmp_path: Path) -> None:
    data = write_demo_data(tmp_path / "data", DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5))
    dataset = open_dataset(data.cells if 2 in RECIPES[name].dims else data.tubules)
    plan = small_form(make_plan(dataset, steps=2, recipe=name), widths, patch)
    folder = train(dataset, plan, tmp_path / "run")
    image = dataset.read_image(dataset.labelled[0])
    assert load(folder)(image).shape == image.shape_vox
    assert set(RECIPES) == {each for each, *_ in SMALL}
