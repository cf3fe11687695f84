"""Validation cases in an order drawn once: the first are scored during training, at its end all that the minutes allow."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.listing import recording
from microtome.evaluation.metrics import dice
from microtome.evaluation.scores import CaseScore, score_case, summarise
from microtome.images.files import label_suffix, write_labels
from microtome.images.image import Image
from microtome.inference.predict import predict_labels
from microtome.inference.predict_files import safe_name
from microtome.inference.predictor import Predictor
from microtome.inference.torch_engine import TorchEngine
from microtome.preprocess import voxel_size
from microtome.training.checkpoint import TrainState
from microtome.training.loop import Event

# Cases that are predicted at each validation during training, and the share of the minutes that one may take.
MOST_VALIDATED = 24
SHARE_OF_MINUTES = 0.03


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a run is scored on.

    Attributes:
        dataset: that the cases are of.
        cases: in the dataset's order.
        plan: of the run.
        device: that the network is on.
        folder: of the run.
    """

    dataset: Dataset
    cases: tuple[Case, ...]
    plan: Plan
    device: torch.device
    folder: Path

    @property
    def shuffled(self) -> list[Case]:
        """The cases in an order of the seed: the first ones of it stand for all, and are the same each time."""
        order = np.random.default_rng([self.plan.seed, len(self.cases)]).permutation(len(self.cases))
        return [self.cases[number] for number in order]

    def score(self, state: TrainState) -> dict[str, Any]:
        """Mean Dice of the foreground over the first cases, predicted whole by the averaged weights, as `predict` would.

        The first time, ends after a share of the minutes and notes in the progress how many cases that were; later
        validations look at as many, however long it takes, or scores could not be compared.
        """
        if not self.cases:
            return {"score": 0.0, "dice": None, "classes": {}}
        progress, table, beside = state.progress, [], 0.0
        limit = math.inf if self.plan.minutes is None else SHARE_OF_MINUTES * 60 * self.plan.minutes
        engine = TorchEngine(network=state.average, device=self.device, precision=self.plan.precision)
        began = time.perf_counter()
        for case in self.shuffled[: progress.validated or MOST_VALIDATED]:
            image, truth = self.dataset.read_image(case), self.dataset.read_label(case)
            labels = predict_labels(image.array, voxel_size(image, self.plan), plan=self.plan, network=state.average, engine=engine)
            annotated = truth >= 0
            table.append([dice((truth == k) & annotated, (labels == k) & annotated) for k in range(len(self.plan.classes))])
            spent = time.perf_counter() - began
            if len(table) == 1 and self.plan.minutes is not None:
                beside = self._seconds_beside(case, image, truth, labels)
                began += beside
            if not progress.validated and spent + beside > limit:
                break
        progress.validated = len(table)
        progress.case_seconds = spent / len(table) + beside
        return self._means(table)

    def score_all(
        self, predictor: Predictor, most_seconds: float, on_event: Callable[[Event], None] = lambda event: None
    ) -> dict[str, Any] | None:
        """Write the predictions of all cases, or of as many of the first as the seconds allow, at least one; their scores.

        Returns:
            the content of `metrics.json`; None where nothing is annotated.
        """
        out, legend, cases = self.folder / "validation", self.dataset.legend, self.shuffled
        # What lies there is from an end before, by other weights, and may be of more cases.
        shutil.rmtree(out, ignore_errors=True)
        rows: dict[str, list[CaseScore]] = {}
        unknown = []
        began = time.perf_counter()
        with recording(out, legend, (safe_name(case.name) for case in cases)) as record:
            for done, case in enumerate(cases, start=1):
                image, truth = self.dataset.read_image(case), self.dataset.read_label(case)
                labels = predictor(image)
                record.add(self._write(out, case, image, labels), case)
                rows[case.name] = self._scores(case, image, truth, labels)
                if not image.spacing_known:
                    unknown.append(case.name)
                on_event({"event": "predicted", "case": case.name, "done": done, "of": len(cases)})
                if (time.perf_counter() - began) * (done + 1) / done > most_seconds:
                    break
        flat = [row for case in self.cases for row in rows.get(case.name, [])]
        if not flat:
            return None
        in_voxels = [case.name for case in self.cases if case.name in unknown]
        metrics = summarise(flat, legend, in_voxels=in_voxels, groups={case.name: case.group for case in self.cases})
        if len(rows) < len(cases):
            metrics["conventions"]["validation_subset"] = f"{len(rows)} of {len(cases)} cases, as the minutes allowed"
        return metrics

    def _seconds_beside(self, case: Case, image: Image, truth: np.ndarray, labels: np.ndarray) -> float:
        """What the last prediction does with a case beside predicting it: how long it takes."""
        began = time.perf_counter()
        cache = self.folder / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as folder:
            self._write(Path(folder), case, image, labels)
            self._scores(case, image, truth, labels)
        return time.perf_counter() - began

    def _write(self, folder: Path, case: Case, image: Image, labels: np.ndarray) -> Path:
        """Write a prediction with the values of the training labels, under the case's name."""
        path = folder / (safe_name(case.name) + label_suffix(image))
        write_labels(path, self.dataset.legend.encode(labels), like=image)
        return path

    def _scores(self, case: Case, image: Image, truth: np.ndarray, labels: np.ndarray) -> list[CaseScore]:
        """The rows of a case; none where nothing is annotated."""
        if not (truth >= 0).any():
            return []
        return score_case(truth, labels, image.spacing_mm, self.dataset.legend, case=case.name)

    def _means(self, table: Sequence[Sequence[float]]) -> dict[str, Any]:
        """What is logged of the Dice of each class of each case: means over the cases, null where undefined."""
        means = [_mean([row[k] for row in table]) for k in range(len(self.plan.classes))]
        mean = _mean([means[k] for k in self.dataset.legend.foreground])
        classes = dict(zip(self.plan.classes, map(_number, means), strict=True))
        return {"score": 0.0 if math.isnan(mean) else mean, "dice": _number(mean), "classes": classes}


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _number(value: float) -> float | None:
    """Five digits for the log, where undefined is null."""
    return None if math.isnan(value) else round(value, 5)
