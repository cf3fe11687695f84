"""Label files -> what stands in them: one pass over every file, a case a thread, and the legend that follows from it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from microtome.data.case import Case, Finding
from microtome.data.legend import TABLE_SIZE, Legend, format_value, label_codes, value_of
from microtome.data.names import some
from microtome.data.parts import check_fits, image_part, large_volume, looked_at, middle_of
from microtome.errors import DataError
from microtome.geometry import Shape, format_shape
from microtome.images.files import read_image
from microtome.images.image import Image, Palette
from microtome.images.volume import Volume
from microtome.threads import in_threads

# Voxels counted at a time: bincount turns its input into int64, eight times the size of most labels.
CHUNK_VOX = 1 << 22
# More different values than this are objects rather than classes.
MOST_CLASSES = 32
# Numbers 1 to n in a single file are objects from this n on; among several files one must have this many.
MANY_IN_ONE_FILE, LEAST_OBJECTS = 8, 3
# Files, and values of each, in which pieces are counted.
LOOKED_AT, LOOKED_AT_VALUES = 4, 32
# Voxels of the box around a value beyond which it is looked at coarsely.
LOOKED_AT_VOX = 1 << 21
# Of a label that is too large to be read, pieces are counted in the middle, within these sides.
LOOKED_AT_SIDES = (128, 512, 512)


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
        whole: share of its values that are one connected piece each, as objects are; None where that was not looked at.
        seen: share of its voxels that were counted, for which `counts` make up; 1: all of them.
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
    whole: float | None = None
    seen: float = 1.0

    @property
    def numbers(self) -> frozenset[int]:
        """The codes found, other than 0."""
        return frozenset(self.counts) - {0}


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
    check_fits(case.labels[0])
    first = read_image(case.labels[0], palette=palette)
    if not per_instance:
        return first, 0
    objects = np.zeros(first.shape_vox, np.int32)
    overlap_vox = 0
    for number, path in enumerate(case.labels, start=1):
        mask = _mask(first if number == 1 else read_image(path, palette="indices"))
        if mask.shape != objects.shape:
            got = f"{format_shape(mask.shape)} and {format_shape(objects.shape)} of {first.path.name}"
            raise DataError(path, expected="masks of one shape for one image", got=got, do="export that mask again", code="D034")
        overlap_vox += int(np.count_nonzero(mask & (objects > 0)))
        objects[mask & (objects == 0)] = number
    return replace(first, array=objects[None], format="masks"), overlap_vox


def scan_labels(cases: Sequence[Case], *, palette: Palette, per_instance: bool) -> tuple[list[LabelScan], dict[str, DataError]]:
    """Count the values of every label, one case a thread in memory; and the error of each case that cannot be read.

    Where the values may be numbers of objects, a few files are looked at once more for the pieces that a value has.
    """

    def scan(case: Case) -> LabelScan | DataError:
        try:
            return _scan(case, palette, per_instance)
        except DataError as error:
            return error

    results = in_threads(scan, cases)
    scans = [result for result in results if isinstance(result, LabelScan)]
    if not per_instance and may_be_objects(scans):
        telling = sorted((one for one in scans if one.numbers), key=lambda one: -len(one.numbers))[:LOOKED_AT]
        looked_at = dict(zip((one.case for one in telling), in_threads(lambda one: _whole(one, palette), telling), strict=True))
        scans = [replace(one, whole=looked_at.get(one.case)) for one in scans]
    named = zip(cases, results, strict=True)
    return scans, {case.name: result for case, result in named if isinstance(result, DataError)}


def may_be_objects(scans: Sequence[LabelScan]) -> bool:
    """Whether the values of unnamed labels could be numbers of objects: too many for classes, or counted anew in every file."""
    return len(frozenset[int]().union(*(scan.numbers for scan in scans))) > MOST_CLASSES or counted_anew(scans)


def counted_anew(scans: Sequence[LabelScan]) -> bool:
    """Whether every file has the values 1 to n, n differing from file to file as numbers of objects do and of classes do not.

    A class that is missing here and there leaves most files with the same n; a single file tells where n is 8 or more.
    """
    filled = [scan.numbers for scan in scans if scan.numbers]
    if not filled or any(scan.colour for scan in scans) or any(max(numbers) != len(numbers) or min(numbers) != 1 for numbers in filled):
        return False
    highest = Counter(len(numbers) for numbers in filled)
    if len(filled) == 1:
        return max(highest) >= MANY_IN_ONE_FILE
    return max(highest) >= LEAST_OBJECTS and 2 * max(highest.values()) <= len(filled)


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
        cases = "one case" if len(overlapping) == 1 else f"{len(overlapping)} cases"
        worst = max(overlapping, key=lambda scan: scan.overlap_vox)
        message = f"masks overlap in {cases} ({sum(scan.overlap_vox for scan in overlapping)} voxels, most in {worst.case}: "
        message += f"{worst.overlap_vox}); the first mask by name keeps them"
        found.append(Finding(severity="note", code="overlapping-masks", message=message, files=worst.files[:1]))
    if legend.snap:
        found += _snapped(scans, legend)
    found += [_sampled(scan) for scan in scans if scan.seen < 1]
    if len(legend.names) < 2:
        message = f"the labels hold one class only ({legend.names[0]}); training needs two"
        found.append(Finding(severity="error", code="one-class", message=message))
    return found


def _scan(case: Case, palette: Palette, per_instance: bool) -> LabelScan:
    """Count one case."""
    volume = None if per_instance else large_volume(case.labels[0])
    if volume is not None and volume.channels == 1:
        return _scan_parts(case, volume)
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


def _scan_parts(case: Case, volume: Volume) -> LabelScan:
    """Count a case whose label is too large to be read at once: part by part, or in a sample of its parts."""
    boxes, seen = looked_at(volume)
    counts: Counter[int] = Counter()
    for box in boxes:
        codes, _ = label_codes(image_part(volume, box))
        counts.update(count_codes(codes))
    return LabelScan(
        case=case.name,
        files=case.labels,
        counts={code: max(1, round(times / seen)) for code, times in sorted(counts.items())},
        colour=False,
        eight_bit=volume.pixels.dtype == np.uint8,
        format=volume.format,
        shape_vox=volume.shape_vox,
        seen=seen,
    )


def _sampled(scan: LabelScan) -> Finding:
    """The note that a label was not counted as a whole."""
    message = f"{scan.files[0]}: {format_shape(scan.shape_vox)} voxels are too many to count; classes and shares are those of "
    message += f"{100 * scan.seen:.2g} % of them, spread over it; name rare classes in microtome.yaml (`classes:`)"
    return Finding(severity="note", code="sampled-label", case=scan.case, message=message, files=scan.files)


def _whole(scan: LabelScan, palette: Palette) -> float:
    """The share of a label's values, of some of them where there are many, that are one connected piece (specks aside)."""
    volume = large_volume(scan.files[0])
    if volume is None:
        codes, _ = label_codes(read_image(scan.files[0], palette=palette))
        found = scan.numbers
    else:
        codes, _ = label_codes(image_part(volume, middle_of(volume, LOOKED_AT_SIDES[-len(volume.shape_vox) :])))
        found = frozenset(count_codes(codes)) - {0}
    chosen = sorted(found)[:: -(-len(found) // LOOKED_AT_VALUES) or 1]
    numbered = _numbered(codes, chosen)
    whole = 0
    for seen, (number, box) in enumerate(enumerate(ndimage.find_objects(numbered), start=1)):
        # Classes are spread over the image and slow to look at: some of them that lie in pieces say enough.
        if seen >= 3 and whole < seen / 2:
            return whole / seen
        region = numbered[box]
        # Of a large region every second voxel (third, ...) will do; what it tears apart is thin for its size.
        step = math.ceil((region.size / LOOKED_AT_VOX) ** (1 / region.ndim))
        pieces, count = ndimage.label(region[(slice(None, None, step),) * region.ndim] == number, structure=np.ones((3,) * region.ndim))
        sizes = np.bincount(pieces.ravel())[1:]
        whole += count == 1 or bool(count and sizes.max() >= 0.95 * sizes.sum())
    return whole / max(1, len(chosen))


def _numbered(codes: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """1, 2, ... (*S) uint8 where a code is one of those chosen, which are ascending and fewer than 256; 0 elsewhere."""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= TABLE_SIZE:
        places = np.searchsorted(chosen, codes).clip(0, len(chosen) - 1)
        return np.where(np.asarray(chosen)[places] == codes, places + 1, 0).astype(np.uint8)
    table = np.zeros(high - low + 1, np.uint8)
    table[np.asarray(chosen) - low] = np.arange(1, len(chosen) + 1)
    return np.asarray(table[codes if low == 0 else codes.astype(np.int64) - low])


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
    message = f"{some((scan.files[0] for scan in between), 1)}: {kind}; values between those of the classes are taken as the nearest, "
    message += "so save masks as PNG without smoothing"
    files = tuple(scan.files[0] for scan in between)
    return [Finding(severity="warning", code="jpeg-ringed-mask" if jpeg else "blurred-mask", message=message, files=files)]
