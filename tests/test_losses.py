"""The losses against numbers worked out by hand, a float64 oracle, and the promise that -1 teaches nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from microtome.training.losses import cross_entropy, segmentation_loss, soft_dice

# Two classes over four pixels in a row: class 1 is as likely as e^logit to 1.
LOGITS = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -math.log(3), 0.0]]])
TARGET = torch.tensor([[1, 0, 0, -1]], dtype=torch.int16)


def random_case(seed: int, shape: tuple[int, ...] = (2, 3, 4, 5), hidden: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K, *S) float32 and a target (B, *S) int16 with a share of -1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape) * 2
    target = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    target[rng.random(target.shape) < hidden] = -1
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target, dtype=torch.int16)


def oracle(logits: np.ndarray, target: np.ndarray, dice_weight: float) -> float:
    """Cross-entropy + Dice as the docstrings say them, voxel by voxel in float64."""
    classes = logits.shape[1]
    rows, truth = np.moveaxis(logits.astype(np.float64), 1, -1).reshape(-1, classes), target.reshape(-1)
    rows, truth = rows[truth >= 0], truth[truth >= 0]
    if not len(truth):
        return 0.0
    entropy = -np.mean([log_softmax(row)[k] for row, k in zip(rows, truth, strict=True)])
    p = softmax(rows, axis=1)
    dice = [(2 * p[truth == k, k].sum() + 1e-5) / (p[:, k].sum() + (truth == k).sum() + 1e-5) for k in range(classes) if (truth == k).any()]
    return float(entropy + dice_weight * (1 - np.mean(dice)))


def test_cross_entropy_is_the_mean_over_annotated_pixels() -> None:
    # p(truth) is 3/4 at the first, 1/2 at the second, 3/4 at the third; the fourth does not count.
    assert cross_entropy(LOGITS, TARGET).item() == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 2)) / 3, abs=1e-6)


def test_soft_dice_is_one_minus_the_mean_over_classes() -> None:
    # Class 1: p = 3/4, 1/2, 1/4, g = 1, 0, 0; class 0: p = 1/4, 1/2, 3/4, g = 0, 1, 1.
    one, zero = 2 * 0.75 / (1.5 + 1), 2 * 1.25 / (1.5 + 2)
    assert soft_dice(LOGITS, TARGET).item() == pytest.approx(1 - (one + zero) / 2, abs=1e-5)


def test_a_perfect_prediction_costs_nothing() -> None:
    target = torch.tensor([[[0, 1], [2, 1]]], dtype=torch.int16)
    logits = 50.0 * torch.nn.functional.one_hot(target.long(), 3).movedim(-1, 1)
    assert segmentation_loss([logits], target).item() == pytest.approx(0, abs=1e-5)


def test_a_class_that_the_batch_lacks_does_not_count_to_dice() -> None:
    logits, target = random_case(0, hidden=0)
    target[target == 2] = 1
    p = logits.softmax(1)
    present = [(2 * p[:, k][target == k].sum() + 1e-5) / (p[:, k].sum() + (target == k).sum() + 1e-5) for k in (0, 1)]
    assert soft_dice(logits, target).item() == pytest.approx(1 - sum(present).item() / 2, abs=1e-6)


def test_dice_sums_over_the_whole_batch_not_sample_by_sample() -> None:
    logits, target = random_case(1)
    halves = (soft_dice(logits[:1], target[:1]) + soft_dice(logits[1:], target[1:])) / 2
    joined = torch.cat([logits[:1], logits[1:]], dim=2), torch.cat([target[:1], target[1:]], dim=1)
    assert soft_dice(logits, target).item() == pytest.approx(soft_dice(*joined).item(), abs=1e-6)
    assert abs(soft_dice(logits, target).item() - halves.item()) > 1e-4


@given(
    seed=st.integers(0, 10**6), volume=st.booleans(), dice_weight=st.sampled_from([0.0, 0.5, 1.0]), hidden=st.sampled_from([0, 0.5, 0.95])
)
@settings(max_examples=25, deadline=None)
def test_the_loss_is_the_oracle_s(seed: int, volume: bool, dice_weight: float, hidden: float) -> None:
    logits, target = random_case(seed, (2, 3, 2, 3, 4) if volume else (2, 4, 5, 3), hidden)
    expected = oracle(logits.numpy(), target.numpy(), dice_weight)
    assert segmentation_loss([logits], target, dice_weight).item() == pytest.approx(expected, abs=2e-5)


def test_the_gradient_is_the_oracle_s_by_finite_differences() -> None:
    logits, target = random_case(2, (1, 3, 2, 3))
    logits.requires_grad_()
    segmentation_loss([logits], target, 0.7).backward()
    array, step = logits.detach().numpy().astype(np.float64), 1e-5
    for index in np.ndindex(array.shape):
        ends = []
        for sign in (1, -1):
            moved = array.copy()
            moved[index] += sign * step
            ends.append(oracle(moved, target.numpy(), 0.7))
        assert logits.grad is not None
        assert logits.grad[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)


@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100))
@settings(max_examples=20, deadline=None)
def test_logits_where_nothing_is_annotated_change_neither_loss_nor_gradient(seed: int, shift: float) -> None:
    fine, target = random_case(seed, (2, 3, 4, 4), 0.5)
    coarse, _ = random_case(seed + 1, (2, 3, 2, 2))
    target[0, 0, 0] = target[1, 1, 1] = -1
    # The coarser level sees the voxels at the odd places.
    hidden = [(part < 0).unsqueeze(1).expand(-1, 3, -1, -1) for part in (target, target[:, 1::2, 1::2])]
    levels = [logits.clone().requires_grad_() for logits in (fine, coarse)]
    moved = [
        torch.where(place, logits.flip(1) + shift, logits).requires_grad_() for place, logits in zip(hidden, (fine, coarse), strict=True)
    ]
    losses = [segmentation_loss(outputs, target) for outputs in (levels, moved)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for place, plain, other in zip(hidden, levels, moved, strict=True):
        assert plain.grad is not None
        assert other.grad is not None
        assert torch.equal(plain.grad, other.grad)
        assert torch.count_nonzero(plain.grad[place]) == 0
        assert torch.count_nonzero(plain.grad[~place]) > 0 or place.all()


def test_a_batch_without_annotation_teaches_nothing() -> None:
    logits, target = random_case(3)
    logits.requires_grad_()
    loss = segmentation_loss([logits], torch.full_like(target, -1))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 0


def test_levels_weigh_1_a_half_and_a_quarter_of_7_quarters() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int16)
    levels = [torch.zeros(1, 2, n, n) for n in (4, 2, 1)]
    # Logits of 0, a, b give a cross-entropy of log(1 + e^x) each.
    for x, level in zip((0.0, 1.0, 2.0), levels, strict=True):
        level[:, 1] = x
    terms = [math.log1p(math.exp(x)) for x in (0.0, 1.0, 2.0)]
    expected = (terms[0] + terms[1] / 2 + terms[2] / 4) / 1.75
    assert segmentation_loss(levels, target, dice_weight=0).item() == pytest.approx(expected, abs=1e-6)


def test_a_coarser_level_is_compared_with_the_middle_voxel_of_each_block() -> None:
    target = torch.full((1, 4, 6), -1, dtype=torch.int16)
    # Blocks of 2 x 3: their middles are rows 1 and 3, columns 1 and 4.
    target[0, 1, 1], target[0, 1, 4], target[0, 3, 1], target[0, 3, 4] = 0, 1, 1, 0
    coarse = torch.zeros(1, 2, 2, 2)
    coarse[0, 1, 0, 1] = coarse[0, 1, 1, 0] = 30
    coarse[0, 0, 0, 0] = coarse[0, 0, 1, 1] = 30
    fine = torch.zeros(1, 2, 4, 6)
    fine[0, 1] = torch.where(target[0] == 1, 30.0, -30.0)
    assert segmentation_loss([fine, coarse], target, dice_weight=0).item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss([fine, coarse.flip(1)], target, dice_weight=0).item() == pytest.approx(30 / 3, abs=1e-4)


def test_a_level_that_is_coarse_along_one_axis_only_fits() -> None:
    target = torch.randint(0, 2, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    level = torch.zeros(1, 2, 2, 2, 2)
    assert segmentation_loss([level], target, dice_weight=0).item() == pytest.approx(math.log(2), abs=1e-6)


def test_bf16_logits_are_summed_in_float32() -> None:
    # 40 000 equal terms: a sum in bfloat16 stops growing at 256 times a term.
    logits = torch.zeros(1, 2, 200, 200, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1, 200, 200, dtype=torch.int16)
    loss = segmentation_loss([logits], target, dice_weight=0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    loss = segmentation_loss([logits], torch.tensor([[1, 0]], dtype=torch.int16))
    loss.backward()
    assert loss.item() == pytest.approx(2e4 + 1, rel=1e-4)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
