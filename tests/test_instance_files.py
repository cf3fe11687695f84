import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage.metrics import adapted_rand_error, variation_of_information

from microtome import cli
from microtome.data.dataset import open_dataset
from microtome.data.legend import Legend
from microtome.data.listing import Entry, Listing, write_listing
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.evaluation.evaluate import evaluate
from microtome.evaluation.instance_scores import METRICS, score_objects
from microtome.images.omezarr import create_labels, finish
from microtome.images.volume import volume_of
from tests.object_maps import as_image, pixels_of, save, squares, write_folders


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_folders(tmp_path)


# files


def test_files_of_object_numbers_are_scored_worst_first(folders: tuple[Path, Path]) -> None:
    result = evaluate(*folders, instances=True)
    assert result["worst"] == ["c", "a", "b"]
    rows = {item["case"]: item for item in result["cases"]}
    assert rows["b"]["ap"] == rows["b"]["pq"] == rows["b"]["v_rand"] == 1
    assert rows["b"]["arand"] == rows["b"]["voi"] == 0
    assert rows["a"]["ap50"] == pytest.approx(15 / 17)
    assert (rows["c"]["ap50"], rows["c"]["seg"], rows["c"]["arand"], rows["c"]["sq"]) == (0, 0, 1, None)
    assert result["summary"]["ap50"]["mean"] == pytest.approx((15 / 17 + 1) / 3)
    assert result["objects"] == {"truth": 48, "predicted": 32, "found": 31, "missed": 17, "false": 1}
    assert "pictures" not in result


@pytest.mark.parametrize("suffix", [".png", ".tif", ".nii.gz", ".npy"])
def test_every_format_gives_the_same_scores_and_high_numbers_stay(tmp_path: Path, suffix: str) -> None:
    truth, kind = squares(first=60_000), np.uint16
    prediction = np.roll(truth, 1, axis=0)
    pair = [save(tmp_path / name / f"x{suffix}", array.astype(kind)) for name, array in (("p", prediction), ("t", truth))]
    [found] = evaluate(*pair, instances=True)["cases"]
    assert found == {**score_objects(truth, prediction, case="x").to_json()}
    assert found["objects_truth"] == 16


def test_numbers_of_32_bits_and_negative_ones_that_are_not_annotated(tmp_path: Path) -> None:
    truth = squares(first=2_000_000_000).astype(np.int32)
    prediction = truth.copy()
    truth[:16] = -1
    prediction[:8] = 7
    for name, array in (("t", truth), ("p", prediction)):
        tifffile.imwrite(tmp_path / f"{name}.tif", array)
    [found] = evaluate(tmp_path / "p.tif", tmp_path / "t.tif", instances=True)["cases"]
    assert (found["objects_truth"], found["objects_predicted"], found["ap"]) == (8, 8, 1)


def kaggle(root: Path, prediction: Callable[[np.ndarray], np.ndarray]) -> tuple[Path, Path]:
    """A dataset with one mask an object, and a prediction of each case."""
    truth = squares()
    for name in ("n1", "n2"):
        noise = np.random.default_rng(1).integers(0, 255, truth.shape, np.uint8)
        save(root / "data" / name / "images" / f"{name}.png", noise)
        for number in range(1, truth.max() + 1):
            save(root / "data" / name / "masks" / f"{name}_{number:02}.png", (truth == number).astype(np.uint8) * 255)
        save(root / "out" / f"{name}.png", prediction(truth).astype(np.uint16))
    return root / "out", root / "data"


def test_one_mask_an_object_is_scored_object_by_object_with_pictures_of_its_images(tmp_path: Path) -> None:
    result = evaluate(
        *kaggle(tmp_path, lambda truth: np.where(truth == 3, 0, 500 - truth * (truth > 0)) * (truth > 0)), instances=True, pictures=True
    )
    assert [item["ap50"] for item in result["cases"]] == [15 / 16] * 2
    assert [item["case"] for item in result["pictures"]] == ["n1", "n2"]
    # Noise lies under the outlines.
    assert pixels_of(result["pictures"][0]["panels"][0]).std() > 20


def test_a_picture_does_without_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    predictions, truth = kaggle(tmp_path, lambda objects: objects)
    image = truth / "n1" / "images" / "n1.png"
    image.write_bytes(image.read_bytes()[:90])
    result = evaluate(predictions, truth, instances=True, pictures=True)
    assert {item["ap50"] for item in result["cases"]} == {1.0}
    assert pixels_of(result["pictures"][0]["panels"][0]).std() < 60


def described(root: Path, text: str, labels: np.ndarray) -> tuple[Path, Path]:
    """A dataset of one image with these labels, and the labels as prediction."""
    save(root / "data" / "images" / "a.png", np.random.default_rng(1).integers(0, 255, labels.shape, np.uint8))
    save(root / "data" / "labels" / "a.png", labels)
    (root / "data" / "microtome.yaml").write_text(text)
    save(root / "out" / "a.png", labels)
    return root / "out", root / "data"


@pytest.mark.parametrize(("text", "count"), [("", 4), ("not_annotated: [255]\n", 3)])
def test_values_that_look_like_classes_are_objects_and_255_only_is_not_where_that_is_stated(tmp_path: Path, text: str, count: int) -> None:
    labels = np.zeros((16, 16), np.uint8)
    for number, value in enumerate((1, 2, 3, 255)):
        labels[4 * number : 4 * number + 3, 2:9] = value
    result = evaluate(*described(tmp_path, text, labels), instances=True)
    assert result["cases"][0]["objects_truth"] == result["cases"][0]["objects_found"] == count


# what `predict` wrote

TWO = Legend(names=("background", "nucleus"), values=((0,), (255,)), background=0)


def predicted(root: Path, objects: np.ndarray | None) -> tuple[Path, Path]:
    """A folder as `predict` writes it, of one case, with or without a map of its objects; and the truth."""
    truth = squares()
    save(root / "truth" / "a.tif", truth.astype(np.uint16))
    save(root / "out" / "a.png", (truth > 0).astype(np.uint8) * 255)
    save(root / "out" / "uncertainty" / "a.tif", np.zeros(truth.shape, np.uint8))
    if objects is not None:
        save(root / "out" / "instances" / "a.tif", objects.astype(np.uint32))
    write_listing(root / "out", Listing(legend=TWO, entries={"a.png": Entry(case="a", image="a.tif")}))
    return root / "out", root / "truth"


def test_of_a_folder_of_predictions_the_maps_of_objects_are_scored(tmp_path: Path) -> None:
    predictions, truth = predicted(tmp_path, squares(first=70_000))
    for place in (predictions, predictions / "a.png", predictions / "instances", predictions / "instances" / "a.tif"):
        [found] = evaluate(place, truth if place.is_dir() else truth / "a.tif", instances=True)["cases"]
        assert (found["case"], found["objects_found"], found["ap"]) == ("a", 16, 1)


def test_classes_are_scored_as_before_beside_maps_that_predict_wrote(tmp_path: Path) -> None:
    predictions, _ = predicted(tmp_path, squares())
    save(tmp_path / "classes" / "a.png", (squares() > 0).astype(np.uint8) * 255)
    with pytest.warns(DataWarning, match="no voxel size"):
        assert evaluate(predictions, tmp_path / "classes")["summary"]["dice"]["mean"] == 1
    save(predictions / "old" / "a.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(DataError, match=r"does not list: old/a\.png"):
        evaluate(predictions, tmp_path / "classes")


def test_labels_that_predict_wrote_are_no_objects(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.png: expected numbers of objects beside it, got labels of background \(0\), nucleus \(255\) alone"
    ):
        evaluate(*predicted(tmp_path, None), instances=True)


def test_a_store_holds_classes_and_objects(tmp_path: Path) -> None:
    truth = squares()
    like = volume_of(as_image(truth[None].astype(np.uint16), Path("a.tif"), (1.0, 1.0)))
    for name, array in (("prediction", (truth > 0).astype(np.uint8)), ("instances", squares(first=9).astype(np.uint32))):
        target = create_labels(tmp_path / "out" / "a.ome.zarr", name, truth.shape, array.dtype, (32, 32))
        target[:, :] = array
        finish(tmp_path / "out" / "a.ome.zarr", name, like=like, values=None, source="a.tif")
    save(tmp_path / "objects" / "a.tif", truth.astype(np.uint16))
    save(tmp_path / "classes" / "a.png", (truth > 0).astype(np.uint8))
    for place in (tmp_path / "out", tmp_path / "out" / "a.ome.zarr", tmp_path / "out" / "a.ome.zarr" / "labels" / "instances"):
        other = tmp_path / "objects" if place.name == "out" else tmp_path / "objects" / "a.tif"
        assert evaluate(place, other, instances=True)["summary"]["ap"]["mean"] == 1
    with pytest.warns(DataWarning, match="no voxel size"):
        assert evaluate(tmp_path / "out", tmp_path / "classes")["summary"]["dice"]["mean"] == 1


# what is refused or doubted


def test_masks_of_a_class_are_warned_of_as_one_object(tmp_path: Path) -> None:
    truth = squares()
    mask, numbered = (save(tmp_path / f"{n}.png", a) for n, a in (("m", (truth > 0).astype(np.uint8)), ("n", truth.astype(np.uint8))))
    with pytest.warns(DataWarning, match=r"m\.png: no file has more than one value beside 0"):
        evaluate(numbered, mask, instances=True)
    with pytest.warns(DataWarning, match=r"m\.png: no file has more"):
        evaluate(mask, numbered, instances=True)


def test_a_tolerance_beside_objects_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"none beside --instances, got 2 mm"):
        evaluate(*folders, tolerance_mm=2.0, instances=True)


def test_errors_name_the_file(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    tifffile.imwrite(truth / "b.tif", np.full((32, 32), -1, np.int16))
    with pytest.raises(DataError, match=r"b\.tif: expected an annotated voxel"):
        evaluate(predictions, truth, instances=True)
    tifffile.imwrite(predictions / "a.tif", np.zeros((32, 31), np.uint16))
    with pytest.raises(DataError, match=r"a\.tif: expected the shape of .*32×32, got 32×31"):
        evaluate(predictions, truth, instances=True)
    tifffile.imwrite(predictions / "a.tif", np.full((32, 32), 0.5, np.float32))
    with pytest.raises(DataError, match=r"a\.tif: expected whole numbers.*got 0\.5"):
        evaluate(predictions, truth, instances=True)
    (predictions / "a.tif").unlink()
    with pytest.raises(DataError, match=r"none for 1: a"):
        evaluate(predictions, truth, instances=True)


# the command


def test_the_command_writes_numbers_and_a_page(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, page = tmp_path / "s.json", tmp_path / "s.html"
    words = ["microtome", "evaluate", *map(str, folders), "--instances", "--json", str(target), "--html", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    scores = json.loads(target.read_text())
    assert set(scores) == {"summary", "classes", "cases", "worst", "objects", "conventions", "versions"}
    assert set(scores["summary"]) == set(METRICS)
    assert scores["summary"]["ap50"].keys() >= {"mean", "low", "high"}
    assert "data:image/jpeg;base64," in page.read_text()


# real data


def test_a_real_case_of_nuclei_scores_as_scikit_image_says(data_folder: Callable[[str], Path], tmp_path: Path) -> None:
    name = "00071198d059ba7f5914a526d124d28e6d010c92466da21d4a04cd5413362552"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to(data_folder("dsb2018") / "stage1_train" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        dataset = open_dataset(tmp_path / "data")
        truth = dataset.read_instances(dataset.cases[0])
        assert truth is not None
        prediction = np.roll(truth, 2, axis=0)
        prediction[prediction == 5] = 6
        save(tmp_path / "out" / f"{name}.tif", prediction.astype(np.uint16))
        result = evaluate(tmp_path / "out", tmp_path / "data", instances=True, pictures=True)
    [found] = result["cases"]
    assert found["objects_truth"] == len(np.unique(truth)) - 1 > 20
    assert found["arand"] == pytest.approx(adapted_rand_error(truth, prediction)[0], rel=1e-12)
    assert [found["voi_split"], found["voi_merge"]] == pytest.approx(list(variation_of_information(truth, prediction)))
    assert 0.2 < found["ap"] < found["ap50"] <= 1
    assert result["pictures"][0]["width"] > 0
