"""Logits -> probabilities, and how unsure they are: entropy, and the disagreement of several passes. NumPy alone.

K classes, S spatial axes. Everything is computed a piece at a time, so that what lies between stays in the processor's cache.
"""

import math
from collections.abc import Iterator

import numpy as np

from microtome.preprocess import CHUNK_VALUES

# Of one class, or of a map: a few such arrays fit into a core's own cache.
PIECE_VALUES = CHUNK_VALUES // 16
# Its logarithm is finite, so that 0 log 0 comes out as 0.
TINY = np.float32(np.finfo(np.float32).tiny)


def probabilities(logits_KS: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax of the logits over a temperature: float32 (K, *S), 0 to 1, their sum over K 1 within rounding.

    Args:
        logits_KS: of any real type; S has one axis at least.
        temperature: above 1 makes them less sure, below 1 surer; 1 leaves them as the network means them.

    Raises:
        ValueError: a temperature that is not a number above 0.

    References:
        Guo et al. 2017, On calibration of modern neural networks (arXiv 1706.04599), section 4.2.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"a temperature above 0 was expected, got {temperature}")
    result = np.empty(logits_KS.shape, np.float32)
    factor = np.float32(1 / temperature)
    for piece in _pieces(logits_KS.shape[1:]):
        logits, out = logits_KS[(slice(None), *piece)], result[(slice(None), *piece)]
        # The largest becomes 0: no exponential is above 1, and one of them is.
        np.subtract(logits, logits.max(axis=0), out=out, dtype=np.float32, casting="same_kind")
        if temperature != 1:
            out *= factor
        np.exp(out, out=out)
        out *= np.reciprocal(out.sum(axis=0))
    return result


def entropy(probabilities_KS: np.ndarray) -> np.ndarray:
    """How unsure: Shannon's entropy over K as a share of its largest value log K: float32 (*S), 0 certain to 1 all classes alike.

    A class of probability 0 adds nothing; a single class is certain.
    """
    classes, *shape = probabilities_KS.shape
    result = np.zeros(tuple(shape), np.float32)
    if classes == 1:
        return result
    for piece in _pieces(tuple(shape)):
        total = result[piece]
        products = np.empty(total.shape, np.float32)
        for layer_S in probabilities_KS[(slice(None), *piece)]:
            np.log(np.maximum(layer_S, TINY, out=products), out=products)
            products *= layer_S
            total -= products
        total *= np.float32(1 / math.log(classes))
        # Rounding can end a hair outside.
        np.clip(total, 0, 1, out=total)
    return result


def disagreement(mean_KS: np.ndarray, mean_entropy_S: np.ndarray) -> np.ndarray:
    """How far several passes differ: H(mean) - mean H, float32 (*S), 0 they say the same, to 1.

    With the arithmetic mean of the passes' probabilities this is the mutual information between class and pass (BALD): that part of
    the entropy which is not in each pass already. A slab holds the mean of their logits; of its softmax, their normalised geometric
    mean, the difference is smaller, and where it would be negative it is 0: it points at the same voxels and is no estimate in bits.

    Args:
        mean_KS: probabilities of the mean over passes.
        mean_entropy_S: mean over passes of each one's `entropy`, as an engine `with_spread` gives it.

    References:
        Houlsby et al. 2011 (arXiv 1112.5745); Smith and Gal 2018, Understanding measures of uncertainty (arXiv 1803.08533), section 2.
    """
    result = entropy(mean_KS)
    for piece in _pieces(result.shape):
        part = result[piece]
        part -= mean_entropy_S[piece]
        np.clip(part, 0, 1, out=part)
    return result


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as uint8, rounded to the nearest of 256 steps: 0 is 0, 1 is 255, the error is at most 1/510."""
    result = np.empty(values.shape, np.uint8)
    for piece in _pieces(values.shape):
        steps = np.multiply(values[piece], 255, dtype=np.float32, casting="same_kind")
        np.clip(np.rint(steps, out=steps), 0, 255, out=steps)
        result[piece] = steps
    return result


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array of about `PIECE_VALUES` values, none of which is split along an inner axis for nothing."""
    inner = math.prod(shape[1:])
    if inner > PIECE_VALUES and len(shape) > 1:
        for row in range(shape[0]):
            for rest in _pieces(shape[1:]):
                yield (slice(row, row + 1), *rest)
        return
    few = max(1, PIECE_VALUES // max(1, inner))
    for first in range(0, shape[0], few):
        yield (slice(first, first + few),)
