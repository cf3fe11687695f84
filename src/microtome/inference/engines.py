"""What can run a bundle here, and `--engine auto`: torch, OpenVINO or ONNX Runtime, held to the float32 network's answers.

Torch is imported when one of its engines, or the writing of a graph, is what it comes to.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from microtome.bundle import Bundle, check_weights
from microtome.errors import ConfigError, unknown_choice
from microtome.inference.graphs import Kind as GraphKind
from microtome.inference.graphs import cache_folder, damaged_graph, find_graph, graph_mark, version_of
from microtome.inference.measurements import Measurements
from microtome.inference.mirroring import TTA, Engine
from microtome.inference.onnxruntime_engine import OnnxRuntimeEngine
from microtome.inference.openvino_engine import OpenVinoEngine
from microtome.inference.processor import may_have_gpu, processor_name, threads
from microtome.inference.search import Candidate, Choice, Job, Search
from microtome.machine import processor_has_bf16


class Kind(NamedTuple):
    """One engine: the package it needs, its arithmetic, the graph it reads, seconds until it is ready in a fresh process."""

    package: str
    precision: str
    graph: GraphKind | None
    startup_seconds: float


# In the order of preference among those of which nothing is known. Seconds measured on 2 cores.
ENGINES = MappingProxyType(
    {
        "openvino-int8": Kind("openvino", "int8", "int8", 0.6),
        "openvino-bf16": Kind("openvino", "bf16", "onnx", 0.6),
        "openvino": Kind("openvino", "fp32", "onnx", 0.6),
        "onnxruntime": Kind("onnxruntime", "fp32", "onnx", 0.6),
        "torch-bf16": Kind("torch", "bf16", None, 2.0),
        "torch": Kind("torch", "", None, 2.0),
    }
)
NAMES = ("auto", "torch", "torch-bf16", "openvino", "openvino-bf16", "openvino-int8", "onnxruntime")
# A library that is imported already is ready sooner; a graph that is missing is written first.
WARM_SECONDS, WRITE_SECONDS = 0.3, 5.0


class Engines:
    """The engines that can run one bundle under a request.

    Args:
        bundle: as `load_bundle` gives it.
        engine: one of `NAMES`.
        device: "auto", "cpu", "cuda".
        tta: what the output is averaged over.
        head: answer from a shallower nested U-Net.

    Raises:
        ConfigError: no such engine, or one that cannot do what is asked beside it.
    """

    def __init__(self, bundle: Bundle, *, engine: str = "auto", device: str = "auto", tta: TTA = "none", head: int | None = None) -> None:
        if engine not in NAMES:
            raise unknown_choice("--engine", engine, NAMES)
        self.bundle, self.engine, self.tta, self.head = bundle, engine, tta, head
        self.samples = bundle.samples if head is None else None
        self.device = _device(device, engine)
        self._found: dict[GraphKind, Path | None] = {}
        if engine != "auto":
            self._check(engine)
        names = self._usable() if engine == "auto" else (engine,)
        self.candidates = tuple(self._candidate(name) for name in names)

    @property
    def only(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.candidates) == 1

    def named(self) -> Choice:
        """The only engine there is to choose, ready.

        Raises:
            ConfigError: it cannot be used here, or disagrees with the oracle.
            DataError: the bundle's weights were changed since they were written.
            RunError: its library cannot run the graph.
        """
        return self._search().named(f"the only one {self._why_only()}" if self.engine == "auto" else "as asked")

    def best(self, job: Job) -> Choice:
        """The engine that is expected to end a job soonest.

        Raises:
            ConfigError: none can be used.
            DataError: the bundle's weights were changed since they were written.
        """
        choice = self._search().best(job)
        # Looked for only where no graph was found, or all its bytes would be hashed again.
        damaged = damaged_graph(self.bundle, "onnx") if self.device == "cpu" and self._find("onnx") is None else None
        if damaged is None:
            return choice
        return replace(choice, reason=f"{choice.reason}; {damaged} is damaged, or of another model: --engine onnxruntime writes it anew")

    def _why_only(self) -> str:
        """Why there is nothing to choose."""
        if self.head is not None:
            return "that can answer from a part of the network (--head)"
        if self.samples is None:
            return "to use, as the model has no golden input to hold others to"
        if self.tta == "rotations":
            return "that turns tiles (--tta rotations)"
        if not self.bundle.hash:
            return "to use, as the model was never saved, and graphs lie beside saved ones"
        return "on a GPU" if self.device != "cpu" else "that is installed here"

    def _search(self) -> Search:
        """A search among the candidates, with what is remembered of them."""
        if any(map(_is_graph, (candidate.name for candidate in self.candidates))):
            # A graph is a copy of the weights: its engine reads none, and that somebody changed them would go unnoticed.
            check_weights(self.bundle)
        path = cache_folder() / "measured" / f"{self.bundle.hash}.json" if self.bundle.hash and self.samples is not None else None
        return Search(self.candidates, self.samples, Measurements.read(path, self._machine()))

    def _machine(self) -> str:
        """What measurements depend on beside engine and tile."""
        where = f"{processor_name()}, {threads()} threads"
        if self.device == "cpu":
            return where
        from microtome.inference.torch_engine import gpu_name

        return f"{gpu_name(self.device)} beside {where}"

    def _check(self, engine: str) -> None:
        """Refuse a named engine that cannot do what is asked beside it."""
        word, do = f"--engine {engine}", "use --engine torch"
        if _is_graph(engine):
            if self.device != "cpu":
                raise ConfigError(word, expected="--device cpu", got=f"--device {self.device}", do=do, code="C025")
            if self.tta == "rotations":
                raise ConfigError(word, expected="no --tta rotations, which turns tiles with torch", got="both", do=do, code="C025")
            if self.head is not None:
                raise ConfigError(
                    word, expected="no --head, as graphs hold the whole network", got=f"--head {self.head}", do=do, code="C025"
                )
            if self.samples is None:
                expected = "a model with a golden input, to check the engine by"
                do = "bring it up to date with `microtome train --resume` on its run, or use --engine torch"
                raise ConfigError(word, expected=expected, got="a model of an older microtome, or of an unfinished run", do=do, code="C025")
        if ENGINES[engine].precision == "bf16" and not self._has_bf16():
            raise ConfigError(word, expected="a processor that multiplies bfloat16", got=self._machine(), do=do, code="C025")

    def _usable(self) -> Iterable[str]:
        """The names that `auto` may choose from, the preferred first."""
        if self.samples is None:
            # Nothing to hold others to.
            return ("torch",)
        names = [name for name, kind in ENGINES.items() if kind.precision != "bf16" or self._has_bf16()]
        if self.device != "cpu" or self.tta == "rotations":
            names = [name for name in names if not _is_graph(name)]
        return [name for name in names if self._can_open(name)]

    def _has_bf16(self) -> bool:
        """Whether bfloat16 is multiplied in hardware."""
        if self.device == "cpu":
            return processor_has_bf16()
        from microtome.inference.devices import has_bf16, pick_device

        return has_bf16(pick_device(self.device))

    def _can_open(self, name: str) -> bool:
        """Whether an engine's library is here, and its graph or what writes it. An int8 graph is there once somebody asked for it."""
        kind = ENGINES[name]
        if kind.graph is None or util.find_spec(kind.package) is None:
            return util.find_spec(kind.package) is not None
        if not self.bundle.hash:
            return False
        writers = ("onnx", "torch")
        return self._find(kind.graph) is not None or (kind.graph == "onnx" and all(util.find_spec(writer) for writer in writers))

    def _find(self, graph: GraphKind) -> Path | None:
        """A graph that is there, looked for once: all its bytes are hashed."""
        if graph not in self._found:
            self._found[graph] = find_graph(self.bundle, graph)
        return self._found[graph]

    def _candidate(self, name: str) -> Candidate:
        """An engine as a candidate of a search."""
        kind = ENGINES[name]
        missing = kind.graph is not None and self._find(kind.graph) is None
        warm = kind.package in sys.modules
        startup = WARM_SECONDS if warm else kind.startup_seconds
        if missing:
            startup += WRITE_SECONDS + (0 if "torch" in sys.modules else ENGINES["torch"].startup_seconds)
        return Candidate(
            name=name,
            version=version_of(kind.package),
            precision=kind.precision,
            open=partial(self._open, name),
            startup_seconds=startup,
            fresh=not (missing or warm),
            source=partial(self._source, kind.graph),
        )

    def _source(self, graph: GraphKind | None) -> str:
        """What tells one graph, or one version of our own networks, from another."""
        if graph is None:
            return f"microtome {version_of('microtome')}"
        path = self._find(graph)
        return graph_mark(path, graph) if path is not None else ""

    def _open(self, name: str) -> Engine:
        """An engine, ready."""
        kind = ENGINES[name]
        if kind.graph is not None:
            path = self._find(kind.graph) or self._write(kind.graph)
            if kind.package == "onnxruntime":
                return OnnxRuntimeEngine(path)
            hint: Literal["f32", "bf16"] = "f32" if kind.precision == "fp32" or not processor_has_bf16() else "bf16"
            # What an int8 graph keeps in floating point may be rounded as well.
            return OpenVinoEngine(path, name, hint)
        from microtome.inference.devices import pick_device
        from microtome.inference.torch_engine import open_torch

        return open_torch(self.bundle, name, pick_device(self.device), self.head)

    def _write(self, graph: GraphKind) -> Path:
        """A graph that is missing, made for this and all later calls."""
        if graph == "int8":
            from microtome.inference.quantise import write_int8

            self._found[graph] = path = write_int8(self.bundle)
        else:
            from microtome.inference.export import write_graph

            self._found[graph] = path = write_graph(self.bundle)
        return path


def _is_graph(name: str) -> bool:
    """Whether an engine reads a graph, and so needs no torch."""
    return name in ENGINES and ENGINES[name].graph is not None


def _device(word: str, engine: str) -> str:
    """`cpu` or torch's name of a GPU; torch is not asked where there cannot be one, or an engine is named that has no use for it."""
    if word == "cpu" or (word == "auto" and (_is_graph(engine) or not may_have_gpu() or util.find_spec("torch") is None)):
        return "cpu"
    from microtome.inference.devices import pick_device

    device = pick_device(word)
    return "cpu" if device.type == "cpu" else str(device)
