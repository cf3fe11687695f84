"""Test-time averaging against what can be computed by hand: turned by quarters, mirrored one by one."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microtome.inference.averaging import mirrored_mean, rotated_mean
from microtome.inference.mirroring import ROTATIONS
from tests.small import one_thread  # noqa: F401 - a fixture


def any_size(n: int, axis: int) -> tuple[int, int]:
    return n, n


def multiples_of_eight(n: int, axis: int) -> tuple[int, int]:
    return n // 8 * 8, -(-n // 8) * 8


def random_convolution(dims: int = 2, *, padding: int = 1) -> nn.Module:
    torch.manual_seed(1)
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(1, 2, 3, padding=padding, padding_mode="zeros")


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (9, 14)])
def test_four_rotations_are_the_quarter_turns(shape: tuple[int, int]) -> None:
    network, image = random_convolution(), torch.randn(1, 1, *shape)
    with torch.no_grad():
        expected = torch.stack([torch.rot90(network(torch.rot90(image, k, (-2, -1))), -k, (-2, -1)) for k in range(4)]).mean(0)
        assert torch.allclose(rotated_mean(network, image, any_size, count=4), expected, atol=1e-5)


def test_quarter_turns_of_a_volume_stay_in_its_sections() -> None:
    network, image = random_convolution(3), torch.randn(1, 1, 3, 8, 10)
    with torch.no_grad():
        expected = torch.stack([torch.rot90(network(torch.rot90(image, k, (-2, -1))), -k, (-2, -1)) for k in range(4)]).mean(0)
        assert torch.allclose(rotated_mean(network, image, any_size, count=4), expected, atol=1e-5)


def test_a_network_without_padding_answers_for_the_middle_of_every_version() -> None:
    network, image = random_convolution(padding=0), torch.randn(1, 1, 11, 16)
    with torch.no_grad():
        expected = torch.stack([torch.rot90(network(torch.rot90(image, k, (-2, -1))), -k, (-2, -1)) for k in range(4)]).mean(0)
        answer = rotated_mean(network, image, any_size, context_vox=1, count=4)
    assert answer.shape == (1, 2, 9, 14)
    assert torch.allclose(answer, expected, atol=1e-5)


def test_seven_rotations_of_a_smooth_picture_leave_what_depends_on_a_pixel_alone() -> None:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(56.0), indexing="ij")
    image = (torch.sin(y / 9) + torch.cos(x / 7))[None, None]

    def pointwise(image_BCS: Tensor) -> Tensor:
        assert all(n % 8 == 0 for n in image_BCS.shape[2:])
        return torch.cat([image_BCS, -2 * image_BCS], dim=1)

    answer = rotated_mean(pointwise, image, multiples_of_eight)
    # Twice linear interpolation of a wave of 44 pixels; at the border the mirror's kink is interpolated too.
    assert torch.allclose(answer[..., 2:-2, 2:-2], pointwise(image)[..., 2:-2, 2:-2], atol=0.03)
    assert torch.allclose(answer, pointwise(image), atol=0.25)


def test_oblong_pixels_are_turned_in_millimetres() -> None:
    spacing = (3.0, 1.0)
    y, x = torch.meshgrid((torch.arange(13.0) - 6) * spacing[0], (torch.arange(39.0) - 19) * spacing[1], indexing="ij")
    shown: list[Tensor] = []

    def slope(image_BCS: Tensor) -> Tensor:
        shown.append(image_BCS[0, 0])
        return image_BCS

    answer = rotated_mean(slope, (2 * y + x)[None, None], any_size, spacing_mm=spacing)
    for number, turned in enumerate(shown):
        rows, columns = (torch.arange(float(n)) - (n - 1) / 2 for n in turned.shape)
        down, right = torch.meshgrid(rows * spacing[0], columns * spacing[1], indexing="ij")
        angle = torch.tensor(2 * np.pi * number / ROTATIONS)
        expected = 2 * (angle.cos() * down + angle.sin() * right) + (angle.cos() * right - angle.sin() * down)
        # Further out lies what the mirror shows.
        near = torch.hypot(down, right) < 17
        assert torch.allclose(turned[near], expected[near], atol=1e-3)
    assert torch.allclose(answer[0, 0][torch.hypot(y, x) < 13], (2 * y + x)[torch.hypot(y, x) < 13], atol=1e-3)


def test_as_many_versions_are_shown_as_the_paper_averages() -> None:
    shown = []

    def network(image_BCS: Tensor) -> Tensor:
        shown.append(image_BCS)
        return image_BCS

    rotated_mean(network, torch.randn(1, 1, 8, 8), any_size)
    assert len(shown) == ROTATIONS == 7


def test_the_mirrored_mean_takes_every_combination_of_axes_once() -> None:
    network, image = random_convolution(), torch.randn(2, 1, 7, 9)
    with torch.no_grad():
        versions = [network(image.flip(axes)).flip(axes) if axes else network(image) for axes in ([], [2], [3], [2, 3])]
        assert torch.allclose(mirrored_mean(network, image, (0, 1)), torch.stack(versions).mean(0), atol=1e-6)
        assert torch.equal(mirrored_mean(network, image, ()), network(image))


def test_averaging_makes_an_uneven_network_even() -> None:
    # A derivative along x: its mirrored mean is 0.
    kernel = torch.tensor([[[[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]]]])
    image = torch.randn(1, 1, 10, 10)
    mean = mirrored_mean(lambda image_BCS: F.conv2d(image_BCS, kernel, padding=1), image, (1,))
    assert np.abs(mean.numpy()).max() < 1e-6
