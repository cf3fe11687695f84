"""What prediction adds to its network: a volume streamed through tiles and slabs to labels, beside the bare network on as many tiles."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import SETTINGS, bundle_of, case
from benchmarks.rows import CACHE
from benchmarks.timing import timed
from microtome.bundle import load_bundle
from microtome.inference.predict import in_memory, predict_whole
from microtome.inference.predictor import Predictor


def stream(setting: str, shape_vox: list[int], engine: str, folder: str = str(CACHE), by: str = "openvino-bf16") -> dict[str, Any]:
    """Time a volume in memory of another voxel size than the plan. Engines: default (the network alone, tile after tile), microtome."""
    chosen = SETTINGS[setting]
    predictor = Predictor(load_bundle(bundle_of(chosen, Path(folder))), engine=by)
    image_CS, _ = case(chosen, tuple(shape_vox), seed=3)
    volume = in_memory(np.clip(image_CS * 40 + 100, 0, 255).astype(np.uint8))
    spacing_mm = tuple(0.8 * side for side in predictor.bundle.plan.spacing_mm)
    volume = replace(volume, spacing_mm=spacing_mm)
    layout = predictor.task(volume).layout
    tiles, shapes = layout.tile_count(), layout.shapes
    sides = [side + 2 * context for side, context in zip(shapes.tile_vox, shapes.context_vox, strict=True)]
    tile_CS = np.zeros((shapes.channels, *sides), np.float32)
    run = predictor.engine
    assert run is not None, "it was named"

    def network() -> None:
        for _ in range(tiles):
            run(tile_CS)

    call = network if engine == "default" else lambda: predict_whole(predictor.task(volume))
    answer: dict[str, Any] = timed(call)
    return answer | {"note": f"{tiles} tiles of {'x'.join(map(str, sides))}, {by}"}
