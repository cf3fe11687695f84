"""UNet++: the authors' count, the nested skips, deep supervision, and pruning to a shallower head."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.network import NetworkSpec
from microtome.models.unetpp import UNetPlusPlus


def unetpp(dims: int = 2, *, in_channels: int = 1, classes: int = 1, **config: object) -> UNetPlusPlus:
    return UNetPlusPlus(NetworkSpec(name="unetpp", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config)))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: nn.Module, image_BCS: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image_BCS)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("supervised", "count"), [(1, 9_041_601), (4, 9_041_601 + 3 * 33)])
def test_it_has_the_authors_count_of_parameters_and_each_further_head_33_more(supervised: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(unetpp(supervised_levels=supervised)) == count


def test_every_node_has_the_width_of_its_level_and_the_size_of_its_level() -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        network = unetpp()
        for name, node in network.nodes.items():
            node.register_forward_hook(lambda *args, name=name: seen.update({name: tuple(args[-1].shape[1:])}))
        assert network(torch.empty(1, 1, 96, 96)).shape == (1, 1, 96, 96)
    expected = {f"x{i}_{j}": (32 << i, 96 >> i, 96 >> i) for i in range(5) for j in range(5 - i)}
    assert seen == expected


def test_a_node_sees_the_up_sampled_node_below_and_then_all_earlier_nodes_of_its_level() -> None:
    torch.manual_seed(0)
    network = unetpp(widths=(2, 3, 4, 5), dropout=0)
    maps: dict[str, Tensor] = {}
    for name, node in network.nodes.items():
        node.register_forward_hook(lambda *args, name=name: maps.update({name: args[-1]}))
    joined: dict[str, Tensor] = {}
    for name in ("x0_3", "x1_2"):
        network.nodes[name].register_forward_pre_hook(lambda _, inputs, name=name: joined.update({name: inputs[0]}))
    network(torch.randn(1, 1, 8, 8))
    up = network.up
    torch.testing.assert_close(joined["x0_3"], torch.cat([up["x0_3"](maps["x1_2"]), maps["x0_0"], maps["x0_1"], maps["x0_2"]], 1))
    torch.testing.assert_close(joined["x1_2"], torch.cat([up["x1_2"](maps["x2_1"]), maps["x1_0"], maps["x1_1"]], 1))


def test_a_node_is_two_convolutions_with_relu_and_dropout_of_a_half_and_no_norm() -> None:
    network = unetpp(widths=(2, 3))
    for node in network.nodes.values():
        assert [type(layer) for layer in node] == [nn.Conv2d, nn.ReLU, nn.Dropout] * 2
        assert [node[place].p for place in (2, 5)] == [0.5, 0.5]
    assert unetpp(widths=(2, 3), dropout=0.1).nodes["x0_0"][2].p == 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_in_training_every_supervised_head_answers_at_full_size_deepest_first_and_otherwise_the_deepest_alone(dims: int) -> None:
    torch.manual_seed(0)
    network = unetpp(dims, in_channels=2, classes=3, widths=(2, 3, 4), supervised_levels=2, dropout=0)
    maps: dict[str, Tensor] = {}
    for name in ("x0_1", "x0_2"):
        network.nodes[name].register_forward_hook(lambda *args, name=name: maps.update({name: args[-1]}))
    image_BCS = torch.randn(1, 2, *(8,) * dims)
    logits = network(image_BCS)
    assert isinstance(logits, list)
    assert [tuple(each.shape) for each in logits] == [(1, 3, *(8,) * dims)] * 2
    torch.testing.assert_close(logits[0], network.heads[0](maps["x0_2"]))
    torch.testing.assert_close(logits[1], network.heads[1](maps["x0_1"]))
    assert torch.allclose(network.eval()(image_BCS), logits[0], atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_gradient_reaches_every_weight(dims: int) -> None:
    torch.manual_seed(0)
    network = unetpp(dims, classes=2, widths=(4, 4, 4), supervised_levels=2)
    loss = sum((each * torch.randn_like(each)).sum() for each in network(torch.randn(2, 1, *(8,) * dims)))
    loss.backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pruned_network_answers_as_its_head_does_in_the_full_one_with_less(dims: int, depth: int) -> None:
    torch.manual_seed(0)
    network = unetpp(dims, classes=2, widths=(2, 3, 4, 5), supervised_levels=3, dropout=0)
    image_BCS = torch.randn(1, 1, *(8,) * dims)
    pruned = network.pruned(depth)
    assert pruned.training
    with torch.no_grad():
        torch.testing.assert_close(pruned(image_BCS), network(image_BCS)[3 - depth], rtol=0, atol=0)
    assert set(pruned.nodes) == {f"x{i}_{j}" for i in range(depth + 1) for j in range(depth + 1 - i)}
    assert parameters(pruned) < parameters(network)
    if depth < 3:
        assert multiply_adds(pruned.eval(), image_BCS) < multiply_adds(network.eval(), image_BCS)


def test_the_papers_network_has_fewer_parameters_and_multiply_adds_the_shallower_it_is_pruned() -> None:
    with torch.device("meta"):
        network = unetpp(supervised_levels=4)
        counts = [parameters(network.pruned(depth)) for depth in (1, 2, 3, 4)]
        work = [multiply_adds(network.pruned(depth).eval(), torch.empty(1, 1, 96, 96)) for depth in (1, 2, 3, 4)]
    # Two 3-convolutions a node, 2-convolutions up, a head: by hand for x0,0, x1,0, up to x0,1, x0,1.
    assert counts[0] == (320 + 9_248) + (18_496 + 36_928) + 8_224 + (18_464 + 9_248) + 33
    assert counts[-1] == 9_041_601
    assert sorted(counts) == counts
    assert sorted(work) == work
    assert work[0] < 0.25 * work[-1]


def test_a_pruned_network_has_weights_of_its_own_of_the_same_type_and_can_be_built_again_from_its_config() -> None:
    torch.manual_seed(0)
    network = unetpp(widths=(2, 3, 4), supervised_levels=2).to(torch.bfloat16).eval()
    pruned = network.pruned(1)
    assert not pruned.training
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    before = network.heads[1].bias.item()
    with torch.no_grad():
        pruned.heads[0].bias.fill_(7)
    assert network.heads[1].bias.item() == before
    again = UNetPlusPlus(pruned.spec)
    again.load_state_dict(pruned.state_dict())
    assert again.sizes == pruned.sizes
    assert pruned.nearest_sizes(3, 0) == (2, 4)


@pytest.mark.parametrize(("supervised", "depth", "heads"), [(1, 1, "2"), (1, 3, "2"), (2, 0, "2 or 1"), (2, -1, "2 or 1")])
def test_pruning_to_a_node_without_a_head_is_refused(supervised: int, depth: int, heads: str) -> None:
    network = unetpp(widths=(2, 3, 4), supervised_levels=supervised)
    with pytest.raises(ConfigError, match=f"a depth with a head, {heads}, got {depth}; train with more `network.supervised_levels`"):
        network.pruned(depth)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": (8,)}, r"at least 2 levels, got \(8,\)"),
        ({"widths": (8, 16), "supervised_levels": 2}, "at most 1 supervised levels, one a nested U-Net, got 2"),
        ({"supervised_levels": 5}, "at most 4 supervised levels"),
    ],
)
def test_what_it_cannot_be_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"unetpp: expected {message}"):
        unetpp(**config)


def test_a_side_that_is_no_multiple_of_16_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="Y 96, X 96 or 112, got 96×100"):
        unetpp()(torch.empty(1, 1, 96, 100))
