"""Lists and names in the room that a line has; `errors.in_one_line` makes lines of them."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from rich.cells import cell_len

from microtome.errors import in_one_line

# More names than this are no line that anybody reads; the classes of street scenes are about thirty.
MOST_LISTED = 36
ELLIPSIS = "…"
# Names of cases keep so many cells although the last column then wraps, and so many however narrow the terminal.
GOOD_NAME, LEAST_NAME = 24, 12


def listed(names: Iterable[object], what: str, most: int = MOST_LISTED) -> str:
    """Names one after the other; of more than `most` the first three, the last, and how many.

    >>> listed(range(1, 255), "values")
    '1, 2, 3, ... 254 (254 values)'
    """
    words = [str(name) for name in names]
    if len(words) <= most:
        return ", ".join(words)
    return f"{', '.join(words[:3])}, ... {words[-1]} ({len(words)} {what})"


def cut_middle(name: str, width: int) -> str:
    """A name in at most `width` cells of a terminal, 1 or more, of which some letters take two: names of cases differ at their ends.

    >>> cut_middle("patient_0001_visit_2", 12)
    'patien…sit_2'
    """
    if cell_len(name) <= width:
        return name
    last = (width - 1) // 2
    return _beginning(name, width - 1 - last) + ELLIPSIS + _beginning(name[::-1], last)[::-1]


def _beginning(name: str, width: int) -> str:
    """As much of a name as takes at most `width` cells."""
    return name[: sum(cells <= width for cells in accumulate(map(cell_len, name)))]


def with_short_names(titles: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> list[tuple[str, ...]]:
    """Rows whose first cells, names of any length, leave the other columns the room that they need; the last may take more lines."""
    escaped = [tuple(map(in_one_line, row)) for row in rows]
    widest = [max(map(cell_len, column)) for column in zip(titles, *escaped, strict=True)]
    # Two spaces between columns.
    room = width - sum(widest[1:-1]) - 2 * (len(titles) - 1)
    most = max(room - widest[-1], min(GOOD_NAME, room - cell_len(titles[-1])), LEAST_NAME)
    return [(cut_middle(name, most), *cells) for name, *cells in escaped]
