"""Weights that a training begins with instead of drawn ones: which of them fit, and a copy that a resumed run begins with."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microtome.errors import DataError, in_one_line
from microtome.files import atomic_path
from microtome.geometry import format_shape
from microtome.inference.restore import arrays_of
from microtome.models.network import Network

FILE = "initial.safetensors"
# Of batch norm: a number that no network here computes with, and that older checkpoints lack.
COUNTER = "num_batches_tracked"
# Named in a line for people.
MOST_NAMED = 3

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Named arrays from somewhere.

    Attributes:
        arrays: name -> array, in the order in which the file has them.
        source: the file, for people.
        hash: of the file's bytes; of a bundle its own.
        place: the entry of the file that held them: `network_weights`; empty where they are all of it.
        left_out: names of what else the file holds.
        shared: how many further names there were for the same tensors.
        record: what was said of them when a training began with them; empty before.
    """

    arrays: Arrays = field(repr=False)
    source: str
    hash: str
    place: str = ""
    left_out: tuple[str, ...] = ()
    shared: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """How a training starts, beside what its plan says.

    Attributes:
        clock: `time.perf_counter()` from which its minutes count; None: now.
        weights: that it begins with, where they fit its network; None: drawn ones.
        deterministic: the same bits each time on a GPU too, or an error (`deterministic.same_bits`).
    """

    clock: float | None = None
    weights: Weights | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class Fit:
    """Which arrays become which parameters.

    Attributes:
        taken: our name -> theirs.
        left: our name -> why it stays as initialised.
        unused: their names that nothing takes.
        by_order: names said nothing, and all shapes are the same one after the other.
    """

    taken: Mapping[str, str]
    left: Mapping[str, str]
    unused: tuple[str, ...]
    by_order: bool = False


@dataclass(frozen=True)
class Initial:
    """What a network began with: our names of it, and what stands in its provenance."""

    names: tuple[str, ...]
    record: Mapping[str, Any]


def fit(wanted: Arrays, given: Arrays) -> Fit:
    """Which of the given arrays a network takes, from its own as they are initialised.

    By name, where the shape is the same too. Where no name is: by order, if the shapes of all are the same in the same order.
    """
    ours = {name: array for name, array in wanted.items() if not name.endswith(COUNTER)}
    theirs = {name: array for name, array in given.items() if not name.endswith(COUNTER)}
    taken = {name: name for name, array in ours.items() if name in theirs and theirs[name].shape == array.shape}
    by_order = not taken and [array.shape for array in ours.values()] == [array.shape for array in theirs.values()]
    if by_order:
        taken = dict(zip(ours, theirs, strict=True))
    left = {name: _difference(array, theirs.get(name)) for name, array in ours.items() if name not in taken}
    return Fit(taken, left, tuple(name for name in theirs if name not in taken.values()), by_order)


def begin_with(network: Network, weights: Weights | None) -> Initial | None:
    """Give a network the weights that fit it; the others stay as they were initialised. None: nothing is given.

    Raises:
        DataError: none of them fits, or one is not finite.
    """
    if weights is None:
        return None
    state = network.state_dict()
    found = fit(arrays_of(state), weights.arrays)
    if not found.taken:
        got = f"{len(weights.arrays)} of other names and shapes: {_named(_shown(weights.arrays))}"
        expected = f"weights of {network.spec.name}: {_named(_shown(arrays_of(state)))}"
        do = "give --network and a plan with the same widths, or leave out --weights"
        raise DataError(weights.source, expected=expected, got=got, do=do, code="D230")
    for theirs in found.taken.values():
        if not np.isfinite(weights.arrays[theirs]).all():
            do = "take weights from before it diverged"
            raise DataError(weights.source, expected="finite weights", got=f"NaN or infinity in `{theirs}`", do=do, code="D231")
    tensors = {ours: torch.from_numpy(np.array(weights.arrays[theirs])) for ours, theirs in found.taken.items()}
    # Into the tensors that there are, whose types they take.
    network.load_state_dict(tensors, strict=False)
    return Initial(tuple(found.taken), weights.record or _record(weights, found))


def keep_initial(path: Path, network: Network, initial: Initial | None) -> None:
    """Write what a network begins with, for a run that is killed before its first checkpoint; without any, remove what another left.

    Raises:
        RunError: the disk is full.
    """
    if initial is None:
        with suppress(FileNotFoundError):
            path.unlink()
        return
    state = network.state_dict()
    arrays = arrays_of({name: state[name] for name in initial.names})
    with atomic_path(path) as part:
        part.write_bytes(save(arrays, metadata={"initial": json.dumps(initial.record)}))


def kept_initial(path: Path) -> Weights | None:
    """What `keep_initial` wrote; None where a run began with drawn weights.

    Raises:
        DataError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            record = dict(json.loads((file.metadata() or {})["initial"]))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        line = " ".join(str(error).split())[:200]
        do = "copy the run folder again, or start a new run"
        raise DataError(path, expected="the weights that this run began with", got=line, do=do, code="D060") from None
    return Weights(arrays=arrays, source=str(path), hash=str(record.get("hash", "")), record=record)


def _record(weights: Weights, found: Fit) -> dict[str, Any]:
    """What a model's provenance says of the weights that it began with."""
    total = len(found.taken) + len(found.left)
    file = in_one_line(weights.source)
    words = f"{len(found.taken)} of {total} tensors from {file}, by {'order' if found.by_order else 'name'}"
    if found.left:
        words += f"; {len(found.left)} stay as initialised ({_named([f'{name}: {why}' for name, why in found.left.items()])})"
    if found.unused:
        words += f"; {len(found.unused)} of the file fit nowhere"
    return {
        "file": file,
        "hash": weights.hash,
        "by": "order" if found.by_order else "name",
        "taken": len(found.taken),
        "as_initialised": sorted(found.left),
        "unused": len(found.unused),
        "words": words,
    }


def _difference(ours: np.ndarray, theirs: np.ndarray | None) -> str:
    """Why an array is not taken."""
    return "not in the file" if theirs is None else f"{_shape(theirs)} there, {_shape(ours)} here"


def _shown(arrays: Arrays) -> list[str]:
    """Names and shapes, for people."""
    return [f"{name} {_shape(array)}" for name, array in arrays.items()]


def _shape(array: np.ndarray) -> str:
    return format_shape(array.shape) or "a number"


def _named(words: list[str]) -> str:
    """The first of them, and how many more there are."""
    rest = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
    return (", ".join(words[:MOST_NAMED]) + rest)[:400]
