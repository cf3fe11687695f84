"""A volume of any size -> labels, probabilities, uncertainty: tiles along the slowest axis, finished rows handed out as they come.

    source (rows read, grey, on the grid)  ->  tiles  ->  engine  ->  slabs (blended, on the original grid)  ->  finished rows

Reading is a thread ahead of the network, and what takes the rows may write in another: `docs/decisions/0017` has the whole road.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from microtome.config import Plan
from microtome.errors import RunError
from microtome.geometry import Shape, Spacing, format_shape
from microtome.images.volume import Volume
from microtome.inference.layout import Layout, Shapes, Sized, choose_layout, choose_tile
from microtome.inference.slabs import Box, Restoring, Slabs, blended
from microtome.inference.source import Grey, Source, measure
from microtome.inference.uncertainty import disagreement, entropy, probabilities, to_uint8
from microtome.machine import shortage_of
from microtome.preprocess import CHUNK_VALUES, grid_shape
from microtome.tiling import Tile, folded

Engine = Callable[[np.ndarray], np.ndarray]
# More than any tile can be halved.
MOST_HALVINGS = 64
# Arrays by name, each (*S) or (layers, *S).
Finished = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to come of the logits of each voxel.

    Attributes:
        labels: its class, int16.
        probabilities: of each class; "uint8" times 255, or "float16"; "" for none.
        uncertainty: the entropy of the probabilities, 0 to 1, uint8 times 255.
        spread: how far the passes of an averaged engine differ, the same; the engine answers with a layer more.
        foreground: the probability of not being this class, uint8 times 255; None for none.
        temperature: that logits are divided by before they become probabilities.
    """

    labels: bool = True
    probabilities: Literal["", "uint8", "float16"] = ""
    uncertainty: bool = False
    spread: bool = False
    foreground: int | None = None
    temperature: float = 1.0

    @property
    def only_labels(self) -> bool:
        """Whether the sums need no division by their weights."""
        return not (self.probabilities or self.uncertainty or self.spread or self.foreground is not None)

    def arrays(self, classes: int) -> dict[str, tuple[int, np.dtype]]:
        """Name -> (layers, 0 for a map without that axis; type) of all that will come."""
        names: dict[str, tuple[int, np.dtype]] = {}
        if self.labels:
            names["labels"] = (0, np.dtype(np.int16))
        if self.probabilities:
            names["probabilities"] = (classes, np.dtype(self.probabilities))
        for name, asked in (("uncertainty", self.uncertainty), ("disagreement", self.spread), ("foreground", self.foreground is not None)):
            if asked:
                names[name] = (0, np.dtype(np.uint8))
        return names

    def voxel_bytes(self, classes: int) -> int:
        """Bytes of a voxel in all of them."""
        return sum(max(1, layers) * kind.itemsize for layers, kind in self.arrays(classes).values())


@dataclass(frozen=True, kw_only=True)
class Task:
    """One volume to be predicted.

    Attributes:
        volume: of as many channels as the plan, or grey where the plan has three.
        plan: of the network.
        layout: how it is cut.
        grey: what values become.
        engine: a tile (C, *S) -> its logits (L, *S'); S has as many axes as the plan.
        wanted: what is to come of it.
    """

    volume: Volume
    plan: Plan
    layout: Layout
    grey: Grey
    engine: Engine
    wanted: Wanted = Wanted()


class TileMemory(NamedTuple):
    """What is known of the memory that tiles take.

    Attributes:
        voxel_bytes: that the network's library takes for each voxel of a tile beyond a patch.
        halvings: how often the tile is halved, as memory was too short for a larger one.
    """

    voxel_bytes: float = 0.0
    halvings: int = 0


def predict_labels(array: np.ndarray, spacing_mm: Spacing, *, plan: Plan, network: Sized, engine: Engine) -> np.ndarray:
    """Class of each voxel: `(C, *S)` in the file's grey values -> (*S) int16 on the same grid.

    A 2D network sees a volume section by section. Where memory is too short for a tile, all is predicted with smaller ones.

    Raises:
        RunError: not even the smallest tile fits.
    """
    volume = in_memory(array)

    def layout_of(halvings: int) -> Layout:
        return layout_for(volume, spacing_mm, plan, network, tile=TileMemory(halvings=halvings))

    layout = layout_of(0)
    grey = Grey(plan.normalisation, measure(volume, layout.shapes.grid, plan))
    task = Task(volume=volume, plan=plan, layout=layout, grey=grey, engine=engine)
    return predict_fitting(task, layout_of)["labels"]


def predict_fitting(
    task: Task,
    layout_of: Callable[[int], Layout],
    on_voxels: Callable[[int, int], None] = lambda done, of: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """`predict_whole`; where memory is too short, from the beginning with a smaller tile, as if it had been that from the start.

    Args:
        task: to be tried first.
        layout_of: the layout with a tile that is halved so often.
        on_voxels: as of `predict_whole`; begins anew with each try.
        say: is told of each smaller tile, in a line.

    Raises:
        RunError: not even the smallest tile fits.
    """
    found: list[dict[str, np.ndarray]] = []
    while said := shortage_of(partial(_predict_into, found, task, on_voxels)):
        task = replace(task, layout=smaller(task.layout, layout_of, said, str(task.volume.path), say))
    return found[0]


def _predict_into(found: list[dict[str, np.ndarray]], task: Task, on_voxels: Callable[[int, int], None]) -> None:
    """`predict_whole`, into a list."""
    found.append(predict_whole(task, on_voxels))


def smaller(layout: Layout, layout_of: Callable[[int], Layout], said: str, where: str, say: Callable[[str], None]) -> Layout:
    """The layout of the next smaller tile, for which memory was too short with this one.

    Args:
        layout: that did not fit.
        layout_of: the layout with a tile that is halved so often.
        said: of the memory.
        where: the image's name, for messages.
        say: is told what happens now, in a line.

    Raises:
        RunError: there is no smaller one.
    """
    tile = layout.shapes.tile_vox
    for halvings in range(1, MOST_HALVINGS):
        found = layout_of(halvings)
        if math.prod(found.shapes.tile_vox) < math.prod(tile):
            say(
                f"{where}: memory ran out ({said}): predicted anew with tiles of {format_shape(found.shapes.tile_vox)} instead of "
                f"{format_shape(tile)}"
            )
            return found
    got = f"too little even for tiles of {format_shape(tile)} ({said})"
    do = "close other programs, give --device cpu where a GPU's memory was short, or predict on a machine with more"
    raise RunError(where, expected="memory for the smallest tile that the network takes", got=got, do=do, code="R123")


def predict_whole(task: Task, on_voxels: Callable[[int, int], None] = lambda done, of: None) -> dict[str, np.ndarray]:
    """All that is wanted of a volume as arrays as large as it, by name, (*S) or (layers, *S); `on_voxels` is told (done, of)."""
    shape = task.volume.shape_vox
    wanted = task.wanted.arrays(len(task.plan.classes))
    arrays = {name: np.empty((layers, *shape) if layers else shape, kind) for name, (layers, kind) in wanted.items()}
    done = 0
    for box in task.layout.boxes():
        rest = tuple(slice(a, b) for a, b in box[1:])
        for first, finished in finished_rows(task, box):
            for name, rows in finished.items():
                place = slice(first, first + rows.shape[-len(shape)])
                arrays[name][(*(slice(None),) * (rows.ndim - len(shape)), place, *rest)] = rows
            done += math.prod(rows.shape[-len(shape) :])
            on_voxels(done, math.prod(shape))
    return arrays


def finished_rows(task: Task, box: Box) -> Iterator[tuple[int, Finished]]:
    """All that is wanted of a box of the original grid, from the first row to the last: (first row, arrays (rows, *plane)).

    The arrays are the caller's to keep.
    """
    for first, logits_LS in logit_rows(task, box):
        yield first, finish(logits_LS, task.wanted, len(task.plan.classes))


def logit_rows(task: Task, box: Box) -> Slabs:
    """Blended logits of a box of the original grid; the next step overwrites them."""
    shapes = task.layout.shapes
    restoring = Restoring(shapes.grid, shapes.shape_vox, box, task.layout.brick_rows)
    # A common factor of all classes changes no winner, unless voxels of different factors are then interpolated.
    divided = not (restoring.same and task.wanted.only_labels)
    with closing(_answers(task, shapes.tiles(restoring.needed))) as answers:
        yield from restoring(blended(answers, restoring.needed, shapes.tile_vox, alone=shapes.apart, divided=divided))


def _answers(task: Task, tiles: Sequence[Tile]) -> Generator[tuple[Tile, np.ndarray]]:
    """Each tile with its logits; the next one is read while the network computes."""
    shapes = task.layout.shapes
    index = [[folded(np.arange(*tile.read[axis]), size) for tile in tiles] for axis, size in enumerate(shapes.grid)]
    plane = [(min(int(places.min()) for places in axis), max(int(places.max()) for places in axis) + 1) for axis in index[1:]]
    source = Source(task.volume, shapes.grid, task.plan, task.grey, plane)
    # A tile at the end is mirrored into rows that those before it have left behind.
    needed_from = np.minimum.accumulate([int(places.min()) for places in index[0]][::-1])[::-1]
    sections = len(shapes.grid) > task.plan.dims
    with ThreadPoolExecutor(1, thread_name_prefix="reading") as reader:
        waiting = reader.submit(source.tile, tiles[0].read, int(needed_from[0]))
        for number, tile in enumerate(tiles):
            image_CS = waiting.result()
            if number + 1 < len(tiles):
                waiting = reader.submit(source.tile, tiles[number + 1].read, int(needed_from[number + 1]))
            yield tile, task.engine(image_CS[:, 0])[:, None] if sections else task.engine(image_CS)


def finish(logits_LS: np.ndarray, wanted: Wanted, classes: int) -> dict[str, np.ndarray]:
    """What is wanted of some rows of logits (L, *S), of which the first `classes` layers are the classes'."""
    logits_KS = logits_LS[:classes]
    finished = {"labels": best_class(logits_KS)} if wanted.labels else {}
    if wanted.only_labels:
        return finished
    chances_KS = probabilities(logits_KS, wanted.temperature)
    if wanted.probabilities:
        finished["probabilities"] = to_uint8(chances_KS) if wanted.probabilities == "uint8" else chances_KS.astype(np.float16)
    if wanted.uncertainty:
        finished["uncertainty"] = to_uint8(entropy(chances_KS))
    if wanted.spread:
        # Of the passes as they are: a temperature was fitted to their mean.
        plain_KS = chances_KS if wanted.temperature == 1 else probabilities(logits_KS)
        finished["disagreement"] = to_uint8(disagreement(plain_KS, logits_LS[classes]))
    if wanted.foreground is not None:
        finished["foreground"] = to_uint8(1 - chances_KS[wanted.foreground])
    return finished


def in_memory(array: np.ndarray) -> Volume:
    """An array (C, *S) as a volume without a place in the world."""
    spacing = (1.0,) * (array.ndim - 1)
    axes = "C" + "ZYX"[-(array.ndim - 1) :]
    place = np.eye(array.ndim)
    chunk = (1, *array.shape[2:])
    return Volume(pixels=array, spacing_mm=spacing, affine=place, axes=axes, path=Path("array"), format="array", chunk_vox=chunk)


def layout_for(
    volume: Volume,
    spacing_mm: Spacing,
    plan: Plan,
    network: Sized,
    *,
    wanted: Wanted = Wanted(),
    limit_bytes: int | None = None,
    bricks: Shape | None = None,
    tile: TileMemory = TileMemory(),  # noqa: B008 - frozen
) -> Layout:
    """How a volume is cut, so that it fits into memory.

    Args:
        volume: what is to be predicted.
        spacing_mm: that it is taken to have.
        plan: of the network.
        network: what sizes it takes.
        wanted: what is to come of it.
        limit_bytes: what may be taken beside the process as it is; None: what is usual, or needed.
        bricks: sides (*S) of what is written at once; None where all comes into arrays.
        tile: what is known of the memory of tiles.
    """
    shape, grid = volume.shape_vox, grid_shape(volume.shape_vox, spacing_mm, plan)
    sections = len(shape) - plan.dims
    classes = len(plan.classes)

    def shapes(grow: bool) -> Shapes:
        patch = choose_tile(grid[sections:], plan, network, grow=False)
        side = choose_tile(grid[sections:], plan, network, grow=grow, halvings=tile.halvings)
        return Shapes(
            shape_vox=shape,
            grid=grid,
            tile_vox=(1,) * sections + side,
            context_vox=(0,) * sections + (network.context_vox,) * plan.dims,
            overlap=plan.overlap,
            channels=plan.channels,
            layers=classes + wanted.spread,
            value_bytes=volume.pixels.dtype.itemsize,
            chunk_rows=min(volume.chunk_vox[0], shape[0]),
            out_bytes=wanted.voxel_bytes(classes),
            engine_bytes=max(0, round(tile.voxel_bytes * (math.prod(side) - math.prod(patch)))),
        )

    brick = tuple(min(side, size) for side, size in zip(bricks, shape, strict=True)) if bricks else None
    return choose_layout(shapes, limit_bytes, brick=brick, where=str(volume.path), halvings=tile.halvings)


def best_class(logits_KS: np.ndarray) -> np.ndarray:
    """Index of the largest logit at each voxel, int16; the first of equals.

    A running maximum, because NumPy's argmax over a leading axis walks memory across its grain; a few rows at a time,
    so that they stay in the processor's cache from class to class.
    """
    classes, depth, *plane = logits_KS.shape
    result = np.empty((depth, *plane), np.int16)
    rows = min(depth, max(1, CHUNK_VALUES // 8 // max(1, math.prod(plane))))
    kind = np.uint8 if classes <= 256 else np.int16
    best, leads = np.empty((rows, *plane), np.float32), np.empty((rows, *plane), bool)
    number, index = np.empty((rows, *plane), kind), np.empty((rows, *plane), kind)
    for start in range(0, depth, rows):
        part = logits_KS[:, start : start + rows]
        few = slice(0, part.shape[1])
        best[few], index[few] = part[0], 0
        for k, layer in enumerate(part[1:], start=1):
            np.greater(layer, best[few], out=leads[few])
            # Later classes have larger numbers: the largest number that ever led is the last that did. No masked writing.
            np.multiply(leads[few], kind(k), out=number[few])
            np.maximum(index[few], number[few], out=index[few])
            np.maximum(best[few], layer, out=best[few])
        result[start : start + rows] = index[few]
    return result
