"""Random changes of a training sample: draw a small frozen record, then apply it.

All spatial changes (flip, rotation, scale, elastic deformation, crop) are one map from output voxels to input
voxels and one resampling per image and per label. B batch, C channels, S spatial axes, D = len(S).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.config import AugmentConfig
from microtome.geometry import Shape, Spacing


@dataclass(frozen=True)
class Warp:
    """Where each voxel of a patch comes from: `source = centre + matrix @ (offset + bend(offset))`, in voxels.

    Attributes:
        matrix: (D, D), flips, rotation and scale; offsets are counted from the middle of the patch.
        control: (D, *control points) coefficients of a cubic B-spline over the patch, voxels; None: no bend.
    """

    matrix: np.ndarray
    control: np.ndarray | None = None

    def coordinates(self, centre: np.ndarray, shape_vox: Shape) -> np.ndarray:
        """Source voxel coordinates (D, *shape_vox) float32 of a patch around `centre` (D,)."""
        dims = len(shape_vox)
        axes = [np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in shape_vox]
        matrix = self.matrix.astype(np.float32)
        result = np.empty((dims, *shape_vox), np.float32)
        for row in range(dims):
            # A sum of D broadcast lines: no (D, *S) grid is made before it is multiplied.
            line = np.float32(centre[row])
            for axis in range(dims):
                shape = [-1 if i == axis else 1 for i in range(dims)]
                line = line + (matrix[row, axis] * axes[axis]).reshape(shape)
            result[row] = line
        if self.control is not None:
            result += np.einsum("ij,j...->i...", matrix, _bspline_field(self.control, shape_vox))
        return result


@dataclass(frozen=True)
class Intensity:
    """Changes of grey values of one sample, applied in the order of the fields; neutral values do nothing."""

    blur_sd: float = 0.0
    low_resolution: float = 1.0
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise_sd: float = 0.0
    noise_seed: int = 0

    def apply(self, image_CS: Tensor) -> Tensor:
        """A changed copy of an image whose channels have about mean 0 and sd 1."""
        if self.blur_sd:
            image_CS = _blur(image_CS, self.blur_sd)
        if self.low_resolution > 1:
            image_CS = _low_resolution(image_CS, self.low_resolution)
        if self.gamma != 1:
            image_CS = _gamma(image_CS, self.gamma)
        if self.contrast != 1 or self.brightness:
            image_CS = image_CS * self.contrast + self.brightness
        if self.noise_sd:
            generator = torch.Generator().manual_seed(self.noise_seed)
            noise_CS = torch.randn(image_CS.shape, generator=generator).to(image_CS.device)
            image_CS = image_CS + self.noise_sd * noise_CS
        return image_CS


def draw_warp(rng: np.random.Generator, config: AugmentConfig, patch_vox: Shape, spacing_mm: Spacing) -> Warp:
    """A random spatial change. Rotations turn millimetres, not voxels, so anisotropic tissue stays rigid."""
    dims = len(patch_vox)
    scale = np.eye(dims)
    if rng.random() < config.scale_p:
        low, high = np.log(config.scale)
        scale /= np.exp(rng.uniform(low, high))
    flip = np.diag([-1.0 if axis in config.flip_axes and rng.random() < 0.5 else 1.0 for axis in range(dims)])
    to_mm = np.diag(np.asarray(spacing_mm[-dims:]))
    rotation = np.eye(dims)
    if config.rotation_deg and rng.random() < config.rotation_p:
        angles = np.deg2rad([rng.uniform(-limit, limit) for limit in config.rotation_deg])
        rotation = np.linalg.inv(to_mm) @ _rotation(angles, dims) @ to_mm
    control = None
    if config.elastic_spacing and rng.random() < config.elastic_p:
        # One point more than the intervals need on each side, so that every voxel lies under four of them.
        points = [int(np.ceil(n / gap)) + 3 for n, gap in zip(patch_vox, config.elastic_spacing, strict=True)]
        sd = np.asarray(config.elastic_sd).reshape(-1, *[1] * dims)
        control = rng.normal(size=(dims, *points)) * sd
    return Warp(rotation @ scale @ flip, control)


def draw_intensity(rng: np.random.Generator, config: AugmentConfig) -> Intensity:
    """A random change of grey values; each of the six happens with probability `intensity_p`."""
    happens = rng.random(6) < config.intensity_p
    gamma = np.exp(rng.uniform(*np.log(config.gamma)))
    # All values are drawn, also those that are not used, so that one setting does not change the draws of another.
    drawn = {
        "blur_sd": rng.uniform(0.3, 1.0) * config.blur_sd,
        "low_resolution": rng.uniform(1.0, config.low_resolution),
        "gamma": gamma,
        "contrast": 1 + rng.uniform(-config.contrast, config.contrast),
        "brightness": rng.uniform(-config.brightness, config.brightness),
        "noise_sd": rng.uniform(0.0, config.noise_sd),
    }
    chosen = {name: float(value) for (name, value), yes in zip(drawn.items(), happens, strict=True) if yes}
    return Intensity(**chosen, noise_seed=int(rng.integers(2**31)))


def resample_patch(image_CS: Tensor, label_S: Tensor, source_DS: np.ndarray) -> tuple[Tensor, Tensor]:
    """Image (linear) and label (nearest) at source coordinates, one `grid_sample` each.

    Args:
        image_CS: float32, a crop of the case.
        label_S: integer, the same crop.
        source_DS: coordinates (D, *patch) in voxels of the crop. Outside, the image is mirrored and the label is -1,
            because nobody annotated what a mirror shows.
    """
    # grid_sample counts axes from the last to the first and from -1 to 1. NumPy, because an operation as small as
    # this costs torch more to share out over its threads than to do.
    lines = [line * np.float32(2 / max(n - 1, 1)) - np.float32(1) for line, n in zip(source_DS, image_CS.shape[1:], strict=True)]
    grid = torch.from_numpy(np.stack(lines[::-1], axis=-1)).to(image_CS.device).unsqueeze(0)
    image = F.grid_sample(image_CS.unsqueeze(0), grid, mode="bilinear", padding_mode="reflection", align_corners=True)[0]
    # Labels are shifted by one so that the zeros of the padding read as -1.
    shifted = (label_S + 1).to(image_CS.dtype)[None, None]
    label = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=True)[0, 0].to(torch.int16) - 1
    for line, n in zip(source_DS, image_CS.shape[1:], strict=True):
        if n == 1:
            # Along an axis of one voxel grid_sample takes every coordinate for that voxel's.
            label[torch.from_numpy(np.abs(line) > 0.5).to(label.device)] = -1
    return image, label


def _rotation(angles: np.ndarray, dims: int) -> np.ndarray:
    """Rotation matrix (D, D): 2D by one angle; 3D about Z, then Y, then X."""
    planes = [(0, 1)] if dims == 2 else [(1, 2), (0, 2), (0, 1)]
    result = np.eye(dims)
    for angle, (a, b) in zip(angles, planes, strict=True):
        turn = np.eye(dims)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        result = turn @ result
    return result


def _bspline_field(control: np.ndarray, shape_vox: Shape) -> np.ndarray:
    """Cubic B-spline with these coefficients (D, *points) at each voxel: (D, *shape_vox), one small product an axis."""
    field = torch.from_numpy(control.astype(np.float32))
    for axis, size in enumerate(shape_vox, start=1):
        basis = torch.from_numpy(bspline_basis(control.shape[axis], size).astype(np.float32))
        field = torch.tensordot(basis, field, dims=([1], [axis])).movedim(0, axis)
    return field.numpy()


def bspline_basis(points: int, size: int) -> np.ndarray:
    """Uniform cubic B-spline weights (size, points): rows sum to 1; the first and last voxel lie one interval inside.

    References:
        Unser 1999, "Splines: a perfect fit for signal and image processing", doi:10.1109/79.799930.
    """
    position = 1 + np.linspace(0, points - 3, size) if size > 1 else np.array([1.0])
    distance = np.abs(position[:, None] - np.arange(points)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


def _blur(image_CS: Tensor, sd: float) -> Tensor:
    """Gaussian blur with mirrored borders, one axis after the other."""
    reach = max(1, round(3 * sd))
    taps = torch.exp(-(torch.arange(-reach, reach + 1, device=image_CS.device) ** 2) / (2 * sd**2))
    taps = (taps / taps.sum()).to(image_CS.dtype)
    for axis in range(1, image_CS.dim()):
        size = image_CS.shape[axis]
        index = torch.arange(-reach, size + reach, device=image_CS.device).abs()
        index = torch.minimum(index, (2 * size - 2 - index).abs()).clamp(max=size - 1)
        # A sum of shifted views is faster on a CPU than a depth-wise convolution of one channel.
        padded = image_CS.index_select(axis, index)
        image_CS = sum(weight * padded.narrow(axis, shift, size) for shift, weight in enumerate(taps.tolist()))
    return image_CS


def _low_resolution(image_CS: Tensor, factor: float) -> Tensor:
    """Nearest-neighbour sampling at a coarser grid, brought back by linear interpolation."""
    size = [max(1, round(n / factor)) for n in image_CS.shape[1:]]
    linear = "bilinear" if image_CS.dim() == 3 else "trilinear"
    small = F.interpolate(image_CS.unsqueeze(0), size=size, mode="nearest-exact")
    return F.interpolate(small, size=image_CS.shape[1:], mode=linear, align_corners=False)[0]


def _gamma(image_CS: Tensor, gamma: float) -> Tensor:
    """Gamma correction of each channel over its own range, mean and sd kept."""
    axes = list(range(1, image_CS.dim()))
    low, high = image_CS.amin(axes, keepdim=True), image_CS.amax(axes, keepdim=True)
    span = (high - low).clamp(min=1e-7)
    changed = ((image_CS - low) / span).pow(gamma)
    before, after = image_CS.std(axes, keepdim=True), changed.std(axes, keepdim=True).clamp(min=1e-7)
    return (changed - changed.mean(axes, keepdim=True)) / after * before + image_CS.mean(axes, keepdim=True)
