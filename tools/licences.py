"""Writes docs/licences.md: every package that is pinned, and torch, with its licence and what we need it for, from what is installed.

`python -m tools.licences` writes it, `--check` says whether it is current and whether every licence on it is one that we take.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from types import MappingProxyType
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.layers import REPOSITORY
from tools.lock import needed, project, read_lock

PAGE = REPOSITORY / "docs" / "licences.md"
PERMISSIVE = frozenset(
    (
        *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC"),
        *("LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib"),
    )
)
# Not permissive, taken all the same, each for its reason. MPL-2.0 asks whoever changes its files to publish those, and nothing else.
EXCEPTIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "certifi": ("MPL-2.0", "a list of certificates, used as it is, never changed"),
        "hypothesis": ("MPL-2.0", "only tests import it; nothing of it is passed on"),
        "pathspec": ("MPL-2.0", "mypy imports it; nothing of it is passed on"),
    }
)
# Their metadata is silent; read in the LICENSE file of the release.
ELSEWHERE: Mapping[str, str] = MappingProxyType({"atheris": "Apache-2.0"})
# What people write instead of an identifier, in lower case.
SPELLED: Mapping[str, str] = MappingProxyType(
    {
        "3-clause bsd license": "BSD-3-Clause",
        "apache": "Apache-2.0",
        "apache 2.0": "Apache-2.0",
        "apache license 2.0": "Apache-2.0",
        "apache software license": "Apache-2.0",
        "bsd": "BSD",
        "bsd license": "BSD",
        "isc license": "ISC",
        "isc license (iscl)": "ISC",
        "mit license": "MIT",
        "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
        "psfl": "PSF-2.0",
        "python software foundation license": "PSF-2.0",
    }
)
HEADER = """\
<!-- made by `make lock` (tools/licences.py) from the metadata of what is installed; change that, not this page -->
# Licences of what microtome needs

microtome itself is Apache-2.0. `make check` fails where a licence on this page is none of the permissive ones ({permissive}),
or is not known. None here is GPL, LGPL or AGPL; `tests/test_supply_chain.py` holds that.

"Direct" is asked for in `pyproject.toml`; the others come with those that are named. CUDA builds of torch bring NVIDIA's libraries
under NVIDIA's own licence; the index that pip is given chooses the build, and microtome passes none of them on.

Not permissive, and why all the same:

{exceptions}

"""


class Row(NamedTuple):
    """A package, and what asks for it: `kind` is core, extra or dev; `through` are the direct ones that bring it, none if it is direct."""

    name: str
    version: str
    licence: str
    kind: str
    extras: tuple[str, ...]
    through: tuple[str, ...]


def licence_of(found: Distribution) -> str:
    """The licence as an SPDX expression: what the metadata says best, else what its licence file is; "unknown" if nothing tells."""
    licence = _field(found, "License")
    written = _field(found, "License-Expression") or _known(licence)
    words = written or " AND ".join(filter(None, map(_known, _classifiers(found))))
    if not words or "BSD" in words.split():
        told = _from_text(licence + _licence_files(found))
        words = re.sub(r"\bBSD(?!-)", told, words) if told else ""
        words = words or told
    return words or ELSEWHERE.get(canonicalize_name(found.name), "unknown")


def _field(found: Distribution, name: str) -> str:
    """A field of the metadata; empty where it has none."""
    return str((found.metadata.get_all(name) or [""])[0])


def _classifiers(found: Distribution) -> list[str]:
    """The licences among the classifiers."""
    lines = found.metadata.get_all("Classifier") or []
    return [line.rpartition("::")[2].strip() for line in lines if line.startswith("License ::")]


def _known(written: str) -> str:
    """The identifier for a licence that somebody wrote in words; empty where it is a text, or none that is known."""
    words = written.rpartition("::")[2].strip()
    return words if words in PERMISSIVE | {"MPL-2.0"} else SPELLED.get(words.lower(), "")


def _licence_files(found: Distribution) -> str:
    """The text of the licence files that the package brings."""
    files = [file for file in found.files or () if re.search(r"(licen[cs]e|copying)[^/]*$", str(file), re.IGNORECASE)]
    return "".join(file.locate().read_text(encoding="utf-8", errors="replace") for file in files[:1])  # type: ignore[attr-defined]


def _from_text(text: str) -> str:
    """Which of the common licences a text is; empty if none."""
    flat = " ".join(text.split())
    if "Redistribution and use in source and binary forms" in flat:
        return "BSD-3-Clause" if re.search("neither the name|may not be used to endorse", flat, re.IGNORECASE) else "BSD-2-Clause"
    if "Apache License" in flat[:400]:
        return "Apache-2.0"
    return "MIT" if "Permission is hereby granted, free of charge" in flat else ""


def is_allowed(name: str, licence: str) -> bool:
    """Whether a licence is permissive, or a named exception. Of `A OR B` one is enough; of anything else all have to be."""
    if EXCEPTIONS.get(name, ("",))[0] == licence:
        return True
    if "(" not in licence and " AND " not in licence:
        return any(set(part.split(" WITH ")) <= PERMISSIVE for part in licence.split(" OR "))
    return set(re.split(r"[()\s]+| AND | OR | WITH ", licence)) - {"", "AND", "OR", "WITH"} <= PERMISSIVE


def rows() -> list[Row]:
    """Every pin and torch, by name."""
    found = project()
    extras: dict[str, list[str]] = found["project"]["optional-dependencies"]
    core, dev = _brings(found["project"]["dependencies"]), _brings(found["dependency-groups"]["dev"] + found["build-system"]["requires"])
    of_extras = {extra: _brings([text for text in texts if not text.startswith("microtome[")], dev) for extra, texts in extras.items()}
    made = []
    for name, (version, licence) in sorted(_versions().items()):
        asked = [extra for extra, brought in of_extras.items() if name in _all(brought)]
        kind = "core" if name in _all(core) else "extra" if asked else "dev"
        brought = core if kind == "core" else of_extras[asked[0]] if kind == "extra" else dev
        through = () if name in brought else tuple(root for root, names in sorted(brought.items()) if name in names)
        made.append(Row(name, version, licence, kind, tuple(asked) if kind == "extra" else (), through))
    return made


def _versions() -> dict[str, tuple[str, str]]:
    """The version and the licence of every pin and of torch, by canonical name."""
    torch = distribution("torch")
    made = {"torch": (torch.version.partition("+")[0], licence_of(torch))}
    for name, pin in read_lock().items():
        try:
            made[name] = (pin.version, licence_of(distribution(pin.name)))
        except PackageNotFoundError:
            made[name] = (pin.version, ELSEWHERE.get(name, "unknown"))
    return made


def _brings(roots: Iterable[str], installed: Mapping[str, set[str]] | None = None) -> dict[str, set[str]]:
    """For each requirement its canonical name, and what it leads to; `installed`: leave out what is not among these."""
    asked = {canonicalize_name(Requirement(text).name): text for text in roots}
    if installed is not None:
        asked = {name: text for name, text in asked.items() if name in _all(installed)}
    return {name: _needed_or_none(text) - {name} for name, text in asked.items()}


def _needed_or_none(text: str) -> set[str]:
    """What a requirement leads to; nothing where it cannot be installed on this machine."""
    marker = Requirement(text).marker
    return needed([text]) if marker is None or marker.evaluate() else set()


def _all(brought: Mapping[str, set[str]]) -> set[str]:
    """The direct ones and what they bring."""
    return set(brought).union(*brought.values())


def not_installed() -> list[str]:
    """The packages of extras that are not pinned, whose licence nobody could read."""
    asked = {Requirement(text).name for texts in project()["project"]["optional-dependencies"].values() for text in texts}
    pins = {*read_lock(), "microtome", "torch"}
    return sorted(name for name in asked if canonicalize_name(name) not in pins)


def page(found: Iterable[Row]) -> str:
    """The page: what users get, and apart from it what only we need."""
    listed = list(found)
    reasons = "\n".join(f"- {name} ({licence}): {reason}" for name, (licence, reason) in EXCEPTIONS.items())
    head = HEADER.format(permissive=", ".join(sorted(PERMISSIVE, key=str.lower)), exceptions=reasons)
    product = [row for row in listed if row.kind != "dev"]
    parts = [head, "## What users install\n\n", _table(product), "\n"]
    if missing := not_installed():
        parts.append(f"Named by extras and not pinned here, so not on this list: {', '.join(missing)}.\n\n")
    parts += ["## What only building and testing need\n\n", _table(row for row in listed if row.kind == "dev")]
    return "".join(parts)


def _table(found: Iterable[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| package | version | licence | for | through |", "|---|---|---|---|---|"]
    for row in found:
        kind = f"extra {', '.join(row.extras)}" if row.extras else row.kind
        lines.append(f"| {row.name} | {row.version} | {row.licence} | {kind} | {', '.join(row.through) or 'direct'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or check it."""
    found = rows()
    refused = [f"{row.name} {row.version}: {row.licence}" for row in found if not is_allowed(row.name, row.licence)]
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(found)
        wrong = [f"licence not taken: {line}" for line in refused] + (
            [] if current else ["docs/licences.md is not current: run `make lock`"]
        )
        sys.exit("\n".join(wrong) or None)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"docs/licences.md: {len(found)} packages, {len(refused)} with a licence that is not taken")


if __name__ == "__main__":
    main()
