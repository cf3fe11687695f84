"""Classifier: the encoder of a U-Net, then one vector of logits for the whole image, its location discarded.

One of three architectures that O'Sullivan's article on the U-Net (towardsdatascience, 56e4842e313a) sets
side by side: classifier, autoencoder, U-Net. Its blocks are those of `unet_same.py`:

    160 |C>64>64|
        80 |64>128>128|
           40 |128>256>256|
              20 |256>512>512|
                 10 |512>1024>1024| -> mean over the image -> linear -> classes

Each bar holds 2 x (3x3 convolution -> batch norm -> ReLU); down: 2x2 max-pooling. The article has an encoder and one
node a class; the mean over the image before them, and the widths, are ours.

So that it trains and predicts through the same code as the others, `forward` gives the image's logits to every voxel.
"""

from torch import Tensor, nn

from microtome.models.blocks import MAX_POOL, initialise_glorot, level_widths, padded_sizes
from microtome.models.network import Network, NetworkSpec
from microtome.models.unet_same import WIDTHS, contract, contracting_stages


class Classifier(Network):
    """Encoder and class nodes. image_BCS (B, C, *S) -> logits_BKS (B, K, *S), one vector for all voxels of an image.

    Sides are multiples of 16. `config.widths` narrows, widens, deepens or flattens it; then 16 is 2^(levels - 1). To
    train, the batch norm of the deepest level needs more than one value a channel: not one image of the smallest size alone.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths = level_widths(spec, WIDTHS)
        super().__init__(spec, padded_sizes(spec.dims, len(widths)))
        self.contract = contracting_stages(spec)
        self.pool = MAX_POOL[spec.dims](2)
        self.head = nn.Linear(widths[-1], spec.classes)
        initialise_glorot(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """The logits of the whole image at every voxel; a view, in which all voxels of an image share memory."""
        logits_BK = self.classify(image_BCS)
        logits_BKS = logits_BK.reshape(*logits_BK.shape, *(1,) * self.dims)
        return logits_BKS.expand(-1, -1, *image_BCS.shape[2:])

    def classify(self, image_BCS: Tensor) -> Tensor:
        """Logits (B, K) of whole images."""
        self.check_image(image_BCS)
        features_BCS = contract(self.contract, self.pool, image_BCS)[-1]
        logits_BK: Tensor = self.head(features_BCS.flatten(2).mean(2))
        return logits_BK
