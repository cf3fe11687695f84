"""Two label maps -> rows of numbers; rows -> the summary that `metrics.json` holds."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.data.case import NOT_ANNOTATED
from microtome.data.legend import Legend
from microtome.evaluation import metrics
from microtome.evaluation.bootstrap import COVERAGE, RESAMPLES, mean_interval
from microtome.geometry import Spacing

METRICS = ("dice", "iou", "hd95_mm", "assd_mm", "nsd", "precision", "recall", "volume_mm3", "pixel_accuracy")
DISTANCES = ("hd95_mm", "assd_mm")

CONVENTIONS = MappingProxyType(
    {
        "not_annotated": "voxels that the truth does not annotate are removed from both masks before anything is computed; "
        "a surface is only where a neighbour is annotated otherwise, not where annotation ends",
        "surface": "voxels of the mask with a face-neighbour outside it; beyond the border of the image all is outside; "
        "distances are Euclidean, in mm, between voxel centres",
        "hd95_mm": "the larger of the two directed 95th percentiles",
        "assd_mm": "mean over all surface voxels of both masks together",
        "nsd": "share of the surface voxels of both masks within the tolerance of the other surface",
        "volume_mm3": "of the prediction, beside volume_truth_mm3 (2D: area in mm²); the worst is the one furthest from the truth",
        "pixel_accuracy": "share of annotated voxels with the right class, background included; the same number in each row of a case",
        "summary": "mean over the foreground classes of a case, then over the cases where that is defined (their number is beside it)",
        "sd": "sample standard deviation (n - 1)",
        "undefined": "null in a row; left out of means and counted beside them",
    }
)

EMPTY_CASES = MappingProxyType(
    {
        "both_empty": "dice, iou, nsd, precision, recall, hd95_mm, assd_mm undefined",
        "truth_empty": "dice, iou, nsd, precision 0; recall, hd95_mm, assd_mm undefined",
        "prediction_empty": "dice, iou, nsd, recall 0; precision, hd95_mm, assd_mm undefined",
    }
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The numbers of one class, or of all objects, in one case.

    Attributes:
        values: a number for each metric, NaN where undefined.
    """

    case: str
    class_name: str
    values: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The row of `cases` in `metrics.json`."""
        return {"case": self.case, "class": self.class_name, **{name: number(value) for name, value in self.values.items()}}

    def badness(self, name: str) -> float:
        """A number that is larger for a worse value of this metric."""
        return -self.values[name]


@dataclass(frozen=True, kw_only=True)
class CaseScore(Row):
    """The numbers of one class in one case, one for each of `METRICS`.

    Attributes:
        volume_truth_mm3: what `volume_mm3` should be.
        tolerance_mm: what `nsd` was computed with.
        axes: of the image, 2 or 3; of two a volume is an area.
    """

    volume_truth_mm3: float
    tolerance_mm: float
    axes: int

    def to_json(self) -> dict[str, Any]:
        """The row of `cases` in `metrics.json`."""
        return {**super().to_json(), "volume_truth_mm3": self.volume_truth_mm3, "tolerance_mm": self.tolerance_mm}

    def badness(self, name: str) -> float:
        """Of a volume how far it is from the truth."""
        if name == "volume_mm3":
            return abs(self.values[name] - self.volume_truth_mm3)
        return self.values[name] if name in DISTANCES else super().badness(name)


def score_case(
    truth: np.ndarray, prediction: np.ndarray, spacing_mm: Spacing, legend: Legend, tolerance_mm: float | None = None, *, case: str = ""
) -> list[CaseScore]:
    """One row for each class of the legend, background included.

    Args:
        truth: classes (*S), `NOT_ANNOTATED` where nothing is known; at least one voxel must be annotated.
        prediction: classes (*S); a negative value is no class and wrong wherever there is truth.
        spacing_mm: voxel size along S.
        legend: names the classes.
        tolerance_mm: of `nsd`; None: the largest voxel side.
        case: its name in the rows.
    """
    if not np.any(truth != NOT_ANNOTATED):
        raise ValueError(f"{case or 'the case'} has no annotated voxel: there is nothing to score")
    tolerance_mm = max(spacing_mm) if tolerance_mm is None else tolerance_mm
    prediction = np.where(truth == NOT_ANNOTATED, NOT_ANNOTATED, prediction)
    annotated = truth != NOT_ANNOTATED
    known = None if annotated.all() else annotated
    accuracy = metrics.pixel_accuracy(truth, prediction)
    rows = []
    for index, name in enumerate(legend.names):
        masks = truth == index, prediction == index
        values = {**_mask_scores(masks, spacing_mm, tolerance_mm, known), "pixel_accuracy": accuracy}
        volume = metrics.volume_mm3(masks[0], spacing_mm)
        row = CaseScore(case=case, class_name=name, values=values, volume_truth_mm3=volume, tolerance_mm=tolerance_mm, axes=truth.ndim)
        rows.append(row)
    return rows


def summarise(
    rows: Sequence[CaseScore],
    legend: Legend,
    *,
    tolerance_mm: float | None = None,
    in_voxels: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of `metrics.json`: summary, classes, cases, worst, conventions, versions.

    Args:
        rows: of `score_case`, any number of cases.
        legend: the one the rows were made with.
        tolerance_mm: as it was asked for; None: each case's largest voxel side.
        in_voxels: cases whose voxel size is not known, so that their distances are in voxels.
        groups: case -> group (a patient); where a group has several of the cases, intervals resample groups and not cases.
    """
    foreground = {legend.names[index] for index in legend.foreground}
    by_case: dict[str, list[CaseScore]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    means = {
        name: np.array([_mean([row.values[name] for row in group if row.class_name in foreground]) for group in by_case.values()])
        for name in METRICS
    }
    members = [(groups or {}).get(case, case) for case in by_case]
    # Cases in which no foreground is expected and none was found are not bad: they come last.
    order = np.argsort(np.nan_to_num(means["dice"], nan=np.inf), kind="stable")
    shown = [row for row in rows if row.class_name in foreground]
    return {
        "summary": {name: summary_of(name, values, shown, members) for name, values in means.items()},
        "classes": {name: class_scores([row for row in rows if row.class_name == name], METRICS) for name in legend.names},
        "cases": [row.to_json() for row in rows],
        "worst": [list(by_case)[index] for index in order],
        "conventions": {"interval": interval_words(members), **_conventions(rows, sorted(foreground), tolerance_mm, in_voxels)},
        "versions": versions(),
    }


def summary_of(name: str, values: np.ndarray, rows: Sequence[Row], groups: Sequence[str]) -> dict[str, float | int | None]:
    """Mean and interval of one number a case (cases,), over how many cases, and how many rows had to be left out of it."""
    mean, low, high = mean_interval(values, groups)
    undefined = sum(not math.isfinite(row.values[name]) for row in rows)
    return {"mean": number(mean), "low": number(low), "high": number(high), "cases": int(np.isfinite(values).sum()), "undefined": undefined}


def class_scores(rows: Sequence[Row], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean, SD, median and worst of each metric over the cases of one class."""
    return {name: _spread(rows, name) for name in names}


def interval_words(groups: Sequence[str]) -> str:
    """How the intervals were made, from the group of each case."""
    units = "cases"
    if len(set(groups)) < len(groups):
        units = f"groups ({len(set(groups))} groups of {len(groups)} cases, as the dataset's `groups` or `group_by` says)"
    return f"{COVERAGE:.0%} percentile bootstrap over {units}, {RESAMPLES} resamples, fixed seed; too narrow with few of them"


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("microtome", "numpy", "scipy")}}


def number(value: float) -> float | None:
    """JSON has no NaN: undefined is null."""
    return float(value) if math.isfinite(value) else None


def _mask_scores(
    masks: tuple[np.ndarray, np.ndarray], spacing_mm: Spacing, tolerance_mm: float, annotated: np.ndarray | None
) -> dict[str, float]:
    """All metrics of a pair of masks (*S), truth and prediction."""
    truth, prediction = masks
    distances = metrics.surface_distances(truth, prediction, spacing_mm, annotated=annotated)
    return {
        "dice": metrics.dice(truth, prediction),
        "iou": metrics.iou(truth, prediction),
        "hd95_mm": metrics.hd95_mm(distances),
        "assd_mm": metrics.assd_mm(distances),
        "nsd": metrics.nsd(distances, tolerance_mm),
        "precision": metrics.precision(truth, prediction),
        "recall": metrics.recall(truth, prediction),
        "volume_mm3": metrics.volume_mm3(prediction, spacing_mm),
    }


def _spread(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Mean, SD, median and worst of one metric over the rows where it is defined, and how many are not."""
    defined = [row for row in rows if math.isfinite(row.values[name])]
    values = np.array([row.values[name] for row in defined])
    worst = max(defined, key=lambda row: row.badness(name), default=None)
    return {
        "mean": number(_mean(values)),
        "sd": float(values.std(ddof=1)) if values.size > 1 else None,
        "median": float(np.median(values)) if values.size else None,
        "worst": worst.values[name] if worst else None,
        "worst_case": worst.case if worst else None,
        "undefined": len(rows) - len(defined),
    }


def _conventions(
    rows: Sequence[CaseScore], foreground: Sequence[str], tolerance_mm: float | None, in_voxels: Sequence[str]
) -> dict[str, Any]:
    """What must be known to read the numbers, in words."""
    used = sorted({row.tolerance_mm for row in rows})
    cases, axes = {row.case for row in rows}, {row.axes for row in rows}
    return {
        "unit": "mm" if not in_voxels else "voxel" if cases == set(in_voxels) else "mm, except in the cases of `in_voxels`",
        "in_voxels": list(in_voxels),
        "axes": axes.pop() if len(axes) == 1 else None,
        "tolerance_mm": used[0] if len(used) == 1 else [used[0], used[-1]],
        "tolerance": "the largest voxel side of each case (smallest and largest if they differ)"
        if tolerance_mm is None
        else "as asked for",
        "foreground": list(foreground),
        "empty_cases": dict(EMPTY_CASES),
        **CONVENTIONS,
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the defined values; NaN if there are none."""
    defined = np.asarray(values, float)
    defined = defined[np.isfinite(defined)]
    return float(defined.mean()) if defined.size else math.nan
