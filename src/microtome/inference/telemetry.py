"""OpenVINO, nncf and ONNX Runtime without their telemetry: this program tells nobody that it runs.

At each `import openvino` it sends an event to Google Analytics and writes a client's number into the user's home, and nncf does so
when it quantises, unless the user has opted out. Both do without where their package `openvino_telemetry` is not installed.
ONNX Runtime (1.31, on Linux too) writes a device's number into the home when it is imported and collects events for Microsoft,
unless a variable of the environment says no by then.
"""

import os
import sys
from importlib import import_module
from typing import Any

PACKAGE = "openvino_telemetry"
VARIABLE = "ORT_DISABLE_TELEMETRY"


def import_quietly(name: str) -> Any:
    """The module of that name, `openvino`, `nncf` or `onnxruntime`; imported for the first time, it finds the telemetry package missing.

    Raises:
        ImportError: it is not installed.
    """
    # Stays set: processes that this one starts are as silent.
    os.environ[VARIABLE] = "1"
    known = PACKAGE in sys.modules
    before = sys.modules.get(PACKAGE)
    # None is Python's own mark for a module that cannot be imported.
    sys.modules[PACKAGE] = None  # type: ignore[assignment]
    try:
        return import_module(name)
    finally:
        if known and before is not None:
            sys.modules[PACKAGE] = before
        else:
            del sys.modules[PACKAGE]
