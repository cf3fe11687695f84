"""A trace as people read it: the table of layers with its totals, and the size of image that a network is shown with."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from microtome.errors import ConfigError
from microtome.geometry import format_shape
from microtome.models.network import Network
from microtome.models.trace import Operation, Trace

TITLES = ("layer", "kind", "output", "parameters", "multiply-adds", "sees at most")
# These change values, not maps: they share the row of what they follow.
FOLDED = frozenset({"norm", "activation", "dropout"})
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "relu": "ReLU",
        "leaky_relu": "leaky ReLU",
        "prelu": "PReLU",
        "elu": "ELU",
        "silu": "SiLU",
        "gelu": "GELU",
        "batch_norm": "batch norm",
        "instance_norm": "instance norm",
        "group_norm": "group norm",
        "layer_norm": "layer norm",
    }
)
# (C, *S) that a paper draws, or that it or its code trains with, by name and number of spatial axes; second-hand for unet3d
# and sliding_window, not confirmed for resunet. Any other network gets 1 channel and the sides below.
_INPUTS: Mapping[tuple[str, int], tuple[int, ...]] = MappingProxyType(
    {
        ("unet", 2): (1, 572, 572),
        ("unet_same", 2): (3, 160, 160),
        ("unet3d", 3): (3, 116, 132, 132),
        ("vnet", 3): (1, 64, 128, 128),
        ("attention_unet", 3): (1, 96, 160, 160),
        ("laddernet", 2): (1, 48, 48),
        ("resunet", 2): (3, 224, 224),
        ("dense_unet", 2): (3, 224, 224),
        ("canet", 2): (3, 512, 512),
        ("sliding_window", 2): (1, 95, 95),
    }
)
_SIDE: Mapping[int, int] = MappingProxyType({2: 256, 3: 64})


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer, with the norm, activation and dropout that follow it.

    Attributes:
        name: dotted name of its module.
        kind: in words, `3×3 convolution, batch norm, ReLU`.
        shape: of its result, (C, *S).
        parameters: counted for the first time here, those of its norm included.
        shared: used here, but counted in an earlier row.
        multiply_adds: of one image.
        field_vox: receptive field along S.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    shared: int
    multiply_adds: int
    field_vox: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """Cells of the table, each a string, and the line below it."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    totals: str


def layer_rows(trace: Trace) -> tuple[LayerRow, ...]:
    """The layers in the order in which they run, the image first."""
    groups: list[list[int]] = []
    for place, operation in enumerate(trace.operations):
        if operation.kind in FOLDED and groups and operation.inputs == (groups[-1][-1],):
            groups[-1].append(place)
        else:
            groups.append([place])
    return tuple(_row([trace.operations[place] for place in group]) for group in groups)


def layer_table(trace: Trace) -> LayerTable:
    """The same as strings, with thousands separators, and the totals in a line."""
    rows = [
        (row.name, row.kind, format_shape(row.shape), _parameters(row), f"{row.multiply_adds:,}", format_shape(row.field_vox))
        for row in layer_rows(trace)
    ]
    rows += [(name, "not used in this pass", "", f"{number:,}", "0", "") for name, number in trace.unused]
    return LayerTable(titles=TITLES, rows=tuple(rows), totals=f"total: {totals(trace)}")


def totals(trace: Trace) -> str:
    """`31,030,658 parameters, 150,428,424,448 multiply-adds (150.4 G), 1×572×572 -> 2×388×388`."""
    results = " and ".join(format_shape(trace.operations[place].shape) for place in trace.outputs)
    work = f"{trace.multiply_adds:,} multiply-adds ({short_number(trace.multiply_adds)})"
    return f"{trace.parameters:,} parameters, {work}, {format_shape(trace.operations[0].shape)} -> {results}"


def short_number(number: int) -> str:
    """`31.0 M`: three to four digits and a letter; numbers below 1000 as they are."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {letter}"
    return str(number)


def kernel_words(operation: Operation) -> str:
    """`3×3×3`, and what is not usual: `3×3, dilation 2`, `2×2, stride 2`."""
    words = [format_shape(operation.kernel)]
    for word, values in (("stride", operation.stride), ("dilation", operation.dilation)):
        if set(values) != {1}:
            words.append(f"{word} {values[0] if len(set(values)) == 1 else format_shape(values)}")
    return ", ".join(words)


def layer_words(operation: Operation) -> str:
    """What the operation is, as people say it: `3×3 convolution, dilation 2`, `2×2 max-pooling`."""
    kind, function = operation.kind, operation.function
    if kind == "convolution":
        size, comma, more = kernel_words(operation).partition(", ")
        return f"{size} convolution{comma}{more}"
    if kind == "transposed":
        return f"{format_shape(operation.kernel)} up-convolution"
    if kind == "pool":
        name = "max-pooling" if "max" in function else "average pooling"
        whole = math.prod(operation.shape[1:]) == 1 and operation.kernel != (2,) * len(operation.kernel)
        dilation = f", dilation {operation.dilation[0]}" if set(operation.dilation) != {1} else ""
        return f"global {name}" if whole else f"{format_shape(operation.kernel)} {name}{dilation}"
    if kind == "resize":
        grows = math.prod(operation.shape[1:]) > math.prod(operation.taken[0][1:])
        return f"{operation.mode} {'up' if grows else 'down'}-sampling"
    if kind == "norm" or kind == "activation":
        return _WORDS.get(function, function)
    return {"input": "image", "other": function}.get(kind, kind)


def parse_input(text: str) -> tuple[int, ...]:
    """`1x64x128x128` -> (1, 64, 128, 128): channels, then the sizes along YX or ZYX; × and * part them too.

    Raises:
        ConfigError: anything but three or four whole numbers above 0.
    """
    parts = re.split(r"\s*[xX×*]\s*", text.strip())
    right = len(parts) in (3, 4) and all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) for part in parts)
    if not right:
        raise ConfigError(
            "--input",
            expected="channels and then 2 or 3 sizes, whole numbers above 0",
            got=f"`{text}`",
            do="write it as 1x572x572 (C, Y, X) or 1x64x128x128 (C, Z, Y, X)",
            code="C037",
        )
    return tuple(map(int, parts))


def default_input(name: str, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The (C, *S) that a network of that name is shown with: its paper's, else 1 channel and a side of 256 in 2D, 64 in 3D."""
    for axes in dims:
        if (name, axes) in _INPUTS:
            return _INPUTS[name, axes]
    return (1, *(_SIDE[dims[0]],) * dims[0])


def nearest_input(network: Network, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The (C, *S) nearest to `wanted` that the network takes; of two sizes as near, the larger."""
    sizes = [
        min(network.nearest_sizes(n, axis), key=lambda size, n=n: (abs(size - n), -size))  # type: ignore[misc]
        for axis, n in enumerate(wanted[1:])
    ]
    return (network.in_channels, *sizes)


def _row(group: list[Operation]) -> LayerRow:
    first, last = group[0], group[-1]
    return LayerRow(
        name=first.name,
        kind=", ".join(layer_words(operation) for operation in group),
        shape=last.shape,
        parameters=sum(operation.parameters for operation in group),
        shared=sum(operation.shared for operation in group),
        multiply_adds=sum(operation.multiply_adds for operation in group),
        field_vox=last.field_vox,
    )


def _parameters(row: LayerRow) -> str:
    return f"{row.parameters:,}" + (f" (+ {row.shared:,} shared)" if row.shared else "")
