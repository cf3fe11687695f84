"""A trace as the figure of a paper has it: feature maps that are bars, and what leads from one to the next.

Norm, activation and dropout belong to the map that they change; a residual sum belongs to the last convolution before it;
an up-sampled map belongs to the concat that takes it; all that computes an attention gate is one symbol. Where that leaves
too many bars, pooled maps go, and then runs of convolutions at one resolution become one box.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from microtome.models.describe import FOLDED, kernel_words
from microtome.models.trace import Operation, Trace

MOST_BARS = 60
MOST_COLUMNS = 34
_SQUASHED = frozenset({"sigmoid", "softmax"})
_JOINS = frozenset({"concat", "sum", "product", "other"})
_WAYS: Mapping[str, frozenset[str]] = MappingProxyType({"concat": frozenset({"concatenate"}), "sum": frozenset({"add"})})
# What a bar is, by the operation that makes it; all else is a map.
_KINDS: Mapping[str, str] = MappingProxyType({"input": "image", "pool": "pool", "concat": "concat", "sum": "sum", "product": "gate"})


@dataclass(frozen=True)
class Link:
    """What leads from the map at `source` to another.

    `kind`: conv, down, up, join (the last of what a concat or sum takes), skip (past deeper maps), residual (past
    maps of its own level), or gate (a signal that weighs another map).
    """

    source: int
    kind: str


@dataclass(kw_only=True)
class Bar:
    """A feature map, or a box of several.

    Attributes:
        place: of the operation that makes it, in `Trace.operations`.
        kind: image, map, pool, concat, sum, gate or box.
        shape: (C, *S).
        level: distance of its voxels along S, in voxels of the image; bars of one level share a row.
        links: where it comes from.
        segments: channels of its parts and the kind of link that each came by; more than one for a concat.
        made_by: the convolutions and pools inside.
        ended: the last activation's name.
        plus: whether a residual sum ends it.
        head: whether it is a result of the network.
        words: lines that say what a box holds.
        joined: how what comes to it is joined: add, concatenate.
    """

    place: int
    kind: str
    shape: tuple[int, ...]
    level: tuple[Fraction, ...]
    links: list[Link]
    segments: tuple[tuple[int, str], ...]
    made_by: list[Operation] = field(default_factory=list)
    ended: str = ""
    plus: bool = False
    head: bool = False
    words: tuple[str, ...] = ()
    joined: frozenset[str] = frozenset()

    @property
    def depth(self) -> float:
        """How coarse it is: 1 for the image's resolution, 2 if halved along each axis."""
        return math.pow(math.prod(self.level), 1 / len(self.level))

    @property
    def convolutions(self) -> list[Operation]:
        """Those inside, transposed ones left out."""
        return [operation for operation in self.made_by if operation.kind in ("convolution", "linear")]


Bars = dict[int, Bar]


def figure(trace: Trace) -> tuple[Bar, ...]:
    """The bars in the order in which they are made, few enough to be drawn."""
    bars = _draft(trace)
    _fold_gates(bars)
    _fold_sums(bars)
    _fold_ups(bars)
    _name_joins(bars)
    for fold in (_fold_pools, _fold_runs):
        if not _fits(bars):
            fold(bars)
    return tuple(bars[place] for place in sorted(bars))


def columns(bars: Iterable[Bar]) -> dict[int, int]:
    """Place -> column: the longest path from the image, where a step to another level needs no new column."""
    column: dict[int, int] = {}
    roomy: set[int] = set()
    levels: dict[int, tuple[Fraction, ...]] = {}
    taken: set[tuple[tuple[Fraction, ...], int]] = set()
    for bar in bars:
        at = 0
        for link in bar.links:
            # Below the last of several, there is room; below the only one of its level the U would become a line.
            falls = link.kind in ("down", "up", "gate") and levels[link.source] != bar.level and link.source in roomy
            at = max(at, column[link.source] + (0 if falls else 1))
        while (bar.level, at) in taken:
            at += 1
        taken.add((bar.level, at))
        if bar.kind != "box" and any(levels[link.source] == bar.level for link in bar.links):
            roomy.add(bar.place)
        column[bar.place], levels[bar.place] = at, bar.level
    return column


def _fits(bars: Bars) -> bool:
    ordered = [bars[place] for place in sorted(bars)]
    return len(ordered) <= MOST_BARS and max(columns(ordered).values()) < MOST_COLUMNS


def _draft(trace: Trace) -> Bars:
    """A bar for each operation that makes a map of its own."""
    bars: Bars = {}
    maker: dict[int, int] = {}
    for place, operation in enumerate(trace.operations):
        sources = list(dict.fromkeys(maker[source] for source in operation.inputs))
        if operation.kind in FOLDED or (operation.kind == "resize" and operation.shape == trace.operations[operation.inputs[0]].shape):
            maker[place] = sources[0]
            bars[sources[0]].ended = operation.function if operation.kind == "activation" else bars[sources[0]].ended
            continue
        maker[place] = place
        kind = _link_kind(operation, trace)
        bars[place] = Bar(
            place=place,
            kind=_KINDS.get(operation.kind, "map"),
            shape=operation.shape,
            level=operation.jump_vox,
            links=[Link(source, kind) for source in sources],
            segments=tuple((taken[0], kind) for taken in operation.taken) if operation.kind == "concat" else ((operation.shape[0], kind),),
            joined=_WAYS.get(operation.kind, frozenset()),
            made_by=[operation] if operation.kind in ("convolution", "transposed", "pool", "resize", "linear") else [],
        )
    for place in trace.outputs:
        bars[maker[place]].head = True
        if trace.operations[place].kind == "resize":
            bars[bars[maker[place]].links[0].source].head = True
    return bars


def _link_kind(operation: Operation, trace: Trace) -> str:
    if operation.kind in _JOINS or not operation.inputs:
        return "join"
    if operation.kind == "pool":
        return "down"
    before = math.prod(trace.operations[operation.inputs[0]].jump_vox)
    after = math.prod(operation.jump_vox)
    return "down" if after > before else "up" if after < before else "conv"


def _takers(bars: Bars, place: int) -> list[int]:
    """Who takes a map; its being a result counts as one."""
    takers = [bar.place for bar in bars.values() if any(link.source == place for link in bar.links)]
    return [*takers, -1] if bars[place].head else takers


def _merge(bars: Bars, gone: int, into: int) -> None:
    """What took the map at `gone` takes the one at `into`."""
    old = bars.pop(gone)
    bars[into].head |= old.head
    bars[into].ended = old.ended or bars[into].ended
    for bar in bars.values():
        bar.links = list(dict.fromkeys(Link(into if link.source == gone else link.source, link.kind) for link in bar.links))


def _light(bar: Bar) -> bool:
    """Whether it looks no further than its own voxel: 1x1 convolutions, pools, resizing, joins."""
    return all(
        o.kind in ("pool", "resize", "linear") or o.kernel in (o.stride, (1,) * len(o.kernel)) or o.shape[0] == 1 for o in bar.made_by
    )


def _roots(bars: Bars, start: int, end: int, kept: Iterable[int]) -> tuple[set[int], set[int]]:
    """The light bars that serve nothing but the way from `start` to `end`, and what they take from outside."""
    inside: set[int] = set()
    roots: set[int] = set()
    waiting = [start]
    while waiting:
        place = max(waiting)
        waiting = [other for other in waiting if other != place]
        bar = bars[place]
        alone = set(_takers(bars, place)) <= inside | {end}
        if alone and _light(bar) and bar.kind not in ("image", "box", "gate") and place not in kept:
            inside.add(place)
            waiting += [link.source for link in bar.links]
        else:
            roots.add(place)
    return inside, roots


def _fold_gates(bars: Bars) -> None:
    """A product with a signal becomes one symbol, with all that only computes the signal and the 1x1 convolution after it."""
    for place in [bar.place for bar in bars.values() if bar.kind == "gate"]:
        gate = bars[place]
        signals = [link.source for link in gate.links if _is_signal(bars, bars[link.source], gate)]
        features = [link.source for link in gate.links if link.source not in signals]
        if not signals or not features:
            continue
        links = dict.fromkeys(features, "join")
        for signal in (signal for signal in signals if signal in bars):
            inside, roots = _roots(bars, signal, place, features)
            for gone in inside:
                del bars[gone]
            links = {**dict.fromkeys(roots, "gate"), **links}
        gate.links = [Link(source, kind) for source, kind in sorted(links.items())]
        _swallow_next(bars, place)


def _swallow_next(bars: Bars, place: int) -> None:
    """1x1 convolutions of a gated map, one after the other, belong to the gate."""
    while True:
        takers = _takers(bars, place)
        if len(takers) != 1 or takers[0] < 0:
            return
        after = bars[takers[0]]
        if after.kind != "map" or after.head or not after.convolutions or not _light(after) or after.level != bars[place].level:
            return
        bars[place].shape, bars[place].segments = after.shape, after.segments
        _merge(bars, after.place, place)


def _is_signal(bars: Bars, bar: Bar, gate: Bar) -> bool:
    """Whether it weighs: squashed to 0..1, or one number a voxel or a channel."""
    if bar.ended in _SQUASHED or (bar.shape[0] == 1 != gate.shape[0]):
        return True
    if math.prod(bar.shape[1:]) == 1 != math.prod(gate.shape[1:]):
        return True
    resized = [operation.kind for operation in bar.made_by] == ["resize"]
    return resized and _is_signal(bars, bars[bar.links[0].source], gate)


def _fold_sums(bars: Bars) -> None:
    """A sum belongs to the latest map that nothing else takes; the other ways into it become links past what lies between."""
    for place in sorted(bar.place for bar in bars.values() if bar.kind == "sum"):
        total = bars[place]
        hosts = [link.source for link in total.links if _takers(bars, link.source) == [place] and bars[link.source].kind != "image"]
        if not hosts:
            continue
        # The shortcut of a unit is the light one, and may be computed last.
        host = max(hosts, key=lambda source: (not _light(bars[source]), source))
        others: set[int] = set()
        for link in total.links:
            if link.source != host:
                inside, roots = _roots(bars, link.source, place, (host,))
                roots = roots if len(roots) == 1 else {link.source}
                for gone in inside if link.source not in roots else ():
                    del bars[gone]
                others |= roots
        # It takes the sum's place, so that all links run forward.
        bar = bars.pop(host)
        bar.links += [Link(source, "join") for source in sorted(others)]
        bar.plus, bar.place, bar.ended, bar.head = True, place, total.ended, total.head
        bar.joined |= total.joined
        bars[place] = bar


def _fold_ups(bars: Bars) -> None:
    """Resizing belongs to the convolution after it, and an up-sampled map to the one concat that takes it."""
    for place in sorted(bars):
        bar = bars[place]
        takers = _takers(bars, place)
        if len(takers) != 1 or takers[0] < 0 or bar.plus or len(bar.links) != 1 or bar.links[0].kind != "up":
            continue
        after = bars[takers[0]]
        resized = bar.made_by[-1].kind == "resize" and after.kind == "map" and len(after.links) == 1 and after.level == bar.level
        if not resized and after.kind != "concat":
            continue
        if after.kind == "concat":
            after.segments = _with_kind(after, place, "up")
        else:
            after.segments = tuple((channels, "up") for channels, _ in after.segments)
        source = bar.links[0].source
        after.made_by = [*bar.made_by, *after.made_by]
        after.links = list(dict.fromkeys(Link(source, "up") if link.source == place else link for link in after.links))
        del bars[place]


def _with_kind(bar: Bar, source: int, kind: str) -> tuple[tuple[int, str], ...]:
    """The segments of a concat, where the one from `source` came by that kind of link."""
    place = [link.source for link in bar.links].index(source)
    return tuple((channels, kind if number == place else old) for number, (channels, old) in enumerate(bar.segments))


def _name_joins(bars: Bars) -> None:
    """Tell skips and residual ways from the last step before a join."""
    for bar in bars.values():
        latest = max((link.source for link in bar.links), default=-1)
        kinds = [link.kind if link.kind != "join" else _join_kind(bars, link.source, bar, latest) for link in bar.links]
        kinds = ["residual" if kind == "join" and bar.plus else kind for kind in kinds]
        if bar.kind == "concat" and len(kinds) == len(bar.segments):
            bar.segments = tuple((channels, kind) for (channels, _), kind in zip(bar.segments, kinds, strict=True))
        bar.links = list(dict.fromkeys(Link(link.source, kind) for link, kind in zip(bar.links, kinds, strict=True)))


def _join_kind(bars: Bars, source: int, bar: Bar, latest: int) -> str:
    start = bars[source]
    between = [other for other in bars.values() if source < other.place < bar.place]
    if start.level != bar.level:
        return "skip" if bar.kind == "gate" else "residual" if bar.plus else "down" if start.depth < bar.depth else "up"
    if any(other.level != bar.level for other in between):
        return "skip"
    return "join" if source == latest else "residual"


def _fold_pools(bars: Bars) -> None:
    """A pooled map that one convolution takes belongs to it."""
    for place in [bar.place for bar in bars.values() if bar.kind == "pool"]:
        takers = _takers(bars, place)
        after = bars[takers[0]] if len(takers) == 1 and takers[0] >= 0 else None
        if after is not None and after.kind == "map" and len(after.links) == 1:
            after.made_by = [*bars[place].made_by, *after.made_by]
            after.links = bars[place].links
            del bars[place]


def _fold_runs(bars: Bars) -> None:
    """Maps of one level that are entered by one and left by one become a box."""
    for start in sorted(bars):
        if start not in bars or bars[start].kind in ("image", "gate") or bars[start].head:
            continue
        run = _longest_run(bars, start)
        if len([operation for place in run for operation in bars[place].convolutions]) > 1:
            _box(bars, run)


def _longest_run(bars: Bars, start: int) -> list[int]:
    group, best = [start], [start]
    for place in sorted(bars):
        bar = bars[place]
        inside = bar.links and {link.source for link in bar.links} <= set(group)
        if place <= start or bar.head or bar.level != bars[start].level or not inside:
            continue
        group.append(place)
        if all(set(_takers(bars, other)) <= set(group) for other in group[:-1]):
            best = list(group)
    return best


def _box(bars: Bars, run: list[int]) -> None:
    """Make the last of the run the box."""
    first, last = bars[run[0]], bars[run[-1]]
    last.made_by = [operation for place in run for operation in bars[place].made_by]
    last.links, last.kind, last.plus, last.joined = first.links, "box", False, first.joined
    last.segments = ((last.shape[0], "box"),)
    last.words = _words(last.convolutions)
    for place in run[:-1]:
        del bars[place]


def _words(convolutions: list[Operation]) -> tuple[str, ...]:
    """`6 × (3×3)`, `16 maps each`, and whether weights are used again."""
    wide = [operation for operation in convolutions if set(operation.kernel) != {1}] or convolutions
    kernels = Counter(kernel_words(operation).partition(",")[0] for operation in wide)
    maps = [operation.shape[0] for operation in wide]
    # A resolution left by strided convolution has the stride in its box; what is counted is the kernel.
    each = f"{maps[0]} maps each" if len(set(maps)) == 1 else f"{min(maps)} to {max(maps)} maps"
    lines = [*(f"{number} × ({kernel})" for kernel, number in kernels.items()), each]
    return (*lines, "weights shared") if any(operation.shared for operation in wide) else tuple(lines)
