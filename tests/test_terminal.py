"""What a terminal shows of scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from microtome import terminal
from microtome.data.case import Finding
from microtome.data.legend import Legend
from microtome.data.quality import Inspection
from microtome.data.quality import Table as CaseTable
from microtome.evaluation.scores import score_case, summarise
from microtome.models.registry import find
from microtome.terminal import Terminal, print_inspection, print_networks, print_scores
from microtome.training.recipes import RECIPES
from microtome.words import cut_middle
from tests.small import small_plan
from tests.test_recipes import data_for, plan_of

OVER = "the minutes were over after {} of 400 planned steps: give more, or an idler machine"
LEGEND = Legend(names=("ground", "cell"), values=((0,), (1,)), background=0)


def test_a_distance_that_leaves_cases_out_says_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.zeros((8, 8), int)
    truth[2:5, 2:5] = 1
    moved = np.roll(truth, 1, axis=0)
    rows = score_case(truth, moved, (1.0, 1.0), LEGEND, case="found")
    rows += [row for number in range(10) for row in score_case(truth, 0 * truth, (1.0, 1.0), LEGEND, case=f"missed {number}")]
    print_scores(summarise(rows, LEGEND))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "hd95_mm 1.000 (10 undefined)" in lines
    [cell] = [line for line in lines if line.startswith("cell ")]
    assert cell.count("1.000 (10 undefined)") == 1
    # Of a case without a prediction Dice is 0 and defined.
    [dice] = [line for line in lines if line.startswith("dice ")]
    assert "undefined" not in dice


def test_scores_that_are_all_defined_say_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.eye(6, dtype=int)
    print_scores(summarise([row for name in "ab" for row in score_case(truth, truth, (1.0, 1.0), LEGEND, case=name)], LEGEND))
    shown = capsys.readouterr().out
    assert "undefined" not in shown
    assert "1.000 [1.000, 1.000]" in shown


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "default"])
def test_a_recipe_is_printed_with_its_source_and_every_value_that_it_set(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(name, data_for(name))
    Terminal().say_plan(plan)
    shown = capsys.readouterr().err
    assert f"recipe {name}: {RECIPES[name].title}: {RECIPES[name].source}\n" in shown
    for field in ("network", "patch_vox", "batch", "loss", "augment", "optimiser", "warmup" if name != "unet3d2016" else "loss"):
        assert f"  {field}" in shown
        assert plan.reasons[field] in shown


@pytest.mark.parametrize(
    ("step", "warmup", "reason", "said"),
    [
        (6, 0, OVER.format(6), f"warning: {OVER.format(6)}; the network has hardly begun to learn\n"),
        (1, 0, "all steps are done", "warning: only 1 step: give more; the network has hardly begun to learn\n"),
        (19, 0, "the minutes are over", "warning: only 19 steps: give more; the network has hardly begun to learn\n"),
        (20, 0, "all steps are done", ""),
        (90, 100, OVER.format(90), f"warning: {OVER.format(90)}; the network has hardly begun to learn\n"),
        (100, 100, OVER.format(100), f"warning: {OVER.format(100)}\n"),
    ],
)
def test_a_run_of_hardly_any_steps_is_said_to_have_learned_hardly_anything(
    step: int, warmup: int, reason: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().training(small_plan(warmup=warmup)) as on_event:
        on_event({"event": "end", "step": step, "reason": reason})
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("subset", ["", "4 of 6 cases, as the minutes allowed"])
def test_a_score_of_some_cases_only_says_so(subset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conventions = {"validation_subset": subset} if subset else {}
    summary = {name: {"mean": 0.5} for name in ("dice", "iou")}
    (tmp_path / "metrics.json").write_text(json.dumps({"summary": summary, "conventions": conventions}), encoding="utf-8")
    Terminal().say_result(tmp_path)
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "validation: Dice 0.500, IoU 0.500" + (f" ({subset})" if subset else "")


def test_a_network_without_a_reference_is_listed_with_its_authors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_networks([find("autoencoder"), find("vnet")])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"({find('autoencoder').authors})" in shown
    assert "S.-A. Ahmadi; arXiv 1606.04797)" in shown


def test_one_step_is_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().say_plan(small_plan(steps=1))
    assert capsys.readouterr().err.splitlines()[0].endswith(", 1 step")


def test_names_that_hold_line_ends_and_emoji_are_shown_as_they_are_and_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    name, shown = "a\nb:x:\x1b[31m[red]", r"a\nb:x:\x1b[31m[red]"
    person = Terminal()
    person.say(name)
    with person.predicting() as view:
        view.done(name, 1, 2)
    with person.training(small_plan()) as on_event:
        on_event({"event": "finding", "step": 0, "severity": "warning", "message": f"{name}: odd"})
    assert capsys.readouterr().err.splitlines() == [shown, f"predicting 1/2: {shown}", f"warning: {shown}: odd"]


def inspection_of(*names: str) -> tuple[Inspection, CaseTable]:
    """An inspection of one finding, and a table of these cases."""
    finding = Finding(severity="warning", code="odd", message=f"{names[0]}.png: odd")
    found = Inspection(root=Path("data"), layout="pairs", legend=LEGEND, rows=(), findings=(finding,))
    return found, CaseTable(("case", "size", "classes"), tuple((name, "512×512", "ground 90 %, cell 10 %") for name in names))


def test_a_name_with_a_line_end_is_a_row_and_a_finding_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_inspection(*inspection_of("a\nb"), None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["case", r"a\nb", "warning:"]
    assert lines[-1] == r"warning: a\nb.png: odd"


@pytest.mark.parametrize(("width", "wraps"), [(60, False), (34, True)])
def test_long_names_of_cases_are_cut_in_their_middle_so_that_a_row_is_a_line(
    width: int, wraps: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_page", lambda: Console(highlight=False, width=width))
    long = "1.2.840.113619.2.5.1762583153.215519.978957063.78." * 2
    print_inspection(*inspection_of(f"{long}1", f"{long}2", "short"), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "512×512" in line]
    names = [line.split()[0] for line in lines]
    assert names[2] == "short"
    for name, end in zip(names, "12", strict=False):
        assert name.startswith("1.2.84")
        assert name.endswith(f"78.{end}")
        assert "…" in name
    # Where even the shortest names leave too little room, the last column goes on below.
    assert all(line.rstrip().endswith("cell 10 %") is not wraps for line in lines)
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("width", "cut"), [(17, "患者ab一番脳b番二"), (12, "患者ab…b番二"), (6, "患…二"), (1, "…")])
def test_letters_that_take_two_cells_are_counted_as_two(width: int, cut: str) -> None:
    assert cut_middle("患者ab一番脳b番二", width) == cut
    assert cell_len(cut) <= width


def test_hundreds_of_classes_are_told_by_their_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal().training(small_plan()) as on_event:
        classes = {f"label {number}": 0.5 for number in range(1, 255)}
        on_event({"event": "validation", "step": 6, "dice": 0.5, "classes": classes})
    expected = "label 1 0.500, label 2 0.500, label 3 0.500, ... label 254 0.500 (254 classes)"
    assert capsys.readouterr().err == f"step 6: validation Dice 0.5000 ({expected})\n"


def test_a_large_image_says_which_it_is_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("microtome.terminal.time.monotonic", lambda: now[0])
    with Terminal().predicting() as view:
        for seconds, done in ((0.5, 1), (20, 10), (25, 11), (400, 20)):
            now[0] = seconds
            view.voxels("brain", done, 100)
        view.done("brain", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  10 % of brain, about 3 min left", "  20 % of brain, about 27 min left", "predicting 1/2: brain"]
