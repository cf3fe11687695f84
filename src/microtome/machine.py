"""What this process may ask of the machine below it: memory that is recycled or short, what the processor multiplies. No torch."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from microtome.errors import ShortOfMemoryError

# glibc's numbers of mallopt's parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_STATUS = Path("/proc/self/status")
# What libraries say that have no error of their own for it: torch on a CPU and on Windows, C++ below torch and engines, CUDA's libraries,
# OpenVINO, ONNX Runtime.
_SHORT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "cannot allocate memory",
    "_alloc_failed",
)
# What oneDNN says, which tells no reason: in a process that may take little more memory it means that, elsewhere it is another fault.
_NO_REASON = ("could not create a primitive", "could not execute a primitive", "could not create a memory")
# What it asks for at once, beside a layer's own arrays, is less.
_LITTLE_BYTES = 2**30


def recycle_memory() -> bool:
    """Keep freed memory in the process instead of giving every activation back to the kernel; True if that was possible.

    glibc returns each large block to the kernel, which clears it anew page by page for the next layer: touching fresh
    memory is over ten times slower than touching recycled memory. Costs 10 to 60 % more resident memory. Call it before
    the first large tensor; MICROTOME_RECYCLE_MEMORY=0 switches it off. Nothing happens outside of glibc.
    """
    if not sys.platform.startswith("linux") or os.environ.get("MICROTOME_RECYCLE_MEMORY") == "0":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    accepted = libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 1 << 16)
    # What one thread reads another frees. With an arena for each thread both keep holes of their own: a long prediction grew to 774 MB
    # where with one arena it stays at 589 MB (docs/log.md).
    libc.mallopt(_M_ARENA_MAX, 1)
    return all(accepted)


def processor_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (where not, bf16 is slower than float32)."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return False
    text = flags.read_text(encoding="ascii", errors="ignore")
    return "avx512_bf16" in text or "amx_bf16" in text


def free_memory_bytes() -> int:
    """Bytes of memory that this process may still take: what the system has left, or its container.

    Where neither says (macOS), half of what is built in.
    """
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if known else 4 * 2**30
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = _number(group / "memory.max")
    if limit is None:
        return free
    # The group counts the files that are kept in memory too; they give way, but for those that are nowhere else.
    stat = group / "memory.stat"
    counts = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines()) if stat.exists() else {}
    files = int(counts.get("file", 0)) - int(counts.get("shmem", 0))
    used = (_number(group / "memory.current") or 0) - files
    return max(0, min(free, limit - max(0, used)))


def resident_bytes(*, most: bool = False) -> int:
    """Bytes of this process in memory now, or at most so far; now where the kernel keeps no peak, 0 where it says nothing."""
    status = _STATUS
    if not status.exists():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii", errors="ignore").splitlines() if ":" in line)
    now = lines.get("VmRSS", "0 kB")
    return int((lines.get("VmHWM", now) if most else now).split()[0]) * 1024


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of this machine or of its GPU, was not enough for what was asked."""
    if isinstance(error, MemoryError | ShortOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and says_short_of_memory(str(error))


def says_short_of_memory(words: str) -> bool:
    """Whether these are words by which a library says that memory was not enough.

    Words without a reason count where memory is short to be seen: less is left than 1 GiB, or than this process has ever held.
    """
    lower = words.lower()
    if any(said in lower for said in _SHORT_OF_MEMORY):
        return True
    return any(said in lower for said in _NO_REASON) and room_bytes() < max(_LITTLE_BYTES, resident_bytes(most=True))


def room_bytes() -> int:
    """Bytes that this process may still take: of the memory that is free, and of the addresses that it is allowed (`ulimit -v`)."""
    if not sys.platform.startswith("linux"):
        return free_memory_bytes()
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return free_memory_bytes() if most == resource.RLIM_INFINITY else max(0, min(free_memory_bytes(), most - used))


def shortage_of(work: Callable[[], None]) -> str:
    """Do some work; what was said where memory was not enough for it, empty where it was.

    Afterwards nothing of the work is held any more, unless the caller does: its error, whose frames hold its arrays, is gone.
    """
    try:
        work()
    except Exception as error:  # libraries have no common class for it; what else it is goes on
        if not is_short_of_memory(error):
            raise
        said = " ".join(str(error).split())[:160] or "no more memory"
    else:
        return ""
    release_memory()
    return said


def release_memory() -> None:
    """Give back what nothing refers to any more, also what torch keeps of a GPU for later; after an error of `is_short_of_memory`."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _number(path: Path) -> int | None:
    """The number that a file of the kernel holds; None where there is none ("max")."""
    words = path.read_text(encoding="ascii").strip() if path.exists() else ""
    return int(words) if words.isdigit() else None
