"""3D U-Net, 2016: the U-Net in three dimensions, with channels doubled before each pooling.

Ö. Çiçek, A. Abdulkadir, S. S. Lienkamp, T. Brox, O. Ronneberger, "3D U-Net: Learning Dense Volumetric
Segmentation from Sparse Annotation", MICCAI 2016, arXiv 1606.06650, Fig. 2, as notes of others give it (second-hand;
its channels give the paper's count of parameters exactly). Sizes Z, Y, X:

    116x132x132 |3>32>64| 112x128x128 ------ crop 40, concat ------ 32x48x48 |192>64>64| 28x44x44 -> 1x1x1 -> classes
        56x64x64 |64>64>128| 52x60x60 ------ crop 16, concat ------ 20x28x28 |384>128>128| 16x24x24
            26x30x30 |128>128>256| 22x26x26 - crop 4, concat - 14x18x18 |768>256>256| 10x14x14
                    11x13x13 |256>256>512| 7x9x9

3x3x3 convolutions without padding, normalisation before each ReLU; down: 2x2x2 max-pooling; up: 2x2x2
up-convolution that keeps its channels. What differs from the U-Net of 2015: one level less, the doubled
channels (no bottleneck), batch norm, no dropout.

Variants:
    paper: with batch norm. 19,072,291 parameters for 3 channels, 3 classes; the paper counts 19,069,955, which is
        this network without the scales of its norms (whether the authors' norm had them is not known).
    no_bn: without, and with a bias in each 3x3x3 convolution: 19,069,955 parameters.

The paper's batch is one sample, and its batch norm takes the current statistics at test time too (second-hand,
two of three sources; the third says the opposite). `config.batch_statistics` does so: `InstanceNorm` stands in the place of
batch norm, for a batch of one the same numbers, and for a larger one a prediction that does not depend on which samples
share a batch. Without it the norm is batch norm with running averages at prediction. The up-convolutions have no bias,
for the count's sake. From the authors' network without norm, second-hand: `no_bn` has a ReLU after each up-convolution
and starts with a bias of -0.1 in its first convolution; weights from N(0, 2 / N); the up-sampled half comes first
in each concatenation.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.errors import ConfigError
from microtome.models.blocks import TRANSPOSED, InstanceNorm, centre_crop, initialise_he, unpadded_context, unpadded_sizes
from microtome.models.network import Network, NetworkSpec

WIDTHS = (64, 128, 256, 512)


class UNet3D(Network):
    """The 3D U-Net of 2016. image_BCS (B, C, Z, Y, X) -> logits_BKS, 88 voxels less along each axis; sides 8 k + 4, 92 or more.

    `config.widths`, the channels that each level ends with, narrows, widens, deepens or flattens it;
    then 88 is `2 * context_vox`. `config.batch_statistics`: the norm takes the statistics of what it sees at prediction too.

    Raises:
        ConfigError: fewer than two widths, an odd one, or `batch_statistics` of the variant without norm.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths = spec.config.widths or WIDTHS
        normalised = spec.variant != "no_bn"
        _check(spec, widths, normalised)
        super().__init__(spec, unpadded_sizes(3, len(widths)), unpadded_context(len(widths)))
        norm = _norm(spec) if normalised else None
        self.analyse = nn.ModuleList(_two_convolutions((i, o // 2, o), norm) for i, o in pairwise((spec.in_channels, *widths)))
        self.pool = nn.MaxPool3d(2)
        # Finest level first, as in the analysis path; the forward pass walks them from the bottom up.
        self.up = nn.ModuleList(_up_convolution(below, normalised) for below in widths[1:])
        self.synthesise = nn.ModuleList(_two_convolutions((below + skip, skip, skip), norm) for skip, below in pairwise(widths))
        self.head = nn.Conv3d(widths[0], spec.classes, 1)
        initialise_he(self)
        if not normalised:
            first = next(module for module in self.modules() if isinstance(module, nn.Conv3d))
            assert first.bias is not None
            nn.init.constant_(first.bias, -0.1)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of the volume's middle, `context_vox` voxels less on each side."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for level, convolutions in enumerate(self.analyse):
            features_BCS = convolutions(self.pool(features_BCS) if level else features_BCS)
            skips.append(features_BCS)
        for level in reversed(range(len(self.synthesise))):
            up_BCS = self.up[level](features_BCS)
            skip_BCS = centre_crop(skips[level], up_BCS.shape[2:])
            features_BCS = self.synthesise[level](torch.cat([up_BCS, skip_BCS], dim=1))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


def _two_convolutions(channels: tuple[int, int, int], norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        # The norm's shift does what a bias would.
        layers += [nn.Conv3d(before, after, 3, bias=False), norm(after)] if norm else [nn.Conv3d(before, after, 3)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _norm(spec: NetworkSpec) -> Callable[[int], nn.Module]:
    return InstanceNorm if spec.config.batch_statistics else nn.BatchNorm3d


def _check(spec: NetworkSpec, widths: tuple[int, ...], normalised: bool) -> None:
    if len(widths) < 2 or any(width % 2 for width in widths):
        expected = "two levels or more of even widths, since each ends by doubling"
        raise ConfigError(spec.name, expected=expected, got=str(widths), do="change `network.widths`", code="C033")
    if spec.config.batch_statistics and not normalised:
        got = f"`batch_statistics` with the variant `{spec.variant}`"
        raise ConfigError(spec.name, expected="a variant with a norm", got=got, do="remove `network.batch_statistics`", code="C033")


def _up_convolution(channels: int, normalised: bool) -> nn.Module:
    up = TRANSPOSED[3](channels, channels, 2, stride=2, bias=False)
    return up if normalised else nn.Sequential(up, nn.ReLU(inplace=True))
