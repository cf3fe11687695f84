"""A process that has everything imported, and forks: `microtome` without its seconds of start, and kills that are exact.

with Nursery(folder) as nursery:
    end = nursery.run(Order(words=("train", ...), log=folder / "said.txt", kill=Kill(stage="save", number=2, seconds=0.01)))
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

REPOSITORY = Path(__file__).parents[1]
# Where a training is, in the order in which it goes through these; each is one of the functions that `staged` names.
STAGES = ("opening", "preparing", "training", "validation", "save", "scores", "completion", "report", "closing")
# Nothing here takes longer, however busy the machine is.
MOST_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL so many seconds after a stage was entered for the n-th time."""

    stage: str = STAGES[0]
    number: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """One run of the command line, in a process of its own.

    Attributes:
        words: what is typed after `microtome`.
        log: takes what it says.
        kill: when it is killed; None: never.
        fault: for `faults.Faults`; None: none.
        threads: of torch's.
        patches: module attributes that have other values there, "package.module:NAME" -> value.
    """

    words: tuple[str, ...]
    log: str
    kill: Kill | None = None
    fault: Mapping[str, Any] | None = None
    threads: int = 1
    patches: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class End:
    """How it ended.

    Attributes:
        code: of the exit; negative: the signal that ended it.
        stages: those that it entered, each with its seconds.
    """

    code: int
    stages: list[tuple[str, float]]

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Nursery:
    """Runs orders in forks of one process; what is `warm` is run there first, by itself, so that what it loads is there for all."""

    def __init__(self, *warm: tuple[str, ...]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        words = [sys.executable, "-m", "tests.forks", json.dumps(warm)]
        self.process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, order: Order) -> End:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(order)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that forks ended with {self.process.wait()}"
        found = json.loads(answer)
        return End(code=found["code"], stages=[(name, seconds) for name, seconds in found["stages"]])

    def close(self) -> None:
        # Its standard input ends, and so does it.
        self.process.communicate(timeout=MOST_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# What follows runs in that process.


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for warm in json.loads(sys.argv[1]):
        assert command(warm) == 0, warm
    # A thread that Python has waited for is gone from the kernel's list a little later, on a busy machine much later.
    end = time.monotonic() + MOST_SECONDS
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has only the thread that made it: of others it would lack what they hold"
    for line in sys.stdin:
        answers.write(json.dumps(carried_out(json.loads(line))) + "\n")
        answers.flush()


def command(words: list[str]) -> int:
    """The command line, with these words; its exit code."""
    from microtome.cli import main as microtome

    sys.argv = ["microtome", *words]
    try:
        microtome()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def carried_out(order: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait for the end or for the instant of the kill, and tell."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        _child(order, tells)
    os.close(tells)
    try:
        return _watched(child, told, order["kill"])
    finally:
        os.close(told)


def _watched(child: int, told: int, kill: Mapping[str, Any] | None) -> dict[str, Any]:
    entered: list[tuple[str, float]] = []
    ends, instant, over = os.pidfd_open(child), None, time.monotonic() + MOST_SECONDS
    speaking = [told]
    while True:
        wait = min(over, instant if instant is not None else over) - time.monotonic()
        ready = select.select([*speaking, ends], [], [], max(0.0, wait))[0]
        if told in ready:
            numbers = os.read(told, 64)
            # The pipe ends with the child.
            speaking = [told] if numbers else []
            # Each stage is one byte.
            for number in numbers:
                entered.append((STAGES[number], time.monotonic()))
                count = sum(name == STAGES[number] for name, _ in entered)
                if kill and (STAGES[number], count) == (kill["stage"], kill["number"]):
                    instant = entered[-1][1] + kill["seconds"]
        elif ends in ready:
            break
        if time.monotonic() >= min(over, instant if instant is not None else over):
            os.kill(child, signal.SIGKILL)
            instant, over = None, over + MOST_SECONDS
    os.close(ends)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    times = [begun for _, begun in entered] + [time.monotonic()]
    return {"code": code, "stages": [(name, after - at) for (name, at), after in zip(entered, times[1:], strict=True)]}


def _child(order: dict[str, Any], tells: int) -> None:
    """One order; never returns."""
    code = 70
    try:
        import torch

        from tests.faults import Faults

        said = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(order["threads"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(staged(tells))
            for name, value in order["patches"].items():
                stack.enter_context(mock.patch(name.replace(":", "."), value))
            if order["fault"]:
                stack.enter_context(Faults(**order["fault"]))
            code = command(order["words"])
    except BaseException:  # noqa: BLE001 - whatever it is, it is shown, and the process ends here
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def staged(tells: int) -> Iterator[None]:
    """Inside of it a training tells, by a byte to a pipe, which of the `STAGES` it enters."""
    from microtome.training import run, validation

    now = ["opening"]

    def enter(stage: str) -> None:
        now[0] = stage
        os.write(tells, bytes([STAGES.index(stage)]))

    def telling(stage: str, call: Any, then: str = "") -> Any:
        def called(*arguments: Any, **words: Any) -> Any:
            before = now[0]
            enter(stage)
            result = call(*arguments, **words)
            enter(then or before)
            return result

        return called

    places: tuple[tuple[Any, str, str, str], ...] = (
        (run, "store_cases", "preparing", ""),
        (run, "train_steps", "training", ""),
        (validation.Validation, "score", "validation", ""),
        (run._Session, "save", "save", ""),
        (validation.Validation, "score_all", "scores", ""),
        (run, "complete_model", "completion", ""),
        (run, "build_report", "report", "closing"),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, stage, then in places:
            stack.enter_context(mock.patch.object(owner, name, telling(stage, getattr(owner, name), then)))
        enter("opening")
        yield


if __name__ == "__main__":
    main()
