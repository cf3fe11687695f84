"""What can be wrong with cases, told from their rows: numbers that `quality` takes while each case is in memory."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from microtome.data.case import Finding
from microtome.data.legend import Legend
from microtome.data.names import some
from microtome.geometry import Shape, Spacing, anisotropy, format_shape, format_sides
from microtome.images.volume import Pixels

Severity = Literal["error", "warning", "note"]

SPACING_RATIO = 2.0  # a voxel side this many times off the median of the dataset is an outlier
SIZE_RATIO = 3.0  # likewise a side of the image
ANISOTROPY_RATIO = 3.0  # nnU-Net's threshold for treating a volume as anisotropic
RARE_SHARE = 0.001  # a class with a smaller share of the annotated voxels is called rare


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """What was found in one case.

    Attributes:
        name: of the case.
        where: its (first) image file relative to the dataset, with the section for a part of a stack.
        where_label: its (first) label file likewise; empty where there is none.
        files: its image files.
        part: "train", "validation", both where a split cuts it, or "" where it is in neither.
        shape_vox: S.
        channels: C.
        dtype: of the image as read.
        spacing_mm: along S; 1 where `spacing_known` is False.
        spacing_known: whether the file or the dataset's settings give it.
        low: smallest finite value; None where there is none.
        high: largest finite value.
        not_finite: how many values are NaN or infinite.
        constant: channels of one value only.
        voxels: number of voxels of each class; None without a (readable) label.
        fingerprint: equal for images of equal pixels, and only for those.
    """

    name: str
    where: str
    where_label: str
    files: tuple[Path, ...]
    part: str
    shape_vox: Shape
    channels: int
    dtype: str
    spacing_mm: Spacing
    spacing_known: bool
    low: float | None
    high: float | None
    not_finite: int
    constant: tuple[int, ...]
    voxels: tuple[int, ...] | None
    fingerprint: str

    @property
    def annotated(self) -> float | None:
        """Share of the voxels that has a class, 0 to 1; None without a label."""
        return None if self.voxels is None else sum(self.voxels) / float(np.prod(self.shape_vox))

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each class among the annotated voxels; empty where nothing is annotated."""
        total = sum(self.voxels or ())
        return tuple(count / total for count in self.voxels or ()) if total else ()


class Values(NamedTuple):
    """What is known of an image's values.

    Attributes:
        low: smallest finite value; None where there is none.
        high: largest finite value.
        not_finite: how many are NaN or infinite.
        constant: channels of one value only.
        fingerprint: equal for images of equal shape, type and content read in the same parts, and only for those.
    """

    low: float | None
    high: float | None
    not_finite: int
    constant: tuple[int, ...]
    fingerprint: str


def look(parts: Iterable[Pixels]) -> Values:
    """Look at an image (C, *S) whose parts come one after the other; of each channel by itself, so that whole planes are as the whole."""
    lows: list[float] = []
    for number, part in enumerate(parts):
        array = np.asarray(part)
        if number == 0:
            lows, highs, wrong = [math.inf] * len(array), [-math.inf] * len(array), [0] * len(array)
            digests = [hashlib.blake2b(str(array.dtype).encode(), digest_size=16) for _ in array]
        for n, channel in enumerate(array):
            digests[n].update(np.ascontiguousarray(channel).data)
            finite = np.isfinite(channel)
            values = channel if finite.all() else channel[finite]
            wrong[n] += channel.size - values.size
            if values.size:
                lows[n], highs[n] = min(lows[n], float(values.min())), max(highs[n], float(values.max()))
    low, high = min(lows), max(highs)
    known = math.isfinite(low)
    return Values(
        low=low if known else None,
        high=high if known else None,
        not_finite=sum(wrong),
        constant=tuple(n for n, bad in enumerate(wrong) if not bad and lows[n] == highs[n]),
        fingerprint=" ".join(digest.hexdigest() for digest in digests),
    )


def class_shares(rows: Sequence[CaseRow], num_classes: int) -> tuple[float, ...]:
    """Share of each class among all annotated voxels of the cases; zeros where nothing is annotated."""
    counts = np.zeros(num_classes)
    for row in rows:
        counts += row.voxels or 0
    return tuple(float(n) for n in counts / max(1, counts.sum()))


def format_share(share: float) -> str:
    """A share for people: `12.3 %`, `0.041 %`, `0 %`."""
    percent = 100 * share
    if percent == 0 or percent == 100:
        return f"{percent:.0f} %"
    # 99.97 % must not read as 100: what is missing matters.
    return f"{min(percent, 99.9):.1f} %" if percent >= 0.95 else f"{percent:.2g} %"


def findings_of(rows: tuple[CaseRow, ...], legend: Legend) -> list[Finding]:
    """What is wrong with the cases, one by one and taken together."""
    checks = (_not_finite, _thin, _constant, _duplicates, _odd_types, _outliers, _anisotropic)
    return [*(finding for check in checks for finding in check(rows)), *_empty(rows, legend), *_classes(rows, legend)]


def _not_finite(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Images with values that are no numbers."""
    text = "{}: {} values are NaN or infinite; set them to a number or leave the case out"
    return [_about([row], "error", "not-finite", text.format(row.where, row.not_finite)) for row in rows if row.not_finite]


def _thin(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Images that are a single pixel wide or high, which no picture of anything is; sections may be single."""
    groups: dict[str, list[CaseRow]] = defaultdict(list)
    for row in rows:
        unit = "pixel" if len(row.shape_vox) == 2 else "voxel"
        sides = [f"1 {unit} {way}" for way, side in zip(("wide", "high"), row.shape_vox[:-3:-1], strict=True) if side == 1]
        if sides:
            groups[" and ".join(sides)].append(row)
    text = "{}: only {}; export it again, or leave the case out"
    return [_about(thin, "warning", "thin-image", text.format(_places(thin), words)) for words, thin in groups.items()]


def _constant(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Images, or channels of them, in which there is nothing to see."""
    found = []
    # That one pixel is like itself says nothing.
    rows = tuple(row for row in rows if np.prod(row.shape_vox) > 1)
    blank = [row for row in rows if len(row.constant) == row.channels]
    if blank:
        text = f"{_places(blank)}: every pixel has the same value; export the image again or leave the case out"
        found.append(_about(blank, "warning", "constant-image", text))
    for channel in sorted({channel for row in rows for channel in row.constant}):
        flat = [row for row in rows if channel in row.constant and len(row.constant) < row.channels]
        if flat:
            text = f"{_places(flat)}: channel {channel + 1} has the same value everywhere, so it tells nothing"
            found.append(_about(flat, "note", "constant-channel", text))
    return found


def _duplicates(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Images of the same pixels; blank ones are another finding."""
    same: dict[str, list[CaseRow]] = defaultdict(list)
    for row in rows:
        if len(row.constant) < row.channels:
            same[row.fingerprint].append(row)
    found = []
    for twins in same.values():
        if len(twins) < 2:
            continue
        text = f"{_places(twins)} hold the same pixels"
        if {"train", "validation"} <= {twin.part for twin in twins}:
            text += ", some in training and some in validation, so the score would be too good; remove all but one"
            found.append(_about(twins, "error", "leak", text))
        else:
            found.append(_about(twins, "warning", "duplicate-image", f"{text}; remove all but one"))
    return found


def _odd_types(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Images whose values are of another type than most images' are."""
    groups: dict[str, list[CaseRow]] = defaultdict(list)
    for row in rows:
        groups[row.dtype].append(row)
    common = max(groups, key=lambda dtype: len(groups[dtype]), default="")
    text = "{}: values of type {}, in most images " + common + "; check that grey values mean the same in all"
    return [_about(odd, "note", "mixed-types", text.format(_places(odd), dtype)) for dtype, odd in groups.items() if dtype != common]


def _empty(rows: tuple[CaseRow, ...], legend: Legend) -> list[Finding]:
    """Labels in which nothing is annotated, or nothing but background."""
    found = []
    labelled = [row for row in rows if row.voxels is not None]
    untouched = [row for row in labelled if not row.shares]
    if untouched:
        text = f"{_labels(untouched)}: nothing in it is annotated; paint something or take the label away"
        found.append(_about(untouched, "error", "nothing-annotated", text))
    if legend.background is None or len(legend.names) < 2:
        return found
    empty = [row for row in labelled if row.shares and row.shares[legend.background] == 1]
    if empty and len(empty) == len(labelled):
        text = f"{_labels(empty)}: no label holds anything but background; check that these are the right masks and the legend"
        found.append(_about(empty, "error", "no-foreground", text))
    elif empty:
        text = f"{_labels(empty)}: nothing but background; right if nothing is there to be seen, else annotate it or leave the case out"
        found.append(_about(empty, "warning", "empty-mask", text))
    return found


def _outliers(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Images whose voxels or extent are unlike the others'."""
    known = [row for row in rows if row.spacing_known]
    found = []
    for odd, median in _far_from_median(known, lambda row: row.spacing_mm, SPACING_RATIO):
        listed = some((f"{row.where} ({format_sides(row.spacing_mm)} mm)" for row in odd), most=4)
        text = f"{listed}: voxel size far from the usual {format_sides(median)} mm; check the header, or set `spacing_mm` in microtome.yaml"
        found.append(_about(odd, "warning", "spacing-outlier", text))
    for odd, median in _far_from_median(rows, lambda row: row.shape_vox, SIZE_RATIO):
        odd = [row for row in odd if min(row.shape_vox[-2:]) > 1]
        if not odd:
            continue
        listed = some((f"{row.where} ({format_shape(row.shape_vox)})" for row in odd), most=4)
        usual = format_shape(tuple(round(side) for side in median))
        text = f"{listed}: size far from the usual {usual}; check that it shows the same kind of thing"
        found.append(_about(odd, "note", "size-outlier", text))
    return found


def _anisotropic(rows: tuple[CaseRow, ...]) -> list[Finding]:
    """Volumes whose sections lie much farther apart than their pixels."""
    ratios = [anisotropy(row.spacing_mm) for row in rows if len(row.shape_vox) == 3]
    if not ratios or (ratio := float(np.median(ratios))) < ANISOTROPY_RATIO:
        return []
    text = f"voxels are {ratio:.3g} times as long along one axis as along another; the plan will take care of it"
    return [Finding(severity="note", code="anisotropic", message=text)]


def _classes(rows: tuple[CaseRow, ...], legend: Legend) -> list[Finding]:
    """Classes that are never or hardly there."""
    found = []
    shares = class_shares(rows, len(legend.names))
    for name, share in zip(legend.names, shares, strict=True) if any(shares) else ():
        if share == 0:
            text = f"class {name} is in no label; annotate some of it or take it out of the legend"
            found.append(Finding(severity="warning", code="missing-class", message=text))
        elif share < RARE_SHARE:
            text = f"class {name} is only {format_share(share)} of what is annotated; more of it would help most"
            found.append(Finding(severity="note", code="rare-class", message=text))
    return found


def _far_from_median(
    rows: Sequence[CaseRow], sides: Callable[[CaseRow], tuple[float, ...]], ratio: float
) -> list[tuple[list[CaseRow], tuple[float, ...]]]:
    """For pictures and for volumes: those with a side more than `ratio` times off the median side, if any, and the median."""
    found = []
    for dims in (2, 3):
        alike = [row for row in rows if len(row.shape_vox) == dims]
        if not alike:
            continue
        lengths = np.array([sides(row) for row in alike], float)
        median = np.median(lengths, axis=0)
        far = np.any((lengths > median * ratio) | (lengths * ratio < median), axis=1)
        if far.any():
            found.append(([row for row, is_far in zip(alike, far, strict=True) if is_far], tuple(float(side) for side in median)))
    return found


def _about(rows: Sequence[CaseRow], severity: Severity, code: str, message: str) -> Finding:
    """A finding about one case or several."""
    name = rows[0].name if len(rows) == 1 else ""
    return Finding(severity=severity, code=code, case=name, message=message, files=tuple(path for row in rows for path in row.files))


def _places(rows: Sequence[CaseRow]) -> str:
    """Where the rows come from, the first few of many."""
    return some((row.where for row in rows), most=4)


def _labels(rows: Sequence[CaseRow]) -> str:
    """The label files of the rows, the first few of many."""
    return some((row.where_label for row in rows), most=4)
