"""FC-DenseNet ("Tiramisu"): a U-Net of dense blocks, in which each layer sees the maps of all layers before it in its block.

S. Jégou, M. Drozdzal, D. Vazquez, A. Romero, Y. Bengio, "The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for
Semantic Segmentation", 2016, arXiv 1611.09326; the authors' code (SimJeg/FC-DenseNet). Variant 103, 32 voxels, width of the stack:

    32 |C>48, +64 =112| ---------------- concat ---------------- |80+112, +64 =256| -> 1x1 -> classes
      16 |112, +80 =192| -------------- concat -------------- |112+192, +80 =384|
        8 |192, +112 =304| ---------- concat ---------- |160+304, +112 =576|
          4 |304, +160 =464| ------- concat ------- |192+464, +160 =816|
            2 |464, +192 =656| --- concat --- |240+656, +192 =1088|
                        1 |656, +240 =896|

A dense block adds maps to its input, `growth` of them a layer: batch norm -> ReLU -> 3-convolution -> dropout 0.2, on all the
maps there are so far. Down: batch norm -> ReLU -> 1-convolution that keeps the width -> dropout -> max-pooling by 2. Up: a
3-transposed convolution with stride 2, one voxel of its output cropped, on ONLY the maps that the block below added; it comes
first in each concatenation. The widths are those of the authors' erratum; the paper's own Table 2 is off by 16.

Variants, with their layers a block from the finest level down (the way up mirrors them):
    103: growth 16, layers 4, 5, 7, 10, 12 and 15 at the bottom. 9,322,091 parameters for 3 channels and 11 classes, and
        9,425,163 with the running mean and variance of each batch norm, which the authors' framework counts.
    67: growth 16, 5 layers each: 3,463,243 and 3,502,923 (layers and growth second-hand).
    56: growth 12, 4 layers each: 1,376,795 and 1,397,963 (layers and growth second-hand; the paper's 1.5M is not reproduced).

Ours: the form in 3D (every 3x3 a 3x3x3); momentum and eps of batch norm are PyTorch's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from microtome.models.blocks import (
    BATCH_NORM,
    CONVOLUTION,
    MAX_POOL,
    TRANSPOSED,
    batch_normed_sizes,
    centre_crop,
    dropout_share,
    level_widths,
)
from microtome.models.network import Network, NetworkSpec

FIRST_WIDTH = 48
DROPOUT = 0.2


@dataclass(frozen=True)
class Form:
    """What tells the variants apart.

    Attributes:
        growth: maps that one layer adds.
        widths: maps that each level's block adds, finest first, the bottom last.
    """

    growth: int
    widths: tuple[int, ...]


FORMS: Mapping[str, Form] = MappingProxyType(
    {"103": Form(16, (64, 80, 112, 160, 192, 240)), "67": Form(16, (80,) * 6), "56": Form(12, (48,) * 6)}
)


class FCDenseNet(Network):
    """FC-DenseNet. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 32, Y and X from 64.

    Y and X have two voxels or more at the bottom, so that batch norm can train on a batch of one.

    `config.widths`: the maps that each level's dense block ADDS, finest first, the bottom last; the paper's are growth x layers.
    A width takes as many layers as the growth needs, the last with what remains: 40 maps with growth 16 are layers of 16, 16
    and 8. The first convolution has 48 maps, or the first width where that is less. 32 is 2^(levels - 1).

    Raises:
        ConfigError: fewer than 2 widths.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        form = FORMS[spec.variant or "103"]
        widths, dims = level_widths(spec, form.widths), spec.dims
        super().__init__(spec, batch_normed_sizes(dims, len(widths)))
        self.widths, dropout, first = widths, dropout_share(spec, DROPOUT), min(FIRST_WIDTH, widths[0])
        # Width of the stack where a level's block begins and, one place further, where it ends.
        stack = [first]
        for width in widths:
            stack.append(stack[-1] + width)
        self.first = CONVOLUTION[dims](spec.in_channels, first, 3, padding=1)
        # Finest level first in each list; the forward pass walks `up` and `expand` from the bottom up.
        self.contract = nn.ModuleList(
            DenseBlock(dims, channels, width, growth=form.growth, dropout=dropout) for channels, width in zip(stack, widths, strict=False)
        )
        self.down = nn.ModuleList(_transition_down(dims, channels, dropout) for channels in stack[1:-1])
        self.up = nn.ModuleList(TRANSPOSED[dims](width, width, 3, stride=2) for width in widths[1:])
        self.expand = nn.ModuleList(
            DenseBlock(dims, below + channels, width, growth=form.growth, dropout=dropout)
            for (width, below), channels in zip(pairwise(widths), stack[1:], strict=False)
        )
        self.head = CONVOLUTION[dims](widths[1] + stack[1] + widths[0], spec.classes, 1)
        _initialise_he_uniform(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        stack_BCS, skips = self.first(image_BCS), []
        for level, block in enumerate(self.contract):
            stack_BCS = block(self.down[level - 1](stack_BCS) if level else stack_BCS)
            skips.append(stack_BCS)
        for level in reversed(range(len(self.expand))):
            # The block's new maps lie behind its input.
            up_BCS = self.up[level](stack_BCS[:, -self.widths[level + 1] :])
            up_BCS = centre_crop(up_BCS, skips[level].shape[2:])
            stack_BCS = self.expand[level](torch.cat([up_BCS, skips[level]], dim=1))
        logits_BKS: Tensor = self.head(stack_BCS)
        return logits_BKS


class DenseBlock(nn.Module):
    """Layers that each add maps to all the maps before them. (B, channels, *S) -> (B, channels + width, *S), the input first."""

    def __init__(self, dims: int, channels: int, width: int, *, growth: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*_convolution(dims, channels + before, min(growth, width - before), kernel=3), nn.Dropout(dropout))
            for before in range(0, width, growth)
        )

    def forward(self, stack_BCS: Tensor) -> Tensor:
        """The input with the new maps behind it."""
        for layer in self.layers:
            stack_BCS = torch.cat([stack_BCS, layer(stack_BCS)], dim=1)
        return stack_BCS


def _convolution(dims: int, channels: int, width: int, *, kernel: int) -> tuple[nn.Module, ...]:
    return BATCH_NORM[dims](channels), nn.ReLU(inplace=True), CONVOLUTION[dims](channels, width, kernel, padding=kernel // 2)


def _transition_down(dims: int, channels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(*_convolution(dims, channels, channels, kernel=1), nn.Dropout(dropout), MAX_POOL[dims](2))


def _initialise_he_uniform(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
