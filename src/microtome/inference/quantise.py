"""A bundle -> its graph in 8-bit integers, with scales chosen by nncf on inputs that the bundle carries.

Products of 8-bit integers are twice as fast as of bfloat16 on processors that have them, and a quarter of the bytes. They are
less exact: whether a model may be used so is for its labels to say, not for this file.
"""

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

import numpy as np

from microtome.bundle import Bundle, Samples
from microtome.errors import ConfigError, DataError
from microtome.files import atomic_path
from microtome.inference.agreement import BOUNDS
from microtome.inference.export import write_graph
from microtome.inference.graphs import FILES, file_hash, find_graph, graph_folder, record_graph
from microtome.inference.openvino_engine import OpenVinoEngine, openvino_core
from microtome.inference.predict import best_class
from microtome.inference.telemetry import import_quietly
from microtome.machine import processor_has_bf16

# Convolutions at the beginning and at the end that stay in floating point: tried in this order, until the labels are right.
SPARED = ((1, 1), (2, 3), (4, 5), (8, 10))


def write_int8(bundle: Bundle) -> Path:
    """Write the int8 graph of a saved bundle for OpenVINO (and, if there is none, its ONNX graph); returns the .xml file.

    Raises:
        ConfigError: nncf or openvino is not installed, or the bundle was never saved.
        DataError: the bundle has no inputs to choose scales by, or too many labels change whatever is left in floating point.
    """
    for package in ("nncf", "openvino"):
        if not find_spec(package):
            raise ConfigError(
                "int8 graph", expected=f"the package {package}", got="none installed", do='run: pip install "microtome[int8]"', code="C002"
            )
    if bundle.samples is None or not bundle.samples.calibration:
        where = bundle.folder or "bundle"
        raise DataError(
            where, expected="calibration samples in the bundle", got="none", do="train it with this version of microtome", code="D056"
        )
    folder = graph_folder(bundle)
    source = find_graph(bundle, "onnx") or write_graph(bundle)
    with tempfile.TemporaryDirectory() as scratch, _quietly():
        drafts = [Path(scratch) / name for name in FILES["int8"]]
        _write_first_that_agrees(source, bundle.samples, drafts[0])
        hashes = [file_hash(draft) for draft in drafts]
        for draft in drafts:
            with atomic_path(folder / draft.name) as part:
                copyfile(draft, part)
    return record_graph(folder, bundle, "int8", hashes, ("openvino", "nncf"))


def _write_first_that_agrees(source: Path, samples: Samples, path: Path) -> None:
    """Write the graph that spares the fewest convolutions of those that label as the float graph does, patch by patch.

    On all samples together, as one patch can be easy: a model of photographs kept every label of its golden input and 98 % of the others.

    Raises:
        DataError: none does; nothing is written.
    """
    openvino = import_quietly("openvino")
    hint: Literal["f32", "bf16"] = "bf16" if processor_has_bf16() else "f32"
    patches = [samples.golden_CS, *(patch.astype(np.float32) for patch in samples.calibration)]
    plain = OpenVinoEngine(source, "openvino")
    wanted = [best_class(plain(patch)) for patch in patches]
    shares = []
    for spared in SPARED:
        quantised = quantise(openvino_core().read_model(source), samples.calibration, spared)
        openvino.save_model(quantised, path, compress_to_fp16=False)
        engine = OpenVinoEngine(path, "openvino-int8", hint)
        equal = [best_class(engine(patch)) == labels for patch, labels in zip(patches, wanted, strict=True)]
        # It maps the file that the next attempt overwrites, which Windows forbids.
        del engine
        shares.append(sum(part.sum() for part in equal) / sum(part.size for part in equal))
        if shares[-1] >= BOUNDS["int8"].labels:
            return
    expected, got = f"{BOUNDS['int8'].labels:.1%} of the labels of the samples as in floating point", f"{max(shares):.2%} at most"
    raise DataError(
        "--engine openvino-int8", expected=expected, got=got, do="use another engine: this network loses too much in 8 bits", code="D057"
    )


def quantise(model: Any, patches: Sequence[np.ndarray], spared: tuple[int, int] = SPARED[0]) -> Any:
    """An OpenVINO model with its convolutions in 8-bit integers, but for some of the first and of the last.

    The first sees the grey values and the last makes the logits: in float these two cost about 3 to 8 % of the time, and 1.3 to 2.4 times
    fewer labels differ from the float network's. The finest levels, where most of the voxels are, come next (docs/log.md).

    Args:
        model: as `openvino.Core.read_model` gives it.
        patches: network inputs (C, *S), over which the ranges of all activations are taken.
        spared: how many of the first and of the last convolutions stay in floating point.
    """
    nncf = import_quietly("nncf")
    dataset = nncf.Dataset(patches, lambda patch: patch[None].astype(np.float32))
    layers = [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    first, last = spared
    ignored = nncf.IgnoredScope(names=sorted({*layers[:first], *layers[-last:]}))
    # MIXED: scales of activations need not be symmetric, since a leaky ReLU's values are not.
    return nncf.quantize(model, dataset, preset=nncf.QuantizationPreset.MIXED, subset_size=len(patches), ignored_scope=ignored)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without nncf's telemetry, progress bars and advice, and the warnings of what it calls."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import_quietly("nncf").set_log_level(logging.ERROR)
        yield
