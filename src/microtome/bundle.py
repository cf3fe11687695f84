"""A trained model on disk: `model.safetensors` (weights and all that describes them) and `model.json` (the same for people).

No pickle anywhere. The safetensors file alone is complete, so that it can be replaced in one rename; `model.json` is a
readable copy of its header. A hash of all of it is checked when it is loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microtome.config import Plan, parse_config
from microtome.data.legend import Legend
from microtome.errors import DataError
from microtome.files import atomic_path, write_json
from microtome.models.network import Network
from microtome.models.registry import build

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A trained model as read from disk.

    Attributes:
        plan: the plan that it was trained with.
        legend: what the classes are called and how they stand in files.
        weights: name -> tensor.
        provenance: where it comes from (versions, data, score), for people.
    """

    plan: Plan
    legend: Legend
    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def network(self) -> Network:
        """The network with its weights, in evaluation mode."""
        network = build(
            self.plan.network.name,
            dims=self.plan.dims,
            in_channels=self.plan.channels,
            classes=len(self.plan.classes),
            config=self.plan.network,
        )
        try:
            network.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            got = " ".join(str(error).split())[:200]
            raise DataError(
                self.plan.network.name, expected="weights of this network", got=got, do="use the microtome that trained it"
            ) from None
        return network.eval()


def save_bundle(folder: Path, bundle: Bundle) -> None:
    """Write a bundle into `folder`, replacing the one that is there in one step."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.weights.items()}
    document = {
        "schema": SCHEMA,
        "plan": bundle.plan.model_dump(mode="json"),
        "legend": bundle.legend.to_json(),
        "provenance": dict(bundle.provenance),
    }
    document["hash"] = _hash(document, weights)
    with atomic_path(folder / "model.safetensors") as part:
        # Not `save_file`: it renames a private file of its own over `part`, and hides a full disk from `atomic_path`.
        part.write_bytes(save(weights, metadata={"microtome": json.dumps(document)}))
    write_json(folder / "model.json", document)


def load_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`: a run folder, its `model/`, or the .safetensors file itself.

    Raises:
        DataError: no bundle there, not readable, changed since it was written, or written by a newer version.
    """
    path = _find(Path(folder))
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("microtome")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(path, expected="a model bundle", got=f"an unreadable file ({error})", do="train again or copy it again") from None
    if header is None:
        raise DataError(
            path, expected="a bundle written by microtome", got="weights without a description", do="use a run folder of `microtome train`"
        )
    document = _document(path, header)
    recorded, found = document.pop("hash", ""), _hash(document, weights)
    if found != recorded:
        raise DataError(path, expected=f"content with hash {recorded}", got=found, do="the file was damaged: copy it again")
    return Bundle(
        plan=parse_config(Plan, document["plan"], path),
        legend=Legend.from_json(document["legend"]),
        weights=weights,
        provenance=document["provenance"],
    )


def _document(path: Path, header: str) -> dict[str, Any]:
    """The description of the weights, of a schema that this version knows."""
    try:
        document = json.loads(header)
        schema = int(document["schema"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"[:200]
        raise DataError(path, expected="a description in JSON with its schema", got=got, do="the file was damaged: copy it again") from None
    if schema > SCHEMA:
        raise DataError(path, expected=f"bundle schema {SCHEMA} or older", got=str(schema), do="update microtome")
    return dict(document)


def _find(folder: Path) -> Path:
    """The weights file that a path means."""
    candidates = [folder, folder / "model.safetensors", folder / "model" / "model.safetensors"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    what = "an interrupted run without a model yet" if (folder / "plan.yaml").exists() else "no model"
    raise DataError(folder, expected="a run folder with model/model.safetensors", got=what, do="give the --out folder of `microtome train`")


def _hash(document: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """A hash of the description, and of names, types, shapes and bytes of all tensors."""
    digest = hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=16)
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
