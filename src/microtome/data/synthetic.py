"""Data made on the spot: tubules in 3D and cells in 2D that no threshold solves, for the demo, tests and benchmarks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from microtome.data.case import NOT_ANNOTATED
from microtome.errors import ConfigError
from microtome.files import write_text
from microtome.geometry import Shape, Spacing, affine_from_spacing, format_shape
from microtome.images.files import write_image, write_labels
from microtome.images.image import Image

# The voxel of the Xenopus kidney stacks of the 3D U-Net paper, 2.04 x 1.76 x 1.76 um.
TUBULE_SPACING_MM: Spacing = (0.00204, 0.00176, 0.00176)

# Photons that a grey value of 1 stands for; fewer make more noise.
PHOTONS = 60.0


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A made volume and what is true of it.

    Attributes:
        image: (Z, Y, X) uint8.
        label: (Z, Y, X) int16, 0 background, 1 tubule: the wall and the lumen that it encloses.
    """

    image: np.ndarray
    label: np.ndarray
    spacing_mm: Spacing = TUBULE_SPACING_MM


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A made picture of cells and what is true of it.

    Attributes:
        image: (Y, X) uint8.
        label: (Y, X) int16, 0 background, 1 cell.
        instances: (Y, X) int32, 0 background, each cell its own number from 1 without gaps; neighbours touch.
    """

    image: np.ndarray
    label: np.ndarray
    instances: np.ndarray


def tubules(shape_vox: Shape = (64, 96, 96), seed: int = 0) -> Volume:
    """Branching hollow tubules as in a kidney under the confocal microscope; a pure function of shape and seed.

    The wall is bright, the lumen nearly as dark as the background; blobs that are no tubules, uneven light, a blur
    that is longer along Z, and photon noise make grey values alone a poor guide. Tubules fill 10 to 20 % of a volume
    of ordinary size.

    References:
        Çiçek et al. 2016, 3D U-Net: learning dense volumetric segmentation from sparse annotation, arXiv:1606.06650
        (the specimen that this imitates).
    """
    _check_shape(shape_vox, dims=3, smallest=16)
    rng = np.random.default_rng(seed)
    depth = _grow_tubules(rng, shape_vox)
    label = (depth < 0).astype(np.int16)
    wall_vox = 1.8
    tissue = 0.18 + 0.05 * _smooth_noise(rng, shape_vox, sd_vox=4)
    tissue = np.maximum(tissue, _blobs(rng, shape_vox, keep_off=depth))
    tissue = np.where(depth < 0, 0.85 + 0.12 * _smooth_noise(rng, shape_vox, sd_vox=5), tissue)
    tissue = np.where(depth < -wall_vox, 0.22, tissue)
    return Volume(image=_expose(rng, tissue, psf_vox=(1.4, 0.7, 0.7)), label=label)


def sparse_annotation(label: np.ndarray, slices: tuple[int, ...] = (3, 3, 2), seed: int = 0) -> np.ndarray:
    """The label as someone leaves it who painted a few orthogonal slices: int16, NOT_ANNOTATED elsewhere.

    Args:
        label: (*S) integer, dense.
        slices: how many slices are kept across each axis of S: (3, 3, 2) are 3 xy, 3 xz and 2 yz slices of a volume.
        seed: moves each slice within its own even share of the axis.

    References:
        Çiçek et al. 2016, arXiv:1606.06650, section 4.1 and table 2 (slices annotated against accuracy).
    """
    if len(slices) != label.ndim or not any(slices) or any(not 0 <= n <= size for n, size in zip(slices, label.shape, strict=False)):
        expected = f"a number of slices for each axis of {format_shape(label.shape)}, not all 0"
        raise ConfigError(
            "slices", expected=expected, got=str(slices), do="give at most as many slices as the axis has voxels", code="C022"
        )
    rng = np.random.default_rng(seed)
    annotated = np.zeros(label.shape, bool)
    for axis, (count, size) in enumerate(zip(slices, label.shape, strict=True)):
        if count:
            place = (np.arange(count) + rng.uniform(0.25, 0.75, count)) * size / count
            np.moveaxis(annotated, axis, 0)[place.astype(int)] = True
    return np.where(annotated, label, NOT_ANNOTATED).astype(np.int16)


def cells(shape_vox: Shape = (256, 256), seed: int = 0, count: int = 40) -> Picture:
    """Cells that touch, some of them dim, textured, under uneven light, blurred and noisy; a pure function of its arguments.

    Args:
        shape_vox: (Y, X), each at least 32.
        seed: of everything that is random.
        count: cells to place; one that others cover altogether is dropped.
    """
    _check_shape(shape_vox, dims=2, smallest=32)
    rng = np.random.default_rng(seed)
    instances = _place_cells(rng, shape_vox, count)
    label = (instances > 0).astype(np.int16)
    # A fifth of the cells is so dim that light from elsewhere in the picture drowns them.
    kinds = rng.random(instances.max() + 1)
    brightness = np.where(kinds < 0.2, rng.uniform(0.3, 0.4, kinds.size), rng.uniform(0.5, 1.0, kinds.size))
    texture = 1 + 0.22 * _smooth_noise(rng, shape_vox, sd_vox=1.5)
    background = 0.16 + 0.05 * _smooth_noise(rng, shape_vox, sd_vox=6)
    dark_seam = 1 - 0.35 * ndimage.gaussian_filter(_seams(instances), 0.7)
    tissue = np.where(label == 1, brightness[instances] * texture * dark_seam, background)
    return Picture(image=_expose(rng, tissue, psf_vox=(1.0, 1.0)), label=label, instances=instances)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How much demo data; the defaults train on two CPU cores in minutes.

    Attributes:
        volume_vox: (Z, Y, X) of each of three volumes: two to train on, one unseen.
        slices: annotated slices of a training volume across Z, Y and X.
        picture_vox: (Y, X) of each picture of cells.
        pictures: with masks, to train on; a quarter as many (at least one) are unseen.
        seed: everything follows from it.
    """

    volume_vox: Shape = (64, 96, 96)
    slices: tuple[int, int, int] = (3, 3, 2)
    picture_vox: Shape = (256, 256)
    pictures: int = 12
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Where `write_demo_data` put what; each is a folder.

    Attributes:
        tubules: a dataset of sparsely annotated volumes: images/, labels/ and microtome.yaml.
        tubules_truth: dense label maps of those volumes, under the same names; training never sees them.
        tubules_unseen: volumes without labels.
        tubules_unseen_truth: dense label maps of those, under the same names.
        cells: a dataset of pictures: images/ and masks/ of 0 and 255.
        cells_unseen: pictures without masks.
        cells_unseen_truth: their masks, under the same names.
    """

    tubules: Path
    tubules_truth: Path
    tubules_unseen: Path
    tubules_unseen_truth: Path
    cells: Path
    cells_unseen: Path
    cells_unseen_truth: Path


def write_demo_data(folder: Path, config: DemoConfig | None = None) -> DemoData:
    """Write a sparse 3D and a dense 2D dataset, and beside them what is unseen and what is true; the same bytes from the same config."""
    config = config or DemoConfig()
    data = DemoData(
        tubules=folder / "tubules",
        tubules_truth=folder / "truth" / "tubules",
        tubules_unseen=folder / "unseen" / "tubules",
        tubules_unseen_truth=folder / "truth" / "tubules_unseen",
        cells=folder / "cells",
        cells_unseen=folder / "unseen" / "cells",
        cells_unseen_truth=folder / "truth" / "cells_unseen",
    )
    for number in range(3):
        _write_volume(data, config, number)
    write_text(data.tubules / "microtome.yaml", _TUBULES_YAML.format(spacing=list(TUBULE_SPACING_MM)))
    for number in range(config.pictures + max(1, config.pictures // 4)):
        _write_picture(data, config, number)
    return data


_TUBULES_YAML = """\
# What the files cannot say by themselves.
not_annotated: 255
classes:
  background: 0
  tubule: 1
spacing_mm: {spacing}
"""


def _write_volume(data: DemoData, config: DemoConfig, number: int) -> None:
    """Volume `number` of the demo: the first two to train on, the third unseen."""
    volume = tubules(config.volume_vox, seed=config.seed + number)
    name = f"tubules_{number + 1}.tif"
    images, truth = (data.tubules / "images", data.tubules_truth) if number < 2 else (data.tubules_unseen, data.tubules_unseen_truth)
    image = _in_memory(volume.image, volume.spacing_mm, images / name)
    write_image(image.path, image)
    write_labels(truth / name, volume.label.astype(np.uint8), image)
    if number < 2:
        sparse = sparse_annotation(volume.label, config.slices, seed=config.seed + number)
        write_labels(data.tubules / "labels" / name, np.where(sparse == NOT_ANNOTATED, 255, sparse).astype(np.uint8), image)


def _write_picture(data: DemoData, config: DemoConfig, number: int) -> None:
    """Picture `number` of the demo, to train on or, past `config.pictures`, unseen."""
    # As many cells an area as in the 256 x 256 picture of the defaults, so a smaller picture is no heap.
    count = max(3, 40 * config.picture_vox[0] * config.picture_vox[1] // 256**2)
    picture = cells(config.picture_vox, seed=config.seed + number, count=count)
    name = f"cells_{number + 1:02d}.png"
    seen = number < config.pictures
    images, masks = (data.cells / "images", data.cells / "masks") if seen else (data.cells_unseen, data.cells_unseen_truth)
    image = _in_memory(picture.image, (1.0, 1.0), images / name)
    write_image(image.path, image)
    write_labels(masks / name, (255 * picture.label).astype(np.uint8), image)


def _in_memory(array_S: np.ndarray, spacing_mm: Spacing, path: Path) -> Image:
    """A one-channel image that is about to be written to `path`."""
    volume = array_S.ndim == 3
    return Image(
        array=array_S[None],
        spacing_mm=spacing_mm,
        affine=affine_from_spacing(spacing_mm),
        axes="CZYX" if volume else "CYX",
        path=path,
        format="tiff" if volume else "png",
        spacing_known=volume,
    )


def _grow_tubules(rng: np.random.Generator, shape_vox: Shape) -> np.ndarray:
    """Signed distance to the nearest tubule surface, voxels, negative inside; far away it is only large."""
    depth = np.full(shape_vox, np.inf, np.float32)
    share = rng.uniform(0.12, 0.16)
    trunk_vox = float(np.clip(min(shape_vox) / 12, 2.5, 5.5))
    path = np.empty((0, 3))
    wanted = share * depth.size
    # Nearly every path adds something; the bound is only there so that a volume of odd shape cannot go on for ever.
    for _ in range(100 + depth.size // 500):
        # Two of three tubules branch off the last one, so that the volume holds a few trees and not a heap of worms.
        start = path[rng.integers(len(path))] if len(path) and rng.random() < 0.67 else rng.uniform(0, shape_vox)
        radius_vox = trunk_vox * rng.uniform(0.7, 1.15)
        path = _walk(rng, start, shape_vox)
        sway = ndimage.gaussian_filter1d(rng.normal(size=len(path)), 6, mode="nearest") * 6**0.5
        for point, change in zip(path, sway, strict=True):
            wanted -= _add_ball(depth, point, radius_vox * (1 + 0.15 * change))
        if wanted < 0:
            break
    return depth


def _walk(rng: np.random.Generator, start: np.ndarray, shape_vox: Shape) -> np.ndarray:
    """Points of a smooth random walk, a voxel apart, until it leaves the volume or has a length of its own; (N, 3)."""
    direction = rng.normal(size=3)
    points = [start]
    for _ in range(int(rng.integers(30, 90))):
        direction = direction + 0.22 * rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        points.append(points[-1] + direction)
        if np.any(points[-1] < -3) or np.any(points[-1] > np.asarray(shape_vox) + 3):
            break
    return np.asarray(points)


def _add_ball(depth: np.ndarray, centre: np.ndarray, radius_vox: float) -> int:
    """Lower `depth` in place to the distance from a ball's surface near the ball; the number of voxels newly inside."""
    box, distance = _ball(depth.shape, centre, radius_vox)
    before = np.count_nonzero(depth[box] < 0)
    depth[box] = np.minimum(depth[box], distance)
    return int(np.count_nonzero(depth[box] < 0) - before)


def _ball(shape_vox: Shape, centre: np.ndarray, radius_vox: float) -> tuple[tuple[slice, ...], np.ndarray]:
    """The part of a volume within 3 voxels of a ball, maybe empty, and each voxel's distance from the ball's surface."""
    low = np.clip(np.floor(centre - radius_vox - 3).astype(int), 0, shape_vox)
    high = np.clip(np.ceil(centre + radius_vox + 4).astype(int), low, shape_vox)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    z, y, x = np.ogrid[box]
    return box, np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) - radius_vox


def _blobs(rng: np.random.Generator, shape_vox: Shape, keep_off: np.ndarray) -> np.ndarray:
    """Solid round things that are no tubules, as grey values; none within 2 voxels of a tubule."""
    grey = np.zeros(shape_vox)
    for _ in range(max(4, int(np.prod(shape_vox)) // 7000)):
        box, distance = _ball(shape_vox, rng.uniform(0, shape_vox), rng.uniform(1.5, 4.0))
        grey[box] = np.where(distance < 0, rng.uniform(0.4, 0.75), grey[box])
    return np.where(keep_off < 2, 0, grey)


def _place_cells(rng: np.random.Generator, shape_vox: Shape, count: int) -> np.ndarray:
    """Cells of wavy outline, most of them beside an earlier one; (Y, X) int32, numbered without gaps."""
    y, x = np.ogrid[: shape_vox[0], : shape_vox[1]]
    nearest = np.ones(shape_vox)
    instances = np.zeros(shape_vox, np.int32)
    centres: list[np.ndarray] = []
    for number in range(1, count + 1):
        radius_vox = rng.uniform(7, 13)
        centre = rng.uniform(0, shape_vox)
        if centres and rng.random() < 0.6:
            turn = rng.uniform(0, 2 * np.pi)
            centre = centres[rng.integers(len(centres))] + 1.8 * radius_vox * np.array([np.sin(turn), np.cos(turn)])
        centres.append(centre)
        outline = _outline(rng, np.arctan2(y - centre[0], x - centre[1]))
        reach = np.hypot(y - centre[0], x - centre[1]) / (radius_vox * outline)
        # A pixel belongs to the cell in which it lies deepest, so overlapping cells meet in a line instead of hiding each other.
        instances = np.where(reach < nearest, np.int32(number), instances)
        nearest = np.minimum(nearest, reach)
    return np.unique(instances, return_inverse=True)[1].reshape(shape_vox).astype(np.int32)


def _outline(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    """Radius at each angle in units of the mean: an ellipse with a few waves."""
    radius = np.ones_like(angle)
    for waves, largest in [(2, 0.18), (3, 0.07), (5, 0.03)]:
        radius += rng.uniform(0, largest) * np.cos(waves * (angle - rng.uniform(0, 2 * np.pi)))
    return radius


def _seams(instances: np.ndarray) -> np.ndarray:
    """1.0 on pixels whose neighbourhood holds two different cells."""
    above = ndimage.maximum_filter(instances, 3)
    below = ndimage.minimum_filter(np.where(instances == 0, instances.max() + 1, instances), 3)
    return ((instances > 0) & (above > below)).astype(float)


def _expose(rng: np.random.Generator, tissue: np.ndarray, psf_vox: tuple[float, ...]) -> np.ndarray:
    """What a camera makes of the tissue: uneven light, blur, photon and read-out noise; uint8."""
    # tanh keeps the brightest corner below twice and the darkest above half of the usual light: grey values must not saturate.
    light = np.exp(0.65 * np.tanh(0.7 * _smooth_noise(rng, tissue.shape, sd_vox=max(tissue.shape) / 4)))
    photons = np.maximum(ndimage.gaussian_filter(tissue * light, psf_vox), 0) * PHOTONS
    grey = rng.poisson(photons) / PHOTONS + rng.normal(0, 0.03, tissue.shape)
    return np.clip(np.rint(grey * 130 + 8), 0, 255).astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, shape_vox: Shape, sd_vox: float) -> np.ndarray:
    """Gaussian noise without detail finer than `sd_vox`, mean 0 and sd 1 over the array."""
    # Drawn on a grid twice finer than the wanted detail and enlarged: a wide filter on the full grid would take seconds.
    coarse = [max(2, int(np.ceil(2 * size / sd_vox))) for size in shape_vox]
    field = ndimage.gaussian_filter(rng.normal(size=coarse), 1.4)
    factors = [size / n for size, n in zip(shape_vox, coarse, strict=True)]
    full: np.ndarray = ndimage.zoom(field, factors, order=1, mode="nearest", grid_mode=True)
    return np.asarray((full - full.mean()) / full.std())


def _check_shape(shape_vox: Shape, dims: int, smallest: int) -> None:
    """Refuse a shape that has no room for what is to be drawn."""
    if len(shape_vox) != dims or min(shape_vox) < smallest:
        expected = f"{dims} sizes of at least {smallest}"
        raise ConfigError("shape_vox", expected=expected, got=format_shape(shape_vox), do="ask for a larger one", code="C022")
