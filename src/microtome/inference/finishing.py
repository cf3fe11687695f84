"""From what a network answers to what is asked for: labels mended, objects numbered, maps written beside them."""

import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np

from microtome.geometry import Shape
from microtome.images.files import write_image
from microtome.images.volume import Volume
from microtome.inference.asked import Options
from microtome.inference.predict import Wanted
from microtome.inference.predictor import Predictor

# Of `Volume.format`: images whose prediction is a store too.
STORES = ("zarr", "n5", "precomputed")
STORE_SUFFIX = ".ome.zarr"
# Maps of a picture are TIFF, since a PNG cannot hold several layers.
MAP_SUFFIXES = MappingProxyType(
    {"nifti": ".nii.gz", "nrrd": ".nrrd", "metaimage": ".mha", "hdf5": ".h5", "npy": ".npy", "dicom": ".nii.gz"}
)
# Sides of what is worked on at once, in memory too, and where a memory has to be kept: distances take sixty bytes a voxel.
BLOCK_SIDE, KEPT_BLOCK_SIDE, DISTANCE_BYTES = 256, 128, 60


def wanted_of(predictor: Predictor, options: Options) -> Wanted:
    """What has to come of the logits of a model."""
    return options.wanted(predictor.bundle.legend, averaged=predictor.tta != "none", temperature=predictor.bundle.temperature)


def predict_maps(
    predictor: Predictor,
    volume: Volume,
    options: Options,
    *,
    images: int = 1,
    on_voxels: Callable[[int, int], None] = lambda done, of: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """All that is asked for of one volume, in memory: labels int16 (*S), and maps by name, (*S) or (layers, *S).

    Where memory is to be kept, how the volume is cut for that is said; and so are smaller tiles, where it turns out to be short.

    Raises:
        ConfigError: the memory is not enough.
        DataError: other channels or axes than the model was trained on.
    """
    wanted, limit = wanted_of(predictor, options), options.limit_bytes
    legend, shape = predictor.bundle.legend, volume.shape_vox
    block = (BLOCK_SIDE if limit is None else KEPT_BLOCK_SIDE,) * len(shape)
    if limit is not None:
        limit -= held_bytes(volume, wanted, options, len(legend.names), block)
    maps = predictor.maps(volume, wanted, images=images, limit_bytes=limit, on_voxels=on_voxels, say=say)
    background = legend.background
    if background is not None and options.mending:
        # Late: it needs SciPy, and a picture that is only labelled does not.
        from microtome.inference.mending import Mending

        mending = Mending(options=options, background=background, classes=legend.foreground, spacing_mm=volume.spacing_mm, block_vox=block)
        if options.clean:
            mending.labels(maps["labels"], maps["labels"])
        if options.instances:
            maps["instances"] = np.empty(shape, np.uint32)
            mending.instances(maps["labels"], maps.pop("foreground", None), maps["instances"])
    return maps


def held_bytes(volume: Volume, wanted: Wanted, options: Options, classes: int, block_vox: Shape) -> int:
    """What is held beside slabs where nothing is a store: the image, all that comes of it, and labels as they are written."""
    voxels = math.prod(volume.shape_vox)
    each = volume.channels * volume.pixels.dtype.itemsize + wanted.voxel_bytes(classes) + 2 * np.dtype(np.int16).itemsize
    # Numbers of objects, and of the components that are cleaned.
    each += np.dtype(np.uint32).itemsize * (options.instances + bool(options.clean))
    return voxels * each + (DISTANCE_BYTES * min(voxels, math.prod(block_vox)) if options.mending else 0)


def write_map(stem: Path, array: np.ndarray, like: Volume) -> None:
    """Write a map (*S) or (layers, *S) of an image in its geometry; pictures get TIFF files, since a PNG holds no layers.

    Raises:
        DataError: the format does not hold it.
    """
    image = like.with_array(array if array.ndim > len(like.shape_vox) else array[None])
    suffix = MAP_SUFFIXES.get(like.format, ".tif")
    if like.format == "nifti" and array.dtype == np.float16:
        # NIfTI has no number of that size.
        image = like.with_array(image.array.astype(np.float32))
    write_image(stem.with_name(stem.name + suffix), image)
