"""What a process does whose store answers no more: the machine that holds it is gone, and with it whoever could say so."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from microtome.errors import RunError
from microtome.training import watch
from microtome.training.clock import handled_by, leave
from microtome.training.processes import LostError, Processes, joined
from microtome.training.watch import Watch, own_status

# Two processes, of which this one is the first; its store stops to answer, while the main thread waits in some library.
MUTE = """
import json, threading, time
from dataclasses import asdict, replace
from microtome.training import watch
class Store:
    def __init__(self): self.asked = 0
    def set(self, key, value): pass
    def wait(self, keys): pass
    def multi_get(self, keys):
        self.asked += 1
        threading.Event().wait(600 if self.asked > 3 else 0)
        # The other one lives, however long this one is halted between two looks.
        return [json.dumps(asdict(replace(watch.own_status(), beat=self.asked)))] * len(keys)
watch.SECONDS_BETWEEN_LOOKS, watch.MOST_SILENT_SECONDS, watch.MOST_SECONDS_AFTER = 0.02, 1.0, 0.1
watch.Watch(Store(), 0, 2).start()
time.sleep(600)
"""

# One that has done its part, and waits in a library for the other, which is gone.
LEFT = MUTE.replace("asked > 3", "asked < 0").replace(
    "watch.Watch(Store(), 0, 2).start()",
    """
found = watch.Watch(Store(), 0, 2)
found.start()
found.leave(None)
""",
)


class Mute:
    """A store that keeps whoever asks it waiting until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def set(self, key: str, value: str) -> None:
        assert self.released.wait(120)

    def multi_get(self, keys: list[str]) -> list[str]:
        return [json.dumps(asdict(own_status()))] * len(keys)


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mute]:
    monkeypatch.setattr(watch, "MOST_SECONDS_ASKING", 0.1)
    store = Mute()
    yield store
    store.released.set()


def last_words(program: str) -> str:
    """What a process says that ends with 1."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    return done.stderr


def test_a_store_that_answers_no_more_ends_the_process_with_one_line() -> None:
    assert last_words(MUTE) == (
        "microtome: the training: expected 2 processes until the end, got the process that holds them together (torchrun, or the one of "
        "rank 0) has not answered for 1 s; see its messages above for why, then continue with --resume [MT-R130]\n"
    )


def test_who_ends_waits_for_no_store_that_answers_no_more(mute: Mute) -> None:
    found = Watch(mute, 1, 2)
    cause = found.verdict(60)
    assert isinstance(cause, RunError)
    assert "(torchrun, or the one of rank 0) has not answered" in cause.got
    # The look that was given up still holds the lock.
    assert found.lock.locked()
    found.leave(cause)
    assert found.ended.is_set()


def test_who_is_asked_for_the_cause_is_told_of_a_fault_of_the_look_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Watch(Mute(), 1, 2)

    def broken() -> None:
        raise ValueError("no such beat")

    monkeypatch.setattr(found, "look", broken)
    with pytest.raises(ValueError, match="no such beat"):
        found.verdict(0)


def test_who_has_left_is_ended_where_the_connections_to_the_others_do_not_close() -> None:
    assert last_words(LEFT) == (
        "microtome: the training: expected 2 processes until the end, got connections to the others that do not close for 1 s; see its "
        "messages above for why, then continue with --resume [MT-R130]\n"
    )


def test_without_a_store_and_news_of_the_others_the_first_process_of_each_machine_speaks() -> None:
    for local, speaks in ((0, True), (1, False)):
        found = Watch(Mute(), 3, 4, local)
        found._lost_holder("ended")
        assert found.speaks() == speaks


def test_without_a_store_the_first_process_of_each_machine_speaks() -> None:
    here = own_status()
    found = Watch(Mute(), 2, 4)
    found.others = {0: replace(here, place="elsewhere"), 1: replace(here, place="elsewhere"), 3: here}
    assert not found.speaks()
    found._lost_holder("ended")
    assert found.speaks()
    found.others[1] = here
    assert not found.speaks()


class AskedToStop(Watch):
    """Is asked to stop while it finds out who is gone, as torchrun asks all that are left."""

    def verdict(self, seconds: float) -> RunError:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return RunError("rank 1", expected="2 processes until the end", got="process 7 ended without a word", do="", code="R130")


def test_a_process_that_is_asked_to_stop_while_it_ends_still_says_why(mute: Mute, monkeypatch: pytest.MonkeyPatch) -> None:
    mute.released.set()
    monkeypatch.setattr(Processes, "join", lambda self: setattr(self, "watch", AskedToStop(mute, 0, 2)))
    words = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with handled_by(leave, (signal.SIGTERM,)):
        with pytest.raises(RunError, match="process 7 ended"), joined("cpu", words):
            raise LostError("connection closed by peer")
        # Requests end the program again.
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
