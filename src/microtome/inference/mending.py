"""Labels as a network left them -> labels as asked for, and numbers of objects; arrays in memory or in stores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from microtome.geometry import Shape, Spacing
from microtome.inference.asked import Options, least_voxels
from microtome.inference.cleanup import clean
from microtome.inference.instances import Splitting, instances_of_labels, segment_instances
from microtome.inference.objects import Readable, Writable

# The least byte that means a probability of a half or more.
HALF = np.uint8(128)


@dataclass(frozen=True, kw_only=True)
class Mending:
    """Labels as a network left them -> labels as asked for, and numbers of objects; arrays in memory or in stores.

    Attributes:
        options: what is asked for.
        background: value of what is no object.
        classes: values of the other classes.
        spacing_mm: voxel size, for sizes in mm.
        block_vox: what is worked on at once.
        scratch: makes an array of a shape and type for what lies between two passes.
    """

    options: Options
    background: int
    classes: tuple[int, ...]
    spacing_mm: Spacing
    block_vox: Shape
    scratch: Callable[[Shape, np.dtype[Any]], Writable] = np.empty

    def labels(self, found: Readable, out: Writable) -> None:
        """Mend labels (*S) into `out`, which may be the same."""
        clean(
            found,
            out,
            self.options.clean,
            classes=self.classes,
            background=self.background,
            spacing_mm=self.spacing_mm,
            block_vox=self.block_vox,
            scratch=self.scratch,
        )

    def instances(self, labels: Readable, foreground: Readable | None, out: Writable) -> None:
        """Number the objects of mended labels (*S) in `out`.

        Objects of one class are parted where they touch, by the probability of being one; of several classes, of which no such
        probability is known, each connected piece is an object.
        """
        if foreground is not None:
            assert len(self.classes) == 1, "the probability of which of them"
            inside = _Inside(foreground, labels, self.classes[0])
            # What was large enough may have been several objects.
            rules = Splitting(min_size_vox=least_voxels(self.options.clean, self.spacing_mm))
            segment_instances(inside, out, rules, block_vox=self.block_vox, spacing_mm=self.spacing_mm)
        else:
            instances_of_labels(labels, out, background=self.background, block_vox=self.block_vox)


@dataclass(frozen=True)
class _Inside:
    """The probability of being an object, below a half where the labels have none: what was mended away stays away, holes are filled."""

    foreground: Readable
    labels: Readable
    value: int

    @property
    def shape(self) -> Shape:
        """(*S)."""
        return self.foreground.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return self.foreground.dtype

    def __getitem__(self, part: Any, /) -> np.ndarray:
        chances = self.foreground[part]
        kept: np.ndarray = np.where(self.labels[part] == self.value, np.maximum(chances, HALF), np.minimum(chances, HALF - np.uint8(1)))
        return kept
