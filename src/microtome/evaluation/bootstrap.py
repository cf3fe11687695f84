"""How sure a mean over cases is: the bootstrap."""

import math

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95
SEED = 0


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of one number a case and the 95 % percentile bootstrap interval around it.

    Cases are drawn with replacement 2000 times with a fixed seed, so the same numbers give the same interval. Few
    cases give too narrow an interval: in a simulation with five it held the true mean in 83 % of the trials, with ten in 89 %.

    Args:
        values: (cases,), NaN where undefined; undefined cases are left out.

    Returns:
        mean, low, high; NaN where fewer than one (mean) or two (interval) cases are defined.

    References:
        Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    defined = values[np.isfinite(values)]
    if defined.size < 2:
        return (float(defined[0]) if defined.size else math.nan), math.nan, math.nan
    drawn = np.random.default_rng(SEED).integers(0, defined.size, size=(RESAMPLES, defined.size), dtype=np.int32)
    outside = (1 - COVERAGE) / 2
    low, high = np.quantile(defined[drawn].mean(axis=1), [outside, 1 - outside])
    return float(defined.mean()), float(low), float(high)
