"""A bundle's arrays -> the torch network that they are the weights of, and back."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from microtome.bundle import Bundle
from microtome.errors import DataError
from microtome.models.network import Network
from microtome.models.registry import build


def restore(bundle: Bundle) -> Network:
    """The network of a bundle with its weights, on the CPU in evaluation mode.

    Raises:
        DataError: the weights are not those of the network that the plan names.
    """
    plan = bundle.plan
    network = build(plan.network.name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=plan.network)
    try:
        network.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.weights.items()})
    except RuntimeError as error:
        got = " ".join(str(error).split())[:200]
        raise DataError(plan.network.name, expected="weights of this network", got=got, do="use the microtome that trained it") from None
    return network.eval()


def arrays_of(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A state dict as arrays; those of tensors in plain layout on the CPU share their memory."""
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.items()}
