"""The 3D U-Net of 2016, held against the paper's table of levels and count of parameters."""

import pytest
import torch
from torch import nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.blocks import TRANSPOSED
from microtome.models.network import Network, NetworkSpec
from microtome.models.unet3d import UNet3D

Shape = tuple[int, ...]


def unet3d(variant: str = "", widths: Shape = (), *, in_channels: int = 3, classes: int = 3, current: bool = False) -> Network:
    config = NetworkConfig(widths=widths, batch_statistics=current)
    return UNet3D(NetworkSpec(name="unet3d", dims=3, in_channels=in_channels, classes=classes, config=config, variant=variant))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def channels_out(network: nn.Module, kind: type[nn.Conv3d] | type[nn.ConvTranspose3d]) -> int:
    return sum(module.out_channels for module in network.modules() if isinstance(module, kind))


def test_both_variants_have_the_papers_count_of_parameters() -> None:
    with torch.device("meta"):
        paper, current, without_norm = unet3d("paper"), unet3d("paper", current=True), unet3d("no_bn")
    assert parameters(without_norm) == 19_069_955
    assert parameters(paper) == parameters(current) == 19_072_291
    scales = sum(p.numel() for name, p in paper.named_parameters() if p.ndim == 1 and name.endswith("weight"))
    assert parameters(paper) - scales == 19_069_955


@pytest.mark.parametrize(("channels", "classes", "count"), [(3, 3, 19_075_523), (1, 1, 19_073_665)])
def test_the_count_of_pytorchs_defaults_is_that_of_the_paper_with_every_bias(channels: int, classes: int, count: int) -> None:
    with torch.device("meta"):
        network = unet3d("paper", in_channels=channels, classes=classes)
    missing_biases = channels_out(network, nn.Conv3d) - classes + channels_out(network, nn.ConvTranspose3d)
    assert parameters(network) + missing_biases == count


def test_every_level_of_the_papers_volume_is_as_in_its_table() -> None:
    with torch.device("meta"):
        network = unet3d()
        seen: list[tuple[str, Shape]] = []
        kinds = {nn.Conv3d: "conv", TRANSPOSED[3]: "up"}
        for module in network.modules():
            if type(module) in kinds:
                module.register_forward_hook(lambda m, _, out: seen.append((kinds[type(m)], tuple(out.shape[1:]))))
        network(torch.empty(1, 3, 116, 132, 132))
    assert [shape[0] for kind, shape in seen if kind == "conv"] == [32, 64, 64, 128, 128, 256, 256, 512, 256, 256, 128, 128, 64, 64, 3]
    assert [seen[place][1] for place in (1, 3, 5, 7)] == [(64, 112, 128, 128), (128, 52, 60, 60), (256, 22, 26, 26), (512, 7, 9, 9)]
    assert [shape for kind, shape in seen if kind == "up"] == [(512, 14, 18, 18), (256, 20, 28, 28), (128, 32, 48, 48)]
    assert [seen[place][1] for place in (10, 13, 16)] == [(256, 10, 14, 14), (128, 16, 24, 24), (64, 28, 44, 44)]
    assert seen[-1] == ("conv", (3, 28, 44, 44))


def test_sizes_are_4_more_than_multiples_of_8_from_92_on() -> None:
    with torch.device("meta"):
        network = unet3d(widths=(2,) * 4)
        assert network.context_vox == 44
        for n in range(1, 200):
            assert network.valid_size(n, 2) == (n >= 92 and n % 8 == 4)
        assert network.nearest_sizes(95, 0) == (92, 100)
        assert network(torch.empty(1, 3, 92, 100, 92)).shape == (1, 3, 4, 12, 4)
        with pytest.raises(ConfigError, match="unet3d: expected a size that fits: Z 92, Y 92 or 100, X 92, got 92×96×16"):
            network(torch.empty(1, 3, 92, 96, 16))


def test_odd_widths_are_refused_since_levels_double() -> None:
    with pytest.raises(ConfigError, match=r"even widths.*\(4, 7\)"):
        unet3d(widths=(4, 7))


def test_fewer_than_two_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"two levels or more.*\(4,\)"):
        unet3d(widths=(4,))


def test_current_statistics_of_a_norm_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a variant with a norm, got `batch_statistics` with the variant `no_bn`"):
        unet3d("no_bn", current=True)


def test_an_output_voxel_sees_92_or_100_voxels_depending_on_its_phase() -> None:
    network = unet3d("no_bn", widths=(2,) * 4, in_channels=1, classes=1).eval()
    network.pool = nn.AvgPool3d(2)  # a maximum passes its gradient to one voxel of the window; all eight are seen
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    image_BCS = torch.ones(1, 1, 100, 100, 100, requires_grad=True)
    logits_BKS = network(image_BCS)
    widths = set()
    for phase in range(0, 8, 2):
        (gradient,) = torch.autograd.grad(logits_BKS[0, 0, phase, phase, phase], image_BCS, retain_graph=True)
        seen = torch.nonzero(gradient[0, 0].sum((1, 2)))
        widths.add(int(seen.max() - seen.min()) + 1)
    assert widths == {92, 100}


def test_without_norm_tiles_give_the_output_of_the_whole_volume_without_seams() -> None:
    torch.manual_seed(0)
    network = unet3d("no_bn", widths=(4,) * 4, in_channels=1).eval()
    image_BCS = torch.randn(1, 1, 92, 92, 108)
    with torch.no_grad():
        whole = network(image_BCS)
        assert whole.std() > 0.01
        for x in (0, 8, 16):
            tile = network(image_BCS[..., x : x + 92])
            torch.testing.assert_close(tile, whole[..., x : x + 4], rtol=1e-4, atol=1e-5)


def test_with_current_statistics_the_prediction_of_a_volume_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    torch.manual_seed(0)
    network = unet3d("paper", widths=(2, 4), in_channels=1, current=True).eval()
    image_BCS = torch.randn(2, 1, 28, 28, 28) * torch.tensor([1.0, 9.0]).reshape(2, 1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(image_BCS)[1:], network(image_BCS[1:]), rtol=1e-4, atol=1e-4)


def test_with_a_batch_of_one_both_norms_train_alike_and_only_that_with_current_statistics_predicts_so_too() -> None:
    torch.manual_seed(0)
    running, current = (unet3d("paper", widths=(2, 4), in_channels=1, current=current) for current in (False, True))
    names = [name for name, _ in current.named_parameters()]
    assert [name for name, _ in running.named_parameters()] == names
    running.load_state_dict(current.state_dict(), strict=False)
    image_BCS = 5 + torch.randn(1, 1, 20, 20, 20)
    trained = current(image_BCS)
    torch.testing.assert_close(running(image_BCS), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(current.eval()(image_BCS), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(running.eval()(image_BCS), trained, rtol=0.05)


def test_without_the_setting_a_prediction_takes_the_running_averages_of_training() -> None:
    torch.manual_seed(0)
    network = unet3d("paper", widths=(2, 4), in_channels=1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0  # the average is then that of the last batch
    image_BCS = torch.randn(1, 1, 28, 28, 28)
    trained = network(image_BCS)
    # PyTorch's running variance is the unbiased one, which is why this is not exact: the smallest map has 64 voxels or more.
    torch.testing.assert_close(network.eval()(image_BCS), trained, rtol=0.1, atol=0.1)
    with torch.no_grad():
        assert not torch.allclose(network(3 * image_BCS), trained, rtol=0.1, atol=0.1)
