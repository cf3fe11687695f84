"""Losses: logits and labels -> one number; voxels labelled -1 change neither it nor its gradient.

B batch, K classes, S spatial axes. Logits are taken in any precision and summed in float32 (float64 stays what it is).
p is the probability of a class, p_t that of the true one, g the label as 0 or 1 for each class. Every sum runs over the
annotated voxels of the whole batch; what is not annotated may hold any finite logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.config import LossConfig
from microtome.errors import ConfigError

Activation = Literal["softmax", "sigmoid"]
# What makes sums over patches those over a batch of which they are a part.
Total = Callable[[Tensor], Tensor]

# Added above and below the line of a ratio of sums, in voxels.
SMOOTH = 1e-5
DEFAULT = LossConfig()


def cross_entropy(
    logits_BKS: Tensor,
    target_BS: Tensor,
    *,
    weights_K: Tensor | None = None,
    weight_BS: Tensor | None = None,
    activation: Activation = "softmax",
) -> Tensor:
    """`-sum(w log p_t) / sum(w)`, from 0 up, where w is `weights_K` of the true class times `weight_BS`; 0 where no w is above 0.

    U-Net's energy is the sum above the line (printed without the minus). It is divided by the sum of the weights (ours), so
    that a weight of 0 and a label of -1 are the same, and the learning rate depends neither on the patch nor on the scale
    of the weights. Without weights it is the mean over the annotated voxels.

    Args:
        logits_BKS: (B, K, *S).
        target_BS: labels from 0 to K - 1, or -1.
        weights_K: of each class, 0 or more; the 3D U-Net weighs a large background down.
        weight_BS: of each voxel, 0 or more: U-Net's border map.
        activation: "sigmoid" takes one sigmoid a class and scales them to a sum of 1, as Keras' sparse cross-entropy does with
            a head of sigmoids (that clips probabilities to 1e-7 before, this does not).

    References:
        Ronneberger et al. 2015, arXiv 1505.04597, section 3; Çiçek et al. 2016, arXiv 1606.06650 (second-hand).
    """
    return _cross_entropy(_Seen.of(logits_BKS, target_BS, activation), weights_K, weight_BS)


def focal(
    logits_BKS: Tensor,
    target_BS: Tensor,
    *,
    gamma: float = 2.0,
    weights_K: Tensor | None = None,
    weight_BS: Tensor | None = None,
    background: bool = True,
    activation: Activation = "softmax",
) -> Tensor:
    """`-sum(w (1 - p_t)^gamma log p_t) / sum(w)`, from 0 up: cross-entropy in which easy voxels weigh less; 0 where no w is above 0.

    `weights_K` is the paper's alpha. The paper divides by the number of boxes with an object in them; a segmentation has no
    boxes, so this is divided as `cross_entropy` is (ours), and is the same for a gamma of 0.

    Args:
        logits_BKS: (B, K, *S).
        target_BS: labels from 0 to K - 1, or -1.
        gamma: 0 or more.
        weights_K: of each class, 0 or more.
        weight_BS: of each voxel, 0 or more.
        background: whether voxels of the first class count.
        activation: as for `cross_entropy`.

    References:
        Lin et al. 2017, arXiv 1708.02002, equations 4 and 5.
    """
    return _focal(_Seen.of(logits_BKS, target_BS, activation), gamma, weights_K, weight_BS, background=background)


def soft_dice(
    logits_BKS: Tensor,
    target_BS: Tensor,
    smooth: float = SMOOTH,
    *,
    background: bool = True,
    activation: Activation = "softmax",
) -> Tensor:
    """`1 - mean over classes of (2 sum(p g) + smooth) / (sum p + sum g + smooth)`, in [0, 1].

    Classes that no annotated voxel of the batch holds are left out: sparse batches often lack one, and pressing an
    absent class to zero by Dice gives gradients without information (cross-entropy does that already). Where none is
    left it is 0. Without `background` the first class is left out.

    References:
        Drozdzal et al. 2016 (arXiv 1608.04117); the batch form is nnU-Net's (Isensee 2021).
    """
    return _soft_dice(_Seen.of(logits_BKS, target_BS, activation), smooth, background=background)


def vnet_dice(logits_BKS: Tensor, target_BS: Tensor, *, background: bool = True, activation: Activation = "softmax") -> Tensor:
    """`1 - mean over classes of D`, `D = 2 sum(p g) / (sum p^2 + sum g^2)`, in [0, 1]; absent classes as in `soft_dice`.

    V-Net maximises D of one class, the foreground: with two classes, `background=False` is its objective, and
    `dD/dp_j = 2 (g_j (sum p^2 + sum g^2) - 2 p_j sum(p g)) / (sum p^2 + sum g^2)^2` its gradient. As printed, nothing is
    added to either sum. The sums run over the batch here (ours); the authors' code adds up the D of each volume, and takes
    hard predictions in place of p in it.

    References:
        Milletari et al. 2016, arXiv 1606.04797, section 3.
    """
    return _vnet_dice(_Seen.of(logits_BKS, target_BS, activation), background=background)


def tversky(
    logits_BKS: Tensor,
    target_BS: Tensor,
    smooth: float = SMOOTH,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    background: bool = True,
    activation: Activation = "softmax",
) -> Tensor:
    """`1 - mean over classes of TP / (TP + alpha FP + beta FN)`, in [0, 1], for classes as in `soft_dice`.

    `TP = sum(p g)`, `FP = sum(p (1 - g))`, `FN = sum((1 - p) g)`; `smooth / 2` is added above and below the line, so that
    1/2 and 1/2 are `soft_dice` (the paper adds nothing); a larger beta finds more and is wrong more often. The paper has
    one class, the lesion: two classes and `background=False`.

    References:
        Salehi et al. 2017, arXiv 1706.05721, equation 3.
    """
    return _tversky(_Seen.of(logits_BKS, target_BS, activation), alpha, beta, smooth, background=background)


def level_weights(count: int, config: LossConfig = DEFAULT) -> tuple[float, ...]:
    """The weights of `count` supervised levels, finest first, with a sum of 1: 1, 1/2, 1/4, ... or those of the config.

    >>> [round(weight, 4) for weight in level_weights(5, LossConfig(level_weights=(1, 1 / 2, 1 / 4, 1 / 8, 0)))]
    [0.5333, 0.2667, 0.1333, 0.0667, 0.0]

    (those of nnU-Net, Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).

    Raises:
        ConfigError: the config has weights for another number of levels.
    """
    weights = config.level_weights or tuple(0.5**level for level in range(count))
    if len(weights) != count:
        do = "give one weight a supervised level, or none"
        raise ConfigError("loss.level_weights", expected=f"{count} values", got=f"{len(weights)}: {weights}", do=do, code="C033")
    return tuple(weight / sum(weights) for weight in weights)


def own_sums(sums: Tensor) -> Tensor:
    """The sums over patches that are the whole batch."""
    return sums


def segmentation_loss(
    outputs: Sequence[Tensor],
    target_BS: Tensor,
    config: LossConfig = DEFAULT,
    weight_BS: Tensor | None = None,
    *,
    total: Total = own_sums,
) -> Tensor:
    """The config's terms, weighed and added up, over supervised levels weighed by `level_weights`.

    A term or a level that weighs 0 is not computed.

    Args:
        outputs: logits of each supervised level, finest first, (B, K, *S / factor); all may be of full size.
        target_BS: labels on the finest grid; coarser levels see every n-th voxel of it.
        config: terms and their weights; `class_weights` go to the cross-entropy.
        weight_BS: on the same grid as the labels, for the cross-entropy and the focal loss, the two that add up voxels.
        total: where the patches are a part of a batch, makes their sums over voxels those of all of it. It is asked for each sum
            in turn, the same ones in the same order each time.

    Raises:
        ConfigError: the config has weights for another number of levels.
    """
    added = outputs[0].new_zeros((), dtype=torch.float32)
    for weight, logits_BKS in zip(level_weights(len(outputs), config), outputs, strict=True):
        if weight:
            shape = logits_BKS.shape[2:]
            level_weight_BS = None if weight_BS is None else _every_nth(weight_BS, shape)
            level = _terms(_Seen.of(logits_BKS, _every_nth(target_BS, shape), config.activation, total), config, level_weight_BS)
            added = added + weight * level
    return added


def _terms(seen: "_Seen", config: LossConfig, weight_BS: Tensor | None) -> Tensor:
    """The weighted sum of the terms of one level."""
    background = config.dice_background
    terms: list[Tensor] = []
    if config.cross_entropy:
        weights_K = seen.log_p.new_tensor(config.class_weights) if config.class_weights else None
        terms.append(config.cross_entropy * _cross_entropy(seen, weights_K, weight_BS))
    if config.dice:
        dice = _vnet_dice(seen, background=background) if config.dice_squares else _soft_dice(seen, SMOOTH, background=background)
        terms.append(config.dice * dice)
    if config.focal:
        terms.append(config.focal * _focal(seen, config.focal_gamma, None, weight_BS, background=background))
    if config.tversky:
        terms.append(config.tversky * _tversky(seen, config.tversky_alpha, config.tversky_beta, SMOOTH, background=background))
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class _Seen:
    """What the terms of one level share, so that the softmax and the labels' classes are computed once.

    Attributes:
        log_p: (B, K, *S) log-probabilities, at least float32.
        g: (B, K, *S) 1 at the true class of annotated voxels, 0 elsewhere.
        annotated: (B, *S) 1 or 0.
        total: makes sums over these patches those of the batch.
    """

    log_p: Tensor
    g: Tensor
    annotated: Tensor
    total: Total = own_sums

    @classmethod
    def of(cls, logits_BKS: Tensor, target_BS: Tensor, activation: Activation, total: Total = own_sums) -> Self:
        """Of a level's logits and the labels on its grid."""
        logits_BKS = logits_BKS if logits_BKS.dtype == torch.float64 else logits_BKS.float()
        # A softmax of log-sigmoids is the sigmoids over their sum, without their underflow.
        log_p_BKS = (F.logsigmoid(logits_BKS) if activation == "sigmoid" else logits_BKS).log_softmax(dim=1)
        # A label without an output would count as annotated and teach nothing; this check does not make the processor wait for a GPU.
        torch._assert_async(target_BS.amax() < logits_BKS.shape[1], f"a label is not among the {logits_BKS.shape[1]} classes")
        classes = torch.arange(logits_BKS.shape[1], device=target_BS.device).view(1, -1, *[1] * (target_BS.dim() - 1))
        g_BKS = (target_BS.unsqueeze(1) == classes).to(log_p_BKS.dtype)
        return cls(log_p_BKS, g_BKS, (target_BS >= 0).to(log_p_BKS.dtype), total)

    def probabilities(self) -> Tensor:
        """(B, K, *S) 0 where nothing is annotated."""
        return self.log_p.exp() * self.annotated.unsqueeze(1)

    def log_p_true(self) -> Tensor:
        """(B, *S) log-probability of the true class, 0 where nothing is annotated."""
        return (self.log_p * self.g).sum(dim=1)

    def sizes(self) -> Tensor:
        """(K,) `sum g` of each class, 1 for one that is absent: it is left out, but must not divide 0 by 0 before."""
        return self.class_sums(self.g).clamp(min=1)

    def class_sums(self, values_BKS: Tensor) -> Tensor:
        """(K,) a sum a class."""
        return self.total(values_BKS.sum([0, *range(2, values_BKS.dim())]))

    def mean(self, values_BS: Tensor, weights_BS: Tensor) -> Tensor:
        """The weighted mean; 0 where nothing has a weight."""
        above, below = self.total((values_BS * weights_BS).sum()), self.total(weights_BS.sum())
        return above / below.clamp(min=torch.finfo(torch.float32).tiny)

    def weights(self, weights_K: Tensor | None, weight_BS: Tensor | None) -> Tensor:
        """The weight of each voxel (B, *S), 0 where nothing is annotated."""
        total_BS = self.annotated
        if weights_K is not None:
            total_BS = (self.g * weights_K.view(1, -1, *[1] * (self.g.dim() - 2))).sum(dim=1)
        if weight_BS is not None:
            total_BS = total_BS * weight_BS.masked_fill(self.annotated == 0, 0)
        return total_BS

    def mean_of_present(self, ratio_K: Tensor, *, background: bool) -> Tensor:
        """The mean of `1 - ratio` over the classes that the batch holds; 0 if it holds none."""
        first = 0 if background else 1
        present_K = self.class_sums(self.g)[first:] > 0
        return (1 - ratio_K[first:]).masked_fill(~present_K, 0).sum() / present_K.sum().clamp(min=1)


def _cross_entropy(seen: _Seen, weights_K: Tensor | None, weight_BS: Tensor | None) -> Tensor:
    return seen.mean(-seen.log_p_true(), seen.weights(weights_K, weight_BS))


def _focal(seen: _Seen, gamma: float, weights_K: Tensor | None, weight_BS: Tensor | None, *, background: bool) -> Tensor:
    weights_BS, log_p_true_BS = seen.weights(weights_K, weight_BS), seen.log_p_true()
    if not background:
        weights_BS = weights_BS * (1 - seen.g[:, 0])
    # Kept off 0, where a power below 1 has an infinite slope.
    error_BS = (-torch.expm1(log_p_true_BS)).clamp(min=1e-7)
    return seen.mean(error_BS**gamma * -log_p_true_BS, weights_BS)


def _soft_dice(seen: _Seen, smooth: float, *, background: bool) -> Tensor:
    p_BKS = seen.probabilities()
    ratio_K = (2 * seen.class_sums(p_BKS * seen.g) + smooth) / (seen.class_sums(p_BKS) + seen.sizes() + smooth)
    return seen.mean_of_present(ratio_K, background=background)


def _vnet_dice(seen: _Seen, *, background: bool) -> Tensor:
    p_BKS = seen.probabilities()
    ratio_K = 2 * seen.class_sums(p_BKS * seen.g) / (seen.class_sums(p_BKS**2) + seen.sizes())
    return seen.mean_of_present(ratio_K, background=background)


def _tversky(seen: _Seen, alpha: float, beta: float, smooth: float, *, background: bool) -> Tensor:
    p_BKS = seen.probabilities()
    overlap_K = seen.class_sums(p_BKS * seen.g)
    false_positive_K, false_negative_K = seen.class_sums(p_BKS) - overlap_K, seen.sizes() - overlap_K
    above_K = 2 * overlap_K + smooth
    ratio_K = above_K / (above_K + 2 * alpha * false_positive_K + 2 * beta * false_negative_K)
    return seen.mean_of_present(ratio_K, background=background)


def _every_nth(values_BS: Tensor, shape: torch.Size) -> Tensor:
    """Labels or weights on a grid that is coarser by whole factors, taken at the middle of each block."""
    for axis, (size, new_size) in enumerate(zip(values_BS.shape[1:], shape, strict=True), start=1):
        if size != new_size:
            step = size // new_size
            index = torch.arange(new_size, device=values_BS.device) * step + step // 2
            values_BS = values_BS.index_select(axis, index)
    return values_BS
