"""What holds for every network of the registry: sizes, refusals, layouts, precision, seeds, and that it can learn."""

import math
import re
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.network import Network
from microtome.models.registry import NETWORKS, build

Shape = tuple[int, ...]
CLASSES = 3
LAYOUT = MappingProxyType({2: torch.channels_last, 3: torch.channels_last_3d})
# Small forms that learn in seconds; a network that is not here has two levels of 8 and 16 channels.
SMALL = MappingProxyType(
    {
        "attention_unet": NetworkConfig(widths=(8, 16, 16)),
        "canet": NetworkConfig(widths=(8, 16), variant="small"),
        "nnunet_resenc": NetworkConfig(widths=(8, 16), convolutions=(1, 2)),
        "sliding_window": NetworkConfig(widths=(8, 8, 32)),
    }
)
# What a network can say about an image is one class for all of it.
ONE_CLASS_AN_IMAGE = frozenset({"classifier"})

FORMS = [(name, dims) for name, entry in NETWORKS.items() for dims in entry.dims]
VARIANTS = [(name, dims, variant) for name, dims in FORMS for variant in NETWORKS[name].variants or ("",)]


def small(name: str, dims: int, in_channels: int = 1) -> Network:
    """The small form of a network, without dropout, from seed 0."""
    torch.manual_seed(0)
    config = SMALL.get(name, NetworkConfig(widths=(8, 16)))
    if "dropout" in NETWORKS[name].settings:
        config = config.model_copy(update={"dropout": 0.0})
    return build(name, dims=dims, in_channels=in_channels, classes=CLASSES, config=config)


def fitting(network: Network, answered: int) -> Shape:
    """The smallest image size for which a network answers for that many voxels or more along each axis."""
    return tuple(network.nearest_sizes(answered + 2 * network.context_vox, axis)[1] for axis in range(network.dims))


def blobs(network: Network, name: str, answered: int) -> tuple[Tensor, Tensor]:
    """Noisy images of one blob each, and the labels of the part that the network answers for: image_BCS, target_BS."""
    shape, border = fitting(network, answered), network.context_vox
    axes = [torch.linspace(-n / answered, n / answered, n) for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    distances = [(grid - shift).square().sum(0) for shift in (-0.4, 0.4, 0.1)]
    target_BS = torch.stack([(distance < 0.4) * k for distance, k in zip(distances, (1, 2, 0), strict=True)])
    if name in ONE_CLASS_AN_IMAGE:
        target_BS = torch.stack([torch.full(shape, k) for k in (1, 2, 0)])
    brightness = torch.tensor([0.0, 1.0, -1.0])[target_BS]
    image_BCS = (brightness + 0.1 * torch.randn(target_BS.shape)).unsqueeze(1)
    return image_BCS, target_BS[(slice(None), *(slice(border, n - border) for n in shape))]


def smallest(network: Network) -> Shape:
    return tuple(network.nearest_sizes(1, axis)[1] for axis in range(network.dims))


def out(network: Network, shape: Shape) -> Shape:
    """Shape of the logits of two images of that size, on the device of the network."""
    logits = network(torch.empty(2, network.in_channels, *shape))
    assert isinstance(logits, Tensor)
    return tuple(logits.shape)


@pytest.mark.parametrize(("name", "dims", "variant"), VARIANTS)
def test_as_in_its_paper_it_gives_logits_of_the_right_shape_at_its_smallest_size(name: str, dims: int, variant: str) -> None:
    with torch.device("meta"):
        network = build(name, dims=dims, in_channels=3, classes=4, variant=variant)
        shape = smallest(network)
        assert all(network.valid_size(n, axis) for axis, n in enumerate(shape))
        assert out(network, shape) == (2, 4, *(n - 2 * network.context_vox for n in shape))


@pytest.mark.parametrize(("name", "dims"), FORMS)
def test_a_size_that_does_not_fit_is_refused_and_the_sizes_that_the_message_names_work(name: str, dims: int) -> None:
    with torch.device("meta"):
        network = build(name, dims=dims, in_channels=1, classes=2)
        shape = smallest(network)
        named = [{n, *refused(network, shape, axis)} for axis, n in enumerate(shape)]
        larger = tuple(max(sizes) for sizes in named)
        assert out(network, larger)[2:] == tuple(n - 2 * network.context_vox for n in larger)


def refused(network: Network, shape: Shape, axis: int) -> set[int]:
    """The sizes that are named where an image is one voxel smaller or larger than `shape` along an axis, if that does not fit."""
    found: set[int] = set()
    for wrong in (shape[axis] - 1, shape[axis] + 1):
        if wrong > 0 and not network.valid_size(wrong, axis):
            with pytest.raises(ConfigError, match=f"^{network.spec.name}: expected a size that fits: ") as refusal:
                out(network, (*shape[:axis], wrong, *shape[axis + 1 :]))
            named = re.search(rf"{'ZYX'[-network.dims :][axis]} (\d+)(?: or (\d+))?,", str(refusal.value))
            assert named, refusal.value
            found |= {int(size) for size in named.groups() if size}
            assert shape[axis] in found
    return found


@pytest.mark.parametrize(("name", "dims", "variant"), VARIANTS)
def test_one_image_of_the_smallest_size_trains_or_is_refused_with_a_way_out_that_works(name: str, dims: int, variant: str) -> None:
    with torch.device("meta"):
        network = build(name, dims=dims, in_channels=1, classes=2, variant=variant)
        one = torch.empty(1, 1, *smallest(network))
        try:
            network(one)
        except ConfigError as refusal:
            assert "train with a batch of 2 or more" in str(refusal)  # noqa: PT017
            network(torch.cat([one, one]))
        # The paper's network once more, with other numbers of channels and classes than above.
        assert tuple(network.eval()(one).shape) == (1, 2, *(n - 2 * network.context_vox for n in smallest(network)))


@pytest.mark.parametrize(("name", "dims"), FORMS)
def test_it_trains_in_bfloat16_and_channels_last(name: str, dims: int) -> None:
    network = small(name, dims).to(memory_format=LAYOUT[dims])
    image_BCS, target_BS = blobs(network, name, answered=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BKS = network(image_BCS.to(memory_format=LAYOUT[dims]))
    assert logits_BKS.shape == (3, CLASSES, *target_BS.shape[1:])
    nn.functional.cross_entropy(logits_BKS.float(), target_BS).backward()
    with_gradient = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert with_gradient
    assert logits_BKS.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in with_gradient)


@pytest.mark.parametrize(("name", "dims"), FORMS)
def test_each_tensor_has_one_name_and_a_seed_says_what_is_in_it(name: str, dims: int) -> None:
    network, again = small(name, dims), small(name, dims)
    tensors = network.state_dict()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in tensors.items())
    torch.manual_seed(1)
    image_BCS = torch.randn(2, 1, *fitting(network, 4))
    with torch.no_grad():
        assert torch.equal(network.eval()(image_BCS), again.eval()(image_BCS))


@pytest.mark.parametrize(("name", "dims"), FORMS)
def test_it_learns_one_batch_by_heart(name: str, dims: int) -> None:
    """Cross-entropy of three small images falls below 5 % of its start (and of log 3, should the start be worse than ignorance)."""
    network = small(name, dims)
    image_BCS, target_BS = blobs(network, name, answered=12 if dims == 2 else 6)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(300):
        loss = nn.functional.cross_entropy(network(image_BCS), target_BS)
        losses.append(loss.item())
        if losses[-1] < 0.05 * min(losses[0], math.log(CLASSES)):
            break
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert losses[-1] < 0.05 * min(losses[0], math.log(CLASSES)), f"{losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
