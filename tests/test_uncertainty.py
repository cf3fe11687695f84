"""Probabilities, entropy, disagreement and bytes against SciPy and the slow obvious sums; the spread of an engine's passes."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from microtome.geometry import Spacing
from microtome.inference import uncertainty
from microtome.inference.averaging import with_entropy
from microtome.inference.mirroring import TTA, Engine, Mirrored, with_spread
from microtome.inference.torch_engine import TorchEngine
from microtome.inference.uncertainty import disagreement, entropy, probabilities, to_uint8
from tests.small import one_thread

__all__ = ["one_thread"]

SHAPES = st.sampled_from([(7,), (3, 5), (1, 1), (2, 9, 11), (4, 3, 2, 5), (0, 4)])


def logits_of(seed: int, classes: int, shape: tuple[int, ...], scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(classes, *shape))).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), SHAPES, st.floats(0.05, 20), st.integers(1, 40))
def test_probabilities_and_entropy_are_scipys_however_they_are_cut(
    seed: int, classes: int, shape: tuple[int, ...], temperature: float, piece: int
) -> None:
    logits = logits_of(seed, classes, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "PIECE_VALUES", piece)
        chances = probabilities(logits, temperature)
        unsure = entropy(chances)
        steps = to_uint8(chances)
    expected = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=0)
    np.testing.assert_allclose(chances, expected, rtol=0, atol=2e-6)
    assert (chances.dtype, unsure.dtype, steps.dtype) == (np.float32, np.float32, np.uint8)
    assert (chances.shape, unsure.shape) == (logits.shape, logits.shape[1:])
    if classes > 1:
        np.testing.assert_allclose(unsure, scipy.stats.entropy(expected, axis=0) / math.log(classes), rtol=0, atol=3e-6)
    assert not unsure.size or (unsure.min() >= 0 and unsure.max() <= 1)
    assert not steps.size or np.abs(steps / 255 - chances).max() <= 1 / 510 + 1e-7


def test_large_volumes_are_cut_inside_of_a_row_too() -> None:
    logits = logits_of(0, 3, (2, 300, 400))
    assert math.prod(logits.shape[2:]) > uncertainty.PIECE_VALUES
    np.testing.assert_allclose(probabilities(logits), scipy.special.softmax(logits, axis=0), rtol=0, atol=1e-6)


def test_a_view_of_a_ring_of_rows_and_other_types_are_read_as_they_are() -> None:
    ring = logits_of(1, 4, (10, 6, 8))
    view = ring[:, 3:7, ::2]
    before = ring.copy()
    np.testing.assert_allclose(probabilities(view), scipy.special.softmax(view, axis=0), rtol=0, atol=1e-6)
    assert np.array_equal(ring, before)
    for kind in (np.float64, np.float16):
        assert probabilities(view.astype(kind)).dtype == np.float32
        np.testing.assert_allclose(probabilities(view.astype(kind)), probabilities(view), rtol=0, atol=5e-3)


def test_logits_of_any_size_give_numbers() -> None:
    logits = np.array([[1e30, -1e30, 500, 0], [-1e30, -1e30, 499, 0]], np.float32)
    chances = probabilities(logits, 0.5)
    np.testing.assert_allclose(chances[:, :2], [[1, 0.5], [0, 0.5]])
    np.testing.assert_allclose(chances[0, 2], 1 / (1 + math.exp(-2)), rtol=1e-6)
    assert np.array_equal(entropy(chances)[:2], [0, 1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"above 0 was expected, got {temperature}"):
        probabilities(np.zeros((2, 3), np.float32), temperature)


def test_entropy_by_hand() -> None:
    chances = np.array([[1.0, 0.5, 0.25, 0.0], [0.0, 0.5, 0.25, 0.5], [0.0, 0.0, 0.25, 0.5], [0.0, 0.0, 0.25, 0.0]], np.float32)
    np.testing.assert_allclose(entropy(chances), [0, 0.5, 1, 0.5], atol=1e-6)
    assert np.array_equal(entropy(np.ones((1, 5), np.float32)), np.zeros(5))


def test_bytes_are_exact_at_both_ends_and_back_from_a_byte() -> None:
    assert to_uint8(np.array([0.0, 1.0, 0.5, 1 + 1e-6, -1e-7], np.float32)).tolist() == [0, 255, 128, 255, 0]
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_uint8(every.astype(np.float32) / 255), every)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 8))
def test_disagreement_is_the_mutual_information_of_class_and_pass(seed: int, classes: int, passes: int) -> None:
    each_PKS = scipy.special.softmax(np.random.default_rng(seed).normal(0, 3, (passes, classes, 6, 5)), axis=1)
    mean_KS = each_PKS.mean(axis=0)
    # Of the joint distribution of pass and class: the sum of p log(p / (p of the pass, p of the class)).
    joint = each_PKS / passes
    expected = (joint * np.log(joint / (mean_KS / passes))).sum(axis=(0, 1)) / math.log(classes)
    entropies = np.mean([entropy(chances) for chances in each_PKS.astype(np.float32)], axis=0)
    found = disagreement(mean_KS.astype(np.float32), entropies)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
    assert found.min() >= 0


def test_disagreement_of_opposite_passes_is_1_of_like_ones_0_and_never_below() -> None:
    half, sure = np.full((2, 3), 0.5, np.float32), np.zeros(3, np.float32)
    assert np.array_equal(disagreement(half, sure), np.ones(3))
    assert np.array_equal(disagreement(half, np.ones(3, np.float32)), np.zeros(3))
    assert np.array_equal(disagreement(half, np.full(3, 1.0001, np.float32)), np.zeros(3))


# ---- the spread of an engine's passes ----


class Sloping:
    """An engine whose answer depends on where a voxel lies, so that mirrored passes differ."""

    name = "sloping"

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        columns = np.arange(image_CS.shape[-1], dtype=np.float32) / 3
        return np.stack([image_CS[0], -image_CS[0] * columns, image_CS[0] + columns])

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> Engine:
        return Mirrored(self, mirror_axes) if tta == "mirror" else self


def by_hand(engine: Engine, image_CS: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over mirrored passes of the entropy of each, pass by pass."""
    maps = []
    for flips in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)):
        along = tuple(axis + 1 for axis in flips)
        logits = np.flip(engine(np.ascontiguousarray(np.flip(image_CS, along))), along)
        maps.append(scipy.stats.entropy(scipy.special.softmax(logits.astype(np.float64), axis=0), axis=0) / math.log(len(logits)))
    return np.mean(maps, axis=0)


@pytest.mark.parametrize("axes", [(), (1,), (0, 1), (0, 1, 2)])
def test_a_mirrored_engine_gives_its_logits_and_the_mean_entropy_of_its_passes(axes: tuple[int, ...]) -> None:
    image = logits_of(2, 1, (5, 6, 7) if len(axes) == 3 else (6, 7), 1.0)
    plain = Sloping().averaged("mirror" if axes else "none", axes, (1.0, 1.0))
    asked = with_spread(plain)
    answer = asked(image)
    assert answer.shape == (4, *image.shape[1:])
    np.testing.assert_array_equal(answer[:3], plain(image))
    np.testing.assert_allclose(answer[3], by_hand(Sloping(), image, axes), rtol=0, atol=2e-6)
    assert asked.name == "sloping"
    # The layer stays when the engine is averaged otherwise, and comes in any order.
    np.testing.assert_array_equal(
        with_spread(Sloping()).averaged("mirror", axes, (1.0, 1.0))(image), Mirrored(with_spread(Sloping()), axes)(image)
    )
    np.testing.assert_array_equal(asked.averaged("none", (), (1.0, 1.0))(image), with_spread(Sloping())(image))


class Uneven(nn.Module):
    """A convolution that is not alike in a mirror, with a border if asked."""

    def __init__(self, context_vox: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.context_vox = context_vox
        self.layer = nn.Conv2d(1, 3, 3, padding=1 - context_vox)
        self.requires_grad_(False)

    def forward(self, image_BCS: Tensor) -> Tensor:
        result: Tensor = 4 * self.layer(image_BCS)
        return result

    def nearest_sizes(self, n: int, axis: int) -> tuple[int, int]:
        return n, n


def engine_of(network: nn.Module, tta: TTA = "none", axes: tuple[int, ...] = ()) -> TorchEngine:
    return TorchEngine(network=network, device=torch.device("cpu"), tta=tta, mirror_axes=axes)  # type: ignore[arg-type]


@pytest.mark.parametrize("context_vox", [0, 1])
@pytest.mark.parametrize("axes", [(), (0,), (0, 1)])
def test_torch_gives_what_numpy_gives(axes: tuple[int, ...], context_vox: int) -> None:
    image, network = logits_of(3, 1, (9, 12), 1.0), Uneven(context_vox)
    plain = engine_of(network, "mirror", axes)
    answer = with_spread(plain)(image)
    np.testing.assert_array_equal(answer[:3], plain(image))
    np.testing.assert_allclose(answer, Mirrored(with_spread(engine_of(network)), axes)(image), rtol=0, atol=2e-6)
    np.testing.assert_allclose(answer[3], by_hand(engine_of(network), image, axes), rtol=0, atol=2e-6)
    # What it is averaged over may change, the layer stays.
    np.testing.assert_array_equal(with_spread(engine_of(network)).averaged("mirror", axes, (1.0, 1.0))(image), answer)


def test_rotations_have_the_layer_too() -> None:
    image, network = logits_of(4, 1, (9, 12), 1.0), Uneven()
    plain = engine_of(network, "rotations")
    answer = with_spread(plain)(image)
    np.testing.assert_array_equal(answer[:3], plain(image))
    single = with_spread(engine_of(network))(image)[3]
    assert 0 <= answer[3].min() <= answer[3].max() <= 1
    assert np.abs(answer[3] - single).max() > 0.01


def test_entropy_in_torch_is_a_number_for_sure_rounded_and_single_class_answers() -> None:
    sure = torch.tensor([[[200.0, -200.0, 0.0]], [[-200.0, 200.0, 0.0]]])[None]
    assert torch.equal(with_entropy(lambda x: x)(sure)[0, 2], torch.tensor([[0.0, 0.0, 1.0]]))
    rounded = with_entropy(lambda x: x.bfloat16())(sure)
    assert rounded.dtype == torch.float32
    assert torch.equal(with_entropy(lambda x: x)(torch.zeros(1, 1, 2, 2))[:, 1], torch.zeros(1, 2, 2))


def test_blending_is_linear_so_the_layer_of_two_halves_is_that_of_the_whole() -> None:
    image, network = logits_of(5, 1, (8, 8), 1.0), Uneven(1)
    asked = with_spread(engine_of(network, "mirror", (0,)))
    whole = asked(image)
    np.testing.assert_allclose(np.concatenate([asked(image[..., :5]), asked(image[..., 3:])], axis=-1), whole, rtol=0, atol=1e-6)
