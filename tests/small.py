"""Small plans and stored cases for the tests of training."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from microtome.config import AugmentConfig, NetworkConfig, Plan
from microtome.training.store import StoredCase, quantiles

# Every probability is 0 and no axis flips, so that no change is ever drawn; tests/test_augment.py holds it to that.
NOTHING = AugmentConfig(**{name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_p")})
SPICED_2D = AugmentConfig(flip_axes=(0, 1), rotation_deg=(180.0,), elastic_spacing=(8.0, 8.0), elastic_sd=(1.0, 1.0))
TINY_2D = NetworkConfig(widths=(4, 8, 8), strides=((1, 1), (2, 2), (2, 2)), kernels=((3, 3),) * 3, supervised_levels=2)
TINY_3D = NetworkConfig(widths=(4, 8), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch on one thread, in the test files that import this: small tensors are slower on two, and sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_plan(**changes: Any) -> Plan:
    """A plan that trains in a second: pictures of 32 x 32 with a network of three levels."""
    values: dict[str, Any] = {
        "dims": 2,
        "channels": 1,
        "classes": ("background", "cell"),
        "spacing_mm": (1.0, 1.0),
        "network": TINY_2D,
        "patch_vox": (32, 32),
        "batch": 2,
        "augment": SPICED_2D,
        "steps": 6,
        "warmup": 2,
        "validations": 2,
        "seed": 3,
    }
    return Plan(**{**values, **changes})


def small_plan_3d(**changes: Any) -> Plan:
    """The same for volumes, with patches of 16 x 16 x 16."""
    values: dict[str, Any] = {
        "dims": 3,
        "classes": ("background", "tubule"),
        "spacing_mm": (0.00204, 0.00176, 0.00176),
        "network": TINY_3D,
        "patch_vox": (16, 16, 16),
        "augment": AugmentConfig(flip_axes=(0, 1, 2), rotation_deg=(180.0, 30.0, 30.0)),
    }
    return small_plan(**{**values, **changes})


def stored_case(label: np.ndarray, image: np.ndarray | None = None, **values: Any) -> StoredCase:
    """A case as `store_cases` opens it, from arrays; the image is made up where none is given."""
    label = np.asarray(label, np.int16)
    if image is None:
        image = np.random.default_rng(0).normal(size=(1, *label.shape)).astype(np.float32)
    voxels = {int(k): np.argwhere(label == k) for k in np.unique(label[label >= 0])}
    counts = {k: len(found) for k, found in voxels.items()}
    return StoredCase(
        **{"name": "case", "weight": 1.0, **values},
        image=image,
        label=label,
        class_voxels=voxels,
        class_counts=counts,
        quantiles=quantiles(image),
    )


def squares(seed: int = 0, size: int = 48) -> StoredCase:
    """A picture with a bright square on a dark ground, which a network learns in a few steps."""
    rng = np.random.default_rng(seed)
    label = np.zeros((size, size), np.int16)
    y, x = rng.integers(0, size // 2, 2)
    label[y : y + size // 2, x : x + size // 2] = 1
    image = (2.0 * label - 1 + 0.3 * rng.normal(size=label.shape)).astype(np.float32)
    return stored_case(label, image[None], name=f"square {seed}")
