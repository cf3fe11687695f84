"""Any engine, averaged over the mirrored versions of a tile; the words for what an output is averaged over. No torch."""

import itertools
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from microtome.geometry import Spacing

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


def versions(axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every choice among the axes, the empty one first."""
    return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]


def passes(tta: TTA, mirror_axes: tuple[int, ...]) -> int:
    """How often a network sees one tile."""
    if tta == "rotations":
        return ROTATIONS
    return len(versions(mirror_axes)) if tta == "mirror" else 1
