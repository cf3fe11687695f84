"""A run folder -> report.html: what was learned from what, how well, where it is wrong, and how it came about."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from microtome.config import Config, Plan, parse_config
from microtome.data.dataset import Dataset
from microtome.data.legend import Legend, format_value
from microtome.data.thumbnails import class_colours
from microtome.errors import ConfigError, DataError
from microtome.evaluation.calibration_page import describe
from microtome.evaluation.curves import Colour, History, charts, foreground_colours, format_duration, read_history
from microtome.evaluation.gallery import ERROR_COLOURS, Exhibit, Gallery, Predictions, format_share, make_gallery, read_predictions
from microtome.evaluation.pages import environment
from microtome.evaluation.run_files import DataForm, EnvironmentForm, FilledForm, MetricsForm, read_file
from microtome.evaluation.units import Units
from microtome.files import write_text
from microtome.model_card import origin_rows
from microtome.yaml_files import load_yaml

WORST, BEST = 6, 2
# Below as many cases the bootstrap's interval is too narrow to be shown without a word (see `bootstrap`).
FEW_CASES = 10
# A page that can be mailed and printed: what is beyond is in metrics.json, dataset.json, or said by `microtome inspect`.
MOST_SCORED, MOST_NAMED, MOST_FINDINGS = 150, 400, 60
SEVERITIES = ("error", "warning", "note")
RANGES = frozenset({"scale", "gamma"})
EXTENTS = frozenset({"patch_vox", "spacing_mm", "assumed_spacing_mm", "resize_vox", "elastic_spacing", "elastic_points", "elastic_sd"})


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds, as far as the run has come.

    Attributes:
        folder: where it lies.
        plan: its plan.yaml.
        data: its dataset.json.
        legend: of the data.
        environment: its environment.json; empty where there is none.
        history: its log.
        metrics: its metrics.json; None before the end.
        predictions: of the validation cases; None before the end.
        filled: its filled.json, of `densify` only; as `gallery.draw_filled` gives it.
    """

    folder: Path
    plan: Plan
    data: Mapping[str, Any]
    legend: Legend
    environment: Mapping[str, Any]
    history: History
    metrics: Mapping[str, Any] | None
    predictions: Predictions | None
    filled: Mapping[str, Any] | None

    @property
    def dataset_name(self) -> str:
        """The folder's name of the dataset."""
        return Path(self.data["root"]).resolve().name

    @property
    def foreground(self) -> tuple[str, ...]:
        """The names of the classes that are scored."""
        return tuple(self.legend.names[index] for index in self.legend.foreground)


def build_report(run: Path, *, dataset: Dataset | None = None) -> Path:
    """Write `report.html` into a run folder and return its path; the run may be complete, going on, or interrupted.

    The page needs no other file and no network. Pictures need the data: where they have been moved it says so.

    Args:
        run: the folder that `train` wrote.
        dataset: the run's data where they are open already; None: they are opened again from where dataset.json says.

    Raises:
        ConfigError: no plan.yaml, or one that cannot be read.
        DataError: another file of the run is missing or damaged; names it.
    """
    record = read_run(Path(run))
    gallery = _gallery(record, dataset)
    page = (
        environment()
        .get_template("report.html")
        .render(
            run=record,
            lead=lead(record),
            cautions=cautions(record),
            facts=_facts(record),
            exhibits=[_shown(exhibit, record) for exhibit in gallery.exhibits],
            gallery=gallery,
            gallery_title=_gallery_title(record, gallery),
            errors=_error_swatches(record.legend),
            classes=_class_rows(record.legend),
            charts=charts(record.history, foreground_colours(record.legend)),
            scored=_scored(record),
            sureness=describe(record.metrics, validated=bool(record.data["validation"])),
            plan_rows=plan_rows(record.plan),
            origin=origin_rows(record.folder),
            findings=_findings(record.data["findings"]),
            parts=[(name, *_listed(record.data[name], MOST_NAMED)) for name in ("train", "validation")],
            history=record.history,
        )
    )
    path = record.folder / "report.html"
    write_text(path, page)
    return path


def read_run(folder: Path) -> Run:
    """Read the files of a run folder; only plan.yaml and dataset.json must be there.

    Raises:
        ConfigError: no plan.yaml, or one that cannot be read.
        DataError: another file is missing or damaged; names it.
    """
    plan_path = folder / "plan.yaml"
    if not plan_path.is_file():
        raise ConfigError(
            folder, expected="a run folder with plan.yaml", got="none", do="give the folder that `microtome train --out` wrote", code="C006"
        )
    data = read_file(folder / "dataset.json", DataForm)
    if data is None:
        raise DataError(folder / "dataset.json", expected="the file that `train` writes first", got="none", do="train again", code="D059")
    return Run(
        folder=folder,
        plan=parse_config(Plan, load_yaml(plan_path), plan_path),
        data=data,
        legend=Legend.from_json(data["legend"]),
        environment=read_file(folder / "environment.json", EnvironmentForm) or {},
        history=read_history(folder / "log.jsonl"),
        metrics=read_file(folder / "metrics.json", MetricsForm),
        predictions=read_predictions(folder / "validation"),
        filled=read_file(folder / "filled.json", FilledForm),
    )


def lead(run: Run) -> str:
    """What was trained on what, and how well it did, in one or two sentences."""
    train, validation = len(run.data["train"]), len(run.data["validation"])
    task = f"find {_sentence(run.foreground)}" if run.legend.background is not None else f"tell apart {_sentence(run.foreground)}"
    network, source = f"{run.plan.dims}D {run.plan.network.name}", f"{_cases(train)} of “{run.dataset_name}”"
    told = f"A {network} learned to {task} from {source}."
    if run.history.end is None:
        told = f"The training of a {network} to {task} from {source} is not complete."
    if not validation:
        return f"{told} Every labelled case trained (fold: {run.plan.fold}), so there is no score."
    if run.metrics is None:
        best = run.history.best
        so_far = f"; the best mean Dice during training so far is {best.dice:.3f}, at step {best.step:,}" if best else ""
        return f"{told} It has not been scored yet{so_far}."
    score = run.metrics["summary"]["dice"]
    if score["mean"] is None:
        return f"{told} The Dice of its {_cases(validation, 'validation')} is undefined: none of them has any foreground."
    interval = (
        f"95 % interval of the mean {score['low']:.3f} to {score['high']:.3f}" if score["low"] is not None else "one case, so no interval"
    )
    return f"{told} On {_cases(score['cases'], 'validation')} its mean Dice is {score['mean']:.3f} ({interval})."


def cautions(run: Run) -> list[str]:
    """What keeps the score from being a promise about new images."""
    if not run.data["validation"]:
        return ["Nothing was kept back to validate with: look at predictions of images with known labels before you rely on this model."]
    found = [
        "A validation score is not a test: the weights that are kept are those that did best on these same cases, so expect "
        "somewhat less on new images. Score labelled images that this run never saw (microtome evaluate) before you rely on it."
    ]
    scored = len(run.data["validation"]) if run.metrics is None else run.metrics["summary"]["dice"]["cases"]
    if scored == 1:
        found.append("One case cannot show how much cases differ.")
    if 1 < scored < FEW_CASES:
        found.append(f"The interval comes from {scored} cases only; from fewer than {FEW_CASES} it tends to be too narrow.")
    if run.legend.ignored:
        found.append("Only what is annotated is scored; nothing is known of how well the rest is predicted.")
    if _stacks(run.data["train"]) & _stacks(run.data["validation"]):
        found.append(
            "Training and validation are parts of the same image, and resemble each other more than another specimen will resemble them."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """A field of the plan for people.

    Attributes:
        name: of the field.
        value: in words; empty for a group of settings.
        settings: the names and values of a group.
        meaning: what the field is.
        reason: why it is what it is; empty where the plan does not say.
    """

    name: str
    value: str
    settings: tuple[tuple[str, str], ...]
    meaning: str
    reason: str


def plan_rows(plan: Plan) -> tuple[PlanRow, ...]:
    """Each field of the plan but the reasons, in order."""
    rows = []
    for name, field in Plan.model_fields.items():
        value = getattr(plan, name)
        if name == "reasons":
            continue
        group = value if isinstance(value, Config) else None
        settings = [] if group is None else [(key, format_setting(key, getattr(group, key))) for key in type(group).model_fields]
        rows.append(
            PlanRow(
                name=name,
                value="" if group else format_setting(name, value),
                settings=tuple((key, words) for key, words in settings if words),
                meaning=(field.description or (type(value).__doc__ or "" if group else "")).replace("`", ""),
                reason=plan.reasons.get(name, ""),
            )
        )
    return tuple(rows)


def format_setting(name: str, value: object) -> str:
    """The value of a setting for people: `96×160`, `0.8 to 1.25`, `not limited`; empty for an empty list."""
    if value is None:
        return "as in its paper" if name == "dropout" else "not limited"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        if name in RANGES:
            return " to ".join(format_setting("", each) for each in value)
        nested = any(isinstance(each, tuple | list) for each in value)
        return ("×" if name in EXTENTS else ", ").join("×".join(map(str, each)) if nested else format_setting("", each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _gallery(run: Run, dataset: Dataset | None) -> Gallery:
    """Pictures of the worst and the best cases, or of the first ones where there are no scores yet."""
    if run.predictions is None:
        return Gallery()
    names = list(run.predictions.files)[: WORST + BEST] if run.metrics is None else [*_chosen(run.metrics)]
    return make_gallery(run.predictions, names, run.plan, dataset or Path(run.data["root"]))


def _chosen(metrics: Mapping[str, Any]) -> list[str]:
    """The cases to show, worst first: all if they are few, else the worst and the best of those whose Dice is defined."""
    foreground = set(metrics["conventions"]["foreground"])
    defined = {row["case"] for row in metrics["cases"] if row["class"] in foreground and row["dice"] is not None}
    order = [name for name in metrics["worst"] if name in defined]
    return order if len(order) <= WORST + BEST else [*order[:WORST], *order[-BEST:]]


def _gallery_title(run: Run, gallery: Gallery) -> str:
    """What the pictures are of."""
    shown, total = len(gallery.exhibits), len(run.data["validation"])
    if run.metrics is None:
        return f"{_cases(shown, 'validation')}, not scored yet"
    if shown == WORST + BEST < total:
        return f"The {WORST} worst and the {BEST} best of {total} validation cases"
    return "The only validation case" if total == 1 else f"{shown} of {total} validation cases, worst first"


def _shown(exhibit: Exhibit, run: Run) -> tuple[Exhibit, list[tuple[str, str, str]]]:
    """A case of the gallery and its pictures, each with a caption and details."""
    counts, part = exhibit.shown, "the picture" if exhibit.section is None else "the section"
    kinds = [(counts.missed, "missed"), (counts.invented, "invented"), (counts.wrong_class, "of the wrong class")]
    kinds = kinds if len(run.foreground) > 1 or run.legend.background is None else kinds[:2]
    words = ", ".join(f"{count:,} {kind}" for count, kind in kinds)
    details = ("", "", "", f"{words}; {format_share(counts.wrong, counts.annotated)} of what is annotated in {part}")
    captions = (f"image ({exhibit.channel})" if exhibit.channel else "image", "truth", "prediction", "errors")
    pictures = [base64.b64encode(panel).decode("ascii") for panel in exhibit.panels]
    return exhibit, list(zip(pictures, captions, details, strict=True))


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers at the top: title, value, remark."""
    history, validation = run.history, len(run.data["validation"])
    dice = (run.metrics or {"summary": {"dice": {"mean": None, "low": None, "high": None}}})["summary"]["dice"]
    interval = f"[{dice['low']:.3f}, {dice['high']:.3f}], 95 % interval" if dice["low"] is not None else "no interval"
    ended = history.end is not None
    steps = f"{history.last_step:,} of {history.planned_steps or run.plan.steps:,} steps" if not ended else f"{history.last_step:,} steps"
    return [
        ("validation Dice", "–" if dice["mean"] is None else f"{dice['mean']:.3f}", "not scored yet" if dice["mean"] is None else interval),
        ("cases", f"{len(run.data['train'])} + {validation}", "trained + validated"),
        ("time", "–" if history.total_seconds is None else format_duration(history.total_seconds), steps),
        (
            "status",
            "complete" if ended else "not complete",
            str((history.end or {}).get("reason", "the log has no end: still going, or interrupted (go on with --resume)")),
        ),
        ("started or resumed", *_started(run)),
    ]


def _started(run: Run) -> tuple[str, str]:
    """The day and the minute at which the run was started, or last taken up again."""
    stated = str(run.environment.get("started", ""))
    day, _, time = stated.partition("T")
    if not day:
        return "–", "not recorded"
    return day, time[:5] + (" UTC" if stated.endswith("+00:00") else "")


def _scored(run: Run) -> dict[str, Any] | None:
    """The scores as the page shows them: foreground only, cases worst first, at most `MOST_SCORED` of them."""
    if run.metrics is None:
        return None
    metrics = run.metrics
    foreground = metrics["conventions"]["foreground"]
    rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in metrics["worst"]}
    for row in metrics["cases"]:
        if row["class"] in foreground:
            rows[row["case"]].append(row)
    cases = list(rows.values())
    return {
        "summary": metrics["summary"],
        "classes": {name: scores for name, scores in metrics["classes"].items() if name in foreground},
        "cases": cases[:MOST_SCORED],
        "left_out": max(0, len(cases) - MOST_SCORED),
        "units": Units.of(metrics["conventions"]),
        "conventions": metrics["conventions"],
        "versions": metrics["versions"],
    }


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]], int]]:
    """Severity, its first findings, and how many more there are."""
    ordered = sorted(findings, key=lambda finding: SEVERITIES.index(finding["severity"]))
    groups = [(severity, list(group)) for severity, group in groupby(ordered, key=lambda finding: str(finding["severity"]))]
    return [(severity, *_listed(group, MOST_FINDINGS)) for severity, group in groups]


def _class_rows(legend: Legend) -> list[tuple[str, Colour | None, str]]:
    """Name, colour and values in files of each class; last what is not annotated, if a value says so."""
    colours = class_colours(len(legend.names), legend.background)
    return [
        (name, colour, ", ".join(map(format_value, values)))
        for name, colour, values in zip(legend.names, colours, legend.values, strict=True)
    ]


def _error_swatches(legend: Legend) -> list[tuple[str, Colour]]:
    """The kinds of error that can occur with these classes, and their colours."""
    words = ("missed: there, but not predicted", "invented: predicted, but not there", "wrong class")
    kinds = list(zip(words, ERROR_COLOURS.values(), strict=True))
    if legend.background is None:
        return kinds[2:]
    return kinds if len(legend.foreground) > 1 else kinds[:2]


def _listed(items: Sequence[Any], most: int) -> tuple[list[Any], int]:
    """The first of many, and how many more there are."""
    return list(items[:most]), max(0, len(items) - most)


def _stacks(names: Iterable[str]) -> set[str]:
    """The images that cases named `image`, `image[first:past]` or `image[z10+y7]` are, or are parts of."""
    return {re.sub(r"\[(\d+:\d+|[zyx]\d+(\+\w+)*)\]$", "", name) for name in names}


def _cases(count: int, kind: str = "") -> str:
    """`1 case`, `3 validation cases`."""
    return f"{count} {kind}{' ' if kind else ''}case{'' if count == 1 else 's'}"


def _sentence(names: Sequence[str]) -> str:
    """Names in a sentence: `a`, `a and b`, `a, b and c`; of many the first."""
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more classes"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
