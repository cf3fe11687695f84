"""Cases as pictures: image, truth, prediction, and what is wrong where."""

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image
from scipy import ndimage

from microtome.config import Plan
from microtome.data.case import NOT_ANNOTATED, Case
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.legend import Legend
from microtome.data.listing import read_listing
from microtome.data.split import split_dataset
from microtome.data.thumbnails import class_colours, is_photograph, picture_size, resized, resized_label, visible
from microtome.errors import DataWarning, MicrotomeError
from microtome.evaluation.metrics import dice
from microtome.geometry import format_shape
from microtome.images.files import read_image
from microtome.images.image import Image
from microtome.images.medical import PATIENT_FORMATS

# What an error map (*S) int16 holds, beside NOT_ANNOTATED.
CORRECT, MISSED, INVENTED, WRONG_CLASS = 0, 1, 2, 3
# Told apart by colour-blind eyes, and from the grey that lies under them.
ERROR_COLOURS = MappingProxyType({MISSED: (58, 134, 255), INVENTED: (255, 76, 48), WRONG_CLASS: (255, 214, 10)})
# Longest side of a picture, pixels; twice what a page shows, for sharp screens and print.
SIDE_PX = 420
# Of one picture; 32 of them in base64 stay well below 3 MB.
MOST_BYTES = 56_000
# Where the axes of NIfTI's world point.
WORLD = ("the patient's right", "anterior", "superior")


@dataclass(frozen=True, kw_only=True)
class ErrorCounts:
    """How many annotated voxels are right, and wrong in which way."""

    correct: int
    missed: int
    invented: int
    wrong_class: int

    @property
    def wrong(self) -> int:
        """All that are not right."""
        return self.missed + self.invented + self.wrong_class

    @property
    def annotated(self) -> int:
        """All that were judged."""
        return self.correct + self.wrong


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One case as the report shows it.

    Attributes:
        case: its name.
        dice: of each foreground class over the whole case; None where truth and prediction have none of it.
        counts: of the whole case.
        shown: of what the pictures show: a section of a volume, else the whole case.
        section: which section is shown, counted from 0 in the file; None of a picture.
        sections: the first section of the case and past its last; None of a picture.
        directions: which way a patient lies in the pictures; empty where nothing tells.
        channel: the channel that is shown, where there are others.
        panels: image, truth, prediction, errors as JPEG.
        size: width and height of each in pixels.
    """

    case: str
    dice: tuple[tuple[str, float | None], ...]
    counts: ErrorCounts
    shown: ErrorCounts
    section: int | None
    sections: tuple[int, int] | None
    directions: str
    channel: str
    panels: tuple[bytes, bytes, bytes, bytes]
    size: tuple[int, int]

    @property
    def where(self) -> str:
        """Which section of a volume the pictures show, how it was chosen, how it lies; empty of a picture."""
        if self.section is None or self.sections is None:
            return ""
        first, past = self.sections
        chosen = "no section has an error"
        if self.counts.wrong:
            chosen = f"the one with most error: {format_share(self.shown.wrong, self.counts.wrong)} of the wrong voxels of the case"
        turned = f"; {self.directions}" if self.directions else ""
        return f"section {self.section} of {first} to {past - 1} (counted from 0), {chosen}{turned}"


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The exhibits, and in words what could not be shown and why."""

    exhibits: tuple[Exhibit, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions in a folder, as its `predictions.json` lists them: case -> file, and the legend of their values."""

    files: Mapping[str, Path]
    legend: Legend


def error_map(truth: np.ndarray, prediction: np.ndarray, background: int | None) -> np.ndarray:
    """What is wrong where: int16 (*S), NOT_ANNOTATED where the truth is.

    MISSED: foreground that was taken for background (or for no class at all). INVENTED: background that was taken for
    foreground. WRONG_CLASS: every other difference; without a background, all of them.

    Args:
        truth: classes (*S).
        prediction: classes (*S); a negative value is no class.
        background: the class that is not foreground, if there is one.
    """
    wrong = np.full(truth.shape, WRONG_CLASS, np.int16)
    if background is not None:
        in_truth, in_prediction = truth != background, (prediction != background) & (prediction >= 0)
        wrong[in_truth & ~in_prediction] = MISSED
        wrong[~in_truth & in_prediction] = INVENTED
    errors = np.where(truth == prediction, np.int16(CORRECT), wrong)
    errors[truth == NOT_ANNOTATED] = NOT_ANNOTATED
    return errors


def count_errors(errors: np.ndarray) -> ErrorCounts:
    """Count the voxels of each kind in an error map (*S) or a part of one."""
    correct, missed, invented, wrong_class = (int(np.count_nonzero(errors == kind)) for kind in (CORRECT, MISSED, INVENTED, WRONG_CLASS))
    return ErrorCounts(correct=correct, missed=missed, invented=invented, wrong_class=wrong_class)


def worst_section(errors: np.ndarray) -> int:
    """The section (of the slowest axis) of an error map (Z, Y, X) with most wrong voxels; the first of equals.

    Without an error it is the section with most annotated voxels.
    """
    wrong = (errors > CORRECT).sum(axis=(1, 2))
    annotated = (errors != NOT_ANNOTATED).sum(axis=(1, 2))
    return int((wrong if wrong.any() else annotated).argmax())


def read_predictions(folder: Path) -> Predictions | None:
    """The predictions of a folder; None where no `predictions.json` lists any.

    Raises:
        DataError: the list is not what `predict` writes.
    """
    listing = read_listing(folder)
    if listing is None:
        return None
    return Predictions(files={entry.case: folder / name for name, entry in listing.entries.items()}, legend=listing.legend)


def make_gallery(predictions: Predictions, names: Sequence[str], plan: Plan, data: Dataset | Path) -> Gallery:
    """Draw some cases; what cannot be drawn becomes a note and never an error.

    Args:
        predictions: of these cases.
        names: of the cases, in the order in which they are to be shown.
        plan: of the run: its fold and seed say which parts of a stack are cases.
        data: the dataset, or its folder, which may have been moved since.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # what was assumed of these files is among the findings already
        try:
            dataset = data if isinstance(data, Dataset) else open_dataset(data)
            parts = split_dataset(dataset, plan.fold, plan.seed, plan.holdout)
        except (MicrotomeError, OSError) as error:  # a folder's name may be longer than any can be
            return Gallery(notes=(f"The data cannot be read any more, so there are no pictures ({error}).",))
        # Predictions were made with the legend of the run, whatever the folder says today.
        dataset = replace(dataset, legend=predictions.legend)
        cases = {case.name: case for case in (*dataset.cases, *parts.train, *parts.validation)}
        drawn = [_drawn(dataset, cases.get(name), name, predictions) for name in names]
    exhibits = tuple(each for each in drawn if isinstance(each, Exhibit))
    return Gallery(exhibits=exhibits, notes=tuple(each for each in drawn if isinstance(each, str)))


def draw_case(case: Case, image: Image, truth: np.ndarray, prediction: np.ndarray, dataset: Dataset) -> Exhibit:
    """The four pictures of a case and the numbers beside them.

    Args:
        case: where it comes from.
        image: (C, *S); three channels of 8 bits are taken for red, green and blue, of any other number the first is shown.
        truth: classes (*S).
        prediction: classes (*S).
        dataset: for the legend and the names of the channels.
    """
    legend = dataset.legend
    errors = error_map(truth, prediction, legend.background)
    counts = count_errors(errors)
    scores = tuple((legend.names[index], _class_dice(truth, prediction, index)) for index in legend.foreground)
    section = worst_section(errors) if errors.ndim == 3 else None
    at = (Ellipsis,) if section is None else (section,)
    flips, directions = _orientation(image)
    pixels_CYX = image.array[(slice(None), *at)][(slice(None), *flips)]
    truth_YX, prediction_YX, errors_YX = (array[at][flips] for array in (truth, prediction, errors))
    height_width = picture_size(truth_YX.shape, image.spacing_mm[-2:], SIDE_PX)
    colours = class_colours(len(legend.names), legend.background)
    base = resized(visible(pixels_CYX), height_width)
    panels = (
        base,
        _with_classes(base, resized_label(truth_YX, height_width), colours),
        _with_classes(base, resized_label(prediction_YX, height_width), colours),
        draw_errors(base, resized_label(errors_YX, height_width)),
    )
    first = case.sections[0] if case.sections else 0
    named = dataset.channel_names[0] if dataset.channel_names and len(pixels_CYX) > 1 and not is_photograph(pixels_CYX) else ""
    return Exhibit(
        case=case.name,
        dice=scores,
        counts=counts,
        shown=count_errors(errors_YX),
        section=None if section is None else first + section,
        sections=None if section is None else (first, first + len(errors)),
        directions=directions,
        channel=named,
        panels=(_jpeg(panels[0]), _jpeg(panels[1]), _jpeg(panels[2]), _jpeg(panels[3])),
        size=(height_width[1], height_width[0]),
    )


def filled_sections(annotation: np.ndarray) -> list[tuple[int, str]]:
    """Sections of a sparse annotation (Z, Y, X) that show what was filled in, each with the reason for the choice.

    Those with the most, a median and the least annotation, each once. Of equals the one farthest from all that are painted
    in great part or chosen already: beside a painted section the result is at its best.
    """
    counts = np.count_nonzero(annotation != NOT_ANNOTATED, axis=(1, 2))
    ordered, painted = sorted(counts), np.flatnonzero(counts > counts.max() / 2).tolist()
    chosen = {int(counts.argmax()): "the most annotated one"}
    for place, why in ((0, "the least annotated one"), (len(ordered) // 2, "the one of median annotation")):
        near = (*painted, *chosen)
        equals = [index for index in np.flatnonzero(counts == ordered[place]).tolist() if index not in chosen]
        if equals:
            chosen[max(equals, key=lambda index: min(abs(index - other) for other in near))] = why
    return list(chosen.items())


def draw_filled(image: Image, annotation: np.ndarray, result: np.ndarray, dataset: Dataset) -> dict[str, Any]:
    """What was filled into a sparse annotation, as the report shows it without the data.

    Args:
        image: (C, *S), as of `draw_case`.
        annotation: classes (*S), NOT_ANNOTATED where nobody looked.
        result: classes (*S).
        dataset: for the legend.

    Returns:
        values that JSON can hold: `annotated`, the share of the voxels in words; `shares`, a class's name, its share of what is
        annotated, and of the result; `sections`, with title, width and height in pixels, and image, annotation and result as
        JPEG in base64.
    """
    legend, (flips, directions) = dataset.legend, _orientation(image)
    colours = class_colours(len(legend.names), legend.background)
    sections = []
    for section, why in filled_sections(annotation) if annotation.ndim == 3 else [(Ellipsis, "")]:
        pixels_CYX = image.array[:, section][(slice(None), *flips)]
        label_YX, result_YX = annotation[section][flips], result[section][flips]
        height, width = picture_size(label_YX.shape, image.spacing_mm[-2:], SIDE_PX)
        base = resized(visible(pixels_CYX), (height, width))
        painted = (_with_classes(base, resized_label(each, (height, width)), colours) for each in (label_YX, result_YX))
        done = format_share(int(np.count_nonzero(label_YX != NOT_ANNOTATED)), label_YX.size)
        title = f"section {section} of 0 to {len(annotation) - 1} (counted from 0), {why}: {done} annotated" if why else f"{done} annotated"
        panels = [base64.b64encode(_jpeg(each)).decode("ascii") for each in (base, *painted)]
        turned = f"; {directions}" if directions else ""
        sections.append({"title": title + turned, "width": width, "height": height, "panels": panels})
    known = int(np.count_nonzero(annotation != NOT_ANNOTATED))
    shares = [
        (name, *(format_share(int(np.count_nonzero(each == index)), of) for each, of in ((annotation, known), (result, result.size))))
        for index, name in enumerate(legend.names)
    ]
    return {"annotated": format_share(known, annotation.size), "shares": shares, "sections": sections}


def format_share(part: int, whole: int) -> str:
    """A share for people; never 0 % of what is not 0."""
    percent = 100 * part / max(1, whole)
    return "less than 0.1\N{NO-BREAK SPACE}%" if 0 < percent < 0.1 else f"{percent:.1f}\N{NO-BREAK SPACE}%"


def draw_errors(rgb: np.ndarray, errors_YX: np.ndarray) -> np.ndarray:
    """Errors in full colour over the picture (Y, X, 3) uint8 in subdued grey; what is not annotated is nearly black."""
    grey = (rgb @ np.array([0.3, 0.59, 0.11]))[..., None] * np.array([0.5, 0.5, 0.5])
    grey[errors_YX == NOT_ANNOTATED] *= 0.4
    for kind, colour in ERROR_COLOURS.items():
        region = errors_YX == kind
        grey[region] = 0.2 * grey[region] + 0.8 * np.asarray(colour)
    return np.asarray(grey, np.uint8)


def _drawn(dataset: Dataset, case: Case | None, name: str, predictions: Predictions) -> Exhibit | str:
    """One case, or why it cannot be shown."""
    path = predictions.files.get(name)
    if case is None or not case.labels or path is None:
        missing = "no prediction of it" if path is None else "no such labelled case in the data any more"
        return f"{name} is not shown: {missing}."
    try:
        image, truth = dataset.read_pair(case)
        prediction = dataset.legend.decode(read_image(path, palette=dataset.legend.palette))
    except MicrotomeError as error:
        return f"{name} is not shown: {error}."
    if prediction.shape != truth.shape:
        return f"{name} is not shown: its prediction has {format_shape(prediction.shape)} voxels, the data now {format_shape(truth.shape)}."
    return draw_case(case, image, truth, prediction, dataset)


def _class_dice(truth: np.ndarray, prediction: np.ndarray, index: int) -> float | None:
    """Dice of one class where the truth is annotated."""
    value = dice(truth == index, (prediction == index) & (truth != NOT_ANNOTATED))
    return None if math.isnan(value) else value


def _orientation(image: Image) -> tuple[tuple[slice, slice], str]:
    """How a section of a patient is turned to be seen as radiologists do, and the words for it; others stay as they are.

    Up is anterior or superior, and the patient's right is on the left, as if seen from the feet: along both axes of the
    picture the coordinates of NIfTI's world (right, anterior, superior) fall.
    """
    if image.format not in PATIENT_FORMATS or len(image.affine) != 4:
        return (slice(None), slice(None)), ""
    columns = image.affine[:3, 1:3]
    axes = np.abs(columns).argmax(axis=0)
    grows = columns[axes, [0, 1]] > 0
    flips = tuple(slice(None, None, -1 if yes else 1) for yes in grows)
    return (flips[0], flips[1]), f"{WORLD[axes[0]]} is at the top, {WORLD[axes[1]]} at the left"


def _with_classes(rgb: np.ndarray, label_YX: np.ndarray, colours: tuple[tuple[int, int, int] | None, ...]) -> np.ndarray:
    """The classes over the picture: a tint and a full outline; what is not annotated is darkened."""
    painted = rgb.astype(np.float32)
    painted[label_YX == NOT_ANNOTATED] *= 0.4
    for index, colour in enumerate(colours):
        if colour is not None:
            region = label_YX == index
            painted[region] = 0.84 * painted[region] + 0.16 * np.asarray(colour)
            painted[region & ~ndimage.binary_erosion(region, iterations=2, border_value=1)] = colour
    return painted.astype(np.uint8)


def _jpeg(rgb: np.ndarray) -> bytes:
    """The picture as a JPEG of full colour resolution; noise that would need too many bytes costs quality."""
    for quality in (90, 80, 65, 45):
        buffer = io.BytesIO()
        PIL.Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()
