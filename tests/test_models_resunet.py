"""The deep residual U-Net of 2018: its units, its fifteen convolutions, its counts of parameters."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.network import NetworkSpec
from microtome.models.resunet import ResidualUnit, ResUNet


def resunet(variant: str = "", *, dims: int = 2, in_channels: int = 3, classes: int = 1, **config: object) -> ResUNet:
    spec = NetworkSpec(name="resunet", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config), variant=variant)
    return ResUNet(spec)


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_fifteen_named_convolutions_have_7782913_parameters_and_all_layers_8220993() -> None:
    with torch.device("meta"):
        network = resunet("paper")
    named = [m for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and not name.endswith("shortcut")]
    assert len(named) == 15
    assert parameters(*named) == 7_782_913
    assert parameters(network) == 8_220_993


def test_with_up_convolutions_it_has_9598145_parameters() -> None:
    with torch.device("meta"):
        network = resunet("upconv")
    ups = [module for module in network.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [up.out_channels for up in ups] == [up.in_channels for up in ups] == [128, 256, 512]
    assert parameters(network) == 9_598_145


def test_the_seven_units_of_an_image_of_224_have_their_channels_and_sizes() -> None:
    with torch.device("meta"):
        network = resunet()
        seen: list[tuple[int, ...]] = []
        for unit in [*network.encoder, *network.decoder]:
            unit.register_forward_hook(lambda *args: seen.append((args[1][0].shape[1], *args[-1].shape[1:])))
        assert network(torch.empty(1, 3, 224, 224)).shape == (1, 1, 224, 224)
    assert seen[:4] == [(3, 64, 224, 224), (64, 128, 112, 112), (128, 256, 56, 56), (256, 512, 28, 28)]
    assert seen[4:] == [(768, 256, 56, 56), (384, 128, 112, 112), (192, 64, 224, 224)]


def test_a_unit_activates_before_each_convolution_and_the_first_starts_with_its_own() -> None:
    with torch.device("meta"):
        network = resunet()
    half = [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    for unit in [*network.encoder[1:], *network.decoder]:
        assert [type(layer) for layer in unit.convolutions] == half + half
    assert [type(layer) for layer in network.encoder[0].convolutions] == [nn.Conv2d, *half]


def test_strides_replace_pooling() -> None:
    with torch.device("meta"):
        network = resunet()
    strides = [[m.stride[0] for m in unit.modules() if isinstance(m, nn.Conv2d)] for unit in network.encoder]
    assert strides == [[1, 1, 1], [2, 1, 2], [2, 1, 2], [2, 1, 2]]  # two convolutions and the shortcut
    assert not [m for m in network.modules() if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]


def test_a_unit_is_its_shortcut_plus_its_convolutions() -> None:
    torch.manual_seed(0)
    features_BCS = torch.randn(2, 3, 8, 8)
    changed, same = ResidualUnit(2, 3, 5, stride=2), ResidualUnit(2, 3, 3)
    assert isinstance(changed.shortcut, nn.Conv2d)
    assert isinstance(same.shortcut, nn.Identity)
    for unit in (changed, same):
        nn.init.zeros_(unit.convolutions[-1].weight)
        nn.init.ones_(unit.convolutions[-1].bias)
        torch.testing.assert_close(unit(features_BCS), unit.shortcut(features_BCS) + 1)


@pytest.mark.parametrize("variant", ["paper", "upconv"])
def test_the_up_sampled_half_comes_first_in_a_concatenation(variant: str) -> None:
    network = resunet(variant, in_channels=1, widths=(2, 4))
    halves: dict[str, Tensor] = {}
    network.up[0].register_forward_hook(lambda *args: halves.update(up=args[-1].clone()))
    network.encoder[0].register_forward_hook(lambda *args: halves.update(skip=args[-1].clone()))
    network.decoder[0].register_forward_pre_hook(lambda _, inputs: halves.update(joined=inputs[0].clone()))
    network(torch.randn(2, 1, 8, 8))
    assert torch.equal(halves["joined"], torch.cat([halves["up"], halves["skip"]], 1))


@pytest.mark.parametrize(("dims", "shape"), [(2, (8, 8)), (3, (4, 8, 8))])
@pytest.mark.parametrize("variant", ["paper", "upconv"])
def test_a_gradient_reaches_every_weight_from_one_image_of_the_smallest_size(dims: int, shape: tuple[int, ...], variant: str) -> None:
    torch.manual_seed(0)
    network = resunet(variant, dims=dims, in_channels=2, classes=3, widths=(4, 6, 8))
    assert tuple(network.nearest_sizes(1, axis)[1] for axis in range(dims)) == shape
    logits_BKS = network(torch.randn(1, 2, *shape))
    assert logits_BKS.shape == (1, 3, *shape)
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    # A bias before a norm has no gradient but rounding: the norm takes it away again.
    assert [name for name, p in network.named_parameters() if p.grad is None or (name.endswith("weight") and not p.grad.any())] == []


def test_sizes_are_multiples_of_8_from_16_on() -> None:
    with torch.device("meta"):
        network = resunet()
        assert [n for n in range(1, 50) if network.valid_size(n, 1)] == [16, 24, 32, 40, 48]
        with pytest.raises(ConfigError, match="resunet: expected a size that fits: Y 16, X 48 or 56, got 8×50"):
            network(torch.empty(1, 3, 8, 50))


def test_a_single_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resunet: expected at least 2 levels, got \(8,\); change `network.widths`"):
        resunet(widths=(8,))
