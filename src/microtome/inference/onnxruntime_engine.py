"""A network's ONNX graph run by ONNX Runtime: the smallest of the libraries, and the soonest ready. No torch."""

from importlib import import_module
from pathlib import Path

import numpy as np

from microtome.geometry import Spacing
from microtome.inference.mirroring import TTA, Engine, Mirrored
from microtome.inference.openvino_engine import missing, unusable
from microtome.inference.processor import threads
from microtome.inference.telemetry import import_quietly

_ERRORS_ONLY = 3  # ONNX Runtime's level of logging


class OnnxRuntimeEngine:
    """One ONNX graph on the CPU, in float32.

    Args:
        path: the graph, of dynamic sizes.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        RunError: it cannot read the graph.
    """

    name = "onnxruntime"

    def __init__(self, path: Path) -> None:
        try:
            onnxruntime, state = import_quietly("onnxruntime"), import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        except ImportError:
            raise missing(self.name, "onnxruntime") from None
        self.path = path
        # Each a direct child of Exception. `RuntimeException` is what a kernel raises, for want of memory too.
        words = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "RuntimeException")
        self._errors = (RuntimeError, *(getattr(state, word) for word in words))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads(), _ERRORS_ONLY
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise unusable(path, self.name, error) from None
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S') float32 of one tile (C, *S).

        Raises:
            MemoryError: too little for a tile of this shape.
            RunError: the graph does not take this shape.
        """
        try:
            found = self._session.run([self._output], {self._input: image_CS[None]})
        except self._errors as error:
            raise unusable(self.path, self.name, error) from None
        logits_KS: np.ndarray = found[0][0]
        return logits_KS

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> Engine:
        """The mean over mirrored versions; nothing else is there for a graph."""
        return Mirrored(self, mirror_axes) if tta == "mirror" else self
