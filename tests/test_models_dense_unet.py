"""FC-DenseNet: the authors' counts and widths, dense blocks, and transitions up that carry the new maps alone."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.dense_unet import DenseBlock, FCDenseNet
from microtome.models.network import NetworkSpec

Shape = tuple[int, ...]


def dense(dims: int = 2, *, variant: str = "", in_channels: int = 3, classes: int = 11, **config: object) -> FCDenseNet:
    sizes = NetworkConfig(**config)
    return FCDenseNet(NetworkSpec(name="dense_unet", dims=dims, in_channels=in_channels, classes=classes, config=sizes, variant=variant))


@pytest.mark.parametrize(
    ("variant", "trained", "with_statistics"),
    [("103", 9_322_091, 9_425_163), ("67", 3_463_243, 3_502_923), ("56", 1_376_795, 1_397_963)],
)
def test_every_variant_has_its_count_of_parameters_and_of_parameters_with_running_statistics(
    variant: str, trained: int, with_statistics: int
) -> None:
    with torch.device("meta"):
        network = dense(variant=variant)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    statistics = sum(buffer.numel() for name, buffer in network.named_buffers() if "running" in name)
    assert (parameters, parameters + statistics) == (trained, with_statistics)


def test_without_a_variant_it_is_103_with_the_stacks_of_the_authors_erratum() -> None:
    widths: list[int] = []
    with torch.device("meta"):
        network = dense()
        for block in [*network.contract, *network.expand]:
            block.register_forward_hook(lambda *args: widths.append(args[-1].shape[1]))
        assert network(torch.empty(1, 3, 64, 96)).shape == (1, 11, 64, 96)
    assert widths == [112, 192, 304, 464, 656, 896, 1088, 816, 576, 384, 256]


def test_103_has_the_papers_layers_in_its_blocks_and_one_and_the_same_growth() -> None:
    with torch.device("meta"):
        network = dense()
    assert [len(block.layers) for block in network.contract] == [4, 5, 7, 10, 12, 15]
    assert [len(block.layers) for block in network.expand] == [4, 5, 7, 10, 12]
    convolutions = [layer[2] for block in [*network.contract, *network.expand] for layer in block.layers]
    assert {convolution.out_channels for convolution in convolutions} == {16}
    assert network.first.out_channels == 48
    # The convolutions that the name counts: 91 in blocks, the first, 5 down, 5 up, the last.
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert sum(isinstance(module, kinds) for module in network.modules()) == 103


def test_a_transition_up_sees_only_the_maps_that_the_block_below_added() -> None:
    torch.manual_seed(0)
    network = dense(in_channels=1, classes=2, widths=(6, 8, 10))
    seen: dict[str, Tensor] = {}
    network.contract[2].register_forward_hook(lambda *args: seen.update(bottom=args[-1]))
    network.expand[1].register_forward_hook(lambda *args: seen.update(middle=args[-1]))
    network.up[1].register_forward_pre_hook(lambda _, inputs: seen.update(into_1=inputs[0]))
    network.up[0].register_forward_pre_hook(lambda _, inputs: seen.update(into_0=inputs[0]))
    network(torch.randn(1, 1, 8, 8))
    assert [seen[name].shape[1] for name in ("bottom", "into_1", "middle", "into_0")] == [6 + 6 + 8 + 10, 10, 10 + 20 + 8, 8]
    assert torch.equal(seen["into_1"], seen["bottom"][:, -10:])
    assert torch.equal(seen["into_0"], seen["middle"][:, -8:])


def test_the_up_sampled_maps_come_before_the_skip() -> None:
    torch.manual_seed(0)
    network = dense(in_channels=1, classes=2, widths=(4, 6))
    seen: dict[str, Tensor] = {}
    network.up[0].register_forward_hook(lambda *args: seen.update(up=args[-1]))
    network.contract[0].register_forward_hook(lambda *args: seen.update(skip=args[-1]))
    network.expand[0].register_forward_pre_hook(lambda _, inputs: seen.update(joined=inputs[0]))
    network(torch.randn(1, 1, 4, 4))
    assert seen["up"].shape[2:] == (5, 5)
    assert torch.equal(seen["joined"], torch.cat([seen["up"][..., :4, :4], seen["skip"]], 1))


def test_a_block_gives_its_input_and_then_layers_of_all_the_maps_before_them() -> None:
    torch.manual_seed(0)
    block = DenseBlock(2, 3, 40, growth=16, dropout=0.2).eval()
    assert [layer[2].out_channels for layer in block.layers] == [16, 16, 8]
    assert [layer[2].in_channels for layer in block.layers] == [3, 19, 35]
    features_BCS = torch.randn(2, 3, 4, 4)
    stack_BCS = block(features_BCS)
    assert torch.equal(stack_BCS[:, :3], features_BCS)
    torch.testing.assert_close(stack_BCS[:, 19:35], block.layers[1](stack_BCS[:, :19]))
    torch.testing.assert_close(stack_BCS[:, 35:], block.layers[2](stack_BCS[:, :35]))


@pytest.mark.parametrize(("dropout", "share"), [(None, 0.2), (0.0, 0.0), (0.4, 0.4)])
def test_dropout_follows_every_convolution_of_blocks_and_transitions_down(dropout: float | None, share: float) -> None:
    network = dense(widths=(40, 16, 8), dropout=dropout)
    dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in dropouts] == [share] * (3 + 1 + 1 + 2 + 1 + 3)


def test_a_side_that_is_no_multiple_of_32_is_refused() -> None:
    with torch.device("meta"):
        network = dense(in_channels=1)
        with pytest.raises(ConfigError, match=r"dense_unet: .*Y 64, X 96 or 128, got 64×100"):
            network(torch.empty(1, 1, 64, 100))
    assert network.nearest_sizes(33, 0) == (64, 64)


def test_a_thin_stack_has_32_sections_and_more_than_one_voxel_at_the_bottom() -> None:
    with torch.device("meta"):
        network = dense(3)
        assert [network.nearest_sizes(1, axis)[0] for axis in range(3)] == [32, 64, 64]
        assert network(torch.empty(1, 3, 32, 64, 64)).shape == (1, 11, 32, 64, 64)


@pytest.mark.parametrize(("dims", "widths"), [(2, (6, 8, 8)), (3, (6, 8)), (2, (3, 40, 5, 6))])
def test_a_batch_of_one_of_the_smallest_size_trains_every_weight(dims: int, widths: Shape) -> None:
    torch.manual_seed(0)
    network = dense(dims, in_channels=2, classes=3, widths=widths)
    image_BCS = torch.randn(1, 2, *(network.nearest_sizes(1, axis)[1] for axis in range(dims)))
    logits_BKS = network(image_BCS)
    assert logits_BKS.shape == (1, 3, *image_BCS.shape[2:])
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in network.named_parameters() if name.endswith("weight") and not parameter.grad.any()] == []


def test_the_weights_are_uniform_with_the_variance_of_he() -> None:
    torch.manual_seed(0)
    network = dense(widths=(64, 64))
    weight = network.down[0][2].weight
    assert network.down[0][2].in_channels == 48 + 64
    assert weight.abs().max().item() <= (6 / 112) ** 0.5
    assert weight.std().item() == pytest.approx((2 / 112) ** 0.5, rel=0.02)


def test_fewer_than_two_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dense_unet: expected at least 2 levels, got \(16,\); change `network.widths`"):
        dense(widths=(16,))
