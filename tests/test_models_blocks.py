"""Shared layers: right where torch is not, and sizes that a batch of one can train at."""

import pytest
import torch
from torch import nn

from microtome.models.blocks import CONVOLUTION, Convolution3d, batch_normed_sizes, initialise_he, padded_sizes


@pytest.mark.parametrize(("kernel", "sections"), [(3, 1), (3, 2), (3, 3), (5, 2), (5, 3), (5, 4), (5, 6)])
def test_the_bfloat16_gradient_of_a_thin_stack_s_weights_is_that_of_float32(kernel: int, sections: int) -> None:
    torch.manual_seed(0)
    layer = CONVOLUTION[3](4, 6, kernel, padding=kernel // 2).to(memory_format=torch.channels_last_3d)
    image_BCS = torch.randn(2, 4, sections, 12, 12).to(memory_format=torch.channels_last_3d)
    gradients = []
    for precision in (torch.float32, torch.bfloat16):
        layer.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            output = layer(image_BCS)
        output.float().square().mean().backward()
        gradients.append(layer.weight.grad.clone())
    difference = (gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max()
    assert difference < 0.03


@pytest.mark.parametrize("sections", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stride", [1, (1, 2, 2), 2])
def test_the_convolution_that_pads_is_torch_s(sections: int, stride: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = Convolution3d(2, 3, 5, stride=stride, padding=2), nn.Conv3d(2, 3, 5, stride=stride, padding=2)
    theirs.load_state_dict(ours.state_dict())
    image_BCS = torch.randn(1, 2, sections, 6, 7)
    assert torch.allclose(ours(image_BCS), theirs(image_BCS), atol=1e-5)


def test_padded_networks_take_multiples_and_normalised_ones_two_voxels_at_the_bottom() -> None:
    assert (padded_sizes(3, 4).minimum, padded_sizes(3, 4).step) == ((8, 8, 8), (8, 8, 8))
    assert (batch_normed_sizes(3, 4).minimum, batch_normed_sizes(3, 4).step) == ((8, 16, 16), (8, 8, 8))
    assert batch_normed_sizes(2, 3).minimum == (8, 8)


def test_he_counts_the_inputs_of_a_group_only() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 5, groups=64)
    initialise_he(layer)
    # One channel of 25 values: sd sqrt(2 / 25) = 0.283.
    assert layer.weight.std().item() == pytest.approx(0.283, rel=0.1)
