"""R2U-Net in the form of its reference port: shared weights, recurrences, count of parameters."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.network import NetworkSpec
from microtome.models.r2unet import R2UNet, RecurrentResidualBlock, RecurrentUnit


def r2unet(*, dims: int = 2, in_channels: int = 3, classes: int = 1, **config: object) -> R2UNet:
    return R2UNet(NetworkSpec(name="r2unet", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config)))


def halving(unit: nn.Module) -> None:
    """Let every convolution halve each value, and no norm change anything."""
    for module in unit.eval().modules():
        if isinstance(module, nn.Conv2d):
            centre = torch.zeros_like(module.weight)
            centre[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 0.5
            module.weight.data = centre
            nn.init.zeros_(module.bias)


def test_with_3_channels_and_1_class_it_has_the_parameters_of_the_port() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in r2unet().parameters()) == 39_091_393


def test_a_recurrent_unit_applies_one_convolution_three_times() -> None:
    unit = RecurrentUnit(2, 4)
    calls: list[Tensor] = []
    unit.convolution[0].register_forward_hook(lambda *args: calls.append(args[-1]))
    unit(torch.randn(1, 4, 4, 4))
    assert (len(calls), sum(isinstance(module, nn.Conv2d) for module in unit.modules())) == (3, 1)


@pytest.mark.parametrize(("recurrences", "value"), [(0, 2.0), (1, 3.0), (2, 3.5)])
def test_each_recurrence_sees_the_input_plus_the_last_output(recurrences: int, value: float) -> None:
    """With f(x) = x / 2 for x = 4: 2, then (4 + 2) / 2 = 3, then (4 + 3) / 2 = 3.5."""
    unit = RecurrentUnit(2, 1, recurrences)
    halving(unit)
    torch.testing.assert_close(unit(torch.full((1, 1, 3, 3), 4.0)), torch.full((1, 1, 3, 3), value), rtol=1e-4, atol=0)


def test_a_block_adds_its_two_units_to_the_projected_input() -> None:
    """With halving: 8 is projected to 4, the units give 7/8 of what they see, 3.5 and then 3.0625, and the sum is 7.0625."""
    block = RecurrentResidualBlock(2, 1, 1)
    halving(block)
    torch.testing.assert_close(block(torch.full((1, 1, 3, 3), 8.0)), torch.full((1, 1, 3, 3), 7.0625), rtol=1e-4, atol=0)


def test_every_level_has_its_channels_and_size() -> None:
    with torch.device("meta"):
        network = r2unet()
        seen: list[tuple[int, ...]] = []
        for block in [*network.encoder, *network.up, *network.decoder]:
            block.register_forward_hook(lambda *args: seen.append(tuple(args[-1].shape[1:])))
        assert network(torch.empty(2, 3, 64, 48)).shape == (2, 1, 64, 48)
    down = [(64 << level, 64 >> level, 48 >> level) for level in range(5)]
    assert seen == down + [shape for shape in down[3::-1] for _ in ("up", "decoder")]


@pytest.mark.parametrize(("dims", "shape"), [(2, (8, 8)), (3, (4, 8, 8))])
def test_a_gradient_reaches_every_weight_from_one_image_of_the_smallest_size(dims: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = r2unet(dims=dims, in_channels=2, classes=3, widths=(4, 6, 8))
    assert tuple(network.nearest_sizes(1, axis)[1] for axis in range(dims)) == shape
    logits_BKS = network(torch.randn(1, 2, *shape))
    assert logits_BKS.shape == (1, 3, *shape)
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    # A bias before a norm has no gradient but rounding: the norm takes it away again.
    assert [name for name, p in network.named_parameters() if p.grad is None or (name.endswith("weight") and not p.grad.any())] == []


def test_shared_weights_have_one_name_each() -> None:
    network = r2unet(widths=(2, 4))
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(network.parameters()))
    # Three blocks of one projection and two units, one up-step and the head.
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 3 * 3 + 1 + 1


def test_a_size_that_is_no_multiple_of_16_is_refused_with_those_that_fit() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="r2unet: expected a size that fits: Y 32, X 48 or 64, got 16×50"):
        r2unet(widths=(2,) * 5)(torch.empty(1, 3, 16, 50))


def test_a_single_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"r2unet: expected at least 2 levels, got \(8,\); change `network.widths`"):
        r2unet(widths=(8,))
