"""Small models on disk, with what other engines are checked by."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome.bundle import Bundle, Samples, save_bundle
from microtome.config import NetworkConfig, Plan
from microtome.data.legend import Legend
from microtome.inference.restore import arrays_of
from microtome.models.registry import build

LEGEND = Legend(names=("nothing", "cell"), values=((0,), (7,)), background=0)


def saved_model(folder: Path, *, dims: int = 2, samples: bool = True, **changes: Any) -> Bundle:
    """A network of two levels that was trained for no step, saved with its answer to noise; `changes` are of the plan."""
    torch.manual_seed(5)
    values: dict[str, Any] = {"network": NetworkConfig(widths=(4, 8)), "patch_vox": (16,) * dims, "spacing_mm": (1.0,) * dims}
    plan = Plan(dims=dims, channels=1, classes=LEGEND.names, batch=1, steps=1, overlap=0.25, **values | changes)
    network = build(plan.network.name, dims=dims, in_channels=1, classes=len(LEGEND.names), config=plan.network).eval()
    golden_CS = np.random.default_rng(0).normal(size=(1, *plan.patch_vox)).astype(np.float16).astype(np.float32)
    with torch.inference_mode():
        logits_KS = network(torch.from_numpy(golden_CS)[None])[0].numpy()
    bundle = Bundle(
        plan=plan,
        legend=LEGEND,
        weights=arrays_of(network.state_dict()),
        samples=Samples(golden_CS, logits_KS) if samples else None,
        sizes=network.sizes if samples else None,
        context_vox=network.context_vox if samples else None,
    )
    return save_bundle(folder / "model", bundle)
