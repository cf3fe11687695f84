"""Rules of a plan for how images look: which grey values the network sees, and which changes leave an image as likely as it was."""

import re

from microtome.config import AugmentConfig, NormalisationConfig
from microtome.fingerprint import Fingerprint
from microtome.geometry import Shape, Spacing
from microtome.images.medical import PATIENT_FORMATS

SIDES = frozenset({"left", "right", "l", "r", "lt", "rt", "lh", "rh", "sin", "dex"})


def choose_normalisation(data: Fingerprint) -> tuple[NormalisationConfig, str]:
    """Fixed numbers where grey values mean something by themselves, else each image by itself."""
    fixed = NormalisationConfig(kind="dataset", low=data.low, high=data.high, mean=data.mean, sd=tuple(max(s, 1e-6) for s in data.sd))
    if data.hounsfield:
        return fixed, "values look like CT numbers, which mean the same in every scan: clipped to 0.5-99.5 %, mean and sd of the dataset"
    if _is_colour(data) and data.brightness_varies < 1:
        return fixed, "colour pictures of like brightness: mean and sd of the dataset for each channel, so that colours keep their meaning"
    return NormalisationConfig(), "mean 0 and sd 1 for each image and channel by itself, because brightness differs between images"


def choose_augment(data: Fingerprint, patch_vox: Shape, spacing_mm: Spacing) -> tuple[AugmentConfig, str]:
    """Changes that leave an image as likely as before: what may be mirrored or turned depends on what is shown."""
    dims = len(patch_vox)
    flips: Shape
    if _sided(data.classes):
        flips, turn, why = (), 20.0, "classes are told apart by their side: never mirrored, turned a little"
    elif data.jpeg_share > 0.5:
        flips, turn, why = (dims - 1,), 20.0, "JPEG photographs: mirrored left to right and turned a little, as up is not down"
    elif data.left_right_axis is not None:
        flips, turn, why = _patient_flips(data, dims), 20.0, "oriented volumes: mirrored left to right only, turned a little"
    else:
        flips, turn = tuple(range(dims)), 180.0
        why = "taken for microscopy, which has no up or down: mirrored and turned freely (scenes: flip_axes [1], rotation_deg [20])"
    if turn == 180.0 and dims == 3:
        angles: tuple[float, ...] = (180.0, 30.0, 30.0)
    else:
        angles = (turn,) if dims == 2 else (turn,) * 3
    # Control points as far apart as a quarter of the patch, in the plane's units; Cicek 2016 uses 32 voxels with sd 4 at 132.
    gap_mm = max(8.0, min(32.0, max(patch_vox) / 4)) * min(spacing_mm)
    gaps = tuple(max(2.0, gap_mm / value) for value in spacing_mm)
    return AugmentConfig(
        flip_axes=flips,
        rotation_deg=angles,
        elastic_spacing=gaps,
        elastic_sd=tuple(gap / 8 for gap in gaps),
    ), why + "; scaled, bent by B-splines, grey values changed"


def _sided(classes: tuple[str, ...]) -> bool:
    """Whether a class is named after a side: `left_kidney`, `Right-Hippocampus`, `LeftLung`, `kidney_L`."""
    words = {word.lower() for name in classes for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return bool(words & SIDES)


def _is_colour(data: Fingerprint) -> bool:
    """Whether three channels are red, green and blue of 8 bits, and not three stains or three scans."""
    return data.channels == 3 and not PATIENT_FORMATS & set(data.formats) and max(data.high) <= 255


def _patient_flips(data: Fingerprint, dims: int) -> tuple[int, ...]:
    """The left-right axis, if the network sees it."""
    axis = (data.left_right_axis or 0) - (len(data.shape_vox) - dims)
    return () if axis < 0 else (axis,)
