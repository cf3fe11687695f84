"""Graphs of a bundle for other engines than torch: where they lie, and that they are whose they say. No torch.

Beside the model, in `model/engines/`, or in the user's cache where that folder cannot be written:

    graph.onnx  graph.json                                   float32, written by `export.write_graph`
    graph-int8.xml  graph-int8.bin  graph-int8.json          8-bit integers, written by `quantise.write_int8`

A graph is a copy: what it was made from, and a hash of its files, stand in the .json, which is written last. One that was made
from another bundle, or does not have that hash, is not there as far as the program is concerned.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from microtome.bundle import CHANGED, INCOMPLETE, OF_ANOTHER, Bundle
from microtome.errors import ConfigError, RunError
from microtome.files import write_json

Kind = Literal["onnx", "int8"]
KINDS: tuple[Kind, ...] = ("onnx", "int8")

# The file that an engine is given stands first.
FILES: Mapping[str, tuple[str, ...]] = MappingProxyType({"onnx": ("graph.onnx",), "int8": ("graph-int8.xml", "graph-int8.bin")})
MANIFEST: Mapping[str, str] = MappingProxyType({"onnx": "graph.json", "int8": "graph-int8.json"})


def find_graph(bundle: Bundle, kind: Kind) -> Path | None:
    """The graph of that kind made from exactly this bundle, undamaged; None if there is none."""
    if not bundle.hash:
        return None
    for folder in _folders(bundle):
        if _is_whole(folder, bundle, kind):
            return folder / FILES[kind][0]
    return None


def damaged_graph(bundle: Bundle, kind: Kind) -> Path | None:
    """The file in a graph's place where `find_graph` finds none: not whole, or of another model; None if nothing is there."""
    return next((path for folder in _folders(bundle) if (path := folder / FILES[kind][0]).exists()), None)


def faults_of_graphs(bundle: Bundle) -> dict[str, str]:
    """The graphs beside a model that is there on disk, by the file that an engine is given.

    Returns:
        CHANGED, OF_ANOTHER, INCOMPLETE, or "" for a whole one.
    """
    if bundle.folder is None or not bundle.hash:
        return {}
    beside = _folders(bundle)[0]
    return {FILES[kind][0]: _fault(beside, bundle, kind) for kind in KINDS if (beside / FILES[kind][0]).exists()}


def graph_folder(bundle: Bundle) -> Path:
    """Where graphs of this bundle are written: beside the model, or in the cache if that folder cannot be written.

    Raises:
        ConfigError: the bundle was never saved, so that nothing could tell its graphs from others'.
        RunError: neither can be written.
    """
    if not bundle.hash:
        raise ConfigError(
            "graph", expected="a bundle that was saved", got="one in memory", do="save it, and take what `save_bundle` returns", code="C038"
        )
    beside, cached = _folders(bundle)[0], _folders(bundle)[-1]
    if _is_writable(beside):
        return beside
    try:
        cached.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got, do = error.strerror or str(error), "set MICROTOME_CACHE to one, or use --engine torch"
        raise RunError(cached, expected="a cache folder that can be written", got=got, do=do, code="R001") from None
    return cached


def cache_folder() -> Path:
    """Where what can be made again is kept: $MICROTOME_CACHE, else $XDG_CACHE_HOME/microtome, else ~/.cache/microtome."""
    if own := os.environ.get("MICROTOME_CACHE"):
        return Path(own)
    # The XDG base directory specification: a relative path is to be ignored.
    if (common := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return common / "microtome"
    try:
        return Path.home() / ".cache" / "microtome"
    except RuntimeError:
        # Containers run under user numbers that have no home; Windows has no user numbers.
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        return Path(tempfile.gettempdir()) / f"microtome-{user}"


def record_graph(folder: Path, bundle: Bundle, kind: Kind, hashes: Sequence[str], packages: Sequence[str] = ()) -> Path:
    """Write the manifest of a graph whose files are complete; returns the file that an engine is given.

    Args:
        folder: where the files lie.
        bundle: what the graph was made from.
        kind: of the graph.
        hashes: `file_hash` of each of its `FILES`, taken before they were put there: another process may have replaced one since.
        packages: that made it, whose versions are noted.
    """
    files, made_by = dict(zip(FILES[kind], hashes, strict=True)), {name: version_of(name) for name in ("microtome", *packages)}
    write_json(folder / MANIFEST[kind], {"kind": kind, "bundle": bundle.hash, "files": files, "made_by": made_by})
    return folder / FILES[kind][0]


def graph_mark(path: Path, kind: Kind) -> str:
    """Eight digits that differ where a graph, as `find_graph` gives it, has other bytes; none where it was removed meanwhile."""
    try:
        return file_hash(path.with_name(MANIFEST[kind]))[:8]
    except OSError:
        return ""


def version_of(package: str) -> str:
    """The version of a package, as its installer wrote it down."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "without version"


def file_hash(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _folders(bundle: Bundle) -> list[Path]:
    """Where graphs of a bundle may lie."""
    cached = cache_folder() / bundle.hash
    return [cached] if bundle.folder is None else [bundle.folder / "engines", cached]


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder that is there, or in its parent if it is not."""
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


def _is_whole(folder: Path, bundle: Bundle, kind: Kind) -> bool:
    """Whether a graph lies in the folder with the bytes that it was written with, and was made from this bundle."""
    return not _fault(folder, bundle, kind)


def _fault(folder: Path, bundle: Bundle, kind: Kind) -> str:
    """What is wrong with a graph in the folder: CHANGED, OF_ANOTHER, or INCOMPLETE, where it is not there too; "" if nothing."""
    try:
        manifest = json.loads((folder / MANIFEST[kind]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # It is written last: what is killed before it is whole was changed by nobody.
        return INCOMPLETE
    try:
        if manifest["kind"] == kind and manifest["bundle"] != bundle.hash:
            return OF_ANOTHER
        whole = manifest["kind"] == kind and all(file_hash(folder / name) == manifest["files"][name] for name in FILES[kind])
    except (OSError, LookupError, TypeError):
        return CHANGED
    return "" if whole else CHANGED
