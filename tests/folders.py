"""Small image files for tests: each function writes one file, making its folder."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import tifffile


def png(path: Path, array: Any = 0, *, palette: list[int] | None = None) -> Path:
    """A PNG (or, by its suffix, a JPEG of quality 90) of (Y, X) or (Y, X, 3) uint8; a number fills 4 x 4 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4), array, np.uint8) if np.ndim(array) == 0 else np.asarray(array, np.uint8)
    picture = PIL.Image.fromarray(pixels)
    if palette is not None:
        picture = PIL.Image.fromarray(pixels, mode=None).convert("P")
        picture.putdata(pixels.ravel().tolist())
        picture.putpalette(palette)
    picture.save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))
    return path


def tiff(path: Path, array: Any) -> Path:
    """A TIFF; three axes are a stack of sections."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.asarray(array), photometric="minisblack")
    return path


def nifti(path: Path, array_ZYX: Any = 0, *, spacing_mm: tuple[float, float, float] = (1, 1, 1), origin_mm: float = 0) -> Path:
    """A NIfTI file of a (Z, Y, X) array, or of (Z, Y, X, C); a number fills 2 x 3 x 4 voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((2, 3, 4), array_ZYX, np.uint8) if np.ndim(array_ZYX) == 0 else np.asarray(array_ZYX)
    affine = np.diag([*spacing_mm[::-1], 1.0])
    affine[:3, 3] = origin_mm
    order = (2, 1, 0, 3) if array.ndim == 4 else (2, 1, 0)
    nib.save(nib.Nifti1Image(array.transpose(order), affine), path)
    return path


def text(path: Path, content: Any) -> Path:
    """A text file; anything but text is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path
