"""The int8 graph: made from the bundle's own samples, near the float network, and nobody hears of it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.bundle import Bundle, save_bundle
from microtome.errors import ConfigError, DataError
from microtome.inference import quantise as module
from microtome.inference.agreement import Bound
from microtome.inference.graphs import find_graph
from microtome.inference.openvino_engine import openvino_core
from microtome.inference.quantise import write_int8
from microtome.inference.restore import restore
from microtome.training.golden import answer
from tests.test_graphs import bundle_of, cache

__all__ = ["cache"]

# Run beside the test runner: where that is loaded, nncf leaves its telemetry out by itself.
SCRIPT = """
import socket, sys
def tried(*_, **__):
    print("tried")
    raise OSError
socket.socket.connect = socket.getaddrinfo = tried
from microtome.bundle import load_bundle
from microtome.inference import quantise
from microtome.inference.agreement import Bound
# The classes of fresh weights are nearly alike everywhere.
quantise.BOUNDS = {"int8": Bound(0.9, 1.0)}
quantise.write_int8(load_bundle(sys.argv[1]))
assert "openvino_telemetry" not in sys.modules
"""


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path, "subprocess.CompletedProcess[str]"]:
    """A bundle with its int8 graph, an empty home, and what the process that made it said."""
    root = tmp_path_factory.mktemp("quantised")
    bundle = save_bundle(root / "model", bundle_of())
    home = root / "home"
    home.mkdir()
    hidden = {"CI", "NNCF_CI", "NNCF_DEV", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(home)}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(root / "model")]
    return bundle, home, subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_it_is_made_in_silence_without_telling_anybody(quantised: tuple[Bundle, Path, "subprocess.CompletedProcess[str]"]) -> None:
    bundle, home, done = quantised
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []
    assert bundle.folder is not None
    names = ["graph-int8.bin", "graph-int8.json", "graph-int8.xml", "graph.json", "graph.onnx"]
    assert sorted(path.name for path in (bundle.folder / "engines").iterdir()) == names


def test_it_is_found_and_computes_in_8_bits_near_the_network(quantised: tuple[Bundle, Path, "subprocess.CompletedProcess[str]"]) -> None:
    bundle = quantised[0]
    path = find_graph(bundle, "int8")
    assert path is not None
    core = openvino_core()
    model = core.read_model(path)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert (kinds.count("Convolution"), kinds.count("ConvolutionBackpropData")) == (7, 1)
    assert 1 <= layers_of_8_bits(model) <= 6
    image = np.random.default_rng(3).normal(size=(1, 20, 12)).astype(np.float32)
    expected = answer(restore(bundle), image)
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image[None])[0][0]
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    # Exactly equal would not be int8.
    assert 1e-6 < difference < 0.2


def layers_of_8_bits(model: Any) -> int:
    types = [str(node.output(0).get_element_type()) for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    return sum("int8" in kind for kind in types)


def test_the_first_and_the_last_convolutions_are_spared_as_many_as_asked(quantised: tuple[Bundle, Path, Any]) -> None:
    bundle = quantised[0]
    source, core = find_graph(bundle, "onnx"), openvino_core()
    assert bundle.samples is not None
    counts = []
    for spared in ((1, 1), (2, 3)):
        with module._quietly():
            counts.append(layers_of_8_bits(module.quantise(core.read_model(source), bundle.samples.calibration, spared)))
    # Seven convolutions and one that enlarges, which is never spared.
    assert counts == [6, 3]


def test_more_are_spared_until_the_golden_labels_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[tuple[int, int]] = []
    bundle = save_bundle(tmp_path / "model", bundle_of())
    quantise = module.quantise

    def noted(model: Any, patches: Any, spared: tuple[int, int]) -> Any:
        tried.append(spared)
        return quantise(model, patches, spared)

    # The labels that are wanted come from another engine than those that are found: these are turned round until the second try.
    monkeypatch.setattr(module, "quantise", noted)
    monkeypatch.setattr(module, "best_class", lambda logits: (logits if len(tried) in (0, 2) else -logits).argmax(0))
    monkeypatch.setitem(vars(module), "BOUNDS", {"int8": Bound(0.6, 1.0)})
    write_int8(bundle)
    assert tried == list(module.SPARED[:2])


def test_a_network_that_8_bits_change_is_refused_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "model", bundle_of())
    monkeypatch.setitem(vars(module), "BOUNDS", {"int8": Bound(1.1, 1.0)})
    monkeypatch.setattr(module, "SPARED", ((1, 1),))
    with pytest.raises(DataError, match=r"openvino-int8: expected 110.0% of the labels .* at most"):
        write_int8(bundle)
    assert find_graph(bundle, "int8") is None
    assert not list(tmp_path.rglob("graph-int8*"))


def test_a_bundle_without_calibration_samples_is_refused(tmp_path: Path) -> None:
    plain = bundle_of()
    assert plain.samples is not None
    for samples in (None, plain.samples._replace(calibration=())):
        bundle = save_bundle(tmp_path / "model", replace(plain, samples=samples))
        with pytest.raises(DataError, match="expected calibration samples in the bundle, got none"):
            write_int8(bundle)
        assert not (tmp_path / "model" / "engines").exists()


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = save_bundle(tmp_path / "model", bundle_of())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'expected the package nncf, got none installed; run: pip install "microtome\[int8\]"'):
        write_int8(bundle)
