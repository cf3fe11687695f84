"""Packages imported one by one in a process of their own: one that cannot be, or that ends Python, is a finding and no more.

`python -m microtome.doctor.probe torch openvino ...` is that process. It says a line before and after each, and at last, where torch is
among them, what torch sees of the machine.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

MARK = "microtome-probe "
SEES = "microtome.doctor.capacity"
# From a network drive, with nothing of it in memory, torch alone takes a minute.
MOST_SECONDS = 300


@dataclass
class Probed:
    """What came of importing packages.

    Attributes:
        problems: module -> why it cannot be imported; those that can are not among them.
        machine: what torch sees, as `capacity.seen_by_torch` says it; empty without torch.
    """

    problems: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def probe(modules: Sequence[str]) -> Probed:
    """Import modules in another process, as often anew as one of them ends it."""
    found, left = Probed(), list(modules)
    while left:
        lines, ending = _run(left)
        begun = [line["begin"] for line in lines if "begin" in line]
        for line in lines:
            found.problems |= {line["end"]: line["problem"]} if line.get("problem") else {}
            found.machine |= line.get("machine", {})
        if not ending:
            break
        # The last that was begun ended the process; a process that did not even begin ends it for all.
        culprit = begun[-1] if begun else left[-1]
        if culprit == SEES:
            found.machine["problem"] = ending
            break
        found.problems[culprit] = ending
        left = left[left.index(culprit) + 1 :]
    return found


def _run(modules: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The lines that the process said, and how it ended; "" if all was well."""
    command = [sys.executable, "-W", "ignore", "-m", "microtome.doctor.probe", *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return _lines(said), f"is not imported after {MOST_SECONDS} s"
    return _lines(done.stdout), "" if done.returncode == 0 else f"ends Python ({_ending(done.returncode)})"


def _lines(said: str) -> list[dict[str, Any]]:
    """The lines that are meant for us; libraries have some of their own."""
    return [json.loads(line.removeprefix(MARK)) for line in said.splitlines() if line.startswith(MARK)]


def _ending(code: int) -> str:
    """`SIGILL`, or `exit code 3`."""
    known = {number.value: number.name for number in signal.Signals}
    return known.get(-code, f"exit code {code}")


def _say(**line: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(line)}\n")
    sys.stdout.flush()


def main(modules: Sequence[str]) -> None:
    """Import what is named, and say what comes of it."""
    for module in modules:
        _say(begin=module)
        try:
            import_module(module)
        except BaseException as error:  # noqa: BLE001 - whatever a broken installation raises is what is looked for
            _say(end=module, problem=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        else:
            _say(end=module, problem="")
    if "torch" in modules and "torch" in sys.modules:
        _say(begin=SEES)
        _say(machine=import_module(SEES).seen_by_torch())


if __name__ == "__main__":
    main(sys.argv[1:])
