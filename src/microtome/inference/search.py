"""Which engine ends a job soonest: open the one that starts soonest, and measure others while that can pay its price.

What is remembered are measurements (`measurements.py`), so that a job of another size is chosen for anew, without timing anything
twice. No torch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microtome.bundle import Samples
from microtome.errors import ConfigError, MicrotomeError
from microtome.geometry import Shape
from microtome.inference.agreement import Agreement, agreement
from microtome.inference.measurements import Measured, Measurements
from microtome.inference.mirroring import Engine

# Engines that nobody has measured are opened while that costs, all together, less than this share of the time that the job would
# still take. Among those measured, a better one saved a third to a half of it; and what is learned serves the next jobs too.
WORTH_TRYING = 0.2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine that might do the job.

    Attributes:
        name: what `--engine` calls it.
        version: of its library; other versions are measured anew.
        precision: of its arithmetic, by which it is held to `agreement.BOUNDS`; "" for the oracle itself.
        open: makes it ready.
        startup_seconds: what that is expected to take.
        fresh: whether opening takes now what it takes a fresh process, so that it may be remembered.
        source: what the library runs, as far as is known by now: a mark of the graph's bytes, which are measured anew when they change.
    """

    name: str
    version: str
    precision: str
    open: Callable[[], Engine]
    startup_seconds: float
    fresh: bool = True
    source: Callable[[], str] = lambda: ""

    @property
    def key(self) -> str:
        """Its name in the measurements."""
        return f"{self.name} {self.version} {self.source()}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be computed.

    Attributes:
        tile_vox: what the network is given at a time, without channels.
        tiles: how often.
    """

    tile_vox: Shape
    tiles: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The engine for a job.

    Attributes:
        engine: opened and found to agree.
        reason: why this one, for people.
    """

    engine: Engine
    reason: str


class Search:
    """One choice among candidates.

    Args:
        candidates: the first of equals is preferred.
        samples: what they have to agree with; None: nothing is compared and nothing timed.
        measurements: what is known of them; what is learned is written there.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        samples: Samples | None,
        measurements: Measurements,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.candidates, self.samples, self.measurements, self.clock = tuple(candidates), samples, measurements, clock
        self.opened: dict[str, Engine] = {}
        self.refused: dict[str, str] = {}
        self.spent_seconds = 0.0

    def named(self, why: str = "as asked") -> Choice:
        """The only candidate, which somebody asked for by its name, or which is the only one that can do it.

        Raises:
            ConfigError: it does not agree with the oracle.
        """
        (candidate,) = self.candidates
        engine = self._open(candidate)
        self.measurements.write()
        found = self._known(candidate).agreement
        if not self._agrees(candidate):
            got = found.failure(candidate.precision) if found else "nothing"
            do = "use --engine torch, or auto, which takes the fastest that agrees"
            raise ConfigError(f"--engine {candidate.name}", expected="the answers of the trained network", got=got, do=do, code="C026")
        return Choice(engine=engine, reason=f"{candidate.name}: {why}{_as_torch(candidate, found)}")

    def best(self, job: Job) -> Choice:
        """The candidate that is expected to end the job soonest.

        Raises:
            ConfigError: none can be used.
        """
        best = self._first(job)
        while (other := self._next(best, job)) is not None:
            began = self.clock()
            if self._try(other, job):
                best = min(best, other, key=lambda one: self._left(one, job) or 0.0)
            self.spent_seconds += self.clock() - began
        self.measurements.write()
        return Choice(engine=self.opened[best.name], reason=self._reason(best, job))

    def _first(self, job: Job) -> Candidate:
        """The usable candidate that is expected to end the job soonest; one not measured is taken to be as slow as any that is."""
        known = [seconds for one in self.candidates if (seconds := self._seconds(one, job)) is not None]
        slowest = max(known, default=0.0)

        def total(one: Candidate) -> float:
            seconds = self._seconds(one, job)
            return self._startup(one) + job.tiles * (slowest if seconds is None else seconds)

        for candidate in sorted(filter(self._possible, self.candidates), key=total):
            if self._try(candidate):
                return candidate
        got = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        raise ConfigError("--engine auto", expected="an engine that can be used", got=got or "none", do="use --engine torch", code="C025")

    def _next(self, best: Candidate, job: Job) -> Candidate | None:
        """Another candidate that is worth being opened, if there is one: known to be faster, or cheap beside what is left to do."""
        others = [one for one in self.candidates if one.name not in self.opened and self._possible(one)]
        left = self._left(best, job)
        if left is None or not others:
            return None
        totals = [(self._startup(one) + job.tiles * seconds, one) for one in others if (seconds := self._seconds(one, job)) is not None]
        total, faster = min(totals, key=lambda pair: pair[0], default=(left, None))
        if faster is not None and total < left:
            return faster
        unknown = [one for one in others if self._seconds(one, job) is None]
        cheapest = min(unknown, key=self._startup, default=None)
        if cheapest is None or self._price(cheapest, best, job) >= WORTH_TRYING * left:
            return None
        # The first look may have been a guess from the golden input; what so much hangs on is timed.
        self._time(best, job)
        left = self._left(best, job) or 0.0
        return cheapest if self._price(cheapest, best, job) < WORTH_TRYING * left else None

    def _price(self, candidate: Candidate, best: Candidate, job: Job) -> float:
        """Seconds to learn how fast a candidate is, beside those spent so: to open and compare it and time two tiles at the best's pace."""
        return self.spent_seconds + self._startup(candidate) + 3 * (self._left(best, job) or 0.0) / job.tiles

    def _try(self, candidate: Candidate, timed: Job | None = None) -> bool:
        """Open and compare a candidate, and time a tile of a job; False, with the reason noted, if it cannot be used."""
        try:
            self._open(candidate)
            if timed is not None and self._possible(candidate) and self._seconds(candidate, timed) is None:
                self._time(candidate, timed)
        except MicrotomeError as error:
            self.refused[candidate.name] = f"expected {error.expected}, got {error.got}"
            return False
        return self._possible(candidate)

    def _open(self, candidate: Candidate) -> Engine:
        """Make a candidate ready, and compare it with the oracle where that is not remembered."""
        began = self.clock()
        engine = candidate.open()
        if candidate.fresh:
            self._note(candidate, startup_seconds=self.clock() - began)
        if self.samples is not None and self._known(candidate).agreement is None:
            self._compare(candidate, engine, self.samples)
        self.opened[candidate.name] = engine
        return engine

    def _compare(self, candidate: Candidate, engine: Engine, samples: Samples) -> None:
        """Measure how near it comes to the oracle, and by the way a first guess of its speed; the oracle's own build is looked at too."""
        image_CS = np.ascontiguousarray(samples.golden_CS, np.float32)
        began = self.clock()
        logits_KS = engine(image_CS)
        seconds = (self.clock() - began) / image_CS[0].size
        self._note(candidate, agreement=agreement(logits_KS, samples.logits_KS), voxel_seconds=seconds)

    def _time(self, candidate: Candidate, job: Job) -> None:
        """Measure a tile, once more than needed: the first one compiles and fills caches."""
        if self.samples is None or job.tile_vox in self._known(candidate).tiles:
            return
        engine, tile_CS = self.opened[candidate.name], tile_like(self.samples.golden_CS, job.tile_vox)
        engine(tile_CS)
        began = self.clock()
        engine(tile_CS)
        self._note(candidate, tiles={job.tile_vox: self.clock() - began})

    def _possible(self, candidate: Candidate) -> bool:
        """Whether nothing is known against a candidate; what is, is noted."""
        if candidate.name not in self.refused and not self._agrees(candidate):
            found = self._known(candidate).agreement
            self.refused[candidate.name] = found.fault(candidate.precision) if found else ""
        return candidate.name not in self.refused

    def _agrees(self, candidate: Candidate) -> bool:
        """Whether it is the oracle, near enough to it, or not yet compared."""
        found = self._known(candidate).agreement
        return found is None or not candidate.precision or found.holds(candidate.precision)

    def _known(self, candidate: Candidate) -> Measured:
        return self.measurements.of(candidate.key)

    def _note(self, candidate: Candidate, **changes: Any) -> None:
        self.measurements.note(candidate.key, **changes)

    def _startup(self, candidate: Candidate) -> float:
        """Seconds to open a candidate: remembered where that holds for this process, else as expected."""
        known = self._known(candidate).startup_seconds
        return candidate.startup_seconds if known is None or not candidate.fresh else known

    def _seconds(self, candidate: Candidate, job: Job) -> float | None:
        return self._known(candidate).tile_seconds(job.tile_vox)

    def _left(self, candidate: Candidate, job: Job) -> float | None:
        """Seconds that an opened candidate needs for the job: by what was timed, or by the first guess; None without either."""
        seconds, guess = self._seconds(candidate, job), self._known(candidate).voxel_seconds
        if seconds is None and guess is not None:
            seconds = guess * math.prod(job.tile_vox)
        return None if seconds is None else job.tiles * seconds

    def _reason(self, best: Candidate, job: Job) -> str:
        """`openvino-bf16: 0.39 s a tile against 1.08 (torch); labels as torch 99.99 %`."""
        taken = {one.name: seconds for one in self.candidates if (seconds := self._seconds(one, job)) is not None}
        own = taken.pop(best.name, None)
        why = "starts soonest, and the job is small" if own is None else f"{own:.2g} s a tile"
        others = " and ".join(f"{seconds:.2g} ({name})" for name, seconds in taken.items() if name not in self.refused)
        against = f" against {others}" if others and own is not None else ""
        refused = ", ".join(f"{name} ({reason})" for name, reason in self.refused.items())
        refusals = f"; not used: {refused}" if refused else ""
        return f"{best.name}: {why}{against}{_as_torch(best, self._known(best).agreement)}{refusals}"


def _as_torch(candidate: Candidate, found: Agreement | None) -> str:
    """What is said of the agreement, if there was any to look at."""
    return f"; {found}" if found is not None and candidate.precision else ""


def tile_like(image_CS: np.ndarray, tile_vox: Shape) -> np.ndarray:
    """An image (C, *S) repeated or cut to a tile (C, *tile_vox) float32: what engines are timed on."""
    repeats = [-(-size // have) for size, have in zip(tile_vox, image_CS.shape[1:], strict=True)]
    repeated = np.tile(image_CS, (1, *repeats))
    return np.ascontiguousarray(repeated[(slice(None), *(slice(size) for size in tile_vox))], np.float32)
