"""Whether an engine says what the float32 network says: on the bundle's golden input, before it may label anything."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from microtome.inference.predict import best_class


@dataclass(frozen=True)
class Bound:
    """What an engine must keep to.

    Attributes:
        labels: least share of equal labels.
        probability: largest difference of a class's probability, but for one voxel in a thousand.
    """

    labels: float
    probability: float


# One voxel of so many may be further off: it may turn over in any other arithmetic, and its label is counted.
ONE_VOXEL_OF = 1000
# Whose probabilities are compared at a time.
VOXELS = 1 << 14
# By the arithmetic (docs/decisions/0013). Ties are not left out: where two classes are alike to the last bit, a changed label
# counts as any other.
BOUNDS = MappingProxyType({"fp32": Bound(0.999, 1e-3), "bf16": Bound(0.999, 0.05), "int8": Bound(0.998, 0.2)})


@dataclass(frozen=True)
class Agreement:
    """How near an engine came to the float32 network of torch.

    Attributes:
        labels: share of voxels with the same label.
        probability: largest difference of a class's probability (softmax), but for one voxel in a thousand.
    """

    labels: float
    probability: float

    def holds(self, precision: str) -> bool:
        """Whether that is near enough for this arithmetic; values that are no numbers never are."""
        bound = BOUNDS[precision]
        return self.labels >= bound.labels and self.probability <= bound.probability

    def __str__(self) -> str:
        return f"labels as torch {_share(self.labels)}"

    def fault(self, precision: str) -> str:
        """The number that is too far off, in two words."""
        if self.labels < BOUNDS[precision].labels:
            return f"{_share(self.labels)} equal labels"
        return f"probabilities off by {self.probability:.2g}"

    def failure(self, precision: str) -> str:
        """The numbers of which one is too far off, and what they had to be."""
        bound = BOUNDS[precision]
        needed = f"needed: {_share(bound.labels)} and {bound.probability:g}"
        return f"{_share(self.labels)} equal labels, probabilities off by up to {self.probability:.2g} ({needed})"


def agreement(logits_KS: np.ndarray, oracle_KS: np.ndarray) -> Agreement:
    """Compare an engine's logits with the oracle's, both (K, *S); another shape, or values that are no numbers, agree nowhere."""
    if logits_KS.shape != oracle_KS.shape or not (np.isfinite(logits_KS).all() and np.isfinite(oracle_KS).all()):
        return Agreement(0.0, 1.0)
    labels = float((best_class(logits_KS) == best_class(oracle_KS)).mean())
    ours_KN, theirs_KN = (logits.reshape(len(logits), -1) for logits in (logits_KS, oracle_KS))
    differences = np.empty(ours_KN.shape[1], np.float32)
    # Some voxels at a time: probabilities of all classes of a whole patch would be most of what a prediction takes.
    for first in range(0, differences.size, VOXELS):
        part = slice(first, first + VOXELS)
        np.abs(_softmax(ours_KN[:, part]) - _softmax(theirs_KN[:, part])).max(axis=0, out=differences[part])
    place = differences.size - 1 - differences.size // ONE_VOXEL_OF
    return Agreement(labels, float(np.partition(differences, place)[place]))


def _softmax(logits_KN: np.ndarray) -> np.ndarray:
    """Probabilities (K, N)."""
    powers = np.exp(logits_KN - logits_KN.max(axis=0))
    probabilities: np.ndarray = powers / powers.sum(axis=0)
    return probabilities


def _share(value: float) -> str:
    """`99.99 %`, cut and never rounded up: 99.999 % is not all."""
    return f"{int(value * 10_000 + 1e-6) / 100:g} %"
