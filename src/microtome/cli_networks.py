"""`microtome networks`: its words -> options -> one call."""

from pathlib import Path
from typing import Annotated

import typer

from microtome.options import AsJson, check_target, refuse_beside

# `cli` takes its command over, in its own place among the others.
commands = typer.Typer()


@commands.command()
def networks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one, layer by layer.")] = None,
    size: Annotated[str | None, typer.Option("--input", help="Channels and sizes of the image: 1x572x572 or 1x64x128x128.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes it tells apart; 2 if not given.", min=1)] = None,
    variant: Annotated[str | None, typer.Option(help="One of its variants; the first if not given.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """The networks with their papers; or one of them: its layers, shapes, parameters, multiply-adds, receptive field, drawing."""
    from microtome.models.registry import NETWORKS
    from microtome.terminal import print_json, print_networks

    if name is None:
        refuse_beside("networks", {"--input": size, "--classes": classes, "--variant": variant, "--svg": svg}, "name a network with it")
        if as_json:
            fields = ("name", "title", "authors", "year", "reference", "dims", "variants")
            print_json([{field: getattr(entry, field) for field in fields} for entry in NETWORKS.values()])
        else:
            print_networks(NETWORKS.values())
        return
    check_target(svg, ".svg")
    _show_network(name, size, classes or 2, variant or "", svg=svg, as_json=as_json)


def _show_network(name: str, size: str | None, classes: int, variant: str, *, svg: Path | None, as_json: bool) -> None:
    """Layers and drawing of one network; on torch's `meta` device, which computes nothing."""
    from dataclasses import asdict

    import torch

    from microtome.files import write_text
    from microtome.models.describe import default_input, layer_rows, layer_table, nearest_input, parse_input
    from microtome.models.drawing import draw
    from microtome.models.registry import build, find
    from microtome.models.trace import trace
    from microtome.terminal import print_json, print_layers

    wanted = parse_input(size) if size is not None else default_input(name, find(name).dims)
    with torch.device("meta"):
        network = build(name, dims=len(wanted) - 1, in_channels=wanted[0], classes=classes, variant=variant)
    found = trace(network, wanted if size is not None else nearest_input(network, wanted))
    if svg is not None:
        write_text(svg, draw(found))
    if as_json:
        print_json([asdict(row) for row in layer_rows(found)])
    else:
        print_layers(layer_table(found), svg)
