"""Every setting of the program: frozen, validated when made, documented field by field; no torch.

A setting exists once, here. `plan.py` fills it in and gives each choice its reason; `PLAN.yaml` is
this file's `Plan` written down, and may be edited and given back.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from microtome.errors import ConfigError


class Config(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NormalisationConfig(Config):
    """How grey values become network input: `(clip(x, low, high) - mean) / sd`, a channel at a time."""

    kind: Literal["image", "dataset", "none"] = Field(
        "image", description="image: mean and sd of each image by itself; dataset: the values below for every image; none: as in the file"
    )
    low: tuple[float, ...] = Field((), description="clip below this, a value a channel (dataset only)")
    high: tuple[float, ...] = Field((), description="clip above this, a value a channel (dataset only)")
    mean: tuple[float, ...] = Field((), description="subtracted, a value a channel (dataset only)")
    sd: tuple[float, ...] = Field((), description="divided by, a value a channel (dataset only)")


class NetworkConfig(Config):
    """A network by name, with the sizes that the plan sets."""

    name: str = Field("modern_unet", description="a name that `microtome networks` lists")
    widths: tuple[int, ...] = Field((), description="channels of each level, finest first; empty: as in the paper")
    strides: tuple[tuple[int, ...], ...] = Field((), description="down-sampling into each level along S; first all 1")
    kernels: tuple[tuple[int, ...], ...] = Field((), description="kernel size of each level along S")
    convolutions: int | tuple[int, ...] = Field(
        2, description="convolutions (or residual units) a level: one number, or one for each level"
    )
    residual: bool = Field(False, description="residual units in the encoder")
    norm: Literal["batch", "instance", "none"] = Field("batch", description="normalisation after each convolution")
    variant: str = Field("", description="a variant that `microtome networks` lists; empty: the first")
    supervised_levels: int = Field(1, ge=1, description="decoder levels (UNet++: nested U-Nets) with a loss of their own, finest first")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="share of dropped values where the network has dropout; null: as in its paper"
    )
    batch_statistics: bool = Field(
        False, description="3D U-Net: the norm takes the statistics of what it sees at prediction too, as in its paper"
    )

    @field_validator("convolutions")
    @classmethod
    def _positive(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if not all(1 <= number <= 32 for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{value} must be from 1 to 32")
        return value


class LossConfig(Config):
    """What is minimised: a weighted sum of terms, each over annotated voxels only."""

    cross_entropy: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    dice: float = Field(1.0, ge=0, description="weight of the soft Dice loss")
    focal: float = Field(0.0, ge=0, description="weight of the focal loss")
    tversky: float = Field(0.0, ge=0, description="weight of the Tversky loss")
    activation: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="how logits become probabilities; sigmoid: one a class, scaled to sum to 1"
    )
    class_weights: tuple[float, ...] = Field((), description="weight of each class in the cross-entropy; empty: 1")
    border_weight: float = Field(
        0.0, ge=0, description="w0 of U-Net's border map: weight of gaps between objects in cross-entropy and focal loss; 0: off"
    )
    border_sigma: float = Field(5.0, gt=0, description="sigma of that map, in voxels of the plan's finest axis")
    balance_classes: bool = Field(False, description="the border map also weighs classes by how rare they are")
    dice_squares: bool = Field(False, description="squares in the Dice loss's denominator, as V-Net has it")
    dice_background: bool = Field(True, description="whether the Dice, focal and Tversky terms look at the first class too")
    focal_gamma: float = Field(2.0, ge=0, description="how much the focal loss leaves out what is easy")
    tversky_alpha: float = Field(0.3, ge=0, description="weight of false positives in the Tversky loss")
    tversky_beta: float = Field(0.7, ge=0, description="weight of false negatives in the Tversky loss")
    level_weights: tuple[float, ...] = Field(
        (), description="weight of each supervised level, finest first, scaled to sum to 1; empty: 1, 1/2, 1/4, ..."
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.cross_entropy + self.dice + self.focal + self.tversky:
            raise ValueError("one of cross_entropy, dice, focal and tversky must be above 0")
        if self.class_weights and not self.cross_entropy:
            raise ValueError(f"class_weights {self.class_weights} weigh the cross-entropy, and cross_entropy is 0")
        if self.border_weight and not self.cross_entropy + self.focal:
            raise ValueError(f"border_weight {self.border_weight} weighs cross-entropy and focal loss, and both are 0")
        if self.balance_classes and not self.border_weight:
            raise ValueError("balance_classes is a part of the border map, and border_weight is 0")
        if any(weight < 0 for weight in (*self.class_weights, *self.level_weights)):
            raise ValueError("class_weights and level_weights must be 0 or more")
        if self.level_weights and not sum(self.level_weights):
            raise ValueError("one of level_weights must be above 0")
        return self


class AugmentConfig(Config):
    """Random changes of a training sample; lengths in units of the plan's voxels."""

    flip_axes: tuple[int, ...] = Field((), description="axes of S that may be mirrored, each with probability 1/2")
    rotation_deg: tuple[float, ...] = Field((), description="largest rotation; 2D: one angle; 3D: about Z, Y, X")
    rotation_p: float = Field(0.5, ge=0, le=1, description="probability of a rotation")
    scale: tuple[float, float] = Field((0.8, 1.25), description="smallest and largest magnification")
    scale_p: float = Field(0.5, ge=0, le=1, description="probability of a change of scale")
    elastic_spacing: tuple[float, ...] = Field((), description="distance of the B-spline control points along S, voxels; empty: off")
    elastic_points: tuple[int, ...] = Field((), description="control points across the patch along S, instead of elastic_spacing")
    elastic_sd: tuple[float, ...] = Field(
        (), description="standard deviation of their displacement along S, voxels; 0: not along this axis"
    )
    elastic_kind: Literal["bspline", "bicubic"] = Field(
        "bspline", description="bspline: the points are coefficients of a smooth B-spline; bicubic: the field passes through them"
    )
    elastic_p: float = Field(0.3, ge=0, le=1, description="probability of an elastic deformation")
    contrast: float = Field(0.25, ge=0, lt=1, description="largest relative change of contrast")
    contrast_p: float = Field(0.2, ge=0, le=1, description="probability of a change of contrast")
    brightness: float = Field(0.25, ge=0, description="largest shift of the mean, in standard deviations")
    brightness_p: float = Field(0.2, ge=0, le=1, description="probability of a shift of the mean")
    gamma: tuple[float, float] = Field((0.7, 1.5), description="range of the gamma correction")
    gamma_p: float = Field(0.2, ge=0, le=1, description="probability of a gamma correction")
    gamma_inverted_p: float = Field(0.0, ge=0, le=1, description="probability of a gamma correction of the negative")
    noise_sd: float = Field(0.1, ge=0, description="largest sd of the added noise, in standard deviations")
    noise_p: float = Field(0.2, ge=0, le=1, description="probability of noise")
    blur_sd: float = Field(1.0, ge=0, description="largest sd of the Gaussian blur, in voxels of the finest axis")
    blur_p: float = Field(0.2, ge=0, le=1, description="probability of a blur")
    low_resolution: float = Field(2.0, ge=1, description="largest factor of simulated low resolution, of the finest axis")
    low_resolution_p: float = Field(0.2, ge=0, le=1, description="probability of low resolution")
    histogram_p: float = Field(0.0, ge=0, le=1, description="probability that grey values take the histogram of another training image")


class OptimiserConfig(Config):
    """How weights are updated."""

    name: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    learning_rate: float = Field(2e-3, gt=0, description="at its highest")
    weight_decay: float = Field(1e-2, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="beta 1 of Adam and AdamW, momentum of SGD, smoothing of RMSprop's squares")
    nesterov: bool = Field(True, description="Nesterov's form of SGD's momentum")
    schedule: Literal["cosine", "poly", "steps", "constant"] = Field("cosine", description="how the learning rate falls over the run")
    decay_at: tuple[float, ...] = Field((), description="shares of the run after which the rate is divided by 10 (steps only)")
    power: float = Field(0.9, gt=0, description="of the polynomial (1 - share of the run) ^ power (poly only)")
    clip_norm: float = Field(12.0, ge=0, description="gradients longer than this are shortened to it; 0: not")
    averaging: float = Field(0.05, ge=0, lt=1, description="weights are averaged over about this share of the run; 0: not")


class Plan(Config):
    """All that a training run needs to know, so that the run can be told from this file alone."""

    recipe: str = Field("default", description="the recipe that filled it in, as `microtome train --recipe` names it")
    dims: Literal[2, 3] = Field(description="2: sections or pictures; 3: volumes")
    channels: int = Field(gt=0, description="channels of the images")
    classes: tuple[str, ...] = Field(description="names of the classes, in the order of the network's outputs", min_length=2)
    spacing_mm: tuple[float, ...] = Field(description="every image is resampled to this voxel size along S of the images (not of dims)")
    stated_spacing_mm: tuple[float, ...] = Field(
        (), description="voxel size of every image along S, whatever its file says; empty: the file's"
    )
    assumed_spacing_mm: tuple[float, ...] = Field((), description="voxel size of images that do not state theirs, along S; empty: 1")
    resize_vox: tuple[int, ...] = Field((), description="every picture is resized to this, whatever its voxel size; empty: not")
    interpolation: Literal["linear", "cubic"] = Field("linear", description="of images brought to the plan's grid; cubic: B-spline")
    normalisation: NormalisationConfig = NormalisationConfig()
    network: NetworkConfig = NetworkConfig()
    patch_vox: tuple[int, ...] = Field(description="what the network sees at once, along the last `dims` axes")
    batch: int = Field(gt=0, description="patches a step")
    micro_batch: int = Field(0, ge=0, description="patches the network sees at once, gradients of the batch being added up; 0: all of it")
    checkpointing: bool = Field(False, description="activations are computed again for the gradient instead of kept: slower, less memory")
    foreground: float = Field(0.5, ge=0, le=1, description="share of patches centred on a class drawn evenly among the classes")
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    steps: int = Field(gt=0, description="optimiser steps; the learning rate decays over them")
    warmup: int = Field(20, ge=0, description="steps over which the learning rate rises from 0")
    validations: int = Field(5, ge=1, description="how often the validation cases are predicted during training")
    minutes: float | None = Field(None, gt=0, description="wall time of the whole run; steps are fitted to it")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the network's arithmetic; weights stay fp32")
    overlap: float = Field(0.5, ge=0, lt=1, description="share of a tile that prediction computes again in the next")
    seed: int = Field(0, ge=0, lt=2**32)
    fold: str = Field("1/5", description="K/N: part K of N validates; all: everything trains, nothing validates")
    holdout: Literal["cases", "slices"] = Field(
        "cases", description="cases: whole images validate; slices: annotated slices of sparsely annotated volumes"
    )
    reasons: Mapping[str, str] = Field(default_factory=dict, description="why each value is what it is")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.patch_vox) != self.dims:
            raise ValueError(f"patch_vox {self.patch_vox} must have {self.dims} sizes, one an axis of a {self.dims}D network")
        if len(self.spacing_mm) < self.dims:
            raise ValueError(f"spacing_mm {self.spacing_mm} must have at least {self.dims} values")
        if not all(0 < size < math.inf for size in (*self.spacing_mm, *self.assumed_spacing_mm)):
            raise ValueError(f"spacing_mm {self.spacing_mm} and assumed_spacing_mm {self.assumed_spacing_mm} must be lengths above 0")
        if self.resize_vox and (len(self.resize_vox) != self.dims or min(self.resize_vox) < 1):
            raise ValueError(f"resize_vox {self.resize_vox} must have {self.dims} sizes of 1 or more, or none")
        levels = self.network.supervised_levels
        if len(self.loss.level_weights) not in (0, levels):
            raise ValueError(f"loss.level_weights {self.loss.level_weights} must have {levels} values, one a supervised level, or none")
        if self.loss.class_weights and len(self.loss.class_weights) != len(self.classes):
            raise ValueError(f"loss.class_weights must have {len(self.classes)} values, one a class, or none")
        if min(self.patch_vox) < 1:
            raise ValueError(f"patch_vox {self.patch_vox} must be at least 1 along each axis")
        self._check_augment()
        fixed = self.normalisation
        counts = {len(values) for values in (fixed.low, fixed.high, fixed.mean, fixed.sd)}
        if fixed.kind == "dataset" and counts != {self.channels}:
            raise ValueError(f"normalisation needs low, high, mean and sd of {self.channels} values each, one a channel")
        return self

    def _check_augment(self) -> None:
        """Lengths and axes that fit the number of dimensions: a wrong one would stop a run at a random step."""
        augment, dims = self.augment, self.dims
        if len(augment.rotation_deg) not in (0, 1 if dims == 2 else 3):
            raise ValueError(f"augment.rotation_deg {augment.rotation_deg} must have {1 if dims == 2 else 3} angles, or none")
        if not set(augment.flip_axes) <= set(range(dims)):
            raise ValueError(f"augment.flip_axes {augment.flip_axes} must be among {tuple(range(dims))}")
        field = augment.elastic_spacing or augment.elastic_points
        if {len(augment.elastic_spacing), len(augment.elastic_points), len(augment.elastic_sd)} - {0, dims}:
            raise ValueError(f"augment.elastic_spacing, elastic_points and elastic_sd must have {dims} values each, or none")
        if len(field) != len(augment.elastic_sd) or (augment.elastic_spacing and augment.elastic_points):
            raise ValueError("augment.elastic_sd needs one of elastic_spacing and elastic_points, and they need it")
        if any(value <= 0 for value in (*augment.elastic_spacing, *augment.elastic_points)):
            raise ValueError(f"augment.elastic_spacing and elastic_points {field} must be above 0")
        if any(value < 0 for value in (*augment.elastic_sd, *augment.rotation_deg)):
            raise ValueError(f"augment.elastic_sd {augment.elastic_sd} and rotation_deg {augment.rotation_deg} must be 0 or more")
        for name, (low, high) in (("scale", augment.scale), ("gamma", augment.gamma)):
            if not 0 < low <= high:
                raise ValueError(f"augment.{name} {(low, high)} must be two numbers above 0, the smaller first")


C = TypeVar("C", bound=Config)


def parse_config(kind: type[C], values: object, where: str | Path) -> C:
    """`values` (as read from YAML or JSON) as a config of this kind.

    Raises:
        ConfigError: names the file, the field, what was given and, for an unknown name, the nearest known one.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            where, expected="names with values (`steps: 1000`)", got=type(values).__name__, do="see `microtome plan --help`", code="C009"
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _config_error(kind, error, where) from None


def dump_yaml(config: Config) -> str:
    """The config as YAML in the order of its fields: a name a line, its value or reason whole beside it."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_LineDumper, sort_keys=False, allow_unicode=True, width=math.inf))


class _LineDumper(yaml.SafeDumper):
    """Safe YAML in which lists of plain values stand in a line, and names with values in a line each, to be read and edited."""

    def __init__(self, stream: Any, **settings: Any) -> None:
        super().__init__(stream, **(settings | {"default_flow_style": None}))

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        """A mapping in lines; an empty one as {}."""
        return super().represent_mapping(tag, mapping, flow_style=not mapping)


def _config_error(kind: type[Config], error: ValidationError, where: str | Path) -> ConfigError:
    """The first fault of a failed validation in one line; an unknown name first, as it may be why another is missing."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    # Where a value may be of two types, the library names both behind the field.
    place = ".".join(str(part)[:80] for part in fault["loc"] if part not in ("int", "tuple[int, ...]"))
    # What a message quotes may be as long as the file.
    reason = _reason(fault["type"], " ".join(fault["msg"].split()))[:300]
    if fault["type"] == "missing":
        return ConfigError(where, expected=f"a value for `{place}`", got="none", do=f"add `{place}`", code="C011")
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])[:80]
        known = sorted(_names_at(kind, fault["loc"][:-1]))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        do = f"did you mean `{near[0]}`?" if near else "remove it"
        return ConfigError(where, expected=f"one of {', '.join(known)}", got=f"the unknown name `{place}`", do=do, code="C010")
    if not place:
        return ConfigError(where, expected="settings that fit together", got=reason, do="change one of them", code="C013")
    # The value may be as long as the file that it stands in.
    got = " ".join(reprlib.repr(fault["input"]).split())[:200]
    return ConfigError(where, expected=f"{place}: {reason}", got=got, do=f"change `{place}`", code="C012")


# How the library begins what it says of a value, and where it goes on to say why.
_OPENING, _WHY = ("Value error, ", "Input should be ", "Tuple should have ", "List should have ", "Keys should be "), ", unable to parse"


def _reason(kind: str, said: str) -> str:
    """What a value should be, in the words that stand behind `expected NAME:`."""
    if kind.startswith(("int_", "float_", "bool_")):
        return {"i": "a whole number", "f": "a number", "b": "true or false"}[kind[0]]
    for opening in _OPENING:
        said = said.removeprefix(opening)
    return said.partition(_WHY)[0]


def _names_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The names that the config has at a path of nested fields."""
    for part in path:
        field = kind.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            kind = field.annotation
    return set(kind.model_fields)
