r"""UNet++: U-Nets of every depth nested in one another, joined by dense skips.

Z. Zhou, M. M. R. Siddiquee, N. Tajbakhsh, J. Liang, "UNet++: A Nested U-Net Architecture for Medical Image Segmentation",
DLMIA 2018, arXiv 1807.10165; the authors' code (MrGiovanni/UNetPlusPlus). Node x(i,j) at level i, column j:

     32   x00 --- x01 --- x02 --- x03 --- x04      heads (1-convolutions) on x01 ... x04
             \   /       /       /       /
     64       x10 --- x11 --- x12 --- x13          \ down: 2x2 max-pooling
                 \   /       /       /             / up: 2x2 transposed convolution with stride 2 to the level's width
    128           x20 --- x21 --- x22              - skips: from every earlier node of the level
                     \   /       /
    256               x30 --- x31
                         \   /
    512                   x40

x(i,j) = H[up x(i+1,j-1), x(i,0), ..., x(i,j-1)], concatenated in this order; H is twice: padded 3-convolution -> ReLU ->
dropout 0.5, without norm. 9,041,601 parameters for 1 channel, 1 class and one head.

Deep supervision (`supervised_levels: n`): heads on the last n of x01 ... x04, all at the image's resolution. In training they
come in a list, x04's first. Otherwise the output is that of x04's head alone. The paper has two modes of prediction: one
averages all heads, the other takes a shallower head and leaves out what that one does not need. `pruned` is the second; the
average is not offered.

What differs from the authors' code: logits in place of a sigmoid; the L2 penalty of 1e-4 on weights is the optimiser's affair;
He initialisation for the up-convolutions too. Ours: the form in 3D.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from microtome.errors import ConfigError
from microtome.models.blocks import CONVOLUTION, MAX_POOL, TRANSPOSED, dropout_share, initialise_he, level_widths, padded_sizes
from microtome.models.network import Network, NetworkSpec

WIDTHS = (32, 64, 128, 256, 512)
DROPOUT = 0.5


class UNetPlusPlus(Network):
    """UNet++. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16.

    In training mode with `supervised_levels` > 1 it returns a list of logits, the deepest head's first, all of the image's size.
    `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1).

    Raises:
        ConfigError: fewer than 2 widths, or more supervised levels than nested U-Nets.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        self._check(spec, widths)
        super().__init__(spec, padded_sizes(dims, len(widths)))
        self.depth = len(widths) - 1
        dropout = dropout_share(spec, DROPOUT)
        self.pool = MAX_POOL[dims](2)
        # By the paper's names; a shallower network has the same, fewer. up[x(i,j)] brings x(i+1,j-1) to that node.
        self.nodes, self.up = nn.ModuleDict(), nn.ModuleDict()
        for level, (above, width) in enumerate(pairwise((spec.in_channels, *widths))):
            self.nodes[_name(level, 0)] = _two_convolutions(dims, above, width, dropout)
        for level, (width, below) in enumerate(pairwise(widths)):
            for column in range(1, len(widths) - level):
                self.up[_name(level, column)] = TRANSPOSED[dims](below, width, 2, stride=2)
                self.nodes[_name(level, column)] = _two_convolutions(dims, (column + 1) * width, width, dropout)
        # The head of the deepest x(0,j) first.
        self.heads = nn.ModuleList(CONVOLUTION[dims](widths[0], spec.classes, 1) for _ in range(spec.config.supervised_levels))
        initialise_he(self)

    def forward(self, image_BCS: Tensor) -> Tensor | list[Tensor]:
        """Logits of every voxel; in training mode with deep supervision of each supervised depth, deepest first."""
        self.check_image(image_BCS)
        # x[i] holds x(i,0), x(i,1), ... as they are made, column by column.
        features_BCS, x = image_BCS, []
        for level in range(self.depth + 1):
            features_BCS = self.nodes[_name(level, 0)](self.pool(features_BCS) if level else features_BCS)
            x.append([features_BCS])
        for column in range(1, self.depth + 1):
            for level in range(self.depth + 1 - column):
                up_BCS = self.up[_name(level, column)](x[level + 1][column - 1])
                x[level].append(self.nodes[_name(level, column)](torch.cat([up_BCS, *x[level]], dim=1)))
        if not self.training or len(self.heads) == 1:
            logits_BKS: Tensor = self.heads[0](x[0][-1])
            return logits_BKS
        return [head(x[0][self.depth - place]) for place, head in enumerate(self.heads)]

    def pruned(self, depth: int) -> "UNetPlusPlus":
        """The network that answers with the head of x(0,depth) and has only the nodes which that head needs.

        It is the UNet++ of the first depth + 1 widths, with copies of this network's weights, in the same mode.
        It takes multiples of 2^depth.

        Args:
            depth: j of the supervised node x(0,j), from `self.depth` (nothing but the other heads is left out) downwards.

        Raises:
            ConfigError: that node has no head, since `supervised_levels` is too small, or does not exist.
        """
        place = self.depth - depth
        if not 0 <= place < len(self.heads):
            depths = " or ".join(str(self.depth - each) for each in range(len(self.heads)))
            raise ConfigError(
                self.spec.name,
                expected=f"a depth with a head, {depths}",
                got=str(depth),
                do="train with more `network.supervised_levels`",
                code="C029",
            )
        widths = level_widths(self.spec, WIDTHS)[: depth + 1]
        config = self.spec.config.model_copy(update={"widths": widths, "supervised_levels": 1})
        network, own = UNetPlusPlus(replace(self.spec, config=config)), self.state_dict()
        state = {name: own[name.replace("heads.0.", f"heads.{place}.")].clone() for name in network.state_dict()}
        # Assigned, not copied into: the weights keep where they lie, their type and their layout.
        network.load_state_dict(state, assign=True)
        return network.train(self.training)

    @staticmethod
    def _check(spec: NetworkSpec, widths: tuple[int, ...]) -> None:
        supervised = spec.config.supervised_levels
        if supervised >= len(widths):
            expected = f"at most {len(widths) - 1} supervised levels, one a nested U-Net"
            raise ConfigError(spec.name, expected=expected, got=str(supervised), do="change `network.supervised_levels`", code="C033")


def _name(level: int, column: int) -> str:
    return f"x{level}_{column}"


def _two_convolutions(dims: int, channels: int, width: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (channels, width):
        layers += [CONVOLUTION[dims](before, width, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers)
