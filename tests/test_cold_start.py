"""A prediction from nothing imported: torch is loaded for its own engines and for nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from microtome.inference.export import write_graph
from tests import folders
from tests.models import saved_model

HEAVY = {"torch", "scipy", "nibabel", "tifffile", "SimpleITK", "jinja2", "onnx", "nncf", "openvino_telemetry"}
CODE = """
import sys
from microtome.cli import main
sys.argv = ["microtome", "predict", *sys.argv[1:]]
try:
    main()
finally:
    sys.stderr.write("LOADED " + " ".join(sys.modules))
"""


def predicted(run: Path, image: Path, out: Path, *words: str) -> tuple[np.ndarray, set[str], str]:
    """The labels that a process of its own writes, the modules that it had loaded by then, and what it said."""
    command = [sys.executable, "-c", CODE, str(run), str(image), "--out", str(out), "--device", "cpu", *words]
    environment = {**os.environ, "MICROTOME_CACHE": str(run / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    said, _, loaded = done.stderr.rpartition("LOADED ")
    assert done.returncode == 0, done.stderr
    with PIL.Image.open(out / f"{image.stem}.png") as picture:
        return np.asarray(picture), set(loaded.split()), said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model and its graph."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("run")
    write_graph(saved_model(folder))
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.png(tmp_path_factory.mktemp("in") / "a.png", np.random.default_rng(2).integers(0, 256, (40, 33)).astype(np.uint8))


@pytest.fixture(scope="module")
def by_torch(run: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    labels, loaded, _ = predicted(run, picture, tmp_path_factory.mktemp("torch"), "--engine", "torch")
    assert "torch" in loaded
    assert loaded & (HEAVY - {"torch"}) == set()
    return labels


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_graph_labels_as_torch_does_without_torch(run: Path, picture: Path, tmp_path: Path, by_torch: np.ndarray, engine: str) -> None:
    pytest.importorskip(engine)
    labels, loaded, said = predicted(run, picture, tmp_path / "out", "--engine", engine)
    assert engine in loaded
    assert loaded & HEAVY == set()
    assert len(np.unique(by_torch)) == 2
    np.testing.assert_array_equal(labels, by_torch)
    assert f"{engine}: as asked; labels as torch 100 %" in said


def test_a_small_job_takes_the_graph_that_is_there(run: Path, picture: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    labels, loaded, said = predicted(run, picture, tmp_path / "out")
    assert "torch" not in loaded
    assert labels.shape == (40, 33)
    assert "starts soonest, and the job is small" in said
