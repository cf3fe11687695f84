"""Networks side by side: what is compared is the same, and what is said of it can be counted again."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome import compare as module
from microtome.compare import Ended, Request, compare, is_finished, measure, parse_names, peak_bytes, run_alone, tell
from microtome.config import dump_yaml
from microtome.data.case import NOT_ANNOTATED
from microtome.data.dataset import Dataset
from microtome.data.split import Split, split_dataset
from microtome.errors import ConfigError, DataError
from microtome.evaluation.comparison import Comparison, Mean, Outcome, Row, chosen_cases, compare_runs
from microtome.evaluation.comparison_page import (
    cautions,
    comparison_html,
    draw_strips,
    format_count,
    format_difference,
    fullest_section,
    lead,
    table,
)
from microtome.files import write_json, write_text
from tests.forked import ran
from tests.small import small_plan
from tests.test_report import NO_SIZE, Page, picture, plan_of, shifted, three_dimensional, two_dimensional, write_run

ASKED = {"data": "/data/cells", "minutes": 2.0, "steps": None, "seed": 0}


def same(truth: np.ndarray) -> np.ndarray:
    """A prediction without an error."""
    return np.maximum(truth, 0)


def write_metrics(folder: Path, dice: dict[str, float | None], iou: float = 0.5) -> Outcome:
    """A run folder that holds nothing but scores: of one foreground class, and of the background that does not count."""
    rows = [{"case": case, "class": "cell", "dice": value, "iou": iou} for case, value in dice.items()]
    rows += [{"case": case, "class": "background", "dice": 1.0, "iou": 1.0} for case in dice]
    write_json(folder / "metrics.json", {"cases": rows, "conventions": {"foreground": ["cell"]}})
    return Outcome(network=folder.name, folder=folder)


def row_of(network: str, **changes: Any) -> Row:
    """A row whose patch and batch are those of all others."""
    return Row(network=network, patch_vox=(32, 32), batch=4, **changes)


def of_rows(*rows: Row, dice: dict[str, dict[str, float]] | None = None) -> Comparison:
    cases = tuple(next(iter(dice.values()))) if dice else ()
    return Comparison(rows=rows, cases=cases, case_dice=dice or {}, trained=4)


# The numbers.


def test_scores_are_those_of_metrics_json_where_all_were_scored_on_the_same_cases(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells")
    outcomes = []
    for name, predict in (("off", shifted), ("exact", same)):
        write_run(tmp_path / name, dataset, plan_of(dataset.legend, 2), predict)
        outcomes.append(Outcome(network=name, folder=tmp_path / name, parameters=7))
    comparison = compare_runs(outcomes)
    assert [row.network for row in comparison.rows] == ["exact", "off"]
    for row in comparison.rows:
        summary = json.loads((tmp_path / row.network / "metrics.json").read_text())["summary"]
        for score, name in ((row.dice, "dice"), (row.iou, "iou")):
            assert score is not None
            assert [score.mean, score.low, score.high] == pytest.approx([summary[name][key] for key in ("mean", "low", "high")])
        # The log of `write_run`: 9 samples a second in batches of 4, and an end 20 s after 400 steps of 1.2 s.
        assert (row.steps, row.step_seconds, row.seconds) == (400, pytest.approx(4 / 9), pytest.approx(500))
        assert (row.patch_vox, row.batch, row.parameters) == ((32, 32), 4, 7)
    assert (comparison.trained, comparison.left_out, len(comparison.cases)) == (4, 0, 2)


def test_cases_that_one_network_was_not_scored_on_count_for_none(tmp_path: Path) -> None:
    long = write_metrics(tmp_path / "long", {"a": 0.9, "b": 0.7, "c": 0.1})
    short = write_metrics(tmp_path / "short", {"a": 0.8, "b": 0.4})
    comparison = compare_runs([short, long])
    assert comparison.cases == ("b", "a")
    assert comparison.left_out == 1
    assert {row.network: row.dice and row.dice.mean for row in comparison.rows} == pytest.approx({"long": 0.8, "short": 0.6})


def test_a_difference_is_taken_case_by_case(tmp_path: Path) -> None:
    best = write_metrics(tmp_path / "best", {"a": 0.9, "b": 0.5, "c": 0.7})
    behind = write_metrics(tmp_path / "behind", {"a": 0.8, "b": 0.4, "c": 0.6})
    first, second = compare_runs([behind, best]).rows
    assert (first.network, first.difference) == ("best", None)
    assert first.dice is not None
    assert second.dice is not None
    # The intervals of the two overlap, because cases differ; the difference of 0.1 is there in each case.
    assert first.dice.low is not None
    assert second.dice.high is not None
    assert first.dice.low < second.dice.high
    assert second.difference is not None
    assert [second.difference.mean, second.difference.low, second.difference.high] == pytest.approx([-0.1] * 3)
    assert format_difference(second.difference) == "Dice -0.100 to the best [-0.100, -0.100], told apart"


def test_cases_of_one_patient_are_no_independent_witnesses(tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "run", {"a": 0.9, "b": 0.5, "c": 0.7})
    together = compare_runs([run], {"a": "patient", "b": "patient", "c": "patient"}).rows[0].dice
    apart = compare_runs([run], {"a": "", "b": ""}).rows[0].dice
    assert together is not None
    assert apart is not None
    assert (together.mean, together.low) == (pytest.approx(0.7), None)
    assert apart.low == pytest.approx(0.5)


def test_an_undefined_dice_is_left_out_and_its_case_comes_last(tmp_path: Path) -> None:
    runs = [write_metrics(tmp_path / name, {"empty": None, "low": 0.2, "high": value}) for name, value in (("x", 0.6), ("y", 0.8))]
    comparison = compare_runs(runs)
    assert comparison.cases == ("low", "high", "empty")
    assert comparison.rows[0].dice is not None
    assert comparison.rows[0].dice.mean == pytest.approx(0.5)
    assert comparison.to_json()["case_dice"]["x"]["empty"] is None
    assert list(chosen_cases(comparison)) == ["low", "high"]


def test_a_failed_network_keeps_its_row(tmp_path: Path) -> None:
    failed = Outcome(network="failed", folder=tmp_path / "failed", failure="no memory", peak_bytes=3)
    comparison = compare_runs([failed, write_metrics(tmp_path / "run", {"a": 0.9})])
    assert [row.network for row in comparison.rows] == ["run", "failed"]
    assert [row.failure for row in comparison.failed] == ["no memory"]
    assert [row.network for row in comparison.scored] == ["run"]
    assert lead(compare_runs([failed]), ASKED) == "There is no score of failed. failed failed."


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    write_text(tmp_path / "run" / "metrics.json", "{")
    with pytest.raises(DataError, match=r"metrics\.json"):
        compare_runs([Outcome(network="run", folder=tmp_path / "run")])


def test_a_step_takes_the_median_and_a_line_that_was_cut_off_does_not_matter(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.yaml", dump_yaml(small_plan(batch=6)))
    lines = [json.dumps({"event": "step", "step": k, "samples_per_second": speed}) for k, speed in enumerate((1.0, 12.0, 60.0), 1)]
    write_text(tmp_path / "log.jsonl", "\n".join([*lines, '{"event": "step", "samples_per_']))
    assert compare_runs([Outcome(network="n", folder=tmp_path)]).rows[0].step_seconds == 0.5


def test_the_best_of_a_column_is_marked_where_networks_did_the_same_work() -> None:
    small, large = (
        row_of("small", parameters=10, multiply_adds=5, step_seconds=0.2),
        row_of("large", parameters=20, multiply_adds=9, step_seconds=0.1),
    )
    assert of_rows(small, large).best == {"parameters": 10, "multiply_adds": 5, "step_seconds": 0.1}
    assert of_rows(small, replace(large, batch=8)).best == {"parameters": 10, "multiply_adds": 5}
    assert of_rows(small, replace(large, patch_vox=(64, 64))).best == {"parameters": 10}
    assert of_rows(small, replace(large, failure="no memory")).best == {}
    assert of_rows(small, replace(small, network="twin")).best == {}


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ({"x": {}}, {}),
        ({"x": {"a": 0.5}}, {"a": "the only"}),
        ({"x": {"a": 0.1, "b": 0.2}}, {"a": "the worst", "b": "the best"}),
        ({"x": {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5}}, {"a": "the worst", "c": "the median", "e": "the best"}),
    ],
)
def test_chosen_cases_are_worst_median_and_best(dice: dict[str, dict[str, float]], expected: dict[str, str]) -> None:
    assert chosen_cases(of_rows(dice=dice)) == expected


@pytest.mark.parametrize(
    ("count", "words"),
    [(None, "–"), (0, "0"), (999, "999"), (1234, "1.23 k"), (999_600, "1.00 M"), (31_030_658, "31.0 M"), (145_600_000_000, "146 G")],
)
def test_large_numbers_have_three_digits(count: int | None, words: str) -> None:
    assert format_count(count).replace("\N{NO-BREAK SPACE}", " ") == words


def test_the_table_has_a_cell_for_each_title() -> None:
    score = Mean(mean=0.5, low=0.25, high=0.75)
    titles, rows = table(
        of_rows(
            row_of("a", dice=score, iou=score, parameters=31_030_658, peak_bytes=2**30, step_seconds=0.25, steps=1200, seconds=60.0),
            Row(network="b", failure="x"),
        )
    )
    assert {len(row) for row in rows} == {len(titles)}
    assert rows[0] == ("a", "0.500 [0.250, 0.750]", "0.500 [0.250, 0.750]", "31.0 M", "–", "0.25 s of 4", "1.00 GB", "1,200 in 60 s", "")
    assert rows[1][-1] == "failed: x"


@pytest.mark.parametrize(
    ("steps", "planned", "words"),
    [
        (49, 60, "49 of 60 planned steps"),
        (50, 60, ""),
        (199, 400, "199 of 400 planned steps"),
        (200, 400, ""),
        (4, 4, "4 steps"),
        (1, 1, "1 step"),
    ],
)
def test_a_network_that_hardly_trained_is_said_to_have(steps: int, planned: int, words: str) -> None:
    short = row_of("short", steps=steps, planned_steps=planned, difference=Mean(mean=-0.1, low=None, high=None))
    comparison = of_rows(row_of("long", steps=900, planned_steps=800), short)
    behind = "Dice -0.100 to the best"
    assert [row[-1] for row in table(comparison)[1]] == ["", f"hardly trained: {words}; {behind}" if words else behind]
    said = [caution for caution in cautions(comparison, ASKED, "cpu") if caution.startswith("Hardly trained: ")]
    assert [caution.partition(". ")[0] for caution in said] == ([f"Hardly trained: short ({words})"] if words else [])
    # What failed has a remark of its own.
    assert not replace(short, failure="no memory").hardly_trained


def test_cautions_are_those_that_hold_here() -> None:
    two = of_rows(row_of("a"), row_of("b"), dice={"a": {"x": 0.5, "y": 0.6}, "b": {"x": 0.5, "y": 0.6}})

    def words(comparison: Comparison, device: str = "cpu", **asked: Any) -> str:
        return " ".join(cautions(comparison, {**ASKED, **asked}, device))

    assert "seed 7" in words(two, seed=7)
    assert "All had the same time" in words(two)
    assert "the same number of steps" in words(two, minutes=None, steps=5)
    assert "over 2 cases only" in words(two)
    assert "GPU" not in words(two)
    assert "GPU" in words(two, device="NVIDIA H200")
    assert "One case cannot show" in words(replace(two, cases=("x",)))
    assert "3 cases left out" in words(replace(two, left_out=3))
    assert "came out differently" not in words(two)
    assert "came out differently" in words(replace(two, rows=(row_of("a"), replace(row_of("b"), batch=9))))


def test_the_section_with_most_truth_is_shown() -> None:
    truth = np.zeros((4, 3, 3), np.int16)
    truth[2, :2], truth[1, 0] = 1, 1
    truth[3] = NOT_ANNOTATED
    assert fullest_section(truth, 0) == 2
    assert fullest_section(np.where(truth == 1, np.int16(0), truth), 0) == 0
    assert fullest_section(np.full((2, 3, 3), 1, np.int16) * np.array([-1, 1], np.int16)[:, None, None], None) == 1


# The page.


def compared(folder: Path, dataset: Dataset, dims: int) -> tuple[Comparison, list[Outcome], Split]:
    """Two networks, one without an error, and one that failed."""
    outcomes = []
    for name, predict in (("off", shifted), ("exact", same)):
        write_run(folder / name, dataset, plan_of(dataset.legend, dims), predict)
        outcomes.append(Outcome(network=name, folder=folder / name, parameters=1000, multiply_adds=10**9, peak_bytes=2**30))
    outcomes.append(Outcome(network="lost", folder=folder / "lost", failure="a <b>tag</b>"))
    return compare_runs(outcomes), outcomes, split_dataset(dataset, "1/3", 0)


@pytest.mark.filterwarnings(NO_SIZE)
def test_page_shows_the_same_cases_of_all_networks_and_needs_no_other_file(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells")
    comparison, outcomes, split = compared(tmp_path / "out", dataset, 2)
    strips = draw_strips(comparison, outcomes, dataset, split)
    write_text(
        tmp_path / "compare.html", comparison_html(comparison, strips, dataset.legend, ASKED, {"device": "cpu", "command": "microtome <x>"})
    )
    page = Page(tmp_path / "compare.html")
    assert page.ids == ["headline", "table", "cases", "made"]
    # Image and truth, then prediction and errors of two networks, of two cases.
    assert [image["alt"].partition(": ")[2] for image in page.images[:6]] == [
        "image",
        "truth",
        "exact",
        "exact, errors",
        "off",
        "off, errors",
    ]
    assert len(page.images) == 12
    assert [link for link in page.links if not link.startswith("data:")] == ["exact/report.html", "off/report.html"]
    assert "failed: a <b>tag</b>" in page.text
    assert "exact and off: the same 4 cases to learn from, 2 minutes each, scored on the same 2 cases. lost failed." in page.text
    # Where there is no error the subdued picture is grey all over; JPEG blurs colours a little.
    colour = [np.ptp(picture(page.images[place]).astype(int), axis=-1).max() for place in (3, 5)]
    assert colour[0] < 20 < 100 < colour[1]


def test_of_a_volume_all_networks_show_the_section_with_most_truth(tmp_path: Path) -> None:
    dataset = three_dimensional(tmp_path / "organs")
    comparison, outcomes, split = compared(tmp_path / "out", dataset, 3)
    (strip,) = draw_strips(comparison, outcomes, dataset, split)
    case = next(case for case in split.validation if case.name == strip.case)
    section = fullest_section(dataset.read_label(case), dataset.legend.background)
    assert strip.where.startswith(f"section {section} (counted from 0), the one with most of the truth")
    exact, off = strip.pictures
    assert exact.exhibit.panels[:2] == off.exhibit.panels[:2]
    # The block is shifted by one voxel along its rows: 4 rows lose one and gain one.
    assert (exact.exhibit.shown.wrong, off.exhibit.shown.missed, off.exhibit.shown.invented) == (0, 4, 4)
    assert (exact.network, exact.dice) == ("exact", 1.0)


@pytest.mark.filterwarnings(NO_SIZE)
def test_a_prediction_that_is_gone_and_a_case_that_is_gone_are_said(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells")
    comparison, outcomes, split = compared(tmp_path / "out", dataset, 2)
    for path in (tmp_path / "out" / "off" / "validation").glob("*.png"):
        path.write_bytes(b"no picture")
    strips = draw_strips(comparison, outcomes, dataset, split)
    assert [[picture.network for picture in strip.pictures] for strip in strips] == [["exact"], ["exact"]]
    assert all(strip.notes[0].startswith("off is not shown: ") for strip in strips)
    gone = draw_strips(comparison, outcomes, replace(dataset, cases=()), Split(train=(), validation=()))
    assert [strip.notes for strip in gone] == [("The case is not in the data any more.",)] * 2


# What is refused before anything begins.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"networks": ("unet", "unet_sam")}, "did you mean `unet_same`"),
        ({"networks": ("unet", "modern_unet", "unet")}, "got unet twice"),
        ({"networks": ()}, "got none"),
        ({"minutes": None}, "either --minutes or --steps, got none"),
        ({"steps": 3}, "got 2 minutes and 3 steps"),
        ({"fold": "all"}, "leave cases to be scored on"),
    ],
)
def test_a_request_that_cannot_be_compared_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Request(**{"networks": ("unet",), "minutes": 2.0, **changes})


def test_names_are_separated_by_commas() -> None:
    assert parse_names("unet, unet_same,") == ("unet", "unet_same")


class Trainings:
    """Stands in for the processes of trainings: notes their words, and writes the run folders that they would have left."""

    def __init__(self, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dataset, self.calls = dataset, list[list[str]]()
        self.ends: dict[str, Ended] = {}
        self.predict: Callable[[np.ndarray], np.ndarray] = same
        monkeypatch.setattr(module, "run_alone", self)

    def __call__(self, words: list[str]) -> Ended:
        self.calls.append(words)
        folder = Path(words[words.index("--out") + 1])
        ended = self.ends.get(folder.name, Ended(failure="", peak_bytes=10, stopped=0))
        write_run(folder, self.dataset, plan_of(self.dataset.legend, 2, fold="1/5"), self.predict, ended=not ended.failure)
        return ended


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    return Trainings(two_dimensional(tmp_path / "cells"), monkeypatch)


TWO = Request(networks=("unet_same", "modern_unet"), minutes=2.0, seed=4)


@pytest.mark.filterwarnings(NO_SIZE)
def test_each_training_gets_the_same_words_but_its_name(trainings: Trainings, tmp_path: Path) -> None:
    said: list[str] = []
    data, out = tmp_path / "cells", tmp_path / "out"
    compare(data, out, replace(TWO, fold="2/5", device="cpu"), say=said.append)
    options = ["--minutes", "2", "--fold", "2/5", "--seed", "4", "--device", "cpu"]
    expected = [["train", str(data), "--out", str(out / name), "--network", name, *options] for name in TWO.networks]
    assert trainings.calls == expected
    assert said[0] == "2 to train, 2 minutes each: about 4 min in all"
    assert said[1:3] == ["", "1/2 unet_same: training for 2 minutes"]
    assert said[3] == "unet_same: Dice 1.000, 400 steps in 8 min"
    record = json.loads((out / "compare.json").read_text())
    assert [row["peak_bytes"] for row in record["rows"]] == [10, 10]
    assert record["asked"]["seed"] == 4
    assert {"command", "torch", "processor"} <= set(record["environment"])
    assert (out / "compare.html").exists()


@pytest.mark.filterwarnings(NO_SIZE)
def test_resume_trains_what_is_not_finished_and_leaves_the_rest(trainings: Trainings, tmp_path: Path) -> None:
    data, out = tmp_path / "cells", tmp_path / "out"
    trainings.ends["modern_unet"] = Ended(failure="step 5: the disk is full", peak_bytes=70, stopped=0)
    first = compare(data, out, TWO)
    assert [(row.network, row.failure) for row in first.rows] == [("unet_same", ""), ("modern_unet", "step 5: the disk is full")]
    del trainings.ends["modern_unet"], trainings.calls[:]
    second = compare(data, out, replace(TWO, networks=(*TWO.networks, "unet")), resume=True)
    assert [call[4:] for call in trainings.calls] == [
        ["--resume", "--device", "auto"],
        ["--network", "unet", *TWO.words, "--device", "auto"],
    ]
    # What the first attempt needed is not forgotten.
    assert {row.network: row.peak_bytes for row in second.rows} == {"unet_same": 10, "modern_unet": 70, "unet": 10}
    assert second.failed == ()


@pytest.mark.filterwarnings(NO_SIZE)
def test_a_stop_ends_all_and_keeps_what_is_finished(trainings: Trainings, tmp_path: Path) -> None:
    data, out = tmp_path / "cells", tmp_path / "out"
    trainings.ends["modern_unet"] = Ended(failure="a request to stop", peak_bytes=10, stopped=signal.SIGINT)
    request = Request(networks=("unet_same", "modern_unet", "unet"), minutes=2.0)
    with pytest.raises(KeyboardInterrupt):
        compare(data, out, request)
    assert len(trainings.calls) == 2
    assert [row["network"] for row in json.loads((out / "compare.json").read_text())["rows"]] == ["unet_same", "modern_unet"]
    assert is_finished(out / "unet_same")
    assert not is_finished(out / "modern_unet")


@pytest.mark.filterwarnings(NO_SIZE)
def test_a_folder_that_does_not_fit_is_refused_before_any_training(trainings: Trainings, tmp_path: Path) -> None:
    data, out = tmp_path / "cells", tmp_path / "out"
    with pytest.raises(ConfigError, match=r"a folder with compare\.json, got none"):
        compare(data, out, TWO, resume=True)
    write_text(out / "thesis.txt", "mine")
    with pytest.raises(ConfigError, match="one with files in it"):
        compare(data, out, TWO)
    asked = {"data": str(data), "minutes": 3.0, "steps": None, "fold": None, "seed": 4, "networks": ["unet", "modern_unet", "vnet"]}
    write_json(out / "compare.json", {"asked": asked, "rows": []})
    with pytest.raises(ConfigError, match=r"minutes 3\.0 as before, got 2\.0"):
        compare(data, out, TWO, resume=True)
    write_json(out / "compare.json", {"asked": asked | {"minutes": 2.0}, "rows": []})
    with pytest.raises(ConfigError, match="--resume: expected the networks of before, and maybe others, got no unet, vnet"):
        compare(data, out, TWO, resume=True)
    write_text(out / "compare.json", '{"asked": ')
    with pytest.raises(DataError, match=r"compare\.json: expected valid JSON"):
        compare(data, out, TWO, resume=True)
    with pytest.raises(ConfigError, match="fold"):
        compare(data, tmp_path / "new", replace(TWO, fold="9/5"))
    write_text(data / "microtome.yaml", "classes: {around: 0, cell: 1, wall: 2}\nvalidation: [picture_0]\n")
    with pytest.raises(ConfigError, match="no fold beside `validation`"):
        compare(data, tmp_path / "new", replace(TWO, fold="1/5"))
    assert trainings.calls == []
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings(NO_SIZE)
def test_networks_for_volumes_alone_are_refused_on_pictures_before_any_training(trainings: Trainings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected networks that take 2D pictures, got unet3d"):
        compare(tmp_path / "cells", tmp_path / "out", replace(TWO, networks=("unet", "unet3d")))
    assert trainings.calls == []
    assert not (tmp_path / "out").exists()


def test_networks_for_pictures_alone_may_see_volumes_section_by_section(tmp_path: Path) -> None:
    three_dimensional(tmp_path / "organs")
    dataset, _ = module._open(tmp_path / "organs", replace(TWO, networks=("unet", "unet3d"), fold="1/3"))
    assert {len(header.shape_vox) for header in dataset.headers.values()} == {3}


def test_a_network_that_cannot_be_built_has_no_numbers(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.yaml", dump_yaml(small_plan()))
    parameters, multiply_adds = measure(tmp_path / "plan.yaml")
    assert parameters is not None
    assert multiply_adds is not None
    assert multiply_adds > parameters > 0
    write_text(tmp_path / "plan.yaml", dump_yaml(small_plan(patch_vox=(33, 32))))
    assert measure(tmp_path / "plan.yaml") == (None, None)


# Processes.


def test_a_process_that_was_killed_is_said_to_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING", "import os; os.kill(os.getpid(), 9)")
    assert run_alone([]).failure == "ended by SIGKILL (out of memory?)"
    monkeypatch.setattr(module, "TRAINING", "import sys; print('not json'); sys.exit(3)")
    ended = run_alone([])
    assert (ended.failure, ended.stopped) == ("exit code 3", 0)
    assert ended.peak_bytes > 2**20
    monkeypatch.setattr(module, "TRAINING", "import sys; assert sys.argv[1:] == ['train', 'x']")
    assert run_alone(["train", "x"]).failure == ""


def test_ctrl_c_reaches_the_training_once_and_ends_it_cleanly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ready, caught = tmp_path / "ready", tmp_path / "caught"
    code = f"""
import pathlib, signal, sys, time
caught = pathlib.Path({str(caught)!r})
signal.signal(signal.SIGINT, lambda number, frame: caught.open("a").write(f"{{number}} "))
pathlib.Path({str(ready)!r}).touch()
began = time.monotonic()
while not caught.exists() and time.monotonic() < began + 20:
    time.sleep(0.01)
time.sleep(0.2)
sys.exit(1)
"""
    monkeypatch.setattr(module, "TRAINING", code)
    before = signal.getsignal(signal.SIGINT)

    def press() -> None:
        while not ready.exists():
            threading.Event().wait(0.01)
        # To the thread that listens, not to whichever the kernel picks.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    ended = run_alone([])
    thread.join()
    assert (ended.failure, ended.stopped) == ("exit code 1", signal.SIGINT)
    assert caught.read_text() == f"{signal.SIGINT.value} "
    assert signal.getsignal(signal.SIGINT) is before


def test_a_command_tells_its_error_and_its_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["-c"])

    def refused() -> None:
        try:
            raise ConfigError("plan", expected="a patch", got="none", do="give one", code="C036")
        except ConfigError:
            sys.exit(2)

    def broken() -> None:
        raise ZeroDivisionError("by\n0")

    for command, end, words in (
        (refused, SystemExit, "plan: expected a patch, got none; give one [MT-C036]"),
        (broken, ZeroDivisionError, "ZeroDivisionError: by 0"),
    ):
        with pytest.raises(end):
            tell(command)
        assert json.loads(capsys.readouterr().out)["failure"] == words
    tell(lambda: None)
    told = json.loads(capsys.readouterr().out)
    assert told["failure"] == ""
    assert told["peak_bytes"] == peak_bytes() > 50 * 2**20


@pytest.mark.filterwarnings(NO_SIZE)
def test_from_data_to_page_with_real_trainings_and_one_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_one(words: Sequence[str]) -> Ended:
        """One in a new process, as always; the others forked."""
        if "modern_unet" in words:
            return run_alone(words)
        # It is asked for what pictures cannot be trained with, which `compare` itself would have refused.
        done = ran(module.TRAINING, *("unet3d" if word == "unet" else word for word in words))
        told = json.loads(done.stdout.splitlines()[-1])
        return Ended(failure=told["failure"] if done.returncode else "", peak_bytes=told["peak_bytes"], stopped=0)

    monkeypatch.setattr(module, "run_alone", run_one)
    data, out = tmp_path / "cells", tmp_path / "out"
    two_dimensional(data)
    said: list[str] = []
    request = Request(networks=("modern_unet", "unet", "laddernet"), steps=2, fold="1/3", seed=1, device="cpu")
    comparison = compare(data, out, request, say=said.append)
    *scored, failed = comparison.rows
    assert {row.network for row in scored} == {"modern_unet", "laddernet"}
    for row in scored:
        assert (row.steps, row.failure) == (2, "")
        assert row.dice is not None
        assert None not in (row.parameters, row.multiply_adds, row.step_seconds)
        assert (row.peak_bytes or 0) > 150 * 2**20
    assert len(comparison.cases) == 2
    assert (failed.network, failed.dice) == ("unet", None)
    assert failed.failure.startswith("unet3d: expected 3D images, got 2D")
    assert f"unet failed: {failed.failure}" in said
    assert table(comparison)[1][0][-1].startswith("hardly trained: 2 steps")
    assert "Hardly trained: " in Page(out / "compare.html").text
    assert json.loads((out / "modern_unet" / "environment.json").read_text())["command"].startswith("microtome train ")
    assert "modern_unet" in Page(out / "compare.html").text
    before = (out / "modern_unet" / "log.jsonl").stat().st_mtime_ns
    again = compare(data, out, request, resume=True)
    assert again.scored == tuple(scored)
    assert (out / "modern_unet" / "log.jsonl").stat().st_mtime_ns == before
