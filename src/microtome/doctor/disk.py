"""How fast a folder's disk takes what must not be lost: bytes and small files, both until the disk has them. No torch."""

import os
import secrets
import shutil
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from microtome.files import atomic_path, sweep

MOUNTS = Path("/proc/self/mountinfo")
# Kinds of file systems behind which another machine stands, and those in memory.
REMOTE = (
    "nfs",
    "cifs",
    "smb",
    "ncpfs",
    "afs",
    "ceph",
    "gluster",
    "lustre",
    "gpfs",
    "beegfs",
    "pvfs",
    "orangefs",
    "9p",
    "virtiofs",
    "wekafs",
)
REMOTE_FUSE = ("sshfs", "s3fs", "gcsfuse", "rclone", "goofys", "davfs", "gvfsd", "juicefs", "mergerfs")
IN_MEMORY = ("tmpfs", "ramfs")
# Written at once, and how many small files. Enough to be slow where the disk is.
MEGABYTES, FILES = 48, 12
# It stops here where the disk is very slow.
MOST_SECONDS = 8.0


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The disk below a folder.

    Attributes:
        folder: that was looked at.
        kind: of its file system; "" where the system does not say.
        remote: whether another machine stands behind it; None: not known.
        in_memory: whether it is no disk at all.
        free_bytes: that this user may still write.
        megabytes_per_second: written and flushed; None where nothing could be written.
        small_file_ms: a small file written, flushed, renamed and its name flushed, as each step of a save is: the median.
        problem: why it could not be measured.
    """

    folder: Path
    kind: str
    remote: bool | None
    in_memory: bool
    free_bytes: int
    megabytes_per_second: float | None = None
    small_file_ms: float | None = None
    problem: str = ""


def measure_disk(folder: Path, *, megabytes: int = MEGABYTES, files: int = FILES) -> Disk:
    """Write and flush into a folder that is there, and remove it again.

    Reading is not measured: the system answers from memory what was just written.
    """
    kind = file_system(folder)
    known = {
        "folder": folder,
        "kind": kind,
        "remote": (kind.startswith(REMOTE) or any(name in kind for name in REMOTE_FUSE)) if kind else None,
        "in_memory": kind in IN_MEMORY,
        "free_bytes": shutil.disk_usage(folder).free,
    }
    # A name by which leftovers are known, should the process be killed here.
    place = folder / f".part-{os.getpid():x}-{secrets.token_hex(4)}-disk"
    try:
        place.mkdir()
        speed = _write_speed(place / "large", megabytes)
        return Disk(**known, megabytes_per_second=speed, small_file_ms=_small_file_ms(place, files))  # type: ignore[arg-type]
    except OSError as error:
        return Disk(**known, problem=error.strerror or str(error))  # type: ignore[arg-type]
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):
            sweep(folder)


def _write_speed(path: Path, megabytes: int) -> float:
    """Megabytes a second, a megabyte (10^6 bytes) at a time, flushed at the end; fewer are written where that takes long."""
    block = secrets.token_bytes(1_000_000)
    began, written = time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while written < megabytes and (written == 0 or time.perf_counter() - began < MOST_SECONDS / 2):
            file.write(block)
            written += 1
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return written / max(seconds, 1e-9)


def _small_file_ms(folder: Path, files: int) -> float:
    """What the program's own way to write a small file takes, the median of some; fewer where they take long."""
    taken: list[float] = []
    for number in range(files):
        if sum(taken) > MOST_SECONDS / 2:
            break
        began = time.perf_counter()
        with atomic_path(folder / f"{number}") as part:
            part.write_bytes(b"\0" * 4096)
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def file_system(folder: Path, mounts: Path = MOUNTS) -> str:
    """The kind of file system that a folder lies on: `ext4`, `nfs4`, `fuse.sshfs`; "" where the system keeps no list (not Linux)."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, deepest, kind = folder.resolve(), 0, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 5 or not after:
            continue
        # Spaces in names are written as octal numbers.
        mount = Path(words[4].replace("\\040", " "))
        # Of two on one place the later one is on top.
        if (mount == place or mount in place.parents) and len(mount.parts) >= deepest:
            deepest, kind = len(mount.parts), after.split()[0]
    return kind
