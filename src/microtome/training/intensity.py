"""Random changes of a sample's grey values: draw a small frozen record, then apply it. C channels, S spatial axes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.config import AugmentConfig
from microtome.geometry import Spacing
from microtome.training.transfer import sent

# Under this sd, in voxels, a neighbour's share of a Gaussian is less than float32 tells from 0.
LEAST_BLUR = 0.17
# Of the table that tells where among a channel's quantiles a value's search begins: it stays in the innermost cache.
BINS = 4096
# Over the knots that lie in one bin or two; beyond that a search of each value by itself is faster.
MOST_PASSES = 8


@dataclass(frozen=True)
class Intensity:
    """Changes of grey values of one sample, applied in the order of the fields; neutral values do nothing.

    Attributes:
        blur_sd: of a Gaussian along each axis of S, voxels; empty: none.
        low_resolution: how many times larger the voxels become along each axis of S; empty: none.
        gamma_inverted: exponent of a gamma correction of the negative.
        gamma: exponent of a gamma correction.
        contrast: factor.
        brightness: added, in standard deviations.
        noise_sd: of the Gaussian noise, in standard deviations.
        noise_seed: which noise.
    """

    blur_sd: tuple[float, ...] = ()
    low_resolution: tuple[float, ...] = ()
    gamma_inverted: float = 1.0
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise_sd: float = 0.0
    noise_seed: int = 0

    def apply(self, image_CS: Tensor) -> Tensor:
        """A changed copy of an image whose channels have about mean 0 and sd 1."""
        for axis, sd in enumerate(self.blur_sd, start=1):
            if sd > LEAST_BLUR:
                image_CS = _blur(image_CS, axis, sd)
        if any(factor > 1 for factor in self.low_resolution):
            image_CS = _low_resolution(image_CS, self.low_resolution)
        if self.gamma_inverted != 1:
            image_CS = -_gamma(-image_CS, self.gamma_inverted)
        if self.gamma != 1:
            image_CS = _gamma(image_CS, self.gamma)
        if self.contrast != 1 or self.brightness:
            image_CS = image_CS * self.contrast + self.brightness
        if self.noise_sd:
            image_CS = image_CS + self.noise_sd * _noise(image_CS, self.noise_seed)
        return image_CS


def draw_intensity(rng: np.random.Generator, config: AugmentConfig, spacing_mm: Spacing) -> Intensity:
    """A random change of grey values, each kind with its own probability; along coarse axes less blur and less loss of resolution.

    Args:
        rng: all values are drawn, also those that are not used, so that one setting does not change the draws of another.
        config: with blur and resolution in voxels of the finest axis.
        spacing_mm: of the network's grid along S. A blur is as wide in mm along every axis; an axis whose voxels are already as
            large as the simulated ones is left alone.
    """
    happens = iter(rng.random(7))
    # How many voxels of an axis go into one of the finest.
    scale = min(spacing_mm) / np.asarray(spacing_mm)
    log_gamma = np.log(config.gamma)
    blur_sd = rng.uniform(0.3, 1.0) * config.blur_sd * scale
    low_resolution = np.maximum(rng.uniform(1.0, config.low_resolution) * scale, 1.0)
    drawn: tuple[tuple[str, float, float | tuple[float, ...]], ...] = (
        ("blur_sd", config.blur_p, tuple(blur_sd.tolist())),
        ("low_resolution", config.low_resolution_p, tuple(low_resolution.tolist())),
        ("gamma_inverted", config.gamma_inverted_p, float(np.exp(rng.uniform(*log_gamma)))),
        ("gamma", config.gamma_p, float(np.exp(rng.uniform(*log_gamma)))),
        ("contrast", config.contrast_p, 1 + rng.uniform(-config.contrast, config.contrast)),
        ("brightness", config.brightness_p, rng.uniform(-config.brightness, config.brightness)),
        ("noise_sd", config.noise_p, rng.uniform(0.0, config.noise_sd)),
    )
    chosen = {name: value for (name, probability, value), place in zip(drawn, happens, strict=True) if place < probability}
    return Intensity(**chosen, noise_seed=int(rng.integers(2**31)))  # type: ignore[arg-type]


def draw_other(rng: np.random.Generator, config: AugmentConfig, own: int, cases: int) -> int | None:
    """The number of another of `cases` training images, whose histogram this sample takes, or None; each is as likely."""
    happens, place = rng.random() < config.histogram_p, rng.random()
    if not happens or cases < 2:
        return None
    other = int(place * (cases - 1))
    return other + (other >= own)


def match_histogram(image_CS: Tensor, own_CQ: np.ndarray, other_CQ: np.ndarray) -> Tensor:
    """A copy in which each channel's values stand where they stood in their own image, in the histogram of another.

    A value is looked up among the quantiles of its own whole image (C, Q) and takes the other's at the same rank, linear between
    them: one table for all patches of a case, so that a patch of bone does not become one of fat. Many equal values become the
    other's at the highest of their ranks, as if looked up in a cumulative histogram.

    References:
        Milletari 2016 (V-Net), arXiv:1606.04797: each training scan takes the histogram of another, drawn at random.
    """
    matched_CS = torch.empty_like(image_CS)
    for values_S, own_Q, other_Q, matched_S in zip(image_CS, own_CQ, other_CQ, matched_CS, strict=True):
        knots, starts, slopes = sent(torch.from_numpy(_lines(own_Q, other_Q)), image_CS.device)
        values = values_S.flatten().clamp(min=knots[0], max=knots[-1])
        below = _last_below(knots, values)
        offset = values.sub_(knots.index_select(0, below))
        matched_S.copy_(offset.mul_(slopes.index_select(0, below)).add_(starts.index_select(0, below)).view_as(values_S))
    return matched_CS


def _lines(own_Q: np.ndarray, other_Q: np.ndarray) -> np.ndarray:
    """Where each line from a quantile to the next begins, its value there and its slope: (3, lines) float32."""
    own, other = own_Q.astype(float), other_Q.astype(float)
    # Of equal quantiles the last; what lies below the smallest of all takes the first of its ranks.
    last = np.flatnonzero(np.append(np.diff(own) > 0, True))
    lowest = own[0] - 1e-6 * max(1.0, abs(own[0]))
    slopes = np.minimum(np.diff(other)[last[:-1]] / np.diff(own)[last[:-1]], np.finfo(np.float32).max)
    table = [(lowest, *own[last]), (other[0], *other[last]), (0.0, *slopes, 0.0)]
    return np.array(table, np.float32)


def _last_below(knots: Tensor, values: Tensor) -> Tensor:
    """Index (N,) int32 of the last of ascending knots that is not above each of the values (N,), all of which lie between the outermost.

    On a CPU a search halves its way through the knots and guesses wrong at each turn. A table tells instead where to begin, and
    the few knots from there are passed all values at a time. Where nearly all knots lie close together they are too many.
    """
    if not values.is_cuda:
        bins = BINS / float(knots[-1] - knots[0])
        edges = knots[0] + torch.arange(-1, BINS) / bins
        # From the bin before its own: rounding may have put a value into the next one.
        first = torch.searchsorted(knots, edges, right=True).sub_(1).clamp_(min=0).int()
        below = first.index_select(0, values.sub(knots[0]).mul_(bins).clamp_(0, BINS).int())
        following = torch.cat([knots[1:], knots.new_tensor([math.inf])])
        for _ in range(MOST_PASSES):
            passed = following.index_select(0, below) <= values
            if not passed.any():
                return below
            below += passed
    return torch.searchsorted(knots, values, right=True, out_int32=True).sub_(1).clamp_(min=0)


def _noise(like_CS: Tensor, seed: int) -> Tensor:
    """Standard normal values of that shape, the same on every device.

    A GPU's own generator would give other numbers than a CPU's. Drawing them here takes 3 ms for 1M voxels of a fifth of the
    samples, in a thread beside others.
    """
    generator = torch.Generator().manual_seed(seed)
    return sent(torch.randn(like_CS.shape, generator=generator), like_CS.device)


def _blur(image_CS: Tensor, axis: int, sd: float) -> Tensor:
    """Gaussian blur along one axis, with mirrored borders."""
    reach, size = max(1, round(3 * sd)), image_CS.shape[axis]
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sd**2))
    index = torch.arange(-reach, size + reach, device=image_CS.device).abs()
    index = torch.minimum(index, (2 * size - 2 - index).abs()).clamp(max=size - 1)
    # A sum of shifted views is faster on a CPU than a depth-wise convolution of one channel.
    padded = image_CS.index_select(axis, index)
    result = torch.zeros_like(image_CS)
    for shift, weight in enumerate((taps / taps.sum()).tolist()):
        result.add_(padded.narrow(axis, shift, size), alpha=weight)
    return result


def _low_resolution(image_CS: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Nearest-neighbour sampling at a coarser grid, brought back by linear interpolation."""
    size = [max(1, round(n / factor)) for n, factor in zip(image_CS.shape[1:], factors, strict=True)]
    linear = "bilinear" if image_CS.dim() == 3 else "trilinear"
    small = F.interpolate(image_CS.unsqueeze(0), size=size, mode="nearest-exact")
    return F.interpolate(small, size=image_CS.shape[1:], mode=linear, align_corners=False)[0]


def _gamma(image_CS: Tensor, gamma: float) -> Tensor:
    """Gamma correction of each channel over its own range, mean and sd kept."""
    axes = tuple(range(1, image_CS.dim()))
    low, high = image_CS.amin(axes, keepdim=True), image_CS.amax(axes, keepdim=True)
    mean = image_CS.mean(axes, keepdim=True)
    before = _sd(image_CS - mean)
    changed = image_CS.sub(low).div_((high - low).clamp(min=1e-7)).pow_(gamma)
    changed.sub_(changed.mean(axes, keepdim=True))
    return changed.mul_(before / _sd(changed).clamp(min=1e-7)).add_(mean)


def _sd(centred_CS: Tensor) -> Tensor:
    """Standard deviation (C, 1, ...) of each channel of values whose mean is 0; several times faster than torch's own."""
    # Rows first: one running sum over millions of squares would lose digits.
    rows = torch.linalg.vector_norm(centred_CS, dim=-1, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.dim())), keepdim=True)
    return length / math.sqrt(max(centred_CS[0].numel() - 1, 1))
