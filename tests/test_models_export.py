"""Every network goes through torch's exporter, the way to other engines, and says the same afterwards."""

import pytest
import torch

from microtome.config import NetworkConfig
from microtome.models.registry import NETWORKS, build

FORMS = [(name, dims) for name, entry in NETWORKS.items() for dims in entry.dims]


@pytest.mark.parametrize(("name", "dims"), FORMS)
def test_it_is_exported_and_says_the_same(name: str, dims: int) -> None:
    torch.manual_seed(0)
    widths = () if name == "sliding_window" else (8, 16, 16)
    network = build(name, dims=dims, in_channels=2, classes=3, config=NetworkConfig(widths=widths)).eval()
    image_BCS = torch.randn(1, 2, *(network.nearest_sizes(16 + 2 * network.context_vox, axis)[1] for axis in range(dims)))
    exported = torch.export.export(network, (image_BCS,))
    with torch.no_grad():
        assert torch.equal(exported.module()(image_BCS), network(image_BCS))
