"""A forward pass by each engine, and the bundle that the product's engines read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import SETTINGS, Setting, as_shipped, bundle_of, case, operations, trained
from benchmarks.rows import CACHE
from benchmarks.timing import timed
from microtome.bundle import load_bundle
from microtome.errors import MicrotomeError
from microtome.inference.predictor import Predictor
from microtome.machine import recycle_memory

# One for each graph that a bundle has.
GRAPHS = ("openvino", "openvino-int8")

Call = Callable[[np.ndarray], np.ndarray]


def prepare(setting: str, folder: str = str(CACHE)) -> dict[str, Any]:
    """Weights, image and bundle (with its graphs) of a setting, so that no timed process makes them."""
    place = bundle_of(SETTINGS[setting], Path(folder))
    return {"seconds": 0.0, "note": write_graphs(place)}


def write_graphs(bundle: Path) -> str:
    """Write the graphs that are missing; says which cannot be written, and why: their engines' rows will say it too."""
    failed = []
    for engine in GRAPHS:
        try:
            Predictor(load_bundle(bundle), engine=engine)
        except MicrotomeError as error:
            failed.append(f"{engine}: {error}"[:200])
    return "; ".join(failed) or "ready"


def forward(setting: str, engine: str, folder: str = str(CACHE)) -> dict[str, Any]:
    """Time one tile, array in and logits out; writes the labels of the answer for the comparison with the default's."""
    chosen, place = SETTINGS[setting], Path(folder)
    image_CS, _ = case(chosen)
    call = plain(chosen, place) if engine in ("default", "recycled memory") else product(chosen, engine, place)
    logits_KS = image_CS

    def tile() -> None:
        nonlocal logits_KS
        logits_KS = call(image_CS)

    answer: dict[str, Any] = timed(tile)
    labels = place / "labels" / f"{setting.replace(' ', '-')}-{engine.replace(' ', '-')}.npy"
    labels.parent.mkdir(parents=True, exist_ok=True)
    np.save(labels, logits_KS.argmax(0).astype(np.uint8))
    return answer | {"labels": str(labels), "operations": operations(chosen), "precision": precision_of(engine)}


def plain(setting: Setting, folder: Path) -> Call:
    """PyTorch as people write it: eager, float32, contiguous; `run_child` leaves its allocator alone unless memory is to be recycled."""
    recycle_memory()
    network = as_shipped(trained(setting, folder)).eval()

    def call(image_CS: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits_BKS = network(torch.from_numpy(image_CS)[None])
        answer: np.ndarray = logits_BKS[0].numpy()
        return answer

    return call


def product(setting: Setting, engine: str, folder: Path) -> Call:
    """An engine of `microtome predict --engine`, as the product opens it."""
    engine_CS = Predictor(load_bundle(bundle_of(setting, folder)), engine=engine, device="cpu").engine
    assert engine_CS is not None, f"{engine} is a name, not auto"
    return engine_CS


def precision_of(engine: str) -> str:
    """What an engine multiplies, by its name."""
    return next((name for name in ("bf16", "int8") if name in engine), "fp32")
