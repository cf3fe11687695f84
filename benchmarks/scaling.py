"""One volume by 1 worker and by 2, and what a block costs: results/scaling.json, and the tables of docs/cluster.md.

    python -m benchmarks.scaling [--quick]

Workers are processes of one thread each, started before; a round is one prediction by `fill_on_cluster` into a new store, the two clusters
in turn. "no network" does the same with zeros in the place of the network's answers: reading, blending, writing, scheduling. "nothing"
sends blocks in which no brick is missing. Seconds of a block are those of Dask's task stream, transitions those that its scheduler counts;
each is a message or two. Bytes read are the parts that the blocks ask for, times the image's bytes on the disk over those in memory; bytes
written are those of the store.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tensorstore as ts
import torch

from benchmarks.cases import SETTINGS, blobs, bundle_of
from benchmarks.rows import CACHE, FIELDS, PACKAGES, REPOSITORY, about, read_results, rounded, say, write_results
from microtome.bundle import load_bundle, save_bundle
from microtome.data.case import Case
from microtome.errors import MicrotomeError
from microtome.files import write_json, write_text
from microtome.images.volume import Pixels
from microtome.inference import cluster, stored
from microtome.inference.bricks import LABELS, Bricks, Record
from microtome.inference.cluster import Order, fill_block, fill_on_cluster
from microtome.inference.layout import Layout, Shapes
from microtome.inference.predict import Wanted
from microtome.inference.predictor import Predictor
from microtome.inference.slabs import Box
from microtome.inference.stored import BRICKS

PAGE = REPOSITORY / "docs" / "cluster.md"
BEGIN, END = "<!-- made by `python -m benchmarks.scaling` -->", "<!-- end of what was made -->"
SETTING, OVERLAP = SETTINGS["thin 32x128x128"], 0.5
SHAPE, QUICK_SHAPE = (1024, 128, 128), (512, 128, 128)
# Of uint8: a little more than 10 TB.
PAPER_SHAPE, PAPER_WORKERS = (10_000, 32_768, 32_768), 1000
COMMAND = "python -m benchmarks.scaling"


class Setup(NamedTuple):
    """What is predicted: the model, the image, and where stores may go."""

    predictor: Predictor
    image: Path
    folder: Path


class Pool(NamedTuple):
    """Workers that are there already."""

    workers: int
    client: Any
    start_seconds: float


def main(words: Sequence[str]) -> int:
    """Measure, write the results and the page."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half of the volume, one round, nothing written: only whether it runs")
    quick = parser.parse_args(words).quick
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        setup = prepared(Path(folder), QUICK_SHAPE if quick else SHAPE)
        rows = measured(setup, rounds=1 if quick else 5)
    if quick:
        for row in rows:
            say(rounded(row))
        return 0
    write_results("scaling", rows, about(COMMAND, packages=(*PACKAGES, "dask", "distributed")))
    write_page()
    return 0


def prepared(folder: Path, shape: tuple[int, ...]) -> Setup:
    """A volume of blobs as OME-Zarr, and a bundle whose tiles overlap."""
    array = np.clip(blobs(shape, SETTING.classes, 3)[0][0] * 40 + 128, 0, 255).astype(np.uint8)
    image = folder / "image.ome.zarr"
    metadata = {"shape": shape, "chunks": BRICKS[3], "dtype": "|u1", "dimension_separator": "/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{image}/0/"}, "metadata": metadata}
    ts.open(spec, create=True).result()[...].write(array).result()
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    scale = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * 3}]}]
    write_json(image / ".zattrs", {"multiscales": [{"version": "0.4", "axes": axes, "datasets": scale}]})
    write_json(image / ".zgroup", {"zarr_format": 2})
    bundle = load_bundle(bundle_of(SETTING, CACHE))
    save_bundle(folder / "run" / "model", replace(bundle, plan=bundle.plan.model_copy(update={"overlap": OVERLAP})))
    return Setup(Predictor(load_bundle(folder / "run"), engine="torch"), image, folder)


def measured(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """All rows."""
    work = f"OME-Zarr {'x'.join(map(str, setup.predictor.bundle.plan.patch_vox))} tiles"
    with ExitStack() as stack:
        pools = [stack.enter_context(pool(workers)) for workers in (1, 2)]
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in range(rounds + 1):
            for each in pools:
                for engine, task in (("", fill_block), (", no network", idle_block)):
                    run = one_run(setup, each, task)
                    say(f"round {number}: workers {each.workers}{engine}: {run['seconds']:.2f} s")
                    # The first one opens libraries.
                    if number:
                        runs.setdefault(f"{each.workers} worker{'s' if each.workers > 1 else ''}{engine}", []).append(run)
        base = median(run["seconds"] for run in runs["1 worker"])
        rows = [row_of(work, engine, found, base) for engine, found in runs.items()]
        rows += [nothing_row(setup, pools[1]), marks_row(setup.folder)]
    for each, row in zip(pools, (rows[0], rows[2]), strict=True):
        row |= {"start_seconds": each.start_seconds, "read_bytes_voxel": bytes_read(setup, each.workers)}
    return rows


@contextmanager
def pool(workers: int) -> Iterator[Pool]:
    """A cluster of this machine, as `--cluster local:N` makes it."""
    begun = time.perf_counter()
    with cluster._connected(f"local:{workers}", say) as client:
        yield Pool(workers, client, time.perf_counter() - begun)


def idle_block(order: Order, box: Box) -> MicrotomeError | None:
    """A block whose network answers at once: what all the rest costs."""
    worker = cluster._worker_of(order)
    worker.task = replace(worker.task, engine=silent(worker.task.layout.shapes))
    return fill_block(order, box)


def one_run(setup: Setup, each: Pool, task: Any) -> dict[str, Any]:
    """One prediction into a new store."""
    import distributed

    place = setup.folder / "out.ome.zarr"
    shutil.rmtree(place, ignore_errors=True)
    case = Case(name="image", images=(setup.image,))
    bricks, _ = stored.open_store(setup.predictor, case, place, Wanted())
    job, address = stored.job_of(setup.predictor, case, bricks), each.client.scheduler.address
    cost, boxes = stored.Cost(bricks.record.layout), stored.blocks(bricks, each.workers)
    transitions = transitions_of(each.client)
    ended: list[int] = []
    with distributed.get_task_stream(client=each.client) as stream, mock.patch.object(cluster, "fill_block", task):
        begun = time.perf_counter()
        fill_on_cluster(address, job, bricks, on_voxels=lambda done, of: ended.append(done), say=lambda line: None)
        seconds = time.perf_counter() - begun
    inside = [piece["stop"] - piece["start"] for record in stream.data for piece in record["startstops"] if piece["action"] == "compute"]
    labels = np.asarray(bricks.opened()["labels"][tuple(slice(0, size) for size in bricks.shape)])
    return {
        "seconds": seconds,
        "blocks": len(ended),
        "voxels": ended[-1],
        "tiles": sum(cost(box) for box in boxes),
        "block_seconds": median(inside),
        "written_bytes_voxel": stored_bytes(place / "labels" / LABELS / "0"),
        "transitions": (transitions_of(each.client) - transitions) / len(ended),
        "labels": labels,
    }


class Counted:
    """Pixels that count the values that are asked for."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels, self.shape, self.dtype, self.values = pixels, pixels.shape, pixels.dtype, 0

    def __getitem__(self, part: Any) -> np.ndarray:
        """A part."""
        found: np.ndarray = self.pixels[part]
        self.values += found.size
        return found


def bytes_read(setup: Setup, workers: int) -> float:
    """Bytes that the blocks of so many workers read, a voxel: computed here, without the network."""
    place = setup.folder / f"read-{workers}.ome.zarr"
    case = Case(name="image", images=(setup.image,))
    bricks, volume = stored.open_store(setup.predictor, case, place, Wanted())
    worker, pixels = stored.Worker(stored.job_of(setup.predictor, case, bricks), setup.predictor), Counted(volume.pixels)
    worker.task = replace(worker.task, volume=replace(volume, pixels=pixels), engine=silent(worker.task.layout.shapes))
    for box in stored.blocks(bricks, workers):
        deque(worker.fill(box), maxlen=0)
    return pixels.values / pixels.pixels[(slice(0, 1), *(slice(0, n) for n in volume.shape_vox))].size * stored_bytes(setup.image / "0")


def stored_bytes(array: Path) -> float:
    """Bytes of an array of a store for each voxel of the volume."""
    shape = json.loads((array / ".zarray").read_text())["shape"]
    return sum(file.stat().st_size for file in array.rglob("*") if file.is_file()) / float(np.prod(shape))


def silent(shapes: Shapes) -> Callable[[np.ndarray], np.ndarray]:
    """An engine that answers at once."""
    answer = np.zeros((shapes.layers, *shapes.tile_vox), np.float32)
    return lambda image_CS: answer


def transitions_of(client: Any) -> int:
    """How often the scheduler has moved a task from one state to another."""
    return int(client.run_on_scheduler(_transitions))


def _transitions(dask_scheduler: Any) -> int:
    """The scheduler's own count."""
    return int(dask_scheduler.transition_counter)


def row_of(work: str, engine: str, runs: Sequence[Mapping[str, Any]], base: float) -> dict[str, Any]:
    """Medians of some runs; the labels of all were the same."""
    assert all(np.array_equal(run["labels"], runs[0]["labels"]) for run in runs), "the same bytes, whoever computes"
    seconds = [run["seconds"] for run in runs]
    row = {"work": work, "engine": engine, **dict.fromkeys(FIELDS[2:]), "seconds": median(seconds)}
    row |= {"ratio_to_default": base / median(seconds), "rounds": len(runs), "low": min(seconds), "high": max(seconds)}
    for name in ("blocks", "voxels", "tiles", "block_seconds", "written_bytes_voxel", "transitions"):
        row[name] = median(run[name] for run in runs)
    return row


def nothing_row(setup: Setup, each: Pool, count: int = 400) -> dict[str, Any]:
    """Blocks in which nothing is missing: what scheduling costs, and asking the store for marks."""
    place = setup.folder / "out.ome.zarr"
    case = Case(name="image", images=(setup.image,))
    bricks, _ = stored.open_store(setup.predictor, case, place, Wanted())
    order = cluster._order_of(stored.job_of(setup.predictor, case, bricks))
    (box,) = [((0, bricks.shape[0]), *bricks.record.layout.columns[0])]
    assert bricks.missing() == [], "the last run ended"
    keys = [f"nothing-{number}" for number in range(count + 2)]
    each.client.gather(each.client.map(partial(fill_block, order), [box] * 2, key=keys[count:], pure=False))
    begun = time.perf_counter()
    each.client.gather(each.client.map(partial(fill_block, order), [box] * count, key=keys[:count], pure=False))
    seconds = (time.perf_counter() - begun) / count
    return {"work": "a block in which nothing is missing", "engine": "2 workers, nothing", **dict.fromkeys(FIELDS[2:]), "seconds": seconds}


def marks_row(folder: Path, count: int = 20_000) -> dict[str, Any]:
    """Listing the marks of a store, a mark."""
    from microtome.images.stores import Documents

    marks = folder / "many" / ".microtome" / "marks"
    marks.mkdir(parents=True)
    for number in range(count):
        (marks / f"{number // 200}.{number % 200}").touch()
    begun = time.perf_counter()
    assert len(Documents(folder / "many").marked()) == count
    seconds = (time.perf_counter() - begun) / count
    return {"work": "one mark of a listing", "engine": "local disk", **dict.fromkeys(FIELDS[2:]), "seconds": seconds}


# The page.


class OnPaper(Bricks):
    """Bricks of a layout without a store: none is written."""

    def __init__(self, layout: Layout) -> None:
        self.record = Record(request={}, engine="torch", layout=layout, moments=None)
        assert layout.brick is not None, "cut for a store"
        self.shape, self.depth = layout.shapes.shape_vox, layout.brick[0]

    def missing(self, most: int | None = None, box: Box | None = None) -> list[Box]:
        """All of them."""
        with mock.patch.object(self, "documents", mock.Mock(marked=lambda prefix="": set()), create=True):
            return super().missing(most, box)

    def done(self) -> tuple[int, int]:
        """None of them."""
        return 0, len(self.missing(1))


def paper_layout(layers: int = SETTING.classes) -> Layout:
    """Ten terabytes cut as 1.5 GB of memory allow: columns of 1024 a side."""
    tile = SETTING.shape_vox
    shapes = Shapes(
        shape_vox=PAPER_SHAPE, grid=PAPER_SHAPE, tile_vox=tile, context_vox=(0,) * 3, overlap=OVERLAP, channels=1, layers=layers
    )
    edges = tuple((*range(0, size, 1024), size) for size in PAPER_SHAPE[1:])
    return Layout(shapes=shapes, edges=edges, brick=BRICKS[3], peak_bytes=0)


def write_page(page: Path = PAGE) -> None:
    """Write the tables between their marks into the page."""
    rows, facts = read_results("scaling")
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    write_text(page, f"{head}{BEGIN}\n\n{tables(rows, facts)}\n{END}{rest.split(END, 1)[1]}")


def tables(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """What was measured, and what follows for ten terabytes and a thousand workers."""
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "dask", "distributed") if name in facts["versions"])
    lines = [f"`{facts['command']}`, {facts['date']}; {facts['machine']}; {versions}; one thread a worker.", ""]
    lines += [
        "| | seconds | times one worker | blocks | seconds a block | transitions a block | bytes read, written a voxel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "blocks" in row:
            moved = f"{row['read_bytes_voxel']:.3g}, {row['written_bytes_voxel']:.3g}" if "read_bytes_voxel" in row else ""
            values = (row["engine"], f"{row['seconds']:.3g}", f"{row['ratio_to_default']:.3g}", f"{row['blocks']:g}")
            lines.append(f"| {' | '.join(values)} | {row['block_seconds']:.3g} | {row['transitions']:.3g} | {moved} |")
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {row['work']} | {row['seconds'] * 1e3:.3g} ms |" for row in rows if "blocks" not in row]
    lines += ["", "| ten terabytes, a thousand workers | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in on_paper(rows)), ""])


@cache
def cut_on_paper() -> tuple[int, int, int, int, int]:
    """Ten terabytes as a thousand workers would share them: columns, blocks, bricks, tiles, and tiles if none was computed twice."""
    layout = paper_layout()
    boxes, cost = stored.blocks(OnPaper(layout), PAPER_WORKERS), stored.Cost(layout)
    whole = tuple((0, size) for size in PAPER_SHAPE)
    return len(layout.columns), len(boxes), len(OnPaper(layout).missing(1)), sum(cost(box) for box in boxes), cost(whole)


def on_paper(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The figures of the plan, each from a formula of the page."""
    found = {row["engine"]: row for row in rows}
    one, rest, nothing = found["1 worker"], found["2 workers, no network"], found["2 workers, nothing"]
    mark = found["local disk"]["seconds"]
    columns, blocks, bricks, tiles, once = cut_on_paper()
    voxels = float(np.prod(PAPER_SHAPE))
    seconds_tile = one["seconds"] / one["tiles"]
    whole = tiles * seconds_tile / PAPER_WORKERS
    return [
        ("voxels V", f"{voxels:.3g}"),
        ("columns x rows of bricks", f"{columns} x {bricks // columns} = {bricks}"),
        ("blocks N", f"{blocks}"),
        ("tiles T, of which more than once", f"{tiles:.3g}, {1 - once / tiles:.1%}"),
        ("hours, T t / W", f"{whole / 3600:.3g}"),
        ("seconds a block, T t / N", f"{tiles * seconds_tile / blocks:.3g}"),
        ("of it all but the network", f"{rest['block_seconds'] / one['block_seconds']:.1%}"),
        ("scheduler: transitions a second, N k / hours", f"{blocks * one['transitions'] / whole:.3g}"),
        ("scheduler: share of its time, N s / hours", f"{blocks * nothing['seconds'] / whole:.2g}"),
        ("store: read, MB/s of all workers", f"{voxels * one['read_bytes_voxel'] / whole / 1e6:.3g}"),
        ("store: written, MB/s of all workers", f"{voxels * one['written_bytes_voxel'] / whole / 1e6:.3g}"),
        ("listing all marks, seconds", f"{bricks * mark:.3g}"),
        ("a killed worker costs at most, seconds", f"{tiles / bricks * seconds_tile:.3g} and its start"),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
