"""A prediction that is written into a chunked store, brick by brick, so that a killed one goes on where it was and many may help.

A brick is some rows of a column of the plane, whole chunks of the store, written once and then marked. What a prediction is (model,
image, layout, what its values are counted from) is recorded in the store before the first brick: who goes on, in this process or in
another, cuts and computes the very same, so that the result equals an unbroken run, byte for byte.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from microtome.data.legend import Legend
from microtome.errors import DataError
from microtome.geometry import Shape
from microtome.images.chunked import ChunkedArray
from microtome.images.omezarr import create_image, create_labels, finish
from microtome.images.stores import Documents
from microtome.images.volume import Volume
from microtome.inference.layout import Layout, Shapes
from microtome.inference.predict import Finished, Task, Wanted, finished_rows
from microtome.inference.slabs import Box
from microtome.inference.source import Moments
from microtome.tiling import Span

# The names of the label image in the store, of the record of what it is, and of what stops those who write it.
LABELS, RECORD, HALT = "prediction", "record", "halt"
# Sides of what is written at once, by the number of axes: a megabyte of labels.
BRICKS: Mapping[int, Shape] = MappingProxyType({2: (1024, 1024), 3: (64, 128, 128)})
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a prediction is; equal records give equal bytes.

    Attributes:
        request: what was asked for, as JSON has it: of another request nothing is taken over.
        engine: what computes, by its name.
        layout: how the image is cut.
        moments: of the image's channels, measured once.
        complete: whether nothing is left to do.
        filled: whether all bricks are written, so that marks say nothing any more.
    """

    request: Mapping[str, Any]
    engine: str
    layout: Layout
    moments: tuple[Moments, ...] | None
    complete: bool = False
    filled: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it stands in the store."""
        return {"schema": SCHEMA, **asdict(self), "filled": self.filled or self.complete}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> Self:
        """What stood in a store.

        Raises:
            DataError: no record of this program, or of a newer version.
        """
        try:
            if found["schema"] != SCHEMA:
                raise DataError(
                    where,
                    expected=f"a record of schema {SCHEMA}",
                    got=str(found["schema"]),
                    do="use the microtome that wrote it",
                    code="D053",
                )
            cut = found["layout"]
            return cls(
                request=found["request"],
                engine=str(found["engine"]),
                layout=Layout(
                    shapes=Shapes(**{name: _tuples(value) for name, value in cut["shapes"].items()}),
                    edges=_tuples(cut["edges"]),
                    brick=_tuples(cut["brick"]),
                    peak_bytes=cut["peak_bytes"],
                ),
                moments=None if found["moments"] is None else tuple(Moments(*channel) for channel in found["moments"]),
                complete=bool(found["complete"]),
                filled=bool(found["filled"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"[:200]
            raise DataError(
                where, expected="the record of a prediction", got=got, do="remove this output and predict again", code="D030"
            ) from None


class Bricks:
    """The store of one prediction, opened or made.

    Args:
        place: the store's folder or URL.
        record: what is to be written; what an earlier call recorded must be of the same request.
        wanted: what is to come of it.
        legend: of the model.

    Attributes:
        record: by which it has to be computed: the earlier call's, if there was one.
        chunk_vox: sides (*S) of the store's chunks.

    Raises:
        DataError: another prediction lies there.
    """

    def __init__(self, place: Path, record: Record, wanted: Wanted, legend: Legend) -> None:
        self.place, self.wanted, self.legend = place, wanted, legend
        self.documents = Documents(place)
        found = recorded(place)
        if found is not None and not same_request(found.request, record.request):
            changed = ", ".join(sorted(name for name in record.request if found.request.get(name) != record.request[name]))
            what = "a finished prediction" if found.complete else "the beginning of a prediction"
            got = f"{what} of another kind ({changed})"
            raise DataError(place, expected="this prediction or nothing", got=got, do="give another --out, or remove it", code="D027")
        self.record = found or record
        if found is None:
            self.documents.write(RECORD, record.to_json())
        layout = self.record.layout
        assert layout.brick is not None, "what is written in bricks was cut into bricks"
        self.shape, self.chunk_vox, self.depth = layout.shapes.shape_vox, layout.brick, layout.brick[0]
        self.arrays = {} if self.record.complete else self._arrays()

    def _arrays(self) -> dict[str, ChunkedArray]:
        """Every array of the store, opened or made."""
        chunk, arrays = self.chunk_vox, {}
        for name, (layers, kind) in self.wanted.arrays(len(self.legend.names)).items():
            if name == "labels":
                arrays[name] = create_labels(self.place, LABELS, self.shape, stored_values(self.legend).dtype, chunk)
            else:
                arrays[name] = create_image(self.place, name, self.shape, kind, chunk, layers=layers or None)
        return arrays

    def missing(self, most: int | None = None, box: Box | None = None) -> list[Box]:
        """Boxes of successive bricks that are not marked, of at most so many bricks each: of all, or within a box that this gave before."""
        if self.record.filled:
            return []
        columns = self.record.layout.columns
        numbers = range(len(columns)) if box is None else [columns.index(box[1:])]
        marked = self.documents.marked("" if box is None else f"{numbers[0]}.")
        rows = self._rows((0, self.shape[0]) if box is None else box[0])
        boxes: list[Box] = []
        for number in numbers:
            run: list[int] = []
            for row in rows:
                if f"{number}.{row}" in marked:
                    continue
                if run and (run[-1] + 1 != row or len(run) == most):
                    boxes.append(self._box(run, columns[number]))
                    run = []
                run.append(row)
            if run:
                boxes.append(self._box(run, columns[number]))
        return boxes

    def done(self) -> tuple[int, int]:
        """How many bricks are written, and of how many."""
        of = len(self.record.layout.columns) * len(self._rows((0, self.shape[0])))
        return of if self.record.filled else len(self.documents.marked()), of

    def bricks_of(self, box: Box) -> list[tuple[str, Box]]:
        """The bricks of a box of `missing`, with their marks."""
        column = self.record.layout.columns.index(box[1:])
        return [(f"{column}.{row}", self._box([row], box[1:])) for row in self._rows(box[0])]

    def fill(self, task: Task, box: Box) -> Iterator[int]:
        """Compute and write a box of `missing`; yields how many voxels are on their way after each piece."""
        writer = _Writer(self, box)
        with ThreadPoolExecutor(1, thread_name_prefix="writing") as pool:
            pending: Future[None] | None = None
            for first, finished in finished_rows(task, box):
                for ready in writer.add(first, finished):
                    # One brick is written while the next is made, and no third waits.
                    if pending is not None:
                        pending.result()
                    pending = pool.submit(self._write, *ready)
                yield writer.voxels(finished)
            if pending is not None:
                pending.result()

    def complete(self, like: Volume, source: str, *, pyramids: bool = True) -> None:
        """Add what makes the store one of images: pyramids, then the documents that name them. A kill in between costs no brick."""
        for name in self.arrays if pyramids else ():
            labels = name == "labels"
            finish(self.place, LABELS if labels else name, like=like, values=stored_names(self.legend) if labels else None, source=source)
        self.documents.write(RECORD, replace(self.record, filled=True).to_json())
        self.documents.remove("marks/")
        # Of a cluster that had too little memory before; this call may have done without one.
        self.halt(False)
        self.documents.write(RECORD, replace(self.record, complete=True).to_json())

    @property
    def halted(self) -> bool:
        """Whether one of several processes had too little memory, and all are to leave the store as it is."""
        return self.documents.read(HALT) is not None

    def halt(self, halted: bool) -> None:
        """Let all processes end what they write, or let them write."""
        self.documents.write(HALT, {}) if halted else self.documents.remove(HALT)

    def begin_anew(self, layout: Layout) -> None:
        """Forget what is written, and go by another layout of the same bricks: two of them would leave a seam.

        The marks first: after a kill in between all is done again by the old layout. No other process may be writing here.
        """
        assert layout.brick == self.record.layout.brick, "chunks stay as they are"
        self.documents.remove("marks/")
        self.record = replace(self.record, layout=layout)
        self.documents.write(RECORD, self.record.to_json())

    def opened(self) -> dict[str, ChunkedArray]:
        """Every array, whether or not all is done."""
        return self.arrays or self._arrays()

    def _rows(self, span: Span) -> range:
        """Rows of bricks between two rows of voxels."""
        return range(span[0] // self.depth, -(-span[1] // self.depth))

    def _box(self, rows: list[int], column: Box) -> Box:
        return ((rows[0] * self.depth, min(self.shape[0], (rows[-1] + 1) * self.depth)), *column)

    def _write(self, mark: str, box: Box, brick: Mapping[str, np.ndarray]) -> None:
        """Write all arrays of a brick, then its mark."""
        place = tuple(slice(a, b) for a, b in box)
        for name, values in brick.items():
            stored = stored_values(self.legend)[values] if name == "labels" else values
            self.arrays[name][(*(slice(None),) * (values.ndim - len(place)), *place)] = stored
        self.documents.mark(mark)


class _Writer:
    """Gathers finished rows until they are a brick."""

    def __init__(self, bricks: Bricks, box: Box) -> None:
        self.coming = iter(bricks.bricks_of(box))
        self.axes = len(box)
        self.mark, self.box = next(self.coming)
        self.kept: dict[str, np.ndarray] = {}

    def add(self, first: int, finished: Finished) -> Iterator[tuple[str, Box, dict[str, np.ndarray]]]:
        """Take rows; gives each brick that is whole with them, with its mark."""
        rows = self._rows(finished)
        done = 0
        while done < rows:
            (start, past), at = self.box[0], first + done
            count = min(past - at, rows - done)
            for name, values in finished.items():
                lead = (slice(None),) * (values.ndim - self.axes)
                if at == start:
                    # A new one for each brick, as the one before may still be being written.
                    self.kept[name] = np.empty((*values.shape[: len(lead)], *(b - a for a, b in self.box)), values.dtype)
                self.kept[name][(*lead, slice(at - start, at - start + count))] = values[(*lead, slice(done, done + count))]
            done += count
            if at + count == past:
                yield self.mark, self.box, dict(self.kept)
                self.mark, self.box = next(self.coming, (self.mark, self.box))

    def voxels(self, finished: Finished) -> int:
        """How many voxels some rows are."""
        values = next(iter(finished.values()))
        return int(np.prod(values.shape[values.ndim - self.axes :]))

    def _rows(self, finished: Finished) -> int:
        values = next(iter(finished.values()))
        return int(values.shape[values.ndim - self.axes])


def recorded(place: Path) -> Record | None:
    """What an earlier call recorded in a store; None where there was none.

    Raises:
        DataError: a record that cannot be read.
    """
    found = Documents(place).read(RECORD)
    return None if found is None else Record.from_json(found, str(place))


def stored_values(legend: Legend) -> np.ndarray:
    """The value in a store of each class: that of the training labels, or its number where those were colours."""
    numbers = np.arange(len(legend.names), dtype=np.int16)
    if legend.kind == "colours":
        return numbers.astype(np.uint8 if len(numbers) <= 256 else np.uint16)
    return legend.encode(numbers)


def stored_names(legend: Legend) -> dict[int, str]:
    """The name of each value that `stored_values` gives."""
    return {int(value): name for value, name in zip(stored_values(legend), legend.names, strict=True)}


def same_request(found: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether two requests are one, as JSON has them."""
    return bool(found == json.loads(json.dumps(asked)))


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
