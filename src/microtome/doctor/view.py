"""What a person sees of it: one table, and while it is made how far it is; the same as JSON for whoever reports a fault."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from microtome.doctor.facts import Facts, plain, without_home
from microtome.doctor.findings import Check, Level, Line, Result, is_well
from microtome.terminal import Terminal

# Of JSON: whoever reads it may hold to what a version says.
SCHEMA = 1
# By level: a mark, what stands for it where only ASCII can be shown, a colour.
MARKS: Mapping[Level, tuple[str, str, str]] = MappingProxyType(
    {
        "good": ("✓", "ok", "green"),
        "note": ("·", "--", "blue"),
        "warning": ("!", "!", "yellow"),
        "bad": ("✗", "FAIL", "red"),
    }
)
# Of a file or a pipe, which have no width.
WIDTH = 110


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function that takes each part as it begins: a bar that goes away, or a line each where there is no terminal."""
    terminal = Terminal()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console, disable=not terminal.console.is_terminal, transient=True) as bar:
        looking = "looking at the machine and at what is installed"
        task = bar.add_task(looking, total=None)
        if not terminal.console.is_terminal:
            terminal.say(f"{looking} ...")

        def show(name: str, done: int, of: int) -> None:
            bar.update(task, description=f"self-test: {name}", completed=done, total=of)
            if not terminal.console.is_terminal and done < of:
                terminal.say(f"self-test {done + 1}/{of}: {name}")

        yield show


def print_diagnosis(lines: Sequence[Line], verdict: str) -> None:
    """The table, and the verdict below it."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    ascii_only = console.options.ascii_only
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for line in lines:
        mark, plain_mark, colour = MARKS[line.level]
        finding = Text(line.finding)
        if isinstance(line, Check) and line.seconds >= 0.1:
            finding.append(f" ({line.seconds:.1f} s)", style="dim")
        if line.do:
            finding.append(f"\n{'->' if ascii_only else '→'} {line.do}", style=colour)
        table.add_row(Text(plain_mark if ascii_only else mark, style=colour), Text(line.what), finding)
    with console.capture() as captured:
        console.print(table)
        console.print()
        console.print(Text(verdict, style="bold"))
    # Columns are filled up with spaces, which nobody wants to paste.
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def as_document(facts: Facts, lines: Sequence[Line], verdict: str, result: Result | None) -> dict[str, Any]:
    """Everything, to be pasted into a report of a fault; the machine is not named, and the user's own folder is `~`.

    `schema`, `ok`, `verdict`, `lines` (`what`, `finding`, `do`, `level`), `facts` as `facts.Facts` has them, `self_test`: null, or
    `checks`, `tile_seconds`, `step_seconds`.
    """
    tested = None
    if result is not None:
        checks = [{**_shown(check), "seconds": round(check.seconds, 2)} for check in result.checks]
        tested = {"checks": checks, "tile_seconds": result.tile_seconds, "step_seconds": result.step_seconds}
    return {
        "schema": SCHEMA,
        "ok": is_well(lines),
        "verdict": verdict,
        "lines": [_shown(line) for line in lines],
        "facts": plain(facts),
        "self_test": tested,
    }


def _shown(line: Line) -> dict[str, Any]:
    """A line for JSON."""
    return {"what": line.what, "finding": without_home(line.finding), "do": without_home(line.do), "level": line.level}
