"""Label files -> what stands in them: one pass over every file, a case a thread, and the legend that follows from it."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from microtome.data.case import Case, Finding
from microtome.data.legend import Legend, format_value, label_codes, value_of
from microtome.errors import DataError
from microtome.geometry import Shape, format_shape
from microtome.images.files import read_image
from microtome.images.image import Image, Palette

# Voxels counted at a time: bincount turns its input into int64, eight times the size of most labels.
CHUNK_VOX = 1 << 22


@dataclass(frozen=True, kw_only=True)
class LabelScan:
    """What the label of one case holds.

    Attributes:
        case: the case's name.
        files: its label files.
        counts: code (see `label_codes`) -> voxels.
        colour: whether codes are colours.
        eight_bit: whether the file stores 8 bits a channel, as pictures do.
        format: what the file really is.
        shape_vox: the label's shape.
        objects: mask files, of the layout with one mask an instance.
        overlap_vox: voxels that more than one mask claims.
    """

    case: str
    files: tuple[Path, ...]
    counts: Mapping[int, int]
    colour: bool
    eight_bit: bool
    format: str
    shape_vox: Shape
    objects: int = 0
    overlap_vox: int = 0


def read_label_image(case: Case, *, palette: Palette = "indices", per_instance: bool = False) -> tuple[Image, int]:
    """The label of a case as one image, and how many voxels more than one mask claims.

    Args:
        case: with at least one label file.
        palette: whether a palette's numbers or its colours are wanted.
        per_instance: each file is the mask of one object; the n-th becomes the value n, and the first keeps what
            several claim.

    Raises:
        DataError: a file cannot be read, or masks of one case differ in shape.
    """
    first = read_image(case.labels[0], palette=palette)
    if not per_instance:
        return first, 0
    objects = np.zeros(first.shape_vox, np.int32)
    overlap_vox = 0
    for number, path in enumerate(case.labels, start=1):
        mask = _mask(first if number == 1 else read_image(path, palette="indices"))
        if mask.shape != objects.shape:
            got = f"{format_shape(mask.shape)} and {format_shape(objects.shape)} of {first.path.name}"
            raise DataError(path, expected="masks of one shape for one image", got=got, do="export that mask again")
        overlap_vox += int(np.count_nonzero(mask & (objects > 0)))
        objects[mask & (objects == 0)] = number
    return replace(first, array=objects[None], format="masks"), overlap_vox


def scan_labels(cases: Sequence[Case], *, palette: Palette, per_instance: bool) -> tuple[list[LabelScan], dict[str, DataError]]:
    """Count the values of every label, one case a thread in memory; and the error of each case that cannot be read."""

    def scan(case: Case) -> LabelScan | DataError:
        try:
            return _scan(case, palette, per_instance)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(scan, cases))
    scans = [result for result in results if isinstance(result, LabelScan)]
    named = zip(cases, results, strict=True)
    return scans, {case.name: result for case, result in named if isinstance(result, DataError)}


def count_codes(codes: np.ndarray) -> dict[int, int]:
    """How often each integer occurs in an array, without a copy of the whole of it."""
    counts: Counter[int] = Counter()
    flat = codes.ravel()
    for start in range(0, flat.size, CHUNK_VOX):
        chunk = flat[start : start + CHUNK_VOX]
        low, high = int(chunk.min()), int(chunk.max())
        if high - low < CHUNK_VOX:
            histogram = np.bincount(chunk if low >= 0 and high < CHUNK_VOX else chunk.astype(np.int64) - low)
            base = 0 if low >= 0 and high < CHUNK_VOX else low
            values = np.flatnonzero(histogram)
            counts.update(dict(zip((values + base).tolist(), histogram[values].tolist(), strict=True)))
        else:
            unique, times = np.unique(chunk, return_counts=True)
            counts.update(dict(zip(unique.tolist(), times.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def class_counts(scan: LabelScan, legend: Legend) -> tuple[int, ...]:
    """Voxels of each class, and last those that are not annotated."""
    codes = np.fromiter(scan.counts, np.int64, len(scan.counts))
    times = np.fromiter(scan.counts.values(), np.int64, len(scan.counts))
    classes = legend.lookup(codes, colour=scan.colour)
    return tuple(int(times[classes == index].sum()) for index in (*range(len(legend.names)), -1))


def label_findings(scans: Iterable[LabelScan], legend: Legend, source: str) -> list[Finding]:
    """Values that the legend does not know, masks that overlap, values that had to be snapped, a single class."""
    scans = list(scans)
    found = [finding for scan in scans for finding in _unknown_values(scan, legend, source)]
    overlapping = [scan for scan in scans if scan.overlap_vox]
    if overlapping:
        worst = max(overlapping, key=lambda scan: scan.overlap_vox)
        message = (
            f"masks overlap in {len(overlapping)} cases ({sum(scan.overlap_vox for scan in overlapping)} voxels, most in {worst.case}: "
        )
        message += f"{worst.overlap_vox}); the first mask by name keeps them"
        found.append(Finding(severity="note", code="overlapping-masks", message=message, files=worst.files[:1]))
    if legend.snap:
        found += _snapped(scans, legend)
    if len(legend.names) < 2:
        message = f"the labels hold one class only ({legend.names[0]}); training needs two"
        found.append(Finding(severity="error", code="one-class", message=message))
    return found


def _scan(case: Case, palette: Palette, per_instance: bool) -> LabelScan:
    """Count one case."""
    image, overlap_vox = read_label_image(case, palette=palette, per_instance=per_instance)
    # Counted as one: the numbers of objects mean nothing beyond their own image.
    codes, colour = ((image.array[0] > 0).view(np.uint8), False) if per_instance else label_codes(image)
    return LabelScan(
        case=case.name,
        files=case.labels,
        counts=count_codes(codes),
        colour=colour,
        eight_bit=image.array.dtype == np.uint8,
        format=image.format,
        shape_vox=image.shape_vox,
        objects=len(case.labels) if per_instance else 0,
        overlap_vox=overlap_vox,
    )


def _mask(image: Image) -> np.ndarray:
    """Where the mask of one object is set, (*S) bool; what JPEG smears around it is not."""
    return np.asarray(image.array.max(axis=0) > (127 if image.format == "jpeg" else 0))


def _unknown_values(scan: LabelScan, legend: Legend, source: str) -> list[Finding]:
    """A finding on a file with values that nobody declared."""
    unknown = {code: times for code, times in scan.counts.items() if not legend.knows(code, colour=scan.colour)}
    if not unknown:
        return []
    shown = ", ".join(format_value(value_of(code, scan.colour)) for code in list(unknown)[:5])
    message = f"{scan.files[0]}: value {shown} is not in the legend of {source or 'the other labels'}; "
    message += f"its {sum(unknown.values())} voxels count as not annotated"
    return [Finding(severity="error", code="label-not-in-legend", case=scan.case, message=message, files=scan.files)]


def _snapped(scans: Sequence[LabelScan], legend: Legend) -> list[Finding]:
    """One warning on the files with values between those of the legend."""
    exact = replace(legend, snap=False)
    between = [scan for scan in scans if any(not exact.knows(code, colour=scan.colour) for code in scan.counts)]
    if not between:
        return []
    jpeg = any(scan.format == "jpeg" for scan in between)
    kind = "JPEG ringing" if jpeg else "blurred edges"
    message = f"{between[0].files[0]} and {len(between) - 1} more" if len(between) > 1 else str(between[0].files[0])
    message += f": {kind}; values between those of the classes are taken as the nearest, so save masks as PNG without smoothing"
    files = tuple(scan.files[0] for scan in between)
    return [Finding(severity="warning", code="jpeg-ringed-mask" if jpeg else "blurred-mask", message=message, files=files)]
