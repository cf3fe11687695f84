"""Maps of objects for the tests of their scores, in memory and in files."""

import base64
import io
from pathlib import Path

import numpy as np
import PIL.Image
from scipy import ndimage

from microtome.geometry import affine_from_spacing
from microtome.images.files import write_image
from microtome.images.image import Image


def squares(shape: tuple[int, ...] = (32, 32), first: int = 1) -> np.ndarray:
    """A map of objects, 4 voxels wide and 8 apart, the first in the corner, numbered from `first` on."""
    numbered, _ = ndimage.label(np.all(np.indices(shape) % 8 < 4, axis=0))
    return np.where(numbered > 0, numbered + first - 1, 0)


def as_image(array: np.ndarray, path: Path, spacing_mm: tuple[float, ...] | None = None) -> Image:
    """An array (C, *S) as the image that a file of this suffix would hold."""
    spacing = spacing_mm or (1.0,) * (array.ndim - 1)
    kind = {".gz": "nifti", ".tif": "tiff", ".npy": "npy"}.get(path.suffix, "png")
    affine, axes = affine_from_spacing(spacing), "CZYX"[-array.ndim :] if array.ndim == 4 else "CYX"
    return Image(array=array, spacing_mm=spacing, affine=affine, axes=axes, path=path, format=kind)


def save(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, as_image(labels[None], path))
    return path


def pixels_of(panel: str) -> np.ndarray:
    """The picture (Y, X, 3) of a panel."""
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(panel)))).astype(int)


def near(panel: str, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a panel has a colour, as far as JPEG keeps it."""
    return np.asarray(np.abs(pixels_of(panel) - colour).max(axis=-1) < 60)


def write_folders(root: Path) -> tuple[Path, Path]:
    """Three cases of 16 objects: a has one missed and one false, b is right but for its numbers, c has nothing."""
    truth = squares()
    missed = np.where(truth == 6, 0, truth)
    missed[14:16, 14:16] = 999
    for name, objects, found in (("a", truth, missed), ("b", truth, squares(first=300)), ("c", truth, 0 * truth)):
        save(root / "truth" / f"{name}.tif", objects.astype(np.uint16))
        save(root / "predictions" / f"{name}.tif", found.astype(np.uint16))
    return root / "predictions", root / "truth"
