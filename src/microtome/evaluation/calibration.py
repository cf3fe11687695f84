"""Whether a network is as sure as it should be: ECE, Brier, NLL, reliability, and the temperature that mends most of it.

K classes, N voxels whose class is known. What is measured are probabilities: how often a class is right of which so much was said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

BINS = 15
# Below, a few voxels without an error would make a network sure of everything; above, what it says hardly depends on it any more.
TEMPERATURES = (0.25, 64.0)
# Of the temperature's logarithm: a tenth of a per cent.
PRECISION = 1e-3
# Voxels for which arrays (K, n) of float64 are made at a time.
MOST_AT_ONCE = 1 << 14


class Bin(NamedTuple):
    """The voxels of which a network is about equally sure.

    Attributes:
        confidence: mean probability of the class that it chose; None where there are no voxels.
        accuracy: share of them whose class is right; None where there are no voxels.
        share: of all voxels.
    """

    confidence: float | None
    accuracy: float | None
    share: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a network said of some voxels of one case whose class is known.

    Attributes:
        group: cases of one group (a patient) are not spread over fitting and scoring.
        logits_KN: float32.
        truth_N: their classes, 0 to K - 1.
    """

    group: str
    logits_KN: np.ndarray  # noqa: N815 - the suffix names the axes
    truth_N: np.ndarray  # noqa: N815


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good probabilities are; lower is better.

    Attributes:
        ece: see `expected_calibration_error`.
        brier: mean over voxels of the sum over classes of (p - 1 for the true class, p else) squared: 0 to 2 (Brier 1950, multi-class).
        nll: mean of -log p of the true class, in nats: 0 or more.
        bins: see `reliability`.
    """

    ece: float
    brier: float
    nll: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature, and what it is worth.

    Attributes:
        temperature: that logits are to be divided by.
        before: scores at temperature 1.
        after: scores of voxels by a temperature that was fitted without them, where `words` do not say otherwise.
        voxels: how many were looked at.
        words: how fitting and scoring were kept apart.
    """

    temperature: float
    before: Scores
    after: Scores
    voxels: int
    words: str

    def to_json(self) -> dict[str, Any]:
        """What stands under `calibration` in metrics.json."""
        before, after = self.before, self.after
        scores = {
            "ece_before": before.ece,
            "ece": after.ece,
            "brier_before": before.brier,
            "brier": after.brier,
            "nll_before": before.nll,
            "nll": after.nll,
        }
        return {"temperature": self.temperature, **scores, "voxels": self.voxels, "bins": [part._asdict() for part in after.bins]}


def calibrate(parts: Sequence[Evidence]) -> Calibration | None:
    """The temperature of all evidence, and its scores: fitted on half of the groups and scored on the other, and the reverse.

    Where that made the other half worse (by NLL), there is too little to learn from, and 1 is kept.

    Args:
        parts: of each case, in an order that stands for nothing.

    Returns:
        None without any voxel. What is not finite is left out.
    """
    parts = [part for part in map(_finite, parts) if part.truth_N.size]
    if not parts:
        return None
    halves = _halves(parts)
    pooled = _joined(parts)
    temperature, before = fit_temperature(*pooled), score(*pooled)
    if len(halves) == 1:
        same = "the same case" if len(parts) == 1 else "the same cases, which are of one group"
        words = f"one temperature, fitted and scored on {same}: somewhat too good"
        after = score(_divided(pooled[0], temperature), pooled[1])
    else:
        words = "one temperature, fitted on half of the cases and scored on the other half, and the reverse, and at last on all of them"
        after = _scored_crosswise(halves)
        if after.nll >= before.nll:
            words = "temperature 1: one fitted on half of the cases made the other half no better"
            temperature, after = 1.0, before
    return Calibration(temperature=temperature, before=before, after=after, voxels=pooled[1].size, words=words)


def fit_temperature(logits_KN: np.ndarray, truth_N: np.ndarray) -> float:
    """The temperature of the least NLL, within `TEMPERATURES`, to four digits; 1 without voxels.

    The NLL is convex in 1/T, so that over log T there is one minimum, which Brent's bounded search cannot miss.

    References:
        Guo et al. 2017, On calibration of modern neural networks (arXiv 1706.04599), section 4.2.
    """
    if not truth_N.size:
        return 1.0

    def loss(log_temperature: float) -> float:
        return _nll(logits_KN, truth_N, math.exp(log_temperature))

    low, high = map(math.log, TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": PRECISION})
    # At an end it stops short of it.
    best = min((float(found.x), low, high), key=loss)
    return float(f"{math.exp(best):.4g}")


def score(logits_KN: np.ndarray, truth_N: np.ndarray) -> Scores:
    """ECE, Brier, NLL and reliability of the softmax of some logits; there must be a voxel."""
    if not truth_N.size:
        raise ValueError(f"voxels with a known class were expected, got {truth_N.size}")
    confidence_N, right_N = np.empty(truth_N.size), np.empty(truth_N.size, bool)
    brier = nll = 0.0
    for part in _spans(truth_N.size):
        # In one order of memory whatever the array came in: sums then agree to the last bit.
        logits, truth = logits_KN[:, part].astype(np.float64, order="C"), truth_N[part]
        logits -= logits.max(axis=0)
        log_total = np.log(np.exp(logits).sum(axis=0))
        places = (truth, np.arange(truth.size))
        nll += float((log_total - logits[places]).sum())
        chances = np.exp(logits - log_total)
        confidence_N[part], right_N[part] = chances.max(axis=0), chances.argmax(axis=0) == truth
        chances[places] -= 1
        brier += float((chances**2).sum())
    bins = reliability(confidence_N, right_N)
    return Scores(ece=expected_calibration_error(bins), brier=brier / truth_N.size, nll=nll / truth_N.size, bins=bins)


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """Confidence and accuracy in bins of equal width: bin m of M holds the voxels with m/M < confidence <= (m + 1)/M.

    Args:
        confidence_N: probability of the class that was chosen, the largest; 0 to 1.
        right_N: whether it is the true class.
        bins: how many.

    References:
        Guo et al. 2017 (arXiv 1706.04599), section 2; their 15 bins.
    """
    number = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(number, minlength=bins)
    sure = np.bincount(number, confidence_N, minlength=bins)
    right = np.bincount(number, right_N, minlength=bins)
    return tuple(
        Bin(float(s / n), float(r / n), float(n / number.size)) if n else Bin(None, None, 0.0)
        for s, r, n in zip(sure, right, counts, strict=True)
    )


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """ECE: |accuracy - confidence| of each bin, weighted by its share of the voxels; 0 good to 1, 0 where all bins are empty.

    It looks at the chosen class alone, and depends on the bins.

    References:
        Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning (AAAI); Guo et al. 2017, equation 3.
    """
    filled = [(part.accuracy, part.confidence, part.share) for part in bins if part.accuracy is not None and part.confidence is not None]
    return sum(abs(accuracy - confidence) * share for accuracy, confidence, share in filled)


def _scored_crosswise(halves: Sequence[Sequence[Evidence]]) -> Scores:
    """Scores of both halves, the logits of each divided by the temperature of the other."""
    joined = [_joined(half) for half in halves]
    divided = [_divided(joined[here][0], fit_temperature(*joined[1 - here])) for here in (0, 1)]
    return score(np.concatenate(divided, axis=1), np.concatenate([truth_N for _, truth_N in joined]))


def _halves(parts: Sequence[Evidence]) -> list[list[Evidence]]:
    """The evidence in two halves of about as many voxels, no group in both; in one where there is one group."""
    groups: dict[str, list[Evidence]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part)
    if len(groups) == 1:
        return [list(parts)]
    halves: list[list[Evidence]] = [[], []]
    sizes = [0, 0]
    # The largest first, or the last could tip the scales.
    for members in sorted(groups.values(), key=lambda members: -sum(part.truth_N.size for part in members)):
        smaller = int(sizes[1] < sizes[0])
        halves[smaller] += members
        sizes[smaller] += sum(part.truth_N.size for part in members)
    return halves


def _finite(part: Evidence) -> Evidence:
    """The voxels whose logits are all numbers."""
    kept = np.isfinite(part.logits_KN).all(axis=0)
    return part if kept.all() else Evidence(group=part.group, logits_KN=part.logits_KN[:, kept], truth_N=part.truth_N[kept])


def _joined(parts: Sequence[Evidence]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K, N) and classes (N,) of all of them."""
    return np.concatenate([part.logits_KN for part in parts], axis=1), np.concatenate([part.truth_N for part in parts])


def _divided(logits_KN: np.ndarray, temperature: float) -> np.ndarray:
    """Logits over a temperature."""
    result: np.ndarray = logits_KN / np.float32(temperature)
    return result


def _nll(logits_KN: np.ndarray, truth_N: np.ndarray, temperature: float) -> float:
    """Mean of -log p of the true class at a temperature; float32 terms, summed in float64."""
    total = 0.0
    for part in _spans(truth_N.size):
        logits, truth = logits_KN[:, part], truth_N[part]
        scaled = (logits - logits.max(axis=0)) * np.float32(1 / temperature)
        terms = np.log(np.exp(scaled).sum(axis=0)) - scaled[truth, np.arange(truth.size)]
        total += float(terms.sum(dtype=np.float64))
    return total / truth_N.size


def _spans(count: int) -> list[slice]:
    """`count` voxels, some at a time."""
    return [slice(first, first + MOST_AT_ONCE) for first in range(0, count, MOST_AT_ONCE)]
