"""The whole road on small made data: train in 2D and 3D, predict by each engine that is here, score, report, resume a killed run."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome.bundle import Bundle, load_bundle
from microtome.config import NetworkConfig, Plan, dump_yaml
from microtome.data.dataset import open_dataset
from microtome.data.synthetic import DemoConfig, DemoData, write_demo_data
from microtome.doctor.findings import Check, Level, Result
from microtome.errors import ConfigError, DataError, DataWarning, MicrotomeError, RunError, StoppedError
from microtome.evaluation.evaluate import evaluate
from microtome.evaluation.pages import write_scores
from microtome.files import make_folder, write_text
from microtome.images.files import read_image
from microtome.inference.agreement import Agreement, agreement
from microtome.inference.devices import has_bf16, pick_device
from microtome.inference.engines import ENGINES, NAMES, Engines
from microtome.inference.mirroring import Engine
from microtome.inference.predict_files import predict_files
from microtome.inference.predictor import Predictor
from microtome.training.rehearsal import make_plan, step_seconds
from microtome.training.run import train

# Two to train on, one to validate with, one unseen are the least that the road needs.
DATA = DemoConfig(volume_vox=(24, 40, 40), picture_vox=(64, 64), pictures=6)
WIDTHS = (8, 16, 32)
# The killed run dies so many steps after its first checkpoint, in the middle of its steps.
STEPS_AFTER_SAVE = 3
REPEATS = 3
# Share of equal labels below which arithmetic that rounds is not rounding but wrong.
LEAST_ROUNDED = 0.97
# Runs that this data is trained into.
PICTURES, VOLUMES = "cells", "tubules"
REPORT_IT = "report this with what `microtome doctor --json` prints"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of each; the defaults end in a minute on two cores.

    Attributes:
        data: that is made.
        steps_2d, steps_3d: of the two trainings.
        batch: patches a step.
        int8: whether that engine is tried, whose preparation takes longer than all others together.
    """

    data: DemoConfig = DATA
    steps_2d: int = 24
    steps_3d: int = 12
    batch: int = 2
    int8: bool = True


class _Found(Exception):  # noqa: N818 - no error: how a part ends that is not simply good
    """A part of the road ended with a finding of its own."""

    def __init__(self, finding: str, do: str = "", level: Level = "bad") -> None:
        super().__init__(finding)
        self.finding, self.do, self.level = finding, do, level


def run_checkup(folder: Path, size: Size, on_part: Callable[[str, int, int], None] = lambda name, done, of: None) -> Result:
    """Go the whole road in a folder, which keeps what was made; a part that fails stops only what needs it.

    Args:
        folder: new or empty.
        size: how much.
        on_part: is told each part as it begins, and its number.

    Raises:
        KeyboardInterrupt: somebody stopped it.
    """
    make_folder(folder)
    road = _Road(folder, size)
    parts = road.parts()
    with _own_cache(folder / "cache"), warnings.catch_warnings():
        # What the made files leave open is no news to anyone.
        warnings.simplefilter("ignore", DataWarning)
        for number, (name, needed, part) in enumerate(parts):
            on_part(name, number, len(parts))
            road.result.checks.append(road.check(name, needed, part))
    on_part("done", len(parts), len(parts))
    return road.result


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """What is measured is measured now, and leaves nothing in the user's cache."""
    before = os.environ.get("MICROTOME_CACHE")
    os.environ["MICROTOME_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MICROTOME_CACHE"]
        else:
            os.environ["MICROTOME_CACHE"] = before


class _Road:
    """The parts of the road, one method each; each returns its finding."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size, self.result = folder, size, Result()
        self.plans: dict[str, Plan] = {}
        self._data: DemoData | None = None
        self._failed: set[str] = set()

    def parts(self) -> list[tuple[str, tuple[str, ...], Callable[[], str]]]:
        """Name, what it needs, and what it does, of each part."""
        both = ("train 2D", "train 3D")
        parts: list[tuple[str, tuple[str, ...], Callable[[], str]]] = [
            ("made data", (), self.make_data),
            ("train 2D", ("made data",), partial(self.train, PICTURES, "cpu")),
            ("train 3D", ("made data",), partial(self.train, VOLUMES, "auto")),
        ]
        # The reference first: others are compared with its labels.
        names = ("torch", *(name for name in NAMES if name not in ("auto", "torch")))
        parts += [(name, (*both, *(("torch",) if name != "torch" else ())), partial(self.predict, name)) for name in names]
        return [
            *parts,
            ("evaluate", ("torch",), self.evaluate),
            ("report", ("train 2D",), self.report),
            ("kill, resume", ("train 2D",), self.resume),
        ]

    def check(self, name: str, needed: Sequence[str], part: Callable[[], str]) -> Check:
        """One part, made and timed, whatever it ends in."""
        missing = [need for need in needed if need in self._failed]
        if missing:
            self._failed.add(name)
            return Check(name, f"not tried, as `{missing[0]}` failed", "", "note")
        began = time.perf_counter()
        level: Level = "good"
        try:
            finding, do = part(), ""
        except StoppedError as error:
            # A training takes Ctrl-C as a wish to be saved; here it means the whole.
            raise KeyboardInterrupt from error
        except _Found as found:
            finding, do, level = found.finding, found.do, found.level
        except MicrotomeError as error:
            finding, do, level = error.line, error.do, "bad"
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is a finding
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            finding, do, level = said, _instead(name) if name in ENGINES else REPORT_IT, "bad"
        if level == "bad":
            self._failed.add(name)
        return Check(name, finding, do, level, time.perf_counter() - began)

    @property
    def data(self) -> DemoData:
        """What was made."""
        assert self._data is not None, "parts that need it name it"
        return self._data

    def make_data(self) -> str:
        """Write pictures of cells and volumes of tubules."""
        self._data = write_demo_data(self.folder / "data", self.size.data)
        return f"{self.size.data.pictures} pictures of cells, 2 volumes of tubules with a few annotated sections, and unseen ones"

    def train(self, name: str, device: str) -> str:
        """Plan and train one of the two; the loss must fall."""
        dataset = open_dataset(self.data.cells if name == PICTURES else self.data.tubules)
        steps = self.size.steps_2d if name == PICTURES else self.size.steps_3d
        planned, where = make_plan(dataset, steps=steps, device=device), pick_device(device)
        if name == PICTURES and has_bf16(where):
            self.result.step_seconds = step_seconds(planned.model_copy(update={"batch": self.size.batch}), where, ("bf16", "fp32"))
        self.plans[name] = plan = self._small(planned)
        write_text(self.folder / f"{name}.yaml", dump_yaml(plan))
        began, losses = time.perf_counter(), []

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "step":
                losses.append(event["loss"])

        train(dataset, plan, self.run(name), device=device, on_event=on_event)
        seconds, quarter = time.perf_counter() - began, max(1, steps // 4)
        first, last = float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))
        where_words = "GPU" if where.type == "cuda" else "processor"
        words = f"loss {first:.2f} → {last:.2f} in {len(losses)} steps of {plan.batch} patches on the {where_words} in {plan.precision}"
        if not last < first:
            raise _Found(f"{words}: nothing was learned", REPORT_IT)
        return f"{words}; {seconds:.0f} s with validation and report"

    def _small(self, plan: Plan) -> Plan:
        """The plan with a network and a batch that take seconds."""
        strides = ((1,) * plan.dims, *((2,) * plan.dims,) * (len(WIDTHS) - 1))
        kernels = ((3,) * plan.dims,) * len(WIDTHS)
        network = NetworkConfig(widths=WIDTHS, strides=strides, kernels=kernels, supervised_levels=2)
        changes = {"network": network, "batch": self.size.batch, "micro_batch": 0, "checkpointing": False}
        return plan.model_copy(update={**changes, "warmup": min(plan.warmup, plan.steps // 4), "validations": 2})

    def run(self, name: str) -> Path:
        """The run folder of pictures or volumes."""
        return self.folder / "runs" / name

    def predict(self, name: str) -> str:
        """Label pictures and a volume by one engine; its answers must be those of the trained network."""
        self._refuse(name)
        try:
            near = [self._answers(name, run) for run in (PICTURES, VOLUMES)]
        except DataError as error:
            if name != "openvino-int8":
                raise
            # So small a network may have no room for the rounding: to refuse is what it has to do.
            raise _Found(f"prepared, and refused for this small network: {error.got}", "", "note") from error
        shares = min(self._equal_labels(run, name) for run in (PICTURES, VOLUMES))
        words = f"{1000 * self.result.tile_seconds[name]:.1f} ms a patch"
        return words + (f"; {min(near, key=lambda one: one.labels)}" if name != "torch" else "") + f", {_share(shares)} of unseen images"

    def _answers(self, name: str, run: str) -> Agreement:
        """Label the unseen images of one run; how near the engine comes to its network."""
        bundle = load_bundle(self.run(run))
        try:
            # Not by `named`, which remembers and refuses: the numbers are what is looked for.
            engine = Engines(bundle, engine=name).candidates[0].open()
            found = self._agreement(engine, bundle, name)
            unseen = self.data.cells_unseen if run == PICTURES else self.data.tubules_unseen
            predict_files(Predictor(bundle, engine=engine), [unseen], self.labels(run, name))
        except (ConfigError, RunError) as error:
            raise _Found(error.line, _instead(name)) from error
        return found

    def _refuse(self, name: str) -> None:
        """Say why an engine is not tried, where it cannot be."""
        kind = ENGINES[name]
        needed = {"openvino": ("openvino", "onnx"), "onnxruntime": ("onnxruntime", "onnx")}.get(kind.package, ())
        extra = "int8" if kind.precision == "int8" else "fast"
        absent = [module for module in (*needed, *(("nncf",) if extra == "int8" else ())) if not _is_here(module)]
        if absent:
            raise _Found(
                f"not tried, as {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed",
                f'pip install "microtome[{extra}]"',
                "note",
            )
        device = pick_device() if kind.package == "torch" else torch.device("cpu")
        if kind.precision == "bf16" and not has_bf16(device):
            raise _Found("not for this machine: it does not multiply bfloat16", "", "note")
        if kind.precision == "int8" and not self.size.int8:
            raise _Found("not tried here", "", "note")

    def _agreement(self, engine: Engine, bundle: Bundle, name: str) -> Agreement:
        """How near an engine comes to the trained network on the golden input; its pace is noted.

        The oracle itself is compared too: with what it answered when the training ended.
        """
        samples = bundle.samples
        if samples is None:
            raise _Found("the model has no samples to be checked by", REPORT_IT)
        image_CS = np.ascontiguousarray(samples.golden_CS, np.float32)
        found = agreement(engine(image_CS), samples.logits_KS)
        precision = ENGINES[name].precision or "fp32"
        if not found.holds(precision):
            if precision != "fp32" and found.labels >= LEAST_ROUNDED:
                # A network that has learned for seconds is unsure of many voxels, and rounding turns them over.
                said = f"computes, but rounds too much for this small network: {found.failure(precision)}; of each model it is asked anew"
                raise _Found(said, "", "note")
            raise _Found(found.failure(precision), _instead(name))
        if bundle.plan.dims == 3:
            self.result.tile_seconds[name] = min(_seconds(engine, image_CS) for _ in range(REPEATS))
        return found

    def labels(self, run: str, name: str) -> Path:
        """Where an engine's label files lie."""
        return self.folder / "predictions" / name / run

    def _equal_labels(self, run: str, name: str) -> float:
        """The least share of voxels of an unseen image with the label that torch gives."""
        theirs = [path for path in sorted(self.labels(run, "torch").iterdir()) if path.suffix != ".json"]
        return min(float((read_image(self.labels(run, name) / path.name).array == read_image(path).array).mean()) for path in theirs)

    def evaluate(self) -> str:
        """Score both against the truth, and write the pages."""
        found = []
        for run, truth in ((PICTURES, self.data.cells_unseen_truth), (VOLUMES, self.data.tubules_unseen_truth)):
            scores = evaluate(self.labels(run, "torch"), truth)
            write_scores(scores, self.folder / "scores" / f"{run}.json", self.folder / "scores" / f"{run}.html")
            found.append(f"{run} {scores['summary']['dice']['mean']:.2f}")
        return f"Dice of {', '.join(found)} on unseen images, after seconds of training"

    def report(self) -> str:
        """See that the training left its page."""
        page = self.run(PICTURES) / "report.html"
        text = page.read_text(encoding="utf-8")
        if not text.rstrip().endswith("</html>"):
            raise _Found("the page is not whole", REPORT_IT)
        return f"one page of {len(text) / 1000:.0f} kB"

    def resume(self) -> str:
        """Kill a training in the middle and go on with it: it must end as the one that nothing stopped, bit for bit."""
        plan, out = self.plans[PICTURES], self.run("killed")
        step = -(-plan.steps // 2) + STEPS_AFTER_SAVE
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "microtome.doctor.dying",
            *map(str, (self.data.cells, self.folder / f"{PICTURES}.yaml", out, step)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if (out / "metrics.json").exists() or done.returncode == 0:
            raise _Found("the process could not be killed", REPORT_IT)
        reached = _last_step(out / "log.jsonl")
        if reached != step:
            said = " ".join(done.stderr.split())[-200:]
            raise _Found(f"the process ended at step {reached} instead of {step}: {said}", REPORT_IT)
        train(open_dataset(self.data.cells), plan, out, device="cpu", resume=True)
        whole, resumed = (load_bundle(self.run(name)).weights for name in (PICTURES, "killed"))
        different = [name for name in whole if not np.array_equal(whole[name], resumed[name])]
        if different or len(whole) != len(resumed):
            raise _Found(f"other weights than without the kill, {different[0] if different else 'and other names'} among them", REPORT_IT)
        return f"killed at step {step} of {plan.steps}, resumed: the same weights as without the kill, bit for bit"


def _last_step(log: Path) -> int:
    """The last step of a log, 0 without one."""
    if not log.exists():
        return 0
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return max((event["step"] for event in events if event["event"] == "step"), default=0)


def _instead(name: str) -> str:
    """What to do about an engine that fails."""
    package = ENGINES[name].package
    return REPORT_IT if package == "torch" else f"pip install --force-reinstall {package}, or predict with --engine torch"


def _seconds(engine: Engine, image_CS: np.ndarray) -> float:
    """Wall time of one tile."""
    began = time.perf_counter()
    engine(image_CS)
    return time.perf_counter() - began


def _share(value: float) -> str:
    """`99.98 %`, cut and never rounded up."""
    return f"{int(value * 10_000 + 1e-6) / 100:g} %"


def _is_here(module: str) -> bool:
    """Whether a module can be found."""
    return find_spec(module) is not None
