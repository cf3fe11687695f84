"""Our default network, in 2D and 3D: the U-Net as nnU-Net shaped it, each level with its own stride and kernel.

F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
Nature Methods 2021, doi 10.1038/s41592-020-01008-z; its residual encoder: F. Isensee et al., "nnU-Net Revisited",
MICCAI 2024, arXiv 2404.09556. In 3D, with 6 levels:

    |C>32>32| ---------------- concat ---------------- |64>32>32| -> 1x1 -> classes
      |32>64>64| -------------- concat -------------- |128>64>64| -> 1x1, in training, where supervised
        |64>128>128| ---------- concat ---------- |256>128>128|
          |128>256>256| ------- concat ------- |512>256>256|
            |256>320>320| ----- concat ----- |640>320>320|
                        |320>320>320|

Each bar holds padded convolution (with bias) -> norm -> leaky ReLU (0.01), `convolutions` times; down: the stride of a
level's first convolution; up: transposed convolution with kernel = stride to the skip's width; the up-sampled half comes
first in each concatenation. Residual (`residual: true`): a convolution as the stem, then in the encoder
`convolutions` residual units a level, and in the decoder one convolution a level.

31,195,594 parameters as in nnU-Net (3D, 6 levels, 1 channel, 2 classes, instance norm, 5 heads), and 102,349,770 with
residual units 1, 3, 4, 6, 6, 6. What differs from nnU-Net (which is `nnunet.py`): batch norm by default; a head exists
only where there is a loss; He initialisation counts the inputs of an up-convolution as they are (see `initialise_he`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.geometry import Sizes
from microtome.models.blocks import AVERAGE_POOL, BATCH_NORM, CONVOLUTION, TRANSPOSED, InstanceNorm, initialise_he
from microtome.models.network import Network, NetworkSpec
from microtome.nnunet_rules import level_widths

LEVELS = 6
SLOPE = 0.01


@dataclass(frozen=True)
class Level:
    """One level of the U: how many convolutions (or residual units) it has, and what they look like."""

    width: int
    stride: tuple[int, ...]
    kernel: tuple[int, ...]
    repeats: int


class ModernUNet(Network):
    """The default network. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of the product of the strides.

    In training mode with `supervised_levels` > 1 it returns a list of logits, finest first, each at its own level's
    resolution; otherwise the finest alone. With instance norm the smallest side is twice that product along each axis that is
    strided, since the deepest level must have more than one voxel.
    To train, batch norm needs more than one value a channel at the deepest level: not one image of the smallest size alone.

    Args:
        spec: its config sets widths, strides, kernels, convolutions, residual, norm and supervised_levels; empty
            widths: 32 doubled up to 320 in 3D, 512 in 2D, 6 levels unless strides, kernels or convolutions have another number.
        all_heads: a head on every decoder level, with a loss or without.

    Raises:
        ConfigError: the config's tuples do not agree in length, or hold what a network cannot have.
    """

    def __init__(self, spec: NetworkSpec, *, all_heads: bool = False) -> None:
        levels = _levels(spec)
        super().__init__(spec, _sizes(spec, levels))
        config, dims = spec.config, spec.dims
        self.stem = _Convolution(spec.in_channels, levels[0], config.norm) if config.residual else nn.Identity()
        before = levels[0].width if config.residual else spec.in_channels
        # Finest level first in each list; the forward pass walks decoder and up from the bottom up.
        self.encoder = nn.ModuleList()
        for level in levels:
            self.encoder.append(_stage(before, level, config))
            before = level.width
        self.up = nn.ModuleList(_up_convolution(below, above.width) for above, below in pairwise(levels))
        self.decoder = nn.ModuleList(_decoder_stage(level, config) for level in levels[:-1])
        heads = len(levels) - 1 if all_heads else config.supervised_levels
        self.heads = nn.ModuleList(CONVOLUTION[dims](level.width, spec.classes, 1) for level in levels[:heads])
        initialise_he(self, SLOPE)
        for module in self.modules():
            if isinstance(module, _ResidualUnit):
                module.start_as_identity()

    def forward(self, image_BCS: Tensor) -> Tensor | list[Tensor]:
        """Logits of every voxel; in training mode with deep supervision of each supervised level, finest first."""
        self.check_image(image_BCS)
        features_BCS, skips = self.stem(image_BCS), []
        for stage in self.encoder:
            features_BCS = stage(features_BCS)
            skips.append(features_BCS)
        logits: list[Tensor] = []
        heads = self.spec.config.supervised_levels if self.training else 1
        for level in reversed(range(len(self.decoder))):
            up_BCS = self.up[level](features_BCS)
            features_BCS = self.decoder[level](torch.cat([up_BCS, skips[level]], dim=1))
            if level < heads:
                logits.insert(0, self.heads[level](features_BCS))
        return logits if len(logits) > 1 else logits[0]


class _Convolution(nn.Sequential):
    """Padded convolution -> norm -> leaky ReLU; the level's stride only where asked."""

    def __init__(self, channels: int, level: Level, norm: str, *, strided: bool = False, activation: bool = True) -> None:
        dims = len(level.kernel)
        padding = tuple(k // 2 for k in level.kernel)
        stride = level.stride if strided else (1,) * dims
        layers = [CONVOLUTION[dims](channels, level.width, level.kernel, stride, padding), *_norm(norm, level.width, dims)]
        super().__init__(*layers, *([nn.LeakyReLU(SLOPE, inplace=True)] if activation else []))


class _ResidualUnit(nn.Module):
    """Two convolutions beside a shortcut: average pool by the stride, then 1x1 convolution and norm where the width changes."""

    def __init__(self, channels: int, level: Level, norm: str, *, strided: bool) -> None:
        super().__init__()
        dims = len(level.kernel)
        self.first = _Convolution(channels, level, norm, strided=strided)
        self.second = _Convolution(level.width, level, norm, activation=False)
        shortcut: list[nn.Module] = []
        if strided and math.prod(level.stride) > 1:
            shortcut.append(AVERAGE_POOL[dims](level.stride, level.stride))
        if channels != level.width:
            shortcut += [CONVOLUTION[dims](channels, level.width, 1, bias=False), *_norm(norm, level.width, dims)]
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, features_BCS: Tensor) -> Tensor:
        sum_BCS: Tensor = self.second(self.first(features_BCS)) + self.shortcut(features_BCS)
        return self.activation(sum_BCS)  # type: ignore[no-any-return]

    def start_as_identity(self) -> None:
        """Zero the last norm (without norm: the last convolution), so that the unit starts as its shortcut."""
        for parameter in self.second[-1].parameters():
            nn.init.zeros_(parameter)


def _stage(channels: int, level: Level, config: NetworkConfig) -> nn.Sequential:
    unit = _ResidualUnit if config.residual else _Convolution
    first = unit(channels, level, config.norm, strided=True)
    return nn.Sequential(first, *(unit(level.width, level, config.norm, strided=False) for _ in range(level.repeats - 1)))


def _decoder_stage(level: Level, config: NetworkConfig) -> nn.Sequential:
    repeats = 1 if config.residual else level.repeats
    widths = (2 * level.width, *(level.width,) * (repeats - 1))
    return nn.Sequential(*(_Convolution(width, level, config.norm) for width in widths))


def _up_convolution(below: Level, width: int) -> nn.Module:
    return TRANSPOSED[len(below.stride)](below.width, width, below.stride, below.stride)


def _norm(kind: str, channels: int, dims: int) -> list[nn.Module]:
    if kind == "none":
        return []
    return [InstanceNorm(channels) if kind == "instance" else BATCH_NORM[dims](channels)]


def _levels(spec: NetworkSpec) -> tuple[Level, ...]:
    """The config's tuples level by level, defaults filled in and all checked."""
    config, dims = spec.config, spec.dims
    number = number_of_levels(config)
    widths = config.widths or level_widths(number, dims)
    strides = config.strides or ((1,) * dims, *((2,) * dims,) * (number - 1))
    kernels = config.kernels or ((3,) * dims,) * number
    repeats = config.convolutions if isinstance(config.convolutions, tuple) else (config.convolutions,) * number
    _check(spec, number >= 2, "at least 2 levels", widths, "widths")
    _check(spec, config.supervised_levels < number, f"at most {number - 1}", config.supervised_levels, "supervised_levels")
    _check(spec, len(repeats) == number, f"{number} convolutions, one a level", repeats, "convolutions")
    for name, values in (("strides", strides), ("kernels", kernels)):
        _check(spec, len(values) == number, f"{number} {name}, one a level", values, name)
        fits = all(len(value) == dims and min(value) >= 1 for value in values)
        _check(spec, fits, f"{name} of {dims} positive numbers each", values, name)
    _check(spec, set(strides[0]) == {1}, "a first stride of 1 along each axis", strides[0], "strides")
    _check(spec, all(k % 2 for kernel in kernels for k in kernel), "odd kernels", kernels, "kernels")
    return tuple(Level(*parts) for parts in zip(widths, strides, kernels, repeats, strict=True))


def number_of_levels(config: NetworkConfig) -> int:
    """How many levels a config asks for; 6 where it leaves that open."""
    convolutions = config.convolutions if isinstance(config.convolutions, tuple) else ()
    return len(config.widths or config.strides or config.kernels or convolutions) or LEVELS


def _check(spec: NetworkSpec, right: bool, expected: str, got: object, field: str) -> None:
    if not right:
        raise ConfigError(spec.name, expected=expected, got=str(got), do=f"change `network.{field}`", code="C033")


def _sizes(spec: NetworkSpec, levels: Sequence[Level]) -> Sizes:
    step = tuple(math.prod(strides) for strides in zip(*(level.stride for level in levels), strict=True))
    if spec.config.norm != "instance":
        return Sizes(step, step)
    # Where nothing is strided, one axis has to have two voxels: X.
    return Sizes(tuple(2 * n if n > 1 else n for n in step) if max(step) > 1 else (*step[:-1], 2), step)
