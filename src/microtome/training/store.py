"""Cases brought to the plan's grid once and kept on disk, from which training reads parts as the network's grey values."""

import hashlib
import math
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from microtome.config import Plan
from microtome.data.dataset import Case, Dataset
from microtome.data.names import stamp_of
from microtome.errors import DataWarning, RunError
from microtome.files import atomic_path, make_folder
from microtome.geometry import Shape
from microtome.machine import free_memory_bytes
from microtome.threads import usable_cores
from microtome.training.arrays import MAPPED, SHARDED, Arrays, Scale, StoredArray, packed_bytes, smallest, write_array
from microtome.training.direct import DirectImage, DirectLabel, Facts, gather, open_views
from microtome.training.preparing import class_counts, draw_voxels, prepare, quantiles, stored_bytes, working_bytes
from microtome.training.roads import MEMORY_SHARE, Road, road_of
from microtome.training.slabwise import SLAB_BYTES, is_begun, middle, prepare_by_slabs, remove_progress

# Part of the key of stored files: what an earlier version of this program wrote is not taken for this one's.
FORMAT = 2
# More would wait for the disk and for each other.
MOST_THREADS = 16
# About what is taken while facts of a case are gathered that is read from where it is: parts as float32, histograms.
GATHERING_BYTES = 2**30
# Other cases may compress worse than the first.
PACKED_MARGIN = 1.15
# What the name of the file ends with that is written last of a case.
COMPLETE = ".voxels.npz"
# What the name of a stored file begins with: the number of the case, and its key.
_STORED = re.compile(r"\d{5,}-[0-9a-f]{8}(?=\.)")


@dataclass(frozen=True)
class StoredCase:
    """One case on disk, ready to be sampled.

    Attributes:
        name: the case's name.
        image: (C, *S) as stored, here or in the data's own store; `crop` gives grey values.
        label: (*S) as stored, -1 where not annotated.
        class_voxels: for each class that it holds, up to 2000 voxel indices (N, D) drawn from all of them.
        class_counts: how many voxels of each of these classes it really holds.
        weight: how often it is drawn, relative to others.
        quantiles: (C, 257) float32 of the image's grey values, from the smallest to the largest.
        weight_map: (*S) float16, how much each voxel counts in the loss; None: all alike.
        scale: what makes the image's values the network's grey values; None: they are.
    """

    name: str
    image: StoredArray | DirectImage | np.ndarray
    label: StoredArray | DirectLabel | np.ndarray
    class_voxels: Mapping[int, np.ndarray]
    class_counts: Mapping[int, int]
    weight: float
    quantiles: np.ndarray
    weight_map: StoredArray | np.ndarray | None = None
    scale: Scale | None = None

    @property
    def shape_vox(self) -> Shape:
        """The spatial shape."""
        return tuple(self.label.shape)

    def crop(self, part: tuple[slice | int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Image (C, *part) float32 in the network's grey values, label (*part) int16 and weight (*part) float32 of a part, all copies.

        Bit for bit what the normalised whole has there.
        """
        image_CS = np.array(self.image[(slice(None), *part)], np.float32)
        if self.scale is not None:
            self.scale.apply(image_CS)
        weight_S = None if self.weight_map is None else np.array(self.weight_map[part], np.float32)
        return image_CS, np.array(self.label[part], np.int16), weight_S

    @cached_property
    def dense(self) -> bool:
        """Whether every voxel is annotated."""
        return sum(self.class_counts.values()) == math.prod(self.shape_vox)

    def draw_annotated(self, rng: np.random.Generator) -> np.ndarray:
        """A voxel index (D,): any voxel of a dense case; else a class, by how many voxels it really has, and one of those noted of it."""
        if self.dense:
            return np.array([rng.integers(size) for size in self.shape_vox])
        classes, counts = zip(*self.class_counts.items(), strict=True)
        ends = np.cumsum(counts)
        place = int(rng.integers(ends[-1]))
        number = int(np.searchsorted(ends, place, side="right"))
        noted, count = self.class_voxels[classes[number]], counts[number]
        # The noted ones stand for equal shares of all.
        voxel: np.ndarray = noted[(place - int(ends[number]) + count) * len(noted) // count]
        return voxel


def store_cases(
    dataset: Dataset,
    cases: Sequence[Case],
    plan: Plan,
    folder: Path,
    on_case: Callable[[int, int], None] = lambda done, of: None,
    *,
    road: Road | None = None,
) -> list[StoredCase]:
    """Preprocess cases into `folder` (or take what lies there from an interrupted run); those that hold annotations.

    As many at once as there are cores, and as fit into memory, each in a thread of its own. Compressed where the disk is too
    small for them as they are. Each file appears only when complete, and is the same whatever else was prepared beside it.
    Of a case that is too large for a copy, and whose patches can be read from where it is, only facts are written. One that is too
    large to be prepared at once, and lies on another grid, is prepared slab by slab, and goes on at the slab where it was killed.

    Args:
        dataset: holds the cases.
        cases: labelled ones.
        plan: says grid, grey values, weights and seed.
        folder: of this run alone; what lies there of an interrupted write or of another plan is removed.
        on_case: is told how many of the cases to prepare are done, and how many there are.
        road: that every case takes as far as it can; None: as the memory decides (`roads.road_of`).

    Raises:
        DataError: a case does not fit in memory, and cannot be read part by part either; says why.
        RunError: they do not fit on the disk, even compressed; or the disk became full, and what was prepared is good.

    Warns:
        DataWarning: they are compressed.
    """
    make_folder(folder)
    stems = [folder / f"{number:05d}-{_key(dataset, case, plan)}" for number, case in enumerate(cases)]
    missing = [number for number, stem in enumerate(stems) if not _is_stored(stem)]
    roads = {number: road_of(dataset, cases[number], plan, road) for number in missing}
    begun = {number for number in missing if roads[number] == "slabs" and is_begun(stems[number])}
    _sweep(folder, {stem.name for number, stem in enumerate(stems) if number not in missing or number in begun})
    tasks = {number: _Task(cases[number], stems[number], roads[number]) for number in missing}
    kind = _choose_kind(dataset, [task for task in tasks.values() if task.road != "direct"], plan, folder)

    def store(number: int) -> None:
        _work(dataset, tasks[number], plan, kind, np.random.default_rng([plan.seed, number]))

    sizes = {number: _memory_bytes(dataset, task, plan) for number, task in tasks.items()}
    left = set(missing)

    def done(number: int) -> None:
        left.discard(number)
        on_case(len(missing) - len(left), len(missing))

    try:
        run_within(int(MEMORY_SHARE * free_memory_bytes()), sizes, store, done)
    except RunError as error:
        # Of a full disk alone; what else is wrong with it is said as it is.
        if error.code != "R102":
            raise
        raise _stopped(dataset, [cases[number] for number in sorted(left) if roads[number] != "direct"], plan, error) from error
    arrays = Arrays()
    stored = [_open(dataset, case, stem, arrays) for case, stem in zip(cases, stems, strict=True)]
    return [case for case in stored if case.class_voxels]


def run_within(memory_bytes: int, sizes: Mapping[int, int], work: Callable[[int], None], done: Callable[[int], None]) -> None:
    """Do work by number in threads, in order, as many at once as there are cores and as their sizes together allow.

    What is larger than the memory by itself is done alone. `done` is called in the caller's thread. After an error what runs
    is finished, nothing more begun, and the error raised.

    Args:
        memory_bytes: what all that runs at once may take.
        sizes: bytes that each number takes while it is worked on.
        work: is called with a number.
        done: is called with a number whose work is done.
    """
    threads = max(1, min(MOST_THREADS, usable_cores()))
    running: dict[Future[None], int] = {}

    def collect() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number = running.pop(future)
            future.result()
            done(number)

    with ThreadPoolExecutor(threads) as pool:
        for number, size in sizes.items():
            while running and (len(running) == threads or sum(sizes[n] for n in running.values()) + size > memory_bytes):
                collect()
            running[pool.submit(work, number)] = number
        while running:
            collect()


class _Task(NamedTuple):
    """A case to be prepared: what the names of its files begin with, and the way that it takes."""

    case: Case
    stem: Path
    road: Road


def _memory_bytes(dataset: Dataset, task: _Task, plan: Plan) -> int:
    """About what a case takes while it is prepared."""
    if task.road == "whole":
        return working_bytes(dataset, task.case, plan)
    return GATHERING_BYTES if task.road == "direct" else SLAB_BYTES


def _choose_kind(dataset: Dataset, tasks: Sequence[_Task], plan: Plan, folder: Path) -> str:
    """How cases are to be stored: as they are where the disk has room for all of them, else compressed.

    Raises:
        RunError: no room for them even compressed; found before hours of work, and nothing was begun.

    Warns:
        DataWarning: they are compressed.
    """
    needed, free = sum(stored_bytes(dataset, task.case, plan) for task in tasks), shutil.disk_usage(folder).free
    # What an interrupted call left of them takes no more room.
    lying = sum(_lying_bytes(task.stem) for task in tasks)
    if needed <= free + lying:
        return MAPPED
    first = min(tasks, key=lambda task: task.road != "whole")
    found = prepare(dataset, first.case, plan) if first.road == "whole" else middle(dataset, first.case, plan)
    arrays = [array for array in (found.image, smallest(found.label, (np.int8,)), found.weight) if array is not None]
    share = sum(packed_bytes(array, plan.dims) for array in arrays) / sum(array.nbytes for array in arrays)
    packed = math.ceil(PACKED_MARGIN * share * needed)
    sizes = f"{len(tasks)} prepared cases take {_gb(needed)}, compressed about {_gb(packed)}"
    if packed > free + lying:
        expected = f"{packed - lying} free bytes ({sizes})"
        do = "free space and --resume, or give another --out"
        raise RunError(folder, expected=expected, got=f"{free} ({_gb(free)}), {packed - lying - free} too few", do=do, code="R002")
    message = f"{folder}: {sizes}, and {_gb(free)} are free: they are stored compressed, from where patches are read several times slower"
    warnings.warn(DataWarning(message), stacklevel=3)
    return SHARDED


def _lying_bytes(stem: Path) -> int:
    """Bytes on the disk that files of a case take."""
    files = [path for found in stem.parent.glob(f"{stem.name}.*") for path in (found, *found.rglob("*"))]
    return sum(path.stat().st_blocks * 512 for path in files)


def _stopped(dataset: Dataset, cases: Sequence[Case], plan: Plan, error: RunError) -> RunError:
    """The error of a disk that became full, with the room that the cases still to be prepared take."""
    needed = sum(stored_bytes(dataset, case, plan) for case in cases)
    expected = f"room for {len(cases)} more prepared cases, at most {needed} bytes ({_gb(needed)})"
    return RunError(error.where, expected=expected, got=error.got, do="free space, then --resume: what was prepared is kept", code="R002")


def _gb(count: int) -> str:
    """`12.3 GB`."""
    return f"{count / 1e9:.1f} GB"


def _key(dataset: Dataset, case: Case, plan: Plan) -> str:
    """What the stored arrays depend on, in a file's name: after a change of plan, classes or files they are not taken for the new ones."""
    grid = (plan.dims, plan.spacing_mm, plan.stated_spacing_mm, plan.assumed_spacing_mm, plan.resize_vox, plan.interpolation)
    loss = plan.loss
    borders = (loss.border_weight, loss.border_sigma, loss.balance_classes) if loss.border_weight else ()
    files = [stamp_of(path) for path in (*case.images, *case.labels)]
    data = (case.name, case.sections, case.planes, files, replace(dataset.legend, reason=""), dataset.config.spacing_mm)
    settings = repr((FORMAT, *data, grid, plan.normalisation, borders, plan.seed))
    return hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()


def _is_stored(stem: Path) -> bool:
    """Whether a case is complete: the file that is written last is there."""
    return stem.with_suffix(COMPLETE).exists()


def _sweep(folder: Path, kept: Collection[str]) -> None:
    """Remove what is of no use to this run: temporary files of a killed process, half of a case, cases of another plan."""
    try:
        # First what makes a case complete: a kill must not leave that without the arrays.
        for path in sorted(folder.iterdir(), key=lambda path: not path.name.endswith(COMPLETE)):
            named = _STORED.match(path.name)
            if path.name.startswith(".part-") or (named and named[0] not in kept):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        got, do = f"{error.strerror or error}", "remove this folder, then --resume"
        raise RunError(folder, expected="prepared cases that can be removed", got=got, do=do, code="R101") from error


def _store(dataset: Dataset, case: Case, plan: Plan, stem: Path, rng: np.random.Generator) -> None:
    """Write one case: its arrays, as the kind that the stem ends with, and last where its classes are and what the image's values mean."""
    image, label, weight, scale = prepare(dataset, case, plan)
    for name, array in (("image", image), ("label", smallest(label, (np.int8,))), ("weight", weight)):
        if array is not None:
            write_array(stem.with_suffix(f".{name}{stem.suffix}"), array, plan.dims)
    counts = class_counts(label)
    voxels = {k: draw_voxels(rng, label, k) for k in counts}
    _write_facts(stem, {"shape": np.array(image.shape)}, Facts(voxels, counts, quantiles(image, scale), scale, np.empty(0)))


def _work(dataset: Dataset, task: _Task, plan: Plan, kind: str, rng: np.random.Generator) -> None:
    """Prepare one case its way; its arrays are of a kind, or of the one that they were begun as."""
    case, stem, road = task
    if road == "direct":
        _note(stem, gather(dataset, case, plan, rng))
    elif road == "whole":
        _store(dataset, case, plan, stem.with_suffix(kind), rng)
    else:
        begun = [found for found in (MAPPED, SHARDED) if is_begun(stem) and stem.with_suffix(f".image{found}").exists()]
        facts, shape = prepare_by_slabs(dataset, case, plan, stem.with_suffix((*begun, kind)[0]), rng)
        _write_facts(stem, {"shape": np.array(shape)}, facts)
        remove_progress(stem)


def _note(stem: Path, facts: Facts) -> None:
    """Write what is known of a case that is read from where it is."""
    _write_facts(stem, {"fill": facts.fill}, facts)


def _write_facts(stem: Path, beside: Mapping[str, np.ndarray], facts: Facts) -> None:
    """Write the file that makes a case complete."""
    found = {**beside, **{f"{k}": places for k, places in facts.voxels.items()}, "quantiles": facts.quantiles}
    found["counts"] = np.array(list(facts.counts.items()), np.int64).reshape(-1, 2)
    if facts.scale is not None:
        found["scale"] = np.stack(facts.scale)
    with atomic_path(stem.with_suffix(COMPLETE)) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **found)


def _open(dataset: Dataset, case: Case, stem: Path, arrays: Arrays) -> StoredCase:
    """A case that was stored or noted; its arrays are opened when they are first read."""
    with np.load(stem.with_suffix(COMPLETE), allow_pickle=False) as file:
        counts = {int(k): int(count) for k, count in file["counts"]}
        voxels = {k: file[str(k)] for k in counts}
        table, fill = file["quantiles"], file.get("fill")
        shape = tuple(int(size) for size in file["shape"]) if fill is None else ()
        scale = Scale.of(file["scale"]) if "scale" in file else None
    # Parts of one stack are drawn by their size; separate images equally often, whatever their size.
    weight = float(sum(counts.values())) if case.sections else 1.0
    if fill is not None:
        return StoredCase(case.name, *open_views(dataset, case, fill), voxels, counts, weight, table, None, scale)
    image, label = arrays.find(stem, "image", shape), arrays.find(stem, "label", shape[1:])
    weight_map = (
        arrays.find(stem, "weight", shape[1:]) if any(stem.with_suffix(f".weight{kind}").exists() for kind in (MAPPED, SHARDED)) else None
    )
    return StoredCase(case.name, image, label, voxels, counts, weight, table, weight_map, scale)
