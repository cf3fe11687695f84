"""CANet: context of growing reach, gathered by a chain of flows that each see the one before.

Q. Tang, F. Liu, J. Jiang, Y. Zhang, "Attention-guided Chained Context Aggregation for Semantic Segmentation", 2020,
arXiv 2002.12041; the authors' code (BebDong/MXNetSeg). Channels of variant `paper`, sides as shares of the image's:

    1/4   C1 |256| ------------------------ 3x3 to 48 ------------------------- concat - 3x3 to 256 - head - up by 4
    1/8     C2 |512| - C3 |1024| - C4 |2048|                                   /
                                    |                                   up by 2
             global flow |512| = mean of C4                                  |
             flow 1 |512| = flow(C4, global flow), pooled by 2               |
             flow 2 |512| = flow(C4, flow 1), pooled by 4        sum of all five -> gate |256|
             flow 3 |512| = flow(C4, flow 2), pooled by 8
             flow 4 |512| = flow(C4, flow 3), pooled by 16

A flow: concatenate C4 and the flow before, average-pool by s, two 3x3 convolutions, bilinear back to C4's size. Gate (feature
selection): a 3x3 convolution gives x; mean over the image -> 1x1 -> batch norm -> sigmoid gives a weight a channel.

Variants:
    paper: the encoder of the authors' code, a ResNet-50 with three 3x3 convolutions as its stem and dilation in place of the
        last two strides; depth-wise separable flows; the gate x weight + x, which the authors' code has switched off. A head on
        C3 in training where `supervised_levels` is 2. Dropout 0.1 after the gate and in each head. 33,769,781 parameters for 3
        channels and 21 classes with one head (counted here, no published count found).
    small: encoder and widths of a widely read tutorial (Paperspace, "Understanding the CANet architecture from scratch"; Keras,
        512x512x3, 21 classes), three flows that all pool by 2, each with a gate of its own, and a decoder of 1x7 and 7x1
        convolutions. The tutorial feeds its second flow what the first was fed and its third the first, and builds the
        fourth identity unit of C4 on the second, so that the third is dead: 511,773 trained parameters and 2,352 statistics,
        514,125. Wired as the paper has it, flows see the flow before (which takes no parameter) and the third unit lives
        (13,696 parameters, 256 statistics): 525,469 and 2,608, 528,077. It has neither dropout nor a second head.

Ours: fresh weights; bilinear resizing by pixel centres; a flow whose pooled map would have no pixel has one; in `small`, the
1x7 and 7x1 convolutions see C1 after its identity unit.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from microtome.errors import ConfigError
from microtome.geometry import Sizes
from microtome.models.blocks import dropout_share, initialise_glorot, initialise_he, level_widths
from microtome.models.network import Network, NetworkSpec

WIDTHS = (256, 512, 1024, 2048)
SMALL_WIDTHS = (8, 16, 32, 64)
# Residual units of C1, C2, C3 and C4; a further level would have as many as C4.
UNITS = (3, 4, 6, 3)
POOLS = (2, 4, 8, 16)
SMALL_POOLS = (2, 2, 2)
DROPOUT = 0.1


class CANet(Network):
    """CANet. image_BCS (B, C, Y, X) -> logits_BKS (B, K, Y, X); sides multiples of 8 (`small`: of 16), 16 or more.

    In training mode with `supervised_levels` 2 (`paper` only) it returns a list, the logits and those of C3's head, both of the
    image's size. Training takes a batch of 2 or more: the batch norms of the global flow and of the gate see one value an image.

    `config.widths`: channels of C1, C2, ..., 2 levels or more, of which C1 has sides of 1/4 and the others of 1/8. All else
    follows the last, w: in `paper` the flows have w / 4, and with v the first, gate and decoder have v, the stem v / 4, v / 4
    and v / 2, and the skip 3 v / 16; in `small` stem and flows have w, gate and skip w / 2. No such share is below 4 channels.

    Raises:
        ConfigError: fewer than 2 widths, or a setting that the variant lacks.
    """

    stem: nn.Module
    stages: nn.ModuleList
    global_flow: nn.Module
    context_flows: nn.ModuleList
    gate: nn.Module
    detail: nn.Module
    head: nn.Module

    def __init__(self, spec: NetworkSpec) -> None:
        small = spec.variant == "small"
        super().__init__(spec, Sizes((16, 16), (16, 16) if small else (8, 8)))
        widths = level_widths(spec, SMALL_WIDTHS if small else WIDTHS)
        _check(spec)
        self.supervised = spec.config.supervised_levels == 2
        if small:
            self._build_small(spec, widths)
        else:
            self._build(spec, widths)

    def forward(self, image_BCS: Tensor) -> Tensor | list[Tensor]:
        """Logits of every pixel; in training mode with deep supervision also those of C3's head."""
        self.check_image(image_BCS)
        if self.training and len(image_BCS) == 1:
            do = "train with a batch of 2 or more: a batch norm after a mean over the image needs two values"
            raise ConfigError(self.spec.name, expected="2 images or more in training", got="1", do=do, code="C035")
        features_BCS, stages = self.stem(image_BCS), []
        for stage in self.stages:
            features_BCS = stage(features_BCS)
            stages.append(features_BCS)
        context_BCS = self.gate(self.gather(features_BCS))
        detail_BCS = self.detail(stages[0])
        joined_BCS = torch.cat([_resize(context_BCS, detail_BCS.shape[2:]), detail_BCS], dim=1)
        logits_BKS = _resize(self.head(joined_BCS), image_BCS.shape[2:])
        if not (self.training and self.supervised):
            return logits_BKS
        return [logits_BKS, _resize(self.second_head(stages[-2]), image_BCS.shape[2:])]

    def gather(self, c4_BCS: Tensor) -> Tensor:
        """The sum of the global flow and of the chain of flows that follows it, each fed the one before."""
        flow_BCS: Tensor = self.global_flow(c4_BCS).expand(-1, -1, *c4_BCS.shape[2:])
        sum_BCS = flow_BCS
        for context_flow in self.context_flows:
            flow_BCS = context_flow(c4_BCS, flow_BCS)
            sum_BCS = sum_BCS + flow_BCS
        return sum_BCS

    def _build(self, spec: NetworkSpec, widths: tuple[int, ...]) -> None:
        first, last, dropout = widths[0], widths[-1], dropout_share(spec, DROPOUT)
        flow, skip, stem = _share(last, 1 / 4), _share(first, 3 / 16), _share(first, 1 / 4)
        self.stem = nn.Sequential(
            _Convolution(spec.in_channels, stem, 3, stride=2),
            _Convolution(stem, stem, 3),
            _Convolution(stem, 2 * stem, 3),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.stages = nn.ModuleList(_stage(level, i, o) for level, (i, o) in enumerate(pairwise((2 * stem, *widths))))
        self.global_flow = nn.Sequential(nn.AdaptiveAvgPool2d(1), _Convolution(last, flow, 1))
        self.context_flows = nn.ModuleList(ContextFlow(pool, [*_separable(last + flow, flow), *_separable(flow, flow)]) for pool in POOLS)
        score = nn.Sequential(nn.AdaptiveAvgPool2d(1), _Convolution(first, first, 1, activation=False))
        self.gate = nn.Sequential(_Convolution(flow, first, 3), Gate(score, residual=True), nn.Dropout(dropout))
        self.detail = _Convolution(first, skip, 3)
        self.head = nn.Sequential(_Convolution(first + skip, first, 3), *_head(first, first, spec.classes, dropout))
        if self.supervised:
            self.second_head = nn.Sequential(*_head(widths[-2], first, spec.classes, dropout))
        initialise_he(self)

    def _build_small(self, spec: NetworkSpec, widths: tuple[int, ...]) -> None:
        first, flow = widths[0], widths[-1]
        half = _share(flow, 1 / 2)
        self.stem = nn.Sequential(_Convolution(spec.in_channels, flow, 3, bias=True), nn.MaxPool2d(2))
        self.stages = nn.ModuleList(_small_stage(level, i, o) for level, (i, o) in enumerate(pairwise((flow, *widths))))
        self.global_flow = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(flow), nn.ReLU(inplace=True), nn.Conv2d(flow, flow, 1))
        self.context_flows = nn.ModuleList(ContextFlow(pool, _small_flow(2 * flow, flow)) for pool in SMALL_POOLS)
        score = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(half, half, 1), nn.BatchNorm2d(half))
        self.gate = nn.Sequential(nn.Conv2d(flow, half, 3, padding=1), Gate(score, residual=False))
        self.detail = LargeKernel(first, half)
        self.head = nn.Conv2d(2 * half, spec.classes, 1)
        initialise_glorot(self)


class ContextFlow(nn.Module):
    """One flow: C4 and the flow before, concatenated, pooled by `pool`, through `layers`, and back to C4's size."""

    def __init__(self, pool: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pool = pool
        self.layers = nn.Sequential(*layers)

    def forward(self, c4_BCS: Tensor, flow_BCS: Tensor) -> Tensor:
        """The next flow, of C4's size."""
        high, wide = (max(n // self.pool, 1) for n in c4_BCS.shape[2:])
        pooled_BCS = adaptive_avg_pool2d(torch.cat([c4_BCS, flow_BCS], dim=1), (high, wide))
        return _resize(self.layers(pooled_BCS), c4_BCS.shape[2:])


class Gate(nn.Module):
    """x times the sigmoid of its score, and where `residual` plus x."""

    def __init__(self, score: nn.Module, *, residual: bool) -> None:
        super().__init__()
        self.score, self.residual = score, residual

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        gated_BCS = features_BCS * torch.sigmoid(self.score(features_BCS))
        return gated_BCS + features_BCS if self.residual else gated_BCS


class LargeKernel(nn.Module):
    """The tutorial's "adapted global convolution": 1x7 then 7x1 plus 7x1 then 1x7, and a 3x3 convolution added to their sum."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        wide, high = (1, 7), (7, 1)
        self.wide_first = nn.Sequential(nn.Conv2d(channels, width, wide, padding=(0, 3)), nn.Conv2d(width, width, high, padding=(3, 0)))
        self.high_first = nn.Sequential(nn.Conv2d(channels, width, high, padding=(3, 0)), nn.Conv2d(width, width, wide, padding=(0, 3)))
        self.refine = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, channels, Y, X) -> (B, width, Y, X)."""
        sum_BCS: Tensor = self.wide_first(features_BCS) + self.high_first(features_BCS)
        refined_BCS: Tensor = self.refine(sum_BCS)
        return sum_BCS + refined_BCS


class _Convolution(nn.Sequential):
    """Padded convolution -> batch norm -> ReLU (unless not wanted)."""

    def __init__(
        self, channels: int, width: int, kernel: int, *, stride: int = 1, dilation: int = 1, bias: bool = False, activation: bool = True
    ) -> None:
        padding = kernel // 2 * dilation
        convolution = nn.Conv2d(channels, width, kernel, stride, padding, dilation, bias=bias)
        super().__init__(convolution, nn.BatchNorm2d(width), *([nn.ReLU(inplace=True)] if activation else []))


class _Residual(nn.Module):
    """ReLU of the sum of layers and shortcut."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut = layers, shortcut

    def forward(self, features_BCS: Tensor) -> Tensor:
        return torch.relu(self.layers(features_BCS) + self.shortcut(features_BCS))


def _stage(level: int, channels: int, width: int) -> nn.Sequential:
    """C1, C2, ... of `paper`: bottleneck units; the second stage halves the map, each later one doubles the dilation instead."""
    dilation = 1 << max(level - 1, 0)
    units = UNITS[min(level, len(UNITS) - 1)]
    # The first unit of a stage has the dilation of the stage before, as in the authors' encoder.
    first = _bottleneck(channels, width, stride=2 if level == 1 else 1, dilation=max(dilation // 2, 1))
    return nn.Sequential(first, *(_bottleneck(width, width, stride=1, dilation=dilation) for _ in range(units - 1)))


def _bottleneck(channels: int, width: int, *, stride: int, dilation: int) -> _Residual:
    inner = _share(width, 1 / 4)
    layers = nn.Sequential(
        _Convolution(channels, inner, 1),
        _Convolution(inner, inner, 3, stride=stride, dilation=dilation),
        _Convolution(inner, width, 1, activation=False),
    )
    same = channels == width and stride == 1
    return _Residual(layers, nn.Identity() if same else _Convolution(channels, width, 1, stride=stride, activation=False))


def _small_stage(level: int, channels: int, width: int) -> nn.Sequential:
    """C1, C2, ... of `small`: a unit with a 3x3 shortcut, then one identity unit more than the stage before has."""
    stride, inner = 2 if level < 2 else 1, _share(width, 1 / 2)
    shortcut = _Convolution(channels, width, 3, stride=stride, bias=True)
    units = [_Residual(_small_layers(channels, inner, width, stride), shortcut)]
    units += [_Residual(_small_layers(width, inner, width, 1), nn.Identity()) for _ in range(level + 1)]
    return nn.Sequential(*units)


def _small_layers(channels: int, inner: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Convolution(channels, inner, 1, stride=stride, bias=True),
        _Convolution(inner, inner, 3, bias=True),
        _Convolution(inner, width, 1, bias=True, activation=False),
    )


def _separable(channels: int, width: int) -> tuple[nn.Module, ...]:
    """A depth-wise separable 3x3 convolution: each channel by itself, then 1x1; batch norm and ReLU after both."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return depthwise, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), _Convolution(channels, width, 1)


def _small_flow(channels: int, width: int) -> list[nn.Module]:
    score = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1))
    convolutions = [nn.Conv2d(before, width, 3, padding=1) for before in (channels, width)]
    return [*convolutions, Gate(score, residual=True)]


def _share(width: int, share: float) -> int:
    # Of a single channel between two batch norms nothing but the sign would count.
    return max(int(width * share), 4)


def _head(channels: int, width: int, classes: int, dropout: float) -> tuple[nn.Module, ...]:
    return _Convolution(channels, width, 3), nn.Dropout(dropout), nn.Conv2d(width, classes, 1)


def _resize(features_BCS: Tensor, shape_vox: Sequence[int]) -> Tensor:
    return interpolate(features_BCS, size=list(shape_vox), mode="bilinear", align_corners=False)


def _check(spec: NetworkSpec) -> None:
    """Refuse what the variant cannot be or does not have."""
    small, config = spec.variant == "small", spec.config
    heads = 1 if small else 2
    if config.supervised_levels > heads:
        expected = f"at most {heads} supervised levels"
        raise ConfigError(
            spec.name, expected=expected, got=str(config.supervised_levels), do="change `network.supervised_levels`", code="C033"
        )
    if small and config.dropout:
        raise ConfigError(spec.name, expected="no dropout in `small`", got=str(config.dropout), do="remove `network.dropout`", code="C033")
