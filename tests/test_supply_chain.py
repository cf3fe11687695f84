"""What microtome is made of: pins with hashes, permissive licences, known vulnerabilities told, and a list of parts that is true."""

import hashlib
import json
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tools import audit, licences, lock, sbom
from tools.audit import Answer
from tools.layers import REPOSITORY

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TORCH = "torch==2.13.0"


# The lock.


def test_every_pin_has_a_version_and_hashes_and_torch_alone_is_not_pinned() -> None:
    pins = lock.read_lock()
    assert len(pins) > 100
    assert [name for name, pin in pins.items() if not re.fullmatch(r"[0-9][0-9a-z.]*", pin.version)] == []
    assert [name for name, pin in pins.items() if not pin.hashes or not all(re.fullmatch("[0-9a-f]{64}", one) for one in pin.hashes)] == []
    found = lock.project()
    roots = found["project"]["dependencies"] + found["dependency-groups"]["dev"] + found["build-system"]["requires"]
    # What those lead to on this machine; on others a few more of the pins are wanted.
    assert lock.needed(roots) - pins.keys() == set()
    assert "torch" not in pins


def test_what_make_installs_is_torch_the_lock_with_hashes_and_this_folder() -> None:
    recipe = MAKEFILE.partition("$(STAMP): requirements.lock")[2].partition("\n\n")[0]
    installs = re.findall(r"\$\(PIP\) install -qq (.*?)(?:;|\n|$)", recipe)
    assert installs == ['"$(TORCH)"', "--no-deps --require-hashes -r requirements.lock", "--no-deps --no-build-isolation -e ."]
    assert f"TORCH ?= {TORCH}\n" in MAKEFILE


def test_a_pin_is_read_as_it_was_written() -> None:
    pins = {
        "a-b": lock.Pin("A.b", "1.0", "", ("0" * 64, "1" * 64)),
        "c": lock.Pin("c", "2.1", "sys_platform == 'linux'", ("f" * 64,)),
    }
    assert lock.read_lock(lock.HEADER + "".join(pin.text() for pin in pins.values())) == pins


@pytest.mark.parametrize(
    ("name", "release", "same"),
    [
        ("a_b-1.0-py3-none-any.whl", "1.0", True),
        ("a_b-1.0-1-cp311-abi3-linux_x86_64.whl", "1.0", True),
        ("a-b-1.0.tar.gz", "1", True),
        ("a_b-1.0.post1-py3-none-any.whl", "1.0", False),
        ("a_b-1.0rc1-py3-none-any.whl", "1.0", False),
        ("a-b-1.0.win32.exe", "1.0", False),
        ("a-b.whl", "1.0", False),
    ],
)
def test_a_file_belongs_to_the_release_that_its_name_says(name: str, release: str, same: bool) -> None:
    assert lock.is_file_of(name, release) == same


def collector(*pages: str | None) -> Any:
    """Indexes, each with its page of a package, or without one."""
    from pip._internal.index.collector import IndexContent

    held = {f"https://index{number}/p/": page for number, page in enumerate(pages)}

    def fetch(location: Any) -> IndexContent | None:
        page = held[location.url]
        return None if page is None else IndexContent(page.encode(), "text/html", "utf-8", location.url, cache_link_parsing=False)

    return SimpleNamespace(search_scope=SimpleNamespace(get_index_urls_locations=lambda name: list(held)), fetch_response=fetch)


def test_hashes_are_of_all_files_of_the_release_and_of_the_first_index_that_has_it() -> None:
    def link(file: str, digest: str) -> str:
        return f'<a href="{file}#sha256={digest * 64}">{file}</a>'

    page = link("p-1.0.tar.gz", "b") + link("p-1.0-py3-none-any.whl", "a") + link("p-1.1.tar.gz", "c") + '<a href="p-1.0.zip">p-1.0.zip</a>'
    other = link("p-1.0.tar.gz", "d")
    assert lock._hashes_of(collector(None, page, other), "p", "1.0") == ("a" * 64, "b" * 64)
    with pytest.raises(SystemExit, match=r"expected p 3\.0 on one of pip's indexes, got no file of it"):
        lock._hashes_of(collector(None, page), "p", "3.0")


# Known vulnerabilities: what pip-audit 2.10.1 wrote, shortened.

FOUND = json.dumps(
    {
        "dependencies": [
            {
                "name": "pyyaml",
                "version": "5.3",
                "vulns": [{"id": "PYSEC-2021-142", "fix_versions": ["5.4"], "aliases": ["CVE-2020-14343"]}],
            },
            {"name": "rich", "version": "15.0.0", "vulns": []},
            {"name": "inhouse", "skip_reason": "Dependency not found on PyPI and could not be audited: inhouse (1.0)"},
        ],
        "fixes": [],
    }
)
LINE = "pyyaml 5.3: PYSEC-2021-142 (CVE-2020-14343), mended in: 5.4"
NONE_KNOWN = json.dumps({"dependencies": [{"name": "rich", "skip_reason": "not found"}, {"name": "typer", "skip_reason": "not found"}]})
UNREACHED = "Traceback\nrequests.exceptions.ConnectionError: HTTPSConnectionPool(host='api.osv.dev', port=443): Max retries exceeded"
CLEAN = Answer("pypi", (), 2)


def test_what_the_service_says_is_read() -> None:
    assert audit.read_answer("pypi", FOUND, "") == Answer("pypi", (LINE,), 2, ("inhouse",))
    assert audit.read_answer("osv", NONE_KNOWN, "") == Answer("osv", (), 0, ("rich", "typer"))
    assert audit.read_answer("osv", "", UNREACHED) == Answer("osv", failure="cannot be reached")
    assert audit.read_answer("osv", "", "a\nERROR: no such option") == Answer("osv", failure="ERROR: no such option")
    assert audit.read_answer("osv", "[]", "") == Answer("osv", failure="no answer")


@pytest.mark.parametrize(
    ("answers", "strict", "said", "code"),
    [
        ([CLEAN], False, "audit: 2 of 2 packages audited by pypi, 0 known vulnerabilities", 0),
        ([CLEAN], True, "audit: 2 of 2 packages audited by pypi, 0 known vulnerabilities", 0),
        ([Answer("pypi", (LINE,), 2)], False, f"{LINE}\naudit: 2 of 2 packages audited by pypi, 1 known vulnerabilities", 1),
        (
            [Answer("pypi", (), 1, ("inhouse",))],
            False,
            "audit: 1 of 2 packages audited by pypi, 0 known vulnerabilities\naudit: not known to pypi: inhouse",
            0,
        ),
        (
            [Answer("pypi", (), 1, ("inhouse",))],
            True,
            "audit: 1 of 2 packages audited by pypi, 0 known vulnerabilities\naudit: not known to pypi: inhouse",
            1,
        ),
        (
            [Answer("pypi", (), 0, ("a", "b")), Answer("osv", failure="cannot be reached")],
            False,
            "audit: none of 2 packages could be audited (pypi: knows none of them; osv: cannot be reached)",
            0,
        ),
        (
            [Answer("pypi", (), 0, ("a", "b")), Answer("osv", failure="cannot be reached")],
            True,
            "audit: none of 2 packages could be audited (pypi: knows none of them; osv: cannot be reached)",
            1,
        ),
    ],
)
def test_verdict(answers: list[Answer], strict: bool, said: str, code: int) -> None:
    assert audit.verdict(answers, 2, strict=strict) == (said.splitlines(), code)


def test_the_next_service_is_asked_where_one_knows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int]] = []

    def ask(service: str, requirements: list[str]) -> Answer:
        asked.append((service, len(requirements)))
        assert requirements[0] == TORCH
        return Answer(service, (), len(requirements)) if service == "osv" else Answer(service, (), 0, ("all",))

    monkeypatch.setattr(audit, "ask", ask)
    monkeypatch.setattr(sys, "argv", ["audit", TORCH, "--strict"])
    with pytest.raises(SystemExit) as left:
        audit.main()
    count = len(lock.read_lock()) + 1
    assert (left.value.code, asked) == (0, [("pypi", count), ("osv", count)])
    assert f"audit: {count} of {count} packages audited by osv, 0 known vulnerabilities" in capsys.readouterr().out


def test_a_service_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **words: Any) -> None:
        assert Path(command[command.index("--requirement") + 1]).read_text() == f"{TORCH}\n"
        raise subprocess.TimeoutExpired(command, words["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert audit.ask("osv", [TORCH]) == Answer("osv", failure="no answer in 300 seconds")


# Licences.


@pytest.mark.parametrize(
    ("name", "licence", "allowed"),
    [
        ("a", "MIT", True),
        ("a", "Apache-2.0 OR GPL-3.0-only", True),
        ("a", "MIT AND BSD-3-Clause", True),
        ("a", "Apache-2.0 WITH LLVM-exception", True),
        ("a", "MIT AND (Apache-2.0 OR BSD-2-Clause)", True),
        ("a", "GPL-3.0-only", False),
        ("a", "LGPL-2.1-or-later", False),
        ("a", "AGPL-3.0-only", False),
        ("a", "MIT AND GPL-2.0-only", False),
        ("a", "Apache-2.0 WITH GPL-exception", False),
        ("a", "unknown", False),
        ("a", "MPL-2.0", False),
        ("certifi", "MPL-2.0", True),
        ("certifi", "GPL-3.0-only", False),
    ],
)
def test_permissive_licences_are_taken_and_no_others(name: str, licence: str, allowed: bool) -> None:
    assert licences.is_allowed(name, licence) == allowed


def package(folder: Path, metadata: str, text: str = "") -> Distribution:
    """A package as it lies in an environment, with these lines of metadata and this licence file."""
    made = folder / "a-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.4\nName: a\nVersion: 1.0\n{metadata}\n", encoding="utf-8")
    (made / "LICENSE").write_text(text, encoding="utf-8")
    (made / "RECORD").write_text("a-1.0.dist-info/LICENSE,,\n" if text else "", encoding="utf-8")
    return Distribution.at(made)


BSD = "Redistribution and use in source and binary forms, with or without modification ..."


@pytest.mark.parametrize(
    ("metadata", "text", "licence"),
    [
        ("License-Expression: MIT", "", "MIT"),
        ("License: Apache License 2.0", "", "Apache-2.0"),
        ("Classifier: License :: OSI Approved :: MIT License", "", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License", f"{BSD} Neither the name of", "BSD-3-Clause"),
        ("Classifier: License :: OSI Approved :: BSD License", BSD, "BSD-2-Clause"),
        ("", "Permission is hereby granted, free of charge, to any person", "MIT"),
        ("License: GNU General Public License v3", "", "unknown"),
        ("License: ask us", "All rights reserved.", "unknown"),
        ("", "", "unknown"),
    ],
)
def test_the_licence_of_a_package_is_read_from_its_metadata_else_from_its_file(
    metadata: str, text: str, licence: str, tmp_path: Path
) -> None:
    assert licences.licence_of(package(tmp_path, metadata, text)) == licence


@pytest.mark.parametrize("licence", ["unknown", "GPL-3.0-only"])
def test_a_licence_that_is_not_taken_fails_the_check(licence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = licences.Row("evil", "1.0", licence, "dev", (), ())
    monkeypatch.setattr(licences, "rows", lambda: [row])
    monkeypatch.setattr(licences, "PAGE", tmp_path / "licences.md")
    (tmp_path / "licences.md").write_text(licences.page([row]), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["licences", "--check"])
    with pytest.raises(SystemExit) as left:
        licences.main()
    assert left.value.code == f"licence not taken: evil 1.0: {licence}"
    monkeypatch.setattr(licences, "rows", lambda: [row._replace(licence="MIT")])
    with pytest.raises(SystemExit, match=r"docs/licences\.md is not current"):
        licences.main()
    (tmp_path / "licences.md").write_text(licences.page(licences.rows()), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        licences.main()
    assert left.value.code is None


def test_the_page_lists_every_pin_and_torch_with_a_licence_that_is_taken() -> None:
    text = licences.PAGE.read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    listed = {name: (version, licence) for name, version, licence, *_ in cells if name != "package"}
    pins = {name: pin.version for name, pin in lock.read_lock().items()}
    assert {name: version for name, (version, _) in listed.items()} == pins | {"torch": "2.13.0"}
    assert [(name, licence) for name, (_, licence) in listed.items() if not licences.is_allowed(name, licence)] == []
    # Of A OR B one is enough, but nobody should have to read twice here.
    assert not re.search("GPL", " ".join(licence for _, licence in listed.values()))


# The list of parts.


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archives, and the list of parts beside them."""
    folder = tmp_path_factory.mktemp("dist")
    (folder / "microtome-0.1.0-cp311-abi3-linux_x86_64.whl").write_bytes(b"a wheel")
    (folder / "microtome-0.1.0.tar.gz").write_bytes(b"an archive")
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(sys, "argv", ["sbom", str(folder), TORCH])
        sbom.main()
    finally:
        patch.undo()
    return folder


@pytest.fixture(scope="module")
def bill(dist: Path) -> dict[str, Any]:
    return dict(json.loads((dist / "sbom.json").read_text(encoding="utf-8")))


def test_the_list_of_parts_follows_the_schema_of_cyclonedx(dist: Path) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((dist / "sbom.json").read_text(encoding="utf-8")) is None


def test_the_list_of_parts_has_the_versions_and_hashes_of_the_lock(bill: dict[str, Any]) -> None:
    pins = lock.read_lock()
    parts = {part["name"]: part for part in bill["components"]}
    assert {name: part["version"] for name, part in parts.items()} == {name: pin.version for name, pin in pins.items()} | {
        "torch": "2.13.0"
    }
    for name, part in parts.items():
        [page] = part["externalReferences"]
        hashes = {one["content"] for one in page.get("hashes", ())}
        assert hashes == set(pins[name].hashes if name in pins else ()), name
        assert part["purl"] == f"pkg:pypi/{name}@{part['version']}"
        assert part["licenses"]


def test_the_list_of_parts_tells_what_users_get_from_what_only_tests_need(bill: dict[str, Any]) -> None:
    scopes = {part["name"]: part["scope"] for part in bill["components"]}
    assert (scopes["numpy"], scopes["torch"], scopes["h5py"], scopes["pytest"]) == ("required", "required", "optional", "excluded")
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in bill["dependencies"]}
    direct = {ref.partition("==")[0] for ref in needs["microtome"]}
    assert {"numpy", "torch", "typer", "h5py"} <= direct
    assert not {"pytest", "click"} & direct
    [nibabel] = (wanted for ref, wanted in needs.items() if ref.startswith("nibabel=="))
    assert any(ref.startswith("numpy==") for ref in nibabel)


def test_what_was_built_stands_there_with_its_own_hashes(bill: dict[str, Any]) -> None:
    made = bill["metadata"]["component"]
    assert (made["name"], made["version"], made["licenses"][0]["license"]["id"]) == ("microtome", "0.1.0", "Apache-2.0")
    assert made["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(b"a wheel").hexdigest()}]
    files = {entry["url"]: entry["hashes"][0]["content"] for entry in made["externalReferences"]}
    assert files["microtome-0.1.0.tar.gz"] == hashlib.sha256(b"an archive").hexdigest()
    assert len(files) == 2


def test_a_folder_without_one_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected one wheel, got 0; run `make build`"):
        sbom.product(tmp_path)
