"""The U-Net of 2015 and the padded one of the worked example, held against the paper's figure."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.blocks import TRANSPOSED
from microtome.models.network import Network, NetworkSpec
from microtome.models.unet import UNet
from microtome.models.unet_same import UNetSame

Shape = tuple[int, ...]


def unet(variant: str = "", widths: Shape = (), *, in_channels: int = 1, classes: int = 2, dropout: float | None = None) -> Network:
    config = NetworkConfig(widths=widths, dropout=dropout)
    return UNet(NetworkSpec(name="unet", dims=2, in_channels=in_channels, classes=classes, config=config, variant=variant))


def unet_same(dims: int = 2, widths: Shape = (), *, in_channels: int = 3, classes: int = 1) -> Network:
    config = NetworkConfig(widths=widths)
    return UNetSame(NetworkSpec(name="unet_same", dims=dims, in_channels=in_channels, classes=classes, config=config))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shapes_in_order(network: Network, image_BCS: Tensor) -> list[tuple[str, Shape]]:
    """Kind and output (C, *S) of each convolution, pooling and up-convolution, as they run."""
    kinds = {nn.Conv2d: "conv", nn.MaxPool2d: "pool", TRANSPOSED[2]: "up"}
    seen: list[tuple[str, Shape]] = []
    for module in network.modules():
        if type(module) in kinds:
            module.register_forward_hook(lambda m, _, out: seen.append((kinds[type(m)], tuple(out.shape[1:]))))
    network(image_BCS)
    return seen


@pytest.mark.parametrize(("channels", "classes", "count"), [(1, 2, 31_030_658), (1, 1, 31_030_593), (3, 1, 31_031_745), (3, 2, 31_031_810)])
def test_the_papers_network_has_the_known_number_of_parameters(channels: int, classes: int, count: int) -> None:
    with torch.device("meta"):
        network = unet(in_channels=channels, classes=classes)
    assert parameters(network) == count


def test_the_papers_network_splits_into_weights_and_biases_as_counted() -> None:
    with torch.device("meta"):
        network = unet()
    biases = sum(p.numel() for name, p in network.named_parameters() if name.endswith("bias"))
    assert (parameters(network) - biases, biases) == (31_023_808, 6_850)


def test_the_released_network_has_the_known_number_of_parameters() -> None:
    with torch.device("meta"):
        network = unet("release")
    assert parameters(network) == 31_100_354


def test_every_layer_of_a_572_image_is_as_in_the_figure() -> None:
    with torch.device("meta"):
        seen = shapes_in_order(unet(), torch.empty(1, 1, 572, 572))
    down = [(64, 570, 568, 284), (128, 282, 280, 140), (256, 138, 136, 68), (512, 66, 64, 32)]
    up = [(512, 56, 54, 52), (256, 104, 102, 100), (128, 200, 198, 196), (64, 392, 390, 388)]
    expected = [(kind, (c, n, n)) for c, *sides in down for kind, n in zip(("conv", "conv", "pool"), sides, strict=True)]
    expected += [("conv", (1024, 30, 30)), ("conv", (1024, 28, 28))]
    expected += [(kind, (c, n, n)) for c, *sides in up for kind, n in zip(("up", "conv", "conv"), sides, strict=True)]
    assert seen == [*expected, ("conv", (2, 388, 388))]
    assert sum(kind in ("conv", "up") for kind, _ in seen) == 23


def test_the_papers_network_has_18_relus_and_no_normalisation() -> None:
    with torch.device("meta"):
        kinds = [type(module) for module in unet().modules()]
    assert kinds.count(nn.ReLU) == kinds.count(nn.Conv2d) - 1 == 18
    assert not {nn.BatchNorm2d, nn.InstanceNorm2d} & set(kinds)


def test_the_last_up_convolution_of_the_release_gives_128_maps() -> None:
    with torch.device("meta"):
        seen = shapes_in_order(unet("release"), torch.empty(1, 1, 188, 188))
    assert [shape[0] for kind, shape in seen if kind == "up"] == [512, 256, 128, 128]
    assert seen[-1] == ("conv", (2, 4, 4))


def test_skips_lose_88_40_16_and_4_pixels_a_side() -> None:
    with torch.device("meta"):
        network = unet()
        skips: list[int] = []
        ups: list[int] = []
        for level in range(4):
            network.contract[level].register_forward_hook(lambda *args: skips.append(args[-1].shape[-1]))
            network.up[level].register_forward_hook(lambda *args: ups.insert(0, args[-1].shape[-1]))
        network(torch.empty(1, 1, 572, 572))
    assert [(skip - up) // 2 for skip, up in zip(skips, ups, strict=True)] == [88, 40, 16, 4]


def output_side(n: int, levels: int) -> int:
    """The output of an n-pixel image by walking through the layers; 0 where a pooled map is odd or nothing is left."""
    for _ in range(levels - 1):
        n -= 4
        if n < 2 or n % 2:
            return 0
        n //= 2
    n -= 4
    for _ in range(levels - 1):
        n = 2 * n - 4
    return max(n, 0)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_size_is_valid_exactly_where_the_layers_allow_it(levels: int) -> None:
    with torch.device("meta"):
        network = unet(widths=(2,) * levels)
    for n in range(1, 420):
        side = output_side(n, levels)
        assert network.valid_size(n, 0) == network.valid_size(n, 1) == (side > 0), n
        assert side in (0, n - 2 * network.context_vox)
        valid = [m for m in range(1, 500) if output_side(m, levels)]
        below, above = max([m for m in valid if m <= n], default=valid[0]), min(m for m in valid if m >= n)
        assert network.nearest_sizes(n, 1) == (below, above)


def test_the_papers_network_loses_92_pixels_a_side_and_starts_at_188() -> None:
    with torch.device("meta"):
        network = unet()
        assert network.context_vox == 92
        assert network.nearest_sizes(1, 0) == (188, 188)
        assert network.nearest_sizes(600, 0) == (588, 604)
        assert network(torch.empty(2, 1, 188, 204)).shape == (2, 2, 4, 20)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 188, 200), "unet: expected a size that fits: Y 188, X 188 or 204, got 188×200; pad or crop"),
        ((1, 1, 572, 100), "unet: expected a size that fits: Y 572, X 188, got 572×100; "),
        ((1, 3, 188, 188), r"unet: expected images \(B, 1, Y, X\), got \(1, 3, 188, 188\); "),
        ((1, 188, 188), r"unet: expected images \(B, 1, Y, X\), got \(1, 188, 188\); "),
    ],
)
def test_an_image_that_does_not_fit_is_refused_with_what_would(shape: Shape, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        unet(widths=(2,) * 5)(torch.empty(shape))


def test_an_output_pixel_sees_188_or_204_pixels_depending_on_its_phase() -> None:
    network = unet(widths=(1,) * 5, classes=1).double().eval()
    network.pool = nn.AvgPool2d(2)  # a maximum passes its gradient to one pixel of the window; all four are seen
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.3)  # positive weights on a positive image: no ReLU cuts the gradient
    image_BCS = torch.ones(1, 1, 204, 204, dtype=torch.float64, requires_grad=True)
    logits_BKS = network(image_BCS)
    widths = set()
    for phase in range(16):
        (gradient,) = torch.autograd.grad(logits_BKS[0, 0, phase, phase], image_BCS, retain_graph=True)
        rows, columns = torch.nonzero(gradient[0, 0], as_tuple=True)
        assert torch.equal(rows.unique(), columns.unique())
        widths.add(int(rows.max() - rows.min()) + 1)
    assert widths == {188, 204}


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_overlapping_tiles_give_the_output_of_the_whole_image_without_seams(variant: str) -> None:
    torch.manual_seed(0)
    network = unet(variant, widths=(3,) * 5).eval()
    image_BCS = torch.randn(1, 1, 236, 236)
    with torch.no_grad():
        whole = network(image_BCS)
        assert whole.std() > 0.01
        for y in (0, 16, 32):
            for x in (0, 16, 32):
                tile = network(image_BCS[..., y : y + 204, x : x + 204])
                torch.testing.assert_close(tile, whole[..., y : y + 20, x : x + 20], rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = unet(widths=(2, 2, 2, 4, 8))
    image_BCS = torch.randn(1, 1, 188, 188)
    assert not torch.equal(network(image_BCS), network(image_BCS))
    network.eval()
    assert torch.equal(network(image_BCS), network(image_BCS))


@pytest.mark.parametrize(("dropout", "share"), [(None, 0.5), (0.0, 0.0), (0.2, 0.2)])
def test_half_of_the_values_are_dropped_unless_the_config_says_another_share(dropout: float | None, share: float) -> None:
    torch.manual_seed(0)
    network = unet(widths=(4, 8), dropout=dropout)
    seen: list[Tensor] = []
    network.dropout.register_forward_hook(lambda _, inputs, out: seen.append((out == 0)[inputs[0] != 0].float().mean()))
    network(torch.randn(2, 1, 60, 60))
    assert [each.item() for each in seen] == pytest.approx([share] * 2, abs=0.02)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_one_level_is_refused(variant: str) -> None:
    with pytest.raises(ConfigError, match=r"unet: expected at least 2 levels, got \(8,\)"):
        unet(variant, widths=(8,))
    with pytest.raises(ConfigError, match=r"unet_same: expected at least 2 levels, got \(8,\)"):
        unet_same(widths=(8,))


def test_weights_start_with_the_papers_standard_deviation() -> None:
    torch.manual_seed(0)
    network = unet(widths=(64, 64))
    second = network.contract[0][2].weight  # 3×3 with 64 channels: N = 576
    assert second.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    assert network.up[0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("classes", "trained", "total"), [(1, 31_043_521, 31_055_297), (3, 31_043_651, 31_055_427)])
def test_the_worked_example_has_the_number_of_parameters_that_keras_prints(classes: int, trained: int, total: int) -> None:
    with torch.device("meta"):
        network = unet_same(classes=classes)
    running = sum(b.numel() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var")))
    assert (parameters(network), running, parameters(network) + running) == (trained, 11_776, total)


def test_every_layer_of_the_worked_example_is_as_described() -> None:
    with torch.device("meta"):
        network = unet_same(classes=3)
        seen = shapes_in_order(network, torch.empty(2, 3, 160, 160))
    expected = []
    for c, n in ((64, 160), (128, 80), (256, 40), (512, 20)):
        expected += [("conv", (c, n, n)), ("conv", (c, n, n)), ("pool", (c, n // 2, n // 2))]
    expected += [("conv", (1024, 10, 10))] * 2
    for c, n in ((512, 20), (256, 40), (128, 80), (64, 160)):
        expected += [("up", (c, n, n)), ("conv", (c, n, n)), ("conv", (c, n, n))]
    assert seen == [*expected, ("conv", (3, 160, 160))]


def test_the_worked_example_concatenates_the_up_sampled_half_first() -> None:
    network = unet_same(widths=(2, 4), in_channels=1, classes=2)
    halves: dict[str, Tensor] = {}
    network.up[0].register_forward_hook(lambda *args: halves.update(up=args[-1]))
    network.contract[0].register_forward_hook(lambda *args: halves.update(skip=args[-1]))
    network.expand[0].register_forward_pre_hook(lambda _, inputs: halves.update(joined=inputs[0]))
    network(torch.randn(2, 1, 8, 8))
    assert torch.equal(halves["joined"], torch.cat([halves["up"], halves["skip"]], 1))


def test_sides_of_the_worked_example_are_multiples_of_16() -> None:
    with torch.device("meta"):
        network = unet_same()
        assert [n for n in range(1, 50) if network.valid_size(n, 0)] == [16, 32, 48]
        assert (network.context_vox, network.nearest_sizes(150, 1)) == (0, (144, 160))
        with pytest.raises(ConfigError, match="Y 144 or 160, X 160"):
            network(torch.empty(1, 3, 150, 160))


def test_in_3d_the_worked_example_halves_every_axis() -> None:
    with torch.device("meta"):
        network = unet_same(3, in_channels=1, classes=2)
        sizes: list[Shape] = []
        for stage in network.contract:
            stage.register_forward_hook(lambda *args: sizes.append(tuple(args[-1].shape[1:])))
        assert network(torch.empty(2, 1, 16, 32, 48)).shape == (2, 2, 16, 32, 48)
    assert sizes == [(64 << level, 16 >> level, 32 >> level, 48 >> level) for level in range(5)]


def test_the_worked_example_starts_with_glorots_weights_and_keras_batch_norm() -> None:
    torch.manual_seed(0)
    network = unet_same(widths=(64, 64))
    second = network.contract[0][3]
    assert second.weight.std().item() == pytest.approx((2 / (2 * 9 * 64)) ** 0.5, rel=0.02)
    assert not second.bias.any()
    assert (network.contract[0][1].eps, network.contract[0][1].momentum) == (1e-3, 0.01)
