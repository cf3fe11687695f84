"""Whether the processes that train together all still run, and what ended one that does not.

Each writes a line about itself into the store that started them, twice a second, and reads those of the others:

    {"host": "node1", "place": "5f3c.../pid:[4026531836]", "process": 71, "began": 8112, "beat": 52, "left": null}

Of a process of this machine the kernel is asked as well. One that was killed is so found in a second, one whose machine is gone in a
minute, whatever the library that adds up gradients waits for, which is half an hour and says neither who nor why.

A store whose machine is gone answers nothing, and who asked it waits: a second thread counts for how long, and nobody waits for it in the
main one but for a while.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from microtome.errors import ConfigError, DataError, MicrotomeError, RunError, StoppedError
from microtome.lock import boot, process_began

SECONDS_BETWEEN_LOOKS = 0.5
# A machine that is so busy that it does not say a word for so long is taken for lost.
MOST_SILENT_SECONDS = 60.0
# From when a process is found to have ended until this one ends too, by force if it is waiting for the other somewhere in a library.
MOST_SECONDS_AFTER = 10.0
# Whoever ends has so long to tell the others, and to ask them.
MOST_SECONDS_ASKING = 10.0
# The rank of whoever holds the store, if that is none of the processes.
_HOLDER = -1
LOST = "R130"
_KINDS = MappingProxyType({kind.__name__: kind for kind in (RunError, DataError, ConfigError, StoppedError)})


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a process says of itself.

    Attributes:
        host: name of the machine.
        place: kernel and process table; numbers of processes mean the same in the same place.
        process: its number.
        began: when it started, in ticks since the kernel did.
        beat: grows as long as it lives.
        left: None while it works; why it ended: empty if well, else an error in its parts.
    """

    host: str
    place: str
    process: int
    began: int
    beat: int = 0
    left: dict[str, str] | None = None

    @property
    def words(self) -> str:
        """Which process, and where."""
        return f"process {self.process} on {self.host}"

    def is_dead(self, place: str) -> bool:
        """Whether it is known to have ended, to somebody at a place."""
        return self.place == place and process_began(self.process) != self.began


def own_status() -> Status:
    """That of this process."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    host, process = socket.gethostname(), os.getpid()
    return Status(host=host, place=f"{boot() or host}/{numbers}", process=process, began=process_began(process) or 0)


def parts_of(error: MicrotomeError) -> dict[str, str]:
    """An error as another process can be told of it."""
    return {"kind": type(error).__name__, **{name: getattr(error, name) for name in ("where", "expected", "got", "do", "code")}}


def error_of(parts: dict[str, str], rank: int) -> MicrotomeError:
    """The error that ended a process; it names that, unless it names another that ended before."""
    words = dict(parts)
    kind = _KINDS.get(words.pop("kind"), RunError)
    where = words.pop("where")
    error = kind(where, **words)
    return error if error.code == LOST else error.on(f"rank {rank}")


@dataclass
class Fallen:
    """The processes that ended before their time.

    Attributes:
        errors: by rank, what ended it.
        silent: those that could not say it themselves.
        since: when the first was found.
    """

    errors: dict[int, MicrotomeError] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    since: float = 0.0

    def add(self, rank: int, error: MicrotomeError, *, silent: bool) -> None:
        """Note one, once."""
        self.since = self.since or time.monotonic()
        self.errors.setdefault(rank, error)
        if silent:
            self.silent.add(rank)

    def cause(self) -> MicrotomeError | None:
        """What ended the first of them: an error of its own, else silence, else the news of another."""
        order = sorted(self.errors, key=lambda rank: (self.errors[rank].code == LOST, rank not in self.silent, rank))
        return self.errors[order[0]] if order else None


class Watch:
    """Tells the others that this process lives, and looks after them, in a thread of its own.

    Args:
        store: of which nobody else uses this connection.
        rank: of this process.
        count: how many there are.
        local: the number of this process on its machine.
    """

    def __init__(self, store: Any, rank: int, count: int, local: int = 0) -> None:
        self.store, self.rank, self.count, self.local = store, rank, count, local
        self.status, self.others = own_status(), dict[int, Status]()
        self.heard: dict[int, tuple[int, float]] = {}
        self.fallen, self.lock = Fallen(), threading.Lock()
        # That this process has told that it ends; that it waits for the others no more.
        self.ended, self.closed = threading.Event(), threading.Event()

    def start(self) -> None:
        """Say that this process is here, and begin to look once all are.

        Raises:
            RuntimeError: some did not come in the time that the store has.
        """
        self._tell()
        self.store.wait([self._key(rank) for rank in range(self.count)])
        threading.Thread(target=self._guard, name="guard", daemon=True).start()
        self.look()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def missing(self) -> list[int]:
        """The ranks that have not come yet."""
        return [rank for rank in range(self.count) if not self.store.check([self._key(rank)])]

    def beside(self) -> int:
        """How many processes, with this one, are on this machine."""
        return 1 + sum(status.place == self.status.place for status in self.others.values())

    def look(self) -> None:
        """Tell that this process lives, and see who else does."""
        with self.lock:
            if self.status.left is not None:
                return
            self.status = replace(self.status, beat=self.status.beat + 1)
            try:
                self._tell()
                self._read()
                suspects = [rank for rank, status in self.others.items() if status.left is None and status.is_dead(self.status.place)]
                if suspects:
                    # What it said last may have come in between.
                    self._read()
            except RuntimeError:
                # torchrun holds the store; without it the first process does.
                self._lost_holder("ended")
                return
            for rank, status in self.others.items():
                self._judge(rank, status)

    def _lost_holder(self, how: str) -> None:
        """Note that the store is gone."""
        got = f"the process that holds them together (torchrun, or the one of rank 0) {how}"
        self.fallen.add(_HOLDER, _lost("the training", self.count, got), silent=True)

    def _judge(self, rank: int, status: Status) -> None:
        """Note a process that ended before its time."""
        now = time.monotonic()
        beat, since = self.heard.get(rank, (-1, now))
        self.heard[rank] = (status.beat, now if status.beat != beat else since)
        if status.left:
            self.fallen.add(rank, error_of(status.left, rank), silent=False)
        elif status.left is None and status.is_dead(self.status.place):
            got = f"{status.words} ended without a word (killed, or memory ran out)"
            self.fallen.add(rank, _lost(f"rank {rank}", self.count, got), silent=True)
        elif status.left is None and now - self.heard[rank][1] > MOST_SILENT_SECONDS:
            got = f"{status.words} has not been heard of for {MOST_SILENT_SECONDS:.0f} s"
            self.fallen.add(rank, _lost(f"rank {rank}", self.count, got), silent=True)

    def verdict(self, seconds: float) -> MicrotomeError | None:
        """What ended another process, if one did; waits so long for news."""
        end = time.monotonic() + seconds
        while True:
            if not _done(self.look):
                self._lost_holder(f"has not answered for {MOST_SECONDS_ASKING:.0f} s")
            cause = self.fallen.cause()
            if cause is not None or time.monotonic() > end:
                return cause
            self.ended.wait(0.1)

    def speaks(self) -> bool:
        """Whether it is on this process to tell people what happened: all before it ended without a word.

        Without a store nobody knows that of those on other machines: the first of each machine then speaks.
        """
        alone = _HOLDER in self.fallen.silent
        if alone and not self.others:
            # It was gone before it had told where the others are.
            return self.local == 0
        here = {rank for rank, status in self.others.items() if status.place == self.status.place}
        return all(rank in self.fallen.silent or (alone and rank not in here) for rank in range(self.rank))

    def leave(self, error: MicrotomeError | None) -> None:
        """Tell the others that this process ends, and why if before its time, if they can be told.

        From then on it looks after nobody, but is itself still guarded: what it closes next may wait for a process that is gone.
        """
        self.ended.set()
        _done(lambda: self._say_left(error))

    def close(self) -> None:
        """Guard this process no more: it waits for nobody."""
        self.closed.set()

    def _say_left(self, error: MicrotomeError | None) -> None:
        """Write that this process ends."""
        with self.lock:
            if self.status.left is None:
                self.status = replace(self.status, left=parts_of(error) if error else {})
                try:
                    self._tell()
                except RuntimeError:
                    # Nobody is left to be told.
                    return

    def wait_for_first(self, seconds: float) -> None:
        """Until the first process has ended, at most so long: a launcher ends all others as soon as one of them fails."""
        end = time.monotonic() + seconds
        first = self.others.get(0)
        while first is not None and time.monotonic() < end and not first.is_dead(self.status.place):
            time.sleep(0.05)

    def _run(self) -> None:
        """Look now and then."""
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS):
            self.look()

    def _guard(self) -> None:
        """See that the looks go on; end this process where another ended and it does not by itself.

        Counted in waits of its own, not by a clock: of a process that was itself halted for long both threads stood still.
        """
        beat, waits = -1, 0
        while not self.closed.wait(SECONDS_BETWEEN_LOOKS):
            waits, beat = (waits + 1 if beat == self.status.beat else 0), self.status.beat
            if waits * SECONDS_BETWEEN_LOOKS > MOST_SILENT_SECONDS and not self.ended.is_set():
                self._lost_holder(f"has not answered for {MOST_SILENT_SECONDS:.0f} s")
            elif waits * SECONDS_BETWEEN_LOOKS > MOST_SILENT_SECONDS:
                got = f"connections to the others that do not close for {MOST_SILENT_SECONDS:.0f} s"
                self.fallen.add(_HOLDER, _lost("the training", self.count, got), silent=True)
            if self.fallen.errors and time.monotonic() - self.fallen.since > MOST_SECONDS_AFTER:
                cause = self.fallen.cause()
                if cause is not None and self.speaks():
                    sys.stderr.write(f"microtome: {cause.line}\n")
                    sys.stderr.flush()
                os._exit(cause.exit_code if cause is not None else 1)

    def _key(self, rank: int) -> str:
        """Under which a process tells of itself."""
        return f"microtome/{rank}"

    def _tell(self) -> None:
        """Write what this process says."""
        self.store.set(self._key(self.rank), json.dumps(asdict(self.status)))

    def _read(self) -> None:
        """Take what the others say."""
        ranks = [rank for rank in range(self.count) if rank != self.rank]
        said: list[Any] = self.store.multi_get([self._key(rank) for rank in ranks])
        self.others = {rank: Status(**json.loads(text)) for rank, text in zip(ranks, said, strict=True)}


def _done(work: Callable[[], None]) -> bool:
    """Do some work that may wait for a machine that is gone; whether it ended in the time that it has.

    Raises:
        BaseException: what the work raised.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised below, in the thread that asked
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MOST_SECONDS_ASKING)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def _lost(where: str, count: int, got: str) -> RunError:
    """The error for a process that is gone."""
    do = "see its messages above for why, then continue with --resume"
    return RunError(where, expected=f"{count} processes until the end", got=got, do=do, code="R130")
