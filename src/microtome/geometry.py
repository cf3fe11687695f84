"""Shapes, spacing and affines: from voxel indices to millimetres and back.

`S` stands for the spatial axes in array order: (Y, X) or (Z, Y, X). An affine maps a homogeneous
voxel index in that same order to a point in millimetres, voxel centres at whole numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
Spacing = tuple[float, ...]


def spacing_of(affine: np.ndarray) -> Spacing:
    """Voxel size in mm along each array axis: the lengths of the affine's columns. Affine (N+1, N+1)."""
    return tuple(float(length) for length in np.linalg.norm(affine[:-1, :-1], axis=0))


def affine_from_spacing(spacing_mm: Spacing) -> np.ndarray:
    """The axis-aligned affine (N+1, N+1) with its origin at the centre of voxel 0."""
    return np.diag([*spacing_mm, 1.0])


def resampled_shape(shape_vox: Shape, spacing_mm: Spacing, new_spacing_mm: Spacing) -> Shape:
    """Voxels that cover the same extent at the new spacing, at least one along each axis."""
    sizes = zip(shape_vox, spacing_mm, new_spacing_mm, strict=True)
    return tuple(max(1, round(size * old / new)) for size, old, new in sizes)


def same_grid(a: np.ndarray, b: np.ndarray, shape_vox: Shape, tolerance_vox: float = 0.05) -> bool:
    """Whether two affines put every corner of a volume within `tolerance_vox` voxels of each other."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape_vox], indexing="ij")).reshape(len(shape_vox), -1)
    homogeneous = np.vstack([corners, np.ones((1, corners.shape[1]))])
    distance_mm = np.linalg.norm((a @ homogeneous - b @ homogeneous)[:-1], axis=0).max()
    return bool(distance_mm <= tolerance_vox * min(spacing_of(a)))


def anisotropy(spacing_mm: Spacing) -> float:
    """Largest voxel side over the smallest, 1 for cubes."""
    return max(spacing_mm) / min(spacing_mm)


def format_sides(sides: Iterable[float]) -> str:
    """Lengths for people: `1 × 0.5 × 0.5`."""
    return " × ".join(f"{side:.4g}" for side in sides)


def format_shape(shape_vox: Shape) -> str:
    """A shape for people: `96×160×160`."""
    return "×".join(str(size) for size in shape_vox)


@dataclass(frozen=True)
class Sizes:
    """The image sizes a network takes along each axis of S: minimum, minimum + step, minimum + 2 step, ..."""

    minimum: tuple[int, ...]
    step: tuple[int, ...]

    def valid(self, n: int, axis: int) -> bool:
        """Whether `n` voxels along that axis fit."""
        return n >= self.minimum[axis] and (n - self.minimum[axis]) % self.step[axis] == 0

    def nearest(self, n: int, axis: int) -> tuple[int, int]:
        """The largest size <= n and the smallest size >= n; both the minimum where n is below it."""
        minimum, step = self.minimum[axis], self.step[axis]
        over = max(n - minimum, 0)
        return minimum + over // step * step, minimum + -(-over // step) * step
