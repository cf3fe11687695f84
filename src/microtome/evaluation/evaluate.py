"""Folders of predictions and of truth -> scores: every case of the truth is scored or the whole is refused."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from microtome.data.case import NOT_ANNOTATED, Case, LabelValue
from microtome.data.classes import LegendRules, make_legend
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.description import NAMES, load_description
from microtome.data.labels import count_codes, scan_labels
from microtome.data.layouts import find_layout
from microtome.data.legend import Legend, code_of, format_value, label_codes, value_of
from microtome.data.listing import LISTING, Listing, read_listing
from microtome.data.names import image_files, some, unique_names
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.evaluation.pairing import Named, pair
from microtome.evaluation.scores import METRICS, CaseScore, score_case, summarise
from microtome.geometry import Spacing, format_shape
from microtome.images.files import probe_image, read_image, stem_of

__all__ = ["METRICS", "CaseScore", "evaluate", "score_case", "summarise"]

# Each thread holds one case; more threads than this would buy little and cost memory.
MOST_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of the truth of one case before its pixels are read.

    Attributes:
        named: its name and the names of its prediction.
        place: the file named in errors.
        read: gives the classes (*S).
        spacing_mm: along S, 1 where unknown.
        spacing_known: whether distances are in mm.
        group: cases of one group (a patient) are no independent witnesses; empty where nobody says.
    """

    named: Named
    place: Path
    read: Callable[[], np.ndarray]
    spacing_mm: Spacing
    spacing_known: bool
    group: str = ""


def evaluate(predictions: Path, truth: Path, *, tolerance_mm: float | None = None) -> dict[str, Any]:
    """Score every case of `truth`; the result is what `metrics.json` holds.

    Files are paired by name, words like `labels`, `mask`, `volume` aside; two single files are a pair whatever they
    are called. A `predictions.json` that `predict` wrote beside its files says which case each of them is of.

    Args:
        predictions: a label file, or a folder of them, with the label values of the training data.
        truth: a label file, a folder of them, or a dataset as `open_dataset` reads it.
        tolerance_mm: of `nsd`; None: the largest voxel side of each case.

    Raises:
        DataError: a case without a prediction, a prediction without a case, one that `predictions.json` does not list,
            a value that the legend does not know, shapes that differ, a case in which nothing is annotated.
    """
    if tolerance_mm is not None and not (tolerance_mm >= 0 and math.isfinite(tolerance_mm)):
        raise ConfigError("tolerance", expected="a length in mm of at least 0", got=str(tolerance_mm), do="give another --tolerance")
    for path in (predictions, truth):
        if not path.exists():
            raise DataError(path, expected="a file or a folder", got="nothing there", do="check the path")
    listed = read_listing(predictions if predictions.is_dir() else predictions.parent)
    legend, truths = _open_truth(truth, listed.legend if listed else None)
    files = _prediction_files(predictions, listed)
    if predictions.is_file() and truth.is_file():
        files = {truths[0].named.case: predictions}
    found = pair(files, [item.named for item in truths], where=predictions)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        scored = list(pool.map(lambda item: _score(item, found[item.named.case], legend, tolerance_mm), truths))
    in_voxels = [item.named.case for item in truths if not item.spacing_known]
    if in_voxels:
        message = (
            f"{truth}: {len(in_voxels)} of {len(truths)} cases have no voxel size (first: {in_voxels[0]}); their distances are in voxels"
        )
        warnings.warn(message, DataWarning, stacklevel=2)
    groups = {item.named.case: item.group for item in truths if item.group}
    return summarise([row for rows in scored for row in rows], legend, tolerance_mm=tolerance_mm, in_voxels=in_voxels, groups=groups)


def _prediction_files(predictions: Path, listed: Listing | None) -> dict[str, Path]:
    """The prediction files by the names that cases may know them by.

    Raises:
        DataError: two are listed for one case, or one in the folder is not listed.
    """
    if predictions.is_file():
        entry = listed.entries.get(predictions.name) if listed else None
        return {entry.case if entry else stem_of(predictions): predictions}
    if listed is None:
        return _files_by_stem(predictions)
    files: dict[str, Path] = {}
    for name, entry in listed.entries.items():
        if entry.case in files:
            got = f"{files[entry.case].name} and {name}"
            raise DataError(predictions / LISTING, expected=f"one prediction of {entry.case}", got=got, do="predict into an empty folder")
        files[entry.case] = predictions / name
    known = set(files.values())
    # A label file is not left out in silence: it may be somebody's prediction of a case, or that of an unfinished call.
    others = [path.relative_to(predictions).as_posix() for path in image_files(predictions) if path not in known]
    if others:
        got = f"{len(others)} that {LISTING} does not list: {some(others)}"
        raise DataError(predictions, expected="only files that `predict` wrote", got=got, do="predict again, or move them away")
    # A file that is listed and not there is reported as the missing prediction of its case.
    return {case: path for case, path in files.items() if path.is_file()}


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """All images below a folder by their relative path without suffix.

    Raises:
        DataError: none there, or two that differ in the suffix only.
    """
    paths = image_files(folder)
    if not paths:
        raise DataError(folder, expected="label images", got="none", do="check the path")
    return dict(zip(unique_names(folder, paths), paths, strict=True))


def _open_truth(path: Path, legend: Legend | None) -> tuple[Legend, list[Truth]]:
    """The legend and the cases of a truth; a given legend wins over the one that the truth has or shows."""
    if _is_dataset(path):
        dataset = open_dataset(path)
        dataset = dataset if legend is None else _with_legend(dataset, legend)
        # Not only those that can be read: a label that cannot is an error here, not a case less.
        return dataset.legend, [_dataset_truth(dataset, case) for case in dataset.cases if case.labels]
    files = {stem_of(path): path} if path.is_file() else _files_by_stem(path)
    legend = legend or _legend_of(files)
    return legend, [_file_truth(name, file, legend) for name, file in files.items()]


def _is_dataset(path: Path) -> bool:
    """Whether a path is a folder in which images and labels pair, or that describes itself; else it is labels only."""
    if not path.is_dir():
        return False
    config, named_by = load_description(path)
    try:
        return any(case.labels for case in find_layout(path, config, named_by).cases)
    except DataError:
        # A folder with a description was meant as a dataset: let it say what is wrong with it.
        return any((path / name).is_file() for name in (*NAMES, "dataset.json"))


def _legend_of(files: Mapping[str, Path]) -> Legend:
    """The classes that the values of these label files show."""
    cases = [Case(name=name, images=(), labels=(path,)) for name, path in files.items()]
    scans, errors = scan_labels(cases, palette="indices", per_instance=False)
    if errors:
        raise next(iter(errors.values()))
    return make_legend(scans, LegendRules())


def _with_legend(dataset: Dataset, legend: Legend) -> Dataset:
    """The dataset read with the classes of the predictions, which may have more of them than these labels show.

    Raises:
        DataError: a value of the dataset that they do not know.
    """
    values = [value for values in dataset.legend.values for value in values]
    unknown = [value for value in values if not _knows(legend, value)]
    if unknown:
        got = some(map(format_value, unknown))
        do = "evaluate against labels of the same classes"
        raise DataError(dataset.root, expected=f"label values of {legend.words}", got=got, do=do)
    return replace(dataset, legend=legend)


def _knows(legend: Legend, value: LabelValue) -> bool:
    """Whether a value is of a class or ignored."""
    colour = isinstance(value, tuple)
    code = code_of(value, colour)
    return code is not None and legend.knows(code, colour=colour)


def _dataset_truth(dataset: Dataset, case: Case) -> Truth:
    """A case of a dataset: it may be called as the dataset calls it, or like its files."""
    names = (case.name, *(stem_of(path) for path in (*case.images, *case.labels)))
    spacing_mm, known = _spacing(dataset, case)
    return Truth(
        named=Named(case=case.name, names=names),
        place=case.labels[0],
        read=lambda: dataset.read_label(case),
        spacing_mm=spacing_mm,
        spacing_known=known,
        group=case.group,
    )


def _spacing(dataset: Dataset, case: Case) -> tuple[Spacing, bool]:
    """The voxel size of a case: as the dataset's description says, else as its image or its label file does."""
    image, label = probe_image(case.images[0]), probe_image(case.labels[0])
    stated = dataset.config.spacing_mm
    if stated is not None:
        if len(stated) != len(image.shape_vox):
            expected = f"a voxel size for each of the {len(image.shape_vox)} axes of {case.images[0].name}"
            raise ConfigError(dataset.root, expected=expected, got=f"spacing_mm {list(stated)}", do="mend `spacing_mm` in microtome.yaml")
        return stated, True
    best = label if label.spacing_known and not image.spacing_known else image
    return best.spacing_mm, best.spacing_known


def _file_truth(name: str, path: Path, legend: Legend) -> Truth:
    """A label file that belongs to no dataset."""
    header = probe_image(path)
    return Truth(
        named=Named(case=name, names=(name, stem_of(path))),
        place=path,
        read=lambda: _classes(path, legend),
        spacing_mm=header.spacing_mm,
        spacing_known=header.spacing_known,
    )


def _score(item: Truth, path: Path, legend: Legend, tolerance_mm: float | None) -> list[CaseScore]:
    """The rows of one case."""
    truth = item.read()
    prediction = _classes(path, legend)
    if truth.shape != prediction.shape:
        raise DataError(
            path,
            expected=f"the shape of {item.place}, {format_shape(truth.shape)}",
            got=format_shape(prediction.shape),
            do="predict this image again, or check that the two belong together",
        )
    if np.all(truth == NOT_ANNOTATED):
        raise DataError(item.place, expected="an annotated voxel", got="none", do="annotate a part of it, or leave this case out")
    return score_case(truth, prediction, item.spacing_mm, legend, tolerance_mm, case=item.named.case)


def _classes(path: Path, legend: Legend) -> np.ndarray:
    """The classes (*S) of a label file, in which every value must be known: a value nobody named is no class to score.

    Raises:
        DataError: names the file and the value.
    """
    codes, colour = label_codes(read_image(path, palette=legend.palette))
    unknown = [value_of(code, colour) for code in count_codes(codes) if not legend.knows(code, colour=colour)]
    if unknown:
        got = some(map(format_value, unknown))
        raise DataError(path, expected=f"label values of {legend.words}", got=got, do="check its label values")
    return legend.lookup(codes, colour=colour)
