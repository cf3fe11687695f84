"""The files of a run folder beside its weights: what it is made of, its plan, its log."""

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from microtome import lock
from microtome.config import Plan, dump_yaml, parse_config
from microtome.data.case import Case, Finding
from microtome.data.dataset import Dataset
from microtome.data.planes import plane_name
from microtome.data.split import Split
from microtome.errors import ConfigError
from microtome.evaluation.run_files import whole_lines
from microtome.files import atomic_path, flush, is_leftover, not_written, sweep, write_json, write_text
from microtome.json_files import MOST_OWN_BYTES, load_object
from microtome.training import initial
from microtome.training.warp import compiled
from microtome.yaml_files import load_yaml


class RunFolder:
    """The files of a run.

    Args:
        path: the folder; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        """The file that holds the whole state."""
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def log(self) -> Path:
        """The events, one in a line."""
        return self.path / "log.jsonl"

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one line to the log.

        Raises:
            RunError: the disk is full.
        """
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise not_written(self.log, error, "a log that can be written", "check the disk, then --resume") from error

    def keep_log(self) -> None:
        """Put the log on the disk: after a power cut it must reach as far as the checkpoint that is written next.

        Raises:
            RunError: the disk is full or broken.
        """
        if self.log.exists():
            flush(self.log)

    def shorten_log(self, step: int, validations: int, *, ended: bool) -> None:
        """Take out what is made again: lines after a step, validations beyond so many, the end of a run that goes on."""
        if not self.log.exists():
            return
        with atomic_path(self.log) as part, part.open("w", encoding="utf-8") as file:
            for line, (kind, at) in self._lines():
                # The one validation that a checkpoint may lack although it is of its step: of minutes that were over before any other.
                made_again = kind == "validation" and validations == 0
                validations -= kind == "validation" and at <= step
                if at <= step and not made_again and (ended or kind != "end"):
                    file.write(line + "\n")

    def has_ended(self) -> bool:
        """Whether the log says that the run came to its end."""
        return any(kind == "end" for _, (kind, _) in self._lines())

    def is_finished(self, plan: Plan) -> bool:
        """Whether the run came to its end, and the plan gives it no other minutes since."""
        return self.has_ended() and plan.minutes == read_plan(self.path / "plan.yaml").minutes

    def _lines(self) -> Iterator[tuple[str, tuple[str, float]]]:
        """The lines of the log, one at a time, each with what `_event` says of it; a power cut may leave any bytes at its end."""
        if not self.log.exists():
            return
        with self.log.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for _, line in whole_lines(file):
                yield line.rstrip("\n"), _event(line)

    def sweep(self) -> None:
        """Remove what killed processes left half-written; nobody else may be training here.

        Graphs are also written by whoever predicts with the model, and a report by whoever asks for one: what a running process of
        this machine is writing stays.
        """
        for folder in (self.path, self.checkpoint.parent, self.path / "model", self.path / "model" / "engines"):
            sweep(folder)

    def write_plan(self, plan: Plan) -> None:
        """Write the plan that the run goes by."""
        write_text(self.path / "plan.yaml", dump_yaml(plan))

    def describe(
        self, dataset: Dataset, plan: Plan, split: Split, more: Iterable[Finding], fingerprints: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Write what the run is about before it begins; `more` are findings of its split, `fingerprints` of its files by part."""
        self.write_plan(plan)
        document = {
            "root": str(dataset.root),
            "layout": dataset.layout,
            "legend": dataset.legend.to_json(),
            "train": [case.name for case in split.train],
            "validation": [case.name for case in split.validation],
            "held_out": _held_out(split.train),
            "fingerprints": dict(fingerprints),
            "findings": [
                {"severity": f.severity, "code": f.code, "case": f.case, "message": f.message, "files": [str(p) for p in f.files]}
                for f in (*dataset.findings, *more)
            ],
        }
        write_json(self.path / "dataset.json", document)

    def is_described(self) -> bool:
        """Whether that is written; a run killed between its first files lacks it."""
        return (self.path / "dataset.json").exists()

    def check_split(self, split: Split) -> dict[str, str]:
        """Refuse to go on with other cases than the run began with: what it learned from must not become what it is scored on.

        Returns:
            the fingerprints of the files that it began with, by part; none of runs of earlier versions.

        Raises:
            ConfigError: names one of the cases.
            DataError: the file is damaged.
        """
        path = self.path / "dataset.json"
        before = self._description()
        for part, cases in (("train", split.train), ("validation", split.validation)):
            changed = {case.name for case in cases} ^ set(map(str, before.get(part, [case.name for case in cases]) or ()))
            if changed:
                got = f"{len(changed)} others ({sorted(changed)[0]}, ...)"
                raise ConfigError(
                    path, expected=f"the same cases in `{part}`", got=got, do="bring the data back, or start a new run", code="C041"
                )
        now = _held_out(split.train)
        held_out = before.get("held_out", now)
        if held_out != now:
            expected, do = f"the held-out slices {held_out}", "bring the annotation back, or start a new run"
            raise ConfigError(path, expected=expected, got=str(now), do=do, code="C041")
        fingerprints = before.get("fingerprints")
        return {str(part): str(found) for part, found in fingerprints.items()} if isinstance(fingerprints, dict) else {}

    def changed_before(self) -> dict[str, str]:
        """What `note_changed` wrote down in earlier sessions of the run."""
        recorded = self._description().get("changed_since")
        return {str(part): str(found) for part, found in recorded.items()} if isinstance(recorded, dict) else {}

    def note_changed(self, changed: Mapping[str, str], message: str) -> None:
        """Write down, once and for good, which parts have other files than the run began with; the report shows the message.

        What a run learned from other files stays in it when the first ones are put back.

        Args:
            changed: part -> fingerprint of the files that the run began with; may be empty.
            message: what that means, for people.
        """
        if changed.keys() <= (known := self.changed_before()).keys():
            return
        document = self._description()
        finding = {"severity": "warning", "code": "changed-data", "case": "", "message": message, "files": []}
        findings = document.get("findings")
        findings = [*(findings if isinstance(findings, list) else []), finding]
        write_json(self.path / "dataset.json", {**document, "changed_since": {**changed, **known}, "findings": findings})

    def _description(self) -> dict[str, Any]:
        """What `describe` wrote; nothing where a kill came before it."""
        path = self.path / "dataset.json"
        if not path.exists():
            return {}
        return dict(load_object(path, do="bring the file back, or start a new run", most_bytes=MOST_OWN_BYTES))


def _held_out(cases: Iterable[Case]) -> dict[str, list[str]]:
    """The planes of each case that it trains without."""
    return {case.name: [plane_name(plane) for plane in case.planes.hidden] for case in cases if case.planes}


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse, before any work, a folder that another process uses or that holds another run, or one to resume that holds none.

    Raises:
        ConfigError: of the folder.
        RunError: it is in use.
    """
    lock.refuse_if_used(folder)
    if resume and not (folder / "plan.yaml").exists():
        raise ConfigError(folder, expected="a run folder with plan.yaml", got="none", do="check --out, or leave out --resume", code="C006")
    if not resume and folder.exists() and (not folder.is_dir() or not all(map(_is_rest, folder.iterdir()))):
        if not folder.is_dir():
            raise ConfigError(folder, expected="a new or empty folder", got="a file", do="give another --out", code="C005")
        raise ConfigError(
            folder, expected="a new or empty folder", got="one with files in it", do="give another --out, or --resume to go on", code="C005"
        )


def _is_rest(path: Path) -> bool:
    """Whether a killed process left this before its run had begun: half a file, its lock, or the weights that it was to begin with."""
    return is_leftover(path) or path.name in (lock.NAME, initial.FILE)


def read_plan(path: Path) -> Plan:
    """A plan from a YAML file, as `microtome plan --out` writes it and a person may have changed it."""
    return parse_config(Plan, load_yaml(path), path)


def environment(device: torch.device) -> dict[str, str | int | bool]:
    """What a person needs to know to run this again."""
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "compiled_warp": compiled(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "command": lock.command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("microtome", "torch", "numpy", "scipy")}}


def _processor() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="ignore").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _event(line: str) -> tuple[str, float]:
    """Kind and step of a log line; the step is infinite for a line that was cut off."""
    try:
        event = json.loads(line)
        return str(event["event"]), float(event["step"])
    except (ValueError, KeyError, TypeError):
        return "", math.inf
