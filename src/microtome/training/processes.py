"""Several processes that train one network, as `torchrun` or a job script starts them: who is who, and what they exchange.

Gradients are added up over all of them after each step (NCCL between GPUs, Gloo between CPUs). Whatever depends on a clock is decided
by the first process. What is exchanged beside gradients goes through Gloo, by which the host waits and not the GPU.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from microtome.config import Plan
from microtome.errors import ConfigError, MicrotomeError, RunError
from microtome.inference.devices import pick_device
from microtome.training.checkpoint import Progress
from microtome.training.clock import ending_anyway
from microtome.training.losses import Total, own_sums
from microtome.training.ranks import ALONE, Number, Piece, Ranks, ShortElsewhereError, flat, spread
from microtome.training.watch import Watch

# Others may still be reading their packages from a slow disk.
MOST_SECONDS_TO_COME = 300.0
# Preparing images, or saving, may take the first process any time; `watch` sees to it that nobody waits for one that is gone.
_PATIENCE = timedelta(days=30)
_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LostError(Exception):
    """Another process did not answer; `watch` knows which, and `joined` makes the error for people of it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of several processes this is.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local: its number on this machine, from 0, which is that of its GPU.
        address: of the store through which they find each other, with `port`.
        port: see there.
        hosted: whether somebody else holds that store; if not, the first process does.
    """

    rank: int
    count: int
    local: int
    address: str
    port: int
    hosted: bool

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self | None:
        """As torchrun says it in the environment; None: one process.

        Raises:
            ConfigError: it says half of it, or what is no number.
        """
        if environ.get("WORLD_SIZE", "1") == "1":
            return None
        missing = [word for word in _WORDS if word not in environ]
        try:
            rank, count, local, port = (int(environ.get(word, "0")) for word in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
            missing += [] if 0 <= rank < count and local >= 0 and port > 0 else ["a RANK below WORLD_SIZE and a port above 0"]
        except ValueError as error:
            missing, rank, count, local, port = [str(error)], 0, 0, 0, 0
        if missing:
            got = f"WORLD_SIZE={environ['WORLD_SIZE']} but not {', '.join(missing)}"
            do = "start it with torchrun, or unset WORLD_SIZE"
            raise ConfigError("environment", expected=f"{', '.join(_WORDS)} together", got=got, do=do, code="C051")
        hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank=rank, count=count, local=local, address=environ["MASTER_ADDR"], port=port, hosted=hosted)


@contextmanager
def joined(device: str = "auto", environ: Mapping[str, str] | None = None) -> Iterator[Ranks]:
    """The processes that train together with this one; alone where nobody started several.

    What ends one of them ends all: the first says what it was, or the lowest that is left if it cannot; the others end with the same
    exit code and without a word.

    Args:
        device: that a person asked for: "cuda" is the GPU with the number of the process on its machine.
        environ: None: `os.environ`.

    Raises:
        ConfigError: the environment says half of what it has to, or there is no such device.
        RunError: the others did not come, or one was lost.
    """
    place = Place.of(os.environ if environ is None else environ)
    if place is None:
        yield ALONE
        return
    ranks = Processes(place, device)
    try:
        ranks.join()
        yield ranks
    except BaseException as error:  # whatever ends this process, the others must not wait for it
        # torchrun asks all others to stop as soon as it sees that one is gone, which may be while this one finds out why.
        with ending_anyway():
            ended = ranks.end(error)
        if ended is error:
            raise
        raise ended from error
    ranks.leave()


class Processes(Ranks):
    """One of several processes.

    Args:
        place: which.
        device: that was asked for.
    """

    def __init__(self, place: Place, device: str) -> None:
        self.place, self.rank, self.count, self.wanted = place, place.rank, place.count, device
        self.watch: Watch | None = None
        # Of what is exchanged that the host waits for; None: not joined yet.
        self.control: distributed.ProcessGroup | None = None

    def join(self) -> None:
        """Find the others.

        Raises:
            ConfigError: there is no such device.
            RunError: some did not come.
        """
        if not self.is_first:
            warnings.simplefilter("ignore")
        try:
            store, own_store = self._store(master=self.is_first and not self.place.hosted), self._store(master=False)
            self.watch = Watch(own_store, self.rank, self.count, self.place.local)
            self.watch.start()
        except RuntimeError as error:
            late = self.watch.missing() if self.watch else []
            got = f"{len(late)} that did not come (rank {late[0]})" if late else " ".join(str(error).split())[:200]
            expected = f"{self.count} processes at {self.place.address}:{self.place.port} within {MOST_SECONDS_TO_COME:.0f} s"
            do = "see that all are started, and reach that address"
            raise RunError(f"rank {self.rank}", expected=expected, got=got, do=do, code="R131") from error
        self.beside = self.watch.beside()
        device = pick_device(self.device(self.wanted))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _together():
            prefixed = distributed.PrefixStore("microtome/group", store)  # type: ignore[attr-defined]
            distributed.init_process_group(backend, store=prefixed, rank=self.rank, world_size=self.count, timeout=_PATIENCE)
            self.control = distributed.group.WORLD if backend == "gloo" else distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def _store(self, *, master: bool) -> Any:
        """A connection to the store by which processes find each other."""
        seconds = timedelta(seconds=MOST_SECONDS_TO_COME)
        return distributed.TCPStore(  # type: ignore[attr-defined]
            self.place.address, self.place.port, is_master=master, timeout=seconds, wait_for_workers=False
        )

    def leave(self) -> None:
        """Tell the others that this process has done its part."""
        if self.watch is not None:
            self.watch.leave(None)
        try:
            if distributed.is_initialized():
                distributed.destroy_process_group()
        finally:
            if self.watch is not None:
                self.watch.close()

    def end(self, error: BaseException) -> BaseException:
        """Tell the others that this process ends before its time; returns what it is to end with."""
        if self.watch is None:
            return error if self.is_first or not isinstance(error, MicrotomeError) else SystemExit(error.exit_code)
        own = isinstance(error, MicrotomeError)
        found = error if own else self.watch.verdict(3.0 if isinstance(error, LostError) else 0.5)
        told = found if isinstance(found, MicrotomeError) else _ended(self.rank, error)
        self.watch.leave(told)
        try:
            if self.control is not None and distributed.is_initialized():
                # Whoever waits for this one is told by its connection that it will not come.
                distributed.destroy_process_group(self.control)
        finally:
            self.watch.close()
        if isinstance(found, MicrotomeError):
            if self.is_first or (not own and self.watch.speaks()):
                return found
            self.watch.wait_for_first(5.0)
            return SystemExit(found.exit_code)
        return told if isinstance(error, LostError) else error

    def device(self, name: str) -> str:
        """A GPU of its own for each process of a machine."""
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.place.local}"
        return name

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self._sum(torch.tensor([float(flag)])).item())

    def first(self, value: Number) -> Number:
        """What the first process says."""
        if value is None:
            return value
        said = torch.tensor([value if self.is_first else 0.0], dtype=torch.float64)
        return self._sum(said).item()

    def follow(self, progress: Progress) -> None:
        """Take over the progress of the first process."""
        vars(progress).update(json.loads(self._text(json.dumps(asdict(progress)))))

    def same_plan(self, make: Callable[[], Plan]) -> Plan:
        """What the first process plans."""
        if not self.is_first:
            return Plan.model_validate_json(self._text(""))
        plan = make()
        self._text(plan.model_dump_json())
        return plan

    def wait(self) -> None:
        """Until every process is here."""
        self.any(False)

    def refuse_others(self, digest: Callable[[], str], folder: Path) -> None:
        """See that all processes took the same out of a run folder."""
        mine = digest()
        if self.any(self._text(mine) != mine):
            do = "keep the run folder on one file system for all machines, with the same versions of everything"
            raise RunError(folder, expected="the same weights in every process", got="others in some", do=do, code="R132")

    def total_table(self, table: Tensor) -> Tensor:
        """The sum over all processes; NaN stays."""
        return self._sum(table)

    def total_of(self, piece: Piece, loss: Callable[[Total], Tensor]) -> Total:
        """What makes the sums of a loss over a piece those over its micro-batch.

        The loss is computed once without gradients, to know its sums; these are exchanged at one go. The gradient of a sum is that of
        the part that lies here: those of all processes together are the whole gradient.
        """
        if not piece.rows:
            return own_sums
        sums: list[Tensor] = []

        def note(values: Tensor) -> Tensor:
            sums.append(values)
            return values

        with torch.no_grad():
            loss(note)
            mine = torch.cat([values.reshape(-1) for values in sums])
            table = mine.new_zeros(piece.rows, len(mine))
            table[piece.row] = mine
        if self.any(False):
            raise ShortElsewhereError
        with _together():
            distributed.all_reduce(table)
        totals = iter(torch.split(table[piece.row], [values.numel() for values in sums]))

        def total(values: Tensor) -> Tensor:
            whole: Tensor = next(totals).view(values.shape) + (values - values.detach())
            return whole

        return total

    def packed(self, loss: Tensor, network: nn.Module) -> Tensor:
        """Loss, gradients and running statistics as one vector."""
        return flat(loss, network)

    def add_up(self, packed: Tensor, network: nn.Module) -> Tensor:
        """Make the gradients the sum over all processes, and running statistics the mean; returns the sum of the losses."""
        with _together():
            distributed.all_reduce(packed)
        return spread(packed, network, self.count)

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        with _together():
            distributed.all_reduce(values, group=self.control)
        return values

    def _text(self, text: str) -> str:
        """What the first process says in words."""
        written = torch.tensor(list(text.encode() if self.is_first else b""), dtype=torch.uint8)
        length = self.first(float(len(written)))
        said = written if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        with _together():
            distributed.broadcast(said, src=0, group=self.control)
        return bytes(said.tolist()).decode()


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at the same time.

    Raises:
        LostError: one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostError(str(error)) from error


def _ended(rank: int, error: BaseException) -> RunError:
    """What the others are told of a process that ends by no error of ours."""
    words = " ".join(str(error).split())[:200]
    got = f"{type(error).__name__}{f' ({words})' if words else ''}"
    do = "see its messages above for why, then continue with --resume"
    return RunError(f"rank {rank}", expected="every process to go on to the end", got=got, do=do, code="R130")
