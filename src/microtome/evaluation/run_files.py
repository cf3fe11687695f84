"""The JSON files of a run folder, checked as they are read: `report` and `compare` take folders that strangers give."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TextIO

from pydantic import ConfigDict, Field, StrictStr, model_validator

from microtome.config import Config, parse_config
from microtome.data.legend import LegendForm
from microtome.errors import ConfigError, DataError
from microtome.json_files import MOST_BYTES, MOST_OWN_BYTES, load_object, parse_json, reason

DO = "copy the run folder again, or run `train` again"
# A line a step, of about 150 bytes. It is read line by line, of which none is longer than so many letters.
MOST_LOG_BYTES, MOST_LINE = 2**33, 2**20
# What grows with the cases; no other file of a run does.
_GROWING = ("dataset.json", "metrics.json")
# Squares of such numbers, and sums of a million of them, are still numbers.
_LARGEST = 1e150

Real = Annotated[float, Field(strict=True, ge=-_LARGEST, le=_LARGEST)]
Step = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**62)]


class _Form(Config):
    """Names with values, of which these must be as said and others may be anything."""

    model_config = ConfigDict(frozen=True, extra="allow")


class _Finding(_Form):
    severity: Literal["error", "warning", "note"]
    code: StrictStr
    case: StrictStr
    message: StrictStr


class DataForm(_Form):
    """`dataset.json` of a run."""

    root: StrictStr
    layout: StrictStr
    legend: LegendForm
    train: list[StrictStr]
    validation: list[StrictStr]
    findings: list[_Finding]
    held_out: dict[str, list[StrictStr]] | None = None


class _Interval(_Form):
    mean: Real | None
    low: Real | None
    high: Real | None
    cases: Count
    undefined: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.low is None) != (self.high is None) or (self.mean is None and self.low is not None):
            raise ValueError("an interval has both ends and a mean")
        return self


class _Spread(_Form):
    mean: Real | None
    sd: Real | None


class _Bin(_Form):
    confidence: Share | None
    accuracy: Share | None
    share: Share


class _Calibration(_Form):
    temperature: Annotated[float, Field(strict=True, gt=0, le=1e6)]
    voxels: Count
    bins: list[_Bin]
    ece: Real
    ece_before: Real
    brier: Real
    brier_before: Real
    nll: Real
    nll_before: Real


class _Conventions(_Form):
    foreground: list[StrictStr]
    unit: StrictStr
    in_voxels: list[StrictStr]
    axes: Count | None = None
    empty_cases: dict[str, StrictStr]


class _Judged(_Form):
    foreground: list[StrictStr]


class ScoresForm(_Form):
    """`metrics.json`, as far as runs are compared by it."""

    cases: list[dict[str, StrictStr | Real | None]]
    conventions: _Judged

    @model_validator(mode="after")
    def _check(self) -> Self:
        for row in self.cases:
            if not (isinstance(row.get("case"), str) and isinstance(row.get("class"), str)):
                raise ValueError("a row without its case or class")
            if wrong := next((name for name in ("dice", "iou") if isinstance(row.get(name, ""), str)), None):
                raise ValueError(f"{row['case']}: `{wrong}` that is no number and not null")
        return self


class TrainedForm(_Form):
    """`dataset.json` of a run, as far as runs are compared by it."""

    train: list[StrictStr]


class MetricsForm(_Form):
    """`metrics.json`."""

    summary: dict[str, _Interval]
    classes: dict[str, dict[str, _Spread]]
    cases: list[dict[str, StrictStr | Real | None]]
    worst: list[StrictStr]
    conventions: _Conventions
    versions: dict[str, StrictStr]
    calibration: _Calibration | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if missing := {"dice", "iou"} - self.summary.keys():
            raise ValueError(f"a summary without {min(missing)}")
        names, known = {*self.summary, "volume_truth_mm3"}, set(self.worst)
        for row in self.cases:
            if row.get("case") not in known or not isinstance(row.get("class"), str):
                raise ValueError(f"a row of the case {row.get('case')!r}, which `worst` does not list, or of no class")
            if wrong := next((name for name in names if isinstance(row.get(name, ""), str)), None):
                raise ValueError(f"{row['case']}: `{wrong}` that is no number and not null")
        return self


class _Section(_Form):
    title: StrictStr
    width: Count
    height: Count
    panels: list[StrictStr] = Field(max_length=3)


class FilledForm(_Form):
    """`filled.json` of `densify`."""

    annotated: StrictStr
    sections: list[_Section]
    shares: list[tuple[StrictStr, StrictStr, StrictStr]]


class EnvironmentForm(_Form):
    """`environment.json`: any names, in words or numbers."""

    __pydantic_extra__: dict[str, StrictStr | Real | Count | bool | None]


class _Asked(_Form):
    data: StrictStr
    minutes: Real | None
    steps: Count | None
    fold: StrictStr | None
    seed: int
    networks: list[StrictStr]


class _CompareRow(_Form):
    network: StrictStr
    peak_bytes: Count | None


class CompareForm(_Form):
    """`compare.json`, as far as `compare --resume` reads it."""

    asked: _Asked
    rows: list[_CompareRow]


class _Event(_Form):
    event: StrictStr
    step: Step | None = None
    seconds: Real | None = None
    loss: Real | None = None
    learning_rate: Real | None = None
    samples_per_second: Annotated[float, Field(strict=True, ge=0, le=1e12)] | None = None
    steps: Step | None = None
    dice: Real | None = None
    classes: dict[str, Real | None] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.event in ("step", "validation") and self.step is None:
            raise ValueError(f"the event `{self.event}` without its step")
        return self


def read_file(path: Path, form: type[Config], do: str = DO) -> dict[str, Any] | None:
    """The content of a JSON file of a run; None where there is none.

    Args:
        path: of the file.
        form: what it must hold.
        do: for the message.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    if not path.is_file():
        return None
    content = dict(load_object(path, do=do, most_bytes=MOST_OWN_BYTES if path.name in _GROWING else MOST_BYTES))
    _check(path, content, form, do)
    return content


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `log.jsonl` that are whole, one at a time; none where there is no log. A kill may cut off a line.

    Raises:
        DataError: a line is JSON, and no event that training logs; or the file is too large, or cannot be read.
    """
    if not path.is_file():
        return
    for number, line in _lines(path):
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            _check(f"{path}:{number}", event, _Event, DO)
            yield event


def whole_lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """The lines of an open log with their numbers, from 1, one at a time; one that is longer than any can be is counted and left out."""
    number, begins = 0, True
    while piece := file.readline(MOST_LINE):
        number += begins
        ends = piece.endswith("\n")
        if begins and (ends or len(piece) < MOST_LINE):
            yield number, piece
        begins = ends


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a log."""
    try:
        if (size := path.stat().st_size) > MOST_LOG_BYTES:
            raise DataError(path, expected=f"a log of at most {MOST_LOG_BYTES} bytes", got=str(size), do=DO, code="D059")
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from whole_lines(file)
    except OSError as error:
        raise DataError(path, expected="a log that can be read", got=reason(error), do=DO, code="D059") from None


def _check(where: str | Path, content: Mapping[str, Any], form: type[Config], do: str) -> None:
    """Refuse content that is not of a form."""
    try:
        parse_config(form, content, where)
    except ConfigError as error:
        raise DataError(where, expected=error.expected, got=error.got[:300], do=do, code="D059") from None
