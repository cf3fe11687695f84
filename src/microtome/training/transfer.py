"""From the host's memory to a GPU beside what it computes: copies that nobody waits for, and a queue of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device; to a GPU through pinned memory, so that the copy is queued and not waited for.

    Pinned memory is not used again before the copy out of it is done: torch's allocator of it takes note of the queue.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Lane:
    """A GPU's queue of work beside the one in which the network runs; on another device there is no queue, and nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What its body asks of the GPU goes into this queue."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def mark(self) -> torch.cuda.Event | None:
        """The point that the queue has reached when all that was asked of it so far is done."""
        return None if self.stream is None else self.stream.record_event()

    def receive(self, done: torch.cuda.Event | None, *made: Tensor | None) -> None:
        """Make the caller's queue wait until tensors made in this one are done; the host does not wait."""
        if done is None:
            return
        here = torch.cuda.current_stream(self.device)
        here.wait_event(done)
        for tensor in made:
            if tensor is not None:
                # Its memory must not go to this queue's next tensor while the caller's still reads it.
                tensor.record_stream(here)
