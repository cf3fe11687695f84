"""Attention U-Net, 2018: each skip is weighed, voxel by voxel, by a gate that looks at the next coarser level.

O. Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018, arXiv 1804.03999, as in the
authors' code (network `unet_CT_single_att_dsv_3D`):

    |C>16>16| ----------------------- concat ----------------------- |48>16>16| -- 1x1x1 --------.
      |16>32>32| ------- gate ------- concat ------- |96>32>32| ------ 1x1x1, up 2 --------------+
        |32>64>64| ------- gate ----- concat ----- |192>64>64| ------- 1x1x1, up 4 --------------+- concat -- 1x1x1 -> classes
          |64>128>128| ----- gate --- concat --- |384>128>128| ------- 1x1x1, up 8 --------------'
                         |128>256>256|

Each bar holds 2 x (3x3x3 convolution -> batch norm -> ReLU), padded; down: 2x2x2 max-pooling; up: trilinear, not learned;
[skip, up-sampled] is the order in each concatenation. A gate, for a skip x with C channels and its gating signal g:

    alpha = sigmoid(psi . ReLU(W_x x + W_g g + b_g) + b_psi)          output = W (alpha x), one alpha a voxel

W_x is a 2x2x2 convolution with stride 2 to C channels and no bias, so alpha is computed at g's resolution, and then
trilinearly up-sampled; W_g, psi and W are 1x1x1, and W ends in a batch norm. g is the decoder's output one level coarser
(for the deepest skip: 1x1x1, norm, ReLU of the bottom). The finest skip has no gate. Heads at every decoder level are
up-sampled, concatenated, finest first, and fused by a 1x1x1 convolution: deep supervision with ONE map as output.

Variants:
    single: one gate a skip, then 1x1x1 -> norm -> ReLU. 6,214,151 parameters for 1 channel, 4 classes.
    double: two gates a skip, their outputs concatenated before that 1x1x1. 6,473,322 parameters.

Without gates 5,888,004. A count of 6.40M is told of the paper (not confirmed); it fits neither. Ours: the same network in 2D,
He's initialisation, and another number of levels. (A popular 2D port gates after up-sampling, at equal resolution, and
the finest skip too: not the paper's gate, and not this file's.)
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.errors import ConfigError
from microtome.models.blocks import BATCH_NORM, CONVOLUTION, LINEAR, MAX_POOL, batch_normed_sizes, initialise_he
from microtome.models.network import Network, NetworkSpec

WIDTHS = (16, 32, 64, 128, 256)


class AttentionUNet(Network):
    """The U-Net with attention gates. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16, Y and X from 32.

    `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1). Y and X have two voxels or more
    at the bottom, so that batch norm can train on a batch of one.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = spec.config.widths or WIDTHS, spec.dims
        if len(widths) < 3:
            expected = "at least 3 levels, since the finest skip has no gate"
            raise ConfigError(spec.name, expected=expected, got=str(widths), do="change `network.widths`", code="C033")
        super().__init__(spec, batch_normed_sizes(dims, len(widths)))
        gates, bottom = 2 if spec.variant == "double" else 1, widths[-1]
        self.encoder = nn.ModuleList(_two_convolutions(dims, i, o) for i, o in pairwise((spec.in_channels, *widths)))
        self.pool = MAX_POOL[dims](2)
        self.gating = nn.Sequential(*_convolution(dims, bottom, bottom, 1))
        # Level by level from here on, finest first; the forward pass walks them from the bottom up.
        self.gates = nn.ModuleList(_Gates(dims, skip, below, gates) for skip, below in pairwise(widths[1:]))
        self.decoder = nn.ModuleList(_two_convolutions(dims, skip + below, skip) for skip, below in pairwise(widths))
        self.up = nn.Upsample(scale_factor=2, mode=LINEAR[dims])
        self.heads = nn.ModuleList(_head(dims, width, spec.classes, 1 << level) for level, width in enumerate(widths[:-1]))
        self.fuse = CONVOLUTION[dims](spec.classes * len(self.heads), spec.classes, 1)
        initialise_he(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        features_BCS, skips = image_BCS, []
        for level, convolutions in enumerate(self.encoder):
            features_BCS = convolutions(self.pool(features_BCS) if level else features_BCS)
            skips.append(features_BCS)
        gating_BCS = self.gating(features_BCS)
        logits: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            skip_BCS = self.gates[level - 1](skips[level], gating_BCS) if level else skips[level]
            features_BCS = self.decoder[level](torch.cat([skip_BCS, self.up(features_BCS)], dim=1))
            gating_BCS = features_BCS
            logits.insert(0, self.heads[level](features_BCS))
        logits_BKS: Tensor = self.fuse(torch.cat(logits, dim=1))
        return logits_BKS


class AttentionGate(nn.Module):
    """Additive attention: the skip times a weight from 0 to 1 for each voxel, then a 1x1x1 convolution and a norm.

    Args:
        dims: spatial axes, 2 or 3.
        channels: of the skip; of the hidden map and the output too.
        gating_channels: of the gating signal, which has half the skip's size along each axis.
    """

    def __init__(self, dims: int, channels: int, gating_channels: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[dims]
        self.of_skip = convolution(channels, channels, 2, 2, bias=False)
        self.of_gating = convolution(gating_channels, channels, 1)
        self.psi = convolution(channels, 1, 1)
        self.up = nn.Upsample(scale_factor=2, mode=LINEAR[dims])
        self.output = nn.Sequential(convolution(channels, channels, 1), BATCH_NORM[dims](channels))

    def attention(self, skip_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        """Alpha (B, 1, *S) of each voxel of the skip, from 0 to 1."""
        hidden_BCS = torch.relu(self.of_skip(skip_BCS) + self.of_gating(gating_BCS))
        attention_B1S: Tensor = self.up(torch.sigmoid(self.psi(hidden_BCS)))
        return attention_B1S

    def forward(self, skip_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        gated_BCS: Tensor = self.output(self.attention(skip_BCS, gating_BCS) * skip_BCS)
        return gated_BCS


class _Gates(nn.Module):
    """One gate or more on the same skip and signal, brought together by 1x1x1 -> norm -> ReLU."""

    def __init__(self, dims: int, channels: int, gating_channels: int, number: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(AttentionGate(dims, channels, gating_channels) for _ in range(number))
        self.combine = nn.Sequential(*_convolution(dims, number * channels, channels, 1))

    def forward(self, skip_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        gated_BCS: Tensor = self.combine(torch.cat([gate(skip_BCS, gating_BCS) for gate in self.gates], dim=1))
        return gated_BCS


def _two_convolutions(dims: int, channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(dims, channels, width, 3), *_convolution(dims, width, width, 3))


def _convolution(dims: int, channels: int, width: int, kernel: int) -> tuple[nn.Module, ...]:
    return CONVOLUTION[dims](channels, width, kernel, padding=kernel // 2), BATCH_NORM[dims](width), nn.ReLU(inplace=True)


def _head(dims: int, channels: int, classes: int, scale: int) -> nn.Module:
    head = CONVOLUTION[dims](channels, classes, 1)
    return head if scale == 1 else nn.Sequential(head, nn.Upsample(scale_factor=scale, mode=LINEAR[dims]))
