"""Validation cases in an order drawn once: the first are scored during training, at its end all that the minutes allow."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.listing import recording
from microtome.data.names import some
from microtome.evaluation.calibration import BINS, Evidence, calibrate
from microtome.evaluation.metrics import dice
from microtome.evaluation.scores import CaseScore, score_case, summarise
from microtome.files import scratch_folder
from microtome.images.files import label_suffix, write_labels
from microtome.images.image import Image
from microtome.inference.mirroring import Engine
from microtome.inference.predict import predict_labels
from microtome.inference.predict_files import safe_name
from microtome.inference.predictor import Predictor
from microtome.inference.torch_engine import TorchEngine
from microtome.preprocess import grid_shape, normalise, resample, resample_labels, voxel_size
from microtome.tiling import Tile, cover, read_mirrored
from microtome.training.checkpoint import TrainState
from microtome.training.loop import Event
from microtome.training.ranks import ALONE, Ranks

# Cases that are predicted at each validation during training, and the share of the minutes that one may take.
MOST_VALIDATED = 24
SHARE_OF_MINUTES = 0.03
# Tiles that the network is shown again to see how sure it is: of all cases together, and of each at most this share of its own.
MOST_TILES, SHARE_OF_TILES = 32, 0.25
# Voxels that are kept of them, and their values over all classes, which are time and memory of the fit.
MOST_VOXELS, MOST_VALUES = 200_000, 1 << 21


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a run is scored on.

    Attributes:
        dataset: that the cases are of.
        cases: in the dataset's order.
        plan: of the run.
        device: that the network is on.
        folder: of the run.
        ranks: the processes that score together.
    """

    dataset: Dataset
    cases: tuple[Case, ...]
    plan: Plan
    device: torch.device
    folder: Path
    ranks: Ranks = ALONE

    @property
    def shuffled(self) -> list[Case]:
        """The cases in an order of the seed: the first ones of it stand for all, and are the same each time."""
        order = np.random.default_rng([self.plan.seed, len(self.cases)]).permutation(len(self.cases))
        return [self.cases[number] for number in order]

    def score(self, state: TrainState) -> dict[str, Any]:
        """Mean Dice of the foreground over the first cases, predicted whole by the averaged weights, as `predict` would.

        The first time, ends after a share of the minutes and notes in the progress how many cases that were; later
        validations look at as many, however long it takes, or scores could not be compared. Of several processes each takes
        every n-th case.
        """
        if not self.cases:
            return {"score": 0.0, "dice": None, "classes": {}}
        progress = state.progress
        cases = self.shuffled[: progress.validated or MOST_VALIDATED]
        engine = TorchEngine(network=state.average, device=self.device, precision=self.plan.precision)
        table = torch.zeros(len(cases), len(self.plan.classes), dtype=torch.float64)
        limit = math.inf if self.plan.minutes is None else SHARE_OF_MINUTES * 60 * self.plan.minutes
        began, beside = time.perf_counter(), 0.0
        for first in range(0, len(cases), self.ranks.count):
            number = first + self.ranks.rank
            if number < len(cases):
                seen = self._predicted(cases[number], state, engine)
                table[number] = torch.tensor(self._dice(*seen[1:]), dtype=torch.float64)
            spent = time.perf_counter() - began
            if number == 0 and self.plan.minutes is not None:
                beside = self._seconds_beside(cases[0], *seen, engine)
                began = time.perf_counter() - spent
            if not progress.validated and limit < math.inf and self.ranks.first(spent + beside) > limit:
                break
        progress.case_seconds = self.ranks.first(spent / (first // self.ranks.count + 1) + beside)
        progress.validated = min(len(cases), first + self.ranks.count)
        return self._means(self.ranks.total_table(table)[: progress.validated].tolist())

    def _predicted(self, case: Case, state: TrainState, engine: TorchEngine) -> tuple[Image, np.ndarray, np.ndarray]:
        """The image of a case, its label (*S) and what is predicted of it (*S)."""
        image, truth = self.dataset.read_pair(case)
        labels = predict_labels(image.array, voxel_size(image, self.plan), plan=self.plan, network=state.average, engine=engine)
        return image, truth, labels

    def _dice(self, truth: np.ndarray, labels: np.ndarray) -> list[float]:
        """The Dice of each class, of what is annotated."""
        annotated = truth >= 0
        return [dice((truth == k) & annotated, (labels == k) & annotated) for k in range(len(self.plan.classes))]

    def score_all(
        self, predictor: Predictor, most_seconds: float, on_event: Callable[[Event], None] = lambda event: None
    ) -> dict[str, Any] | None:
        """Write the predictions of all cases, or of as many of the first as the seconds allow, at least one; their scores.

        How sure the network is of some voxels is asked at the same time, while a case is there, and within the same seconds.

        Returns:
            the content of `metrics.json`; None where nothing is annotated.
        """
        out, legend, cases = self.folder / "validation", self.dataset.legend, self.shuffled
        # What lies there is from an end before, by other weights, and may be of more cases.
        shutil.rmtree(out, ignore_errors=True)
        rows: dict[str, list[CaseScore]] = {}
        gathered: list[Evidence] = []
        unknown = []
        began = time.perf_counter()
        with recording(out, legend, (safe_name(case.name) for case in cases)) as record:
            for done, case in enumerate(cases, start=1):
                image, truth = self.dataset.read_pair(case)
                labels = predictor(image)
                record.add(self._write(out, case, image, labels), case)
                rows[case.name] = self._scores(case, image, truth, labels)
                if not image.spacing_known:
                    unknown.append(case.name)
                if done <= MOST_TILES and predictor.engine is not None and predictor.bundle.context_vox is not None:
                    gathered += self.evidence(case, image, truth, predictor.engine, predictor.bundle.context_vox)
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
        large = [case.name for case in cases if case.name in rows and self.dataset.is_large(case)]
        if large:
            metrics["conventions"]["validation_parts"] = f"of {some(large)} the middle alone, as it is too large to be held as a whole"
        return metrics | _calibration(gathered, metrics["conventions"])

    def evidence(self, case: Case, image: Image, truth: np.ndarray, engine: Engine, context_vox: int) -> list[Evidence]:
        """What the network says of annotated voxels of a case, on its own grid; the same each time, by the plan's seed.

        A voxel of each class in turn is drawn, and the tile that answers for it is computed as prediction would, had it no tiles larger
        than a patch, before it is blended with others. Of the part that the tile answers for any voxels are taken: near what is
        looked for, and there each class as often as it is. Were as many taken of each class, "right nine times in ten" would
        be said of voxels that nobody meets.

        Args:
            case: of the validation.
            image: its image as read.
            truth: its label (*S), -1 not annotated.
            engine: the network, not averaged.
            context_vox: border that its output lacks.
        """
        plan = self.plan
        label_S = resample_labels(truth, grid_shape(image.shape_vox, voxel_size(image, plan), plan))
        rng = np.random.default_rng([plan.seed, self.cases.index(case)])
        looked_at = min(len(self.cases), MOST_TILES)
        chosen = _choose_tiles(label_S, plan, context_vox, MOST_TILES // looked_at, rng)
        if not chosen:
            return []
        prepared_CS = resample(normalise(image.array, plan.normalisation), label_S.shape, plan.interpolation)
        most = min(MOST_VOXELS, MOST_VALUES // len(plan.classes)) // (looked_at * len(chosen))
        found = []
        for section, tile in chosen:
            plane_CS, annotation_S = (prepared_CS, label_S) if section is None else (prepared_CS[:, section], label_S[section])
            logits_KS = engine(read_mirrored(plane_CS, tile.read))
            inside = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(tile.write, tile.blend, strict=True))
            truth_N = annotation_S[tuple(slice(a, b) for a, b in tile.write)].reshape(-1)
            places = np.flatnonzero(truth_N >= 0)
            if len(places) > most:
                places = rng.choice(places, most, replace=False)
            logits_KN = logits_KS[:, *inside].reshape(len(logits_KS), -1)[:, places]
            found.append(Evidence(group=case.group or case.name, logits_KN=logits_KN, truth_N=truth_N[places]))
        return found

    def _seconds_beside(self, case: Case, image: Image, truth: np.ndarray, labels: np.ndarray, engine: TorchEngine) -> float:
        """What the last prediction does with a case beside predicting it: how long it takes."""
        began = time.perf_counter()
        with scratch_folder(self.folder / "cache") as folder:
            self._write(folder, case, image, labels)
            self._scores(case, image, truth, labels)
        scored = time.perf_counter()
        self.evidence(case, image, truth, engine, engine.network.context_vox)
        # Of many cases the first alone are asked.
        return scored - began + (time.perf_counter() - scored) * min(1.0, MOST_TILES / len(self.cases))

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


def _choose_tiles(label_S: np.ndarray, plan: Plan, context_vox: int, most: int, rng: np.random.Generator) -> list[tuple[int | None, Tile]]:
    """Tiles of a label map, each with the section that it is of, if a 2D network sees a volume; none where nothing is annotated.

    As many at most as are asked for, and as a share of all of them is, but one at least.
    """
    sections = label_S.ndim - plan.dims
    side = tuple(size - 2 * context_vox for size in plan.patch_vox)
    parts = cover(label_S.shape[sections:], side, overlap=plan.overlap, context_vox=(context_vox,) * plan.dims)
    # Of each row, how often each class occurs: places are found without a list of all of them, which would be several volumes.
    counts = np.stack([np.bincount(row[row >= 0], minlength=len(plan.classes)) for row in label_S])
    present = rng.permutation(np.flatnonzero(counts.sum(axis=0)))
    if not len(present):
        return []
    most = max(1, min(most, int(SHARE_OF_TILES * len(parts) * math.prod(label_S.shape[:sections]))))
    chosen: list[tuple[int | None, Tile]] = []
    for number in range(most):
        k = present[number % len(present)]
        row = int(np.searchsorted(np.cumsum(counts[:, k]), rng.integers(counts[:, k].sum()), side="right"))
        within = rng.choice(np.flatnonzero(label_S[row] == k))
        at = (row, *(int(index) for index in np.unravel_index(within, label_S.shape[1:])))
        tile = next(part for part in parts if all(a <= index < b for (a, b), index in zip(part.write, at[sections:], strict=True)))
        found = (row if sections else None, tile)
        if found not in chosen:
            chosen.append(found)
    return chosen


def _calibration(gathered: Sequence[Evidence], conventions: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json says of calibration, if anything can be said; adds to its conventions how it was made."""
    found = calibrate(gathered)
    if found is None:
        return {}
    conventions["calibration"] = (
        f"{found.words}; ECE: {BINS} bins of equal width of the chosen class's probability; Brier: squares summed over classes, 0 to 2; "
        "NLL in nats; of voxels in tiles around every class"
    )
    return {"calibration": found.to_json()}


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _number(value: float) -> float | None:
    """Five digits for the log, where undefined is null."""
    return None if math.isnan(value) else round(value, 5)
