"""What a file's name says: whether it is an image or a label, and which other file it belongs to."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from microtome.images.files import is_image_name, stem_of

Role = Literal["image", "label", ""]

_IMAGE = r"images?|imgs?|im|imaging|volumes?|vol|raw"
_LABEL = r"masks?|labels?|lbls?|seg|segs|segmentations?|gt|ground[-_ ]?truths?|annotations?|annot|anno|trimaps?"


def _whole(words: str) -> re.Pattern[str]:
    """Words that stand alone or with digits on one side: `img2d` and `001mask`, but not `masked` or `a5gt7`."""
    return re.compile(rf"(?<![a-z0-9])(?:{words})(?![a-z])|(?<![a-z])(?:{words})(?![a-z0-9])")


_IMAGE_WORDS, _LABEL_WORDS, _ROLE_WORDS = _whole(_IMAGE), _whole(_LABEL), _whole(f"{_LABEL}|{_IMAGE}")


def role_of(name: str) -> Role:
    """What the words of a file's stem or of a folder's name say; a label word outweighs an image word."""
    plain = _plain(name)
    if _LABEL_WORDS.search(plain):
        return "label"
    return "image" if _IMAGE_WORDS.search(plain) else ""


def key_of(name: str) -> str:
    """A name without case and without the words of its role: `train-volume` and `Train_Labels` are both `train`."""
    return re.sub(r"[-_. ]+", "_", _ROLE_WORDS.sub("", _plain(name))).strip("_")


def natural(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """A key to sort names as people count, case_2 before case_10; only equal names have equal keys."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)), name


def image_files(root: Path) -> list[Path]:
    """Every image file below a folder, in natural order; hidden files and what archivers leave behind are not."""
    return sorted(_walk(root), key=lambda path: natural(path.relative_to(root).as_posix()))


def unique_names(root: Path, files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, else its path in the folder without suffix, else with it, so that none repeats."""
    folders = [path.relative_to(root).parent for path in files]
    full = [(folder / stem_of(path)).as_posix() for folder, path in zip(folders, files, strict=True)]
    for names in ([stem_of(path) for path in files], full):
        # Written to a disk that ignores case, two names that differ only in it would be one file.
        if len({name.casefold() for name in names}) == len(files):
            return names
    return [path.relative_to(root).as_posix() for path in files]


def some(names: Iterable[object], most: int = 5) -> str:
    """The first few of a list, and how many more."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def relative(root: Path, path: Path) -> str:
    """A path as it stands in a folder; whole where it lies outside."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def relative_words(root: Path, message: str) -> str:
    """A message in which files of a folder are named as they stand in it."""
    return message.replace(os.path.join(root, ""), "")


def _plain(name: str) -> str:
    """In small letters, with camel case taken apart: `imagesTr` -> `images_tr`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _walk(root: Path) -> Iterator[Path]:
    """Image files below a folder, in no order; linked folders are entered, each once."""
    entered: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in entered else [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        yield from (Path(folder, name) for name in files if real not in entered and is_image_name(Path(folder, name)))
        entered.add(real)
