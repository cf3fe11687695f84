"""Every error for people that the package can make: a code of the table, a line of one form, and numbers that keep their meaning."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from microtome.codes.findings import BY_FINDING
from microtome.codes.lookup import AREAS, BLANK, FAULTS, PARTS, Line, all_lines, forms_of, lines_of
from microtome.errors import PREFIX
from tools import errors, measure
from tools.layers import REPOSITORY

Call = tuple[measure.Source, ast.Call]
Class = tuple[measure.Source, ast.ClassDef]
# Where an error is made, the call that makes it, and the letter that its code must have.
Made = tuple[str, ast.Call, str]
# Names of files keep their small letters where they begin a sentence.
BEGINS = re.compile(r"[A-Z`\-]|microtome\.yaml|dataset\.json")
LETTERS = {"DataError": "D", "ConfigError": "C", "RunError": "R"}
# What a line may tell people to do: it begins with one of these words, or asks `did you mean ...?`.
VERBS = re.compile(
    r"(add|allow|annotate|ask|bring|build|change|check|choose|close|continue|convert|copy|correct|cut|delete|densify|do|"
    r"evaluate|export|find|free|give|hold|install|keep|label|leave|let|make|mend|move|name|open|pad|paint|"
    r"plan|predict|put|read|remove|rename|repack|resample|restart|round|run|save|say|see|set|start|state|stop|"
    r"take|train|try|update|use|wait|write)"
    r"\b"
)


@pytest.fixture(scope="module")
def nodes() -> tuple[list[Call], list[Class]]:
    """Every call and every class of the package, with its file: seconds of work, so for whoever runs these tests alone."""
    sources = measure.sources()
    calls = [(source, node) for source in sources for node in source.nodes if isinstance(node, ast.Call)]
    return calls, [(source, node) for source in sources for node in source.nodes if isinstance(node, ast.ClassDef)]


@pytest.fixture(scope="module")
def calls(nodes: tuple[list[Call], list[Class]]) -> list[Call]:
    return nodes[0]


@pytest.fixture(scope="module")
def lines() -> tuple[Line, ...]:
    return all_lines()


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return errors.pages()


@pytest.fixture(scope="module")
def kinds(nodes: tuple[list[Call], list[Class]]) -> dict[str, str]:
    """The classes of errors for people -> the letter of their codes, found class by class until none is new."""
    found, known = dict(LETTERS), 0
    while len(found) > known:
        known = len(found)
        found |= {
            node.name: found[base.id] for _, node in nodes[1] for base in node.bases if isinstance(base, ast.Name) and base.id in found
        }
    return found


@pytest.fixture(scope="module")
def made(nodes: tuple[list[Call], list[Class]], kinds: dict[str, str]) -> list[Made]:
    return list(found_errors(*nodes, kinds))


def found_errors(calls: list[Call], classes: list[Class], kinds: dict[str, str]) -> Iterator[Made]:
    """Every call in the package that makes an error for people: where it stands, the call, the letter that its code must have.

    It is found by its class's name alone, not as `lookup` finds it. A class that words itself makes its error in its `__init__`.
    """
    worded = {}
    for source, node in classes:
        if node.name in kinds:
            own = [call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"]
            if own:
                worded[node.name] = (f"{source.name}: {node.name}", own[0], kinds[node.name])
    for source, call in calls:
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if name in kinds and name not in worded:
            yield source.at(call, ast.unparse(call)), call, kinds[name]
    yield from worded.values()


def test_errors_are_found_in_the_whole_package(kinds: dict[str, str], made: list[Made]) -> None:
    assert len(made) >= 300
    assert {letter for _, _, letter in made} == {"D", "C", "R"}
    assert {"StoppedError", "TooLittleMemoryError"} <= kinds.keys()


def test_every_error_says_where_and_the_three_parts_and_its_code(made: list[Made]) -> None:
    assert [at for at, call, _ in made if len(call.args) != 1] == []
    assert [at for at, call, _ in made if {word.arg for word in call.keywords} != {*PARTS, "code"}] == []


def test_every_error_has_a_code_of_the_table_with_the_letter_of_its_kind(made: list[Made]) -> None:
    wrong = []
    for at, call, letter in made:
        code = next((word.value for word in call.keywords if word.arg == "code"), None)
        if isinstance(code, ast.Constant):
            right = code.value in FAULTS and str(code.value).startswith(letter)
        else:
            # An error that is told again in other words keeps its code.
            right = isinstance(code, ast.Attribute) and code.attr == "code"
        wrong += [] if right else [at]
    assert wrong == [], "a new kind of fault gets a new number in src/microtome/codes"


def test_the_pages_are_made_of_all_of_them(lines: tuple[Line, ...], made: list[Made]) -> None:
    def said(code: ast.expr) -> str:
        return str(code.value) if isinstance(code, ast.Constant) else ""

    codes = [said(word.value) for _, call, _ in made for word in call.keywords if word.arg == "code"]
    assert Counter(line.code for line in lines) == Counter(codes)
    assert [line for line in lines if line.code and LETTERS[line.kind] != line.code[0]] == []


def test_every_code_of_the_table_is_used(lines: tuple[Line, ...]) -> None:
    assert sorted(FAULTS.keys() - {line.code for line in lines} - set(BY_FINDING.values())) == []


def severity_and_code(call: ast.Call) -> tuple[str, ast.expr] | None:
    """What the call of a finding says; None of other calls. `_about` is given them in their order."""
    if not isinstance(call.func, ast.Name) or call.func.id not in ("Finding", "_about"):
        return None
    if call.func.id == "_about":
        return ast.unparse(call.args[1]), call.args[2]
    words = {str(word.arg): word.value for word in call.keywords}
    return ast.unparse(words["severity"]), words["code"]


def test_every_error_of_inspect_has_a_code_of_the_table(calls: list[Call]) -> None:
    told = [(source, *said) for source, call in calls if (said := severity_and_code(call))]
    assert len(told) >= 40
    # Of `a if x else b` both count.
    said = [
        (source, severity, code)
        for source, severity, found in told
        for code in ((found.body, found.orelse) if isinstance(found, ast.IfExp) else (found,))
    ]
    # `_about` hands on what it was given.
    named = [f"{source.name}: {ast.unparse(code)}" for source, _, code in said if not isinstance(code, ast.Constant)]
    assert named == ["src/microtome/data/checks.py: code"], "the code of a finding is a literal"
    # An expression may come to be an error.
    words = {code.value for _, severity, code in said if severity not in ("'warning'", "'note'") and isinstance(code, ast.Constant)}
    assert words == set(BY_FINDING)
    assert set(BY_FINDING.values()) <= set(FAULTS)


def test_a_code_belongs_to_one_area() -> None:
    assert sum(map(len, AREAS.values())) == len(FAULTS)
    assert [code for code in FAULTS if not re.fullmatch(r"[DCR]\d{3}", code)] == []


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_line_are_words_without_line_end_or_full_stop(part: str, lines: tuple[Line, ...]) -> None:
    texts = [(line, line.parts[part]) for line in lines]
    assert [line for line, text in texts if not text.strip() or "\n" in text or text != text.lstrip()] == []
    # Three of them mean: and so on.
    assert [line for line, text in texts if re.search(r"[^.][.;,:]$", text)] == []


def is_imperative(text: str) -> bool:
    """Whether words tell somebody to do something; what is filled in before them does not count."""
    words = text.lstrip(BLANK)
    return words.startswith("did you mean") or bool(VERBS.match(words))


def test_every_line_ends_with_what_to_do(lines: tuple[Line, ...]) -> None:
    # `or` stands between words of which one is taken.
    wrong = [line for line in lines if line.parts["do"] != BLANK and not is_imperative(line.parts["do"])]
    assert wrong == []
    handed = [line for line in lines if line.parts["do"] == BLANK]
    assert len(handed) <= 8, handed


def test_what_to_do_is_told_to_those_who_make_the_error_too(calls: list[Call]) -> None:
    words = [(source, word.value) for source, call in calls for word in call.keywords if word.arg == "do"]
    fixed = [(source, node) for source, node in words if isinstance(node, ast.Constant)]
    fixed += [
        (source, node.values[0]) for source, node in words if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant)
    ]
    assert len(fixed) > 200
    assert [source.at(node, str(node.value)) for source, node in fixed if not is_imperative(str(node.value))] == []


def carries_a_value(line: Line) -> bool:
    """Whether `got` shows what was found: a value, the words that were typed, or that nothing was."""
    return BLANK in line.parts["got"] or bool(re.match(r"(none|nothing|no|neither)\b|--|\d", line.parts["got"]))


def test_nine_in_ten_lines_show_what_was_found(lines: tuple[Line, ...]) -> None:
    bare = [line for line in lines if not carries_a_value(line)]
    assert len(bare) <= 0.1 * len(lines), bare


@pytest.mark.parametrize("code", sorted(FAULTS))
def test_title_cause_and_cure_are_for_people(code: str) -> None:
    fault = FAULTS[code]
    assert 8 <= len(fault.title) <= 60
    assert BEGINS.match(fault.title)
    assert not fault.title.endswith(".")
    for text, most in ((fault.cause, 3), (fault.cure, 4)):
        assert BEGINS.match(text)
        assert text.endswith((".", ".)"))
        assert text.count("`") % 2 == 0
        assert not re.search(r"\s{2}|\n| [.,;](\s|$)", text)
        plain = re.sub("`[^`]*`", "X", text)
        assert 1 <= len(re.findall(r"[.?!](?=\s+[A-Z`\-]|\)?$)", plain)) <= most + 1
    assert fault.cause != fault.cure


def test_no_two_codes_have_one_title() -> None:
    assert [title for title, n in Counter(fault.title for fault in FAULTS.values()).items() if n > 1] == []


def test_a_number_never_comes_to_stand_for_something_else() -> None:
    """To add a code: take a free number, then `make docs` adds its line to tests/data/error_codes.txt.

    A title that is only said better is changed there by hand. One that nothing makes any more leaves the table and stays there.
    """
    ever = errors.ever()
    assert len(ever) >= 135
    assert list(ever) == sorted(ever)
    assert {code: ever[code] for code in FAULTS if code in ever and ever[code] != FAULTS[code].title} == {}, "take a new number"
    assert FAULTS.keys() - ever.keys() == set(), "run `make docs`"


def test_pages_have_a_place_for_each_code_with_its_lines_cause_and_cure(pages: dict[Path, str]) -> None:
    named = {path.name: text for path, text in pages.items()}
    index = named["errors.md"]
    for area, faults in AREAS.items():
        text = named[f"{errors.slug(area)}.md"]
        for code, fault in faults.items():
            section = text.partition(f'<a id="mt-{code.lower()}"></a>')[2].partition("<a id=")[0]
            assert section.startswith(f"\n\n## {PREFIX}{code}: {fault.title}\n")
            assert fault.cause in section
            assert fault.cure in section
            assert all(form in section for form in forms_of(code))
            assert f"(errors/{errors.slug(area)}.md#mt-{code.lower()}) | {fault.title} |" in index


def test_a_long_list_of_lines_is_folded(pages: dict[Path, str]) -> None:
    most = max(FAULTS, key=lambda code: len(forms_of(code)))
    few = next(code for code in FAULTS if len(forms_of(code)) == 1)
    assert len(lines_of(most)) > errors.MOST_FORMS + 1
    text = "".join(pages.values())
    section = text.partition(f"## {PREFIX}{most}: ")[2].partition("<a id=")[0]
    assert section.partition("<details>")[0].count("\n- ") == errors.MOST_FORMS
    assert "<details>" not in text.partition(f"## {PREFIX}{few}: ")[2].partition("<a id=")[0]


def test_pages_are_current(pages: dict[Path, str]) -> None:
    assert len(pages) == len(AREAS) + 2
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `make docs`"


def test_every_code_that_a_document_names_exists() -> None:
    files = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "changes").glob("*.md")]
    named = {(file.name, code) for file in files for code in re.findall(rf"{PREFIX}([DCR]\d+)", file.read_text(encoding="utf-8"))}
    assert len(named) > len(FAULTS)
    assert {(name, code) for name, code in named if code not in FAULTS} == set()
