"""One image -> a prediction in an OME-Zarr store: in this process, or as jobs that any process can do a part of."""

import heapq
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microtome.data.case import Case
from microtome.data.reading import open_case
from microtome.errors import ConfigError, ShortOfMemoryError
from microtome.images.stores import name_of
from microtome.images.volume import Volume, url_of
from microtome.inference.bricks import BRICKS, Bricks, Record, recorded
from microtome.inference.layout import Cost
from microtome.inference.mirroring import TTA
from microtome.inference.predict import Task, Wanted
from microtome.inference.predictor import Predictor, load
from microtome.inference.slabs import Box
from microtome.inference.source import Grey, measure
from microtome.machine import is_short_of_memory, resident_bytes

# (voxels done, of).
OnVoxels = Callable[[int, int], None]
# A block is at most so many tiles deep: tiles across its ends, computed for both blocks, are then a sixteenth of all.
MOST_DEPTHS = 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process must know to compute a part of a prediction; plain values, which can be sent.

    Attributes:
        bundle: folder of the model.
        case: the image.
        place: the store to write.
        record: as it stands in the store.
        wanted: what is to come of it.
        device: as in `Predictor`.
        tta: the same.
        head: the same.
    """

    bundle: Path
    case: Case
    place: Path
    record: Record
    wanted: Wanted
    device: str
    tta: TTA
    head: int | None


def open_store(
    predictor: Predictor,
    case: Case,
    place: Path,
    wanted: Wanted,
    *,
    limit_bytes: int | None = None,
    images: int = 1,
    request: Mapping[str, Any] | None = None,
) -> tuple[Bricks, Volume]:
    """The store of a prediction, with what an earlier call decided or else decided now; and the image.

    Args:
        predictor: the model.
        case: the image, the first of so many.
        place: of the store.
        wanted: what is to come of it.
        limit_bytes: memory that this process may take, all in all.
        images: how many are to come.
        request: what else tells this prediction from others, as JSON has it.

    Raises:
        ConfigError: the memory is not enough, or an engine was named that is not the one that the store was begun with.
        DataError: another prediction lies there, or the image does not fit the model.
    """
    volume = open_case(case)
    request = request_of(predictor, case, volume, wanted) | dict(request or {})
    found = recorded(place)
    if found is not None and not found.complete:
        _check_going_on(predictor, place, found, limit_bytes)
    if found is None:
        sides = BRICKS[len(volume.shape_vox)]
        layout = predictor.layout(volume, wanted, images=images, limit_bytes=limit_bytes, bricks=sides)
        moments = measure(volume, layout.shapes.grid, predictor.bundle.plan)
        engine = predictor.engine
        assert engine is not None, "it was chosen for the layout"
        record = Record(request=request, engine=engine.name, layout=layout, moments=moments)
    else:
        record = replace(found, request=request)
    return Bricks(place, record, wanted, predictor.bundle.legend), volume


def _check_going_on(predictor: Predictor, place: Path, found: Record, limit_bytes: int | None) -> None:
    """Refuse to go on with a prediction that was begun with another engine, or for more memory.

    Raises:
        ConfigError: says which engine, or how much memory.
    """
    if predictor.asked not in ("auto", found.engine):
        got, do = f"--engine {predictor.asked}", f"use --engine {found.engine}, or auto"
        raise ConfigError(name_of(place), expected="the engine that this prediction was begun with", got=got, do=do, code="C027")
    needed = found.layout.peak_bytes + resident_bytes()
    if limit_bytes is not None and needed > limit_bytes:
        expected = f"the {math.ceil(needed / 1e8) / 10:g} GB or more for which this prediction was begun"
        got, do = f"--memory {limit_bytes / 1e9:g}", "give as much, or remove it and begin anew"
        raise ConfigError(name_of(place), expected=expected, got=got, do=do, code="C027")


def request_of(predictor: Predictor, case: Case, volume: Volume, wanted: Wanted) -> dict[str, Any]:
    """What tells one prediction from another, as JSON has it: of an image that changed nothing is taken over."""
    return {
        "model": predictor.bundle.hash,
        "averaging": predictor.tta,
        "head": predictor.head,
        "images": [place_words(path) for path in case.images],
        "written": [_written(path) for path in case.images],
        "pixels": {"shape": list(volume.pixels.shape), "dtype": volume.pixels.dtype.name, "spacing_mm": list(volume.spacing_mm)},
        "sections": list(case.sections) if case.sections else None,
        "wanted": vars(wanted),
    }


def place_words(path: Path) -> str:
    """A path or URL as it is true from any folder."""
    return url_of(path) or os.path.abspath(path)


def _written(path: Path) -> list[int] | None:
    """Size, and the time of its last change (ns), of an image's file; None of a folder or URL, which say neither."""
    file = None if url_of(path) else next((place for place in (path, *path.parents) if place.is_file()), None)
    return [file.stat().st_size, file.stat().st_mtime_ns] if file else None


def job_of(predictor: Predictor, case: Case, bricks: Bricks) -> Job:
    """The job of a store that is open."""
    folder = predictor.bundle.folder
    assert folder is not None, "a bundle that was loaded lies somewhere"
    return Job(
        bundle=folder,
        case=case,
        place=bricks.place,
        record=bricks.record,
        wanted=bricks.wanted,
        device=predictor.device,
        tta=predictor.tta,
        head=predictor.head,
    )


class Worker:
    """A process's part in a job: the model loaded once, image and store open.

    Args:
        job: what is to be computed.
        predictor: with the job's engine, where there is one already.
    """

    def __init__(self, job: Job, predictor: Predictor | None = None) -> None:
        if predictor is None or predictor.engine is None or predictor.engine.name != job.record.engine:
            predictor = load(job.bundle, device=job.device, engine=job.record.engine, tta=job.tta, head=job.head)
        volume = open_case(job.case)
        grey = Grey(predictor.bundle.plan.normalisation, job.record.moments)
        self.bricks = Bricks(job.place, job.record, job.wanted, predictor.bundle.legend)
        self.task: Task = predictor.task_of(volume, job.wanted, job.record.layout, grey)

    def fill(self, box: Box) -> Iterator[int]:
        """Compute and write a box of missing bricks; yields voxels as they are done."""
        return self.bricks.fill(self.task, box)

    def fill_missing(self, box: Box) -> None:
        """Compute and write what is missing of a box of many that processes share; no more of it once one of them had too little memory.

        Raises:
            ShortOfMemoryError: this one has.
        """
        try:
            for part in self.bricks.missing(box=box):
                for _ in self.fill(part):
                    if self.bricks.halted:
                        return
        except Exception as error:  # libraries have no common class for it; what else it is goes on
            if not is_short_of_memory(error):
                raise
            got, do = " ".join(str(error).split())[:160] or "no more", "give workers more memory, or fewer threads each"
            raise ShortOfMemoryError(name_of(self.bricks.place), expected="memory for a tile", got=got, do=do, code="R123") from None


def fill_here(worker: Worker, on_voxels: OnVoxels = lambda done, of: None) -> None:
    """Compute and write all that is missing, in this process."""
    missing = worker.bricks.missing()
    of = sum(voxels_of(box) for box in missing)
    done = 0
    for box in missing:
        for count in worker.fill(box):
            done += count
            on_voxels(done, of)


def voxels_of(box: Box) -> int:
    """How many voxels a box has."""
    count = 1
    for first, past in box:
        count *= past - first
    return count


def blocks(bricks: Bricks, slots: int) -> list[Box]:
    """The missing bricks in boxes such that so many workers end soonest; the smallest boxes that cost 2 % at most beside that.

    Small boxes keep all busy to the end, large ones compute fewer tiles twice. At most `MOST_DEPTHS` tiles deep.
    """
    layout, (done, of) = bricks.record.layout, bricks.done()
    cost, depth = Cost(layout), layout.shapes.tile_vox[0] * layout.shapes.shape_vox[0] / layout.shapes.grid[0]
    rows = -(-bricks.shape[0] // bricks.depth)
    most = max(1, min(rows, math.ceil(MOST_DEPTHS * depth / bricks.depth)))
    # Even shares: of what is left in some rounds of all workers, of each column.
    shares = {-(-(of - done) // (slots * rounds)) for rounds in (1, 2, 3, 4, 6, 8)} | {-(-rows // parts) for parts in range(1, 9)}
    sizes = sorted(size for size in shares | {most >> halved for halved in range(8)} if 1 <= size <= most)
    ends = {size: makespan([cost(box) for box in bricks.missing(size)], slots) for size in sizes}
    return bricks.missing(next(size for size, end in ends.items() if end <= 1.02 * min(ends.values())))


def makespan(costs: list[int], slots: int) -> float:
    """When the last of so many workers ends if whoever is free takes the next block."""
    if len(costs) > 64 * slots:
        return sum(costs) / slots + max(costs)
    busy = [0] * slots
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)
