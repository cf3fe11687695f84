import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.data.legend import Legend
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.evaluation.evaluate import METRICS, CaseScore, evaluate, score_case, summarise
from microtome.evaluation.pages import scores_html
from microtome.evaluation.pairing import Named, bare_name, pair
from microtome.evaluation.units import Units
from microtome.files import write_json
from microtome.geometry import affine_from_spacing
from microtome.images.files import write_image
from microtome.images.image import Image

NAN = math.nan
in_voxels = pytest.mark.filterwarnings("ignore:.*voxel size:microtome.errors.DataWarning", "ignore:.*spacing:microtome.errors.DataWarning")


def legend_of(*names: str, background: int | None = 0) -> Legend:
    values = tuple((index,) for index in range(len(names)))
    return Legend(names=names, values=values, ignored=(), kind="values", background=background, reason="for the test")


THREE = legend_of("nothing", "cell", "wall")


def save(path: Path, array: np.ndarray, spacing_mm: tuple[float, ...] | None = None) -> Path:
    """A label file of the format that the suffix says, with a voxel size where one is given."""
    kind = "nifti" if path.name.endswith(".nii.gz") else "tiff" if path.suffix == ".tif" else "png"
    spacing = spacing_mm or (1.0,) * array.ndim
    axes = "CZYX" if array.ndim == 3 else "CYX"
    image = Image(
        array=array[None],
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes=axes,
        path=path,
        format=kind,
        spacing_known=spacing_mm is not None,
    )
    write_image(path, image)
    return path


def blocks(seed: int = 0, shape: tuple[int, ...] = (4, 8, 8)) -> np.ndarray:
    """A label map in which the classes 0, 1, 2 all occur in blocks."""
    rng = np.random.default_rng(seed)
    small = rng.permuted(np.arange(math.prod(size // 2 for size in shape)) % 3).reshape([size // 2 for size in shape])
    for axis in range(len(shape)):
        small = small.repeat(2, axis=axis)
    return small.astype(np.uint8)


def row(case: str, name: str, **values: float) -> CaseScore:
    """A row of which only some numbers matter."""
    truth = values.pop("truth", 0.0)
    numbers = {**dict.fromkeys(METRICS, NAN), **values}
    return CaseScore(case=case, class_name=name, values=numbers, volume_truth_mm3=truth, tolerance_mm=1.0, axes=3)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases a, b, c; the prediction is right but for one section of a."""
    for name in "abc":
        labels = blocks(ord(name))
        save(tmp_path / "truth" / f"{name}.nii.gz", labels, (2.0, 0.5, 0.5))
        if name == "a":
            labels = labels.copy()
            labels[0] = 0
        save(tmp_path / "predictions" / f"{name}.nii.gz", labels, (2.0, 0.5, 0.5))
    return tmp_path / "predictions", tmp_path / "truth"


# one case


def test_a_case_gets_a_row_for_every_class_with_hand_computed_numbers() -> None:
    truth = np.array([[0, 0, 1, 1], [0, 0, 2, 2]])
    prediction = np.array([[0, 1, 1, 1], [0, 0, 2, 1]])
    rows = score_case(truth, prediction, (1.0, 0.5), THREE, 0.5, case="a")
    assert [(item.case, item.class_name) for item in rows] == [("a", "nothing"), ("a", "cell"), ("a", "wall")]
    cell = rows[1].values
    assert set(cell) == set(METRICS)
    assert cell["dice"] == pytest.approx(2 * 2 / (2 + 4))
    assert cell["iou"] == pytest.approx(2 / 4)
    assert cell["precision"] == pytest.approx(2 / 4)
    assert cell["recall"] == 1
    assert cell["volume_mm3"] == pytest.approx(4 * 0.5)
    assert rows[1].volume_truth_mm3 == pytest.approx(2 * 0.5)
    # The voxel left of the truth is half a millimetre away, the one below it a whole one.
    assert cell["assd_mm"] == pytest.approx((0.5 + 1.0) / 6)
    assert cell["nsd"] == pytest.approx(5 / 6)
    assert {item.values["pixel_accuracy"] for item in rows} == {6 / 8}


def test_the_tolerance_is_the_largest_voxel_side_unless_one_is_given() -> None:
    truth = blocks()
    assert {item.tolerance_mm for item in score_case(truth, truth, (2.5, 0.5, 0.7), THREE)} == {2.5}
    assert {item.tolerance_mm for item in score_case(truth, truth, (2.5, 0.5, 0.7), THREE, 0.0)} == {0.0}


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_what_is_predicted_where_nothing_is_annotated_changes_no_number(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = blocks(seed).astype(np.int16)
    truth[rng.random(truth.shape) < 0.4] = -1
    truth[0, 0, 0] = 1
    prediction = blocks(seed + 1).astype(np.int16)
    other = np.where(truth == -1, rng.integers(-1, 3, truth.shape), prediction)
    before, after = (score_case(truth, maps, (2.0, 1.0, 1.0), THREE) for maps in (prediction, other))
    assert json.dumps([item.to_json() for item in before]) == json.dumps([item.to_json() for item in after])


def test_what_is_predicted_where_something_is_annotated_does_change_the_numbers() -> None:
    truth = blocks()
    other = truth.copy()
    other[1, 3, 3] = (truth[1, 3, 3] + 1) % 3
    assert score_case(truth, other, (1.0,) * 3, THREE)[0].values["pixel_accuracy"] == pytest.approx(255 / 256)


def test_no_class_predicted_is_wrong_for_every_class() -> None:
    truth = np.array([[1, 1, 2, 2]])
    rows = score_case(truth, np.array([[1, -1, 2, 2]]), (1.0, 1.0), THREE)
    assert rows[1].values["recall"] == 0.5
    assert rows[0].values["pixel_accuracy"] == 0.75


def test_a_case_in_which_nothing_is_annotated_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match=r"blank has no annotated voxel"):
        score_case(np.full((3, 3), -1), np.zeros((3, 3), int), (1.0, 1.0), THREE, case="blank")


# the summary


def test_the_summary_is_over_foreground_classes_of_a_case_and_then_over_cases() -> None:
    rows = [
        *(row("a", "nothing", dice=0.99), row("a", "cell", dice=0.2), row("a", "wall", dice=0.4)),
        *(row("b", "nothing", dice=0.99), row("b", "cell", dice=0.9), row("b", "wall")),
    ]
    result = summarise(rows, THREE)
    # Case a has 0.3, case b 0.9 (its wall is undefined); two cases resample to 0.3, 0.6 and 0.9.
    expected = {"mean": 0.6, "low": 0.3, "high": 0.9, "cases": 2, "undefined": 1}
    assert result["summary"]["dice"] == pytest.approx(expected)
    assert result["summary"]["nsd"] == {"mean": None, "low": None, "high": None, "cases": 0, "undefined": 4}
    assert result["worst"] == ["a", "b"]


def test_without_a_background_every_class_is_foreground() -> None:
    rows = [row("a", "left", dice=0.2), row("a", "right", dice=0.6)]
    result = summarise(rows, legend_of("left", "right", background=None))
    assert result["summary"]["dice"]["mean"] == pytest.approx(0.4)
    assert result["summary"]["dice"]["low"] is None
    assert result["conventions"]["foreground"] == ["left", "right"]


def test_a_class_has_mean_sd_median_and_worst_over_its_cases_and_counts_the_undefined() -> None:
    dice, distance = (0.9, 0.5, 0.7, NAN), (1.0, 8.0, 3.0, NAN)
    rows = [row(case, "cell", dice=d, hd95_mm=h) for case, d, h in zip("abcd", dice, distance, strict=True)]
    scores = summarise(rows, THREE)["classes"]["cell"]
    expected = {"mean": 0.7, "sd": 0.2, "median": 0.7, "worst": 0.5, "worst_case": "b", "undefined": 1}
    assert scores["dice"] == {**expected, "mean": pytest.approx(0.7), "sd": pytest.approx(0.2)}
    assert scores["hd95_mm"]["worst"] == 8.0
    assert scores["hd95_mm"]["undefined"] == 1
    assert scores["nsd"] == {"mean": None, "sd": None, "median": None, "worst": None, "worst_case": None, "undefined": 4}


def test_the_worst_volume_is_the_one_furthest_from_the_truth() -> None:
    rows = [row("a", "cell", volume_mm3=100.0, truth=101.0), row("b", "cell", volume_mm3=50.0, truth=20.0)]
    scores = summarise(rows, THREE)["classes"]["cell"]["volume_mm3"]
    assert (scores["worst"], scores["worst_case"]) == (50.0, "b")


def test_a_case_without_foreground_comes_after_the_bad_ones() -> None:
    rows = [row("empty", "cell"), row("good", "cell", dice=0.9), row("bad", "cell", dice=0.1)]
    assert summarise(rows, THREE)["worst"] == ["bad", "good", "empty"]


def test_conventions_name_the_tolerance_the_unit_and_every_row_of_emptiness() -> None:
    truth = blocks()
    rows = [item for case, side in (("a", 1.0), ("b", 3.0)) for item in score_case(truth, truth, (side, 1.0, 1.0), THREE, case=case)]
    conventions = summarise(rows, THREE, in_voxels=["b"])["conventions"]
    assert conventions["tolerance_mm"] == [1.0, 3.0]
    assert conventions["tolerance"].startswith("the largest voxel side")
    assert conventions["unit"] == "mm, except in the cases of `in_voxels`"
    assert set(conventions["empty_cases"]) == {"both_empty", "truth_empty", "prediction_empty"}
    assert summarise(rows, THREE)["conventions"]["unit"] == "mm"
    assert summarise(rows, THREE, in_voxels=["a", "b"])["conventions"]["unit"] == "voxel"


def test_of_pictures_areas_are_scored_and_of_volumes_volumes() -> None:
    picture, volume = (score_case(truth, truth, (1.0,) * truth.ndim, THREE, case=str(truth.ndim)) for truth in (blocks()[0], blocks()))
    axes = [summarise(rows, THREE)["conventions"]["axes"] for rows in (picture, volume, picture + volume)]
    assert axes == [2, 3, None]


@pytest.mark.parametrize(
    ("axes", "unit", "words"),
    [
        (2, "mm", ("mm", "mm²", "area", "pixel")),
        (2, "voxel", ("pixels", "pixels", "area", "pixel")),
        (3, "mm", ("mm", "mm³", "volume", "voxel")),
        (3, "voxel", ("voxels", "voxels", "volume", "voxel")),
        (3, "mm, except in the cases of `in_voxels`", ("mm or voxels", "mm³ or voxels", "volume", "voxel")),
        (None, "mm", ("mm", "mm³", "volume", "voxel")),
    ],
)
def test_tables_say_what_their_numbers_are_in(axes: int | None, unit: str, words: tuple[str, ...]) -> None:
    assert Units.of({"axes": axes, "unit": unit}) == words


# folders


def test_two_folders_are_scored_with_the_voxel_size_of_the_truth(folders: tuple[Path, Path]) -> None:
    result = evaluate(*folders)
    assert set(result) == {"summary", "classes", "cases", "worst", "conventions", "versions"}
    assert set(result["summary"]) == set(METRICS)
    assert len(result["cases"]) == 3 * 3
    assert result["worst"][0] == "a"
    assert result["conventions"]["tolerance_mm"] == 2.0
    by_name = {(item["case"], item["class"]): item for item in result["cases"]}
    assert all(by_name["b", name]["dice"] == 1 for name in result["classes"])
    voxels = np.count_nonzero(blocks(ord("b")) == 1)
    assert by_name["b", list(result["classes"])[1]]["volume_mm3"] == pytest.approx(voxels * 0.5)
    json.dumps(result, allow_nan=False)


def test_the_tolerance_may_be_given(folders: tuple[Path, Path]) -> None:
    assert evaluate(*folders, tolerance_mm=0.5)["conventions"]["tolerance_mm"] == 0.5
    with pytest.raises(ConfigError, match=r"got -1"):
        evaluate(*folders, tolerance_mm=-1.0)


def test_a_missing_prediction_is_an_error_that_names_the_case(folders: tuple[Path, Path]) -> None:
    (folders[0] / "b.nii.gz").unlink()
    with pytest.raises(DataError, match=r"for each of 3 cases, got none for 1: b;"):
        evaluate(*folders)


def test_a_prediction_without_truth_is_an_error_that_names_it(folders: tuple[Path, Path]) -> None:
    (folders[1] / "b.nii.gz").unlink()
    with pytest.raises(DataError, match=r"got none for 1: b\.nii\.gz;"):
        evaluate(*folders)


def test_a_prediction_of_another_shape_is_an_error_that_names_both(folders: tuple[Path, Path]) -> None:
    save(folders[0] / "b.nii.gz", blocks(1, (6, 8, 8)), (2.0, 0.5, 0.5))
    with pytest.raises(DataError, match=r"predictions/b\.nii\.gz: .*truth/b\.nii\.gz, 4×8×8, got 6×8×8"):
        evaluate(*folders)


def test_a_value_that_the_legend_does_not_know_is_an_error_that_names_file_and_value(folders: tuple[Path, Path]) -> None:
    labels = blocks(ord("b"))
    labels[0, 0, 0] = 77
    save(folders[0] / "b.nii.gz", labels, (2.0, 0.5, 0.5))
    with pytest.raises(DataError, match=r"predictions/b\.nii\.gz.*77"):
        evaluate(*folders)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*nothing there"):
        evaluate(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "truth").mkdir()
    save(tmp_path / "truth" / "a.nii.gz", blocks(), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"empty: expected label images, got none"):
        evaluate(tmp_path / "empty", tmp_path / "truth")


def test_two_files_are_a_pair_whatever_they_are_called(tmp_path: Path) -> None:
    truth = save(tmp_path / "x" / "expert.nii.gz", blocks(1), (1.0, 1.0, 1.0))
    prediction = save(tmp_path / "y" / "network.nii.gz", blocks(1), (1.0, 1.0, 1.0))
    result = evaluate(prediction, truth)
    assert result["summary"]["dice"]["mean"] == 1
    assert result["worst"] == ["expert"]


@in_voxels
def test_unknown_voxel_sizes_are_warned_of_once_and_distances_are_in_voxels(tmp_path: Path) -> None:
    for name in "ab":
        for folder in ("truth", "predictions"):
            save(tmp_path / folder / f"{name}.png", blocks(1, (8, 8)))
    with pytest.warns(DataWarning, match=r"2 of 2 cases have no voxel size \(first: a\)"):
        result = evaluate(tmp_path / "predictions", tmp_path / "truth")
    assert result["conventions"]["unit"] == "voxel"
    assert result["conventions"]["in_voxels"] == ["a", "b"]


def dataset_of_three_classes(root: Path, *, spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
    """images/ and labels/ of two cases with named values 0, 5, 9 and 255 for what is not annotated."""
    for index, name in enumerate(("case_1", "case_2")):
        labels = np.array([0, 5, 9], np.uint8)[blocks(index)]
        labels[0, :2] = 255
        save(root / "images" / f"{name}.nii.gz", np.random.default_rng(index).normal(size=labels.shape).astype(np.float32), spacing_mm)
        save(root / "labels" / f"{name}.nii.gz", labels, spacing_mm)
    (root / "microtome.yaml").write_text("classes: {nothing: 0, cell: 5, wall: 9}\nnot_annotated: 255\n")


def predict_for(folder: Path) -> None:
    """What a perfect network would write for that dataset, wrong only where nothing is annotated."""
    for index, name in enumerate(("case_1", "case_2")):
        save(folder / f"{name}.nii.gz", np.array([0, 5, 9], np.uint8)[blocks(index)], (1.0, 1.0, 1.0))


def test_the_truth_may_be_a_dataset_with_a_legend_of_its_own(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    predict_for(tmp_path / "out")
    result = evaluate(tmp_path / "out", tmp_path / "data")
    assert list(result["classes"]) == ["nothing", "cell", "wall"]
    assert result["summary"]["dice"]["mean"] == result["summary"]["pixel_accuracy"]["mean"] == 1
    assert sum(item["volume_truth_mm3"] for item in result["cases"] if item["case"] == "case_1") == 4 * 8 * 8 - 2 * 8


@in_voxels
@pytest.mark.parametrize(("described", "drawn"), [("group_by: '(.)_'", "groups (2 groups of 4 cases"), ("{}", "cases,")])
def test_intervals_resample_the_groups_of_a_dataset(tmp_path: Path, described: str, drawn: str) -> None:
    truth = np.zeros((10, 10), np.uint8)
    truth[2:6, 2:6] = 255
    for name, shift in (("a_1", 0), ("a_2", 2), ("b_1", 2), ("b_2", 4)):
        save(tmp_path / "data" / "images" / f"{name}.png", np.arange(100, dtype=np.uint8).reshape(10, 10))
        save(tmp_path / "data" / "masks" / f"{name}.png", truth)
        save(tmp_path / "out" / f"{name}.png", np.roll(truth, shift, axis=1))
    (tmp_path / "data" / "microtome.yaml").write_text(described)
    result = evaluate(tmp_path / "out", tmp_path / "data")
    assert f"bootstrap over {drawn}" in result["conventions"]["interval"]
    # Dice is 1, 1/2, 1/2, 0: the groups' means are 3/4 and 1/4.
    dice = result["summary"]["dice"]
    assert dice["mean"] == pytest.approx(0.5)
    assert ((dice["low"], dice["high"]) == pytest.approx((0.25, 0.75))) == ("group_by" in described)


def test_every_case_of_its_own_group_is_drawn_by_itself() -> None:
    rows = [row(case, "cell", dice=value) for case, value in (("a", 0.2), ("b", 0.6), ("c", 0.7))]
    alone = summarise(rows, THREE, groups={"a": "a", "b": "b", "c": "c"})
    assert alone == summarise(rows, THREE)
    assert "over cases" in alone["conventions"]["interval"]
    assert summarise(rows, THREE, groups={"a": "mouse", "b": "mouse"})["conventions"]["interval"].count("2 groups of 3 cases") == 1


def listing(out: Path, names: tuple[str, ...], **cases: str) -> None:
    """A predictions.json with classes of these names and values 0, 5, 9, ..."""
    legend = Legend(names=names, values=((0,), (5,), (9,), (7,))[: len(names)], ignored=(255,), kind="values", background=0, reason="")
    listed = {f"{file}.nii.gz": {"case": case, "input": f"{case}.nii.gz"} for file, case in cases.items()}
    write_json(out / "predictions.json", {"legend": legend.to_json(), "cases": listed})


def test_predictions_json_says_which_case_a_file_is_of(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    out = tmp_path / "out"
    predict_for(out)
    (out / "case_1.nii.gz").rename(out / "first.nii.gz")
    (out / "case_2.nii.gz").rename(out / "second.nii.gz")
    listing(out, ("nothing", "cell", "wall"), first="case_1", second="case_2")
    assert evaluate(out, tmp_path / "data")["summary"]["dice"]["mean"] == 1
    (out / "second.nii.gz").unlink()
    with pytest.raises(DataError, match=r"none for 1: case_2"):
        evaluate(out, tmp_path / "data")
    listing(out, ("nothing", "cell", "wall"), first="case_1", second="case_1")
    with pytest.raises(DataError, match=r"one prediction of case_1, got first\.nii\.gz and second\.nii\.gz"):
        evaluate(out, tmp_path / "data")


def test_a_label_file_that_predictions_json_does_not_list_is_an_error_that_names_it(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    out = tmp_path / "out"
    predict_for(out)
    listing(out, ("nothing", "cell", "wall"), case_1="case_1", case_2="case_2")
    assert evaluate(out, tmp_path / "data")["summary"]["dice"]["mean"] == 1
    save(out / "case_3.nii.gz", blocks(), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"got 1 that predictions\.json does not list: case_3\.nii\.gz"):
        evaluate(out, tmp_path / "data")


def test_predictions_may_know_a_class_that_this_truth_does_not_show_but_not_one_less(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    out = tmp_path / "out"
    predict_for(out)
    more = np.array([0, 5, 9], np.uint8)[blocks(0)]
    more[3, 0, 0] = 7
    save(out / "case_1.nii.gz", more, (1.0, 1.0, 1.0))
    listing(out, ("nothing", "cell", "wall", "vessel"), case_1="case_1", case_2="case_2")
    vessel = evaluate(out, tmp_path / "data")["classes"]["vessel"]
    assert (vessel["precision"]["mean"], vessel["recall"]["mean"], vessel["recall"]["undefined"]) == (0, None, 2)
    listing(out, ("nothing", "cell"), case_1="case_1", case_2="case_2")
    with pytest.raises(DataError, match=r"data: expected label values of nothing \(0\), cell \(5\), got 9;"):
        evaluate(out, tmp_path / "data")


def test_the_voxel_size_of_microtome_yaml_wins_and_must_fit(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    predict_for(tmp_path / "out")
    described = (tmp_path / "data" / "microtome.yaml").read_text()
    (tmp_path / "data" / "microtome.yaml").write_text(described + "spacing_mm: [4, 0.5, 0.5]\n")
    result = evaluate(tmp_path / "out", tmp_path / "data")
    assert result["conventions"]["tolerance_mm"] == 4.0
    assert sum(item["volume_truth_mm3"] for item in result["cases"] if item["case"] == "case_1") == 4 * 8 * 8 - 2 * 8
    (tmp_path / "data" / "microtome.yaml").write_text(described + "spacing_mm: [0.5, 0.5]\n")
    with pytest.raises(ConfigError, match=r"each of the 3 axes of case_1\.nii\.gz, got spacing_mm \[0\.5, 0\.5\]"):
        evaluate(tmp_path / "out", tmp_path / "data")


def test_a_label_that_cannot_be_read_is_an_error_and_not_a_case_less(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    predict_for(tmp_path / "out")
    path = tmp_path / "data" / "labels" / "case_2.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"case_2\.nii\.gz"):
        evaluate(tmp_path / "out", tmp_path / "data")


@in_voxels
def test_one_mask_an_object_is_scored_as_one_class(tmp_path: Path) -> None:
    for name in ("n1", "n2"):
        nuclei = np.zeros((2, 16, 16), np.uint8)
        nuclei[0, 2:6, 2:6] = nuclei[1, 9:14, 9:14] = 255
        save(tmp_path / "data" / name / "images" / f"{name}.png", np.random.default_rng(1).integers(0, 255, (16, 16)).astype(np.uint8))
        for number, mask in enumerate(nuclei):
            save(tmp_path / "data" / name / "masks" / f"{name}{number}.png", mask)
        save(tmp_path / "out" / f"{name}.png", nuclei.max(axis=0) * np.tri(16, dtype=np.uint8))
    result = evaluate(tmp_path / "out", tmp_path / "data")
    assert len(result["classes"]) == 2
    # The prediction is the lower triangle of both squares: 10 of 16 and 15 of 25 pixels.
    assert result["summary"]["recall"]["mean"] == pytest.approx(25 / 41)
    assert result["summary"]["precision"]["mean"] == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": {"a.png": {}}}', '{"cases": 3}'])
def test_a_predictions_json_that_predict_did_not_write_is_an_error_that_names_it(folders: tuple[Path, Path], text: str) -> None:
    (folders[0] / "predictions.json").write_text(text)
    with pytest.raises(DataError, match=r"predictions\.json: expected (the list|valid JSON)"):
        evaluate(*folders)


def test_a_label_file_in_which_nothing_is_annotated_is_an_error_that_names_it(tmp_path: Path) -> None:
    dataset_of_three_classes(tmp_path / "data")
    predict_for(tmp_path / "out")
    save(tmp_path / "data" / "labels" / "case_2.nii.gz", np.full((4, 8, 8), 255, np.uint8), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"case_2\.nii\.gz: expected an annotated voxel"):
        evaluate(tmp_path / "out", tmp_path / "data")


# names


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("train-volume", "train"),
        ("Train_Labels", "train"),
        ("case_7_pred", "case_7"),
        ("case_7", "case_7"),
        ("mask", "mask"),
        ("predictions", "predictions"),
    ],
)
def test_a_bare_name_has_no_words_of_a_role(name: str, bare: str) -> None:
    assert bare_name(name) == bare


def test_the_same_name_is_preferred_to_the_same_bare_name() -> None:
    files = {"a": Path("a.png"), "a_mask": Path("a_mask.png")}
    truths = [Named(case="a", names=("a",)), Named(case="a_mask", names=("a_mask",))]
    assert pair(files, truths, where=Path("out")) == {"a": Path("a.png"), "a_mask": Path("a_mask.png")}


def test_two_files_for_one_case_and_one_file_for_two_cases_are_refused() -> None:
    with pytest.raises(DataError, match=r"one prediction of a, got a_mask\.png, a_pred\.png"):
        pair({"a_mask": Path("a_mask.png"), "a_pred": Path("a_pred.png")}, [Named(case="a", names=("a",))], where=Path("out"))
    twice = [Named(case="a_gt", names=("a_gt",)), Named(case="a_mask", names=("a_mask",))]
    with pytest.raises(DataError, match=r"got a_gt and a_mask"):
        pair({"a": Path("a.png")}, twice, where=Path("out"))


def test_the_error_shows_five_of_many_missing_names() -> None:
    truths = [Named(case=f"case_{index}", names=(f"case_{index}",)) for index in range(9)]
    with pytest.raises(DataError, match=r"none for 8: case_1, case_2, case_3, case_4, case_5 and 3 more;"):
        pair({"case_0": Path("case_0.png")}, truths, where=Path("out"))


# the page


def result_with(case: str) -> dict[str, Any]:
    truth = blocks()
    rows = [
        *score_case(truth, np.where(truth == 1, 0, truth), (1.0,) * 3, THREE, case=case),
        *score_case(truth, truth, (1.0,) * 3, THREE, case="good"),
    ]
    return summarise(rows, THREE, in_voxels=[case])


def test_the_page_shows_the_worst_case_first_and_every_number_and_needs_nothing_else() -> None:
    page = scores_html(result_with("poor"))
    assert page.index('<th scope="row" rowspan="3">poor') < page.index('<th scope="row" rowspan="3">good')
    assert all(
        word in page for word in ("Dice", "HD95 (mm or voxels)", "pixel accuracy", "wall", "1 of 2 cases have no voxel size", "both empty")
    )
    assert not any(word in page for word in ("http:", "https:", "<script", "<link"))


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.0, "0.000"), (4e-6, "4.00e-06"), (0.87654, "0.877"), (12.34, "12.3"), (12345.6, "12,346")]
)
def test_a_number_is_shown_with_the_digits_that_mean_something(value: float | None, shown: str) -> None:
    result = result_with("poor")
    result["summary"]["volume_mm3"]["mean"] = value
    assert f"<span>volume (mm³ or voxels)</span><b>{shown}</b>" in scores_html(result)


def test_a_name_cannot_put_markup_into_the_page() -> None:
    page = scores_html(result_with("<img src=x onerror=alert(1)>"))
    assert "<img" not in page
    assert "&lt;img src=x" in page


# real data


def test_forty_hippocampi_are_scored_in_seconds(data_folder: Callable[[str], Path], tmp_path: Path) -> None:
    labels = sorted((data_folder("hippocampus") / "labels").glob("*.nii.gz"))[:40]
    for folder in ("truth", "predictions"):
        (tmp_path / folder).mkdir()
        for path in labels:
            (tmp_path / folder / path.name).symlink_to(path)
    begin = time.perf_counter()
    result = evaluate(tmp_path / "predictions", tmp_path / "truth")
    assert time.perf_counter() - begin < 20
    assert len(result["cases"]) == 40 * 3
    assert result["summary"]["dice"]["mean"] == result["summary"]["nsd"]["mean"] == 1
    assert result["summary"]["hd95_mm"]["mean"] == 0


@in_voxels
def test_a_prediction_named_after_its_image_finds_the_label_in_its_dataset(data_folder: Callable[[str], Path], tmp_path: Path) -> None:
    root = data_folder("isbi2012")
    (tmp_path / "train-volume.tif").symlink_to(root / "train-labels.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        result = evaluate(tmp_path, root)
    assert result["summary"]["dice"]["mean"] == 1
    assert len(result["classes"]) == 2
