"""Planes of a DICOM segmentation: where its frames lie, and which segment each voxel of them is of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import DataError
from microtome.geometry import Shape

# A segment that is written here has the value of the label map as its code in this scheme.
SCHEME = "99MICROTOME"
# Of segments, which have 16 bits.
_PAST_NUMBERS = 2**16


@dataclass(frozen=True, kw_only=True)
class Planes:
    """Planes of a segmentation that are not decoded yet.

    Attributes:
        shape_vox: (Z, Y, X).
        affine: (4, 4) from their indices to mm, in the directions of DICOM.
        decode: gives the number of the segment at each voxel, uint16 (Z, Y, X); 0 where none is.
    """

    shape_vox: Shape
    affine: np.ndarray
    decode: Callable[[], np.ndarray]


@cache
def tags_of(names: tuple[str, ...]) -> list[Any]:
    """The numbers of elements, which take longer to look up by name than to read."""
    from pydicom.tag import Tag

    return [Tag(name) for name in names]


def planes_of(highdicom: Any, path: Path, whole: Any) -> Planes:
    """The planes of a segmentation, whose frames may come in any order.

    Args:
        highdicom: the library.
        path: of the file, for messages.
        whole: all that it holds, which is changed where it is of a slide.

    Raises:
        DataError: frames without a place, or planes that are not at equal distances.
    """
    return _tiled(highdicom, path, whole) if "TotalPixelMatrixRows" in whole else _stacked(highdicom, path, whole)


def _stacked(highdicom: Any, path: Path, whole: Any) -> Planes:
    """The planes that the frames of a segmentation lie in, in any order.

    Raises:
        DataError: frames without a place, or planes that are not at equal distances.
    """
    groups, shared = list(whole.PerFrameFunctionalGroupsSequence), next(iter(whole.get("SharedFunctionalGroupsSequence", ())), None)
    if len(groups) != whole.NumberOfFrames:
        got = f"{whole.NumberOfFrames} frames and {len(groups)} positions"
        raise DataError(path, expected="a position for each frame", got=got, do="export it again", code="D017")
    positions = _of_frames(groups, shared, "PlanePositionSequence", "ImagePositionPatient")
    numbers = _of_frames(groups, shared, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
    directions = _of_all(path, _of_frames(groups, shared, "PlaneOrientationSequence", "ImageOrientationPatient"))
    sides = _of_all(path, _of_frames(groups, shared, "PixelMeasuresSequence", "PixelSpacing"))
    apart = _of_frames(groups, shared, "PixelMeasuresSequence", "SpacingBetweenSlices", missing=None)[0]
    # Positions count, where they belie the distance that is said.
    for said in (apart, None) if apart else (None,):
        distance, places = highdicom.spatial.get_volume_positions(positions, directions, allow_duplicate_positions=True, spacing_hint=said)
        if places is not None:
            break
    if places is None:
        got = f"positions {positions[:4]}"
        raise DataError(path, expected="planes at equal distances", got=got, do="export it with its series", code="D018")
    place = highdicom.VolumeGeometry.from_attributes(
        image_position=positions[places.index(0)],
        image_orientation=directions,
        rows=int(whole.Rows),
        columns=int(whole.Columns),
        pixel_spacing=sides,
        number_of_frames=max(places) + 1,
        spacing_between_slices=distance,
        coordinate_system="PATIENT",
    )
    shape = tuple(map(int, place.spatial_shape))
    return Planes(shape_vox=shape, affine=np.asarray(place.affine), decode=lambda: _decoded(path, whole, shape, places, numbers))


def _of_frames(groups: Sequence[Any], shared: Any, sequence: str, name: str, **missing: Any) -> list[Any]:
    """A value of each frame: the one of all, else its own.

    Raises:
        KeyError: it is not there, and nothing is said to be in its place.
    """
    outer, inner = tags_of((sequence, name))
    of_all = [_plain(shared[outer].value[0], inner, **missing)] * len(groups) if shared is not None and outer in shared else None
    return of_all or [_plain(group[outer].value[0], inner, **missing) for group in groups]


def _plain(item: Any, tag: Any, **missing: Any) -> Any:
    """A value, or several, as numbers."""
    value = missing["missing"] if missing and tag not in item else item[tag].value
    return value if value is None or isinstance(value, int) else float(value) if isinstance(value, float) else [float(one) for one in value]


def _of_all(path: Path, values: Sequence[Any]) -> Any:
    """The value that all frames have.

    Raises:
        DataError: they have several.
    """
    if any(value != values[0] for value in values):
        got = f"{values[0]} and others"
        raise DataError(path, expected="one direction and size of all planes", got=got, do="export it with its series", code="D018")
    return values[0]


def _decoded(path: Path, whole: Any, shape: Shape, places: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    """The number of the segment at each voxel, frame by frame.

    Raises:
        DataError: segments that overlap, or fractions.
    """
    labels = np.zeros(shape, np.uint16)
    known = {int(one.SegmentNumber) for one in whole.SegmentSequence}
    full = 1 if whole.SegmentationType == "BINARY" else int(whole.MaximumFractionalValue)
    for place, number, frame in zip(places, numbers, _frames(whole), strict=True):
        drawn, plane = frame == full, labels[place]
        if number not in known:
            raise ValueError(f"a frame of segment {number}, which it does not describe")
        if np.count_nonzero(frame) != np.count_nonzero(drawn):
            got = f"fractions from {frame.min()} to {frame.max()} of {full}"
            raise DataError(path, expected="whole voxels", got=got, do="export it as a binary segmentation", code="D018")
        if plane[drawn].any():
            got = f"segment {number} over another"
            raise DataError(path, expected="segments that do not overlap", got=got, do="export each as a file", code="D018")
        plane[drawn] = number
    return labels


def _frames(whole: Any) -> Iterator[np.ndarray]:
    """The frames (Y, X) of a segmentation; those of bits follow each other without a gap, which pydicom alone has for all at once."""
    from pydicom.pixels.utils import iter_pixels

    syntax = whole.file_meta.TransferSyntaxUID
    if whole.BitsAllocated != 1 or syntax.is_compressed or not syntax.is_little_endian:
        yield from iter_pixels(whole, raw=True)
        return
    rows, columns, count = int(whole.Rows), int(whole.Columns), int(whole.NumberOfFrames)
    packed, size = np.frombuffer(whole.PixelData, np.uint8), rows * columns
    if 8 * len(packed) < count * size:
        raise ValueError(f"{len(packed)} bytes for {count} frames of {size} bits")
    for first in range(0, count * size, size):
        bits = np.unpackbits(packed[first // 8 : -(-(first + size) // 8)], bitorder="little")
        yield bits[first % 8 :][:size].reshape(rows, columns)


def _tiled(highdicom: Any, path: Path, whole: Any) -> Planes:
    """The one plane of a slide that tiles make up, as the library has it.

    Raises:
        DataError: it has no place.
    """
    segments = highdicom.seg.Segmentation.from_dataset(whole, copy=False)
    place = segments.get_volume_geometry()
    if place is None:
        got = f"{whole.NumberOfFrames} frames without a place"
        raise DataError(path, expected="tiles in a plane", got=got, do="export it with its slide", code="D018")

    def decode() -> np.ndarray:
        try:
            return np.asarray(segments.get_volume(combine_segments=True, dtype=np.uint16).array)
        except RuntimeError as error:
            got = str(error).splitlines()[0]
            raise DataError(path, expected="segments that do not overlap", got=got, do="export each as a file", code="D018") from error

    return Planes(shape_vox=tuple(map(int, place.spatial_shape)), affine=np.asarray(place.affine), decode=decode)


def values_of(segments: Sequence[Any]) -> tuple[np.ndarray, dict[int, str]]:
    """The value in the label map of each number of a segment, 0 first; and the names of values."""
    values, names = np.zeros(_PAST_NUMBERS, np.uint16), {}
    for segment in segments:
        number, code = int(segment.SegmentNumber), segment.SegmentedPropertyTypeCodeSequence[0]
        if not 0 < number < _PAST_NUMBERS:
            raise ValueError(f"a segment of number {number}")
        values[number] = int(code.CodeValue) if code.get("CodingSchemeDesignator") == SCHEME else number
        names[int(values[number])] = str(segment.SegmentLabel)
    return values, names
