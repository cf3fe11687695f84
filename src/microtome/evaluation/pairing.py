"""Which prediction belongs to which truth: by name, and never by leaving one out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from microtome.data.listing import LISTING, Listing
from microtome.data.names import image_files, is_image_place, key_of, some, stem_of, unique_names
from microtome.errors import DataError

# Folders that `predict` makes beside its labels, one for each further map; the last holds a number for each object.
OBJECTS = "instances"
MAPS = ("probabilities", "uncertainty", "disagreement", OBJECTS)
# What `key_of` does not know: predictions are never in a dataset.
_PREDICTION = re.compile(r"(?<![a-z0-9])(?:preds?|predictions?)(?![a-z0-9])")


@dataclass(frozen=True, kw_only=True)
class Named:
    """A truth and the names that a prediction of it may have, the best first.

    Attributes:
        case: its own name.
        names: file stems (or relative paths without suffix) that mean this case.
    """

    case: str
    names: tuple[str, ...]


def pair(predictions: Mapping[str, Path], truths: Sequence[Named], *, where: Path) -> dict[str, Path]:
    """The prediction file of each case: the one with the same name, else the same name without role words.

    Args:
        predictions: names (file stems) and their files.
        truths: what must be found among them.
        where: the folder of predictions, named in errors.

    Raises:
        DataError: a case without a prediction, a prediction without a case, or two files for one case.
    """
    found = {truth.case: path for truth in truths if (path := _find(truth, predictions, where))}
    missing = [truth.case for truth in truths if truth.case not in found]
    if missing:
        raise DataError(
            where,
            expected=f"a prediction for each of {len(truths)} cases",
            got=f"none for {len(missing)}: {some(missing)}",
            do="predict them too, or evaluate against a truth without them",
            code="D071",
        )
    unused = sorted(set(predictions.values()) - set(found.values()))
    if unused:
        raise DataError(
            where,
            expected="a truth for every prediction",
            got=f"none for {len(unused)}: {some([path.name for path in unused])}",
            do="add their truth or move them away",
            code="D072",
        )
    _refuse_double(found, truths)
    return found


def prediction_files(predictions: Path, listed: Listing | None) -> dict[str, Path]:
    """The prediction files by the names that cases may know them by.

    Raises:
        DataError: two are listed for one case, or one in the folder is not listed.
    """
    if is_image_place(predictions):
        entry = listed.entries.get(predictions.name) if listed else None
        return {entry.case if entry else stem_of(predictions): predictions}
    if listed is None:
        return files_by_stem(predictions)
    files: dict[str, Path] = {}
    for name, entry in listed.entries.items():
        if entry.case in files:
            got = f"{files[entry.case].name} and {name}"
            raise DataError(
                predictions / LISTING, expected=f"one prediction of {entry.case}", got=got, do="predict into an empty folder", code="D073"
            )
        files[entry.case] = predictions / name
    known = set(files.values())
    maps = {path for name in MAPS if (predictions / name).is_dir() for path in image_files(predictions / name)}
    # A label file is not left out in silence: it may be somebody's prediction of a case, or that of an unfinished call.
    others = [path.relative_to(predictions).as_posix() for path in image_files(predictions) if path not in known | maps]
    if others:
        got = f"{len(others)} that {LISTING} does not list: {some(others)}"
        raise DataError(
            predictions, expected="only files that `predict` wrote", got=got, do="predict again, or move them away", code="D076"
        )
    # A file that is listed and not there is reported as the missing prediction of its case.
    return {case: path for case, path in files.items() if path.exists()}


def files_by_stem(folder: Path) -> dict[str, Path]:
    """All images below a folder by their relative path without suffix.

    Raises:
        DataError: none there, or two that differ in the suffix only.
    """
    paths = image_files(folder)
    if not paths:
        raise DataError(folder, expected="label images", got="none", do="check the path", code="D074")
    return dict(zip(unique_names(folder, paths), paths, strict=True))


def label_maps(found: Mapping[str, Path]) -> dict[str, Path]:
    """Where the classes of each prediction are: of a store that `predict` wrote the label map in it, of others themselves."""
    return {case: within if (within := path / "labels" / "prediction").is_dir() else path for case, path in found.items()}


def object_maps(found: Mapping[str, Path], folder: Path, listed: Listing | None) -> dict[str, Path]:
    """Where the numbers of objects of each prediction are: of those that `predict` wrote beside them or within, of others themselves.

    Args:
        found: case -> its prediction.
        folder: where they are.
        listed: what `predict` wrote there.

    Raises:
        DataError: `predict` wrote labels only.
    """
    beside = folder / OBJECTS
    maps = {path.relative_to(beside).with_name(stem_of(path)): path for path in (image_files(beside) if listed and beside.is_dir() else ())}
    objects = {}
    for case, path in found.items():
        within = path / "labels" / OBJECTS
        other = within if within.is_dir() else maps.get(path.relative_to(folder).with_name(stem_of(path))) if listed else path
        if other is None:
            got = f"labels of {listed.legend.words} alone" if listed else "labels alone"
            raise DataError(path, expected="numbers of objects beside it", got=got, do="predict again with --instances", code="D075")
        objects[case] = other
    return objects


def bare_name(name: str) -> str:
    """A name without the words of its role: `train-labels` and `train_volume` are `train`; a name of nothing else stays."""
    return _PREDICTION.sub("", key_of(name)).strip("_") or name


def _find(truth: Named, predictions: Mapping[str, Path], where: Path) -> Path | None:
    """The prediction of one case, by the first rule that finds any."""
    for name in truth.names:
        if name in predictions:
            return predictions[name]
    wanted = {bare_name(name) for name in truth.names}
    found = [path for name, path in predictions.items() if bare_name(name) in wanted]
    if len(found) > 1:
        raise DataError(
            where,
            expected=f"one prediction of {truth.case}",
            got=some([path.name for path in found]),
            do="keep the right one there",
            code="D073",
        )
    return found[0] if found else None


def _refuse_double(found: Mapping[str, Path], truths: Sequence[Named]) -> None:
    """A prediction belongs to one truth."""
    owner: dict[Path, str] = {}
    for truth in truths:
        path = found[truth.case]
        if path in owner:
            raise DataError(
                path,
                expected="one truth for it",
                got=f"{owner[path]} and {truth.case}",
                do="give them names that differ in more than a role",
                code="D073",
            )
        owner[path] = truth.case
