"""docs/guarantees.md: every promise names tests that are there, and its numbers are those of the last soak."""

import ast
import json
import re
from pathlib import Path

import pytest

from tools import guarantees
from tools.guarantees import BEGIN, END, NONE, PAGE
from tools.layers import REPOSITORY

NAMED = re.compile(r"`(tests/\w+\.py)::(\w+)`")
TEXT = PAGE.read_text(encoding="utf-8")


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def promises() -> list[str]:
    """The items of the lists, each with the lines that go on with it."""
    return re.findall(r"^- .*(?:\n  .*)*", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED.findall(TEXT))))
def test_a_test_that_is_named_is_there(file: str, name: str) -> None:
    assert name in functions_of(REPOSITORY / file)


def test_every_promise_names_a_test() -> None:
    assert len(promises()) > 20
    assert [promise for promise in promises() if not NAMED.search(promise)] == []


def test_the_table_is_that_of_the_last_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"part": "kills", "what": "in 2D", "tried": 1200, "failed": 0, "seconds": 3.0},
        {"part": "fuzz", "what": "PNG", "tried": 100_000, "failed": 1, "seconds": 4.0},
    ]
    result = tmp_path / "soak.json"
    result.write_text(json.dumps({"seconds": 1680, "date": "2026-11-30", "machine": "two cores", "rows": rows}), encoding="utf-8")
    monkeypatch.setattr(guarantees, "RESULT", result)
    text = guarantees.pages()[PAGE]
    made = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert made.startswith("`make soak` on 2026-11-30, 28 minutes, two cores: 1 of 101,200 failed.\n")
    assert "| Trainings, killed | in 2D | 1,200 | 0 |" in made
    assert "| Hostile files, read | PNG | 100,000 | 1 |" in made
    assert text.replace(made, "") == TEXT[: TEXT.index(BEGIN) + len(BEGIN)] + TEXT[TEXT.index(END) :]


def test_without_a_soak_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarantees, "RESULT", tmp_path / "soak.json")
    assert BEGIN + NONE + END in guarantees.pages()[PAGE]
