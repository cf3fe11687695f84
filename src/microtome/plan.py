"""What the data are + what the machine can do + the minutes there are -> Plan; each choice carries its reason.

Every rule is a small function from measured facts to (value, reason). `training.rehearsal.make_plan` then times real
steps of the drafted plan and fits `steps` and `batch` to the minutes.
"""

from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np

from microtome.appearance import choose_augment, choose_normalisation
from microtome.config import NetworkConfig, OptimiserConfig, Plan
from microtome.fingerprint import Fingerprint
from microtome.geometry import Shape, Spacing, format_shape, resampled_shape
from microtome.models.registry import find
from microtome.step_memory import FULL_SHARE, SMALLEST_BATCH, Resources, fit_patch, patch_bytes, save_memory

T = TypeVar("T")
Dims = Literal[2, 3]
Precision = Literal["fp32", "bf16"]

# Voxels of a batch: below it, convolutions do not fill two cores and batch statistics become unsteady.
BATCH_VOXELS = MappingProxyType({2: 8 * 256**2, 3: 4 * 56**3})
# Sections further apart than this many pixels show other things than their neighbours.
THICK_SECTIONS = 4.0
# A class thinner than this many voxels is lost between them.
THINNEST_VOX = 6.0
# Coarser than this, what fills a class (nuclei, texture) is gone, however thick the class is.
COARSEST = 4.0
# A patch of a smaller share of a volume does not show where in the body it lies.
SMALLEST_SHARE = 0.02
FIXED_REASONS = MappingProxyType(
    {
        "foreground": "half of the patches lie on a class drawn evenly, so that rare classes are seen",
        "loss": "cross-entropy alone neglects small classes, Dice alone is noisy; both ignore what is not annotated",
        "overlap": "tiles overlap by a quarter and are blended by Gaussian weights: more costs time and gains little",
        "assumed_spacing_mm": "the median of the training images",
        "validations": "a look at whole images now and then; the best is kept",
    }
)


def draft_plan(
    data: Fingerprint,
    resources: Resources,
    *,
    network: str = "modern_unet",
    dims: tuple[int, ...] = (2, 3),
    seed: int = 0,
    fold: str = "1/5",
) -> Plan:
    """A whole plan but for its timing: `steps` is a guess until real steps have been timed; `dims` may limit the network's."""
    reasons = dict(FIXED_REASONS)

    def noted(field: str, choice: tuple[T, str]) -> T:
        value, reasons[field] = choice
        return value

    possible = tuple(n for n in find(network).dims if n in dims)
    axes = noted("dims", choose_dims(data, possible or dims))
    precision = noted("precision", choose_precision(resources))
    spacing = noted("spacing_mm", choose_spacing(data, axes, _largest_patch(resources, axes)))
    shape = resampled_shape(data.shape_vox, data.spacing_mm, spacing)[-axes:]
    patch = noted("patch_vox", choose_patch(shape, spacing[-axes:], resources))
    topology = noted("network", choose_network(network, patch, spacing[-axes:], resources))
    patch = noted("patch_vox", fit_patch(patch, topology, data, resources, precision=precision, reason=reasons["patch_vox"]))
    plan = Plan(
        dims=axes,
        channels=data.channels,
        classes=data.classes,
        spacing_mm=spacing,
        stated_spacing_mm=noted("stated_spacing_mm", choose_stated(data)),
        assumed_spacing_mm=data.spacing_mm,
        normalisation=noted("normalisation", choose_normalisation(data)),
        interpolation=noted("interpolation", choose_interpolation(data, spacing)),
        network=topology,
        patch_vox=patch,
        optimiser=noted("optimiser", choose_optimiser(topology)),
        batch=noted("batch", choose_batch(patch, topology, resources, precision, len(data.classes))),
        augment=noted("augment", choose_augment(data, patch, spacing[-axes:])),
        steps=1000,
        minutes=resources.minutes,
        precision=precision,
        overlap=0.25,
        seed=seed,
        fold=fold,
        reasons=reasons,
    )
    return save_memory(plan, resources)


def choose_dims(data: Fingerprint, possible: tuple[int, ...] = (2, 3)) -> tuple[Dims, str]:
    """2D for pictures and for stacks of thick sections, 3D for volumes; a network of only one kind decides for volumes."""
    if len(data.shape_vox) == 2:
        return 2, "the images are two-dimensional"
    if 3 not in possible:
        return 2, "the network is two-dimensional: each section is seen as a picture"
    if 2 not in possible:
        return 3, "the network is three-dimensional"
    if data.shape_vox[0] < 8:
        return 2, f"the stacks have only {data.shape_vox[0]} sections: each is seen as a picture"
    if data.spacing_known:
        # Only the axis that is cut into sections counts: a network in 3D pools any other coarse axis later.
        ratio, how = data.spacing_mm[0] / max(data.spacing_mm[1:]), "by the spacing in the files"
    else:
        ratio, how = data.section_lag or 1.0, "judged by how unlike neighbouring sections are, as no spacing is stated"
    if ratio > THICK_SECTIONS:
        return 2, f"sections lie {ratio:.0f} times as far apart as pixels ({how}): each is seen as a picture"
    return 3, f"volumes whose sections lie about as close as pixels (ratio {ratio:.1f}, {how})"


def choose_precision(resources: Resources) -> tuple[Precision, str]:
    """bf16 where the processor has it; timing may still take it back."""
    if resources.bf16:
        return "bf16", "the processor multiplies bfloat16 in hardware"
    return "fp32", "the processor has no bfloat16 arithmetic"


def choose_spacing(data: Fingerprint, dims: int, patch: int) -> tuple[Spacing, str]:
    """The voxel size at which the network works.

    The median of the dataset; along an axis more than 3 times as coarse as the others its 10th percentile (Isensee 2021).
    Images much larger than a patch are seen at a coarser scale, at most COARSEST times, as long as the thinnest class stays
    THINNEST_VOX wide.
    """
    spacing, words = _own_spacing(data, dims)
    if not np.isfinite(data.thinnest_vox):
        return spacing, f"{words}; how thin the classes are cannot be told, as none touches another"
    if dims == 3:
        share = patch**3 / np.prod(data.shape_vox)
        larger, what = float((SMALLEST_SHARE / share) ** (1 / 3)), f"a patch then shows {SMALLEST_SHARE:.0%} of a volume or more"
    else:
        side = max(data.shape_vox[-2:])
        larger, what = side / patch, f"a patch of {patch} then shows more of an image of {side}"
    factor = round(min(larger, data.thinnest_vox / THINNEST_VOX, COARSEST), 2)
    if factor < 1.5:
        return spacing, words
    finest = min(spacing[-dims:]) * factor
    coarse = (*spacing[:-dims], *(float(f"{max(value, finest):.6g}") for value in spacing[-dims:]))
    return coarse, (
        f"voxels {factor:g} times as large as in the images: {what}, and the thinnest class ({data.thinnest_vox:.0f} pixels) "
        f"keeps {data.thinnest_vox / factor:.0f}; results come at full size"
    )


def _own_spacing(data: Fingerprint, dims: int) -> tuple[Spacing, str]:
    """The voxel size of the images themselves."""
    spacing = list(data.spacing_mm)
    axis = int(np.argmax(spacing))
    others = [value for i, value in enumerate(spacing) if i != axis]
    if dims == 3 and spacing[axis] > 3 * max(others):
        spacing[axis] = max(data.spacing_low_mm[axis], max(others))
        return tuple(spacing), "median voxel size; along the coarse axis its 10th percentile"
    return tuple(spacing), "median voxel size of the images" + ("; others are resampled to it" if data.spacing_varies else "")


def choose_interpolation(data: Fingerprint, spacing_mm: Spacing) -> tuple[Literal["cubic"], str]:
    """Cubic for images; which images it will touch."""
    if spacing_mm == data.spacing_mm and not data.spacing_varies:
        return "cubic", "the images have one voxel size; one of another is brought to it by B-splines, which blur less than lines"
    return "cubic", "B-splines keep fine detail that linear interpolation blurs; labels and logits stay linear"


def choose_patch(shape_vox: Shape, spacing_mm: Spacing, resources: Resources) -> tuple[Shape, str]:
    """What the network sees at once: the whole image if it is small, else a block of the largest affordable volume."""
    dims = len(shape_vox)
    limit = _largest_patch(resources, dims) ** dims
    patch, spacing = np.array(shape_vox, float), np.array(spacing_mm)
    # Shrink the axis that is longest in mm, as a cube of tissue tells more than a rod of the same volume.
    # The tolerance is for rounding: a root taken to the power again may lie just above the limit for ever.
    while patch.prod() > limit * (1 + 1e-9):
        sides = patch * spacing
        longest = sides >= sides.max() * (1 - 1e-9)
        rest = sides[~longest]
        wanted = (limit * spacing.prod() / rest.prod()) ** (1 / longest.sum())
        patch[longest] = (max(wanted, rest.max()) if len(rest) else wanted) / spacing[longest]
    whole = tuple(max(1, int(np.ceil(n - 1e-6))) for n in patch)
    covers = all(n >= size for n, size in zip(whole, shape_vox, strict=True))
    return whole, "covers the median image" if covers else f"a part of the median image of {format_shape(shape_vox)}"


def choose_network(name: str, patch_vox: Shape, spacing_mm: Spacing, resources: Resources) -> tuple[NetworkConfig, str]:
    """Levels until the patch is a few voxels, widths doubling; axes that are coarse are pooled later (Isensee 2021)."""
    if name != "modern_unet":
        return NetworkConfig(name=name), "as asked; sizes as in its paper"
    dims = len(patch_vox)
    strides, kernels = _levels(patch_vox, spacing_mm, smallest=4 if dims == 3 else 8, most=6 if dims == 3 else 7)
    base, cap = (32, 320 if dims == 3 else 512) if resources.gpu else (24, 320)
    widths = tuple(min(base * 2**level, cap) for level in range(len(strides)))
    supervised = max(1, min(3, len(strides) - 1))
    config = NetworkConfig(name=name, widths=widths, strides=strides, kernels=kernels, norm="batch", supervised_levels=supervised)
    return config, (
        f"{len(strides)} levels bring a patch of {format_shape(patch_vox)} down to "
        f"{format_shape(_coarsest(patch_vox, strides))}; {base} channels to begin with suit {'a GPU' if resources.gpu else 'a processor'}; "
        f"batch norm is the fastest normalisation, and batches are large enough for it; supervised decoder levels: {supervised}"
    )


def choose_stated(data: Fingerprint) -> tuple[Spacing, str]:
    """Whether files are asked for their voxel size at all."""
    if data.stated_spacing_mm:
        return data.stated_spacing_mm, "as microtome.yaml says"
    if not data.spacing_known:
        return data.spacing_mm, "no training image states its size, so that of other images would mean something else: pixels are pixels"
    return (), "each file's own"


def choose_optimiser(network: NetworkConfig) -> tuple[OptimiserConfig, str]:
    """A high rate for the normalised default; a careful one for the papers' networks, some of which have no normalisation."""
    if network.widths:
        return OptimiserConfig(), "AdamW with a high rate that falls to zero learns fastest in short runs; averaged over the last steps"
    return OptimiserConfig(learning_rate=3e-4), "AdamW with a low rate: networks without normalisation diverge at a high one"


def choose_batch(patch_vox: Shape, network: NetworkConfig, resources: Resources, precision: str, classes: int) -> tuple[int, str]:
    """Enough patches to fill two cores, as far as memory allows, but no fewer than steady statistics need: see `save_memory`."""
    voxels = int(np.prod(patch_vox))
    wanted = int(np.clip(BATCH_VOXELS[len(patch_vox)] // voxels, SMALLEST_BATCH, 16))
    bytes_each = patch_bytes(patch_vox, network, precision, classes)
    room, free = FULL_SHARE * resources.memory_bytes, resources.memory_bytes / 2**30
    most = int(room / bytes_each)
    if most >= wanted:
        return wanted, f"enough patches for steady statistics; about {wanted * bytes_each / 2**30:.1f} GB"
    if most >= SMALLEST_BATCH:
        return most, f"what fits into {free:.1f} GB at about {bytes_each / 2**20:.0f} MB a patch"
    least = patch_bytes(patch_vox, network, precision, classes, checkpointing=True)
    if least > room:
        return 1, f"one patch takes about {least / 2**30:.1f} GB of the {free:.1f} GB there are: make patch_vox smaller if memory runs out"
    return SMALLEST_BATCH, f"fewer make unsteady statistics, though only {most} fit into {free:.1f} GB at once"


def _largest_patch(resources: Resources, dims: int) -> int:
    """Side of the largest patch: small where minutes and cores are few, so that many steps can be made."""
    if resources.gpu:
        return 512 if dims == 2 else 128
    minutes = np.inf if resources.minutes is None else resources.minutes
    steps = (128, 256, 384) if dims == 2 else (40, 56, 80)
    return steps[int(minutes >= 3) + int(minutes >= 60)]


def _levels(patch_vox: Shape, spacing_mm: Spacing, smallest: int, most: int) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Strides into and kernels of each level.

    An axis is halved while its voxels are less than twice the finest and at least `smallest` would be left; its kernel
    is 1 until its voxels are within a factor 2 of the finest.
    """
    size, spacing = np.array(patch_vox, float), np.array(spacing_mm, float)
    strides: list[Shape] = [(1,) * len(patch_vox)]
    kernels: list[Shape] = [_kernel(spacing)]
    while len(strides) < most:
        large = size / 2 >= smallest
        if len(strides) == 1 and not large.any():
            # A U has two levels at least, however small the images; the patch is then larger than they are.
            large[:] = True
        halved = large & (spacing < 2 * spacing[large].min()) if large.any() else large
        if not halved.any():
            break
        size, spacing = np.where(halved, np.ceil(size / 2), size), np.where(halved, spacing * 2, spacing)
        strides.append(tuple(2 if yes else 1 for yes in halved))
        kernels.append(_kernel(spacing))
    return tuple(strides), tuple(kernels)


def _kernel(spacing: np.ndarray) -> Shape:
    """3 along axes within a factor 2 of the finest, else 1."""
    return tuple(3 if value < 2 * spacing.min() else 1 for value in spacing)


def _coarsest(patch_vox: Shape, strides: tuple[Shape, ...]) -> Shape:
    """Size of the patch at the last level."""
    factors = np.prod(np.array(strides), axis=0)
    return tuple(int(n) for n in np.ceil(np.array(patch_vox) / factors))
