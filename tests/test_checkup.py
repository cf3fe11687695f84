"""The self-test of `microtome doctor`: once in small from end to end, and what it says of things that are broken."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome import cli
from microtome.data.synthetic import DemoConfig
from microtome.doctor import checkup
from microtome.doctor import facts as facts_module
from microtome.doctor.checkup import Size, _Road, run_checkup
from microtome.doctor.findings import Check, Result
from microtome.doctor.probe import Probed
from microtome.errors import ConfigError, StoppedError
from microtome.inference.openvino_engine import OpenVinoEngine
from microtome.inference.torch_engine import TorchEngine
from microtome.machine import processor_has_bf16
from tests.small import one_thread

assert one_thread
SMALL = Size(data=DemoConfig(volume_vox=(24, 32, 32), picture_vox=(64, 64), pictures=5), steps_2d=8, steps_3d=6, int8=False)


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    """A folder in which the whole road was gone, and what came of it."""
    folder = tmp_path_factory.mktemp("checkup")
    before = os.environ.get("OMP_NUM_THREADS")
    # The run that is killed computes in a process of its own: on as many threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    yield folder, run_checkup(folder, SMALL)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def of(result: Result, what: str) -> Check:
    [found] = [check for check in result.checks if check.what == what]
    return found


def road_on(folder: Path) -> _Road:
    """A road on which data and trainings are done."""
    road = _Road(folder, SMALL)
    road.make_data()
    return road


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["microtome", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.slow
def test_the_whole_road_works_here(tested: tuple[Path, Result]) -> None:
    folder, result = tested
    assert [check for check in result.checks if check.level == "bad"] == []
    expected = {"torch", "openvino", "onnxruntime"}
    assert expected <= set(result.tile_seconds)
    for name in ("openvino", "onnxruntime"):
        assert "labels as torch" in of(result, name).finding
        assert {path.suffix for path in (folder / "predictions" / name / "cells").iterdir()} >= {".png"}
    assert of(result, "train 2D").finding.startswith("loss ")
    assert of(result, "kill, resume").finding == "killed at step 7 of 8, resumed: the same weights as without the kill, bit for bit"
    assert "Dice of cells 0." in of(result, "evaluate").finding
    assert (folder / "scores" / "tubules.html").exists()
    assert (of(result, "torch-bf16").level == "good") <= processor_has_bf16()


def test_nothing_is_left_in_the_users_cache(tested: tuple[Path, Result]) -> None:
    assert list(Path(os.environ["MICROTOME_CACHE"]).rglob("*")) == []
    assert tested[1].checks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: -logits, "% equal labels, probabilities off by"),
        (lambda logits: logits / 0, "0 % equal labels"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_engine_that_answers_wrongly_is_told_with_what_to_do(
    change: Any, said: str, tested: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = OpenVinoEngine.__call__
    monkeypatch.setattr(OpenVinoEngine, "__call__", lambda self, image_CS: change(plain(self, image_CS)))
    road = road_on(tested[0])
    check = road.check("openvino", (), partial(road.predict, "openvino"))
    assert check.level == "bad"
    assert said in check.finding
    assert check.do == "pip install --force-reinstall openvino, or predict with --engine torch"


def test_an_engine_whose_library_raises_is_told_and_stops_no_other(tested: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: OpenVinoEngine, path: Path, name: str, precision: str) -> None:
        raise AttributeError("module openvino has no attribute\nCore")

    monkeypatch.setattr(OpenVinoEngine, "__init__", broken)
    road = road_on(tested[0])
    check = road.check("openvino", (), partial(road.predict, "openvino"))
    assert (check.level, check.finding) == ("bad", "AttributeError: module openvino has no attribute Core")
    assert road.check("onnxruntime", ("torch",), partial(road.predict, "onnxruntime")).level == "good"


def test_torch_that_no_longer_answers_as_after_training_is_told(tested: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TorchEngine.__call__
    monkeypatch.setattr(TorchEngine, "__call__", lambda self, image_CS: plain(self, image_CS) + np.float32([0, 9])[:, None, None])
    road = road_on(tested[0])
    check = road.check("torch", (), partial(road.predict, "torch"))
    assert check.level == "bad"
    assert "needed: 99.9 % and 0.001" in check.finding
    after = road.check("evaluate", ("torch",), road.evaluate)
    assert after == Check("evaluate", "not tried, as `torch` failed", "", "note")


def test_rounding_that_a_small_network_does_not_bear_is_no_fault_and_nonsense_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    road = _Road(tmp_path, SMALL)
    golden = np.zeros((1, 100, 10), np.float32)
    logits = np.stack([np.ones((100, 10)), np.zeros((100, 10))]).astype(np.float32)
    bundle: Any = type("Bundle", (), {"samples": type("Samples", (), {"golden_CS": golden, "logits_KS": logits})})

    def turned(voxels: int) -> Any:
        """An engine that gives so many of 1000 voxels the other label."""
        found = logits.copy()
        found.reshape(2, -1)[0, :voxels] = -1
        return lambda image_CS: found

    def compared(name: str, wrong: int) -> Check:
        return road.check(name, (), lambda: str(road._agreement(turned(wrong), bundle, name)))

    for wrong, level in ((20, "note"), (40, "bad")):
        check = compared("torch-bf16", wrong)
        assert check.level == level
        assert f"{100 - wrong / 10:g} % equal labels" in check.finding
    assert compared("onnxruntime", 20).level == "bad"


def test_an_engine_whose_package_is_hidden_is_not_tried_and_the_line_to_install_it_is_told(
    tested: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnxruntime", "nncf"):
        monkeypatch.setitem(sys.modules, module, None)
    road = road_on(tested[0])
    found = [road.check(name, (), partial(road.predict, name)) for name in ("onnxruntime", "openvino-int8")]
    assert [check.level for check in found] == ["note", "note"]
    assert [check.finding for check in found] == ["not tried, as onnxruntime is not installed", "not tried, as nncf is not installed"]
    assert [check.do for check in found] == ['pip install "microtome[fast]"', 'pip install "microtome[int8]"']


def test_a_part_that_fails_stops_only_what_needs_it(tmp_path: Path) -> None:
    def fail() -> str:
        raise ConfigError("x", expected="a", got="b", do="do c", code="C001")

    road = _Road(tmp_path, SMALL)
    first = road.check("train 2D", (), fail)
    assert (first.finding, first.do, first.level) == ("x: expected a, got b; do c [MT-C001]", "do c", "bad")
    assert road.check("report", ("train 2D",), fail).finding == "not tried, as `train 2D` failed"
    assert road.check("resume", ("report",), fail).finding == "not tried, as `report` failed"
    assert road.check("evaluate", ("train 3D",), lambda: "well").level == "good"


def test_ctrl_c_in_a_training_ends_the_whole(tmp_path: Path) -> None:
    def stopped() -> str:
        raise StoppedError("step 2", expected="30 steps", got="a request to stop", do="go on", code="R004")

    with pytest.raises(KeyboardInterrupt):
        _Road(tmp_path, SMALL).check("train 2D", (), stopped)


def test_a_failure_makes_the_exit_code_1_and_leaves_no_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    def broken(folder: Path, size: Size, on_part: Any) -> Result:
        (folder / "data").mkdir(parents=True)
        seen.append(folder)
        on_part("openvino", 0, 1)
        return Result(checks=[Check("openvino", "50 % equal labels", "pip install --force-reinstall openvino", "bad")])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(facts_module, "probe", lambda modules: Probed())
    monkeypatch.setattr(checkup, "run_checkup", broken)
    assert run(monkeypatch, "doctor") == 1
    shown = capsys.readouterr()
    assert "✗  openvino" in shown.out
    assert shown.out.splitlines()[-1] == "Something does not work here: openvino; do what the lines marked so say."
    assert shown.err.endswith("self-test 1/1: openvino\n")
    assert not seen[0].exists()
    assert run(monkeypatch, "doctor", "--out", tmp_path / "kept") == 1
    assert (tmp_path / "kept" / "data").exists()


def test_ctrl_c_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Path] = []

    def stopped(folder: Path, size: Size, on_part: Any) -> Result:
        (folder / "data").mkdir(parents=True)
        seen.append(folder)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(facts_module, "probe", lambda modules: Probed())
    monkeypatch.setattr(checkup, "run_checkup", stopped)
    assert run(monkeypatch, "doctor") == 130
    assert not seen[0].exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_the_self_test_as_users_run_it_works_here(tmp_path: Path) -> None:
    assert [check for check in run_checkup(tmp_path / "new", Size()).checks if check.level == "bad"] == []
