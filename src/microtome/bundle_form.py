"""What the description in a bundle's header must hold, by its schema: checked before anything is built from it."""

import math
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from microtome.config import Config, Plan, parse_config
from microtome.data.legend import Legend, LegendForm
from microtome.errors import ConfigError, DataError
from microtome.json_files import parse_json

SCHEMA = 2
# The oldest microtome that reads what is written here. Raise it with the schema, and when the plan gains a field that older
# versions would refuse; then `python -m tests.golden_bundles`.
NEEDS = "microtome >= 0.1"
# Each happened with the probability that plans of before 0.1 call `intensity_p`.
FIRST_CHANCES = ("contrast_p", "brightness_p", "gamma_p", "noise_p", "blur_p", "low_resolution_p")


def read_document(path: Path, header: str) -> dict[str, Any]:
    """The description of the weights, of a schema that this version knows; its content is not looked at yet.

    Raises:
        DataError: not JSON, without a schema, or of a newer microtome, which is named where the file names it.
    """
    try:
        document = parse_json(header)
        schema = document["schema"]
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise ValueError(f"schema {str(schema)[:64]}")
    except (ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"[:200]
        raise DataError(
            path, expected="a description in JSON with its schema", got=got, do="copy it again: the file was damaged", code="D054"
        ) from None
    needed = _needed(document.get("needs"))
    if needed > _own_version():
        version = ".".join(map(str, needed))
        expected, got = f"bundle schema {SCHEMA} or older", f"{schema}, which needs microtome {version}"
        raise DataError(path, expected=expected, got=got, do=f"update microtome to {version} or newer", code="D053")
    if schema > SCHEMA:
        raise DataError(path, expected=f"bundle schema {SCHEMA} or older", got=str(schema)[:64], do="update microtome", code="D053")
    return dict(document)


def _needed(words: object) -> tuple[int, ...]:
    """The version in `microtome >= 0.1`; () where nothing of that form is said."""
    match = re.fullmatch(r"microtome >= (\d{1,6}(?:\.\d{1,6}){0,3})", words) if isinstance(words, str) else None
    return tuple(map(int, match[1].split("."))) if match else ()


@cache
def _own_version() -> tuple[int, ...]:
    """The numbers that this version begins with; larger than all where it is not known."""
    try:
        match = re.match(r"\d+(?:\.\d+)*", metadata.version("microtome"))
    except metadata.PackageNotFoundError:
        match = None
    return tuple(map(int, match[0].split("."))) if match else (10**9,)


class _SizesForm(Config):
    """Sizes as JSON holds them."""

    minimum: tuple[int, ...]
    step: tuple[int, ...]


class Form(Config):
    """What a description must hold, in every schema; the bytes were as they were written, but nobody knows by whom."""

    # Later versions may say more without another schema.
    model_config = ConfigDict(frozen=True, extra="ignore")

    plan: Plan
    legend: LegendForm
    provenance: dict[str, Any]
    sizes: _SizesForm | None = None
    context_vox: int | None = Field(None, ge=0, le=10_000)
    tensors: dict[str, str] = Field(default_factory=dict)

    def as_legend(self) -> Legend:
        """The legend that it holds."""
        return Legend(**dict(self.legend))

    def fault(self) -> str:
        """What does not fit together, in words; empty where all does."""
        classes = len(self.plan.classes)
        if len(self.legend.names) != classes:
            return f"a legend of {len(self.legend.names)} classes beside a plan of {classes}"
        sizes = (*self.sizes.minimum, *self.sizes.step) if self.sizes else (1,) * 2 * self.plan.dims
        if len(sizes) != 2 * self.plan.dims or min(sizes) < 1:
            return f"sizes {sizes} of a network of {self.plan.dims} axes"
        return ""


def parse_form(path: Path, document: Mapping[str, Any]) -> Form:
    """The checked content of a description.

    Raises:
        DataError: something lacks, is of another kind, or does not fit the rest.
    """
    do = "use the microtome that wrote it, or copy it again"
    try:
        form = parse_config(Form, {**document, "plan": _in_words_of_now(document.get("plan"))}, path)
    except ConfigError as error:
        raise DataError(path, expected=error.expected, got=error.got[:300], do=do, code="D200") from None
    if fault := form.fault():
        raise DataError(path, expected="a description that fits together", got=fault[:300], do=do, code="D200")
    return form


def _in_words_of_now(plan: object) -> object:
    """A plan as this version reads it: the first ones had one chance for all changes of grey values, and one weight in their loss."""
    if not isinstance(plan, dict):
        return plan
    plan, augment = dict(plan), plan.get("augment")
    if "dice_weight" in plan:
        plan["loss"] = {"dice": plan.pop("dice_weight")}
    if isinstance(augment, dict) and "intensity_p" in augment:
        chance = augment["intensity_p"]
        rest = {name: value for name, value in augment.items() if name != "intensity_p"}
        plan["augment"] = {**rest, **dict.fromkeys(FIRST_CHANCES, chance)}
    return plan


def temperature_of(path: Path, recorded: object) -> float:
    """A temperature that logits can be divided by."""
    if isinstance(recorded, int | float) and not isinstance(recorded, bool) and 0 < recorded < math.inf:
        return float(recorded)
    do = "copy it again, or train again"
    raise DataError(path, expected="a temperature above 0", got=str(recorded)[:64], do=do, code="D054")
