"""A case as a small picture: one section of the image with its label drawn over it, as PNG bytes."""

import io
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
from scipy import ndimage

from microtome.data.case import NOT_ANNOTATED
from microtome.data.parts import image_part, middle_of
from microtome.images.image import Image
from microtome.images.volume import Pixels, Volume

# Pixels of the part of a large section that is drawn.
MIDDLE_SIDE = 2048
# Told apart on grey, on H&E pink and by most colour-blind eyes; a ninth class takes the first colour again.
COLOURS: tuple[tuple[int, int, int], ...] = (
    (255, 140, 0),
    (0, 190, 255),
    (120, 220, 40),
    (240, 60, 160),
    (255, 225, 0),
    (150, 110, 255),
    (0, 205, 160),
    (230, 60, 50),
)


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A picture of one case.

    Attributes:
        case: the case's name.
        png: the picture as a PNG file.
        size: its width and height in pixels.
        section: which section of a volume it shows, counted from 0 along the slowest axis; None for a picture.
    """

    case: str
    png: bytes
    size: tuple[int, int]
    section: int | None


def class_colours(num_classes: int, background: int | None) -> tuple[tuple[int, int, int] | None, ...]:
    """The colour (R, G, B) of each class; None for the background, which is not drawn."""
    foreground = [index for index in range(num_classes) if index != background]
    colours = {index: COLOURS[n % len(COLOURS)] for n, index in enumerate(foreground)}
    return tuple(colours.get(index) for index in range(num_classes))


def draw_thumbnail(
    case: str, image: Image, label: np.ndarray | None, colours: tuple[tuple[int, int, int] | None, ...], side_px: int = 264
) -> Thumbnail:
    """Draw a case with its longest side `side_px` pixels long.

    Of a volume it shows the section with the most foreground, the middle one where there is none. Classes are tinted
    and outlined in their colour; what is not annotated is darkened.

    Args:
        case: its name.
        image: (C, *S); three channels are taken for red, green and blue, of any other number the first is shown.
        label: (*S) int16 or None; one whose shape is not that of the image is left out.
        colours: as `class_colours` gives them.
        side_px: length of the longest side.
    """
    if label is not None and label.shape != image.shape_vox:
        label = None
    section = _section(image, label, colours)
    pixels_CYX = image.array if section is None else image.array[:, section]
    label_YX = label if label is None or section is None else label[section]
    height_width = picture_size(pixels_CYX.shape[1:], image.spacing_mm[-2:], side_px)
    rgb = resized(visible(pixels_CYX), height_width)
    if label_YX is not None:
        _paint(rgb, resized_label(label_YX, height_width), colours)
    return Thumbnail(case=case, png=_png(rgb), size=(height_width[1], height_width[0]), section=section)


def draw_middle(
    case: str, volume: Volume, label: Pixels | None, colours: tuple[tuple[int, int, int] | None, ...], side_px: int = 264
) -> Thumbnail:
    """Draw the middle of a case that is too large to be read: of its middle section, or of a picture, at most `MIDDLE_SIDE` a side.

    Args:
        case: its name.
        volume: of the image.
        label: (*S) int16 classes, or None.
        colours: as `class_colours` gives them.
        side_px: length of the longest side.
    """
    flat = len(volume.shape_vox) == 2
    box = middle_of(volume, (MIDDLE_SIDE, MIDDLE_SIDE) if flat else (1, MIDDLE_SIDE, MIDDLE_SIDE))
    drawn = draw_thumbnail(case, image_part(volume, box), None if label is None else label[box], colours, side_px)
    return drawn if flat else replace(drawn, section=box[0].start)


def _section(image: Image, label: np.ndarray | None, colours: tuple[tuple[int, int, int] | None, ...]) -> int | None:
    """The section of a volume that tells most; None for a picture."""
    if len(image.shape_vox) == 2:
        return None
    middle = image.shape_vox[0] // 2
    if label is None:
        return middle
    drawn = [index for index, colour in enumerate(colours) if colour is not None]
    foreground = np.isin(label, drawn).sum(axis=(1, 2))
    annotated = (label != NOT_ANNOTATED).sum(axis=(1, 2))
    # A section painted in full says more than one that two orthogonal sections only cross.
    score = foreground * (annotated / label[0].size) ** 2
    return int(score.argmax()) if score.any() else middle


def picture_size(shape_YX: tuple[int, ...], spacing_mm: tuple[float, ...], side_px: int) -> tuple[int, int]:
    """Height and width in pixels that keep the shape in mm; a strip is never thinner than 24 pixels."""
    extent = np.asarray(shape_YX) * np.asarray(spacing_mm)
    height, width = np.maximum(24, np.rint(extent / extent.max() * side_px).astype(int))
    return int(height), int(width)


def visible(pixels_CYX: np.ndarray) -> np.ndarray:
    """Grey values as (Y, X, 3) uint8, stretched between the 0.5 and 99.5 percentiles unless they are a photograph."""
    if is_photograph(pixels_CYX):
        return np.moveaxis(pixels_CYX, 0, -1)
    values = np.nan_to_num(pixels_CYX[0].astype(np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, [0.5, 99.5])
    grey = np.clip((values - low) / max(float(high - low), 1e-12), 0, 1)
    return np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=-1)


def is_photograph(pixels_CYX: np.ndarray) -> bool:
    """Whether the channels are red, green and blue."""
    return len(pixels_CYX) == 3 and pixels_CYX.dtype == np.uint8


def resized(rgb_YXC: np.ndarray, height_width: tuple[int, int]) -> np.ndarray:
    """The picture at another size, smoothly."""
    size = (height_width[1], height_width[0])
    return np.array(PIL.Image.fromarray(np.ascontiguousarray(rgb_YXC)).resize(size, PIL.Image.Resampling.BICUBIC, reducing_gap=2))


def resized_label(label_YX: np.ndarray, height_width: tuple[int, int]) -> np.ndarray:
    """The label at another size; classes are never mixed."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(height_width, label_YX.shape, strict=True))
    return np.asarray(label_YX[np.ix_(rows, columns)])


def _paint(rgb: np.ndarray, label_YX: np.ndarray, colours: tuple[tuple[int, int, int] | None, ...]) -> None:
    """Draw the classes over the picture in place: a light tint, a full outline, darkness where nothing is annotated."""
    missing = label_YX == NOT_ANNOTATED
    rgb[missing] = (0.45 * rgb[missing]).astype(np.uint8)
    for index, colour in enumerate(colours):
        if colour is None:
            continue
        region = label_YX == index
        rgb[region] = (0.86 * rgb[region] + 0.14 * np.asarray(colour)).astype(np.uint8)
        rgb[region & ~ndimage.binary_erosion(region, iterations=2, border_value=1)] = colour


def _png(rgb: np.ndarray) -> bytes:
    """The picture as a PNG of 160 colours: a third of the bytes, and a page of 64 stays small enough to mail."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(rgb).quantize(160, method=PIL.Image.Quantize.MEDIANCUT).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
