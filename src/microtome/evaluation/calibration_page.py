"""What a report says of how sure a model is: sentences for people, a few numbers, and the reliability diagram."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microtome.evaluation.curves import BLUE, Colour, Tick

# Of the diagram, in pixels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 430, 52, 24, 10, 52
# Bins with fewer of the voxels say nothing: their dots would jump.
LEAST_SHARE = 1e-4
# What a sentence calls fairly sure: neither a guess nor certain.
FAIRLY_SURE = (0.55, 0.97)
# Temperatures that change nothing worth a word.
NEARLY_ONE = 0.02


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A column of the diagram; pixels from the top left."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Diagram:
    """A reliability diagram: accuracy over confidence, and how many voxels there are of each confidence.

    Attributes:
        points: of the line, as SVG's polyline takes them.
        dots: the same points one by one.
        shares: a column for each bin, as high as its share of the voxels.
        x_ticks, y_ticks: in per cent.
    """

    points: str
    dots: tuple[tuple[float, float], ...]
    shares: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    colour: Colour = BLUE
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, kw_only=True)
class Sureness:
    """What the page shows.

    Attributes:
        sentences: for people.
        facts: title, value, remark; empty where nothing was measured.
        diagram: None where nothing was measured.
    """

    sentences: tuple[str, ...]
    facts: tuple[tuple[str, str, str], ...] = ()
    diagram: Diagram | None = None


def describe(metrics: Mapping[str, Any] | None, *, validated: bool) -> Sureness:
    """What can be said of how sure a model is.

    Args:
        metrics: the run's metrics.json; None where there is none.
        validated: whether a case was kept back.
    """
    if not validated:
        words = "Nobody knows: no case was kept back to compare its probabilities with, so they are left as the network gives them"
        return Sureness(sentences=(f"{words} (temperature 1).",))
    if metrics is None:
        return Sureness(sentences=("That is measured at the end of the run.",))
    found = metrics.get("calibration")
    if found is None:
        return Sureness(sentences=("That was not measured in this run; probabilities are left as the network gives them (temperature 1).",))
    # How fitting and scoring were kept apart, or were not.
    how = str(metrics["conventions"].get("calibration", "")).partition(";")[0]
    sentences = (_plainly(found), _corrected(found), *([f"{how[:1].upper()}{how[1:]}."] if how else []))
    return Sureness(sentences=sentences, facts=_facts(found), diagram=draw(found["bins"]))


def draw(bins: Sequence[Mapping[str, Any]]) -> Diagram:
    """The diagram of the bins in metrics.json."""
    shown = [part for part in bins if part["share"] >= LEAST_SHARE]
    dots = tuple((_x(part["confidence"]), _y(part["accuracy"])) for part in shown)
    ticks = [number / 5 for number in range(6)]
    return Diagram(
        points=" ".join(f"{x:g},{y:g}" for x, y in dots),
        dots=dots,
        shares=tuple(_column(number, len(bins), part["share"]) for number, part in enumerate(bins) if part["share"] > 0),
        x_ticks=tuple(Tick(at=_x(value), words=_percent(value)) for value in ticks),
        y_ticks=tuple(Tick(at=_y(value), words=_percent(value)) for value in ticks),
    )


def _column(number: int, count: int, share: float) -> Bar:
    """A bin's share of the voxels; the whole height is all of them."""
    first, past = _x(number / count), _x((number + 1) / count)
    return Bar(x=first + 1, y=_y(share), width=round(past - first - 2, 1), height=round(_y(0) - _y(share), 1))


def _x(value: float) -> float:
    """Where a confidence lies."""
    return round(LEFT + value * (WIDTH - RIGHT - LEFT), 1)


def _y(value: float) -> float:
    """Where an accuracy or a share lies."""
    return round(HEIGHT - BOTTOM - value * (HEIGHT - BOTTOM - TOP), 1)


def _plainly(found: Mapping[str, Any]) -> str:
    """What its sureness is worth, in one sentence."""
    gap = f"on average what it says and how often it is right differ by {_points(found['ece'])}"
    low, high = FAIRLY_SURE
    unsure = [part for part in found["bins"] if part["share"] >= LEAST_SHARE and low <= part["confidence"] <= high]
    if not unsure:
        return f"The model is nearly always certain of a voxel's class; {gap}."
    typical = max(unsure, key=lambda part: part["share"])
    sure, right = _percent(typical["confidence"]), _percent(typical["accuracy"])
    return f"Where the model says that it is about {sure} sure of a voxel's class, it is right in {right} of the voxels; {gap}."


def _corrected(found: Mapping[str, Any]) -> str:
    """What the temperature did, and how it was judged."""
    temperature, judged = found["temperature"], f"Measured on {found['voxels']:,} voxels of the validation cases"
    if abs(temperature - 1) < NEARLY_ONE:
        return f"{judged}. Its probabilities needed no correction; which class it chooses never depends on this."
    was, made = ("too sure", "less sure") if temperature > 1 else ("not sure enough", "surer")
    off = f"by itself the network is {was}, {_points(found['ece_before'])} off on average"
    return f"{judged}: {off}; a temperature of {temperature:g} makes it {made}. Which class it chooses does not depend on this."


def _percent(share: float) -> str:
    """A share as `87 %`, on one line."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _points(share: float) -> str:
    """A difference of two shares in percentage points."""
    return f"{100 * share:.1f} percentage points" if share >= 0.0005 else "less than 0.1 percentage points"


def _facts(found: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """The numbers, with what they were before the correction."""
    scores = (("ece", "ECE"), ("brier", "Brier score"), ("nll", "log loss"))
    rows = [(words, f"{found[name]:.3f}", f"{found[f'{name}_before']:.3f} without the temperature") for name, words in scores]
    return (("temperature", f"{found['temperature']:g}", "logits are divided by it"), *rows)
