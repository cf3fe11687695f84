"""One process at a time in a folder: a lock that the kernel frees when its process ends, and a document that says whose it is.

    FOLDER/.lock    {"host": ..., "boot": ..., "process": ..., "began": ..., "since": ..., "command": ...}, locked by `flock`

Two kernels cannot ask each other. What another host wrote is believed, whether or not that host still runs.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from microtome.errors import RunError, in_one_line
from microtome.files import make_folder, not_written

NAME = ".lock"
# Of what is changed by several processes, one at a time.
TURN = ".turn"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# A document is written right after its file is locked; so long is waited for it.
_MOST_SECONDS = 1.0
# Whoever waits for its turn looks so often, so many seconds apart: what is done in a turn takes a fraction of a second.
_LOOKS, _LOOK_SECONDS = 6000, 0.01
# A folder that others remove as soon as it is empty is made so often.
_OPENINGS = 100
# What a file system says that knows no locks, or has no server for them.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who uses a folder.

    Attributes:
        host: name of the machine.
        boot: that its kernel drew when it started: containers of one machine share it, a restarted machine has another.
        process: its number.
        began: when the process started, in ticks since that boot; a number that another program was given since differs in it.
        thread: that holds it.
        since: when it took the folder, for people.
        command: what was typed.
    """

    host: str
    boot: str
    process: int
    began: int
    thread: int
    since: str
    command: str

    @property
    def words(self) -> str:
        """Who, where and since when."""
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"


@contextmanager
def run_lock(folder: Path) -> Iterator[Holder | None]:
    """Inside of it no other process and no other thread can take `folder`, which is made if it is not there.

    Within the thread that holds it already it does nothing. Afterwards the file is gone, and so is a folder that was made for it and in
    which nothing else came to lie.

    Yields:
        who held it before and ended without giving it back; None: nobody.

    Raises:
        RunError: it is in use: by whom and since when, or which file to remove if that is wrong.
    """
    path, made = folder / NAME, not folder.exists()
    try:
        handle, locked = _taken(path)
    except OSError as error:
        raise not_written(path, error, "a file that can be locked", "check the rights, or choose another --out") from error
    before = _read(handle)
    if _is_ours(before):
        os.close(handle)
        yield None
        return
    try:
        if before is not None and not _has_ended(before, locked):
            raise in_use(path, before)
        _write(handle, path)
        yield before
    finally:
        # Whoever wrote it last: a lock that was refused stays as it was found.
        if _is_ours(_read(handle)):
            with suppress(OSError):
                path.unlink()
        os.close(handle)
        if made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Inside of it no other process and no other thread is inside of it, for one folder; waits for its turn, for a minute.

    For reading and writing anew what several may add to. On a file system that knows no locks nobody waits.

    Raises:
        RunError: the folder cannot be written to, or another process keeps its turn.
    """
    path = folder / TURN
    try:
        for _ in range(_LOOKS):
            handle, locked, named = _opened(path)
            if locked is not False and named:
                break
            os.close(handle)
            time.sleep(_LOOK_SECONDS)
        else:
            raise in_use(path, None)
    except OSError as error:
        raise not_written(path, error, "a file that can be locked", "check the rights, or choose another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def refuse_if_used(folder: Path) -> None:
    """Say at once, before any work, that another process uses `folder`; a moment later `run_lock` decides.

    Raises:
        RunError: as of `run_lock`.
    """
    path = folder / NAME
    try:
        # Not for reading alone: network drives lock only what is open for writing.
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        holder, locked = _read(handle), _lock(handle)
        if holder is not None and not _is_ours(holder) and not _has_ended(holder, locked):
            raise in_use(path, holder)
    finally:
        os.close(handle)


def in_use(path: Path, holder: Holder | None) -> RunError:
    """The error for a folder that somebody uses; None: who has not said who it is."""
    do = "wait until it ends, or give another --out"
    expected = "a folder that no other process uses"
    if holder is None:
        return RunError(path.parent, expected=expected, got="a process that has not said which", do=do, code="R121")
    if not _same_machine(holder):
        do = f"wait until it ends; if it has ended (`ps -p {holder.process}` on {holder.host} shows nothing), remove {path}"
    return RunError(path.parent, expected=expected, got=holder.words, do=do, code="R121")


def _taken(path: Path) -> tuple[int, bool | None]:
    """The lock's file and what `_lock` says of it: locked now, or by this thread before, or on a file system without locks.

    Raises:
        RunError: somebody else holds it.
        OSError: it cannot be opened.
    """
    end = time.monotonic() + _MOST_SECONDS
    while True:
        handle, locked, named = _opened(path)
        holder = _read(handle)
        if _is_ours(holder) or (locked is not False and named):
            return handle, locked
        os.close(handle)
        # Nothing in it, or a process that has ended: whoever holds it is about to say so, or only looks.
        late = time.monotonic() > end
        if locked is False and (late or (holder is not None and not _has_ended(holder, locked))):
            raise in_use(path, holder)
        time.sleep(0.01)


def _opened(path: Path) -> tuple[int, bool | None, bool]:
    """A lock's file, made where it is not there, with its folder; what `_lock` says of it; whether it is still the one of that name.

    Between opening and locking its holder may have ended and removed it: what was locked is then nobody's lock.

    Raises:
        RunError: the folder cannot be made.
        OSError: the file cannot be opened.
    """
    for left in reversed(range(_OPENINGS)):
        make_folder(path.parent)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            break
        except FileNotFoundError:
            # Somebody who found the folder empty removed it in between.
            if not left:
                raise
    try:
        return handle, _lock(handle), _is_named(handle, path)
    except OSError:
        os.close(handle)
        raise


def _lock(handle: int) -> bool | None:
    """Lock a file: True if nobody else holds it, False if somebody does, None where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _has_ended(holder: Holder, locked: bool | None) -> bool:
    """Whether who wrote a document is surely gone; `locked` is what `_lock` said of its file."""
    if holder.boot != boot():
        # This machine was restarted, or it is another one, which cannot be asked.
        return holder.host == socket.gethostname() and locked is not False
    if locked and boot():
        # The same kernel, which would have kept its lock; a container beside this one too, whose numbers mean nothing here.
        return True
    began = process_began(holder.process)
    return began is None or began != holder.began


def _same_machine(holder: Holder) -> bool:
    """Whether its process runs above this kernel."""
    return holder.boot == boot() or holder.host == socket.gethostname()


def _is_ours(holder: Holder | None) -> bool:
    """Whether this thread wrote it."""
    if holder is None or (holder.boot, holder.process, holder.thread) != (boot(), os.getpid(), threading.get_ident()):
        return False
    return holder.began == (process_began(os.getpid()) or 0)


def process_began(process: int) -> int | None:
    """When a process started, in ticks since the machine did; None where there is none, 0 where the kernel does not say."""
    stat = Path(f"/proc/{process}/stat")
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    try:
        # The name of the program, in brackets, may hold anything.
        fields_after = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return None if fields_after[0] in "ZX" else int(fields_after[19])
    except (OSError, IndexError):
        return None


def command() -> str:
    """The words that started this process, its program without its folder; `microtome` also where `python -m microtome` did."""
    program, package = Path(sys.argv[0]), Path(__file__).resolve().parent
    ours = program.suffix == ".py" and program.resolve().parent == package
    return in_one_line(" ".join([package.name if ours else program.name, *sys.argv[1:]]))


def boot() -> str:
    """What tells one running kernel from another; empty where it does not say."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _read(handle: int) -> Holder | None:
    """What stands in the file; None where nothing does, or what is not ours, or where it cannot be read.

    A Windows share lets nobody read a file that somebody else has locked.
    """
    try:
        found = json.loads(os.pread(handle, 1 << 16, 0))
        return Holder(**{field.name: field.type(found[field.name]) for field in fields(Holder)})  # type: ignore[operator]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(handle: int, path: Path) -> None:
    """Say in the file that it is this thread's.

    Raises:
        RunError: the disk is full.
    """
    holder = Holder(
        host=socket.gethostname(),
        boot=boot(),
        process=os.getpid(),
        began=process_began(os.getpid()) or 0,
        thread=threading.get_ident(),
        since=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        command=command()[:1000],
    )
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(asdict(holder), indent=1) + "\n").encode(), 0)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise not_written(path, error, "a folder that can be written") from error
