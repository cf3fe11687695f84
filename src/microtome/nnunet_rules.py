"""nnU-Net's rules from shapes and spacings to network, patch and batch: pure functions of numbers.

F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
Nature Methods 2021, doi 10.1038/s41592-020-01008-z; F. Isensee et al., "nnU-Net Revisited", MICCAI 2024,
arXiv 2404.09556. The rules are those of the authors' code (version 2), told in our words:

    initial_patch -> pooling_plan -> feature_maps <= what a budget allows? -> smaller patch, again -> batch_size
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from microtome.errors import ConfigError
from microtome.geometry import Shape, Spacing, format_shape

FIRST_WIDTH = 32
LARGEST_WIDTH: Mapping[int, int] = MappingProxyType({2: 512, 3: 320})
# Convolutions a level of the plain network, in encoder and decoder.
CONVOLUTIONS = 2
# Residual units of the first levels of the residual encoder; each deeper level has as many as the last.
UNITS = (1, 3, 4, 6)
# No axis is pooled below this many voxels.
SHORTEST = 4
# An axis whose voxels are this many times as large as the finest is neither pooled nor convolved yet.
COARSE = 2.0
# Sides of the square and the cube that the first guess of a patch is as large as.
FIRST_SIDE: Mapping[int, int] = MappingProxyType({2: 2048, 3: 256})
SMALLEST_BATCH = 2


class Topology(NamedTuple):
    """How a patch is pooled, level by level, finest first.

    Attributes:
        strides: down-sampling into each level along S; the first all 1.
        kernels: kernel size of each level along S.
        patch_vox: the patch, padded to a multiple of the product of the strides.
    """

    strides: tuple[Shape, ...]
    kernels: tuple[Shape, ...]
    patch_vox: Shape


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a patch may cost, in values of the feature maps that `feature_maps` counts.

    Attributes:
        residual: whether it is meant for the residual encoder.
        reference: for each number of spatial axes, the feature maps that fill `memory_gb`.
        memory_gb: the memory at which the references were set.
        share: largest share of the dataset's voxels that a batch may cover.
    """

    residual: bool
    reference: Mapping[int, float]
    memory_gb: float
    share: float

    def allowed(self, dims: int, memory_gb: float | None = None) -> float:
        """Values of feature maps for this much memory; None: as much as the budget was set at."""
        return self.reference[dims] * (1.0 if memory_gb is None else memory_gb / self.memory_gb)


# Batch for which the references were set.
REFERENCE_BATCH: Mapping[int, int] = MappingProxyType({2: 12, 3: 2})
BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "plain": Budget(residual=False, reference=MappingProxyType({2: 85e6, 3: 560e6}), memory_gb=8, share=0.05),
        "resenc_m": Budget(residual=True, reference=MappingProxyType({2: 135e6, 3: 680e6}), memory_gb=8, share=1),
        "resenc_l": Budget(residual=True, reference=MappingProxyType({2: 380e6, 3: 2.1e9}), memory_gb=24, share=1),
        "resenc_xl": Budget(residual=True, reference=MappingProxyType({2: 560e6, 3: 3.6e9}), memory_gb=40, share=1),
    }
)


def level_widths(levels: int, dims: int) -> tuple[int, ...]:
    """Channels of each level: 32 doubled up to 512 in 2D, 320 in 3D."""
    return tuple(min(FIRST_WIDTH << level, LARGEST_WIDTH[dims]) for level in range(levels))


def residual_units(levels: int) -> tuple[int, ...]:
    """Residual units of each level of the encoder: 1, 3, 4, 6, 6, ..."""
    return tuple(UNITS[min(level, len(UNITS) - 1)] for level in range(levels))


def pooling_plan(patch_vox: Shape, spacing_mm: Spacing) -> Topology:
    """Which axes are halved into each level, and how large the kernels are.

    An axis is halved while it has 8 voxels or more (12 if it is the only one) and voxels less than twice
    the smallest of the axes that are long enough. Its kernel is 1 until its voxels are less than
    twice the finest, then 3 for good; the deepest level always has kernels of 3.

    A patch too short to be halved at all gives one level, which is no U.
    """
    size, spacing = list(patch_vox), list(spacing_mm)
    axes = range(len(size))
    strides: list[Shape] = [(1,) * len(size)]
    kernels: list[Shape] = []
    while halved := _halved(size, spacing):
        before = kernels[-1] if kernels else (1,) * len(size)
        kernels.append(tuple(3 if before[axis] == 3 or spacing[axis] < COARSE * min(spacing) else 1 for axis in axes))
        strides.append(tuple(2 if axis in halved else 1 for axis in axes))
        for axis in halved:
            size[axis], spacing[axis] = -(-size[axis] // 2), 2 * spacing[axis]
    kernels.append((3,) * len(size))
    padded = tuple(-(-n // step) * step for n, step in zip(patch_vox, divisors(strides), strict=True))
    return Topology(tuple(strides), tuple(kernels), padded)


def _halved(size: list[int], spacing: list[float]) -> list[int]:
    """The axes to halve next; none: the plan is complete."""
    long = [axis for axis, n in enumerate(size) if n >= 2 * SHORTEST]
    fine = [axis for axis in long if spacing[axis] < COARSE * min(spacing[other] for other in long)]
    if len(fine) == 1 and size[fine[0]] < 3 * SHORTEST:
        return []
    return fine


def divisors(strides: tuple[Shape, ...] | list[Shape]) -> Shape:
    """What the sides of a patch must be multiples of: the product of the strides along each axis."""
    return tuple(math.prod(along) for along in zip(*strides, strict=True))


def feature_maps(topology: Topology, classes: int, *, residual: bool) -> int:
    """Values that the network's layers put out for one patch: the estimate of memory that budgets are compared with.

    Counted are the outputs of all convolutions and up-convolutions, of the head of every decoder level, and of each shortcut
    of the residual encoder that is not the identity (once). For a patch of 128^3 and 3 classes: 453,694,976 of the
    plain network, 558,319,104 with the residual encoder.
    """
    levels, dims = len(topology.strides), len(topology.patch_vox)
    widths, units = level_widths(levels, dims), residual_units(levels)
    size, total = topology.patch_vox, 0
    for level, (width, stride) in enumerate(zip(widths, topology.strides, strict=True)):
        size = tuple(n // step for n, step in zip(size, stride, strict=True))
        # The one beside the units: the stem on the first level, on all others the shortcut that is pooled.
        maps = (2 * units[level] + 1) * width if residual else CONVOLUTIONS * width
        if level < levels - 1:
            maps += (1 + (1 if residual else CONVOLUTIONS)) * width + classes
        total += maps * math.prod(size)
    return total


def initial_patch(spacing_mm: Spacing, median_shape_vox: Shape) -> Shape:
    """A first guess: a cube in mm with the voxels of 256^3 (3D) or 2048^2 (2D), no larger than the median image."""
    dims = len(spacing_mm)
    side_mm = FIRST_SIDE[dims] * math.prod(spacing_mm) ** (1 / dims)
    return tuple(max(1, min(round(side_mm / step), n)) for step, n in zip(spacing_mm, median_shape_vox, strict=True))


def plan_patch(
    spacing_mm: Spacing, median_shape_vox: Shape, classes: int, budget: Budget, *, memory_gb: float | None = None
) -> tuple[Topology, int]:
    """The largest patch that a budget allows, how it is pooled, and its feature maps.

    While the estimate is too large, the axis that is largest relative to the median image loses one step that it can be
    pooled by. The plain network's estimate is scaled to the smallest batch of 2 (in 2D a patch may so reach 6 times
    the reference); the residual encoder's is compared as it is.

    Args:
        spacing_mm: voxel size along S.
        median_shape_vox: of the dataset at that voxel size.
        classes: outputs of the network.
        budget: one of `BUDGETS`.
        memory_gb: the memory there is; None: as much as the budget was set at.

    Raises:
        ConfigError: not even the smallest patch fits.
    """
    dims = len(spacing_mm)
    most = budget.allowed(dims, memory_gb) * (1 if budget.residual else REFERENCE_BATCH[dims] / SMALLEST_BATCH)
    topology = pooling_plan(initial_patch(spacing_mm, median_shape_vox), spacing_mm)
    while (estimate := feature_maps(topology, classes, residual=budget.residual)) > most:
        patch = _smaller(topology, spacing_mm, median_shape_vox)
        if not patch:
            got = f"{most:.3g}, and a patch of {format_shape(topology.patch_vox)} has {estimate:.3g}"
            raise ConfigError(
                "nnU-Net's rules", expected="memory for feature maps of a patch", got=got, do="allow more memory", code="C042"
            )
        topology = pooling_plan(patch, spacing_mm)
    return topology, estimate


def _smaller(topology: Topology, spacing_mm: Spacing, median_shape_vox: Shape) -> Shape:
    """The patch with the axis shortened that is largest relative to the median image, the last of equals; () where none can be."""
    patch, steps = topology.patch_vox, divisors(topology.strides)
    possible = [axis for axis, (n, step) in enumerate(zip(patch, steps, strict=True)) if n > step]
    if not possible:
        return ()
    longest = max(possible, key=lambda axis: (patch[axis] / median_shape_vox[axis], axis))

    def shortened(step: int) -> Shape:
        return tuple(n - step if axis == longest else n for axis, n in enumerate(patch))

    # The full step may skip sizes that are pooled less often (224 between 256 and 192), so that the step is the one of
    # the patch that it would lead to.
    return shortened(divisors(pooling_plan(shortened(steps[longest]), spacing_mm).strides)[longest])


def batch_size(patch_vox: Shape, estimate: int, budget: Budget, *, dataset_voxels: float, memory_gb: float | None = None) -> int:
    """Patches a step: what fills the budget, at most its share of the dataset's voxels, and at least 2.

    Args:
        patch_vox: the patch.
        estimate: its `feature_maps`.
        budget: one of `BUDGETS`.
        dataset_voxels: of the median image, times the number of training images.
        memory_gb: the memory there is; None: as much as the budget was set at.
    """
    dims = len(patch_vox)
    filling = round(budget.allowed(dims, memory_gb) / estimate * REFERENCE_BATCH[dims])
    covering = round(dataset_voxels * budget.share / math.prod(patch_vox))
    return max(min(filling, covering), SMALLEST_BATCH)
