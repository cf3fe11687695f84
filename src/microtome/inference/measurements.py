"""What engines took and how near they came, remembered for a bundle on a machine: measurements, never choices.

A small JSON file a bundle: machine (processor and threads) -> engine (with its library's version) -> numbers. It may be deleted
at any time. A file that is damaged, or cannot be written, costs a measurement more and nothing else.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from microtome.errors import RunError
from microtome.files import write_json
from microtome.geometry import Shape
from microtome.inference.agreement import Agreement

# Another tile's seconds are scaled by its voxels up to this factor of their number; beyond it caches decide otherwise.
FARTHEST = 4.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one engine on this machine.

    Attributes:
        startup_seconds: from nothing imported to ready; None: not measured.
        agreement: with the golden output; None: not compared.
        voxel_seconds: what a voxel of the golden input took when they were compared: an upper bound, as it was the first run.
        tiles: seconds a tile, by the shape of its input.
    """

    startup_seconds: float | None = None
    agreement: Agreement | None = None
    voxel_seconds: float | None = None
    tiles: Mapping[Shape, float] = field(default_factory=dict)

    def tile_seconds(self, tile_vox: Shape) -> float | None:
        """Seconds a tile of this shape: measured, or scaled from the measured one nearest in size; None where there is none near."""
        if tile_vox in self.tiles:
            return self.tiles[tile_vox]
        voxels = math.prod(tile_vox)
        ratios = [(max(ratio, 1 / ratio), ratio * seconds) for shape, seconds in self.tiles.items() if (ratio := voxels / math.prod(shape))]
        farness, seconds = min(ratios, default=(math.inf, 0.0))
        return seconds if farness <= FARTHEST else None


@dataclass(kw_only=True)
class Measurements:
    """The file of one bundle, and the part of it that is about this machine.

    Attributes:
        path: of the file; None: nothing is kept.
        machine: what numbers depend on beside engine and tile.
        engines: engine with version -> what is known.
    """

    path: Path | None
    machine: str
    engines: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, machine: str) -> "Measurements":
        """What the file knows of this machine; nothing where there is no sound file."""
        document = _document(path)
        found = document.get(machine)
        entries = found.items() if isinstance(found, dict) else ()
        return cls(path=path, machine=machine, engines={name: entry for name, value in entries if (entry := _entry(value))})

    def of(self, engine: str) -> Measured:
        """What is known of an engine."""
        return self.engines.get(engine, Measured())

    def note(self, engine: str, **changes: Any) -> None:
        """Take over new numbers of an engine: fields of `Measured`; `tiles` are added to those known."""
        known = self.of(engine)
        if "tiles" in changes:
            changes["tiles"] = {**known.tiles, **changes["tiles"]}
        self.engines[engine] = replace(known, **changes)

    def write(self) -> None:
        """Put them into the file, beside what other machines and other processes wrote; not at all where that is not possible."""
        if self.path is None:
            return
        document = _document(self.path)
        others = document.get(self.machine)
        document[self.machine] = (others if isinstance(others, dict) else {}) | {n: _plain(entry) for n, entry in self.engines.items()}
        with suppress(RunError):
            write_json(self.path, document)


def _document(path: Path | None) -> dict[str, Any]:
    """The file's content, empty where there is none that can be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        # What Python reads and JSON does not know, NaN and infinity, could not be written again.
        json.dumps(document, allow_nan=False)
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _entry(value: Any) -> Measured | None:
    """One engine's numbers from JSON; None where they are not what was written."""
    try:
        tiles = {tuple(map(int, shape.split("x"))): float(seconds) for shape, seconds in value["tiles"].items()}
        startup, guess = (None if value[name] is None else float(value[name]) for name in ("startup_seconds", "voxel_seconds"))
        agreement = None if value["labels"] is None else Agreement(float(value["labels"]), float(value["probability"]))
        numbers = [*tiles.values(), startup or 0.0, guess or 0.0, *((agreement.labels, agreement.probability) if agreement else ())]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    if not all(0 <= number < math.inf for number in numbers) or not all(min(shape) > 0 for shape in tiles):
        return None
    return Measured(startup_seconds=startup, agreement=agreement, voxel_seconds=guess, tiles=tiles)


def _plain(entry: Measured) -> dict[str, Any]:
    """One engine's numbers for JSON."""
    return {
        "startup_seconds": entry.startup_seconds,
        "voxel_seconds": entry.voxel_seconds,
        "labels": entry.agreement.labels if entry.agreement else None,
        "probability": entry.agreement.probability if entry.agreement else None,
        "tiles": {"x".join(map(str, shape)): seconds for shape, seconds in entry.tiles.items()},
    }
