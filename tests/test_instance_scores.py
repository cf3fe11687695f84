import json
import math
from pathlib import Path

import numpy as np
import pytest

from microtome.evaluation import gallery
from microtome.evaluation.evaluate import evaluate
from microtome.evaluation.instance_scores import (
    FALSE_COLOUR,
    FOUND_COLOUR,
    METRICS,
    MISSED_COLOUR,
    ObjectScore,
    draw_objects,
    score_objects,
    summarise_objects,
)
from microtome.evaluation.pages import scores_html
from microtome.terminal import print_scores
from tests.object_maps import as_image, near, pixels_of, squares, write_folders


def row(case: str, **values: float) -> ObjectScore:
    return ObjectScore(
        case=case, class_name="object", values={**dict.fromkeys(METRICS, math.nan), **values}, num_truth=3, num_predicted=2, num_found=1
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_folders(tmp_path)


# rows and summary


def test_a_case_gets_a_row_with_every_metric_and_the_fate_of_its_objects() -> None:
    truth = squares()
    prediction = np.where(truth == 6, 0, truth)
    prediction[14:16, 14:16] = 999
    score = score_objects(truth, prediction, case="a")
    assert tuple(score.values) == METRICS
    assert score.counts == {"truth": 16, "predicted": 16, "found": 15, "missed": 1, "false": 1}
    assert [score.values["ap50"], score.values["ap"]] == pytest.approx([15 / 17] * 2)
    assert score.values["pq"] == pytest.approx(15 / 16)
    assert score.values["seg"] == pytest.approx(15 / 16)
    assert score.values["voi"] == score.values["voi_split"] + score.values["voi_merge"]
    written = score.to_json()
    assert (written["case"], written["class"], written["objects_missed"], written["objects_false"]) == ("a", "object", 1, 1)


def test_an_undefined_number_is_null_and_a_case_without_annotation_is_refused() -> None:
    nothing = np.zeros((4, 4), np.uint8)
    written = score_objects(nothing, nothing, case="a").to_json()
    assert written["pq"] is None
    assert written["voi"] == 0
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    with pytest.raises(ValueError, match="b has no annotated voxel"):
        score_objects(np.full((4, 4), -1), nothing, case="b")


def test_the_summary_has_means_intervals_spreads_and_the_worst_case_by_the_right_end() -> None:
    rows = [row("good", pq=0.9, voi=0.2), row("none"), row("bad", pq=0.3, voi=1.2), row("fair", pq=0.6, voi=0.4)]
    result = summarise_objects(rows)
    assert result["worst"] == ["bad", "fair", "good", "none"]
    assert result["summary"]["pq"]["mean"] == pytest.approx(0.6)
    assert (result["summary"]["pq"]["cases"], result["summary"]["pq"]["undefined"]) == (3, 1)
    assert result["summary"]["pq"]["low"] < 0.6 < result["summary"]["pq"]["high"]
    spread = result["classes"]["object"]
    assert (spread["pq"]["worst"], spread["pq"]["worst_case"], spread["pq"]["median"]) == (0.3, "bad", 0.6)
    assert (spread["voi"]["worst"], spread["voi"]["worst_case"]) == (1.2, "bad")
    assert spread["pq"]["sd"] == pytest.approx(np.std([0.9, 0.3, 0.6], ddof=1))
    assert result["objects"] == {"truth": 12, "predicted": 8, "found": 4, "missed": 8, "false": 4}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_conventions_explain_every_metric_and_every_row_of_emptiness() -> None:
    result = summarise_objects([row("a", pq=1.0)])
    said = " ".join(str(value) for value in result["conventions"].values()) + " ".join(result["conventions"])
    assert [name for name in METRICS if name not in said.lower()] == []
    assert set(result["conventions"]["empty_cases"]) == {"both_empty", "truth_empty", "prediction_empty"}
    assert set(result["versions"]) == {"python", "microtome", "numpy", "scipy"}


def test_intervals_resample_groups() -> None:
    rows = [row(name, pq=value) for name, value in (("a1", 0.1), ("a2", 0.2), ("b", 0.9))]
    result = summarise_objects(rows, groups={"a1": "a", "a2": "a"})
    assert "2 groups of 3 cases" in result["conventions"]["interval"]


# pictures


def test_a_picture_outlines_what_was_found_missed_and_invented() -> None:
    truth = squares((60, 60))
    prediction = np.where(truth == 1, 0, truth)
    prediction[56:60, 52:55] = 999
    drawn = draw_objects(truth, prediction, None, case="a")
    assert (drawn["case"], drawn["section"], drawn["width"], drawn["height"]) == ("a", None, 480, 480)
    expected, found = drawn["panels"]
    scale = 480 // 60
    # The first square lies in the corner; nothing else is missed, and what is false lies at the lower end.
    assert near(expected, MISSED_COLOUR)[: 4 * scale, : 4 * scale].any()
    assert not near(expected, MISSED_COLOUR)[5 * scale :].any()
    assert near(found, FALSE_COLOUR)[56 * scale :, 52 * scale : 55 * scale].any()
    assert not near(found, FALSE_COLOUR)[: 55 * scale].any()
    assert near(expected, FOUND_COLOUR).any()
    assert near(found, FOUND_COLOUR).any()
    # Inside of an object the image is seen.
    assert np.ptp(pixels_of(expected)[8 * scale + 10 : 12 * scale - 10, 8 * scale + 10 : 12 * scale - 10]) < 40


def test_of_a_volume_the_section_with_most_error_is_drawn_over_its_image() -> None:
    truth = np.stack([squares((16, 32))] * 5)
    prediction = truth.copy()
    prediction[3, :, :] = 0
    prediction[3, 10:14, 10:30] = 999
    image = as_image(np.random.default_rng(0).integers(0, 255, (1, *truth.shape), np.uint8), Path("v.tif"), (3.0, 1.0, 2.0))
    drawn = draw_objects(truth, prediction, image)
    assert drawn["section"] == 3
    # Voxels are twice as wide as high, and so is the picture four times as wide.
    assert (drawn["width"], drawn["height"]) == (480, 120)
    assert draw_objects(truth, truth, image)["section"] == 0


def test_what_is_not_annotated_is_dark_and_has_no_outline() -> None:
    truth = squares((32, 32))
    truth[16:] = -1
    drawn = draw_objects(truth, np.zeros_like(truth), None)
    assert pixels_of(drawn["panels"][0])[260:].max() < 40
    assert near(drawn["panels"][0], MISSED_COLOUR)[:240].any()


def test_colours_mean_what_they_mean_in_the_report() -> None:
    assert gallery.ERROR_COLOURS[gallery.MISSED] == MISSED_COLOUR
    assert gallery.ERROR_COLOURS[gallery.INVENTED] == FALSE_COLOUR


# the page and the terminal


def test_the_page_shows_counts_scores_and_pictures_and_needs_nothing_else(folders: tuple[Path, Path]) -> None:
    page = scores_html(evaluate(*folders, instances=True, pictures=True))
    assert page.index('<th scope="row" rowspan="1">c</th>') < page.index('<th scope="row" rowspan="1">a</th>')
    for words in (
        "Of 48 objects 31 were found and 17 missed; of 32 predicted 1",
        "is false",
        "AP50",
        "V-Info",
        "VOI split (bits)",
        "both empty",
    ):
        assert words in page
    assert page.count("<img src=") == 2 * 3
    assert "<td>16</td><td>15</td><td>1</td><td>1</td>" in page
    assert "true volume" not in page
    assert not any(word in page for word in ("http:", "https:", "<script", "<link"))


def test_a_name_cannot_put_markup_into_the_page() -> None:
    hostile = "<b onload=x>"
    result = summarise_objects([row(hostile, pq=0.5)])
    result["pictures"] = [draw_objects(squares(), squares(), None, case=hostile)]
    page = scores_html(result)
    assert hostile not in page
    assert page.count("&lt;b onload=x&gt;") >= 3


def test_the_terminal_says_what_became_of_the_objects(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    print_scores(evaluate(*folders, instances=True))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "worst: c PQ 0.000, 0 of 16 objects found, 16 missed, 0 false" in lines
    assert any(line.startswith("ap50 0.627 [") for line in lines)
    assert "dice" not in " ".join(lines)
