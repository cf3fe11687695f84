"""How an image is cut so that its prediction stays within a given memory: tiles, columns of the plane, and what that takes.

A slab holds all classes of a plane times the depth of a tile. Where that is too much the plane is cut into columns, each of which
is walked from the first row to the last by itself; tiles across an edge between two columns are computed for both.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Protocol

from microtome.config import Plan
from microtome.errors import ConfigError
from microtome.geometry import Shape, format_shape
from microtome.inference.slabs import Box, Restoring
from microtome.inference.source import MOST_READ
from microtome.preprocess import CHUNK_VALUES, MOST_ROWS
from microtome.tiling import Span, Tile, cover, starts

# Memory beside arrays: Python's own, buffers of readers and writers, what an allocator rounds up to.
MARGIN_BYTES = 64 * 2**20
MARGIN_SHARE = 1.15
# What prediction takes without being told otherwise, beside the network: enough for a volume of hospital size in one column.
USUAL_BYTES = 3 * 2**29


class TooLittleMemoryError(ConfigError):
    """Not even the layout that takes least fits.

    Attributes:
        short_bytes: so much more would be enough.
    """

    def __init__(self, where: str, least_bytes: int, limit_bytes: int) -> None:
        self.short_bytes = least_bytes - limit_bytes
        got = f"{max(0, limit_bytes) / 1e9:.2f} GB for it, and the least that it takes is {least_bytes / 1e9:.2f} GB"
        super().__init__(where, expected="memory for a slab of one column", got=got, do="allow more memory", code="C042")


class Sized(Protocol):
    """What a network tells about the sizes that it takes."""

    context_vox: int

    def nearest_sizes(self, n: int, axis: int) -> tuple[int, int]:
        """The nearest sizes that fit, below or equal and above or equal."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One image and the network that it is shown to; shapes are of S, whose first axes may be sections of a 2D network.

    Attributes:
        shape_vox: on its own grid.
        grid: on the network's.
        tile_vox: the network's output, 1 along sections.
        context_vox: border that the output lacks, 0 along sections.
        overlap: share of a tile that the next one covers too.
        channels: of the network's input.
        layers: classes, and one more for the spread of passes.
        value_bytes: of one value in the file.
        chunk_rows: rows of the file that are read at once.
        out_bytes: for each voxel of what is written.
        engine_bytes: that a tile takes in the network's library, beyond what the process holds already.
    """

    shape_vox: Shape
    grid: Shape
    tile_vox: Shape
    context_vox: Shape
    overlap: float
    channels: int
    layers: int
    value_bytes: int = 4
    chunk_rows: int = 1
    out_bytes: int = 2
    engine_bytes: int = 0

    def tiles(self, box: Box) -> list[Tile]:
        """Those whose output touches a box of the grid."""
        return cover(self.grid, self.tile_vox, overlap=self.overlap, context_vox=self.context_vox, box=box)

    @property
    def apart(self) -> bool:
        """Whether no two tiles overlap, as each is as large as the plane and one row or the whole image deep."""
        deep = self.tile_vox[0] in (1, self.grid[0]) or self.tile_vox[0] > self.grid[0]
        return deep and all(side >= size for side, size in zip(self.tile_vox[1:], self.grid[1:], strict=True))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an image is cut.

    Attributes:
        shapes: of image and tiles.
        edges: along each axis of the plane, where columns of the original grid begin, and its size.
        brick: sides (*S) of what is written at once; None where rows are handed over as they come.
        peak_bytes: about what it takes beside the process as it is and its network.
    """

    shapes: Shapes
    edges: tuple[tuple[int, ...], ...]
    brick: Shape | None
    peak_bytes: int

    @cached_property
    def columns(self) -> list[Box]:
        """Parts of the plane, in order."""
        return [tuple(spans) for spans in product(*(tuple(pairwise(edges)) for edges in self.edges))]

    @property
    def words(self) -> str:
        """For people: the tile, the slab and what they take."""
        shapes, columns = self.shapes, len(self.columns)
        sides = tuple(max(b - a for a, b in pairwise(edges)) for edges in self.edges)
        where = "" if columns == 1 else f" in {columns} columns"
        slab = format_shape((min(shapes.tile_vox[0], shapes.grid[0]), *sides))
        return f"tiles of {format_shape(shapes.tile_vox)}, slabs of {slab}{where}, about {self.peak_bytes / 1e9:.2g} GB beside the network"

    def boxes(self, rows: Span | None = None) -> Iterator[Box]:
        """The columns between two rows, all of them where none are given."""
        for column in self.columns:
            yield (rows or (0, self.shapes.shape_vox[0]), *column)

    @property
    def brick_rows(self) -> int | None:
        """Rows of the original grid that are written at once."""
        return self.brick[0] if self.brick else None

    def tile_count(self) -> int:
        """How often the network is asked, tiles of two columns counted twice."""
        return sum(self.tiles_of(box) for box in self.boxes())

    def tiles_of(self, box: Box) -> int:
        """How often the network is asked for a box of the original grid."""
        shapes, needed = self.shapes, Restoring(self.shapes.grid, self.shapes.shape_vox, box, self.brick_rows).needed
        return math.prod(
            len(cover((size,), (side,), overlap=shapes.overlap, box=(span,)))
            for size, side, span in zip(shapes.grid, shapes.tile_vox, needed, strict=True)
        )


class Cost:
    """How many tiles a box of the original grid takes, from counting and not from listing them: a layout may have millions of boxes."""

    def __init__(self, layout: Layout) -> None:
        shapes = layout.shapes
        self._axes = [
            (starts(size, tile, shapes.overlap), tile, size / whole)
            for size, tile, whole in zip(shapes.grid, shapes.tile_vox, shapes.shape_vox, strict=True)
        ]

    def __call__(self, box: Box) -> int:
        """Tiles whose output touches it."""
        return math.prod(self._along(axis, span) for axis, span in enumerate(box))

    def all_boxes(self, layout: Layout) -> int:
        """Tiles of all columns, those of two columns counted twice."""
        spans = [[(0, layout.shapes.shape_vox[0])], *(list(pairwise(edges)) for edges in layout.edges)]
        return math.prod(sum(self._along(axis, span) for span in along) for axis, along in enumerate(spans))

    def _along(self, axis: int, span: Span) -> int:
        """Tiles that touch a span of one axis."""
        first, tile, scale = self._axes[axis]
        return bisect_left(first, math.ceil(span[1] * scale)) - bisect_right(first, math.floor(span[0] * scale) - tile)


def needed_of(shapes: Shapes, box: Box) -> Box:
    """The box of the network's grid that a box of the original takes."""
    return Restoring(shapes.grid, shapes.shape_vox, box).needed


def choose_tile(shape_vox: Shape, plan: Plan, network: Sized, *, grow: bool = True, halvings: int = 0) -> Shape:
    """The network's output size for this image: the whole image if a training step held as many voxels, else less.

    What fitted into memory with gradients for `batch` patches fits without them for one tile of that size. With `grow` false it is
    no larger than a patch. Where memory was too short all the same, it is halved so often, along its longest side, as far as the
    network takes it.
    """
    context = network.context_vox

    def fitting(size: int, axis: int) -> int:
        return network.nearest_sizes(size + 2 * context, axis)[1] - 2 * context

    tile = [min(fitting(patch - 2 * context, i), fitting(shape_vox[i], i)) for i, patch in enumerate(plan.patch_vox)]
    budget = math.prod(plan.patch_vox) * plan.batch
    while grow:
        # Grow the axis that is cut into most tiles; fewer seams, less computed twice.
        cuts = [(size / side, i) for i, (size, side) in enumerate(zip(shape_vox, tile, strict=True)) if side < size]
        if not cuts:
            break
        axis = max(cuts)[1]
        larger = [min(fitting(2 * n, i), fitting(shape_vox[i], i)) if i == axis else n for i, n in enumerate(tile)]
        if math.prod(n + 2 * context for n in larger) > budget or larger == tile:
            break
        tile = larger
    for _ in range(halvings):
        for axis in sorted(range(plan.dims), key=lambda i: -tile[i]):
            side = fitting(-(-tile[axis] // 2), axis)
            if 0 < side < tile[axis]:
                tile[axis] = side
                break
    return tuple(tile)


def choose_layout(
    shapes_of: Callable[[bool], Shapes], limit_bytes: int | None, *, brick: Shape | None, where: str, halvings: int = 0
) -> Layout:
    """Of a grown tile and one of a patch's size, each with as few columns as fit: the layout that computes less; the grown one of equals.

    Args:
        shapes_of: the shapes with a tile that is grown, or not.
        limit_bytes: what may be taken beside the process as it is; None: as little as is usual, or else as is needed.
        brick: as in `Layout`; columns begin at multiples of it.
        where: the image's name, for messages.
        halvings: of what is usual or allowed so many halves are taken, where that is possible: memory was too short for more.

    Raises:
        ConfigError: not even the narrowest columns fit; says how much would.
    """
    most = (USUAL_BYTES if limit_bytes is None else limit_bytes) >> halvings
    fitting: list[Layout] = []
    least: Layout | None = None
    for grown in (True, False):
        for layout in _layouts(shapes_of(grown), brick):
            if layout.peak_bytes <= most:
                fitting.append(layout)
                break
            least = layout if least is None or layout.peak_bytes < least.peak_bytes else least
        if fitting and len(fitting[0].columns) == 1:
            return fitting[0]
    if fitting:
        return min(fitting, key=_computed)
    assert least is not None, "there is always one column"
    if limit_bytes is None or least.peak_bytes <= limit_bytes:
        return least
    raise TooLittleMemoryError(where, least.peak_bytes, limit_bytes)


def _computed(layout: Layout) -> int:
    """Voxels that the network computes, all tiles together."""
    shapes = layout.shapes
    tile = math.prod(side + 2 * context for side, context in zip(shapes.tile_vox, shapes.context_vox, strict=True))
    return Cost(layout).all_boxes(layout) * tile


def _layouts(shapes: Shapes, brick: Shape | None) -> Iterator[Layout]:
    """Layouts of ever more and narrower columns; the longest side is halved each time."""
    align = brick[1:] if brick else (1,) * (len(shapes.shape_vox) - 1)
    counts = [1] * len(align)
    most = [max(1, -(-size // step)) for size, step in zip(shapes.shape_vox[1:], align, strict=True)]
    while True:
        edges = tuple(_edges(size, step, count) for size, step, count in zip(shapes.shape_vox[1:], align, counts, strict=True))
        yield Layout(shapes=shapes, edges=edges, brick=brick, peak_bytes=_peak_bytes(shapes, edges, brick))
        axes = [
            (size / count, axis) for axis, (size, count) in enumerate(zip(shapes.shape_vox[1:], counts, strict=True)) if count < most[axis]
        ]
        if not axes:
            return
        axis = max(axes)[1]
        counts[axis] = min(2 * counts[axis], most[axis])


def _edges(size: int, step: int, count: int) -> tuple[int, ...]:
    """Where `count` or fewer columns of about the same width begin, at multiples of `step`; and the size."""
    width = math.ceil(math.ceil(size / step) / count) * step
    return (*range(0, size, width), size)


def _peak_bytes(shapes: Shapes, edges: tuple[tuple[int, ...], ...], brick: Shape | None) -> int:
    """What the widest column takes; arrays as `source`, `slabs` and `predict` make them."""
    return max(_column_bytes(shapes, tuple(spans), brick) for spans in product(*(_widest(edge) for edge in edges)))


def _widest(edges: tuple[int, ...]) -> list[Span]:
    """The widest column and its neighbours' kin: the first, the last and one in the middle, as halos differ."""
    spans = list(pairwise(edges))
    return [spans[i] for i in sorted({0, len(spans) // 2, len(spans) - 1})]


def _column_bytes(shapes: Shapes, column: Box, brick: Shape | None) -> int:
    """What one column takes."""
    rows = shapes.shape_vox[0]
    needed = needed_of(shapes, ((0, rows), *column))
    resampled = tuple(shapes.grid) != tuple(shapes.shape_vox)
    plane = math.prod(b - a for a, b in needed[1:])
    made = math.prod(b - a for a, b in column)
    halo = [
        min(size, b - a + 2 * (side + context))
        for (a, b), size, side, context in zip(needed[1:], shapes.grid[1:], shapes.tile_vox[1:], shapes.context_vox[1:], strict=True)
    ]
    shown = math.prod(halo)
    depth = shapes.tile_vox[0] + 2 * shapes.context_vox[0]
    tile_in = math.prod(side + 2 * context for side, context in zip(shapes.tile_vox, shapes.context_vox, strict=True))
    few = min(MOST_ROWS, max(1, CHUNK_VALUES // max(1, shapes.layers * max(plane, made))))
    factor = shapes.shape_vox[0] / shapes.grid[0]
    read = math.ceil(depth * factor) + (28 if resampled else 0)
    # As `Source` reads: whole chunks, unless they are so large that they are read again for each tile.
    if shapes.chunk_rows * shown * shapes.channels <= MOST_READ:
        read = max(read, shapes.chunk_rows)
    total: float = shapes.engine_bytes + (shapes.layers + 1) * min(shapes.tile_vox[0], shapes.grid[0]) * plane * 4
    # The network's answer, and the copy that its library makes of it.
    total += 2 * shapes.layers * math.prod(shapes.tile_vox) * 4 + 3 * shapes.channels * tile_in * 4
    # Rows on the grid and rows of the file, each as parts and as the whole that they are joined to.
    total += 2 * shapes.channels * shown * (depth * 4 if resampled else 0)
    total += 2 * shapes.channels * math.ceil(shown * (made / max(1, plane))) * read * (4 + shapes.value_bytes / 2)
    if resampled:
        total += shapes.layers * (few + 4) * (plane + 2 * made) * 4
    # What is being written, what waits, and what is being made.
    handed = brick[0] if brick is not None else min(shapes.tile_vox[0], shapes.grid[0]) * factor
    total += math.ceil(3 * handed * made * shapes.out_bytes)
    return math.ceil(MARGIN_SHARE * total) + MARGIN_BYTES
