"""`microtome explain`: a code, however it is typed, is told in words; a wrong one proposes the nearest."""

import json

import pytest

from microtome.codes.lookup import AREAS, FAULTS, code_of, document, explained, listed
from microtome.errors import ConfigError
from tests.test_cli import run


@pytest.mark.parametrize(
    "typed", ["MT-D034", "mt-d034", "D034", " d034 ", "[MT-D034]", "d34", "MT-D34", "MT D034", "mt d34", "D0034", "D-034"]
)
def test_a_code_may_be_typed_in_any_way(typed: str) -> None:
    assert code_of(typed) == "D034"


def test_a_number_alone_is_a_code_where_one_letter_alone_has_it() -> None:
    letters = {number: [code for code in FAULTS if int(code[1:]) == number] for number in {int(code[1:]) for code in FAULTS}}
    alone = next(number for number, codes in letters.items() if len(codes) == 1)
    shared = next(number for number, codes in letters.items() if len(codes) > 1)
    assert code_of(str(alone)) == letters[alone][0]
    with pytest.raises(ConfigError, match=f"got `{shared}`"):
        code_of(str(shared))


def test_a_wrong_code_is_one_line_with_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "explain", "MT-D034X") == 2
    said = "microtome: explain: expected a code such as MT-D031, got `MT-D034X`; did you mean MT-D034? [MT-C001]\n"
    assert capsys.readouterr().err == said
    with pytest.raises(ConfigError, match=r"got `banana`; see `microtome explain` for all$"):
        code_of("banana")


def test_a_code_is_told_with_title_cause_cure_and_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", "MT-C004") == 0
    title, cause, cure, places = capsys.readouterr().out.rstrip().split("\n\n")
    fault = FAULTS["C004"]
    assert title == f"MT-C004: {fault.title}"
    assert cause.split() == fault.cause.split()
    assert cure.split() == f"What to do: {fault.cure}".split()
    assert places.startswith("Comes from:\n  densify: ")
    assert "\n  options: Options that several commands share" in places


def test_without_a_code_all_are_listed_by_area(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "explain") == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == list(AREAS)
    assert {line.split()[0] for line in text.splitlines() if line.startswith(" ")} == {f"MT-{code}" for code in FAULTS}
    assert text == listed() + "\n"


def test_programs_get_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "explain", "C004", "--json") == 0
    one = json.loads(capsys.readouterr().out)
    assert one == document("C004")
    assert one["code"] == "MT-C004"
    assert one["area"] == "Options, plans and YAML files"
    assert {"densify", "options"} <= set(one["modules"])
    assert "expected the name of a file ending in …, got a folder or `…`; give another name" in one["forms"]
    assert run(monkeypatch, "explain", "--json") == 0
    assert [entry["code"] for entry in json.loads(capsys.readouterr().out)] == [f"MT-{code}" for code in sorted(FAULTS)]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_are_as_wide_as_the_terminal_and_commands_stay_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = explained("C024").splitlines()
    command = '`python -c "import torch; print(torch.cuda.is_available())"`'
    assert any(command in line for line in lines)
    assert max(len(line) for line in lines if command not in line) <= min(width, 100)
