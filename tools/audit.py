"""Asks for known vulnerabilities of every pin of requirements.lock, and of torch, and says so where nobody could be asked.

`python -m tools.audit torch==2.13.0` ends with 1 where there is one, with `--strict` also where a package could not be asked for.
pip-audit by itself says that nothing is known, and ends with 0, where its service knows none of the packages: an index that
mirrors only files answers like that.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.lock import read_lock

# Who is asked, in this order, until one knows anything: the index itself, then the Open Source Vulnerabilities database.
SERVICES = ("pypi", "osv")
MOST_SECONDS = 300
# How `requests` names what went wrong on the way.
UNREACHABLE = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError")


class Answer(NamedTuple):
    """What one service said: a line a vulnerability, the packages it answered for and not, and why it did not answer at all."""

    service: str
    found: tuple[str, ...] = ()
    asked: int = 0
    unknown: tuple[str, ...] = ()
    failure: str = ""


def read_answer(service: str, output: str, errors: str) -> Answer:
    """What pip-audit's JSON says; without JSON, the last line of its errors is the failure."""
    try:
        rows: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, LookupError, TypeError):
        last = (errors.strip().splitlines() or ["no answer"])[-1]
        return Answer(service, failure="cannot be reached" if UNREACHABLE.search(last) else last[:200])
    found = [_vulnerability(row, one) for row in rows for one in row.get("vulns", ())]
    unknown = [row["name"] for row in rows if "skip_reason" in row]
    return Answer(service, tuple(found), len(rows) - len(unknown), tuple(unknown))


def _vulnerability(row: dict[str, Any], one: dict[str, Any]) -> str:
    """One vulnerability in a line, with the version that has it no more."""
    mended = ", ".join(one.get("fix_versions") or ()) or "no release yet"
    return f"{row['name']} {row['version']}: {one['id']} ({' '.join(one.get('aliases') or ())}), mended in: {mended}"


def ask(service: str, requirements: Sequence[str]) -> Answer:
    """Ask one service for pinned requirements."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        words = ["-m", "pip_audit", "--requirement", str(file), "--no-deps", "--disable-pip", "--format", "json", "--vulnerability-service"]
        command = [sys.executable, *words, service, "--desc", "off", "--progress-spinner", "off", "--cache-dir", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return Answer(service, failure=f"no answer in {MOST_SECONDS} seconds")
    return read_answer(service, done.stdout, done.stderr)


def verdict(answers: Sequence[Answer], of: int, *, strict: bool) -> tuple[list[str], int]:
    """What is said, and the exit code.

    Args:
        answers: of the services that were asked; the last is the one that counts.
        of: packages that they were asked for.
        strict: whether a package that nobody could be asked for is a failure.
    """
    last = answers[-1]
    lines = list(last.found)
    if not last.asked:
        why = "; ".join(f"{answer.service}: {answer.failure or 'knows none of them'}" for answer in answers)
        lines.append(f"audit: none of {of} packages could be audited ({why})")
    else:
        lines.append(f"audit: {last.asked} of {of} packages audited by {last.service}, {len(last.found)} known vulnerabilities")
        if last.unknown:
            lines.append(f"audit: not known to {last.service}: {', '.join(last.unknown)}")
    failed = bool(last.found) or (strict and last.asked < of)
    return lines, int(failed)


def main() -> None:
    """Audit requirements.lock and the requirements that are given as words."""
    words = [word for word in sys.argv[1:] if word != "--strict"]
    requirements = [*words, *(f"{pin.name}=={pin.version}" for pin in read_lock().values())]
    answers: list[Answer] = []
    for service in SERVICES:
        answers.append(ask(service, requirements))
        if answers[-1].asked:
            break
    lines, code = verdict(answers, len(requirements), strict="--strict" in sys.argv)
    print("\n".join(lines))
    sys.exit(code)


if __name__ == "__main__":
    main()
