"""Several networks on the same data: each trained in a process of its own, one table, one page of the same cases."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from microtome.config import Plan, parse_config
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.split import Split, split_dataset
from microtome.errors import ConfigError, MicrotomeError
from microtome.evaluation.comparison import Comparison, Outcome, compare_runs
from microtome.evaluation.comparison_page import comparison_html, draw_strips, format_asked
from microtome.evaluation.curves import format_duration, read_history
from microtome.evaluation.run_files import CompareForm, read_file
from microtome.files import write_json, write_text
from microtome.inference.devices import pick_device
from microtome.models.registry import build, find
from microtome.models.trace import trace
from microtome.training.clock import ASKING, handled_by, leave
from microtome.training.folder import environment
from microtome.training.rehearsal import only_pictures
from microtome.yaml_files import load_yaml

# What a training says of itself goes to the terminal, as ever.
TRAINING = "from microtome.cli import main; from microtome.compare import tell; tell(main)"
# Linux counts in KiB, macOS in bytes.
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared, and how.

    Attributes:
        networks: names that `microtome networks` lists.
        minutes: wall time of each training; None: `steps` are given.
        steps: of each training; None: `minutes` are given.
        fold: "K/N"; None: as `train` has it without one.
        seed: of everything random, in each training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: no network, one that is given twice or does not exist; no or two lengths of the trainings; a fold
            in which nothing validates.
    """

    networks: tuple[str, ...]
    minutes: float | None = None
    steps: int | None = None
    fold: str | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in self.networks:
            find(name)
        twice = sorted({name for name in self.networks if self.networks.count(name) > 1})
        if twice or not self.networks:
            got = f"{', '.join(twice)} twice" if twice else "none"
            raise ConfigError("--networks", expected="names of networks, each once", got=got, do="see `microtome networks`", code="C044")
        if (self.minutes is None) == (self.steps is None):
            got = "none" if self.minutes is None else f"{self.minutes:g} minutes and {self.steps} steps"
            raise ConfigError("compare", expected="either --minutes or --steps", got=got, do="give one of the two", code="C003")
        if self.fold == "all":
            raise ConfigError("--fold", expected="K/N", got=f"`{self.fold}`", do="leave cases to be scored on", code="C014")

    @property
    def words(self) -> tuple[str, ...]:
        """The options of a new training, without its network."""
        length = ("--minutes", f"{self.minutes:g}") if self.steps is None else ("--steps", str(self.steps))
        fold = ("--fold", self.fold) if self.fold else ()
        return (*length, *fold, "--seed", str(self.seed))


def parse_names(text: str) -> tuple[str, ...]:
    """The names in `unet,unet_same`."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def compare(data: Path, out: Path, request: Request, *, resume: bool = False, say: Callable[[str], None] = lambda line: None) -> Comparison:
    """Train each network into OUT/NAME and write OUT/compare.json, anew after each of them, and OUT/compare.html.

    Args:
        data: folder with images and masks.
        out: must be new or empty, unless `resume`.
        request: what is compared.
        resume: leave finished trainings as they are, go on with the others; data, length, fold and seed must be as
            before, and networks may be added.
        say: takes a line for the terminal when a training begins and ends.

    Raises:
        ConfigError: `out` holds something else, or a comparison that was asked for in other words; the data have no such
            fold, or nothing to be scored on; pictures, of which a network cannot learn.
        DataError: the data cannot be read.
        KeyboardInterrupt: somebody stopped it; what is finished stays, and the training that was stopped saved itself.
    """
    work = _Comparing(data, out, request, resume, say)
    work.train_all()
    return work.finish()


class _Comparing:
    """One call's work on a folder of runs."""

    def __init__(self, data: Path, out: Path, request: Request, resume: bool, say: Callable[[str], None]) -> None:
        self.data, self.out, self.request, self.say = data, out, request, say
        self.device = pick_device(request.device)
        self.asked = {**asdict(request), "data": str(data.resolve()), "networks": list(request.networks)}
        self.peaks = self._peaks_before(resume)
        self.dataset, self.split = _open(data, request)
        self.outcomes: list[Outcome] = []

    def train_all(self) -> None:
        """Each network that is not finished, one after the other: side by side they would slow each other down."""
        finished = [name for name in self.request.networks if is_finished(self.out / name)]
        count, each = len(self.request.networks) - len(finished), format_asked(self.asked)
        if self.request.minutes is None:
            self.say(f"{count} to train, {each} each")
        else:
            self.say(f"{count} to train, {each} each: about {format_duration(60 * self.request.minutes * count)} in all")
        self._write()
        for number, name in enumerate(self.request.networks, start=1):
            if name not in finished:
                self.say("")
                self.say(f"{number}/{len(self.request.networks)} {name}: training for {each}")
                self._train(name)
            else:
                self.outcomes.append(self._outcome(name))
            self._write()
            self.say(self._ended(name))

    def finish(self) -> Comparison:
        """The page of all networks."""
        comparison = self._compared()
        strips = draw_strips(comparison, self.outcomes, self.dataset, self.split)
        page = comparison_html(comparison, strips, self.dataset.legend, self.asked, environment(self.device))
        write_text(self.out / "compare.html", page)
        return comparison

    def _peaks_before(self, resume: bool) -> dict[str, int]:
        """Peak memory of trainings of a call before, bytes.

        Raises:
            ConfigError: the folder is not what it must be.
        """
        record = self.out / "compare.json"
        if not resume:
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                do = "give another --out, or --resume to go on"
                raise ConfigError(self.out, expected="a new or empty folder", got="one with files in it", do=do, code="C005")
            return {}
        if not record.is_file():
            raise ConfigError(
                self.out, expected="a folder with compare.json", got="none", do="check --out, or leave out --resume", code="C006"
            )
        asked, peaks = asked_before(record)
        missing = [name for name in asked["networks"] if name not in self.request.networks]
        for name in ("data", "minutes", "steps", "fold", "seed"):
            if (value := asked[name]) != self.asked[name]:
                do = "give the same, or another --out"
                raise ConfigError("--resume", expected=f"{name} {value} as before", got=f"{self.asked[name]}", do=do, code="C007")
        if missing:
            do = "add them, or give another --out"
            raise ConfigError(
                "--resume", expected="the networks of before, and maybe others", got=f"no {', '.join(missing)}", do=do, code="C007"
            )
        return peaks

    def _train(self, name: str) -> None:
        """One training; what it needed and how it ended become an outcome.

        Raises:
            KeyboardInterrupt: somebody asked to stop; SystemExit where it was not by Ctrl-C.
        """
        folder = self.out / name
        words = ["--resume"] if (folder / "plan.yaml").is_file() else ["--network", name, *self.request.words]
        ended = run_alone(["train", str(self.data), "--out", str(folder), *words, "--device", self.request.device])
        self.peaks[name] = max(ended.peak_bytes, self.peaks.get(name, 0))
        self.outcomes.append(self._outcome(name, ended.failure))
        if ended.stopped:
            self._write()
            leave(ended.stopped, None)

    def _outcome(self, name: str, failure: str = "") -> Outcome:
        """What is known of a network whose training ended."""
        folder = self.out / name
        parameters, multiply_adds = measure(folder / "plan.yaml") if (folder / "plan.yaml").is_file() else (None, None)
        return Outcome(
            network=name,
            folder=folder,
            failure=failure,
            peak_bytes=self.peaks.get(name),
            parameters=parameters,
            multiply_adds=multiply_adds,
        )

    def _compared(self) -> Comparison:
        """All networks so far."""
        return compare_runs(self.outcomes, {case.name: case.group for case in self.split.validation})

    def _write(self) -> None:
        """Write compare.json: a call that is ended at any time leaves what the next one needs."""
        made = {"asked": self.asked, **self._compared().to_json(), "environment": environment(self.device)}
        write_json(self.out / "compare.json", made)

    def _ended(self, name: str) -> str:
        """The line about a training that ended."""
        row = next(row for row in self._compared().rows if row.network == name)
        if row.failure:
            return f"{name} failed: {row.failure}"
        score = "no score" if row.dice is None else f"Dice {row.dice.mean:.3f}"
        return f"{name}: {score}, {row.steps:,} step{'' if row.steps == 1 else 's'}" + (
            "" if row.seconds is None else f" in {format_duration(row.seconds)}"
        )


def asked_before(record: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What a `compare.json` says was asked for, and the peak memory of each network's training, bytes.

    Raises:
        DataError: it is damaged, or not what `compare` writes.
    """
    found = read_file(record, CompareForm, "give another --out")
    assert found is not None, "it is there"
    return found["asked"], {row["network"]: row["peak_bytes"] for row in found["rows"] if row["peak_bytes"]}


def _open(data: Path, request: Request) -> tuple[Dataset, Split]:
    """The data, and which of them every training learns from.

    Raises:
        ConfigError: nothing would be scored, the fold is not one of these data, or a network cannot learn of them.
    """
    dataset = open_dataset(data)
    solid = [name for name in request.networks if 2 not in find(name).dims]
    if solid and only_pictures(dataset):
        raise ConfigError(
            "--networks", expected="networks that take 2D pictures", got=", ".join(solid), do="leave out those that do not", code="C043"
        )
    if request.fold is not None and (dataset.config.validation or dataset.config.validation_sections):
        expected = "no fold beside `validation` in microtome.yaml"
        raise ConfigError("--fold", expected=expected, got=request.fold, do="remove one of the two", code="C003")
    return dataset, split_dataset(dataset, request.fold or "1/5", request.seed)


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    return read_history(folder / "log.jsonl").end is not None


def measure(plan_yaml: Path) -> tuple[int | None, int | None]:
    """Parameters of a plan's network and multiply-adds of one of its patches; None where it cannot be built."""
    plan = parse_config(Plan, load_yaml(plan_yaml), plan_yaml)
    try:
        with torch.device("meta"):
            network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
        found = trace(network, (plan.channels, *plan.patch_vox))
    except MicrotomeError:
        # The training said already what is wrong with the plan.
        return None, None
    return found.parameters, found.multiply_adds


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        failure: in words; empty where there was none.
        peak_bytes: the most memory that its process held at once.
        stopped: the signal by which this process was asked to stop meanwhile; 0: it was not.
    """

    failure: str
    peak_bytes: int
    stopped: int


def run_alone(words: Sequence[str]) -> Ended:
    """Run `microtome WORDS` in a process of its own, so that its memory is its own and its crash is not ours.

    Requests to stop, while it runs, are handed to it, so that it ends its step and saves.
    """
    with _handing_on_signals() as (begun, stopped):
        command = [sys.executable, "-P", "-c", TRAINING, *words]
        # A group of its own: Ctrl-C in a terminal reaches a whole group, and a second one ends a training before it has saved.
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0) as process:
            begun(process.pid)
            said = process.stdout.read() if process.stdout else b""
            # Popen's own wait would throw the memory of a process that was killed away.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = code = os.waitstatus_to_exitcode(status)
    told = _told(said)
    failure = told.get("failure", "") or f"exit code {code}"
    if code < 0:
        failure = f"ended by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    # Of one that was killed there is only the kernel's number, which on Linux is never below the peak of the process that started it.
    peak = told.get("peak_bytes", usage.ru_maxrss * MAXRSS_BYTES)
    return Ended(failure=failure if code else "", peak_bytes=peak, stopped=stopped())


def tell(command: Callable[[], None]) -> None:
    """The other side of `run_alone`: runs the command and writes what ended it, and its peak memory, to standard output."""
    sys.argv[0] = "microtome"
    try:
        command()
    finally:
        end = sys.exc_info()[1]
        # The command line turns an error for people into an exit code, which keeps the error as its context.
        error = end.__context__ if isinstance(end, SystemExit) else end
        words = error.line if isinstance(error, MicrotomeError) else f"{type(error).__name__}: {error}"
        told = {"failure": " ".join(words.split()) if error else "", "peak_bytes": peak_bytes()}
        sys.stdout.write(f"\n{json.dumps(told)}\n")


def _told(said: bytes) -> dict[str, Any]:
    """What `tell` wrote; empty where the process was gone before."""
    try:
        return dict(json.loads(said.rstrip().rpartition(b"\n")[2]))
    except ValueError:
        return {}


def peak_bytes() -> int:
    """The most memory that this process has held at once (resident set)."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii", errors="replace").splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES


@contextmanager
def _handing_on_signals() -> Iterator[tuple[Callable[[int], None], Callable[[], int]]]:
    """Hands requests to stop on to a process: a function that takes its number, and one that tells the first that came, or 0.

    Only the main thread can listen to signals.
    """
    asked: list[int] = []
    running: list[int] = []

    def send(process: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, number)

    def on_signal(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for process in running:
            send(process, number)

    def begun(process: int) -> None:
        running.append(process)
        if asked:
            send(process, asked[0])

    if threading.current_thread() is not threading.main_thread():
        yield begun, lambda: 0
        return
    with handled_by(on_signal, ASKING):
        yield begun, lambda: asked[0] if asked else 0
