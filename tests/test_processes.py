"""Two processes under torchrun: the losses of one, what one that is killed costs, who writes and who speaks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from microtome.config import Plan, dump_yaml
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import ConfigError, DataError, RunError, StoppedError
from microtome.training.clock import stopped_at
from microtome.training.folder import RunFolder
from microtome.training.processes import LostError, Place, Processes
from microtome.training.run import train
from microtome.training.watch import Fallen, Watch, error_of, parts_of
from tests.small import TINY_2D, TINY_3D, one_thread, small_plan, small_plan_3d

__all__ = ["one_thread"]

# Sums in float32 in another order differ by their last digits, 6e-8 of them; twenty steps make some of it.
TOLERANCE, STEPS_ALIKE = 1e-5, 20
# It doubles every third step or so: 1e-7 in the first ones, 6e-6 after 20, 1e-4 after 40 (docs/log.md).
GROWN = 2e-3
# A process that hangs is ended, and the test with it; a busy machine takes a minute to import torch three times.
MOST_SECONDS = 300


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    made = write_demo_data(tmp_path_factory.mktemp("data"), DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=7))
    return open_dataset(made.cells), open_dataset(made.tubules)


def plan_2d(dataset: Dataset, **changes: Any) -> Plan:
    """Without batch norm, which normalises by what one process holds; seven pictures, three of which validate."""
    values = {"network": TINY_2D.model_copy(update={"norm": "instance"}), "batch": 3, "steps": 36, "validations": 12, "fold": "1/3"}
    return small_plan(**{"classes": dataset.legend.names, **values, **changes})


class Job:
    """torchrun with two processes on a dataset."""

    def __init__(self, dataset: Dataset, folder: Path, words: list[str]) -> None:
        self.said = folder.with_suffix(f".{time.monotonic_ns()}.txt")
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "microtome", "train", str(dataset.root), "--out", str(folder), *words]
        with self.said.open("w") as file:
            self.process = subprocess.Popen(command, env=environ, stdout=file, stderr=file)

    def rank(self, number: int) -> int:
        """The process with this rank."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _field(entry, "PPid") == self.process.pid and f"RANK={number}" in _environ(entry):
                return int(entry.name)
        raise AssertionError(f"no process of rank {number}; {self.words}")

    def end(self) -> str:
        """Wait for its end; what was said."""
        try:
            self.process.wait(MOST_SECONDS)
        finally:
            self.process.terminate()
            self.process.wait()
        return self.words

    @property
    def words(self) -> str:
        return self.said.read_text(errors="replace")


def _field(entry: Path, name: str) -> int:
    try:
        lines = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
        return int(lines.get(name, "0"))
    except OSError:
        return 0


def _environ(entry: Path) -> list[str]:
    try:
        return (entry / "environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def lines(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_validation(job: Job, folder: Path) -> None:
    end = time.monotonic() + MOST_SECONDS
    while not any('"validation"' in line for line in _written(folder)):
        assert job.process.poll() is None, job.words
        assert time.monotonic() < end, job.words
        time.sleep(0.005)


def _written(folder: Path) -> list[str]:
    log = folder / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def assert_same_curve(folder: Path, alone: Path) -> None:
    """Within the tolerance in the first steps; behind them a difference has grown, as training makes of all small differences."""
    mine, other = lines(folder), lines(alone)
    steps = [(event["step"], event["loss"]) for event in mine if event["event"] == "step"]
    expected = [(event["step"], event["loss"]) for event in other if event["event"] == "step"]
    assert [step for step, _ in steps] == [step for step, _ in expected]
    losses, wanted = [loss for _, loss in steps], [loss for _, loss in expected]
    assert losses[:STEPS_ALIKE] == pytest.approx(wanted[:STEPS_ALIKE], rel=TOLERANCE)
    assert losses == pytest.approx(wanted, rel=GROWN)
    scores = [event["score"] for event in mine if event["event"] == "validation"]
    # Predictions are labels: a digit of a weight moves a pixel now and then, of some hundred in the foreground.
    assert scores == pytest.approx([event["score"] for event in other if event["event"] == "validation"], abs=0.01)


@pytest.fixture(scope="module")
def killed(datasets: tuple[Dataset, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Job, list[int]]]:
    """A run of which rank 1 is killed after a validation; the folder, the job at its end, and what its processes were."""
    cells, root = datasets[0], tmp_path_factory.mktemp("runs")
    (root / "plan.yaml").write_text(dump_yaml(plan_2d(cells)))
    job = Job(cells, root / "run", ["--plan", str(root / "plan.yaml"), "--device", "cpu"])
    try:
        wait_for_validation(job, root / "run")
        processes = [job.rank(0), job.rank(1)]
        os.kill(processes[1], signal.SIGKILL)
        job.end()
        yield root / "run", job, processes
    finally:
        job.process.terminate()
        job.process.wait()


@pytest.fixture(scope="module")
def resumed(killed: tuple[Path, Job, list[int]], datasets: tuple[Dataset, Dataset]) -> tuple[Path, str]:
    """The same run, brought to its end by two processes, and what they said."""
    assert len([event for event in lines(killed[0]) if event["event"] == "step"]) < 36, "it was killed too late"
    job = Job(datasets[0], killed[0], ["--resume", "--device", "cpu"])
    said = job.end()
    assert job.process.returncode == 0, said
    return killed[0], said


@pytest.fixture(scope="module")
def alone(datasets: tuple[Dataset, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(datasets[0], plan_2d(datasets[0]), tmp_path_factory.mktemp("alone") / "run", device="cpu")


def test_a_killed_rank_ends_the_job_with_one_line_that_names_it(killed: tuple[Path, Job, list[int]]) -> None:
    _, job, processes = killed
    assert job.process.returncode not in (0, None)
    said = [line for line in job.words.splitlines() if line.startswith("microtome: ")]
    assert len(said) == 1, job.words
    assert said[0].startswith(f"microtome: rank 1: expected 2 processes until the end, got process {processes[1]} on ")
    assert "--resume" in said[0]
    assert said[0].endswith("[MT-R130]")
    assert [number for number in processes if Path(f"/proc/{number}").exists()] == []


def test_two_processes_killed_and_resumed_have_the_losses_of_one(resumed: tuple[Path, str], alone: Path) -> None:
    assert_same_curve(resumed[0], alone)


def test_the_last_scores_are_those_of_one_process(resumed: tuple[Path, str], alone: Path) -> None:
    mine, other = (json.loads((folder / "metrics.json").read_text()) for folder in (resumed[0], alone))
    assert {row["case"] for row in mine["cases"]} == {row["case"] for row in other["cases"]}
    assert mine["summary"]["dice"]["mean"] == pytest.approx(other["summary"]["dice"]["mean"], abs=0.01)


def test_one_process_writes_and_one_speaks(resumed: tuple[Path, str], alone: Path) -> None:
    folder, said = resumed
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    assert said.count("model: ") == 1
    assert said.count("layout") + said.count("labelled images") == 1
    steps = [event["step"] for event in lines(folder) if event["event"] == "step"]
    assert steps == list(range(1, 37))


@pytest.mark.soak
def test_volumes_have_the_losses_of_one_process_too(datasets: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    tubules = datasets[1]
    plan = small_plan_3d(network=TINY_3D.model_copy(update={"norm": "instance"}), batch=5, micro_batch=4, steps=30)
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan))
    job = Job(tubules, tmp_path / "two", ["--plan", str(tmp_path / "plan.yaml"), "--device", "cpu"])
    assert job.process.wait(MOST_SECONDS) == 0, job.words
    assert_same_curve(tmp_path / "two", train(tubules, plan, tmp_path / "one", device="cpu"))


@pytest.mark.soak
def test_a_job_that_is_asked_to_stop_is_saved_at_the_same_step_and_goes_on(datasets: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    cells = datasets[0]
    plan = plan_2d(cells, steps=60, validations=3)
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan))
    job = Job(cells, tmp_path / "two", ["--plan", str(tmp_path / "plan.yaml"), "--device", "cpu"])
    wait_for_validation(job, tmp_path / "two")
    os.kill(job.process.pid, signal.SIGTERM)
    said = job.end()
    stopped = [line for line in said.splitlines() if line.startswith("microtome: ")]
    assert len(stopped) == 1, said
    assert "[MT-R004]" in stopped[0]
    assert RunFolder(tmp_path / "two").checkpoint.exists()
    # One process goes on where two were.
    assert_same_curve(train(cells, plan, tmp_path / "two", device="cpu", resume=True), train(cells, plan, tmp_path / "one", device="cpu"))


@pytest.mark.soak
def test_more_processes_than_patches_are_refused_in_one_line(datasets: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan_2d(datasets[0], batch=1)))
    job = Job(datasets[0], tmp_path / "two", ["--plan", str(tmp_path / "plan.yaml"), "--device", "cpu"])
    said = [line for line in job.end().splitlines() if line.startswith("microtome: ")]
    assert [line.partition("[")[2] for line in said] == ["MT-C050]"]


# ---- what needs no second process ----


def test_one_process_is_one_whatever_started_it() -> None:
    assert Place.of({}) is None
    assert Place.of({"RANK": "0", "WORLD_SIZE": "1"}) is None


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_place_is_what_torchrun_says() -> None:
    assert Place.of(TORCHRUN) == Place(rank=3, count=4, local=1, address="node0", port=29500, hosted=False)
    place = Place.of({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert place is not None
    assert place.hosted


@pytest.mark.parametrize(("changes", "named"), [({"RANK": None}, "not RANK"), ({"RANK": "4"}, "RANK below"), ({"MASTER_PORT": "x"}, "'x'")])
def test_half_an_environment_is_refused(changes: Mapping[str, str | None], named: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=named):
        Place.of(environ)


def test_an_error_comes_whole_from_another_process() -> None:
    error = DataError("case_07", expected="a", got="b", do="c", code="D012")
    told = error_of(json.loads(json.dumps(parts_of(error))), 2)
    assert type(told) is DataError
    assert str(told) == "case_07: expected a, got b (on rank 2); c"
    assert told.code == "D012"


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Processes]:
    """Two that have found each other, without a network between them."""
    monkeypatch.setattr(Watch, "wait_for_first", lambda self, seconds: None)
    store, found = distributed.HashStore(), []
    for rank in range(2):
        ranks = Processes(Place(rank=rank, count=2, local=rank, address="", port=1, hosted=True), "cpu")
        ranks.watch = Watch(store, rank, 2)
        ranks.watch._tell()
        found.append(ranks)
    return found


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_stop_that_reaches_one_alone_ends_the_other_with_the_same_code(asked: int, two: list[Processes]) -> None:
    # Of it the other, which waits until images are prepared, hears only that nobody is there any more.
    request = stopped_at(0, 36)
    endings = {asked: two[asked].end(request), 1 - asked: two[1 - asked].end(LostError("Connection closed by peer"))}
    assert isinstance(endings[0], StoppedError)
    assert "step 0: expected 36 steps, got a request to stop" in str(endings[0])
    assert isinstance(endings[1], SystemExit)
    assert endings[1].code == 75


def test_the_first_cause_is_told_and_not_what_followed_from_it() -> None:
    fallen = Fallen()
    fallen.add(2, RunError("rank 1", expected="a", got="b", do="c", code="R130"), silent=False)
    fallen.add(1, RunError("disk", expected="a", got="b", do="c", code="R001"), silent=False)
    cause = fallen.cause()
    assert cause is not None
    assert cause.code == "R001"
