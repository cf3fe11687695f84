"""One augmented sample, image and label, by each library on one core: rotation, scale and elastic deformation, every time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.cases import blobs
from benchmarks.parts import augment
from benchmarks.timing import one_core, timed


def peer_augment(shape_vox: list[int], engine: str) -> dict[str, Any]:
    """Time it. Engines: batchgeneratorsv2, MONAI, TorchIO, microtome."""
    if engine == "microtome":
        return augment(shape_vox, engine)
    one_core()
    torch.set_num_threads(1)
    patch = tuple(shape_vox)
    image, label = blobs(patch, 3, seed=0)
    makers = {"batchgeneratorsv2": _batchgenerators, "MONAI": _monai, "TorchIO": _torchio}
    answer: dict[str, Any] = timed(makers[engine](image, label, patch), budget_seconds=4, most=40)
    return answer


def _batchgenerators(image: np.ndarray, label: np.ndarray, patch: tuple[int, ...]) -> Callable[[], object]:
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    transform = SpatialTransform(
        patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=1,
        p_rotation=1,
        rotation=(-math.pi / 6, math.pi / 6),
        p_scaling=1,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
    )
    tensors = {"image": torch.from_numpy(image), "segmentation": torch.from_numpy(label)[None]}
    return lambda: transform(**{name: tensor.clone() for name, tensor in tensors.items()})


def _monai(image: np.ndarray, label: np.ndarray, patch: tuple[int, ...]) -> Callable[[], object]:
    from monai.transforms import Rand2DElasticd, Rand3DElasticd

    common: dict[str, Any] = {"keys": ("image", "label"), "prob": 1.0, "mode": ("bilinear", "nearest"), "padding_mode": "reflection"}
    turned = {"rotate_range": (math.pi / 6,) * (1 if len(patch) == 2 else 3), "scale_range": (0.3,) * len(patch)}
    if len(patch) == 2:
        transform: Any = Rand2DElasticd(spacing=(32, 32), magnitude_range=(2, 6), spatial_size=patch, **turned, **common)
    else:
        transform = Rand3DElasticd(sigma_range=(5, 8), magnitude_range=(50, 150), spatial_size=patch, **turned, **common)
    pair = {"image": torch.from_numpy(image), "label": torch.from_numpy(label)[None].float()}
    return lambda: transform({name: tensor.clone() for name, tensor in pair.items()})


def _torchio(image: np.ndarray, label: np.ndarray, patch: tuple[int, ...]) -> Callable[[], object]:
    import torchio as tio

    # Volumes only: a picture is one of a single section, along which nothing may move.
    flat = len(patch) == 2
    image_4d, label_4d = (torch.from_numpy(array)[..., None] if flat else torch.from_numpy(array) for array in (image, label[None]))
    subject = tio.Subject(image=tio.ScalarImage(tensor=image_4d), label=tio.LabelMap(tensor=label_4d))
    degrees: Any = (0, 0, 0, 0, -30, 30) if flat else 30
    moves: Any = (6, 6, 0) if flat else 6
    affine = tio.RandomAffine(scales=(0.7, 1.4, 0.7, 1.4, 1, 1) if flat else (0.7, 1.4), degrees=degrees)
    elastic = tio.RandomElasticDeformation(num_control_points=7, max_displacement=moves)
    both = tio.Compose([affine, elastic])
    return lambda: both(subject)
