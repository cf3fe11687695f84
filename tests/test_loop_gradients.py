"""Micro-batches: what they compute, exactly, and where that is the whole batch's gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microtome.config import LossConfig, NetworkConfig, Plan
from microtome.training import gradients
from microtome.training.feeding import Batch
from microtome.training.gradients import add_gradients
from microtome.training.losses import segmentation_loss
from tests.small import TINY_2D, one_thread, small_plan
from tests.test_checkpoint import fresh

__all__ = ["one_thread"]

INSTANCE = TINY_2D.model_copy(update={"norm": "instance", "supervised_levels": 1})
CROSS_ENTROPY = LossConfig(dice=0)


def made(count: int, *, unknown: bool = False, weighted: bool = False) -> Batch:
    """Patches of 32 x 32; with `unknown` ever more of each is not annotated."""
    generator = torch.Generator().manual_seed(0)
    label_BS = torch.randint(2, (count, 32, 32), generator=generator).to(torch.int16)
    if unknown:
        for number in range(count):
            label_BS[number, : 6 * number] = -1
    weight_BS = torch.rand(count, 32, 32, generator=generator) if weighted else None
    return Batch(torch.randn(count, 1, 32, 32, generator=generator), label_BS, weight_BS)


def computed(plan: Plan, batch: Batch) -> tuple[float, Tensor]:
    """Loss and gradient, as one vector."""
    network = fresh(plan).network.train()
    loss = add_gradients(network, batch, plan)
    return loss.item(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@given(count=st.integers(1, 6), micro=st.integers(1, 8), norm=st.sampled_from(["instance", "none"]))
@settings(max_examples=25, deadline=None)
def test_of_patches_annotated_alike_the_cross_entropy_and_its_gradient_are_the_whole_batch_s(count: int, micro: int, norm: str) -> None:
    whole = small_plan(network=INSTANCE.model_copy(update={"norm": norm}), loss=CROSS_ENTROPY)
    batch = made(count)
    (loss, gradient), (added_loss, added) = computed(whole, batch), computed(whole.model_copy(update={"micro_batch": micro}), batch)
    assert added_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(added, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("weighted", [False, True])
def test_otherwise_it_is_the_mean_over_micro_batches_by_their_patches(weighted: bool) -> None:
    plan = small_plan(network=INSTANCE, micro_batch=2)
    batch = made(5, unknown=True, weighted=weighted)
    network = fresh(plan).network.train()
    expected = torch.zeros(())
    for part, share in ((slice(0, 2), 0.4), (slice(2, 4), 0.4), (slice(4, 5), 0.2)):
        weight_BS = None if batch.weight is None else batch.weight[part]
        expected = expected + share * segmentation_loss([network(batch.image[part])], batch.label[part], plan.loss, weight_BS)
    expected.backward()
    loss, gradient = computed(plan, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)
    # Which is not that of the whole batch: Dice and the means are taken within a micro-batch.
    assert loss != pytest.approx(computed(plan.model_copy(update={"micro_batch": 0}), batch)[0], rel=1e-4)


@pytest.mark.parametrize(("micro", "sizes"), [(0, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_the_network_sees_so_many_patches_at_a_time(micro: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def note(outputs: list[Tensor], *rest: Any) -> Tensor:
        seen.append(len(outputs[0]))
        return segmentation_loss(outputs, *rest)

    monkeypatch.setattr(gradients, "segmentation_loss", note)
    computed(small_plan(network=INSTANCE, micro_batch=micro), made(5))
    assert seen == sizes


def test_gradients_are_added_to_what_is_there_and_the_loss_hangs_on_no_graph() -> None:
    plan = small_plan(network=NetworkConfig(name="unet_same", widths=(4, 8)), micro_batch=2)
    network, batch = fresh(plan).network.train(), made(2)
    assert not add_gradients(network, batch, plan).requires_grad
    first = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    add_gradients(network, batch, plan)
    for parameter, before in zip(network.parameters(), first, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, 2 * before, rtol=1e-3, atol=1e-6)
