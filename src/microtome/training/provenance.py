"""Where a model comes from, for people and programs: its data, command, versions; it stands in the bundle as `provenance`."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.names import place_of
from microtome.data.split import Split
from microtome.errors import in_one_line
from microtome.lock import command
from microtome.training.folder import versions

_UNREADABLE = b"unreadable: "
# Read of each end of an image file, whose bytes may be more than anybody waits for.
END_BYTES = 1 << 16
# What a fingerprint covers, in the words that stand beside it.
COVERS = (
    "names of cases, names and sizes of files, all bytes of label files, the first and the last 64 KiB of image files; "
    "of stores and folders the names and sizes of what lies in them, one level deep"
)


def origin(dataset: Dataset, split: Split, plan: Plan) -> dict[str, Any]:
    """What a bundle says of where it comes from, apart from step and score."""
    return {
        "made_by": "microtome train",
        "data": in_one_line(str(dataset.root)),
        "training_cases": len(split.train),
        "validation_cases": len(split.validation),
        "training_data": fingerprint_of(dataset.root, split.train),
        "validation_data": fingerprint_of(dataset.root, split.validation),
        "spacing_known": dataset.config.spacing_mm is not None or all(header.spacing_known for header in dataset.headers.values()),
        "recipe": plan.recipe,
        "seed": plan.seed,
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
    }


def fingerprint_of(root: Path, cases: Iterable[Case]) -> dict[str, Any]:
    """A hash by which the same cases are known again, wherever their folder lies; with what it covers.

    Two datasets with the same fingerprint have the same labels. Images that differ only in the middle of files of the same
    size have the same one: reading terabytes a second time would take longer than the training.

    Args:
        root: the dataset's folder, from which names of files are counted.
        cases: in any order.
    """
    digest, done, total, unreadable = hashlib.blake2b(digest_size=16), set(), 0, 0
    for case in sorted(cases, key=lambda case: case.name):
        digest.update(_identity(case).encode())
        for path, whole in (*((path, False) for path in case.images), *((path, True) for path in case.labels)):
            if (path, whole) in done:
                continue
            done.add((path, whole))
            for name, size, content in _contents(path, whole):
                digest.update(repr((_relative(root, path), name, size)).encode() + content)
                total, unreadable = total + size, unreadable + content.startswith(_UNREADABLE)
    found = {"fingerprint": digest.hexdigest(), "files": len(done), "bytes": total, "covers": COVERS}
    return found | ({"unreadable": unreadable} if unreadable else {})


def _identity(case: Case) -> str:
    """What is hashed of a case beside its files, in a form that does not follow the fields of its class."""
    planes = None if case.planes is None else f"Planes(shown={case.planes.shown!r}, hidden={case.planes.hidden!r})"
    return f"({case.name!r}, {case.sections!r}, {planes})"


def _contents(path: Path, whole: bool) -> Iterator[tuple[str, int, bytes]]:
    """Name, size and digest of a file; of a store or a folder those of its members, without their bytes."""
    place = place_of(path)
    try:
        if not place.is_dir():
            yield place.name, place.stat().st_size, _digest(place, whole)
            return
        for folder in (place, *sorted(each for each in place.iterdir() if each.is_dir())):
            with os.scandir(folder) as members:
                found = sorted((entry.name, entry.stat().st_size) for entry in members if entry.is_file())
            yield from ((f"{folder.name}/{name}", size, b"") for name, size in found)
    except OSError as error:
        # What cannot be read any more was read when training began: the model is not lost for it.
        yield place.name, 0, _UNREADABLE + str(error.strerror).encode()


def _digest(path: Path, whole: bool) -> bytes:
    """A hash of a file's bytes, or of both its ends."""
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        digest = hashlib.blake2b(file.read(END_BYTES), digest_size=16)
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - END_BYTES))
        digest.update(file.read(END_BYTES))
        return digest.digest()


def _relative(root: Path, path: Path) -> str:
    """The path from the dataset's folder, or the name where it lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
