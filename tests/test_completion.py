"""What a model is given at the end of its run: samples and a graph, once, and a line where that cannot be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from microtome.bundle import Bundle, load_bundle, save_bundle
from microtome.data.dataset import Dataset, open_dataset
from microtome.errors import DataError
from microtome.inference.graphs import find_graph
from microtome.inference.restore import arrays_of
from microtome.training import completion as module
from microtome.training.completion import complete_model
from tests.small import small_plan
from tests.test_golden_samples import network_for, pictures


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Dataset]:
    """A model as training leaves it, without samples, and its data."""
    pictures(tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    plan = small_plan(classes=dataset.legend.names)
    save_bundle(tmp_path / "model", Bundle(plan=plan, legend=dataset.legend, weights=arrays_of(network_for(plan).state_dict())))
    return tmp_path / "model", dataset


def test_a_model_gets_samples_sizes_and_a_graph_and_keeps_its_weights(run: tuple[Path, Dataset]) -> None:
    folder, dataset = run
    before = {name: np.array(values) for name, values in load_bundle(folder).weights.items()}
    assert complete_model(folder, dataset, dataset.labelled) is None
    bundle = load_bundle(folder)
    assert bundle.samples is not None
    assert bundle.sizes is not None
    assert bundle.context_vox == 0
    assert find_graph(bundle, "onnx") is not None
    assert before.keys() == bundle.weights.keys()
    assert all(np.array_equal(values, bundle.weights[name]) for name, values in before.items())


def test_what_is_there_stays(run: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dataset = run
    complete_model(folder, dataset, dataset.labelled)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(module, "samples_of", lambda *_: pytest.fail("samples were made again"))
    assert complete_model(folder, dataset, dataset.labelled) is None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_graph_that_cannot_be_written_is_a_line_and_costs_no_sample(run: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dataset = run

    def refuse(bundle: Bundle) -> Path:
        raise DataError("graph", expected="the same answers", got="others", do="use --engine torch")

    monkeypatch.setattr(module, "write_graph", refuse)
    line = complete_model(folder, dataset, dataset.labelled)
    assert line is not None
    assert line.startswith("other engines than torch cannot take up this model: graph: expected the same answers")
    assert load_bundle(folder).samples is not None


def test_data_that_are_gone_by_then_cost_samples_and_not_the_model(run: tuple[Path, Dataset]) -> None:
    folder, dataset = run
    gone = [replace(case, images=(folder / "gone.png",)) for case in dataset.labelled]
    line = complete_model(folder, dataset, gone)
    assert line is not None
    assert "gone.png" in line
    assert load_bundle(folder).samples is None
