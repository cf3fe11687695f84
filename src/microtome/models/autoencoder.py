"""Autoencoder: the encoder and decoder of a U-Net without its skips, so that all passes through the code at the bottom.

One of three architectures that O'Sullivan's article on the U-Net (towardsdatascience, 56e4842e313a) sets
side by side: classifier, autoencoder, U-Net. Its blocks are those of `unet_same.py`:

    160 |C>64>64|                                        |64>64>64| -> 1x1 -> classes
        80 |64>128>128|                            |128>128>128|
           40 |128>256>256|                    |256>256>256|
              20 |256>512>512|              |512>512>512|
                     10 |512>1024>1024| = the code

Each bar holds 2 x (3x3 convolution -> batch norm -> ReLU); down: 2x2 max-pooling; up: learned, 2x2 transposed
convolution with stride 2. Where a detail was pooled away, only the code can say where it was.

The article trains it on its own input: built with `classes` = `in_channels`, the logits are the image again (mean
squared error, or binary cross-entropy of their sigmoid), and `encode` gives the compressed image. Trained on labels it is
the U-Net's counterpart without skips. The article names no widths: depth, widths and activation are ours.
"""

from itertools import pairwise

from torch import Tensor, nn

from microtome.models.blocks import CONVOLUTION, MAX_POOL, TRANSPOSED, initialise_glorot, level_widths, padded_sizes
from microtome.models.network import Network, NetworkSpec
from microtome.models.unet_same import WIDTHS, contract, contracting_stages, two_convolutions


class Autoencoder(Network):
    """Encoder and decoder without skips. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of 16.

    `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1). To train, the batch norm of the
    deepest level needs more than one value a channel: not one image of the smallest size alone.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths, dims = level_widths(spec, WIDTHS), spec.dims
        super().__init__(spec, padded_sizes(dims, len(widths)))
        self.contract = contracting_stages(spec)
        self.pool = MAX_POOL[dims](2)
        # Finest level first, as in the contracting path; `decode` walks them from the bottom up.
        self.up = nn.ModuleList(TRANSPOSED[dims](below, above, 2, stride=2) for above, below in pairwise(widths))
        self.expand = nn.ModuleList(two_convolutions(width, width, dims) for width in widths[:-1])
        self.head = CONVOLUTION[dims](widths[0], spec.classes, 1)
        initialise_glorot(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of every voxel, from the code alone."""
        return self.decode(self.encode(image_BCS))

    def encode(self, image_BCS: Tensor) -> Tensor:
        """The code (B, last width, *S / 16) of images."""
        self.check_image(image_BCS)
        return contract(self.contract, self.pool, image_BCS)[-1]

    def decode(self, code_BCS: Tensor) -> Tensor:
        """Logits of the size of the images that the code was made from."""
        features_BCS = code_BCS
        for level in reversed(range(len(self.expand))):
            features_BCS = self.expand[level](self.up[level](features_BCS))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS
