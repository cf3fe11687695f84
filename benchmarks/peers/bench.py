"""`make bench-peers`: beside nnU-Net, MONAI, TorchIO and batchgeneratorsv2; writes results/peers.json and docs/performance.md.

    .venv-peers/bin/python -m benchmarks.peers.bench [--only WORDS] [--rounds 3] [--slow-rounds 1] [--tiny]

Same network, weights, patch and threads for all; each in a process of its own, in turn. "ratio_to_default" is the peer's time (the first
engine of each work) over the row's. Volumes go from file to file by each program's own command; everything it does counts.
"""

import argparse
import os
import sys
from typing import Any

from benchmarks.bench import best_limits, compare_labels, limits
from benchmarks.rows import PACKAGES, about, read_results, say, write_results
from benchmarks.timing import PREPARING_SECONDS, Found, Work, rows_of, run_child, run_rounds

OURS = ("torch", "torch-bf16", "openvino-bf16", "openvino-int8")
PEERS = ("nnunetv2", "monai", "torchio", "batchgeneratorsv2", "dynamic_network_architectures")
NETWORK = "nnunet_plain 64x128x128 5 heads"
TRAINING = ("nnU-Net", "microtome-fp32", "microtome-bf16")
MODULE = "benchmarks.peers.child"


def quick_works() -> list[Work]:
    """Works of seconds."""
    parts = [Work("peers: help", {"kind": "help"}, ("nnU-Net", "microtome"))]
    for shape in ((512, 512), (64, 128, 128)):
        name = f"peers: augmentation {'x'.join(map(str, shape))}, one core"
        parts.append(Work(name, {"kind": "augment", "shape_vox": shape}, ("batchgeneratorsv2", "MONAI", "TorchIO", "microtome"), threads=1))
    return [*parts, Work(f"peers: training step {NETWORK}", {"kind": "train", "setting": NETWORK}, TRAINING)]


def slow_works(*, tiny: bool = False) -> list[Work]:
    """Volumes from file to file."""
    size = "80x80x80" if tiny else "160x256x256"
    return [
        Work(
            f"peers: volume {size}, {classes} classes, file to file",
            {"kind": "predict", "classes": classes, "tiny": tiny},
            ("nnU-Net", "MONAI", *OURS),
        )
        for classes in ((3,) if tiny else (3, 14))
    ]


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="works with these words in their name; the others keep their rows")
    parser.add_argument("--rounds", type=int, default=3, help="of the works of seconds")
    parser.add_argument("--slow-rounds", type=int, default=1, help="of the volumes")
    parser.add_argument("--tiny", action="store_true", help="a tiny volume, to try this program out")
    parser.add_argument("--out", default="peers", help="name of the file in benchmarks/results")
    options = parser.parse_args()
    groups = (quick_works(), slow_works(tiny=options.tiny))
    quick, slow = ([work for work in group if options.only.lower() in work.name.lower()] for group in groups)
    threads = os.cpu_count() or 1
    first = limits(threads)
    prepared = {work.name: prepared_for(work) for work in slow}
    for name, answer in prepared.items():
        say(f"{name}: {answer.get('error') or answer.get('note')}")
    ready = [work for work in slow if "error" not in prepared[work.name]]
    found = run_rounds(quick, options.rounds, lambda work, engine: run({**work.request, "engine": engine}, work))
    found |= run_rounds(ready, options.slow_rounds, lambda work, engine: run({**work.request, "engine": engine}, work))
    found |= {(work.name, engine): [prepared[work.name]] for work in slow if work not in ready for engine in work.engines}
    measured = best_limits(first, limits(threads))
    finish([*quick, *slow], found, measured, options)


def finish(done: list[Work], found: Found, measured: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the rows; works that were left out keep theirs."""
    compare_labels(done, found)
    rows = rows_of(done, found, measured.get("rates", {}))
    if options.only:
        names = {work.name for work in done}
        rows = [row for row in read_results(options.out)[0] if row["work"] not in names] + rows
    command = "make bench-peers" if sys.argv[1:] == [] else " ".join(["python -m benchmarks.peers.bench", *sys.argv[1:]])
    write_results(options.out, rows, about(command, measured, (*PACKAGES, *PEERS)))
    for row in rows:
        say({name: row.get(name) for name in ("work", "engine", "seconds", "ratio_to_default", "labels_equal", "peak_mb", "error")})
    if options.out == "peers":
        from tools.performance import write_page

        write_page()


def prepared_for(work: Work) -> dict[str, Any]:
    """The files of a work, made when they are missing."""
    return run_child({**work.request, "kind": "prepare"}, module=MODULE, limit_seconds=PREPARING_SECONDS)


def run(request: dict[str, Any], work: Work) -> dict[str, Any]:
    """One process of the peers' environment; a volume may take it minutes."""
    return run_child(request, work.threads, module=MODULE, limit_seconds=PREPARING_SECONDS)


if __name__ == "__main__":
    main()
