"""Validation: the same cases each time, no more time than is given, all that is predicted at the end."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from microtome.bundle import Bundle
from microtome.data.dataset import Dataset, open_dataset
from microtome.evaluation.scores import score_case
from microtome.images.files import read_image
from microtome.inference.predictor import Predictor
from microtome.inference.restore import arrays_of
from microtome.training import validation
from microtome.training.checkpoint import TrainState
from microtome.training.validation import MOST_VALIDATED, Validation
from tests.folders import png
from tests.small import one_thread, small_plan
from tests.test_checkpoint import fresh

__all__ = ["one_thread"]

COUNT = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        label = rng.integers(0, 2, (12, 14))
        png(folder / "images" / f"{number:02d}.png", 100 * label + rng.integers(0, 99, label.shape))
        png(folder / "labels" / f"{number:02d}.png", label)
    return open_dataset(folder)


def validation_of(dataset: Dataset, folder: Path, **changes: Any) -> Validation:
    plan = small_plan(classes=dataset.legend.names, **changes)
    return Validation(dataset=dataset, cases=dataset.labelled, plan=plan, device=torch.device("cpu"), folder=folder)


def predictor_of(dataset: Dataset, state: TrainState) -> Predictor:
    plan = small_plan(classes=dataset.legend.names)
    network = state.average
    bundle = Bundle(
        plan=plan, legend=dataset.legend, weights=arrays_of(network.state_dict()), sizes=network.sizes, context_vox=network.context_vox
    )
    return Predictor(bundle, device="cpu")


class Slow:
    """A clock by which a prediction, and the scores of a case, take so many seconds and nothing else takes any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, predict: float = 0.0, score: float = 0.0) -> None:
        self.now, self.predict, self.score = 0.0, predict, score
        self.predicted = 0
        monkeypatch.setattr(validation, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(validation, "predict_labels", self.predicting)
        monkeypatch.setattr(validation, "score_case", self.scoring)

    def predicting(self, array: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        self.now += self.predict
        self.predicted += 1
        return (array[0] > 99).astype(np.int16)

    def scoring(self, *arguments: Any, **options: Any) -> Any:
        self.now += self.score
        return score_case(*arguments, **options)


def test_the_order_is_of_the_seed_and_holds_each_case_once(pictures: Dataset, tmp_path: Path) -> None:
    orders = [[case.name for case in validation_of(pictures, tmp_path, seed=seed).shuffled] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [case.name for case in pictures.labelled]
    # The first ones are from everywhere.
    assert not set(map(int, orders[0][:10])) <= set(range(15))


def test_without_minutes_as_many_cases_as_are_enough_are_scored(pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, clock = fresh(small_plan()), Slow(monkeypatch, predict=1000)
    result = validation_of(pictures, tmp_path).score(state)
    assert clock.predicted == state.progress.validated == MOST_VALIDATED < COUNT
    assert result == {"score": 1.0, "dice": 1.0, "classes": dict.fromkeys(pictures.legend.names, 1.0)}


def test_the_first_validation_ends_after_its_share_of_the_minutes_and_later_ones_look_at_as_many(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, clock = fresh(small_plan()), Slow(monkeypatch, predict=1.0)
    seen = validation_of(pictures, tmp_path, minutes=2)
    seen.score(state)
    # Three per cent of two minutes are 3.6 seconds.
    assert (clock.predicted, state.progress.validated) == (4, 4)
    for seconds in (0.1, 50.0):
        clock.predict, clock.predicted = seconds, 0
        seen.score(state)
        assert (clock.predicted, state.progress.validated) == (4, 4)
    other, clock.predicted = fresh(small_plan()), 0
    seen.score(other)
    assert clock.predicted == other.progress.validated == 1


def test_what_a_case_takes_holds_its_scores_and_its_file(pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh(small_plan())
    Slow(monkeypatch, predict=0.5, score=7.0)
    validation_of(pictures, tmp_path, minutes=10).score(state)
    assert state.progress.case_seconds == 7.5
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_dice_that_is_undefined_is_null_and_its_score_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, label in (("a", np.eye(12)), ("b", np.zeros((12, 12)))):
        png(tmp_path / "images" / f"{name}.png", label)
        png(tmp_path / "labels" / f"{name}.png", label)
    dataset = open_dataset(tmp_path)
    Slow(monkeypatch)
    plan = small_plan(classes=dataset.legend.names)
    empty = Validation(dataset=dataset, cases=dataset.labelled[1:], plan=plan, device=torch.device("cpu"), folder=tmp_path)
    names = dataset.legend.names
    assert empty.score(fresh(plan)) == {"score": 0.0, "dice": None, "classes": {names[0]: 1.0, names[1]: None}}


def test_at_the_end_all_cases_are_scored_and_written(pictures: Dataset, tmp_path: Path) -> None:
    predictor = predictor_of(pictures, fresh(small_plan()))
    events: list[Mapping[str, Any]] = []
    metrics = validation_of(pictures, tmp_path).score_all(predictor, float("inf"), events.append)
    assert metrics is not None
    assert "validation_subset" not in metrics["conventions"]
    names = [case.name for case in pictures.labelled]
    # In the dataset's order, whatever the order of the work.
    assert list(dict.fromkeys(row["case"] for row in metrics["cases"])) == names
    assert [(event["done"], event["of"]) for event in events] == [(number, COUNT) for number in range(1, COUNT + 1)]
    assert sorted(path.name for path in (tmp_path / "validation").glob("*.png")) == [f"{name}.png" for name in names]
    shown = read_image(tmp_path / "validation" / "07.png").array[0]
    assert np.array_equal(shown, pictures.legend.encode(predictor(pictures.read_image(pictures.labelled[7]))))


def test_at_the_end_the_first_cases_are_scored_that_the_seconds_allow(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = predictor_of(pictures, fresh(small_plan()))
    Slow(monkeypatch, score=1.0)
    seen = validation_of(pictures, tmp_path)
    for seconds, count in ((5.0, 5), (3.9, 3), (0.0, 1)):
        metrics = seen.score_all(predictor, seconds)
        assert metrics is not None
        assert metrics["conventions"]["validation_subset"] == f"{count} of 30 cases, as the minutes allowed"
        expected = sorted(case.name for case in seen.shuffled[:count])
        assert list(dict.fromkeys(row["case"] for row in metrics["cases"])) == expected
        # Predictions of an end before are gone.
        assert sorted(path.stem for path in (tmp_path / "validation").glob("*.png")) == expected


def test_where_nothing_is_annotated_there_are_no_scores(tmp_path: Path) -> None:
    (tmp_path / "microtome.yaml").write_text("classes: {ground: 0, cell: 1}\nnot_annotated: 255\n", encoding="utf-8")
    for name, value in (("a", 1), ("b", 255)):
        png(tmp_path / "images" / f"{name}.png", np.zeros((12, 12)))
        png(tmp_path / "labels" / f"{name}.png", np.full((12, 12), value))
    dataset = open_dataset(tmp_path)
    plan = small_plan(classes=dataset.legend.names)
    seen = Validation(dataset=dataset, cases=dataset.labelled[1:], plan=plan, device=torch.device("cpu"), folder=tmp_path)
    assert seen.score_all(predictor_of(dataset, fresh(plan)), float("inf")) is None
    assert (tmp_path / "validation" / "b.png").is_file()
