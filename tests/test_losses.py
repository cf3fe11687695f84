"""The losses against numbers worked out by hand, a float64 oracle, and the promise that -1 teaches nothing."""

import math
from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax

from microtome.config import LossConfig
from microtome.errors import ConfigError
from microtome.training import losses
from microtome.training.losses import cross_entropy, focal, level_weights, segmentation_loss, soft_dice, tversky, vnet_dice

# Two classes over four pixels in a row: class 1 is as likely as e^logit to 1.
LOGITS = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -math.log(3), 0.0]]])
TARGET = torch.tensor([[1, 0, 0, -1]], dtype=torch.int16)
ENTROPY = LossConfig(dice=0)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Every loss, and every option of it that takes another path.
LOSSES: MappingProxyType[str, Loss] = MappingProxyType(
    {
        "cross_entropy": cross_entropy,
        "cross_entropy, sigmoid": partial(cross_entropy, activation="sigmoid"),
        "cross_entropy, class weights": lambda x, t: cross_entropy(x, t, weights_K=torch.tensor([0.25, 1, 3], dtype=x.dtype)),
        "cross_entropy, weight map": lambda x, t: cross_entropy(x, t, weight_BS=_map(t)),
        "focal": focal,
        "focal, gamma 1/2": partial(focal, gamma=0.5),
        "focal, weights": lambda x, t: focal(
            x, t, weights_K=torch.tensor([0.25, 1, 3], dtype=x.dtype), weight_BS=_map(t), background=False
        ),
        "soft_dice": soft_dice,
        "soft_dice, sigmoid": partial(soft_dice, activation="sigmoid"),
        "soft_dice, foreground": partial(soft_dice, background=False),
        "vnet_dice": vnet_dice,
        "vnet_dice, foreground": partial(vnet_dice, background=False),
        "tversky": tversky,
        "tversky, sigmoid foreground": partial(tversky, alpha=0.8, beta=0.1, background=False, activation="sigmoid"),
        "all terms": lambda x, t: segmentation_loss([x], t, LossConfig(focal=0.5, tversky=0.25, class_weights=(1, 2, 3)), _map(t)),
    }
)
REGIONS: MappingProxyType[str, Loss] = MappingProxyType({name: LOSSES[name] for name in ("soft_dice", "vnet_dice", "tversky")})


def _map(target: torch.Tensor) -> torch.Tensor:
    """A weight map: 1 to 3, another at each voxel."""
    return 1 + torch.arange(target.numel()).reshape(target.shape) % 7 / 3


def random_case(seed: int, shape: tuple[int, ...] = (2, 3, 4, 5), hidden: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K, *S) float32 and a target (B, *S) int16 with a share of -1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape) * 2
    target = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    target[rng.random(target.shape) < hidden] = -1
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target, dtype=torch.int16)


def gradient(loss: Loss, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss and its gradient by the logits."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def oracle(logits: np.ndarray, target: np.ndarray, config: LossConfig, weight: np.ndarray | None = None) -> float:
    """One level's loss as the docstrings say it, class by class over the annotated voxels in float64."""
    classes = logits.shape[1]
    rows, truth = np.moveaxis(logits.astype(np.float64), 1, -1).reshape(-1, classes), target.reshape(-1)
    w = (np.ones(len(truth)) if weight is None else weight.astype(np.float64).reshape(-1))[truth >= 0]
    rows, truth = rows[truth >= 0], truth[truth >= 0]
    if not len(truth):
        return 0.0
    sigmoids = expit(rows)
    p = sigmoids / sigmoids.sum(1, keepdims=True) if config.activation == "sigmoid" else np.exp(log_softmax(rows, axis=1))
    true = p[np.arange(len(truth)), truth]
    class_w = w * np.array(config.class_weights or (1,) * classes)[truth]
    counted = w * (truth > 0) if not config.dice_background else w
    total = config.cross_entropy * (class_w * -np.log(true)).sum() / class_w.sum()
    total += config.focal * (counted * (1 - true) ** config.focal_gamma * -np.log(true)).sum() / max(counted.sum(), 1e-30)
    dice, tversky_index = [], []
    for k in range(0 if config.dice_background else 1, classes):
        g = (truth == k).astype(np.float64)
        if g.any():
            below = (p[:, k] ** 2 + g**2 if config.dice_squares else p[:, k] + g).sum()
            smooth = 0 if config.dice_squares else 1e-5
            dice.append((2 * (p[:, k] * g).sum() + smooth) / (below + smooth))
            tp, fp, fn = (p[:, k] * g).sum() + 0.5e-5, (p[:, k] * (1 - g)).sum(), ((1 - p[:, k]) * g).sum()
            tversky_index.append(tp / (tp + config.tversky_alpha * fp + config.tversky_beta * fn))
    parts = ((config.dice, dice), (config.tversky, tversky_index))
    return float(total + sum(factor * (1 - np.mean(ratios)) for factor, ratios in parts if ratios))


CONFIGS = st.builds(
    LossConfig,
    cross_entropy=st.sampled_from([0.5, 1.0]),
    dice=st.sampled_from([0.0, 0.5, 1.0]),
    focal=st.sampled_from([0.0, 0.7]),
    tversky=st.sampled_from([0.0, 0.3]),
    activation=st.sampled_from(["softmax", "sigmoid"]),
    class_weights=st.sampled_from([(), (0.2, 1.0, 3.0)]),
    dice_squares=st.booleans(),
    dice_background=st.booleans(),
    focal_gamma=st.sampled_from([0.0, 0.5, 2.0]),
)


def test_cross_entropy_is_the_mean_over_annotated_pixels() -> None:
    # p(truth) is 3/4 at the first, 1/2 at the second, 3/4 at the third; the fourth does not count.
    assert cross_entropy(LOGITS, TARGET).item() == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 2)) / 3, abs=1e-6)


def test_weights_of_classes_and_voxels_multiply_and_are_divided_by_their_sum() -> None:
    # Class 1 weighs 3, class 0 weighs 1; the pixels 1, 2, 4 and, not annotated, 100: 3, 2 and 4 of 9.
    weights = torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 2.0, 4.0, 100.0]])
    expected = -(3 * math.log(3 / 4) + 2 * math.log(1 / 2) + 4 * math.log(3 / 4)) / 9
    assert cross_entropy(LOGITS, TARGET, weights_K=weights[0], weight_BS=weights[1]).item() == pytest.approx(expected, abs=1e-6)
    for scale in (10, 1e-3):
        found = cross_entropy(LOGITS, TARGET, weights_K=scale * weights[0], weight_BS=weights[1])
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_sigmoids_are_scaled_to_a_sum_of_1() -> None:
    # Sigmoids of 0 and log 3 are 1/2 and 3/4: probabilities 2/5 and 3/5.
    logits, target = torch.tensor([[[0.0], [math.log(3)]]]), torch.tensor([[1]], dtype=torch.int16)
    assert cross_entropy(logits, target, activation="sigmoid").item() == pytest.approx(-math.log(3 / 5), abs=1e-6)


def test_focal_weighs_each_pixel_by_its_error_squared() -> None:
    expected = -(2 * (1 / 4) ** 2 * math.log(3 / 4) + (1 / 2) ** 2 * math.log(1 / 2)) / 3
    assert focal(LOGITS, TARGET).item() == pytest.approx(expected, abs=1e-6)
    # Without the first class the first pixel alone is left.
    assert focal(LOGITS, TARGET, background=False).item() == pytest.approx(-((1 / 4) ** 2) * math.log(3 / 4), abs=1e-6)
    assert focal(LOGITS, TARGET, gamma=0).item() == cross_entropy(LOGITS, TARGET).item()


def test_soft_dice_is_one_minus_the_mean_over_classes() -> None:
    # Class 1: p = 3/4, 1/2, 1/4, g = 1, 0, 0; class 0: p = 1/4, 1/2, 3/4, g = 0, 1, 1.
    one, zero = 2 * 0.75 / (1.5 + 1), 2 * 1.25 / (1.5 + 2)
    assert soft_dice(LOGITS, TARGET).item() == pytest.approx(1 - (one + zero) / 2, abs=1e-5)
    assert soft_dice(LOGITS, TARGET, background=False).item() == pytest.approx(1 - one, abs=1e-5)


def test_vnet_dice_has_squares_below() -> None:
    # Squares of p of class 1 add up to 14/16.
    assert vnet_dice(LOGITS, TARGET, background=False).item() == pytest.approx(1 - 1.5 / (14 / 16 + 1), abs=1e-6)


def test_tversky_weighs_what_is_too_much_and_what_is_missing() -> None:
    # Class 1: 3/4 true, 3/4 too much, 1/4 missing.
    expected = 1 - 0.75 / (0.75 + 0.3 * 0.75 + 0.7 * 0.25)
    assert tversky(LOGITS, TARGET, background=False).item() == pytest.approx(expected, abs=1e-5)
    assert tversky(LOGITS, TARGET, alpha=0.5, beta=0.5).item() == pytest.approx(soft_dice(LOGITS, TARGET).item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_vnet_s_gradient_is_the_one_that_the_paper_prints(seed: int) -> None:
    logits, target = random_case(seed, (2, 2, 3, 4))
    logits = logits.double()
    seen, g = target >= 0, (target == 1).double()
    p = logits.softmax(1)[:, 1] * seen
    squares, overlap = (p**2).sum() + (g**2).sum(), (p * g).sum()
    printed = 2 * (g * squares - 2 * p * overlap) / squares**2
    _, found = gradient(partial(vnet_dice, background=False), logits, target)
    # Of two classes, dp / da is p (1 - p) for the logit of the second.
    assert torch.allclose(found[:, 1], -printed * p * (1 - p) * seen, rtol=1e-10, atol=1e-14)
    assert torch.count_nonzero(found) == 2 * seen.sum()


def test_a_perfect_prediction_costs_nothing() -> None:
    target = torch.tensor([[[0, 1], [2, 1]]], dtype=torch.int16)
    logits = 50.0 * torch.nn.functional.one_hot(target.long(), 3).movedim(-1, 1)
    for name in LOSSES.keys() - {name for name in LOSSES if "sigmoid" in name}:
        assert LOSSES[name](logits, target).item() == pytest.approx(0, abs=1e-5), name
    for name in (name for name in LOSSES if "sigmoid" in name):
        # A sigmoid of 0 is 1/2: only logits below 0 make a class unlikely.
        assert LOSSES[name](2 * logits - 50, target).item() == pytest.approx(0, abs=1e-5), name


def test_a_class_that_the_batch_lacks_does_not_count_to_dice() -> None:
    logits, target = random_case(0, hidden=0)
    target[target == 2] = 1
    p = logits.softmax(1)
    present = [(2 * p[:, k][target == k].sum() + 1e-5) / (p[:, k].sum() + (target == k).sum() + 1e-5) for k in (0, 1)]
    assert soft_dice(logits, target).item() == pytest.approx(1 - sum(present).item() / 2, abs=1e-6)


@pytest.mark.parametrize("name", REGIONS)
def test_a_class_that_is_neither_there_nor_predicted_gives_a_finite_gradient(name: str) -> None:
    logits, target = random_case(0, hidden=0)
    target[target == 2] = 1
    logits[:, 2] = -1e4
    loss = REGIONS[name] if name == "vnet_dice" else partial(REGIONS[name], smooth=0.0)
    value, slopes = gradient(loss, logits, target)
    assert 0 < value.item() < 1
    assert slopes.isfinite().all()
    assert torch.count_nonzero(slopes[:, :2]) > 0


def test_dice_sums_over_the_whole_batch_not_sample_by_sample() -> None:
    logits, target = random_case(1)
    halves = (soft_dice(logits[:1], target[:1]) + soft_dice(logits[1:], target[1:])) / 2
    joined = torch.cat([logits[:1], logits[1:]], dim=2), torch.cat([target[:1], target[1:]], dim=1)
    assert soft_dice(logits, target).item() == pytest.approx(soft_dice(*joined).item(), abs=1e-6)
    assert abs(soft_dice(logits, target).item() - halves.item()) > 1e-4


@given(
    seed=st.integers(0, 10**6),
    volume=st.booleans(),
    config=CONFIGS,
    hidden=st.sampled_from([0, 0.5, 0.95]),
    weighed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_loss_is_the_oracle_s(seed: int, volume: bool, config: LossConfig, hidden: float, weighed: bool) -> None:
    logits, target = random_case(seed, (2, 3, 2, 3, 4) if volume else (2, 3, 5, 3), hidden)
    weight = _map(target) if weighed else None
    expected = oracle(logits.numpy(), target.numpy(), config, None if weight is None else weight.numpy())
    assert segmentation_loss([logits], target, config, weight).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    for seed, shape in ((0, (2, 3, 2, 3)), (1, (1, 3, 2, 2, 2))):
        logits, target = random_case(seed, shape)
        assert (target < 0).any()
        assert torch.autograd.gradcheck(lambda x, t=target: LOSSES[name](x, t), logits.double().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100))
@settings(max_examples=10, deadline=None)
def test_logits_where_nothing_is_annotated_change_no_bit_of_loss_or_gradient(name: str, seed: int, shift: float) -> None:
    logits, target = random_case(seed, hidden=0.5)
    target[0, 0, 0] = -1
    hidden = (target < 0).unsqueeze(1).expand_as(logits)
    value, slopes = gradient(LOSSES[name], logits, target)
    other, other_slopes = gradient(LOSSES[name], torch.where(hidden, logits.flip(1) + shift * logits, logits), target)
    assert value.item() == other.item()
    assert torch.equal(slopes, other_slopes)
    assert torch.count_nonzero(slopes[hidden]) == 0
    assert torch.count_nonzero(slopes[~hidden]) > 0 or not (target > 0).any()


@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100))
@settings(max_examples=20, deadline=None)
def test_what_is_not_annotated_teaches_coarser_levels_nothing_either(seed: int, shift: float) -> None:
    fine, target = random_case(seed, (2, 3, 4, 4), 0.5)
    coarse, _ = random_case(seed + 1, (2, 3, 2, 2))
    target[0, 0, 0] = target[1, 1, 1] = -1
    # The coarser level sees the voxels at the odd places.
    hidden = [(part < 0).unsqueeze(1).expand(-1, 3, -1, -1) for part in (target, target[:, 1::2, 1::2])]
    levels = [logits.clone().requires_grad_() for logits in (fine, coarse)]
    moved = [
        torch.where(place, logits.flip(1) + shift, logits).requires_grad_() for place, logits in zip(hidden, (fine, coarse), strict=True)
    ]
    values = [segmentation_loss(outputs, target) for outputs in (levels, moved)]
    for value in values:
        value.backward()
    assert values[0].item() == values[1].item()
    for place, plain, other in zip(hidden, levels, moved, strict=True):
        assert plain.grad is not None
        assert other.grad is not None
        assert torch.equal(plain.grad, other.grad)
        assert torch.count_nonzero(plain.grad[place]) == 0
        assert torch.count_nonzero(plain.grad[~place]) > 0 or place.all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_annotation_teaches_nothing(name: str) -> None:
    logits, target = random_case(3)
    value, slopes = gradient(LOSSES[name], logits, torch.full_like(target, -1))
    assert value.item() == 0
    assert torch.count_nonzero(slopes) == 0


@pytest.mark.parametrize("name", ["soft_dice", "vnet_dice", "tversky", "focal"])
def test_without_background_a_batch_of_background_teaches_nothing(name: str) -> None:
    logits, target = random_case(3)
    value, slopes = gradient(partial(LOSSES[name], background=False), logits, torch.zeros_like(target))
    assert value.item() == 0
    assert torch.count_nonzero(slopes) == 0


@pytest.mark.parametrize("loss", [cross_entropy, focal])
def test_a_weight_of_0_is_the_same_as_not_annotated(loss: Callable[..., torch.Tensor]) -> None:
    logits, target = random_case(4)
    drop = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    dropped = gradient(loss, logits, torch.where(drop, -1, target).to(torch.int16))
    weightless = gradient(partial(loss, weight_BS=(~drop).float()), logits, target)
    assert 0 < (drop & (target >= 0)).sum() < (target >= 0).sum()
    assert dropped[0].item() == pytest.approx(weightless[0].item(), abs=1e-7)
    assert torch.allclose(dropped[1], weightless[1], atol=1e-8)


def test_a_weight_that_is_no_number_where_nothing_is_annotated_does_not_matter() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, math.nan]])
    assert cross_entropy(LOGITS, TARGET, weight_BS=weight).item() == cross_entropy(LOGITS, TARGET).item()


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not among the 2 classes"):
        cross_entropy(LOGITS, torch.full_like(TARGET, 2))


def test_levels_weigh_1_a_half_and_a_quarter_of_7_quarters() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int16)
    levels = [torch.zeros(1, 2, n, n) for n in (4, 2, 1)]
    # Logits of 0, a, b give a cross-entropy of log(1 + e^x) each.
    for x, level in zip((0.0, 1.0, 2.0), levels, strict=True):
        level[:, 1] = x
    terms = [math.log1p(math.exp(x)) for x in (0.0, 1.0, 2.0)]
    expected = (terms[0] + terms[1] / 2 + terms[2] / 4) / 1.75
    assert segmentation_loss(levels, target, ENTROPY).item() == pytest.approx(expected, abs=1e-6)


def test_level_weights_of_nnunet_leave_out_the_coarsest() -> None:
    config = LossConfig(level_weights=(1, 1 / 2, 1 / 4, 1 / 8, 0))
    assert level_weights(5, config) == pytest.approx((0.5333, 0.2667, 0.1333, 0.0667, 0), abs=5e-5)
    assert level_weights(1) == (1,)
    target = torch.zeros(1, 16, 16, dtype=torch.int16)
    levels = [torch.zeros(1, 2, n, n, requires_grad=True) for n in (16, 8, 4, 2, 1)]
    segmentation_loss(levels, target, config).backward()
    assert [level.grad is not None for level in levels] == [True] * 4 + [False]


def test_weights_for_another_number_of_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected 3 values, got 2: \(1\.0, 0\.5\)"):
        level_weights(3, LossConfig(level_weights=(1, 0.5)))


def test_outputs_may_all_be_of_full_size() -> None:
    logits, target = random_case(5)
    others = [random_case(seed)[0] for seed in (6, 7)]
    config = LossConfig(level_weights=(1, 1, 2))
    single = [segmentation_loss([each], target).item() for each in (logits, *others)]
    expected = (single[0] + single[1] + 2 * single[2]) / 4
    assert segmentation_loss([logits, *others], target, config).item() == pytest.approx(expected, abs=1e-6)


def test_a_term_that_weighs_0_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = random_case(8)
    names = {"cross_entropy": cross_entropy, "dice": soft_dice, "focal": focal, "tversky": tversky}
    for only, loss in names.items():
        with monkeypatch.context() as patch:
            for name in ("cross_entropy", "soft_dice", "vnet_dice", "focal", "tversky"):
                if name.removeprefix("soft_") != only:
                    patch.delattr(losses, f"_{name}")
            config = LossConfig(**{name: float(name == only) for name in names})
            found = segmentation_loss([logits], target, config).item()
        assert found == loss(logits, target).item()


def test_a_coarser_level_is_compared_with_the_middle_voxel_of_each_block() -> None:
    target = torch.full((1, 4, 6), -1, dtype=torch.int16)
    # Blocks of 2 x 3: their middles are rows 1 and 3, columns 1 and 4.
    target[0, 1, 1], target[0, 1, 4], target[0, 3, 1], target[0, 3, 4] = 0, 1, 1, 0
    coarse = torch.zeros(1, 2, 2, 2)
    coarse[0, 1, 0, 1] = coarse[0, 1, 1, 0] = 30
    coarse[0, 0, 0, 0] = coarse[0, 0, 1, 1] = 30
    fine = torch.zeros(1, 2, 4, 6)
    fine[0, 1] = torch.where(target[0] == 1, 30.0, -30.0)
    assert segmentation_loss([fine, coarse], target, ENTROPY).item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss([fine, coarse.flip(1)], target, ENTROPY).item() == pytest.approx(30 / 3, abs=1e-4)


def test_a_coarser_level_takes_the_weight_of_the_voxel_whose_label_it_takes() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int16)
    coarse = torch.zeros(1, 2, 2, 2)
    coarse[0, 1, 0, 0] = 3.0
    weight = torch.zeros(1, 4, 4)
    weight[0, 1, 1], weight[0, 1, 3] = 2.0, 1.0
    expected = (2 * math.log1p(math.exp(3)) + math.log(2)) / 3
    assert segmentation_loss([coarse], target, ENTROPY, weight).item() == pytest.approx(expected, abs=1e-6)


def test_a_level_that_is_coarse_along_one_axis_only_fits() -> None:
    target = torch.randint(0, 2, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    level = torch.zeros(1, 2, 2, 2, 2)
    assert segmentation_loss([level], target, ENTROPY).item() == pytest.approx(math.log(2), abs=1e-6)


def test_bf16_logits_are_summed_in_float32() -> None:
    # 40 000 equal terms: a sum in bfloat16 stops growing at 256 times a term.
    logits = torch.zeros(1, 2, 200, 200, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1, 200, 200, dtype=torch.int16)
    loss = segmentation_loss([logits], target, ENTROPY)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_and_fp16_logits_give_what_the_same_numbers_give_in_float32(name: str) -> None:
    logits, target = random_case(9)
    for dtype in (torch.bfloat16, torch.float16):
        assert LOSSES[name](logits.to(dtype), target).item() == LOSSES[name](logits.to(dtype).float(), target).item()


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4]]])
    value, slopes = gradient(LOSSES[name], logits, torch.tensor([[1, 0]], dtype=torch.int16))
    # Wrong everywhere, by 2e4 (sigmoids: by half of it): all that a Dice can lose.
    assert value.item() > 0.99
    assert value.isfinite()
    assert slopes.isfinite().all()


def test_the_loss_of_large_logits_is_their_difference() -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]])
    assert segmentation_loss([logits], torch.tensor([[1, 0]], dtype=torch.int16)).item() == pytest.approx(2e4 + 1, rel=1e-4)
