"""nnU-Net's two networks as its code builds them: the plain U-Net and the one with a residual encoder.

F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
Nature Methods 2021, doi 10.1038/s41592-020-01008-z; F. Isensee et al., "nnU-Net Revisited", MICCAI 2024,
arXiv 2404.09556. Facts from the authors' code, version 2. In 3D, with 6 levels; `modern_unet.py` draws the whole U:

    level            0    1    2    3    4    5
    channels        32   64  128  256  320  320      at most 512 in 2D
    plain            2    2    2    2    2    2      convolutions, and as many in the decoder
    ResEnc       stem+1   3    4    6    6    6      residual units; 6 on each deeper level; 1 convolution in the decoder
    heads            x    x    x    x    x           1x1, there whether or not the level has a loss

A convolution has a bias and is followed by instance norm (eps 1e-5) and leaky ReLU (0.01). Each level's first convolution
has its stride; up: transposed convolution with kernel = stride. The shortcut of a residual unit: average pool by the
stride, then 1x1 convolution without bias and norm where the width changes. The last norm of a unit starts at zero.

Parameters for 1 channel and 2 classes: 3D with 6 levels 31,195,594 plain, 102,349,770 ResEnc; 2D with 8 levels
46,324,558 and 140,017,038.

How many levels, and their strides and kernels, follow from the patch: `nnunet_rules.pooling_plan`; without them
there are 6 levels that halve every axis (ours). What differs: He initialisation counts the inputs of an up-convolution
as they are (see `initialise_he`), and there is no dropout to switch on.
"""

from dataclasses import replace

from microtome.config import NetworkConfig
from microtome.models.modern_unet import ModernUNet, number_of_levels
from microtome.models.network import NetworkSpec
from microtome.nnunet_rules import residual_units


class NNUNetPlain(ModernUNet):
    """nnU-Net's default network. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides multiples of the product of the strides.

    `config` sets widths, strides, kernels, convolutions and supervised_levels, as in `ModernUNet`. A head without a
    loss gets no gradient.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__(_with(spec, residual=False), all_heads=True)


class NNUNetResEnc(ModernUNet):
    """nnU-Net's residual encoder U-Net. image_BCS (B, C, *S) -> logits_BKS (B, K, *S); sides as in `NNUNetPlain`.

    `config` as there; `convolutions` are the residual units of a level. Left at its default of 2 it means the
    paper's 1, 3, 4, 6, 6, ...; for two units on every level write them as one number a level.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        if spec.config.convolutions == NetworkConfig.model_fields["convolutions"].default:
            spec = _with(spec, convolutions=residual_units(number_of_levels(spec.config)))
        super().__init__(_with(spec, residual=True), all_heads=True)


def _with(spec: NetworkSpec, **changes: object) -> NetworkSpec:
    """The spec with instance norm and other changes to its config."""
    return replace(spec, config=spec.config.model_copy(update={"norm": "instance", **changes}))
