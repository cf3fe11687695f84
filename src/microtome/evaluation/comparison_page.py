"""A comparison of networks for people: the table, pictures of the same cases side by side, one page."""

import math
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from microtome.data.case import NOT_ANNOTATED, Case
from microtome.data.dataset import Dataset
from microtome.data.legend import Legend
from microtome.data.split import Split
from microtome.data.thumbnails import class_colours
from microtome.errors import DataWarning, MicrotomeError
from microtome.evaluation.comparison import Comparison, Mean, Outcome, Row, chosen_cases
from microtome.evaluation.curves import format_duration
from microtome.evaluation.gallery import ERROR_COLOURS, Exhibit, draw_case, read_predictions
from microtome.evaluation.pages import environment
from microtome.evaluation.report import FEW_CASES
from microtome.geometry import format_shape
from microtome.images.files import read_image

ERRORS = ("missed", "invented", "wrong class")
TITLES = ("Dice", "IoU", "parameters", "multiply-adds", "step", "memory", "steps")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value of the table, what belongs to it in smaller letters, and whether it is the best of its column."""

    words: str
    remark: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What one network made of a case: its Dice over the whole case, None where it is undefined, and the section that is shown."""

    network: str
    dice: float | None
    exhibit: Exhibit


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One case as every network sees it.

    Attributes:
        case: its name.
        place: which one it is: "the worst", "the median", "the best".
        where: which section of a volume is shown, and how it lies; empty of a picture.
        pictures: a network each, in the order of the table.
        notes: which networks could not be shown, and why.
    """

    case: str
    place: str
    where: str
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...] = ()


def cells(comparison: Comparison, row: Row) -> tuple[Cell, ...]:
    """The values of a network in the order of `TITLES`."""
    patch = f"of {format_shape(row.patch_vox)}" if row.multiply_adds is not None else ""
    return (
        _score_cell(row.dice, comparison.is_best(row, "dice")),
        _score_cell(row.iou, comparison.is_best(row, "iou")),
        Cell(words=format_count(row.parameters), best=comparison.is_best(row, "parameters")),
        Cell(words=format_count(row.multiply_adds), remark=patch, best=comparison.is_best(row, "multiply_adds")),
        Cell(
            words="–" if row.step_seconds is None else f"{row.step_seconds:.3g} s",
            remark="" if row.step_seconds is None else f"of {row.batch}",
            best=comparison.is_best(row, "step_seconds"),
        ),
        Cell(words="–" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GB", best=comparison.is_best(row, "peak_bytes")),
        Cell(words=f"{row.steps:,}", remark="" if row.seconds is None else f"in {format_duration(row.seconds)}"),
    )


def table(comparison: Comparison) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Titles and rows as text, for a terminal; the last column says what failed or hardly trained, or how far it is behind."""
    rows = []
    for row in comparison.rows:
        # A space that no line may be broken at is for the page.
        values = (" ".join(filter(None, (cell.words, cell.remark))).replace("\N{NO-BREAK SPACE}", " ") for cell in cells(comparison, row))
        rows.append((row.network, *values, f"failed: {row.failure}" if row.failure else remark(row)))
    return ("network", *TITLES, "remark"), tuple(rows)


def remark(row: Row) -> str:
    """What is to be known of a network that did not fail: that it hardly trained, and how far behind the best it is."""
    hardly = f"hardly trained: {_steps_done(row)}" if row.hardly_trained else ""
    return "; ".join(filter(None, (hardly, format_difference(row.difference))))


def format_count(count: int | None) -> str:
    """A large number with three digits: `950`, `31.0 M`, `1.24 T`; a dash for none."""
    if count is None:
        return "–"
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # 999,600 is 1.00 M and not 1000 k.
        if count >= 0.9995 * 10**power:
            value = count / 10**power
            return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f}\N{NO-BREAK SPACE}{letter}"
    return str(count)


def format_difference(difference: Mean | None) -> str:
    """How far behind the best, and whether the same cases tell the two apart; empty for the best itself."""
    if difference is None:
        return ""
    words = f"Dice {difference.mean:+.3f} to the best"
    if difference.low is None or difference.high is None:
        return words
    told = "told apart" if is_told_apart(difference) else "not told apart"
    return f"{words} [{difference.low:+.3f}, {difference.high:+.3f}], {told}"


def draw_strips(comparison: Comparison, outcomes: Sequence[Outcome], dataset: Dataset, split: Split) -> tuple[Strip, ...]:
    """The worst, the median and the best case, each as every scored network predicted it.

    Args:
        comparison: of these outcomes.
        outcomes: where predictions lie.
        dataset: that the runs were trained on.
        split: of the runs.
    """
    folders = {outcome.network: outcome.folder / "validation" for outcome in outcomes}
    cases = {case.name: case for case in (*dataset.cases, *split.train, *split.validation)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # what was assumed of these files is among the findings of each run
        predictions = {row.network: read_predictions(folders[row.network]) for row in comparison.scored}
        strips = []
        for name, place in chosen_cases(comparison).items():
            files = {network: found.files[name] for network, found in predictions.items() if found is not None and name in found.files}
            dice = {network: comparison.case_dice[network][name] for network in files}
            strips.append(_strip(dataset, cases.get(name), (name, place), files, dice))
    return tuple(strips)


def comparison_html(
    comparison: Comparison, strips: Sequence[Strip], legend: Legend, asked: Mapping[str, Any], made: Mapping[str, Any]
) -> str:
    """The page; it needs no other file and no network, and links to the reports of the runs, which lie beside it.

    Args:
        comparison: all rows.
        strips: as `draw_strips` makes them.
        legend: of the data.
        asked: data, minutes or steps, and seed, as `compare.json` has them.
        made: name -> value of the machine, versions and command.
    """
    colours = class_colours(len(legend.names), legend.background)
    values = {
        "data": Path(asked["data"]).resolve().name,
        "lead": lead(comparison, asked),
        "cautions": cautions(comparison, asked, str(made.get("device", "cpu"))),
        "titles": TITLES,
        "rows": [(row, cells(comparison, row), remark(row)) for row in comparison.rows],
        "strips": [(strip, _columns(strip, legend)) for strip in strips],
        "classes": [(name, colour) for name, colour in zip(legend.names, colours, strict=True) if colour],
        "errors": [(words, colour) for words, colour in zip(ERRORS, ERROR_COLOURS.values(), strict=True) if words in _kinds(legend)],
        "made": made,
    }
    return environment().get_template("comparison.html").render(values)


def lead(comparison: Comparison, asked: Mapping[str, Any]) -> str:
    """What was compared, and who did best, in a few sentences."""
    failed = f" {_sentence(comparison.failed)} failed." if comparison.failed else ""
    if not comparison.scored:
        return f"There is no score of {_sentence(comparison.rows)}.{failed}"
    first, *others = comparison.scored
    told = (
        f"{_sentence(comparison.scored)}: the same {_cases(comparison.trained)} to learn from, {format_asked(asked)} each, scored on the "
        f"same {_cases(len(comparison.cases))}.{failed} The best mean Dice is that of {first.network}, {_score_words(first.dice)}."
    )
    behind = others[0].difference if others else None
    if behind is None:
        return told
    told = f"{told} The next, {others[0].network}, is {abs(behind.mean):.3f} lower"
    if behind.low is None or behind.high is None:
        return f"{told}; one case cannot tell whether that is chance."
    verdict = "more than the choice of cases explains" if is_told_apart(behind) else "which the choice of cases may explain"
    return f"{told}, {verdict} (95 % interval of the difference case by case: {behind.low:+.3f} to {behind.high:+.3f})."


def cautions(comparison: Comparison, asked: Mapping[str, Any], device: str) -> list[str]:
    """What keeps the order of the table from being a verdict on the networks."""
    found = [
        f"Each network was trained once, all with seed {asked['seed']}. Another seed gives other scores, and nothing here shows how "
        "much: the intervals are over cases, not over seeds.",
        "The weights that were kept are those that did best on these same cases, so expect somewhat less of each on new images.",
    ]
    hardly = [f"{row.network} ({_steps_done(row)})" for row in comparison.rows if row.hardly_trained]
    if hardly:
        found.append(f"Hardly trained: {', '.join(hardly)}. Their scores say little of the networks; give them longer.")
    if asked["minutes"] is None:
        found.append("All did the same number of steps: a network whose steps take longer had more time.")
    else:
        found.append(
            "All had the same time, planning and scoring included: a network whose steps take longer did fewer of them. "
            "With more time, or on another machine, the order may be another."
        )
    if len({(row.patch_vox, row.batch) for row in comparison.rows if row.batch}) > 1:
        found.append(
            "Patch and batch were planned for each network and came out differently: multiply-adds and steps are not of the same work."
        )
    if len(comparison.cases) == 1:
        found.append("One case cannot show how much cases differ.")
    if 1 < len(comparison.cases) < FEW_CASES:
        found.append(f"The scores are over {_cases(len(comparison.cases))} only: intervals from fewer than {FEW_CASES} are too narrow.")
    if comparison.left_out:
        found.append(f"{_cases(comparison.left_out)} left out, on which the minutes allowed only some networks to be scored.")
    if device != "cpu":
        found.append("Memory is that of the process on the host, without the memory of the GPU.")
    return found


def format_asked(asked: Mapping[str, Any]) -> str:
    """`2 minutes`, or `100 steps`."""
    count, unit = (asked["steps"], "step") if asked["minutes"] is None else (asked["minutes"], "minute")
    return f"{count:g} {unit}{'' if count == 1 else 's'}"


def is_told_apart(difference: Mean) -> bool:
    """Whether 0 lies outside of the interval of a difference."""
    return difference.low is not None and difference.high is not None and not difference.low <= 0 <= difference.high


def fullest_section(truth: np.ndarray, background: int | None) -> int:
    """The section of the slowest axis of classes (Z, Y, X) with most foreground; without any, with most annotated voxels."""
    annotated = truth != NOT_ANNOTATED
    foreground = annotated if background is None else annotated & (truth != background)
    return int((foreground if foreground.any() else annotated).sum(axis=(1, 2)).argmax())


def _strip(dataset: Dataset, case: Case | None, title: tuple[str, str], files: Mapping[str, Path], dice: Mapping[str, float]) -> Strip:
    """One case, of a volume the section with most truth, by every network whose prediction can be read."""
    name, place = title
    if case is None:
        return Strip(case=name, place=place, where="", pictures=(), notes=("The case is not in the data any more.",))
    try:
        image, truth = dataset.read_pair(case)
    except MicrotomeError as error:
        return Strip(case=name, place=place, where="", pictures=(), notes=(f"The case cannot be read any more ({error}).",))
    section = fullest_section(truth, dataset.legend.background) if truth.ndim == 3 else None
    # A volume of one section: whatever is drawn of it is that one, the same of all networks.
    part = slice(None) if section is None else slice(section, section + 1)
    shown = replace(image, array=image.array[:, part])
    pictures, notes = [], []
    for network, path in files.items():
        try:
            prediction = dataset.legend.decode(read_image(path, palette=dataset.legend.palette))
        except MicrotomeError as error:
            notes.append(f"{network} is not shown: {error}.")
            continue
        if prediction.shape != truth.shape:
            notes.append(f"{network} is not shown: its prediction has {format_shape(prediction.shape)} voxels.")
            continue
        exhibit = draw_case(case, shown, truth[part], prediction[part], dataset)
        pictures.append(Picture(network=network, dice=dice[network] if math.isfinite(dice[network]) else None, exhibit=exhibit))
    words = []
    if section is not None:
        first = case.sections[0] if case.sections else 0
        words = [f"section {first + section} (counted from 0), the one with most of the truth"]
        words += [picture.exhibit.directions for picture in pictures[:1] if picture.exhibit.directions]
    return Strip(case=name, place=place, where="; ".join(words), pictures=tuple(pictures), notes=tuple(notes))


def _columns(strip: Strip, legend: Legend) -> list[list[tuple[str, str, str]]]:
    """What stands one above the other: image and truth, then prediction and errors of each network; as source, title, remark."""
    columns: list[list[tuple[str, str, str]]] = []
    for picture in strip.pictures:
        counts, sources = picture.exhibit.shown, [b64encode(panel).decode("ascii") for panel in picture.exhibit.panels]
        if not columns:
            columns.append([(sources[0], "image", ""), (sources[1], "truth", "")])
        numbers = zip((counts.missed, counts.invented, counts.wrong_class), ERRORS, strict=True)
        wrong = ", ".join(f"{count:,} {words}" for count, words in numbers if words in _kinds(legend))
        score = "Dice undefined" if picture.dice is None else f"Dice {picture.dice:.3f}"
        columns.append([(sources[2], picture.network, score), (sources[3], "errors", wrong)])
    return columns


def _kinds(legend: Legend) -> tuple[str, ...]:
    """The kinds of error that can occur with these classes."""
    if legend.background is None:
        return ERRORS[2:]
    return ERRORS if len(legend.foreground) > 1 else ERRORS[:2]


def _score_cell(score: Mean | None, best: bool) -> Cell:
    """A score with its interval."""
    if score is None:
        return Cell(words="–")
    remark = "" if score.low is None or score.high is None else f"[{score.low:.3f}, {score.high:.3f}]"
    return Cell(words=f"{score.mean:.3f}", remark=remark, best=best)


def _score_words(score: Mean | None) -> str:
    """A score with its interval in a sentence."""
    cell = _score_cell(score, best=False)
    return f"{cell.words} {cell.remark}".strip()


def _steps_done(row: Row) -> str:
    """`6 of 25 planned steps`, or `6 steps` where all that were planned were done."""
    planned = row.planned_steps or 0
    done = f"{row.steps:,}" if row.steps >= planned else f"{row.steps:,} of {planned:,} planned"
    return f"{done} step{'' if max(row.steps, planned) == 1 else 's'}"


def _sentence(rows: Sequence[Row]) -> str:
    """The names of networks in a sentence: `a`, `a and b`, `a, b and c`."""
    names = [row.network for row in rows]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _cases(count: int) -> str:
    """`1 case`, `3 cases`."""
    return f"{count} case{'' if count == 1 else 's'}"
