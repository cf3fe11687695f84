"""Writes requirements.lock from the environment: what pyproject.toml asks for and what that needs, pinned, with the hash of every file.

`make lock` runs it after `pip install --upgrade ...` in `.venv`. torch is left out: the Makefile installs it
first and alone, so that the builds for other machines (CUDA, CPU) are chosen by pip's index and by nothing here. pip is left out,
as it is what installs. Of each release all files are listed, wheels of every platform and the source, so that the lock holds on machines
that are not this one.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution, version
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from tools.layers import REPOSITORY

LOCK = REPOSITORY / "requirements.lock"
HEADER = """\
# Made by `make lock` (tools/lock.py): every package of `make`'s .venv except torch, which the Makefile installs by itself, and pip.
# importlib_resources is for Python 3.11 only and harmless on 3.12. pip checks the hashes: they are of all files of each release.
"""
# One page of an index for each package: eight wait for the network at a time.
CONNECTIONS = 8


class Pin(NamedTuple):
    """One line of the lock: a package, its only version, where it is wanted ("" is everywhere) and the SHA-256 of its files."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]

    def text(self) -> str:
        """As pip reads it."""
        marker = f" ; {self.marker}" if self.marker else ""
        return " \\\n    ".join([f"{self.name}=={self.version}{marker}", *(f"--hash=sha256:{digest}" for digest in self.hashes)]) + "\n"


def read_lock(text: str | None = None) -> dict[str, Pin]:
    """The pins of requirements.lock, or of its text, by canonical name."""
    text = LOCK.read_text(encoding="utf-8") if text is None else text
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in map(_read_pin, lines)}


def _read_pin(line: str) -> Pin:
    """One pin, its continued lines joined."""
    words, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
    pinned, _, marker = words.partition(" ; ")
    name, _, release = pinned.partition("==")
    return Pin(name.strip(), release.strip(), marker.strip(), tuple(digest.strip() for digest in hashes))


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def needed(roots: Iterable[str]) -> set[str]:
    """The canonical names of what the requirements lead to, without torch, what its CUDA builds bring, and pip."""
    found: set[str] = set()
    todo = [Requirement(text) for text in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = name + (f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else "")
        if key not in found and not name.startswith(("nvidia", "cuda", "triton")):
            found.add(key)
            todo += needs(requirement)
    return {key.partition("[")[0] for key in found} - {"torch", "pip"}


def needs(requirement: Requirement) -> list[Requirement]:
    """What one requirement needs on this interpreter, with the extras that it asks for."""
    wants = [Requirement(text) for text in distribution(requirement.name).requires or ()]
    extras = ("", *requirement.extras)
    return [want for want in wants if want.marker is None or any(want.marker.evaluate({"extra": extra}) for extra in extras)]


def markers(roots: Iterable[str]) -> dict[str, str]:
    """Where a package is wanted that pyproject.toml does not want everywhere, by canonical name."""
    wanted = [Requirement(text) for text in roots]
    return {canonicalize_name(want.name): str(want.marker) for want in wanted if want.marker is not None}


def file_hashes(pins: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The SHA-256 of all files of each release, from the first of pip's indexes that has it; sorted.

    Args:
        pins: versions by canonical name.
    """
    # pip has no public word for this. Asked through pip, its settings hold: index, certificates, proxies.
    from pip._internal.commands.install import InstallCommand

    command = InstallCommand("install", "")
    options, _ = command.parse_args(["--disable-pip-version-check"])
    with command.main_context():
        finder = command._build_package_finder(options, command.get_default_session(options))
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = pool.map(lambda pin: _hashes_of(finder._link_collector, *pin), pins.items())
            return dict(zip(pins, found, strict=True))


def _hashes_of(collector: Any, name: str, release: str) -> tuple[str, ...]:
    """The hashes of the files of one release.

    Raises:
        SystemExit: no index has it.
    """
    from pip._internal.index.collector import parse_links
    from pip._internal.models.link import Link

    for location in collector.search_scope.get_index_urls_locations(name):
        page = collector.fetch_response(Link(location))
        links = [] if page is None else list(parse_links(page))
        hashes = {str(link.hash) for link in links if link.hash_name == "sha256" and is_file_of(link.filename, release)}
        if hashes:
            return tuple(sorted(hashes))
    raise SystemExit(
        f"make lock: expected {name} {release} on one of pip's indexes, got no file of it with a hash; install another version"
    )


def is_file_of(filename: str, release: str) -> bool:
    """Whether a file of an index is a wheel or the source of that release; names of older kinds are of none."""
    try:
        found = parse_wheel_filename(filename)[1] if filename.endswith(".whl") else parse_sdist_filename(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return False
    return found == Version(release)


def main() -> None:
    """Write requirements.lock."""
    found = project()
    roots = found["project"]["dependencies"] + found["dependency-groups"]["dev"] + found["build-system"]["requires"]
    pins = {name: re.sub(r"[+].*", "", version(name)) for name in sorted(needed(roots))}
    where, hashes = markers(roots), file_hashes(pins)
    lines = [Pin(distribution(name).name, pins[name], where.get(name, ""), hashes[name]).text() for name in pins]
    LOCK.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"requirements.lock: {len(pins)} packages, {sum(map(len, hashes.values()))} files")


if __name__ == "__main__":
    main()
