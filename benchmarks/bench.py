"""`make bench`: ours alone, on this machine, in twenty minutes; writes results/latest.json and docs/performance.md.

    python -m benchmarks.bench [--only WORDS] [--rounds 3] [--quick] [--out NAME]

"default" is plain PyTorch as people write it: float32, eager, contiguous, torch's own instance norm, no recycling of memory, in
`torch.inference_mode`. Every engine has the same weights; each is timed in a process of its own, all in turn, in rounds; a row is
the median of its rounds. The limits are measured in the same run, before the first round and after the last.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import CACHE, FIELDS, REPOSITORY, about, read_results, say, write_results
from benchmarks.timing import PREPARING_SECONDS, Work, rows_of, run_child, run_rounds
from benchmarks.works import works


def main() -> None:
    """Run, write, print."""
    options = parsed()
    chosen = [work for work in works(options.tiny) if options.only.lower() in work.name.lower()]
    if not chosen:
        sys.exit(f"bench: no work has `{options.only}` in its name: {', '.join(work.name for work in works(options.tiny))}")
    threads = os.cpu_count() or 1
    say(f"limits of this machine, {threads} threads ...")
    first = limits(threads)
    say("weights and bundles (made once, kept in build/benchmarks) ...")
    prepare(chosen)
    found = run_rounds(chosen, 1 if options.quick else options.rounds, run)
    measured = best_limits(first, limits(threads))
    compare_labels(chosen, found)
    rows = rows_of(chosen, found, measured.get("rates", {}))
    finish(rows, measured, options)


def finish(rows: list[dict[str, Any]], measured: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Write the files (works that were left out keep their old rows) and print the table."""
    from tools.performance import write_page

    if options.only:
        done = {row["work"] for row in rows}
        order = [work.name for work in works(options.tiny)]
        kept = [row for row in read_results(options.out)[0] if row["work"] not in done]
        rows = sorted([*kept, *rows], key=lambda row: _place(order, row["work"]))
    command = "make bench" if sys.argv[1:] == [] else " ".join(["python -m benchmarks.bench", *sys.argv[1:]])
    write_results(options.out, rows, about(command, measured))
    for row in rows:
        say("  ".join(f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}" for name in FIELDS))
    if options.out == "latest":
        write_page()


def _place(order: list[str], work: str) -> int:
    return order.index(work) if work in order else len(order)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="works with these words in their name; the others keep their rows")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each engine (two of those that take long)")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--tiny", action="store_true", help="works of a second each, to try this program out")
    parser.add_argument("--out", default="latest", help="name of the file in benchmarks/results")
    return parser.parse_args()


def limits(threads: int) -> dict[str, Any]:
    """Rates of this machine, from a process of their own; nothing if that fails."""
    command = [sys.executable, "-m", "benchmarks.limits", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode:
        say(f"limits: {done.stderr.strip()[-300:]}")
        return {}
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def best_limits(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The higher of two measurements of each rate: a busy moment makes a limit look lower than it is, never higher."""
    both = [one.get("rates", {}) for one in (first, second)]
    rates = {name: max(one.get(name, 0.0) for one in both) for name in both[0] | both[1]}
    return {**first, **second, "rates": rates}


def prepare(chosen: list[Work]) -> None:
    """Weights and bundles of every setting that is asked for, in processes of their own."""
    settings = [str(work.request["setting"]) for work in chosen if work.request["kind"] == "forward"]
    if any(work.request.get("what") == "predict" for work in chosen):
        settings.append("modern_unet 512x512")
    for setting in dict.fromkeys(settings):
        answer = run_child({"kind": "prepare", "setting": setting, "folder": str(CACHE)}, limit_seconds=PREPARING_SECONDS)
        say(f"  {setting}: {answer.get('error') or answer.get('note')}")


def run(work: Work, engine: str) -> dict[str, Any]:
    """One process."""
    return run_child({**work.request, "engine": engine}, work.threads)


def compare_labels(chosen: list[Work], found: Mapping[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Note in every run that wrote labels how many of them are the default's."""
    for work in chosen:
        reference = next((run["labels"] for run in found[work.name, work.engines[0]] if "labels" in run), None)
        for run in (run for engine in work.engines for run in found[work.name, engine] if reference and "labels" in run):
            run["labels_equal"] = float(np.mean(np.load(Path(run["labels"])) == np.load(Path(reference))))


if __name__ == "__main__":
    main()
