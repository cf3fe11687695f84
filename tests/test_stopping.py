"""Requests to stop, sent to real processes: what is saved, the exit codes that a job script acts on, and how soon."""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microtome import cli
from microtome.config import dump_yaml
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import LeftAtOnceError
from microtome.training import clock
from microtome.training.clock import ASKING, leaving, stop_requests
from microtome.training.run import train
from tests.forked import Started, anew, forked
from tests.small import one_thread, small_plan
from tests.test_run import assert_same_weights, lines

__all__ = ["one_thread"]
pytestmark = pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="whoever started the tests has Ctrl-C ignored")

# The command as it is; before the named event it says so and waits to be told to go on, so that a signal comes exactly there. It says
# when a signal was heard, and takes the next one for a second request, however soon it comes.
COMMAND = """
import os, signal, sys, torch
torch.set_num_threads(1)
# Whoever started the tests may have it ignored (nohup).
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from microtome import cli
from microtome.training import clock, folder, store, validation
here = sys.argv.pop(1)
def wait(name):
    if name == here:
        # Not by a buffer, which a signal may find in the middle of this.
        os.write(1, name.encode() + b"\\n")
        sys.stdin.readline()
append, choose, score = folder.RunFolder.append, store._choose_kind, validation.Validation.score
def appended(self, event):
    append(self, event)
    wait(f"{event['event']} {event['step']}")
def chosen(*words):
    wait("preparing")
    return choose(*words)
def scored(*words):
    wait("validating")
    return score(*words)
heard = clock.Requests.on_signal
def hearing(self, number, frame):
    heard(self, number, frame)
    os.write(1, b"heard\\n")
folder.RunFolder.append, store._choose_kind, validation.Validation.score = appended, chosen, scored
clock.Requests.on_signal, clock._SAME_SECONDS = hearing, -1.0
sys.argv[0] = "microtome"
cli.main()
"""
STUCK = """
import hashlib, sys
from microtome.training.clock import leaving, stop_requests
with leaving(), stop_requests():
    print("stuck", flush=True)
    # Minutes in a library that never looks at signals.
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5)
    return open_dataset(write_demo_data(tmp_path_factory.mktemp("data"), config).cells)


@pytest.fixture(scope="module")
def plan_file(cells: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(dump_yaml(small_plan(classes=cells.legend.names)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(cells: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    return train(cells, small_plan(classes=cells.legend.names), tmp_path_factory.mktemp("unbroken") / "run")


@contextmanager
def started(program: str, *words: Any, start: Any = forked) -> Iterator[Started]:
    """A process that has said its first line."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with start(program, *map(str, words), environment=environment) as process:
        assert process.stdout.readline()
        yield process


def stopped(process: Started, *numbers: int) -> tuple[int | None, str]:
    """Exit code, and what was said, of a process to which signals are sent while it waits."""
    for number in numbers:
        process.send_signal(number)
    return process.end("\n")


def resumed(cells: Dataset, plan_file: Path, run: Path) -> Path:
    from microtome.training.folder import read_plan

    return train(cells, read_plan(plan_file), run, resume=True)


@pytest.mark.parametrize(("number", "start"), [(signal.SIGINT, forked), (signal.SIGTERM, anew)])
def test_a_request_ends_the_step_saves_exits_with_75_and_resume_gives_the_unbroken_run(
    number: int, start: Any, cells: Dataset, plan_file: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started(COMMAND, "step 4", "train", cells.root, "--plan", plan_file, "--out", run, "--device", "cpu", start=start) as process:
        code, said = stopped(process, number)
    assert code == 75
    assert said.splitlines()[-1].endswith("step 4: expected 6 steps, got a request to stop; continue with --resume [MT-R004]")
    assert lines(run)[-1]["step"] == 4
    assert not (run / ".lock").exists()
    assert_same_weights(resumed(cells, plan_file, run), unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_ctrl_c_or_sigterm_leaves_at_once_and_resume_gives_the_unbroken_run(
    number: int, code: int, cells: Dataset, plan_file: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started(COMMAND, "step 5", "train", cells.root, "--plan", plan_file, "--out", run, "--device", "cpu") as process:
        # It waits in the middle of a step until it is told to go on, which it never is.
        process.send_signal(number)
        assert process.stdout.readline() == "heard\n"
        process.send_signal(number)
        ended, said = process.end()
    assert ended == code
    assert said.endswith("microtome: stopped; give the same command again; add --resume if the folder of --out exists\n")
    assert "Traceback" not in said
    assert_same_weights(resumed(cells, plan_file, run), unbroken)


def test_a_request_that_comes_by_two_ways_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SAME_SECONDS", math.inf)
    with stop_requests() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stopped()


def test_of_two_requests_only_ctrl_c_and_sigterm_insist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SAME_SECONDS", -1.0)
    with stop_requests() as stopped:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGHUP)
        assert stopped()
        # The first of its kind says the same in another word.
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(LeftAtOnceError) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143


def test_two_different_requests_during_a_validation_are_one_and_it_is_ended(
    cells: Dataset, plan_file: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started(COMMAND, "validating", "train", cells.root, "--plan", plan_file, "--out", run, "--device", "cpu") as process:
        # The first of two validations, after step 3. So does SLURM ask: a warning, then the end.
        code, said = stopped(process, signal.SIGUSR1, signal.SIGTERM)
    assert code == 75
    assert said.splitlines()[-1].endswith("step 3: expected 6 steps, got a request to stop; continue with --resume [MT-R004]")
    assert [event["step"] for event in lines(run) if event["event"] == "validation"] == [3]
    assert_same_weights(resumed(cells, plan_file, run), unbroken)


def test_requests_of_two_kinds_minutes_apart_are_one_and_two_of_a_kind_insist(monkeypatch: pytest.MonkeyPatch) -> None:
    # As SLURM sends them.
    insists, seconds = clock.Insistence(), iter([0.0, 120.0, 120.4, 121.0])
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert [insists(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)] == [False] * 3 + [True]


def test_a_request_while_images_are_prepared_is_heard_then_and_the_run_goes_on(
    cells: Dataset, plan_file: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started(COMMAND, "preparing", "train", cells.root, "--plan", plan_file, "--out", run, "--device", "cpu") as process:
        code, said = stopped(process, signal.SIGHUP)
    assert (code, (run / "log.jsonl").exists()) == (75, False)
    assert "step 0: expected 6 steps, got a request to stop; continue with --resume [MT-R004]" in said
    assert_same_weights(resumed(cells, plan_file, run), unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_asked_twice_while_deep_in_a_library_is_gone_in_seconds(number: int) -> None:
    with started(STUCK) as process:
        end = time.monotonic() + 120
        # The kernel keeps one signal of a kind, and what comes right after the first is the same request.
        while process.poll() is None:
            assert time.monotonic() < end, "it does not end"
            process.send_signal(number)
            process.wait(0.05)
        assert process.poll() == 128 + number
        assert "left at once; what was saved is good" in process.stderr.read()


@pytest.mark.parametrize(
    ("number", "code", "command"),
    [(signal.SIGTERM, 75, "train"), (signal.SIGHUP, 75, "compare"), (signal.SIGUSR1, 75, "predict"), (signal.SIGINT, 130, "predict")],
)
def test_a_request_beside_any_training_is_one_line_and_a_code(
    number: int, code: int, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["microtome", command, "cells"])
    before = [signal.getsignal(asking) for asking in ASKING]
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    resumed = "; add --resume if the folder of --out exists" if command != "predict" else ""
    assert capsys.readouterr().err == f"microtome: stopped; give the same command again{resumed}\n"
    assert [signal.getsignal(asking) for asking in ASKING] == before


def test_a_program_that_ends_leaves_nothing_that_listens() -> None:
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with leaving():
        pass
    after = signal.set_wakeup_fd(before)
    assert after == before


def test_memory_that_ends_anywhere_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ended() -> None:
        raise MemoryError("Unable to allocate 9.31 TiB for an array")

    monkeypatch.setattr(cli, "app", ended)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("microtome: memory: expected as much as was asked for, got Unable to allocate 9.31 TiB for an array; close")
    assert said.endswith("[MT-R124]\n")
