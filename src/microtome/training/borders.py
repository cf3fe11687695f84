"""U-Net's weight map: the gaps between touching objects weigh more; from numbered objects (*S) to weights (*S), no torch.

In `objects_S` 0 is background, every number above it one object, and -1 is not annotated.
"""

import itertools
import math

import numpy as np
from scipy import ndimage

from microtome.geometry import Spacing

# Where d1 + d2 is more than this many sigma, what borders add is less than 0.04 % of w0, and is left out.
REACH_SIGMAS = 4.0


def border_weights(objects_S: np.ndarray, spacing_mm: Spacing, *, w0: float, sigma_vox: float, balance: bool) -> np.ndarray:
    """The weight of each voxel, `w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))`; float32 (*S), 0 where nothing is annotated.

    `d1` and `d2` are the distances of a background voxel to the nearest and the second-nearest object, centre of voxel to
    centre of voxel, in sides of the finest voxel: both 1 in a gap one voxel wide. Between objects further apart than
    `REACH_SIGMAS` sigma, or where there is one object only, nothing is added.

    The paper prints the sum for every pixel and does not give `w_c`. Ours: the border term is added on background only, where
    separation has to be learned (inside of an object its own border would be the nearest, and raise its rim); `w_c` is 1, or
    with `balance` N / (2 N_k) of the N annotated voxels of this image, N_k being those of objects together or of background:
    a mean of 1, and 1 again in an image that lacks either.

    Args:
        objects_S: integers (*S), two or three axes.
        spacing_mm: voxel size along S.
        w0: 10 in the paper.
        sigma_vox: in sides of the finest voxel; 5 in the paper.
        balance: whether the rarer of objects and background weighs more.

    References:
        Ronneberger et al. 2015, arXiv 1505.04597, section 3.
    """
    inside_S, background_S = objects_S > 0, objects_S == 0
    inside, background = np.count_nonzero(inside_S), np.count_nonzero(background_S)
    share = (inside + background) / 2
    even = not balance or not inside or not background
    weights_S = np.zeros(objects_S.shape, np.float32)
    weights_S[inside_S] = 1 if even else share / inside
    weights_S[background_S] = 1 if even else share / background
    if w0 and inside and background:
        places, sums = _near_two(objects_S, np.array(spacing_mm) / min(spacing_mm), REACH_SIGMAS * sigma_vox)
        weights_S[places] += w0 * np.exp(-(sums**2) / (2 * sigma_vox**2))
    return weights_S


def separated(objects_S: np.ndarray) -> np.ndarray:
    """The objects with one voxel of background between those that touch, by a side, an edge or a corner; same type.

    The paper inserts such borders "by morphology" and does not say whose voxels are taken. Ours: those of the larger object,
    of two of the same size the one with the higher number, so that small objects stay whole; one that is a single voxel thick
    and lies along smaller ones can vanish.

    References:
        Ronneberger et al. 2015, arXiv 1505.04597, section 3.
    """
    numbers, index, sizes = np.unique(objects_S, return_inverse=True, return_counts=True)
    # The smaller an object, the higher its rank; 0 is for what is no object.
    rank = np.zeros(len(numbers), np.int32)
    rank[np.lexsort((numbers, sizes))[::-1]] = np.arange(1, len(numbers) + 1)
    rank_S = np.where(numbers > 0, rank, 0)[index].reshape(objects_S.shape)
    taken_S = (rank_S > 0) & (ndimage.maximum_filter(rank_S, size=3, mode="nearest") > rank_S)
    return np.where(taken_S, 0, objects_S).astype(objects_S.dtype)


def objects_of(label_S: np.ndarray) -> np.ndarray:
    """The connected pieces of each class above 0, numbered from 1: int32 (*S); -1 stays -1.

    For labels without instances. Voxels that touch by a corner are connected; pieces of different classes are not.
    """
    objects_S = np.where(label_S < 0, -1, 0).astype(np.int32)
    count = 0
    for k in np.unique(label_S[label_S > 0]):
        pieces_S, found = ndimage.label(label_S == k, structure=np.ones((3,) * label_S.ndim))
        objects_S += np.where(pieces_S > 0, pieces_S + count, 0).astype(np.int32)
        count += found
    return objects_S


def _near_two(objects_S: np.ndarray, sides: np.ndarray, reach: float) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The background voxels where d1 + d2 is at most `reach`, as an index of S, and that sum (N,); exact.

    One distance transform finds the nearest object i of every voxel; the second-nearest is the nearest of all but i. Rather
    than one more for each i, there is one for each of a few *sets* of objects, such that of any two objects that one voxel
    within reach has near it, some set holds the second and not the first. d2 is the least distance to the sets without i.
    """
    numbered_S = _numbered(objects_S)
    sets_TN = _sets(_colours(numbered_S, sides, reach))
    nearest = _nearest(numbered_S > 0, sides)
    places = np.nonzero(objects_S == 0)
    first = _distances(nearest, places, sides)
    close = first <= reach / 2
    places, first = tuple(axis[close] for axis in places), first[close]
    i = numbered_S[tuple(axis[places] for axis in nearest)]
    second = np.full(first.shape, np.inf)
    for set_N in sets_TN:
        distances = _distances(_nearest(set_N[numbered_S], sides), places, sides)
        second = np.where(set_N[i], second, np.minimum(second, distances))
    near = first + second <= reach
    return tuple(axis[near] for axis in places), (first + second)[near]


def _numbered(objects_S: np.ndarray) -> np.ndarray:
    """The objects numbered from 1 without gaps, 0 elsewhere; int32 (*S)."""
    numbered_S = np.zeros(objects_S.shape, np.int32)
    inside_S = objects_S > 0
    numbered_S[inside_S] = np.unique(objects_S[inside_S], return_inverse=True)[1] + 1
    return numbered_S


def _colours(numbered_S: np.ndarray, sides: np.ndarray, reach: float) -> np.ndarray:
    """A colour from 0 for each object (N,), another for any two that one voxel can have within reach.

    That takes d1 + d2 <= reach, so they are no further apart than that, nor are the boxes around them.
    """
    boxes = ndimage.find_objects(numbered_S)
    low = np.array([[side.start for side in box] for box in boxes]) * sides
    high = np.array([[side.stop - 1 for side in box] for box in boxes]) * sides
    colours = np.zeros(len(boxes), np.int64)
    for n in range(1, len(boxes)):
        gaps = np.maximum(0, np.maximum(low[n] - high[:n], low[:n] - high[n]))
        # The slack is for rounding.
        taken = set(colours[:n][(gaps**2).sum(1) <= reach**2 * (1 + 1e-6)].tolist())
        colours[n] = next(colour for colour in itertools.count() if colour not in taken)
    return colours


def _sets(colours: np.ndarray) -> np.ndarray:
    """Sets of objects as rows of bool (T, 1 + N), element 0 in none; of two objects of different colours some set holds only the second.

    Every colour is in another half of the T sets, so no colour's sets are among those of another (Sperner's theorem: no
    smaller T would do): 6 sets for 20 colours, 9 for 100.
    """
    count = int(colours.max()) + 1
    total = next(t for t in itertools.count() if math.comb(t, t // 2) >= count)
    halves = itertools.islice(itertools.combinations(range(total), total // 2), count)
    member_KT = np.array([[t in half for t in range(total)] for half in halves], dtype=bool).reshape(count, total)
    return np.concatenate([np.zeros((1, total), bool), member_KT[colours]]).T


def _nearest(inside_S: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """The nearest true voxel of each voxel, as (D, *S) indices."""
    indices: np.ndarray = ndimage.distance_transform_edt(~inside_S, sampling=sides, return_distances=False, return_indices=True)
    return indices


def _distances(nearest: np.ndarray, places: tuple[np.ndarray, ...], sides: np.ndarray) -> np.ndarray:
    """How far these voxels are from their nearest; (N,) in sides of the finest voxel."""
    offsets = ((axis[places] - place) * side for axis, place, side in zip(nearest, places, sides, strict=True))
    distances: np.ndarray = np.sqrt(sum(offset**2 for offset in offsets))
    return distances
