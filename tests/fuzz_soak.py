"""A hundred thousand mutated inputs of every format, and some that are guided by what they reach in our code.

`run` goes on until each format has all of its inputs or the time is over: next is always what has the least of its own, so that
slow formats get more of the time. Every input that is counted was read; nothing is estimated.
"""

import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests import fuzz_documents, fuzz_images, fuzz_stores
from tests.fuzz_guided import guided_outcome
from tests.fuzzing import Outcome, Target, fuzz

# Of each format.
INPUTS = 100_000
# What is read of a target before it is asked again which has the least.
_SLICE_SECONDS = 15.0
# Of the time, what is kept for coverage to guide, and how long it does so of a target, whose start takes as long.
_GUIDED_SHARE, _GUIDED_SECONDS = 0.05, 10.0
_Makers = tuple[Callable[[], Target | tuple[Target, ...]], ...]
# As people name them: a format's versions, and the documents of a run, are one. In order of speed, the fastest first.
FORMATS: MappingProxyType[str, _Makers] = MappingProxyType(
    {
        "PNG": (fuzz_images.pngs,),
        "BMP": (fuzz_images.bmps,),
        "NPY": (fuzz_images.npys,),
        "GIF": (fuzz_images.gifs,),
        "JPEG": (fuzz_images.jpegs,),
        "NRRD": (fuzz_images.nrrds,),
        "MetaImage": (fuzz_images.metaimages, fuzz_images.detached_headers),
        "NIfTI": (fuzz_images.niftis, fuzz_images.packed_niftis),
        "TIFF": (fuzz_images.tiffs, fuzz_images.ome_tiffs),
        "microtome.yaml": (fuzz_documents.microtome_yamls,),
        "dataset.json": (fuzz_documents.dataset_jsons,),
        "model bundle": (fuzz_documents.bundles,),
        "foreign weights": (fuzz_documents.foreign_weights,),
        "checkpoint": (fuzz_documents.checkpoints,),
        "plan.yaml": (fuzz_documents.plans,),
        "OME-Zarr": (fuzz_stores.ome_zarr_4, fuzz_stores.ome_zarr_5),
        "N5": (fuzz_stores.n5,),
        "precomputed": (fuzz_stores.precomputed,),
        "Zarr": (fuzz_stores.zarr_2, fuzz_stores.zarr_3),
        "run folder": (fuzz_documents.runs, fuzz_documents.listings, fuzz_documents.comparisons),
        "HDF5": (fuzz_images.hdf5s,),
        "DICOM": (fuzz_images.dicoms, fuzz_images.dicom_series, fuzz_images.segmentations),
    }
)


@dataclass
class _Tally:
    """What became of a format so far."""

    name: str
    tried: int = 0
    guided: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    known: frozenset[str] = frozenset()

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Count what was read in so many seconds; what was found before is not told again."""
        self.tried, self.seconds = self.tried + outcome.tried, self.seconds + seconds
        for finding in outcome.findings:
            if finding.kind not in self.known:
                self.findings.append(f"seed {outcome.seed}, {finding}")
                self.known |= {finding.kind}

    def row(self) -> dict[str, Any]:
        """For the table of the soak."""
        return {
            "part": "fuzz",
            "what": self.name,
            "tried": self.tried,
            "of": INPUTS,
            "guided": self.guided,
            "failed": len(self.findings),
            "seconds": round(self.seconds, 1),
            "findings": self.findings,
        }


@dataclass
class _Job:
    """A target, the seed of its inputs, how many of them were read so far, in their order, and whether some are read now."""

    tally: _Tally
    target: Target
    goal: int
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    tried: int = 0
    busy: bool = False

    @property
    def share(self) -> float:
        """Of the inputs, what was read."""
        return self.tried / self.goal


class _Core(NamedTuple):
    """A core by its number, and whether others are served first."""

    number: int
    aside: bool


@cache
def targets_of(name: str) -> tuple[Target, ...]:
    """What is read of a format: one target, or several for its kinds of files."""
    made = [maker() for maker in FORMATS[name]]
    return tuple(target for each in made for target in (each if isinstance(each, tuple) else (each,)))


def goals(inputs: int, targets: Sequence[Target]) -> list[int]:
    """How many inputs each target of a format has by its weight, rounded up."""
    weights = sum(target.weight for target in targets)
    return [-int(-inputs * target.weight // weights) for target in targets]


def run(seconds: float, formats: Sequence[str] | None = None, *, guided: bool = True, joined: Path | None = None) -> list[dict[str, Any]]:
    """Read mutants of each format until all have had `INPUTS`, or the time is over.

    Args:
        seconds: of wall time, for all of it.
        formats: by name; None: all.
        guided: whether the end of the time is guided by coverage, where atheris is installed.
        joined: a file that appears when more than the first core is free; until then, what is left over of them is taken. None: all are.

    Returns:
        A row a format: part, what, tried `of` how many (of which `guided` by coverage), failed, seconds of one process, and what was
        found, each kind once.

    Raises:
        KeyError: no such format.
    """
    names = list(FORMATS) if formats is None else list(formats)
    if unknown := set(names) - FORMATS.keys():
        raise KeyError(f"{min(unknown)}: one of {', '.join(FORMATS)}")
    tallies = {name: _Tally(name) for name in FORMATS if name in names}
    jobs = [
        _Job(tally, target, goal)
        for tally in tallies.values()
        for target, goal in zip(targets_of(tally.name), goals(INPUTS, targets_of(tally.name)), strict=True)
    ]
    end = time.monotonic() + seconds
    lock, cores = threading.Lock(), sorted(os.sched_getaffinity(0))

    def aside(number: int) -> bool:
        """Whether a core is another's."""
        return number > 0 and joined is not None and not joined.exists()

    def work(number: int) -> None:
        """One of the cores: slices until nothing is left, then what coverage guides."""
        last = end - (_GUIDED_SHARE * seconds if guided else 0.0)
        while last - time.monotonic() > 1 and any(job.tried < job.goal for job in jobs):
            if (job := _next(jobs, lock)) is None:
                time.sleep(0.1)
            else:
                _read(job, min(_SLICE_SECONDS, last - time.monotonic()), _Core(cores[number], aside(number)), lock)
        while guided and not aside(number) and end - time.monotonic() > 2 * _GUIDED_SECONDS and _guide(random.choice(jobs), lock):
            pass

    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(work, range(len(cores))))
    return [tallies[name].row() for name in names]


def _next(jobs: Sequence[_Job], lock: threading.Lock) -> _Job | None:
    """What has the least of its inputs, of what nobody reads now; None where there is nothing."""
    with lock:
        job = min((job for job in jobs if job.tried < job.goal and not job.busy), key=lambda one: one.share, default=None)
        if job is not None:
            job.busy = True
        return job


def _read(job: _Job, seconds: float, core: _Core, lock: threading.Lock) -> None:
    """A slice of a target's inputs."""
    begun = time.monotonic()
    left = job.goal - job.tried
    known = job.tally.known
    outcome = fuzz(job.target, left, seconds=seconds, seed=job.seed, first=job.tried, known=known, core=core.number, aside=core.aside)
    took = time.monotonic() - begun
    with lock:
        job.busy, job.tried = False, job.tried + outcome.tried
        job.tally.add(outcome, took)
    sys.stdout.write(f"{job.target.name} ({job.target.file}): {job.tried} of {job.goal}, {outcome.tried} of them in {took:.1f} s\n")


def _guide(job: _Job, lock: threading.Lock) -> bool:
    """Read inputs that coverage leads to; False where atheris is not installed."""
    begun = time.monotonic()
    outcome = guided_outcome(job.target.name, targets_of(job.target.name).index(job.target), _GUIDED_SECONDS)
    if outcome is None:
        return False
    with lock:
        job.tally.add(outcome, time.monotonic() - begun)
        job.tally.guided += outcome.tried
    return True
