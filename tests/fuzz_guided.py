"""Mutants that coverage guides: atheris watches which of our lines an input reaches, and keeps those that reach new ones.

`guided_outcome` starts this file as a process of its own, as `atheris.Fuzz` never returns; how many inputs were read stands in a
file that both map into memory, so that it is known however the process ends.
"""

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path

from tests.fuzzing import Finding, Outcome, Target, limit_memory, mutated, quiet, seed_refused, tried

_REPOSITORY = Path(__file__).parents[1]
_COUNT_BYTES = 16
# To start, on a busy machine: ten seconds of one core. The library stops by itself, and the clock of each input ends what hangs.
_SPARE_SECONDS = 240.0
_MOST_FINDINGS = 8
_LONGEST_INPUT = 1 << 16


def guided_outcome(name: str, number: int, seconds: float) -> Outcome | None:
    """Read inputs of a format's target for so long.

    Args:
        name: of the format, as in `fuzz_soak.FORMATS`.
        number: of its target.
        seconds: that it may read; starting it takes some more.

    Returns:
        what became of them; None where atheris is not installed.
    """
    if find_spec("atheris") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="guided-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        folder = Path(place)
        (folder / "count").write_bytes(bytes(_COUNT_BYTES))
        seed = random.SystemRandom().randrange(1, 2**31)
        words = [sys.executable, "-m", "tests.fuzz_guided", name, str(number), str(seconds), str(seed), place]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(_REPOSITORY / "src"), str(_REPOSITORY)))}
        with (folder / "said").open("wb") as said:
            try:
                done = subprocess.run(
                    words, cwd=_REPOSITORY, env=environment, stdout=said, stderr=said, timeout=seconds + _SPARE_SECONDS, check=False
                )
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = -signal.SIGALRM
        outcome = Outcome(name, seed)
        outcome.tried = int.from_bytes((folder / "count").read_bytes()[:8], "little")
        outcome.findings = [_finding(path) for path in sorted(folder.glob("finding-*.json"))]
        if code:
            outcome.findings.append(_crash(folder, code, outcome.tried))
        return outcome


def _finding(path: Path) -> Finding:
    found = json.loads(path.read_text())
    return Finding(found["what"], found["number"], bytes.fromhex(found["data"]))


def _crash(folder: Path, code: int, number: int) -> Finding:
    """What ended the process."""
    last = folder / "last"
    how = "took longer than 10 s" if code == -signal.SIGALRM else f"ended the interpreter (exit code {code})"
    trace = "\n".join((folder / name).read_text(errors="replace")[-1500:] for name in ("trace", "said") if (folder / name).exists())
    return Finding(f"{how}\n{trace}", number, last.read_bytes() if last.exists() else b"")


def _main(name: str, number: int, seconds: float, seed: int, folder: Path) -> None:
    """Read until the time is over; this process then ends."""
    import atheris

    with atheris.instrument_imports(include=["microtome"]):
        from tests.fuzz_soak import targets_of
    target = targets_of(name)[number]
    place, corpus = folder / "inputs", folder / "corpus"
    for made in (place, corpus):
        made.mkdir()
    for at, data in enumerate(target.seeds):
        (corpus / f"seed-{at}").write_bytes(data)
    file, given = target.placed(place)
    if refused := seed_refused(target, file, given):
        _keep(folder, 0, refused, b"")
        return
    limit_memory()
    watch = _Watch(target, folder, file, given)
    options = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", f"-max_len={_LONGEST_INPUT}", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], watch.read, custom_mutator=watch.mutate)
    atheris.Fuzz()


class _Watch:
    """Reads what it is given, counts it, and keeps what went wrong."""

    def __init__(self, target: Target, folder: Path, file: Path, given: Path) -> None:
        self.target, self.folder, self.file, self.given = target, folder, file, given
        with (folder / "count").open("r+b") as count:
            self.count = mmap.mmap(count.fileno(), _COUNT_BYTES)
        self.read_so_far, self.known = 0, set[str]()

    def read(self, data: bytes) -> None:
        """Read one input."""
        data = self.target.finished(data)
        self.read_so_far += 1
        self.count[:8] = self.read_so_far.to_bytes(8, "little")
        _, what = tried(self.target, data, self.file, self.given)
        kind = Finding(what, self.read_so_far, data).kind
        if what and kind not in self.known and len(self.known) < _MOST_FINDINGS:
            self.known.add(kind)
            _keep(self.folder, self.read_so_far, what, data)

    def mutate(self, data: bytes, most: int, seed: int) -> bytes:
        """The next input from one that reached new lines: by the library's changes, ours, or of what it says."""
        import atheris

        rng = random.Random(seed)
        if self.target.change and rng.random() < 0.4:
            try:
                return self.target.change(data, rng)[:most]
            except Exception:  # noqa: BLE001 - what an earlier change made may be nothing that can be taken apart
                pass
        if rng.random() < 0.4:
            return mutated(data, rng, self.target.dictionary, self.target.seeds)[:most]
        return bytes(atheris.Mutate(data, most))


def _keep(folder: Path, number: int, what: str, data: bytes) -> None:
    """A finding, for the process that started this one."""
    (folder / f"finding-{zlib.crc32(what.encode()):08x}.json").write_text(json.dumps({"what": what, "number": number, "data": data.hex()}))


if __name__ == "__main__":
    _name, _number, _seconds, _seed, _folder = sys.argv[1:]
    sys.argv = sys.argv[:1]
    with quiet(Path(_folder)):
        _main(_name, int(_number), float(_seconds), int(_seed), Path(_folder))
