"""A network's graph run by OpenVINO: the fastest on most processors, and ready in half a second. No torch."""

from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microtome.errors import ConfigError, RunError
from microtome.geometry import Shape, Spacing
from microtome.inference.mirroring import TTA, Engine, Mirrored
from microtome.inference.processor import threads
from microtome.inference.telemetry import import_quietly
from microtome.machine import says_short_of_memory

# Tile shapes that stay compiled: images of a folder differ in size; each holds the weights once more.
MOST_SHAPES = 4


@cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process, which is never let go.

    While it is there its CPU plugin has put the stack on which the main thread handles signals into memory of its own. That is freed with
    the last core, by whichever thread comes to it: from then on Ctrl-C would end in a segmentation fault.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    return import_quietly("openvino").Core()


class OpenVinoEngine:
    """One graph on the CPU, compiled for each tile shape when it first comes.

    Args:
        path: an ONNX graph or an OpenVINO one (`.xml`, with its weights beside it), of dynamic sizes.
        name: what `--engine` calls it.
        precision: of the arithmetic; "bf16" is fast only where the processor multiplies it.

    Raises:
        ConfigError: OpenVINO is not installed.
        RunError: it cannot read the graph.
    """

    def __init__(self, path: Path, name: str, precision: Literal["f32", "bf16"] = "f32") -> None:
        try:
            self._core = openvino_core()
        except ImportError:
            raise missing(name, "openvino") from None
        self.path, self.name = path, name
        self._settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads(), "PERFORMANCE_HINT": "LATENCY"}
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise unusable(path, name, error) from None
        self._requests: OrderedDict[Shape, Any] = OrderedDict()

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S') float32 of one tile (C, *S).

        Raises:
            MemoryError: too little for a tile of this shape.
            RunError: the graph does not take this shape.
        """
        try:
            found = self._request(image_CS.shape).infer({0: image_CS[None]}, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise unusable(self.path, self.name, error) from None
        # The first output alone, and a copy: the next tile is written into the same memory.
        logits_KS: np.ndarray = np.array(found[0][0], np.float32)
        return logits_KS

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> Engine:
        """The mean over mirrored versions; nothing else is there for a graph."""
        return Mirrored(self, mirror_axes) if tta == "mirror" else self

    def _request(self, shape: Shape) -> Any:
        """What computes tiles of this shape."""
        if shape not in self._requests:
            self._model.reshape([1, *shape])
            self._requests[shape] = self._core.compile_model(self._model, "CPU", self._settings).create_infer_request()
            if len(self._requests) > MOST_SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(shape)
        return self._requests[shape]


def missing(engine: str, package: str) -> ConfigError:
    """The error for an engine whose library is not installed."""
    return ConfigError(
        f"--engine {engine}",
        expected=f"the package {package}",
        got="none installed",
        do='run: pip install "microtome[fast]", or use --engine torch',
        code="C002",
    )


def unusable(path: Path, engine: str, error: Exception) -> RunError | MemoryError:
    """The error for a graph that a library cannot run, or for which memory was too short."""
    if says_short_of_memory(str(error)):
        return MemoryError(str(error))
    got = " ".join(str(error).split())[-200:]
    return RunError(path, expected=f"a graph that {engine} can run", got=got, do="remove the file, or use --engine torch", code="R011")
