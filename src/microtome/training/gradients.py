"""The loss of a batch and its gradient: all at once, or in micro-batches one after the other, smaller ones where memory is short."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from microtome.config import Plan
from microtome.errors import RunError
from microtome.geometry import format_shape
from microtome.inference.devices import arithmetic
from microtome.machine import is_short_of_memory, release_memory
from microtome.models.network import Network
from microtome.training.compiled import TrainingCall, training_call
from microtome.training.feeding import Batch
from microtome.training.losses import segmentation_loss
from microtome.training.recompute import recomputing


def add_gradients(network: TrainingCall, batch: Batch, plan: Plan) -> Tensor:
    """Add the gradient of the batch's loss to that of each parameter; returns the loss, still on the device.

    With `plan.micro_batch` the network sees so many patches at a time, and the loss is the mean of the losses of the
    micro-batches, each weighed by its number of patches. What sums over voxels before it divides does so within a micro-batch:
    Dice and Tversky take their ratios there, and cross-entropy and focal loss their means over the voxels that are annotated (or
    weighed) there. A mean over patches that are annotated alike is therefore exactly that of the whole batch; Dice is not, and a
    voxel of a sparsely annotated micro-batch weighs more. Batch norm normalises by the micro-batch, and its running statistics move
    once for each.

    Args:
        network: in training mode, on the batch's device.
        batch: labels and weights as large as the network's output.
        plan: gives loss, precision and micro_batch.
    """
    total = batch.image.new_zeros(())
    for part in _parts(batch, plan.micro_batch or len(batch.image)):
        with arithmetic(batch.image.device, plan.precision):
            outputs = network(part.image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss = segmentation_loss(outputs, part.label, plan.loss, part.weight) * (len(part.image) / len(batch.image))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


class Gradients:
    """`add_gradients` for a whole run: where memory is short for a step, its micro-batches are halved and the step is taken again.

    A step that failed leaves nothing: no gradient, no moved statistics, no used random numbers. The step that is taken in its place,
    and all that follow, are those of a run begun with the smaller micro-batch.

    Args:
        network: on the device, in training mode.
        plan: of the run.
        device: where the network lies.
        job_seconds: that training may still take; None: not known.
        on_smaller: is told of each plan that takes less memory, and why in a line.

    Attributes:
        plan: by which steps are taken now.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        device: torch.device,
        job_seconds: float | None = None,
        *,
        on_smaller: Callable[[Plan, str], None] = lambda plan, line: None,
    ) -> None:
        self.network, self.plan, self.device, self.job_seconds, self.on_smaller = network, plan, device, job_seconds, on_smaller
        self.undo = ExitStack()
        self.call: TrainingCall = network

    def __enter__(self) -> Self:
        while self._failed(self._prepare):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch, whose gradient every parameter holds afterwards, and nothing before.

        Raises:
            RunError: memory is too short for a single patch.
        """
        before = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        loss: list[Tensor] = []
        while self._failed(lambda: loss.append(add_gradients(self.call, batch, self.plan))):
            self.network.zero_grad(set_to_none=True)
            for buffer, values in before:
                buffer.copy_(values)
            # What dropout drew of the step's own numbers is drawn again.
            torch.manual_seed(torch.initial_seed())
            while self._failed(self._prepare):
                pass
        return loss[0]

    def _prepare(self) -> None:
        """The network as the plan of now calls it."""
        self.undo.close()
        if self.plan.checkpointing:
            self.undo.enter_context(recomputing(self.network, self.plan.patch_vox))
        self.call = training_call(self.network, self.plan, self.device, self.job_seconds)

    def _failed(self, work: Callable[[], None]) -> bool:
        """Whether memory was too short for some work; the plan is then a smaller one.

        Raises:
            RunError: there is no smaller one.
        """
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not is_short_of_memory(error):
                raise
            said = " ".join(str(error).split())[:160] or "no more memory"
        else:
            return False
        # Only here: the error holds the frames of the step, and these its activations.
        self.network.zero_grad(set_to_none=True)
        release_memory()
        smaller = smaller_steps(self.plan)
        if smaller is None:
            raise RunError(
                "memory",
                expected=f"room for a training step of one patch of {format_shape(self.plan.patch_vox)}",
                got=said,
                do="make patch_vox smaller in plan.yaml, then --resume; or close other programs, or plan anew with --memory",
                code="R122",
            )
        was, self.plan = self.plan, smaller
        self.on_smaller(smaller, f"memory ran out ({said}): {_changed(was, smaller)}; the step is taken again")
        return True


def smaller_steps(plan: Plan) -> Plan | None:
    """The plan with half the patches at once, or, where that is one, with activations computed twice; None: there is no smaller one."""
    size = min(plan.micro_batch or plan.batch, plan.batch)
    if size > 1:
        half = -(-size // 2)
        return _with(plan, "micro_batch", half, f"{half} of {plan.batch} patches at a time, as memory ran out with {size}")
    if not plan.checkpointing:
        return _with(plan, "checkpointing", True, "memory ran out with one patch at a time")
    return None


def _with(plan: Plan, field: str, value: object, reason: str) -> Plan:
    """The plan with one value changed and its reason noted."""
    return plan.model_copy(update={field: value, "reasons": {**plan.reasons, field: reason}})


def _changed(was: Plan, now: Plan) -> str:
    """What is other in the smaller plan, in words."""
    if now.checkpointing != was.checkpointing:
        return "activations are computed twice from now on (checkpointing)"
    return f"micro_batch was {was.micro_batch or was.batch} and is {now.micro_batch} of {now.batch} patches"


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in pieces of `size` patches; the last may be smaller."""
    images, labels = torch.split(batch.image, size), torch.split(batch.label, size)
    weights = [None] * len(images) if batch.weight is None else torch.split(batch.weight, size)
    yield from map(Batch, images, labels, weights)
