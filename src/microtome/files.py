"""Writing files so that a kill at any instant leaves the old file or the new one, never half of either."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from microtome.errors import RunError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffixes; on success flushed and renamed to `path`.

    Whatever the body raises, the temporary file is removed and `path` stays as it was.

    Raises:
        RunError: the disk is full or the folder cannot be written; names the file.
    """
    # The suffix stays last because writers choose their format by it (.nii.gz, .png, ...); 60 characters are at most
    # 240 bytes, so that the longest name that a file system takes has room for the rest.
    part = path.parent / f".part-{secrets.token_hex(4)}-{path.name[-60:]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created as any other file of this user, so that the kernel applies the umask: it can be read only by
        # setting it, for all threads.
        part.touch(exist_ok=False)
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise RunError(
            path, expected="a folder that can be written", got=f"{error.strerror or error}", do="free space or choose another --out"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` on success and removed otherwise; its files are flushed by who writes them.

    A folder cannot replace another in one step. What lies at `path` must be of a write that nothing marked as complete: it goes.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    part = path.parent / f".part-{secrets.token_hex(4)}-{path.name[-60:]}"
    try:
        part.mkdir(parents=True)
        yield part
        _flush(part)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
        _flush(path.parent)
    except (OSError, ValueError) as error:
        # Libraries that write many files tell of a full disk in a ValueError of their own.
        got = " ".join(str(getattr(error, "strerror", None) or error).split())[-300:]
        raise RunError(path, expected="a folder that can be written", got=got, do="free space or choose another --out") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(part)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` in one step."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON to `path` in one step; NaN is not JSON and raises ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _flush(path: Path) -> None:
    """Ask the kernel to put a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
