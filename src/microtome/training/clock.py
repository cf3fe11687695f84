"""Where the wall time of a run goes, and whether somebody asked it to stop."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from microtome.errors import LeftAtOnceError, StoppedError

# Ctrl-C; what job schedulers and machines that shut down send; a terminal that was closed; SLURM's `--signal=USR1@60`.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Of these a second one means it: a closed terminal may send several, and schedulers repeat a warning.
INSISTING = (signal.SIGINT, signal.SIGTERM)
# One request may come by two ways: `timeout` signals a process and its group, SLURM a torchrun, which hands it on, and its processes.
_SAME_SECONDS = 0.5
# A program that was asked twice and is deep in a library has so long to end by itself.
_PATIENCE_SECONDS = 1.0


class Clock:
    """Where wall time goes."""

    def __init__(self) -> None:
        self.start = self.last = self.last_save = time.perf_counter()
        self.network_seconds = 0.0
        self.step_seconds: list[float] = []

    @contextmanager
    def network(self) -> Iterator[None]:
        """Counts its body as forward + backward + optimiser step."""
        begin = time.perf_counter()
        yield
        self.network_seconds += time.perf_counter() - begin

    def steps_done(self, count: int = 1) -> float:
        """Seconds that each of the steps took that ended since this, or `since_step`, was last asked."""
        now = time.perf_counter()
        seconds = (now - self.last) / count
        self.step_seconds += [seconds] * count
        self.last = now
        return seconds

    def since_step(self) -> float:
        """Seconds of what came after a step, which are then not counted to the next one."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def seconds_a_step(self) -> float:
        """Mean of the latest steps: what the next ones will take if the machine stays as busy as it is."""
        latest = self.step_seconds[-50:]
        return sum(latest) / len(latest)

    def saved(self) -> None:
        """A checkpoint was written now."""
        self.last_save = time.perf_counter()

    def since_save(self) -> float:
        """Seconds since the last checkpoint."""
        return time.perf_counter() - self.last_save


class Insistence:
    """Tells somebody who asks a second time to stop from one request that came by two ways, or in two words.

    A scheduler warns by one signal and ends by another (SLURM: SIGUSR1, then SIGTERM before SIGKILL): both ask for the same.
    """

    def __init__(self) -> None:
        self.asked: dict[int, float] = {}

    def __call__(self, number: int) -> bool:
        """Take a signal; whether it is the same request a second time, which is meant."""
        now = time.monotonic()
        if number not in self.asked:
            self.asked[number] = now
            return False
        return number in INSISTING and now - self.asked[number] > _SAME_SECONDS


class Requests:
    """Whether somebody asked to stop; the first request is noted, one that insists leaves at once."""

    def __init__(self) -> None:
        self.number, self.insists = 0, Insistence()

    def __call__(self) -> bool:
        """Whether a request came."""
        return self.number != 0

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Take a request.

        Raises:
            KeyboardInterrupt: a second Ctrl-C.
            LeftAtOnceError: a second SIGTERM, with the exit code 143.
        """
        if self.insists(number):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise LeftAtOnceError(128 + number)
        self.number = self.number or number


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 came; who asks it ends what it does and saves.

    A second Ctrl-C, or a second SIGTERM, leaves at once, unless it comes within half a second of the first: that is one request by two
    ways. One after another signal is the first of its kind.
    Within another one of this process, what that one heard counts. Only the main thread can listen to signals; one that is handled by a
    program around this one, outside of Python, is left to it: its handler could not be put back. SIGHUP stays ignored under `nohup`, and
    SIGUSR1 with whoever listens to it already.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    outer = [found for number in ASKING if isinstance(found := getattr(signal.getsignal(number), "__self__", None), Requests)]
    if outer:
        yield outer[0]
        return
    with handled_by(requests.on_signal, ASKING):
        yield requests


def stopped_at(step: int, steps: int) -> StoppedError:
    """What to say of a run that was asked to stop and has saved itself."""
    return StoppedError(f"step {step}", expected=f"{steps} steps", got="a request to stop", do="continue with --resume", code="R004")


def leave(number: int, _: FrameType | None) -> None:
    """A handler that leaves: whatever is under way is given up, and what was being written is removed.

    Raises:
        KeyboardInterrupt: for Ctrl-C, as Python has it.
        SystemExit: else, with the exit code that shells give a process which the signal ended; the command line makes that of a
            StoppedError of it.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextmanager
def leaving() -> Iterator[None]:
    """For a whole program: requests to stop end it in good order, and a second one in a second at most.

    Python answers a signal when its main thread is between two steps of its own. That thread may be in a library for long, or wait
    for another: a thread that only listens then ends the process, as a kill would, which every file of ours survives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, written = socket.socketpair()
    written.setblocking(False)
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    threading.Thread(target=_leave_when_insisted, args=(heard, ended), name="leaving", daemon=True).start()
    try:
        with handled_by(leave, ASKING[1:]):
            yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        written.close()


def _leave_when_insisted(heard: socket.socket, ended: threading.Event) -> None:
    """Count requests; end the process some time after the second, unless `ended` says that it is over."""
    insists, number = Insistence(), 0
    with heard:
        # Each byte is the number of a signal; none is left when the other side is closed.
        while said := heard.recv(1):
            number = said[0]
            if insists(number):
                break
        else:
            return
    if not ended.wait(_PATIENCE_SECONDS):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nmicrotome: left at once; what was saved is good\n")
        os._exit(128 + number)


@contextmanager
def ending_anyway() -> Iterator[None]:
    """Inside of it SIGTERM changes nothing: the process ends as it is, and has to say why. A second one still ends it, by `leaving`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled_by(lambda *_: None, (signal.SIGTERM,)):
        yield


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Inside of it these signals go to a handler, but for those that belong to somebody else."""
    ours = [number for number in numbers if is_free(number)]
    before = {number: signal.signal(number, handler) for number in ours}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def is_free(number: signal.Signals) -> bool:
    """Whether a signal may be taken."""
    found = signal.getsignal(number)
    if number == signal.SIGHUP:
        return found not in (None, signal.SIG_IGN)
    return found in (signal.SIG_DFL, leave) if number == signal.SIGUSR1 else found is not None
