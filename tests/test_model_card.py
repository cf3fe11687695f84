"""`microtome model`: what a person is told of a model that lies somewhere."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from microtome.bundle import load_bundle, save_bundle
from microtome.cli import main
from microtome.errors import DataError
from microtome.inference.graphs import file_hash, record_graph
from microtome.model_card import card, card_rows, origin_rows
from tests.golden_bundles import FOLDER
from tests.models import saved_model

GOLDEN = sorted(folder for folder in FOLDER.iterdir() if folder.is_dir())
ORIGIN: dict[str, Any] = {
    "step": 40,
    "score": 0.87654,
    "data": "/data/cells",
    "training_cases": 4,
    "training_data": {"fingerprint": "ab" * 16, "files": 8, "bytes": 12345, "covers": "names"},
    "validation_cases": 1,
    "validation_data": {"fingerprint": "cd" * 16, "files": 2, "bytes": 99, "covers": "names"},
    "command": "microtome train cells --out runs/cells",
    "date": "2026-11-30T12:00:00+00:00",
    "microtome": "0.1.0",
    "torch": "2.13.0",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_bundle(tmp_path / "model", replace(saved_model(tmp_path), provenance=ORIGIN))
    return tmp_path


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["microtome", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_a_person_is_told_network_classes_origin_and_hash(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "model", run) == 0
    shown = capsys.readouterr().out
    lines = dict(line.strip().split(maxsplit=1) for line in shown.splitlines()[1:])
    assert shown.splitlines()[0] == f"model: {run / 'model'}"
    assert lines["network"].startswith("2D modern_unet, 1 channel, ")
    assert lines["classes"] == "nothing (0), cell (7)"
    assert lines["patch"] == "16×16 voxels of 1 × 1 mm"
    assert lines["score"] == "Dice 0.8765 in the validation at step 40"
    assert lines["learned"] == f"from  4 cases of /data/cells: 8 files of 12345 bytes, fingerprint {'ab' * 16}"
    assert lines["validated"] == f"on  1 case of /data/cells: 2 files of 99 bytes, fingerprint {'cd' * 16}"
    assert lines["command"] == "microtome train cells --out runs/cells"
    assert lines["versions"] == "microtome 0.1.0, torch 2.13.0"
    assert "are as they were written" in lines["hash"]
    assert "model.json" not in lines


def test_a_command_that_an_earlier_version_wrote_is_shown_as_people_type_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    origin = ORIGIN | {"command": "__main__.py train cells --out runs/cells"}
    save_bundle(tmp_path / "model", replace(saved_model(tmp_path), provenance=origin))
    assert dict(card_rows(card(load_bundle(tmp_path))))["command"] == "microtome train cells --out runs/cells"


def test_facts_of_several_lines_are_shown_in_one(tmp_path: Path) -> None:
    save_bundle(tmp_path / "model", replace(saved_model(tmp_path), provenance=ORIGIN | {"date": "today\nhash  another"}))
    assert dict(card_rows(card(load_bundle(tmp_path))))["date"] == r"today\nhash  another"


def test_a_model_of_data_that_changed_during_its_training_says_so(tmp_path: Path) -> None:
    origin = ORIGIN | {"data_changed_since": {"train": "ef" * 16}}
    save_bundle(tmp_path / "model", replace(saved_model(tmp_path), provenance=origin))
    assert dict(card_rows(card(load_bundle(tmp_path))))["data changed"] == f"since the run began: train had fingerprint {'ef' * 16}"


def test_programs_get_the_same_as_json(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "model", run / "model", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["provenance"] == ORIGIN
    assert found["classes"] == {"nothing": [0], "cell": [7]}
    assert found["hash"] == json.loads((run / "model" / "model.json").read_text(encoding="utf-8"))["hash"]
    assert found["copy_for_people"] == ""


def test_a_model_json_that_somebody_edited_is_said_and_the_exit_code_is_2(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = run / "model" / "model.json"
    copy.write_text(copy.read_text(encoding="utf-8").replace('"cell"', '"cells"'), encoding="utf-8")
    assert called(monkeypatch, "model", run) == 2
    shown = capsys.readouterr()
    assert "model.json    changed since it was written; nothing is read from it" in shown.out
    assert "classes       nothing (0), cell (7)" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("bytes", 2, "changed since it was written"),
        ("model", 0, "of another model than"),
        ("no manifest", 0, "not complete: its writing was broken off;"),
        ("half a manifest", 0, "not complete: its writing was broken off;"),
    ],
)
def test_a_graph_that_is_not_this_models_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, code: int, says: str
) -> None:
    engines = run / "model" / "engines"
    engines.mkdir()
    (engines / "graph.onnx").write_bytes(b"a graph")
    bundle = load_bundle(run)
    record_graph(engines, bundle, "onnx", [file_hash(engines / "graph.onnx")])
    assert called(monkeypatch, "model", run) == 0
    assert "graph.onnx" not in capsys.readouterr().out
    if change == "bytes":
        (engines / "graph.onnx").write_bytes(b"a Graph")
    elif change == "no manifest":
        (engines / "graph.json").unlink()
    elif change == "half a manifest":
        (engines / "graph.json").write_bytes((engines / "graph.json").read_bytes()[:20])
    else:
        save_bundle(run / "model", replace(bundle, provenance={}))
    assert called(monkeypatch, "model", run) == code
    assert f"graph.onnx    {says}" in capsys.readouterr().out


def test_changed_weights_are_refused_with_the_file(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert called(monkeypatch, "model", run) == 2
    line = capsys.readouterr().err
    assert str(file) in line
    assert "expected content with hash" in line
    assert line.endswith("[MT-D054]\n")


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_models_of_every_form_have_a_card(folder: Path) -> None:
    found = card(load_bundle(folder))
    rows = dict(card_rows(found))
    assert found["classes"] == {"nothing": [0], "Zelle é": [7, 9]}
    assert rows["score"] == "Dice 0.3000 in the validation at step 12"
    assert "model.json" not in rows


def test_a_stranger_that_says_nonsense_of_its_origin_is_shown_and_moves_no_cursor(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nonsense = {name: ["\x1b[2J", 5, None] for name in (*ORIGIN, "initial_weights")}
    save_bundle(run / "model", replace(load_bundle(run), provenance=nonsense))
    assert called(monkeypatch, "model", run) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_run_without_a_model_has_no_rows_and_asking_for_its_model_is_refused(tmp_path: Path) -> None:
    assert origin_rows(tmp_path) == []
    with pytest.raises(DataError, match="no model"):
        load_bundle(tmp_path)
