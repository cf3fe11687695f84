"""DICOM -> Volume: a series of slices, a file of many frames, a picture, or a segmentation; a slice is decoded when it is asked for."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microtome.errors import DataError, DataWarning
from microtome.geometry import affine_from_spacing, spacing_of
from microtome.images.dicom_planes import tags_of
from microtome.images.dicom_seg import SEGMENTATION, DicomFile, dicom_files, open_segmentation, pixels_of, pydicom_for
from microtome.images.image import Header, Limits, decoding
from microtome.images.itk import LPS_TO_RAS
from microtome.images.parts import bounds, cut_off, limits_of_parts
from microtome.images.volume import Volume

# What is read of a header; pixels and the thousand other elements are left where they are.
_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "NumberOfFrames", "Rows", "Columns"),
    *("SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_SAME_DIRECTION, _SAME_PLACE_MM = 1e-4, 1e-3  # the first of cosines
_MOST_UNEVEN = 0.01  # of the distance of slices
_MOST_LISTED = 8
_BITS = (8, 16, 32)


class _Look(NamedTuple):
    """What all slices of a volume have in common."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str

    def __str__(self) -> str:
        sign = "signed" if self.signed else "unsigned"
        return f"{self.rows}×{self.columns} {self.photometric}, {self.bits_stored} of {self.bits_allocated} bits {sign}"


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """A frame of a file, and where it is.

    Attributes:
        position: of the centre of its first pixel, mm to the left, to the back, upwards (3,); None of a picture.
        orientation: direction cosines of rows and of columns (2, 3); with a position always.
        spacing: distance of rows, and of columns, in mm; None if it does not say.
        thickness: in mm, or None.
    """

    path: Path
    frame: int
    deflated: bool
    series: str
    description: str
    look: _Look
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float


def open_dicom(path: Path, limits: Limits) -> Volume:
    """The volume (C, Z, Y, X) of a series of slices, or a picture (C, Y, X) without a place.

    Slices are ordered by their positions along the normal of their planes, and the positions alone give the distance of
    slices. Values are those that the rescaling gives: float32, or integers where it only adds an integer. MONOCHROME1,
    whose low values are bright, is turned round. Colours are three channels.

    Args:
        path: a folder with one series (segmentations and files without pixels aside), one file of a series, whose other files
            are looked for in its folder, a file of many frames, or a segmentation, which gives a label map of the values that
            `write_seg` was given, else of the numbers of segments. A segmentation has the planes that are in its file.
        limits: of sides and channels, and of the values of one slice; a segmentation is decoded as a whole.

    Raises:
        DataError: damaged, cut off, several series, slices that are missing, double, or of several sizes or directions,
            frames without positions, a compression that cannot be unpacked here, or segments that overlap.
    """
    header = _header(path) if path.is_file() else None
    if header is not None and header.get("SOPClassUID") == SEGMENTATION:
        return open_segmentation(path, limits)
    slices = _slices_of(path, header)
    if slices is None:
        only = next(file for file in dicom_files(path) if _header(file).get("SOPClassUID") == SEGMENTATION)
        return open_segmentation(only, limits)
    _check_alike(slices)
    slices = _sorted(path, slices)
    look, dtype = slices[0].look, _type(slices)
    flat = slices[0].position is None
    affine, known = _affine(slices)
    header = Header(
        shape_vox=(look.rows, look.columns) if flat else (len(slices), look.rows, look.columns),
        channels=look.samples,
        dtype=dtype.name,
        spacing_mm=spacing_of(affine),
        spacing_known=known,
        format="dicom",
    )
    limits_of_parts(limits).check(slices[0].path, header)
    return Volume(
        pixels=_Series(slices, header.shape_vox, dtype),
        spacing_mm=header.spacing_mm,
        affine=affine,
        axes="CYX" if flat else "CZYX",
        path=path,
        format="dicom",
        chunk_vox=header.shape_vox if flat else (1, *header.shape_vox[1:]),
        spacing_known=known,
        extra={"source": [one.path for one in slices], "frames": [one.frame for one in slices]},
    )


class _Series:
    """Pixels of slices in their order."""

    def __init__(self, slices: Sequence[_Slice], shape_vox: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = (slices[0].look.samples, *shape_vox), dtype
        self._slices = slices

    def __getitem__(self, part: Any) -> np.ndarray:
        limits = bounds(part, self.shape)
        out = np.empty([high - low for low, high in limits], self.dtype)
        (c0, c1), (y0, y1), (x0, x1) = limits[0], *limits[-2:]
        planes = out if out.ndim == 4 else out[:, None]
        first, past = limits[1] if out.ndim == 4 else (0, 1)
        for number, one in enumerate(self._slices[first:past] if out.size else ()):
            planes[:, number] = _values(one, self.dtype)[c0:c1, y0:y1, x0:x1]
        return out


def _header(path: Path) -> Any:
    """The elements that count; `pixels_at` is where those that were not read begin."""
    with decoding(path, "DICOM"), DicomFile(path) as file:
        header = pydicom_for(path).dcmread(file, stop_before_pixels=True, specific_tags=tags_of(_TAGS))
        header.pixels_at = file.tell()
        # Elements are parsed when they are looked at; those of a segmentation by its own reader.
        if header.get("SOPClassUID") != SEGMENTATION:
            list(header)
        return header


def _slices_of(path: Path, header: Any) -> list[_Slice] | None:
    """The slices of the one series that a path means, in any order; None of a folder with nothing but one segmentation.

    `header` is the file's, None of a folder.

    Raises:
        DataError: several series, or none.
    """
    if header is not None:
        own = list(_read_slices(path, header))
        if not own:
            raise DataError(
                path, expected="an image", got=f"{header.get('Modality')} without pixels", do="give a file of images", code="D017"
            )
        if len(own) != 1 or own[0].position is None or not own[0].series:
            return own
        others = (one for file in dicom_files(path.parent) if file != path for one in _read_slices(file, _header(file)))
        return own + [one for one in others if one.series == own[0].series]
    headers = [(file, _header(file)) for file in dicom_files(path)]
    segmentations = [file for file, header in headers if header.get("SOPClassUID") == SEGMENTATION]
    slices = [one for file, header in headers if file not in segmentations for one in _read_slices(file, header)]
    if not slices and len(segmentations) == 1:
        return None
    series: dict[str, list[_Slice]] = {}
    for one in slices:
        series.setdefault(one.series, []).append(one)
    if len(series) != 1:
        listed = [f"{name} ({found[0].description or 'no description'}, {len(found)} slices)" for name, found in series.items()]
        more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
        got = f"{len(listed)}: {'; '.join(listed[:_MOST_LISTED])}{more}" if listed else f"none in {len(headers)} DICOM files"
        do = "give one file of the series that is meant, or move each into a folder of its own"
        raise DataError(path, expected="one series of images", got=got, do=do, code="D015")
    return slices


def _read_slices(path: Path, header: Any) -> Iterator[_Slice]:
    """The frames of a file; none of a file without pixels or of a segmentation."""
    if "Rows" not in header or header.get("SOPClassUID") == SEGMENTATION:
        return
    with decoding(path, "DICOM"):
        count = int(header.get("NumberOfFrames") or 1)
        look = _look(path, header)
        _check_file(path, header, look, count)
        frames = list(header.get("PerFrameFunctionalGroupsSequence", [None]))
        if len(frames) != count:
            got = f"{count} frames and {len(frames) if frames[0] else 'no'} positions"
            raise DataError(
                path, expected="a position for each frame", got=got, do="export each frame or time point as a file", code="D017"
            )
        shared = next(iter(header.get("SharedFunctionalGroupsSequence", [])), None)
        for number, frame in enumerate(frames):
            yield _slice(path, number, header, look, [group for group in (frame, shared) if group is not None])


def _slice(path: Path, number: int, header: Any, look: _Look, groups: list[Any]) -> _Slice:
    """One frame; what the groups of a file of many frames say goes before what the file says."""

    def find(sequence: str, name: str) -> Any:
        places = [group[sequence].value[0] for group in groups if sequence in group]
        return next((place[name].value for place in places if name in place), header.get(name))

    position, orientation = (find(f"Plane{word}Sequence", f"Image{word}Patient") for word in ("Position", "Orientation"))
    placed = bool(position) and bool(orientation)
    spacing = find("PixelMeasuresSequence", "PixelSpacing") or header.get("ImagerPixelSpacing")
    thickness, slope = find("PixelMeasuresSequence", "SliceThickness"), find("PixelValueTransformationSequence", "RescaleSlope")
    intercept = find("PixelValueTransformationSequence", "RescaleIntercept") or 0
    numbers = [*(spacing or ()), *(position if placed else ()), *(orientation if placed else ()), slope or 0, intercept]
    if not np.isfinite(np.array(numbers, float)).all() or any(float(size) <= 0 for size in spacing or ()):
        raise DataError(path, expected="finite places and rescaling, sizes above 0", got=f"{numbers}", do="export it again", code="D010")
    return _Slice(
        path=path,
        frame=number,
        deflated=header.file_meta.TransferSyntaxUID.is_deflated,
        series=str(header.get("SeriesInstanceUID", "")),
        description=str(header.get("SeriesDescription", "")),
        look=look,
        position=np.array(position, float).reshape(3) if placed else None,
        orientation=np.array(orientation, float).reshape(2, 3) if placed else None,
        spacing=(float(spacing[0]), float(spacing[1])) if spacing else None,
        thickness=None if thickness in (None, "") else float(thickness),
        slope=1.0 if slope is None else float(slope),
        intercept=float(intercept),
    )


def _look(path: Path, header: Any) -> _Look:
    """Size and type of the pixels of a file.

    Raises:
        DataError: neither grey values nor colours.
    """
    photometric, samples, bits = str(header.PhotometricInterpretation), int(header.get("SamplesPerPixel", 1)), int(header.BitsAllocated)
    stored = int(header.get("BitsStored", bits))
    grey, colour = photometric in _GREY and samples == 1, photometric in _COLOURS and samples == 3
    if not (grey or colour) or bits not in _BITS or not 0 < stored <= bits:
        got = f"{photometric} with {samples} samples of {str(stored)[:20]} of {bits} bits"
        raise DataError(path, expected="grey values or RGB colours", got=got, do="export it as MONOCHROME2 or RGB", code="D017")
    if "ModalityLUTSequence" in header:
        warnings.warn(f"{path}: its look-up table of values (Modality LUT) is not applied", DataWarning, stacklevel=6)
    return _Look(
        rows=int(header.Rows),
        columns=int(header.Columns),
        samples=samples,
        bits_allocated=bits,
        bits_stored=stored,
        signed=bool(header.get("PixelRepresentation", 0)),
        photometric="RGB" if colour else photometric,
    )


def _check_file(path: Path, header: Any, look: _Look, frames: int) -> None:
    """Refuse a file that is shorter than its pixels, or packed in a way that cannot be unpacked here."""
    from pydicom.pixels.decoders.base import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_compressed and not syntax.is_deflated:
        # Two of three colours may be stored for every second pixel only.
        samples = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else look.samples
        wanted = header.pixels_at + look.rows * look.columns * samples * look.bits_allocated // 8 * frames
        if (size := path.stat().st_size) < wanted:
            raise cut_off(path, wanted, size)
    elif syntax.is_compressed and not get_decoder(syntax).is_available:
        do = 'run: pip install "microtome[medical]" python-gdcm, or export it without compression'
        raise DataError(path, expected=f"a decoder of {syntax.name}", got=f"none is installed ({syntax})", do=do, code="D014")


def _check_alike(slices: Sequence[_Slice]) -> None:
    """Refuse slices that are not of one size, type, direction and distance of pixels.

    Raises:
        DataError: names the first and the one that differs.
    """
    first = slices[0]
    for one in slices[1:]:
        if one.look != first.look:
            raise _unlike(first, one, str(first.look), str(one.look))
        if one.orientation is None or first.orientation is None:
            raise _unlike(first, one, "a position", "none: these are pictures, or time points")
        if np.abs(one.orientation - first.orientation).max() > _SAME_DIRECTION:
            raise _unlike(first, one, f"directions {first.orientation.round(4).tolist()}", str(one.orientation.round(4).tolist()))
        if one.spacing != first.spacing and not np.allclose(one.spacing or (0, 0), first.spacing or (0, 0), rtol=_SAME_DIRECTION):
            raise _unlike(first, one, f"pixels of {first.spacing} mm", str(one.spacing))


def _unlike(first: _Slice, one: _Slice, expected: str, got: str) -> DataError:
    do = "take it out of the folder, or export it as a series of its own"
    return DataError(one.path, expected=f"{expected}, as {first.path.name}", got=got, do=do, code="D015")


def _sorted(path: Path, slices: list[_Slice]) -> list[_Slice]:
    """The slices along the normal of their planes.

    Raises:
        DataError: two are at one place, or they are not at equal distances; names the files.
    """
    if len(slices) == 1:
        return slices
    normal = _normal(slices[0])
    slices = sorted(slices, key=lambda one: (float(_at(one) @ normal), one.path.name, one.frame))
    steps = np.diff([_at(one) for one in slices], axis=0)
    nearest = int((gaps_mm := steps @ normal).argmin())
    if gaps_mm[nearest] <= _SAME_PLACE_MM:
        got = f"{slices[nearest].path.name} and {slices[nearest + 1].path.name} both at {_at(slices[nearest]).tolist()}"
        do = "keep one time point or echo in the folder, and each slice once"
        raise DataError(path, expected="one slice at each position", got=got, do=do, code="D016")
    usual = np.median(steps, axis=0)
    off = np.linalg.norm(steps - usual, axis=1)
    worst = int(off.argmax())
    if off[worst] > _MOST_UNEVEN * float(usual @ normal):
        names = f"{slices[worst].path.name} and {slices[worst + 1].path.name}"
        expected, got = f"slices {usual @ normal:.5g} mm apart", f"{gaps_mm[worst]:.5g} mm between {names}"
        raise DataError(path, expected=expected, got=got, do="find the slices that are missing, or resample the series", code="D016")
    return slices


def _at(one: _Slice) -> np.ndarray:
    assert one.position is not None, "checked before"
    return one.position


def _normal(one: _Slice) -> np.ndarray:
    """Of the plane of a slice, of length 1."""
    assert one.orientation is not None, "with a position always"
    normal = np.cross(*one.orientation)
    return np.asarray(normal / np.linalg.norm(normal))


def _affine(slices: Sequence[_Slice]) -> tuple[np.ndarray, bool]:
    """(z, y, x) -> mm to the right, to the front, upwards, of sorted slices; and whether the voxel size is known.

    Of a picture without a position: its axes and pixels alone. One slice is as thick as it says, or 1 mm.

    Raises:
        DataError: the axes span no volume.
    """
    first, spacing = slices[0], slices[0].spacing or (1.0, 1.0)
    if first.position is None or first.orientation is None:
        return affine_from_spacing(spacing), first.spacing is not None
    affine, thickness = np.eye(4), 1.0 if first.thickness is None else first.thickness
    if len(slices) == 1 and not 0 < thickness < math.inf:
        warnings.warn(f"{first.path}: its thickness of {thickness:g} mm cannot be; 1 mm is assumed", DataWarning, stacklevel=5)
        thickness = 1.0
    one_step = _normal(first) * thickness
    affine[:3, 0] = one_step if len(slices) == 1 else (_at(slices[-1]) - first.position) / (len(slices) - 1)
    affine[:3, 1], affine[:3, 2] = first.orientation[1] * spacing[0], first.orientation[0] * spacing[1]
    affine[:3, 3] = first.position
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise DataError(
            first.path, expected="rows and columns at an angle", got=f"{first.orientation.tolist()}", do="export it again", code="D010"
        )
    return LPS_TO_RAS @ affine, first.spacing is not None


def _stored_range(look: _Look) -> tuple[int, int]:
    """The smallest and the largest value that pixels may have."""
    return (-(2 ** (look.bits_stored - 1)), 2 ** (look.bits_stored - 1) - 1) if look.signed else (0, 2**look.bits_stored - 1)


def _type(slices: Sequence[_Slice]) -> np.dtype[Any]:
    """Of the values after rescaling: as stored, integers that hold them if integers are added, or float32."""
    look, added = slices[0].look, [one.intercept for one in slices]
    if any(one.slope != 1 or one.intercept != math.floor(one.intercept) for one in slices):
        return np.dtype(np.float32)
    if not any(added):
        return np.dtype(f"{'i' if look.signed else 'u'}{look.bits_allocated // 8}")
    low, high = _stored_range(look)
    types = (kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= low + min(added) and high + max(added) <= np.iinfo(kind).max)
    return np.dtype(next(types, np.float32))


def _values(one: _Slice, dtype: np.dtype[Any]) -> np.ndarray:
    """A slice decoded and rescaled, (samples, Y, X)."""
    with decoding(one.path, "DICOM"):
        stored = pixels_of(one.path, one.frame, deflated=one.deflated)
    if stored.shape[:2] != one.look[:2]:
        raise DataError(one.path, expected=f"pixels {one.look}", got=f"{stored.shape}", do="export it again", code="D017")
    if one.look.photometric == "MONOCHROME1":
        # All bits of a number turned round are the distance from the other end of its range.
        stored = (sum(_stored_range(one.look)) - stored.astype(np.int64)).astype(stored.dtype)
    if (one.slope, one.intercept) != (1.0, 0.0):
        stored = stored * one.slope + one.intercept
    plane = stored.astype(dtype, copy=False)
    return plane[None] if one.look.samples == 1 else np.moveaxis(plane, -1, 0)
