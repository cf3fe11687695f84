"""The same bits from the same training on a GPU too: what has an order is chosen, and what has none is refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from microtome.errors import ConfigError

# With others, products of matrices on a GPU may add up in another order each time (CUDA's documentation of cuBLAS, reproducibility).
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def same_bits(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """Inside of it a training on a GPU gives the same bits each time, or is refused; it is slower, as fast kernels add in no fixed order.

    Nothing is timed or compiled there, as the choice could fall out otherwise the next time (`compiled.fast_kernels`). A processor needs
    none of it: with one number of threads its sums have one order.

    Args:
        device: that is trained on.
        wanted: False: nothing changes.

    Raises:
        ConfigError: an operation of the network has no form with a fixed order on a GPU; names it.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    workspace = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise ConfigError(WORKSPACE, expected=" or ".join(WORKSPACES), got=workspace, do="remove it from the environment", code="C052")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if "does not have a deterministic implementation" not in said:
            raise
        got = f"{said.partition(' does not have')[0][-60:]}, which torch has in no such form"
        do = "choose another --network, or train with --device cpu"
        raise ConfigError("--deterministic", expected="operations that add in a fixed order", got=got, do=do, code="C052") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
