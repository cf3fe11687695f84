"""What this machine can do at most, measured: matrix products, multiply-add instructions, memory copies, fresh memory.

    python -m benchmarks.limits [--threads N]

The limit of a precision is the best rate of it that anything here reaches; a row of the tables is compared with that.
Rates are in operations a second (a multiply-add counts two) or bytes a second (read + written).
"""

import argparse
import ctypes
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("fma.c")
SIDE = 2048
# More than a last-level cache holds, so that a copy is one of memory.
COPIED_BYTES = 1 << 28


class Microloop(NamedTuple):
    """A function of fma.c: the processor flags that it needs, its precision, and operations of one instruction."""

    function: str
    flags: tuple[str, ...]
    precision: str
    operations: int
    define: str = ""


MICROLOOPS = (
    Microloop("fma_avx512", ("avx512f",), "fp32", 2 * 16),
    Microloop("fma_avx2", ("avx2", "fma"), "fp32", 2 * 8),
    Microloop("dot_bf16", ("avx512_bf16",), "bf16", 2 * 32, "WITH_BF16"),
    Microloop("dot_int8", ("avx512_vnni",), "int8", 2 * 64, "WITH_VNNI"),
)
ACCUMULATORS = 24
# Of a microloop: some hundredths of a second.
ROUNDS = 20_000_000
# Which measured rates bound which precision.
BOUNDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp32": ("matrix product fp32", "fma_avx512", "fma_avx2"),
        "bf16": ("matrix product bf16", "dot_bf16"),
        "int8": ("matrix product int8", "dot_int8"),
        "memory": ("memory copy",),
    }
)


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Shortest wall time of a call after one to warm up: a limit is what is possible, not what is usual."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_limits(threads: int, side: int = SIDE, copied: int = COPIED_BYTES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every rate that can be measured here with so many threads; {"rates": name -> rate, "skipped": name -> why}.

    In one process: it is started anew for each round.
    """
    import torch

    torch.set_num_threads(threads)
    rates, skipped = matrix_products(side)
    rates |= memory_rates(copied)
    loops, why = microloop_rates(threads, rounds)
    return {"rates": rates | loops, "skipped": skipped | why, "threads": threads}


def matrix_products(side: int) -> tuple[dict[str, float], dict[str, str]]:
    """Operations a second of square matrix products in three precisions."""
    import torch

    rates, skipped = {}, {}
    operations = 2 * side**3
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(side, side).to(kind) for _ in range(2))
        rates[f"matrix product {name}"] = operations / best_seconds(lambda left=left, right=right: torch.mm(left, right))
    try:
        left, right = (torch.randint(-9, 9, (side, side), dtype=torch.int8) for _ in range(2))
        rates["matrix product int8"] = operations / best_seconds(lambda: torch._int_mm(left, right))
    except (RuntimeError, AttributeError) as error:
        skipped["matrix product int8"] = f"torch._int_mm: {error}"[:200]
    return rates, skipped


def memory_rates(copied: int) -> dict[str, float]:
    """Bytes a second of a copy between warm buffers (read + written), and of filling memory that is fresh from the kernel."""
    import mmap

    import torch

    source, target = (torch.ones(copied // 4) for _ in range(2))
    copy = best_seconds(lambda: target.copy_(source))

    def fresh() -> None:
        # An anonymous mapping, as malloc makes one for a large block: every page of it is cleared by the kernel first.
        with mmap.mmap(-1, copied) as block:
            view = torch.frombuffer(block, dtype=torch.float32)
            view.fill_(1)
            del view

    return {"memory copy": 2 * copied / copy, "fresh memory": copied / best_seconds(fresh, repeats=3)}


def microloop_rates(threads: int, rounds: int = ROUNDS) -> tuple[dict[str, float], dict[str, str]]:
    """Operations a second of multiply-add instructions on all threads at once, where they can be compiled and run."""
    flags = processor_flags()
    wanted = [loop for loop in MICROLOOPS if set(loop.flags) <= flags]
    skipped = {loop.function: f"this processor lacks {', '.join(loop.flags)}" for loop in MICROLOOPS if loop not in wanted}
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {}, skipped | {loop.function: "no C compiler here" for loop in wanted}
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = compiled(compiler, wanted, Path(folder)) if wanted else None
        except (subprocess.CalledProcessError, OSError) as error:
            why = str(getattr(error, "stderr", "") or error).strip()[-200:]
            return {}, skipped | {loop.function: f"{compiler}: {why}" for loop in wanted}
        return {loop.function: _rate(getattr(library, loop.function), loop, threads, rounds) for loop in wanted}, skipped


def compiled(compiler: str, loops: Iterable[Microloop], folder: Path) -> ctypes.CDLL:
    """fma.c as a library with these loops."""
    target = folder / "fma.so"
    defines = [f"-D{loop.define}" for loop in loops if loop.define]
    # Not -ffast-math: it would let the compiler shorten the sums that are timed.
    command = [compiler, "-O2", "-shared", "-fPIC", *defines, str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(target))


def _rate(function: Any, loop: Microloop, threads: int, rounds: int) -> float:
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_long]
    with ThreadPoolExecutor(threads) as pool:
        # ctypes lets go of the interpreter's lock, so that the threads run side by side.
        seconds = best_seconds(lambda: list(pool.map(function, [rounds] * threads)), repeats=3)
    return threads * rounds * ACCUMULATORS * loop.operations / seconds


def processor_flags() -> set[str]:
    """What the processor says that it can do; empty where there is no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="ascii", errors="ignore").splitlines() if cpuinfo.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def limit_of(rates: Mapping[str, float], precision: str) -> tuple[str, float] | None:
    """The highest measured rate for a precision ("fp32", "bf16", "int8", "memory") and its name; None if nothing measured bounds it."""
    found = [(rates[name], name) for name in BOUNDS.get(precision, ()) if name in rates]
    return (max(found)[1], max(found)[0]) if found else None


def main() -> None:
    """Print the rates as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure_limits(parser.parse_args().threads), indent=1))


if __name__ == "__main__":
    main()
