"""The log of a run that goes on: what is made again is taken out, line by line, however long it is."""

import json
import tracemalloc
from pathlib import Path

from microtome.training.folder import RunFolder


def log_of(folder: Path, *events: tuple[str, int]) -> str:
    """Write a log; what stands in it."""
    text = "".join(json.dumps({"event": kind, "step": step}) + "\n" for kind, step in events)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return text


def test_lines_after_a_step_validations_beyond_so_many_and_the_end_are_taken_out(tmp_path: Path) -> None:
    kept = log_of(tmp_path, ("step", 1), ("validation", 1), ("step", 2))
    log_of(tmp_path, ("step", 1), ("validation", 1), ("step", 2), ("validation", 2), ("end", 2), ("step", 3))
    RunFolder(tmp_path).shorten_log(2, 1, ended=False)
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == kept
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.shorten_log(2, 1, ended=False)
    assert not folder.has_ended()
    assert list(tmp_path.iterdir()) == []


def test_what_a_power_cut_left_behind_the_lines_is_never_in_memory_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    kept = log_of(tmp_path, ("step", 1), ("step", 2))
    with log.open("r+b") as file:
        # It takes no room on the disk.
        file.truncate(60 * 2**20)
        file.seek(0, 2)
        file.write(b"\n" + kept.encode())
    tracemalloc.start()
    try:
        ended = RunFolder(tmp_path).has_ended()
        RunFolder(tmp_path).shorten_log(1, 0, ended=False)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (ended, log.read_text(encoding="utf-8")) == (False, kept.splitlines(keepends=True)[0] * 2)
    assert most < 20 * 2**20
