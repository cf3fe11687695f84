"""Any image file <-> Image: which reader a file needs is decided by its first bytes, never by its name."""

import dataclasses
import gzip
import re
import warnings
from pathlib import Path
from types import MappingProxyType

import numpy as np

from microtome.errors import DataError, DataWarning
from microtome.geometry import format_shape
from microtome.images.image import Header, Image, Limits, Palette, decoding
from microtome.images.medical import GZIP_MAGIC, NIFTI2_BYTES, is_nifti, probe_nifti, read_nifti, write_nifti
from microtome.images.raster import probe_raster, read_raster, write_png
from microtome.images.tiff import probe_tiff, read_tiff, write_tiff

# Longest first, so that `.nii.gz` is not cut to `.nii`.
_SUFFIXES = MappingProxyType(
    {
        ".ome.tiff": "tiff",
        ".ome.tif": "tiff",
        ".nii.gz": "nifti",
        ".tiff": "tiff",
        ".jpeg": "jpeg",
        ".nii": "nifti",
        ".tif": "tiff",
        ".png": "png",
        ".jpg": "jpeg",
        ".bmp": "bmp",
        ".gif": "gif",
    }
)
_MAGIC = (
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"\xff\xd8\xff", "jpeg"),
    (rb"BM.{4}\0\0\0\0", "bmp"),
    (rb"GIF8[79]a", "gif"),
    (rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]", "tiff"),
)
# Known only so that the message can say what the file is.
_FOREIGN = (
    (rb".{128}DICM", "a DICOM file"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "packed data that are not NIfTI"),
    (rb"NRRD000", "an NRRD file"),
    (rb"ObjectType", "a MetaImage file"),
    (rb"RIFF.{4}WEBP", "a WebP picture"),
    (rb"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (rb"\s*<", "text such as HTML or XML"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (rb"\Z", "an empty file"),
)


def read_image(path: Path, *, palette: Palette = "colours", limits: Limits = Limits()) -> Image:  # noqa: B008 - frozen
    """Read a PNG, JPEG, BMP, GIF, TIFF, OME-TIFF or NIfTI file.

    Args:
        path: the file; what it is is told by its first bytes.
        palette: what a palette image gives: "colours", 3 channels; or "indices", 1 channel, for label maps.
        limits: what its header may claim.

    Returns:
        The image, (C, *S), with its geometry; see `read_raster`, `read_tiff`, `read_nifti` for what becomes of
        alpha, palettes, orientation, units and scales.

    Raises:
        DataError: not there, not an image, damaged, or beyond the limits; names the file.

    Warns:
        DataWarning: its suffix claims another format, or something had to be assumed; names the file.
    """
    kind = _checked_kind(path)
    if kind == "nifti":
        return read_nifti(path, limits)
    if kind == "tiff":
        return read_tiff(path, palette, limits)
    return read_raster(path, kind, palette, limits)


def probe_image(path: Path) -> Header:
    """Shape, channels, type and spacing of what `read_image` would give, without decoding a pixel.

    Raises:
        DataError: not there, not an image, or its header is damaged.
    """
    kind = _checked_kind(path)
    if kind == "nifti":
        return probe_nifti(path)
    return probe_tiff(path) if kind == "tiff" else probe_raster(path, kind)


def write_labels(path: Path, labels: np.ndarray, like: Image) -> None:
    """Write a label map of an image in that image's real format and geometry, in one step.

    Integers are stored in the smallest type that holds them. A JPEG, BMP or GIF gets a PNG: its own format would
    change or limit the values.

    Args:
        path: ends in `label_suffix(like)`, or another suffix of that format.
        labels: (*S) integers, or (3, *S) uint8 colours.
        like: the image that was labelled.

    Raises:
        DataError: other shape than the image's, no integers, or values that the format does not hold.
    """
    colours = labels.shape == (3, *like.shape_vox) and labels.dtype == np.uint8
    if not colours and labels.shape != like.shape_vox:
        got = f"{format_shape(labels.shape)} {labels.dtype}"
        raise DataError(path, expected=f"labels of {format_shape(like.shape_vox)}", got=got, do=f"label {like.path.name} itself")
    if labels.dtype.kind not in "biu":
        raise DataError(path, expected="whole numbers", got=f"{labels.dtype} labels", do="round them, or use write_image")
    if _SUFFIXES.get(suffix_of(path)) != _SUFFIXES[label_suffix(like)]:
        raise DataError(path, expected=f"a name ending in {label_suffix(like)}", got=f"`{path.name}`", do="rename the output")
    array = labels if colours else _smallest(labels)[None]
    write_image(path, dataclasses.replace(like, array=array))


def write_image(path: Path, image: Image) -> None:
    """Write an image with its geometry in the format that `path`'s suffix names: PNG, TIFF or NIfTI, in one step.

    Raises:
        DataError: another suffix, or a type that the format does not hold.
    """
    kind = _SUFFIXES.get(suffix_of(path))
    if kind == "png":
        write_png(path, image.array.astype(np.uint8) if image.array.dtype == np.bool_ else image.array)
    elif kind == "tiff":
        write_tiff(path, image)
    elif kind == "nifti":
        write_nifti(path, image)
    else:
        raise DataError(path, expected="a name ending in .png, .tif, .nii or .nii.gz", got=f"`{path.name}`", do="rename the output")


def label_suffix(image: Image) -> str:
    """The suffix of a label map of this image: its own format's, or .png where that one would change the values."""
    if image.format == "nifti":
        return ".nii.gz" if image.extra.get("compressed", True) else ".nii"
    return ".tif" if image.format == "tiff" else ".png"


def is_image_name(path: Path) -> bool:
    """Whether a file has the suffix of an image and is not one of the hidden companions that systems leave (`._a.png`)."""
    return not path.name.startswith(".") and suffix_of(path) in _SUFFIXES


def stem_of(path: Path) -> str:
    """The name without its whole image suffix: `a.b` of `a.b.nii.gz`; of any other file without its last suffix."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def suffix_of(path: Path) -> str:
    """The known image suffix of a name in small letters (`.nii.gz`, `.ome.tif`, `.png`), or ""."""
    name = path.name.lower()
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def _checked_kind(path: Path) -> str:
    """The format by the file's content; warns where its suffix claims another one."""
    kind = _kind_of(path)
    claimed = _SUFFIXES.get(suffix_of(path))
    if claimed is not None and claimed != kind:
        warnings.warn(f"{path}: the suffix says {claimed} but the file is {kind}; it is read as {kind}", DataWarning, stacklevel=3)
    return kind


def _kind_of(path: Path) -> str:
    """The format by the file's first bytes.

    Raises:
        DataError: it cannot be read, or is of no known format; says what it is, if that is known.
    """
    head = _head(path)
    if is_nifti(_unpacked(path) if head.startswith(GZIP_MAGIC) else head):
        return "nifti"
    for pattern, kind in _MAGIC:
        if re.match(pattern, head, re.DOTALL):
            return kind
    got = next((words for pattern, words in _FOREIGN if re.match(pattern, head, re.DOTALL)), f"bytes {head[:8].hex(' ')}")
    raise DataError(path, expected="a PNG, JPEG, BMP, GIF, TIFF or NIfTI file", got=got, do="convert it, or take it out of the folder")


def _head(path: Path) -> bytes:
    """The file's first bytes, enough for every format's mark."""
    try:
        with path.open("rb") as file:
            return file.read(NIFTI2_BYTES)
    except OSError as error:
        raise DataError(path, expected="a readable file", got=str(error.strerror), do="check the path and its permissions") from None


def _unpacked(path: Path) -> bytes:
    """The first bytes of a file packed with gzip."""
    with decoding(path, "gzip"), gzip.open(path) as file:
        return file.read(NIFTI2_BYTES)


def _smallest(labels: np.ndarray) -> np.ndarray:
    """The same integers in the smallest unsigned type that holds them; in a signed one of 16 bits or more if some are negative."""
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    types = (np.uint8, np.uint16, np.uint32, np.uint64) if low >= 0 else (np.int16, np.int32, np.int64)
    return labels.astype(next(kind for kind in types if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))
