"""All that must survive a crash, in one object and in one file that is replaced in one rename."""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.config import OptimiserConfig, Plan
from microtome.errors import DataError
from microtome.files import atomic_path
from microtome.models.network import Network


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
    """Write the whole state as one safetensors file, in one step.

    Raises:
        RunError: the disk is full; the file that was there is still whole.
    """
    tensors = {f"network/{name}": t for name, t in state.network.state_dict().items()}
    tensors |= {f"average/{name}": t for name, t in state.average.state_dict().items()}
    document = {"progress": asdict(state.progress), "optimiser": type(state.optimiser).__name__}
    for number, values in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{name}": t for name, t in values.items() if isinstance(t, Tensor)}
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomic_path(path) as part:
        try:
            save_file(flat, part, metadata={"microtome": json.dumps(document)})
        except SafetensorError as error:
            # The library wraps the system's error; `atomic_path` knows what to say of it.
            raise OSError(str(error)) from None


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Bring `state`, made by `new_state` with the same plan, to where the file was written.

    Raises:
        DataError: the file cannot be read or belongs to another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("microtome", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(path, expected="a checkpoint", got=str(error), do="start again without --resume") from None
    try:
        state.network.load_state_dict(_part(tensors, "network/"))
        state.average.load_state_dict(_part(tensors, "average/"))
        state.progress = Progress(**document["progress"])
        if document["optimiser"] != type(state.optimiser).__name__:
            # Its moments mean something else to another optimiser, which would start without any in silence.
            raise KeyError(document["optimiser"])
    except (RuntimeError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise DataError(path, expected="a checkpoint of this plan", got=line, do="use the plan.yaml of the run") from None
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
