"""Grey values, computed the fast way, against the obvious one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.training import intensity
from microtome.training.intensity import Intensity, match_histogram
from microtome.training.store import quantiles
from tests.small import one_thread

__all__ = ["one_thread"]

SHAPES = [(1, 24, 30), (2, 6, 9, 7), (1, 1, 40)]


def interpolated(image_CS: torch.Tensor, own_CQ: np.ndarray, other_CQ: np.ndarray) -> np.ndarray:
    """`match_histogram` as NumPy has it, in float64."""
    return np.stack([np.interp(channel, own, other) for channel, own, other in zip(image_CS.numpy(), own_CQ, other_CQ, strict=True)])


def drawn(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Images whose values are spread in different ways, few values a bin or all of them in one."""
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(size=shape),
        "few values": rng.integers(0, 4, shape),
        "one value": np.full(shape, rng.normal()),
        "all zero": np.zeros(shape),
        "one far away": np.append(rng.normal(size=int(np.prod(shape)) - 1), 1e7).reshape(shape),
        "mostly ground": np.where(rng.random(shape) < 0.9, -1.0, rng.normal(size=shape)),
        "tiny": 1e-20 * rng.normal(size=shape),
    }
    return values[kind].astype(np.float32)


KINDS = ["normal", "few values", "one value", "all zero", "one far away", "mostly ground", "tiny"]


@given(own=st.sampled_from(KINDS), other=st.sampled_from(KINDS), seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
@settings(max_examples=100, deadline=None)
def test_a_matched_histogram_is_that_of_numpy_s_interpolation(own: str, other: str, seed: int, shape: tuple[int, ...]) -> None:
    image, example = drawn(own, seed, shape), drawn(other, seed + 1, shape)
    tables = quantiles(image), quantiles(example)
    patch = torch.from_numpy(image)
    before = patch.clone()
    matched, expected = match_histogram(patch, *tables), interpolated(patch, *tables)
    assert matched.dtype == torch.float32
    # Rounding to float32 of a table whose values are as large as the example's.
    assert np.abs(matched.numpy() - expected).max() <= 2e-6 * max(np.abs(example).max(), 1e-30)
    assert torch.equal(patch, before)


def test_values_that_the_whole_image_does_not_hold_take_the_outermost() -> None:
    own, other = np.array([[0.0, 1.0, 2.0]], np.float32), np.array([[5.0, 6.0, 8.0]], np.float32)
    image = torch.tensor([[[-9.0, -1e-5, 0.0, 2.0, 2.5, 1e9]]])
    assert match_histogram(image, own, other).flatten().tolist() == [5, 5, 5, 8, 8, 8]


@pytest.mark.parametrize("passes", [0, 1, 8])
def test_a_search_begun_from_a_table_ends_where_one_from_nothing_does(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intensity, "MOST_PASSES", passes)
    knots = torch.from_numpy(np.unique(drawn("normal", 0, (257,))))
    # Also the knots themselves, and their neighbours on both sides.
    near = [torch.nextafter(knots, torch.tensor(limit)) for limit in (-torch.inf, torch.inf)]
    values = torch.cat([torch.from_numpy(drawn("normal", 1, (5000,))), knots, *near]).clamp(knots[0], knots[-1])
    expected = np.searchsorted(knots.numpy(), values.numpy(), side="right") - 1
    assert np.array_equal(intensity._last_below(knots, values).numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.6, 1.7])
def test_gamma_is_its_formula_with_torch_s_own_sd(shape: tuple[int, ...], gamma: float) -> None:
    image = torch.from_numpy(drawn("normal", 0, shape)) * 3 + 7
    before = image.clone()
    changed = Intensity(gamma=gamma).apply(image)
    assert torch.equal(image, before)
    for ours, channel in zip(changed.double(), image.double(), strict=True):
        low, high = channel.min(), channel.max()
        bent = ((channel - low) / (high - low)) ** gamma
        expected = (bent - bent.mean()) / bent.std() * channel.std() + channel.mean()
        assert (ours - expected).abs().max() < 2e-5


def test_gamma_of_one_voxel_is_that_voxel() -> None:
    assert Intensity(gamma=1.4).apply(torch.full((2, 1, 1), 3.0)).flatten().tolist() == [3.0, 3.0]


def test_noise_comes_from_the_processor_s_generator() -> None:
    image = torch.zeros(1, 20, 20)
    expected = 0.5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(99)
    assert torch.equal(Intensity(noise_sd=0.5, noise_seed=7).apply(image), expected)
