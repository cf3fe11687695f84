"""docs/networks.md and its drawings, written from the registry: every network with its paper, settings and totals."""

from functools import cache
from pathlib import Path

import torch

from microtome.models.describe import default_input, nearest_input, totals
from microtome.models.drawing import draw
from microtome.models.registry import NETWORKS, Entry, build
from microtome.models.trace import Trace, trace
from tools.layers import REPOSITORY

FOLDER = REPOSITORY / "docs" / "networks"
INTRODUCTION = """\
# The networks

`microtome networks NAME` prints the layers of one of them, `--input CxSxS` at another size, `--svg FILE` draws it.
`microtome train --network NAME` trains it, and `microtome.build("NAME", dims=2, in_channels=1, classes=2)` gives the module.
In drawings a bar is a feature map: its height the size, the number above it the channels.
"""


@cache
def shown(name: str) -> Trace:
    """The network with 2 classes, at the size that its paper draws it with."""
    wanted = default_input(name, NETWORKS[name].dims)
    with torch.device("meta"):
        network = build(name, dims=len(wanted) - 1, in_channels=wanted[0], classes=2)
    return trace(network, nearest_input(network, wanted))


def network_pages() -> dict[Path, str]:
    """The page and the drawings, by path."""
    drawings = {FOLDER / f"{name}.svg": draw(shown(name)) for name in NETWORKS}
    sections = "\n".join(_section(entry) for entry in NETWORKS.values())
    return {FOLDER.with_suffix(".md"): INTRODUCTION + "\n" + sections, **drawings}


def _section(entry: Entry) -> str:
    """What the registry says of a network, its totals, its drawing."""
    lines = [
        f"## `{entry.name}`",
        "",
        f"{entry.title} ({entry.authors}; {', '.join(filter(None, (entry.reference, str(entry.year))))}).",
        "",
        f"- works in {' and '.join(f'{n}D' for n in entry.dims)}",
        *([f"- variants: {', '.join(f'`{variant}`' for variant in entry.variants)}; the first if nobody says"] if entry.variants else []),
        f"- settings in `plan.yaml`, under `network`: {', '.join(f'`{field}`' for field in sorted(entry.settings))}",
        f"- as drawn: {totals(shown(entry.name))}",
        "",
        f"![{entry.name}](networks/{entry.name}.svg)",
        "",
    ]
    return "\n".join(lines)
