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
In 3D, which the example does not have, every 2 and 3 above counts along Z too.

Parameters in 2D, with the running mean and variance that Keras counts: 31,055,297 for 3 channels and 1 class
(31,043,521 trained), 31,055,427 for 3 and 3.

This network returns logits. The example ends in a sigmoid for each of its 3 classes, and its loss scales the
sigmoids to sum to 1; that is the loss's affair. From knowledge of Keras' defaults, not re-read: batch norm with
eps 1e-3 and momentum 0.99 (0.01 as PyTorch counts it), Glorot-uniform weights, zero biases.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.models.blocks import BATCH_NORM, CONVOLUTION, MAX_POOL, TRANSPOSED, initialise_glorot, level_widths, padded_sizes
from microtome.models.network import Network, NetworkSpec

WIDTHS = (64, 128, 256, 512, 1024)


class UNetSame(Network):
    """The padded U-Net with batch norm. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16.

    `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1). To train, the batch norm of the
    deepest level needs more than one value a channel: not one image of the smallest size alone.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        super().__init__(spec, padded_sizes(dims, len(widths)))
        self.contract = contracting_stages(spec)
        self.pool = MAX_POOL[dims](2)
        # Finest level first, as in the contracting path; the forward pass walks them from the bottom up.
        self.up = nn.ModuleList(TRANSPOSED[dims](below, above, 2, stride=2) for above, below in pairwise(widths))
        self.expand = nn.ModuleList(two_convolutions(2 * width, width, dims) for width in widths[:-1])
        self.head = CONVOLUTION[dims](widths[0], spec.classes, 1)
        initialise_glorot(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        *skips, features_BCS = contract(self.contract, self.pool, image_BCS)
        for level in reversed(range(len(self.expand))):
            up_BCS = self.up[level](features_BCS)
            features_BCS = self.expand[level](torch.cat([up_BCS, skips[level]], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


def contracting_stages(spec: NetworkSpec) -> nn.ModuleList:
    """Two convolutions for each level, finest first."""
    return nn.ModuleList(two_convolutions(i, o, spec.dims) for i, o in pairwise((spec.in_channels, *level_widths(spec, WIDTHS))))


def contract(stages: nn.ModuleList, pool: nn.Module, image_BCS: Tensor) -> list[Tensor]:
    """The features of each level, finest first, pooled between them."""
    features: list[Tensor] = []
    for stage in stages:
        features.append(stage(pool(features[-1]) if features else image_BCS))
    return features


def two_convolutions(channels: int, width: int, dims: int) -> nn.Sequential:
    """Twice a padded 3-convolution, batch norm and ReLU."""
    return nn.Sequential(*_convolution(channels, width, dims), *_convolution(width, width, dims))


def _convolution(channels: int, width: int, dims: int) -> tuple[nn.Module, ...]:
    norm = BATCH_NORM[dims](width, eps=1e-3, momentum=0.01)
    return CONVOLUTION[dims](channels, width, 3, padding=1), norm, nn.ReLU(inplace=True)
