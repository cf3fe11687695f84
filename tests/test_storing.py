"""Predictions in stores: equal to those in memory, taken up again brick by brick, refused where another one lies."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.bundle import load_bundle, save_bundle
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
from microtome.machine import resident_bytes
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
    bricks, _ = stored.open_store(predictor, case_of(store), place, wanted_of(predictor, options), request={"clean-up and instances": {}})
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


def test_an_image_that_needs_more_memory_says_how_much_and_stops_no_other(tmp_path: Path) -> None:
    # Few tiles: this is about memory, and a picture of 10 million pixels has 20,000 of 32 × 32 that overlap by half.
    run = small_bundle(tmp_path / "run", dims=2, patch_vox=(256, 256), overlap=0)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "large.npy", np.zeros((3200, 3200), np.uint8))
    np.save(tmp_path / "in" / "small.npy", np.zeros((40, 40), np.uint8))
    predictor = predictor_of(run)
    held = resident_bytes(most=True) / 1e9
    with pytest.raises(DataError, match=r"large\.npy: expected --memory (\S+) or more, got --memory .*the other 1 are in") as caught:
        predict_files(predictor, [tmp_path / "in"], tmp_path / "out", options=Options(memory_gb=held + 0.08))
    assert (tmp_path / "out" / "small.npy").exists()
    enough = float(str(caught.value).split("--memory ")[1].split(" ")[0])
    assert predict_files(predictor, [tmp_path / "in" / "large.npy"], tmp_path / "more", options=Options(memory_gb=enough))


def test_a_size_in_mm_needs_a_voxel_size(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((40, 40), np.uint8))
    run = small_bundle(tmp_path / "run", dims=2)
    with pytest.raises(DataError, match=r"a\.npy: expected a voxel size in the file, got none.*--min-size in voxels"):
        predict_files(predictor_of(run), [tmp_path / "a.npy"], tmp_path / "out", options=Options(clean=CleanUp(min_size_mm=0.5)))


def test_instances_need_a_background(tmp_path: Path) -> None:
    run = small_bundle(tmp_path / "run", dims=2, background=None)
    with pytest.raises(ConfigError, match="--instances: expected a model with a background"):
        predict_files(predictor_of(run), [tmp_path], tmp_path / "out", options=Options(instances=True))
    with pytest.raises(ConfigError, match="--keep-largest"):
        predict_files(predictor_of(run), [tmp_path], tmp_path / "out", options=Options(clean=CleanUp(keep_largest=True)))


def test_bricks_are_whole_chunks_and_make_up_the_volume_once(run: Path, store: Path, tmp_path: Path) -> None:
    predictor = predictor_of(run)
    bricks, _ = stored.open_store(predictor, case_of(store), tmp_path / "out.ome.zarr", wanted_of(predictor, Options()))
    seen, chunks = np.zeros(SHAPE, int), bricks.opened()["labels"].chunks
    for box in bricks.missing():
        for _, brick in bricks.bricks_of(box):
            seen[tuple(slice(a, b) for a, b in brick)] += 1
            for (first, past), side, size in zip(brick, chunks, SHAPE, strict=True):
                assert first % side == 0
                assert past % side == 0 or past == size
    assert (seen == 1).all()
    assert all(len(sides) == axes for axes, sides in bricks_module.BRICKS.items())


def test_of_an_image_that_changed_nothing_is_taken_over(run: Path, tmp_path: Path) -> None:
    array, predictor = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8), predictor_of(run)
    case = Case(name="a", images=(tmp_path / "a.npy",))
    np.save(tmp_path / "a.npy", array)
    place = write_store(predictor, case, tmp_path / "out.ome.zarr", Options())
    write_store(predictor, case, place, Options())
    for changed, what in ((array[:-4], "pixels, written"), (255 - array, "written")):
        np.save(tmp_path / "a.npy", changed)
        os.utime(tmp_path / "a.npy", ns=(1, 1))
        with pytest.raises(DataError, match=rf"a finished prediction of another kind \({what}\)"):
            write_store(predictor, case, place, Options())
    # Of a store the kind of its pixels tells.
    moving = write_volume_store(tmp_path / "b.ome.zarr", array, chunk=(8, 16, 16))
    write_store(predictor, case_of(moving), tmp_path / "b", Options())
    shutil.rmtree(moving)
    write_volume_store(moving, array[:-4], chunk=(8, 16, 16))
    with pytest.raises(DataError, match=r"of another kind \(pixels\)"):
        write_store(predictor, case_of(moving), tmp_path / "b", Options())


def test_the_same_image_from_another_folder_is_the_same(run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    write_store(predictor_of(run), case_of(store), tmp_path / "out.ome.zarr", Options())
    monkeypatch.chdir(store.parent)
    write_store(predictor_of(run), case_of(Path(store.name)), tmp_path / "out.ome.zarr", Options(), say=said.append)
    assert said == [f"{tmp_path / 'out.ome.zarr'}: finished already"]


@pytest.mark.parametrize("options", [Options(), Options(instances=True)], ids=["labels", "instances"])
def test_a_store_that_is_not_ours_is_left_alone(run: Path, store: Path, tmp_path: Path, options: Options) -> None:
    foreign = write_volume_store(tmp_path / "out.ome.zarr", np.zeros(SHAPE, np.uint8), chunk=(8, 16, 16))
    before = contents(foreign)
    with pytest.raises(DataError, match=r"out.ome.zarr: expected nothing there, got what `predict` did not write"):
        write_store(predictor_of(run), case_of(store), foreign, options)
    assert contents(foreign) == before
    # What a kill leaves before there is a record.
    (tmp_path / "begun.ome.zarr" / ".microtome").mkdir(parents=True)
    write_store(predictor_of(run), case_of(store), tmp_path / "begun.ome.zarr", options)


def test_what_a_kill_left_on_the_way_goes_with_the_next_call(run: Path, store: Path, tmp_path: Path) -> None:
    place = write_store(predictor_of(run), case_of(store), tmp_path / "out.ome.zarr", ALL)
    (tmp_path / ".stage-out.ome.zarr" / "labels").mkdir(parents=True)
    write_store(predictor_of(run), case_of(store), place, ALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ome.zarr"]


def test_auto_goes_on_with_the_engine_that_began(run: Path, store: Path, tmp_path: Path) -> None:
    predictor, place = predictor_of(run), tmp_path / "out.ome.zarr"
    stored.open_store(predictor, case_of(store), place, wanted_of(predictor, Options()), request={"clean-up and instances": {}})
    chosen = Predictor(load_bundle(run))
    record = json.loads((place / ".microtome" / "record.json").read_text())
    (place / ".microtome" / "record.json").write_text(json.dumps(record | {"engine": "torch-bf16"}))
    # An engine that was chosen for an image before is no word of the user's.
    assert chosen.engine is not None
    assert chosen.engine.name == "torch"
    bricks, _ = stored.open_store(chosen, case_of(store), place, wanted_of(chosen, Options()), request={"clean-up and instances": {}})
    assert bricks.record.engine == "torch-bf16"


def test_less_memory_than_it_was_begun_for_is_refused(run: Path, store: Path, tmp_path: Path) -> None:
    predictor, place = predictor_of(run), tmp_path / "out.ome.zarr"
    wanted = wanted_of(predictor, Options())
    stored.open_store(predictor, case_of(store), place, wanted, limit_bytes=8 * 10**9)
    stored.open_store(predictor, case_of(store), place, wanted, limit_bytes=8 * 10**9)
    with pytest.raises(ConfigError, match=r"or more for which this prediction was begun, got --memory 0.1"):
        stored.open_store(predictor, case_of(store), place, wanted, limit_bytes=10**8)


@pytest.mark.parametrize("memory", [float("nan"), float("inf"), 0.0, -1.0])
def test_memory_is_a_number_above_0(memory: float) -> None:
    with pytest.raises(ConfigError, match="--memory: expected a number of GB above 0"):
        Options(memory_gb=memory)


def test_label_files_are_not_written_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_bundle(tmp_path / "run", dims=2)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, (40, 36)).astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    out = Path("memory://test-storing/out")
    with pytest.raises(DataError, match=r"memory://test-storing/out: expected a folder .* --ome-zarr"):
        predict_files(predictor_of(run), [tmp_path / "a.npy"], out)
    [place] = predict_files(predictor_of(run), [tmp_path / "a.npy"], out, options=Options(store=True))
    assert read_image(place / "labels" / "prediction").shape_vox == (40, 36)
    # Nothing of the URL became a folder here.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "run"]


def test_a_large_plain_image_tells_how_far_it_is_and_how_it_is_cut(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8))
    done, said = list[tuple[str, int, int]](), list[str]()
    words: dict[str, Any] = {"on_voxels": lambda name, now, of: done.append((name, now, of)), "say": said.append}
    predict_files(predictor_of(run), [tmp_path / "a.npy"], tmp_path / "out", options=Options(memory_gb=8), **words)
    assert len(done) > 1
    assert done[-1] == ("a", np.prod(SHAPE), np.prod(SHAPE))
    assert done == sorted(done)
    assert len(said) == 1
    assert "slabs of" in said[0]


KINDS: dict[str, dict[str, Any]] = {
    "sections": {"plan": {"spacing_mm": (2.0, 1.0, 1.0)}},
    "resized": {"plan": {"resize_vox": (16, 16), "spacing_mm": (1.0, 1.0, 1.0)}},
    "colours": {"values": (((0, 0, 0),), ((255, 0, 10),)), "kind": "colours"},
    "objects": {"values": ((0,), (255,)), "kind": "instances"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stores_hold_what_plain_files_do(tmp_path: Path, kind: str) -> None:
    given = KINDS[kind]
    bundle = load_bundle(small_bundle(tmp_path / "run", dims=2))
    legend = replace(bundle.legend, values=given.get("values", bundle.legend.values), kind=given.get("kind", "values"))
    plan = bundle.plan.model_copy(update=given.get("plan", {}))
    save_bundle(tmp_path / "run" / "model", replace(bundle, plan=plan, legend=legend))
    shape = (5, 40, 36)[-len(plan.spacing_mm) :]
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8))
    for options in (Options(uncertainty=True), Options(instances=True, clean=CleanUp(fill_holes=True))):
        predictor, out = predictor_of(tmp_path / "run", tta="mirror"), tmp_path / f"out{options.instances}"
        maps = predict_maps(predictor, open_volume(tmp_path / "a.npy"), options)
        [place] = predict_files(predictor, [tmp_path / "a.npy"], out, options=replace(options, store=True))
        values = bricks_module.stored_values(legend)
        np.testing.assert_array_equal(read_image(place / "labels" / "prediction").array[0], values[maps.pop("labels")])
        assert len(maps) == (1 if options.instances else 2)
        for name, array in maps.items():
            found = read_image(place / ("labels/instances" if name == "instances" else name))
            np.testing.assert_array_equal(found.array[0], array)
