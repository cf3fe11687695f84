"""A bundle's arrays -> the torch network that they are the weights of, and back."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microtome.bundle import Bundle
from microtome.config import NetworkConfig, Plan
from microtome.errors import ConfigError, DataError
from microtome.models.network import Network
from microtome.models.registry import build

DO = "use the microtome that trained it"


def restore(bundle: Bundle) -> Network:
    """The network of a bundle with its weights, on the CPU in evaluation mode.

    What the plan describes is compared with the weights there are before any memory is taken for it.

    Raises:
        DataError: the weights are not those of the network that the plan names.
    """
    where = bundle.folder or bundle.plan.network.name
    network = outlined(bundle.plan, len(bundle.weights), where)
    wanted = dict(network.state_dict())
    weights = dict(bundle.weights)
    if fault := _fault({name: tuple(tensor.shape) for name, tensor in wanted.items()}, weights):
        raise DataError(where, expected=f"weights of the network {bundle.plan.network.name}", got=fault, do=DO, code="D055")
    # Copies: whoever has the network may change it, and the bundle stays as it is.
    tensors = {name: torch.from_numpy(np.array(weights[name])).to(wanted[name].dtype) for name in wanted}
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def outlined(plan: Plan, most_levels: int, where: str | Path) -> Network:
    """The network of a plan without memory for its weights (on torch's `meta` device), in training mode.

    Args:
        plan: names network and sizes.
        most_levels: the plan may be a stranger's; one of more levels than this is refused before it is built.
        where: the plan stands, for messages.

    Raises:
        DataError: no such network, or sizes that it cannot have.
    """
    name, config = plan.network.name, plan.network
    if _levels(config) > most_levels:
        got = f"a plan of {_levels(config)} levels beside {most_levels} tensors"
        raise DataError(where, expected=f"weights of the network {name[:80]}", got=got, do=DO, code="D055")
    try:
        with torch.device("meta"):
            return build(name, dims=plan.dims, in_channels=plan.channels, classes=len(plan.classes), config=config)
    except (ConfigError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        # Sizes that no tensor can have are told by torch in errors of its own.
        got = " ".join(str(error).split())[:200]
        raise DataError(where, expected="a network that can be built", got=got, do=DO, code="D055") from None


def arrays_of(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A state dict as arrays; those of tensors in plain layout on the CPU share their memory."""
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.items()}


def _levels(config: NetworkConfig) -> int:
    """The levels that a config asks for; 0 where it leaves them to the network."""
    listed = config.convolutions if isinstance(config.convolutions, tuple) else ()
    return max(len(config.widths), len(config.strides), len(config.kernels), len(listed), config.supervised_levels)


def _fault(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]) -> str:
    """How weights differ from what the network has, in words; empty where they do not."""
    missing, others = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or others:
        named = [f"{what} key {names[0]} and {len(names) - 1} more" for what, names in (("Missing", missing), ("unknown", others)) if names]
        return ", ".join(named)[:200]
    for name, array in weights.items():
        if array.shape != wanted[name] or array.dtype.kind not in "fiu":
            return f"{name} of {array.dtype} {array.shape} instead of {wanted[name]}"[:200]
    return ""
