"""Folders of predictions and of truth -> scores: every case of the truth is scored or the whole is refused."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from microtome.data.case import Case, LabelValue
from microtome.data.classes import LegendRules, make_legend
from microtome.data.containers import contents_of
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.description import NAMES, load_description
from microtome.data.labels import count_codes, scan_labels
from microtome.data.layouts import find_layout
from microtome.data.legend import Legend, code_of, format_value, label_codes, value_of
from microtome.data.listing import Listing, read_listing
from microtome.data.names import is_image_place, some, stem_of
from microtome.errors import ConfigError, DataError, DataWarning, MicrotomeError
from microtome.evaluation.instance_scores import ObjectScore, draw_objects, score_objects, summarise_objects
from microtome.evaluation.pairing import Named, files_by_stem, label_maps, object_maps, pair, prediction_files
from microtome.evaluation.scores import METRICS, CaseScore, score_case, summarise
from microtome.geometry import Spacing, format_shape
from microtome.images.files import probe_image, read_image
from microtome.images.image import Image
from microtome.threads import in_threads, usable_cores

__all__ = ["METRICS", "CaseScore", "evaluate", "score_case", "summarise"]

# Each thread holds one case; more threads than this would buy little and cost memory.
MOST_THREADS = 8
# Cases that a page shows, the worst first.
MOST_PICTURES = 6
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of the truth of one case before its pixels are read.

    Attributes:
        named: its name and the names of its prediction.
        place: the file named in errors.
        read: gives the classes, or the numbers of the objects, (*S).
        spacing_mm: along S, 1 where unknown.
        spacing_known: whether distances are in mm.
        group: cases of one group (a patient) are no independent witnesses; empty where nobody says.
        read_image: gives the image, where there is one.
    """

    named: Named
    place: Path
    read: Callable[[], np.ndarray]
    spacing_mm: Spacing
    spacing_known: bool
    group: str = ""
    read_image: Callable[[], Image] | None = None


def evaluate(
    predictions: Path, truth: Path, *, tolerance_mm: float | None = None, instances: bool = False, pictures: bool = False
) -> dict[str, Any]:
    """Score every case of `truth`; the result is what `metrics.json` holds.

    Files are paired by name, words like `labels`, `mask`, `volume` aside; two single files are a pair whatever they
    are called. A `predictions.json` that `predict` wrote beside its files says which case each of them is of.

    Args:
        predictions: a label file or store, or a folder of them, with the label values of the training data.
        truth: a label file, a folder of them, or a dataset as `open_dataset` reads it.
        tolerance_mm: of `nsd`; None: the largest voxel side of each case.
        instances: values are numbers of objects, which are scored one by one; else they are classes. Of a folder that `predict`
            wrote these are the maps that its --instances makes.
        pictures: of objects: the worst cases are drawn, into `pictures` of the result, as `draw_objects` has them.

    Raises:
        DataError: a case without a prediction, a prediction without a case, one that `predictions.json` does not list,
            a value that the legend does not know, shapes that differ, a case in which nothing is annotated.
        ConfigError: a tolerance that is no length, or beside `instances`, which have no use for it.

    Warns:
        DataWarning: cases without a voxel size; objects that are probably classes.
    """
    _check(predictions, truth, tolerance_mm, instances)
    folder = predictions.parent if is_image_place(predictions) else predictions
    listed = read_listing(folder)
    if instances:
        truths = _open_objects(truth)
        found = object_maps(_paired(predictions, truth, listed, truths), folder, listed)
        return _evaluate_objects(truths, found, (truth, predictions), pictures)
    legend, truths = _open_truth(truth, listed.legend if listed else None)
    found = label_maps(_paired(predictions, truth, listed, truths))
    scored = _each(truths, lambda item: _score(item, found[item.named.case], legend, tolerance_mm))
    in_voxels = [item.named.case for item in truths if not item.spacing_known]
    if in_voxels:
        those = f"{len(in_voxels)} of {len(truths)} cases have" if len(truths) > 1 else "the one case has"
        message = f"{truth}: {those} no voxel size (first: {in_voxels[0]}); distances are then in voxels"
        warnings.warn(message, DataWarning, stacklevel=2)
    rows = [row for rows in scored for row in rows]
    return summarise(rows, legend, tolerance_mm=tolerance_mm, in_voxels=in_voxels, groups=_groups(truths))


def _check(predictions: Path, truth: Path, tolerance_mm: float | None, instances: bool) -> None:
    """Refuse what cannot be before anything is read."""
    if tolerance_mm is not None and not (tolerance_mm >= 0 and math.isfinite(tolerance_mm)):
        raise ConfigError(
            "tolerance", expected="a length in mm of at least 0", got=str(tolerance_mm), do="give another --tolerance", code="C022"
        )
    if tolerance_mm is not None and instances:
        raise ConfigError(
            "tolerance", expected="none beside --instances", got=f"{tolerance_mm:g} mm", do="leave one of them out", code="C003"
        )
    for path in (predictions, truth):
        if not (path.exists() or is_image_place(path)):
            raise DataError(path, expected="a file or a folder", got="nothing there", do="check the path", code="D001")


def _paired(predictions: Path, truth: Path, listed: Listing | None, truths: Sequence[Truth]) -> dict[str, Path]:
    """The prediction file of each case; two single files are a pair whatever they are called."""
    files = prediction_files(predictions, listed)
    if is_image_place(predictions) and is_image_place(truth):
        files = {truths[0].named.case: predictions}
    return pair(files, [item.named for item in truths], where=predictions)


def _each(truths: Sequence[Truth], score: Callable[[Truth], Result]) -> list[Result]:
    """What a function gives of each case, some at a time."""
    return in_threads(score, truths, min(MOST_THREADS, usable_cores()))


def _groups(truths: Sequence[Truth]) -> dict[str, str]:
    """Case -> group, where somebody says."""
    return {item.named.case: item.group for item in truths if item.group}


def _open_truth(path: Path, legend: Legend | None) -> tuple[Legend, list[Truth]]:
    """The legend and the cases of a truth; a given legend wins over the one that the truth has or shows."""
    if _is_dataset(path):
        dataset = open_dataset(path)
        dataset = dataset if legend is None else _with_legend(dataset, legend)
        # Not only those that can be read: a label that cannot is an error here, not a case less.
        return dataset.legend, [_dataset_truth(dataset, case) for case in dataset.cases if case.labels]
    files = {stem_of(path): path} if is_image_place(path) else files_by_stem(path)
    legend = legend or _legend_of(files)
    return legend, [_file_truth(name, file, partial(_classes, file, legend)) for name, file in files.items()]


def _is_dataset(path: Path) -> bool:
    """Whether a path is a folder in which images and labels pair, or that describes itself, or holds both; else it is labels only."""
    contents = contents_of(path)
    if contents is not None and contents.images and contents.labels:
        return True
    if is_image_place(path) or not path.is_dir():
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
        raise DataError(dataset.root, expected=f"label values of {legend.words}", got=got, do=do, code="D040")
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
        read_image=partial(dataset.read_image, case),
    )


def _spacing(dataset: Dataset, case: Case) -> tuple[Spacing, bool]:
    """The voxel size of a case: as the dataset's description says, else as its image or its label file does."""
    image, label = probe_image(case.images[0]), probe_image(case.labels[0])
    stated = dataset.config.spacing_mm
    if stated is not None:
        if len(stated) != len(image.shape_vox):
            expected = f"a voxel size for each of the {len(image.shape_vox)} axes of {case.images[0].name}"
            raise ConfigError(
                dataset.root, expected=expected, got=f"spacing_mm {list(stated)}", do="mend `spacing_mm` in microtome.yaml", code="C019"
            )
        return stated, True
    best = label if label.spacing_known and not image.spacing_known else image
    return best.spacing_mm, best.spacing_known


def _file_truth(name: str, path: Path, read: Callable[[], np.ndarray]) -> Truth:
    """A label file that belongs to no dataset."""
    header = probe_image(path)
    return Truth(
        named=Named(case=name, names=(name, stem_of(path))),
        place=path,
        read=read,
        spacing_mm=header.spacing_mm,
        spacing_known=header.spacing_known,
    )


def _score(item: Truth, path: Path, legend: Legend, tolerance_mm: float | None) -> list[CaseScore]:
    """The rows of one case."""
    truth, prediction = _checked(item, path, _classes(path, legend))
    return score_case(truth, prediction, item.spacing_mm, legend, tolerance_mm, case=item.named.case)


def _checked(item: Truth, path: Path, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction (*S) of one case, which must have one shape, and something that is annotated."""
    truth = item.read()
    if truth.shape != prediction.shape:
        raise DataError(
            path,
            expected=f"the shape of {item.place}, {format_shape(truth.shape)}",
            got=format_shape(prediction.shape),
            do="predict this image again, or check that the two belong together",
            code="D077",
        )
    if np.all(truth < 0):
        raise DataError(
            item.place, expected="an annotated voxel", got="none", do="annotate a part of it, or leave this case out", code="D033"
        )
    return truth, prediction


def _classes(path: Path, legend: Legend) -> np.ndarray:
    """The classes (*S) of a label file, in which every value must be known: a value nobody named is no class to score.

    Raises:
        DataError: names the file and the value.
    """
    codes, colour = label_codes(read_image(path, palette=legend.palette))
    unknown = [value_of(code, colour) for code in count_codes(codes) if not legend.knows(code, colour=colour)]
    if unknown:
        got = some(map(format_value, unknown))
        raise DataError(path, expected=f"label values of {legend.words}", got=got, do="check its label values", code="D040")
    return legend.lookup(codes, colour=colour)


def _open_objects(path: Path) -> list[Truth]:
    """The cases of a truth whose label values are numbers of objects."""
    if _is_dataset(path):
        dataset = _of_objects(open_dataset(path))
        cases = [case for case in dataset.cases if case.labels]
        return [replace(_dataset_truth(dataset, case), read=partial(_instances, dataset, case)) for case in cases]
    files = {stem_of(path): path} if is_image_place(path) else files_by_stem(path)
    return [_file_truth(name, file, partial(_numbers, file)) for name, file in files.items()]


def _of_objects(dataset: Dataset) -> Dataset:
    """The dataset with a legend of objects, where its values look like classes.

    A value that only seemed to mean "not annotated" may well be an object; one below 0 cannot, nor can one that was stated.
    """
    legend = dataset.legend
    if legend.kind == "instances":
        return dataset
    stated = dataset.config.not_annotated is not None
    ignored = tuple(value for value in legend.ignored if stated or (isinstance(value, int) and value < 0))
    return replace(dataset, legend=replace(legend, kind="instances", ignored=ignored, snap=False))


def _instances(dataset: Dataset, case: Case) -> np.ndarray:
    """The objects (*S) of a case of a dataset of objects."""
    objects = dataset.read_instances(case)
    if objects is None:
        raise ValueError(f"{dataset.root} must have a legend of instances, got {dataset.legend.kind}")
    return objects


def _numbers(path: Path) -> np.ndarray:
    """The numbers of objects (*S) in a label file.

    Raises:
        DataError: values are no whole numbers, or the file has channels that are no colours.
    """
    return label_codes(read_image(path, palette="indices"))[0]


def _evaluate_objects(truths: Sequence[Truth], found: Mapping[str, Path], where: tuple[Path, Path], pictures: bool) -> dict[str, Any]:
    """Scores of the objects in truth and predictions, `where` they are, with the worst cases drawn if that is asked for."""

    def score(item: Truth) -> ObjectScore:
        path = found[item.named.case]
        return score_objects(*_checked(item, path, _numbers(path)), case=item.named.case)

    rows = _each(truths, score)
    _warn_of_classes(rows, where)
    result = summarise_objects(rows, groups=_groups(truths))
    if pictures:
        by_name = {item.named.case: item for item in truths}
        result["pictures"] = _each([by_name[name] for name in result["worst"][:MOST_PICTURES]], lambda item: _draw(item, found))
    return result


def _warn_of_classes(rows: Sequence[ObjectScore], where: tuple[Path, Path]) -> None:
    """Warn where truth or predictions have at most one object in every case, as masks of a class have."""
    most = max(row.num_truth for row in rows), max(row.num_predicted for row in rows)
    if min(most) <= 1:
        message = f"{where[0 if most[0] <= 1 else 1]}: no file has more than one value beside 0, so all of its foreground counts as one "
        warnings.warn(message + "object; if the values are classes, give each object a number of its own", DataWarning, stacklevel=4)


def _draw(item: Truth, found: Mapping[str, Path]) -> dict[str, Any]:
    """The picture of one case; without its image where that is not there or cannot be read."""
    truth, prediction = item.read(), _numbers(found[item.named.case])
    try:
        image = item.read_image() if item.read_image else None
    except MicrotomeError:
        image = None
    return draw_objects(truth, prediction, image, case=item.named.case)
