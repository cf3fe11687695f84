"""`microtome doctor`: its words -> facts, a self-test, a table."""

from pathlib import Path
from typing import Annotated

import typer

from microtome.errors import ConfigError
from microtome.options import AsJson

# `cli` takes its command over, in its own place among the others.
commands = typer.Typer()


@commands.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Only look at the machine and at what is installed; no self-test.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep what the self-test makes in this folder, new or empty; its disk is measured, else the current folder's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine has, a self-test of the whole road, and what to install for what is missing. Exit code 1 if it fails."""
    import tempfile

    from microtome.doctor.advice import lines as lines_of
    from microtome.doctor.facts import examine
    from microtome.doctor.findings import Line, Result, is_well
    from microtome.doctor.verdict import verdict
    from microtome.doctor.view import as_document, print_diagnosis, progress
    from microtome.terminal import print_json

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(out, expected="a new or empty folder", got="one that is taken", do="give another --out", code="C005")
    result: Result | None = None
    with progress() as on_part:
        facts = examine(out or Path())
        lines: list[Line] = lines_of(facts)
        if not quick and is_well(lines):
            from microtome.doctor.checkup import Size, run_checkup

            with tempfile.TemporaryDirectory(prefix="microtome-doctor-", ignore_cleanup_errors=True) as scratch:
                result = run_checkup(out or Path(scratch), Size(), on_part)
            lines += result.checks
    if not quick and result is None:
        lines.append(Line("self-test", "not tried: what it needs does not work", "", "note"))
    sentence = verdict(facts, lines, result)
    if as_json:
        print_json(as_document(facts, lines, sentence, result))
    else:
        print_diagnosis(lines, sentence)
    if not is_well(lines):
        raise typer.Exit(1)
