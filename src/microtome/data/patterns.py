"""Regular expressions of a stranger: refused before use where matching one could take for ever."""

import math
import re
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

_MOST_LETTERS = 200
# Ways to match a name, as powers of 2, of which Python may try each: three repeats without an end, of names of up to 2**8 letters, and
# a little more. That is a few seconds of work.
_NAME_BITS, _MOST_BITS = 8.0, 26.0
# Steps along one of these ways.
_MOST_STEPS = 10_000
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def quick_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression, compiled, that answers soon whatever name it is asked about.

    Python tries one way to match after another. Repeats in repeats (`(a+)+`), alternatives in repeats (`(a|a)*`) and repeats in a row
    (`a*a*a*a*`) have more ways than can be tried before the sun burns out.

    Raises:
        ValueError: none, or too long, or with too many ways to match.
    """
    if len(pattern) > _MOST_LETTERS:
        raise ValueError(f"a regular expression of at most {_MOST_LETTERS} letters, not {len(pattern)}")
    try:
        compiled = re.compile(pattern)
        bits, steps = _work(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"a regular expression ({error})") from None
    if bits > _MOST_BITS or steps > _MOST_STEPS:
        raise ValueError(
            f"a regular expression of at most three `+` or `*`, with neither another repeat nor `|` inside of one, not {pattern!r}, "
            "which could take for ever"
        )
    return compiled


def _work(parts: Any) -> tuple[float, float]:
    """The ways to match a row of parts, as a power of 2, and the steps along the longest one."""
    works = [_work_of(kind, value) for kind, value in parts]
    return sum(bits for bits, _ in works), sum(steps for _, steps in works)


def _work_of(kind: Any, value: Any) -> tuple[float, float]:
    """The same of one part, as Python's own parser has it."""
    if kind in _REPEATS:
        least, most, body = value
        bits, steps = _work(body)
        if most == _constants.MAXREPEAT:
            return (math.inf if bits else _NAME_BITS), max(1, least) * max(1, steps)
        return math.log2(most - least + 1) + most * bits, max(1, most) * max(1, steps)
    if kind == _constants.BRANCH:
        return _either(value[1])
    if kind == _constants.GROUPREF_EXISTS:
        return _either([way for way in value[1:] if way is not None])
    # Brackets of all kinds, looks ahead and behind have their inside last; other parts are one letter or place.
    inside = value if kind == _constants.ATOMIC_GROUP else value[-1] if isinstance(value, tuple) else None
    bits, steps = _work(inside) if isinstance(inside, _parser.SubPattern) else (0.0, 0.0)
    return bits, steps + 1


def _either(ways: list[Any]) -> tuple[float, float]:
    """The work of alternatives, of which each may be tried."""
    works = [_work(way) for way in ways]
    return math.log2(len(works)) + max(bits for bits, _ in works), 1 + max(steps for _, steps in works)
