"""Predictions in stores: equal to those in memory, taken up again brick by brick, refused where another one lies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.bundle import load_bundle
from microtome.config import NormalisationConfig
from microtome.data.case import Case
from microtome.errors import ConfigError, DataError
from microtome.images.files import open_volume, read_image
from microtome.inference import bricks as bricks_module
from microtome.inference import stored
from microtome.inference.asked import CleanUp, Options
from microtome.inference.finishing import predict_maps, wanted_of
from microtome.inference.predict_files import predict_files
from microtome.inference.predictor import Predictor
from microtome.inference.storing import write_store
from tests.stores import small_bundle, write_volume_store

SHAPE = (22, 40, 36)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("run"), dims=3, normalisation=NormalisationConfig(kind="image"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, SHAPE).astype(np.uint8)
    return write_volume_store(tmp_path_factory.mktemp("in") / "a.ome.zarr", array, chunk=(8, 16, 16))


@pytest.fixture(autouse=True)
def _small_bricks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BRICKS", {2: (16, 16), 3: (4, 16, 16)})


def case_of(store: Path) -> Case:
    return Case(name="a", images=(store,))


def predictor_of(run: Path, **words: Any) -> Predictor:
    return Predictor(load_bundle(run), engine="torch", **words)


ALL = Options(
    probabilities="float16",
    uncertainty=True,
    instances=True,
    clean=CleanUp(keep_largest=False, fill_holes=True, min_size_vox=4),
)


def test_a_store_holds_what_memory_would(run: Path, store: Path, tmp_path: Path) -> None:
    predictor = predictor_of(run)
    maps = predict_maps(predictor, open_volume(store), ALL)
    place = write_store(predictor, case_of(store), tmp_path / "out.ome.zarr", ALL)
    codes = predictor.bundle.legend.encode(maps["labels"])
    np.testing.assert_array_equal(read_image(place / "labels" / "prediction").array[0], codes)
    np.testing.assert_array_equal(read_image(place / "labels" / "instances").array[0], maps["instances"])
    np.testing.assert_array_equal(read_image(place / "probabilities").array, maps["probabilities"])
    np.testing.assert_array_equal(read_image(place / "uncertainty").array[0], maps["uncertainty"])
    assert len(np.unique(maps["instances"])) > 1
    # Nothing of the way is left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ome.zarr"]
    assert not (place / "foreground").exists()
    found, wanted = read_image(place / "labels" / "prediction"), read_image(store)
    assert found.spacing_mm == pytest.approx(wanted.spacing_mm)
    np.testing.assert_allclose(found.affine, wanted.affine)


def test_what_is_marked_is_never_computed_again_and_the_result_is_the_same(run: Path, store: Path, tmp_path: Path) -> None:
    predictor, options = predictor_of(run), Options(uncertainty=True)
    whole = write_store(predictor, case_of(store), tmp_path / "whole.ome.zarr", options)
    place = tmp_path / "broken.ome.zarr"
    bricks, _ = stored.open_store(predictor, case_of(store), place, wanted_of(predictor, options), request={"mending": {}})
    worker = stored.Worker(stored.job_of(predictor, case_of(store), bricks), predictor)
    boxes = bricks.missing(most=1)
    assert len(boxes) == 6 * len(bricks.record.layout.columns)
    for box in boxes[1::2]:
        list(worker.fill(box))
    assert bricks.missing(most=1) == boxes[0::2]
    done = []
    write_store(predictor, case_of(store), place, options, on_voxels=lambda now, of: done.append((now, of)))
    assert done[-1][0] == done[-1][1] == sum(stored.voxels_of(box) for box in boxes[0::2])
    assert contents(place) == contents(whole)
    said: list[str] = []
    write_store(predictor, case_of(store), place, options, say=said.append)
    assert said == [f"{place}: finished already"]


def contents(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def test_columns_of_little_memory_give_the_same_labels(run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from microtome.inference import layout

    monkeypatch.setattr(layout, "MARGIN_BYTES", 0)
    predictor = predictor_of(run)
    whole = write_store(predictor, case_of(store), tmp_path / "one.ome.zarr", Options())
    monkeypatch.setattr(layout, "USUAL_BYTES", 10)
    cut = write_store(predictor, case_of(store), tmp_path / "many.ome.zarr", Options())
    record = json.loads((cut / ".microtome" / "record.json").read_text())
    assert len(record["layout"]["edges"][0]) > 2
    np.testing.assert_array_equal(*(read_image(place / "labels" / "prediction").array for place in (whole, cut)))


def test_a_place_of_another_prediction_is_refused(run: Path, store: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.ome.zarr"
    write_store(predictor_of(run), case_of(store), place, Options())
    with pytest.raises(DataError, match=r"a finished prediction of another kind \(averaging, wanted\)|\(averaging\)"):
        write_store(predictor_of(run, tta="mirror"), case_of(store), place, Options())
    with pytest.raises(DataError, match="another prediction"):
        write_store(predictor_of(run), case_of(store), place, Options(instances=True))


def test_another_engine_than_it_was_begun_with_is_refused(run: Path, store: Path, tmp_path: Path) -> None:
    predictor, place = predictor_of(run), tmp_path / "out.ome.zarr"
    stored.open_store(predictor, case_of(store), place, wanted_of(predictor, Options()))
    record = json.loads((place / ".microtome" / "record.json").read_text())
    (place / ".microtome" / "record.json").write_text(json.dumps(record | {"engine": "openvino"}))
    with pytest.raises(ConfigError, match="--engine openvino, or auto"):
        stored.open_store(predictor, case_of(store), place, wanted_of(predictor, Options()))


@pytest.mark.parametrize("damage", ["{}", '{"schema": 1}', '{"schema": 9}', "[]", "{"])
def test_a_damaged_record_is_one_line(run: Path, store: Path, tmp_path: Path, damage: str) -> None:
    predictor, place = predictor_of(run), tmp_path / "out.ome.zarr"
    stored.open_store(predictor, case_of(store), place, wanted_of(predictor, Options()))
    (place / ".microtome" / "record.json").write_text(damage)
    with pytest.raises(DataError) as caught:
        stored.open_store(predictor, case_of(store), place, wanted_of(predictor, Options()))
    assert "out.ome.zarr" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_and_its_maps(tmp_path: Path) -> None:
    from PIL import Image as Picture

    run = small_bundle(tmp_path / "run", dims=2, normalisation=NormalisationConfig(kind="image"))
    (tmp_path / "in").mkdir()
    array = np.random.default_rng(0).integers(0, 255, (45, 50)).astype(np.uint8)
    Picture.fromarray(array).save(tmp_path / "in" / "a.png")
    predictor = predictor_of(run, tta="mirror")
    written = predict_files(predictor, [tmp_path / "in"], tmp_path / "out", options=ALL)
    assert written == [tmp_path / "out" / "a.png"]
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        "a.png",
        "predictions.json",
        *(f"{kind}/a.tif" for kind in ("probabilities", "uncertainty", "disagreement", "instances")),
    }
    chances = read_image(tmp_path / "out" / "probabilities" / "a.tif").array
    # TIFF files hold float32 where half of it would do, as few programs read the half.
    assert chances.dtype == np.float32
    np.testing.assert_allclose(chances.sum(axis=0), 1, atol=2e-3)
    # A store of the same picture holds the same.
    predict_files(predictor, [tmp_path / "in"], tmp_path / "stores", options=Options(store=True))
    plain = predict_files(predictor, [tmp_path / "in"], tmp_path / "plain")
    np.testing.assert_array_equal(
        read_image(tmp_path / "stores" / "a.ome.zarr" / "labels" / "prediction").array, read_image(plain[0]).array
    )


def test_memory_is_kept_or_refused(run: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected memory for a slab of one column, got .* the least that it takes is"):
        write_store(predictor_of(run), case_of(store), tmp_path / "out.ome.zarr", Options(memory_gb=0.1))
    assert not (tmp_path / "out.ome.zarr" / "labels").exists()
    write_store(predictor_of(run), case_of(store), tmp_path / "out.ome.zarr", Options(memory_gb=8))


def test_instances_need_a_background(tmp_path: Path) -> None:
    run = small_bundle(tmp_path / "run", dims=2, background=None)
    with pytest.raises(ConfigError, match="--instances: expected a model with a background"):
        predict_files(predictor_of(run), [tmp_path], tmp_path / "out", options=Options(instances=True))
    with pytest.raises(ConfigError, match="--keep-largest"):
        predict_files(predictor_of(run), [tmp_path], tmp_path / "out", options=Options(clean=CleanUp(keep_largest=True)))


def test_bricks_are_whole_chunks() -> None:
    assert all(len(sides) == axes for axes, sides in bricks_module.BRICKS.items())
