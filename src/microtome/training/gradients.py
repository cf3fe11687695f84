"""The loss of a batch and its gradient: all at once, in micro-batches one after the other, in parts beside other processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
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
from microtome.training.losses import Total, own_sums, segmentation_loss
from microtome.training.ranks import ALONE, Piece, Ranks, ShortElsewhereError, deal, most_at_once
from microtome.training.recompute import recomputing


def add_gradients(network: TrainingCall, batch: Batch, plan: Plan, ranks: Ranks = ALONE) -> Tensor:
    """Add the gradient of the batch's loss to that of each parameter; returns the loss, still on the device.

    Of several processes each adds the gradients of its own patches, and the loss is its share: sums over the processes are what
    one with the whole batch would have found.

    With `plan.micro_batch` the network sees so many patches at a time, and the loss is the mean of the losses of the
    micro-batches, each weighed by its number of patches. What sums over voxels before it divides does so within a micro-batch:
    Dice and Tversky take their ratios there, and cross-entropy and focal loss their means over the voxels that are annotated (or
    weighed) there. A mean over patches that are annotated alike is therefore exactly that of the whole batch; Dice is not, and a
    voxel of a sparsely annotated micro-batch weighs more. Batch norm normalises by the micro-batch, and its running statistics move
    once for each.

    Args:
        network: in training mode, on the batch's device.
        batch: the patches of this process; labels and weights as large as the network's output.
        plan: gives loss, precision and micro_batch, and with several processes the size of the whole batch.
        ranks: the processes.

    Raises:
        ShortElsewhereError: memory was too short in another process.
    """
    patches = len(batch.image) if ranks.count == 1 else plan.batch
    added = batch.image.new_zeros(())
    for piece, part in _parts(batch, deal(patches, plan.micro_batch, ranks.count)[ranks.rank]):
        with arithmetic(batch.image.device, plan.precision):
            outputs = network(part.image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss_of = partial(_loss, outputs, part, plan)
        loss = loss_of(ranks.total_of(piece, loss_of))
        (loss * (piece.of / patches)).backward()  # type: ignore[no-untyped-call]
        added += loss.detach() * (piece.patches / patches)
    return added


def _loss(outputs: Sequence[Tensor], part: Batch, plan: Plan, total: Total) -> Tensor:
    """The loss of a micro-batch, of which these may be a part."""
    if total is own_sums:
        return segmentation_loss(outputs, part.label, plan.loss, part.weight)
    return segmentation_loss(outputs, part.label, plan.loss, part.weight, total=total)


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
        ranks: the processes that share the batch: all of them halve what they do, or none.

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
        ranks: Ranks = ALONE,
    ) -> None:
        self.network, self.plan, self.device, self.job_seconds, self.on_smaller = network, plan, device, job_seconds, on_smaller
        self.ranks = ranks
        self.undo = ExitStack()
        self.call: TrainingCall = network

    def __enter__(self) -> Self:
        while self._failed(self._prepare):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def __call__(self, batch: Batch, again: Callable[[], Batch] | None = None) -> Tensor:
        """The loss of a batch, whose gradient every parameter holds afterwards, and nothing before.

        Args:
            batch: the patches of this process.
            again: gives them anew where the plan has changed, by which other patches may be this process's; None: the same.

        Raises:
            RunError: memory is too short for a single patch.
        """
        before = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        packed: list[Tensor] = []

        def step() -> None:
            packed.append(self.ranks.packed(add_gradients(self.call, batch, self.plan, self.ranks), self.network))

        while self._failed(step):
            packed.clear()
            self.network.zero_grad(set_to_none=True)
            for buffer, values in before:
                buffer.copy_(values)
            # What dropout drew of the step's own numbers is drawn again.
            torch.manual_seed(torch.initial_seed())
            while self._failed(self._prepare):
                pass
            batch = batch if again is None else again()
        return self.ranks.add_up(packed[-1], self.network)

    def _prepare(self) -> None:
        """The network as the plan of now calls it."""
        self.undo.close()
        if self.plan.checkpointing:
            self.undo.enter_context(recomputing(self.network, self.plan.patch_vox))
        self.call = training_call(self.network, self._own_plan(), self.device, self.job_seconds)

    def _own_plan(self) -> Plan:
        """The plan with the patches that this process takes in all, and at a time."""
        if self.ranks.count == 1:
            return self.plan
        pieces = deal(self.plan.batch, self.plan.micro_batch, self.ranks.count)[self.ranks.rank]
        sizes = {"batch": sum(piece.patches for piece in pieces), "micro_batch": pieces[0].patches}
        return self.plan.model_copy(update=sizes)

    def _failed(self, work: Callable[[], None]) -> bool:
        """Whether memory was too short for some work, in this process or in another; the plan is then a smaller one.

        Raises:
            RunError: there is no smaller one.
        """
        said = "memory of another process"
        try:
            work()
        except ShortElsewhereError:
            # The one that it was asked in the middle of the work.
            pass
        except (RuntimeError, MemoryError) as error:
            if not is_short_of_memory(error):
                raise
            self.ranks.any(True)
            said = " ".join(str(error).split())[:160] or "no more memory"
        else:
            if not self.ranks.any(False):
                return False
        # Only here: the error holds the frames of the step, and these its activations.
        self.network.zero_grad(set_to_none=True)
        release_memory()
        smaller = smaller_steps(self.plan, self.ranks.count)
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


def smaller_steps(plan: Plan, ranks: int = 1) -> Plan | None:
    """The plan with half the patches at once, or, where that is one, with activations computed twice; None: there is no smaller one.

    Several processes share a micro-batch before each has one of its own: it is halved until the fullest of them has less at once.
    """
    size = min(plan.micro_batch or plan.batch, plan.batch)
    most = most_at_once(plan.batch, size, ranks)
    if most > 1:
        half = -(-size // 2)
        while most_at_once(plan.batch, half, ranks) == most:
            half = -(-half // 2)
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


def _parts(batch: Batch, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Batch]]:
    """The patches of each piece."""
    sizes = [piece.patches for piece in pieces]
    images, labels = torch.split(batch.image, sizes), torch.split(batch.label, sizes)
    weights = [None] * len(images) if batch.weight is None else torch.split(batch.weight, sizes)
    yield from zip(pieces, map(Batch, images, labels, weights), strict=True)
