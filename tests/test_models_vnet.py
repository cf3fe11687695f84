"""The V-Net of 2016, held against the paper's Table 1 of receptive fields and the release's layout."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.blocks import CONVOLUTION, TRANSPOSED
from microtome.models.network import NetworkSpec
from microtome.models.vnet import VNet, repeated

Shape = tuple[int, ...]


def vnet(variant: str = "", *, dims: int = 3, in_channels: int = 1, classes: int = 2, **config: object) -> VNet:
    spec = NetworkSpec(name="vnet", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config), variant=variant)
    return VNet(spec)


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def convolutions(module: nn.Module) -> list[nn.Conv3d | nn.ConvTranspose3d]:
    return [each for each in module.modules() if isinstance(each, nn.Conv3d | nn.ConvTranspose3d)]


def receptive_fields(network: VNet) -> list[int]:
    """Voxels that an output of each bar sees, as the paper counts: each kernel of k adds k - 1 steps of its finer grid."""
    seen, jump, fields = 1, 1, []

    def count(module: nn.Conv3d | nn.ConvTranspose3d, *_: object) -> None:
        nonlocal seen, jump
        (kernel,), (stride,) = set(module.kernel_size), set(module.stride)
        if module.transposed:
            jump //= stride
        seen += (kernel - 1) * jump
        if not module.transposed:
            jump *= stride

    for module in convolutions(network):
        module.register_forward_hook(count)
    for bar in [*network.left, *network.right]:
        bar.register_forward_hook(lambda *_: fields.append(seen))
    network(torch.empty(1, 1, 16, 16, 16))
    assert jump == 1
    return fields


@pytest.mark.parametrize(
    ("variant", "weights", "biases", "slopes", "count"),
    [("paper", 65_168_400, 3_458, 3_456, 65_175_314), ("release", 61_976_340, 3_172, 3_170, 61_982_682)],
)
def test_both_variants_have_the_weights_biases_and_slopes_of_their_layout(
    variant: str, weights: int, biases: int, slopes: int, count: int
) -> None:
    with torch.device("meta"):
        network = vnet(variant)
    assert size([module.weight for module in convolutions(network)]) == weights
    assert size([module.bias for module in convolutions(network)]) == biases
    assert size([module.weight for module in network.modules() if isinstance(module, nn.PReLU)]) == slopes
    assert size(list(network.parameters())) == count


@pytest.mark.parametrize(
    ("variant", "fields"),
    [("paper", [5, 22, 72, 172, 372, 476, 528, 546, 551]), ("release", [5, 14, 48, 148, 348, 452, 488, 498, 503])],
)
def test_the_receptive_fields_are_those_of_table_1_and_of_the_release(variant: str, fields: list[int]) -> None:
    with torch.device("meta"):
        assert receptive_fields(vnet(variant)) == fields


def test_a_volume_of_128_by_128_by_64_passes_the_figures_sizes_and_keeps_its_own() -> None:
    with torch.device("meta"):
        network = vnet()
        seen: list[Shape] = []
        for bar in [*network.left, *network.right]:
            bar.register_forward_hook(lambda *args: seen.append(tuple(args[-1].shape[1:])))
        assert network(torch.empty(1, 1, 128, 128, 64)).shape == (1, 2, 128, 128, 64)
    left = [(16 * 2**level, 128 >> level, 128 >> level, 64 >> level) for level in range(5)]
    assert seen == left + [(2 * channels, *shape) for channels, *shape in left[3::-1]]


def test_sizes_are_multiples_of_16() -> None:
    with torch.device("meta"):
        network = vnet(widths=(2,) * 5)
        assert [n for n in range(1, 70) if network.valid_size(n, 0)] == [16, 32, 48, 64]
        with pytest.raises(ConfigError, match="vnet: expected a size that fits: Z 16 or 32, Y 16, X 16, got 24×16×16"):
            network(torch.empty(1, 1, 24, 16, 16))


def test_the_image_is_repeated_and_cut_to_the_first_width() -> None:
    image_BCS = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    assert repeated(image_BCS, 5).flatten().tolist() == [1, 2, 1, 2, 1]
    assert repeated(image_BCS, 1).flatten().tolist() == [1]
    assert repeated(image_BCS, 2) is image_BCS


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_its_last_convolution_at_0_a_bar_is_the_prelu_of_its_input(side: str) -> None:
    torch.manual_seed(0)
    network = vnet(dims=2, in_channels=2, widths=(4, 6, 8))
    for level, bar in enumerate(getattr(network, side)):
        last = bar.convolutions[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(bar.convolutions[-1].bias)
        entering = torch.randn(1, bar.convolutions[0].in_channels, 8, 8)
        wanted = torch.cat([entering] * 2, dim=1) if side == "left" and level == 0 else entering
        torch.testing.assert_close(bar(entering), torch.where(wanted > 0, wanted, 0.25 * wanted))


def test_a_right_bar_sees_the_up_sampled_map_at_the_skips_width_and_then_the_skip() -> None:
    network = vnet(dims=2, widths=(3, 5, 7))
    parts: dict[str, Tensor] = {}
    network.up[0].register_forward_hook(lambda *args: parts.update(up=args[-1]))
    network.left[0].register_forward_hook(lambda *args: parts.update(skip=args[-1]))
    network.right[0].register_forward_pre_hook(lambda _, inputs: parts.update(joined=inputs[0]))
    network(torch.randn(1, 1, 8, 8))
    assert parts["up"].shape == parts["skip"].shape == (1, 3, 8, 8)
    assert torch.equal(parts["joined"], torch.cat([parts["up"], parts["skip"]], 1))


def test_every_activation_is_a_prelu_with_a_slope_a_channel_and_nothing_normalises_or_drops() -> None:
    with torch.device("meta"):
        network = vnet()
    leaves = [module for module in network.modules() if not list(module.children())]
    assert {type(leaf) for leaf in leaves} == {CONVOLUTION[3], TRANSPOSED[3], nn.PReLU}
    assert all(bar.activation.num_parameters == bar.convolutions[-1].out_channels for bar in [*network.left, *network.right])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_gradient_reaches_every_weight_in_2d_and_3d(dims: int, variant: str) -> None:
    torch.manual_seed(0)
    network = vnet(variant, dims=dims, in_channels=3, classes=4, widths=(4, 5, 6))
    logits_BKS = network(torch.randn(1, 3, *(8,) * dims))
    assert logits_BKS.shape == (1, 4, *(8,) * dims)
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_a_single_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vnet: expected at least 2 levels, got \(8,\); change `network.widths`"):
        vnet(widths=(8,))
