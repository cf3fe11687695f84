"""`microtome.yaml`: the small file beside the images that says what cannot be seen in them."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from microtome.config import Config, parse_config
from microtome.data.case import LabelValue
from microtome.data.names import some
from microtome.data.patterns import quick_pattern
from microtome.errors import ConfigError, DataError
from microtome.yaml_files import load_yaml

NAMES = ("microtome.yaml", "microtome.yml")
# What Linux takes, less what is put behind a name (`_0000`); a longer one is an error wherever it is asked for.
_MOST_NAME_BYTES, _MOST_PATH_BYTES = 240, 4000


def _label_value(value: Any) -> LabelValue:
    """A number, or a colour as "#rrggbb" or as three numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(part, int) and 0 <= part <= 255 for part in value):
        return value[0], value[1], value[2]
    raise ValueError(f'a whole number or a colour in quotes ("#ff8800"), not {value!r}')


def _label_values(value: Any) -> tuple[LabelValue, ...]:
    """One value or a list of them."""
    return tuple(_label_value(each) for each in (value if isinstance(value, list | tuple) else [value]))


def _classes(value: Any) -> Any:
    """`[names]`, `{name: value or values}` or `{value: name}` -> {name: values}."""
    if isinstance(value, list):
        if len({str(name) for name in value}) < len(value):
            raise ValueError(f"each name once, not {value}")
        return {str(name): () for name in value}
    if not isinstance(value, dict):
        raise ValueError(f"a list of names or `name: value` lines, not {value!r}")
    if all(isinstance(key, int) for key in value):
        names = dict.fromkeys(str(name) for name in value.values())
        return {name: tuple(key for key, other in value.items() if str(other) == name) for name in names}
    return {str(name): _label_values(values) for name, values in value.items()}


def _words(value: Any) -> Any:
    """`{key: word}` with single words as lists of one."""
    return {str(k): (v,) if isinstance(v, str) else v for k, v in value.items()} if isinstance(value, dict) else value


class DatasetConfig(Config):
    """The content of `microtome.yaml`; every name may be left out."""

    classes: Annotated[Mapping[str, tuple[LabelValue, ...]], BeforeValidator(_classes)] = Field(
        default_factory=dict, description="name: value, or several values, or a colour; or only the names in the order of the values"
    )
    not_annotated: Annotated[tuple[LabelValue, ...] | None, BeforeValidator(lambda v: v if v is None else _label_values(v))] = Field(
        default=None, description="values of voxels that nobody looked at; an empty list: there are none"
    )
    background: str | None = Field(
        default="", description="the class that is not foreground, null: none; by default the one of that name or else of value 0 or black"
    )
    spacing_mm: tuple[float, ...] | None = Field(default=None, description="voxel size along Z, Y, X (or Y, X), whatever the files say")
    images: str | None = Field(
        default=None,
        description="subfolder or glob of the images (`scans`, `scans/*_t1.nii.gz`); of containers the part's name (`raw`)",
    )
    labels: str | None = Field(default=None, description="subfolder or glob of the labels; of containers the part's name (`cells`)")
    pairs: Annotated[Mapping[str, tuple[str, ...]], BeforeValidator(_words)] = Field(
        default_factory=dict, description="image: label, where names do not show which belong together"
    )
    instances: bool | None = Field(default=None, description="true: each value is an object, not a class")
    groups: Annotated[Mapping[str, tuple[str, ...]], BeforeValidator(_words)] = Field(
        default_factory=dict, description="group: [cases] that a split keeps together (a patient)"
    )
    group_by: str | None = Field(
        default=None, description="regular expression on a case's name, with at most three `+` or `*`; its first bracket is the group"
    )
    validation: tuple[str, ...] = Field(default=(), description="the cases that validate, instead of a fold")
    validation_sections: tuple[int, int] | None = Field(
        default=None, description="of a single stack: first section that validates, and past the last"
    )

    @field_validator("spacing_mm")
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (len(value) not in (2, 3) or not all(0 < size < float("inf") for size in value)):
            raise ValueError(f"two or three positive numbers, one an axis, not {value}")
        return value

    @field_validator("group_by")
    @classmethod
    def _has_group(cls, value: str | None) -> str | None:
        brackets = 1 if value is None else quick_pattern(value).groups
        if brackets < 1:
            raise ValueError("a regular expression with a bracket around the group, such as `(patient\\d+)_`")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_repeats("class", self.classes)
        _refuse_repeats("group", self.groups)
        if len({bool(values) for values in self.classes.values()}) > 1:
            raise ValueError("a value for every class, or for none")
        if self.validation_sections and not 0 <= self.validation_sections[0] < self.validation_sections[1]:
            raise ValueError(f"validation_sections as [first, past the last], not {list(self.validation_sections)}")
        return self


def load_description(folder: Path) -> tuple[DatasetConfig, str]:
    """The folder's `microtome.yaml` and its path for messages; an empty config where there is none.

    Raises:
        ConfigError: not YAML, an unknown name, a value that cannot be.
        DataError: a glob that cannot be.
    """
    path = next((folder / name for name in NAMES if (folder / name).is_file()), folder / NAMES[0])
    if not path.is_file():
        return DatasetConfig(), str(path)
    values = load_yaml(path)
    config = parse_config(DatasetConfig, {} if values is None else values, path)
    for pattern in filter(None, (config.images, config.labels)):
        _check_pattern(pattern, path)
    return config, str(path)


def _check_pattern(pattern: str, named_by: Path) -> None:
    """Refuse a name or glob that no file system, or no glob, takes."""
    parts = Path(pattern).parts
    long = any(len(part.encode("utf-8", "surrogatepass")) >= _MOST_NAME_BYTES for part in parts)
    if long or any("**" in part and part != "**" for part in parts):
        expected = f"a glob whose parts have fewer than {_MOST_NAME_BYTES} bytes, with `**` alone between slashes"
        raise DataError(named_by, expected=expected, got=repr(pattern)[:200], do="mend it", code="D031")


def inside(root: Path, name: str, named_by: str | Path) -> Path:
    """The file that a document names, which must lie in the dataset's folder.

    Raises:
        DataError: an absolute name, one that climbs out with `..`, or a link that leads out.
    """
    path = _stored(root, name)
    try:
        short = len(os.fsencode(path)) < _MOST_PATH_BYTES and all(len(os.fsencode(part)) < _MOST_NAME_BYTES for part in path.parts)
        safe = short and not Path(name).is_absolute() and path.resolve().is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError):
        # A null byte, what is no text, or a circle of links.
        safe = False
    if not safe:
        raise DataError(
            named_by, expected=f"names of files inside {root}", got=repr(name)[:200], do="copy that file into the folder", code="D042"
        )
    return path


def existing(root: Path, name: str, named_by: str | Path) -> Path:
    """Like `inside`, for a file that must be there.

    Raises:
        DataError: outside, or not there.
    """
    path = inside(root, name, named_by)
    if not path.is_file():
        raise DataError(
            named_by, expected=f"a file {name!r} in {root}", got="no such file", do="mend the name or add the file", code="D043"
        )
    return path


def as_stored(config: DatasetConfig, cases: Iterable[str]) -> DatasetConfig:
    """What is said of cases under the names that their files have: a Mac stores an accent as two letters, a keyboard types one."""
    known = set(cases)
    alike = {_typed(case): case for case in known}

    def stored(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name if name in known else alike.get(_typed(name), name) for name in names)

    groups = {group: stored(members) for group, members in config.groups.items()}
    return config.model_copy(update={"groups": groups, "validation": stored(config.validation)})


def unknown_name(where: str, kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a case that a document names and the folder does not have."""
    return ConfigError(
        where, expected=f"`{kind}` to name cases out of {some(sorted(known), 8)}", got=repr(name), do="mend the name", code="C017"
    )


def _stored(root: Path, name: str) -> Path:
    """The place of that name, or of one that differs only in how accents are stored, where that alone is there."""
    path = root / name
    if name.isascii() or os.path.lexists(path) or Path(name).is_absolute() or ".." in Path(name).parts:
        return path
    found = root
    for part in Path(name).parts:
        exact = found / part
        if part.isascii() or os.path.lexists(exact):
            found = exact
            continue
        try:
            alike = [entry for entry in os.listdir(found) if _typed(entry) == _typed(part)]
        except (OSError, ValueError):
            return path
        found = found / alike[0] if len(alike) == 1 else exact
    return found


def _typed(name: str) -> str:
    """With accents as one letter each, as they are typed."""
    return unicodedata.normalize("NFC", name)


def _refuse_repeats(kind: str, members: Mapping[str, tuple[Any, ...]]) -> None:
    """A value belongs to one class, a case to one group."""
    owner: dict[Any, str] = {}
    for name, values in members.items():
        for value in values:
            if owner.setdefault(value, name) != name:
                raise ValueError(f"one {kind} for {value!r}, not both {owner[value]!r} and {name!r}")
