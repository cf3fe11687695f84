"""The warp of a sample in one pass; compiled from `_warp.c` and `_warp.h` where a compiler was there at installation."""

import numpy as np

INTERFACE: int
MOST_ALONG_AXIS: int
MOST_VOXELS: int

def resample(
    crop: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    patch: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    affine: np.ndarray,
    bend: tuple[np.ndarray, ...] | None,
    level: int = 0,
    /,
) -> None:
    """Fill `patch` from `crop`; the interpreter is free meanwhile.

    Args:
        crop: image (C, *S) float32, label (*S) int16 and weight (*S) float32 or None; contiguous, as all arrays here.
        patch: the same of the patch, to be written.
        affine: (D, D + 1) float64, matrix and source of the patch's first voxel, in voxels of the crop.
        bend: control points (D, *points) float32 in axes of the crop, and for each axis the weights (points, size) float32
            by which they move its voxels; None: no deformation.
        level: which of the processor's instruction sets, 1 to `levels()`; all give the same bits. 0: the widest.

    Raises:
        ValueError: an array of the wrong type, shape or layout, or too large; nothing was written.
    """

def levels() -> int:
    """How many instruction sets there is code for that this processor has: 1 is the plain one, 2 AVX2."""
