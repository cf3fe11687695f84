"""nnU-Net's two networks: counts, heads and units as its code builds them."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.blocks import InstanceNorm
from microtome.models.network import Network, NetworkSpec
from microtome.models.nnunet import NNUNetPlain, NNUNetResEnc
from microtome.nnunet_rules import feature_maps, level_widths, pooling_plan

Builder = type[NNUNetPlain] | type[NNUNetResEnc]
BOTH: list[Builder] = [NNUNetPlain, NNUNetResEnc]
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def nnunet(builder: Builder, dims: int, *, classes: int = 2, **config: object) -> Network:
    return builder(NetworkSpec(name="nnunet", dims=dims, in_channels=1, classes=classes, config=NetworkConfig(**config)))


@pytest.mark.parametrize(
    ("builder", "dims", "levels", "count"),
    [
        (NNUNetPlain, 3, 6, 31_195_594),
        (NNUNetResEnc, 3, 6, 102_349_770),
        (NNUNetPlain, 2, 8, 46_324_558),
        (NNUNetResEnc, 2, 8, 140_017_038),
    ],
)
def test_it_has_nnunets_parameters_with_deep_supervision_off_too(builder: Builder, dims: int, levels: int, count: int) -> None:
    with torch.device("meta"):
        network = nnunet(builder, dims, widths=level_widths(levels, dims))
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert len(network.heads) == levels - 1


@pytest.mark.parametrize(("builder", "size"), [(NNUNetPlain, 453_694_976), (NNUNetResEnc, 558_319_104)])
def test_the_feature_maps_of_a_128_cube_have_the_size_that_nnunet_estimates(builder: Builder, size: int) -> None:
    with torch.device("meta"):
        assert counted_maps(nnunet(builder, 3, classes=3, supervised_levels=5), (128,) * 3) == size


@pytest.mark.parametrize("builder", BOTH)
@pytest.mark.parametrize(
    ("patch_vox", "spacing_mm"),
    [((40, 56, 40), (1.0, 1.0, 1.0)), ((14, 100, 90), (6.0, 1.5, 1.5)), ((70, 200), (1.0, 0.4)), ((12, 9), (1, 1))],
)
def test_the_estimate_of_feature_maps_counts_what_the_network_puts_out(
    builder: Builder, patch_vox: tuple[int, ...], spacing_mm: tuple[float, ...]
) -> None:
    topology = pooling_plan(patch_vox, spacing_mm)
    config = {"strides": topology.strides, "kernels": topology.kernels, "supervised_levels": len(topology.strides) - 1}
    with torch.device("meta"):
        counted = counted_maps(nnunet(builder, len(patch_vox), classes=4, **config), topology.patch_vox)
    assert feature_maps(topology, 4, residual=builder is NNUNetResEnc) == counted


def counted_maps(network: Network, patch_vox: tuple[int, ...]) -> int:
    """Values put out by all convolutions, and by all shortcuts that are not the identity (once each)."""
    total: list[int] = []
    for name, module in network.named_modules():
        shortcut = name.endswith("shortcut") and len(list(module.children())) > 0
        if shortcut or (isinstance(module, CONVOLUTIONS) and "shortcut" not in name):
            module.register_forward_hook(lambda *args: total.append(args[-1].numel()))
    network(torch.empty(1, 1, *patch_vox))
    return sum(total)


def test_residual_units_are_1_3_4_6_6_6_unless_set_one_a_level() -> None:
    with torch.device("meta"):
        units = [
            [len(stage) for stage in nnunet(NNUNetResEnc, 2, **config).encoder]
            for config in (
                {},
                {"widths": (2,) * 8},
                {"widths": (2,) * 3},
                {"convolutions": (2, 2, 2)},
                {"widths": (2, 2), "convolutions": 1},
            )
        ]
        assert units == [[1, 3, 4, 6, 6, 6], [1, 3, 4, 6, 6, 6, 6, 6], [1, 3, 4], [2, 2, 2], [1, 1]]
        assert [len(stage) for stage in nnunet(NNUNetResEnc, 2).decoder] == [1] * 5
        plain = nnunet(NNUNetPlain, 2)
        assert [len(stage) for stage in [*plain.encoder, *plain.decoder]] == [2] * 11


@pytest.mark.parametrize("builder", BOTH)
def test_every_norm_is_instance_norm_and_only_shortcuts_lack_a_bias(builder: Builder) -> None:
    with torch.device("meta"):
        network = nnunet(builder, 3, widths=(2, 4, 4))
    norms = [module for module in network.modules() if isinstance(module, InstanceNorm)]
    convolutions = [(name, module) for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS)]
    assert norms
    assert not any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    assert {norm.eps for norm in norms} == {1e-5}
    assert all((module.bias is None) == ("shortcut" in name) for name, module in convolutions)
    assert {module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)} == {0.01}


@pytest.mark.parametrize("builder", BOTH)
@pytest.mark.parametrize("dims", [2, 3])
def test_in_training_as_many_levels_as_are_supervised_come_out_finest_first(builder: Builder, dims: int) -> None:
    torch.manual_seed(0)
    image_BCS = torch.randn(1, 1, *(16,) * dims)
    network = nnunet(builder, dims, widths=(2, 4, 4, 4), supervised_levels=2)
    logits = network(image_BCS)
    assert isinstance(logits, list)
    assert [tuple(each.shape) for each in logits] == [(1, 2, *(n,) * dims) for n in (16, 8)]
    assert torch.allclose(network.eval()(image_BCS), logits[0], atol=1e-5)
    assert isinstance(nnunet(builder, dims, widths=(2, 4, 4))(image_BCS), Tensor)


def test_a_head_without_a_loss_gets_no_gradient_and_all_else_does() -> None:
    torch.manual_seed(0)
    network = nnunet(NNUNetPlain, 2, widths=(2, 4, 4, 4), supervised_levels=2)
    sum(each.square().sum() for each in network(torch.randn(1, 1, 16, 16))).backward()
    assert {name for name, parameter in network.named_parameters() if parameter.grad is None} == {"heads.2.weight", "heads.2.bias"}


def test_convolutions_that_do_not_match_the_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 convolutions, one a level, got \(1, 3, 4\)"):
        nnunet(NNUNetResEnc, 2, widths=(2, 2), convolutions=(1, 3, 4))
