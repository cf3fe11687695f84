"""Who takes which patches of a batch, and what a part of a loss is worth where its sums run over all of it."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microtome.config import LossConfig
from microtome.errors import ConfigError
from microtome.training import ranks as ranks_module
from microtome.training.feeding import Batch
from microtome.training.gradients import Gradients, add_gradients, smaller_steps
from microtome.training.losses import segmentation_loss
from microtome.training.ranks import Ranks, deal, most_at_once
from tests.small import one_thread, small_plan
from tests.test_checkpoint import fresh

__all__ = ["one_thread"]


@given(batch=st.integers(1, 24), micro=st.integers(0, 30), count=st.integers(1, 24))
def test_every_patch_is_dealt_to_one_rank_and_every_rank_has_one(batch: int, micro: int, count: int) -> None:
    if count > batch:
        with pytest.raises(ConfigError, match=f"at least {count} patches"):
            deal(batch, micro, count)
        return
    dealt = deal(batch, micro, count)
    assert len(dealt) == count
    assert all(pieces and all(piece.patches > 0 for piece in pieces) for pieces in dealt)
    taken = [(piece.first + k, piece.row, piece.of) for pieces in dealt for piece in pieces for k in range(piece.patches)]
    # The micro-batches are those of one process, whoever takes them.
    alone = [(piece.first + k, piece.row, piece.of) for piece in deal(batch, micro)[0] for k in range(piece.patches)]
    assert taken == alone
    assert {piece.rows for pieces in dealt for piece in pieces} == (
        {0} if len(deal(batch, micro)[0]) >= count else {len(deal(batch, micro)[0])}
    )


def test_pieces_by_hand() -> None:
    assert [[tuple(piece)[:3] for piece in pieces] for pieces in deal(8, 2, 3)] == [[(0, 2, 2)], [(2, 2, 2)], [(4, 2, 2), (6, 2, 2)]]
    assert [[tuple(piece) for piece in pieces] for pieces in deal(5, 4, 3)] == [[(0, 2, 4, 0, 2)], [(2, 2, 4, 0, 2)], [(4, 1, 1, 1, 2)]]
    assert [[tuple(piece) for piece in pieces] for pieces in deal(3, 0, 2)] == [[(0, 1, 3, 0, 1)], [(1, 2, 3, 0, 1)]]


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(ranks_module).attempted == 1
    assert doctest.testmod(ranks_module).failed == 0


def test_where_memory_is_short_every_rank_has_fewer_patches_at_once() -> None:
    # Two ranks have 4 of 8 patches each. Micro-batches of 4 would give each a whole one, and as many as before.
    smaller = smaller_steps(small_plan(batch=8), ranks=2)
    assert smaller is not None
    assert (smaller.micro_batch, most_at_once(8, 0, 2), most_at_once(8, smaller.micro_batch, 2)) == (2, 4, 2)
    smaller = smaller_steps(small_plan(batch=8))
    assert smaller is not None
    assert smaller.micro_batch == 4
    alone = smaller_steps(small_plan(batch=2), ranks=2)
    assert alone is not None
    assert alone.checkpointing


CONFIGS = {
    "cross-entropy and dice": LossConfig(),
    "weighed classes": LossConfig(class_weights=(0.2, 1.0, 3.0), dice=0),
    "squares": LossConfig(dice_squares=True, dice_background=False),
    "focal and tversky": LossConfig(cross_entropy=0, dice=0, focal=1.0, tversky=0.5),
    "sigmoids": LossConfig(activation="sigmoid"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_with_the_sums_of_all_have_the_loss_and_together_the_gradient_of_the_whole(name: str) -> None:
    config, generator = CONFIGS[name], torch.Generator().manual_seed(0)
    logits_BKS = torch.randn(5, 3, 12, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    label_BS = torch.randint(-1, 3, (5, 12, 10), generator=generator)
    # One part alone holds the last class, and another is annotated nowhere.
    label_BS[:2][label_BS[:2] == 2] = 0
    label_BS[4] = -1
    weight_BS = torch.rand(5, 12, 10, generator=generator, dtype=torch.float64)
    levels = lambda part: [logits_BKS[part], logits_BKS[part, :, ::2, ::2]]  # noqa: E731
    whole = segmentation_loss(levels(slice(None)), label_BS, config, weight_BS)
    (expected,) = torch.autograd.grad(whole, logits_BKS)

    parts = (slice(0, 2), slice(2, 4), slice(4, 5))
    seen: list[list[torch.Tensor]] = []
    for part in parts:
        sums: list[torch.Tensor] = []
        segmentation_loss(
            levels(part), label_BS[part], config, weight_BS[part], total=lambda values, sums=sums: sums.append(values) or values
        )
        seen.append([values.detach() for values in sums])
    totals = [sum(values) for values in zip(*seen, strict=True)]

    found = torch.zeros_like(expected)
    for part in parts:
        each = iter(totals)
        loss = segmentation_loss(
            levels(part), label_BS[part], config, weight_BS[part], total=lambda values, each=each: next(each) + values - values.detach()
        )
        assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
        found += torch.autograd.grad(loss, logits_BKS)[0]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


class ShortOnce(Ranks):
    """Another process whose memory is too short for the first step that it is asked about."""

    def __init__(self) -> None:
        self.answers = [False, True]

    def any(self, flag: bool) -> bool:
        return flag or (bool(self.answers) and self.answers.pop(0))


def test_memory_that_is_short_in_another_process_halves_the_micro_batch_here() -> None:
    plan = small_plan(batch=2)
    generator = torch.Generator().manual_seed(0)
    label_BS = torch.randint(2, (2, 32, 32), generator=generator).to(torch.int16)
    batch = Batch(torch.randn(2, 1, 32, 32, generator=generator), label_BS, None)
    network, asked, told = fresh(plan).network.train(), [], []

    def again() -> Batch:
        asked.append(1)
        return batch

    with Gradients(network, plan, torch.device("cpu"), on_smaller=lambda plan, line: told.append(line), ranks=ShortOnce()) as gradients:
        loss = gradients(batch, again)
    assert gradients.plan.micro_batch == 1
    assert len(asked) == 1
    assert ["memory of another process" in line for line in told] == [True]
    other = fresh(plan).network.train()
    assert loss.item() == add_gradients(other, batch, plan.model_copy(update={"micro_batch": 1})).item()
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine.grad, theirs.grad) for mine, theirs in pairs if mine.grad is not None and theirs.grad is not None)
