"""NRRD and MetaImage <-> Volume, Image: volumes of ITK and Slicer with their place in the patient.

SimpleITK says where the voxels are in the world. The voxels themselves are mapped into memory where they lie open in the
file, and unpacked at the first touch where they are packed.
"""

import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.errors import DataError, RunError, missing_extra
from microtome.files import atomic_path
from microtome.geometry import Shape, format_shape, spacing_of
from microtome.images.image import Header, Image, Limits, decoding, native
from microtome.images.itk_text import Text, meta_text, nrrd_text
from microtome.images.medical import world_affine
from microtome.images.parts import Lazy, Mapped, cut_off, limits_of_parts, mapped
from microtome.images.volume import Pixels, Volume

# Of unpacked and of packed bytes that are held at a time beside the array.
_CHUNK_BYTES, _PACKED_BYTES = 2**22, 2**16
# ITK counts x to the left and y to the back, NIfTI and we to the right and to the front.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LPS_TO_RAS.flags.writeable = False
_PIXEL_TYPE = re.compile(r"(?:vector of )?(?P<bits>\d+)-bit (?P<kind>signed integer|unsigned integer|float)")
_KINDS = MappingProxyType({"signed integer": "i", "unsigned integer": "u", "float": "f"})
_Segment = tuple[int, int, str]  # layer, value in it, name


def open_itk(path: Path, limits: Limits) -> Volume:
    """A volume (C, Z, Y, X), or a picture (C, Y, X), of a NRRD or MetaImage file.

    The affine is that which the same volume has as NIfTI. A picture has its millimetres in the order Y, X. Components of
    vectors and colours are channels, as is a fourth axis. A segmentation of Slicer is a label map: of one layer with the
    values of the file, of several with the number of each segment, from 1; where segments overlap the lower number stays.
    `extra["classes"]` holds their names.

    Raises:
        DataError: damaged, cut off, complex-valued, beyond `limits`, or with its voxels in a file outside of its folder.
    """
    found = _inspected(path)
    header, classes = found.header, {value: name for _, value, name in found.segments}
    if found.layers > 1:
        classes = {number: name for number, (_, _, name) in enumerate(found.segments, start=1)}
    with _named_by(path, found.text.data):
        pixels = _pixels(path, found, limits)
    return Volume(
        pixels=pixels,
        spacing_mm=header.spacing_mm,
        affine=found.affine,
        axes="CZYX" if len(header.shape_vox) == 3 else "CYX",
        path=path,
        format=header.format,
        chunk_vox=(1, *header.shape_vox[1:]),
        spacing_known=header.spacing_known,
        extra={"classes": classes} if classes else {},
    )


def write_itk(path: Path, image: Image) -> None:
    """Write an image as NRRD or, where the name ends in `.mha`, MetaImage, packed, in one step; channels become components of vectors.

    Raises:
        DataError: a name ending in `.mhd` or `.nhdr`, which are halves of pairs of files.
        RunError: it could not be written.
    """
    sitk = _simpleitk(path)
    if path.suffix.lower() not in (".nrrd", ".mha"):
        raise DataError(
            path, expected="a name ending in .nrrd or .mha", got=f"`{path.name}`", do="write one file instead of a pair", code="D006"
        )
    array = image.array.astype({"bool": "uint8", "float16": "float32"}.get(image.array.dtype.name, image.array.dtype), copy=False)
    array_SC = array[0] if len(array) == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1))
    picture = sitk.GetImageFromArray(array_SC, isVector=len(array) > 1)
    matrix, origin = _itk_place(image)
    spacing = np.linalg.norm(matrix, axis=0)
    picture.SetSpacing(spacing.tolist())
    picture.SetOrigin(origin.tolist())
    picture.SetDirection((matrix / spacing).ravel().tolist())
    with atomic_path(path) as part:
        try:
            sitk.WriteImage(picture, str(part), useCompression=True)
        except RuntimeError as error:
            got = str(error).splitlines()[-1]
            raise RunError(
                path, expected="a folder that can be written", got=got, do="free space or choose another --out", code="R001"
            ) from error


@dataclass(frozen=True, kw_only=True)
class _Found:
    """All that is known of a file before a voxel is read.

    Attributes:
        text: what its text says.
        reader: SimpleITK's, for packings that only it knows.
        dtype, file_shape: of the voxels in the file: the fourth axis of ITK, S, components.
        segments: of a segmentation.
        layers: of these; more than 1 are merged into one label map.
        header, affine: of the image.
    """

    text: Text
    reader: Any
    dtype: np.dtype[Any]
    file_shape: Shape
    segments: list[_Segment]
    layers: int
    header: Header
    affine: np.ndarray


def _simpleitk(path: Path) -> Any:
    """The library, which few need."""
    try:
        import SimpleITK
    except ImportError:
        raise missing_extra(str(path), "SimpleITK", "medical") from None
    return SimpleITK


def _inspected(path: Path) -> _Found:
    """Read the start of a file."""
    sitk = _simpleitk(path)
    with decoding(path, "NRRD or MetaImage"), path.open("rb") as file:
        kind = "nrrd" if file.read(4) == b"NRRD" else "metaimage"
        # Before SimpleITK sees the file, as the text may lead it to other files.
        text = nrrd_text(path) if kind == "nrrd" else meta_text(path)
        reader = sitk.ImageFileReader()
        reader.SetImageIO({"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}[kind])
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        dtype = _type(path, sitk.GetPixelIDValueAsString(reader.GetPixelID()))
        shape_SC = _file_shape(path, reader.GetSize(), reader.GetNumberOfComponents())
        affine = _affine(path, reader, text.mm)
        segments = _segments(text.fields)
    channels = shape_SC[0] * shape_SC[-1]
    layers = channels if segments else 1
    header = Header(
        shape_vox=shape_SC[1:-1],
        channels=1 if layers > 1 else channels,
        dtype="uint16" if layers > 1 else dtype.name,
        spacing_mm=spacing_of(affine),
        spacing_known=text.spacing_known,
        format=kind,
    )
    return _Found(
        text=text, reader=reader, dtype=dtype, file_shape=shape_SC, segments=segments, layers=layers, header=header, affine=affine
    )


def _type(path: Path, words: str) -> np.dtype[Any]:
    """The type of voxels from SimpleITK's words for it."""
    match = _PIXEL_TYPE.fullmatch(words)
    if match is None:
        raise DataError(path, expected="real numbers", got=f"values of {words}", do="save the magnitude, or real part", code="D008")
    return np.dtype(f"{_KINDS[match['kind']]}{int(match['bits']) // 8}")


def _file_shape(path: Path, size: tuple[int, ...], components: int) -> Shape:
    """The fourth axis or 1, S, and components; the slowest first.

    Raises:
        DataError: more axes, or both vectors and a fourth axis.
    """
    if not 2 <= len(size) <= 4 or (len(size) == 4 and size[3] > 1 and components > 1):
        got = f"{components} components of {format_shape(tuple(size[::-1]))}"
        raise DataError(path, expected="2 or 3 axes, and one of channels", got=got, do="save one time point a file", code="D009")
    return (size[3] if len(size) == 4 else 1, *size[:3][::-1], components)


def _affine(path: Path, reader: Any, mm: float) -> np.ndarray:
    """(z, y, x) -> (x, y, z) in mm, to the right, to the front, upwards; of a picture (y, x) -> (y, x).

    Raises:
        DataError: voxel sizes that are not above 0, or axes that lie in one plane.
    """
    axes = reader.GetDimension()
    dims = min(3, axes)
    matrix = np.array(reader.GetDirection()).reshape(axes, axes)[:dims, :dims] * reader.GetSpacing()[:dims]
    affine = np.eye(dims + 1)
    affine[:dims, :dims], affine[:dims, dims] = mm * matrix, mm * np.array(reader.GetOrigin()[:dims])
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:dims, :dims]) < dims:
        got = f"axes {np.round(matrix, 6).tolist()}, origin {reader.GetOrigin()}"
        raise DataError(
            path, expected="finite voxel sizes above 0 along axes that span a volume", got=got, do="set its spacing", code="D010"
        )
    if dims == 2:
        return affine[[1, 0, 2]][:, [1, 0, 2]]
    return (LPS_TO_RAS @ affine)[:, [2, 1, 0, 3]]


def _itk_place(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """ITK's matrix (x, y, z) -> mm, and the origin, of an image."""
    if len(image.shape_vox) == 2:
        affine, dims = image.affine[[1, 0, 2]][:, [1, 0, 2]], 2
    else:
        affine, dims = LPS_TO_RAS @ world_affine(image)[:, [2, 1, 0, 3]], 3
    return affine[:dims, :dims], affine[:dims, dims]


def _segments(fields: dict[str, str]) -> list[_Segment]:
    """Slicer's segments in their order."""
    found: list[_Segment] = []
    while (name := fields.get(f"segment{len(found)}_name", fields.get(f"segment{len(found)}_id"))) is not None:
        start = f"segment{len(found)}_"
        found.append((int(fields.get(f"{start}layer", 0)), int(fields.get(f"{start}labelvalue", len(found) + 1)), name))
    return found


def _pixels(path: Path, found: _Found, limits: Limits) -> Pixels:
    """The voxels, mapped where they lie open."""
    text, header = _placed(found), found.header
    shape = (header.channels, *header.shape_vox)
    components = () if found.file_shape[-1] == 1 else found.file_shape[-1:]
    stored = (*components, *found.file_shape[-2:0:-1], *((found.file_shape[0],) if found.file_shape[0] > 1 else ()))
    plain = text.packing if not text.sizes or _unit_free(text.sizes) == _unit_free(stored) else ""
    dtype = found.dtype.newbyteorder(">" if text.big else "<")
    if plain == "raw" and found.layers == 1:
        limits_of_parts(limits).check(path, header)
        return Mapped(_channels_first(mapped(text.data, dtype, text.offset, found.file_shape)))
    limits.check(text.data, header)

    def decode() -> np.ndarray:
        with _named_by(path, text.data), decoding(path, "NRRD or MetaImage"):
            if plain == "raw":
                array_SC = mapped(text.data, dtype, text.offset, found.file_shape)
            elif plain:
                array_SC = _inflated(text, found.file_shape, dtype)
            else:
                array_SC = _by_simpleitk(path, found)
            array = _channels_first(array_SC)
            return native(array) if found.layers == 1 else _merged(array, found.segments)

    return Lazy(shape, np.dtype(header.dtype), decode)


def _placed(found: _Found) -> Text:
    """The text, with the place of voxels that end where their file ends."""
    if found.text.offset >= 0:
        return found.text
    size = math.prod(found.file_shape) * found.dtype.itemsize
    return replace(found.text, offset=max(0, found.text.data.stat().st_size - size))


@contextmanager
def _named_by(path: Path, data: Path) -> Iterator[None]:
    """Say of what is wrong with a file of voxels which file led to it."""
    try:
        yield
    except DataError as error:
        if data == path or error.where != str(data):
            raise
        raise error.led_to_by(path) from error


def _unit_free(sizes: Shape) -> Shape:
    """Sizes without those of 1, which change nothing of where a value lies."""
    return tuple(size for size in sizes if size > 1)


def _channels_first(array_SC: np.ndarray) -> np.ndarray:
    """(T, *S, components) as (C, *S); one of T and components is 1, so that no value moves."""
    return np.moveaxis(array_SC, -1, 1).reshape(-1, *array_SC.shape[1:-1])


def _by_simpleitk(path: Path, found: _Found) -> np.ndarray:
    """What is packed in some other way."""
    return np.asarray(_simpleitk(path).GetArrayFromImage(found.reader.Execute())).reshape(found.file_shape)


def _inflated(text: Text, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
    """Voxels that are packed by deflate, in the frame of zlib or of gzip.

    Raises:
        DataError: they end too early.
    """
    array = np.empty(shape, dtype)
    flat, done = array.reshape(-1).view(np.uint8), 0
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    with text.data.open("rb") as file:
        file.seek(text.offset)
        while done < flat.size:
            packed = unpacker.unconsumed_tail or file.read(_PACKED_BYTES)
            if not packed or unpacker.eof:
                raise cut_off(text.data, flat.size, done)
            # A piece at a time: an empty mask is a thousandth of its size.
            piece = unpacker.decompress(packed, min(_CHUNK_BYTES, flat.size - done))
            flat[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        # The checksum is behind the last value.
        unpacker.decompress(unpacker.unconsumed_tail + file.read(_PACKED_BYTES), 1)
    return array


def _merged(layers: np.ndarray, segments: list[_Segment]) -> np.ndarray:
    """Layers of segments (L, *S) as one label map (1, *S) of their numbers; of segments that overlap the lower number stays."""
    labels = np.zeros((1, *layers.shape[1:]), np.uint16)
    for number, (layer, value, _) in reversed(list(enumerate(segments, start=1))):
        labels[0][layers[layer] == value] = number
    return labels
