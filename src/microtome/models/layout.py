"""Where the bars of a figure go, the ways of its arrows, and places for labels that cover nothing; lengths in pixels.

A row holds the maps of one resolution, the image's at the top; a column is a step on the longest path from the image.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from microtome.models.figure import Bar, Link, columns

WIDTH, MARGIN, TOP = 1400, 84, 74
# Height of the largest map; smaller ones shrink less than their size, or the deepest could not be seen.
TALLEST, SHORTEST, SHRINK = 150.0, 12.0, 0.62
GAP_X, GAP_Y, LANE = 26.0, 54.0, 9.0
TEXT, LETTER, LINE = 11, 6.2, 13

Level = tuple[Fraction, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle: its left and top, its width and height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    @property
    def centre_x(self) -> float:
        """Halfway from left to right."""
        return self.x + self.width / 2

    @property
    def centre_y(self) -> float:
        """Halfway from top to bottom."""
        return self.y + self.height / 2

    def covers(self, other: "Box") -> bool:
        """Whether the two share more than an edge."""
        return self.x < other.right and other.x < self.right and self.y < other.bottom and other.y < self.bottom


@dataclass(frozen=True)
class Arrow:
    """A way of straight pieces from one bar to another."""

    link: Link
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Label:
    """A text with the rectangle that it fills."""

    text: str
    box: Box


@dataclass(kw_only=True)
class Layout:
    """A figure with places.

    Attributes:
        boxes: place of a bar -> its rectangle.
        segments: place of a concat -> the rectangles of its parts.
        arrows: of all links.
        labels: channels, sizes, words of boxes.
        height: of all that is drawn.
    """

    boxes: dict[int, Box]
    segments: dict[int, list[Box]]
    arrows: list[Arrow] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    height: float = 0


def lay_out(bars: Sequence[Bar]) -> Layout:
    """Give every bar, arrow and label of a figure its place."""
    column = columns(bars)
    rows = sorted({bar.level for bar in bars}, key=_depth)
    lanes = _lanes(bars, column)
    tops = _row_tops(bars, rows, lanes)
    lefts, unit = _column_lefts(bars, column)
    layout = Layout(boxes={}, segments={})
    for bar in bars:
        width, height = bar_width(bar) * unit, _height(bar, bars)
        row_height = max(_height(other, bars) for other in bars if other.level == bar.level)
        left, right = lefts[column[bar.place]], lefts[column[bar.place] + 1]
        box = Box(left + (right - left - GAP_X * unit - width) / 2, tops[bar.level] + (row_height - height) / 2, width, height)
        layout.boxes[bar.place] = box
        layout.segments[bar.place] = _segments(bar, box)
    layout.arrows = [_arrow(link, bar, layout, lanes) for bar in bars for link in bar.links]
    layout.height = max(box.bottom for box in layout.boxes.values()) + GAP_Y
    layout.labels = _labels(bars, layout)
    return layout


def bar_width(bar: Bar) -> float:
    """Grows with the logarithm of the channels; boxes hold words, gates are circles."""
    if bar.kind == "gate":
        return 18
    if bar.kind == "box":
        return min(40 + 4 * len(bar.convolutions), 90)
    return sum(3 + 2.4 * math.log2(channels + 1) for channels, _ in bar.segments)


def text_width(text: str, size: float = TEXT) -> float:
    """At most what it takes in a common sans-serif."""
    return LETTER * len(text) * size / TEXT


def _depth(level: Level) -> float:
    return math.pow(math.prod(level), 1 / len(level))


def _height(bar: Bar, bars: Sequence[Bar]) -> float:
    if bar.kind == "gate":
        return 18
    side, largest = (math.pow(math.prod(each.shape[1:]), 1 / max(len(each.shape) - 1, 1)) for each in (bar, bars[0]))
    return max(TALLEST * math.pow(side / largest, SHRINK), SHORTEST)


def _row_tops(bars: Sequence[Bar], rows: Sequence[Level], lanes: Mapping[tuple[Link, int], tuple[str, int]]) -> dict[Level, float]:
    """Where the bars of each row begin, with room for the arcs above and below."""
    level = {bar.place: bar.level for bar in bars}
    tops: dict[Level, float] = {}
    y = float(TOP)
    for row in rows:
        above, below = (
            max((lane + 1 for (_, place), (side, lane) in lanes.items() if level[place] == row and side == which), default=0)
            for which in ("above", "below")
        )
        tops[row] = y + 16 + above * LANE
        words = max(len(bar.words) for bar in bars if bar.level == row)
        y = tops[row] + max(_height(bar, bars) for bar in bars if bar.level == row) + below * LANE + GAP_Y + words * LINE
    return tops


def _column_lefts(bars: Sequence[Bar], column: Mapping[int, int]) -> tuple[list[float], float]:
    """The left of each column and of the one behind the last, and the scale that makes them fit."""
    number = max(column.values()) + 1
    widths = [max((bar_width(bar) for bar in bars if column[bar.place] == at), default=0) + GAP_X for at in range(number)]
    unit = min((WIDTH - 2 * MARGIN) / sum(widths), 1.5)
    start = (WIDTH - unit * (sum(widths) - GAP_X)) / 2
    return [start + unit * sum(widths[:at]) for at in range(number + 1)], unit


def _segments(bar: Bar, box: Box) -> list[Box]:
    shares = [3 + 2.4 * math.log2(channels + 1) for channels, _ in bar.segments]
    # The skipped part stands left, where its arrow comes from, whatever the order in memory.
    boxes, x = [box] * len(shares), box.x
    for place in sorted(range(len(shares)), key=lambda place: bar.segments[place][1] == "up"):
        width = box.width * shares[place] / sum(shares)
        boxes[place] = Box(x, box.y, width, box.height)
        x += width
    return boxes


def _lanes(bars: Sequence[Bar], column: Mapping[int, int]) -> dict[tuple[Link, int], tuple[str, int]]:
    """(link, its end) -> side and number of the lane that takes it past the bars between: skips above, residuals below."""
    by_place = {bar.place: bar for bar in bars}
    found: dict[tuple[Link, int], tuple[str, int]] = {}
    taken: dict[tuple[Level, str, int], list[tuple[int, int]]] = {}
    wanted = [
        (column[bar.place] - column[link.source], link, bar)
        for bar in bars
        for link in bar.links
        if by_place[link.source].level == bar.level and _needs_lane(link, bar, bars, column)
    ]
    for _, link, bar in sorted(wanted, key=lambda each: (each[0], each[2].place)):
        side = "below" if link.kind == "residual" else "above"
        span = (column[link.source], column[bar.place])
        lane = 0
        while any(span[0] < end and start < span[1] for start, end in taken.get((bar.level, side, lane), [])):
            lane += 1
        taken.setdefault((bar.level, side, lane), []).append(span)
        found[link, bar.place] = (side, lane)
    return found


def _needs_lane(link: Link, bar: Bar, bars: Iterable[Bar], column: Mapping[int, int]) -> bool:
    between = any(other.level == bar.level and column[link.source] < column[other.place] < column[bar.place] for other in bars)
    return between or (link.kind == "residual" and any(link.source == other.source and other != link for other in bar.links))


def _arrow(link: Link, bar: Bar, layout: Layout, lanes: Mapping[tuple[Link, int], tuple[str, int]]) -> Arrow:
    start, end = layout.boxes[link.source], _target(link, bar, layout)
    if (link, bar.place) in lanes:
        side, lane = lanes[link, bar.place]
        x0, x1 = start.right - min(4, start.width / 4), end.x + min(4, end.width / 4)
        if side == "above":
            y = min(start.y, end.y) - 18 - lane * LANE
            return Arrow(link, ((x0, start.y), (x0, y), (x1, y), (x1, end.y)))
        y = max(start.bottom, end.bottom) + 7 + lane * LANE
        return Arrow(link, ((x0, start.bottom), (x0, y), (x1, y), (x1, end.bottom)))
    if start.y <= end.centre_y <= start.bottom and start.right < end.x:
        return Arrow(link, ((start.right, end.centre_y), (layout.boxes[bar.place].x, end.centre_y)))
    others = [box for place, box in layout.boxes.items() if place not in (link.source, bar.place)]
    ways = _elbows(start, end, link.kind, near_source=bool(bar.words))
    return Arrow(link, min(ways, key=lambda points: _crossings(points, others)))


def _target(link: Link, bar: Bar, layout: Layout) -> Box:
    """The part of a concat that the link leads to; else the bar."""
    segments = layout.segments[bar.place]
    if bar.kind == "concat" and len(bar.links) == len(segments):
        return segments[bar.links.index(link)]
    return layout.boxes[bar.place]


def _elbows(start: Box, end: Box, kind: str, *, near_source: bool) -> list[tuple[tuple[float, float], ...]]:
    """Ways out at the top or bottom, along between two rows where the bars are not above each other, and in."""
    down = end.y > start.y
    y0, y1 = (start.bottom, end.y) if down else (start.y, end.bottom)
    low, high = max(start.x, end.x), min(start.right, end.right)
    if high - low > 2:
        x = low + 0.35 * (high - low)
        return [((x, y0), (x, y1))]
    # A gate's signal and the up-sampled map leave the same bar side by side.
    share = 0.25 if kind == "gate" else 0.5 + 0.25 * math.copysign(1, end.x - start.x)
    x0, x1 = start.x + share * start.width, end.centre_x
    turns = (y1 - 20, y0 + 20) if down else (y0 - 20, y1 + 12) if near_source else (y1 + 12, y0 - 20)
    return [((x0, y0), (x0, turn), (x1, turn), (x1, y1)) for turn in turns]


def _crossings(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> int:
    """How many of the boxes the way would cross."""
    pieces = [way_box(piece) for piece in pairwise(points)]
    return sum(piece.covers(box) for piece in pieces for box in boxes)


class _Places:
    """What is taken, and the first of some places that is not."""

    def __init__(self, layout: Layout) -> None:
        self.taken = [*layout.boxes.values()]
        for arrow in layout.arrows:
            self.taken += [way_box(piece) for piece in pairwise(arrow.points)]
        self.labels: list[Label] = []

    def put(self, text: str, corners: Iterable[tuple[float, float]]) -> bool:
        """Write the text with its top left at the first corner where it covers nothing."""
        return self.put_lines((text,), ((x + text_width(text) / 2, y) for x, y in corners))

    def put_lines(self, lines: Sequence[str], centres: Iterable[tuple[float, float]]) -> bool:
        """The same for centred lines, from the middle of their top."""
        for x, y in centres:
            boxes = [Box(x - text_width(text) / 2, y + n * LINE, text_width(text), TEXT + 1) for n, text in enumerate(lines)]
            inside = all(box.x >= 2 and box.right <= WIDTH - 2 for box in boxes)
            if inside and not any(box.covers(other) for box in boxes for other in self.taken):
                self.taken += [Box(box.x - 3, box.y, box.width + 6, box.height) for box in boxes]
                self.labels += [Label(text, box) for text, box in zip(lines, boxes, strict=True)]
                return True
        return False


def way_box(piece: tuple[tuple[float, float], tuple[float, float]]) -> Box:
    """The rectangle that a straight piece of an arrow fills, with a little room around."""
    (x0, y0), (x1, y1) = piece
    return Box(min(x0, x1) - 3.5, min(y0, y1) - 2, abs(x1 - x0) + 7, abs(y1 - y0) + 4)


def _labels(bars: Sequence[Bar], layout: Layout) -> list[Label]:
    places = _Places(layout)
    rows: dict[Level, list[Bar]] = {}
    for bar in sorted(bars, key=lambda bar: layout.boxes[bar.place].x):
        rows.setdefault(bar.level, []).append(bar)
    for bar in bars:
        if bar.words:
            _put_words(bar, layout.boxes[bar.place], places)
    for row in rows.values():
        _put_sizes(row, layout, places)
    for bar in bars:
        _put_channels(bar, layout.boxes[bar.place], places)
    return places.labels


def _put_sizes(row: Sequence[Bar], layout: Layout, places: _Places) -> None:
    """The size of each run of maps that are as large, unless a box says it; the first of a row is written in any case."""
    written = {label.text for label in places.labels}
    last = ""
    for number, bar in enumerate(row):
        text = size_words(bar)
        if bar.kind == "gate" or text == last or text in written:
            continue
        box, width = layout.boxes[bar.place], text_width(text)
        corners = [
            (box.centre_x - width / 2, box.bottom + 3),
            (box.x - width - 4, box.bottom - TEXT),
            (box.x - width - 4, box.bottom + 3),
            (box.x - width - 4, box.y),
            (box.right + 4, box.bottom - TEXT),
            (box.right + 4, box.bottom + 3),
            (box.right - width, box.bottom + 3),
            (box.x, box.bottom + 3),
        ]
        margin = [(6.0, box.centre_y + step * TEXT) for step in (0, 1, -1, 2, -2)] if number == 0 else []
        if places.put(text, [*corners, *margin]):
            last = text


def size_words(bar: Bar) -> str:
    """`64×128×128`; a vector has the size 1."""
    return "×".join(map(str, bar.shape[1:])) or "1"


def _put_channels(bar: Bar, box: Box, places: _Places) -> None:
    """Channels above; a pooled map has those of what it was."""
    if bar.kind in ("gate", "pool"):
        return
    text = str(bar.shape[0])
    width = text_width(text)
    near = [(box.centre_x - width / 2 + shift, box.y - TEXT - 3 - rise) for rise in (0, 8) for shift in (0, 8, -8, 15, -15)]
    beside = [(box.right + 3, box.y - TEXT), (box.x - width - 3, box.y - TEXT), (box.centre_x - width / 2, box.bottom + 3)]
    places.put(text, [*near, *beside])


def _put_words(bar: Bar, box: Box, places: _Places) -> None:
    """The size and the words of a box, below it."""
    lines = (size_words(bar), *bar.words)
    shifts = [shift for step in range(13) for shift in (-7.0 * step, 7.0 * step)]
    below = [(box.centre_x + shift, box.bottom + 4 + fall) for fall in (0, 14, 28) for shift in shifts]
    places.put_lines(lines, below)
