"""Losses: logits and labels -> one number; voxels labelled -1 change neither it nor its gradient.

B batch, K classes, S spatial axes. Logits are taken in any precision and summed in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_BKS: Tensor, target_BS: Tensor) -> Tensor:
    """Mean over annotated voxels of -log softmax(logits)[target]; 0 where nothing is annotated.

    U-Net (Ronneberger 2015) section 3 without its weight map; the sign is the one that is minimised.
    """
    loss_BS = F.cross_entropy(logits_BKS.float(), target_BS.long(), ignore_index=-1, reduction="none")
    return loss_BS.sum() / (target_BS >= 0).sum().clamp(min=1)


def soft_dice(logits_BKS: Tensor, target_BS: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - mean over classes of 2 sum(p g) / (sum p + sum g), sums over the annotated voxels of the whole batch.

    Classes that no annotated voxel of the batch holds are left out: sparse batches often lack one, and pressing an
    absent class to zero by Dice gives gradients without information (cross-entropy does that already).

    References:
        Drozdzal et al. 2016 (arXiv 1608.04117); the batch form is nnU-Net's (Isensee 2021).
    """
    annotated_B1S = (target_BS >= 0).unsqueeze(1)
    p_BKS = logits_BKS.float().softmax(dim=1) * annotated_B1S
    classes = torch.arange(logits_BKS.shape[1], device=target_BS.device)
    g_BKS = (target_BS.unsqueeze(1) == classes.view(1, -1, *[1] * (target_BS.dim() - 1))).to(p_BKS.dtype)
    axes = [0, *range(2, p_BKS.dim())]
    overlap_K, total_p_K, total_g_K = (p_BKS * g_BKS).sum(axes), p_BKS.sum(axes), g_BKS.sum(axes)
    dice_K = (2 * overlap_K + smooth) / (total_p_K + total_g_K + smooth)
    present_K = (total_g_K > 0).to(dice_K.dtype)
    return ((1 - dice_K) * present_K).sum() / present_K.sum().clamp(min=1)


def segmentation_loss(outputs: Sequence[Tensor], target_BS: Tensor, dice_weight: float = 1.0) -> Tensor:
    """Cross-entropy + dice_weight x soft Dice, over decoder levels with weights 1, 1/2, 1/4, ... that sum to 1.

    Args:
        outputs: logits of each supervised level, finest first, (B, K, *S / factor).
        target_BS: labels on the finest grid; coarser levels see every n-th voxel of it.
        dice_weight: 0 leaves cross-entropy alone.
    """
    weights = [0.5**level for level in range(len(outputs))]
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for weight, logits_BKS in zip(weights, outputs, strict=True):
        level_target_BS = _every_nth(target_BS, logits_BKS.shape[2:])
        loss = cross_entropy(logits_BKS, level_target_BS)
        if dice_weight:
            loss = loss + dice_weight * soft_dice(logits_BKS, level_target_BS)
        total = total + weight / sum(weights) * loss
    return total


def _every_nth(target_BS: Tensor, shape: torch.Size) -> Tensor:
    """Labels on a grid that is coarser by whole factors, taken at the middle of each block."""
    for axis, (size, new_size) in enumerate(zip(target_BS.shape[1:], shape, strict=True), start=1):
        if size != new_size:
            step = size // new_size
            index = torch.arange(new_size, device=target_BS.device) * step + step // 2
            target_BS = target_BS.index_select(axis, index)
    return target_BS
