"""What a person sees in a terminal: tables, progress with time left; plain lines where there is no terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from microtome.config import Config, NetworkConfig, Plan
from microtome.errors import in_one_line
from microtome.evaluation.units import Units
from microtome.words import listed, with_short_names

if TYPE_CHECKING:
    # What is shown is made elsewhere: a prediction does not wait for what only reports need.
    from microtome.data.dataset import Dataset
    from microtome.data.quality import Inspection
    from microtome.data.quality import Table as CaseTable
    from microtome.models.describe import LayerTable
    from microtome.models.registry import Entry
    from microtome.training.initial import Weights

MARKS = (("error", "red"), ("warning", "yellow"), ("note", "blue"))
MOST_ROWS = 30
# What is shown of `metrics.json`; the file has more.
CLASS_SCORES = ("dice", "iou", "hd95_mm", "assd_mm", "nsd", "precision", "recall", "pixel_accuracy")
OBJECT_SCORES = ("ap50", "ap", "pq", "seg", "arand", "voi_split", "voi_merge", "v_rand", "v_info")
# What the reason of a value begins with that a recipe set.
SOURCES = ("ours:", "paper", "article")
SECONDS_BETWEEN_LINES = 15.0
# Of what is written into a file or a pipe.
PAGE_WIDTH = 160
# An image that takes no longer has no bar of its own.
SECONDS_UNTIL_SHARE = 1.0
# A run of fewer steps, or of fewer than its learning rate takes to rise, shows nothing of what its network can learn.
FEWEST_STEPS = 20


class Terminal:
    """Says what is going on; everything goes to standard error, so that standard output stays for results.

    Args:
        silent: it says nothing: of several processes that train together one speaks.
    """

    def __init__(self, *, silent: bool = False) -> None:
        # Without emoji: of a file that is named `a:x:1.png` its name would be shown as another.
        self.console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=silent)

    def say(self, line: str) -> None:
        """One line, without markup: names of files may hold brackets, line ends, and letters that move the cursor."""
        self.console.print(in_one_line(line), markup=False)

    def say_dataset(self, dataset: "Dataset") -> None:
        """What was found in one line, and what is worth a warning."""
        count = len(dataset.labelled)
        images = f"{count} labelled {'image' if count == 1 else 'images'}"
        self.say(f"{dataset.root}: {dataset.layout}; {images}, classes {listed(dataset.legend.names, 'classes')}")
        for finding in dataset.findings:
            if finding.severity != "note":
                self.say(f"{finding.severity}: {finding.line}")

    def say_plan(self, plan: Plan) -> None:
        """The plan in three lines."""
        patch = "×".join(map(str, plan.patch_vox))
        self.say(f"{plan.dims}D {plan.network.name}, patch {patch}, batch {plan.batch}, {plan.precision}, {_steps(plan.steps)}")
        self.say(f"  {plan.reasons.get('dims', '')}; steps: {plan.reasons.get('steps', '')}")
        if plan.recipe != "default":
            self.say(f"recipe {plan.recipe}: {plan.reasons.get('recipe', '')}".rstrip(": "))
            for name in type(plan).model_fields:
                reason = plan.reasons.get(name, "")
                if reason.startswith(SOURCES):
                    self.say(f"  {name}{_brief(getattr(plan, name))} – {reason}")

    def say_result(self, folder: Path) -> None:
        """Where everything is, and the score."""
        metrics = folder / "metrics.json"
        if metrics.exists():
            found = json.loads(metrics.read_text(encoding="utf-8"))
            summary, subset = found["summary"], found["conventions"].get("validation_subset")
            scored = f" ({subset})" if subset else ""
            self.say(f"validation: Dice {_interval(summary['dice'])}, IoU {_interval(summary['iou'])}{scored}")
        self.say(f"model: {folder / 'model'}   report: {folder / 'report.html'}")

    @contextmanager
    def training(self, plan: Plan) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """A function that shows the events of a run: a bar with loss, score, speed and time left, or a line now and then."""
        with self._bar() as bar:
            yield _TrainingView(self, bar, plan)

    @contextmanager
    def predicting(self) -> Iterator["_PredictingView"]:
        """What shows how far a row of images is, and how far a large one of them."""
        with self._bar() as bar:
            yield _PredictingView(self, bar)

    def _bar(self) -> Progress:
        """A progress bar that shows nothing where there is no terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", markup=False),
        )
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=False)


class _PredictingView:
    """Shows images as they are done, and the share of one that takes long."""

    def __init__(self, terminal: Terminal, bar: Progress) -> None:
        self.terminal, self.bar = terminal, bar
        self.task = bar.add_task("predicting", total=None, status="")
        self.part: TaskID | None = None
        self.line_at = self.began = time.monotonic()

    def done(self, name: str, done: int, of: int) -> None:
        """So many images are done; the name of the last."""
        self.bar.update(self.task, completed=done, total=of, status=in_one_line(name))
        self.began = time.monotonic()
        if self.part is not None:
            self.bar.remove_task(self.part)
            self.part = None
        if not self.terminal.console.is_terminal:
            self.terminal.say(f"predicting {done}/{of}: {name}")

    def voxels(self, name: str, done: int, of: int) -> None:
        """So many of an image's voxels are done, of so many; shown once the image has taken a while."""
        spent = time.monotonic() - self.began
        if spent < SECONDS_UNTIL_SHARE or not done:
            return
        if self.part is None:
            self.part = self.bar.add_task("  this image, thousandths", total=1000, status=in_one_line(name))
        self.bar.update(self.part, completed=1000 * done // of)
        if not self.terminal.console.is_terminal and time.monotonic() - self.line_at > SECONDS_BETWEEN_LINES:
            self.line_at = time.monotonic()
            self.terminal.say(f"  {100 * done / of:.0f} % of {name}, about {_duration(spent * (of - done) / done)} left")


class _TrainingView:
    """Turns events into a moving bar, or into lines."""

    def __init__(self, terminal: Terminal, bar: Progress, plan: Plan) -> None:
        self.terminal, self.bar, self.steps = terminal, bar, plan.steps
        self.fewest = max(plan.warmup, FEWEST_STEPS)
        self.task = bar.add_task("training", total=plan.steps, status="")
        self.loss: float | None = None
        self.score, self.shown = "", 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "step":
            self._step(event)
        elif kind == "validation" and event["dice"] is not None:
            self.score = f"Dice {event['dice']:.3f}"
            scores = (f"{name} {'–' if value is None else format(value, '.3f')}" for name, value in event["classes"].items())
            classes = listed(scores, "classes")
            self.terminal.say(f"step {event['step']}: validation Dice {event['dice']:.4f} ({classes})")
        elif kind == "schedule":
            self.steps = event["steps"]
            self.bar.update(self.task, total=self.steps)
        elif kind == "finding":
            self.terminal.say(f"{event['severity']}: {event['message']}")
        elif kind == "memory":
            self.terminal.say(f"warning: {event['message']}")
        elif kind == "complete":
            self.terminal.say(
                f"already complete at step {event['step']}: only scores and report are made anew (--steps or --minutes adds training)"
            )
        elif kind == "end":
            self._end(event)
        elif kind == "prepared":
            self._prepared(event["done"], event["of"])
        elif kind == "predicted":
            self.bar.update(
                self.task, description="validating", completed=event["done"], total=event["of"], status=in_one_line(event["case"])
            )

    def _prepared(self, done: int, of: int) -> None:
        """A case that was prepared moves the bar; without a terminal every few seconds one is a line."""
        last = done == of
        words, total = ("training", self.steps) if last else ("preparing", of)
        self.bar.update(self.task, description=words, completed=0 if last else done, total=total, status="")
        now = time.monotonic()
        if not (last or self.terminal.console.is_terminal) and now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            self.terminal.say(f"preparing {done}/{of} cases")

    def _end(self, event: Mapping[str, Any]) -> None:
        """A warning where the run was too short for its plan, or for any network."""
        short = event["reason"] if "planned steps" in event["reason"] else ""
        if event["step"] < self.fewest:
            did = short or f"only {_steps(event['step'])}: give more"
            self.terminal.say(f"warning: {did}; the network has hardly begun to learn")
        elif short:
            self.terminal.say(f"warning: {short}")

    def _step(self, event: Mapping[str, Any]) -> None:
        """A step moves the bar; without a terminal every few seconds one is a line."""
        # A running mean: the loss of one batch jumps too much to be read.
        self.loss = event["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * event["loss"]
        status = f"loss {self.loss:.3f}  {self.score}  {event['samples_per_second']:.1f} samples/s"
        self.bar.update(self.task, completed=event["step"], status=status)
        now = time.monotonic()
        if not self.terminal.console.is_terminal and now - self.shown > SECONDS_BETWEEN_LINES:
            self.shown = now
            self.terminal.say(f"step {event['step']}/{self.steps}: {status}, {event['seconds']:.0f} s")


def _page() -> Console:
    """Standard output; wide where it is a file or a pipe, which have no width."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=PAGE_WIDTH)


def _print_line(console: Console, line: str) -> None:
    """One line as it is, whatever names in it hold; it may be longer than the terminal is wide."""
    console.print(in_one_line(line), markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_inspection(inspection: "Inspection", cases: "CaseTable", html: Path | None) -> None:
    """Layout, legend, cases as `case_table` has them, findings."""
    console = _page()
    _print_line(console, f"{inspection.root}: {inspection.layout}")
    _print_line(console, f"classes: {listed(inspection.legend.names, 'classes')} – {inspection.legend.reason}")
    _print_table(console, cases.titles, with_short_names(cases.titles, cases.rows[:MOST_ROWS], console.width))
    if len(cases.rows) > MOST_ROWS:
        _print_line(console, f"... and {len(cases.rows) - MOST_ROWS} more cases (--json and --html have all)")
    for severity, colour in MARKS:
        for finding in inspection.findings:
            if finding.severity == severity:
                console.print(f"{severity}:", style=f"bold {colour}", end=" ")
                _print_line(console, finding.line)
    if not inspection.findings:
        console.print("nothing wrong was found")
    if html is not None:
        _print_line(console, f"page: {html}")


def print_plan(plan: Plan, out: Path | None) -> None:
    """Each value of a plan with its reason."""
    console = _page()
    values = plan.model_dump(mode="json", exclude={"reasons"})
    rows = [(name, Text(_short(value)), plan.reasons.get(name, "")) for name, value in values.items()]
    _print_table(console, ("setting", "value", "why"), rows, wrapping=2)
    if out is not None:
        _print_line(console, f"plan: {out}")


def print_scores(result: Mapping[str, Any], written: Sequence[Path] = ()) -> None:
    """Summary, classes and the worst cases of a `metrics.json`, and the files that it was written to."""
    console = _page()
    units = Units.of(result["conventions"])
    shown = OBJECT_SCORES if "objects" in result else CLASS_SCORES
    words = [name if units.length == "mm" else name.replace("_mm", f" ({units.length})") for name in shown]
    summary = [(word, _interval(result["summary"][name])) for word, name in zip(words, shown, strict=True)]
    _print_table(console, ("over foreground and cases", "mean [95 % interval]"), summary)
    rows = [(name, *(_defined(values[metric]) for metric in shown)) for name, values in result["classes"].items()]
    _print_table(console, ("class", *words), rows)
    foreground = set(result["conventions"]["foreground"])
    for name in result["worst"][:5]:
        rows_of_case = [row for row in result["cases"] if row["case"] == name and row["class"] in foreground]
        _print_line(console, f"worst: {name}  {_case_scores(rows_of_case)}")
    for path in written:
        _print_line(console, f"written: {path}")


def _case_scores(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scores of one case in a line: Dice by class, or PQ and what became of its objects."""
    if not rows:
        return "no class beside the background"
    if "dice" in rows[0]:
        return "Dice " + ", ".join(f"{row['class']} {_number(row['dice'])}" for row in rows)
    [row] = rows
    counts = (row[f"objects_{name}"] for name in ("found", "truth", "missed", "false"))
    return f"PQ {_number(row['pq'])}, " + "{} of {} objects found, {} missed, {} false".format(*counts)


def print_networks(entries: "Iterable[Entry]") -> None:
    """A line for each network."""
    console = _page()
    rows = [
        (e.name, "/".join(f"{d}D" for d in e.dims), str(e.year), f"{e.title} ({'; '.join(filter(None, (e.authors, e.reference)))})")
        for e in entries
    ]
    _print_table(console, ("name", "works in", "year", "paper"), rows)


def print_layers(table: "LayerTable", svg: Path | None) -> None:
    """The layers of a network, its totals, and where it was drawn."""
    console = _page()
    _print_table(console, table.titles, table.rows)
    _print_line(console, table.totals)
    if svg is not None:
        _print_line(console, f"drawing: {svg}")


def print_card(folder: str, rows: Iterable[tuple[str, str]]) -> None:
    """What a trained model is, as `model_card.card_rows` has it: a line a fact, to be copied."""
    console = _page()
    _print_line(console, f"model: {folder}")
    for name, words in rows:
        # A stranger's model may say anything, letters that move the cursor too.
        _print_line(console, f"  {name:<13} {words}")


def print_tensors(weights: "Weights", tensors: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """What a file of weights holds, and where it was written; names are a stranger's."""
    console = _page()
    rows = [(each["name"], "×".join(map(str, each["shape"])), each["type"]) for each in tensors]
    _print_table(console, ("tensor", "shape", "type"), rows)
    place = f" in `{weights.place}`" if weights.place else ""
    _print_line(console, f"{len(tensors)} tensors{place} of {weights.source}, hash {weights.hash}")
    if weights.shared:
        _print_line(console, f"{weights.shared} further names of the same tensors are left out")
    if weights.left_out:
        _print_line(console, f"beside them, not read: {', '.join(weights.left_out)}")
    if out is not None:
        _print_line(console, f"written: {out}")


def print_comparison(table: tuple[Sequence[str], Iterable[Iterable[str]]], page: Path) -> None:
    """A row for each network, the best first: titles and rows as `evaluation.comparison_page.table` has them."""
    console = _page()
    _print_table(console, *table)
    _print_line(console, f"page: {page}")


def _print_table(console: Console, titles: Sequence[str], rows: Iterable[Iterable[str | Text]], wrapping: int = 1) -> None:
    """A table without frames whose last columns may take more than a line; cells are data, never markup, and lines only as `Text`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles, start=1):
        wraps = number > len(titles) - wrapping
        table.add_column(title, overflow="fold" if wraps else "ellipsis", no_wrap=not wraps)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(in_one_line(cell)) for cell in row))
    console.print(table)


def _short(value: Any) -> str:
    """A setting as people write it; a group of settings in lines."""
    if isinstance(value, dict):
        return "\n".join(f"{name} {_short(inner)}" for name, inner in value.items() if inner not in ([], None))
    if isinstance(value, list):
        return "(" + ", ".join(_short(inner) for inner in value) + ")"
    return f"{value:g}" if isinstance(value, float) else in_one_line(str(value))


def _brief(value: Any) -> str:
    """A setting in a word or two behind its name; nothing for a group of settings, which the plan has in full."""
    if isinstance(value, NetworkConfig):
        return f" {value.name}"
    return "" if isinstance(value, Config) else f" {_short(list(value) if isinstance(value, tuple) else value)}"


def _interval(entry: Mapping[str, Any]) -> str:
    """`0.873 [0.861, 0.884]`, and over how many values it is not."""
    low, high = entry.get("low"), entry.get("high")
    return _defined(entry, f" [{_number(low)}, {_number(high)}]" if low is not None and high is not None else "")


def _defined(entry: Mapping[str, Any], interval: str = "") -> str:
    """`1.200 (10 undefined)`: a mean that leaves cases out says so, or a method that finds nothing would look good."""
    undefined = f" ({entry['undefined']} undefined)" if entry.get("undefined") else ""
    return _number(entry["mean"]) + interval + undefined


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _steps(count: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} step{'' if count == 1 else 's'}"


def _number(value: float | None) -> str:
    """Three digits, a dash where undefined."""
    return "–" if value is None else f"{value:.3f}"
