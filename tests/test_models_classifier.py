"""The encoder with class nodes: one vector of logits an image."""

import pytest
import torch
from torch import nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.classifier import Classifier
from microtome.models.network import NetworkSpec
from microtome.models.unet_same import UNetSame


def spec(dims: int, widths: tuple[int, ...] = (), *, in_channels: int = 1, classes: int = 2) -> NetworkSpec:
    config = NetworkConfig(widths=widths)
    return NetworkSpec(name="classifier", dims=dims, in_channels=in_channels, classes=classes, config=config)


@pytest.mark.parametrize("dims", [2, 3])
def test_it_has_the_encoder_of_the_padded_unet_and_class_nodes_only(dims: int) -> None:
    with torch.device("meta"):
        ours, unet = Classifier(spec(dims)).state_dict(), UNetSame(spec(dims)).state_dict()
    head = {"head.weight": (2, 1024), "head.bias": (2,)}
    encoder = {name: tuple(tensor.shape) for name, tensor in unet.items() if name.startswith("contract.")}
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {**encoder, **head}


@pytest.mark.parametrize("dims", [2, 3])
def test_every_voxel_of_an_image_has_the_logits_of_the_image(dims: int) -> None:
    torch.manual_seed(0)
    network = Classifier(spec(dims, (4, 8), in_channels=2, classes=3))
    image_BCS = torch.randn(2, 2, *(4, 6, 8)[:dims])
    logits_BK = network.eval().classify(image_BCS)
    assert logits_BK.shape == (2, 3)
    logits_BKS = network(image_BCS)
    assert logits_BKS.shape == (2, 3, *image_BCS.shape[2:])
    assert torch.equal(logits_BKS.flatten(2).amin(2), logits_BK)
    assert torch.equal(logits_BKS.flatten(2).amax(2), logits_BK)


def test_location_is_discarded_a_turned_map_of_features_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    network = Classifier(spec(2, (4, 8))).eval()
    image_BCS = torch.randn(1, 1, 8, 8)
    before = network.classify(image_BCS)
    network.contract[-1].register_forward_hook(lambda *args: args[-1].roll((1, 2), dims=(2, 3)).flip(3))
    torch.testing.assert_close(network.classify(image_BCS), before, rtol=1e-5, atol=1e-6)


def test_a_loss_over_voxels_is_the_loss_over_images() -> None:
    """So it trains through the code that trains the others."""
    torch.manual_seed(0)
    network = Classifier(spec(2, (4, 8)))
    image_BCS, class_B = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 1])
    gradients = []
    for logits, target in (
        (network.classify(image_BCS), class_B),
        (network(image_BCS), class_B.reshape(3, 1, 1).expand(3, 8, 8)),
    ):
        loss = nn.functional.cross_entropy(logits, target)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"classifier: expected at least 2 levels, got \(8,\)"):
        Classifier(spec(2, (8,)))
    with torch.device("meta"), pytest.raises(ConfigError, match="classifier: expected a size that fits: Y 16, X 16 or 32, got 16×24"):
        Classifier(spec(2)).classify(torch.empty(2, 1, 16, 24))
