"""The bundles that tests/test_golden_bundles.py loads: what they hold, and how the newest is written.

Those of earlier forms were written by the programs of their time (tests/data/bundles/README.md) and never change. After a
change of what a bundle holds, while that form is not released yet, or after giving it a name of its own in `NEWEST`:

    python -m tests.golden_bundles
"""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome.bundle import FILE, Bundle, Samples, save_bundle
from microtome.config import NetworkConfig, Plan
from microtome.data.legend import Legend
from microtome.inference.restore import arrays_of
from microtome.models.registry import build

FOLDER = Path(__file__).parent / "data" / "bundles"
# Without the number of axes that each of a pair has.
NEWEST = "schema2-needs"
LEGEND = Legend(names=("nothing", "Zelle é"), values=((0,), (7, 9)), ignored=(255,), background=0, reason="for the test")


def write_newest(folder: Path, dims: int) -> Path:
    """Write a bundle as the program writes it now, with its golden input and output beside it."""
    torch.manual_seed(dims)
    config = NetworkConfig(widths=(4, 8), norm="instance" if dims == 3 else "batch")
    size = (4, 8, 8)[-dims:]
    common: dict[str, Any] = {"dims": dims, "channels": 1, "classes": LEGEND.names, "network": config}
    plan = Plan(**common, patch_vox=size, spacing_mm=(1.0, 0.1, 1 / 3)[-dims:], batch=1, steps=7)
    network = build("modern_unet", dims=dims, in_channels=1, classes=2, config=config)
    with torch.no_grad():
        network(torch.randn(2, 1, *size))
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    rng = np.random.default_rng(dims)
    image_CS = rng.normal(size=(1, *size)).astype(np.float16).astype(np.float32)
    with torch.inference_mode():
        logits_KS = network.eval()(torch.from_numpy(image_CS)[None])[0].numpy()
    samples = Samples(image_CS, logits_KS, tuple(rng.normal(size=(1, *size)).astype(np.float16) for _ in range(2)))
    weights = arrays_of(network.state_dict())
    described: dict[str, Any] = {"sizes": network.sizes, "context_vox": network.context_vox, "temperature": 1.625}
    provenance = {"made_by": "python -m tests.golden_bundles", "step": 12, "score": 0.1 + 0.2}
    save_bundle(folder, Bundle(plan=plan, legend=LEGEND, weights=weights, samples=samples, provenance=provenance, **described))
    np.savez(folder / "golden.npz", allow_pickle=False, image=image_CS, logits=logits_KS)
    return folder


def header_of(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, read by hand."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def form_of(folder: Path) -> list[str]:
    """What a bundle is made of, without its values: each name in its description with the kind of its value, tensors, files."""
    header = header_of(folder / FILE)
    document = json.loads(header.pop("__metadata__")["microtome"])
    # Free words for people.
    del document["provenance"]
    tensors = [f"tensor {name}: {each['dtype']} {each['shape']}" for name, each in header.items()]
    return sorted([*_names("", document), *tensors, *(f"file {path.name}" for path in folder.iterdir() if path.name != "golden.npz")])


def _names(place: str, value: object) -> list[str]:
    if isinstance(value, dict) and place != ".plan.reasons":
        return [line for name, inner in value.items() for line in _names(f"{place}.{name}", inner)]
    return [f"{place}: {type(value).__name__}"]


if __name__ == "__main__":
    for number in (2, 3):
        torch.set_num_threads(1)
        sys.stdout.write(f"{write_newest(FOLDER / f'{NEWEST}-{number}d', number)}\n")
