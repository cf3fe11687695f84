"""V-Net, 2016: the volumetric U with a residual sum around every stage, and strided convolutions instead of pooling.

F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
Segmentation", 3DV 2016, arXiv 1606.04797, Fig. 2 and Table 1. Sizes for 128x128x64, along the first axis; n x c is
n convolutions of 5x5x5 that end with c channels:

    128 |1x16| L1 ------------------ concat ------------------ R1 |1x32| 128 -> 1x1x1 -> classes
       64 |2x32| L2 ---------------- concat ---------------- R2 |2x64| 64
          32 |3x64| L3 ------------- concat ------------- R3 |3x128| 32
             16 |3x128| L4 --------- concat --------- R4 |3x256| 16
                      8 |3x256| L5

Each bar adds its own input to its last convolution's output, then PReLU (a learned slope a channel); the input of a right
bar is [up-sampled, skip]. Down: 2x2x2 convolution with stride 2; up: 2x2x2 up-convolution with stride 2 to the skip's width;
a PReLU after each. Padded, so that the output has the image's size; no normalisation, no dropout.

Variants:
    paper: the counts of convolutions above, the only ones that give the receptive fields of the paper's Table 1
        (5, 22, 72, 172, 372, 476, 528, 546, 551). 65,175,314 parameters for 1 channel, 2 classes; the paper states no count.
    release: the authors' prototxt: 1, 1, 2, 3, 3 convolutions on the left and 3, 2, 1, 1 on the right, and a head of
        5x5x5 convolution -> PReLU -> 1x1x1. 61,982,682 parameters.

The paper's text leaves open what the release settles: the order in the concatenation, what the right bars add, and that L1
adds the image, repeated up to 16 channels. Ours: an image of n channels is repeated and then cut to the first width
(with more channels than that, the first ones are added); He's initialisation (the release says "MSRA") with slopes
that start at 0.25, PyTorch's value; the same network in 2D; with another number of levels, level i (from 0) has min(i + 1, 3)
convolutions, in the release min(i, 3) and at least 1.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.models.blocks import CONVOLUTION, TRANSPOSED, initialise_he, level_widths, padded_sizes
from microtome.models.network import Network, NetworkSpec

WIDTHS = (16, 32, 64, 128, 256)
SLOPE = 0.25  # of every PReLU at the start


class VNet(Network):
    """The V-Net of 2016. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16.

    `config.widths`, the channels of the left bars, narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1).
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        super().__init__(spec, padded_sizes(dims, len(widths)))
        released = spec.variant == "release"
        convolutions = [max(1, min(level if released else level + 1, 3)) for level in range(len(widths))]
        self.down = nn.ModuleList(_resampled(CONVOLUTION[dims](above, below, 2, 2), below) for above, below in pairwise(widths))
        entering = (spec.in_channels, *widths[1:])
        self.left = nn.ModuleList(_Bar(dims, i, o, n) for i, o, n in zip(entering, widths, convolutions, strict=True))
        # Finest level first, as on the left; the forward pass walks them from the bottom up.
        rising = (*(2 * width for width in widths[1:-1]), widths[-1])
        self.up = nn.ModuleList(_resampled(TRANSPOSED[dims](i, o, 2, 2), o) for i, o in zip(rising, widths[:-1], strict=True))
        self.right = nn.ModuleList(_Bar(dims, 2 * o, 2 * o, n) for o, n in zip(widths[:-1], convolutions, strict=False))
        self.head = _head(dims, 2 * widths[0], spec.classes, released)
        initialise_he(self, SLOPE)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for level, bar in enumerate(self.left):
            features_BCS = bar(self.down[level - 1](features_BCS) if level else features_BCS)
            skips.append(features_BCS)
        for level in reversed(range(len(self.right))):
            up_BCS = self.up[level](features_BCS)
            features_BCS = self.right[level](torch.cat([up_BCS, skips[level]], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


class _Bar(nn.Module):
    """Convolutions of 5 with PReLU between; before the last PReLU the bar's input is added."""

    def __init__(self, dims: int, channels: int, width: int, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [CONVOLUTION[dims](channels, width, 5, padding=2)]
        for _ in range(convolutions - 1):
            layers += [nn.PReLU(width, SLOPE), CONVOLUTION[dims](width, width, 5, padding=2)]
        self.convolutions = nn.Sequential(*layers)
        self.activation = nn.PReLU(width, SLOPE)

    def forward(self, features_BCS: Tensor) -> Tensor:
        convolved_BCS = self.convolutions(features_BCS)
        sum_BCS: Tensor = self.activation(convolved_BCS + repeated(features_BCS, convolved_BCS.shape[1]))
        return sum_BCS


def repeated(features_BCS: Tensor, width: int) -> Tensor:
    """The channels over and over until there are `width`: c0, c1, c0, c1, c0 for two channels and a width of 5."""
    channels = features_BCS.shape[1]
    return features_BCS if channels == width else torch.cat([features_BCS] * -(-width // channels), dim=1)[:, :width]


def _resampled(convolution: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.PReLU(width, SLOPE))


def _head(dims: int, channels: int, classes: int, released: bool) -> nn.Module:
    convolution = CONVOLUTION[dims]
    if not released:
        return convolution(channels, classes, 1)
    return nn.Sequential(convolution(channels, classes, 5, padding=2), nn.PReLU(classes, SLOPE), convolution(classes, classes, 1))
