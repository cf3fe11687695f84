"""Any image file or store <-> Image or Volume: which reader it needs is decided by its first bytes, never by its name."""

import dataclasses
import gzip
import math
import os
import re
import warnings
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np

from microtome.errors import DataError, DataWarning
from microtome.geometry import format_shape
from microtome.images.image import Header, Image, Limits, Palette, decoding
from microtome.images.medical import GZIP_MAGIC, NIFTI2_BYTES, is_nifti, probe_nifti, read_nifti, write_nifti
from microtome.images.raster import probe_raster, read_raster, write_png
from microtome.images.tiff import probe_tiff, read_tiff, write_tiff
from microtome.images.volume import Volume, url_of, volume_of

# Of one part or two, as `suffix_of` has it.
_SUFFIXES = MappingProxyType(
    {
        ".ome.tiff": "tiff",
        ".ome.tif": "tiff",
        ".nii.gz": "nifti",
        ".ome.zarr": "zarr",
        ".seg.nrrd": "nrrd",
        ".tiff": "tiff",
        ".jpeg": "jpeg",
        ".nii": "nifti",
        ".tif": "tiff",
        ".png": "png",
        ".jpg": "jpeg",
        ".bmp": "bmp",
        ".gif": "gif",
        ".zarr": "zarr",
        ".n5": "n5",
        ".precomputed": "precomputed",
        ".hdf5": "hdf5",
        ".h5": "hdf5",
        ".hdf": "hdf5",
        ".ilp": "hdf5",
        ".npy": "npy",
        ".nrrd": "nrrd",
        ".nhdr": "nrrd",
        ".mha": "metaimage",
        ".mhd": "metaimage",
        ".dcm": "dicom",
    }
)
# Kinds of which parts are read, each by a function `(path, limits) -> Volume`; imported late, as most files need none of them.
_OPENERS = MappingProxyType(
    {
        "zarr": ("microtome.images.chunked", "open_chunked"),
        "n5": ("microtome.images.chunked", "open_chunked"),
        "precomputed": ("microtome.images.chunked", "open_chunked"),
        "hdf5": ("microtome.images.hdf5", "open_hdf5"),
        "npy": ("microtome.images.npy", "open_npy"),
        "nrrd": ("microtome.images.itk", "open_itk"),
        "metaimage": ("microtome.images.itk", "open_itk"),
        "dicom": ("microtome.images.dicom", "open_dicom"),
        "tiff": ("microtome.images.tiff_parts", "open_tiff"),
        "nifti": ("microtome.images.nifti_parts", "open_nifti"),
    }
)
# Kinds that are written whole, each by a function `(path, image)`; NIfTI, TIFF and PNG have theirs above.
_WRITERS = MappingProxyType(
    {
        "hdf5": ("microtome.images.hdf5", "write_hdf5"),
        "npy": ("microtome.images.npy", "write_npy"),
        "nrrd": ("microtome.images.itk", "write_itk"),
        "metaimage": ("microtome.images.itk", "write_itk"),
        "zarr": ("microtome.images.omezarr", "write_omezarr"),
        "dicom": ("microtome.images.dicom_seg", "write_seg"),
    }
)
# A label map of an image of this kind is a file of that suffix; of all others a PNG, since their own would change the values.
_LABEL_SUFFIXES = MappingProxyType(
    {"tiff": ".tif", "hdf5": ".h5", "npy": ".npy", "nrrd": ".nrrd", "metaimage": ".mha", "dicom": ".nii.gz"}
    | dict.fromkeys(("zarr", "n5", "precomputed"), ".ome.zarr")
)
# Files that make a folder a store, and the kind that it is.
_MARKERS = ((".zgroup", "zarr"), (".zarray", "zarr"), ("zarr.json", "zarr"), ("attributes.json", "n5"), ("info", "precomputed"))
# Files without the suffix of an image that may come before the slices of a DICOM series.
_MOST_BESIDE = 8
_MAGIC = re.compile(
    rb"(?P<png>\x89PNG\r\n\x1a\n)"
    rb"|(?P<jpeg>\xff\xd8\xff)"
    rb"|(?P<bmp>BM.{4}\0\0\0\0)"
    rb"|(?P<gif>GIF8[79]a)"
    rb"|(?P<tiff>II[\x2a\x2b]\0|MM\0[\x2a\x2b])"
    rb"|(?P<hdf5>\x89HDF\r\n\x1a\n)"
    rb"|(?P<npy>\x93NUMPY)"
    rb"|(?P<nrrd>NRRD000)"
    rb"|(?P<metaimage>ObjectType|NDims)"
    rb"|(?P<dicom>.{128}DICM)",
    re.DOTALL,
)
# Known only so that the message can say what the file is.
_FOREIGN = (
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "packed data that are not NIfTI"),
    (rb"RIFF.{4}WEBP", "a WebP picture"),
    (rb"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (rb"\s*<", "text such as HTML or XML"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (rb"\Z", "an empty file"),
)


def read_image(path: Path, *, palette: Palette = "colours", limits: Limits = Limits()) -> Image:  # noqa: B008 - frozen
    """Read all of an image into memory.

    Args:
        path: a PNG, JPEG, BMP, GIF, TIFF, OME-TIFF, NIfTI, NRRD, MetaImage or NPY file; a dataset in an HDF5 file (`file.h5/raw`);
            a folder of DICOM files; an OME-Zarr, Zarr, N5 or Neuroglancer store, here or by its URL. What it is is told by its
            first bytes.
        palette: what a palette image gives: "colours", 3 channels; or "indices", 1 channel, for label maps.
        limits: what its header may claim.

    Returns:
        The image, (C, *S), with its geometry; see the reader of its kind for what becomes of alpha, palettes,
        orientation, units and scales.

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
    return all_of(path, _opened(path, kind, limits), limits) if kind in _OPENERS else read_raster(path, kind, palette, limits)


def open_volume(path: Path, *, limits: Limits = Limits()) -> Volume:  # noqa: B008 - frozen
    """Open an image to read it part by part; `read_image` has the words. A kind that is decoded only as a whole is read now.

    Raises:
        DataError: not there, not an image, its header is damaged or beyond the limits.
    """
    kind = _checked_kind(path)
    return _opened(path, kind, limits) if kind in _OPENERS else volume_of(read_raster(path, kind, "colours", limits))


def probe_image(path: Path) -> Header:
    """Shape, channels, type and spacing of what `read_image` would give, without decoding a pixel.

    Raises:
        DataError: not there, not an image, or its header is damaged.
    """
    kind = _checked_kind(path)
    if kind == "nifti":
        return probe_nifti(path)
    if kind == "tiff":
        return probe_tiff(path)
    return _opened(path, kind, Limits()).header if kind in _OPENERS else probe_raster(path, kind)


def write_labels(path: Path, labels: np.ndarray, like: Image | Volume) -> None:
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
        raise DataError(
            path, expected=f"labels of {format_shape(like.shape_vox)}", got=got, do=f"label {like.path.name} itself", code="D007"
        )
    if labels.dtype.kind not in "biu":
        raise DataError(path, expected="whole numbers", got=f"{labels.dtype} labels", do="round them, or use write_image", code="D007")
    if _SUFFIXES.get(suffix_of(path)) != _SUFFIXES[label_suffix(like)]:
        raise DataError(path, expected=f"a name ending in {label_suffix(like)}", got=f"`{path.name}`", do="rename the output", code="D006")
    array = labels if colours else _smallest(labels)[None]
    write_image(path, like.with_array(array) if isinstance(like, Volume) else dataclasses.replace(like, array=array))


def write_image(path: Path, image: Image) -> None:
    """Write an image with its geometry in the format that `path`'s suffix names, in one step.

    Raises:
        DataError: a suffix of no format that is written, or a type that the format does not hold.
    """
    kind = _SUFFIXES.get(suffix_of(path), "")
    if kind == "png":
        write_png(path, image.array.astype(np.uint8) if image.array.dtype == np.bool_ else image.array)
    elif kind == "tiff":
        write_tiff(path, image)
    elif kind == "nifti":
        write_nifti(path, image)
    elif kind in _WRITERS:
        module, name = _WRITERS[kind]
        getattr(import_module(module), name)(path, image)
    else:
        expected = "a name ending in .png, .tif, .nii, .nii.gz, .nrrd, .mha, .h5, .npy, .ome.zarr or .dcm"
        raise DataError(path, expected=expected, got=f"`{path.name}`", do="rename the output", code="D006")


def label_suffix(image: Image | Volume) -> str:
    """The suffix of a label map of this image: its own format's, or .png where that one would change the values."""
    if image.format == "nifti":
        return ".nii.gz" if image.extra.get("compressed", True) else ".nii"
    if image.format == "dicom" and len(image.shape_vox) == 2:
        return ".tif"
    if image.format == "dicom" and "source" in image.extra:
        return ".dcm"
    return _LABEL_SUFFIXES.get(image.format, ".png")


def is_image_name(path: Path) -> bool:
    """Whether a file has the suffix of an image and is not one of the hidden companions that systems leave (`._a.png`)."""
    return not path.name.startswith(".") and suffix_of(path) in _SUFFIXES


def stem_of(path: Path) -> str:
    """The name without its whole image suffix: `a.b` of `a.b.nii.gz`; of any other file without its last suffix."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def suffix_of(path: Path) -> str:
    """The known image suffix of a name in small letters (`.nii.gz`, `.ome.tif`, `.png`), or ""."""
    parts = path.name.lower().split(".")
    # The longer counts, so that `.nii.gz` is not cut to `.gz`.
    ends = (f".{'.'.join(parts[-count:])}" for count in (2, 1) if len(parts) > count)
    return next((end for end in ends if end in _SUFFIXES), "")


def _checked_kind(path: Path) -> str:
    """The format by the file's content; warns where its suffix claims another one."""
    kind = _kind_of(path)
    claimed = _SUFFIXES.get(suffix_of(path))
    if claimed is not None and claimed != kind:
        warnings.warn(f"{path}: the suffix says {claimed} but the file is {kind}; it is read as {kind}", DataWarning, stacklevel=3)
    return kind


def _opened(path: Path, kind: str, limits: Limits) -> Volume:
    """What the opener of a kind gives."""
    module, name = _OPENERS[kind]
    volume: Volume = getattr(import_module(module), name)(path, limits)
    return volume


def all_of(path: Path, volume: Volume, limits: Limits) -> Image:
    """All of a volume that was opened by this path, which may be more than fits in memory.

    Raises:
        DataError: it is damaged, or beyond the limits.
    """
    if volume.format == "hdf5":
        # Alone of these, its chunks may hold a million times their size.
        limits.check(next(above for above in (path, *path.parents) if above.is_file()), volume.header)
    if math.prod(volume.pixels.shape) > limits.max_voxels:
        got = f"{volume.channels} channels of {format_shape(volume.shape_vox)}"
        raise DataError(
            path, expected=f"at most {limits.max_voxels} values (max_voxels)", got=got, do="open it part by part, or cut it", code="D003"
        )
    return volume.load()


def store_kind(folder: Path) -> str:
    """The kind of store that a folder is: "zarr", "n5", "precomputed", "dicom"; "" of one that is none."""
    for marker, kind in _MARKERS:
        # Asked of every folder of a dataset: by words, as making paths takes longer than the answer.
        if os.path.isfile(f"{folder}/{marker}"):
            return kind
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    # One that is no series says so when it is opened; a licence or a table beside the slices is none.
    for path in islice(files, _MOST_BESIDE):
        if _head(path)[128:132] == b"DICM":
            return "dicom"
        if suffix_of(path):
            return ""
    return ""


def _kind_of(path: Path) -> str:
    """The format by the first bytes of a file, the marks of a folder, or the file that a path leads into.

    Raises:
        DataError: it cannot be read, or is of no known format; says what it is, if that is known.
    """
    if (url := url_of(path)) is not None:
        from microtome.images.chunked import kind_of_url

        return kind_of_url(url)
    if not path.is_file():
        if path.is_dir():
            return _kind_of_folder(path)
        if not path.exists() and any(_kind_of(above) == "hdf5" for above in path.parents if above.is_file()):
            return "hdf5"
    head = _head(path)
    if is_nifti(_unpacked(path) if head.startswith(GZIP_MAGIC) else head):
        return "nifti"
    if (found := _MAGIC.match(head)) and found.lastgroup:
        return found.lastgroup
    got = next((words for pattern, words in _FOREIGN if re.match(pattern, head, re.DOTALL)), f"bytes {head[:8].hex(' ')}")
    expected = "a PNG, JPEG, BMP, GIF, TIFF, NIfTI, NRRD, MetaImage, DICOM, HDF5 or NPY file"
    raise DataError(path, expected=expected, got=got, do="convert it, or take it out of the folder", code="D005")


def _kind_of_folder(path: Path) -> str:
    """The kind of store that a folder is, or lies in.

    Raises:
        DataError: it is none.
    """
    if kind := store_kind(path):
        return kind
    if (path.parent / "info").is_file():
        return "precomputed"
    raise DataError(
        path, expected="an image", got="a folder that is no store of one", do="give a folder of DICOM, Zarr, N5 or an info", code="D005"
    )


def _head(path: Path) -> bytes:
    """The file's first bytes, enough for every format's mark."""
    try:
        with path.open("rb") as file:
            return file.read(NIFTI2_BYTES)
    except OSError as error:
        raise DataError(
            path, expected="a readable file", got=str(error.strerror), do="check the path and its permissions", code="D001"
        ) from None


def _unpacked(path: Path) -> bytes:
    """The first bytes of a file packed with gzip."""
    with decoding(path, "gzip"), gzip.open(path) as file:
        return file.read(NIFTI2_BYTES)


def _smallest(labels: np.ndarray) -> np.ndarray:
    """The same integers in the smallest unsigned type that holds them; in a signed one of 16 bits or more if some are negative."""
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    types = (np.uint8, np.uint16, np.uint32, np.uint64) if low >= 0 else (np.int16, np.int32, np.int64)
    return labels.astype(next(kind for kind in types if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))
