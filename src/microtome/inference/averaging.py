"""Test-time averaging: the versions of a tile that a network is shown, and their outputs brought back onto the tile.

B batch, C channels, K classes, S spatial axes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.geometry import Spacing
from microtome.inference.mirroring import ROTATIONS, versions

Pass = Callable[[Tensor], Tensor]
NearestSizes = Callable[[int, int], tuple[int, int]]


def mirrored_mean(network: Pass, image_BCS: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean logits (B, K, *S') over all mirrored versions along these axes of S: 2^len(axes) passes."""
    passes = versions(axes)
    total_BKS: Tensor | None = None
    for chosen in passes:
        flip = [axis + 2 for axis in chosen]
        logits_BKS = network(image_BCS.flip(flip) if flip else image_BCS).float()
        logits_BKS = logits_BKS.flip(flip) if flip else logits_BKS
        total_BKS = logits_BKS if total_BKS is None else total_BKS + logits_BKS
    assert total_BKS is not None
    return total_BKS / len(passes)


def rotated_mean(
    network: Pass,
    image_BCS: Tensor,
    nearest_sizes: NearestSizes,
    context_vox: int = 0,
    *,
    count: int = ROTATIONS,
    spacing_mm: Spacing = (1.0, 1.0),
) -> Tensor:
    """Mean logits (B, K, *S') over `count` turned versions, by even steps of a full turn in the plane of the last two axes.

    Millimetres are turned, not pixels, as in training: under oblong pixels too, tissue stays rigid. Each version lies on a
    canvas that holds the whole turned tile, of a size that the network takes; the corners beyond the tile show its mirror
    image. Linear interpolation there and back.

    Args:
        network: (B, C, *S) -> (B, K, *S'), S' = S less `context_vox` on both sides of each axis.
        image_BCS: of a size that the network takes.
        nearest_sizes: the network's: (size, axis of S) -> the nearest below or equal, and above or equal.
        context_vox: border that the output lacks.
        count: versions; the first is not turned.
        spacing_mm: voxel size, of which the last two count.

    References:
        Ronneberger et al. 2015 (arXiv 1505.04597), section 4.
    """
    total_BKS = network(image_BCS).float()
    plane = image_BCS.shape[-2:]
    answered = (plane[0] - 2 * context_vox, plane[1] - 2 * context_vox)
    first, oblong = image_BCS.dim() - 4, spacing_mm[-1] / spacing_mm[-2]
    for number in range(1, count):
        angle = 2 * math.pi * number / count
        cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
        wanted = (plane[0] * cosine + plane[1] * sine * oblong, plane[0] * sine / oblong + plane[1] * cosine)
        canvas = tuple(nearest_sizes(math.ceil(size - 1e-6), first + axis)[1] for axis, size in enumerate(wanted))
        turned_BCS = _turn(image_BCS.float(), angle, oblong, canvas, "reflection").to(image_BCS.dtype)
        total_BKS = total_BKS + _turn(network(turned_BCS).float(), -angle, oblong, answered, "border")
    return total_BKS / count


def with_entropy(network: Pass) -> Pass:
    """The network with a last class more: the entropy of its softmax, 0 to 1, as `uncertainty.entropy` has it; logits in float32.

    Averaged by the functions above it becomes the mean over passes of each pass's entropy.
    """

    def forward(image_BCS: Tensor) -> Tensor:
        logits_BKS = network(image_BCS).float()
        log_BKS = logits_BKS.log_softmax(dim=1)
        entropy_B1S = -(log_BKS.exp() * log_BKS).sum(dim=1, keepdim=True) / max(math.log(logits_BKS.shape[1]), 1.0e-9)
        return torch.cat([logits_BKS, entropy_B1S.clamp(0, 1)], dim=1)

    return forward


def _turn(array_BCS: Tensor, angle: float, oblong: float, shape: tuple[int, ...], outside: str) -> Tensor:
    """The last two axes turned by an angle about the middle onto a plane of another shape; pixels are `oblong` times as wide as high."""
    height, width = array_BCS.shape[-2:]
    rows = torch.arange(shape[0], device=array_BCS.device, dtype=torch.float32) - (shape[0] - 1) / 2
    columns = torch.arange(shape[1], device=array_BCS.device, dtype=torch.float32) - (shape[1] - 1) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    y = cosine * rows[:, None] + sine * oblong * columns[None]
    x = cosine * columns[None] - sine / oblong * rows[:, None]
    # grid_sample counts the width first, from -1 to 1 between the middles of the outer pixels.
    grid = torch.stack([x * (2 / max(width - 1, 1)), y * (2 / max(height - 1, 1))], dim=-1)
    flat = array_BCS.flatten(1, -3)
    turned = F.grid_sample(flat, grid.expand(len(flat), -1, -1, -1), mode="bilinear", padding_mode=outside, align_corners=True)
    return turned.reshape(*array_BCS.shape[:-2], *shape)
