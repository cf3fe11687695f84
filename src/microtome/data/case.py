"""The nouns of a dataset: a case, a finding about it, and what a layout found out before any pixel was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from microtome.codes.findings import BY_FINDING
from microtome.errors import PREFIX

# Nothing is learned from voxels of this value and nothing is scored on them.
NOT_ANNOTATED = -1

# What stands in a label file: a number, or a colour (red, green, blue).
LabelValue = int | tuple[int, int, int]

# A section of a volume across one of its axes: (axis of S, index along it), counted from 0 as the file has them.
Plane = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Planes:
    """Which planes of a sparsely annotated volume count, beside what its label file says.

    Attributes:
        shown: only these are annotated; empty: all that the file annotates.
        hidden: nothing in these is annotated, their crossings with other planes included.
    """

    shown: tuple[Plane, ...] = ()
    hidden: tuple[Plane, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image, its label if there is one, and what a split must know of it.

    Attributes:
        name: unique in its dataset; relative path without suffix where stems repeat.
        images: one file, or one a channel (nnU-Net's `_0000`, `_0001`).
        labels: none, one label map, or one mask an instance (Kaggle's layout).
        group: cases of one group (a patient) are never split; the case's own name by default.
        sections: first and past-the-end section along the slowest axis, where the case is a part of a stack.
        planes: which annotated planes count, where not all do; the image is whole all the same.
    """

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    group: str = ""
    sections: tuple[int, int] | None = None
    planes: Planes | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about the data that a person should know before training.

    Attributes:
        severity: error: training on it would be wrong; warning: look at it; note: good to know.
        code: one kebab-case word for programs, such as `unpaired-image`.
        case: the case's name, empty where the finding is about the dataset.
        message: one sentence with the file's name and the value.
        files: the files it is about.
        fault: of an error that a reader raised its code, such as D012.
    """

    severity: Literal["error", "warning", "note"]
    code: str
    case: str = ""
    message: str
    files: tuple[Path, ...] = ()
    fault: str = ""

    @property
    def page(self) -> str:
        """The code that `microtome explain` tells more of, MT-D031; "" of what is no error."""
        code = self.fault or BY_FINDING.get(self.code, "")
        return f"{PREFIX}{code}" if code and self.severity == "error" else ""

    @property
    def line(self) -> str:
        """The message as a terminal shows it, with that code at its end."""
        return f"{self.message} [{self.page}]" if self.page else self.message


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a document says about the classes, so that it need not be guessed.

    Attributes:
        classes: name -> values; empty values where only the names are given, in the order of the values found.
        ignored: values that mean "not annotated"; None where the document does not say.
        source: the document, for messages; empty where there is none.
    """

    classes: Mapping[str, tuple[LabelValue, ...]] = field(default_factory=dict)
    ignored: tuple[LabelValue, ...] | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files make the cases of a folder.

    Attributes:
        sentence: for people, such as "images/ + labels/, paired by name".
        cases: all of them, labelled or not.
        findings: files without a partner, ambiguous pairs.
        per_instance: each label file is the mask of one object.
        object_name: what one instance is called where nobody says.
        declared: classes as the layout's document names them.
        channel_names: as the layout's document names them, or empty.
    """

    sentence: str
    cases: tuple[Case, ...]
    findings: tuple[Finding, ...] = ()
    per_instance: bool = False
    object_name: str = "object"
    declared: Declared = field(default_factory=Declared)
    channel_names: tuple[str, ...] = ()
