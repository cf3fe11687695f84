"""Writes dist/sbom.json: what microtome's wheel needs and what built it, in CycloneDX 1.6, with versions, licences and hashes.

`make build` runs it after the archives are there: `python -m tools.sbom dist torch==2.13.0`. What users install has the scope `required`
(core) or `optional` (extras), what only builds and tests `excluded`.
"""

import hashlib
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import MappingProxyType

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.tool import Tool
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.licences import Row, rows
from tools.lock import needs, read_lock

SCOPES = MappingProxyType({"core": ComponentScope.REQUIRED, "extra": ComponentScope.OPTIONAL, "dev": ComponentScope.EXCLUDED})
INDEX = "https://pypi.org/simple"


def component(row: Row, hashes: Iterable[str]) -> Component:
    """A package that is needed; the hashes are of all files of its release, so that they stand with the place where those lie."""
    page = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(f"{INDEX}/{row.name}/"),
        comment="every file of this release",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in hashes],
    )
    return Component(
        type=ComponentType.LIBRARY,
        name=row.name,
        version=row.version,
        bom_ref=f"{row.name}=={row.version}",
        purl=PackageURL("pypi", name=row.name, version=row.version),
        scope=SCOPES[row.kind],
        licenses=[LicenseFactory().make_from_string(row.licence)],
        external_references=[page],
    )


def product(folder: Path) -> Component:
    """What is built: microtome, with the SHA-256 of its wheel; every archive of `folder` with its own."""
    archives = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    wheels = [archive for archive in archives if archive.suffix == ".whl"]
    if len(wheels) != 1:
        raise SystemExit(f"{folder}: expected one wheel, got {len(wheels)}; run `make build`")
    files = [
        ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(archive.name), hashes=[_hash(archive)]) for archive in archives
    ]
    return Component(
        type=ComponentType.APPLICATION,
        name="microtome",
        version=version("microtome"),
        bom_ref="microtome",
        purl=PackageURL("pypi", name="microtome", version=version("microtome")),
        licenses=[LicenseFactory().make_from_string(distribution("microtome").metadata["License-Expression"])],
        hashes=[_hash(wheels[0])],
        external_references=files,
    )


def _hash(file: Path) -> HashType:
    """The SHA-256 of a file."""
    return HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(file.read_bytes()).hexdigest())


def bill(folder: Path, extra: Iterable[str] = ()) -> Bom:
    """The bill of materials of the archives in `folder`.

    Args:
        folder: with one wheel.
        extra: `name==version` of what the lock leaves out; its files are not pinned, so they have no hashes.
    """
    pins, found = read_lock(), rows()
    versions = {name: pin.version for name, pin in pins.items()} | dict(word.split("==") for word in extra)
    bom = Bom()
    bom.metadata.component = product(folder)
    bom.metadata.tools.tools.add(Tool(name="microtome tools.sbom", version=version("microtome")))
    made = {
        row.name: component(row._replace(version=versions[row.name]), pins[row.name].hashes if row.name in pins else ()) for row in found
    }
    bom.components.update(made.values())
    bom.register_dependency(bom.metadata.component, [made[row.name] for row in found if not row.through and row.kind != "dev"])
    for name, one in made.items():
        bom.register_dependency(one, [made[other] for other in _direct(name) if other in made])
    return bom


def _direct(name: str) -> list[str]:
    """The canonical names of what a package asks for itself on this machine; nothing where it is not installed."""
    try:
        return [canonicalize_name(want.name) for want in needs(Requirement(name))]
    except PackageNotFoundError:
        return []


def main() -> None:
    """Write sbom.json beside the archives."""
    folder = Path(sys.argv[1])
    bom = bill(folder, sys.argv[2:])
    (folder / "sbom.json").write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n", encoding="utf-8")
    print(f"{folder}/sbom.json: {len(bom.components)} packages; {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    main()
