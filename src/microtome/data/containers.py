"""One file or store that holds images and their labels: HDF5 with raw + label, OME-Zarr with labels/; which of its parts are which."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from microtome.data.case import Case, Finding, Layout
from microtome.data.description import existing, inside
from microtome.data.names import Role, is_image_place, natural, relative, role_of, some, store_of, unique_names
from microtome.errors import DataError
from microtome.images.files import suffix_of
from microtome.images.hdf5 import datasets

HDF5_SUFFIXES = frozenset({".h5", ".hdf5", ".hdf", ".ilp"})
# What kinds of places are called; in a store of another kind is one image and nothing else.
_WORDS = MappingProxyType({"hdf5": "HDF5 files", "zarr": "Zarr stores", "n5": "N5 stores"})
# Of several images in one container the first of these is meant.
_USUAL_IMAGES = ("", "raw", "image", "images", "volumes/raw")
# Axes that an image may have, and groups within groups that are looked into.
_AXES, _DEPTH = range(2, 6), 4
_LIMIT_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What lies in a container, by the words of its parts' names.

    Attributes:
        path: the file or store.
        kind: "hdf5", "zarr" or "n5".
        images: names of the parts that are images; "" is the store itself.
        labels: names of the parts that are label maps.
    """

    path: Path
    kind: str
    images: tuple[str, ...]
    labels: tuple[str, ...]

    def place(self, name: str) -> Path:
        """The path of a part."""
        return self.path / name if name else self.path


def contents_of(path: Path) -> Contents | None:
    """The parts of an HDF5 file or of a Zarr or N5 store; None of everything else, and of one so damaged that whoever opens it says so.

    A part whose name, or the group around it, has a word of labels (`label`, `labels/cells`, `mask`) is a label; of the others
    those with a word of images are images, and where no name has one, all.
    """
    kind = "hdf5" if path.is_file() and suffix_of(path) in HDF5_SUFFIXES else store_of(path)
    if kind not in _WORDS:
        return None
    try:
        names = _datasets(path) if kind == "hdf5" else [part.relative_to(path).as_posix() for part in _parts(path, _DEPTH)]
    except DataError:
        return None
    roles = {("" if name == "." else name): _role(name) for name in sorted(names, key=natural)}
    labels = tuple(name for name, role in roles.items() if role == "label")
    named = tuple(name for name, role in roles.items() if role == "image" or not name)
    return Contents(path=path, kind=kind, images=named or tuple(name for name in roles if name not in labels), labels=labels)


def image_of(path: Path, stated: str | None = None) -> Path:
    """The image of a container to predict, its labels left out; of anything else the path itself.

    Raises:
        DataError: several images, none of which is stated or has a usual name.
    """
    contents = contents_of(path)
    if contents is None or not contents.images:
        return path
    if len(contents.images) == 1 and not contents.labels:
        # The reader finds it by itself.
        return path if contents.kind == "hdf5" else contents.place(contents.images[0])
    return contents.place(_chosen(contents, contents.images, stated, "images"))


def container_layout(root: Path, files: Sequence[Path], images: str | None = None, labels: str | None = None) -> Layout | None:
    """The cases of files that hold an image and its label each; None where none of them does.

    Args:
        root: the dataset's folder, or the one that a single container lies in.
        files: of the dataset; what is no container is an image without a label.
        images: the name of the image in each of them, where it is stated.
        labels: the name of the label likewise.

    Raises:
        DataError: several labels or images in one container and none stated; names them.
    """
    found = {path: contents_of(path) for path in files}
    if not any(contents and contents.labels and contents.images for contents in found.values()):
        return None
    cases, words = [], []
    for path, name in zip(files, unique_names(root, files), strict=True):
        contents = found[path]
        if contents is None or not contents.images:
            cases.append(Case(name=name, images=(path,)))
            continue
        image = _chosen(contents, contents.images, images, "images")
        known = [each for each in contents.labels if _is(each, labels)] if labels else contents.labels
        label = _chosen(contents, contents.labels, labels, "labels") if known else None
        cases.append(Case(name=name, images=(contents.place(image),), labels=() if label is None else (contents.place(label),), group=name))
        if label is not None:
            words.append(f"{_WORDS[contents.kind]} with {' + '.join(part for part in (image, label) if part)}")
    if not words:
        got = some(dict.fromkeys(part for contents in found.values() if contents for part in contents.labels))
        raise DataError(
            root, expected=f"a label `{labels}` inside of the files", got=got, do="mend `labels:` in microtome.yaml", code="D020"
        )
    sentence = some(dict.fromkeys(words), most=3)
    return Layout(sentence=sentence, cases=tuple(sorted(cases, key=lambda case: natural(case.name))), findings=_findings(root, cases))


def are_inner(root: Path, *patterns: str | None) -> bool:
    """Whether `images:` and `labels:`, of which one is stated, name parts of containers: they are no globs, and no folders there."""
    stated = [pattern for pattern in patterns if pattern]
    return bool(stated) and not any(set(pattern) & set("*?[") or (root / pattern).exists() for pattern in stated)


def existing_part(root: Path, name: str, named_by: str) -> Path:
    """Like `description.existing`, and stores and parts of containers too (`a.h5/raw`).

    Raises:
        DataError: outside of the folder, or not there.
    """
    path = inside(root, name, named_by)
    return path if is_image_place(path) else existing(root, name, named_by)


def _findings(root: Path, cases: Sequence[Case]) -> tuple[Finding, ...]:
    """One note on the images that have no label."""
    bare = [case.images[0] for case in cases if not case.labels]
    if not bare:
        return ()
    message = f"{len(bare)} images have no labels and are not used for training: {some((relative(root, path) for path in bare), 2)}"
    return (Finding(severity="note", code="unlabelled-images", message=message, files=tuple(bare)),)


def _datasets(path: Path) -> list[str]:
    """Names of the datasets of an HDF5 file that may be images."""
    return [name.strip("/") for name, shape in datasets(path).items() if len(shape) in _AXES]


def _role(name: str) -> Role:
    """What the innermost word of a part's name and groups says."""
    return next((role for word in reversed(name.split("/")) if (role := role_of(word))), "")


def _is(name: str, stated: str) -> bool:
    """Whether a part is the stated one: its whole name or the end of it (`cells` of `labels/cells`)."""
    return f"/{name}".endswith(f"/{stated.strip('/')}")


def _chosen(contents: Contents, names: Sequence[str], stated: str | None, word: str) -> str:
    """The stated part, the only one, or of images the usual one."""
    known: Callable[[str], bool] = (lambda name: _is(name, stated)) if stated else (lambda name: True)
    fitting = [name for name in names if known(name)]
    usual = [name for name in _USUAL_IMAGES if name in fitting] if word == "images" else []
    if len(fitting) == 1 or usual:
        return usual[0] if usual else fitting[0]
    got = some([name or "the store itself" for name in names], most=8)
    expected = f"one part of it as the {word}" if not stated else f"one part `{stated}` in it"
    raise DataError(
        contents.path, expected=expected, got=f"{len(fitting)} ({got})", do=f"say which in microtome.yaml: `{word}: NAME`", code="D020"
    )


def _parts(folder: Path, depth: int) -> Iterator[Path]:
    """The images of a store: arrays, and groups that are one image in several sizes; of these only `labels` is looked into."""
    if _is_image(folder):
        yield folder
        folder, depth = folder / "labels", min(depth, 1)
    if depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _parts(child, depth - 1)


def _is_image(folder: Path) -> bool:
    """Whether a folder of a store is an array or a pyramid."""
    if (folder / ".zarray").is_file():
        return True
    zarr, attributes, n5 = (_document(folder / name) for name in ("zarr.json", ".zattrs", "attributes.json"))
    inner = zarr.get("attributes")
    ome = inner.get("ome") if isinstance(inner, dict) else None
    pyramid = any(isinstance(each, dict) and "multiscales" in each for each in (attributes, inner, ome, n5))
    return pyramid or zarr.get("node_type") == "array" or "dimensions" in n5 or "dimensions" in _document(folder / "s0" / "attributes.json")


def _document(path: Path) -> dict[str, Any]:
    """A JSON object of reasonable size; empty where there is none, as whoever opens the store says what is wrong with it."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= _LIMIT_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
