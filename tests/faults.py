"""Every call that changes what is on a disk, counted; at one of them the process is killed, or the disk is full or broken.

In Python's words: `os` and `open` are what all writers of a training go through. tests/test_kills.py holds that no file of a run folder
came about in another way.
"""

import builtins
import errno
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

# What is done at a call; "half" is of writes alone.
KILLS = ("before", "after", "half")
ERRORS = ("full", "broken")
# Of these a full disk fails each one from then on; what takes no room still works.
TAKING = ("open", "write", "pwrite", "mkdir", "link")
_MADE_BY = {
    "rename": (0, 1),
    "replace": (0, 1),
    "link": (0, 1),
    "unlink": (0,),
    "remove": (0,),
    "mkdir": (0,),
    "rmdir": (0,),
    "fsync": (0,),
    "ftruncate": (0,),
    "pwrite": (0,),
}


class Faults:
    """Inside of it calls are counted that change something below a folder.

    Args:
        below: the folder.
        number: of the call at which something is done, from 1; 0: nothing is.
        kind: one of KILLS or ERRORS. A full disk stays full; a broken one fails once.
        trace: takes all calls in the end, as JSON: [name, path, second path].
    """

    def __init__(self, below: str, number: int = 0, kind: str = "before", trace: str = "") -> None:
        self.below, self.number, self.kind, self.trace_file = os.path.realpath(below), number, kind, trace
        self.calls: list[tuple[str, str, str]] = []
        self.lock, self.stack = threading.Lock(), ExitStack()
        self.full = False

    def __enter__(self) -> Self:
        for name, places in _MADE_BY.items():
            self.stack.enter_context(mock.patch.object(os, name, self._watching(name, getattr(os, name), places)))
        self.real_open, self.real_os_open = io.open, os.open
        self.stack.enter_context(mock.patch.object(os, "open", self._os_open))
        for module in (io, builtins):
            self.stack.enter_context(mock.patch.object(module, "open", self._open))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()
        if self.trace_file:
            Path(self.trace_file).write_text(json.dumps(self.calls))

    def at(self, name: str, paths: list[str], call: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Make a call, unless it is the one at which something is done."""
        with self.lock:
            self.calls.append((name, *(os.path.relpath(path, self.below) for path in paths), "")[:3])
            chosen = len(self.calls) == self.number
        if chosen and self.kind in ("before", "half"):
            if self.kind == "half":
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if chosen and self.kind == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO), paths[0])
        if (chosen and self.kind == "full") or (self.full and name in TAKING):
            if not self.full:
                half()
            self.full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[0])
        result = call()
        if chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def is_ours(self, path: str) -> bool:
        return path == self.below or path.startswith(self.below + os.sep)

    def _watching(self, name: str, call: Callable[..., Any], places: tuple[int, ...]) -> Callable[..., Any]:
        def watched(*arguments: Any, **words: Any) -> Any:
            folder = words.get("dir_fd", words.get("src_dir_fd"))
            paths = [_path_of(arguments[place], folder) for place in places]
            # What is there already is not made, and what is gone is not removed: nothing changes.
            idle = (name == "mkdir" and os.path.isdir(paths[0])) or (name in ("unlink", "remove") and not os.path.lexists(paths[0]))
            if idle or not any(map(self.is_ours, paths)):
                return call(*arguments, **words)
            half: Callable[[], Any] = lambda: None  # noqa: E731
            if name == "pwrite":
                half = lambda: call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])  # noqa: E731
            return self.at(name, paths, lambda: call(*arguments, **words), half)

        return watched

    def _os_open(self, path: Any, flags: int, *arguments: Any, **words: Any) -> int:
        found = _path_of(path, words.get("dir_fd"))
        if not (flags & os.O_CREAT and self.is_ours(found)) or os.path.exists(found):
            return self.real_os_open(path, flags, *arguments, **words)
        opened: int = self.at("open", [found], lambda: self.real_os_open(path, flags, *arguments, **words))
        return opened

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **words: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not self.is_ours(_path_of(file, None)):
            return self.real_open(file, mode, buffering, *arguments, **words)
        path = _path_of(file, None)
        plain = mode.replace("b", "").replace("t", "")
        raw: io.FileIO = self.at("open", [path], lambda: io.FileIO(file, plain))
        watched = _Writes(self, raw, path)
        buffered = io.BufferedRandom(watched) if "+" in mode else io.BufferedWriter(watched)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **words)


class _Writes(io.RawIOBase):
    """A file that was opened for writing; it shows no number, by which a library would write past it."""

    def __init__(self, faults: Faults, raw: io.FileIO, path: str) -> None:
        self.faults, self.raw, self.path = faults, raw, path

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        return int(
            self.faults.at("write", [self.path], lambda: self.raw.write(content), lambda: self.raw.write(content[: len(content) // 2]))
        )

    def readinto(self, target: Any) -> int:
        return self.raw.readinto(target)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def truncate(self, size: int | None = None) -> int:
        return int(self.faults.at("ftruncate", [self.path], lambda: self.raw.truncate(size)))

    def readable(self) -> bool:
        return self.raw.readable()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.raw.seekable()

    def close(self) -> None:
        super().close()
        self.raw.close()


def _path_of(found: Any, folder: int | None) -> str:
    """The path that a call means, by name or by number, with the folder's links resolved."""
    if isinstance(found, int):
        return os.readlink(f"/proc/self/fd/{found}")
    name = os.fsdecode(found)
    if folder is not None and not os.path.isabs(name):
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    parent, last = os.path.split(os.path.abspath(name))
    return os.path.join(os.path.realpath(parent), last)
