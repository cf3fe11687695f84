"""The attention U-Net of 2018, held against the released network's layout and the gate's formula."""

import math

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.attention_unet import AttentionGate, AttentionUNet
from microtome.models.network import NetworkSpec


def attention_unet(variant: str = "", *, dims: int = 3, in_channels: int = 1, classes: int = 4, **config: object) -> AttentionUNet:
    spec = NetworkSpec(
        name="attention_unet", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config), variant=variant
    )
    return AttentionUNet(spec)


@pytest.mark.parametrize(("variant", "count"), [("single", 6_214_151), ("double", 6_473_322)])
def test_it_has_the_parameters_of_the_released_networks_and_without_gates_5888004(variant: str, count: int) -> None:
    with torch.device("meta"):
        network = attention_unet(variant)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    assert sum(sizes.values()) == count
    assert sum(n for name, n in sizes.items() if not name.startswith(("gates.", "gating."))) == 5_888_004


def test_every_level_of_a_crop_of_160_by_160_by_96_has_its_channels_and_size() -> None:
    with torch.device("meta"):
        network = attention_unet()
        seen: list[tuple[int, ...]] = []
        for block in [*network.encoder, *network.decoder]:
            block.register_forward_hook(lambda *args: seen.append(tuple(args[-1].shape[1:])))
        assert network(torch.empty(1, 1, 160, 160, 96)).shape == (1, 4, 160, 160, 96)
    down = [(16 << level, 160 >> level, 160 >> level, 96 >> level) for level in range(5)]
    assert seen == down + down[3::-1]


def tiny_gate() -> AttentionGate:
    """One channel; W_x the mean of 2x2 pixels, W_g the signal less 1, psi twice the sum plus 1/2."""
    gate = AttentionGate(2, 1, 1).eval()
    values = {"of_skip.weight": 0.25, "of_gating.weight": 1, "of_gating.bias": -1, "psi.weight": 2, "psi.bias": 0.5}
    with torch.no_grad():
        for name, value in {**values, "output.0.weight": 3, "output.0.bias": 0}.items():
            gate.get_parameter(name).fill_(value)
    return gate


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_gate_weighs_the_skip_by_the_sigmoid_of_its_formula() -> None:
    gate, gating_BCS = tiny_gate(), torch.full((1, 1, 2, 2), 2.0)
    for x, alpha in ((-0.7, sigmoid(2 * (-0.7 + 2 - 1) + 0.5)), (-3.0, sigmoid(0.5))):  # the second: ReLU at 0
        skip_BCS = torch.full((1, 1, 4, 4), x)
        torch.testing.assert_close(gate.attention(skip_BCS, gating_BCS), torch.full((1, 1, 4, 4), alpha))
        torch.testing.assert_close(gate(skip_BCS, gating_BCS), torch.full((1, 1, 4, 4), 3 * alpha * x), rtol=1e-4, atol=1e-5)


def test_attention_is_computed_at_the_signals_resolution_and_up_sampled_linearly() -> None:
    gate = tiny_gate()
    gating_BCS = torch.tensor([[0.0, 4.0]]).expand(2, 2).reshape(1, 1, 2, 2)
    low, high = sigmoid(0.5), sigmoid(2 * (4 - 1) + 0.5)
    attention_B1S = gate.attention(torch.zeros(1, 1, 4, 4), gating_BCS)
    row = torch.tensor([low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high])
    torch.testing.assert_close(attention_B1S, row.expand(1, 1, 4, 4))


def test_each_gate_takes_the_decoders_output_one_level_coarser_and_the_deepest_the_gating_signal_of_the_bottom() -> None:
    network = attention_unet(dims=2, widths=(4, 4, 4, 4))
    signals: dict[str, Tensor] = {}
    network.gating.register_forward_hook(lambda *args: signals.update(bottom=args[-1]))
    for level, block in enumerate(network.decoder):
        block.register_forward_hook(lambda *args, level=level: signals.update({f"decoder {level}": args[-1]}))
    for level, gates in enumerate(network.gates, start=1):
        gates.register_forward_pre_hook(lambda _, inputs, level=level: signals.update({f"gate {level}": inputs[1]}))
    network(torch.randn(1, 1, 16, 16))
    assert [gates.gates[0].of_skip.in_channels for gates in network.gates] == [4, 4]
    assert torch.equal(signals["gate 2"], signals["bottom"])
    assert torch.equal(signals["gate 1"], signals["decoder 2"])


def test_the_finest_skip_enters_its_concatenation_ungated_and_first() -> None:
    network = attention_unet(dims=2, widths=(4, 5, 6))
    parts: dict[str, Tensor] = {}
    network.encoder[0].register_forward_hook(lambda *args: parts.update(skip=args[-1]))
    network.decoder[0].register_forward_pre_hook(lambda _, inputs: parts.update(joined=inputs[0]))
    network(torch.randn(1, 1, 8, 8))
    assert len(network.gates) == 1
    assert torch.equal(parts["joined"][:, :4], parts["skip"])


def test_the_heads_of_all_levels_are_fused_to_one_map_finest_first() -> None:
    network = attention_unet(dims=2, classes=2, widths=(4, 5, 6))
    with torch.no_grad():
        network.heads[0].bias.fill_(1)
        network.heads[0].weight.zero_()
        network.heads[1][0].bias.fill_(10)
        network.heads[1][0].weight.zero_()
        network.fuse.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 0]]).reshape(2, 4, 1, 1))
    logits_BKS = network(torch.randn(1, 1, 8, 8))
    assert isinstance(logits_BKS, Tensor)
    torch.testing.assert_close(logits_BKS, torch.tensor([73.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 8, 8))


@pytest.mark.parametrize(("dims", "shape"), [(2, (8, 8)), (3, (4, 8, 8))])
@pytest.mark.parametrize("variant", ["single", "double"])
def test_a_gradient_reaches_every_weight_from_one_image_of_the_smallest_size(dims: int, shape: tuple[int, ...], variant: str) -> None:
    torch.manual_seed(0)
    network = attention_unet(variant, dims=dims, in_channels=2, classes=3, widths=(4, 6, 8))
    assert tuple(network.nearest_sizes(1, axis)[1] for axis in range(dims)) == shape
    logits_BKS = network(torch.randn(1, 2, *shape))
    assert logits_BKS.shape == (1, 3, *shape)
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    # A bias before a norm has no gradient but rounding: the norm takes it away again.
    assert [name for name, p in network.named_parameters() if p.grad is None or (name.endswith("weight") and not p.grad.any())] == []


def test_batch_norm_follows_every_convolution_but_those_of_attention_and_of_the_heads() -> None:
    with torch.device("meta"):
        network = attention_unet()
    norms = sum(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    without = sum(
        isinstance(module, nn.Conv3d) for name, module in network.named_modules() if name.endswith(("of_skip", "of_gating", "psi"))
    )
    assert without == 9
    assert norms == sum(isinstance(module, nn.Conv3d) for module in network.modules()) - without - 5


def test_fewer_than_three_levels_are_refused_since_nothing_would_be_gated() -> None:
    with pytest.raises(ConfigError, match=r"attention_unet: expected at least 3 levels, .* got \(8, 16\); change `network.widths`"):
        attention_unet(widths=(8, 16))
