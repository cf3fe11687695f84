"""U-Net with padded convolutions and batch norm: the worked example of a widely read tutorial.

The Paperspace worked example (Keras, Oxford-IIIT Pets, 160x160x3), after Ronneberger et al. 2015:

    160 |3>64>64| --------------- concat --------------- |128>64>64| -> 1x1 -> classes
        80 |64>128>128| --------- concat --------- |256>128>128|
           40 |128>256>256| ----- concat ----- |512>256>256|
              20 |256>512>512| -- concat -- |1024>512>512|
                     10 |512>1024>1024|

Each bar holds 2 x (3x3 convolution -> batch norm -> ReLU); down: 2x2 max-pooling; up: 2x2 transposed
convolution with stride 2; the up-sampled half comes first in each concatenation. What differs from the paper
of 2015: padding, so the output has the image's size and skips need no crop; batch norm; no dropout.

Parameters, with the running mean and variance that Keras counts: 31,055,297 for 3 channels and 1 class
(31,043,521 trained), 31,055,427 for 3 and 3.

This network returns logits. The example ends in a sigmoid for each of its 3 classes, and its loss scales the
sigmoids to sum to 1; that is the loss's affair. From knowledge of Keras' defaults, not re-read: batch norm with
eps 1e-3 and momentum 0.99 (0.01 as PyTorch counts it), Glorot-uniform weights, zero biases.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.models.network import Network, NetworkSpec, Sizes

WIDTHS = (64, 128, 256, 512, 1024)


class UNetSame(Network):
    """The padded U-Net with batch norm. image_BCS (B, C, Y, X) -> logits_BKS (B, K, Y, X); sides multiples of 16.

    `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1).
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths = spec.config.widths or WIDTHS
        step = 1 << (len(widths) - 1)
        super().__init__(spec, Sizes((step, step), (step, step)))
        self.contract = nn.ModuleList(_two_convolutions(i, o) for i, o in pairwise((spec.in_channels, *widths)))
        self.pool = nn.MaxPool2d(2)
        # Finest level first, as in the contracting path; the forward pass walks them from the bottom up.
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, stride=2) for above, below in pairwise(widths))
        self.expand = nn.ModuleList(_two_convolutions(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(widths[0], spec.classes, 1)
        _initialise_glorot(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every pixel."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for level, convolutions in enumerate(self.contract):
            features_BCS = convolutions(self.pool(features_BCS) if level else features_BCS)
            skips.append(features_BCS)
        for level in reversed(range(len(self.expand))):
            up_BCS = self.up[level](features_BCS)
            features_BCS = self.expand[level](torch.cat([up_BCS, skips[level]], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


def _two_convolutions(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(channels, width), *_convolution(width, width))


def _convolution(channels: int, width: int) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
    return nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU(inplace=True)


def _initialise_glorot(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
