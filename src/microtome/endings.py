"""How a program ends: whatever ended it becomes one line for people and an exit code."""

import errno
from types import MappingProxyType
from typing import NamedTuple

from microtome.errors import DataError, LeftAtOnceError, MicrotomeError, RunError, StoppedError, in_one_line
from microtome.machine import is_short_of_memory

_INTERRUPTED = 130
# What has to be said beside the same words, by command.
_RESUMED = "; add --resume if the folder of --out exists"
_AGAIN = MappingProxyType(
    {"train": _RESUMED, "compare": _RESUMED, "densify": "; remove the folder of its run first, or give another --run"}
)
# Of a path that somebody gave: neither a fault of this program nor one of the disk.
_OF_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)


class End(NamedTuple):
    """What a person is told, and the exit code."""

    line: str
    exit_code: int


def ending(error: BaseException, command: str = "") -> End | None:
    """The end that an error of a command means; None: of an ordinary one, which says nothing."""
    if isinstance(error, MicrotomeError):
        return End(error.line, error.exit_code)
    if not isinstance(error, Exception):
        return _stopped(error, command)
    if is_short_of_memory(error):
        return End(_memory_ended(error).line, 1)
    if isinstance(error, OSError) and error.errno in _OF_PATHS and isinstance(error.filename, str):
        found = _unusable(error, error.filename)
        return End(found.line, found.exit_code)
    return End(_unforeseen(error), 1)


def _unusable(error: OSError, path: str) -> DataError:
    """The error for a path that the system does not take, wherever it was looked at first."""
    shown = path if len(path) <= 120 else f"{path[:80]}...{path[-30:]}"
    do = "check its length, and the right to enter each of its folders"
    return DataError(in_one_line(shown), expected="a path that can be opened", got=error.strerror or str(error), do=do, code="D001")


def _stopped(error: BaseException, command: str) -> End | None:
    """The end of a program that was asked to stop: by Ctrl-C 130, by whatever else 75, for which a job script starts it again.

    Typer makes an exit of Ctrl-C, in silence; `leaving` one of other requests, from 128 on, where no training answered them. Who asked
    twice wants the program gone, and no script to start it again.
    """
    code = getattr(error, "code", _INTERRUPTED)
    if not isinstance(code, int) or code < 128:
        return None
    line = f"stopped; give the same command again{_AGAIN.get(command, '')}"
    return End(line, code if code == _INTERRUPTED or isinstance(error, LeftAtOnceError) else StoppedError.exit_code)


def _memory_ended(error: Exception) -> RunError:
    """The error for memory that was short where nothing smaller could take its place."""
    got = " ".join(str(error).split())[:200] or "no more"
    do = "close other programs, or give a smaller --memory; what was saved is good"
    return RunError("memory", expected="as much as was asked for", got=got, do=do, code="R124")


def _unforeseen(error: Exception) -> str:
    """The line for an error that nobody meant for people: a fault of this program's own, or of a library below it."""
    said = in_one_line(" ".join(str(error).split()))[:300] or "no words"
    return f"{type(error).__name__}: {said}; this is a fault of microtome: please report it with what the same command shows with --debug"
