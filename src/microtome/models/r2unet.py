"""R2U-Net, 2018: the U-Net whose convolutions are recurrent units inside residual blocks.

M. Z. Alom, M. Hasan, C. Yakopcic, T. M. Taha, V. K. Asari, "Recurrent Residual Convolutional Neural Network based on
U-Net (R2U-Net) for Medical Image Segmentation", 2018, arXiv 1802.06955, in the form of a widely used port
(LeeJunHyun/Image_Segmentation):

    |C>64| --------------------- concat --------------------- |128>64| -> 1x1 -> classes
      |64>128| ----------------- concat ----------------- |256>128|
        |128>256| -------------- concat -------------- |512>256|
          |256>512| ------------ concat ------------ |1024>512|
                      |512>1024|

Each bar is a block y = x + R(R(x)), where x is a 1x1 convolution of what comes in, to the bar's width, and R a recurrent
unit: one 3x3 convolution -> batch norm -> ReLU, f, with ONE set of weights, applied t + 1 = 3 times:

    r(0) = f(x)          r(1) = f(x + r(0))          r(2) = f(x + r(1))          R(x) = r(2)

Down: 2x2 max-pooling; up: nearest-neighbour doubling, 3x3 convolution -> batch norm -> ReLU. 39,091,393 parameters for 3
channels, 1 class.

What differs from the paper: its formula as it is usually quoted (not confirmed) has two convolutions in a unit, one of x and
one of the recurrent map, where the port has one of their sum; a script headed with the first author's name does not
share weights at all. Not confirmed either: the order in a concatenation, here [skip, up-sampled]. The norm is shared with the
convolution, so its running mean and variance are those of all three passes together: predictions are as good as
the passes are alike. Weights start as PyTorch draws them. Ours: the same network in 3D and
another number of levels.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.models.blocks import BATCH_NORM, CONVOLUTION, MAX_POOL, batch_normed_sizes, level_widths
from microtome.models.network import Network, NetworkSpec

WIDTHS = (64, 128, 256, 512, 1024)
RECURRENCES = 2


class R2UNet(Network):
    """The recurrent residual U-Net. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16, Y and X from 32.

    `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1). Y and X have two voxels or more
    at the bottom, so that batch norm can train on a batch of one.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        super().__init__(spec, batch_normed_sizes(dims, len(widths)))
        self.encoder = nn.ModuleList(RecurrentResidualBlock(dims, i, o) for i, o in pairwise((spec.in_channels, *widths)))
        self.pool = MAX_POOL[dims](2)
        # Finest level first, as in the encoder; the forward pass walks them from the bottom up.
        self.up = nn.ModuleList(_up(dims, below, above) for above, below in pairwise(widths))
        self.decoder = nn.ModuleList(RecurrentResidualBlock(dims, 2 * width, width) for width in widths[:-1])
        self.head = CONVOLUTION[dims](widths[0], spec.classes, 1)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for level, block in enumerate(self.encoder):
            features_BCS = block(self.pool(features_BCS) if level else features_BCS)
            skips.append(features_BCS)
        for level in reversed(range(len(self.decoder))):
            up_BCS = self.up[level](features_BCS)
            features_BCS = self.decoder[level](torch.cat([skips[level], up_BCS], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


class RecurrentUnit(nn.Module):
    """One convolution -> norm -> ReLU, applied to x and then `recurrences` times to x plus its own last output."""

    def __init__(self, dims: int, width: int, recurrences: int = RECURRENCES) -> None:
        super().__init__()
        self.recurrences = recurrences
        self.convolution = nn.Sequential(*_convolution(dims, width, width))

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        recurrent_BCS: Tensor = self.convolution(features_BCS)
        for _ in range(self.recurrences):
            recurrent_BCS = self.convolution(features_BCS + recurrent_BCS)
        return recurrent_BCS


class RecurrentResidualBlock(nn.Module):
    """A 1x1 convolution to the width, and its sum with two recurrent units of it."""

    def __init__(self, dims: int, channels: int, width: int) -> None:
        super().__init__()
        self.project = CONVOLUTION[dims](channels, width, 1)
        self.units = nn.Sequential(RecurrentUnit(dims, width), RecurrentUnit(dims, width))

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, width, *S)."""
        projected_BCS: Tensor = self.project(features_BCS)
        sum_BCS: Tensor = projected_BCS + self.units(projected_BCS)
        return sum_BCS


def _convolution(dims: int, channels: int, width: int) -> tuple[nn.Module, ...]:
    return CONVOLUTION[dims](channels, width, 3, padding=1), BATCH_NORM[dims](width), nn.ReLU(inplace=True)


def _up(dims: int, channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), *_convolution(dims, channels, width))
