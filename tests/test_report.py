"""The report is one page that says what the run folder says, in every state a run can be in."""

import base64
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from microtome import json_files
from microtome.config import NetworkConfig, Plan, dump_yaml
from microtome.data.case import NOT_ANNOTATED, Case
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.legend import Legend
from microtome.data.split import split_dataset
from microtome.data.synthetic import cells, sparse_annotation, tubules
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.evaluation import curves
from microtome.evaluation import report as report_module
from microtome.evaluation.curves import charts, format_duration, nice_steps, read_history, readable
from microtome.evaluation.gallery import (
    CORRECT,
    ERROR_COLOURS,
    INVENTED,
    MISSED,
    MOST_BYTES,
    WRONG_CLASS,
    Exhibit,
    count_errors,
    draw_case,
    draw_errors,
    draw_filled,
    error_map,
    filled_sections,
    format_share,
    read_predictions,
    worst_section,
)
from microtome.evaluation.report import build_report, cautions, format_setting, lead, plan_rows, read_run
from microtome.evaluation.run_files import MOST_LINE, EnvironmentForm, ScoresForm, read_file
from microtome.evaluation.scores import score_case, summarise
from microtome.files import write_json, write_text
from microtome.geometry import affine_from_spacing
from microtome.images.files import label_suffix, write_image, write_labels
from microtome.images.image import Image

SECTIONS = ("headline", "cases", "scores", "sureness", "curves", "plan", "findings", "legend", "split", "environment", "conventions")
NO_SIZE = "ignore:.*voxel size:microtome.errors.DataWarning"


def image_of(array_S: np.ndarray, path: Path, spacing_mm: tuple[float, ...] | None = None) -> Image:
    """A one-channel image of the format that the suffix says."""
    kinds = {".png": "png", ".tif": "tiff", ".gz": "nifti"}
    spacing = spacing_mm or (1.0,) * array_S.ndim
    return Image(
        array=array_S[None],
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes="CZYX" if array_S.ndim == 3 else "CYX",
        path=path,
        format=kinds[path.suffix],
        spacing_known=spacing_mm is not None,
    )


def save_pair(folder: Path, name: str, image_S: np.ndarray, label_S: np.ndarray, spacing_mm: tuple[float, ...] | None = None) -> None:
    """An image and its label as files of a dataset."""
    for kind, array in (("images", image_S), ("labels", label_S)):
        image = image_of(array.astype(np.uint8), folder / kind / name, spacing_mm)
        write_image(image.path, image)


def plan_of(legend: Legend, dims: int, **changes: Any) -> Plan:
    """A plan with reasons."""
    values = {
        "dims": dims,
        "channels": 1,
        "classes": legend.names,
        "spacing_mm": (1.0,) * dims,
        "network": NetworkConfig(name="modern_unet", widths=(24, 48), strides=((1,) * dims, (2,) * dims)),
        "patch_vox": (32,) * dims,
        "batch": 4,
        "steps": 400,
        "minutes": 10.0,
        "fold": "1/3",
        "reasons": {"batch": "what fits <into> memory", "patch_vox": "covers the median image"},
    }
    return Plan(**{**values, **changes})


def write_log(path: Path, classes: tuple[str, ...], steps: int = 400, ended: bool = True) -> None:
    """A log as training writes it: falling loss, five validations."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1.4 * math.exp(-step / 90) + 0.25 + 0.08 * rng.normal() * math.exp(-step / 300)
        rate = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        lines.append({"event": "step", "step": step, "loss": loss, "learning_rate": rate, "samples_per_second": 9.0, "seconds": 1.2 * step})
        if step % (steps // 5) == 0:
            dice = [round(0.95 - 0.5 * math.exp(-step / 120) - 0.06 * k, 5) for k in range(len(classes))]
            mean = sum(dice[1:]) / (len(dice) - 1)
            lines.append(
                {"event": "validation", "step": step, "dice": mean, "classes": dict(zip(classes, dice, strict=True)), "seconds": 1.2 * step}
            )
    if ended:
        lines.append({"event": "end", "reason": "all steps are done", "step": steps, "seconds": 1.2 * steps + 20, "network_share": 0.93})
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_run(run: Path, dataset: Dataset, plan: Plan, predict: Callable[[np.ndarray], np.ndarray], *, ended: bool = True) -> Path:
    """A run folder as training leaves it, with predictions made from the truth by `predict`."""
    split = split_dataset(dataset, plan.fold, plan.seed)
    findings = [{"severity": f.severity, "code": f.code, "case": f.case, "message": f.message, "files": []} for f in dataset.findings]
    names = {"train": [case.name for case in split.train], "validation": [case.name for case in split.validation]}
    legend = dataset.legend.to_json()
    write_text(run / "plan.yaml", dump_yaml(plan))
    write_json(run / "dataset.json", {"root": str(dataset.root), "layout": dataset.layout, "legend": legend, **names, "findings": findings})
    environment = {"python": "3.11.9", "device": "cpu", "threads": 2, "command": "microtome train <x>"}
    write_json(run / "environment.json", {**environment, "started": "2026-03-04T05:06:07+00:00"})
    write_log(run / "log.jsonl", dataset.legend.names, ended=ended)
    if not ended or not split.validation:
        return run
    rows, listed = [], {}
    for number, case in enumerate(split.validation):
        image, truth = dataset.read_image(case), dataset.read_label(case)
        prediction = predict(truth)
        path = run / "validation" / f"{number}{label_suffix(image)}"
        write_labels(path, dataset.legend.encode(prediction), like=image)
        listed[path.name] = {"case": case.name, "input": str(case.images[0])}
        rows += score_case(truth, prediction, image.spacing_mm, dataset.legend, case=case.name)
    write_json(run / "validation" / "predictions.json", {"legend": legend, "cases": listed})
    write_json(run / "metrics.json", summarise(rows, dataset.legend))
    return run


def shifted(truth: np.ndarray) -> np.ndarray:
    """A prediction that is off by one voxel along the last axis."""
    return np.roll(np.maximum(truth, 0), 1, axis=-1)


def two_dimensional(folder: Path, count: int = 6, names: Callable[[int], str] = "picture_{}".format) -> Dataset:
    """Pictures of three classes: 0 around, a block of 1, a block of 2."""
    for number in range(count):
        label = np.zeros((20, 24), np.uint8)
        label[4 : 9 + number % 3, 3:9] = 1
        label[12:17, 10:20] = 2
        grey = 60 * label + np.arange(24, dtype=np.uint8) + number
        save_pair(folder, f"{names(number)}.png", grey, label)
    write_text(folder / "microtome.yaml", "classes: {around: 0, cell: 1, wall: 2}\n")
    return open_dataset(folder)


def three_dimensional(folder: Path, count: int = 3) -> Dataset:
    """Small volumes with one block of class 1."""
    for number in range(count):
        label = np.zeros((6, 10, 12), np.uint8)
        label[2:5, 3:7, 3 : 8 + number] = 1
        save_pair(folder, f"volume_{number}.nii.gz", 90 * label + 5 + number, label, (2.0, 1.0, 1.0))
    return open_dataset(folder)


@pytest.fixture
def run_2d(tmp_path: Path) -> Path:
    dataset = two_dimensional(tmp_path / "cells")
    return write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 2), shifted)


@pytest.fixture
def run_3d(tmp_path: Path) -> Path:
    dataset = three_dimensional(tmp_path / "organs")
    return write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 3), shifted)


class Page(HTMLParser):
    """A page taken apart: what is open is closed in order, ids, pictures, text, tags."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline", "circle", "link", "input", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.images += [values] if tag == "img" else []
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def picture(values: dict[str, str]) -> np.ndarray:
    """The pixels of an image that is inside of the page."""
    data = base64.b64decode(values["src"].partition("base64,")[2])
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


# The error map.


def test_error_map_of_every_pair_of_classes() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, -1, -1])
    prediction = np.array([0, 1, 2, -1, 0, 1, 2, -1, 1, 1, 0])
    expected = [CORRECT, INVENTED, INVENTED, WRONG_CLASS, MISSED, CORRECT, WRONG_CLASS, MISSED, WRONG_CLASS, NOT_ANNOTATED, NOT_ANNOTATED]
    assert error_map(truth, prediction, 0).tolist() == expected


def test_without_background_every_difference_is_a_wrong_class() -> None:
    assert error_map(np.array([0, 1, 1, 0, -1]), np.array([0, 0, -1, 1, 0]), None).tolist() == [
        CORRECT,
        WRONG_CLASS,
        WRONG_CLASS,
        WRONG_CLASS,
        NOT_ANNOTATED,
    ]


def test_counts_are_those_counted_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1], [2, 2, -1, -1]])
    prediction = np.array([[0, 1, 0, 1], [1, 2, 0, 1]])
    counts = count_errors(error_map(truth, prediction, 0))
    assert (counts.correct, counts.missed, counts.invented, counts.wrong_class) == (3, 1, 1, 1)
    assert (counts.wrong, counts.annotated) == (3, 6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 1]))
def test_errors_are_where_annotated_classes_differ(seed: int, background: int | None) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(-1, 3, (2, 4, 5))
    errors = error_map(truth, prediction, background)
    counts = count_errors(errors)
    assert np.array_equal(errors > CORRECT, (truth != prediction) & (truth != NOT_ANNOTATED))
    assert counts.annotated == np.count_nonzero(truth != NOT_ANNOTATED)


def test_worst_section_has_most_errors_else_most_annotations() -> None:
    errors = np.zeros((4, 2, 2), np.int16)
    errors[0] = NOT_ANNOTATED
    errors[0, 0, 0] = CORRECT
    assert worst_section(errors) == 1
    errors[2, 0] = [MISSED, INVENTED]
    errors[3, 0, 0] = WRONG_CLASS
    assert worst_section(errors) == 2


def test_drawn_errors_are_coloured_where_they_are_and_grey_elsewhere() -> None:
    rgb = np.full((1, 5, 3), [200, 100, 50], np.uint8)
    drawn = draw_errors(rgb, np.array([[CORRECT, MISSED, INVENTED, WRONG_CLASS, NOT_ANNOTATED]]))
    assert np.ptp(drawn[0, 0]) == 0
    assert np.ptp(drawn[0, 4]) == 0
    assert drawn[0, 4, 0] < drawn[0, 0, 0] < 200
    for place, kind in enumerate((MISSED, INVENTED, WRONG_CLASS), start=1):
        assert np.abs(drawn[0, place].astype(int) - ERROR_COLOURS[kind]).max() <= 52


@pytest.mark.parametrize(("part", "whole", "words"), [(0, 9, "0.0 %"), (1, 3000, "less than 0.1 %"), (1, 8, "12.5 %"), (0, 0, "0.0 %")])
def test_share_never_hides_what_is_there(part: int, whole: int, words: str) -> None:
    assert format_share(part, whole).replace("\N{NO-BREAK SPACE}", " ") == words


def exhibit_of(
    image: Image, truth: np.ndarray, prediction: np.ndarray, *, sections: tuple[int, int] | None = None, channels: int = 1
) -> Exhibit:
    legend = Legend(names=("around", "cell"), values=((0,), (1,)), background=0)
    names = tuple(f"channel {n}" for n in range(1, channels + 1))
    dataset = Dataset(root=Path("data"), layout="", cases=(), legend=legend, channel_names=names)
    return draw_case(Case(name="a", images=(image.path,), sections=sections), image, truth, prediction, dataset)


def test_exhibit_of_a_stack_names_the_section_of_the_whole_stack() -> None:
    truth = np.zeros((5, 8, 8), np.int16)
    prediction = truth.copy()
    prediction[3, 2, 2:5] = 1
    prediction[4, 2, 2] = 1
    shown = exhibit_of(image_of(np.zeros((5, 8, 8), np.uint8), Path("a.tif")), truth, prediction, sections=(20, 25))
    assert (shown.section, shown.sections) == (23, (20, 25))
    assert (shown.counts.invented, shown.shown.invented) == (4, 3)
    assert shown.where.startswith("section 23 of 20 to 24 (counted from 0), the one with most error: 75.0")
    assert shown.dice == (("cell", 0.0),)


def test_dice_of_an_exhibit_leaves_out_what_is_not_annotated() -> None:
    truth = np.array([[1, 1, 0, -1]], np.int16)
    shown = exhibit_of(image_of(np.zeros((1, 4), np.uint8), Path("a.png")), truth, np.array([[1, 0, 0, 1]], np.int16))
    assert shown.dice == (("cell", 2 / 3),)
    assert (shown.section, shown.where, shown.directions) == (None, "", "")


def test_patients_are_shown_anterior_up_and_right_on_the_left() -> None:
    # Y grows towards anterior and X towards the patient's right, so the last row is at the top and the last column at the left.
    grey = np.zeros((2, 8, 8), np.uint8)
    grey[:, 7, 7] = 255
    affine = np.array([[0, 0, 1.0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    image = Image(array=grey[None], spacing_mm=(1.0, 1.0, 1.0), affine=affine, axes="CZYX", path=Path("a.nii.gz"), format="nifti")
    shown = exhibit_of(image, np.zeros((2, 8, 8), np.int16), np.zeros((2, 8, 8), np.int16))
    pixels = np.asarray(PIL.Image.open(io.BytesIO(shown.panels[0])))
    assert shown.directions == "anterior is at the top, the patient's right at the left"
    assert pixels[8, 8, 0] > 200
    assert pixels[8, -8, 0] < 60
    turned = exhibit_of(Image(**{**vars(image), "affine": affine @ np.diag([1, -1, -1, 1.0])}), *np.zeros((2, 2, 8, 8), np.int16))
    assert np.asarray(PIL.Image.open(io.BytesIO(turned.panels[0])))[-8, -8, 0] > 200
    assert turned.directions == shown.directions


def test_of_several_channels_the_first_is_shown_and_named() -> None:
    image = image_of(np.zeros((4, 4), np.uint8), Path("a.png"))
    many = Image(**{**vars(image), "array": np.zeros((4, 4, 4), np.uint8)})
    colour = Image(**{**vars(image), "array": np.zeros((3, 4, 4), np.uint8)})
    flat = np.zeros((4, 4), np.int16)
    assert exhibit_of(many, flat, flat, channels=4).channel == "channel 1"
    assert exhibit_of(colour, flat, flat, channels=3).channel == ""
    assert exhibit_of(image, flat, flat).channel == ""


def test_pictures_keep_their_shape_in_mm_and_even_noise_stays_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 500, 500), np.uint8)
    image = image_of(np.zeros((500, 500), np.uint8), Path("a.tif"), (2.0, 1.0))
    shown = exhibit_of(Image(**{**vars(image), "array": noise}), *np.zeros((2, 500, 500), np.int16), channels=3)
    assert shown.size == (210, 420)
    assert max(len(panel) for panel in shown.panels) <= MOST_BYTES


# The course of the run.


def test_history_of_no_log_and_of_an_empty_one_is_empty(tmp_path: Path) -> None:
    write_text(tmp_path / "log.jsonl", "")
    for path in (tmp_path / "none.jsonl", tmp_path / "log.jsonl"):
        history = read_history(path)
        assert (history.last_step, history.total_seconds, history.end, history.best) == (0, None, None, None)
        assert charts(history, {"cell": (1, 2, 3)}) == ()


def test_a_log_of_any_length_is_read_and_a_line_without_end_is_none(tmp_path: Path) -> None:
    step = '{"event": "step", "step": %d, "loss": 1.0, "learning_rate": 0.1, "seconds": %d.0}\n'
    with (tmp_path / "log.jsonl").open("w") as file:
        file.writelines((step % (1, 1), "0" * 3 * MOST_LINE + "\n", step % (2, 2)))
        # 300 MB that take no room on the disk, as a power cut may leave them.
        file.truncate(300 * 2**20)
        file.seek(0, 2)
        file.write("\n" + step % (3, 3))
    history = read_history(tmp_path / "log.jsonl")
    assert history.steps.tolist() == history.seconds.tolist() == [1, 2, 3]


def test_a_line_without_end_is_one_line_in_the_number_of_a_later_one(tmp_path: Path) -> None:
    lines = ["0" * 3 * MOST_LINE, "0" * (MOST_LINE - 1), '{"event": "step", "step": -1}']
    write_text(tmp_path / "log.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match=r"log\.jsonl:3: "):
        read_history(tmp_path / "log.jsonl")


@pytest.mark.parametrize(
    ("more", "got"),
    [
        ('{"event": "step", "step": 3}', "3 and 2"),
        ('{"event": "validation", "step": 2, "dice": 0.5, "classes": {"a": 0.5, "b": null}}', "2 and 5"),
    ],
)
def test_more_steps_or_scores_than_a_training_makes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, got: str
) -> None:
    monkeypatch.setattr(curves, "MOST_STEPS", 2)
    monkeypatch.setattr(curves, "MOST_SCORES", 4)
    lines = ['{"event": "step", "step": 1}', '{"event": "step", "step": 2}']
    lines.append('{"event": "validation", "step": 2, "dice": 0.5, "classes": {"a": 0.5}}')
    write_text(tmp_path / "log.jsonl", "\n".join(lines))
    assert read_history(tmp_path / "log.jsonl").last_step == 2
    write_text(tmp_path / "log.jsonl", "\n".join([*lines, more]))
    with pytest.raises(DataError, match=rf"log\.jsonl: expected at most 2 steps and 4 scores of validations, got {got} or more"):
        read_history(tmp_path / "log.jsonl")


def test_a_large_file_of_more_values_than_rows_have_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MOST_BYTES", 100)
    monkeypatch.setattr(json_files, "MOST_OWN_VALUES", 40)
    path = tmp_path / "metrics.json"
    empty: dict[str, Any] = {"cases": [], "conventions": {"foreground": []}}
    write_text(path, json.dumps(empty | {"x": [[]] * 17}))
    assert path.stat().st_size > 100
    # 22 brackets that open, and 18 commas.
    assert read_file(path, ScoresForm) is not None
    write_text(path, json.dumps(empty | {"x": [[]] * 18}))
    with pytest.raises(DataError, match=r"metrics\.json: expected valid JSON, got 42 values, of at most 40"):
        read_file(path, ScoresForm)


def test_what_does_not_grow_with_the_cases_may_not_be_large(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_bytes(b"{}")
    os.truncate(tmp_path / "environment.json", json_files.MOST_BYTES + 1)
    with pytest.raises(DataError, match=r"environment\.json: expected valid JSON, got 33554433 bytes, of at most 33554432"):
        read_file(tmp_path / "environment.json", EnvironmentForm)


def test_scores_of_more_bytes_than_a_document_of_strangers_may_have_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    document: dict[str, Any] = {
        "cases": [{"case": "a", "class": "cell", "dice": 0.5, "iou": None}],
        "conventions": {"foreground": ["cell"]},
    }
    write_text(path, json.dumps(document) + " " * 40_000_000)
    assert path.stat().st_size > json_files.MOST_BYTES
    assert read_file(path, ScoresForm) == document
    os.truncate(path, json_files.MOST_OWN_BYTES + 1)
    with pytest.raises(DataError, match=r"metrics\.json: expected valid JSON, got 268435457 bytes, of at most 268435456"):
        read_file(path, ScoresForm)


def test_history_leaves_out_a_line_that_was_cut_off(tmp_path: Path) -> None:
    lines = [
        '{"event": "step", "step": 1, "loss": 2.0, "learning_rate": 0.1, "seconds": 3.0}',
        '{"event": "schedule", "step": 1, "steps": 70, "seconds": 3.5}',
        '{"event": "validation", "step": 1, "dice": 0.5, "classes": {"cell": 0.5}, "seconds": 4.0}',
        '{"event": "validation", "step": 2, "dice": 0.5, "classes": {"cell": null}, "seconds": 5.0}',
        '{"event": "step", "step": 2, "lo',
    ]
    write_text(tmp_path / "log.jsonl", "\n".join(lines))
    history = read_history(tmp_path / "log.jsonl")
    assert (history.last_step, history.total_seconds, history.planned_steps, history.end) == (1, 5.0, 70, None)
    assert history.losses.tolist() == [2.0]
    assert history.best is not None
    assert history.best.step == 2


def test_charts_of_a_run_stay_inside_their_frames(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", ("around", "cell", "wall"), steps=3000)
    drawn = charts(read_history(tmp_path / "log.jsonl"), {"cell": (255, 140, 0), "wall": (0, 190, 255)})
    assert [chart.title for chart in drawn] == ["Training loss", "Validation Dice", "Learning rate"]
    assert [line.name for line in drawn[1].lines] == ["cell", "wall", "mean"]
    assert drawn[1].marker is not None
    assert drawn[1].marker.words == "kept: step 3,000"
    for chart in drawn:
        for line in chart.lines:
            points = np.array([[float(part) for part in point.split(",")] for point in line.points.split()])
            assert len(points) <= 540
            assert points[:, 0].min() >= chart.left
            assert points[:, 0].max() <= chart.right
            assert points[:, 1].min() >= chart.top
            assert points[:, 1].max() <= chart.bottom


def test_dice_axis_is_always_0_to_1_and_points_are_where_they_were_logged(tmp_path: Path) -> None:
    rows = [{"event": "validation", "step": step, "dice": dice, "classes": {"cell": dice}} for step, dice in ((50, 0.25), (100, 0.75))]
    write_text(tmp_path / "log.jsonl", "\n".join(map(json.dumps, rows)))
    (chart,) = charts(read_history(tmp_path / "log.jsonl"), {"cell": (255, 140, 0)})
    height, width = chart.bottom - chart.top, chart.right - chart.left
    assert [tick.words for tick in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [line.name for line in chart.lines] == ["cell"]
    assert chart.lines[0].dots == (
        (chart.left + width / 2, pytest.approx(chart.bottom - 0.25 * height, abs=0.06)),
        (chart.right, pytest.approx(chart.bottom - 0.75 * height, abs=0.06)),
    )


def test_ticks_have_the_time_below_the_step(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", ("around", "cell"), steps=400)
    chart = charts(read_history(tmp_path / "log.jsonl"), {})[0]
    assert [(tick.words, tick.more) for tick in chart.x_ticks][:3] == [("0", ""), ("50", "60 s"), ("100", "2 min")]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 437, 8, [0, 100, 200, 300, 400]),
        (0, 0.002, 2, [0, 0.001, 0.002]),
        (-0.3, 0.3, 6, [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]),
    ],
)
def test_nice_steps(low: float, high: float, most: int, expected: list[float]) -> None:
    assert nice_steps(low, high, most) == expected


@pytest.mark.parametrize(("seconds", "words"), [(4.2, "4 s"), (89, "89 s"), (720, "12 min"), (7500, "2 h 5 min"), (7200, "2 h")])
def test_durations_for_people(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_bright_colours_are_darkened_for_lines_and_dark_ones_left() -> None:
    assert readable((255, 225, 0)) == (164, 145, 0)
    assert readable((40, 60, 90)) == (40, 60, 90)


# The page.


def test_page_of_a_2d_run_has_every_section_in_order(run_2d: Path) -> None:
    path = build_report(run_2d)
    page = Page(path)
    assert path == run_2d / "report.html"
    assert page.ids == list(SECTIONS)
    assert "script" not in page.tags
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "Validation Dice" in page.text
    assert "what fits <into> memory" in page.text
    assert "microtome train <x>" in page.text
    assert [file.name for file in run_2d.iterdir() if file.name.startswith(".part")] == []


def test_page_of_a_2d_run_shows_image_truth_prediction_and_errors_of_each_case(run_2d: Path) -> None:
    page, record = Page(build_report(run_2d)), read_run(run_2d)
    captions = ("image", "truth", "prediction", "errors")
    assert record.metrics is not None
    assert [image["alt"] for image in page.images] == [f"{caption} of {case}" for case in record.metrics["worst"] for caption in captions]
    shown = picture(page.images[3]).astype(int)
    assert shown.shape == (350, 420, 3)
    blue, red = (np.abs(shown - ERROR_COLOURS[kind]).max(axis=-1) < 70 for kind in (MISSED, INVENTED))
    assert (blue & (np.arange(420) < 210)).any()
    assert red.any()
    assert (picture(page.images[1]) != picture(page.images[2])).any()


def test_page_of_a_3d_run_says_which_section_it_shows(run_3d: Path) -> None:
    page = Page(build_report(run_3d))
    assert page.ids == list(SECTIONS)
    assert len(page.images) == 4
    # The block spans sections 2, 3 and 4, each with a third of the errors; the first of them is shown.
    assert "section 2 of 0 to 5 (counted from 0), the one with most error: 33.3 % of the wrong voxels" in page.text
    # A shift by one along X misses one column of 4 voxels and invents another.
    assert "4 missed, 4 invented; 6.7 % of what is annotated in the section" in page.text


def test_headline_says_what_was_learned_from_what_and_how_well(run_2d: Path) -> None:
    record = read_run(run_2d)
    assert record.metrics is not None
    dice = record.metrics["summary"]["dice"]
    expected = (
        f"A 2D modern_unet learned to find cell and wall from 4 cases of “cells”. On 2 validation cases its mean Dice is {dice['mean']:.3f}"
    )
    assert lead(record) == f"{expected} (95 % interval of the mean {dice['low']:.3f} to {dice['high']:.3f})."
    first, few = cautions(record)
    assert "A validation score is not a test" in first
    assert "these same cases" in first
    assert "2 cases only" in few
    text = Page(build_report(run_2d)).text
    assert lead(record) in text
    assert first in text
    assert "started or resumed 2026-03-04 05:06 UTC" in text


def test_one_validation_case_has_no_interval(run_3d: Path) -> None:
    record = read_run(run_3d)
    assert "(one case, so no interval)" in lead(record)
    assert cautions(record)[1:] == ["One case cannot show how much cases differ."]
    assert "The only validation case" in Page(build_report(run_3d)).text


def test_parts_of_one_stack_are_called_alike(tmp_path: Path) -> None:
    label = np.zeros((10, 8, 8), np.uint8)
    label[:, 2:5, 2:5] = 1
    save_pair(tmp_path / "stack", "a.tif", 90 * label, label, (1.0, 1.0, 1.0))
    dataset = open_dataset(tmp_path / "stack")
    run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 3), shifted)
    text = Page(build_report(run)).text
    assert "parts of the same image" in text
    assert "section 7 of 7 to 9 (counted from 0)" in text


def test_many_cases_show_the_six_worst_and_the_two_best(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells", count=20)
    run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 2, fold="1/2"), shifted)
    order = json.loads((run / "metrics.json").read_text())["worst"]
    page = Page(build_report(run))
    assert "The 6 worst and the 2 best of 10 validation cases" in page.text
    assert [image["alt"].removeprefix("image of ") for image in page.images[::4]] == [*order[:6], *order[-2:]]
    assert (run / "report.html").stat().st_size < 3_000_000


def test_names_of_cases_are_escaped(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells", names="<script>alert({})<&'\"b>".replace("/", "").format)
    run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 2), shifted)
    path = build_report(run)
    page = Page(path)
    assert "script" not in page.tags
    assert "<script>" not in path.read_text(encoding="utf-8")
    assert "<script>alert(1)<&'\"b>" in page.text
    assert page.images[0]["alt"].startswith("image of <script>alert(")


def test_interrupted_run_says_so_and_shows_its_curves(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells")
    run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 2), shifted, ended=False)
    page = Page(build_report(run))
    assert page.ids == list(SECTIONS)
    assert page.tags.count("svg") == 3
    assert page.images == []
    for words in (
        "not complete",
        "still going, or interrupted",
        "400 of 400 steps",
        "It has not been scored yet",
        "There are no scores yet",
    ):
        assert words in page.text
    assert "The training of a 2D modern_unet to find cell and wall from 4 cases of “cells” is not complete." in page.text
    assert "No validation case has been predicted yet" in page.text


def test_predictions_without_scores_are_shown_as_such(run_2d: Path) -> None:
    (run_2d / "metrics.json").unlink()
    page = Page(build_report(run_2d))
    assert "2 validation cases, not scored yet" in page.text
    assert len(page.images) == 8


def test_run_that_has_only_begun_has_a_page(run_2d: Path) -> None:
    for name in ("metrics.json", "environment.json"):
        (run_2d / name).unlink()
    shutil.rmtree(run_2d / "validation")
    write_text(run_2d / "log.jsonl", "")
    page = Page(build_report(run_2d))
    assert page.ids == list(SECTIONS)
    assert "The log holds no steps yet." in page.text
    assert "svg" not in page.tags


def test_data_that_were_moved_cost_the_pictures_only(run_2d: Path, tmp_path: Path) -> None:
    (tmp_path / "cells").rename(tmp_path / "elsewhere")
    page = Page(build_report(run_2d))
    assert page.images == []
    assert "The data cannot be read any more, so there are no pictures" in page.text
    assert "On 2 validation cases its mean Dice is" in page.text
    moved = Page(build_report(run_2d, dataset=open_dataset(tmp_path / "elsewhere")))
    assert len(moved.images) == 8


def test_case_that_is_gone_or_changed_is_named_and_the_others_are_shown(run_2d: Path, tmp_path: Path) -> None:
    predictions = read_predictions(run_2d / "validation")
    assert predictions is not None
    gone, other = predictions.files
    predictions.files[gone].unlink()
    page = Page(build_report(run_2d))
    assert f"{gone} is not shown: " in page.text
    assert [image["alt"] for image in page.images[:1]] == [f"image of {other}"]
    write_labels(predictions.files[other], np.zeros((5, 5), np.uint8), like=image_of(np.zeros((5, 5), np.uint8), Path("a.png")))
    assert f"{other} is not shown: its prediction has 5×5 voxels, the data now 20×24." in Page(build_report(run_2d)).text


def test_run_in_which_everything_trained_has_no_score_and_says_why(tmp_path: Path) -> None:
    dataset = two_dimensional(tmp_path / "cells")
    run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 2, fold="all"), shifted)
    page = Page(build_report(run))
    assert "Every labelled case trained (fold: all), so there is no score." in page.text
    assert "Nothing was kept back to validate with" in page.text
    assert page.images == []


def test_filled_sections_have_the_most_a_median_and_the_least_annotation() -> None:
    annotation = np.full((7, 2, 3), NOT_ANNOTATED, np.int16)
    annotation[1], annotation[5] = 0, 0
    annotation[2, 0], annotation[3, 0, 0], annotation[6, 0] = 1, 1, 1
    # Voxels by section: 0 6 3 1 0 6 3; in order 0 0 1 3 3 6 6. Painted are 1 and 5, from which 0 and 4 are equally far.
    assert filled_sections(annotation) == [
        (1, "the most annotated one"),
        (0, "the least annotated one"),
        (2, "the one of median annotation"),
    ]
    sparse = np.full((24, 2, 2), NOT_ANNOTATED, np.int16)
    sparse[[4, 12, 20]] = 1
    # Four from the nearest painted one are 0, 8 and 16; the first is taken, then the next.
    assert [index for index, _ in filled_sections(sparse)] == [4, 0, 8]
    assert len(filled_sections(annotation[:1])) == 1


def test_page_shows_what_was_filled_in_where_nothing_validates(tmp_path: Path) -> None:
    dataset = three_dimensional(tmp_path / "organs")
    run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 3, fold="all"), shifted)
    image, truth = dataset.read_image(dataset.cases[0]), dataset.read_label(dataset.cases[0])
    annotation = np.where(np.arange(6)[:, None, None] == 4, truth, NOT_ANNOTATED)
    write_json(run / "filled.json", draw_filled(image, annotation, truth, dataset))
    shutil.rmtree(tmp_path / "organs")
    page = Page(build_report(run))
    assert "filled" in page.ids
    assert "cases" not in page.ids
    # Section 4 has 4 × 5 voxels of class 1 among 120; the volume 3 × 20 among 720.
    assert "16.7 % of the voxels were annotated" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "foreground 16.7 % 8.3 %" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "section 4 of 0 to 5 (counted from 0), the most annotated one: 100.0" in page.text
    plain, painted, result = (picture(values) for values in page.images[:3])
    assert np.array_equal(painted, result)
    assert not np.array_equal(plain, painted)
    dark, bright = (picture(page.images[index]).mean() for index in (7, 8))
    assert dark < 0.6 * bright


def test_findings_are_grouped_worst_first_and_long_lists_cut(run_2d: Path) -> None:
    data = json.loads((run_2d / "dataset.json").read_text())
    notes = [{"severity": "note", "code": "assumed", "case": "", "message": f"note {n}", "files": []} for n in range(70)]
    error = {"severity": "error", "code": "unreadable", "case": "x", "message": "a.png is <b>broken</b>", "files": []}
    write_json(run_2d / "dataset.json", {**data, "findings": [*notes, error]})
    text = Page(build_report(run_2d)).text
    assert text.index("a.png is <b>broken</b>") < text.index("note 0")
    assert "and 10 more;" in text


def test_long_lists_of_scores_end_where_the_file_goes_on(run_2d: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MOST_SCORED", 1)
    assert "1 more cases with better scores are in metrics.json" in Page(build_report(run_2d)).text


def test_plan_is_told_field_by_field_with_reasons(run_2d: Path) -> None:
    rows = {row.name: row for row in plan_rows(read_run(run_2d).plan)}
    assert list(rows) == [name for name in Plan.model_fields if name != "reasons"]
    assert (rows["patch_vox"].value, rows["patch_vox"].reason) == ("32×32", "covers the median image")
    assert (rows["classes"].value, rows["minutes"].value) == ("around, cell, wall", "10")
    assert ("strides", "1×1, 2×2") in rows["network"].settings
    assert "kernels" not in dict(rows["network"].settings)
    assert rows["network"].meaning == "A network by name, with the sizes that the plan sets."
    assert all(row.meaning for row in rows.values() if row.name != "seed")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("minutes", None, "not limited"),
        ("dropout", None, "as in its paper"),
        ("residual", False, "no"),
        ("scale", (0.8, 1.25), "0.8 to 1.25"),
        ("spacing_mm", (0.00204, 0.00176), "0.00204×0.00176"),
        ("strides", ((1, 1), (2, 2)), "1×1, 2×2"),
        ("widths", (), ""),
        ("steps", 12000, "12000"),
    ],
)
def test_settings_for_people(name: str, value: object, words: str) -> None:
    assert format_setting(name, value) == words


def test_folder_without_a_plan_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a run folder with plan\.yaml, got none"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("dataset.json", "{"), ("dataset.json", "{}"), ("metrics.json", "[]"), ("validation/predictions.json", '{"cases": {"a": 1}}')],
)
def test_damaged_file_is_named(run_2d: Path, name: str, content: str) -> None:
    write_text(run_2d / name, content)
    with pytest.raises(DataError, match=Path(name).name):
        build_report(run_2d)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dataset.json", {"findings": [3]}),
        ("dataset.json", {"findings": [{"severity": "x", "code": "", "case": "", "message": ""}]}),
        ("dataset.json", {"root": {}}),
        ("dataset.json", {"train": [0.5]}),
        ("dataset.json", {"legend": {"names": [["a"]]}}),
        ("metrics.json", {"summary": {"dice": {}}}),
        ("metrics.json", {"worst": [[]]}),
        ("metrics.json", {"cases": [{"case": "nobody", "class": "cell"}]}),
        ("metrics.json", {"conventions": {"foreground": [[]], "unit": "mm", "in_voxels": [], "empty_cases": {}}}),
        ("environment.json", {"started": {}}),
    ],
)
def test_what_no_training_writes_is_refused_with_the_name_of_the_file(run_2d: Path, name: str, change: dict[str, object]) -> None:
    write_json(run_2d / name, json.loads((run_2d / name).read_text()) | change)
    with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
        build_report(run_2d)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left_out", ["mean", "low", "high", "cases", "undefined"])
def test_of_a_mean_that_says_less_than_all_no_page_is_made(run_2d: Path, left_out: str) -> None:
    metrics = json.loads((run_2d / "metrics.json").read_text())
    del metrics["summary"]["dice"][left_out]
    write_json(run_2d / "metrics.json", metrics)
    with pytest.raises(DataError, match=rf"metrics\.json: expected .*dice\W+{left_out}"):
        build_report(run_2d)


@pytest.mark.parametrize(
    "line", ['{"event": "step"}', '{"event": "validation", "step": 1, "dice": "x"}', '{"event": "step", "step": 1e308}']
)
def test_a_line_of_the_log_that_no_training_writes_is_refused_by_its_number(run_2d: Path, line: str) -> None:
    (run_2d / "log.jsonl").write_text('{"event": "schedule", "steps": 3}\n' + line)
    with pytest.raises(DataError, match=r"log\.jsonl:2: expected "):
        build_report(run_2d)


def test_run_without_its_description_of_the_data_is_refused(run_2d: Path) -> None:
    (run_2d / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json"):
        build_report(run_2d)


def test_what_was_assumed_of_the_data_is_not_warned_of_again(tmp_path: Path) -> None:
    label = np.zeros((10, 8, 8), np.uint8)
    label[:, 2:5, 2:5] = 1
    for number in range(3):
        save_pair(tmp_path / "stacks", f"{number}.tif", 90 * label, label)
    with pytest.warns(DataWarning, match="voxel size"):
        dataset = open_dataset(tmp_path / "stacks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        run = write_run(tmp_path / "run", dataset, plan_of(dataset.legend, 3), shifted)
    assert len(Page(build_report(run)).images) == 4


def test_realistic_runs_give_pages_that_can_be_mailed(tmp_path: Path) -> None:
    for number in range(12):
        made = cells((128, 128), seed=number, count=10)
        save_pair(tmp_path / "cells", f"{number}.png", made.image, made.label)
    for number in range(2):
        volume = tubules((24, 48, 48), seed=number)
        label = np.where((sparse := sparse_annotation(volume.label, seed=number)) == NOT_ANNOTATED, 255, sparse)
        save_pair(tmp_path / "tubules", f"{number}.tif", volume.image, label, volume.spacing_mm)
    write_text(tmp_path / "tubules" / "microtome.yaml", "not_annotated: 255\nclasses: {background: 0, tubule: 1}\n")
    for name, dims in (("cells", 2), ("tubules", 3)):
        dataset = open_dataset(tmp_path / name)
        run = write_run(tmp_path / f"run_{name}", dataset, plan_of(dataset.legend, dims), eroded)
        page = Page(build_report(run))
        assert len(page.images) >= 4
        assert ("Only what is annotated is scored" in page.text) == (name == "tubules")
        assert (run / "report.html").stat().st_size < 3_000_000


def eroded(truth: np.ndarray) -> np.ndarray:
    """Objects a voxel too thin, and some specks."""
    specks = ndimage.uniform_filter(np.random.default_rng(0).random(truth.shape), 3) > 0.66
    return (ndimage.binary_erosion(truth == 1) | specks).astype(np.int16)
