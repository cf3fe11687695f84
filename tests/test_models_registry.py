"""Building by name, and what holds for every network of the registry."""

import ast
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import microtome.models
from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.blocks import centre_crop
from microtome.models.network import Network
from microtome.models.registry import NETWORKS, build, find

FORMS = [(name, dims, variant) for name, entry in NETWORKS.items() for dims in entry.dims for variant in entry.variants or ("",)]


# A head without a loss gets no gradient.
WITH_HEADS: Mapping[str, dict[str, object]] = MappingProxyType(
    {name: {"supervised_levels": 2} for name in ("nnunet_plain", "nnunet_resenc")}
)


def small(name: str, dims: int, variant: str, **config: object) -> tuple[Network, Tensor]:
    """A narrow network with 3 classes, and two random images of the smallest size it takes that is 12 or more."""
    torch.manual_seed(0)
    network = build(name, dims=dims, in_channels=2, classes=3, config=NetworkConfig(widths=(6, 8, 8), **config), variant=variant)
    return network, torch.randn(2, 2, *(network.nearest_sizes(12, axis)[1] for axis in range(dims)))


def test_the_registry_lists_each_network_by_its_name_and_cannot_be_changed() -> None:
    assert {"modern_unet", "unet", "unet_same", "unet3d"} <= set(NETWORKS)
    assert all(entry.name == name for name, entry in NETWORKS.items())
    assert all(entry.settings <= set(NetworkConfig.model_fields) for entry in NETWORKS.values())
    with pytest.raises(TypeError):
        NETWORKS["mine"] = NETWORKS["unet"]  # type: ignore[index]


@pytest.mark.parametrize(("name", "near"), [("unte3d", "`unet3d`"), ("unet_sane", "`unet_same`"), ("modernunet", "`modern_unet`")])
def test_an_unknown_name_is_refused_with_the_nearest_known_ones(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"got `{name}`; did you mean .*{near}"):
        build(name, dims=2, in_channels=1, classes=2)


def test_a_name_near_to_none_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"expected one of modern_unet, unet, .* got `qqq`; choose one of them"):
        find("qqq")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "unet", "dims": 3}, "unet: expected 2D images, got 3D; use one of .*unet3d"),
        ({"name": "unet3d", "dims": 2}, "unet3d: expected 3D images, got 2D; use one of .*unet_same"),
        ({"name": "modern_unet", "dims": 4}, "modern_unet: expected 2D or 3D images, got 4D; give 2D or 3D"),
        ({"name": "unet", "dims": 2, "variant": "no_bn"}, "one of the variants paper, release, got `no_bn`"),
        ({"name": "unet_same", "dims": 2, "variant": "paper"}, "expected no variant, got `paper`"),
        ({"name": "unet", "dims": 2, "in_channels": 0}, "at least one channel and one class, .*, got 0 channels and 2 classes"),
        ({"name": "unet", "dims": 2, "classes": 10**18}, f"at most 1,000,000 of each, got 1 channels and {10**18} classes"),
        (
            {"name": "unet", "dims": 2, "config": NetworkConfig(residual=True)},
            r"settings that it has \(dropout, widths\), got `residual: True`",
        ),
        ({"name": "unet3d", "dims": 3, "config": NetworkConfig(norm="none")}, "got `norm: none`; remove `network.norm`"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_way_out(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**{"in_channels": 1, "classes": 2, **arguments})  # type: ignore[arg-type]


def test_no_variant_means_the_first() -> None:
    with torch.device("meta"):
        default, first, second = (build("unet", dims=2, in_channels=1, classes=2, variant=v).state_dict() for v in ("", "paper", "release"))
    assert {k: v.shape for k, v in default.items()} == {k: v.shape for k, v in first.items()}
    assert {k: v.shape for k, v in default.items()} != {k: v.shape for k, v in second.items()}


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_logits_have_the_images_size_less_the_context(name: str, dims: int, variant: str) -> None:
    network, image_BCS = small(name, dims, variant)
    assert (network.dims, network.in_channels, network.classes) == (dims, 2, 3)
    logits_BKS = network(image_BCS)
    assert logits_BKS.shape == (2, 3, *(n - 2 * network.context_vox for n in image_BCS.shape[2:]))
    assert logits_BKS.isfinite().all()


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_a_size_between_two_that_fit_is_refused(name: str, dims: int, variant: str) -> None:
    network, image_BCS = small(name, dims, variant)
    n = image_BCS.shape[-1] + 1
    if network.valid_size(n, dims - 1):
        pytest.skip("every size from the smallest on fits")
    low, high = network.nearest_sizes(n, dims - 1)
    assert low < n < high
    with pytest.raises(ConfigError, match=f"X {low} or {high}, got "):
        network(nn.functional.pad(image_BCS, (0, 1)))


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_each_weight_has_one_name(name: str, dims: int, variant: str) -> None:
    network, _ = small(name, dims, variant)
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(parameter) for parameter in network.parameters()})
    tensors = list(network.state_dict().values())
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("name", "dims", "variant", "config"),
    [
        *((*form, WITH_HEADS.get(form[0], {})) for form in FORMS),
        ("modern_unet", 3, "", {"norm": "instance", "residual": True, "supervised_levels": 2}),
    ],
)
def test_a_gradient_reaches_every_weight(name: str, dims: int, variant: str, config: dict[str, object]) -> None:
    network, image_BCS = small(name, dims, variant, **config)
    for key, parameter in network.named_parameters():
        if parameter.ndim == 1 and key.endswith("weight"):
            nn.init.ones_(parameter)  # a residual unit starts with its last norm at 0, which stops the gradient for one step
    logits = network(image_BCS)
    loss = sum((each * torch.randn_like(each)).sum() for each in (logits if isinstance(logits, list) else [logits]))
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    # A bias before a norm has none: the norm takes it away again.
    assert [key for key, gradient in gradients.items() if key.endswith("weight") and not gradient.any()] == []


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_channels_last_gives_the_same_logits(name: str, dims: int, variant: str) -> None:
    network, image_BCS = small(name, dims, variant)
    network.eval()
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    with torch.no_grad():
        plain = network(image_BCS)
        last = network.to(memory_format=layout)(image_BCS.to(memory_format=layout))
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-4)


def test_a_centre_crop_is_the_middle() -> None:
    features_BCS = torch.arange(36).reshape(1, 1, 6, 6)
    assert centre_crop(features_BCS, torch.Size((2, 4))).tolist() == [[[[13, 14, 15, 16], [19, 20, 21, 22]]]]


def test_no_network_knows_a_device_a_rank_or_a_file() -> None:
    """Speed and storage are layers around a network, so its code has no word for them."""
    words = {"device", "cuda", "cpu", "autocast", "amp", "rank", "distributed", "Path", "open", "print"}
    for path in Path(microtome.models.__path__[0]).glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not names & words, path.name
