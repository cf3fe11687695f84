"""Which prediction belongs to which truth: by name, and never by leaving one out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from microtome.data.names import key_of, some
from microtome.errors import DataError

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
        )
    unused = sorted(set(predictions.values()) - set(found.values()))
    if unused:
        raise DataError(
            where,
            expected="a truth for every prediction",
            got=f"none for {len(unused)}: {some([path.name for path in unused])}",
            do="add their truth or move them away",
        )
    _refuse_double(found, truths)
    return found


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
            where, expected=f"one prediction of {truth.case}", got=some([path.name for path in found]), do="keep the right one there"
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
            )
        owner[path] = truth.case
