"""The loss of a batch and its gradient: all at once, or in micro-batches one after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from microtome.config import Plan
from microtome.inference.devices import arithmetic
from microtome.training.compiled import TrainingCall
from microtome.training.feeding import Batch
from microtome.training.losses import segmentation_loss


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


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in pieces of `size` patches; the last may be smaller."""
    images, labels = torch.split(batch.image, size), torch.split(batch.label, size)
    weights = [None] * len(images) if batch.weight is None else torch.split(batch.weight, size)
    yield from map(Batch, images, labels, weights)
