"""LadderNet in its released shape: shared weights, joins by addition, count of parameters."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.laddernet import LadderNet, SharedBlock
from microtome.models.network import NetworkSpec


def laddernet(*, dims: int = 2, in_channels: int = 1, classes: int = 2, **config: object) -> LadderNet:
    return LadderNet(NetworkSpec(name="laddernet", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config)))


def test_with_1_channel_and_2_classes_it_has_the_parameters_of_the_release() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in laddernet().parameters()) == 1_381_652


@pytest.mark.parametrize(("weight", "value"), [(0.5, 5.0), (-0.5, 4.0), (-2.0, 4.0)])
def test_a_block_applies_one_convolution_twice_and_adds_its_input(weight: float, value: float) -> None:
    """For x = 4 and w = 1/2: 2, 1, and 4 + 1 = 5; for w below 0 the inner ReLU leaves 0, and x remains."""
    block = SharedBlock(2, 1, 0.0)
    nn.init.zeros_(block.convolution.weight)
    nn.init.zeros_(block.convolution.bias)
    block.convolution.weight.data[..., 1, 1] = weight
    calls: list[Tensor] = []
    block.convolution.register_forward_hook(lambda *args: calls.append(args[-1]))
    assert block(torch.full((1, 1, 3, 3), 4.0)).unique().tolist() == [value]
    assert len(calls) == 2


def test_the_gradient_of_a_shared_convolution_is_that_of_both_its_uses() -> None:
    """With w > 0 and x = 1: y = 1 + w w, so dy/dw = 2 w; one use alone would give w."""
    block = SharedBlock(2, 1, 0.0)
    nn.init.zeros_(block.convolution.weight)
    nn.init.zeros_(block.convolution.bias)
    block.convolution.weight.data[..., 1, 1] = 0.75
    block(torch.ones(1, 1, 1, 1)).sum().backward()
    assert block.convolution.weight.grad is not None
    assert block.convolution.weight.grad[0, 0, 1, 1].item() == 1.5


def test_every_level_of_both_us_has_its_channels_and_size() -> None:
    with torch.device("meta"):
        network = laddernet()
        seen: list[tuple[int, ...]] = []
        for ladder in (network.first, network.second):
            for block in [*ladder.encoder, *ladder.decoder]:
                block.register_forward_hook(lambda *args: seen.append(tuple(args[-1].shape[1:])))
        assert network(torch.empty(1, 1, 48, 48)).shape == (1, 2, 48, 48)
    down = [(10 << level, 48 >> level, 48 >> level) for level in range(5)]
    assert seen == 2 * (down + down[3::-1])


def test_the_second_u_adds_the_first_us_map_at_every_level_of_its_way_down() -> None:
    torch.manual_seed(0)
    network = laddernet(widths=(3, 4, 5), dropout=0.0)
    maps: dict[str, Tensor] = {}
    for level, block in enumerate(network.first.decoder):
        block.register_forward_hook(lambda *args, level=level: maps.update({f"first {level}": args[-1]}))
    for level, block in enumerate(network.second.encoder):
        block.register_forward_pre_hook(lambda _, inputs, level=level: maps.update({f"second {level}": inputs[0]}))
    network.between.register_forward_hook(lambda *args: maps.update(entering0=args[-1]))
    for level, down in enumerate(network.second.down, start=1):
        down.register_forward_hook(lambda *args, level=level: maps.update({f"entering{level}": args[-1]}))
    network(torch.randn(1, 1, 8, 8))
    for level in (0, 1):
        assert maps[f"first {level}"].any()
        assert torch.equal(maps[f"second {level}"], maps[f"entering{level}"] + maps[f"first {level}"])
    assert torch.equal(maps["second 2"], maps["entering2"])  # the bottom has nothing to add


def test_a_decoder_adds_the_skip_of_its_own_u() -> None:
    torch.manual_seed(0)
    network = laddernet(widths=(3, 4), dropout=0.0)
    for ladder in (network.first, network.second):
        parts: dict[str, Tensor] = {}
        hooks = [
            ladder.up[0].register_forward_hook(lambda *args, parts=parts: parts.update(up=args[-1].clone())),
            ladder.encoder[0].register_forward_hook(lambda *args, parts=parts: parts.update(skip=args[-1])),
            ladder.decoder[0].register_forward_pre_hook(lambda _, inputs, parts=parts: parts.update(joined=inputs[0])),
        ]
        network(torch.randn(1, 1, 8, 8))
        assert len(hooks) == 3
        assert torch.equal(parts["joined"], parts["up"] + parts["skip"])


@pytest.mark.parametrize(("dropout", "share"), [({}, 0.25), ({"dropout": 0.0}, 0.0), ({"dropout": 0.5}, 0.5)])
def test_blocks_drop_a_quarter_of_the_channels_unless_the_config_says_otherwise(dropout: dict[str, float], share: float) -> None:
    with torch.device("meta"):
        network = laddernet(**dropout)
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout2d)} == {share}


def test_nothing_is_normalised_so_a_prediction_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    torch.manual_seed(0)
    network = laddernet(widths=(3, 4, 5)).eval()
    image_BCS = torch.randn(2, 1, 8, 8) * torch.tensor([1.0, 9.0]).reshape(2, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(image_BCS)[1:], network(image_BCS[1:]))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_gradient_reaches_every_weight_under_one_name_each_in_2d_and_3d(dims: int) -> None:
    torch.manual_seed(0)
    network = laddernet(dims=dims, in_channels=2, classes=3, widths=(8, 8, 8), dropout=0.0)
    logits_BKS = network(torch.randn(2, 2, *(8,) * dims))
    assert logits_BKS.shape == (2, 3, *(8,) * dims)
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    named = dict(network.named_parameters(remove_duplicate=False))
    assert len(named) == len(list(network.parameters()))
    assert [name for name, parameter in named.items() if parameter.grad is None or not parameter.grad.any()] == []


def test_sizes_are_multiples_of_16() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="laddernet: expected a size that fits: Y 16, X 48 or 64, got 16×50"):
        laddernet()(torch.empty(1, 1, 16, 50))


def test_a_single_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"laddernet: expected at least 2 levels, got \(8,\); change `network.widths`"):
        laddernet(widths=(8,))
