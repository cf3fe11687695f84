"""Samples that a bundle carries: parts of training cases as prediction sees them, of sizes that the network takes, small."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microtome.bundle import Samples
from microtome.config import NetworkConfig, NormalisationConfig, Plan
from microtome.data.dataset import Dataset, open_dataset
from microtome.inference.devices import to_device
from microtome.models.network import Network
from microtome.models.registry import build
from microtome.preprocess import normalise
from microtome.training.golden import MOST_BYTES, answer, calibration_shape, golden_shape, samples_of
from tests.folders import nifti, png, tiff
from tests.small import one_thread, small_plan, small_plan_3d

__all__ = ["one_thread"]


def pictures(folder: Path, count: int = 6, shape: tuple[int, int] = (60, 70)) -> Dataset:
    """Dark noise with one bright square, which is the foreground, at the place (30, 40)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        label = np.zeros(shape, int)
        label[28:33, 38:43] = 1
        png(folder / "images" / f"{number}.png", rng.integers(0, 50, shape) + 150 * label)
        png(folder / "labels" / f"{number}.png", label)
    return open_dataset(folder)


def network_for(plan: Plan) -> Network:
    torch.manual_seed(0)
    return build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)


def made(dataset: Dataset, **changes: Any) -> tuple[Samples, Plan, Network]:
    plan = small_plan(classes=dataset.legend.names, **changes)
    network = network_for(plan)
    return samples_of(dataset, dataset.labelled, plan, network), plan, network


def contains(image_CS: np.ndarray, part_CS: np.ndarray) -> bool:
    """Whether a 2D part lies in an image somewhere, to the last bit of float16."""
    image, part = image_CS.astype(np.float16), part_CS.astype(np.float16)
    windows = np.lib.stride_tricks.sliding_window_view(image, part.shape)
    return bool((windows == part).all(axis=(-3, -2, -1)).any())


def test_the_golden_sample_is_what_the_float32_network_says(tmp_path: Path) -> None:
    samples, _, network = made(pictures(tmp_path))
    assert samples.golden_CS.dtype == np.float32
    assert np.array_equal(samples.golden_CS.astype(np.float16).astype(np.float32), samples.golden_CS)
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(samples.golden_CS)[None])[0].numpy()
    assert np.array_equal(samples.logits_KS, expected)


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    dataset = pictures(tmp_path, count=1)
    plan = small_plan(classes=dataset.legend.names)
    network = network_for(plan).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    samples_of(dataset, dataset.labelled, plan, network)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_layout_and_precision_of_the_trained_network_do_not_matter(tmp_path: Path) -> None:
    samples, _, network = made(pictures(tmp_path))
    turned = answer(to_device(network, torch.device("cpu"), 2), samples.golden_CS)
    np.testing.assert_allclose(turned, samples.logits_KS, rtol=0, atol=1e-5)
    assert answer(network.double(), samples.golden_CS).dtype == np.float32


def test_parts_come_from_the_images_as_prediction_sees_them(tmp_path: Path) -> None:
    dataset = pictures(tmp_path)
    samples, plan, _ = made(dataset)
    seen = [normalise(dataset.read_image(case).array, plan.normalisation) for case in dataset.labelled]
    parts = [samples.golden_CS, *samples.calibration]
    assert all(any(contains(image, part) for image in seen) for part in parts)
    # Of six cases the first, the last and two between.
    assert [any(contains(image, part) for part in parts) for image in seen] == [True, True, False, True, False, True]


def test_half_of_the_parts_or_more_show_foreground(tmp_path: Path) -> None:
    samples, _, _ = made(pictures(tmp_path, shape=(400, 400)))
    bright = [part.max() > 5 for part in samples.calibration]
    assert samples.golden_CS.max() > 5
    # A part of 32 x 32 anywhere hits the one square of 5 x 5 in these 400 x 400 about once in a hundred.
    assert bright == [True, False] * 4 or sum(bright) in (5, 6)


def test_the_same_plan_gives_the_same_samples_and_another_seed_others(tmp_path: Path) -> None:
    dataset = pictures(tmp_path)
    first, again, other = (made(dataset, seed=seed)[0] for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first.calibration, again.calibration, strict=True))
    assert np.array_equal(first.golden_CS, again.golden_CS)
    assert not all(np.array_equal(a, b) for a, b in zip(first.calibration, other.calibration, strict=True))


def test_an_image_smaller_than_the_network_takes_is_mirrored(tmp_path: Path) -> None:
    samples, _, _ = made(pictures(tmp_path, shape=(33, 43)), patch_vox=(64, 64))
    assert samples.golden_CS.shape == (1, 64, 64)
    assert {part.shape for part in samples.calibration} == {(1, 64, 64)}
    # 33 of 64 rows are the image, from the 16th before it on.
    assert np.array_equal(samples.golden_CS[:, 14], samples.golden_CS[:, 16])


def test_cases_without_foreground_give_samples_too(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(5):
        png(tmp_path / "labels" / f"{number}.png", np.zeros((60, 70)))
    samples, _, _ = made(open_dataset(tmp_path))
    assert len(samples.calibration) == 8


def test_grey_values_beyond_float16_stay_finite(tmp_path: Path) -> None:
    tiff(tmp_path / "images" / "a.tif", np.full((40, 40), 65535, np.uint16))
    tiff(tmp_path / "labels" / "a.tif", np.eye(40, dtype=np.uint8))
    dataset = open_dataset(tmp_path)
    plan = small_plan(classes=dataset.legend.names, normalisation=NormalisationConfig(kind="none"))
    samples = samples_of(dataset, dataset.labelled, plan, network_for(plan))
    assert dataset.read_image(dataset.labelled[0]).array.max() > np.finfo(np.float16).max
    assert samples.golden_CS.max() == np.finfo(np.float16).max
    assert np.isfinite(samples.logits_KS).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_volume_gives_sections_to_a_2d_network_and_parts_of_itself_to_a_3d_one(tmp_path: Path, dims: int) -> None:
    rng = np.random.default_rng(0)
    label = np.zeros((20, 48, 40), np.uint8)
    label[7, 20:24, 18:20] = 1
    # Each section has a grey value of its own, by which it is known again.
    grey = np.arange(20)[:, None, None] * 8 + rng.integers(0, 2, label.shape)
    nifti(tmp_path / "images" / "a.nii.gz", grey.astype(np.uint8))
    nifti(tmp_path / "labels" / "a.nii.gz", label)
    dataset = open_dataset(tmp_path)
    make = small_plan if dims == 2 else small_plan_3d
    plan = make(classes=dataset.legend.names, spacing_mm=(1.0, 1.0, 1.0))
    samples = samples_of(dataset, dataset.labelled, plan, network_for(plan))
    image = normalise(dataset.read_image(dataset.labelled[0]).array, plan.normalisation)
    assert {part.shape for part in samples.calibration} == {(1, *plan.patch_vox)}
    assert samples.golden_CS.shape == (1, *plan.patch_vox)
    if dims == 2:
        assert contains(image[:, 7], samples.golden_CS)
        assert all(any(contains(image[:, z], part) for z in range(20)) for part in samples.calibration)
    else:
        middle = samples.golden_CS.astype(np.float16)[:, 8]
        assert any(contains(image[:, z], middle) for z in range(20))


@pytest.mark.parametrize(
    ("name", "dims", "patch", "golden", "calibration", "count"),
    [
        ("modern_unet", 2, (512, 512), (256, 256), (512, 512), 8),
        ("modern_unet", 2, (64, 96), (64, 96), (64, 96), 8),
        ("modern_unet", 3, (64, 128, 128), (64, 64, 64), (64, 128, 128), 4),
        ("modern_unet", 3, (128, 256, 256), (64, 64, 64), (64, 128, 128), 4),
        ("unet", 2, (572, 572), (252, 252), (572, 572), 8),
        ("unet3d", 3, (116, 132, 132), (92, 92, 92), (116, 92, 92), 4),
        ("sliding_window", 2, (200, 200), (200, 200), (200, 200), 8),
    ],
)
def test_sizes_are_those_that_the_network_takes(
    name: str, dims: int, patch: tuple[int, ...], golden: tuple[int, ...], calibration: tuple[int, ...], count: int
) -> None:
    # As many levels as in the papers.
    levels = {"modern_unet": 6, "unet": 5, "unet3d": 4, "sliding_window": 5}[name]
    config = NetworkConfig(name=name, widths=(4,) * levels)
    plan = (small_plan if dims == 2 else small_plan_3d)(network=config, patch_vox=patch)
    network = network_for(plan)
    assert golden_shape(plan, network) == golden
    shape, number = calibration_shape(plan, network, golden)
    assert (shape, number) == (calibration, count)
    for sizes in (golden, shape):
        assert all(network.valid_size(n, axis) for axis, n in enumerate(sizes))


@pytest.mark.parametrize("channels", [1, 3, 20, 300])
@pytest.mark.parametrize("classes", [2, 40])
def test_all_samples_together_stay_small(channels: int, classes: int) -> None:
    names = tuple(f"class {k}" for k in range(classes))
    plan = small_plan(patch_vox=(1024, 1024), channels=channels, classes=names)
    network = network_for(plan)
    golden = golden_shape(plan, network)
    shape, count = calibration_shape(plan, network, golden)
    total = np.prod(golden) * (2 * channels + 4 * classes) + count * np.prod(shape) * 2 * channels
    assert 0 < count <= 8
    assert total <= MOST_BYTES
