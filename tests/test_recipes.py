"""Recipes: what each paper says stands in the plan, and each value says where it comes from."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from microtome import options
from microtome.config import Plan
from microtome.data.dataset import open_dataset
from microtome.errors import ConfigError
from microtome.fingerprint import Fingerprint
from microtome.models.registry import NETWORKS, build
from microtome.plan import draft_plan
from microtome.step_memory import Resources, save_memory, step_bytes
from microtome.training import rehearsal
from microtome.training.loop import learning_rate
from microtome.training.recipes import RECIPES, apply_recipe, check_dims, find_recipe
from tests.small import small_plan
from tests.test_report import two_dimensional

PAPERS = [name for name in RECIPES if name != "default"]


def facts(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "cases": 20,
        "channels": 1,
        "classes": ("background", "cell"),
        "shape_vox": (1024, 1024),
        "spacing_mm": (1.0, 1.0),
        "spacing_low_mm": (1.0, 1.0),
        "spacing_varies": False,
        "spacing_known": False,
        "formats": frozenset({"tiff"}),
        "jpeg_share": 0.0,
        "thinnest_vox": 10.0,
        "section_lag": None,
        "low": (0.0,),
        "high": (255.0,),
        "mean": (100.0,),
        "sd": (30.0,),
        "brightness_varies": 0.2,
        "hounsfield": False,
        "left_right_axis": None,
    }
    return Fingerprint(**{**values, **changes})


COLOUR = MappingProxyType({"channels": 3, "low": (0.0,) * 3, "high": (255.0,) * 3, "mean": (100.0,) * 3, "sd": (30.0,) * 3})


def volume_facts(**changes: Any) -> Fingerprint:
    volume: dict[str, Any] = {"shape_vox": (200, 300, 300), "spacing_mm": (1.0, 1.0, 1.0), "spacing_low_mm": (1.0, 1.0, 1.0)}
    return facts(**volume | {"spacing_known": True, "section_lag": 1.0, "formats": frozenset({"nifti"})} | changes)


def plan_of(name: str, data: Fingerprint, *, network: str | None = None, memory_gb: float = 64) -> Plan:
    recipe, resources = find_recipe(name, network), Resources(minutes=10, memory_bytes=int(memory_gb * 2**30), bf16=True)
    draft = draft_plan(data, resources, network=network or (recipe.networks or ("modern_unet",))[0], dims=recipe.dims)
    return apply_recipe(recipe, draft, data, resources)


def data_for(name: str) -> Fingerprint:
    return facts() if RECIPES[name].dims == (2,) else volume_facts()


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_of_a_recipe_says_where_it_comes_from(name: str) -> None:
    data, resources = data_for(name), Resources(minutes=10, memory_bytes=2**36, bf16=True)
    recipe = RECIPES[name]
    lines = recipe.fill(draft_plan(data, resources, network=recipe.networks[0], dims=recipe.dims), data, resources)
    assert {"network", "patch_vox", "batch", "loss", "augment", "optimiser"} <= set(lines)
    for field, (_, reason) in lines.items():
        assert reason.startswith(("paper", "article", "ours:")), field
        assert field in Plan.model_fields


@pytest.mark.parametrize("name", PAPERS)
def test_the_network_of_a_recipe_takes_its_patch(name: str) -> None:
    plan = plan_of(name, data_for(name))
    with torch.device("meta"):
        network = build(plan.network.name, dims=plan.dims, in_channels=1, classes=2, config=plan.network)
    assert all(network.valid_size(n, axis) for axis, n in enumerate(plan.patch_vox))
    assert plan.recipe == name


@pytest.mark.parametrize("name", [*PAPERS, "default"])
def test_recipes_train_networks_that_there_are(name: str) -> None:
    for network in RECIPES[name].networks:
        assert set(RECIPES[name].dims) <= set(NETWORKS[network].dims)


def test_unet2015_is_section_3_of_the_paper() -> None:
    plan = plan_of("unet2015", facts())
    assert plan.patch_vox == (572, 572)
    assert plan.batch == 1
    assert (plan.optimiser.name, plan.optimiser.momentum, plan.optimiser.nesterov) == ("sgd", 0.99, False)
    assert (plan.loss.dice, plan.loss.border_weight, plan.loss.border_sigma, plan.loss.balance_classes) == (0, 10, 5, True)
    assert (plan.augment.elastic_points, plan.augment.elastic_sd, plan.augment.elastic_kind) == ((3, 3), (10, 10), "bicubic")
    assert plan.augment.elastic_p == 1


def test_unet2015_sees_small_pictures_whole_and_bends_them_no_more() -> None:
    plan = plan_of("unet2015", facts(shape_vox=(256, 256)))
    # Sizes are 16 k + 60: 428 answers for 244 of the 256 pixels, and the next would be computed for pixels that there are not.
    assert plan.patch_vox == (428, 428)
    assert plan.augment.elastic_sd == pytest.approx((10 * 428 / 572,) * 2)


def test_unet3d2016_has_the_paper_s_patch_and_deformation() -> None:
    plan = plan_of("unet3d2016", volume_facts())
    assert plan.patch_vox == (116, 132, 132)
    assert plan.network.batch_statistics
    # It turns, scales and bends; it does not mirror.
    assert plan.augment.flip_axes == ()
    assert plan.augment.elastic_spacing == (32, 32, 32)
    assert plan.augment.elastic_sd == (4, 4, 4)
    assert plan.augment.elastic_kind == "bspline"


def test_unet3d2016_counts_its_32_voxels_along_the_finest_axis() -> None:
    plan = plan_of("unet3d2016", volume_facts(spacing_mm=(2.0, 1.0, 1.0), spacing_low_mm=(2.0, 1.0, 1.0)))
    assert plan.augment.elastic_spacing == (16, 32, 32)
    assert plan.augment.elastic_sd == (2, 4, 4)


def test_vnet2016_is_section_4_of_the_paper() -> None:
    plan = plan_of("vnet2016", volume_facts())
    assert plan.spacing_mm == (1.5, 1.0, 1.0)
    assert plan.patch_vox == (64, 128, 128)
    assert plan.batch == 2
    assert (plan.loss.cross_entropy, plan.loss.dice, plan.loss.dice_squares, plan.loss.dice_background) == (0, 1, True, False)
    assert (plan.augment.elastic_points, plan.augment.elastic_sd, plan.augment.histogram_p) == ((2, 2, 2), (15, 15, 15), 1)
    assert (plan.optimiser.learning_rate, plan.optimiser.momentum, plan.optimiser.clip_norm) == (1e-4, 0.99, 0)
    rates = [learning_rate(step, 30_000, plan) for step in (0, 24_999, 25_000, 29_999)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


def test_vnet2016_leaves_volumes_of_another_scale_at_their_own_voxels() -> None:
    plan = plan_of("vnet2016", volume_facts(spacing_mm=(0.002, 0.002, 0.002), spacing_low_mm=(0.002, 0.002, 0.002)))
    assert plan.spacing_mm == (0.002, 0.002, 0.002)
    assert plan.reasons["spacing_mm"].startswith("ours:")


def test_pets2022_is_the_worked_example() -> None:
    plan = plan_of("pets2022", facts(**COLOUR, classes=("pet", "background", "border"), formats=frozenset({"jpeg"}), jpeg_share=1.0))
    assert plan.resize_vox == plan.patch_vox == (160, 160)
    assert plan.batch == 8
    assert plan.normalisation.kind == "none"
    assert (plan.loss.activation, plan.loss.dice) == ("sigmoid", 0)
    assert (plan.optimiser.name, plan.optimiser.learning_rate, plan.optimiser.schedule) == ("rmsprop", 1e-3, "constant")
    changes = [value for name, value in plan.augment if name.endswith("_p")]
    assert changes == [0.0] * len(changes)
    assert not plan.augment.flip_axes


def test_nnunet_is_its_second_version() -> None:
    plan = plan_of("nnunet", volume_facts(shape_vox=(300, 300, 300)))
    # The authors' rules give 128^3 for large isotropic volumes at 8 GB, pooled five times.
    assert plan.patch_vox == (128, 128, 128)
    assert plan.batch == 2
    assert len(plan.network.strides) == 6
    assert plan.network.supervised_levels == 5
    assert [w / sum(plan.loss.level_weights) for w in plan.loss.level_weights] == pytest.approx(
        [0.5333, 0.2667, 0.1333, 0.0667, 0], abs=1e-4
    )
    assert (plan.optimiser.name, plan.optimiser.momentum, plan.optimiser.nesterov, plan.optimiser.weight_decay) == ("sgd", 0.99, True, 3e-5)
    assert learning_rate(500, 1000, plan) == pytest.approx(0.01 * 0.5**0.9)
    assert (plan.augment.elastic_p, plan.augment.scale, plan.augment.gamma_inverted_p) == (0, (0.7, 1.4), 0.1)
    assert not plan.loss.dice_background


def test_nnunet_puts_a_third_of_a_batch_on_a_class_in_whole_patches() -> None:
    assert plan_of("nnunet", volume_facts(shape_vox=(300, 300, 300))).foreground == pytest.approx(1 / 2)
    plan = plan_of("nnunet", facts(shape_vox=(512, 512), cases=1000))
    assert plan.batch == 12
    assert plan.foreground == pytest.approx(4 / 12)


def test_nnunet_counts_all_sections_of_a_stack_that_it_sees_one_by_one() -> None:
    thick = volume_facts(shape_vox=(30, 512, 512), spacing_mm=(6.0, 1.0, 1.0), spacing_low_mm=(6.0, 1.0, 1.0), cases=10)
    stacks, pictures = plan_of("nnunet", thick), plan_of("nnunet", facts(shape_vox=(512, 512), cases=300))
    assert (stacks.dims, stacks.patch_vox) == (2, pictures.patch_vox)
    assert stacks.batch == pictures.batch == 12


@pytest.mark.parametrize("memory_gb", [2, 4, 8, 16])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["vnet2016", "nnunet", "unet3d2016"])
def test_a_recipe_for_volumes_leaves_room_in_the_memory_that_there_is(name: str, bf16: bool, memory_gb: float) -> None:
    recipe, resources = RECIPES[name], Resources(minutes=10, memory_bytes=int(memory_gb * 2**30), bf16=bf16)
    draft = draft_plan(volume_facts(), resources, network=recipe.networks[0], dims=recipe.dims)
    plan = apply_recipe(recipe, draft, volume_facts(), resources)
    assert step_bytes(save_memory(plan, resources)) < 0.65 * resources.memory_bytes


def test_nnunet_s_residual_encoder_can_be_asked_for() -> None:
    plan = plan_of("nnunet", volume_facts(), network="nnunet_resenc")
    assert plan.network.name == "nnunet_resenc"


def test_the_default_recipe_changes_nothing() -> None:
    data, resources = facts(), Resources(minutes=10, memory_bytes=2**34, bf16=True)
    draft = draft_plan(data, resources)
    assert apply_recipe(find_recipe("default"), draft, data, resources) == draft


def test_a_recipe_for_volumes_refuses_pictures() -> None:
    with pytest.raises(ConfigError, match="3D images for the recipe vnet2016, got 2D"):
        plan_of("vnet2016", facts())


def test_a_recipe_for_volumes_names_the_recipes_for_pictures_before_any_network_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "take_fingerprint", None)
    two_dimensional(tmp_path)
    named = "choose another --recipe: one of default, unet2015, pets2022, nnunet"
    with pytest.raises(ConfigError, match=f"3D images for the recipe unet3d2016, got 2D; {named}"):
        rehearsal.make_plan(open_dataset(tmp_path), steps=1, recipe="unet3d2016")


@pytest.mark.parametrize("dims", [2, 3])
def test_the_recipes_that_are_named_instead_take_these_images(dims: int) -> None:
    for recipe in RECIPES.values():
        if dims in recipe.dims:
            check_dims(recipe, dims)
        else:
            with pytest.raises(ConfigError) as refused:
                check_dims(recipe, dims)
            assert all(dims in RECIPES[name].dims for name in refused.value.do.partition("one of ")[2].split(", "))


def test_an_unknown_recipe_and_a_network_of_another_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean `vnet2016`"):
        find_recipe("vnet2015")
    with pytest.raises(ConfigError, match="the network unet for the recipe unet2015, got `vnet`"):
        find_recipe("unet2015", "vnet")


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("poly", 0.5**0.9), ("constant", 1.0), ("steps", 0.01)])
def test_each_schedule_begins_at_its_rate_and_is_known_half_way(schedule: str, half: float) -> None:
    plan = small_plan(steps=100, warmup=0, optimiser={"schedule": schedule, "decay_at": (0.25, 0.5, 0.75)})
    top = plan.optimiser.learning_rate
    assert learning_rate(0, 100, plan) == pytest.approx(top)
    assert learning_rate(50, 100, plan) == pytest.approx(half * top)


def test_every_recipe_is_named_in_the_help() -> None:
    text = options.Recipe.__metadata__[0].help
    assert all(name in text for name in RECIPES)
