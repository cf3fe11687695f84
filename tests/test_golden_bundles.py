"""Bundles of every form that was ever written keep loading, and answer as they answered then."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from microtome.bundle import FILE, fault_of_copy, load_bundle, save_bundle
from microtome.bundle_form import parse_form
from microtome.geometry import affine_from_spacing
from microtome.images.image import Image
from microtome.inference.graphs import find_graph
from microtome.inference.predictor import Predictor
from microtome.inference.restore import restore
from tests.golden_bundles import FOLDER, NEWEST, form_of, header_of, write_newest
from tests.small import one_thread  # noqa: F401 - a fixture

GOLDEN = sorted(folder for folder in FOLDER.iterdir() if folder.is_dir())
# Another torch, or processor, may add in another order.
TOLERANCE = 1e-5


def test_every_form_is_there_in_2d_and_in_3d_and_small() -> None:
    forms: dict[str, set[int]] = {}
    for folder in GOLDEN:
        name = folder.name.removesuffix("-2d").removesuffix("-3d")
        forms.setdefault(name, set()).add(load_bundle(folder).plan.dims)
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 100_000
    assert forms.keys() == {"schema1-first", "schema1", "schema2-plain", "schema2-samples", "schema2-temperature", NEWEST}
    assert set(map(tuple, forms.values())) == {(2, 3)}
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in forms if name not in listed] == []


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_it_loads_and_answers_as_it_answered_then(folder: Path) -> None:
    bundle, golden = load_bundle(folder), np.load(folder / "golden.npz", allow_pickle=False)
    with torch.inference_mode():
        logits_KS = restore(bundle)(torch.from_numpy(golden["image"])[None])[0].numpy()
    np.testing.assert_allclose(logits_KS, golden["logits"], rtol=0, atol=TOLERANCE)
    assert bundle.legend.names == ("nothing", "Zelle é")
    assert bundle.legend.values == ((0,), (7, 9))
    assert bundle.provenance["step"] == 12
    assert bundle.temperature == (1.625 if folder.name.startswith(("schema2-temperature", NEWEST)) else 1.0)
    if folder.name.startswith(("schema2-samples", "schema2-temperature", NEWEST)):
        assert bundle.samples is not None
        assert np.array_equal(bundle.samples.golden_CS, golden["image"])
        assert np.array_equal(bundle.samples.logits_KS, golden["logits"])
        assert len(bundle.samples.calibration) == 2
    else:
        assert bundle.samples is None


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_saved_again_it_has_the_newest_form_and_the_same_weights(folder: Path, tmp_path: Path) -> None:
    before = load_bundle(folder)
    save_bundle(tmp_path, before)
    after = load_bundle(tmp_path)
    assert (after.plan, after.legend, after.provenance) == (before.plan, before.legend, before.provenance)
    assert {name: array.tobytes() for name, array in after.weights.items()} == {n: a.tobytes() for n, a in before.weights.items()}
    if before.samples is not None:
        assert form_of(tmp_path) == form_of(FOLDER / f"{NEWEST}-{before.plan.dims}d")


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_every_form_predicts(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "model")
    bundle = load_bundle(place)
    shape, spacing_mm = (5, 20, 24)[-bundle.plan.dims :], bundle.plan.spacing_mm
    array = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    axes, affine = ("CYX", "CZYX")[bundle.plan.dims - 2], affine_from_spacing(spacing_mm)
    image = Image(array=array, spacing_mm=spacing_mm, affine=affine, axes=axes, path=tmp_path / "made", format="made")
    labels = Predictor(bundle, engine="torch", device="cpu")(image)
    assert labels.shape == shape
    assert set(np.unique(labels)) <= {0, 1}
    assert find_graph(bundle, "onnx") is None


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_written_now_has_the_form_of_the_newest_golden_bundle(dims: int, tmp_path: Path) -> None:
    advice = "what a bundle holds has changed: name the new form in tests/golden_bundles.py, then `python -m tests.golden_bundles`"
    assert form_of(write_newest(tmp_path, dims)) == form_of(FOLDER / f"{NEWEST}-{dims}d"), advice


def test_the_form_tells_a_change_of_the_description_and_of_the_tensors(tmp_path: Path) -> None:
    newest = FOLDER / f"{NEWEST}-2d"
    form = form_of(newest)
    assert ".needs: str" in form
    assert ".plan.network.widths: list" in form
    assert sum(line.startswith("tensor ") for line in form) > 20
    assert form != form_of(FOLDER / "schema2-temperature-2d")
    shutil.copytree(newest, tmp_path / "model")
    (tmp_path / "model" / "more.json").write_text("{}")
    assert form_of(tmp_path / "model") != form


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_its_copy_for_people_is_what_the_header_says(folder: Path) -> None:
    document = json.loads(header_of(folder / FILE)["__metadata__"]["microtome"])
    assert json.loads((folder / "model.json").read_text(encoding="utf-8")) == document
    assert fault_of_copy(load_bundle(folder)) == ""


@pytest.mark.parametrize("dims", [2, 3])
def test_plans_of_the_first_bundles_are_read_in_the_words_of_now(dims: int) -> None:
    plan = load_bundle(FOLDER / f"schema1-first-{dims}d").plan
    augment = plan.augment
    # Those bundles say `dice_weight: 1.0` and `intensity_p: 0.2`.
    chances = (augment.contrast_p, augment.brightness_p, augment.gamma_p, augment.noise_p, augment.blur_p, augment.low_resolution_p)
    assert set(chances) == {0.2}
    assert augment.rotation_p == 0.5
    assert (plan.loss.dice, plan.loss.cross_entropy) == (1.0, 1.0)


def test_other_chances_and_weights_of_such_plans_are_kept() -> None:
    document = json.loads(header_of(FOLDER / "schema1-first-2d" / FILE)["__metadata__"]["microtome"])
    document["plan"]["augment"]["intensity_p"], document["plan"]["dice_weight"] = 0.75, 0.5
    plan = parse_form(Path("model"), document).plan
    assert (plan.augment.noise_p, plan.augment.elastic_p, plan.loss.dice) == (0.75, 0.3, 0.5)
