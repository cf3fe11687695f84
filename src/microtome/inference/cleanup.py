"""Labels of a volume of any size -> labels without specks and holes, block by block; the result does not depend on the blocks.

In this order:

1. the components of each class: those that are too small, and all but the largest one where that is asked for, become background;
2. on what is left: holes become the class around them.

A component is connected by faces. A hole of a class is a component of background that has no voxel at the border of the image and
whose neighbours by faces are all of that class: what two classes enclose together, or what holds a part of another class, is a hole
of none, so the order of classes means nothing. An axis with one voxel has no border.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from microtome.errors import ConfigError
from microtome.geometry import Shape, Spacing
from microtome.inference.asked import CleanUp, least_voxels
from microtome.inference.objects import Box, Objects, Readable, Writable, label_blocks
from microtome.tiling import blocks_of

# No class: holes of this are not filled.
_NONE = np.iinfo(np.int64).min


def clean(
    labels: Readable,
    out: Writable,
    rules: CleanUp,
    *,
    classes: Sequence[int],
    background: int,
    spacing_mm: Spacing,
    block_vox: Shape,
    scratch: Callable[[Shape, np.dtype[Any]], Writable],
) -> None:
    """Write `labels`, cleaned, to `out`. The same whatever the blocks; memory holds a few of them, and what `label_blocks` says.

    Args:
        labels: integers (*S); values that are no class, such as -1 (not annotated), stay as they are and are no background.
        out: integers (*S) that hold the same values; may be `labels` itself.
        rules: what is cleaned.
        classes: the numbers of all classes.
        background: the number of that class.
        spacing_mm: voxel size along S.
        block_vox: sides of a block; those of the volume where it is in memory.
        scratch: makes an array for a while: `np.zeros`, or a store where the volume does not fit into memory. What is in it does
            not matter; it is asked for once, if at all.

    Raises:
        ConfigError: a class of the rules is none of the classes, or the background.
    """
    foreground = sorted(set(classes) - {background})
    largest = _chosen("keep-largest", rules.keep_largest, foreground)
    filled = _chosen("fill-holes", rules.fill_holes, foreground)
    least = least_voxels(rules, spacing_mm)
    store = scratch(out.shape, np.dtype(np.uint32)) if largest or filled or least > 1 else None
    if store is None or (not largest and least <= 1):
        if labels is not out:
            _rewrite(out, block_vox, lambda box: labels[box])
    else:
        _remove_components(labels, out, store, block_vox, foreground=foreground, largest=largest, least=least, background=background)
    if store is not None and filled:
        _fill(out, store, block_vox, filled=filled, background=background)


def _chosen(what: str, asked: bool | tuple[int, ...], foreground: list[int]) -> list[int]:
    """The classes that something is done for."""
    if isinstance(asked, bool):
        return foreground if asked else []
    unknown = sorted(set(asked) - set(foreground))
    if unknown:
        known = ", ".join(map(str, foreground)) or "none"
        raise ConfigError(
            f"--{what}", expected=f"classes other than the background ({known})", got=f"{unknown[0]}", do="choose from these", code="C023"
        )
    return sorted(set(asked))


def _rewrite(out: Writable, block_vox: Shape, values_of: Callable[[Box], np.ndarray]) -> None:
    """Write all blocks of `out` anew."""
    for box in blocks_of(out.shape, block_vox):
        out[box] = values_of(box).astype(out.dtype)


def _label_classes(labels: Readable, store: Writable, classes: list[int], block_vox: Shape) -> Objects:
    """Number the components of some classes; `values` are places in the list of classes, from 1 on."""

    def places_of(box: Box) -> np.ndarray:
        part = labels[box]
        places = np.zeros(part.shape, np.int32)
        for place, number in enumerate(classes, 1):
            places[part == number] = place
        return places

    return label_blocks(places_of, store.shape, store, block_vox)


def _remove_components(
    labels: Readable,
    out: Writable,
    store: Writable,
    block_vox: Shape,
    *,
    foreground: list[int],
    largest: list[int],
    least: int,
    background: int,
) -> None:
    """Write the labels without the components that are too small, or not the largest of a class of which only that stays."""
    objects = _label_classes(labels, store, foreground, block_vox)
    stays = objects.sizes_vox >= least
    for number in largest:
        mine = np.flatnonzero(objects.values == foreground.index(number) + 1)
        # Objects are numbered by their first voxels, and of equal sizes argmax takes the first.
        others = np.delete(mine, np.argmax(objects.sizes_vox[mine])) if len(mine) else mine
        stays[others] = False
    goes = np.concatenate([[False], ~stays])
    _rewrite(out, block_vox, lambda box: np.where(goes[store[box]], background, labels[box]))


def _fill(out: Writable, store: Writable, block_vox: Shape, *, filled: list[int], background: int) -> None:
    """Turn the holes in some classes into these classes."""
    objects = _label_classes(out, store, [background], block_vox)
    around = _surroundings(out, store, len(objects), block_vox)
    size = np.array(out.shape)
    at_border = ((objects.boxes_vox[..., 0] == 0) | (objects.boxes_vox[..., 1] == size)) & (size > 1)
    around[1:][at_border.any(axis=1)] = _NONE
    around[~np.isin(around, filled)] = _NONE
    if (around == _NONE).all():
        return
    for box in blocks_of(out.shape, block_vox):
        found = around[store[box]]
        if (found != _NONE).any():
            part = out[box]
            out[box] = np.where(found == _NONE, part, found).astype(out.dtype)


def _surroundings(out: Readable, store: Readable, count: int, block_vox: Shape) -> np.ndarray:
    """The value (count + 1,) of all voxels that are neighbours of each component 1..count by a face; `_NONE` where they differ."""
    low, high = np.full(count + 1, np.iinfo(np.int64).max), np.full(count + 1, _NONE)
    for box in blocks_of(out.shape, block_vox):
        # A voxel more at the far sides, so that each pair of neighbours is seen once.
        near = tuple(slice(side.start, side.stop + 1) for side in box)
        objects, values = store[near], out[near]
        for axis in range(objects.ndim):
            lower = (slice(None),) * axis + (slice(None, -1),)
            upper = (slice(None),) * axis + (slice(1, None),)
            for here, there in ((lower, upper), (upper, lower)):
                beside = (objects[here] > 0) & (objects[there] == 0)
                np.minimum.at(low, objects[here][beside], values[there][beside])
                np.maximum.at(high, objects[here][beside], values[there][beside])
    return np.where(low == high, high, _NONE)
