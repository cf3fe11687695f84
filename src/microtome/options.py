"""Options that several commands share, and checks of what was typed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microtome.errors import ConfigError, DataError, in_one_line, unknown_choice

if TYPE_CHECKING:
    from microtome.config import Plan
    from microtome.data.dataset import Dataset

# What the generators of random numbers take.
MOST_SEED = 2**32 - 1

Data = Annotated[Path, typer.Argument(metavar="DATA", help="Folder with images and masks.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `train --out` made.")]
Minutes = Annotated[float | None, typer.Option(help="Wall time of the whole run.", min=0.1)]
Memory = Annotated[float | None, typer.Option(help="GB that training may use; by default most of what is free.", min=0.1)]
Network = Annotated[str | None, typer.Option(help="One of `microtome networks`; modern_unet, or the recipe's, if not given.")]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=MOST_SEED)]
Dims = Annotated[int | None, typer.Option(help="2 or 3, whatever the images look like.", min=2, max=3)]
AnyRecipe = Annotated[str | None, typer.Option(help="default, unet2015, unet3d2016, vnet2016, pets2022 or nnunet: as that paper trained.")]
Recipe = Annotated[str, typer.Option(help="default, unet2015, unet3d2016, vnet2016, pets2022 or nnunet: as that paper trained.")]
Holdout = Annotated[str, typer.Option(help="cases: whole images validate; slices: annotated slices of sparsely annotated volumes.")]
Fold = Annotated[str, typer.Option(help="K/N: part K of N validates; all: everything trains, nothing validates.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Engine = Annotated[
    str,
    typer.Option(
        help="What computes: torch (the reference), torch-bf16, openvino, openvino-bf16, openvino-int8, onnxruntime; auto: the one that "
        "ends this job soonest. All are held to torch's answers on samples of the model; without samples, and with --head, it is torch."
    ),
]
Averaged = Annotated[
    str,
    typer.Option(
        help="none; mirror: average over mirrored versions; rotations: over 7 turned ones, of a model trained on images turned up to "
        "180 degrees. Slower, a little better."
    ),
]
Head = Annotated[int | None, typer.Option(help="Answer from a shallower nested U-Net (unetpp), 1 the shallowest: faster.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def one_of(word: str, given: str, known: Sequence[str]) -> Any:
    """The word that was given, if it is a known one."""
    if given not in known:
        raise unknown_choice(word, given, known)
    return given


def checked_holdout(given: str, fold: str | None) -> Any:
    """What validates; slices beside a fold in which nothing does would be ignored in silence."""
    chosen = one_of("--holdout", given, ("cases", "slices"))
    if chosen == "slices" and fold == "all":
        raise ConfigError(
            "--holdout slices", expected="a fold K/N", got="--fold all, in which nothing validates", do="leave one of them out", code="C003"
        )
    return chosen


def checked_fold(fold: str | None) -> str | None:
    """The fold that was asked for, if it can be one, before any time is spent on the data."""
    from microtome.data.split import parse_fold

    if fold is not None:
        parse_fold(fold)
    return fold


def check_target(path: Path | None, *suffixes: str, new: bool = False) -> None:
    """Refuse a file to write that is not named as what it will be: it may be somebody's image; or one that is there and has to be `new`."""
    if path is not None and (path.suffix.lower() not in suffixes or path.is_dir()):
        got = "a folder" if path.is_dir() else f"`{path.name}`"
        raise ConfigError(
            path, expected=f"the name of a file ending in {' or '.join(suffixes)}", got=got, do="give another name", code="C004"
        )

    if path is not None and new and path.exists():
        got, do = f"a file of {path.stat().st_size} bytes", "give another name, or remove it: it may have been edited"
        raise ConfigError(path, expected="the name of a new file", got=got, do=do, code="C005")


def check_there(data: Path) -> None:
    """Refuse a folder that is not there before anything is imported that takes seconds; `open_data` says the rest."""
    if not data.exists():
        do = "give the folder that holds both"
        raise DataError(data, expected="a folder of images and labels", got="nothing there", do=do, code="D001")


def refuse_beside(word: str, others: Mapping[str, object], do: str = "change the plan instead, or start a new run") -> None:
    """Options that would be ignored in silence beside `word`."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(word, expected="none of " + ", ".join(others), got=" ".join(given), do=do, code="C003")


def check_names(network: str | None, recipe: str | None) -> None:
    """Refuse a name that there is not, before any time is spent on the data."""
    from microtome.models.registry import find
    from microtome.training.recipes import find_recipe

    if network is not None:
        find(network)
    find_recipe(recipe or "default", network)


def changed_plan(plan: "Plan", *, minutes: float | None, steps: int | None, fold: str | None, seed: int | None) -> "Plan":
    """The plan with what was typed in its place, and reasons that say so."""
    given = {"minutes": minutes, "steps": steps, "fold": fold, "seed": seed}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    reasons = {**plan.reasons, **dict.fromkeys(changes, "as asked")}
    if minutes not in (None, plan.minutes):
        reasons["steps"] = "as they were planned; the run fits them to the minutes that were asked for"
    if steps is not None:
        changes["minutes"] = None
        reasons.pop("minutes", None)
    return plan.model_copy(update={**changes, "reasons": reasons})


def open_data(data: Path) -> "Dataset":
    """The dataset; what its files leave open is among its findings, so it is not said a second time as a warning."""
    import warnings

    from microtome.data.dataset import open_dataset
    from microtome.errors import DataWarning

    warnings.simplefilter("ignore", DataWarning)
    return open_dataset(data)


def one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning for people: without the place in the code that gave it."""
    return f"warning: {in_one_line(' '.join(str(message).split()))}\n"
