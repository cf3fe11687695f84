"""Sliding window, 2012: a network that labels one pixel from the square around it, in both ways it can be run.

D. C. Ciresan, A. Giusti, L. M. Gambardella, J. Schmidhuber, "Deep Neural Networks Segment Neuronal Membranes in
Electron Microscopy Images", NIPS 2012; the network N4:

    95 |C>48, k4| 92 -> 46 |48>48, k5| 42 -> 21 |48>48, k4| 18 -> 9 |48>48, k4| 6 -> 3 |fully connected 200| -> classes

-> is 2x2 max-pooling. 219,290 parameters for 1 channel and 2 classes. Second-hand: the sizes of the layers (from a port's
comments). Not confirmed, so ours: the ReLU after each convolution and the hidden layer (before each pooling), and the
initialisation. The paper's own way with the data (mirrored borders, foveation, balanced sampling of pixels, the mean
of four networks) is not here.

The paper runs the network once for every pixel: `forward_windows`. Neighbouring windows share nearly all of their
pixels, so `forward` computes each value once: pooling with stride 1, and every layer after it reaches as much further as
that pooling would have shrunk the map ("a trous"). Same weights, same map:

    window          stride 1, dilation 1 -> pool, stride 2 -> kernel, dilation 1 -> pool, stride 2 -> ...
    whole image     stride 1, dilation 1 -> pool, stride 1 -> kernel, dilation 2 -> pool, stride 1 -> kernel, dilation 4 ...
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

from microtome.errors import ConfigError
from microtome.geometry import Sizes
from microtome.models.blocks import initialise_he
from microtome.models.network import Network, NetworkSpec

# Maps of the four convolutions, then hidden units.
WIDTHS = (48, 48, 48, 48, 200)
KERNELS = (4, 5, 4, 4)
# Side of the last pooled map, which the hidden layer sees as a whole.
LAST = 3


class SlidingWindow(Network):
    """Ciresan's N4. image_BCS (B, C, Y, X) -> logits_BKS (B, K, Y - 94, X - 94); sides 95 or more.

    `config.widths`: maps of each convolution, then hidden units. Another number of convolutions than four has another
    window: kernels are 4, 5, 4, 4, 4, ... from the first on, and the last pooled map stays 3x3; 94 is `2 * context_vox`.

    Raises:
        ConfigError: fewer than two widths.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        widths = spec.config.widths or WIDTHS
        if len(widths) < 2:
            expected = "maps of a convolution or more, then hidden units"
            raise ConfigError(spec.name, expected=expected, got=str(widths), do="change `network.widths`", code="C033")
        kernels = tuple(KERNELS[min(place, len(KERNELS) - 1)] for place in range(len(widths) - 1))
        self.window_vox = _window(kernels)
        super().__init__(spec, Sizes((self.window_vox,) * 2, (1, 1)), self.window_vox // 2)
        pairs = pairwise((spec.in_channels, *widths[:-1]))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k) for (i, o), k in zip(pairs, kernels, strict=True))
        # Fully connected layers, written as the convolutions that they are of a window's last map.
        self.hidden = nn.Conv2d(widths[-2], widths[-1], LAST)
        self.head = nn.Conv2d(widths[-1], spec.classes, 1)
        initialise_he(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Logits of the image's middle, `context_vox` pixels less on each side, all at once."""
        self.check_image(image_BCS)
        return self._logits(image_BCS, stride=1)

    def forward_windows(self, image_BCS: Tensor, batch: int = 256) -> Tensor:
        """The same map as `forward`, one window a pixel as in the paper; `batch` windows at once."""
        self.check_image(image_BCS)
        side = self.window_vox
        windows_BYXCS = image_BCS.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)
        shape = windows_BYXCS.shape[:3]
        places = torch.split(torch.arange(shape.numel()), batch)
        # Indexed part by part: a view as long as it can be, since all windows together are 9025 times as large as the image.
        logits = [self._logits(windows_BYXCS[torch.unravel_index(part, shape)], stride=2) for part in places]
        return torch.cat(logits).reshape(*shape, self.classes).permute(0, 3, 1, 2)

    def _logits(self, image_BCS: Tensor, stride: int) -> Tensor:
        """The layers, with pooling of stride 2 (of a window: one value), or of stride 1 and dilation instead (a value a pixel)."""
        features_BCS, dilation = image_BCS, 1
        for layer in self.convolutions:
            features_BCS = relu(_convolved(layer, features_BCS, dilation))
            features_BCS = max_pool2d(features_BCS, 2, stride=stride, dilation=dilation)
            dilation *= 2 // stride
        features_BCS = relu(_convolved(self.hidden, features_BCS, dilation))
        logits_BKS: Tensor = self.head(features_BCS)
        return logits_BKS


def _convolved(layer: nn.Module, features_BCS: Tensor, dilation: int) -> Tensor:
    """A layer's convolution with another dilation than its own."""
    assert isinstance(layer, nn.Conv2d)
    return conv2d(features_BCS, layer.weight, layer.bias, dilation=dilation)


def _window(kernels: tuple[int, ...]) -> int:
    """Side of the window that convolutions with these kernels, each followed by pooling, bring down to the last map: 95 for N4."""
    side = LAST
    for kernel in reversed(kernels):
        side = 2 * side + kernel - 1
    return side
