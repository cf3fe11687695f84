"""Several processes that train one network: which patches each of them takes, and what they tell each other.

The plan says what a batch is and how it falls into micro-batches; how many processes share it changes no sum, only who adds up what:

    batch      0 1 2 3 4 5 6 7        with micro_batch 4: two micro-batches
    2 ranks    0 0 0 0 1 1 1 1        each takes one of them whole
    4 ranks    0 0 1 1 2 2 3 3        two share one: the sums of its loss run over both

A network and a loss know nothing of it. `Ranks` is one process, which has nobody to ask; `processes.Processes` is one of several.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from microtome.config import Plan
from microtome.errors import ConfigError
from microtome.training.checkpoint import Progress
from microtome.training.losses import Total, own_sums

Number = TypeVar("Number", float, float | None)


class Piece(NamedTuple):
    """Patches that one process takes at a time: a micro-batch, or its share of one.

    Attributes:
        first: position in the batch of the first of them.
        patches: how many.
        of: how many the micro-batch has.
        row: which micro-batch it is.
        rows: how many micro-batches there are where some are shared, which are then all worked on at once; 0: each is whole.
    """

    first: int
    patches: int
    of: int
    row: int
    rows: int = 0


def deal(batch: int, micro_batch: int, ranks: int = 1) -> list[list[Piece]]:
    """The pieces of each rank; every patch is in one of them, and every rank has one at least.

    Micro-batches are handed out whole, neighbours to one rank, while there are as many as ranks. Of fewer, the largest are
    shared by several ranks until each has a part; a rank then has one piece.

    >>> deal(5, 4, 2)
    [[Piece(first=0, patches=4, of=4, row=0, rows=0)], [Piece(first=4, patches=1, of=1, row=1, rows=0)]]

    Args:
        batch: patches a step.
        micro_batch: patches that the plan lets the network see at a time; 0: all.
        ranks: how many processes.

    Raises:
        ConfigError: there are more ranks than patches.
    """
    if ranks > batch:
        do = "start fewer processes, or make batch in plan.yaml larger"
        raise ConfigError("batch", expected=f"at least {ranks} patches for {ranks} processes", got=str(batch), do=do, code="C050")
    size = micro_batch or batch
    wholes = [Piece(first, min(size, batch - first), min(size, batch - first), row) for row, first in enumerate(range(0, batch, size))]
    if len(wholes) >= ranks:
        return [wholes[rank * len(wholes) // ranks : (rank + 1) * len(wholes) // ranks] for rank in range(ranks)]
    sharers = [1] * len(wholes)
    for _ in range(ranks - len(wholes)):
        fullest = max(range(len(wholes)), key=lambda row: wholes[row].patches / sharers[row])
        sharers[fullest] += 1
    return [[_share(whole, number, count, len(wholes))] for whole, count in zip(wholes, sharers, strict=True) for number in range(count)]


def most_at_once(batch: int, micro_batch: int, ranks: int) -> int:
    """How many patches the rank that has most of them takes at a time."""
    return max(piece.patches for pieces in deal(batch, micro_batch, ranks) for piece in pieces)


def _share(whole: Piece, number: int, count: int, rows: int) -> Piece:
    """Of a micro-batch that so many ranks share, the part with this number."""
    first, end = number * whole.patches // count, (number + 1) * whole.patches // count
    return Piece(whole.first + first, end - first, whole.of, whole.row, rows)


class Ranks:
    """One process that trains alone; what several would have to agree on it decides itself.

    Attributes:
        rank: the number of this process, from 0; the first one writes the run folder and speaks to people.
        count: how many there are.
        beside: how many of them share the memory of this machine.
    """

    rank, count, beside = 0, 1, 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Which device this process is to use where a person asked for `name`."""
        return name

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all ask at the same time."""
        return flag

    def first(self, value: Number) -> Number:
        """What the first process says where clocks may differ; None is the same everywhere."""
        return value

    def follow(self, progress: Progress) -> None:
        """Take over the progress of the first process."""

    def same_plan(self, make: Callable[[], Plan]) -> Plan:
        """What the first process plans."""
        return make()

    def wait(self) -> None:
        """Until every process is here."""

    def refuse_others(self, digest: Callable[[], str], folder: Path) -> None:
        """See that all processes took the same out of a run folder.

        Raises:
            RunError: they did not.
        """

    def total_table(self, table: Tensor) -> Tensor:
        """The sum over all processes of a table in which each fills rows of its own; NaN stays."""
        return table

    def total_of(self, piece: Piece, loss: Callable[[Total], Tensor]) -> Total:
        """What makes the sums of a loss over a piece those over its micro-batch, for a loss that asks for the same ones each time.

        Raises:
            ShortElsewhereError: memory was too short in another process.
        """
        return own_sums

    def packed(self, loss: Tensor, network: nn.Module) -> Tensor:
        """What `add_up` exchanges: made before, as it takes memory."""
        return loss

    def add_up(self, packed: Tensor, network: nn.Module) -> Tensor:
        """Make the gradients of all parameters the sum over all processes; returns the sum of their losses."""
        return packed


def positions(plan: Plan, ranks: Ranks) -> range:
    """The places in the batch whose samples this process makes."""
    pieces = deal(plan.batch, plan.micro_batch, ranks.count)[ranks.rank]
    return range(pieces[0].first, pieces[-1].first + pieces[-1].patches)


class ShortElsewhereError(MemoryError):
    """Memory was too short in another process for the step that all of them were taking."""


def seed_of_step(seed: int, step: int, rank: int = 0) -> int:
    """What dropout draws from: a function of the step, and other numbers in each process."""
    return seed * 1_000_003 + step + rank * 2**40


def flat(loss: Tensor, network: nn.Module) -> Tensor:
    """Loss, gradients and running statistics as one vector."""
    return torch.cat([loss.reshape(1), *(values.reshape(-1) for values in _exchanged(network))])


def spread(vector: Tensor, network: nn.Module, count: int) -> Tensor:
    """Put a sum of such vectors back into the network: gradients are sums, running statistics means; returns the loss."""
    with torch.no_grad():
        end = 1
        for values in _exchanged(network):
            begin, end = end, end + values.numel()
            values.copy_(vector[begin:end].view(values.shape))
        for buffer in _statistics(network):
            buffer /= count
    return vector[0]


def _exchanged(network: nn.Module) -> list[Tensor]:
    """Gradients, and then running statistics; what has no gradient in one process has none in any."""
    return [p.grad for p in network.parameters() if p.grad is not None] + _statistics(network)


def _statistics(network: nn.Module) -> list[Tensor]:
    """Running means and variances of batch norm."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


ALONE = Ranks()
