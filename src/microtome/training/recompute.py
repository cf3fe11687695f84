"""Activations that are computed again for the gradient instead of kept: less memory, about a quarter more time.

Networks know nothing of it. While `recomputing` is open, the parts of a network that `models.segments` finds keep only what
they take and hand on; when the backward pass reaches a part, it runs again and its activations are there for its gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from microtome.geometry import Shape
from microtome.models.network import Network
from microtome.models.segments import segments
from microtome.models.trace import trace


@contextmanager
def recomputing(network: Network, patch_vox: Shape) -> Iterator[None]:
    """Training steps of `network` inside of it compute the activations of its parts twice; afterwards it is as it was.

    Gradients and running statistics are those of a plain step, bit for bit on one machine: dropout drops the same values the
    second time, autocast casts the same, and batch norm counts a batch once. The backward pass belongs inside, too.

    Args:
        network: it may be used for prediction as well; what is run without gradients runs as ever.
        patch_vox: the size that it will see, (*S,).
    """
    graph = trace(network, (network.in_channels, *patch_vox))
    with ExitStack() as undo:
        for name in segments(network, graph):
            module = network.get_submodule(name)
            # An attribute of the object goes before the method of its class; taken away, the method is back.
            module.forward = _twice(module, module.forward)
            undo.callback(delattr, module, "forward")
        yield


def _twice(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a part, to be run again in the backward pass."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_kept(module)

    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts)

    return run


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside of it, running statistics and counts of batches move only in copies that are thrown away."""
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
    for part, name, buffer in buffers:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in buffers:
            setattr(part, name, buffer)
