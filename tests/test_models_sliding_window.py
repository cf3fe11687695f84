"""Ciresan's N4 in both ways: one window a pixel, and the whole image at once."""

import pytest
import torch
from torch import nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.network import NetworkSpec
from microtome.models.sliding_window import SlidingWindow

SMALL = (3, 4, 4, 5, 6)


def sliding(widths: tuple[int, ...] = (), *, in_channels: int = 1, classes: int = 2) -> SlidingWindow:
    config = NetworkConfig(widths=widths)
    return SlidingWindow(NetworkSpec(name="sliding_window", dims=2, in_channels=in_channels, classes=classes, config=config))


def test_it_has_the_parameters_of_n4_each_under_one_name() -> None:
    with torch.device("meta"):
        network = sliding()
    counts = [parameter.numel() for parameter in network.parameters()]
    assert sum(counts) == 219_290
    # Weights and biases of four convolutions and two fully connected layers, by hand.
    weights = [48 * 16, 48 * 48 * 25, 48 * 48 * 16, 48 * 48 * 16, 200 * 48 * 9, 2 * 200]
    biases = [48, 48, 48, 48, 200, 2]
    assert counts == [n for pair in zip(weights, biases, strict=True) for n in pair]


def test_a_window_of_95_pixels_shrinks_as_in_the_table_of_n4() -> None:
    network = sliding(SMALL)
    kernels = [layer.kernel_size[0] for layer in network.convolutions]
    assert kernels == [4, 5, 4, 4]
    sides, side = [], network.window_vox
    for kernel in kernels:
        sides += [side - kernel + 1, (side - kernel + 1) // 2]
        side = sides[-1]
    assert (network.window_vox, sides) == (95, [92, 46, 42, 21, 18, 9, 6, 3])
    assert network.hidden.kernel_size == (3, 3)


def test_any_size_from_95_on_loses_47_pixels_a_side() -> None:
    with torch.device("meta"):
        network = sliding()
        assert network.context_vox == 47
        assert network(torch.empty(2, 1, 95, 188)).shape == (2, 2, 1, 94)
        assert [n for n in range(90, 100) if network.valid_size(n, 0)] == [95, 96, 97, 98, 99]
        with pytest.raises(ConfigError, match="sliding_window: expected a size that fits: Y 100, X 95, got 100×94"):
            network(torch.empty(1, 1, 100, 94))


@pytest.mark.parametrize(("widths", "side"), [(SMALL, 101), ((3, 4, 5), 31), ((3, 4), 14), ((2, 3, 4, 5), 50), ((2, 2, 2, 2, 3, 4), 192)])
def test_the_whole_image_at_once_gives_the_map_of_one_window_a_pixel(widths: tuple[int, ...], side: int) -> None:
    """Same products, added up in another order: equal to the rounding of float32 (1e-5 of values of about 1)."""
    torch.manual_seed(0)
    network = sliding(widths, in_channels=2, classes=3)
    image_BCS = torch.randn(2, 2, side, side + 1)
    with torch.no_grad():
        at_once = network(image_BCS)
        windows = network.forward_windows(image_BCS, batch=7)
    assert at_once.shape == (2, 3, side - 2 * network.context_vox, side + 1 - 2 * network.context_vox)
    assert at_once.std() > 0.01
    torch.testing.assert_close(windows, at_once, rtol=1e-4, atol=1e-5)


def test_a_window_passes_through_pooling_and_fully_connected_layers_as_in_the_paper() -> None:
    """The same weights in PyTorch's own layers, stride 2 and linear."""
    torch.manual_seed(0)
    network = sliding(SMALL)
    plain = nn.Sequential()
    for layer in network.convolutions:
        plain.extend([layer, nn.ReLU(), nn.MaxPool2d(2)])
    hidden, head = nn.Linear(5 * 9, 6), nn.Linear(6, 2)
    plain.extend([nn.Flatten(), hidden, nn.ReLU(), head])
    with torch.no_grad():
        for linear, convolution in ((hidden, network.hidden), (head, network.head)):
            linear.weight.copy_(convolution.weight.flatten(1))
            linear.bias.copy_(convolution.bias)
        image_BCS = torch.randn(3, 1, 95, 95)
        torch.testing.assert_close(network.forward_windows(image_BCS)[..., 0, 0], plain(image_BCS), rtol=1e-4, atol=1e-5)


def test_a_logit_depends_on_its_own_window_only() -> None:
    torch.manual_seed(0)
    network = sliding(SMALL).eval()
    image_BCS = torch.randn(1, 1, 99, 99)
    logits_BKS = network(image_BCS)
    inside, outside = image_BCS.clone(), image_BCS.clone()
    outside[..., :2, :] += 100
    inside[..., 2:97, 2:97] += torch.randn(95, 95)
    assert torch.equal(network(outside)[..., 2:, :], logits_BKS[..., 2:, :])
    assert not torch.equal(network(inside)[..., 2, 2], logits_BKS[..., 2, 2])


def test_both_ways_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    network = sliding((3, 4, 5))
    image_BCS = torch.randn(1, 1, 25, 26)
    weight_BKS = torch.randn(1, 2, 3, 4)
    first, second = (
        torch.autograd.grad((form(image_BCS) * weight_BKS).sum(), list(network.parameters()))
        for form in (network.forward, network.forward_windows)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fewer_than_two_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"maps of a convolution or more, then hidden units, got \(48,\)"):
        sliding((48,))
