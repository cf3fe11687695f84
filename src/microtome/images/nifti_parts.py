"""NIfTI by part: a file that is not packed is mapped into memory, a packed one is decoded when it is first touched."""

from pathlib import Path
from typing import Any

import numpy as np

from microtome.images.image import Limits, decoding
from microtome.images.medical import Found, data_offset, decode_nifti, inspect_nifti, scaled
from microtome.images.parts import Lazy, Mapped, limits_of_parts, mapped
from microtome.images.volume import Pixels, Volume


def open_nifti(path: Path, limits: Limits) -> Volume:
    """What `read_nifti` gives, as a volume: the same values, geometry and header.

    Scales are applied to the part that is read. Records of colours are decoded as a whole, as packed files are.

    Raises:
        DataError: damaged, cut off, or beyond `limits`; the number of voxels counts only where all of them are decoded.
    """
    found = inspect_nifti(path, limits_of_parts(limits))
    whole = found.compressed or found.dtype.names is not None
    if whole:
        limits.check(path, found.header)
    return Volume(
        pixels=_decoded(path, found) if whole else _mapped(path, found),
        spacing_mm=found.place.spacing_mm,
        affine=found.place.affine,
        axes="CZYX",
        path=path,
        format="nifti",
        chunk_vox=(1, *found.header.shape_vox[1:]),
        spacing_known=found.place.known,
        extra=found.extra,
    )


def _decoded(path: Path, found: Found) -> Pixels:
    header = found.header
    return Lazy((header.channels, *header.shape_vox), _type(found), lambda: decode_nifti(path, found))


def _mapped(path: Path, found: Found) -> Pixels:
    shape = (found.header.channels, *found.header.shape_vox)
    with decoding(path, "NIfTI"):
        array = mapped(path, found.dtype, data_offset(path, found), shape)
    return Mapped(array, lambda part: scaled(part, found), _type(found))


def _type(found: Found) -> np.dtype[Any]:
    """Of what reading gives."""
    return np.dtype(found.header.dtype)
