"""The warp of `warp.py` where a crop lies on a GPU: every array as large as the patch is computed there.

What crosses over are a line of numbers an axis and the few control points. On a CPU it gives what `warp.py` gives, up to rounding,
and so it is tested. Products of float32 must not be rounded to TF32 (torch's default): a bend would move by up to 0.01 voxels.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.geometry import Shape
from microtome.training.transfer import sent
from microtome.training.warp import Bend, Patch, Warp, bspline_weights, keys_weights


def warp_on_device(crop: Patch, warp: Warp, centre: np.ndarray, patch_vox: Shape) -> Patch:
    """Image and weight (linear) and label (nearest) of a patch, where the crop lies.

    Args:
        crop: of a case. Outside of it the image is mirrored, the weight is 1 and the label -1.
        warp: the movement.
        centre: (D,) voxel of the crop under the middle of the patch.
        patch_vox: size of the patch.
    """
    shape = tuple(crop.label.shape)
    grid = sampling_grid(warp, centre, patch_vox, shape, device=crop.image.device)
    image = F.grid_sample(crop.image.unsqueeze(0), grid, mode="bilinear", padding_mode="reflection", align_corners=True)[0]
    # Shifted, so that the zeros of the padding read as -1 and as 1.
    label = _sample_zeros(crop.label.float().add_(1), grid, "nearest").sub_(1).to(torch.int16)
    weight = None if crop.weight is None else _sample_zeros(crop.weight - 1, grid, "bilinear").add_(1)
    for axis in (axis for axis, n in enumerate(shape) if n == 1):
        # Along an axis of one voxel grid_sample takes every coordinate for that voxel's. It lies at -1, and is 2 long.
        outside = (grid[0, ..., -1 - axis] + 1).abs() > 1
        label = label.masked_fill(outside, -1)
        weight = None if weight is None else weight.masked_fill(outside, 1.0)
    return Patch(image, label, weight)


def sampling_grid(warp: Warp, centre: np.ndarray, patch_vox: Shape, crop_vox: Shape, *, device: torch.device) -> Tensor:
    """Where `F.grid_sample` reads each voxel of a patch (1, *patch_vox, D) in a crop: -1 is its first voxel's centre, 1 its last's."""
    dims = len(patch_vox)
    # grid_sample counts axes from the last to the first.
    half = np.array([2 / max(n - 1, 1) for n in crop_vox])[::-1]
    matrix = warp.matrix[::-1] * half[:, None]
    lines = [np.outer(matrix[:, axis], np.arange(n) - (n - 1) / 2) for axis, n in enumerate(patch_vox)]
    lines[0] += (centre[::-1] * half - 1)[:, None]
    grid = torch.zeros((), device=device)
    for axis, line in enumerate(lines):
        grid = grid + _sent(line, device).view(dims, *[-1 if i == axis else 1 for i in range(dims)])
    if warp.bend is not None:
        # The field is linear in its control points: to turn these few is to turn all voxels' displacements.
        turned = np.einsum("ij,j...->i...", matrix, warp.bend.control)
        _add_field(grid, Bend(turned, warp.bend.gap_vox, warp.bend.kind))
    return grid.movedim(0, -1).unsqueeze(0)


def _add_field(target: Tensor, bend: Bend) -> None:
    """Add the displacement of each voxel to `target` (D, *S): one small product an axis."""
    shape, weights = tuple(target.shape), bspline_weights if bend.kind == "bspline" else keys_weights
    sizes = zip(bend.control.shape[1:], shape[1:], bend.gap_vox, strict=True)
    bases = [_sent(weights(points, size, gap), target.device) for points, size, gap in sizes]
    field = _sent(bend.control, target.device)
    for axis, basis in enumerate(bases[:-1], start=1):
        field = torch.matmul(basis, field.reshape(math.prod(shape[:axis]), basis.shape[1], -1))
    target.view(-1, shape[-1]).addmm_(field.reshape(-1, bases[-1].shape[1]), bases[-1].T)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """A small array as float32 on the device."""
    return sent(torch.from_numpy(np.ascontiguousarray(values, np.float32)), device)


def _sample_zeros(values_S: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Values at the places of a grid (1, *patch, D), float32; 0 outside."""
    result: Tensor = F.grid_sample(values_S[None, None], grid, mode=mode, padding_mode="zeros", align_corners=True)
    return result[0, 0]
