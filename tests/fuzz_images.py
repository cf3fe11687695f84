"""The image formats as targets of `fuzzing`: small good files, the words of each format, and what has to hold of what was read."""

import ctypes
import io
import itertools
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its makers write it
import tifffile
from PIL import Image as Pictures
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from microtome.errors import MicrotomeError
from microtome.images.files import all_of, open_volume, probe_image, read_image, write_labels
from microtome.images.image import Header, Image, Limits
from microtome.images.volume import Volume
from tests.dicom_series import dataset, enhanced, series
from tests.fuzzing import Target, packed, png_mended

RNG = np.random.default_rng(0)
PICTURE, VOLUME = RNG.integers(0, 255, (5, 6)).astype(np.uint8), RNG.integers(0, 2000, (4, 5, 6)).astype(np.int16)
# As few as a series may have.
SLICES = VOLUME[:2]
COLOURS = RNG.integers(0, 255, (5, 6, 3)).astype(np.uint8)
_MOST_COMPARED = 2**20
_M_PERTURB = -6  # of glibc
_MALLOPT = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
# How many were refused, and were good, as a whole; and of how many one is read in part too, which takes as long as all else of a good one.
_REFUSED, _GOOD = itertools.count(), itertools.count()
_REFUSED_A_PART, _GOOD_A_PART = 4, 2
# Smaller than those by default, so that what is just allowed is decoded in milliseconds.
LIMITS = Limits(max_voxels=2**21, unsuspected_bytes=2**22)
GROWTH_BYTES = 2**28


def read_all(path: Path) -> None:
    """The header, the whole, and a part; they say the same.

    Raises:
        MicrotomeError: one of the three was refused.
    """
    _compare(probe_image(path), lambda: read_image(path, limits=LIMITS), lambda: open_volume(path, limits=LIMITS))


def read_opened(path: Path) -> None:
    """The same of kinds that are read in parts, of which `probe_image` and `read_image` open the volume by the same function.

    Raises:
        MicrotomeError: one of the two was refused.
    """
    volume = open_volume(path, limits=LIMITS)
    _compare(volume.header, lambda: all_of(path, volume, LIMITS), lambda: open_volume(path, limits=LIMITS))


def read_store(path: Path) -> None:
    """The same of stores. What tensorstore unpacks it holds to its size; what of its memory is never used is not filled, and no use of it.

    Raises:
        MicrotomeError: one of the two was refused.
    """
    volume = open_volume(path, limits=LIMITS)
    _compare(volume.header, lambda: all_of(path, volume, LIMITS), lambda: volume, filled=False)


def _compare(header: Header, whole_of: Callable[[], Image], opened: Callable[[], Volume], *, filled: bool = True) -> None:
    """Read the whole, and of some a part, and hold them to the header and to each other."""
    with _memory_of(0x11 if filled else 0):
        whole = _refusable(whole_of)
    in_part = next(_GOOD) % _GOOD_A_PART == 0 if isinstance(whole, Image) else next(_REFUSED) % _REFUSED_A_PART == 0
    with _memory_of(0xEE if filled else 0):
        part = _refusable(lambda: _part(opened())) if in_part else None
    if isinstance(whole, Image):
        shape = (header.channels, *header.shape_vox)
        assert (whole.array.shape, whole.array.dtype.name) == (shape, header.dtype), f"header {header}, image {whole.array.shape}"
        assert np.isfinite(whole.affine).all(), f"affine {whole.affine}"
        assert all(0 < size < np.inf for size in whole.spacing_mm), f"spacing {whole.spacing_mm}"
        if isinstance(part, np.ndarray) and whole.array.size < _MOST_COMPARED:
            np.testing.assert_array_equal(part, whole.array[tuple(slice(0, size) for size in part.shape)])
    for found in (whole, part):
        if isinstance(found, MicrotomeError):
            raise found


@contextmanager
def _memory_of(byte: int) -> Iterator[None]:
    """Meanwhile new memory is full of a byte, where the system can do so: what a library left undecoded is then another each time."""
    _MALLOPT(_M_PERTURB, byte)
    try:
        yield
    finally:
        _MALLOPT(_M_PERTURB, 0)


def _refusable(read: Callable[[], Any]) -> Any:
    """What reading gives, or the error that it was refused with."""
    try:
        return read()
    except MicrotomeError as error:
        return error


def _part(volume: Volume) -> np.ndarray:
    """A corner of at most 3 voxels a side."""
    pixels = volume.pixels
    return np.asarray(pixels[tuple(slice(0, min(3, size)) for size in pixels.shape)])


def _written(name: str, write: Callable[[Path], object]) -> bytes:
    """The bytes of a file that a library writes."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _picture(kind: str, array: np.ndarray = PICTURE, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    picture = Pictures.fromarray(array)
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def _rotated() -> Any:
    exif = Pictures.Exif()
    exif[0x0112] = 6
    return exif


def _target(**values: Any) -> Target:
    return Target(**{"read": read_all, "growth_bytes": GROWTH_BYTES, **values})


def pngs() -> Target:
    """Grey, deep, colours, palette, bits, interlaced, EXIF."""
    deep = PICTURE.astype(np.uint16) * 200
    seeds = (_picture("png"), _picture("png", deep), _picture("png", COLOURS, exif=_rotated()), _picture("png", COLOURS, "P"))
    chunks = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"gAMA")
    more = (_picture("png", COLOURS, "RGBA"), _picture("png", PICTURE, "1"), _picture("png", COLOURS, "LA"), _rgb_deep())
    return _target(name="PNG", seeds=(*seeds, *more), mend=png_mended, dictionary=chunks)


def _rgb_deep() -> bytes:
    """A PNG of three channels of 16 bits, which Pillow does not write."""
    rows = b"".join(b"\0" + row.tobytes() for row in (COLOURS.astype(">u2") * 200))
    chunks = ((b"IHDR", bytes((0, 0, 0, 6, 0, 0, 0, 5, 16, 2, 0, 0, 0))), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return png_mended(b"\x89PNG\r\n\x1a\n" + b"".join(len(body).to_bytes(4, "big") + name + body + bytes(4) for name, body in chunks))


def jpegs() -> Target:
    """Grey, colours, progressive, CMYK, EXIF."""
    seeds = (_picture("jpeg"), _picture("jpeg", COLOURS, exif=_rotated()), _picture("jpeg", COLOURS, progressive=True))
    marks = tuple(bytes((0xFF, mark)) for mark in (0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE))
    return _target(name="JPEG", seeds=(*seeds, _picture("jpeg", COLOURS, "CMYK")), dictionary=(*marks, b"Exif\0\0"))


def bmps() -> Target:
    """Grey, colours, bits."""
    return _target(name="BMP", seeds=(_picture("bmp"), _picture("bmp", COLOURS), _picture("bmp", PICTURE, "1")))


def gifs() -> Target:
    """One picture and several."""
    two = [Pictures.fromarray(PICTURE), Pictures.fromarray(PICTURE[::-1].copy())]
    many = _picture("gif", save_all=True, append_images=two)
    return _target(name="GIF", seeds=(_picture("gif"), many, _picture("gif", COLOURS)), dictionary=(b"\x21\xf9\x04", b"\x2c", b"\x3b"))


def _tiff(array: np.ndarray = VOLUME, **options: Any) -> bytes:
    return _written("a.tif", lambda path: tifffile.imwrite(path, array, **options))


def tiffs() -> Target:
    """Plain, packed, of tiles, big; ImageJ's and OME's."""
    plain = (_tiff(), _tiff(COLOURS, photometric="rgb"), _tiff(PICTURE, bigtiff=True), _tiff(byteorder=">"))
    packings = [
        _tiff(VOLUME.astype(np.uint8), compression=name, photometric="minisblack") for name in ("zlib", "lzw", "packbits", "zstd", "lzma")
    ]
    lossy = [_tiff(COLOURS, compression=name, photometric="rgb") for name in ("jpeg", "webp", "jpeg2000", "jpegxl", "png")]
    tiles = _tiff(VOLUME, tile=(16, 16), compression="zlib", predictor=True)
    more = (tiles, _tiff(imagej=True, metadata={"unit": "um", "spacing": 2}), *_palettes())
    words = tuple(
        tag.to_bytes(2, "little")
        for tag in (254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 324, 338, 339, 347, 32997)
    )
    return _target(name="TIFF", seeds=(*plain, *packings, *lossy, *more), dictionary=words)


def _palettes() -> tuple[bytes, bytes]:
    table = RNG.integers(0, 2**16, (3, 256)).astype(np.uint16)
    bits = _tiff(PICTURE > 100, photometric="minisblack")
    return _tiff(PICTURE, photometric="palette", colormap=table), bits


def ome_tiffs() -> Target:
    """The XML of OME is read too."""
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    seeds = (_tiff(ome=True, metadata=metadata), _tiff(np.stack([VOLUME, VOLUME]), ome=True, metadata={"axes": "CZYX"}))
    words = (
        b'SizeZ="9"',
        b"<TiffData ",
        b'IFD="7"',
        b'FileName="/etc/passwd"',
        b'DimensionOrder="XYTCZ"',
        b"<!DOCTYPE",
        b'BigEndian="true"',
    )
    return _target(name="TIFF", seeds=seeds, file="case-x.ome.tif", dictionary=words)


def _nifti(kind: Any = nib.Nifti1Image, array: np.ndarray = VOLUME, slope: float = 1.0) -> bytes:
    image = kind(array, np.diag([2.0, 2, 3, 1]))
    image.header.set_xyzt_units("mm")
    image.header["scl_slope"], image.header["scl_inter"] = slope, 0
    return bytes(image.to_bytes())


def _rgb_nifti() -> bytes:
    records = RNG.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8).view(np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))[..., 0]
    return _nifti(array=records)


def niftis() -> Target:
    """Versions 1 and 2, scaled, four axes, colours."""
    seeds = (_nifti(), _nifti(nib.Nifti2Image), _nifti(array=VOLUME[..., None].astype(np.float32)), _nifti(slope=2.5), _rgb_nifti())
    return _target(name="NIfTI", seeds=seeds, file="case-x.nii", dictionary=(b"n+1\0", b"n+2\0", b"ni1\0"))


def packed_niftis() -> Target:
    """The same behind gzip."""
    return _target(name="NIfTI", seeds=niftis().seeds, file="case-x.nii.gz", mend=packed)


def _itk(name: str, array: np.ndarray = VOLUME, *, vector: bool = False, compressed: bool = False) -> bytes:
    picture = sitk.GetImageFromArray(array, isVector=vector)
    picture.SetSpacing([0.5] * picture.GetDimension())
    return _written(name, lambda path: sitk.WriteImage(picture, str(path), useCompression=compressed))


def nrrds() -> Target:
    """Open, packed, colours, bzip2 (SimpleITK's alone), text, a segmentation of Slicer."""
    open_, gz = _itk("a.nrrd"), _itk("a.nrrd", compressed=True)
    text = b"NRRD0004\ntype: short\ndimension: 2\nsizes: 3 2\nencoding: ascii\nspacings: 1 2\n\n1 2 3\n4 5 6\n"
    hexadecimal = b"NRRD0004\ntype: uchar\ndimension: 2\nsizes: 3 2\nencoding: hex\nspacings: 1 2\n\n010203040506\n"
    segments = open_.replace(b"\n\n", b"\nSegment0_Name:=a\nSegment0_LabelValue:=1\nSegment0_Layer:=0\nSegment1_Name:=b\n\n", 1)
    words = (
        b"data file: /etc/passwd\n",
        b"datafile: ../a\n",
        b"byte skip: -1\n",
        b"line skip: 3\n",
        b"kinds: vector\n",
        b"encoding: bzip2\n",
    )
    axes = (
        b"sizes: 4 6 5 4\n",
        b"space: right-anterior-superior\n",
        b"block size: 9\n",
        b"axis mins: 0\n",
        b"type: block\n",
        b"encoding: gzip\n",
    )
    seeds = (open_, gz, _itk("a.nrrd", COLOURS, vector=True), text, hexadecimal, segments)
    return _target(name="NRRD", read=read_opened, seeds=seeds, file="case-x.nrrd", dictionary=(*words, *axes))


def metaimages() -> Target:
    """Open, packed, vectors, text."""
    start = b"NDims = 2\nDimSize = 3 2\nElementType = MET_SHORT\nElementSpacing = 1 2\nBinaryData = False\n"
    text = b"ObjectType = Image\n" + start + b"ElementDataFile = LOCAL\n1 2 3 4 5 6\n"
    seeds = (_itk("a.mha"), _itk("a.mha", compressed=True), _itk("a.mha", COLOURS, vector=True), text)
    words = (b"ElementDataFile = /etc/passwd\n", b"ElementDataFile = LIST\n", b"HeaderSize = -1\n", b"ElementNumberOfChannels = 9\n")
    more = (b"CompressedDataSize = 1\n", b"BinaryDataByteOrderMSB = True\n", b"ElementType = MET_STRING\n", b"ObjectType = Mesh\n")
    return _target(name="MetaImage", read=read_opened, seeds=seeds, file="case-x.mha", dictionary=(*words, *more))


def detached_headers() -> Target:
    """The text of a MetaImage whose voxels are in a file beside it."""
    head = _itk("a.mha").partition(b"LOCAL\n")
    return _target(
        name="MetaImage",
        read=read_opened,
        seeds=(head[0] + b"case-x.raw\n",),
        file="case-x.mhd",
        prepare=_raw_beside,
        dictionary=(b"LIST", b"../", b"/etc/", b"%d", b"case-x.mhd"),
    )


def _raw_beside(folder: Path) -> None:
    (folder / "case-x.raw").write_bytes(VOLUME.tobytes())


def npys() -> Target:
    """Both orders of memory, both versions, colours."""
    seeds = tuple(_npy(array) for array in (VOLUME, np.asfortranarray(VOLUME), COLOURS, PICTURE > 9, VOLUME.astype(">f8")))
    words = (b"'descr': '|O'", b"'|V8'", b"True", b"(9223372036854775807, 2)", b"(((((", b"__import__", b"'<m8'", b"'<c16'")
    return _target(name="NPY", read=read_opened, seeds=seeds, file="case-x.npy", dictionary=words)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _hdf5(**options: Any) -> bytes:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("raw", data=VOLUME, **options)
            dataset.attrs["axes"], dataset.attrs["element_size_um"] = "zyx", [2.0, 1.0, 1.0]

    return _written("a.h5", write)


def hdf5s() -> Target:
    """In one piece, in chunks, packed."""
    seeds = (_hdf5(), _hdf5(chunks=(2, 3, 3)), _hdf5(chunks=(2, 3, 3), compression="gzip", shuffle=True, fletcher32=True))
    words = (b"TREE", b"HEAP", b"SNOD", b"OHDR", b"FRHP", b"BTHD", b"\x89HDF\r\n\x1a\n", b"/raw", b"raw\0", b"\xff" * 8)
    return _target(name="HDF5", read=read_opened, seeds=seeds, file="case-x.h5", dictionary=words)


_ELEMENTS = (
    (0x28, 2),
    (0x28, 8),
    (0x28, 0x10),
    (0x28, 0x11),
    (0x28, 0x30),
    (0x28, 0x100),
    (0x28, 0x101),
    (0x28, 0x103),
    (0x28, 0x1052),
    (0x7FE0, 0x10),
)
_TAGS = tuple(group.to_bytes(2, "little") + element.to_bytes(2, "little") for group, element in _ELEMENTS)


def dicoms() -> Target:
    """A picture, and slices that are open or packed."""
    place = {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "RescaleSlope": 2, "RescaleIntercept": -9}
    # JPEG 2000 halves a picture five times.
    arrays = (
        (VOLUME[0], ExplicitVRLittleEndian),
        (COLOURS, ExplicitVRLittleEndian),
        (VOLUME[0], RLELossless),
        (np.tile(VOLUME[0], (7, 6)), JPEG2000Lossless),
    )
    made = [dataset(array, syntax=syntax, **place) for array, syntax in arrays]
    seeds = [_written("a.dcm", lambda path, one=one: one.save_as(path, enforce_file_format=True)) for one in made]
    seeds.append(_written("a.dcm", lambda path: enhanced(path, [0, 1, 2])))
    syntaxes = (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.5")
    words = (*_TAGS, *syntaxes, b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0", b"\xff\xff\xff\xff", b"SQ", b"OB", b"UN")
    return _target(name="DICOM", read=read_opened, seeds=tuple(seeds), file="case-x.dcm", dictionary=words)


def dicom_series() -> Target:
    """One slice of a folder changes."""
    seeds = [_written("s/IM1.dcm", lambda path: series(path.parent, SLICES, names=range(len(SLICES))))]
    values: dict[str, Any] = {"file": "case-x/IM1.dcm", "given": "case-x", "prepare": _slices, "dictionary": _TAGS}
    # Mostly it is a good one, and the others are read with it.
    return _target(name="DICOM", read=read_opened, seeds=tuple(seeds), weight=0.1, **values)


def _slices(folder: Path) -> None:
    series(folder / "case-x", SLICES, names=range(len(SLICES)))


def segmentations() -> Target:
    """Label maps of DICOM."""
    return _target(name="DICOM", read=read_opened, seeds=(_written("seg.dcm", _segmentation),), file="case-x.dcm", dictionary=_TAGS)


def _segmentation(path: Path) -> None:
    series(path.parent / "s", SLICES)
    write_labels(path, (SLICES > 900).astype(int), read_image(path.parent / "s"))
