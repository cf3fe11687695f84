"""What a file's name says: whether it is an image or a label, and which other file it belongs to."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from microtome.errors import ConfigError, DataError
from microtome.images import files as formats
from microtome.images.files import is_image_name, store_kind, suffix_of

Role = Literal["image", "label", ""]

_IMAGE = r"images?|imgs?|im|imaging|volumes?|vol|raw|dicoms?|dcm"
_LABEL = r"masks?|labels?|lbls?|seg|segs|segmentations?|gt|ground[-_ ]?truths?|annotations?|annot|anno|trimaps?"


def _whole(words: str) -> re.Pattern[str]:
    """Words that stand alone or with digits on one side: `img2d` and `001mask`, but not `masked` or `a5gt7`."""
    return re.compile(rf"(?<![a-z0-9])(?:{words})(?![a-z])|(?<![a-z])(?:{words})(?![a-z0-9])")


# Documents that say what a store is; they change when it is written anew.
_DOCUMENTS = frozenset({".zgroup", ".zarray", ".zattrs", "zarr.json", "attributes.json", "info"})
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


def stem_of(path: Path) -> str:
    """The name without its image suffix; the whole name of a folder without one, as UIDs of DICOM series have dots in them."""
    return path.name if not suffix_of(path) and path.is_dir() else formats.stem_of(path)


def store_of(folder: Path) -> str:
    """As `images.files.store_kind`, and "" of what is no folder, cannot be read, or holds DICOM files that are an image each."""
    try:
        kind = store_kind(folder) if folder.is_dir() else ""
        return "" if kind == "dicom" and _are_pictures(folder) else kind
    except (OSError, DataError):
        # Whoever opens it is told why.
        return ""


def _are_pictures(folder: Path) -> bool:
    """Whether DICOM files are an image each; False where the package that tells is not there: whoever opens them says so."""
    from microtome.images.dicom_seg import are_separate

    try:
        return are_separate(folder)
    except ConfigError:
        return False


def is_image_place(path: Path) -> bool:
    """Whether something that may be an image is there: a file, a store, or a path that leads into a file (`a.h5/raw`) or a store."""
    if path.is_dir():
        # A folder of predictions may hold DICOM files, and is no series.
        return bool(store_of(path)) and not (path / "predictions.json").exists()
    return path.is_file() or place_of(path).is_file()


def place_of(path: Path) -> Path:
    """The file or folder on this disk that a path names or leads into: `a.h5` of `a.h5/raw`."""
    return next((each for each in (path, *path.parents) if each.exists()), path)


def outer_of(path: Path) -> Path:
    """The container that a path leads into, as far as names tell: `a.ome.zarr` of `a.ome.zarr/labels/cells`; the path itself of others."""
    return next((each for each in (*reversed(path.parents), path) if suffix_of(each)), path)


def lone_outer(root: Path, path: Path) -> Path:
    """The outermost folder below `root` that holds one DICOM series alone (`images/p1` of `images/p1/study/CT`), or the path itself.

    A folder whose name has a word of a role is none of it.
    """
    series = store_of(path) == "dicom"
    while series and root in path.parent.parents and not role_of(path.parent.name) and len(list(islice(path.parent.iterdir(), 2))) == 1:
        path = path.parent
    return path


def stamp_of(path: Path) -> tuple[str, int, int]:
    """What changes with an image, without reading it: a file's name, size and time; of a store or a folder a digest of those within.

    Of a store those of its documents count, how many entries its folders have and when these changed, two levels deep; chunks
    are not looked at one by one. Files of a folder without such documents (DICOM) all count.
    """
    place = place_of(path)
    if not place.is_dir():
        stat = place.stat()
        return path.name, stat.st_size, stat.st_mtime_ns
    digest, entries = hashlib.blake2b(digest_size=8), 0
    for folder in (place, *sorted(each for each in place.iterdir() if each.is_dir())):
        with os.scandir(folder) as found:
            members = sorted(found, key=lambda entry: entry.name)
        documents = [entry for entry in members if entry.name in _DOCUMENTS] or [entry for entry in members if entry.is_file()]
        stats = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in documents]
        digest.update(repr((folder.name, len(members), folder.stat().st_mtime_ns, stats)).encode())
        entries += len(members)
    return path.name, entries, int.from_bytes(digest.digest())


def image_files(root: Path) -> list[Path]:
    """Every image below a folder, in natural order: files, and folders that are stores or DICOM series.

    Hidden files and what archivers leave behind are none.
    """
    return sorted(_walk(root), key=lambda path: natural(path.relative_to(root).as_posix()))


def unique_names(root: Path, files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, else its path in the folder without suffix, else with it, so that none repeats.

    The stem of a series alone in its folders is that of the outermost, as `lone_outer` has it.
    """
    folders = [path.relative_to(root).parent for path in files]
    full = [(folder / stem_of(path)).as_posix() for folder, path in zip(folders, files, strict=True)]
    for names in ([stem_of(lone_outer(root, path)) for path in files], full):
        # Written to a disk that ignores case, or how accents are stored, two names that differ only in that would be one file.
        if len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(files):
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
    """In small letters, with camel case taken apart (`imagesTr` -> `images_tr`); accents as one letter each: macOS stores them as two."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", unicodedata.normalize("NFC", name)).lower()


def _walk(root: Path) -> Iterator[Path]:
    """Images below a folder, in no order; linked folders are entered, each once, and stores are not."""
    entered: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        shown = [] if real in entered else [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        stores = {name for name in shown if store_of(Path(folder, name))}
        subfolders[:] = [name for name in shown if name not in stores]
        yield from (Path(folder, name) for name in stores)
        yield from (Path(folder, name) for name in files if real not in entered and is_image_name(Path(folder, name)))
        entered.add(real)
