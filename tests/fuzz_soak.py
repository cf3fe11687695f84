"""A hundred thousand mutated inputs of every format, some of them guided by what they reach in our code.

`run` shares its time out among the formats: as many processes at a time as there are cores, the fast formats first, so that what
these leave goes to the slow ones. Every input that is counted was read; nothing is estimated.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from tests import fuzz_documents, fuzz_images, fuzz_stores
from tests.fuzz_guided import guided_outcome
from tests.fuzzing import Outcome, Target, fuzz

# Of each format.
INPUTS = 100_000
# Of the time, what coverage guides; and the least that is worth the start of such a process.
_GUIDED_SHARE, _LEAST_GUIDED_SECONDS = 0.15, 5.0
_Makers = tuple[Callable[[], Target | tuple[Target, ...]], ...]
# In order of speed, the fastest first.
FORMATS: MappingProxyType[str, _Makers] = MappingProxyType(
    {
        "predictions.json": (fuzz_documents.listings,),
        "compare.json": (fuzz_documents.comparisons,),
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
        "OME-Zarr 0.4": (fuzz_stores.ome_zarr_4,),
        "OME-Zarr 0.5": (fuzz_stores.ome_zarr_5,),
        "N5": (fuzz_stores.n5,),
        "precomputed": (fuzz_stores.precomputed,),
        "Zarr 2": (fuzz_stores.zarr_2,),
        "Zarr 3": (fuzz_stores.zarr_3,),
        "run folder": (fuzz_documents.runs,),
        "HDF5": (fuzz_images.hdf5s,),
        "DICOM": (fuzz_images.dicoms, fuzz_images.dicom_series),
        "DICOM segmentation": (fuzz_images.segmentations,),
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

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Count what was read in so many seconds."""
        self.tried, self.seconds = self.tried + outcome.tried, self.seconds + seconds
        self.findings += [f"seed {outcome.seed}, {finding}" for finding in outcome.findings]

    def row(self) -> dict[str, Any]:
        """For the table of the soak."""
        return {
            "part": "fuzz",
            "what": self.name,
            "tried": self.tried,
            "guided": self.guided,
            "failed": len(self.findings),
            "seconds": round(self.seconds, 1),
            "findings": self.findings,
        }


@cache
def targets_of(name: str) -> tuple[Target, ...]:
    """What is read of a format: one target, or several for its kinds of files."""
    made = [maker() for maker in FORMATS[name]]
    return tuple(target for each in made for target in (each if isinstance(each, tuple) else (each,)))


def share(inputs: int, targets: int) -> int:
    """The inputs of each of so many targets, rounded up."""
    return -(-inputs // targets)


def run(seconds: float, formats: Sequence[str] | None = None, *, guided: bool = True) -> list[dict[str, Any]]:
    """Read mutants of each format until all have had `INPUTS`, or the time is over.

    Args:
        seconds: of wall time, for all of it.
        formats: by name; None: all.
        guided: whether a part is guided by coverage, where atheris is installed.

    Returns:
        A row a format: part, what, tried (of which `guided` by coverage), failed, seconds of one process, and what was found.

    Raises:
        KeyError: no such format.
    """
    names = list(FORMATS) if formats is None else list(formats)
    if unknown := set(names) - FORMATS.keys():
        raise KeyError(f"{min(unknown)}: one of {', '.join(FORMATS)}")
    tallies = {name: _Tally(name) for name in FORMATS if name in names}
    workers, end = len(os.sched_getaffinity(0)), time.monotonic() + seconds
    if guided:
        each = _GUIDED_SHARE * seconds * workers / sum(len(targets_of(name)) for name in tallies)
        if each >= _LEAST_GUIDED_SECONDS:
            jobs = [(tally, target, each) for tally in tallies.values() for target in targets_of(tally.name)]
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda job: _guide(*job), jobs))
    while (todo := [tally for tally in tallies.values() if tally.tried < INPUTS and not tally.findings]) and end - time.monotonic() > 1:
        _round(todo, workers, end)
    return [tallies[name].row() for name in names]


def _round(tallies: Sequence[_Tally], workers: int, end: float) -> None:
    """Each format once, for its part of the time that is left; what it does not use is left to those behind it."""
    jobs = [
        (tally, target, share(INPUTS - tally.tried, len(targets_of(tally.name)))) for tally in tallies for target in targets_of(tally.name)
    ]
    waiting = len(jobs)

    def work(job: tuple[_Tally, Target, int]) -> None:
        nonlocal waiting
        tally, target, inputs = job
        begun = time.monotonic()
        outcome = fuzz(target, inputs, seconds=max(0.0, end - begun) * workers / max(waiting, workers))
        waiting -= 1
        tally.add(outcome, time.monotonic() - begun)
        sys.stdout.write(f"{target.name} ({target.file}): {outcome.tried} in {time.monotonic() - begun:.1f} s\n")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, jobs))


def _guide(tally: _Tally, target: Target, seconds: float) -> None:
    """Read inputs that coverage leads to."""
    begun = time.monotonic()
    outcome = guided_outcome(target.name, targets_of(target.name).index(target), seconds)
    if outcome is not None:
        tally.add(outcome, time.monotonic() - begun)
        tally.guided += outcome.tried
