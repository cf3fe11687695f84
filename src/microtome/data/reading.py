"""The files of one case -> one image: channels stacked, spacing as stated, sections cut, label on the image's grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from microtome.data.case import Case, Plane, Planes
from microtome.data.legend import Legend
from microtome.data.parts import check_fits, image_part
from microtome.data.planes import keep_planes
from microtome.errors import ConfigError, DataError
from microtome.geometry import Spacing, format_shape, format_sides, same_grid
from microtome.images.files import open_volume, probe_image, read_image
from microtome.images.image import Header, Image
from microtome.images.medical import PATIENT_FORMATS
from microtome.images.volume import Sections, Stacked, Volume, volume_of

# Formats whose parts are read without the rest, whatever the part.
PARTED = frozenset({"zarr", "n5", "precomputed", "hdf5", "npy"})

_Pictured = TypeVar("_Pictured", Image, Volume)


def read_case_image(case: Case) -> Image:
    """The image of a case as its files say, channels stacked, its sections only.

    Raises:
        DataError: as `stack_channels`.
    """
    return cut(stack_channels(case), case.sections)


def open_case(case: Case) -> Volume:
    """The image of a case, not read yet: channels stacked, its sections only.

    Raises:
        DataError: a file cannot be opened, or two of them are not on one grid.
    """
    volumes = [open_volume(path) for path in case.images]
    for other in volumes[1:]:
        _check_grid(case, volumes[0].header, other, "channels")
    volume = volumes[0]
    if len(volumes) > 1:
        volume = replace(volume, pixels=Stacked(tuple(each.pixels for each in volumes)))
    return cut_volume(volume, case.sections)


def stack_channels(case: Case) -> Image:
    """The image of a case, the channels of all its files one after the other.

    Raises:
        DataError: a file cannot be read, or two of them are not on one grid.
    """
    check_fits(*case.images)
    images = [read_image(path) for path in case.images]
    if len(images) == 1:
        return images[0]
    header = probe_image(case.images[0])
    for other in images[1:]:
        _check_grid(case, header, other, "channels")
    return replace(images[0], array=np.concatenate([image.array for image in images]))


def fit_channels(image: Image, channels: int) -> Image:
    """The image with this many channels: as it is, or grey as three equal ones.

    Raises:
        DataError: any other number.
    """
    if image.channels == channels:
        return image
    if image.channels == 1 and channels == 3:
        return replace(image, array=np.repeat(image.array, 3, axis=0))
    raise _channels_error(image, channels)


def fit_volume(volume: Volume, channels: int) -> Volume:
    """Like `fit_channels`, of what is not read yet."""
    if volume.channels == channels:
        return volume
    if volume.channels == 1 and channels == 3:
        return replace(volume, pixels=Stacked((volume.pixels,) * 3))
    raise _channels_error(volume, channels)


def _channels_error(image: Image | Volume, channels: int) -> DataError:
    """The error for another number of channels."""
    expected = f"{channels} channel{'s' if channels > 1 else ''}, as the other images have"
    return DataError(image.path, expected=expected, got=str(image.channels), do="export it like the others or leave it out", code="D036")


def with_spacing(image: _Pictured, spacing_mm: Spacing | None) -> _Pictured:
    """The image with another voxel size; origin and directions stay. None changes nothing.

    Raises:
        ConfigError: not as many sizes as the image has axes.
    """
    if spacing_mm is None:
        return image
    if len(spacing_mm) != len(image.shape_vox):
        got = f"spacing_mm {list(spacing_mm)}"
        expected = f"a size for each of the {len(image.shape_vox)} axes of {format_shape(image.shape_vox)}"
        raise ConfigError(image.path, expected=expected, got=got, do="mend `spacing_mm` in microtome.yaml", code="C019")
    factors: np.ndarray = np.asarray(spacing_mm) / np.asarray(image.spacing_mm)
    return replace(image, spacing_mm=spacing_mm, affine=image.affine @ np.diag([*factors, 1.0]), spacing_known=True)


def cut(image: Image, sections: tuple[int, int] | None) -> Image:
    """The part of an image from the first to before the second section of the slowest axis; None is all of it."""
    if sections is None:
        return image
    step = np.eye(len(image.affine))
    step[0, -1] = sections[0]
    array = image.array[:, sections[0] : sections[1]]
    return replace(image, array=array, affine=image.affine @ step, extra=_extra_of_part(image.extra))


def cut_volume(volume: Volume, sections: tuple[int, int] | None) -> Volume:
    """Like `cut`, of what is not read yet."""
    if sections is None:
        return volume
    step = np.eye(len(volume.affine))
    step[0, -1] = sections[0]
    pixels = Sections(volume.pixels, *sections)
    return replace(volume, pixels=pixels, affine=volume.affine @ step, extra=_extra_of_part(volume.extra))


def _extra_of_part(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a writer needs of some sections: not the slices of a DICOM series, all of which a segmentation refers to."""
    return {name: value for name, value in extra.items() if name not in ("source", "frames")}


@dataclass(frozen=True)
class LabelParts:
    """The label of a case that is not read yet: classes (*S) int16 of the parts that are asked for, NOT_ANNOTATED elsewhere.

    Attributes:
        volume: one channel of the file's values, of the case's sections only.
        legend: which value is which class.
        case: of which the planes count, where not all do.
    """

    volume: Volume
    legend: Legend
    case: Case

    @property
    def shape(self) -> tuple[int, ...]:
        """S."""
        return self.volume.shape_vox

    @property
    def dtype(self) -> np.dtype[np.int16]:
        """That of label maps."""
        return np.dtype(np.int16)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        """A part, of as many slices of step 1 as S has axes."""
        labels = self.legend.decode(image_part(self.volume, part))
        if self.case.planes is None:
            return labels
        starts = [side.indices(size)[0] for side, size in zip(part, self.shape, strict=True)]
        starts[0] += self.case.sections[0] if self.case.sections else 0
        planes = Planes(shown=_moved(self.case.planes.shown, starts), hidden=_moved(self.case.planes.hidden, starts))
        return keep_planes(labels, replace(self.case, sections=None, planes=planes))


def open_label_parts(case: Case, legend: Legend) -> LabelParts:
    """The label of a case that has one label file of one channel, not read yet.

    Raises:
        DataError: it cannot be opened, or does not lie on the image's grid.
    """
    volume, image = open_volume(case.labels[0]), probe_image(case.images[0])
    if volume.format == "dicom":
        # A segmentation, which is in memory already.
        volume = volume_of(_with_empty_planes(volume.load(), image))
    _check_grid(case, image, volume, "image and label")
    return LabelParts(cut_volume(volume, case.sections), legend, case)


def _moved(planes: Sequence[Plane], starts: Sequence[int]) -> tuple[Plane, ...]:
    """Planes as they are counted in a part that begins there; those outside of it have no place in it."""
    return tuple((axis, index - starts[axis]) for axis, index in planes)


def checked_label(case: Case, label: Image) -> Image:
    """The label of a case, if it lies on the grid of the case's image; planes that a DICOM segmentation leaves out are empty.

    Raises:
        DataError: another shape, or in files with a patient's millimetres another place in the world; names both files.
    """
    image = probe_image(case.images[0])
    label = _with_empty_planes(label, image)
    _check_grid(case, image, label, "image and label")
    return label


def _with_empty_planes(label: Image, image: Header) -> Image:
    """A segmentation of some sections of a series on the grid of all of them; every other label as it is."""
    if label.format != "dicom" or image.format not in PATIENT_FORMATS or label.shape_vox[1:] != image.shape_vox[1:]:
        return label
    affine = np.asarray(image.affine)
    if affine.shape != label.affine.shape or label.shape_vox[0] >= image.shape_vox[0]:
        return label
    first = round(float(np.linalg.solve(affine, label.affine)[0, -1]))
    step = np.eye(len(affine))
    step[0, -1] = first
    past = first + label.shape_vox[0]
    if not 0 <= first <= past <= image.shape_vox[0] or not same_grid(affine @ step, label.affine, label.shape_vox):
        return label
    array = np.zeros((label.channels, *image.shape_vox), label.array.dtype)
    array[:, first:past] = label.array
    return replace(label, array=array, affine=affine)


def _check_grid(case: Case, image: Header, other: Image | Volume, what: str) -> None:
    """Compare shape and, where both are of formats with a patient's millimetres, place with those of the case's first image."""
    name = str(case.images[0])
    placed = image.affine is not None and {image.format, other.format} <= PATIENT_FORMATS
    if image.shape_vox != other.shape_vox:
        raise _shape_error(case, image.shape_vox, other)
    if placed and image.affine is not None and not same_grid(image.affine, other.affine, image.shape_vox):
        raise DataError(
            case.name,
            expected=f"{what} in the same place ({name}, origin {_origin(image.affine)}, spacing {format_sides(image.spacing_mm)})",
            got=f"{other.path} with origin {_origin(other.affine)}, spacing {format_sides(other.spacing_mm)}",
            do="resample the label to the image's grid, or copy its header if the voxels agree",
            code="D035",
        )


def _shape_error(case: Case, shape_vox: tuple[int, ...], other: Image | Volume) -> DataError:
    """Two shapes that should be one; both files are named with their folders, as they often have the same name."""
    turned = other.shape_vox == (*shape_vox[:-2], shape_vox[-1], shape_vox[-2])
    hint = "; it lies on its side (an EXIF orientation that one of the two lost?)" if turned else ""
    return DataError(
        case.name,
        expected=f"the shape of {case.images[0]}, {format_shape(shape_vox)}",
        got=f"{format_shape(other.shape_vox)} in {other.path}{hint}",
        do="export one of them again at the size of the other, or leave the case out",
        code="D034",
    )


def _origin(affine: np.ndarray) -> str:
    """Where voxel 0 lies, mm."""
    return "(" + ", ".join(f"{value:.4g}" for value in affine[:-1, -1]) + ")"
