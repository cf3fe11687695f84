"""What a trained model is given at the end of its run, so that engines other than torch can take it up at once."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from microtome.bundle import Bundle, load_bundle, save_bundle
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.errors import MicrotomeError
from microtome.inference.export import write_graph
from microtome.inference.graphs import find_graph
from microtome.inference.restore import restore
from microtome.training.golden import samples_of


def complete_model(folder: Path, dataset: Dataset, cases: Sequence[Case], temperature: float = 1.0) -> str | None:
    """Add temperature and samples to the bundle in `folder`, and write its graph beside it if `onnx` is installed.

    What is there already stays, but another temperature. What a kill left of an earlier call is brought to its end.

    Args:
        folder: of the run or the model.
        dataset: that it was trained on.
        cases: that it was trained on, of which samples are cut.
        temperature: that was fitted to its validation cases.

    Returns:
        what could not be done, in a line for people: torch predicts with the model all the same. None if all is there, or there is
        nothing to write a graph with.

    Raises:
        RunError: the disk is full or broken.
    """
    try:
        bundle = load_bundle(folder)
        if not _is_told(bundle):
            bundle = _saved(bundle)
        if bundle.temperature != temperature:
            # By itself, so that samples that cannot be cut do not cost it.
            bundle = _saved(replace(bundle, temperature=temperature))
        if bundle.samples is None:
            bundle = _with_samples(bundle, dataset, cases)
        if find_graph(bundle, "onnx") is None and find_spec("onnx") is not None:
            write_graph(bundle)
    except MicrotomeError as error:
        if isinstance(error.__cause__, OSError):
            # The disk is full or broken: what comes after this has no room either, and with --resume it can be done again.
            raise
        return f"other engines than torch cannot take up this model: {error}"
    return None


def _is_told(bundle: Bundle) -> bool:
    """Whether `model.json` tells people of this bundle: a kill may have come between the two files."""
    assert bundle.folder is not None, "it was loaded"
    try:
        return bool(json.loads((bundle.folder / "model.json").read_text(encoding="utf-8"))["hash"] == bundle.hash)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _with_samples(bundle: Bundle, dataset: Dataset, cases: Sequence[Case]) -> Bundle:
    """The bundle, saved again in its place with samples and with what its network says of sizes."""
    network = restore(bundle)
    samples = samples_of(dataset, cases, bundle.plan, network)
    return _saved(replace(bundle, samples=samples, sizes=network.sizes, context_vox=network.context_vox))


def _saved(bundle: Bundle) -> Bundle:
    """A bundle that was loaded, changed, in its place."""
    assert bundle.folder is not None, "it was loaded"
    return save_bundle(bundle.folder, bundle)
