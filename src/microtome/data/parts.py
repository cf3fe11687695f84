"""Images too large to be looked at as a whole: which of them these are, and which parts of them are read instead."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from microtome.data.names import place_of
from microtome.errors import DataError
from microtome.geometry import Shape
from microtome.images.files import open_volume, probe_image
from microtome.images.image import Image
from microtome.images.volume import Volume
from microtome.machine import free_memory_bytes

# Values of an image from which on it is read part by part: 645 voxels a side.
MOST_WHOLE = 2**28
# Values from which on a sample of the parts stands for all: counting a terabyte for a share of voxels would take hours.
MOST_SEEN = 2**33
# Values that are read at a time at most, where chunks are not larger; fewer where parts are a sample, to spread them.
MOST_READ, SAMPLE_READ = 2**26, 2**21
# Smaller files are read without asking their header what they claim.
_SMALL_BYTES = 2**28
# The sample is the same each time.
_SEED = 0


def parts_of(shape_vox: Shape, chunk_vox: Shape, most: int = MOST_READ, seen: int | None = None) -> Iterator[tuple[slice, ...]]:
    """Boxes (*S) that make up a volume in the order of the slowest axis, or a sample of them, cut where its chunks are.

    Where a chunk's depth of whole planes is within `most` they are whole planes, so that voxels come in C order.

    Args:
        shape_vox: S.
        chunk_vox: sides of what is decoded at once.
        most: about as many voxels lie in a box, or a chunk's where those are larger.
        seen: voxels that are enough; None: all. The boxes are drawn evenly, without repetition, from a fixed seed.
    """
    sides = [min(side, size) for side, size in zip(chunk_vox, shape_vox, strict=True)]
    for axis in reversed(range(len(sides))):
        others = math.prod(sides) // sides[axis]
        whole_chunks = max(1, most // (others * sides[axis])) * sides[axis]
        sides[axis] = shape_vox[axis] if others * shape_vox[axis] <= most else min(shape_vox[axis], whole_chunks)
    counts = [-(-size // side) for size, side in zip(shape_vox, sides, strict=True)]
    total = math.prod(counts)
    wanted = total if seen is None else max(1, min(total, seen // math.prod(sides)))
    chosen = range(total) if wanted == total else np.sort(np.random.default_rng(_SEED).choice(total, wanted, replace=False))
    for number in chosen:
        place = np.unravel_index(int(number), counts)
        yield tuple(slice(int(i) * n, min(size, (int(i) + 1) * n)) for i, n, size in zip(place, sides, shape_vox, strict=True))


def looked_at(volume: Volume, values: int = MOST_SEEN) -> tuple[list[tuple[slice, ...]], float]:
    """Boxes that stand for a volume, all of it where it has no more values than that, and the share of its voxels that they hold."""
    total = math.prod(volume.shape_vox)
    seen = values // volume.channels
    complete = total <= seen
    parts = parts_of(
        volume.shape_vox,
        volume.chunk_vox,
        (MOST_READ if complete else SAMPLE_READ) // volume.channels,
        None if complete else seen,
    )
    boxes = list(parts)
    return boxes, sum(math.prod(side.stop - side.start for side in box) for box in boxes) / total


def middle_of(volume: Volume, sides_vox: Shape) -> tuple[slice, ...]:
    """The box in the middle of a volume that is no longer than that along each axis."""
    sizes = [min(side, size) for side, size in zip(sides_vox, volume.shape_vox, strict=True)]
    return tuple(slice((size - n + 1) // 2, (size - n + 1) // 2 + n) for n, size in zip(sizes, volume.shape_vox, strict=True))


def image_part(volume: Volume, box: tuple[slice, ...]) -> Image:
    """A part (C, *box) of a volume in memory; its place in the world stays that of the whole, and what is of the whole file is left out."""
    return replace(volume, extra={}).with_array(volume.pixels[(slice(None), *box)])


def large_volume(path: Path) -> Volume | None:
    """An image of more values than `MOST_WHOLE`, opened and not read; None of every other.

    Raises:
        DataError: its header cannot be read.
    """
    if not _may_be_large(path):
        return None
    header = probe_image(path)
    return open_volume(path) if math.prod(header.shape_vox) * header.channels > MOST_WHOLE else None


def check_fits(*paths: Path) -> None:
    """Refuse to read all of an image, of the channels in one file or in several, that the free memory does not hold.

    Raises:
        DataError: names its bytes and those that are free.
    """
    if not any(_may_be_large(path) for path in paths):
        return
    needed, free = sum(probe_image(path).claimed_bytes for path in paths), free_memory_bytes()
    if needed > free:
        expected = f"an image that fits in the free memory ({free} bytes) where all of it is needed at once"
        do = "cut it into parts, or store it as OME-Zarr or HDF5 on the grid that the network sees"
        raise DataError(paths[0], expected=expected, got=f"{needed} bytes ({needed / 1e9:.1f} GB)", do=do, code="D004")


def _may_be_large(path: Path) -> bool:
    """Whether a header is worth a look: a folder's size is not known, a file's is."""
    place = place_of(path)
    return place.is_dir() or (place.is_file() and place.stat().st_size > _SMALL_BYTES)
