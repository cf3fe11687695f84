"""The parts of a network that can be computed again for the gradient, and how many values a training step holds then.

A part is a block of a network that holds a convolution: a level's convolutions, a residual unit. Of its values only those are
kept that it hands on; the others are there again while the backward pass is in that part. Small parts hand on more and large
ones hold more at once, so a part is cut into the blocks that it is made of where that lowers the most that is held.
"""

import math
from collections.abc import Iterator, Sequence

from torch import nn

from microtome.models.network import Network
from microtome.models.trace import Trace

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def segments(network: Network, graph: Trace) -> tuple[str, ...]:
    """Names of the modules that are the parts of a network; `graph` is a trace of it at the size that it will see."""
    return _cut(network, graph)[0]


def recomputed_values(network: Network, graph: Trace) -> int:
    """The most values that a step holds at any time where the parts are computed again, for one image; gradients are not counted."""
    return _cut(network, graph)[1]


def _cut(network: Network, graph: Trace) -> tuple[tuple[str, ...], int]:
    """The parts, and the most values held with them."""
    names = tuple(_blocks(network, ""))
    most, largest = _held(graph, names)
    while largest:
        finer = (*(name for name in names if name != largest), *_blocks(network.get_submodule(largest), largest + "."))
        less, next_largest = _held(graph, finer)
        if less > most:
            break
        names, most, largest = finer, less, next_largest
    return names, most


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    """The outermost modules inside of a module that are called as a whole and hold a convolution beside something else."""
    for own_name, child in module.named_children():
        name = prefix + own_name
        # A list of modules is not called itself.
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _blocks(child, name + ".")
        elif next(child.children(), None) is not None and any(isinstance(part, CONVOLUTIONS) for part in child.modules()):
            yield name


def _held(graph: Trace, names: Sequence[str]) -> tuple[int, str]:
    """The most values that are held at any time, and the part at work then; "" where that is none.

    Values are counted as `Trace.values` does. When the backward pass reaches a part, what was kept after it is gone.
    """
    part_of = [next((name for name in names if f"{op.name}.".startswith(name + ".")), "") for op in graph.operations]
    taken = {(place, part_of[taker]) for taker, op in enumerate(graph.operations) for place in op.inputs}
    handed_on = {place for place, taker in taken if taker != part_of[place]} | set(graph.outputs)
    kept, before, inside = 0, dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for place, op in enumerate(graph.operations):
        size, part = math.prod(op.shape), part_of[place]
        # What a part hands on may come from an activation in place; the operation before it has counted that memory.
        counted = 0 if op.kind == "activation" else size
        stays = counted if not part else size if place in handed_on else 0
        kept += stays
        if part:
            # What it hands on is computed again beside what was kept: an activation needs its own result for its gradient.
            inside[part] += counted
            before[part] = kept
    return max([(kept, ""), *((before[name] + inside[name], name) for name in names)])
