"""The parts of a run that are not the network: augmentation, resampling, logits to labels, reading patches; beside what people write."""

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import blobs
from benchmarks.timing import one_core, timed
from microtome.config import AugmentConfig, Plan
from microtome.data.dataset import open_dataset
from microtome.inference.predict import best_class
from microtome.inference.slabs import Restoring
from microtome.machine import recycle_memory
from microtome.preprocess import resample
from microtome.training.sampling import Pool, draw_sample, load_sample
from microtome.training.store import StoredCase, store_cases

BYTES = 4


def augmentation(dims: int) -> AugmentConfig:
    """Rotation, scale and elastic deformation of every sample, nothing else."""
    off = {name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_p")}
    return AugmentConfig(
        **{**off, "rotation_p": 1.0, "scale_p": 1.0, "elastic_p": 1.0},
        rotation_deg=(180.0,) if dims == 2 else (30.0, 30.0, 30.0),
        scale=(0.7, 1.4),
        elastic_spacing=(32.0,) * dims,
        elastic_sd=(4.0,) * dims,
    )


def plan_for(patch_vox: tuple[int, ...], classes: int, augment: AugmentConfig) -> Plan:
    """A plan of patches of this shape."""
    dims = len(patch_vox)
    names = tuple(str(k) for k in range(classes))
    return Plan(dims=dims, channels=1, classes=names, spacing_mm=(1.0,) * dims, patch_vox=patch_vox, batch=1, steps=1, augment=augment)  # type: ignore[arg-type]


def stored(shape_vox: tuple[int, ...], plan: Plan, folder: Path, kind: type = np.float32) -> tuple[StoredCase, np.ndarray, np.ndarray]:
    """One case of blobs as the training store keeps it, and its image and label as they are."""
    image, label = blobs(shape_vox, len(plan.classes), seed=0)
    values = image[0] if kind is np.float32 else np.clip(image[0] * 400 + 1600, 0, 4095).astype(kind)
    for name, array in (("images", values), ("labels", label.astype(np.uint8))):
        (folder / "data" / name).mkdir(parents=True)
        tifffile.imwrite(folder / "data" / name / "case.tif", array, photometric="minisblack", metadata={"axes": "ZYX"[-array.ndim :]})
    (folder / "data" / "microtome.yaml").write_text(f"spacing_mm: {[1.0] * len(shape_vox)}\n")
    dataset = open_dataset(folder / "data")
    plan = plan.model_copy(update={"classes": dataset.legend.names})
    return store_cases(dataset, dataset.cases, plan, folder / "store")[0], values, label


def augment(shape_vox: list[int], engine: str) -> dict[str, Any]:
    """Time one augmented sample, image (linear) and label (nearest), on one core."""
    one_core()
    torch.set_num_threads(1)
    recycle_memory()
    patch, dims = tuple(shape_vox), len(shape_vox)
    plan = plan_for(patch, 3, augmentation(dims))
    with tempfile.TemporaryDirectory() as folder:
        case, image, label = stored(tuple(n + n // 2 for n in patch), plan, Path(folder))
        numbers = count()
        if engine == "default":
            part = tuple(slice(n // 4, n // 4 + n) for n in patch)
            image_BCS = torch.from_numpy(image[part].copy())[None, None]
            label_BCS = torch.from_numpy(label[part].astype(np.float32))[None, None]
            call: Callable[[], object] = lambda: plain_augmentation(image_BCS, label_BCS, next(numbers))  # noqa: E731
        else:
            pool = Pool.of([case])
            call = lambda: load_sample(draw_sample(pool, plan, next(numbers), 0), pool.cases, patch)  # noqa: E731
        answer: dict[str, Any] = timed(call, budget_seconds=2, most=60)
    # Image in and out as float32, label as int16: what has to move at least.
    return answer | {"operations": 2 * (BYTES + 2) * float(np.prod(patch)), "precision": "memory"}


def plain_augmentation(image_BCS: Tensor, label_BCS: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same change as people write it with torch: an affine grid, coarse displacements made fine by interpolation, two samplings."""
    dims = image_BCS.dim() - 2
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.eye(dims) + 0.3 * torch.randn(dims, dims, generator=generator))
    theta = torch.cat([turn * (0.7 + 0.7 * torch.rand(1, generator=generator)), torch.zeros(dims, 1)], dim=1)
    grid = F.affine_grid(theta[None], list(image_BCS.shape), align_corners=False)
    coarse = 0.03 * torch.randn(1, dims, *[max(2, n // 32) for n in image_BCS.shape[2:]], generator=generator)
    fine = F.interpolate(coarse, size=image_BCS.shape[2:], mode="bicubic" if dims == 2 else "trilinear", align_corners=True)
    grid = grid + fine.movedim(1, -1)
    image = F.grid_sample(image_BCS, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return image, F.grid_sample(label_BCS, grid, mode="nearest", align_corners=False).to(torch.int16)


def resample_image(shape_vox: list[int], new_shape_vox: list[int], engine: str) -> dict[str, Any]:
    """Time bringing an image to the plan's grid. Engines: default (SciPy's cubic zoom), linear, cubic."""
    recycle_memory()
    image = np.random.default_rng(0).standard_normal((1, *shape_vox), dtype=np.float32)
    new = tuple(new_shape_vox)
    factors = [new_n / n for n, new_n in zip(shape_vox, new, strict=True)]
    calls: dict[str, Callable[[], np.ndarray]] = {
        "default": lambda: ndimage.zoom(image[0], factors, order=3, mode="nearest", grid_mode=True)[None],
        "linear": lambda: resample(image, new),
        "cubic": lambda: resample(image, new, "cubic"),
    }
    call = calls[engine]
    answer: dict[str, Any] = timed(call)
    moved = BYTES * float(np.prod(shape_vox) + np.prod(new))
    return answer | {"operations": moved, "precision": "memory"}


def logits_to_labels(classes: int, shape_vox: list[int], new_shape_vox: list[int], engine: str, folder: str) -> dict[str, Any]:
    """Time logits on the network's grid -> labels on the image's. Engines: default (torch, all at once), microtome."""
    recycle_memory()
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((classes, *[max(2, n // 8) for n in shape_vox]), dtype=np.float32)
    logits_KS = F.interpolate(torch.from_numpy(coarse)[None], size=shape_vox, mode="trilinear")[0].numpy()
    new = tuple(new_shape_vox)

    def default() -> np.ndarray:
        fine = F.interpolate(torch.from_numpy(logits_KS)[None], size=new, mode="trilinear", align_corners=False)
        answer: np.ndarray = fine[0].argmax(0).to(torch.int16).numpy()
        return answer

    def ours() -> np.ndarray:
        labels = np.empty(new, np.int16)
        rows = 16
        slabs = ((first, logits_KS[:, first : first + rows]) for first in range(0, shape_vox[0], rows))
        for first, part in Restoring(tuple(shape_vox), new, tuple((0, size) for size in new))(slabs):
            labels[first : first + part.shape[1]] = best_class(part)
        return labels

    call = default if engine == "default" else ours
    answer: dict[str, Any] = timed(call)
    path = Path(folder) / "labels" / f"logits-{classes}-{engine}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, call())
    moved = BYTES * float(logits_KS.size) + 2.0 * float(np.prod(new))
    return answer | {"operations": moved, "precision": "memory", "labels": str(path)}


def store(size: int, patch: int, engine: str) -> dict[str, Any]:
    """Time reading a random cube of image and label. Engines: default (float32 .npy, memory-mapped), microtome."""
    rng = np.random.default_rng(0)
    plan = plan_for((patch,) * 3, 3, AugmentConfig())
    with tempfile.TemporaryDirectory() as folder:
        case, values, label = stored((size,) * 3, plan, Path(folder), np.uint16)
        arrays = []
        for name, array in (("image", values.astype(np.float32)), ("label", label)):
            np.save(Path(folder) / f"{name}.npy", array)
            arrays.append(np.load(Path(folder) / f"{name}.npy", mmap_mode="r"))

        def part() -> tuple[slice, ...]:
            return tuple(slice(first, first + patch) for first in rng.integers(0, size - patch + 1, 3).tolist())

        def default() -> tuple[np.ndarray, ...]:
            chosen = part()
            return tuple(np.array(array[chosen]) for array in arrays)

        call: Callable[[], object] = default if engine == "default" else lambda: case.crop(part())
        answer: dict[str, Any] = timed(call, budget_seconds=2, most=100)
        held = sum(file.stat().st_size for file in (Path(folder) / "store").rglob("*") if file.is_file())
    note = f"{(BYTES + 2) * size**3 / 2**20:.0f} MB on disk" if engine == "default" else f"{held / 2**20:.0f} MB on disk"
    return answer | {"operations": 2.0 * (BYTES + 2) * patch**3, "precision": "memory", "note": note}
