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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml.composer import ComposerError

from microtome.errors import ConfigError


class Config(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NormalisationConfig(Config):
    """How grey values become network input: `(clip(x, low, high) - mean) / sd`, a channel at a time."""

    kind: Literal["image", "dataset"] = Field(
        "image", description="image: mean and sd of each image by itself; dataset: the values below for every image"
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
    convolutions: int = Field(2, ge=1, le=6, description="convolutions (or residual units) a level")
    residual: bool = Field(False, description="residual units in the encoder")
    norm: Literal["batch", "instance", "none"] = Field("batch", description="normalisation after each convolution")
    variant: str = Field("", description="a variant that `microtome networks` lists; empty: the first")
    supervised_levels: int = Field(1, ge=1, description="decoder levels with a loss of their own, finest first")


class AugmentConfig(Config):
    """Random changes of a training sample; lengths in units of the plan's voxels."""

    flip_axes: tuple[int, ...] = Field((), description="axes of S that may be mirrored, each with probability 1/2")
    rotation_deg: tuple[float, ...] = Field((), description="largest rotation; 2D: one angle; 3D: about Z, Y, X")
    rotation_p: float = Field(0.5, ge=0, le=1, description="probability of a rotation")
    scale: tuple[float, float] = Field((0.8, 1.25), description="smallest and largest magnification")
    scale_p: float = Field(0.5, ge=0, le=1, description="probability of a change of scale")
    elastic_spacing: tuple[float, ...] = Field((), description="distance of the B-spline control points along S, voxels; empty: off")
    elastic_sd: tuple[float, ...] = Field((), description="standard deviation of their displacement along S, voxels")
    elastic_p: float = Field(0.3, ge=0, le=1, description="probability of an elastic deformation")
    contrast: float = Field(0.25, ge=0, lt=1, description="largest relative change of contrast")
    brightness: float = Field(0.25, ge=0, description="largest shift of the mean, in standard deviations")
    gamma: tuple[float, float] = Field((0.7, 1.5), description="range of the gamma correction")
    noise_sd: float = Field(0.1, ge=0, description="largest sd of the added noise, in standard deviations")
    blur_sd: float = Field(1.0, ge=0, description="largest sd of the Gaussian blur, voxels")
    low_resolution: float = Field(2.0, ge=1, description="largest factor of simulated low resolution")
    intensity_p: float = Field(0.2, ge=0, le=1, description="probability of each change of grey values")


class OptimiserConfig(Config):
    """How weights are updated."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(2e-3, gt=0, description="at its highest")
    weight_decay: float = Field(1e-2, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="beta 1 of AdamW, Nesterov momentum of SGD")
    clip_norm: float = Field(12.0, gt=0, description="gradients longer than this are shortened to it")
    averaging: float = Field(0.05, ge=0, lt=1, description="weights are averaged over about this share of the run; 0: not")


class Plan(Config):
    """All that a training run needs to know, so that the run can be told from this file alone."""

    dims: Literal[2, 3] = Field(description="2: sections or pictures; 3: volumes")
    channels: int = Field(gt=0, description="channels of the images")
    classes: tuple[str, ...] = Field(description="names of the classes, in the order of the network's outputs", min_length=2)
    spacing_mm: tuple[float, ...] = Field(description="every image is resampled to this voxel size along S of the images (not of dims)")
    stated_spacing_mm: tuple[float, ...] = Field(
        (), description="voxel size of every image along S, whatever its file says; empty: the file's"
    )
    assumed_spacing_mm: tuple[float, ...] = Field((), description="voxel size of images that do not state theirs, along S; empty: 1")
    normalisation: NormalisationConfig = NormalisationConfig()
    network: NetworkConfig = NetworkConfig()
    patch_vox: tuple[int, ...] = Field(description="what the network sees at once, along the last `dims` axes")
    batch: int = Field(gt=0, description="patches a step")
    foreground: float = Field(0.5, ge=0, le=1, description="share of patches centred on a class drawn evenly among the classes")
    dice_weight: float = Field(1.0, ge=0, description="weight of the soft Dice loss beside cross-entropy")
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
    reasons: Mapping[str, str] = Field(default_factory=dict, description="why each value is what it is")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.patch_vox) != self.dims:
            raise ValueError(f"patch_vox {self.patch_vox} must have {self.dims} sizes, one an axis of a {self.dims}D network")
        if len(self.spacing_mm) < self.dims:
            raise ValueError(f"spacing_mm {self.spacing_mm} must have at least {self.dims} values")
        if not all(0 < size < math.inf for size in (*self.spacing_mm, *self.assumed_spacing_mm)):
            raise ValueError(f"spacing_mm {self.spacing_mm} and assumed_spacing_mm {self.assumed_spacing_mm} must be lengths above 0")
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
        if {len(augment.elastic_spacing), len(augment.elastic_sd)} - {0, dims} or len(augment.elastic_spacing) != len(augment.elastic_sd):
            raise ValueError(f"augment.elastic_spacing and elastic_sd must have {dims} values each, or none")
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
        raise ConfigError(where, expected="names with values (`steps: 1000`)", got=type(values).__name__, do="see `microtome plan --help`")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _config_error(kind, error, where) from None


def load_yaml(path: Path, limit_bytes: int = 10_000_000) -> Any:
    """The content of a small YAML file, safely loaded.

    Raises:
        ConfigError: not there, too large, not YAML.
    """
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise ConfigError(path, expected=f"at most {limit_bytes} bytes", got=f"{size}", do="check that this is the right file")
        return _PlainLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(path, expected="a readable file", got=str(error.strerror), do="check the path") from None
    except RecursionError:
        raise ConfigError(path, expected="valid YAML", got="brackets in brackets without end", do="check the file") from None
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        # Besides its own errors, PyYAML lets through what int(), float() and date() raise on malformed values.
        line = " ".join(str(error).split())
        raise ConfigError(path, expected="valid YAML", got=line, do="mend that line") from None


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, a few lines of which can stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name): write its value out", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


def dump_yaml(config: Config) -> str:
    """The config as YAML in the order of its fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _config_error(kind: type[Config], error: ValidationError, where: str | Path) -> ConfigError:
    """The first fault of a failed validation in one line; an unknown name first, as it may be why another is missing."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = ".".join(str(part) for part in fault["loc"])
    reason = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return ConfigError(where, expected=f"a value for `{place}`", got="none", do=f"add `{place}`")
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])
        known = sorted(_names_at(kind, fault["loc"][:-1]))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        do = f"did you mean `{near[0]}`?" if near else "remove it"
        return ConfigError(where, expected=f"one of {', '.join(known)}", got=f"the unknown name `{place}`", do=do)
    if not place:
        return ConfigError(where, expected="settings that fit together", got=reason, do="change one of them")
    # The value may be as long as the file that it stands in.
    got = reprlib.repr(fault["input"])[:200]
    return ConfigError(where, expected=f"{place}: {reason}", got=got, do=f"change `{place}`")


def _names_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The names that the config has at a path of nested fields."""
    for part in path:
        field = kind.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            kind = field.annotation
    return set(kind.model_fields)
