"""Random movements of a training sample: draw a small frozen record, then apply it.

All of them (flip, rotation, scale, elastic deformation, crop) are one map from output voxels to input voxels and one
grid, at which image, label and weights are sampled. C channels, S spatial axes, D = len(S).
"""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.config import AugmentConfig
from microtome.geometry import Shape, Spacing
from microtome.preprocess import crop_box

try:
    from microtome.training import _warp
except ImportError:
    _warp = None  # type: ignore[assignment]

# What _warp must say of itself: a build that was left from another version is not used.
INTERFACE = 1


@dataclass(frozen=True)
class Bend:
    """An elastic deformation: displacements on a grid of control points, from which each voxel's follow.

    Attributes:
        control: (D, *points), voxels.
        gap_vox: distance of the points along each axis. The first voxel of the patch lies on the first point; of a B-spline on
            the second, as the first belongs to a ring outside.
        kind: bspline: the points are coefficients of a uniform cubic B-spline, which smooths them; bicubic: the field passes
            through the points (Keys' cubic convolution along each axis, tricubic in 3D), and those on the edges are repeated outside.
    """

    control: np.ndarray
    gap_vox: tuple[float, ...]
    kind: Literal["bspline", "bicubic"] = "bspline"


@dataclass(frozen=True)
class Warp:
    """Where each voxel of a patch comes from: `source = centre + matrix @ (offset + bend(offset))`, in voxels.

    Attributes:
        matrix: (D, D), flips, rotation and scale; offsets are counted from the middle of the patch.
        bend: the elastic deformation, if there is one.
    """

    matrix: np.ndarray
    bend: Bend | None = None

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
        if self.bend is not None:
            _add_field(result, self.bend, self._turned(self.bend))
        return result

    def bounds(self, centre: np.ndarray, shape_vox: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest source coordinate (D,) of a patch around `centre` (D,), or a little beyond; no voxel's own is computed.

        Each cell of the control points has bounds of its own. They must cover the patch.
        """
        dims, middle = len(shape_vox), (np.array(shape_vox) - 1) / 2
        bend = self.bend or Bend(np.zeros((dims, *(1,) * dims)), (math.inf,) * dims, "bicubic")
        least = _least_field(self._turned(bend), bend.kind)
        for axis, (n, gap) in enumerate(zip(shape_vox, bend.gap_vox, strict=True)):
            edges = np.minimum(np.arange(least.shape[axis + 2] + 1) * min(gap, n), n - 1) - middle[axis]
            ends = self.matrix[:, axis, None, None] * np.stack([edges[:-1], edges[1:]])
            shape = (2, dims, *(-1 if other == axis else 1 for other in range(dims)))
            least = least + np.stack([ends.min(1), -ends.max(1)]).reshape(shape)
        low, high = least.reshape(2, dims, -1).min(-1) * np.array([[1], [-1]])
        return centre + low, centre + high

    def box(self, centre: np.ndarray, shape_vox: Shape, case_vox: Shape) -> tuple[slice, ...]:
        """The part of a case of shape `case_vox` that a patch around `centre` (D,) is made of, what is mirrored into it included.

        The warp of this part is that of the whole case: where the part ends inside of the case, nothing beyond is asked for.
        """
        low, high = self.bounds(centre, shape_vox)
        last = np.array(case_vox) - 1
        return crop_box(case_vox, np.minimum(low, 2 * last - high).tolist(), np.maximum(high, -low).tolist())

    def _turned(self, bend: Bend) -> np.ndarray:
        """Control points (D, *points) along the axes of the source.

        The field is linear in them: to turn these few is to turn all voxels' displacements.
        """
        turned: np.ndarray = np.tensordot(self.matrix, bend.control, 1)
        return turned


class Patch(NamedTuple):
    """A part of a case.

    Attributes:
        image: (C, *S) float32.
        label: (*S) int16, -1 where not annotated.
        weight: (*S) float32, how much each voxel counts in the loss; None: all alike.
    """

    image: Tensor
    label: Tensor
    weight: Tensor | None = None


def draw_warp(rng: np.random.Generator, config: AugmentConfig, patch_vox: Shape, spacing_mm: Spacing) -> Warp:
    """A random movement. Rotations turn millimetres, not voxels, so anisotropic tissue stays rigid.

    What happens, flips, scale and angles are drawn whether they are used or not, and the control points last: one setting does
    not change what another draws.
    """
    dims = len(patch_vox)
    happens = rng.random(3) < (config.scale_p, config.rotation_p, config.elastic_p)
    mirrored = rng.random(dims) < 0.5
    magnification = np.exp(rng.uniform(*np.log(config.scale)))
    turns = rng.uniform(-1, 1, 1 if dims == 2 else 3)
    matrix = np.diag([-1.0 if axis in config.flip_axes and mirrored[axis] else 1.0 for axis in range(dims)])
    if happens[0]:
        matrix /= magnification
    if happens[1] and config.rotation_deg:
        to_mm = np.diag(np.asarray(spacing_mm[-dims:]))
        matrix = np.linalg.inv(to_mm) @ _rotation(np.deg2rad(turns * config.rotation_deg), dims) @ to_mm @ matrix
    return Warp(matrix, draw_bend(rng, config, patch_vox) if happens[2] and config.elastic_sd else None)


def draw_bend(rng: np.random.Generator, config: AugmentConfig, patch_vox: Shape) -> Bend:
    """Normally distributed displacements of control points, along each axis with the sd that the config gives in voxels.

    With `elastic_points`, so many of them cover the patch from edge to edge, corners included: 3 x 3 of N(0, 10) and bicubic
    are U-Net's. With `elastic_spacing` they lie that far apart, from the first voxel on, to beyond the last: 32 voxels of
    N(0, 4) and B-spline are 3D U-Net's (second-hand). A cubic B-spline needs one more point on every side; this ring is drawn like
    the others, so that 2 x 2 x 2 points are a deformation too. V-Net speaks of 2 x 2 x 2 control points and N(0, 15); whether it means
    these is not confirmed. Its release leaves the through-plane component 0: an `elastic_sd` of 0 along that axis.

    References:
        Ronneberger 2015, arXiv:1505.04597; Çiçek 2016, arXiv:1606.06650; Milletari 2016, arXiv:1606.04797.
    """
    if config.elastic_points:
        points = list(config.elastic_points)
        # One point alone is that of every voxel: the next would be infinitely far away.
        gaps = tuple(max(n - 1, 1) / (k - 1) if k > 1 else math.inf for n, k in zip(patch_vox, points, strict=True))
    else:
        gaps = config.elastic_spacing
        points = [math.floor((n - 1) / gap) + 2 for n, gap in zip(patch_vox, gaps, strict=True)]
    ring = 2 if config.elastic_kind == "bspline" else 0
    drawn = rng.normal(size=(len(points), *(n + ring for n in points)))
    sd = np.asarray(config.elastic_sd).reshape(-1, *[1] * len(points))
    return Bend(drawn * sd, gaps, config.elastic_kind)


def compiled() -> bool:
    """Whether samples on a CPU are warped by the compiled code; MICROTOME_COMPILED=0 switches it off."""
    return _warp is not None and _warp.INTERFACE == INTERFACE and os.environ.get("MICROTOME_COMPILED") != "0"


def warp_patch(crop: Patch, warp: Warp, centre: np.ndarray, shape_vox: Shape) -> Patch:
    """The patch of `shape_vox` around `centre` (D,), in voxels of the crop: `resample_patch` at the warp's coordinates.

    The compiled code, where there is one, makes no array of coordinates; it differs from the tensor code by their rounding.
    The same input gives the same bytes on every processor that has it.
    """
    if compiled() and _suits(crop, shape_vox):
        return _compiled_patch(crop, warp, centre, shape_vox)
    return resample_patch(crop, warp.coordinates(centre, shape_vox))


def _suits(crop: Patch, shape_vox: Shape) -> bool:
    """Whether the compiled code takes these types and sizes."""
    types = [crop.image.dtype, crop.label.dtype, torch.float32 if crop.weight is None else crop.weight.dtype]
    shapes = (tuple(crop.label.shape), shape_vox)
    fits = all(min(shape) >= 1 and max(shape) <= _warp.MOST_ALONG_AXIS and math.prod(shape) <= _warp.MOST_VOXELS for shape in shapes)
    return fits and types == [torch.float32, torch.int16, torch.float32] and crop.image.device.type == "cpu"


def _compiled_patch(crop: Patch, warp: Warp, centre: np.ndarray, shape_vox: Shape) -> Patch:
    """`warp_patch` by the compiled code."""
    origin = centre - warp.matrix @ ((np.array(shape_vox) - 1) / 2)
    affine = np.column_stack([warp.matrix, origin]).astype(np.float64)
    bend = None
    if warp.bend is not None:
        control = np.ascontiguousarray(warp._turned(warp.bend), np.float32)
        bend = (control, *_bases(warp.bend, shape_vox))
    patch = Patch(
        torch.empty(len(crop.image), *shape_vox),
        torch.empty(shape_vox, dtype=torch.int16),
        None if crop.weight is None else torch.empty(shape_vox),
    )
    _warp.resample(_arrays(crop), _arrays(patch), affine, bend)
    return patch


def _arrays(patch: Patch) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The same memory as contiguous arrays."""
    weight = None if patch.weight is None else patch.weight.contiguous().numpy()
    return patch.image.contiguous().numpy(), patch.label.contiguous().numpy(), weight


def resample_patch(crop: Patch, source_DS: np.ndarray) -> Patch:
    """Image and weight (linear) and label (nearest) at the same source coordinates.

    Args:
        crop: of the case.
        source_DS: coordinates (D, *patch) in voxels of the crop. Outside, the image is mirrored, the weight is 1 and the label -1,
            because nobody annotated what a mirror shows.
    """
    # grid_sample counts axes from the last to the first and from -1 to 1. NumPy, because an operation as small as
    # this costs torch more to share out over its threads than to do.
    shape = crop.label.shape
    lines = [line * np.float32(2 / max(n - 1, 1)) - np.float32(1) for line, n in zip(source_DS, shape, strict=True)]
    grid = torch.from_numpy(np.stack(lines[::-1], axis=-1)).to(crop.image.device).unsqueeze(0)
    image = F.grid_sample(crop.image.unsqueeze(0), grid, mode="bilinear", padding_mode="reflection", align_corners=True)[0]
    # Labels are shifted by one so that the zeros of the padding read as -1, and weights so that they read as 1.
    label = _sample_zeros(crop.label + 1, grid, "nearest").to(torch.int16) - 1
    weight = None if crop.weight is None else _sample_zeros(crop.weight - 1, grid, "bilinear") + 1
    for line, n in zip(source_DS, shape, strict=True):
        if n == 1:
            # Along an axis of one voxel grid_sample takes every coordinate for that voxel's.
            outside = torch.from_numpy(np.abs(line) > 0.5).to(label.device)
            label[outside] = -1
            weight = None if weight is None else weight.masked_fill(outside, 1.0)
    return Patch(image, label, weight)


def _sample_zeros(values_S: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Values at the places of a grid (1, *patch, D), float32; 0 outside."""
    return F.grid_sample(values_S.float()[None, None], grid, mode=mode, padding_mode="zeros", align_corners=True)[0, 0]


def _rotation(angles: np.ndarray, dims: int) -> np.ndarray:
    """Rotation matrix (D, D): 2D by one angle; 3D about Z, then Y, then X."""
    planes = [(0, 1)] if dims == 2 else [(1, 2), (0, 2), (0, 1)]
    result = np.eye(dims)
    for angle, (a, b) in zip(angles, planes, strict=True):
        turn = np.eye(dims)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        result = turn @ result
    return result


def _add_field(target: np.ndarray, bend: Bend, turned: np.ndarray) -> None:
    """Add the displacement of each voxel to `target` (D, *S) float32: one small product an axis."""
    shape = target.shape
    field = torch.from_numpy(turned.astype(np.float32))
    bases = [torch.from_numpy(basis.T) for basis in _bases(bend, shape[1:])]
    for axis, basis in enumerate(bases[:-1], start=1):
        field = torch.matmul(basis, field.reshape(math.prod(shape[:axis]), basis.shape[1], -1))
    # The last product is the large one: it goes straight to where it is wanted.
    torch.from_numpy(target).view(-1, shape[-1]).addmm_(field.reshape(-1, bases[-1].shape[1]), bases[-1].T)


def _least_field(control: np.ndarray, kind: str) -> np.ndarray:
    """Least displacement, and least of its negative, (2, D, *cells) between neighbouring points, or a little below.

    Between two points the field is a cubic along each axis, and stays above the least of its four Bézier points, which follow
    from the four points around: of a B-spline by de Boor's rule, of Keys' convolution by its tangents.
    """
    spline = kind == "bspline"
    rule = (
        [[1, 4, 1, 0], [0, 4, 2, 0], [0, 2, 4, 0], [0, 1, 4, 1]] if spline else [[0, 6, 0, 0], [-1, 6, 1, 0], [0, 1, 6, -1], [0, 0, 6, 0]]
    )
    plus, minus = np.maximum(rule, 0) / 6, np.minimum(rule, 0) / -6
    least = np.stack([control, -control])
    for axis in range(2, least.ndim):
        points = least.shape[axis]
        # The first point of the first cell; the last cell holds only voxels that lie on its first point.
        first, cells = (0, points - 2) if spline else (-1, points)
        around = np.clip(np.arange(first, first + 4)[:, None] + np.arange(cells), 0, points - 1)
        four = np.moveaxis(least.take(around, axis), axis, 0)
        # A negative share of a value counts by the least of the value's negative.
        both = [(share @ four.reshape(4, -1)).reshape(four.shape) for share in (plus, minus)]
        least = (both[0] + both[1][:, ::-1]).min(0)
    return least


def _bases(bend: Bend, shape_vox: Shape) -> list[np.ndarray]:
    """For each axis the weights (points, size) float32 of the control points at its voxels."""
    sizes = zip(bend.control.shape[1:], shape_vox, bend.gap_vox, strict=True)
    return [_basis(bend.kind, points, size, gap) for points, size, gap in sizes]


@lru_cache(maxsize=64)
def _basis(kind: str, points: int, size: int, gap_vox: float) -> np.ndarray:
    """Weights (points, size) float32 along one axis; a run asks for the same few at each of its samples."""
    weights = bspline_weights if kind == "bspline" else keys_weights
    return np.ascontiguousarray(weights(points, size, gap_vox).T, np.float32)


def bspline_weights(points: int, size: int, gap_vox: float) -> np.ndarray:
    """Uniform cubic B-spline (size, points) of control points `gap_vox` voxels apart, the second of them on voxel 0; rows sum to 1.

    References:
        Unser 1999, "Splines: a perfect fit for signal and image processing", doi:10.1109/79.799930.
    """
    position = 1 + np.arange(size) / gap_vox
    distance = np.abs(position[:, None] - np.arange(points))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


def keys_weights(points: int, size: int, gap_vox: float) -> np.ndarray:
    """Cubic convolution (size, points) between points `gap_vox` voxels apart, the first on voxel 0; rows sum to 1.

    The kernel has a = -1/2, Keys' own choice, with which parabolas are met exactly away from the edges; U-Net's "bicubic" does
    not say which (not confirmed).

    References:
        Keys 1981, "Cubic convolution interpolation for digital image processing", doi:10.1109/TASSP.1981.1163711.
    """
    position = np.arange(size) / gap_vox
    distance = np.abs(position[:, None] - np.arange(-1, points + 1))
    near = 1 - 2.5 * distance**2 + 1.5 * distance**3
    far = 2 - 4 * distance + 2.5 * distance**2 - 0.5 * distance**3
    weight = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    # What falls to the points beyond the edges is the edges' own.
    inner = weight[:, 1:-1].copy()
    inner[:, 0] += weight[:, 0]
    inner[:, -1] += weight[:, -1]
    return inner
