"""Run folders of several networks on the same data -> one row for each, over the cases that all of them were scored on."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.config import Plan, parse_config
from microtome.evaluation.bootstrap import mean_interval
from microtome.evaluation.curves import read_history
from microtome.evaluation.run_files import ScoresForm, TrainedForm, read_file
from microtome.geometry import Shape
from microtome.yaml_files import load_yaml

# A run of fewer steps has learned next to nothing, whatever its network.
FEWEST_STEPS = 50
_DO = "remove that run's folder and compare again with --resume"
# Of a row: the fields whose best value is marked, and which is the best.
BEST = MappingProxyType({"dice": max, "iou": max, "parameters": min, "multiply_adds": min, "step_seconds": min, "peak_bytes": min})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the training of one network ended.

    Attributes:
        network: its name.
        folder: of the run; need not be there where the run failed early.
        failure: what went wrong, in words; empty where nothing did.
        peak_bytes: the most memory that its process held; None where nobody measured it.
        parameters: that are learned; None where the network could not be built.
        multiply_adds: of one patch; None where the network could not be built.
    """

    network: str
    folder: Path
    failure: str = ""
    peak_bytes: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over cases and the 95 % interval around it; None where there are too few cases for one."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network in the table; None is what is not known, because its run failed.

    Attributes:
        network: its name.
        failure: as in `Outcome`.
        dice: over the foreground and the common cases.
        iou: the same.
        difference: of the Dice, case by case, to the network with the best mean; None for that one.
        parameters: that are learned.
        multiply_adds: of one patch.
        patch_vox: the patch.
        batch: patches a step.
        step_seconds: median wall time of a step.
        peak_bytes: the most memory that the process held.
        steps: that were done.
        planned_steps: of its plan; None without one.
        seconds: wall time of the whole run.
    """

    network: str
    failure: str = ""
    dice: Mean | None = None
    iou: Mean | None = None
    difference: Mean | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    patch_vox: Shape = ()
    batch: int | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    steps: int = 0
    planned_steps: int | None = None
    seconds: float | None = None

    @property
    def hardly_trained(self) -> bool:
        """Whether it came to its end after less than half of the planned steps, or fewer than `FEWEST_STEPS`."""
        planned = self.planned_steps
        return planned is not None and not self.failure and self.steps < max(FEWEST_STEPS, planned / 2)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is known of all networks together.

    Attributes:
        rows: the best mean Dice first, those without a score last.
        cases: validation cases that every scored network was scored on, the worst first by the mean of their Dice.
        case_dice: network -> Dice of each of these cases, NaN where it is undefined.
        left_out: cases that only some of the networks were scored on.
        trained: cases that all learned from.
    """

    rows: tuple[Row, ...]
    cases: tuple[str, ...]
    case_dice: Mapping[str, Mapping[str, float]]
    left_out: int = 0
    trained: int = 0

    @property
    def scored(self) -> tuple[Row, ...]:
        """The rows that have a score."""
        return tuple(row for row in self.rows if row.dice is not None)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows of networks whose training failed."""
        return tuple(row for row in self.rows if row.failure)

    @property
    def best(self) -> Mapping[str, float]:
        """The best value of each column in which networks differ and values can be compared; of a failed one none counts."""
        found = {}
        for name, pick in BEST.items():
            values = [value for row in self.rows if not row.failure and (value := _value(row, name)) is not None]
            if len(set(values)) > 1 and self._comparable(name):
                found[name] = pick(values)
        return found

    def is_best(self, row: Row, name: str) -> bool:
        """Whether a row has the best value of a column."""
        return not row.failure and name in self.best and _value(row, name) == self.best[name]

    def _comparable(self, name: str) -> bool:
        """Whether a column says of all networks the same thing: work needs the same patches, time the same batches of them."""
        known = [row for row in self.rows if not row.failure and _value(row, name) is not None]
        same_patch = len({row.patch_vox for row in known}) == 1
        same_batch = len({row.batch for row in known}) == 1
        return {"multiply_adds": same_patch, "step_seconds": same_patch and same_batch}.get(name, True)

    def to_json(self) -> dict[str, Any]:
        """The part of `compare.json` that was measured; undefined is null."""
        dice = {network: {case: _defined(value) for case, value in found.items()} for network, found in self.case_dice.items()}
        return {"rows": [asdict(row) for row in self.rows], "cases": list(self.cases), "left_out": self.left_out, "case_dice": dice}


def compare_runs(outcomes: Sequence[Outcome], groups: Mapping[str, str] = MappingProxyType({})) -> Comparison:
    """Read the run folders; scores are over the cases that all of them were scored on, which short runs may not have got to.

    Args:
        outcomes: of each network.
        groups: case -> group (a patient), as `mean_interval` takes them; a case that is not among them is its own group.

    Raises:
        DataError: a file of a run is damaged; names it.
    """
    metrics = {outcome.network: found for outcome in outcomes if (found := read_file(outcome.folder / "metrics.json", ScoresForm, _DO))}
    dice, iou = ({network: case_means(found, name) for network, found in metrics.items()} for name in ("dice", "iou"))
    cases = _common_cases(dice)
    members = [groups.get(case) or case for case in cases]
    dice_N, iou_N = ({name: np.array([of[case] for case in cases]) for name, of in found.items()} for found in (dice, iou))
    # With no common case, or none with foreground, nobody is the best.
    leader = max(dice_N, key=lambda name: np.nan_to_num(_mean(dice_N[name]), nan=-1), default="")
    rows = []
    for outcome in outcomes:
        row, name = _row(outcome), outcome.network
        if name in dice_N:
            difference = None if name == leader else _interval(dice_N[name] - dice_N[leader], members)
            row = replace(row, dice=_interval(dice_N[name], members), iou=_interval(iou_N[name], members), difference=difference)
        rows.append(row)
    trained = [len(found["train"]) for outcome in outcomes if (found := read_file(outcome.folder / "dataset.json", TrainedForm, _DO))]
    return Comparison(
        rows=tuple(sorted(rows, key=lambda row: -1.0 if row.dice is None else row.dice.mean, reverse=True)),
        cases=cases,
        case_dice={network: {case: values[case] for case in cases} for network, values in dice.items()},
        left_out=len({case for values in dice.values() for case in values}) - len(cases),
        trained=max(trained, default=0),
    )


def case_means(metrics: Mapping[str, Any], name: str) -> dict[str, float]:
    """Case -> mean of one metric over the foreground, NaN where it is undefined, from a `metrics.json`."""
    foreground = set(metrics["conventions"]["foreground"])
    values: dict[str, list[float]] = {}
    for row in metrics["cases"]:
        if row["class"] in foreground:
            values.setdefault(row["case"], []).append(math.nan if row[name] is None else row[name])
    return {case: _mean(found) for case, found in values.items()}


def chosen_cases(comparison: Comparison) -> dict[str, str]:
    """The worst, the median and the best case by the mean over networks, and the words for each; fewer where there are fewer."""
    shown = [case for case in comparison.cases if any(math.isfinite(found[case]) for found in comparison.case_dice.values())]
    if not shown:
        return {}
    places = {0: "the worst", len(shown) - 1: "the best", (len(shown) - 1) // 2: "the median"}
    if len(shown) < 3:
        places = {0: "the worst", len(shown) - 1: "the best"} if len(shown) == 2 else {0: "the only"}
    return {shown[place]: words for place, words in sorted(places.items())}


def _common_cases(scores: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """The cases that all networks have a score of, the worst first by the mean over the networks."""
    if not scores:
        return ()
    common = set.intersection(*(set(values) for values in scores.values()))
    means = {case: _mean([values[case] for values in scores.values()]) for case in common}
    # Cases in which no foreground is expected and none was found are not bad: they come last, as in metrics.json.
    return tuple(sorted(common, key=lambda case: (math.isnan(means[case]), np.nan_to_num(means[case]), case)))


def _row(outcome: Outcome) -> Row:
    """What a run folder tells of a network, without its scores."""
    path = outcome.folder / "plan.yaml"
    plan = parse_config(Plan, load_yaml(path), path) if path.is_file() else None
    history = read_history(outcome.folder / "log.jsonl")
    return Row(
        network=outcome.network,
        failure=outcome.failure,
        parameters=outcome.parameters,
        multiply_adds=outcome.multiply_adds,
        patch_vox=plan.patch_vox if plan else (),
        batch=plan.batch if plan else None,
        step_seconds=_step_seconds(history.speeds, plan.batch) if plan else None,
        peak_bytes=outcome.peak_bytes,
        steps=history.last_step,
        planned_steps=plan.steps if plan else None,
        seconds=history.total_seconds,
    )


def _step_seconds(speeds: np.ndarray, batch: int) -> float | None:
    """Median wall time of the steps (n,); None where none was logged.

    From the speed of each step, as the `seconds` of a line are rounded and go on through validations.
    """
    known = speeds[speeds > 0]
    return batch / float(np.median(known)) if known.size else None


def _value(row: Row, name: str) -> float | None:
    """A field as one number: the mean of a score."""
    value = getattr(row, name)
    return value.mean if isinstance(value, Mean) else value


def _interval(values: np.ndarray, groups: Sequence[str]) -> Mean | None:
    """The mean of one number a case (cases,) with its interval; None where no case has one."""
    mean, low, high = mean_interval(values, groups)
    return None if math.isnan(mean) else Mean(mean=mean, low=_defined(low), high=_defined(high))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the defined values; NaN if there are none."""
    defined = [value for value in values if math.isfinite(value)]
    return statistics.fmean(defined) if defined else math.nan


def _defined(value: float) -> float | None:
    """JSON has no NaN: undefined is null."""
    return float(value) if math.isfinite(value) else None
