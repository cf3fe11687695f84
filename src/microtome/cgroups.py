"""What a container, or a job of a cluster, allows this process: memory and processor time, by the kernel's control groups. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# What version 1 says where there is no limit: the largest multiple of a page.
_NO_LIMIT = 2**60


@dataclass(frozen=True)
class Limits:
    """What may be taken.

    Attributes:
        memory_bytes: None: no limit that can be seen.
        cores: how many at a time, all in all; 1.5 is one and a half; None as above.
    """

    memory_bytes: int | None = None
    cores: float | None = None


def limits(groups: Path = GROUPS, own: Path = OWN) -> Limits:
    """The tightest limits of this process's groups and of those above them, of either version of control groups.

    A container sees its own group as the root. Without control groups (macOS, Windows) nothing is known.

    Args:
        groups: where groups are mounted.
        own: what names the groups of this process.
    """
    memory = [bound for folder in _folders(groups, own, "memory") if (bound := _memory(folder)) is not None]
    cores = [share for folder in _folders(groups, own, "cpu") if (share := _cores(folder)) is not None]
    return Limits(min(memory, default=None), min(cores, default=None))


def _folders(groups: Path, own: Path, kind: str) -> Iterator[Path]:
    """The folders of the process's group and of those above it: of version 2, and of version 1 for one kind."""
    for line in _text(own).splitlines():
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds and kind not in kinds.split(","):
            continue
        root = groups / kind if kinds else groups
        # The host's path means nothing in a container of version 1: what there is of it is looked at, and the root.
        inner = root / path.strip("/")
        while inner != root and root in inner.parents:
            yield inner
            inner = inner.parent
        yield root


def _memory(folder: Path) -> int | None:
    """Bytes that one group may take."""
    found = [_whole(_text(folder / name)) for name in ("memory.max", "memory.limit_in_bytes")]
    return next((value for value in found if value is not None and value < _NO_LIMIT), None)


def _cores(folder: Path) -> float | None:
    """Cores that one group may take: microseconds of processor time in a period of so many."""
    words = _text(folder / "cpu.max").split() or [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = (_whole(word) for word in words[:2])
    return quota / period if quota and period else None


def _whole(word: str) -> int | None:
    """A number; None for `max`, `-1` and nothing."""
    return int(word) if word.isdecimal() else None


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing where there is none, or it may not be read."""
    try:
        return path.read_text(encoding="ascii", errors="ignore").strip()
    except OSError:
        return ""
