"""Training recipes by name: a drafted plan -> the plan that a paper trained with, each value with its source.

What a recipe does not set (precision, validations, fold, in some the normalisation or the warm-up) stays as drafted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from microtome.config import Plan
from microtome.errors import ConfigError, unknown_choice
from microtome.fingerprint import Fingerprint
from microtome.step_memory import Resources
from microtome.training import papers

Fill = Callable[[Plan, Fingerprint, Resources], papers.Lines]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trained.

    Attributes:
        name: what users type.
        title: in a line.
        source: where to read it.
        networks: that it trains; the first if nobody says.
        dims: of its networks.
        fill: a drafted plan -> the fields that the recipe sets.
    """

    name: str
    title: str
    source: str
    networks: tuple[str, ...]
    dims: tuple[int, ...]
    fill: Fill


def apply_recipe(recipe: Recipe, draft: Plan, data: Fingerprint, resources: Resources) -> Plan:
    """The drafted plan with all that the recipe sets, and its reasons.

    Raises:
        ConfigError: the draft has other dimensions than the recipe.
    """
    check_dims(recipe, draft.dims)
    lines = recipe.fill(draft, data, resources)
    values = {name: getattr(draft, name) for name in Plan.model_fields}
    values |= {name: value for name, (value, _) in lines.items()}
    reasons = {**draft.reasons, **{name: reason for name, (_, reason) in lines.items()}}
    if lines:
        reasons["recipe"] = f"{recipe.title}: {recipe.source}"
    return Plan(**values | {"recipe": recipe.name, "reasons": reasons})


def check_dims(recipe: Recipe, dims: int) -> None:
    """Refuse images of so many axes that the recipe is not for, and name the recipes that are.

    Raises:
        ConfigError: the recipe is for others.
    """
    if dims not in recipe.dims:
        expected = f"{' or '.join(f'{n}D' for n in recipe.dims)} images for the recipe {recipe.name}"
        others = ", ".join(other.name for other in RECIPES.values() if dims in other.dims)
        raise ConfigError("recipe", expected=expected, got=f"{dims}D", do=f"choose another --recipe: one of {others}", code="C039")


def _nothing(draft: Plan, data: Fingerprint, resources: Resources) -> papers.Lines:
    """The drafted plan is the default recipe."""
    return {}


def _listed(*recipes: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({recipe.name: recipe for recipe in recipes})


RECIPES = _listed(
    Recipe(
        name="default",
        title="what we found to learn fastest in minutes",
        source="`microtome plan` gives the reason of each value",
        networks=(),
        dims=(2, 3),
        fill=_nothing,
    ),
    Recipe(
        name="unet2015",
        title="U-Net on electron microscopy and cells",
        source="Ronneberger et al. 2015, arXiv 1505.04597",
        networks=("unet",),
        dims=(2,),
        fill=papers.unet2015,
    ),
    Recipe(
        name="unet3d2016",
        title="3D U-Net on sparsely annotated volumes",
        source="Çiçek et al. 2016, arXiv 1606.06650",
        networks=("unet3d",),
        dims=(3,),
        fill=papers.unet3d2016,
    ),
    Recipe(
        name="vnet2016",
        title="V-Net on MR volumes of the prostate",
        source="Milletari et al. 2016, arXiv 1606.04797",
        networks=("vnet",),
        dims=(3,),
        fill=papers.vnet2016,
    ),
    Recipe(
        name="pets2022",
        title="the worked example on photographs of pets",
        source="Paperspace blog, U-Net architecture for image segmentation",
        networks=("unet_same",),
        dims=(2,),
        fill=papers.pets2022,
    ),
    Recipe(
        name="nnunet",
        title="nnU-Net, version 2: self-configuring",
        source="Isensee et al. 2021, doi 10.1038/s41592-020-01008-z, and the authors' code",
        networks=("nnunet_plain", "nnunet_resenc"),
        dims=(2, 3),
        fill=papers.nnunet,
    ),
)


def find_recipe(name: str, network: str | None = None) -> Recipe:
    """The recipe of that name, if it trains that network.

    Raises:
        ConfigError: there is none, or it trains another network.
    """
    if name not in RECIPES:
        raise unknown_choice("recipe", name, RECIPES)
    recipe = RECIPES[name]
    if network is not None and recipe.networks and network not in recipe.networks:
        expected = f"the network {' or '.join(recipe.networks)} for the recipe {name}"
        raise ConfigError("network", expected=expected, got=f"`{network}`", do="leave out --network or --recipe", code="C039")
    return recipe
