"""Trainings that are killed, or whose disk is full or broken, and go on: what must be equal in the end, and whole at every instant."""

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microtome.bundle import load_bundle
from microtome.config import dump_yaml
from microtome.data.dataset import open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.inference.graphs import find_graph
from microtome.training.checkpoint import _read, previous_checkpoint
from microtome.training.folder import RunFolder, read_plan
from tests.faults import TAKING
from tests.forks import End, Kill, Nursery, Order
from tests.small import TINY_3D, small_plan, small_plan_3d

# What tells of time, and differs from run to run.
TIMED = {"seconds", "samples_per_second", "network_share", "case_seconds", "hash", "date", "command"}
# Between two validations a checkpoint after so many seconds, where it is 120 else.
OFTEN = {"microtome.training.loop:SECONDS_BETWEEN_CHECKPOINTS": 0.02}
ALWAYS = {"microtome.training.loop:SECONDS_BETWEEN_CHECKPOINTS": -1.0, "microtome.training.store:MOST_THREADS": 1}
_LINE = re.compile(r"microtome: (.+): expected (.+), got (.+); (.+) \[MT-[A-Z]\d{3}\]")


@dataclass(frozen=True)
class Setup:
    """A training that takes a second: data, plan, and a folder for its runs."""

    name: str
    data: Path
    plan: Path
    folder: Path

    def order(self, run: Path, **words: Any) -> Order:
        """The command as a person would give it: with --resume as soon as there is something to resume."""
        begun = (run / "plan.yaml").exists()
        how = ("--resume",) if begun else ("--plan", str(self.plan))
        typed = ("train", str(self.data), "--out", str(run), "--device", "cpu", *how)
        return Order(words=typed, log=str(run.with_suffix(".txt")), **words)


def setups(folder: Path, *, steps: int = 4, validations: int = 2) -> tuple[Setup, Setup]:
    """A training of pictures and one of volumes, of so many steps and validations."""
    made = write_demo_data(folder / "data", DemoConfig(picture_vox=(40, 44), volume_vox=(16, 20, 24), pictures=2))
    found = []
    for name, data in (("2D", made.cells), ("3D", made.tubules)):
        classes = open_dataset(data).legend.names
        words: dict[str, Any] = {"classes": classes, "steps": steps, "validations": validations}
        flat = TINY_3D.model_copy(update={"strides": ((1, 1), (2, 2)), "kernels": ((3, 3),) * 2})
        plan = small_plan(**words, network=flat) if name == "2D" else small_plan_3d(**words)
        path = folder / f"{name}.yaml"
        path.write_text(dump_yaml(plan), encoding="utf-8")
        found.append(Setup(name, data, path, folder))
    return found[0], found[1]


def content_of(run: Path) -> dict[str, Any]:
    """All that a run folder says, but for times: equal for runs that are the same."""
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    tensors, document = _read(RunFolder(run).checkpoint)
    bundle = load_bundle(run)
    plain = [name for name in files if name.startswith("validation/") or name in ("plan.yaml", "dataset.json", "metrics.json")]
    return {
        "files": files,
        "log": _timeless([json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]),
        "state": {name: (str(tensor.dtype), tensor.shape, _digest(tensor.numpy().tobytes())) for name, tensor in tensors.items()},
        "progress": _timeless(document),
        "model": {name: (str(array.dtype), array.shape, _digest(array.tobytes())) for name, array in bundle.weights.items()},
        "samples": None if bundle.samples is None else _digest(bundle.samples.golden_CS.tobytes() + bundle.samples.logits_KS.tobytes()),
        "described": _timeless(json.loads((run / "model" / "model.json").read_text(encoding="utf-8"))),
        "graph": _digest(found.read_bytes()) if (found := find_graph(bundle, "onnx")) else None,
        **{name: _digest((run / name).read_bytes()) for name in plain},
    }


def differences(run: Path, wanted: Mapping[str, Any]) -> list[str]:
    """What of a run that ended is not as it must be, in words; none if all is."""
    found = content_of(run)
    wrong = [f"{name}: {found.get(name)} instead of {wanted.get(name)}" for name in wanted | found if found.get(name) != wanted.get(name)]
    scored = {event["step"]: event["score"] for event in found["log"] if event["event"] == "validation"}
    best = max(scored.values())
    provenance = load_bundle(run).provenance
    if (provenance["score"], scored.get(provenance["step"])) != (best, best):
        wrong.append(f"the model is of step {provenance['step']} with {provenance['score']}, of {scored}")
    return [line[:2000] for line in wrong]


def broken(run: Path) -> list[str]:
    """What of a run that was ended at any instant is not whole, in words; none if all is."""
    wrong, files, progress = [], RunFolder(run), None
    for path in (previous_checkpoint(files.checkpoint), files.checkpoint):
        if path.exists():
            # Held to its hash; DataError where it is not whole.
            progress = _read(path)[1]["progress"]
    if previous_checkpoint(files.checkpoint).exists() and not files.checkpoint.exists():
        wrong.append("only the checkpoint before the last is there")
    if (run / "model" / "model.safetensors").exists():
        bundle = load_bundle(run)
        dict(bundle.weights)
        if progress is None:
            wrong.append("a model is there that no checkpoint knows")
        elif progress["best_step"] not in (bundle.provenance["step"], progress["step"]):
            wrong.append(f"the model is of step {bundle.provenance['step']}, and the checkpoint of {progress}")
    elif progress is not None and progress["best"] is not None and progress["best_step"] != progress["step"]:
        wrong.append(f"no model, and the checkpoint of {progress}")
    if (run / "plan.yaml").exists():
        read_plan(run / "plan.yaml")
    for name in ("dataset.json", "environment.json", "metrics.json", "model/model.json", "validation/predictions.json"):
        if (run / name).exists():
            json.loads((run / name).read_text(encoding="utf-8"))
    if (run / "report.html").exists() and not (run / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>"):
        wrong.append("report.html is cut off")
    return wrong


def one_line(run: Path) -> list[str]:
    """What is wrong with the last words of a run that failed: they must be one line that says where, what, and what to do."""
    said = run.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    last = said.rstrip().rsplit("\n", 1)[-1]
    return [said[-2000:]] if "Traceback" in said or not _LINE.fullmatch(last) else []


def unbroken(nursery: Nursery, setup: Setup, patches: Mapping[str, Any] = OFTEN) -> tuple[dict[str, Any], End]:
    """What a run that nobody disturbs leaves, and where it was for how long."""
    run = setup.folder / f"unbroken-{setup.name}"
    end = nursery.run(setup.order(run, patches=patches))
    assert end.code == 0, run.with_suffix(".txt").read_text(encoding="utf-8")
    wanted = content_of(run)
    assert differences(run, wanted) == []
    return wanted, end


@dataclass
class Tally:
    """What was tried, and what went wrong."""

    tried: int = 0
    runs: int = 0
    where: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def any_kill(stages: Sequence[tuple[str, float]], rng: random.Random) -> Kill:
    """A random instant: of the whole run, or, as often, of one of its stages, of which some are very short."""
    if rng.random() < 0.5:
        return Kill(seconds=rng.uniform(0, sum(seconds for _, seconds in stages)))
    stage = rng.choice(sorted({name for name, _ in stages}))
    times = [seconds for name, seconds in stages if name == stage]
    number = rng.randrange(len(times))
    return Kill(stage=stage, number=number + 1, seconds=rng.uniform(0, times[number]))


def kill_again_and_again(
    nursery: Nursery, setup: Setup, known: tuple[dict[str, Any], End], kills: int, rng: random.Random, tally: Tally
) -> None:
    """One run that is killed so many times, or until it comes to its end, and then left alone; it is compared with the unbroken one."""
    run, (wanted, end) = setup.folder / f"killed-{tally.runs}", known
    killed = 0
    while True:
        kill = any_kill(end.stages, rng) if killed < kills else None
        ended = nursery.run(setup.order(run, kill=kill, patches=OFTEN))
        if not ended.was_killed:
            break
        killed += 1
        tally.tried += 1
        tally.where[ended.stages[-1][0] if ended.stages else "start"] += 1
        tally.wrong += [f"{setup.name}, after {kill}: {what}" for what in broken(run)]
    tally.runs += 1
    if ended.code != 0:
        tally.wrong.append(f"{setup.name}: exit code {ended.code}: {run.with_suffix('.txt').read_text(encoding='utf-8')[-2000:]}")
    else:
        tally.wrong += [f"{setup.name}: {what}" for what in differences(run, wanted)]
    shutil.rmtree(run)


def calls_of(nursery: Nursery, setup: Setup) -> list[tuple[str, str, str]]:
    """Every call that changes something on the disk in a run that nobody disturbs, in their order: name and paths below the run."""
    run, trace = setup.folder / f"traced-{setup.name}", setup.folder / f"traced-{setup.name}.json"
    end = nursery.run(setup.order(run, patches=ALWAYS, fault={"below": str(run), "trace": str(trace)}))
    assert end.code == 0, run.with_suffix(".txt").read_text(encoding="utf-8")
    return [(name, path, other) for name, path, other in json.loads(trace.read_text(encoding="utf-8"))]


def faults_at(calls: Sequence[tuple[str, str, str]], kinds: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each call with each fault that it can have, and that leaves something else than one before it."""
    before = ""
    for number, (name, _, _) in enumerate(calls, start=1):
        can = {
            # What a flush changes outlives a power cut, and a kill all the same.
            "before": before != "fsync",
            "half": name in ("write", "pwrite"),
            # What takes no room is done on a full disk too.
            "full": name in (*TAKING, "fsync"),
        }
        yield from ((number, kind) for kind in kinds if can.get(kind, True))
        before = name


def survive(nursery: Nursery, setup: Setup, wanted: Mapping[str, Any], fault: tuple[int, str], tally: Tally) -> None:
    """One run with a fault at one call, and on with it without; it is compared with the unbroken one."""
    run, (number, kind) = setup.folder / f"faulty-{setup.name}-{tally.runs}", fault
    ended = nursery.run(setup.order(run, patches=ALWAYS, fault={"below": str(run), "number": number, "kind": kind}))
    where = f"{setup.name}, {kind} at call {number}"
    tally.tried, tally.runs = tally.tried + 1, tally.runs + 1
    tally.where[kind] += 1
    tally.wrong += [f"{where}: {what}" for what in broken(run)]
    if kind in ("full", "broken"):
        # Of what is only tidied up, or may be missing, nobody is told.
        if ended.code not in (0, 1):
            tally.wrong.append(f"{where}: exit code {ended.code}")
        if ended.code:
            tally.wrong += [f"{where}: {what}" for what in one_line(run)]
    elif not ended.was_killed:
        tally.wrong.append(f"{where}: it was not killed, but ended with {ended.code}")
    again = nursery.run(setup.order(run, patches=ALWAYS))
    if again.code != 0:
        tally.wrong.append(f"{where}, then: exit code {again.code}: {run.with_suffix('.txt').read_text(encoding='utf-8')[-2000:]}")
    else:
        tally.wrong += [f"{where}, then: {what}" for what in differences(run, wanted)]
    shutil.rmtree(run, ignore_errors=True)


def _timeless(value: Any) -> Any:
    """The value without what tells of time."""
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in TIMED}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
