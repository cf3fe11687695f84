"""A hundred kills of trainings, and each fault at each call that a training makes to the disk; `tools.soak` runs them."""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import kills
from tests.forks import End, Nursery
from tests.kills import ALWAYS, Setup, Tally

KILLS = 100
# Of one run, before it is left alone.
KILLS_A_RUN = 6
WORDS = {
    "before": "killed before a call to the disk",
    "half": "killed in the middle of a write",
    "full": "disk full from a call on",
    "broken": "disk broken at a call",
}
Rows = list[dict[str, Any]]


@contextmanager
def _started(**plan: int) -> Iterator[tuple[Nursery, tuple[Setup, Setup]]]:
    """Two trainings in a folder of their own, and a process that forks them."""
    with tempfile.TemporaryDirectory(prefix="microtome-soak-") as name:
        flat, deep = kills.setups(Path(name), **plan)
        with Nursery(flat.order(flat.folder / "first").words) as nursery:
            yield nursery, (flat, deep)


def run(seconds: float, most: int = KILLS) -> Rows:
    """Kill trainings of pictures and of volumes at random instants, until that was so often, or the time is over.

    Returns:
        a row for pictures and one for volumes: part, what, tried (kills), failed, seconds, and what was found.
    """
    end, seed = time.monotonic() + seconds, time.time_ns()
    rng = random.Random(seed)
    tallies, spent = {"2D": Tally(), "3D": Tally()}, {"2D": 0.0, "3D": 0.0}
    with _started(steps=8, validations=4) as (nursery, both):
        known: dict[str, tuple[dict[str, Any], End]] = {setup.name: kills.unbroken(nursery, setup) for setup in both}
        while time.monotonic() < end and sum(tally.tried for tally in tallies.values()) < most:
            setup = min(both, key=lambda setup: tallies[setup.name].tried)
            begun, tally = time.monotonic(), tallies[setup.name]
            left = most - sum(each.tried for each in tallies.values())
            kills.kill_again_and_again(nursery, setup, known[setup.name], min(KILLS_A_RUN, left), rng, tally)
            spent[setup.name] += time.monotonic() - begun
    return [
        _row("kills", f"training, {name}: killed at a random instant", tally, spent[name]) | {"at": dict(tally.where), "seed": seed}
        for name, tally in tallies.items()
    ]


def run_faults(seconds: float) -> Rows:
    """Each fault at each call of a training of two steps, its start and its end: pictures first, then volumes, in any order.

    Returns:
        a row for each kind of fault and of training: part, what, tried, of (how many there are), failed, seconds, and what was found.
    """
    end, rng, rows = time.monotonic() + seconds, random.Random(time.time_ns()), []
    with _started(steps=2, validations=2) as (nursery, both):
        for setup in both:
            wanted, _ = kills.unbroken(nursery, setup, ALWAYS)
            calls = kills.calls_of(nursery, setup)
            # The start and the end of volumes are those of pictures, but for the predictions.
            places = ("",) if setup is both[0] else ("checkpoints", "model/.", "validation")
            faults = [fault for fault in kills.faults_at(calls, tuple(WORDS)) if calls[fault[0] - 1][1].startswith(places)]
            rng.shuffle(faults)
            tallies, spent = {kind: Tally() for kind in WORDS}, dict.fromkeys(WORDS, 0.0)
            for fault in faults:
                begun = time.monotonic()
                # A third of the time is for volumes, whatever pictures take.
                if begun > end - (seconds / 3 if setup is both[0] else 0.0):
                    break
                kills.survive(nursery, setup, wanted, fault, tallies[fault[1]])
                spent[fault[1]] += time.monotonic() - begun
            for kind, tally in tallies.items():
                row = _row("faults", f"training, {setup.name}: {WORDS[kind]}", tally, spent[kind])
                rows.append(row | {"of": sum(each == kind for _, each in faults)})
    return rows


def _row(part: str, what: str, tally: Tally, seconds: float) -> dict[str, Any]:
    return {
        "part": part,
        "what": what,
        "tried": tally.tried,
        "failed": len(tally.wrong),
        "seconds": round(seconds, 1),
        "findings": tally.wrong[:5],
    }
