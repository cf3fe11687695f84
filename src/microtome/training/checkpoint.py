"""All that must survive a crash, in one object and in one file that is replaced in one rename.

The file is in the safetensors format, written here: the library's own `save_file` puts a temporary file of its own beside it, which
a kill would leave, and its `save` needs the memory twice. Its description carries a hash of all that the file says.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microtome.config import OptimiserConfig, Plan
from microtome.errors import DataError, RunError
from microtome.files import atomic_path
from microtome.models.network import Network

# What safetensors calls the types that a state may hold, in the order in which the library puts them into a file.
_TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.int64: "I64",
        torch.float64: "F64",
        torch.float32: "F32",
        torch.int32: "I32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimiser steps done.
        steps: steps in all; fitted anew to the time left when a run is limited by minutes.
        best: best validation score so far and `best_step`, the step at which it was reached.
        validations: how many were made; `next_validation`, the step of the next.
        seconds: wall time of the run so far.
        validated: how many cases each validation looks at; 0 before the first, which finds out how many fit into its time.
        case_seconds: what the last prediction takes for a case, with its scores and its file; None before a validation.
    """

    step: int = 0
    steps: int = 0
    best: float | None = None
    best_step: int = 0
    validations: int = 0
    next_validation: int = 0
    seconds: float = 0.0
    validated: int = 0
    case_seconds: float | None = None


@dataclass
class TrainState:
    """Weights, their running average, optimiser and progress."""

    network: Network
    average: Network
    optimiser: torch.optim.Optimizer
    progress: Progress


def new_state(network: Network, plan: Plan) -> TrainState:
    """The state before the first step of a plan."""
    config = plan.optimiser
    decay = [p for p in network.parameters() if p.dim() > 1]
    # Weight decay pulls scales and biases of a normalisation towards a network that computes nothing.
    rest = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    average = copy.deepcopy(network).requires_grad_(False).eval()
    first_validation = -(-plan.steps // plan.validations)
    return TrainState(network, average, _optimiser(groups, config), Progress(steps=plan.steps, next_validation=first_validation))


def _optimiser(groups: list[dict[str, Any]], config: OptimiserConfig) -> torch.optim.Optimizer:
    """The optimiser of a config; eps and the betas that it does not name are torch's, but RMSprop's eps, which is Keras'."""
    rate, momentum = config.learning_rate, config.momentum
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=config.nesterov and momentum > 0)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate, alpha=momentum, eps=1e-7)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, betas=(momentum, 0.999))


def save_checkpoint(path: Path, state: TrainState) -> None:
    """Write the whole state as one safetensors file, in one step; the one before it stays beside it as `previous_checkpoint`.

    Raises:
        RunError: the disk is full; the file that was there is still whole.
    """
    tensors, document = _contents(state)
    document |= {"hash": _hash(tensors, document)}
    size = len(_header(tensors, document)) + sum(tensor.nbytes for tensor in tensors.values())
    _keep_previous(path)
    with atomic_path(path, size) as part, part.open("wb") as file:
        for chunk in _serialised(tensors, document):
            file.write(chunk)


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the last one lies, if there is one: a disk that damages a file rarely damages two."""
    return path.with_name("previous" + path.suffix)


def has_checkpoint(path: Path) -> bool:
    """Whether there is one of that name, or one before it."""
    return path.exists() or previous_checkpoint(path).exists()


def _keep_previous(path: Path) -> None:
    """Give the last checkpoint a second name, by which it stays when it is replaced; costs no time, and its size on the disk.

    It is a second road, which some file systems have not: where it cannot be made the first is as safe as without.
    """
    second = previous_checkpoint(path)
    if not path.exists():
        return
    with suppress(RunError), atomic_path(second) as part:
        part.unlink()
        part.hardlink_to(path)


def _contents(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state by name, in the memory of the processor, and what describes the rest."""
    tensors = {f"network/{name}": t for name, t in state.network.state_dict().items()}
    tensors |= {f"average/{name}": t for name, t in state.average.state_dict().items()}
    document = {"progress": asdict(state.progress), "optimiser": type(state.optimiser).__name__}
    for number, values in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{name}": t for name, t in values.items() if isinstance(t, Tensor)}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, document


def _serialised(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor: none is copied.

    References:
        https://github.com/huggingface/safetensors: 8 bytes with the length of the header, the header in JSON, the tensors.
    """
    yield _header(tensors, document)
    for name in _order(tensors):
        yield _bytes(tensors[name])


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names by type, the largest first, and by name: so each tensor lies at a multiple of its size."""
    kinds = list(_TYPES)
    return sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))


def _header(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> bytes:
    """What stands before the tensors: the length of the rest, and where each of them lies."""
    header: dict[str, Any] = {"__metadata__": {"microtome": json.dumps(document)}}
    end = 0
    for name in _order(tensors):
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": _TYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which are not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def digest(state: TrainState) -> str:
    """What tells one state from another, without its progress."""
    tensors, document = _contents(state)
    return _hash(tensors, {"optimiser": document["optimiser"]})


def _hash(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """A hash of a description and of names, types, shapes and bytes of tensors."""
    digest = hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)};".encode())
        digest.update(_bytes(tensors[name].contiguous()))
    return digest.hexdigest()


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Bring `state`, made by `new_state` with the same plan, to where the file was written.

    Raises:
        DataError: the file cannot be read, was changed since it was written, or belongs to another network.
    """
    _take(path, state, *_read(path))


def load_latest(path: Path, state: TrainState) -> str | None:
    """`load_checkpoint` of the last one or, where that is damaged, of the one before it.

    Returns:
        what was wrong with the last one, in a line for people; None if nothing.

    Raises:
        DataError: both are damaged, or they belong to another network.
    """
    try:
        found = _read(path)
    except DataError as error:
        previous = previous_checkpoint(path)
        if not previous.exists():
            raise
        _take(previous, state, *_read(previous))
        return f"{error.where}: {error.got}; the run goes on from the checkpoint before it, of step {state.progress.step}"
    _take(path, state, *found)
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a checkpoint and what describes the rest, as they were written.

    Raises:
        DataError: the file cannot be read, or was changed since.
    """
    do = "copy it again if it was copied, else start again without --resume; model/ is as it was"
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("microtome", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        recorded = document.pop("hash", None)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # The last three: damage made another JSON of the description, or a type of numbers of a tensor that torch has not.
        line = " ".join(str(error).split())[:200]
        raise DataError(path, expected="a checkpoint", got=f"a damaged file ({line})", do=do, code="D060") from None
    # Those of version 0.1.0 have none.
    if recorded is not None and recorded != _hash(tensors, document):
        raise DataError(path, expected=f"content with hash {str(recorded)[:64]}", got="a damaged file", do=do, code="D060")
    return tensors, document


def _take(path: Path, state: TrainState, tensors: dict[str, Tensor], document: Mapping[str, Any]) -> None:
    """Bring `state` to what was read from a file.

    Raises:
        DataError: the file belongs to another network.
    """
    try:
        if unknown := sorted(document.keys() - {"progress", "optimiser"}):
            raise KeyError(unknown[0])
        state.network.load_state_dict(_part(tensors, "network/"))
        state.average.load_state_dict(_part(tensors, "average/"))
        state.progress = Progress(**document["progress"])
        if document["optimiser"] != type(state.optimiser).__name__:
            # Its moments mean something else to another optimiser, which would start without any in silence.
            raise KeyError(document["optimiser"])
    except (RuntimeError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise DataError(path, expected="a checkpoint of this plan", got=line, do="use the plan.yaml of the run", code="D061") from None
    _load_optimiser(state.optimiser, _part(tensors, "optimiser/"))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put moments and step counts back; learning rates are set anew at each step."""
    values: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        number, name = key.split("/")
        values.setdefault(int(number), {})[name] = tensor
    document = optimiser.state_dict()
    optimiser.load_state_dict({"state": values, "param_groups": document["param_groups"]})
