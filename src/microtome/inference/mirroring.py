"""Any engine, averaged over the mirrored versions of a tile, and how unsure each was; the words for what is averaged. No torch."""

import itertools
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from microtome.geometry import Spacing
from microtome.inference.uncertainty import entropy, probabilities

TTA = Literal["none", "mirror", "rotations"]
# U-Net's result on the EM data is the mean over 7 rotated versions (Ronneberger 2015, section 4). Which 7 is not said; even
# steps of the full turn are ours.
ROTATIONS = 7


class Engine(Protocol):
    """A trained network in the hands of one library: a tile (C, *S) float32 -> its logits (K, *S') float32."""

    @property
    def name(self) -> str:
        """What `--engine` calls it."""

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S') of one tile; S' is S less the network's border on both sides."""

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> "Engine":
        """The same engine whose output is the mean over versions of the tile; `TorchEngine` has the words."""


@dataclass(frozen=True)
class Mirrored:
    """The mean of an engine's logits over all mirrored versions along some axes of S: 2^len(axes) passes.

    Attributes:
        engine: that is asked.
        axes: of S, as in `AugmentConfig.flip_axes`.
    """

    engine: Engine
    axes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The engine's."""
        return self.engine.name

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Mean logits (K, *S') of one tile."""
        total_KS = self.engine(image_CS).copy()
        for flips in versions(self.axes)[1:]:
            along = tuple(axis + 1 for axis in flips)
            # A copy, as libraries read memory forward.
            total_KS += np.flip(self.engine(np.ascontiguousarray(np.flip(image_CS, along))), along)
        return total_KS / np.float32(2 ** len(self.axes))

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> Engine:
        """The engine below, averaged otherwise."""
        return self.engine.averaged(tta, mirror_axes, spacing_mm)


@runtime_checkable
class Spreads(Protocol):
    """An engine that adds the layer of `with_spread` itself."""

    def with_spread(self) -> Engine:
        """The same engine with that layer."""


@dataclass(frozen=True)
class Spread:
    """An engine whose output has a last layer more: the entropy of its answer.

    Everything linear that comes after, the mean over passes and the blending of tiles, treats it as it treats a logit.

    Attributes:
        engine: that is asked, one pass at a time.
    """

    engine: Engine

    @property
    def name(self) -> str:
        """The engine's."""
        return self.engine.name

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits and entropy (K + 1, *S') of one tile."""
        logits_KS = self.engine(image_CS)
        return np.concatenate([logits_KS, entropy(probabilities(logits_KS))[None]])

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> Engine:
        """The engine below, averaged, with that layer."""
        return with_spread(self.engine.averaged(tta, mirror_axes, spacing_mm))


def with_spread(engine: Engine) -> Engine:
    """The same engine with a further layer: (K + 1, *S'), mean logits, and last the mean over passes of each pass's `entropy`.

    The logits are those that the engine gives without it, bit for bit. With `uncertainty.disagreement` the layer tells how far the
    passes differ; of a single pass it is that pass's entropy.
    """
    if isinstance(engine, Spreads):
        return engine.with_spread()
    return replace(engine, engine=with_spread(engine.engine)) if isinstance(engine, Mirrored) else Spread(engine)


def versions(axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every choice among the axes, the empty one first."""
    return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]


def passes(tta: TTA, mirror_axes: tuple[int, ...]) -> int:
    """How often a network sees one tile."""
    if tta == "rotations":
        return ROTATIONS
    return len(versions(mirror_axes)) if tta == "mirror" else 1
