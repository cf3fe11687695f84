"""Where the wall time of a run goes, and whether somebody asked it to stop."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C or SIGTERM came; the step then ends and the state is saved.

    A second Ctrl-C leaves at once, as Python does by itself. Only the main thread can listen to signals; one that is
    handled by a program around this one, outside of Python, is left to it: its handler could not be put back.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def on_signal(number: int, _: object) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler)

    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, on_signal) for number in ours}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
