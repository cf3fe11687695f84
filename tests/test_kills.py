"""Trainings killed at any instant, on a disk that is full or broken at any call, resumed, and in the end the same."""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microtome.bundle import load_bundle
from microtome.training.checkpoint import _read
from microtome.training.folder import RunFolder
from tests import kills
from tests.faults import ERRORS
from tests.forks import End, Kill, Nursery
from tests.kills import ALWAYS, Setup, Tally

Known = dict[str, tuple[dict[str, Any], End]]


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Setup]:
    return kills.setups(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def nursery(setups: tuple[Setup, Setup]) -> Iterator[Nursery]:
    with Nursery(*(setup.order(setup.folder / f"first-{setup.name}").words for setup in setups)) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def known(setups: tuple[Setup, Setup], nursery: Nursery) -> Known:
    """What runs leave that nobody disturbs."""
    return {setup.name: kills.unbroken(nursery, setup) for setup in setups}


@pytest.fixture(scope="module")
def calls(setups: tuple[Setup, Setup], nursery: Nursery) -> list[tuple[str, str, str]]:
    """Every call of the flat one that changes something on the disk."""
    return kills.calls_of(nursery, setups[0])


def seeded() -> random.Random:
    """Of instants, other ones each time; the seed is for whoever reads of a failure."""
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201 - shown by pytest
    return random.Random(seed)


@pytest.mark.parametrize("dims", [0, 1], ids=["2D", "3D"])
def test_a_training_killed_six_times_and_resumed_leaves_what_an_unbroken_one_leaves(
    dims: int, setups: tuple[Setup, Setup], nursery: Nursery, known: Known
) -> None:
    tally, rng, setup = Tally(), seeded(), setups[dims]
    while tally.tried < 6:
        kills.kill_again_and_again(nursery, setup, known[setup.name], 6 - tally.tried, rng, tally)
    assert tally.wrong == []


def test_the_same_seed_gives_the_same_weights_and_log_in_two_processes(setups: tuple[Setup, Setup], known: Known) -> None:
    # The first ones are of a process that trained one after the other, the others each of one that was forked from it.
    for setup in setups:
        assert kills.differences(setup.folder / f"first-{setup.name}", known[setup.name][0]) == []


def test_a_training_goes_on_with_another_number_of_threads(setups: tuple[Setup, Setup], nursery: Nursery, known: Known) -> None:
    flat, _ = setups
    run = flat.folder / "threads"
    kill = Kill(stage="validation", number=2, seconds=0.0)
    assert nursery.run(flat.order(run, kill=kill)).was_killed
    assert nursery.run(flat.order(run, threads=2)).code == 0
    found, wanted = kills.content_of(run), known["2D"][0]
    # Sums in another order are others in their last digits; everything is there all the same.
    assert [(event["event"], event["step"]) for event in found["log"]] == [(event["event"], event["step"]) for event in wanted["log"]]
    assert found["files"] == wanted["files"]
    for event, other in zip(found["log"], wanted["log"], strict=True):
        assert event.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-3)


def test_no_file_of_a_run_comes_about_but_by_calls_that_are_counted(calls: list[tuple[str, str, str]], known: Known) -> None:
    made = {path for name, path, _ in calls if name == "open"} | {other for name, _, other in calls if name == "replace"}
    assert set(known["2D"][0]["files"]) - made == set()
    written = {path for name, path, _ in calls if name in ("write", "pwrite")}
    moved = {path for name, path, _ in calls if name == "replace" and "previous" not in path}
    assert moved - written == set()


def test_what_is_renamed_is_on_the_disk_before_and_its_name_right_after(calls: list[tuple[str, str, str]]) -> None:
    renames = [(number, path, other) for number, (name, path, other) in enumerate(calls) if name == "replace"]
    assert len(renames) > 15
    for number, path, other in renames:
        before = [name for name, at, _ in calls[:number] if at == path and name in ("write", "fsync", "link")]
        assert before[-1] == "fsync", (path, before)
        assert calls[number + 1][:2] == ("fsync", os.path.dirname(other) or "."), other


def test_the_log_is_on_the_disk_before_the_checkpoint_that_tells_of_it(calls: list[tuple[str, str, str]]) -> None:
    saves = [number for number, (name, _, other) in enumerate(calls) if (name, other) == ("replace", "checkpoints/last.safetensors")]
    assert len(saves) == 4
    for number in saves:
        assert [name for name, at, _ in calls[:number] if at == "log.jsonl"][-1] == "fsync"


def test_a_kill_in_the_middle_of_a_write_and_a_disk_that_is_full_or_broken_cost_nothing(
    setups: tuple[Setup, Setup], nursery: Nursery, known: Known, calls: list[tuple[str, str, str]]
) -> None:
    tally, rng = Tally(), seeded()
    # Of the saves: the start and the end have their turn in `make soak`.
    saves = [fault for fault in kills.faults_at(calls, ("half", *ERRORS)) if calls[fault[0] - 1][1].startswith(("checkpoints", "model/."))]
    for kind in ("half", *ERRORS):
        fault = rng.choice([each for each in saves if each[1] == kind])
        kills.survive(nursery, setups[0], known["2D"][0], fault, tally)
    assert tally.wrong == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount a file system here, so that none can be made full")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full_says_what_is_missing_and_the_run_goes_on_when_there_is_room(
    setups: tuple[Setup, Setup], nursery: Nursery, known: Known, small_disk: Path
) -> None:
    flat, _ = setups
    run = small_disk / "run"
    ended = nursery.run(flat.order(run, patches=ALWAYS))
    said = run.with_suffix(".txt").read_text(encoding="utf-8")
    assert ended.code == 1, said
    assert kills.one_line(run) == []
    last = said.rstrip().rsplit("\n", 1)[-1]
    assert "MT-R102" in last
    assert " bytes" in last
    assert kills.broken(run) == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert nursery.run(flat.order(run, patches=ALWAYS)).code == 0
    assert kills.differences(run, known["2D"][0]) == []


def test_a_difference_of_one_bit_is_seen(setups: tuple[Setup, Setup], known: Known, tmp_path: Path) -> None:
    flat, _ = setups
    run, wanted = tmp_path / "run", known["2D"][0]
    shutil.copytree(flat.folder / "unbroken-2D", run)
    assert kills.differences(run, wanted) == []
    (run / ".part-1-00000000-a").touch()
    assert [line.partition(":")[0] for line in kills.differences(run, wanted)] == ["files"]
    (run / ".part-1-00000000-a").unlink()
    log = run / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 3', '"step": 2', 1))
    assert "log" in [line.partition(":")[0] for line in kills.differences(run, wanted)]
    path = RunFolder(run).checkpoint
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="damaged"):
        kills.broken(run)
    assert json.loads((run / "model" / "model.json").read_text())["provenance"]["step"] == load_bundle(run).provenance["step"]
    assert _read(flat.folder / "unbroken-2D" / "checkpoints" / "last.safetensors")[1]["progress"]["step"] == 4
