"""Activations computed twice: the same gradients and statistics for every network, and fewer values held."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.geometry import Sizes
from microtome.inference.devices import arithmetic
from microtome.models.network import Network, NetworkSpec
from microtome.models.registry import NETWORKS, build
from microtome.models.segments import recomputed_values, segments
from microtome.models.trace import trace
from microtome.training.recompute import recomputing, statistics_kept
from tests.small import one_thread

__all__ = ["one_thread"]

CPU = torch.device("cpu")
EVERY = [(name, dims) for name, entry in NETWORKS.items() for dims in entry.dims]


def small(name: str, dims: int) -> tuple[Network, tuple[int, ...]]:
    """The network with few channels, in training mode, and the smallest size from 8 that it takes."""
    torch.manual_seed(0)
    widths = {"widths": (4, 8, 8)} if "widths" in NETWORKS[name].settings else {}
    network = build(name, dims=dims, in_channels=1, classes=3, config=NetworkConfig(name=name, **widths)).train()
    return network, tuple(network.nearest_sizes(8, axis)[1] for axis in range(dims))


def step(network: Network, size: tuple[int, ...], precision: str = "fp32") -> None:
    """Forward and backward of a batch of two that follows from the size alone."""
    torch.manual_seed(1)
    image_BCS = torch.randn(2, 1, *size)
    with arithmetic(CPU, precision):
        outputs = network(image_BCS)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    torch.stack([logits.float().square().mean() for logits in outputs]).sum().backward()


def assert_alike(one: Network, other: Network) -> None:
    """The same gradients, and buffers, bit for bit."""
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


class Chain(Network):
    """Two blocks and a head, one channel all along; `dropout` in the first block; a block may be called twice."""

    def __init__(self, *, dropout: float = 0.0, calls: int = 1) -> None:
        super().__init__(NetworkSpec(name="chain", dims=2, in_channels=1, classes=1), Sizes((2, 2), (1, 1)))
        block = [nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU(inplace=True)]
        self.first = nn.Sequential(*copy.deepcopy(block), nn.Dropout(dropout)) if dropout else nn.Sequential(*copy.deepcopy(block))
        self.second = nn.Sequential(*block)
        self.head = nn.Conv2d(1, 1, 1)
        self.calls = calls

    def forward(self, image_BCS: Tensor) -> Tensor:
        features_BCS = image_BCS
        for _ in range(self.calls):
            features_BCS = self.first(features_BCS)
        logits_BKS: Tensor = self.head(self.second(features_BCS))
        return logits_BKS


# ---- gradients and statistics ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_gradients_and_running_statistics_of_every_network_are_those_of_a_plain_step(name: str, dims: int, precision: str) -> None:
    plain, size = small(name, dims)
    twice = copy.deepcopy(plain)
    step(plain, size, precision)
    with recomputing(twice, size):
        step(twice, size, precision)
    assert_alike(plain, twice)


def test_what_was_dropped_is_dropped_again() -> None:
    torch.manual_seed(0)
    plain = Chain(dropout=0.5)
    twice = copy.deepcopy(plain)
    step(plain, (12, 12))
    with recomputing(twice, (12, 12)):
        step(twice, (12, 12))
    assert plain.first[0].weight.grad is not None
    assert plain.first[0].weight.grad.any()
    assert_alike(plain, twice)


@pytest.mark.parametrize("calls", [1, 2])
def test_batch_norm_counts_a_batch_once_for_each_call(calls: int) -> None:
    network = Chain(calls=calls)
    with recomputing(network, (8, 8)):
        step(network, (8, 8))
    assert [network.first[1].num_batches_tracked.item(), network.second[1].num_batches_tracked.item()] == [calls, 1]


def test_statistics_move_in_copies_only() -> None:
    norm = nn.BatchNorm2d(3)
    before = {name: (buffer, buffer.clone()) for name, buffer in norm.named_buffers()}
    with statistics_kept(norm):
        norm(torch.randn(4, 3, 5, 5) + 7)
        assert norm.running_mean is not None
        assert norm.running_mean.min() > 0.5
    for name, buffer in norm.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])


def test_afterwards_the_network_is_as_it_was_even_after_an_error() -> None:
    network, size = small("unet_same", 2)
    names = segments(network, trace(network, (1, *size)))
    changed: list[bool] = []

    def fail() -> None:
        with recomputing(network, size):
            changed.extend("forward" in vars(network.get_submodule(name)) for name in names)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert changed
    assert all(changed)
    assert not any("forward" in vars(module) for module in network.modules())
    assert list(network.state_dict()) == list(small("unet_same", 2)[0].state_dict())


def test_without_gradients_it_predicts_as_ever() -> None:
    network, size = small("unet_same", 2)
    image_BCS = torch.randn(1, 1, *size)
    with torch.no_grad():
        expected = network.eval()(image_BCS)
        with recomputing(network, size):
            assert torch.equal(network(image_BCS), expected)


# ---- what is held ----


@contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes of each tensor that the forward pass keeps for the gradient outside of the parts."""
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize(("name", "dims"), [("modern_unet", 3), ("unet_same", 2), ("nnunet_plain", 2), ("r2unet", 2)])
def test_the_forward_pass_keeps_much_less(name: str, dims: int) -> None:
    network, _ = small(name, dims)
    size = (32,) * dims
    kept: list[int] = []
    contexts: list[AbstractContextManager[None]] = [nullcontext(), recomputing(network, size)]
    for context in contexts:
        with context, counting() as found:
            network(torch.randn(2, 1, *size))
        kept.append(sum(found))
    assert 0 < kept[1] < 0.65 * kept[0]


def test_what_is_held_is_counted_as_by_hand() -> None:
    network, n = Chain(), 10 * 12
    graph = trace(network, (1, 10, 12))
    # Image, two values a voxel in each block (convolution, norm; the ReLU works in place), head.
    assert graph.values == 6 * n
    # Image, what the first block hands on, and the three after it: as much as with the second block computed twice, so it is not.
    assert segments(network, graph) == ("first",)
    assert recomputed_values(network, graph) == 5 * n


def test_a_block_that_holds_most_is_cut_into_its_own_blocks() -> None:
    network, n = Chain(), 8 * 8
    network.second = nn.Sequential(nn.Sequential(*(copy.deepcopy(network.first) for _ in range(4))))
    graph = trace(network, (1, 8, 8))
    assert graph.values == 12 * n
    names = segments(network, graph)
    assert {"first", "second.0.0", "second.0.1", "second.0.2"} <= set(names)
    assert not {"second", "second.0"} & set(names)
    # Image and what four blocks hand on, the two of the last block and the head.
    assert recomputed_values(network, graph) == 8 * n


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_no_network_holds_more_and_parts_do_not_overlap(name: str, dims: int) -> None:
    network, size = small(name, dims)
    graph = trace(network, (1, *size))
    names = segments(network, graph)
    assert 0 < recomputed_values(network, graph) <= graph.values
    assert len(set(names)) == len(names)
    assert not any(one != other and one.startswith(other + ".") for one in names for other in names)
    if name != "sliding_window":
        assert names
