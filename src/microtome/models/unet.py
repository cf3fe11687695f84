"""U-Net, 2015: unpadded convolutions, cropped skips, and an output smaller than its image.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, arXiv 1505.04597, Fig. 1:

    572 |1>64>64| 568 ------------- crop 88, concat ------------ 392 |128>64>64| 388 -> 1x1 -> classes
        284 |64>128>128| 280 ------ crop 40, concat ------ 200 |256>128>128| 196
            140 |128>256>256| 136 - crop 16, concat - 104 |512>256>256| 100
                68 |256>512>512| 64 - crop 4 - 56 |1024>512>512| 52
                       32 |512>1024>1024| 28

Right of a bar is the size after the two convolutions; down: 2x2 max-pooling; up: 2x2 up-convolution
that halves the channels. 23 convolutions (18 of 3x3, 4 up, 1 of 1x1), no normalisation.

Variants:
    paper: the figure. 31,030,658 parameters for 1 channel, 2 classes.
    release: the Caffe network `phseg_v5` that the authors put on their page: a ReLU after each
        up-convolution, and the last one keeps its 128 channels. 31,100,354 parameters.

What the paper leaves open is filled from the release as two independent ports report it (second-hand):
dropout with p = 0.5 after the last two levels of the contracting path ("at the end of the contracting
path" is the paper's word), the fourth skip taken after the dropout, and the up-sampled half first in each
concatenation. Biases start at 0 (not stated).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.models.blocks import TRANSPOSED, centre_crop, dropout_share, initialise_he, level_widths, unpadded_context, unpadded_sizes
from microtome.models.network import Network, NetworkSpec

WIDTHS = (64, 128, 256, 512, 1024)
DROPOUT = 0.5


class UNet(Network):
    """The U-Net of 2015. image_BCS (B, C, Y, X) -> logits_BKS (B, K, Y - 184, X - 184); sides 16 k + 60, 188 or more.

    `config.widths` narrows, widens, deepens or flattens it; then 184 is `2 * context_vox`. `config.dropout` sets the share
    of dropped values.

    Raises:
        ConfigError: fewer than two widths.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths = level_widths(spec, WIDTHS)
        super().__init__(spec, unpadded_sizes(2, len(widths)), unpadded_context(len(widths)))
        released = spec.variant == "release"
        ups = [*widths[:-1]]
        if released:
            ups[0] = widths[1]
        self.contract = nn.ModuleList(_two_convolutions(i, o) for i, o in pairwise((spec.in_channels, *widths)))
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout_share(spec, DROPOUT))
        # Finest level first, as in the contracting path; the forward pass walks them from the bottom up.
        self.up = nn.ModuleList(_up_convolution(below, up, released) for below, up in zip(widths[1:], ups, strict=True))
        self.expand = nn.ModuleList(_two_convolutions(up + skip, skip) for up, skip in zip(ups, widths[:-1], strict=True))
        self.head = nn.Conv2d(widths[0], spec.classes, 1)
        initialise_he(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of the image's middle, `context_vox` pixels less on each side."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for level, convolutions in enumerate(self.contract):
            features_BCS = convolutions(self.pool(features_BCS) if level else features_BCS)
            if level >= len(self.contract) - 2:
                features_BCS = self.dropout(features_BCS)
            skips.append(features_BCS)
        for level in reversed(range(len(self.expand))):
            up_BCS = self.up[level](features_BCS)
            skip_BCS = centre_crop(skips[level], up_BCS.shape[2:])
            features_BCS = self.expand[level](torch.cat([up_BCS, skip_BCS], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


def _two_convolutions(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3), nn.ReLU(inplace=True))


def _up_convolution(channels: int, width: int, released: bool) -> nn.Module:
    up = TRANSPOSED[2](channels, width, 2, stride=2)
    return nn.Sequential(up, nn.ReLU(inplace=True)) if released else up
