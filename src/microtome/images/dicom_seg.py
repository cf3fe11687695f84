"""DICOM segmentation objects <-> label map, written by highdicom with references to the slices that were labelled."""

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import DataError, missing_extra
from microtome.files import atomic_path
from microtome.geometry import format_shape, spacing_of
from microtome.images.dicom_planes import SCHEME, planes_of, values_of
from microtome.images.image import Header, Image, Limits, decoding
from microtome.images.itk import LPS_TO_RAS
from microtome.images.parts import BoundedFile
from microtome.images.volume import Volume, volume_of

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_MOST_SEGMENTS = 255
# Files of a folder that tell whether they are slices of one series.
_MOST_LOOKED_AT = 16
# What a deflated data set may become whatever its size, or for each of its bytes; and what is inflated at once.
_UNSUSPECTED_BYTES, _MOST_GROWTH, _PIECE_BYTES = Limits().unsuspected_bytes, 50, 2**20


def pydicom_for(path: Path) -> Any:
    """The library, which few need."""
    try:
        import pydicom
    except ImportError:
        raise missing_extra(str(path), "pydicom", "medical") from None
    return pydicom


def read_dicom(path: Path, **options: Any) -> Any:
    """What a file holds; `options` are those of `pydicom.dcmread`."""
    dcmread = pydicom_for(path).dcmread
    with DicomFile(path) as file:
        return dcmread(file, **options)


def pixels_of(path: Path, frame: int, *, deflated: bool) -> np.ndarray:
    """A frame (Y, X) or (Y, X, samples) as it is stored; of a deflated file, of which pydicom finds no single frame, from all of it."""
    from pydicom.pixels.utils import pixel_array

    if deflated:
        return np.asarray(pixel_array(read_dicom(path), index=frame))
    with DicomFile(path) as file:
        return np.asarray(pixel_array(file, index=frame))


class DicomFile(BoundedFile):
    """A file for pydicom, which asks for all that is left only where that is deflated, and inflates it whatever becomes of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file.

        Raises:
            DataError: what is left becomes more than any image of it would.
        """
        found = super().read(size)
        if size is None or size < 0:
            _check_inflated(self._path, found)
        return found


def _check_inflated(path: Path, packed: bytes) -> None:
    """Inflate a piece at a time, keeping none; what cannot be inflated is left to whoever reads it."""
    most, done, unpacker = max(_UNSUSPECTED_BYTES, _MOST_GROWTH * len(packed)), 0, zlib.decompressobj(-zlib.MAX_WBITS)
    with suppress(zlib.error):
        while packed and not unpacker.eof:
            done += len(unpacker.decompress(packed, _PIECE_BYTES))
            packed = unpacker.unconsumed_tail
            if done > most:
                expected = f"a deflated data set of at most {most} bytes"
                raise DataError(path, expected=expected, got="one that becomes more", do="export it without compression", code="D003")


def dicom_files(folder: Path) -> Iterator[Path]:
    """The DICOM files of a folder, by name."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            with path.open("rb") as file:
                found = file.read(132)[128:] == b"DICM"
            if found:
                yield path


def are_separate(folder: Path) -> bool:
    """Whether the DICOM files of a folder are an image or a segmentation each, and no series: as the first of them tell.

    They are where there are segmentations alone, or several images and no two of one series. What cannot be read is passed over.

    Raises:
        ConfigError: pydicom is not installed.
    """
    series, segmentations = list[str](), 0
    for number, path in enumerate(islice(dicom_files(folder), _MOST_LOOKED_AT)):
        with suppress(DataError), decoding(path, "DICOM"):
            tags = ["SOPClassUID", "SeriesInstanceUID", "Rows"]
            header = read_dicom(path, stop_before_pixels=True, specific_tags=tags)
            own = str(header.get("SeriesInstanceUID", number))
            if header.get("SOPClassUID") == SEGMENTATION:
                segmentations += 1
            elif own in series:
                return False
            elif "Rows" in header:
                series.append(own)
    return len(series) > 1 or (not series and segmentations > 0)


def open_segmentation(path: Path, limits: Limits) -> Volume:
    """The label map (1, Z, Y, X) of a segmentation, decoded now; `extra["classes"]` holds the names of its values.

    Values are those that `write_seg` was given; of a segmentation of another program the numbers of its segments.

    Raises:
        DataError: damaged, segments that overlap, fractions, no place in a patient, or beyond `limits`.
    """
    highdicom = _highdicom(path)
    with decoding(path, "DICOM"):
        whole = read_dicom(path)
        planes = planes_of(highdicom, path, whole)
        affine = LPS_TO_RAS @ planes.affine
        if not all(0 < side < math.inf for side in spacing_of(affine)):
            got = f"{spacing_of(affine)} mm"
            raise DataError(path, expected="finite voxel sizes above 0", got=got, do="export it again", code="D010")
        header = Header(
            shape_vox=planes.shape_vox,
            channels=1,
            dtype="uint16",
            spacing_mm=spacing_of(affine),
            spacing_known=True,
            format="dicom",
        )
        limits.check(path, header)
        values, names = values_of(whole.SegmentSequence)
        labels = values[planes.decode()]
    # As series are: along the normal of rows and columns, which have the opposite order in an affine of z, y, x.
    if np.linalg.det(affine[:3, :3]) > 0:
        labels, affine = labels[::-1], affine @ _turned(len(labels))
    image = Image(
        array=np.ascontiguousarray(labels)[None],
        spacing_mm=spacing_of(affine),
        affine=affine,
        axes="CZYX",
        path=path,
        format="dicom",
        extra={"classes": names},
    )
    return volume_of(image)


# Of patient and study, which a file must have and may leave empty; anonymisers take them out.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)


def _fill_required(source: Any) -> None:
    """Give a source's header the elements that a segmentation takes over from it, empty where they are missing."""
    for name in _MAY_BE_EMPTY:
        if name not in source:
            setattr(source, name, "")


def write_seg(path: Path, image: Image) -> None:
    """Write a label map (1, Z, Y, X) as a segmentation of one binary segment for each value above 0, in one step.

    Args:
        path: of the file.
        image: of integers from 0. `extra["source"]` are the files of its slices in their order, as `open_dicom` gives them,
            with `extra["frames"]` where they are of one file; `extra["classes"]`, optional, names values; all that it
            names are segments, be there voxels of them or not.

    Raises:
        DataError: other values, more than 255 of them, or an image that is no series.
    """
    highdicom = _highdicom(path)
    files, frames = [Path(file) for file in image.extra.get("source", ())], list(image.extra.get("frames", ()))
    if image.array.ndim != 4 or image.channels != 1 or len(files) != len(image.array[0]):
        got = f"{image.channels} channels of {format_shape(image.shape_vox)} from {len(files)} slices"
        raise DataError(path, expected="a label map of a DICOM series", got=got, do="write .nii.gz, .tif or .png instead", code="D019")
    names = _named(path, image)
    order = np.argsort(frames, kind="stable") if frames and len(set(files)) == 1 else np.arange(len(files))
    labels = image.array[0][order]
    numbers = np.where(labels > 0, np.searchsorted(list(names), labels) + 1, 0).astype(np.uint8)
    with decoding(files[0], "DICOM"), warnings.catch_warnings():
        # Of names of patients that have one part, and the like.
        warnings.simplefilter("ignore", UserWarning)
        sources = [read_dicom(file, stop_before_pixels=True) for file in dict.fromkeys(files)]
        _set_spacing(sources, image)
        for source in sources:
            _fill_required(source)
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=numbers,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(highdicom, number, *one) for number, one in enumerate(names.items(), start=1)],
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="microtome",
            manufacturer_model_name="microtome",
            software_versions=version("microtome"),
            device_serial_number="0",
            # All planes of the series, so that the label map that is read has its shape.
            omit_empty_frames=False,
        )
    with atomic_path(path) as part:
        segmentation.save_as(part)


def _highdicom(path: Path) -> Any:
    """The library, which few need."""
    try:
        import highdicom
    except ImportError:
        raise missing_extra(str(path), "highdicom", "medical") from None
    return highdicom


def _named(path: Path, image: Image) -> dict[int, str]:
    """Names of the values above 0, by value; the values that are there if the image names none.

    Raises:
        DataError: values that no segment can have.
    """
    array = image.array
    if array.dtype.kind not in "biu" or int(array.min(initial=0)) < 0:
        got = f"{array.dtype} from {array.min(initial=0)}"
        raise DataError(path, expected="whole numbers from 0", got=got, do="write .nii.gz instead", code="D019")
    given: Mapping[int, str] = image.extra.get("classes") or {}
    # No segmentation is without a segment.
    values = sorted({int(value) for value in (*np.unique(array), *given) if value > 0}) or [1]
    if len(values) > _MOST_SEGMENTS:
        got = f"{len(values)} of them"
        raise DataError(path, expected=f"at most {_MOST_SEGMENTS} segments", got=got, do="write .nii.gz instead", code="D019")
    return {value: str(given.get(value, f"label {value}")) for value in values}


def _segment(highdicom: Any, number: int, value: int, name: str) -> Any:
    """The description of a segment, with the value that it has in the label map."""
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="microtome", version=version("microtome"), family=codes.DCM.ArtificialIntelligence
    )
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=highdicom.sr.CodedConcept(str(value), SCHEME, name[:64]),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
    )


def _set_spacing(sources: Iterable[Any], image: Image) -> None:
    """Give headers in memory the distance of slices that they have: what files say of it may be anything, and is copied."""
    columns = image.affine[:3, :3]
    apart = float(abs(np.linalg.det(columns)) / np.linalg.norm(np.cross(columns[:, 1], columns[:, 2])))
    for source in sources:
        for place in list(_measures(source)) or [source]:
            place.SliceThickness = place.SpacingBetweenSlices = f"{apart:.10g}"


def _measures(plain: Any) -> Iterator[Any]:
    """Where a file of many frames says the distances of pixels and slices."""
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in plain.get(name, ()):
            yield from groups.get("PixelMeasuresSequence", ())


def _turned(sections: int) -> np.ndarray:
    """The affine of sections counted from the other end."""
    turned = np.diag([-1.0, 1.0, 1.0, 1.0])
    turned[0, 3] = sections - 1
    return turned
