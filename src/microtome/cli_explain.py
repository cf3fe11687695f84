"""`microtome explain`: the code that an error ends with -> what it means and what to do."""

from typing import Annotated

import typer

from microtome.options import AsJson

# `cli` takes its command over, in its own place among the others.
commands = typer.Typer()


@commands.command()
def explain(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", help="The code at the end of an error, such as MT-D031.")] = None,
    as_json: AsJson = False,
) -> None:
    """What an error means and what to do about it, by its code; without one, all codes."""
    from microtome.codes.lookup import FAULTS, code_of, document, explained, listed
    from microtome.terminal import print_json

    if code is None:
        if as_json:
            print_json([document(each) for each in sorted(FAULTS)])
        else:
            typer.echo(listed())
        return
    known = code_of(code)
    if as_json:
        print_json(document(known))
    else:
        typer.echo(explained(known))
