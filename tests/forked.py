"""Processes forked from one that has everything imported, as a new Python takes four seconds of a processor to import torch.

with forked(PROGRAM, "train", folder) as process:
    process.send_signal(signal.SIGTERM)
    code, said = process.end("\n")

Each test process has one that it forks from, which is started with the first fork. It computes nothing itself, so that it has no threads.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from subprocess import PIPE
from typing import IO, Any
from unittest import mock

import psutil

FORKS = multiprocessing.get_context("forkserver")
# Imported once, and not by each that is forked. One list for all tests: there is one such process, and whoever asks first starts it.
_READERS = ("chunked", "dicom", "hdf5", "itk", "npy", "nifti_parts", "tiff_parts")
FORKS.set_forkserver_preload(
    [
        # What readers import late, and of torch what the first step of an optimiser imports, which takes seconds.
        *("highdicom", "imagecodecs", "pydicom.pixels.utils", "torch._dynamo"),
        *(f"microtome.images.{name}" for name in _READERS),
        "distributed",
        "microtome.cli",
        "microtome.inference.storing",
        "microtome.inference.torch_engine",
        "microtome.models.registry",
        "microtome.training.run",
        "tests.fuzz_documents",
        "tests.fuzz_images",
        "tests.fuzz_stores",
    ]
)
# Nothing here takes longer, however busy the machine is.
MOST_SECONDS = 240.0


class Started:
    """A process that runs a program, with its pipes.

    Attributes:
        stdin, stdout, stderr: of text, ours.
    """

    def __init__(self, process: BaseProcess | subprocess.Popen[str], pipes: tuple[IO[str], IO[str], IO[str]]) -> None:
        self._process = process
        self.stdin, self.stdout, self.stderr = pipes

    def poll(self) -> int | None:
        """The code that it ended with, negative for a signal; None while it runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def send_signal(self, number: int) -> None:
        # As of `subprocess`: none for a process that has ended, whose number may be another's.
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def wait(self, seconds: float = MOST_SECONDS) -> int | None:
        """The code that it ended with; None if it still runs after so many seconds."""
        if isinstance(self._process, BaseProcess):
            self._process.join(seconds)
        else:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        return self.poll()

    def end(self, words: str = "") -> tuple[int | None, str]:
        """Give it a last line, if it is one, and wait for its end; its code, and what it said of errors."""
        self.stdin.write(words)
        self.stdin.flush()
        said = self.stderr.read()
        return self.wait(), said


@contextmanager
def forked_workers() -> Iterator[None]:
    """Workers that Dask starts meanwhile are forks too, with the variables of this process."""
    import dask
    from distributed import utils

    settings = {"worker.multiprocessing-method": "forkserver", "nanny.environ": dict(os.environ)}
    # Dask would have a list of its own of what is imported first.
    with (
        mock.patch.object(utils, "_forkserver_preload_set", True),
        dask.config.set({f"distributed.{key}": value for key, value in settings.items()}),
    ):
        yield


def forks() -> list[psutil.Process]:
    """All that were forked for this process, and live."""
    number = forkserver._forkserver._forkserver_pid
    return psutil.Process(number).children() if number else []


def ran(program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """The end of such a process that nobody disturbs, and the little that it said."""
    with forked(program, *words, environment={**os.environ, "CUDA_VISIBLE_DEVICES": ""}) as process:
        out = process.stdout.read()
        code, errors = process.end()
    assert code is not None, errors
    return subprocess.CompletedProcess(words, code, out, errors)


@contextmanager
def anew(program: str, *words: str, environment: Mapping[str, str]) -> Iterator[Started]:
    """The same without a fork, for what is to be seen once of a process as people start it."""
    command = [sys.executable, "-W", "ignore", "-c", program, *words]
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield Started(process, (process.stdin, process.stdout, process.stderr))
        finally:
            process.kill()


@contextmanager
def forked(program: str, *words: str, environment: Mapping[str, str]) -> Iterator[Started]:
    """A process that runs `python -W ignore -c program words`, but for its start; it is killed if it does not end by itself.

    Args:
        program: what it runs.
        words: its `sys.argv[1:]`.
        environment: all of its variables; what torch reads of them as it is imported is read before.
    """
    ends = [FORKS.Pipe(duplex=False) for _ in range(3)]
    theirs = [ends[0][0], ends[1][1], ends[2][1]]
    process = FORKS.Process(target=_run, args=(program, words, dict(environment), theirs))
    process.start()
    for end in theirs:
        end.close()
    with os.fdopen(_taken(ends[0][1]), "w") as given, os.fdopen(_taken(ends[1][0])) as out, os.fdopen(_taken(ends[2][0])) as errors:
        try:
            yield Started(process, (given, out, errors))
        finally:
            process.kill()
            process.join()


def _taken(end: Connection) -> int:
    """The descriptor of a pipe's end, which is ours from now on."""
    number = os.dup(end.fileno())
    end.close()
    return number


def _run(program: str, words: tuple[str, ...], environment: dict[str, str], ends: list[Any]) -> None:
    """What the child does."""
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115 - as long as it lives
    os.environ.clear()
    os.environ.update(environment)
    # As Python sets it for a program of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    sys.argv = ["-c", *words]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
