"""Facts of a machine -> lines for people: what, finding, and where something can be done about it, what."""

from typing import Any

from microtome.doctor.facts import Facts, shown, without_home
from microtome.doctor.findings import Line
from microtome.doctor.packages import EXTRAS, Extra, Package

GB = 2**30
# Less free memory than this is little for training on volumes, less free disk than this for what it prepares.
LITTLE_MEMORY_BYTES, LITTLE_DISK_BYTES = 4 * GB, 5 * GB
# A disk below either takes seconds for each checkpoint, and keeps training waiting.
SLOW_MEGABYTES, SLOW_FILE_MS = 40.0, 60.0
BF16, INT8 = {"avx512_bf16", "amx_bf16"}, {"avx512_vnni", "avx_vnni", "amx_int8"}


def lines(facts: Facts) -> list[Line]:
    """All that was found, from the system down to what is installed."""
    return [
        Line("system", f"microtome {facts.microtome}, Python {facts.python}, {facts.system}"),
        *_core(facts),
        _processor(facts),
        _arithmetic(facts),
        _memory(facts),
        _gpu(facts),
        *_patch(facts.torch),
        *_warp(facts.torch),
        _disk(facts),
        _cache(facts),
        *(_extra(extra, facts.extras[extra.name]) for extra in EXTRAS),
    ]


def _core(facts: Facts) -> list[Line]:
    """Torch, and what of the other packages is missing or broken."""
    found = []
    for package in facts.core:
        if not package.version:
            found.append(Line(package.name, "not installed", f'pip install "{package.name}"', "bad"))
        elif package.problem:
            do = f'pip install --force-reinstall "{package.name}"'
            if "SIGILL" in package.problem:
                do = "this processor lacks instructions that this build needs: install another build or version"
            found.append(Line(package.name, f"{package.version} is installed, but {package.problem}", do, "bad"))
        elif package.name == "torch":
            found.append(_torch(package, facts.torch))
    return found


def _torch(package: Package, seen: dict[str, Any]) -> Line:
    """Torch's version and what it was built for."""
    if problem := seen.get("problem"):
        return Line(
            "torch", f"{package.version} {problem} when it looks at the machine", "set CUDA_VISIBLE_DEVICES= to do without the GPU", "bad"
        )
    build = f"built for CUDA {seen['cuda']}" if seen.get("cuda") else "built for processors"
    return Line(
        "torch",
        f"{package.version}, {build}; computes with {seen.get('instructions', 'unknown')} in {_count(seen.get('threads', 0), 'thread')}",
    )


def _processor(facts: Facts) -> Line:
    """Name, cores, and threads that fit neither them nor a container."""
    cores = _count(facts.cores, "core")
    if facts.cores_usable < facts.cores:
        cores = f"{facts.cores_usable} of {cores} usable"
    allowed = facts.cores_allowed
    if allowed is not None and allowed < facts.cores_usable:
        cores += f", a container allows {allowed:g} at a time"
    finding = f"{facts.processor}: {cores}, {_count(facts.threads, 'thread')}"
    if allowed is not None and facts.threads > allowed + 0.5:
        return Line(
            "processor", finding, f"export OMP_NUM_THREADS={max(1, int(allowed))}: more threads stand in each other's way", "warning"
        )
    if facts.threads > facts.cores_usable:
        return Line("processor", finding, f"export OMP_NUM_THREADS={facts.cores_usable}: more threads stand in each other's way", "warning")
    if facts.threads_asked and facts.threads < facts.cores_usable and (allowed is None or facts.threads + 1 <= allowed):
        return Line("processor", f"{finding} (OMP_NUM_THREADS)", "unset OMP_NUM_THREADS, if all cores may be used", "note")
    return Line("processor", finding)


def _arithmetic(facts: Facts) -> Line:
    """What the processor multiplies fast."""
    if facts.instructions is None:
        return Line("arithmetic", "the system does not tell what its processor multiplies; float32 is used", "", "note")
    have = set(facts.instructions)
    bf16 = "bfloat16" if facts.bf16 else "no bfloat16 (microtome then keeps to float32)"
    if not facts.bf16 and have & {"bf16", *BF16}:
        bf16 = "bfloat16, which microtome does not use on this processor"
    int8 = "8-bit integers (VNNI)" if have & INT8 else "8-bit integers (i8mm)" if "i8mm" in have else "no fast 8-bit integers"
    names = ", ".join(facts.instructions) or "none that speeds up networks"
    return Line("arithmetic", f"float32, {bf16}, {int8}; instructions: {names}")


def _memory(facts: Facts) -> Line:
    """Free, of how much, and who limits it."""
    free, limit = facts.memory_free_bytes, facts.memory_limit_bytes
    total = f" of {_gb(facts.memory_bytes)}" if facts.memory_bytes else ", as far as can be told without the system's word"
    finding = f"{_gb(free)} free{total}"
    if limit is not None and (facts.memory_bytes is None or limit < facts.memory_bytes):
        finding += f"; a container or job allows {_gb(limit)}"
    if free < LITTLE_MEMORY_BYTES:
        return Line("memory", finding, "close other programs, or keep to small patches: `train --memory GB`", "warning")
    return Line("memory", finding)


def _gpu(facts: Facts) -> Line:
    """GPUs that torch can use, or why there is none."""
    gpus, build = facts.torch.get("gpus", []), facts.torch.get("cuda")
    if gpus:
        each = [
            f"{gpu['name']}, {_gb(gpu['free_bytes'])} of {_gb(gpu['total_bytes'])} free{', bfloat16' if gpu['bf16'] else ''}"
            for gpu in gpus
        ]
        return Line("GPU", "; ".join(each))
    if not facts.torch:
        return Line("GPU", "not known, as torch cannot be asked", "", "note")
    if not facts.gpu_marks:
        return Line("GPU", "none; everything runs on the processor")
    if not build:
        return Line("GPU", "there is a driver, but torch was built for processors", 'pip install --force-reinstall "torch"', "warning")
    return Line(
        "GPU",
        f"there is a driver, but torch (CUDA {build}) finds no GPU",
        "see what `nvidia-smi` says: the driver may be too old",
        "warning",
    )


def _patch(seen: dict[str, Any]) -> list[Line]:
    """How large a volume's patch may be."""
    side = seen.get("patch_vox")
    if side is None:
        return []
    if side == 0:
        return [Line("3D patch", "not even 32 × 32 × 32 voxels fit into the free memory", "free memory, or train with --dims 2", "warning")]
    return [Line("3D patch", f"training has room for up to {side} × {side} × {side} voxels, one channel, the default network")]


def _warp(seen: dict[str, Any]) -> list[Line]:
    """Whether samples are warped by the compiled code."""
    if "compiled_warp" not in seen:
        return []
    if seen["compiled_warp"]:
        return [Line("augmentation", "warped by compiled code")]
    do = "unset MICROTOME_COMPILED, or install a C compiler (gcc) and microtome again"
    return [Line("augmentation", "warped by torch, which is slower: the compiled code is missing or switched off", do, "note")]


def _disk(facts: Facts) -> Line:
    """Room and speed of the disk on which runs are to lie."""
    disk = facts.disk
    kind = f" ({disk.kind}{', in memory' if disk.in_memory else ', a network drive' if disk.remote else ''})" if disk.kind else ""
    finding = f"{_gb(disk.free_bytes)} free in {shown(disk.folder)}{kind}"
    if disk.megabytes_per_second is not None and disk.small_file_ms is not None:
        finding += f"; writes {disk.megabytes_per_second:.0f} MB/s, a small file {disk.small_file_ms:.1f} ms, all flushed"
    if disk.problem:
        where = without_home(disk.problem)
        return Line("disk", f"{where}; {finding}", "give --out on a disk that can be written", "warning")
    if disk.free_bytes < LITTLE_DISK_BYTES:
        return Line("disk", finding, "free space: training keeps prepared images beside the run", "warning")
    if (disk.megabytes_per_second or 0) < SLOW_MEGABYTES or (disk.small_file_ms or 0) > SLOW_FILE_MS:
        why = "a network drive" if disk.remote else "it"
        return Line(
            "disk", finding, f"{why} is slow: put --out of `train` on a disk of this machine, and copy the run afterwards", "warning"
        )
    if disk.in_memory:
        return Line("disk", finding, "what lies here takes memory, and is gone when the machine is switched off", "note")
    return Line("disk", finding)


def _cache(facts: Facts) -> Line:
    """Whether measurements can be remembered."""
    if facts.cache_problem:
        do = "export MICROTOME_CACHE=FOLDER, one that can be written: else engines are measured anew each time"
        return Line("cache", f"{shown(facts.cache)} cannot be written: {facts.cache_problem}", do, "warning")
    return Line("cache", f"{shown(facts.cache)} can be written")


def _extra(extra: Extra, packages: tuple[Package, ...]) -> Line:
    """One extra: what of it is here, what it is for, and how to get it."""
    name, do = f"[{extra.name}]", f'pip install "microtome[{extra.name}]"'
    broken = [package for package in packages if package.problem]
    missing = [package.name for package in packages if not package.version]
    if broken:
        words = "; ".join(f"{package.name} {package.version}: {package.problem}" for package in broken)
        return Line(name, f"cannot be used: {words}", f"pip install --force-reinstall {' '.join(p.name for p in broken)}", "warning")
    here = ", ".join(f"{package.name} {package.version}" for package in packages if package.version)
    if not here:
        return Line(name, f"not installed: {extra.purpose}", do, "note")
    if missing:
        return Line(name, f"{here}, but not {', '.join(missing)}: {extra.purpose}", do, "note")
    return Line(name, f"{here}: {extra.purpose}")


def _gb(count: int) -> str:
    """`19.8 GB`."""
    return f"{count / GB:.1f} GB"


def _count(number: int, what: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
