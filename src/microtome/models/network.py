"""What every network is to the rest of the program: its request, the sizes it takes, its checks.

Axes in tensor names, here and in every file of this folder: `B` batch, `C` channels, `K` classes,
`S` the spatial axes, YX or ZYX.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.geometry import Sizes, format_shape

# More than anybody has, and few enough for torch to count the bytes of the weights.
MOST_CHANNELS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """What a network is built from.

    Attributes:
        name: as the registry lists it; error messages begin with it.
        dims: spatial axes, 2 or 3.
        in_channels: channels of the image.
        classes: channels of the logits.
        config: sizes set by a plan; the default leaves all as in the paper.
        variant: one of the variants that the network's file describes; empty: the first.
    """

    name: str
    dims: int
    in_channels: int
    classes: int
    config: NetworkConfig = field(default_factory=NetworkConfig)
    variant: str = ""

    def __post_init__(self) -> None:
        if not (1 <= self.in_channels <= MOST_CHANNELS and 1 <= self.classes <= MOST_CHANNELS):
            got = f"{self.in_channels} channels and {self.classes} classes"
            expected = f"at least one channel and one class, and at most {MOST_CHANNELS:,} of each"
            raise ConfigError(self.name, expected=expected, got=got, do="check the dataset's channels and legend", code="C033")
        if any(width < 1 for width in self.config.widths):
            raise ConfigError(self.name, expected="positive widths", got=str(self.config.widths), do="change `network.widths`", code="C033")


class Network(nn.Module):
    """A network: image_BCS -> logits_BKS, unnormalised (no softmax, no sigmoid).

    Attributes:
        spec: what it was built from.
        sizes: the image sizes that it takes.
        context_vox: border that the output lacks on each side of each axis; 0 for padded convolutions.
    """

    def __init__(self, spec: NetworkSpec, sizes: Sizes, context_vox: int = 0) -> None:
        super().__init__()
        self.spec, self.sizes, self.context_vox = spec, sizes, context_vox

    @property
    def dims(self) -> int:
        """Spatial axes, 2 or 3."""
        return self.spec.dims

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return self.spec.in_channels

    @property
    def classes(self) -> int:
        """Channels of the logits."""
        return self.spec.classes

    def valid_size(self, n: int, axis: int) -> bool:
        """Whether the network takes `n` voxels along that axis of S."""
        return self.sizes.valid(n, axis)

    def nearest_sizes(self, n: int, axis: int) -> tuple[int, int]:
        """The largest size <= n and the smallest size >= n that fit; both the smallest of all where n is below it."""
        return self.sizes.nearest(n, axis)

    def pruned(self, depth: int) -> "Network":
        """The part of a network of nested U-Nets that answers from the head of a shallower one; see `UNetPP`.

        Raises:
            ConfigError: there is no such head.
        """
        got = f"head {depth}"
        raise ConfigError(self.spec.name, expected="a network of nested U-Nets (unetpp)", got=got, do="leave out --head", code="C029")

    def check_image(self, image_BCS: Tensor) -> None:
        """Refuse an image that does not fit; each `forward` begins with it.

        Raises:
            ConfigError: wrong number of axes or channels, a size that does not fit (the nearest that do are named), or one
                image to train a batch norm on that has one voxel at the deepest level.
        """
        shape = tuple(image_BCS.shape)
        axes = "ZYX"[-self.dims :]
        if len(shape) != self.dims + 2 or shape[1] != self.in_channels:
            expected = f"images (B, {self.in_channels}, {', '.join(axes)})"
            raise ConfigError(
                self.spec.name, expected=expected, got=str(shape), do="build the network for these channels and axes", code="C034"
            )
        if not all(self.valid_size(n, axis) for axis, n in enumerate(shape[2:])):
            fits = [f"{axes[axis]} {_either(self.nearest_sizes(n, axis))}" for axis, n in enumerate(shape[2:])]
            got = format_shape(shape[2:])
            raise ConfigError(
                self.spec.name, expected=f"a size that fits: {', '.join(fits)}", got=got, do="pad or crop to such a size", code="C034"
            )
        if self.training and shape[0] == 1 and shape[2:] == self.sizes.step and self._batch_normed():
            expected = "more than one value a channel for the batch norm of the deepest level, to train"
            got = f"one image of {format_shape(shape[2:])}"
            raise ConfigError(
                self.spec.name, expected=expected, got=got, do="train with a batch of 2 or more, or with larger images", code="C035"
            )

    def _batch_normed(self) -> bool:
        return any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in self.modules())


def _either(sizes: tuple[int, int]) -> str:
    """`188` or `188 or 204`."""
    return " or ".join(str(n) for n in sorted(set(sizes)))
