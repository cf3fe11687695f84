"""A network as papers draw it, in SVG: the U with its levels, channels, sizes and skips."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from types import MappingProxyType

from microtome.geometry import format_shape
from microtome.models.describe import layer_rows, layer_words, short_number
from microtome.models.figure import Bar, figure
from microtome.models.layout import TEXT, WIDTH, Arrow, Box, Label, Layout, lay_out, text_width, way_box
from microtome.models.trace import Operation, Trace

INK, PALE, FRAME = "#1c2430", "#5b6675", "#3d5a80"
_FILLS: Mapping[str, str] = MappingProxyType(
    {"image": "#d9dde3", "map": "#8fb3d9", "up": "#8fb3d9", "skip": "#ffffff", "head": "#f0a35e", "box": "#c3d7ec", "gate": "#fdf1c7"}
)
_STROKES: Mapping[str, str] = MappingProxyType(
    {"conv": "#2b5c93", "down": "#c8372d", "up": "#2e8b3d", "join": "#8a94a3", "skip": "#8a94a3", "residual": "#9a6fb0", "gate": "#b8860b"}
)
_LEGEND_STEP = 17


def draw(trace: Trace) -> str:
    """The network of a trace as the text of an SVG file, 1400 px wide."""
    bars = figure(trace)
    layout = lay_out(bars)
    legend = _legend(trace, bars)
    top = _legend_top(layout, legend)
    height = math.ceil(max(layout.height, top + len(legend) * _LEGEND_STEP) + 12)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="{TEXT}" fill="{INK}">',
        f"<title>{escape(_title(trace))}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        "<defs>" + "".join(_marker(kind, colour) for kind, colour in _STROKES.items()) + "</defs>",
        _text(24, 34, _title(trace), size=20),
        _text(24, 54, _subtitle(trace), size=13, colour=PALE),
        *(_line(arrow) for arrow in layout.arrows),
        *(piece for bar in bars for piece in _bar(bar, layout)),
        *(_label(label) for label in layout.labels),
        *(piece for number, (kind, words) in enumerate(legend) for piece in _legend_row(kind, words, top + number * _LEGEND_STEP)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend_top(layout: Layout, legend: Sequence[tuple[str, str]]) -> float:
    """In the lower left corner where nothing is there, as below a U; else below all."""
    high = len(legend) * _LEGEND_STEP
    room = Box(0, layout.height - high, 80 + max(text_width(words) for _, words in legend), high)
    ways = [way_box(piece) for arrow in layout.arrows for piece in pairwise(arrow.points)]
    taken = [*layout.boxes.values(), *ways, *(label.box for label in layout.labels)]
    return layout.height + 8 if any(room.covers(box) for box in taken) else room.y


def _title(trace: Trace) -> str:
    return trace.network + (f" ({trace.variant})" if trace.variant else "")


def _subtitle(trace: Trace) -> str:
    image = trace.operations[0].shape
    words = f"input {format_shape(image)}, output {format_shape(trace.operations[trace.outputs[0]].shape)}"
    sees = format_shape(trace.operations[trace.outputs[0]].field_vox)
    return (
        f"{words}; {trace.parameters:,} parameters; {short_number(trace.multiply_adds)} multiply-adds; an output voxel sees at most {sees}"
    )


def _bar(bar: Bar, layout: Layout) -> list[str]:
    box = layout.boxes[bar.place]
    if bar.kind == "gate":
        return [_circle(box.centre_x, box.centre_y, 9, "×")]
    fill = "head" if bar.head else bar.kind if bar.kind in _FILLS else "map"
    pieces = []
    for (_, kind), segment in zip(bar.segments, layout.segments[bar.place], strict=True):
        skipped = len(bar.segments) > 1 and kind in ("skip", "residual", "join")
        pieces.append(_rectangle(segment, _FILLS["skip" if skipped else fill]))
    if bar.kind == "box":
        number = min(len(bar.convolutions), 8)
        pieces += [_stripe(box, share / number) for share in range(1, number)]
    if bar.plus and bar.kind != "box":
        pieces.append(_circle(box.centre_x, box.y + min(10, box.height / 2), 6, "+"))
    return pieces


def _legend(trace: Trace, bars: Sequence[Bar]) -> list[tuple[str, str]]:
    """Kinds of arrows and bars that the drawing has, each with what it stands for here."""
    kinds = {link.kind for bar in bars for link in bar.links}
    results = {trace.operations[place].name for place in trace.outputs}
    rows = [row for row in layer_rows(trace) if row.multiply_adds and row.name not in results]
    plain = Counter(row.kind for row in rows if "stride" not in row.kind and "up-" not in row.kind)
    words = {
        "conv": "; ".join(kind for kind, _ in plain.most_common(3)),
        "down": _common(o for o in trace.operations if o.kind == "pool" or (o.kind == "convolution" and set(o.stride) != {1})),
        "up": _common(o for o in trace.operations if o.kind in ("transposed", "resize") and _finer(o, trace)),
        "skip": _skips(trace, bars),
        "join": "taken into a concat or sum",
        "residual": "past other maps: " + _ways(bars, "residual"),
        "gate": "weighs a map (×)",
    }
    shown = [(kind, text) for kind, text in words.items() if kind in kinds]
    return [*shown, ("head", "result: " + _common(trace.operations[place] for place in trace.outputs))]


def _finer(operation: Operation, trace: Trace) -> bool:
    return math.prod(operation.shape[1:]) > math.prod(trace.operations[operation.inputs[0]].shape[1:])


def _skips(trace: Trace, bars: Sequence[Bar]) -> str:
    """What becomes of the maps that are skipped: cropped, concatenated, added, gated."""
    joins = [operation for operation in trace.operations if operation.kind in ("concat", "sum")]
    pairs = [(trace.operations[place], taken) for join in joins for place, taken in zip(join.inputs, join.taken, strict=True)]
    cropped = any(math.prod(taken[1:]) < math.prod(source.shape[1:]) and source.kind != "transposed" for source, taken in pairs)
    return ("crop and " if cropped else "") + _ways(bars, "skip")


def _ways(bars: Sequence[Bar], kind: str) -> str:
    """How maps that come by links of that kind are joined with others."""
    ways = {way for bar in bars if any(link.kind == kind for link in bar.links) for way in bar.joined}
    return " or ".join(sorted(ways)).replace("add", "add (+)") or "weigh"


def _common(operations: Iterable[Operation]) -> str:
    """The kinds of layers, most frequent first, at most three."""
    counted = Counter(layer_words(operation) for operation in operations)
    return ", ".join(words for words, _ in counted.most_common(3)) or "one step"


def _legend_row(kind: str, words: str, y: float) -> list[str]:
    x = 24.0
    if kind == "head":
        sign = _rectangle(Box(x + 10, y - 4, 10, 11), _FILLS["head"])
    else:
        sign = f'<path d="M {x} {y + 2} H {x + 26}" {_stroke(kind)}/>'
    return [sign, _text(x + 36, y + 6, words)]


def _line(arrow: Arrow) -> str:
    (x, y), *rest = arrow.points
    way = f"M {x:.1f} {y:.1f} " + " ".join(f"L {x:.1f} {y:.1f}" for x, y in rest)
    return f'<path d="{way}" {_stroke(arrow.link.kind)}/>'


def _stroke(kind: str) -> str:
    dashed = ' stroke-dasharray="4 3"' if kind == "gate" else ""
    width = {"residual": 1.2, "gate": 1.2, "join": 1.2, "conv": 1.6}.get(kind, 2)
    return f'fill="none" stroke="{_STROKES[kind]}" stroke-width="{width}" stroke-linejoin="round" marker-end="url(#end-{kind})"{dashed}'


def _marker(kind: str, colour: str) -> str:
    return (
        f'<marker id="end-{kind}" viewBox="0 0 8 8" refX="7.4" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" '
        f'orient="auto"><path d="M 0 0.8 L 8 4 L 0 7.2 z" fill="{colour}"/></marker>'
    )


def _rectangle(box: Box, fill: str) -> str:
    return (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'fill="{fill}" stroke="{FRAME}" stroke-width="1"/>'
    )


def _stripe(box: Box, share: float) -> str:
    x = box.x + share * box.width
    return f'<path d="M {x:.1f} {box.y:.1f} V {box.bottom:.1f}" stroke="{FRAME}" stroke-width="0.5"/>'


def _circle(x: float, y: float, radius: float, sign: str) -> str:
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{_FILLS["gate"]}" stroke="{FRAME}"/>'
    return shape + _text(x, y + 4, sign, anchor="middle")


def _label(label: Label) -> str:
    return _text(label.box.centre_x, label.box.bottom - 3, label.text, anchor="middle")


def _text(x: float, y: float, words: str, *, size: int = TEXT, colour: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
