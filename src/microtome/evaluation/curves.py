"""`log.jsonl` -> the course of a run -> charts: positions and words that a page draws as SVG."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from microtome.data.legend import Legend
from microtome.data.thumbnails import class_colours
from microtome.errors import DataError
from microtome.evaluation.run_files import DO, read_events

Colour = tuple[int, int, int]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1080, 52, 30, 10, 56
# More points than this are not seen at that width.
MOST_POINTS = 540
_STEP_FIELDS = ("step", "loss", "learning_rate", "seconds", "samples_per_second")
# Five numbers of so many steps take 1.3 GB. Of validations their scores are counted, one of each class and the mean.
MOST_STEPS, MOST_SCORES = 2**25, 2**22
INK: Colour = (28, 36, 48)
BLUE: Colour = (43, 92, 147)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A look at the validation cases during training.

    Attributes:
        step: after which it was made.
        dice: mean over the foreground; None where it is undefined.
        classes: class -> Dice, None where it is undefined.
    """

    step: int
    dice: float | None
    classes: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class History:
    """The course of a run so far.

    Attributes:
        steps, losses, rates, seconds, speeds: (n,) of each step that was logged: its number, loss, learning rate, wall time since the
            start, samples a second; NaN where one is not logged.
        validations: in the order in which they were made.
        total_seconds: wall time at the last line; None of an empty log.
        planned_steps: as last rescheduled; None if never.
        end: the line that ends a complete run; None of one that is still going or was interrupted.
    """

    steps: np.ndarray
    losses: np.ndarray
    rates: np.ndarray
    seconds: np.ndarray
    speeds: np.ndarray
    validations: tuple[Validation, ...] = ()
    total_seconds: float | None = None
    planned_steps: int | None = None
    end: Mapping[str, Any] | None = None

    @property
    def last_step(self) -> int:
        """The number of the last step, 0 before the first."""
        return int(self.steps[-1]) if self.steps.size else 0

    @property
    def best(self) -> Validation | None:
        """The validation whose weights were kept: the highest mean Dice, the latest of equals."""
        defined = [(each.dice, each.step, each) for each in self.validations if each.dice is not None]
        return max(defined, key=lambda entry: entry[:2])[2] if defined else None


def read_history(path: Path) -> History:
    """Read a `log.jsonl`; none, an empty one, and a last line that was cut off are all fine.

    Raises:
        DataError: it holds something else than training logs, or more than any training makes.
    """
    # One event at a time, five numbers of each step: millions of steps fit into memory so.
    columns = [array("d") for _ in _STEP_FIELDS]
    validations, scores, total = [], 0, -math.inf
    last: dict[str, dict[str, Any]] = {}
    for event in read_events(path):
        seconds = _float(event.get("seconds"))
        total = max(total, seconds if math.isfinite(seconds) else total)
        if event["event"] == "step":
            for column, name in zip(columns, _STEP_FIELDS, strict=True):
                column.append(_float(event.get(name)))
        elif event["event"] == "validation":
            validations.append(_validation(event))
            scores += 1 + len(validations[-1].classes)
        elif event["event"] in ("schedule", "end"):
            last[event["event"]] = event
        if len(columns[0]) > MOST_STEPS or scores > MOST_SCORES:
            expected = f"at most {MOST_STEPS} steps and {MOST_SCORES} scores of validations"
            raise DataError(path, expected=expected, got=f"{len(columns[0])} and {scores} or more", do=DO, code="D059")
    numbers = [np.frombuffer(column) for column in columns]
    return History(
        steps=numbers[0],
        losses=numbers[1],
        rates=numbers[2],
        seconds=numbers[3],
        speeds=numbers[4],
        validations=tuple(validations),
        total_seconds=total if math.isfinite(total) else None,
        planned_steps=last.get("schedule", {}).get("steps"),
        end=last.get("end"),
    )


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis: where it is in pixels, and its words; `more` is a second line."""

    at: float
    words: str
    more: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart: `points` as SVG's polyline takes them, and the same points one by one where they are dots."""

    name: str
    colour: Colour
    points: str
    width: float = 1.8
    opacity: float = 1.0
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """All that is needed to draw one diagram; lengths in pixels, the origin at the top left.

    Attributes:
        title: what it shows.
        height: of the whole, `WIDTH` wide.
        x_ticks, y_ticks: along the bottom, and along the left side.
        marker: where something is to be pointed out along x, and the words for it.
    """

    title: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    marker: Tick | None = None
    width: int = field(default=WIDTH, init=False)
    left: int = field(default=LEFT, init=False)
    right: int = field(default=WIDTH - RIGHT, init=False)
    top: int = field(default=TOP, init=False)

    @property
    def bottom(self) -> int:
        """The position of the x axis."""
        return self.height - BOTTOM


def charts(history: History, colours: Mapping[str, Colour]) -> tuple[Chart, ...]:
    """Loss, learning rate, and validation Dice; what was not logged is left out.

    Args:
        history: of the run.
        colours: of the classes whose Dice is drawn: the foreground.
    """
    drawn = []
    if history.steps.size > 1:
        drawn = [loss_chart(history), rate_chart(history)]
    if any(_curve(history, name)[0].size for name in colours):
        drawn.insert(1 if drawn else 0, dice_chart(history, colours))
    return tuple(drawn)


def loss_chart(history: History) -> Chart:
    """The loss of every step, thin, and smoothed over a thirtieth of the run, thick."""
    shown = np.isfinite(history.losses)
    steps, losses = history.steps[shown], history.losses[shown]
    # One bad batch must not press the rest of the curve flat.
    high = min(float(losses.max(initial=0.0)), 1.5 * float(np.quantile(losses, 0.99))) if losses.size else 1.0
    x, y = _x_scale(history), _Scale(min(0.0, float(losses.min(initial=0.0))), high, 250 - BOTTOM, TOP)
    span = max(1.0, losses.size / 60)
    smooth = ndimage.gaussian_filter1d(losses, span, mode="nearest") if losses.size else losses
    raw = _envelope(losses)
    even = np.unique(np.linspace(0, max(0, losses.size - 1), MOST_POINTS).astype(int))[: losses.size]
    return Chart(
        title="Training loss",
        height=250,
        x_ticks=_step_ticks(history, x),
        y_ticks=y.ticks(),
        lines=(
            Line(name="each step", colour=BLUE, points=_points(x, y, steps[raw], losses[raw]), width=1, opacity=0.35),
            Line(name="smoothed", colour=BLUE, points=_points(x, y, steps[even], smooth[even]), width=2.2),
        ),
    )


def rate_chart(history: History) -> Chart:
    """The learning rate of every step, small."""
    shown = np.isfinite(history.rates)
    steps, rates = history.steps[shown], history.rates[shown]
    x, y = _x_scale(history), _Scale(0.0, 1.05 * float(rates.max(initial=0.0)), 130 - BOTTOM, TOP)
    few = _envelope(rates)
    line = Line(name="learning rate", colour=INK, points=_points(x, y, steps[few], rates[few]))
    return Chart(title="Learning rate", height=130, x_ticks=_step_ticks(history, x), y_ticks=y.ticks(most=3), lines=(line,))


def dice_chart(history: History, colours: Mapping[str, Colour]) -> Chart:
    """The validation Dice of each foreground class, and their mean if they are several; the axis is always 0 to 1."""
    x, y = _x_scale(history), _Scale(0.0, 1.0, 270 - BOTTOM, TOP)
    lines = [_dotted(name, readable(colour), x, y, _curve(history, name)) for name, colour in colours.items()]
    if len(lines) > 1:
        lines.append(_dotted("mean", INK, x, y, _curve(history, None)))
    best = history.best
    marker = None if best is None else Tick(at=x.at(best.step), words=f"kept: step {best.step:,}")
    return Chart(title="Validation Dice", height=270, x_ticks=_step_ticks(history, x), y_ticks=y.ticks(), lines=tuple(lines), marker=marker)


def foreground_colours(legend: Legend) -> dict[str, Colour]:
    """The classes whose Dice is drawn, and their colours."""
    colours = class_colours(len(legend.names), legend.background)
    return {legend.names[index]: colour for index in legend.foreground if (colour := colours[index]) is not None}


def readable(colour: Colour) -> Colour:
    """A class colour darkened as far as a thin line on white needs it."""
    red, green, blue = colour
    luminance = 0.3 * red + 0.59 * green + 0.11 * blue
    factor = min(1.0, 135 / max(luminance, 1.0))
    return int(red * factor), int(green * factor), int(blue * factor)


def format_duration(seconds: float) -> str:
    """A time for people: `42 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def nice_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart, about `most` of them at the most."""
    size = (high - low) / most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, because 3 times 0.1 is not 0.3.
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


class _Scale:
    """Values on an axis -> pixels."""

    def __init__(self, low: float, high: float, at_low: float, at_high: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        self.at_low, self.at_high = at_low, at_high

    def at(self, value: float) -> float:
        """Where a value lies; beyond the axis its end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.at_low + share * (self.at_high - self.at_low), 1)

    def ticks(self, most: int = 5) -> tuple[Tick, ...]:
        """Marks at round values."""
        return tuple(Tick(at=self.at(value), words=f"{value:,.10g}") for value in nice_steps(self.low, self.high, most))


def _x_scale(history: History) -> _Scale:
    """Steps from 0 to the last one."""
    last = max([history.last_step, *(each.step for each in history.validations)])
    return _Scale(0.0, float(last), LEFT, WIDTH - RIGHT)


def _step_ticks(history: History, x: _Scale) -> tuple[Tick, ...]:
    """Round numbers of steps, with the wall time at which they were reached below."""
    timed = np.isfinite(history.seconds)
    ticks = []
    for value in nice_steps(x.low, x.high, most=8):
        if value != round(value):
            continue
        known = timed.any() and value > 0
        time = format_duration(float(np.interp(value, history.steps[timed], history.seconds[timed]))) if known else ""
        ticks.append(Tick(at=x.at(value), words=f"{value:,.0f}", more=time))
    return tuple(ticks)


def _curve(history: History, name: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and Dice of the validations in which a class, or with None the mean, is defined."""
    pairs = [(each.step, each.dice if name is None else each.classes.get(name)) for each in history.validations]
    defined = [(step, value) for step, value in pairs if value is not None]
    return np.array([step for step, _ in defined], float), np.array([value for _, value in defined], float)


def _dotted(name: str, colour: Colour, x: _Scale, y: _Scale, curve: tuple[np.ndarray, np.ndarray]) -> Line:
    """A line whose points are marked, because validations are few."""
    dots = tuple((x.at(step), y.at(value)) for step, value in zip(*curve, strict=True))
    width = 2.6 if name == "mean" else 1.8
    return Line(name=name, colour=colour, points=_points(x, y, *curve), width=width, dots=dots)


def _envelope(values: np.ndarray) -> np.ndarray:
    """Indices of the smallest and the largest value of each of many bins, in order: the same picture from fewer points."""
    bins = np.array_split(np.arange(values.size), max(1, min(values.size, MOST_POINTS // 2)))
    picked = {int(index) for part in bins if part.size for index in (part[values[part].argmin()], part[values[part].argmax()])}
    return np.array(sorted(picked), int)


def _points(x: _Scale, y: _Scale, steps: np.ndarray, values: np.ndarray) -> str:
    """Points as SVG's polyline takes them."""
    return " ".join(f"{x.at(step):g},{y.at(value):g}" for step, value in zip(steps, values, strict=True))


def _validation(event: Mapping[str, Any]) -> Validation:
    """A validation as it was logged."""
    return Validation(step=int(event["step"]), dice=event.get("dice"), classes=event.get("classes") or {})


def _float(value: object) -> float:
    """A logged number; NaN where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan
