"""ECE, Brier, NLL and temperature against what is computed by hand and by the slow way; a run measures, keeps and shows them."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.bundle import load_bundle
from microtome.data.dataset import Dataset, open_dataset
from microtome.evaluation import calibration as module
from microtome.evaluation.calibration import (
    BINS,
    TEMPERATURES,
    Evidence,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    reliability,
    score,
)
from microtome.images.files import read_image
from microtome.training import completion, validation
from microtome.training.run import train
from microtome.training.validation import MOST_TILES, Validation
from tests.folders import png, text
from tests.small import one_thread, small_plan, small_plan_3d
from tests.test_checkpoint import fresh
from tests.test_validation import predictor_of, validation_of

__all__ = ["one_thread"]


def drawn(seed: int, temperature: float, *, classes: int = 3, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax over this temperature is exactly how often each class occurs."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (classes, count))
    cumulated = np.cumsum(scipy.special.softmax(logits / temperature, axis=0), axis=0)
    truth = (rng.random(count) > cumulated).sum(axis=0).clip(max=classes - 1)
    return logits.astype(np.float32), truth.astype(np.int16)


def part(group: str, logits: np.ndarray, truth: np.ndarray) -> Evidence:
    return Evidence(group=group, logits_KN=logits, truth_N=truth)


# ---- scores ----


def test_bins_by_hand() -> None:
    found = reliability(np.array([0.5, 0.6, 0.9, 1.0]), np.array([True, False, True, True]), bins=2)
    # A half belongs to the lower bin.
    assert found == ((0.5, 1.0, 0.25), (pytest.approx(2.5 / 3), pytest.approx(2 / 3), 0.75))
    assert expected_calibration_error(found) == pytest.approx(0.25 * 0.5 + 0.75 * 0.5 / 3)
    assert reliability(np.array([1.0]), np.array([True]))[:-1] == ((None, None, 0.0),) * (BINS - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 300), st.integers(1, 50))
def test_scores_are_those_of_the_slow_way(seed: int, classes: int, count: int, at_once: int) -> None:
    rng = np.random.default_rng(seed)
    logits, truth = rng.normal(0, 4, (classes, count)).astype(np.float32), rng.integers(0, classes, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_AT_ONCE", at_once)
        found = score(logits, truth)
    chances = scipy.special.softmax(logits.astype(np.float64), axis=0)
    brier = sum(sum((chances[k, n] - (truth[n] == k)) ** 2 for k in range(classes)) for n in range(count)) / count
    nll = -sum(math.log(chances[truth[n], n]) for n in range(count)) / count
    assert (found.brier, found.nll) == (pytest.approx(brier), pytest.approx(nll))
    ece = 0.0
    for number in range(15):
        inside = [n for n in range(count) if number / 15 < chances[:, n].max() <= (number + 1) / 15]
        if inside:
            right = np.mean([chances[:, n].argmax() == truth[n] for n in inside])
            ece += len(inside) / count * abs(right - np.mean([chances[:, n].max() for n in inside]))
    assert found.ece == pytest.approx(ece)
    assert sum(each.share for each in found.bins) == pytest.approx(1)


def test_scores_of_no_voxel_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        score(np.empty((2, 0), np.float32), np.empty(0, np.int16))


# ---- temperature ----


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 6.0])
def test_the_temperature_that_was_used_is_found_again(temperature: float) -> None:
    assert fit_temperature(*drawn(1, temperature)) == pytest.approx(temperature, rel=0.08)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 40), st.integers(2, 4))
def test_no_temperature_of_a_fine_grid_has_a_smaller_loss(seed: int, temperature: float, classes: int) -> None:
    logits, truth = drawn(seed, temperature, classes=classes, count=400)
    grid = np.geomspace(*TEMPERATURES, 200)
    losses = [-scipy.special.log_softmax(logits / t, axis=0)[truth, np.arange(400)].mean() for t in grid]
    found = fit_temperature(logits, truth)
    loss = -scipy.special.log_softmax(logits / found, axis=0)[truth, np.arange(400)].mean()
    assert loss <= min(losses) + 1e-5


def test_answers_without_an_error_or_at_chance_end_at_the_bounds() -> None:
    logits = np.array([[3.0, -3.0], [-3.0, 3.0]], np.float32)
    assert fit_temperature(logits, np.array([0, 1])) == TEMPERATURES[0]
    assert fit_temperature(logits, np.array([1, 0])) == TEMPERATURES[1]
    assert fit_temperature(logits[:, :0], np.empty(0, int)) == 1.0


def test_a_temperature_is_scored_on_groups_that_it_was_not_fitted_to() -> None:
    parts = [part(str(n % 4), *drawn(n, 3.0 if n % 4 < 2 else 1.5, count=2000)) for n in range(8)]
    found = calibrate(parts)
    assert found is not None
    # By the equal sizes the even and the odd groups are the halves.
    halves = [[each for each in parts if int(each.group) % 2 == half] for half in (0, 1)]
    pooled = [(np.concatenate([e.logits_KN for e in half], axis=1), np.concatenate([e.truth_N for e in half])) for half in halves]
    crossed = [score(pooled[i][0] / np.float32(fit_temperature(*pooled[1 - i])), pooled[i][1]) for i in (0, 1)]
    assert found.after.nll == pytest.approx((crossed[0].nll + crossed[1].nll) / 2)
    assert found.after.brier == pytest.approx((crossed[0].brier + crossed[1].brier) / 2)
    assert found.temperature == fit_temperature(*(np.concatenate(both, axis=-1) for both in zip(*pooled, strict=True)))
    assert found.after.nll < found.before.nll
    assert found.after.ece < found.before.ece
    assert "fitted on half of the cases and scored on the other half" in found.words
    assert found.voxels == 16_000


def test_one_case_is_fitted_and_scored_on_itself_and_says_so() -> None:
    logits, truth = drawn(0, 2.0)
    for groups, words in ((("a",), "fitted and scored on the same case:"), (("a", "a"), "fitted and scored on the same cases, which are")):
        found = calibrate([part(group, logits, truth) for group in groups])
        assert found is not None
        assert words in found.words
        assert found.after.nll == pytest.approx(score(logits / np.float32(found.temperature), truth).nll)
        assert found.temperature == pytest.approx(2, rel=0.06)


def test_a_temperature_that_does_not_carry_over_is_not_kept() -> None:
    # What is far too sure in one group is far too unsure in the other.
    found = calibrate([part("a", *drawn(0, 8.0)), part("b", *drawn(1, 0.3))])
    assert found is not None
    assert found.temperature == 1.0
    assert found.after == found.before
    assert found.words.startswith("temperature 1:")


def test_what_is_not_finite_is_left_out_and_nothing_is_none() -> None:
    logits, truth = drawn(0, 2.0, count=500)
    broken = logits.copy()
    broken[1, ::2] = np.nan
    found, clean = calibrate([part("a", broken, truth)]), calibrate([part("a", logits[:, 1::2], truth[1::2])])
    assert found is not None
    assert found == clean
    assert calibrate([part("a", np.full_like(logits, np.inf), truth)]) is None
    assert calibrate([]) is None


# ---- a run ----


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten pictures of noisy blocks; some of the labels are wrong, so that nobody may be sure."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(10):
        label = np.kron(rng.integers(0, 2, (4, 5)), np.ones((12, 12), int))
        png(folder / "images" / f"{number}.png", 90 * label + rng.integers(0, 150, label.shape))
        png(folder / "labels" / f"{number}.png", np.where(rng.random(label.shape) < 0.1, 1 - label, label))
    return open_dataset(folder)


@pytest.fixture(scope="module")
def run(pictures: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(pictures, plan_of(pictures), tmp_path_factory.mktemp("runs") / "run")


def plan_of(dataset: Dataset, **changes: Any) -> Any:
    return small_plan(classes=dataset.legend.names, fold="1/3", steps=8, **changes)


def calibration_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["calibration"]
    return found


def test_a_run_measures_how_sure_it_is_and_the_model_keeps_the_temperature(run: Path) -> None:
    found = calibration_of(run)
    assert found.keys() == {"temperature", "ece_before", "ece", "brier_before", "brier", "nll_before", "nll", "voxels", "bins"}
    assert load_bundle(run).temperature == found["temperature"] != 1
    assert found["nll"] < found["nll_before"]
    assert 0 <= found["ece"] <= 1
    assert len(found["bins"]) == BINS
    assert found["bins"][-1].keys() == {"confidence", "accuracy", "share"}
    # Fewer than all voxels of the three or four cases, and more than one tile of them.
    assert 1000 < found["voxels"] <= 4 * 48 * 60
    said = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["conventions"]["calibration"]
    assert said.startswith("one temperature, fitted on half of the cases")


class Killed(BaseException):
    """What a kill does: nothing of ours runs after it."""


@pytest.mark.parametrize(("event", "at"), [("step", 5), ("predicted", 2), ("end", 8)])
def test_a_run_that_was_killed_ends_with_the_same_calibration(event: str, at: int, pictures: Dataset, run: Path, tmp_path: Path) -> None:
    def kill(seen: Mapping[str, Any]) -> None:
        if seen["event"] == event and seen.get("done", seen.get("step")) == at:
            raise Killed

    with pytest.raises(Killed):
        train(pictures, plan_of(pictures), tmp_path / "run", on_event=kill)
    folder = train(pictures, plan_of(pictures), tmp_path / "run", resume=True)
    assert calibration_of(folder) == calibration_of(run)
    assert load_bundle(folder).temperature == load_bundle(run).temperature


def test_a_complete_run_that_is_taken_up_again_keeps_its_model(pictures: Dataset, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    train(pictures, plan_of(pictures), folder, resume=True)
    assert load_bundle(folder).hash == load_bundle(run).hash
    assert calibration_of(folder) == calibration_of(run)


def test_the_temperature_is_kept_even_where_no_samples_can_be_cut(
    pictures: Dataset, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    module_bundle = load_bundle(folder)
    completion.save_bundle(folder / "model", replace(module_bundle, samples=None, temperature=1.0))
    gone = [replace(case, images=(folder / "gone.png",)) for case in pictures.labelled]
    assert "gone.png" in (completion.complete_model(folder, pictures, gone, 1.75) or "")
    found = load_bundle(folder)
    assert (found.temperature, found.samples) == (1.75, None)


def test_without_a_case_to_validate_the_temperature_stays_1_and_the_page_says_so(pictures: Dataset, tmp_path: Path) -> None:
    plan = small_plan(classes=pictures.legend.names, fold="all", steps=1, validations=1)
    folder = train(pictures, plan, tmp_path / "run")
    assert load_bundle(folder).temperature == 1.0
    assert json.loads((folder / "model" / "model.json").read_text(encoding="utf-8"))["temperature"] == 1.0
    assert "Nobody knows: no case was kept back" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_run_shows_it(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    found = calibration_of(run)
    assert "How sure is it?" in page
    assert f"<b>{found['temperature']:g}</b>" in page
    assert f"{found['voxels']:,} voxels" in page
    assert "One temperature, fitted on half of the cases and scored on the other half" in page


# ---- what is gathered ----


def evidence_of(dataset: Dataset, number: int, **changes: Any) -> list[Evidence]:
    """The evidence of a case by an engine whose logits are the grey value."""
    seen = Validation(
        dataset=dataset,
        cases=dataset.labelled,
        plan=small_plan(classes=dataset.legend.names, **changes),
        device=torch.device("cpu"),
        folder=Path(),
    )
    case = dataset.labelled[number]
    return seen.evidence(case, dataset.read_image(case), dataset.read_label(case), Grey(), 0)


class Grey:
    """Says the grey value, and its negative."""

    name = "grey"

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        return np.concatenate([image_CS, -image_CS])

    def averaged(self, *_: Any) -> "Grey":
        return self


def test_evidence_is_of_the_voxels_that_it_names(pictures: Dataset) -> None:
    # A tile larger than the picture: all of it, in order.
    (found,) = evidence_of(pictures, 3, patch_vox=(64, 64))
    case = pictures.labelled[3]
    assert np.array_equal(found.truth_N, pictures.read_label(case).reshape(-1))
    grey = read_image(case.images[0]).array[0].reshape(-1)
    assert np.corrcoef(found.logits_KN[0], grey)[0, 1] > 0.9999
    assert found.group == case.name


def test_evidence_is_the_same_each_time_and_shared_out_over_the_cases(pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (evidence_of(pictures, 0, patch_vox=(16, 16)) for _ in range(2))
    assert len(first) == MOST_TILES // 10 > 1
    assert all(
        np.array_equal(a.logits_KN, b.logits_KN) and np.array_equal(a.truth_N, b.truth_N) for a, b in zip(first, second, strict=True)
    )
    monkeypatch.setattr(validation, "MOST_VOXELS", 600)
    fewer = evidence_of(pictures, 0, patch_vox=(16, 16))
    assert [part.truth_N.size for part in fewer] == [20, 20, 20]


def test_sections_of_a_volume_are_shown_to_a_2d_network_one_by_one_and_only_annotated_voxels_count() -> None:
    label = np.full((3, 20, 24), -1, np.int16)
    label[1, 4:9, 6:12] = 1
    rng = np.random.default_rng(0)
    for plan in (small_plan(patch_vox=(16, 16), spacing_mm=(1.0,) * 3), small_plan_3d(patch_vox=(8, 16, 16), spacing_mm=(1.0,) * 3)):
        found = validation._choose_tiles(label, plan, 0, 5, rng)
        assert found
        for section, tile in found:
            assert section == (1 if plan.dims == 2 else None)
            inside = (label if section is None else label[section])[tuple(slice(a, b) for a, b in tile.write)]
            assert (inside == 1).any()
    assert validation._choose_tiles(np.full((3, 5, 5), -1, np.int16), plan, 0, 5, rng) == []


def test_every_class_has_a_tile_however_rare_it_is() -> None:
    label = np.zeros((60, 200), np.int16)
    label[50, 190] = 1
    found = validation._choose_tiles(label, small_plan(patch_vox=(16, 16)), 0, 6, np.random.default_rng(0))
    assert any((label[tuple(slice(a, b) for a, b in tile.write)] == 1).any() for _, tile in found)


def test_an_unpadded_network_is_asked_with_its_border(pictures: Dataset) -> None:
    plan = small_plan(patch_vox=(32, 32))
    for _, tile in validation._choose_tiles(np.zeros((40, 40), np.int16), plan, 4, 3, np.random.default_rng(0)):
        assert [b - a for a, b in tile.read] == [32, 32]
        assert [b - a for a, b in tile.blend] == [24, 24]


def test_the_seconds_of_the_end_hold_for_it_too(pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(validation, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    asked = Validation.evidence

    def slow(self: Validation, *arguments: Any) -> list[Evidence]:
        now[0] += 10
        return asked(self, *arguments)

    monkeypatch.setattr(Validation, "evidence", slow)
    seen = validation_of(pictures, tmp_path)
    predictor = predictor_of(pictures, fresh(small_plan(classes=pictures.legend.names)))
    metrics = seen.score_all(predictor, 35.0)
    assert metrics is not None
    assert metrics["conventions"]["validation_subset"].startswith("3 of 10 cases")
    assert metrics["calibration"]["voxels"] > 0


def test_what_a_case_takes_holds_it_as_far_as_it_is_asked_of_each(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(validation, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Validation, "evidence", lambda *_: now.__setitem__(0, now[0] + 8.0))
    for most, seconds in ((32, 8.0), (5, 4.0)):
        monkeypatch.setattr(validation, "MOST_TILES", most)
        state = fresh(small_plan())
        validation_of(pictures, tmp_path, minutes=10).score(state)
        assert state.progress.case_seconds == seconds


def test_voxels_that_nobody_looked_at_are_no_evidence(tmp_path: Path) -> None:
    text(tmp_path / "microtome.yaml", "classes: {ground: 0, cell: 1}\nnot_annotated: 255\n")
    label = np.full((40, 44), 255)
    label[10:20, 8:30], label[14:17, 10:20] = 0, 1
    png(tmp_path / "images" / "a.png", label)
    png(tmp_path / "labels" / "a.png", label)
    dataset = open_dataset(tmp_path)
    (found,) = evidence_of(dataset, 0, patch_vox=(64, 64))
    assert np.bincount(found.truth_N).tolist() == [220 - 30, 30]
    assert found.logits_KN.shape == (2, 220)
