"""Writing files so that a kill at any instant leaves the old file or the new one, never half of either."""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from microtome.errors import DataError, RunError

# The name of a temporary file or folder: the process that writes it, and what no other has drawn.
_PART = re.compile(r"\.part-([0-9a-f]{1,8})-[0-9a-f]{8}-")
# What a system says where nothing more can be written: the disk is full, or what one account may have of it.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_RIGHTS, _IN_THE_WAY = "get the right to write there, or choose another --out", "choose another --out: a file is where a folder has to be"
_CURES = MappingProxyType(
    {
        **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
        **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _IN_THE_WAY),
        errno.ENAMETOOLONG: "choose a shorter --out",
    }
)


@contextmanager
def atomic_path(path: Path, size: int = 0) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffixes; on success flushed and renamed to `path`.

    Whatever the body raises, the temporary file is removed and `path` stays as it was.

    Args:
        path: what is to be written.
        size: bytes that it will have, if that is known: where so many are not free nothing is begun.

    Raises:
        RunError: the disk is full (how many bytes are missing) or the folder cannot be written; names the file.
    """
    part = _part(path)
    try:
        _make(path.parent)
        _check_room(path, size)
        # Created as any other file of this user, so that the kernel applies the umask: it can be read only by
        # setting it, for all threads.
        part.touch(exist_ok=False)
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise not_written(path, error, "a folder that can be written", size=size, written=_size(part)) from error
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
    part = _part(path)
    try:
        _make(path.parent)
        part.mkdir()
        yield part
        _flush(part)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
        _flush(path.parent)
    except (OSError, ValueError) as error:
        # Libraries that write many files tell of a full disk in a ValueError of their own.
        raise not_written(path, error, "a folder that can be written") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(part)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent`, which is made if it is not there; gone afterwards, and a leftover where a kill came.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    part = _part(parent / "scratch")
    make_folder(part)
    try:
        yield part
    finally:
        with suppress(OSError):
            shutil.rmtree(part)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` in one step."""
    content = text.encode()
    with atomic_path(path, len(content)) as part:
        part.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON to `path` in one step; NaN is not JSON and raises ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_name(path: Path) -> None:
    """Refuse a path whose bytes are no text: no list of files, model or report that names it could be read again.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        do = "rename it, or all at once: convmv -f latin1 -t utf-8 --notest -r FOLDER"
        raise DataError(path, expected="a name in UTF-8", got=repr(str(path))[-200:], do=do, code="D050") from None


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that a power cut does not take away again.

    Raises:
        RunError: the disk is full, or the folder cannot be made.
        DataError: its name is not UTF-8.
    """
    check_name(path)
    try:
        _make(path)
    except OSError as error:
        raise not_written(path, error, "a folder that can be made") from error


def flush(path: Path) -> None:
    """Put a file on the disk that is written bit by bit, and its name.

    Raises:
        RunError: the disk is full or broken.
    """
    try:
        _flush(path)
        _flush(path.parent)
    except OSError as error:
        raise not_written(path, error, "a file that can be written", "check the disk, then --resume") from error


def not_written(
    path: Path,
    error: OSError | ValueError,
    expected: str,
    do: str = "",
    *,
    size: int = 0,
    written: int = 0,
) -> RunError:
    """The error for a file or folder that could not be written; of a full disk it tells how many bytes were missing.

    Args:
        path: that was to be written.
        error: what the system, or a library, said.
        expected: in words for people, where it is not that the disk is full.
        do: what a person can do, where it is not that; as the system's error means if it is not given.
        size: bytes that the file was to have; 0 where that is not known.
        written: how many of them were.
    """
    said = " ".join(str(getattr(error, "strerror", None) or error).split())[-300:]
    if getattr(error, "errno", None) not in _FULL and not any(os.strerror(number) in said for number in _FULL):
        return RunError(path, expected=expected, got=said, do=do or cure(error), code="R001")
    room = f"room for {size} bytes" if size else "room for what is still to be written"
    return _full(path, room, f"{said} after {written} bytes, with {_free(path)} bytes free")


def cure(error: OSError | ValueError) -> str:
    """What a person can do where a file or folder could not be written, and the disk is not full."""
    return _CURES.get(getattr(error, "errno", None) or 0, "check the disk, or choose another --out")


def remove_folder(path: Path) -> None:
    """Remove a folder such that no kill leaves half of it under its name; what cannot be removed stays, as a leftover of this process."""
    part = _part(path)
    with suppress(OSError):
        path.rename(part)
        shutil.rmtree(part)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is a temporary one that no running process is writing: a kill left it.

    Of this process none is under way where it asks. A process of another machine looks as if it had ended: whoever removes what this
    finds must know that none writes there.
    """
    found = _PART.match(path.name)
    if found is None:
        return False
    writer = int(found[1], 16)
    return writer == os.getpid() or not _is_running(writer)


def sweep(folder: Path) -> None:
    """Remove the leftovers in a folder, if it is there; not those in folders below it."""
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if is_leftover(path):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _part(path: Path) -> Path:
    """A name for what is to become `path`; it tells which process writes it."""
    # The suffix stays last because writers choose their format by it (.nii.gz, .png, ...); 56 characters are at most
    # 224 bytes, so that the longest name that a file system takes has room for the rest.
    return path.parent / f".part-{os.getpid():x}-{secrets.token_hex(4)}-{path.name[-56:]}"


def _check_room(path: Path, size: int) -> None:
    """Refuse to begin a file of a known size that its disk has no room for.

    Raises:
        RunError: how many bytes it needs, how many are free, and how many are missing.
    """
    if size and size > (free := _free(path)):
        raise _full(path, f"{size} free bytes", f"{free}, {size - free} too few")


def _full(path: Path, expected: str, got: str) -> RunError:
    """The error for a disk that is full."""
    return RunError(
        path, expected=expected, got=got, do="free space (a training goes on with --resume), or choose another --out", code="R102"
    )


def _free(path: Path) -> int:
    """Bytes that this account may still write beside a path; what is beyond all disks where the file system does not say."""
    folder = next(each for each in path.absolute().parents if each.is_dir())
    usage = shutil.disk_usage(folder)
    return usage.free if usage.free or usage.total else 1 << 63


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # It is somebody else's.
        return True
    return True


def _make(folder: Path) -> None:
    """Make a folder and those above it, each one's name on the disk before anything is put into it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _flush(path.parent)
    if not missing:
        folder.mkdir(exist_ok=True)


def _flush(path: Path) -> None:
    """Ask the kernel to put a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some shared drives know no such call for folders (VirtualBox, older SMB); when names are on the disk is then theirs to decide.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)
