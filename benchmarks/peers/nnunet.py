"""nnU-Net's own network with our weights, its folder of a trained model, and a training step as its trainer makes it on a CPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from benchmarks.cases import SETTINGS, Setting, built, case
from benchmarks.timing import timed
from microtome.models.blocks import InstanceNorm
from microtome.models.network import Network
from microtome.nnunet_rules import level_widths

LEVELS = 6
ARCHITECTURE: dict[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": LEVELS,
        "features_per_stage": list(level_widths(LEVELS, 3)),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * LEVELS,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (LEVELS - 1)],
        "n_conv_per_stage": [2] * LEVELS,
        "n_conv_per_stage_decoder": [2] * (LEVELS - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def their_network(classes: int, *, deep_supervision: bool) -> nn.Module:
    """PlainConvUNet as nnU-Net builds it from a plans file."""
    keywords, imported = ARCHITECTURE["arch_kwargs"], ARCHITECTURE["_kw_requires_import"]
    made: nn.Module = get_network_from_plans(
        ARCHITECTURE["network_class_name"], keywords, imported, 1, classes, deep_supervision=deep_supervision
    )
    return made


def our_layers(network: Network) -> Iterator[nn.Module]:
    """Convolutions and norms of `nnunet_plain` in nnU-Net's order: encoder, then decoder, up-convolutions, heads, from the bottom up."""
    parts = [network.encoder, *(reversed(getattr(network, name)) for name in ("decoder", "up", "heads"))]
    for part in parts:
        for block in part:
            yield from (module for module in block.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | InstanceNorm))


def their_layers(network: nn.Module) -> Iterator[nn.Module]:
    """The same of PlainConvUNet, each once: its blocks hold their layers under several names."""
    seen: set[int] = set()
    decoder = network.decoder
    for part in (network.encoder.stages, decoder.stages, decoder.transpconvs, decoder.seg_layers):  # type: ignore[union-attr]
        for module in part.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.InstanceNorm3d) and id(module) not in seen:
                seen.add(id(module))
                yield module


def with_our_weights(theirs: nn.Module, ours: Network) -> nn.Module:
    """Copy parameter for parameter; every shape must fit."""
    pairs = zip(their_layers(theirs), our_layers(ours), strict=True)
    with torch.no_grad():
        for target, source in pairs:
            for name in ("weight", "bias"):
                a, b = getattr(target, name), getattr(source, name)
                if a.shape != b.shape:
                    raise ValueError(f"{type(target).__name__}: {tuple(a.shape)} here, {tuple(b.shape)} in ours")
                a.copy_(b)
    return theirs.eval()


def largest_difference(theirs: nn.Module, ours: Network, shape_vox: tuple[int, ...]) -> float:
    """Of the logits of both on random numbers."""
    image_BCS = torch.randn(1, 1, *shape_vox, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float((theirs(image_BCS) - ours(image_BCS)).abs().max())


def write_model_folder(folder: Path, network: nn.Module, classes: int, patch_vox: tuple[int, ...]) -> None:
    """What `nnUNetv2_predict_from_modelfolder` reads: plans.json, dataset.json, fold_0/checkpoint_final.pth."""
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    labels = {"background": 0, **{f"class{k}": k for k in range(1, classes)}}
    dataset = {"channel_names": {"0": "blobs"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "plans.json").write_text(json.dumps(plans(patch_vox)))
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def plans(patch_vox: tuple[int, ...]) -> dict[str, Any]:
    """A plans file with nnU-Net's defaults for isotropic volumes of 1 mm."""
    how = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_vox),
        "median_image_size_in_voxels": [128.0, 205.0, 205.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **how},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **how},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **how},
        "architecture": ARCHITECTURE,
        "batch_dice": False,
    }
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    return {
        "dataset_name": "Dataset001_Blobs",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [0.8, 0.8, 0.8],
        "original_median_shape_after_transp": [160, 256, 256],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": statistics},
    }


def their_step(name: str) -> dict[str, Any]:
    """Time a training step as nnUNetTrainer.train_step makes it on a CPU: float32, deep supervision, SGD, gradients clipped at 12."""
    setting = SETTINGS[name]
    network = their_network(setting.classes, deep_supervision=True).train()
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    weights = np.array([1 / 2**i for i in range(LEVELS - 1)])
    weights[-1] = 0
    loss = DeepSupervisionWrapper(loss, weights / weights.sum())
    optimiser = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    image, label = case(setting)
    data = torch.from_numpy(image)[None]
    full = torch.from_numpy(label.astype(np.float32))[None, None]
    targets = [full[:, :, :: 2**i, :: 2**i, :: 2**i] for i in range(LEVELS - 1)]

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss(network(data), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimiser.step()

    answer: dict[str, Any] = timed(step, budget_seconds=3, most=3)
    return answer


def fresh_pair(setting: Setting) -> tuple[nn.Module, Network]:
    """Both networks with the same new weights."""
    ours = built(setting).eval()
    return with_our_weights(their_network(setting.classes, deep_supervision=False), ours), ours
