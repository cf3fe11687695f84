"""JSON from files that nobody vouches for: of limited size, depth and numbers, each name once.

Python reads what JSON does not have (NaN, numbers without end, a name twice, halves of characters) and fails on it far from the file,
in whatever takes the value for what it looks like. Here it is refused where the file is known.
"""

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microtome.errors import DataError

# Values take up to 25 times the bytes of their text. A dataset.json of 100,000 cases has 20 million.
MOST_BYTES = 2**25
# Of what this program writes itself, which grows with the cases. Such values take about five times their text: they are long, and above
# MOST_BYTES no more of them are taken than a million rows of scores have. Of the smallest that there are so many take 2 GB.
MOST_OWN_BYTES, MOST_OWN_VALUES = 2**28, 2**24
# Brackets in brackets: what we read has up to nine.
MOST_DEPTH = 64
# Whole numbers of 64 bits, with or without a sign.
_LOWEST, _PAST = -(2**63), 2**64


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or names a thing twice, or has NaN, infinity, numbers beyond 64 bits, more than 64 brackets in
            brackets, or strings that are no text.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        value = json.loads(text, parse_constant=_not_a_number, parse_int=_whole, parse_float=_real, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("brackets in brackets without end") from None
    _check_depth(value)
    if "\\ud" in text.lower():
        # The two halves of a character are written so where text is kept in ASCII; a lone half is none.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def load_json(path: Path, *, do: str, most_bytes: int = MOST_BYTES) -> Any:
    """The value of a JSON file.

    Args:
        path: of the file.
        do: what a person does about a file that is damaged, for the message.
        most_bytes: that the file may have.

    Raises:
        DataError: not there, no plain file, too large, or no JSON.
    """
    try:
        content = read_limited(path, most_bytes)
        _check_values(content)
        return parse_json(content)
    except OSError as error:
        raise DataError(path, expected="a file that can be read", got=error.strerror or str(error), do=do, code="D241") from None
    except ValueError as error:
        raise DataError(path, expected="valid JSON", got=reason(error), do=do, code="D240") from None


def load_object(path: Path, *, do: str, most_bytes: int = MOST_BYTES) -> Mapping[str, Any]:
    """The object of a JSON file: names with values; its arguments are those of `load_json`.

    Raises:
        DataError: as `load_json`, or another kind of value.
    """
    value = load_json(path, do=do, most_bytes=most_bytes)
    if not isinstance(value, dict):
        raise DataError(path, expected="names with values", got=f"a {type(value).__name__}", do=do, code="D240")
    return value


def read_limited(path: Path, most_bytes: int) -> bytes:
    """The bytes of a plain file of limited size; nothing else is opened, as a pipe would wait for a writer for ever.

    Raises:
        OSError: not there, or no right to read it.
        ValueError: no plain file, or larger.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("something that is no plain file")
    with path.open("rb") as file:
        # Memory is taken for as many as are asked for; of a file that grows meanwhile the rest is read after them.
        content = file.read(min(found.st_size, most_bytes) + 1)
        content += file.read(most_bytes + 1 - len(content)) if len(content) > found.st_size else b""
    if len(content) > most_bytes:
        raise ValueError(f"{max(found.st_size, len(content))} bytes, of at most {most_bytes}")
    return content


def reason(error: Exception) -> str:
    """What is wrong, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_values(content: bytes) -> None:
    """Refuse, before anything is made of it, a large text of more values than a file of scores or predictions has."""
    if len(content) > MOST_BYTES and (values := sum(content.count(mark) for mark in b"[{,")) > MOST_OWN_VALUES:
        raise ValueError(f"{values} values, of at most {MOST_OWN_VALUES}")


def _not_a_number(word: str) -> Any:
    raise ValueError(f"{word}, which JSON does not have")


def _whole(digits: str) -> int:
    """A whole number of 64 bits."""
    if len(digits) > 20 or not _LOWEST <= int(digits) < _PAST:
        raise ValueError(f"a whole number of {len(digits)} digits, beyond 64 bits")
    return int(digits)


def _real(digits: str) -> float:
    """A number that is finite."""
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:40]}, which is beyond all that can be computed with")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {twice[:80]!r} twice")
    return found


def _check_depth(value: Any) -> None:
    """Refuse brackets in brackets beyond the limit."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [child for each in level if isinstance(each, dict | list) for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise ValueError(f"more than {MOST_DEPTH} brackets in brackets")
