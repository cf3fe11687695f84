"""LadderNet, 2018: a chain of U-Nets joined by additions, with residual blocks that use one convolution twice.

J. Zhuang, "LadderNet: Multi-path networks based on U-Net for medical image segmentation", 2018, arXiv 1810.07810, as in the
author's code (`LadderNetv65` with 4 down-samplings and 10 filters). Channels of each map; + joins, nothing is concatenated:

    C > 10 --------- + 10 --> + 10 --------- + 10 -> 1x1 -> classes
         20 ------- + 20 ----> + 20 ------- + 20
           40 ----- + 40 ------> + 40 ----- + 40
             80 --- + 80 --------> + 80 --- + 80
               160 (first U)          160 (second U)

Every number stands for a residual block: convolution -> ReLU -> dropout (whole channels, 0.25) -> the SAME convolution,
plus its input, then ReLU. Down: 3x3 convolution with stride 2, then ReLU; up: 3x3 up-convolution with stride 2, plus the skip of
this U. The second U starts with a block of its own, and at each level of its way down it adds the first U's
map of that level. 1,381,652 parameters for 1 channel, 2 classes; "1.5M" is told of the paper (not confirmed).

There is no normalisation: in the released code it is commented out, as is a third U in the middle, so two U's it is here.
Left as PyTorch draws them: the weights (He's would double the variance in each of the 19 residual blocks). What differs from
the release: it ends in a log-softmax, this in logits; ours too are the same network in 3D and another number of levels.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from microtome.models.blocks import CONVOLUTION, DROPOUT, TRANSPOSED, dropout_share, level_widths, padded_sizes
from microtome.models.network import Network, NetworkSpec

WIDTHS = (10, 20, 40, 80, 160)
DROPPED = 0.25


class LadderNet(Network):
    """Two U-Nets in a chain. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16.

    `config.widths` narrows, widens, deepens or flattens both; then 16 is 2^(levels - 1). `config.dropout` is the share of
    channels dropped in each block.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        super().__init__(spec, padded_sizes(dims, len(widths)))
        dropout = dropout_share(spec, DROPPED)
        self.stem = nn.Sequential(CONVOLUTION[dims](spec.in_channels, widths[0], 3, padding=1), nn.ReLU(inplace=True))
        self.first = _Ladder(dims, widths, dropout)
        self.between = SharedBlock(dims, widths[0], dropout)
        self.second = _Ladder(dims, widths, dropout)
        self.head = CONVOLUTION[dims](widths[0], spec.classes, 1)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel."""
        self.check_image(image_BCS)
        maps = self.first(self.stem(image_BCS), ())
        logits_BKS: Tensor = self.head(self.second(self.between(maps[0]), maps)[0])
        return logits_BKS


class SharedBlock(nn.Module):
    """ReLU(x + c(dropout(ReLU(c(x))))) with one convolution c."""

    def __init__(self, dims: int, width: int, dropout: float) -> None:
        super().__init__()
        self.convolution = CONVOLUTION[dims](width, width, 3, padding=1)
        self.dropout = DROPOUT[dims](dropout)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        hidden_BCS = self.dropout(self.activation(self.convolution(features_BCS)))
        sum_BCS: Tensor = self.activation(features_BCS + self.convolution(hidden_BCS))
        return sum_BCS


class _Ladder(nn.Module):
    """One U: down and up again, to a list of the maps of its way up, finest first."""

    def __init__(self, dims: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        # Finest level first in each list; the way up walks them from the bottom.
        self.encoder = nn.ModuleList(SharedBlock(dims, width, dropout) for width in widths)
        self.down = nn.ModuleList(_down(dims, above, below) for above, below in pairwise(widths))
        self.up = nn.ModuleList(TRANSPOSED[dims](below, above, 3, 2, 1, output_padding=1) for above, below in pairwise(widths))
        self.decoder = nn.ModuleList(SharedBlock(dims, width, dropout) for width in widths[:-1])

    def forward(self, features_BCS: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        """`before` holds the maps of the U before it, finest first; none where there is no such U."""
        skips: list[Tensor] = []
        for level, down in enumerate(self.down):
            features_BCS = self.encoder[level](features_BCS + before[level] if before else features_BCS)
            skips.append(features_BCS)
            features_BCS = down(features_BCS)
        features_BCS = self.encoder[-1](features_BCS)
        maps: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            features_BCS = self.decoder[level](self.up[level](features_BCS) + skips[level])
            maps.insert(0, features_BCS)
        return maps


def _down(dims: int, channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(CONVOLUTION[dims](channels, width, 3, 2, padding=1), nn.ReLU(inplace=True))
