"""Deep residual U-Net, 2018: seven levels of pre-activated residual units, strided convolutions instead of pooling.

Z. Zhang, Q. Liu, Y. Wang, "Road Extraction by Deep Residual U-Net", IEEE Geoscience and Remote Sensing Letters 2018,
arXiv 1711.10684, Fig. 2 and Table I, as second-hand sources give them. Sizes for a 224x224 image (the paper's, not confirmed):

    224 |C>64>64| ---------------- concat ---------------- |192>64>64| 224 -> 1x1 -> classes
      112 |64>128>128| ----------- concat ----------- |384>128>128| 112
         56 |128>256>256| -------- concat -------- |768>256>256| 56
                         28 |256>512>512| (bridge)

Each bar is a residual unit: 2 x (batch norm -> ReLU -> 3x3 convolution), padded, plus a 1x1 convolution of the unit's
input where channels or size change, and nothing after the sum. Down: stride 2 in a unit's first convolution and in its shortcut. The
first unit starts with its convolution (not confirmed): a norm and ReLU of the raw image would throw half of it away.

Variants:
    paper: interpolation up-samples. 8,220,993 parameters for 3 channels, 1 class; 7,782,913 of them in the 15 convolutions
        that the paper's table names, so that its "7.8M" (not confirmed) seems to leave out shortcuts and norms.
    upconv: a 2x2 up-convolution with stride 2 that keeps its channels. 9,598,145 parameters.

Not confirmed, and chosen here: linear interpolation, [up-sampled, skip] in each concatenation, no norm in a shortcut, weights
as PyTorch draws them (no ReLU follows a shortcut, so that He's would double its variance). The paper ends in a sigmoid and
trains it with the mean squared error (second-hand); that is the loss's affair. Ours: the same network in 3D and another
number of levels.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.models.blocks import BATCH_NORM, CONVOLUTION, LINEAR, TRANSPOSED, batch_normed_sizes, level_widths
from microtome.models.network import Network, NetworkSpec

WIDTHS = (64, 128, 256, 512)


class ResUNet(Network):
    """The deep residual U-Net. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 8, Y and X from 16.

    `config.widths` narrows, widens, deepens or flattens it; then 8 is 2^(levels - 1). Y and X have two voxels or more
    at the bottom, so that batch norm can train on a batch of one.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        super().__init__(spec, batch_normed_sizes(dims, len(widths)))
        first = ResidualUnit(dims, spec.in_channels, widths[0], from_image=True)
        self.encoder = nn.ModuleList([first, *(ResidualUnit(dims, i, o, stride=2) for i, o in pairwise(widths))])
        # Finest level first, as in the encoder; the forward pass walks them from the bottom up.
        self.up = nn.ModuleList(_up(dims, below, spec.variant == "upconv") for below in widths[1:])
        self.decoder = nn.ModuleList(ResidualUnit(dims, below + skip, skip) for skip, below in pairwise(widths))
        self.head = CONVOLUTION[dims](widths[0], spec.classes, 1)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for unit in self.encoder:
            features_BCS = unit(features_BCS)
            skips.append(features_BCS)
        for level in reversed(range(len(self.decoder))):
            up_BCS = self.up[level](features_BCS)
            features_BCS = self.decoder[level](torch.cat([up_BCS, skips[level]], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


class ResidualUnit(nn.Module):
    """Two convolutions, each after its norm and ReLU, beside a shortcut.

    Args:
        dims: spatial axes, 2 or 3.
        channels: that come in.
        width: channels that go out.
        stride: of the first convolution and of the shortcut.
        from_image: start with the first convolution, without norm and ReLU before it.
    """

    def __init__(self, dims: int, channels: int, width: int, *, stride: int = 1, from_image: bool = False) -> None:
        super().__init__()
        convolution = CONVOLUTION[dims]
        before = () if from_image else _norm_and_relu(dims, channels)
        first, second = convolution(channels, width, 3, stride, padding=1), convolution(width, width, 3, padding=1)
        self.convolutions = nn.Sequential(*before, first, *_norm_and_relu(dims, width), second)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else convolution(channels, width, 1, stride)

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, width, *S / stride)."""
        sum_BCS: Tensor = self.convolutions(features_BCS) + self.shortcut(features_BCS)
        return sum_BCS


def _norm_and_relu(dims: int, channels: int) -> tuple[nn.Module, ...]:
    return BATCH_NORM[dims](channels), nn.ReLU(inplace=True)


def _up(dims: int, channels: int, learned: bool) -> nn.Module:
    return TRANSPOSED[dims](channels, channels, 2, 2) if learned else nn.Upsample(scale_factor=2, mode=LINEAR[dims])
