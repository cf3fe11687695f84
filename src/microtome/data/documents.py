"""Datasets that come with a `dataset.json`: Medical Segmentation Decathlon and nnU-Net raw data, versions 1 and 2."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microtome.data.case import Case, Declared, Finding, LabelValue, Layout
from microtome.data.description import inside
from microtome.data.names import image_files, natural
from microtome.errors import DataError
from microtome.images.files import stem_of
from microtome.json_files import load_json

CHANNEL = re.compile(r"^(?P<name>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A parsed `dataset.json`."""

    root: Path
    path: Path
    content: Mapping[str, Any]


def read_document(root: Path, *, classes_known: bool = False) -> Layout | None:
    """The layout that the folder's `dataset.json` describes; None where there is none, or it is of another program.

    Args:
        root: the dataset's folder.
        classes_known: whether `microtome.yaml` names the classes, so that the document's do not matter.

    Raises:
        DataError: not JSON; files outside of the folder; classes that overlap (regions); no labelled case.
    """
    path = root / "dataset.json"
    if not path.is_file():
        return None
    content = _load(path)
    if not isinstance(content, dict) or not ("training" in content or {"labels", "channel_names"} <= set(content)):
        return None
    document = _Document(root=root, path=path, content=content)
    if isinstance(content.get("dataset"), dict):
        cases, findings = _present(_explicit(document))
    elif isinstance(content.get("training"), list):
        cases, findings = _present(_listed(document))
    else:
        cases, findings = _by_folder(document)
    cases += _unlabelled(document, cases)
    if not any(case.labels for case in cases):
        raise DataError(
            path, expected="labelled cases", got=f"{len(cases)} cases without labels", do="check that labelsTr/ is there", code="D032"
        )
    return Layout(
        sentence=f"{_kind(document, cases)} (dataset.json)",
        cases=tuple(sorted(cases, key=lambda case: natural(case.name))),
        findings=tuple(findings),
        declared=Declared() if classes_known else _declared(document),
        channel_names=_channel_names(content),
    )


def channel_groups(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files `x_0000`, `x_0001` under the name x, a file a channel in order; a file without such an end under its own."""
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in files:
        match = CHANNEL.match(stem_of(path))
        name, channel = (match["name"], int(match["channel"])) if match else (stem_of(path), 0)
        groups.setdefault(name, []).append((channel, path))
    return {name: [path for _, path in sorted(members)] for name, members in groups.items()}


def _load(path: Path) -> Any:
    """The JSON of a file of reasonable size."""
    return load_json(path, do="mend or remove the file")


def _kind(document: _Document, cases: Iterable[Case]) -> str:
    """What the folder is called by those who made it."""
    if "channel_names" in document.content:
        return "nnU-Net raw data, version 2"
    channelled = any(CHANNEL.match(stem_of(path)) for case in cases for path in case.images)
    return "nnU-Net raw data, version 1" if channelled else "Medical Segmentation Decathlon"


def _listed(document: _Document) -> Iterator[Case]:
    """Cases of a `training` list of {image, label}."""
    for entry in document.content["training"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not isinstance(entry.get("label"), str):
            raise DataError(
                document.path, expected="`training` entries as {image, label}", got=repr(entry)[:200], do="mend that entry", code="D041"
            )
        name, images = _images(document, entry["image"])
        yield Case(name=name, images=images, labels=(inside(document.root, entry["label"], document.path),))


def _explicit(document: _Document) -> Iterator[Case]:
    """Cases of version 2's `dataset`: name -> {images, label}."""
    for name, entry in document.content["dataset"].items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if (
            not isinstance(images, list)
            or not images
            or not all(isinstance(image, str) for image in images)
            or not isinstance(entry.get("label"), str)
        ):
            raise DataError(
                document.path,
                expected="`dataset` entries as {images, label}",
                got=f"{name}: {entry}"[:200],
                do="mend that entry",
                code="D041",
            )
        files = tuple(inside(document.root, image, document.path) for image in images)
        yield Case(name=name, images=files, labels=(inside(document.root, entry["label"], document.path),))


def _present(named: Iterable[Case]) -> tuple[list[Case], list[Finding]]:
    """The cases whose files are all there, and a finding for each other one; the first of two equal names counts."""
    cases: dict[str, Case] = {}
    findings = []
    for case in named:
        missing = [path for path in case.images + case.labels if not path.is_file()]
        if missing:
            message = f"dataset.json names {missing[0]}, which is not there"
            findings.append(Finding(severity="error", code="missing-file", case=case.name, message=message, files=tuple(missing)))
        elif case.name in cases:
            message = f"dataset.json names the case {case.name} twice; the first is used"
            findings.append(Finding(severity="error", code="repeated-case", case=case.name, message=message))
        else:
            cases[case.name] = case
    return list(cases.values()), findings


def _by_folder(document: _Document) -> tuple[list[Case], list[Finding]]:
    """Cases of version 2's imagesTr/ and labelsTr/, by the `file_ending` that the document states."""
    groups = channel_groups(_files(document, "imagesTr"))
    labels = {stem_of(path): path for path in _files(document, "labelsTr")}
    cases: list[Case] = []
    findings: list[Finding] = []
    channels = len(_channel_names(document.content))
    for name, images in groups.items():
        if len(images) != channels:
            message = f"{name}: {len(images)} files in imagesTr/ for {channels} channels of dataset.json"
            findings.append(Finding(severity="error", code="missing-channel", case=name, message=message, files=tuple(images)))
            continue
        cases.append(Case(name=name, images=tuple(images), labels=(labels[name],) if name in labels else ()))
        if name not in labels:
            message = f"{images[0].name} has no label in labelsTr/; it is not used for training"
            findings.append(Finding(severity="warning", code="unpaired-image", case=name, message=message, files=tuple(images)))
    for name in labels.keys() - groups.keys():
        message = f"labelsTr/{labels[name].name} has no image in imagesTr/; it is not used"
        findings.append(Finding(severity="warning", code="unpaired-label", case=name, message=message, files=(labels[name],)))
    return cases, sorted(findings, key=lambda finding: natural(finding.case))


def _files(document: _Document, folder: str) -> list[Path]:
    """Image files of a subfolder, of the stated ending where one is stated."""
    ending = str(document.content.get("file_ending", ""))
    where = document.root / folder
    return [path for path in image_files(where) if path.name.endswith(ending)] if where.is_dir() else []


def _images(document: _Document, name: str) -> tuple[str, tuple[Path, ...]]:
    """The case's name and files of an image that a list names; version 1 leaves the channel's number out."""
    path = inside(document.root, name, document.path)
    if path.is_file():
        match = CHANNEL.match(stem_of(path))
        return (match["name"] if match else stem_of(path)), (path,)
    stem, ending = stem_of(path), path.name.removeprefix(stem_of(path))
    channels = [path.with_name(f"{stem}_{number:04d}{ending}") for number in range(max(1, len(_channel_names(document.content))))]
    return stem, tuple(channels) if channels[0].is_file() else (path,)


def _unlabelled(document: _Document, cases: Iterable[Case]) -> list[Case]:
    """Cases of imagesTs/, which have no labels and need none."""
    known = {case.name for case in cases}
    groups = channel_groups(_files(document, "imagesTs"))
    tests = [Case(name=name, images=tuple(images)) for name, images in groups.items()]
    return [replace(case, name=f"imagesTs/{case.name}") if case.name in known else case for case in tests]


def _channel_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the channels in order, from either version's word for them."""
    names = content.get("channel_names", content.get("modality", {}))
    if isinstance(names, dict):
        return tuple(str(names[key]) for key in sorted(names, key=lambda key: natural(str(key))))
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _declared(document: _Document) -> Declared:
    """Classes as `labels` names them: number -> name in version 1 and the Decathlon, name -> number in version 2."""
    labels = document.content.get("labels", {})
    if not isinstance(labels, dict):
        raise DataError(document.path, expected="`labels` as {name: value}", got=repr(labels)[:200], do="mend `labels`", code="D041")
    classes: dict[str, tuple[LabelValue, ...]] = {}
    ignored: tuple[LabelValue, ...] = ()
    for key, other in labels.items():
        name, value = (str(other), key) if re.fullmatch(r"-?\d+", str(key)) and isinstance(other, str) else (str(key), other)
        number = _number(document, name, value)
        if name.casefold() == "ignore":
            ignored += (number,)
        else:
            classes[name] = (*classes.get(name, ()), number)
    return Declared(classes=classes, ignored=ignored, source=str(document.path))


def _number(document: _Document, name: str, value: Any) -> int:
    """The value of one class."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise DataError(
            document.path,
            expected="one value for each of `labels`",
            got=f"the region {name!r}: {value}"[:200],
            do="give `classes:` without overlaps in microtome.yaml; regions are not supported yet",
            code="D041",
        )
    # Exported tables hold 1.0 and "1".
    whole = re.fullmatch(r"-?\d{1,18}(\.0)?", str(value)) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    if whole is None:
        got = f"{name!r}: {value!r}"[:200]
        raise DataError(document.path, expected="whole numbers in `labels`", got=got, do="mend that entry", code="D041")
    return int(float(value)) if whole[1] else int(value)
