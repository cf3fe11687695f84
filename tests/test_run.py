"""Whole runs on made data: what a run folder holds, what a kill costs, what is refused."""

import html
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from microtome.bundle import load_bundle
from microtome.config import NetworkConfig, Plan, dump_yaml
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.split import Split, split_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import ConfigError, DataError, RunError
from microtome.images.files import read_image
from microtome.inference.predictor import load
from microtome.training import loop, store
from microtome.training import run as run_module
from microtome.training.checkpoint import load_checkpoint
from microtome.training.folder import RunFolder, environment, read_plan
from microtome.training.rehearsal import make_plan
from microtome.training.run import train
from tests.folders import png, text
from tests.forked import ran
from tests.small import one_thread, small_plan, small_plan_3d
from tests.test_checkpoint import fresh

__all__ = ["one_thread"]

FILES = ("plan.yaml", "dataset.json", "environment.json", "log.jsonl", "metrics.json", "report.html")
MODEL = (
    "model/model.safetensors",
    "model/model.json",
    "model/engines/graph.onnx",
    "model/engines/graph.json",
    "checkpoints/last.safetensors",
)


class Killed(BaseException):
    """What a kill does: nothing of ours runs after it."""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5)
    return open_dataset(write_demo_data(tmp_path_factory.mktemp("data"), config).cells)


@pytest.fixture(scope="module")
def tubules(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=1)
    return open_dataset(write_demo_data(tmp_path_factory.mktemp("data"), config).tubules)


@pytest.fixture(scope="module")
def cells_run(cells: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(cells, plan_for(cells), tmp_path_factory.mktemp("runs") / "cells")


def plan_for(dataset: Dataset, **changes: Any) -> Plan:
    return small_plan(classes=dataset.legend.names, **changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_bundle(folder).weights)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []


def kill_at(step: int, event: str = "step") -> Any:
    def on_event(seen: Mapping[str, Any]) -> None:
        if seen["event"] == event and seen.get("step", seen.get("done")) == step:
            raise Killed

    return on_event


# ---- what a run leaves ----


def test_a_run_leaves_all_its_files_and_no_others(cells_run: Path, cells: Dataset) -> None:
    split = split_dataset(cells, "1/5", 3)
    validation = {f"validation/{case.name}.png" for case in split.validation} | {"validation/predictions.json"}
    assert validation > {"validation/predictions.json"}
    found = {path.relative_to(cells_run).as_posix() for path in cells_run.rglob("*") if path.is_file()}
    assert found == {*FILES, *MODEL, *validation}


def test_a_run_of_volumes_leaves_the_same(tubules: Dataset, tmp_path: Path) -> None:
    folder = train(tubules, small_plan_3d(), tmp_path / "run")
    assert all((folder / name).is_file() for name in (*FILES, *MODEL))
    assert not (folder / "cache").exists()
    names = json.loads((folder / "dataset.json").read_text())["validation"]
    for name in names:
        assert read_image(folder / "validation" / f"{name}.tif").shape_vox == (18, 24, 32)
    rows = json.loads((folder / "metrics.json").read_text())["cases"]
    assert {row["case"] for row in rows} == set(names)


def test_the_log_tells_the_run_line_by_line(cells_run: Path, cells: Dataset) -> None:
    events = lines(cells_run)
    assert [(event["event"], event["step"]) for event in events] == [
        *(("step", step) for step in (1, 2, 3)),
        ("validation", 3),
        *(("step", step) for step in (4, 5, 6)),
        ("validation", 6),
        ("end", 6),
    ]
    seconds = [event["seconds"] for event in events]
    assert seconds == sorted(seconds)
    assert events[0].keys() == {"event", "step", "loss", "learning_rate", "seconds", "samples_per_second"}
    assert {"dice", "classes", "seconds"} < events[3].keys()
    assert tuple(events[3]["classes"]) == cells.legend.names
    assert all(value is None or 0 <= value <= 1 for value in events[3]["classes"].values())
    assert {"reason", "network_share", "seconds"} < events[-1].keys()
    assert 0 < events[-1]["network_share"] < 1


def test_metrics_have_the_one_schema(cells_run: Path, cells: Dataset) -> None:
    metrics = json.loads((cells_run / "metrics.json").read_text(encoding="utf-8"))
    assert {"summary", "classes", "cases", "conventions", "versions"} <= metrics.keys()
    assert {"mean", "low", "high"} <= metrics["summary"]["dice"].keys()
    foreground = [cells.legend.names[k] for k in cells.legend.foreground]
    assert set(foreground) <= metrics["classes"].keys()
    assert {"mean", "sd", "median", "worst"} <= metrics["classes"][foreground[0]]["iou"].keys()
    assert {row["case"] for row in metrics["cases"]} == {case.name for case in split_dataset(cells, "1/5", 3).validation}


def test_the_folder_says_what_it_was_made_from(cells_run: Path, cells: Dataset) -> None:
    assert read_plan(cells_run / "plan.yaml") == plan_for(cells)
    document = json.loads((cells_run / "dataset.json").read_text(encoding="utf-8"))
    split = split_dataset(cells, "1/5", 3)
    assert document["train"] == [case.name for case in split.train]
    assert document["validation"] == [case.name for case in split.validation]
    assert document["root"] == str(cells.root)
    about = json.loads((cells_run / "environment.json").read_text(encoding="utf-8"))
    assert about["torch"] == torch.__version__
    assert about["device"] == "cpu"
    assert environment(torch.device("cpu")).keys() == about.keys()


def test_the_model_is_the_best_validation_and_predicts_what_the_folder_shows(cells_run: Path, cells: Dataset) -> None:
    bundle = load_bundle(cells_run)
    validations = [event for event in lines(cells_run) if event["event"] == "validation"]
    best = max(event["score"] for event in validations)
    assert bundle.provenance["score"] == best
    assert bundle.provenance["step"] == max(event["step"] for event in validations if event["score"] == best)
    case = split_dataset(cells, "1/5", 3).validation[0]
    shown = read_image(cells_run / "validation" / f"{case.name}.png").array[0]
    assert np.array_equal(shown, cells.legend.encode(load(cells_run, device="cpu", engine="torch")(cells.read_image(case))))


def test_the_logged_dice_is_that_of_the_scores(cells_run: Path) -> None:
    logged = [event["score"] for event in lines(cells_run) if event["event"] == "validation"]
    metrics = json.loads((cells_run / "metrics.json").read_text(encoding="utf-8"))
    # One foreground class: the mean over cases is the same number.
    assert metrics["summary"]["dice"]["mean"] == pytest.approx(max(logged), abs=1e-4)


def test_progress_is_told_as_it_happens(tubules: Dataset, tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []
    train(tubules, small_plan_3d(steps=2, validations=1), tmp_path / "run", on_event=seen.append)
    assert [event["event"] for event in seen] == ["prepared", "step", "step", "validation", "predicted", "end"]
    assert (seen[0]["done"], seen[0]["of"]) == (seen[4]["done"], seen[4]["of"]) == (1, 1)


def test_everything_may_train_and_nothing_validate(cells: Dataset, tmp_path: Path) -> None:
    folder = train(cells, plan_for(cells, fold="all"), tmp_path / "run")
    assert json.loads((folder / "dataset.json").read_text())["validation"] == []
    assert len(json.loads((folder / "dataset.json").read_text())["train"]) == 5
    assert (folder / "report.html").is_file()
    assert not (folder / "metrics.json").exists()
    # The last weights are the model.
    assert load_bundle(folder).provenance["step"] == 6


@pytest.mark.parametrize("network", [NetworkConfig(name="unet", widths=(4, 8)), NetworkConfig(name="unet_same", widths=(4, 8))])
def test_the_papers_networks_train(network: NetworkConfig, cells: Dataset, tmp_path: Path) -> None:
    folder = train(cells, plan_for(cells, network=network, steps=2, validations=1), tmp_path / "run")
    assert load_bundle(folder).plan.network == network
    assert (folder / "metrics.json").is_file()


def test_a_2d_network_trains_on_volumes(tubules: Dataset, tmp_path: Path) -> None:
    plan = small_plan(classes=tubules.legend.names, spacing_mm=(0.00204, 0.00176, 0.00176), steps=2, validations=1)
    folder = train(tubules, plan, tmp_path / "run")
    assert (folder / "metrics.json").is_file()


# ---- resuming ----


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_killed_and_resumed_gives_the_weights_of_one_that_was_not(step: int, cells: Dataset, cells_run: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", on_event=kill_at(step))
    assert (tmp_path / "run" / "model").exists() == (step > 3)
    torch.manual_seed(1)
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True)
    assert_same_weights(folder, cells_run)
    timeless = [{k: v for k, v in e.items() if k in ("event", "step", "loss", "dice")} for e in lines(folder)]
    assert timeless == [{k: v for k, v in e.items() if k in ("event", "step", "loss", "dice")} for e in lines(cells_run)]


@pytest.mark.parametrize(("step", "event"), [(6, "validation"), (1, "predicted"), (6, "end")])
def test_a_run_killed_at_its_end_is_brought_to_it(step: int, event: str, cells: Dataset, cells_run: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", on_event=kill_at(step, event))
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True)
    assert_same_weights(folder, cells_run)
    assert all((folder / name).is_file() for name in FILES)
    assert not (folder / "cache").exists()
    first, second = (json.loads((run / "metrics.json").read_text())["summary"] for run in (folder, cells_run))
    assert first == second


def test_a_kill_between_a_checkpoint_and_its_model_costs_no_best(
    cells: Dataset, cells_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(session: Any) -> None:
        if session.state.progress.step == 6:
            raise Killed
        save_model(session)

    save_model = run_module._Session._save_model
    monkeypatch.setattr(run_module._Session, "_save_model", killed)
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run")
    assert load_bundle(tmp_path / "run").provenance["step"] == 3
    monkeypatch.undo()
    # No step is left, at which it would be written again.
    monkeypatch.setattr(run_module, "train_steps", lambda *_: pytest.fail("a step was made again"))
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True)
    assert load_bundle(folder).provenance["step"] == 6
    assert_same_weights(folder, cells_run)


def test_a_best_that_the_checkpoint_has_lost_counts_until_there_is_a_better_one(cells: Dataset, cells_run: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", on_event=kill_at(1, "predicted"))
    assert load_bundle(tmp_path / "run").provenance["step"] == 6
    # The checkpoint before it, of step 3, is gone on from.
    (tmp_path / "run" / "checkpoints" / "last.safetensors").write_bytes(b"damaged")
    said: list[str] = []

    def stop(event: Mapping[str, Any]) -> None:
        said.append(str(event.get("message", "")))
        if event["event"] == "step":
            raise Killed

    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", resume=True, on_event=stop)
    assert any("the model of step 6 is not the best that the checkpoint knows" in line for line in said)
    assert load_bundle(tmp_path / "run").provenance["step"] == 6
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True)
    assert_same_weights(folder, cells_run)
    assert [event["step"] for event in lines(folder) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_process_is_killed_is_resumed(cells: Dataset, cells_run: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_text(dump_yaml(plan_for(cells)), encoding="utf-8")
    program = (
        "import os, signal, sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from microtome.data.dataset import open_dataset; from microtome.training.folder import read_plan\n"
        "from microtome.training.run import train\n"
        "kill = lambda e: os.kill(os.getpid(), signal.SIGKILL) if (e['event'], e['step']) == ('step', 5) else None\n"
        "train(open_dataset(Path(sys.argv[1])), read_plan(Path(sys.argv[2])), Path(sys.argv[3]), on_event=kill)\n"
    )
    assert ran(program, str(cells.root), str(plan_file), str(tmp_path / "run")).returncode == -signal.SIGKILL
    # A line that the kill cut in two.
    with (tmp_path / "run" / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "step": 6, "lo')
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True)
    assert_same_weights(folder, cells_run)
    assert [event["step"] for event in lines(folder) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_says_how_to_go_on(cells: Dataset, cells_run: Path, tmp_path: Path) -> None:
    def stop(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunError, match=r"step 4.*--resume"):
        train(cells, plan_for(cells), tmp_path / "run", on_event=stop)
    seen: list[int] = []
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True, on_event=lambda e: seen.append(e.get("step", 0)))
    assert seen[0] == 5
    assert_same_weights(folder, cells_run)


def test_time_goes_on_where_it_was(cells: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", on_event=kill_at(5))
    before = lines(tmp_path / "run")[3]["seconds"]
    folder = train(cells, plan_for(cells), tmp_path / "run", resume=True)
    seconds = [event["seconds"] for event in lines(folder)]
    assert seconds == sorted(seconds)
    assert seconds[-1] > before


def test_other_cases_than_the_run_began_with_are_refused(cells: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", on_event=kill_at(2))
    fewer = replace(cells, cases=cells.cases[1:])
    with pytest.raises(ConfigError, match=r"dataset\.json: expected the same cases"):
        train(fewer, plan_for(cells), tmp_path / "run", resume=True)


@pytest.mark.parametrize(("written", "read"), [({"train": "ab"}, {"train": "ab"}), (None, {}), (["ab"], {})])
def test_fingerprints_that_somebody_took_out_of_a_run_are_none(written: Any, read: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"fingerprints": written}))
    assert RunFolder(tmp_path).check_split(Split(train=(), validation=())) == read


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_damaged_list_of_cases_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json: expected .*; bring the file back, or start a new run"):
        RunFolder(tmp_path).check_split(Split(train=(), validation=()))


def test_other_pixels_under_the_same_names_are_said_when_a_run_is_resumed(tmp_path: Path) -> None:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5)
    data = open_dataset(write_demo_data(tmp_path, config).cells)
    with pytest.raises(Killed):
        train(data, plan_for(data), tmp_path / "run", on_event=kill_at(2))
    said: list[str] = []

    def note(event: Any) -> None:
        if event["event"] == "finding" and event["severity"] == "warning":
            said.append(event["message"])

    with pytest.raises(Killed):
        train(data, plan_for(data), tmp_path / "run", resume=True, on_event=lambda event: (note(event), kill_at(3)(event)))
    assert said == []
    # A label of one voxel more.
    split = split_dataset(data, plan_for(data).fold, plan_for(data).seed)
    [path] = split.validation[0].labels
    label = np.array(Pillow.open(path))
    good = path.read_bytes()
    label[0, 0] = label.max() - label[0, 0]
    Pillow.fromarray(label).save(path)
    with pytest.raises(Killed):
        train(data, plan_for(data), tmp_path / "run", resume=True, on_event=lambda event: (note(event), kill_at(4)(event)))
    [line] = said
    # Whoever reads the run, or its model, later is told as well.
    [noted] = [event for event in lines(tmp_path / "run") if event["event"] == "finding"]
    assert (noted["message"], noted["step"]) == (line, 0)
    begun = json.loads((tmp_path / "run" / "dataset.json").read_text())["fingerprints"]
    assert load_bundle(tmp_path / "run").provenance["data_changed_since"] == {"validation": begun["validation"]}
    assert line.startswith("images or labels of `validation` have changed under the same names since the run began: what it learned")
    assert line.endswith("put the files back, or train anew with another --out")
    # What it learned stays in it when the files are put back: nothing is warned of any more, and nothing forgotten.
    path.write_bytes(good)
    train(data, plan_for(data), tmp_path / "run", resume=True, on_event=note)
    assert said == [line]
    assert load_bundle(tmp_path / "run").provenance["data_changed_since"] == {"validation": begun["validation"]}
    assert line.partition(";")[0] in html.unescape((tmp_path / "run" / "report.html").read_text())


def test_files_that_were_put_back_before_a_step_was_made_with_others_leave_no_mark(tmp_path: Path) -> None:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5)
    data = open_dataset(write_demo_data(tmp_path, config).cells)
    run = train(data, plan_for(data), tmp_path / "run")
    [path] = split_dataset(data, plan_for(data).fold, plan_for(data).seed).train[0].labels
    good = path.read_bytes()
    label = np.array(Pillow.open(path))
    label[0, 0] = label.max() - label[0, 0]
    Pillow.fromarray(label).save(path)
    train(data, plan_for(data), run, resume=True)
    path.write_bytes(good)
    train(data, plan_for(data, steps=plan_for(data).steps + 1), run, resume=True)
    assert "changed_since" not in json.loads((run / "dataset.json").read_text())
    assert "data_changed_since" not in load_bundle(run).provenance


def test_other_slices_than_the_run_held_out_are_refused(tubules: Dataset, tmp_path: Path) -> None:
    plan = small_plan_3d(classes=tubules.legend.names, holdout="slices")
    with pytest.raises(Killed):
        train(tubules, plan, tmp_path / "run", on_event=kill_at(1))
    path = tmp_path / "run" / "dataset.json"
    document = json.loads(path.read_text())
    [planes] = [planes for planes in document["held_out"].values() if planes][:1]
    planes[0] = "z17"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"dataset\.json: expected the held-out slices .*z17"):
        train(tubules, plan, tmp_path / "run", resume=True)


def test_a_complete_run_that_was_given_minutes_goes_on_although_it_was_killed_at_once(
    cells_run: Path, cells: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(cells_run, folder)
    with pytest.raises(Killed):
        train(cells, plan_for(cells, minutes=10), folder, resume=True, on_event=kill_at(7))
    # The report of a run that goes on must not call it complete.
    assert "end" not in [event["event"] for event in lines(folder)]
    with pytest.raises(Killed):
        train(cells, read_plan(folder / "plan.yaml"), folder, resume=True, on_event=kill_at(8))
    assert [event["step"] for event in lines(folder) if event["event"] == "step"] == list(range(1, 9))


def test_a_complete_run_that_is_resumed_as_it_was_stays_complete(cells_run: Path, cells: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(cells_run, folder)
    train(cells, read_plan(folder / "plan.yaml"), folder, resume=True)
    assert_same_weights(folder, cells_run)
    assert [event["step"] for event in lines(folder) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    # Nothing was prepared for steps that were not made.
    assert not (folder / "cache").exists()


def test_a_run_whose_minutes_went_before_any_validation_still_gives_a_model(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    plan = plan_for(cells, minutes=10, validations=1)
    with pytest.raises(Killed):
        train(cells, plan, tmp_path / "run", on_event=kill_at(4))
    folder = train(cells, plan.model_copy(update={"minutes": 1e-4}), tmp_path / "run", resume=True)
    events = [(event["event"], event["step"]) for event in lines(folder)]
    assert events == [("step", 1), ("step", 2), ("step", 3), ("validation", 3), ("end", 3)]
    assert load_bundle(folder).provenance["step"] == 3
    assert all((folder / name).is_file() for name in FILES)


def test_the_plan_that_is_given_is_the_one_that_goes_on(cells: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(cells, plan_for(cells), tmp_path / "run", on_event=kill_at(5))
    folder = train(cells, plan_for(cells, steps=8), tmp_path / "run", resume=True)
    assert read_plan(folder / "plan.yaml").steps == lines(folder)[-1]["step"] == 8


# ---- what is refused ----


def test_a_folder_with_something_in_it_is_refused_and_left_alone(cells: Dataset, tmp_path: Path) -> None:
    text(tmp_path / "notes.txt", "mine")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        train(cells, plan_for(cells), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        train(cells, plan_for(cells), tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_nothing_cannot_be_resumed(name: str, cells: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"expected a run folder with plan\.yaml"):
        train(cells, plan_for(cells), tmp_path / name, resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_dataset_without_annotation_is_refused(tmp_path: Path) -> None:
    text(tmp_path / "microtome.yaml", "classes: {ground: 0, cell: 1}\nnot_annotated: 255\n")
    for name in "ab":
        png(tmp_path / "images" / f"{name}.png", np.zeros((8, 8)))
        png(tmp_path / "labels" / f"{name}.png", np.full((8, 8), 255))
    with pytest.raises(DataError, match="expected annotated voxels to learn from, got none"):
        train(open_dataset(tmp_path), small_plan(classes=("ground", "cell")), tmp_path / "run")


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = run_module.save_checkpoint
    calls: list[Path] = []

    def full(path: Path, state: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            monkeypatch.setattr(os, "fsync", no_space)
        save(path, state)

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    with pytest.raises(RunError, match=r"last\.safetensors: expected room for \d+ bytes, got No space left on device after \d+ bytes"):
        train(cells, plan_for(cells), tmp_path / "run")
    state = fresh(plan_for(cells))
    load_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors", state)
    assert state.progress.step == 3
    assert load(tmp_path / "run", device="cpu").bundle.provenance["step"] == 3
    assert not list((tmp_path / "run").rglob(".part-*"))


def test_a_log_that_cannot_be_written_is_an_error_in_words(cells: Dataset, tmp_path: Path) -> None:
    def obstruct(event: Mapping[str, Any]) -> None:
        if event["step"] == 2:
            (tmp_path / "run" / "log.jsonl").unlink()
            (tmp_path / "run" / "log.jsonl").mkdir()

    with pytest.raises(RunError, match=r"log\.jsonl: expected a log that can be written"):
        train(cells, plan_for(cells), tmp_path / "run", on_event=obstruct)


# ---- planning and training by minutes ----


def test_a_plan_by_minutes_times_real_steps(cells: Dataset) -> None:
    plan = make_plan(cells, minutes=0.1, seed=3, device="cpu", memory_gb=2)
    assert (plan.minutes, plan.seed) == (0.1, 3)
    assert "a step on this machine" in plan.reasons["steps"]
    assert plan.steps >= 1


def test_a_run_by_minutes_ends_with_them(cells: Dataset, tmp_path: Path) -> None:
    folder = train(cells, plan_for(cells, minutes=0.05, steps=20, validations=3), tmp_path / "run")
    events = lines(folder)
    assert events[-1]["reason"] == "the minutes are over"
    assert [event for event in events if event["event"] == "schedule"]
    # Three seconds, and what a busy machine adds to the last prediction.
    assert events[-1]["seconds"] < 9


def test_more_validation_cases_than_the_minutes_allow_leave_three_quarters_to_training(cells: Dataset, tmp_path: Path) -> None:
    session = run_module._Session(cells, plan_for(cells, minutes=10), tmp_path, "cpu", lambda event: None)
    assert session.seconds_left() == pytest.approx(600 * 0.94, abs=2)
    session.state.progress.case_seconds = 2.0
    assert len(session.split.validation) == 1
    assert session.seconds_left() == pytest.approx(600 - 1.5 * 2 - 12, abs=2)
    session.state.progress.case_seconds = 900.0
    assert session.seconds_left() == pytest.approx(450, abs=2)
    # What is kept back is also what the end may take.
    assert session._seconds_for_end() == pytest.approx(600 - 12, abs=2)
    session.seconds_before = 500.0
    assert session._seconds_for_end() == pytest.approx(150 - 12, abs=2)


def test_a_run_that_could_not_score_all_cases_says_so(cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module._Session, "_seconds_for_end", lambda session: 0.0)
    folder = train(cells, plan_for(cells, fold="1/2", steps=2, validations=1), tmp_path / "run")
    count = len(json.loads((folder / "dataset.json").read_text())["validation"])
    assert count > 1
    said = f"1 of {count} cases, as the minutes allowed"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["conventions"]["validation_subset"] == lines(folder)[-1]["validation_subset"] == said
    assert said in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_by_steps_scores_all_however_long_it_takes(cells: Dataset, tmp_path: Path) -> None:
    session = run_module._Session(cells, plan_for(cells), tmp_path, "cpu", lambda event: None)
    session.seconds_before = 1e9
    assert (session.seconds_left(), session._seconds_for_end()) == (None, float("inf"))


def test_minutes_that_preparing_takes_are_refused_and_what_was_prepared_is_kept(
    cells: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, took = time.perf_counter, [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: clock() + took[0]))
    store_cases = run_module.store_cases

    def slow(*arguments: Any) -> Any:
        took[0] = 58.0
        return store_cases(*arguments)

    monkeypatch.setattr(run_module, "store_cases", slow)
    expected = r"expected at least 5% of 1 minutes left to train in, got 0 s, as preparing 4 cases took 0\.97 minutes; .*--resume"
    with pytest.raises(RunError, match=expected):
        train(cells, plan_for(cells, minutes=1), tmp_path / "run")
    monkeypatch.setattr(store, "prepare", lambda *arguments: pytest.fail("a case was prepared again"))
    with pytest.raises(Killed):
        train(cells, plan_for(cells, minutes=10), tmp_path / "run", resume=True, on_event=kill_at(1))


def test_dimensions_that_a_recipe_has_not_are_refused_by_its_name(cells: Dataset) -> None:
    with pytest.raises(ConfigError, match="dims: expected 2 for the recipe unet2015, got 3"):
        make_plan(cells, steps=1, recipe="unet2015", dims=3)


def test_a_plan_of_exactly_so_many_steps(cells: Dataset) -> None:
    plan = make_plan(cells, steps=17, device="cpu", memory_gb=2)
    assert (plan.steps, plan.minutes, plan.reasons["steps"]) == (17, None, "as asked")


def test_a_run_on_real_volumes(data_folder: Any, tmp_path: Path) -> None:
    dataset = open_dataset(data_folder("hippocampus"))
    few = replace(dataset, cases=dataset.labelled[:3])
    plan = small_plan_3d(classes=few.legend.names, spacing_mm=(1.0, 1.0, 1.0), steps=2, validations=1)
    folder = train(few, plan, tmp_path / "run")
    names = json.loads((folder / "dataset.json").read_text())["validation"]
    written = read_image(folder / "validation" / f"{names[0]}.nii.gz")
    source = few.read_image(next(case for case in few.cases if case.name == names[0]))
    assert np.array_equal(written.affine, source.affine)
    assert written.shape_vox == source.shape_vox


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_vox": (30, 32)}, "patch_vox: expected 28 or 32 along axis 0 for modern_unet, got 30"),
        ({"classes": ("a", "b", "c")}, "expected the classes background, foreground, got a plan for a, b, c"),
        ({"batch": 10**7}, "plan: expected at most the"),
        ({"channels": 3}, "expected 3 channels as in the plan, got 1"),
        ({"spacing_mm": (1.0, 1.0, 1.0)}, "expected 3 axes as in the plan, got images with [2] axes"),
    ],
)
def test_a_plan_for_other_data_is_refused_before_anything_is_written(
    change: dict[str, Any], words: str, cells: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(cells, plan_for(cells).model_copy(update=change), tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_copy_that_validates_under_another_name_is_said_and_noted(cells: Dataset, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(cells.root, root)
    for part in ("images", "masks"):
        shutil.copyfile(root / part / "cells_01.png", root / part / "other.png")
    text(root / "microtome.yaml", "validation: [other]\n")
    events: list[Mapping[str, Any]] = []
    copied = open_dataset(root)
    folder = train(copied, plan_for(copied, steps=1, validations=1), tmp_path / "run", on_event=events.append)
    (said,) = [event["message"] for event in events if event["event"] == "finding"]
    assert "cells_01.png trains and other.png validates, and they are the same file" in said
    noted = json.loads((folder / "dataset.json").read_text())["findings"]
    assert [finding["message"] for finding in noted if finding["code"] == "leak"] == [said]
