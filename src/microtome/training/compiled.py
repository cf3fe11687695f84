"""How a GPU trains faster: kernels chosen by measurement, TF32, and a compiled network where the job is long enough.

The network itself stays as it is, so that weights keep their names in checkpoints; what is compiled is only called.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from microtome.config import Plan
from microtome.inference.cuda_graphs import compiling_pays
from microtome.inference.devices import arithmetic
from microtome.inference.tf32 import tensor_float32, without_advice

TrainingCall = Callable[[Tensor], Tensor | list[Tensor]]


@contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """For training on a GPU, inside of the body: cuDNN times its kernels and keeps the fastest, float32 convolutions are TF32.

    Patches are all of one size, so the timing is done once. Which kernel wins may differ from run to run, and some add up
    gradients in no fixed order: on a GPU a resumed run ends near the unbroken one, not bit for bit on it as on a CPU, but within
    `deterministic.same_bits`, where nothing is timed. Nothing happens on other devices.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        with tensor_float32(True):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def training_call(network: nn.Module, plan: Plan, device: torch.device, job_seconds: float | None) -> TrainingCall:
    """The network as training calls it: compiled where that pays, else itself.

    Not compiled are a network that is to give the same bits each time, one whose activations are computed twice,
    which is arranged in Python as it runs, and one whose last micro-batch has another size: it would be compiled again, in the middle
    of the first step.

    Args:
        network: in training mode, on the device. Its weights and statistics are as before afterwards.
        plan: whose batches (or parts of a batch) it will see.
        device: where it lies.
        job_seconds: that training may still take; None: not known.
    """
    size = plan.micro_batch or plan.batch
    fixed = torch.are_deterministic_algorithms_enabled()
    if fixed or plan.checkpointing or plan.batch % size or not compiling_pays(device, job_seconds):
        return network
    image_BCS = torch.zeros(size, plan.channels, *plan.patch_vox, device=device)
    layout = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
    return compiled(network, image_BCS.contiguous(memory_format=layout), plan.precision)


def compiled(network: nn.Module, image_BCS: Tensor, precision: str, backend: str = "inductor") -> TrainingCall:
    """The network compiled for batches like `image_BCS`, forward and backward; itself, with a warning, where that fails.

    Both are compiled now, on this batch: a failure in the middle of the first step could not be made good.

    Args:
        network: in training mode. Its weights and statistics are as before afterwards, gradients are cleared.
        image_BCS: a batch, of which size, layout and device count.
        precision: "fp32" or "bf16".
        backend: of torch.compile.

    Raises:
        OutOfMemoryError: the batch is too large for the device, compiled or not.
    """
    call: TrainingCall = torch.compile(network, dynamic=False, backend=backend)
    statistics = {name: values.clone() for name, values in network.named_buffers()}
    try:
        with without_advice():
            with arithmetic(image_BCS.device, precision):
                outputs = call(image_BCS)
            parts = outputs if isinstance(outputs, list) else [outputs]
            torch.stack([part.float().sum() for part in parts]).sum().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # The first line says which part of the compiler it was, the second what happened.
        line = " ".join(str(error).split("\n")[:2])
        warnings.warn(f"torch.compile failed, training goes on without it: {line}", stacklevel=2)
        call = network
    finally:
        network.zero_grad(set_to_none=True)
        for name, values in network.named_buffers():
            values.copy_(statistics[name])
    return call
