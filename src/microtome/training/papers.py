"""What each paper's training set: a drafted plan -> values of the plan, each with its source.

A reason names the place in the paper (or the blog's article, or the authors' code) where the value stands, or begins with
"ours:" where the source leaves it open or where it is known second-hand only.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.config import AugmentConfig, LossConfig, NetworkConfig, NormalisationConfig, OptimiserConfig, Plan
from microtome.errors import ConfigError
from microtome.fingerprint import Fingerprint
from microtome.geometry import Shape, Spacing, format_shape, resampled_shape
from microtome.nnunet_rules import BUDGETS, Topology, batch_size, plan_patch
from microtome.step_memory import FULL_SHARE, Resources, fit_patch, patch_bytes

# Value and reason of each field of the plan that a recipe sets.
Lines = Mapping[str, tuple[Any, str]]
# Grey-value changes that the papers name without numbers.
GREY = MappingProxyType({"contrast_p": 0.5, "brightness_p": 0.5})
OFF = MappingProxyType({"contrast_p": 0.0, "brightness_p": 0.0, "gamma_p": 0.0, "noise_p": 0.0, "blur_p": 0.0, "low_resolution_p": 0.0})
STILL = MappingProxyType({"rotation_p": 0.0, "scale_p": 0.0, "elastic_p": 0.0})
# V-Net's voxel, Z Y X; images of another scale than the body's keep their own.
VNET_SPACING_MM = (1.5, 1.0, 1.0)
BODY_SCALE = 4.0


def unet2015(draft: Plan, data: Fingerprint, resources: Resources) -> Lines:
    """Ronneberger 2015, section 3."""
    shape = data.shape_vox[-2:]
    network = NetworkConfig(name="unet")
    patch = _patch(tuple(min(388, n) for n in shape), (572, 572), network, (draft, data, resources))
    augment = AugmentConfig(
        rotation_deg=(180.0,),
        rotation_p=1.0,
        scale_p=0.0,
        elastic_points=(3, 3),
        elastic_sd=tuple(10 * n / 572 for n in patch),
        elastic_kind="bicubic",
        elastic_p=1.0,
        **OFF | GREY,
    )
    loss = LossConfig(dice=0, border_weight=10, border_sigma=5, balance_classes=True)
    optimiser = OptimiserConfig(name="sgd", learning_rate=3e-4, momentum=0.99, nesterov=False, weight_decay=0, clip_norm=1, averaging=0)
    return {
        "network": (
            network,
            "paper, Fig. 1: 23 convolutions without padding; section 3.1: dropout at the end of the contracting path; ours: by 0.5",
        ),
        "spacing_mm": (data.spacing_mm, "ours: the images' own pixels, as the paper resizes nothing"),
        "normalisation": (NormalisationConfig(), "ours: each image to mean 0 and sd 1; the paper does not say"),
        "patch_vox": (patch, "paper, Fig. 1: 572 × 572, a large tile rather than a large batch; smaller where images are"),
        "batch": (1, "paper, section 3: one image"),
        "foreground": (0.0, "ours: tiles anywhere, as rare classes weigh more in the loss"),
        "loss": (
            loss,
            "paper, equations 1 and 2: cross-entropy, w0 = 10, sigma = 5 pixels; ours: the form of the class balance, border weights on "
            "background only, and a mean over the pixels instead of a sum",
        ),
        "augment": (
            augment,
            "paper, section 3.1: displacements on a 3 × 3 grid, sd 10 pixels, bicubic; rotation; grey values; "
            "ours: less in a tile smaller than 572, all angles, and by how much grey values change",
        ),
        "optimiser": (
            optimiser,
            "paper, section 3: stochastic gradient descent, momentum 0.99; ours: rate 0.0003 falling to 0, gradients shortened to 1",
        ),
        "warmup": (20, "ours: the paper does not say"),
    }


def unet3d2016(draft: Plan, data: Fingerprint, resources: Resources) -> Lines:
    """Çiçek 2016, sections 2 and 3; much of it is known second-hand only."""
    network = NetworkConfig(name="unet3d", batch_statistics=True)
    shape = resampled_shape(data.shape_vox, data.spacing_mm, draft.spacing_mm)
    patch = _patch(tuple(min(a, b) for a, b in zip((28, 44, 44), shape, strict=True)), (116, 132, 132), network, (draft, data, resources))
    finest = min(draft.spacing_mm)
    augment = draft.augment.model_copy(
        update={
            "flip_axes": (),
            "rotation_p": 0.5,
            "scale_p": 0.5,
            "elastic_spacing": tuple(32 * finest / size for size in draft.spacing_mm),
            "elastic_sd": tuple(4 * finest / size for size in draft.spacing_mm),
            "elastic_p": 1.0,
            **OFF,
            **GREY,
        }
    )
    optimiser = OptimiserConfig(name="sgd", learning_rate=5e-3, momentum=0.9, nesterov=False, weight_decay=0, averaging=0)
    return {
        "network": (
            network,
            "ours: Fig. 2 with batch norm, whose statistics at prediction are of what it sees (second-hand)",
        ),
        "patch_vox": (patch, "ours: 132 × 132 × 116 voxels (second-hand), smaller where volumes are"),
        "batch": (1, "ours: one volume (second-hand)"),
        "loss": (LossConfig(dice=0), "ours: softmax with weight 0 where not annotated; the paper's class weights are not known"),
        "augment": (
            augment,
            "ours: displacements of sd 4 on a grid of 32 voxels by B-splines, rotation, scaling and grey values (second-hand); counted in "
            "voxels of the finest axis, and how much volumes are turned, scaled and changed in grey values, is not known",
        ),
        "optimiser": (
            optimiser,
            "ours: stochastic gradient descent (second-hand, 70,000 steps), rate 0.005 and momentum 0.9, which are not known; "
            "gradients shortened to 12",
        ),
    }


def vnet2016(draft: Plan, data: Fingerprint, resources: Resources) -> Lines:
    """Milletari 2016, sections 3 and 4, and the authors' released settings."""
    network = NetworkConfig(name="vnet")
    body = data.spacing_known and all(
        1 / BODY_SCALE <= own / paper <= BODY_SCALE for own, paper in zip(data.spacing_mm, VNET_SPACING_MM, strict=True)
    )
    spacing: Spacing = VNET_SPACING_MM if body else data.spacing_mm
    why = "paper, section 4: 1 × 1 × 1.5 mm" if body else "ours: the images' own voxels, which are not of the body's scale"
    shape = resampled_shape(data.shape_vox, data.spacing_mm, spacing)
    # Two volumes have to fit.
    half = replace(resources, memory_bytes=resources.memory_bytes // 2)
    patch = _patch(tuple(min(a, b) for a, b in zip((64, 128, 128), shape, strict=True)), (64, 128, 128), network, (draft, data, half))
    augment = AugmentConfig(
        elastic_points=(2, 2, 2),
        elastic_sd=tuple(15 * n / size for n, size in zip(patch, (64, 128, 128), strict=True)),
        histogram_p=1.0,
        **OFF | STILL | {"elastic_p": 1.0},
    )
    optimiser = OptimiserConfig(
        name="sgd",
        learning_rate=1e-4,
        momentum=0.99,
        nesterov=False,
        weight_decay=5e-4,
        schedule="steps",
        decay_at=(25 / 30,),
        clip_norm=0,
        averaging=0,
    )
    return {
        "network": (network, "paper, Fig. 2"),
        "spacing_mm": (spacing, why),
        "normalisation": (draft.normalisation, "ours: as the default recipe; the paper's correction of bias fields (N4) is not made"),
        "patch_vox": (patch, "paper, section 4: 128 × 128 × 64 voxels; smaller where volumes or the memory are"),
        "batch": (2, "paper, section 4: two volumes"),
        "foreground": (0.0, "ours: anywhere, as Dice needs no balance"),
        "loss": (
            LossConfig(cross_entropy=0, dice_squares=True, dice_background=False),
            "paper, section 3: Dice with squares, no class weights; ours: over both volumes together",
        ),
        "augment": (
            augment,
            "paper, section 4: B-spline deformation by 2 × 2 × 2 control points, sd 15 voxels, and the histogram of another "
            "training volume, at every step; ours: less along a side that is shorter than the paper's",
        ),
        "optimiser": (
            optimiser,
            "paper, section 4: momentum 0.99, rate 0.0001, a tenth of it after 25,000 of some 30,000 steps (here the same share); "
            "the authors' release: weight decay 0.0005",
        ),
        "warmup": (0, "ours: none, as the paper names none"),
    }


def pets2022(draft: Plan, data: Fingerprint, resources: Resources) -> Lines:
    """The worked example on Oxford-IIIT Pets: Keras, 15 epochs set, 11 made."""
    still = AugmentConfig(**OFF | STILL)
    optimiser = OptimiserConfig(
        name="rmsprop", learning_rate=1e-3, momentum=0.9, weight_decay=0, schedule="constant", clip_norm=0, averaging=0
    )
    return {
        "network": (NetworkConfig(name="unet_same"), "article: its U-Net, padded and with batch norm"),
        "spacing_mm": (data.spacing_mm, "ours: the pictures' own pixels, of which only the proportions matter, as all are resized"),
        "resize_vox": ((160, 160), "article: pictures are resized to 160 × 160; ours: as `interpolation` says"),
        "normalisation": (NormalisationConfig(kind="none"), "article: grey values as they are, 0 to 255"),
        "patch_vox": ((160, 160), "article: whole pictures"),
        "batch": (8, "article: 8 pictures"),
        "foreground": (0.0, "article: pictures as they come"),
        "loss": (
            LossConfig(dice=0, activation="sigmoid"),
            "article: cross-entropy of one sigmoid a class; its framework scales them to sum to 1, and so do we",
        ),
        "augment": (still, "article: none"),
        "optimiser": (optimiser, "ours: RMSprop with rate 0.001, smoothing 0.9: the framework's defaults, not read again"),
        "warmup": (0, "ours: none, as the article names none"),
    }


def nnunet(draft: Plan, data: Fingerprint, resources: Resources) -> Lines:
    """Isensee 2021 in its second version (papers and authors' code); its 2D or 3D configuration, as the data look."""
    spacing = _nnunet_spacing(data, draft.dims)
    topology, network, batch, memory = _nnunet_sizes(draft, data, resources, spacing)
    levels = len(topology.strides)
    # The heads are all built; that of the lowest level has no weight in the loss.
    weights = (*(0.5**level for level in range(levels - 2)), 0.0) if levels > 2 else (1.0,)
    optimiser = OptimiserConfig(
        name="sgd", learning_rate=0.01, momentum=0.99, weight_decay=3e-5, schedule="poly", power=0.9, clip_norm=12, averaging=0
    )
    limit = f"feature maps within the budget for {memory:.3g} GB"
    return {
        "network": (network, f"paper: {levels} levels by its pooling rules, instance norm, a head at every level of the decoder"),
        "spacing_mm": (spacing, "paper: the median voxel size; of an axis three times as coarse as the others its 10th percentile"),
        "patch_vox": (topology.patch_vox, f"paper: as large as its {limit} (8 GB at most here: ours)"),
        "batch": (batch, f"paper: {limit}, at least 2"),
        "foreground": (1 - round(batch * 0.67) / batch, "paper: 0.33 of a batch lies on a class, in whole patches: 1 of 2, 4 of 12"),
        "loss": (
            LossConfig(dice_background=False, level_weights=weights),
            "paper: cross-entropy + soft Dice of the foreground; levels weigh 1, 1/2, 1/4, ..., the lowest 0; ours: Dice always over the "
            "batch, and over the classes that it holds",
        ),
        "augment": (
            _nnunet_augment(topology.patch_vox),
            "paper: no elastic deformation, all axes mirrored; ours: brightness shifts the mean, as values have mean 0 "
            "here, and how strong noise and blur are",
        ),
        "optimiser": (
            optimiser,
            "paper: SGD with Nesterov momentum 0.99, rate 0.01 (1 - share)^0.9, weight decay 0.00003; 250,000 steps there",
        ),
        "warmup": (0, "paper: none"),
        "overlap": (0.5, "paper: tiles overlap by half"),
    }


def _nnunet_sizes(draft: Plan, data: Fingerprint, resources: Resources, spacing: Spacing) -> tuple[Topology, NetworkConfig, int, float]:
    """Patch and pooling, the network, patches a step, and the GB whose budget of feature maps they keep to."""
    budget = BUDGETS["resenc_m" if draft.network.name == "nnunet_resenc" else "plain"]
    whole = resampled_shape(data.shape_vox, data.spacing_mm, spacing)
    shape, spacing = whole[-draft.dims :], spacing[-draft.dims :]
    # Of a stack all sections count, also where each is seen as a picture.
    voxels = float(np.prod(whole)) * data.cases
    room = FULL_SHARE * resources.memory_bytes
    memory = min(budget.memory_gb, room / 2**30)
    while True:
        topology, estimate = plan_patch(spacing, shape, len(data.classes), budget, memory_gb=memory)
        levels = len(topology.strides)
        if levels < 2:
            raise ConfigError(
                "recipe",
                expected="images of 8 voxels or more along an axis",
                got=format_shape(shape),
                do="use the default recipe",
                code="C039",
            )
        network = NetworkConfig(name=draft.network.name, strides=topology.strides, kernels=topology.kernels, supervised_levels=levels - 1)
        batch = batch_size(topology.patch_vox, estimate, budget, dataset_voxels=voxels, memory_gb=memory)
        if batch * patch_bytes(topology.patch_vox, network, draft.precision, len(data.classes)) <= room:
            return topology, network, batch, memory
        # The budgets are for half precision; here a value may take more.
        memory *= 0.9


def _nnunet_spacing(data: Fingerprint, dims: int) -> Spacing:
    """The median voxel size; along an axis that is much coarser and shorter than the others its 10th percentile."""
    spacing, shape = list(data.spacing_mm), data.shape_vox
    axis = int(np.argmax(spacing))
    others = [i for i in range(len(spacing)) if i != axis]
    coarse = spacing[axis] > 3 * max(spacing[i] for i in others) and 3 * shape[axis] < min(shape[i] for i in others)
    if dims == 3 and coarse:
        spacing[axis] = max(data.spacing_low_mm[axis], *(spacing[i] for i in others))
    return tuple(spacing)


def _nnunet_augment(patch_vox: Shape) -> AugmentConfig:
    """Its ranges and probabilities; a patch of few thick sections is turned in their plane only."""
    dims = len(patch_vox)
    flat = dims == 3 and max(patch_vox) / patch_vox[0] > 3
    if dims == 2:
        turns: tuple[float, ...] = (15.0,) if max(patch_vox) / min(patch_vox) > 1.5 else (180.0,)
    else:
        turns = (180.0, 0.0, 0.0) if flat else (30.0,) * 3
    return AugmentConfig(
        flip_axes=tuple(range(dims)),
        rotation_deg=turns,
        rotation_p=0.2,
        scale=(0.7, 1.4),
        scale_p=0.2,
        elastic_p=0,
        contrast_p=0.15,
        brightness_p=0.15,
        gamma_p=0.3,
        gamma_inverted_p=0.1,
        noise_p=0.1,
        blur_p=0.2,
        low_resolution_p=0.25,
    )


def _patch(seen: Shape, paper: Shape, network: NetworkConfig, facts: tuple[Plan, Fingerprint, Resources]) -> Shape:
    """The nearest size to what the network should answer for; no larger than the paper's, and of what fits into memory."""
    draft, data, resources = facts
    fitted, _ = fit_patch(seen, network, data, resources, precision=draft.precision, reason="")
    return tuple(min(a, b) for a, b in zip(fitted, paper, strict=True))
