"""Writes docs/errors.md and docs/errors/ from the table of codes and the lines of the source that carry them.

`make docs` runs it. It also appends new codes to tests/data/error_codes.txt, the list of all codes that there ever were: nothing takes a
line of it back, so that a number never comes to stand for another fault.
"""

import re
from pathlib import Path

from microtome.codes.fault import Fault
from microtome.codes.lookup import AREAS, BLANK, FAULTS, findings_of, forms_of
from microtome.errors import PREFIX, DataError
from tools.layers import REPOSITORY

PAGE = REPOSITORY / "docs" / "errors.md"
FOLDER = REPOSITORY / "docs" / "errors"
EVER = REPOSITORY / "tests" / "data" / "error_codes.txt"
MADE_BY = "<!-- made by `make docs` from src/microtome/codes; change that, not this page -->\n"
# So many forms of a line are shown at once, the others where somebody opens them.
MOST_FORMS = 4
EXAMPLE = DataError(
    "case_07",
    expected="the shape of its image, 96×512×512",
    got="95×512×512 in labels/case_07.nii.gz",
    do="export the label again or leave the case out",
    code="D034",
)
INDEX = f"""\
{MADE_BY}
# Errors

Whatever goes wrong, microtome says it in one line: where, what was expected, what was found, and after the semicolon what to do.

```text
microtome: {EXAMPLE.line}
```

The code in brackets stands for one kind of fault for ever, so it can be searched for, and quoted in a question. The same words as on these
pages, without a browser:

```sh
microtome explain {PREFIX}{EXAMPLE.code}
```

| code | what is wrong | exit code |
|---|---|---|
| {PREFIX}D… | a file or folder is not what it has to be | 2 |
| {PREFIX}C… | an option, a plan or a `microtome.yaml` says something that cannot be done | 2 |
| {PREFIX}R… | files and words are good, and the run could not go on | 1; 75 where a training was asked to stop and saved itself |

Nothing is half-written when one of these lines appears: what was there before is there still. `microtome --debug ...` shows where in the
program a line comes from. A Python traceback without `--debug` is a fault of microtome's own; please report it.
"""


def slug(area: str) -> str:
    """The name of an area's page: its words in lower case, without what stands in brackets."""
    return "-".join(re.findall("[a-z0-9]+", area.partition("(")[0].lower()))


def index_page() -> str:
    """How a line is read, and all codes by area."""
    parts = [INDEX]
    for area, faults in AREAS.items():
        rows = [f"| [{PREFIX}{code}](errors/{slug(area)}.md#{anchor(code)}) | {_cell(faults[code].title)} |" for code in sorted(faults)]
        parts.append("\n".join([f"\n## [{area}](errors/{slug(area)}.md)\n", "| code | what is wrong |", "|---|---|", *rows]) + "\n")
    if gone := {code: title for code, title in ever().items() if code not in FAULTS}:
        parts += ["\n## Of earlier versions\n\n", *(f"- {PREFIX}{code}: {title}\n" for code, title in gone.items())]
    return "".join(parts)


def anchor(code: str) -> str:
    """The name of a code's place on its page: mt-d034."""
    return f"{PREFIX}{code}".lower()


def area_page(area: str) -> str:
    """The codes of one area, each with the lines that carry it, its cause and its cure."""
    head = f"{MADE_BY}\n# {area}\n\nWhat is filled in is shown as {BLANK}. [All errors](../errors.md)\n"
    return "".join([head, *(_section(code, AREAS[area][code]) for code in sorted(AREAS[area]))])


def _section(code: str, fault: Fault) -> str:
    words = findings_of(code)
    lines = [f"- an error of `microtome inspect`: `{'`, `'.join(words)}`"] if words else []
    lines += [f"- {_literal(form)}" for form in forms_of(code)]
    shown, more = (lines, []) if len(lines) <= MOST_FORMS + 1 else (lines[:MOST_FORMS], lines[MOST_FORMS:])
    if more:
        shown += ["", f"<details><summary>{len(more)} more lines with this code</summary>", "", *more, "", "</details>"]
    head = f'\n<a id="{anchor(code)}"></a>\n\n## {PREFIX}{code}: {fault.title}\n'
    return "\n".join([head, fault.cause, "", f"**What to do.** {fault.cure}", "", "Shown as:", "", *shown]) + "\n"


def _literal(text: str) -> str:
    """Text as it is, though there are backticks in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def ever() -> dict[str, str]:
    """Every code that there ever was, with the title that it had first."""
    lines = EVER.read_text(encoding="utf-8").splitlines() if EVER.exists() else []
    return dict(line.split(" ", 1) for line in lines)


def pages() -> dict[Path, str]:
    """Each page with the text that it should have, and the list of codes with the new ones added."""
    known = {code: fault.title for code, fault in FAULTS.items()} | ever()
    codes = "".join(f"{code} {known[code]}\n" for code in sorted(known))
    return {PAGE: index_page(), **{FOLDER / f"{slug(area)}.md": area_page(area) for area in AREAS}, EVER: codes}
