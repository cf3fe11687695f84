"""The U-Net without skips: everything passes through the code."""

import pytest
import torch
from torch import nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.autoencoder import Autoencoder
from microtome.models.network import NetworkSpec
from microtome.models.unet_same import UNetSame


def spec(dims: int, widths: tuple[int, ...] = (), *, in_channels: int = 1, classes: int = 2) -> NetworkSpec:
    config = NetworkConfig(widths=widths)
    return NetworkSpec(name="autoencoder", dims=dims, in_channels=in_channels, classes=classes, config=config)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_the_padded_unet_less_what_its_skips_need(dims: int) -> None:
    """A skip doubles the channels that the first convolution of a decoder level sees: 3^dims x width x width more weights."""
    with torch.device("meta"):
        without, with_skips = Autoencoder(spec(dims)), UNetSame(spec(dims))
    assert parameters(with_skips) - parameters(without) == sum(3**dims * width**2 for width in (64, 128, 256, 512))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_code_has_the_last_width_and_a_16th_of_each_side(dims: int) -> None:
    with torch.device("meta"):
        network = Autoencoder(spec(dims, in_channels=3, classes=3))
        image_BCS = torch.empty(2, 3, *(16, 32, 48)[:dims])
        assert network.encode(image_BCS).shape == (2, 1024, *(1, 2, 3)[:dims])
        assert network(image_BCS).shape == (2, 3, *(16, 32, 48)[:dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_no_output_depends_on_the_image_except_through_the_code(dims: int) -> None:
    torch.manual_seed(0)
    network = Autoencoder(spec(dims, (4, 8, 8))).eval()
    image_BCS = torch.randn(1, 1, *(8,) * dims, requires_grad=True)
    code_BCS = network.encode(image_BCS)
    assert torch.equal(network.decode(code_BCS), network(image_BCS))
    (gradient,) = torch.autograd.grad(network(image_BCS).sum(), image_BCS)
    assert gradient.any()
    # The same forward pass with the code cut off from the image: nothing is left that leads there.
    network.contract[-1].register_forward_hook(lambda *args: args[-1].detach().requires_grad_())
    (gradient,) = torch.autograd.grad(network(image_BCS).sum(), image_BCS, allow_unused=True)
    assert gradient is None


def test_trained_on_its_own_input_its_error_falls() -> None:
    """The article's form: classes = channels, mean squared error to the image itself."""
    torch.manual_seed(0)
    network = Autoencoder(spec(2, (8, 16), in_channels=2, classes=2))
    image_BCS = 5 * nn.functional.avg_pool2d(torch.randn(4, 2, 20, 20), 5, stride=1)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    errors = []
    for _ in range(80):
        error = nn.functional.mse_loss(network(image_BCS), image_BCS)
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    # The image's own variance is the error of the best constant.
    assert errors[-1] < 0.3 * image_BCS.var().item() < errors[0]


def test_one_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"autoencoder: expected at least 2 levels, got \(8,\)"):
        Autoencoder(spec(2, (8,)))
