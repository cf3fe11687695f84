"""What two networks or more share: layers by dimension, centre crop, instance norm, initialisation, sizes of U-Nets."""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv3d, instance_norm, pad

from microtome.errors import ConfigError
from microtome.geometry import Sizes
from microtome.models.network import NetworkSpec


class Convolution3d(nn.Conv3d):
    """`nn.Conv3d`, but it pads stacks of few sections itself.

    Torch 2.13 on a CPU gets the bfloat16 gradient of a padded convolution's weights wrong where there are no more sections than
    it pads (Z <= 2 x padding): up to NaN, from memory that nobody wrote. Without padding along Z it is right.
    """

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, Z, Y, X) -> (B, C', Z', Y', X')."""
        if isinstance(self.padding, str) or features_BCS.shape[2] > 2 * self.padding[0]:
            return super().forward(features_BCS)
        front = self.padding[0]
        padded_BCS = pad(features_BCS, (0, 0, 0, 0, front, front))
        return conv3d(padded_BCS, self.weight, self.bias, self.stride, (0, *self.padding[1:]), self.dilation, self.groups)


class UpConvolution2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`; where its kernel is its stride a CPU trains it as the matrix product that it then is."""

    def forward(self, features_BCS: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, Y, X) -> (B, C', Y', X')."""
        if _is_product(self, features_BCS):
            return up_product(features_BCS, self.weight, self.bias)
        return super().forward(features_BCS, output_size)


class UpConvolution3d(nn.ConvTranspose3d):
    """The same for volumes."""

    def forward(self, features_BCS: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, Z, Y, X) -> (B, C', Z', Y', X')."""
        if _is_product(self, features_BCS):
            return up_product(features_BCS, self.weight, self.bias)
        return super().forward(features_BCS, output_size)


def _is_product(layer: nn.ConvTranspose2d | nn.ConvTranspose3d, features_BCS: Tensor) -> bool:
    """Whether a step on a CPU is to be trained, and no two outputs of the layer overlap, nor is one cut off or added."""
    plain = layer.groups == 1 and not any((*layer.padding, *layer.output_padding)) and set(layer.dilation) == {1}
    learns = layer.training and torch.is_grad_enabled() and features_BCS.is_cpu
    return learns and plain and layer.kernel_size == layer.stride


def up_product(features_BCS: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution whose stride is its kernel: each voxel gives a block of outputs, by one matrix product.

    The forward pass is slower than torch's by half and its gradient 3 to 4 times as fast in bfloat16 (torch 2.13, oneDNN).

    Args:
        features_BCS: (B, C, *S).
        weight: (C, C', *kernel), torch's.
        bias: (C',) or None.

    Returns:
        (B, C', *S x kernel), channels last.
    """
    kernel, sides, out = weight.shape[2:], features_BCS.shape[2:], weight.shape[1]
    product = features_BCS.movedim(1, -1).flatten(0, -2) @ weight.movedim(1, -1).flatten(1)
    blocks = product.view(-1, *sides, *kernel, out)
    # B, then each axis of S followed by that of its block.
    order = [axis for pair in zip(range(1, 1 + len(sides)), range(1 + len(sides), 1 + 2 * len(sides)), strict=True) for axis in pair]
    spread_BSC = blocks.permute(0, *order, -1).reshape(-1, *(n * k for n, k in zip(sides, kernel, strict=True)), out)
    return (spread_BSC if bias is None else spread_BSC.add_(bias)).movedim(-1, 1)


# For each number of spatial axes.
Layers = Mapping[int, Callable[..., nn.Module]]
CONVOLUTION: Layers = MappingProxyType({2: nn.Conv2d, 3: Convolution3d})
TRANSPOSED: Layers = MappingProxyType({2: UpConvolution2d, 3: UpConvolution3d})
MAX_POOL: Layers = MappingProxyType({2: nn.MaxPool2d, 3: nn.MaxPool3d})
AVERAGE_POOL: Layers = MappingProxyType({2: nn.AvgPool2d, 3: nn.AvgPool3d})
BATCH_NORM: Layers = MappingProxyType({2: nn.BatchNorm2d, 3: nn.BatchNorm3d})
DROPOUT: Layers = MappingProxyType({2: nn.Dropout2d, 3: nn.Dropout3d})
# Names of `torch.nn.functional.interpolate`'s linear modes.
LINEAR: Mapping[int, str] = MappingProxyType({2: "bilinear", 3: "trilinear"})


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1 over S, then scaled and shifted by learned values.

    The same numbers as `torch.nn.InstanceNorm2d/3d(affine=True)`. Torch's kernel copies a channels-last
    tensor to the other layout and back; but the instance norm of ONE sample is batch norm with the
    batch's own statistics, which keeps the layout and is 1.4 to 1.5 times as fast there (a whole
    training step on a CPU). Torch 2.13 on a CPU also returns a wrong gradient where a batch of one and the gradient
    that comes in are channels-last; batch norm does not.

    A sample needs more than one voxel.

    References:
        Ulyanov, Vedaldi, Lempitsky, Instance normalization, 2016, arXiv 1607.08022.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features_BCS: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S), in the same memory layout."""
        if features_BCS.is_contiguous() and len(features_BCS) > 1:
            return instance_norm(features_BCS, weight=self.weight, bias=self.bias, eps=self.eps)
        samples = [batch_norm(sample, None, None, self.weight, self.bias, True, 0.0, self.eps) for sample in torch.split(features_BCS, 1)]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def centre_crop(features_BCS: Tensor, shape_vox: torch.Size) -> Tensor:
    """The middle of a feature map, as large as `shape_vox`: unpadded U-Nets lose a border that the skip still has.

    A view, but for training: there a copy of the small middle, whose gradient comes back in the memory layout of the map. That of
    a view comes back contiguous, and adding it to the channels-last gradient of the pooled path took over a third of a step.
    """
    starts = [(have - want) // 2 for have, want in zip(features_BCS.shape[2:], shape_vox, strict=True)]
    if torch.is_grad_enabled() and features_BCS.requires_grad:
        ends = [have - want - start for have, want, start in zip(features_BCS.shape[2:], shape_vox, starts, strict=True)]
        # `pad` takes the sides of the last axis first.
        return pad(features_BCS, [-n for start, end in zip(reversed(starts), reversed(ends), strict=True) for n in (start, end)])
    for axis, (start, want) in enumerate(zip(starts, shape_vox, strict=True), start=2):
        features_BCS = features_BCS.narrow(axis, start, want)
    return features_BCS


def initialise_he(network: nn.Module, slope: float = 0.0) -> None:
    """Normal weights with sd sqrt(2 / ((1 + slope^2) N)) and zero biases, so that activations keep their variance.

    N is the number of inputs of one output value: channels x kernel of a convolution, but the channels
    alone of an up-convolution whose kernel is its stride, since each output then sees one input voxel.
    (`torch.nn.init.kaiming_normal_` counts output channels x kernel there.) `slope` is that of the leaky ReLU.

    References:
        He et al., Delving deep into rectifiers, ICCV 2015, arXiv 1502.01852.
        Ronneberger et al. 2015, section 3: sd sqrt(2 / N).
    """
    for module in _with_values(network):
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            inputs = module.in_channels // module.groups * (1 if module.transposed else math.prod(module.kernel_size))
            nn.init.normal_(module.weight, std=math.sqrt(2 / ((1 + slope**2) * inputs)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_glorot(network: nn.Module) -> None:
    """Uniform weights of variance 2 / (inputs + outputs) and zero biases, Keras' default.

    References:
        Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010.
    """
    for module in _with_values(network):
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _with_values(network: nn.Module) -> Iterator[nn.Module]:
    """The modules; none of a network of shapes alone, where drawing nothing would load torch's compiler, seconds of it."""
    if not any(parameter.is_meta for parameter in network.parameters()):
        yield from network.modules()


def padded_sizes(dims: int, levels: int) -> Sizes:
    """The sizes of a padded U-Net that halves its map `levels - 1` times: multiples of 2^(levels - 1)."""
    step = 1 << (levels - 1)
    return Sizes((step,) * dims, (step,) * dims)


def batch_normed_sizes(dims: int, levels: int) -> Sizes:
    """The same from twice that size along Y and X, so that the coarsest map of a single image has more than one voxel to normalise."""
    step = 1 << (levels - 1)
    return Sizes((step,) * (dims - 2) + (2 * step,) * 2, (step,) * dims)


def level_widths(spec: NetworkSpec, paper: tuple[int, ...]) -> tuple[int, ...]:
    """The channels of each level, finest first: the config's, or where it leaves them open the paper's.

    Raises:
        ConfigError: fewer than two levels.
    """
    widths = spec.config.widths or paper
    if len(widths) < 2:
        raise ConfigError(spec.name, expected="at least 2 levels", got=str(widths), do="change `network.widths`", code="C033")
    return widths


def dropout_share(spec: NetworkSpec, paper: float) -> float:
    """The share of dropped values: the config's, or where it leaves it open the paper's."""
    return paper if spec.config.dropout is None else spec.config.dropout


def unpadded_context(levels: int) -> int:
    """Border in voxels that a U-Net with two unpadded 3-convolutions a level loses on each side: 92 with 5 levels, 44 with 4.

    With D = 2^(levels - 1): the way down loses 4 (D - 1), the bottom 4 D, the way up 4 (D - 1), both sides together.
    """
    return 6 * (1 << (levels - 1)) - 4


def unpadded_sizes(dims: int, levels: int) -> Sizes:
    """The sizes for which every pooled map of such a U-Net has even sides and the output has a voxel or more.

    n = D k + 4 (D - 1): 188, 204, ... with 5 levels (16 k + 60), 92, 100, ... with 4 (8 k + 4).
    """
    step = 1 << (levels - 1)
    offset = 4 * (step - 1)
    smallest = 2 * unpadded_context(levels) + 1
    minimum = offset + -(-(smallest - offset) // step) * step
    return Sizes((minimum,) * dims, (step,) * dims)
