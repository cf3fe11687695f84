"""What this machine has, as far as a program can know it: numbers and names, no advice. No torch in this process."""

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from microtome.cgroups import limits
from microtome.doctor import disk
from microtome.doctor.disk import Disk
from microtome.doctor.packages import CORE, EXTRAS, TRIED, TRIED_EXTRAS, Package, look_up
from microtome.doctor.probe import Probed, probe
from microtome.inference.graphs import cache_folder, version_of
from microtome.inference.processor import may_have_gpu, processor_name, threads
from microtome.machine import free_memory_bytes, processor_has_bf16

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
# What networks are multiplied with, as Linux names it for processors of Intel and AMD, and of ARM.
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of this machine and of what is installed on it.

    Attributes:
        system: its name and release, and that of Python.
        python: its version.
        microtome: its version.
        processor: its own name.
        cores: of the machine.
        cores_usable: that the system lets this process run on.
        cores_allowed: how many at a time a container allows; None: no limit that can be seen.
        threads: that engines take.
        threads_asked: what OMP_NUM_THREADS says; "" if it is not set.
        instructions: of INSTRUCTIONS those that the processor has; None: the system does not say.
        bf16: whether the processor multiplies bfloat16.
        memory_bytes: of the machine; None: the system does not say.
        memory_limit_bytes: that a container allows; None: no limit that can be seen.
        memory_free_bytes: that this process may still take.
        gpu_marks: whether a driver of a GPU left its mark on the system.
        torch: what torch sees: `capacity.seen_by_torch`; empty where it cannot be imported.
        disk: below the folder that was looked at.
        cache: the folder in which measurements are kept.
        cache_problem: why it cannot be written; "" if it can.
        core: the packages that everything needs.
        extras: name -> its packages.
    """

    system: str
    python: str
    microtome: str
    processor: str
    cores: int
    cores_usable: int
    cores_allowed: float | None = None
    threads: int
    threads_asked: str = ""
    instructions: tuple[str, ...] | None
    bf16: bool
    memory_bytes: int | None
    memory_limit_bytes: int | None = None
    memory_free_bytes: int
    gpu_marks: bool = False
    torch: dict[str, Any] = field(default_factory=dict)
    disk: Disk
    cache: Path
    cache_problem: str = ""
    core: tuple[Package, ...]
    extras: dict[str, tuple[Package, ...]]


def examine(folder: Path) -> Facts:
    """Look at this machine, at the disk of a folder, and at what is installed; some seconds.

    Args:
        folder: where runs are to lie. What is there of its path is looked at; where that cannot be written, the temporary folder.
    """
    core = tuple(look_up(wanted) for wanted in CORE)
    extras = {extra.name: tuple(look_up(wanted) for wanted in extra.packages) for extra in EXTRAS}
    here = [package.module for package in (*core, *(one for some in extras.values() for one in some)) if package.version]
    probed = probe([module for module in (*TRIED, *TRIED_EXTRAS) if module in here])
    allowed = limits()
    return Facts(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        microtome=version_of("microtome"),
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        cores_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cores_allowed=allowed.cores,
        threads=threads(),
        threads_asked=os.environ.get("OMP_NUM_THREADS", ""),
        instructions=instructions(),
        bf16=processor_has_bf16(),
        memory_bytes=memory(),
        memory_limit_bytes=allowed.memory_bytes,
        memory_free_bytes=free_memory_bytes(),
        gpu_marks=may_have_gpu(),
        torch=probed.machine,
        disk=_disk(folder),
        cache=cache_folder(),
        cache_problem=unwritable(cache_folder()),
        core=_with_problems(core, probed),
        extras={name: _with_problems(packages, probed) for name, packages in extras.items()},
    )


def _with_problems(packages: Sequence[Package], probed: Probed) -> tuple[Package, ...]:
    """The packages with what came of importing them."""
    return tuple(replace(package, problem=probed.problems.get(package.module, "")) for package in packages)


def _disk(folder: Path) -> Disk:
    """The disk of what there is of a path, or of the temporary folder where nothing can be written there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    found = disk.measure_disk(there)
    if not found.problem:
        return found
    instead = disk.measure_disk(Path(tempfile.gettempdir()))
    return replace(instead, problem=f"{there} cannot be written ({found.problem})")


def instructions(cpuinfo: Path = CPUINFO) -> tuple[str, ...] | None:
    """Of INSTRUCTIONS those that the processor says it has; None where the system keeps no such list (macOS, Windows)."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return None
    words = next((set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), None)
    return None if words is None else tuple(name for name in INSTRUCTIONS if name in words)


def memory(meminfo: Path = MEMINFO) -> int | None:
    """Bytes of memory that are built in; None where the system does not say."""
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        return int(lines["MemTotal"].split()[0]) * 1024
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def unwritable(folder: Path) -> str:
    """Why a file cannot be made in a folder, which is made if it is not there; "" if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"microtome")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def plain(facts: Facts) -> dict[str, Any]:
    """The facts for JSON; the user's own folder is `~`, as they are pasted where others read."""
    values = asdict(facts)
    values["cache"], values["disk"]["folder"] = shown(facts.cache), shown(facts.disk.folder)
    values["disk"]["problem"] = without_home(facts.disk.problem)
    return values


def shown(path: Path) -> str:
    """A path for people: what lies in the user's own folder begins with `~`."""
    return without_home(str(path))


def without_home(text: str) -> str:
    """A text in which the user's own folder is `~`."""
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    return text.replace(home, "~") if len(home) > 1 else text
