"""What a trained model is given at the end of its run, so that engines other than torch can take it up at once."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from microtome.bundle import load_bundle, save_bundle
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.errors import MicrotomeError
from microtome.inference.export import write_graph
from microtome.inference.graphs import find_graph
from microtome.inference.restore import restore
from microtome.training.golden import samples_of


def complete_model(folder: Path, dataset: Dataset, cases: Sequence[Case]) -> str | None:
    """Add samples to the bundle in `folder`, and write its graph beside it if `onnx` is installed; what is there already stays.

    Args:
        folder: of the run or the model.
        dataset: that it was trained on.
        cases: that it was trained on, of which samples are cut.

    Returns:
        why there is no graph, in a line for people; None if there is one, or nothing to write it with.
    """
    bundle = load_bundle(folder)
    if bundle.samples is None:
        network = restore(bundle)
        samples = samples_of(dataset, cases, bundle.plan, network)
        whole = replace(bundle, samples=samples, sizes=network.sizes, context_vox=network.context_vox)
        assert bundle.folder is not None, "it was loaded"
        bundle = save_bundle(bundle.folder, whole)
    if find_graph(bundle, "onnx") is None and find_spec("onnx") is not None:
        try:
            write_graph(bundle)
        except MicrotomeError as error:
            # The model itself is good: torch predicts with it.
            return f"no graph for other engines: {error}"
    return None
