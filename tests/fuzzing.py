"""Mutated files by the thousand, read in a process of their own: what crashes, hangs, swells or raises what a user cannot understand.

`mutated` changes bytes; a `Target` says what is read and how; `fuzz` reads so many mutants and tells what went wrong. Every
mutant follows from (seed, number), so a finding is repeated by `Target.mutant(seed, number)`.
"""

import faulthandler
import gc
import gzip
import logging
import mmap
import os
import random
import re
import resource
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

from microtome.errors import MicrotomeError
from tests.forked import FORKS

SECONDS_PER_INPUT = 10
# Of address space above that at the start, and of memory in use that one input may add where no target says another.
SPACE_BYTES, GROWTH_BYTES = 4 * 2**30, 5 * 2**28
# A process with others to serve first gets a tenth of a core that one of them wants, so that each second may take ten.
_NICE, _NICE_SECONDS = 10, 10
_MOST_FINDINGS = 8
# Memory is the process's either way; of a thread the rest of the answer is found in a tenth of the time.
_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF, 0x20, 0x2F, 0x2E, 0x0A)
_WHOLE = (0, 1, -1, 2, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**31), -(2**63))
_REAL = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e308, 1e-308, 5e-324, 3.4e38, 1e18)
_TEXTS = (
    b"0",
    b"-1",
    b"1",
    b"2147483648",
    b"9223372036854775807",
    b"99999999999999999999",
    b"1e999",
    b"nan",
    b"inf",
    b"",
    b"0.0",
    b"1e-320",
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
# What a child leaves for the case that it is ended: whether it has begun with an input, its number, and good ones that it has not told.
_NOTE = struct.Struct("<?QQ")
# How a finding begins that was raised, up to its message; a frame of a trace; and what differs from one to the next in words.
_RAISED, _FRAME = re.compile(r"raised \w+ at [^\n]*?:\d+: "), re.compile(r'File "[^"\n]*", line \d+')
_DIFFERS, _LONGEST_KIND = re.compile(r"0x[0-9a-f]+|\d+|/\S*/"), 160
# Whoever starts a process asks after the ends of all others; of two threads that do so at once one would find its code read already.
_ENDS = threading.Lock()
_Words = tuple[Sequence[bytes], Sequence[bytes]]  # a dictionary, and other seeds


def mutated(seed: bytes, rng: random.Random, dictionary: Sequence[bytes] = (), others: Sequence[bytes] = ()) -> bytes:
    """A seed with 1 to 8 changes: bits, bytes, numbers, pieces cut, doubled or brought in.

    Args:
        seed: a good input.
        rng: says which changes.
        dictionary: words of the format, which are put in at any place.
        others: more seeds, of which pieces are taken.
    """
    data = bytearray(seed)
    for _ in range(1 << rng.randrange(4)):
        rng.choice(_CHANGES)(data, rng, (dictionary, others))
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, the start more often: headers are there."""
    return int(rng.random() ** rng.choice((1, 3)) * len(data))


def _flip(data: bytearray, rng: random.Random, _: _Words) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random, _: _Words) -> None:
    if data:
        data[_place(data, rng)] = rng.choice(_BYTES) if rng.random() < 0.7 else rng.randrange(256)


def _number(data: bytearray, rng: random.Random, _: _Words) -> None:
    """An integer or float of 8 to 64 bits, in either order of bytes, mostly at a multiple of its size."""
    order = rng.choice("<>")
    if rng.random() < 0.7:
        form = rng.choice("bhiq")
        bits = 8 * struct.calcsize("=" + form)
        value = rng.choice(_WHOLE) if rng.random() < 0.8 else rng.randrange(1 << bits)
        packed = (value % (1 << bits)).to_bytes(bits // 8, "little" if order == "<" else "big")
    else:
        form = rng.choice("fd")
        value = rng.choice(_REAL)
        packed = struct.pack(order + form, value if form == "d" else max(-3.4e38, min(3.4e38, value)) if abs(value) < 1e309 else value)
    at = _place(data, rng)
    at -= at % len(packed) if rng.random() < 0.8 else 0
    data[at : at + len(packed)] = packed


def _digits(data: bytearray, rng: random.Random, _: _Words) -> None:
    """Another number where a number is written in letters."""
    found = list(_NUMBER.finditer(bytes(data[:4096])))
    if found:
        match = rng.choice(found)
        data[match.start() : match.end()] = rng.choice(_TEXTS)


def _cut(data: bytearray, rng: random.Random, _: _Words) -> None:
    del data[_place(data, rng) :]


def _remove(data: bytearray, rng: random.Random, _: _Words) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 2, 4, 8, 16, 64))]


def _repeat(data: bytearray, rng: random.Random, _: _Words) -> None:
    at, length = _place(data, rng), rng.choice((1, 2, 4, 12, 16, 64, 256))
    data[at:at] = data[at : at + length] * rng.choice((1, 1, 2, 16))


def _insert(data: bytearray, rng: random.Random, _: _Words) -> None:
    at = _place(data, rng)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8))) if rng.random() < 0.5 else bytes(rng.choice((1, 4, 16)))


def _word(data: bytearray, rng: random.Random, words: _Words) -> None:
    """A word of the format, over what is there or between."""
    if words[0]:
        at, word = _place(data, rng), rng.choice(words[0])
        data[at : at + (len(word) if rng.random() < 0.6 else 0)] = word


def _splice(data: bytearray, rng: random.Random, words: _Words) -> None:
    """The same place of another seed, or any piece of it."""
    if words[1]:
        other = rng.choice(words[1])
        at, start, length = _place(data, rng), _place(bytearray(other), rng), rng.choice((4, 16, 64, len(other)))
        start = at if rng.random() < 0.5 else start
        data[at : at + length] = other[start : start + length]


_CHANGES = (_flip, _set, _number, _number, _digits, _cut, _remove, _repeat, _insert, _word, _splice)


def png_mended(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums that their bytes deserve."""
    at, out = 8, [data[:8]]
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += [data[at : at + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        at += 12 + length
    return b"".join((*out, data[at:]))


def packed(data: bytes) -> bytes:
    """Gzip of the data, so that changes are behind the checksum."""
    return gzip.compress(data, 1, mtime=0)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is read, and how; functions are named by module, as another process calls them.

    Attributes:
        name: of the format; several targets may share one, such as the documents of a store.
        seeds: good inputs, as small as they can be.
        read: reads the path, and asserts what has to hold of what it read.
        file: where in an empty folder the input is written; a user meets this name in errors.
        given: what is read, in that folder: the file, or a folder above it.
        prepare: fills the folder with all that stays the same.
        mend: makes most inputs what a reader gets to understand: checksums, packing.
        dictionary: words of the format.
        change: for formats of which changed bytes are mostly refused at once: a change of what a seed says, for half of the inputs.
        growth_bytes: of memory that one input may add to what is in use.
        seconds: that one input may take.
        weight: how many inputs it has beside another target of the format; less where each takes many times as long.
    """

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    file: str = "case-x.dat"
    given: str = ""
    prepare: Callable[[Path], object] | None = None
    mend: Callable[[bytes], bytes] | None = None
    dictionary: tuple[bytes, ...] = ()
    change: Callable[[bytes, random.Random], bytes] | None = None
    growth_bytes: int = GROWTH_BYTES
    seconds: float = SECONDS_PER_INPUT
    weight: float = 1.0

    def mutant(self, seed: int, number: int) -> bytes:
        """The input of this number; the first ones are the seeds themselves."""
        if number < len(self.seeds):
            return self.finished(self.seeds[number], always=True)
        rng = random.Random(f"{seed} {number}")
        chosen = rng.choice(self.seeds)
        if self.change and rng.random() < 0.5:
            return self.finished(self.change(chosen, rng))
        return self.finished(mutated(chosen, rng, self.dictionary, self.seeds))

    def finished(self, data: bytes, *, always: bool = False) -> bytes:
        """The bytes that are written: mended, three times of four, as the bytes themselves decide."""
        return self.mend(data) if self.mend and (always or zlib.crc32(data) & 3) else data

    def placed(self, folder: Path) -> tuple[Path, Path]:
        """The file that inputs are written to, and the path that is read, in a new folder with all beside them."""
        file = folder / self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.prepare:
            self.prepare(folder)
        return file, folder / self.given if self.given else file


@dataclass(frozen=True)
class Finding:
    """An input that did what no input may do."""

    what: str
    number: int
    data: bytes

    @property
    def kind(self) -> str:
        """By which others of the same reason are known: what was raised, in which line of which file, and its message without numbers.

        What ended the interpreter or wanted memory has the line where it did. What took too long is met at any line.
        """
        head, _, trace = self.what.partition("\n")
        if raised := _RAISED.match(head):
            return raised[0] + _DIFFERS.sub("#", head[raised.end() :])
        frames = _FRAME.findall(trace)
        if frames and head.startswith(("ended", "wanted")):
            # A crash has its last frame first.
            return f"{head} {frames[0] if head.startswith('ended') else frames[-1]}"
        return _DIFFERS.sub("#", self.what)[:_LONGEST_KIND]

    def __str__(self) -> str:
        return (
            f"input {self.number}: {self.what}\nits {len(self.data)} bytes (gzip, hex): {gzip.compress(self.data, 9, mtime=0).hex()[:6000]}"
        )


@dataclass
class Outcome:
    """What became of the inputs of a target.

    Attributes:
        seed: which repeats them.
        first: number of the first input.
        tried, good: inputs read, and those that gave an image.
        slowest_s: the longest that one took.
    """

    name: str
    seed: int
    first: int = 0
    tried: int = 0
    good: int = 0
    slowest_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def next(self) -> int:
        """The number of the input behind those that were read."""
        return self.first + self.tried

    def check(self) -> None:
        """Fail with all that was found."""
        assert not self.findings, f"{self.name}, seed {self.seed}:\n" + "\n".join(map(str, self.findings))


def fuzz(
    target: Target,
    inputs: int,
    *,
    seconds: float = 3600.0,
    seed: int | None = None,
    first: int = 0,
    known: frozenset[str] = frozenset(),
    core: int | None = None,
    aside: bool = False,
) -> Outcome:
    """Read mutants of a target in a process of its own, which is started again where one ends it.

    Args:
        target: what is read.
        inputs: how many; fewer where the time is over.
        seconds: for all of them.
        seed: of all changes; a new one, which is printed, if none is given.
        first: number of the first of them.
        known: findings, by `Finding.kind`, that were told already.
        core: which reads them; None: any.
        aside: whether it has others to serve first: inputs then get what these leave of it, and longer.
    """
    target = replace(target, seconds=_NICE_SECONDS * target.seconds) if aside else target
    outcome = Outcome(target.name, secrets.randbits(32) if seed is None else seed, first)
    sys.stdout.write(f"{target.name}: seed {outcome.seed}\n")
    end = time.monotonic() + seconds
    with _scratch() as folder:
        while outcome.tried < inputs and time.monotonic() < end and len(outcome.findings) < _MOST_FINDINGS:
            told = known.union(finding.kind for finding in outcome.findings)
            _one_process(target, outcome, _Part(first + inputs, end, told, core, aside), folder)
    return outcome


@dataclass(frozen=True)
class _Part:
    """What a process does of a target: before which input it stops, until when, which findings it does not tell again, on which core.

    `aside`: with the time that others leave.
    """

    stop: int
    end: float
    known: frozenset[str]
    core: int | None
    aside: bool


def _one_process(target: Target, outcome: Outcome, part: _Part, folder: Path) -> None:
    """Read on from where the last process ended."""
    ours, theirs = FORKS.Pipe()
    child = FORKS.Process(target=_child, args=(target, outcome.seed, outcome.next, part, folder, theirs))
    with _ENDS:
        child.start()
    theirs.close()
    for behind, good, slowest, finding in _received(ours):
        outcome.tried, outcome.good = behind - outcome.first, outcome.good + good
        outcome.slowest_s = max(outcome.slowest_s, slowest)
        outcome.findings += [finding] if finding else []
    with _ENDS:
        child.join()
    if child.exitcode == 0:
        return
    noted, number, untold = _NOTE.unpack((folder / "number").read_bytes()) if (folder / "number").exists() else (0, 0, 0)
    number = number if noted else outcome.next
    outcome.good += untold
    how = (
        f"took longer than {target.seconds:g} s"
        if child.exitcode == -signal.SIGALRM
        else f"ended the interpreter (exit code {child.exitcode})"
    )
    trace = (folder / "trace").read_text(errors="replace")[-1500:] if (folder / "trace").exists() else ""
    finding = Finding(f"{how}\n{trace}", number, target.mutant(outcome.seed, number))
    outcome.findings += [finding] if finding.kind not in part.known else []
    outcome.tried = number + 1 - outcome.first


def _received(pipe: Connection) -> Iterator[tuple[int, int, float, Finding | None]]:
    """What a child says until it ends."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory where there is one."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _child(target: Target, seed: int, first: int, part: _Part, folder: Path, pipe: Connection) -> None:
    """Read the inputs from the first on; every new finding is told at once, and once a second how many were read."""
    if part.core is not None:
        os.sched_setaffinity(0, {part.core})
    if part.aside:
        os.nice(_NICE)
    with quiet(folder):
        place = folder / f"inputs-{first}"
        place.mkdir()
        file, given = target.placed(place)
        if refused := seed_refused(target, file, given):
            # No seed, no mutants.
            pipe.send((part.stop, 0, 0.0, Finding(refused, first, b"")))
            return
        limit_memory()
        # What was loaded by now stays.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        known, new_ones, good, slowest, told = set(part.known), 0, 0, 0.0, time.monotonic()
        (folder / "number").write_bytes(bytes(_NOTE.size))
        with (folder / "number").open("r+b") as kept:
            note = mmap.mmap(kept.fileno(), _NOTE.size)
        for number in range(first, part.stop):
            data = target.mutant(seed, number)
            _NOTE.pack_into(note, 0, 1, number, good)
            begun = time.monotonic()
            found, what = tried(target, data, file, given)
            now = time.monotonic()
            slowest, good = max(slowest, now - begun), good + found
            new = Finding(what, number, data) if what else None
            new = None if new is None or new.kind in known else new
            known |= {new.kind} if new else set()
            new_ones += new is not None
            if new or number + 1 == part.stop or now > part.end or now - told > 1:
                pipe.send((number + 1, good, slowest, new))
                good, told = 0, now
            if now > part.end or new_ones >= _MOST_FINDINGS:
                return


def seed_refused(target: Target, file: Path, given: Path) -> str:
    """Why a seed cannot be read, if so: nothing behind that would be reached by its mutants. Libraries are loaded by this, too."""
    for number, seed in enumerate(target.seeds):
        file.write_bytes(target.finished(seed, always=True))
        try:
            target.read(given)
        except MicrotomeError as error:
            return f"seed {number} is refused: {error}"
    return ""


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """No words of libraries; a trace of a crash, or of what takes too long, in the file `trace`."""
    logging.disable(logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with (folder / "trace").open("w") as trace, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faulthandler.enable(trace, all_threads=False)
        faulthandler.register(signal.SIGALRM, trace, all_threads=False, chain=True)
        try:
            kept = os.dup(2)
            os.dup2(nowhere, 2)
            yield
        except BaseException:
            os.dup2(kept, 2)
            raise


def limit_memory() -> None:
    """No more address space than now and 4 GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def tried(target: Target, data: bytes, file: Path, given: Path) -> tuple[bool, str]:
    """Read one input: whether it is a good one, and what is wrong with how it was refused."""
    # A file of its own: what is written within a tick of the clock looks unchanged to a cache.
    with suppress(FileNotFoundError):
        os.unlink(file)
    with open(file, "wb", buffering=0) as written:
        written.write(data)
    before = resource.getrusage(_WHO).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, target.seconds)
    good, what = False, ""
    try:
        target.read(given)
        good = True
    except MicrotomeError as error:
        what = _unclear(error, given)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        trace = "".join(traceback.format_exception(error)[-14:])
        what = f"raised {type(error).__name__} at {last.filename}:{last.lineno}: {' '.join(str(error).split())}\n{trace}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(_WHO).ru_maxrss - before) * 1024
    return good, what or (f"took {grown / 2**20:.0f} MiB of memory" if grown > target.growth_bytes else "")


def _unclear(error: MicrotomeError, given: Path) -> str:
    """What a user could not understand in an error, or memory that it only just did not get."""
    text, cause = str(error), error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, MemoryError) or "bad_alloc" in str(cause):
            trace = "".join(traceback.format_exception(cause)[-6:])
            return f"wanted more than {SPACE_BYTES >> 30} GiB of memory\n{trace}"
        cause = cause.__cause__ or cause.__context__
    if given.name not in text:
        return f"an error without the name {given.name}: {text}"
    return f"an error of several lines: {text!r}" if "\n" in text or "\r" in text else ""
