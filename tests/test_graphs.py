"""Graphs beside a model: found only if they are whole and made from this model, written only if they say what it says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microtome.bundle import CHANGED, INCOMPLETE, OF_ANOTHER, Bundle, Samples, load_bundle, save_bundle
from microtome.config import NetworkConfig, Plan
from microtome.data.legend import Legend
from microtome.errors import ConfigError, DataError, RunError
from microtome.inference import export, graphs
from microtome.inference.export import run_graph, write_graph
from microtome.inference.graphs import cache_folder, faults_of_graphs, file_hash, find_graph, graph_folder, graph_mark, record_graph
from microtome.inference.restore import arrays_of, restore
from microtome.models.registry import build
from microtome.training.golden import answer
from tests.small import one_thread

__all__ = ["one_thread"]

LEGEND = Legend(names=("background", "cell"), values=((0,), (1,)), ignored=(), background=0, reason="for the test")
SCHEMA_1 = Path(__file__).parent / "data" / "bundles" / "schema1"


def bundle_of(**changes: Any) -> Bundle:
    """A small network with fresh weights and its true samples."""
    config = NetworkConfig(widths=(4, 8))
    torch.manual_seed(0)
    network = build("modern_unet", dims=2, in_channels=1, classes=2, config=config)
    plan = Plan(dims=2, channels=1, network=config, batch=1, steps=1, patch_vox=(8, 8), spacing_mm=(1.0, 1.0), classes=LEGEND.names)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 12, 16)).astype(np.float16).astype(np.float32)
    samples = Samples(image, answer(network, image), tuple(rng.normal(size=(2, 1, 8, 8)).astype(np.float16)))
    values: dict[str, Any] = {"weights": arrays_of(network.state_dict()), "samples": samples, "sizes": network.sizes}
    return Bundle(plan=plan, legend=LEGEND, **values | changes)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own; nothing half-written may be left anywhere."""
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert not list(tmp_path.rglob(".part-*"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return save_bundle(tmp_path / "model", bundle_of())


def test_a_graph_is_written_beside_the_model_and_found(bundle: Bundle) -> None:
    assert find_graph(bundle, "onnx") is None
    path = write_graph(bundle)
    assert bundle.folder is not None
    assert path == bundle.folder / "engines" / "graph.onnx"
    assert find_graph(load_bundle(bundle.folder), "onnx") == path
    assert find_graph(bundle, "int8") is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["graph.json", "graph.onnx"]


def test_the_manifest_says_what_made_the_graph(bundle: Bundle) -> None:
    manifest = json.loads(write_graph(bundle).with_name("graph.json").read_text(encoding="utf-8"))
    assert manifest["bundle"] == bundle.hash
    assert manifest["made_by"].keys() == {"microtome", "torch", "onnx"}


def test_the_graph_answers_as_the_network_does(bundle: Bundle) -> None:
    assert bundle.samples is not None
    image = np.random.default_rng(1).normal(size=(1, 20, 10)).astype(np.float32)
    expected = answer(restore(bundle), image)
    np.testing.assert_allclose(run_graph(write_graph(bundle), image), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_openvino_answers_where_onnx_runtime_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle.samples is not None
    path, image = write_graph(bundle), bundle.samples.golden_CS
    expected = run_graph(path, image)
    monkeypatch.setattr(export, "find_spec", lambda name: name != "onnxruntime" or None)
    np.testing.assert_allclose(run_graph(path, image), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("change", ["graph", "cut off", "manifest", "no manifest", "list", "no graph"])
def test_a_damaged_graph_is_not_found(bundle: Bundle, change: str) -> None:
    path = write_graph(bundle)
    manifest = path.with_name("graph.json")
    if change == "graph":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif change == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "manifest":
        manifest.write_text(manifest.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    elif change == "list":
        manifest.write_text("[1]", encoding="utf-8")
    else:
        (path if change == "no graph" else manifest).unlink()
    assert find_graph(bundle, "onnx") is None
    broken_off = change in ("manifest", "no manifest")
    assert faults_of_graphs(bundle) == ({} if change == "no graph" else {"graph.onnx": INCOMPLETE if broken_off else CHANGED})


def test_a_graph_of_another_bundle_is_not_found(bundle: Bundle, tmp_path: Path) -> None:
    write_graph(bundle)
    assert faults_of_graphs(bundle) == {"graph.onnx": ""}
    newer = save_bundle(tmp_path / "model", replace(bundle, provenance={"step": 2}))
    assert find_graph(newer, "onnx") is None
    assert faults_of_graphs(newer) == {"graph.onnx": OF_ANOTHER}
    write_graph(newer)
    assert find_graph(newer, "onnx") is not None
    assert find_graph(bundle, "onnx") is None


def test_a_graph_of_another_kind_is_not_found(bundle: Bundle) -> None:
    path = write_graph(bundle)
    for name in ("graph-int8.xml", "graph-int8.bin"):
        path.with_name(name).write_bytes(path.read_bytes())
    path.with_name("graph-int8.json").write_bytes(path.with_name("graph.json").read_bytes())
    assert find_graph(bundle, "int8") is None
    record_graph(path.parent, bundle, "int8", [file_hash(path)] * 2)
    assert find_graph(bundle, "int8") == path.with_name("graph-int8.xml")


def test_a_folder_that_cannot_be_written_sends_graphs_to_the_cache(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert graph_folder(bundle) == cache / bundle.hash
    path = write_graph(bundle)
    assert path.parent == cache / bundle.hash
    assert find_graph(bundle, "onnx") == path


def test_a_graph_in_a_folder_that_cannot_be_written_any_more_is_found(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_graph(bundle)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert find_graph(bundle, "onnx") == path


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MICROTOME_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "microtome"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "microtome"


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MICROTOME_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().is_absolute()
    # As on Windows.
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setenv("USERNAME", "ann")
    assert cache_folder().name == "microtome-ann"


def test_a_cache_that_cannot_be_written_is_named_with_what_moves_it(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    cache.write_text("in the way")
    with pytest.raises(RunError, match=r"expected a cache folder that can be written, got .*; set MICROTOME_CACHE to one"):
        write_graph(bundle)


def test_a_bundle_in_memory_has_no_graph() -> None:
    assert find_graph(bundle_of(), "onnx") is None
    with pytest.raises(ConfigError, match="expected a bundle that was saved"):
        write_graph(bundle_of())


def test_a_bundle_without_samples_gets_no_graph_as_nothing_could_check_it() -> None:
    # Not into the tests' own folder.
    bundle = replace(load_bundle(SCHEMA_1), folder=None)
    with pytest.raises(DataError, match=r"expected a golden input in the bundle, .*got none; .*train --resume"):
        write_graph(bundle)
    assert find_graph(bundle, "onnx") is None


def test_a_graph_that_torch_cannot_write_is_refused_in_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise torch.onnx.errors.UnsupportedOperatorError("aten::new", 17, None)

    monkeypatch.setattr(torch.onnx, "export", unsupported)
    with pytest.raises(
        RunError, match=r"expected a network that torch can write as a graph, got .*aten::new.*; use --engine torch"
    ) as caught:
        write_graph(bundle)
    assert "\n" not in str(caught.value)
    assert find_graph(bundle, "onnx") is None


def test_files_of_two_processes_are_no_graph(bundle: Bundle) -> None:
    """One put its weights beside the other's layers before that wrote its manifest."""
    assert bundle.folder is not None
    folder = bundle.folder / "engines"
    folder.mkdir()
    for name in ("graph-int8.xml", "graph-int8.bin"):
        (folder / name).write_bytes(b"ours")
    ours = [file_hash(folder / name) for name in ("graph-int8.xml", "graph-int8.bin")]
    (folder / "graph-int8.bin").write_bytes(b"theirs")
    record_graph(folder, bundle, "int8", ours)
    assert find_graph(bundle, "int8") is None


def test_another_graph_of_the_same_bundle_has_another_mark(bundle: Bundle) -> None:
    path = write_graph(bundle)
    mark = graph_mark(path, "onnx")
    assert len(mark) == 8
    assert graph_mark(path, "onnx") == mark
    path.write_bytes(path.read_bytes() + b"\0")
    record_graph(path.parent, bundle, "onnx", [file_hash(path)])
    assert graph_mark(path, "onnx") not in (mark, "")
    path.with_name("graph.json").unlink()
    assert graph_mark(path, "onnx") == ""


@pytest.mark.parametrize("wrong", ["values", "shape", "nan"])
def test_a_graph_that_says_something_else_is_not_written(tmp_path: Path, wrong: str) -> None:
    plain = bundle_of()
    assert plain.samples is not None
    logits = plain.samples.logits_KS.copy()
    if wrong == "values":
        logits[0, 3, 3] += 0.01 * np.abs(logits).max()
    elif wrong == "nan":
        logits[0, 3, 3] = np.nan
    else:
        logits = logits[:, 1:]
    bundle = save_bundle(tmp_path / "model", replace(plain, samples=plain.samples._replace(logits_KS=logits)))
    with pytest.raises(DataError, match="use --engine torch"):
        write_graph(bundle)
    assert list((tmp_path / "model" / "engines").iterdir()) == []
    assert find_graph(bundle, "onnx") is None


def test_a_kill_before_the_manifest_leaves_no_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            write_graph(bundle)
    assert find_graph(bundle, "onnx") is None
    write_graph(bundle)
    assert find_graph(bundle, "onnx") is not None


@pytest.mark.parametrize("absent", [{"onnx"}, {"onnxruntime", "openvino"}])
def test_what_is_not_installed_is_named(bundle: Bundle, absent: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name in absent else True)
    with pytest.raises(ConfigError, match=r'pip install "microtome\[fast\]"'):
        write_graph(bundle)
    assert find_graph(bundle, "onnx") is None


def test_finding_a_graph_needs_no_torch(bundle: Bundle) -> None:
    write_graph(bundle)
    code = (
        "import sys; from microtome.bundle import load_bundle; from microtome.inference.graphs import find_graph; "
        "assert find_graph(load_bundle(sys.argv[1]), 'onnx'); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code, str(bundle.folder)], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("package", ["openvino", "onnxruntime"])
def test_an_engine_is_imported_without_telling_anybody(package: str, tmp_path: Path) -> None:
    code = """
import socket, sys
def tried(*_, **__):
    print("tried")
    raise OSError
socket.socket.connect = socket.getaddrinfo = tried
from microtome.inference.telemetry import import_quietly
assert import_quietly(sys.argv[1]).__version__
assert "openvino_telemetry" not in sys.modules
"""
    hidden = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list((tmp_path / "home").iterdir()) == []
