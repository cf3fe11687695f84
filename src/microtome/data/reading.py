"""The files of one case -> one image: channels stacked, spacing as stated, sections cut, label on the image's grid."""

from dataclasses import replace

import numpy as np

from microtome.data.case import Case
from microtome.errors import ConfigError, DataError
from microtome.geometry import Spacing, format_shape, format_sides, same_grid
from microtome.images.files import probe_image, read_image
from microtome.images.image import Header, Image


def read_case_image(case: Case) -> Image:
    """The image of a case as its files say, channels stacked, its sections only.

    Raises:
        DataError: as `stack_channels`.
    """
    return cut(stack_channels(case), case.sections)


def stack_channels(case: Case) -> Image:
    """The image of a case, the channels of all its files one after the other.

    Raises:
        DataError: a file cannot be read, or two of them are not on one grid.
    """
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
    expected = f"{channels} channel{'s' if channels > 1 else ''}, as the other images have"
    raise DataError(image.path, expected=expected, got=str(image.channels), do="export it like the others or leave it out")


def with_spacing(image: Image, spacing_mm: Spacing | None) -> Image:
    """The image with another voxel size; origin and directions stay. None changes nothing.

    Raises:
        ConfigError: not as many sizes as the image has axes.
    """
    if spacing_mm is None:
        return image
    if len(spacing_mm) != len(image.shape_vox):
        got = f"spacing_mm {list(spacing_mm)}"
        expected = f"a size for each of the {len(image.shape_vox)} axes of {format_shape(image.shape_vox)}"
        raise ConfigError(image.path, expected=expected, got=got, do="mend `spacing_mm` in microtome.yaml")
    factors = np.asarray(spacing_mm) / np.asarray(image.spacing_mm)
    return replace(image, spacing_mm=spacing_mm, affine=image.affine @ np.diag([*factors, 1.0]), spacing_known=True)


def cut(image: Image, sections: tuple[int, int] | None) -> Image:
    """The part of an image from the first to before the second section of the slowest axis; None is all of it."""
    if sections is None:
        return image
    step = np.eye(len(image.affine))
    step[0, -1] = sections[0]
    return replace(image, array=image.array[:, sections[0] : sections[1]], affine=image.affine @ step)


def checked_label(case: Case, label: Image) -> Image:
    """The label of a case, if it lies on the grid of the case's image.

    Raises:
        DataError: another shape, or in NIfTI files another place in the world; names both files.
    """
    _check_grid(case, probe_image(case.images[0]), label, "image and label")
    return label


def _check_grid(case: Case, image: Header, other: Image, what: str) -> None:
    """Compare shape and, where both files know theirs, place with those of the case's first image."""
    name = case.images[0].name
    if image.shape_vox != other.shape_vox:
        raise _shape_error(case, image.shape_vox, name, other)
    if image.affine is not None and other.format == "nifti" and not same_grid(image.affine, other.affine, image.shape_vox):
        raise DataError(
            case.name,
            expected=f"{what} in the same place ({name}, origin {_origin(image.affine)}, spacing {format_sides(image.spacing_mm)})",
            got=f"{other.path.name} with origin {_origin(other.affine)}, spacing {format_sides(other.spacing_mm)}",
            do="resample the label to the image's grid, or copy its header if the voxels agree",
        )


def _shape_error(case: Case, shape_vox: tuple[int, ...], name: str, label: Image) -> DataError:
    """Two shapes that should be one."""
    turned = label.shape_vox == (*shape_vox[:-2], shape_vox[-1], shape_vox[-2])
    hint = "; it lies on its side (an EXIF orientation that one of the two lost?)" if turned else ""
    return DataError(
        case.name,
        expected=f"the shape of {name}, {format_shape(shape_vox)}",
        got=f"{format_shape(label.shape_vox)} in {label.path.name}{hint}",
        do="export the label again or leave the case out",
    )


def _origin(affine: np.ndarray) -> str:
    """Where voxel 0 lies, mm."""
    return "(" + ", ".join(f"{value:.4g}" for value in affine[:-1, -1]) + ")"
