"""A network's pass over tiles of one size as a CUDA graph: recorded once, then started by one call of the processor.

A GPU is often done with a small kernel before the processor has asked for the next; a graph asks for all of them at once.
B batch, C channels, K classes, S spatial axes.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from microtome.inference.tf32 import tensor_float32, without_advice

Forward = Callable[[Tensor], Tensor]

# What torch.compile takes on a GPU for a U-Net, about: not measured yet, benchmarks/gpu.py does.
COMPILE_SECONDS = 60.0
# If it makes a job a tenth faster, one that is ten times as long as compiling gains nothing yet and a longer one does.
LEAST_TIMES_COMPILING = 10
# Kernels are chosen, libraries loaded and workspaces taken in the first passes, none of which may be recorded.
WARM_UP = 3
# Tiles of one size in a row until a graph is recorded for them: recording costs about five passes.
REPEATS = 8


def compiling_pays(device: torch.device, job_seconds: float | None) -> bool:
    """Whether torch.compile is worth its time: on a GPU, for a job of more than ten minutes; None: nobody knows how long it is, no.

    On a CPU it gained nothing in training (1.58 against 1.63 s a step, after 20 s of compiling) and prediction has faster engines.
    """
    return device.type == "cuda" and job_seconds is not None and job_seconds > LEAST_TIMES_COMPILING * COMPILE_SECONDS


def graphed(network: nn.Module, example_BCS: Tensor, *, precision: str = "fp32", compile_first: bool = False) -> Forward:
    """A call that gives what the network gives, without gradients; tiles of the example's size are computed by a CUDA graph.

    Any other size, and every size where the example is not on a GPU or no graph can be recorded, is computed by the plain network.
    In float32 convolutions are exact (no TF32). The result is a copy: the next call does not change it. One thread at a time.

    Args:
        network: in evaluation mode, on the example's device. Its weights may change in place, and are not to be replaced.
        example_BCS: a tile, of which only size and device count.
        precision: "fp32" or "bf16".
        compile_first: whether the graph is recorded from the compiled network (see `compiling_pays`).

    Warns:
        UserWarning: once, that no graph could be recorded, and why.
    """
    plain = plain_forward(network, example_BCS.device, precision)
    if example_BCS.device.type != "cuda":
        return plain
    called: nn.Module | Forward = torch.compile(network, dynamic=False) if compile_first else network
    try:
        return _Graph(plain_forward(called, example_BCS.device, precision), plain, example_BCS)
    except RuntimeError as error:
        # Also a lack of memory: a graph keeps what its pass needs for itself, a plain pass may still fit.
        line = str(error).partition("\n")[0]
        warnings.warn(f"no CUDA graph for tiles of {tuple(example_BCS.shape)}, they are computed one by one: {line}", stacklevel=2)
        return plain


def plain_forward(network: nn.Module | Forward, device: torch.device, precision: str) -> Forward:
    """The network as a call: without gradients, in this precision, exact where that is float32."""

    def forward(image_BCS: Tensor) -> Tensor:
        # Autocast may not keep rounded weights for the next call: a recorded graph would read them after they are freed.
        rounded = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        with torch.inference_mode(), rounded, tensor_float32(False):
            result: Tensor = network(image_BCS)
            return result

    return forward


class RepeatedTiles:
    """A network as a call that records a graph of itself when tiles of one size keep coming, as those of a large image do.

    It holds one graph; tiles of another size let it go. What else is to be known says `graphed`, to which it comes.

    Args:
        network: in evaluation mode.
        precision: "fp32" or "bf16".
    """

    def __init__(self, network: nn.Module, precision: str = "fp32") -> None:
        self.network, self.precision = network, precision
        self.size: tuple[object, ...] = ()
        self.count = 0
        self.call: Forward | None = None

    def __call__(self, image_BCS: Tensor) -> Tensor:
        """Logits of a tile, a copy."""
        size = (image_BCS.shape, image_BCS.dtype, image_BCS.device)
        if size != self.size or self.call is None:
            # The old graph is let go before another can be recorded: each keeps the memory of a pass.
            self.size, self.count, self.call = size, 0, plain_forward(self.network, image_BCS.device, self.precision)
        self.count += 1
        if self.count == REPEATS:
            self.call = graphed(self.network, image_BCS, precision=self.precision)
        return self.call(image_BCS)


class _Graph:
    """A recorded pass with the buffers that it reads and writes, and the plain pass for tiles of other sizes."""

    def __init__(self, recorded: Forward, plain: Forward, example_BCS: Tensor) -> None:
        self.plain = plain
        layout = torch.channels_last if example_BCS.dim() == 4 else torch.channels_last_3d
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.device(example_BCS.device), _kernels_by_measurement():
            self.image_BCS = torch.zeros_like(example_BCS, memory_format=layout)
            _warm_up(recorded, self.image_BCS)
            # Threads that feed a training may ask for memory meanwhile: that concerns only this thread's recording if it does it.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits_BKS = recorded(self.image_BCS)

    def __call__(self, image_BCS: Tensor) -> Tensor:
        fits = image_BCS.shape == self.image_BCS.shape and image_BCS.dtype == self.image_BCS.dtype
        if not fits or image_BCS.device != self.image_BCS.device:
            return self.plain(image_BCS)
        with torch.inference_mode():
            self.image_BCS.copy_(image_BCS, non_blocking=True)
            self.graph.replay()
            return self.logits_BKS.clone()


def _warm_up(forward: Forward, image_BCS: Tensor) -> None:
    """Some passes on a stream of their own, as recording is."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(here)
    with torch.cuda.stream(side), without_advice():
        for _ in range(WARM_UP):
            forward(image_BCS)
    here.wait_stream(side)


@contextmanager
def _kernels_by_measurement() -> Iterator[None]:
    """Let cuDNN time its kernels for each size it meets and keep the fastest: right where there is one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
