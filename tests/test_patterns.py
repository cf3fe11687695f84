"""Regular expressions of `group_by`: those that answer soon, and those that might never."""

import re

import pytest

from microtome.data.patterns import quick_pattern

SLOW = [
    "(a+)+b",
    "(a|a)*b",
    "a*a*a*a*b",
    "(a*)*b",
    "(a+?)+?b",
    "(?:a|ab)+c",
    "(a{1,2})*b",
    "(a?)*b",
    "((a+)b?)+c",
    "(?=(a+)+b)a",
    "(?>(a+)+)b",
    "(a)(?(1)(a+)+|b)c",
    "(" + "a?" * 60 + "a" * 60 + ")",
    "(a{0,30}){30}b",
    "(a|ab)" * 30,
    "((?:){4000000000})",
    "(?:(?:(?:(a)){900}){900}){900}",
]
QUICK = [
    (r"(mouse\d+)_", "mouse12_left", "mouse12"),
    (r"^(p\d)_", "p1_a", "p1"),
    (r"([^_]+)_.*_.*", "a_b_c", "a"),
    (r"^(mouse|rat)\d+_.*_.*", "rat3_b_c", "rat"),
    (r"(\d{4}-\d{2}-\d{2})", "scan 2024-05-06", "2024-05-06"),
    (r"(?i)(?P<who>[a-z0-9]+)(?=-)", "P7-x", "P7"),
    (r"([ab]*)(?:c|d)", "abd", "ab"),
    (r"(?:[ab])+(x)", "abx", "x"),
]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_could_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="which could take for ever"):
        quick_pattern(pattern)


@pytest.mark.parametrize(("pattern", "name", "group"), QUICK)
def test_what_people_write_is_a_pattern(pattern: str, name: str, group: str) -> None:
    match = quick_pattern(pattern).search(name)
    assert match is not None
    assert match[1] == group


def test_the_slowest_that_is_allowed_comes_to_an_end() -> None:
    assert quick_pattern("(a*)a*a*b").search("a" * 120) is None


def test_a_pattern_of_more_than_200_letters_is_refused() -> None:
    assert isinstance(quick_pattern(f"({'a' * 198})"), re.Pattern)
    with pytest.raises(ValueError, match="at most 200 letters, not 201"):
        quick_pattern(f"({'a' * 199})")


@pytest.mark.parametrize("pattern", ["(", "*", "a{99999999999999999999}", "(?P<a>x)(?P<a>y)", "[z-a]"])
def test_what_python_takes_for_no_pattern_is_none(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"a regular expression \("):
        quick_pattern(pattern)
