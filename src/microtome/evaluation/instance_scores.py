"""Two maps of objects -> a row of numbers and a picture; rows -> the summary that `metrics.json` holds."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image

from microtome.data.thumbnails import picture_size, resized, resized_label, visible
from microtome.evaluation import instance_metrics as metrics
from microtome.evaluation.instance_metrics import Overlaps, count_overlaps, match
from microtome.evaluation.scores import Row, class_scores, interval_words, summary_of, versions
from microtome.images.image import Image

METRICS = ("ap50", "ap", "pq", "sq", "rq", "seg", "arand", "voi", "voi_split", "voi_merge", "v_rand", "v_info")
ERRORS = ("arand", "voi", "voi_split", "voi_merge")
# What all objects together are called where classes have their names.
OBJECT = "object"

# What a voxel of an object is, beside 0 for none.
FOUND, NOT_FOUND = 1, 2
# Missed and invented as in the error maps of the report, found between them; told apart by colour-blind eyes.
FOUND_COLOUR, MISSED_COLOUR, FALSE_COLOUR = (90, 200, 90), (58, 134, 255), (255, 76, 48)
# Longest side of a picture, pixels, and how thick an outline is.
SIDE_PX, OUTLINE_PX = 480, 2

CONVENTIONS = MappingProxyType(
    {
        "objects": "each value of a label file other than 0 is one object, whatever the value, in however many pieces",
        "not_annotated": "voxels that the truth does not annotate are left out of both maps; a negative value in a prediction is no object",
        "found": "an object of the truth that a predicted one overlaps with an IoU above 0.5; the others are missed, and predicted "
        "objects that found none are false",
        "ap50": "TP / (TP + FP + FN), objects matched one to one at an IoU above 0.5 (not the area under a precision-recall curve)",
        "ap": "the mean of the same at the IoUs 0.50, 0.55, ..., 0.95",
        "pq": "SQ x RQ: mean IoU of the matched objects, times the F1 score of matching (IoU above 0.5)",
        "seg": "mean over the true objects of the Jaccard index with the predicted object that covers more than half of it, else 0",
        "arand": "1 - F score of Rand precision and recall over pairs of voxels in objects of the truth, the predicted background as "
        "one segment (scikit-image's adapted_rand_error); best 0",
        "voi": "in bits, split + merge, the background as a segment (scikit-image's variation_of_information); best 0",
        "v_rand": "V^Rand, weights of one half, over voxels in objects of the truth, each voxel of the predicted background a segment "
        "of its own; borders are not thinned",
        "v_info": "V^Info, likewise",
        "summary": "mean over the cases where it is defined (their number is beside it): a case with many objects counts as one with few",
        "sd": "sample standard deviation (n - 1)",
        "undefined": "null in a row; left out of means and counted beside them",
    }
)

EMPTY_CASES = MappingProxyType(
    {
        "both_empty": "voi, voi_split, voi_merge 0; all others undefined",
        "truth_empty": "ap50, ap, pq, rq 0; sq, seg, arand, v_rand, v_info undefined; voi as defined",
        "prediction_empty": "ap50, ap, pq, rq, seg, v_rand, v_info 0; arand 1; sq undefined; voi as defined",
    }
)


@dataclass(frozen=True, kw_only=True)
class ObjectScore(Row):
    """The numbers of all objects in one case, one for each of `METRICS`.

    Attributes:
        num_truth: objects of the truth.
        num_predicted: objects of the prediction.
        num_found: pairs of them with an IoU above 0.5.
    """

    num_truth: int
    num_predicted: int
    num_found: int

    @property
    def counts(self) -> dict[str, int]:
        """How many objects there are, were predicted, found, missed and invented."""
        missed, false = self.num_truth - self.num_found, self.num_predicted - self.num_found
        return {"truth": self.num_truth, "predicted": self.num_predicted, "found": self.num_found, "missed": missed, "false": false}

    def to_json(self) -> dict[str, Any]:
        """The row of `cases` in `metrics.json`."""
        return {**super().to_json(), **{f"objects_{name}": count for name, count in self.counts.items()}}

    def badness(self, name: str) -> float:
        """Of an error its value."""
        return self.values[name] if name in ERRORS else super().badness(name)


def score_objects(truth: np.ndarray, prediction: np.ndarray, *, case: str = "") -> ObjectScore:
    """The row of one case.

    Args:
        truth: numbers of objects (*S), 0 background, negative where not annotated; at least one voxel must be annotated.
        prediction: numbers of objects (*S); negative is background.
        case: its name in the row.
    """
    if not np.any(truth >= 0):
        raise ValueError(f"{case or 'the case'} has no annotated voxel: there is nothing to score")
    overlaps = count_overlaps(truth, prediction)
    return ObjectScore(
        case=case,
        class_name=OBJECT,
        values=_values(overlaps),
        num_truth=len(overlaps.truth_ids),
        num_predicted=len(overlaps.prediction_ids),
        num_found=len(match(overlaps).iou),
    )


def summarise_objects(rows: Sequence[ObjectScore], *, groups: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The content of `metrics.json`: summary, classes, cases, worst, objects, conventions, versions.

    Args:
        rows: of `score_objects`, one a case.
        groups: case -> group (a patient); where a group has several of the cases, intervals resample groups and not cases.
    """
    members = [(groups or {}).get(row.case, row.case) for row in rows]
    # Cases without an object on either side are not bad: they come last.
    order = np.argsort([np.nan_to_num(row.values["pq"], nan=np.inf) for row in rows], kind="stable")
    counts = [row.counts for row in rows]
    return {
        "summary": {name: summary_of(name, np.array([row.values[name] for row in rows]), rows, members) for name in METRICS},
        "classes": {OBJECT: class_scores(rows, METRICS)},
        "cases": [row.to_json() for row in rows],
        "worst": [rows[index].case for index in order],
        "objects": {name: sum(each[name] for each in counts) for name in counts[0]} if counts else {},
        "conventions": {
            "interval": interval_words(members),
            "unit": "voxel",
            "in_voxels": [],
            "foreground": [OBJECT],
            "empty_cases": dict(EMPTY_CASES),
            **CONVENTIONS,
        },
        "versions": versions(),
    }


def draw_objects(truth: np.ndarray, prediction: np.ndarray, image: Image | None, *, case: str = "") -> dict[str, Any]:
    """The outlines of the objects of a case over its image, those of the truth and those of the prediction.

    Args:
        truth: numbers of objects (*S), 2D or 3D, 0 background, negative where not annotated.
        prediction: the same.
        image: (C, *S); None: the outlines alone.
        case: its name.

    Returns:
        values that JSON can hold: `case`; `section`, which one of a volume is shown (the one with most voxels of objects missed
        or false, else of all), or None; `width` and `height` in pixels; `panels`, truth and prediction as JPEG in base64.
    """
    overlaps = count_overlaps(truth, prediction)
    pairs = match(overlaps)
    kinds = _kinds(truth, overlaps.truth_ids, pairs.truth), _kinds(prediction, overlaps.prediction_ids, pairs.prediction)
    section = _telling_section(kinds) if truth.ndim == 3 else None
    at = (Ellipsis,) if section is None else (section,)
    height_width = picture_size(truth[at].shape, image.spacing_mm[-2:] if image else (1.0, 1.0), SIDE_PX)
    base = resized(visible(image.array[(slice(None), *at)]), height_width) if image else np.full((*height_width, 3), 48, np.uint8)
    base[resized_label(truth[at], height_width) < 0] //= 3
    panels = []
    for objects, kind, other in ((truth, kinds[0], MISSED_COLOUR), (prediction, kinds[1], FALSE_COLOUR)):
        edges = _outlines(resized_label(objects[at], height_width))
        shown = resized_label(kind[at], height_width) * edges
        panel = base.copy()
        panel[shown == FOUND], panel[shown == NOT_FOUND] = FOUND_COLOUR, other
        panels.append(_jpeg(panel))
    return {"case": case, "section": section, "width": height_width[1], "height": height_width[0], "panels": panels}


def _values(overlaps: Overlaps) -> dict[str, float]:
    """All metrics of one case, in the order of `METRICS`."""
    split, merge = metrics.voi_split(overlaps), metrics.voi_merge(overlaps)
    return {
        "ap50": metrics.ap(overlaps),
        "ap": metrics.mean_ap(overlaps),
        "pq": metrics.pq(overlaps),
        "sq": metrics.sq(overlaps),
        "rq": metrics.rq(overlaps),
        "seg": metrics.seg(overlaps),
        "arand": metrics.arand(overlaps),
        "voi": split + merge,
        "voi_split": split,
        "voi_merge": merge,
        "v_rand": metrics.v_rand(overlaps),
        "v_info": metrics.v_info(overlaps),
    }


def _kinds(objects: np.ndarray, ids: np.ndarray, found: np.ndarray) -> np.ndarray:
    """FOUND or NOT_FOUND in objects (*S) that were scored, 0 elsewhere.

    Args:
        objects: numbers of objects (*S).
        ids: (n,) the numbers that were scored, ascending.
        found: places in `ids` of those that have a match.
    """
    if not ids.size:
        return np.zeros(objects.shape, np.uint8)
    kind = np.full(len(ids), NOT_FOUND, np.uint8)
    kind[found] = FOUND
    places = np.searchsorted(ids, objects).clip(0, len(ids) - 1)
    return np.where(ids[places] == objects, kind[places], np.uint8(0))


def _telling_section(kinds: tuple[np.ndarray, np.ndarray]) -> int:
    """The section (of the slowest axis) with most voxels of objects that have no match; else of any object."""
    wrong, objects = np.zeros(len(kinds[0]), np.int64), np.zeros(len(kinds[0]), np.int64)
    for kind in kinds:
        wrong += np.count_nonzero(kind == NOT_FOUND, axis=(1, 2))
        objects += np.count_nonzero(kind, axis=(1, 2))
    return int((wrong if wrong.any() else objects).argmax())


def _outlines(objects_YX: np.ndarray) -> np.ndarray:
    """Where an object (Y, X) ends or touches another: its own voxels, so many thick."""
    edges = np.zeros(objects_YX.shape, bool)
    for axis in (0, 1):
        along, edge = np.moveaxis(objects_YX, axis, 0), np.moveaxis(edges, axis, 0)
        for step in range(1, OUTLINE_PX + 1):
            differs = along[step:] != along[:-step]
            edge[step:] |= differs
            edge[:-step] |= differs
    return np.asarray(edges & (objects_YX > 0))


def _jpeg(rgb: np.ndarray) -> str:
    """The picture as a JPEG of full colour resolution, in base64."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(rgb).save(buffer, "JPEG", quality=85, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
