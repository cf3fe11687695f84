"""Traces of the registry's networks as they are shown, made once for all tests."""

from functools import cache

import torch

from microtome.models.describe import default_input, nearest_input
from microtome.models.registry import NETWORKS, build
from microtome.models.trace import Trace, trace

FORMS = [(name, dims, variant) for name, entry in NETWORKS.items() for dims in entry.dims for variant in entry.variants or ("",)]


@cache
def traced(name: str, dims: int, variant: str = "") -> Trace:
    """The network with 2 classes, at the size that it is shown with."""
    shape = default_input(name, (dims,))
    with torch.device("meta"):
        network = build(name, dims=dims, in_channels=shape[0], classes=2, variant=variant)
    return trace(network, nearest_input(network, shape))
