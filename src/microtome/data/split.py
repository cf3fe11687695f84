"""Which cases train and which validate: by group, with every class on both sides where that can be, from a seed."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from microtome.data.case import Case, Finding, Plane, Planes
from microtome.data.dataset import Dataset
from microtome.data.names import natural, place_of, some
from microtome.data.planes import annotated_planes, plane_name
from microtome.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Split:
    """The two parts of a dataset's labelled cases.

    Attributes:
        train: what is learned from.
        validation: what is scored during training; empty for `all`.
    """

    train: tuple[Case, ...]
    validation: tuple[Case, ...]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Cases that stay together, and the classes that occur in them."""

    name: str
    cases: tuple[Case, ...]
    classes: frozenset[int]


def split_dataset(dataset: Dataset, fold: str = "1/5", seed: int = 0, holdout: str = "cases") -> Split:
    """Split the labelled cases, never a group, the same way for the same names, classes and seed, whatever the order of files.

    `validation:` and `validation_sections:` of `microtome.yaml` come before a fold. A dataset of one case is cut
    along its slowest axis (sections of a volume, rows of a picture): part 1 of N is the last block. With fewer groups
    than N there are as many folds as groups.

    Args:
        dataset: with at least one labelled case.
        fold: "K/N", part K of N validates; "all": everything trains and nothing validates.
        seed: of what is random in the choice of folds; with slices nothing is.
        holdout: "cases": whole cases validate; "slices": annotated planes of sparsely annotated volumes do, every N-th
            of them across Z, then Y, then X. Such a volume is in both parts, in training without these planes and in
            validation with nothing else. A voxel of one of them trains nothing, though it may lie in another plane too.
            Where neighbouring sections were painted the score is too good: they look alike.

    Raises:
        ConfigError: the fold cannot be read or does not exist here; `validation:` tears a group apart or leaves nothing;
            `holdout` is none of the two; no volume has two annotated planes, or `validation:` is stated beside them.
        DataError: no labelled case.
    """
    cases = sorted(dataset.labelled, key=lambda case: natural(case.name))
    if not cases:
        raise DataError(
            dataset.root, expected="labelled cases", got=f"{len(dataset.cases)} cases without readable labels", do="add labels", code="D032"
        )
    if holdout not in ("cases", "slices"):
        raise ConfigError("holdout", expected="cases or slices", got=repr(holdout), do="give one of the two", code="C001")
    part, parts = parse_fold(fold)
    if parts == 1:
        return Split(train=tuple(cases), validation=())
    if holdout == "slices":
        return _slices(dataset, cases, part, parts)
    if dataset.config.validation_sections:
        return _fixed_sections(dataset, cases, dataset.config.validation_sections)
    if dataset.config.validation:
        return _fixed_cases(dataset, cases)
    if len(cases) == 1:
        return _sections(dataset, cases[0], part, parts)
    groups = _groups(cases, dataset.class_counts)
    if len(groups) == 1:
        got = f"one group, {groups[0].name!r}, of {len(cases)} cases"
        raise ConfigError(
            dataset.root, expected="two groups at least", got=got, do="train with --fold all or state `validation:`", code="C015"
        )
    folds = _folds(groups, _available(part, parts, len(groups), "groups"), seed)
    chosen = {case.name for group in folds[part - 1] for case in group.cases}
    return _by_names(cases, chosen)


def cut_case(split: Split, dataset: Dataset) -> list[Finding]:
    """A note where the only case is cut in two, and nobody said where, to have something to validate on."""
    found: list[Finding] = []
    if dataset.config.validation_sections:
        return found
    for case in (case for case in split.validation if case.sections and case.images in {other.images for other in split.train}):
        first, past = case.sections or (0, 0)
        text = f"{case.group}: one labelled image for both parts: sections (of a picture: rows) {first} to {past - 1} validate, "
        text += "the others train; they are neighbours, so that scores are a little too good"
        found.append(Finding(severity="note", code="cut-case", case=case.name, message=text, files=case.images))
    return found


def leaks(split: Split) -> list[Finding]:
    """Images that train and, as another file of the same bytes, validate: their score would be too good.

    Files are read only where their sizes agree. (`microtome inspect` compares pixels, which takes longer.)
    """
    parts = {"train": split.train, "validation": split.validation}
    # Of stores nothing is compared: their bytes are in many files.
    places = {part: {place_of(path) for case in cases for path in case.images} for part, cases in parts.items()}
    files = {part: {place for place in found if place.is_file()} for part, found in places.items()}
    files = {part: paths - (files["train"] & files["validation"]) for part, paths in files.items()}
    sizes = {part: {path.stat().st_size for path in paths} for part, paths in files.items()}
    shared = sizes["train"] & sizes["validation"]
    twins: dict[str, dict[str, Path]] = defaultdict(dict)
    for part, paths in files.items():
        for path in sorted(paths):
            if path.stat().st_size in shared:
                with path.open("rb") as file:
                    twins[hashlib.file_digest(file, "blake2b").hexdigest()].setdefault(part, path)
    found = [(pair["train"], pair["validation"]) for pair in twins.values() if len(pair) == 2]
    if not found:
        return []
    first, second = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    text = f"{first.name} trains and {second.name} validates, and they are the same file{more}: the score will be too good; remove one"
    return [Finding(severity="error", code="leak", message=text, files=(first, second))]


def parse_fold(fold: str) -> tuple[int, int]:
    """K and N of "K/N"; 1 and 1 for "all".

    Raises:
        ConfigError: it is neither.
    """
    if fold == "all":
        return 1, 1
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", fold)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if parts < 2 or not 1 <= part <= parts:
        raise ConfigError(
            "fold", expected='"K/N" with K from 1 to N and N of 2 or more, or "all"', got=repr(fold), do="try 1/5", code="C014"
        )
    return part, parts


def _available(part: int, parts: int, units: int, what: str) -> int:
    """The number of folds that so many units allow."""
    if part > min(parts, units):
        got = f"{part}/{parts}, and there are {units} {what}"
        raise ConfigError(
            "fold", expected=f"a part of at most {units}", got=got, do=f"take a fold from 1/{parts} to {units}/{parts}", code="C014"
        )
    return min(parts, units)


def _by_names(cases: Iterable[Case], chosen: set[str]) -> Split:
    """The split with the chosen cases in validation."""
    cases = tuple(cases)
    return Split(
        train=tuple(case for case in cases if case.name not in chosen), validation=tuple(case for case in cases if case.name in chosen)
    )


def _fixed_cases(dataset: Dataset, cases: Sequence[Case]) -> Split:
    """The split that `validation:` states."""
    chosen = set(dataset.config.validation)
    named_by = dataset.root / "microtome.yaml"
    labelled = {case.name for case in cases}
    unlabelled = [name for name in dataset.config.validation if name not in labelled]
    if unlabelled:
        got = some(unlabelled)
        raise ConfigError(named_by, expected="labelled cases in `validation`", got=got, do="take them out or add their labels", code="C016")
    split = _by_names(cases, chosen)
    torn = {case.group for case in split.train} & {case.group for case in split.validation}
    if torn or not split.train:
        got = f"group {sorted(torn)[0]!r} in both parts" if torn else "every case in `validation`"
        raise ConfigError(named_by, expected="groups that train and groups that validate", got=got, do="mend `validation`", code="C016")
    return split


def _groups(cases: Sequence[Case], class_counts: Mapping[str, tuple[int, ...]]) -> list[_Group]:
    """The groups in natural order; the last count of a case is of what is not annotated, no class."""
    members: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        members[case.group or case.name].append(case)
    return [
        _Group(
            name=name,
            cases=tuple(group),
            classes=frozenset(index for case in group for index, n in enumerate(class_counts.get(case.name, ())[:-1]) if n),
        )
        for name, group in sorted(members.items(), key=lambda item: natural(item[0]))
    ]


@dataclass(kw_only=True)
class _Fold:
    """A fold while groups are dealt out: its groups, how many of them have each class, and its number of cases."""

    groups: list[_Group] = field(default_factory=list)
    classes: Counter[int] = field(default_factory=Counter)
    cases: int = 0

    def add(self, group: _Group) -> None:
        """Take a group in."""
        self.groups.append(group)
        self.classes.update(group.classes)
        self.cases += len(group.cases)


def _folds(groups: Sequence[_Group], parts: int, seed: int) -> list[list[_Group]]:
    """Groups dealt out so that each fold has its share of each class and of the cases; the rarest class first.

    Of equally good folds the last is taken, so that a class which only one group has is learned from in the first fold.

    References:
        Sechidis et al. 2011, On the stratification of multi-label data, doi:10.1007/978-3-642-23808-6_10.
    """
    # The groups come sorted, so that the shuffle follows from the seed alone.
    waiting = [groups[int(index)] for index in np.random.default_rng(seed).permutation(len(groups))]
    sizes = Counter(index for group in groups for index in group.classes)
    dealt = [_Fold() for _ in range(parts)]
    while waiting:
        left = Counter(index for group in waiting for index in group.classes)
        rarest = min(left, key=lambda index: (left[index], index), default=None)
        for group in waiting:
            if rarest is None or rarest in group.classes:
                _best_fold(group, dealt, sizes, rarest).add(group)
        waiting = [group for group in waiting if rarest is not None and rarest not in group.classes]
    return [fold.groups for fold in dealt]


def _best_fold(group: _Group, dealt: Sequence[_Fold], sizes: Mapping[int, int], rarest: int | None) -> _Fold:
    """The fold that needs a group most; an empty one always does."""

    def need(place: int) -> tuple[int, int, int]:
        fold = dealt[place]
        # With this group the fold would hold all that there is of these classes, and training on the others none.
        alone = sum(0 < fold.classes[index] == sizes[index] - 1 for index in group.classes)
        return alone, fold.classes[rarest] if rarest is not None else 0, fold.cases

    return dealt[min(reversed(range(len(dealt))), key=need)]


def _sections(dataset: Dataset, case: Case, part: int, parts: int) -> Split:
    """A single case cut along its slowest axis into blocks with equally many annotated sections."""
    found = dataset.annotated_sections(case)
    annotated = np.flatnonzero(found)
    if len(annotated) < 2:
        got = f"{len(annotated)} of {len(found)}"
        raise ConfigError(case.name, expected="two annotated sections or rows at least", got=got, do="train with --fold all", code="C015")
    parts = _available(part, parts, len(annotated), "annotated sections")
    # Part 1 is the last block: round(k n / N) counted from the end.
    first, past = (len(annotated) - round(k * len(annotated) / parts) for k in (part, part - 1))
    return _cut(case, len(found), _border(annotated, first, len(found)), _border(annotated, past, len(found)))


def _border(annotated: np.ndarray, index: int, sections: int) -> int:
    """The section at which a block that begins with annotated section number `index` begins: half way from the one before."""
    if index == 0:
        return 0
    return sections if index == len(annotated) else int(annotated[index - 1] + annotated[index] + 1) // 2


def _fixed_sections(dataset: Dataset, cases: Sequence[Case], sections: tuple[int, int]) -> Split:
    """The split that `validation_sections:` states."""
    named_by = dataset.root / "microtome.yaml"
    if len(cases) != 1:
        got = f"{len(cases)} labelled cases"
        raise ConfigError(
            named_by, expected="a single stack for `validation_sections`", got=got, do="use `validation: [case, ...]`", code="C016"
        )
    count = dataset.header(cases[0]).shape_vox[0]
    if sections[1] > count or sections[1] - sections[0] == count:
        expected = f"`validation_sections` within the {count} sections of {cases[0].name}, and some that train"
        raise ConfigError(named_by, expected=expected, got=str(list(sections)), do="mend `validation_sections`", code="C016")
    return _cut(cases[0], count, *sections)


def _cut(case: Case, sections: int, first: int, past: int) -> Split:
    """The case's sections from `first` to before `past` validate, the rest trains."""
    before, within, after = (
        replace(case, name=f"{case.name}[{a}:{b}]", group=case.group or case.name, sections=(a, b))
        for a, b in ((0, first), (first, past), (past, sections))
    )
    return Split(train=tuple(part for part, size in ((before, first), (after, sections - past)) if size), validation=(within,))


def _slices(dataset: Dataset, cases: Sequence[Case], part: int, parts: int) -> Split:
    """Every N-th annotated plane of the volumes that have two or more, counted on from volume to volume, validates."""
    if dataset.config.validation or dataset.config.validation_sections:
        got = "`validation` in microtome.yaml"
        raise ConfigError("holdout", expected="nothing stated beside slices", got=got, do="remove one of the two", code="C003")
    found = {case.name: _planes(dataset, case) for case in cases}
    # A plane that is the only one of its volume would leave nothing of that to learn from.
    units = [(name, plane) for name, planes in found.items() if len(planes) >= 2 for plane in planes]
    if not units:
        expected = "a volume with two annotated planes at least, and nothing annotated between them"
        got = f"none among {some(found)}"
        raise ConfigError(dataset.root, expected=expected, got=got, do="hold out cases, or train with --fold all", code="C015")
    chosen: dict[str, list[Plane]] = defaultdict(list)
    for name, plane in units[part - 1 :: _available(part, parts, len(units), "annotated planes")]:
        chosen[name].append(plane)
    sides = [_sides(case, tuple(chosen.get(case.name, ()))) for case in cases]
    return Split(train=tuple(train for train, _ in sides), validation=tuple(held for _, held in sides if held))


def _planes(dataset: Dataset, case: Case) -> tuple[Plane, ...]:
    """The annotated planes of a case that can be told apart; none of a picture or where all is annotated."""
    if case.planes and case.planes.shown:
        return case.planes.shown
    header = dataset.headers.get(case.name)
    counts = dataset.class_counts.get(case.name)
    if (header and len(header.shape_vox) != 3) or (counts and not counts[-1]):
        return ()
    return annotated_planes(dataset.read_label(case)) or ()


def _sides(case: Case, planes: tuple[Plane, ...]) -> tuple[Case, Case | None]:
    """A case without some planes, to train on, and with nothing but these, to validate with; whole where there are none."""
    if not planes:
        return case, None
    before = case.planes or Planes()
    # A name becomes that of a file, so it must not grow with the planes; the first ones tell folds apart.
    words = [plane_name(plane) for plane in planes]
    listed = "+".join(words if len(words) <= 4 else [*words[:3], f"{len(words) - 3}more"])
    train = replace(case, planes=Planes(shown=before.shown, hidden=(*before.hidden, *planes)))
    return train, replace(
        case, name=f"{case.name}[{listed}]", group=case.group or case.name, planes=Planes(shown=planes, hidden=before.hidden)
    )
