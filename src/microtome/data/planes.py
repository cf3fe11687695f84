"""Planes of a volume that a person painted: which they are, how they are called, and a label cut down to some of them."""

import re
from collections.abc import Sequence

import numpy as np

from microtome.data.case import NOT_ANNOTATED, Case, Plane
from microtome.errors import ConfigError
from microtome.geometry import Shape, format_shape

AXES = "zyx"
# A painted plane is at least this full, in shares of the fullest one: some are painted in part only.
FULL = 0.5
# How much fuller than the emptiest plane of its axis it is at least: what all planes of an axis have, others left there.
APART = 0.1
# Where so many planes of every axis are full, nothing was painted plane by plane.
DENSE = 0.75


def annotated_planes(label_S: np.ndarray) -> tuple[Plane, ...] | None:
    """The planes that were painted, in order of axis and index; None where the whole volume was, so that no plane stands out.

    Taken one after the other, the one first that has the most annotated voxels and stands out most from its axis; then
    what it explains, its lines in the planes that cross it, is left out of the count. So three painted sections across Z
    do not make every section across Y look painted. Where people painted in no planes at all (strokes of a 3D brush), the
    planes that hold most of it. The rule is ours.

    Args:
        label_S: a label of three axes, NOT_ANNOTATED where nobody looked.

    Returns:
        (axis, index) pairs; empty where nothing is annotated.
    """
    left_S = label_S != NOT_ANNOTATED
    counts = [np.count_nonzero(left_S, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    shares = [count * len(count) / left_S.size for count in counts]
    fullest = max(share.max(initial=0) for share in shares)
    if not fullest:
        return ()
    if all((share >= FULL * fullest).mean() >= DENSE for share in shares):
        return None
    lifts = [np.where(share - share.min() >= APART * fullest, share - share.min(), 0) for share in shares]
    found: list[Plane] = []
    while True:
        # Voxels of a plane of each axis that lie in none of those found.
        sizes = [n - sum(axis == each for each, _ in found) for axis, n in enumerate(left_S.shape)]
        scores = [
            np.where(count >= FULL * fullest * sizes[axis - 1] * sizes[axis - 2], lifts[axis] * count, 0)
            for axis, count in enumerate(counts)
        ]
        axis = int(np.argmax([score.max() for score in scores]))
        index = int(scores[axis].argmax())
        if not scores[axis][index]:
            return tuple(sorted(found))
        found.append((axis, index))
        _take_out(left_S, counts, axis, index)


def _take_out(left_S: np.ndarray, counts: Sequence[np.ndarray], axis: int, index: int) -> None:
    """Empty a plane, and take its lines off the counts of the planes that cross it, in place."""
    plane = np.moveaxis(left_S, axis, 0)[index]
    first, second = (other for other in range(3) if other != axis)
    counts[first][:] -= np.count_nonzero(plane, axis=1)
    counts[second][:] -= np.count_nonzero(plane, axis=0)
    counts[axis][index] = 0
    plane[:] = False


def keep_planes(label_S: np.ndarray, case: Case) -> np.ndarray:
    """The label of a case, cut to its sections already, NOT_ANNOTATED wherever the case's planes do not count.

    Planes are counted in the whole stack, as the file has it. The given array is not changed.
    """
    if case.planes is None:
        return label_S
    first = case.sections[0] if case.sections else 0
    kept = in_planes(label_S.shape, case.planes.shown, first) if case.planes.shown else np.ones(label_S.shape, bool)
    kept &= ~in_planes(label_S.shape, case.planes.hidden, first)
    return np.where(kept, label_S, label_S.dtype.type(NOT_ANNOTATED))


def in_planes(shape_vox: Shape, planes: Sequence[Plane], first: int = 0) -> np.ndarray:
    """Where the planes lie in a volume (*S) bool whose slowest axis begins at `first`."""
    inside = np.zeros(shape_vox, bool)
    for axis, index in planes:
        place = index - first if axis == 0 else index
        if 0 <= place < shape_vox[axis]:
            np.moveaxis(inside, axis, 0)[place] = True
    return inside


def plane_name(plane: Plane) -> str:
    """`z10`: across Z, the eleventh."""
    return f"{AXES[plane[0]]}{plane[1]}"


def parse_planes(text: str, shape_vox: Shape, where: str = "--planes") -> tuple[Plane, ...]:
    """The planes that a person names, `z10,z20,y40`, counted from 0; in order, each once.

    Raises:
        ConfigError: the image is no volume, a word names no plane, or the volume has no such plane.
    """
    if len(shape_vox) != len(AXES):
        raise ConfigError(
            where,
            expected="a volume",
            got=f"an image of {format_shape(shape_vox)}",
            do="leave it out: a picture has no planes",
            code="C020",
        )
    planes = set()
    for word in text.split(","):
        match = re.fullmatch(rf"([{AXES}])(\d{{1,6}})", word.strip().lower())
        axis, index = (AXES.index(match[1]), int(match[2])) if match else (0, -1)
        if not 0 <= index < shape_vox[axis]:
            lasts = ", ".join(f"{letter}0 to {letter}{size - 1}" for letter, size in zip(AXES, shape_vox, strict=True))
            raise ConfigError(where, expected=f"planes out of {lasts}", got=repr(word.strip()), do="write them as z10,z20,y40", code="C020")
        planes.add((axis, index))
    return tuple(sorted(planes))
