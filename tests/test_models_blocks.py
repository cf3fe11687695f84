"""Shared layers: right where torch is not, and sizes that a batch of one can train at."""

from typing import Any

import pytest
import torch
from torch import nn

from microtome.models import blocks
from microtome.models.blocks import CONVOLUTION, TRANSPOSED, Convolution3d, batch_normed_sizes, centre_crop, initialise_he, padded_sizes


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


@pytest.mark.parametrize(("have", "want"), [((9, 8), (4, 8)), ((5, 7, 12), (2, 7, 5)), ((6, 6), (6, 6))])
@pytest.mark.parametrize("training", [False, True])
def test_the_middle_is_cut_out_and_its_gradient_goes_there_alone_in_the_layout_of_the_map(
    have: tuple[int, ...], want: tuple[int, ...], training: bool
) -> None:
    layout = torch.channels_last if len(have) == 2 else torch.channels_last_3d
    features_BCS = torch.randn(2, 3, *have).to(memory_format=layout).requires_grad_(training)
    middle = (slice(None), slice(None), *(slice((h - w) // 2, (h - w) // 2 + w) for h, w in zip(have, want, strict=True)))
    found = centre_crop(features_BCS, torch.Size(want))
    assert torch.equal(found, features_BCS[middle])
    if not training:
        assert found.untyped_storage().data_ptr() == features_BCS.untyped_storage().data_ptr()
        return
    (gradient,) = torch.autograd.grad(found, features_BCS, torch.ones_like(found))
    expected = torch.zeros_like(features_BCS)
    expected[middle] = 1
    assert torch.equal(gradient, expected)
    assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("settings", "is_product"),
    [
        ({"kernel_size": 2, "stride": 2}, True),
        ({"kernel_size": (1, 3), "stride": (1, 3)}, True),
        ({"kernel_size": (1, 2, 3), "stride": (1, 2, 3)}, True),
        ({"kernel_size": 3, "stride": 2}, False),
        ({"kernel_size": 2, "stride": 2, "output_padding": 1}, False),
        ({"kernel_size": 2, "stride": 2, "padding": 1}, False),
        ({"kernel_size": 2, "stride": 2, "groups": 2}, False),
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, False),
    ],
)
def test_the_up_convolution_and_its_gradients_are_torch_s(
    settings: dict[str, Any], is_product: bool, channels_last: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dims = len(settings["kernel_size"]) if isinstance(settings["kernel_size"], tuple) else 2
    ours, theirs = (kind(4, 6, bias=bias, **settings) for kind in (TRANSPOSED[dims], (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2]))
    theirs.load_state_dict(ours.state_dict())
    layout = (torch.channels_last, torch.channels_last_3d)[dims - 2] if channels_last else torch.contiguous_format
    image_BCS = torch.randn(2, 4, 3, 4, 5)[(slice(None),) * 2 + (0,) * (3 - dims)].to(memory_format=layout).requires_grad_()
    calls: list[int] = []
    product = blocks.up_product
    monkeypatch.setattr(blocks, "up_product", lambda *arguments: (calls.append(1), product(*arguments))[1])
    found = [
        (layer(image_BCS), torch.autograd.grad(layer(image_BCS).sin().sum(), [image_BCS, *layer.parameters()])) for layer in (ours, theirs)
    ]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert bool(calls) == is_product
    calls.clear()
    with torch.no_grad():
        ours(image_BCS)
    # In a prediction and in an exported graph it is torch's.
    assert torch.equal(ours.eval()(image_BCS), theirs(image_BCS))
    assert not calls


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
