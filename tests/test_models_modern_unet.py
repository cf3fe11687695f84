"""The default network in 2D and 3D: the topology of nnU-Net, and every setting of its config."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.blocks import CONVOLUTION, InstanceNorm
from microtome.models.modern_unet import ModernUNet
from microtome.models.network import Network, NetworkSpec
from microtome.models.registry import build

RESENC_3D = (1, 3, 4, 6, 6, 6)
RESENC_2D = (1, 3, 4, 6, 6, 6, 6, 6)
WIDTHS_2D = (32, 64, 128, 256, 512, 512, 512, 512)


def modern(dims: int, *, in_channels: int = 1, classes: int = 2, **config: object) -> ModernUNet:
    spec = NetworkSpec(name="modern_unet", dims=dims, in_channels=in_channels, classes=classes, config=NetworkConfig(**config))
    return ModernUNet(spec)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("dims", "widths", "convolutions", "count"),
    [
        (3, (), 2, 31_195_594),
        (3, (), RESENC_3D, 102_349_770),
        (2, WIDTHS_2D, 2, 46_324_558),
        (2, WIDTHS_2D, RESENC_2D, 140_017_038),
    ],
)
def test_with_instance_norm_and_all_heads_it_has_the_parameters_of_nnunet(
    dims: int, widths: tuple[int, ...], convolutions: int | tuple[int, ...], count: int
) -> None:
    heads = len(widths or RESENC_3D) - 1
    with torch.device("meta"):
        residual = convolutions != 2
        network = modern(dims, widths=widths, convolutions=convolutions, residual=residual, norm="instance", supervised_levels=heads)
    assert parameters(network) == count


@pytest.mark.parametrize(("dims", "widths"), [(3, (32, 64, 128, 256, 320, 320)), (2, (32, 64, 128, 256, 512, 512))])
def test_without_settings_widths_double_up_to_320_in_3d_and_512_in_2d(dims: int, widths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = build("modern_unet", dims=dims, in_channels=1, classes=2)
        stages: list[tuple[int, int]] = []
        for stage in network.encoder:
            stage.register_forward_hook(lambda *args: stages.append((args[-1].shape[1], args[-1].shape[-1])))
        assert network(torch.empty(2, 1, *(64,) * dims)).shape == (2, 2, *(64,) * dims)
    assert stages == list(zip(widths, (64, 32, 16, 8, 4, 2), strict=True))


def test_strides_and_kernels_apply_level_by_level_and_axis_by_axis() -> None:
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 3))
    kernels = ((1, 3, 3), (3, 3, 3), (3, 5, 3))
    with torch.device("meta"):
        network = modern(3, widths=(2, 4, 6), strides=strides, kernels=kernels)
        sizes: list[tuple[int, ...]] = []
        for stage in network.encoder:
            stage.register_forward_hook(lambda *args: sizes.append(tuple(args[-1].shape[2:])))
        assert network(torch.empty(1, 1, 6, 16, 18)).shape == (1, 2, 6, 16, 18)
    assert sizes == [(6, 16, 18), (6, 8, 9), (3, 4, 3)]
    assert [stage[0][0].kernel_size for stage in network.encoder] == list(kernels)
    assert [stage[0][0].kernel_size for stage in network.decoder] == list(kernels[:2])
    assert [up.kernel_size for up in network.up] == [up.stride for up in network.up] == list(strides[1:])
    assert network.sizes.step == (2, 4, 6)


@given(data=st.data(), dims=st.sampled_from([2, 3]), levels=st.integers(2, 4), residual=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_size_that_fits_gives_logits_of_the_images_size(data: st.DataObject, dims: int, levels: int, residual: bool) -> None:
    per_axis = st.tuples(*[st.sampled_from([1, 2, 3])] * dims)
    strides = ((1,) * dims, *(data.draw(per_axis) for _ in range(levels - 1)))
    kernels = tuple(data.draw(st.tuples(*[st.sampled_from([1, 3])] * dims)) for _ in range(levels))
    norm = data.draw(st.sampled_from(["batch", "instance", "none"]))
    with torch.device("meta"):
        network = modern(dims, widths=(2,) * levels, strides=strides, kernels=kernels, residual=residual, norm=norm).eval()
        wanted = data.draw(st.tuples(*[st.integers(2, 30)] * dims))
        shape = tuple(network.nearest_sizes(n, axis)[1] for axis, n in enumerate(wanted))
        assert all(network.valid_size(n, axis) and n >= want for axis, (n, want) in enumerate(zip(shape, wanted, strict=True)))
        assert network(torch.empty(1, 1, *shape)).shape == (1, 2, *shape)


@pytest.mark.parametrize("dims", [2, 3])
def test_deep_supervision_returns_logits_finest_first_in_training_and_the_finest_alone_otherwise(dims: int) -> None:
    torch.manual_seed(0)
    network = modern(dims, classes=3, widths=(2, 3, 4, 5), norm="instance", supervised_levels=3)
    image_BCS = torch.randn(2, 1, *(16,) * dims)
    logits = network(image_BCS)
    assert isinstance(logits, list)
    assert [tuple(each.shape) for each in logits] == [(2, 3, *(n,) * dims) for n in (16, 8, 4)]
    network.eval()
    # Training multiplies the up-convolutions out in another order.
    assert torch.allclose(network(image_BCS), logits[0], atol=1e-5)


def test_heads_exist_only_where_there_is_a_loss() -> None:
    with torch.device("meta"):
        assert [len(modern(2, supervised_levels=n).heads) for n in (1, 2, 5)] == [1, 2, 5]
        assert isinstance(modern(2, widths=(2, 2))(torch.empty(2, 1, 8, 8)), Tensor)


def test_with_instance_norm_the_deepest_level_keeps_two_voxels_along_strided_axes() -> None:
    strides = ((1, 1, 1), (1, 2, 2), (1, 2, 2))
    with torch.device("meta"):
        batch, instance = (modern(3, widths=(2, 2, 2), strides=strides, norm=norm) for norm in ("batch", "instance"))
    assert (batch.nearest_sizes(1, 0), batch.nearest_sizes(1, 1)) == ((1, 1), (4, 4))
    assert (instance.nearest_sizes(1, 0), instance.nearest_sizes(1, 1)) == ((1, 1), (8, 8))
    assert instance.nearest_sizes(13, 2) == (12, 16)


def test_with_instance_norm_and_no_stride_at_all_the_smallest_size_has_two_voxels() -> None:
    with torch.device("meta"):
        network = modern(2, widths=(2, 2), strides=((1, 1), (1, 1)), norm="instance")
        assert [network.nearest_sizes(1, axis)[0] for axis in range(2)] == [1, 2]
        assert network(torch.empty(1, network.in_channels, 1, 2)).shape[2:] == (1, 2)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_a_residual_unit_starts_as_its_shortcut(norm: str) -> None:
    torch.manual_seed(0)
    network = modern(2, widths=(4, 4), strides=((1, 1), (2, 2)), residual=True, norm=norm)
    features_BCS = torch.randn(2, 4, 8, 8)
    pooled = nn.functional.avg_pool2d(features_BCS, 2)
    torch.testing.assert_close(network.encoder[1][0](features_BCS), nn.functional.leaky_relu(pooled, 0.01))


def test_residual_networks_have_a_stem_units_as_set_and_one_convolution_a_decoder_level() -> None:
    with torch.device("meta"):
        network = modern(2, widths=(2, 4, 8), residual=True, convolutions=3)
        assert [len(stage) for stage in network.encoder] == [3, 3, 3]
        assert [len(stage) for stage in network.decoder] == [1, 1]
        plain = modern(2, widths=(2, 4, 8), convolutions=3)
        assert [len(stage) for stage in [*plain.encoder, *plain.decoder]] == [3] * 5
        assert isinstance(plain.stem, nn.Identity)


def test_convolutions_may_differ_from_level_to_level_and_the_decoder_has_those_of_its_level() -> None:
    with torch.device("meta"):
        plain = modern(3, convolutions=(1, 3, 2))
        assert [len(stage) for stage in plain.encoder] == [1, 3, 2]
        assert [len(stage) for stage in plain.decoder] == [1, 3]
        residual = modern(3, convolutions=(1, 3, 2), residual=True)
        assert [len(stage) for stage in residual.encoder] == [1, 3, 2]
        assert [len(stage) for stage in residual.decoder] == [1, 1]


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm3d), ("instance", InstanceNorm), ("none", None)])
def test_a_convolution_is_followed_by_norm_and_leaky_relu_of_slope_001(norm: str, kind: type[nn.Module] | None) -> None:
    network = modern(3, widths=(2, 4), norm=norm)
    for layers in (network.encoder[0][1], network.encoder[1][0], network.decoder[0][0]):
        assert [type(layer) for layer in layers] == [CONVOLUTION[3], *([kind] if kind else []), nn.LeakyReLU]
        assert layers[-1].negative_slope == 0.01


def test_the_up_sampled_half_comes_first_in_a_concatenation() -> None:
    network = modern(2, widths=(2, 4))
    halves: dict[str, Tensor] = {}
    network.up[0].register_forward_hook(lambda *args: halves.update(up=args[-1]))
    network.encoder[0].register_forward_hook(lambda *args: halves.update(skip=args[-1]))
    network.decoder[0].register_forward_pre_hook(lambda _, inputs: halves.update(joined=inputs[0]))
    network(torch.randn(2, 1, 8, 8))
    assert torch.equal(halves["joined"], torch.cat([halves["up"], halves["skip"]], 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": (8,)}, r"at least 2 levels, got \(8,\)"),
        ({"widths": (8, 16), "supervised_levels": 2}, "at most 1, got 2; change `network.supervised_levels`"),
        ({"widths": (8, 16), "strides": ((1, 1),)}, "2 strides, one a level"),
        ({"widths": (8, 16), "strides": ((1, 1, 1), (2, 2, 2))}, "strides of 2 positive numbers each"),
        ({"widths": (8, 16), "strides": ((1, 2), (2, 2))}, r"a first stride of 1 along each axis, got \(1, 2\)"),
        ({"widths": (8, 16), "strides": ((1, 1), (0, 2))}, "strides of 2 positive numbers each"),
        ({"widths": (8, 16), "kernels": ((3, 3), (2, 3))}, "odd kernels"),
        ({"widths": (8, 16), "kernels": ((3, 3), (3, 3), (3, 3))}, "2 kernels, one a level"),
        ({"widths": (8, 16), "convolutions": (1, 2, 3)}, r"2 convolutions, one a level, got \(1, 2, 3\); change `network.convolutions`"),
        ({"widths": (8, -16)}, r"positive widths, got \(8, -16\)"),
    ],
)
def test_settings_that_do_not_agree_are_refused_by_name(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"modern_unet: expected .*{message}"):
        build("modern_unet", dims=2, in_channels=1, classes=2, config=NetworkConfig(**config))


def test_activations_neither_die_nor_explode_without_norm() -> None:
    torch.manual_seed(0)
    network: Network = modern(2, widths=(32,) * 5, norm="none").eval()
    with torch.no_grad():
        sd = network(torch.randn(4, 1, 64, 64)).std().item()
    assert 0.3 < sd < 4


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gradient_channels_last", [False, True])
def test_instance_norm_in_any_layout_is_that_of_torch_in_values_and_gradients(
    dims: int, batch: int, channels_last: bool, gradient_channels_last: bool
) -> None:
    """Torch's runs on contiguous tensors: with channels-last gradients and a batch of one its own are wrong (2.13, CPU)."""
    torch.manual_seed(0)
    torch_norm = (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(5, affine=True)
    norm = InstanceNorm(5)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    layout = last if channels_last else torch.contiguous_format
    for parameter in torch_norm.parameters():
        nn.init.normal_(parameter)
    norm.load_state_dict(torch_norm.state_dict())
    image = 3 + 2 * torch.randn(batch, 5, *(6, 7, 8)[:dims])
    ours_in, torch_in = image.clone(memory_format=layout).requires_grad_(), image.clone().requires_grad_()
    ours, theirs = norm(ours_in), torch_norm(torch_in)
    assert ours.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(image)
    ours.backward(gradient.clone(memory_format=last) if gradient_channels_last else gradient)
    theirs.backward(gradient)
    torch.testing.assert_close(ours_in.grad, torch_in.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, torch_norm.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.bias.grad, torch_norm.bias.grad, rtol=1e-4, atol=1e-4)
