"""Mutated files of every format are read or refused in one line; and what watches over that finds what it is there to find."""

import ctypes
import gzip
import json
import os
import random
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from microtome.errors import DataError, DataWarning, MicrotomeError
from microtome.evaluation.report import build_report
from tests import fuzz_documents, fuzz_soak, fuzzing
from tests.forked import FORKS
from tests.fuzz_soak import FORMATS, goals, targets_of
from tests.fuzz_trees import changed_tree, changed_trees, yaml_text
from tests.fuzzing import Outcome, Target, fuzz, mutated, png_mended

# Of each format, in `make test`; `make soak` reads a hundred thousand.
INPUTS = 200
# A number that nobody draws again.
SEED = 20261130
# Explaining a failure takes a minute.
PHASES = [phase for phase in Phase if phase is not Phase.explain]


# What watches: it finds what goes wrong, and by its number.


# Of three inputs, in one line of this file.
MESSAGES = {b"1": "alpha 1", b"2": "alpha 2", b"o": "omega"}


def read_bravely(path: Path) -> None:
    """Does, with a file of one letter, what that letter says."""
    data = path.read_bytes()
    if data == b"c":
        ctypes.string_at(0)
    if data == b"h":
        time.sleep(60)
    if data == b"w":
        time.sleep(1.5)
    if data == b"s":
        bytearray(2**28)
    if data == b"v":
        raise ValueError("a number that is none")
    if data == b"p":
        raise ValueError(f"of priority {os.nice(0)}")
    if data in MESSAGES:
        raise ValueError(MESSAGES[data])
    if data == b"n":
        raise DataError("elsewhere", expected="x", got="y", do="z", code="D001")
    if data == b"m":
        try:
            bytearray(2**40)
        except MemoryError:
            raise DataError(path, expected="x", got="y", do="z", code="D001") from None
    if data == b"d":
        raise DataError(path, expected="x", got="y", do="z", code="D001")


def letters(words: bytes) -> Target:
    """Inputs of one letter each, in this order."""
    seconds = 1 if b"h" in words or b"w" in words else 10
    return _Letters(name="letters", seeds=(b"g",), read=read_bravely, growth_bytes=2**26, seconds=seconds, dictionary=(words,))


class _Letters(Target):
    """A target whose inputs are letters, not chance."""

    def mutant(self, seed: int, number: int) -> bytes:
        return self.dictionary[0][number : number + 1]


@pytest.mark.parametrize(
    ("letter", "words"),
    [
        ("c", "ended the interpreter (exit code -11)"),
        ("h", "took longer than 1 s"),
        ("s", "took 2"),
        ("v", "raised ValueError"),
        ("n", "an error without the name case-x.dat"),
        ("m", "wanted more than 4 GiB of memory"),
    ],
)
def test_what_no_input_may_do_is_found_and_told_by_its_number(letter: str, words: str) -> None:
    outcome = fuzz(letters(f"ggd{letter}gg".encode()), 6, seed=1)
    [finding] = outcome.findings
    assert (finding.number, finding.data) == (3, letter.encode())
    assert words in finding.what
    # It went on behind it, and what was read was counted.
    assert (outcome.tried, outcome.good) == (6, 5 if letter == "s" else 4)
    with pytest.raises(AssertionError, match=r"letters, seed 1:\ninput 3: "):
        outcome.check()


def test_while_a_reader_is_started_or_awaited_no_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    class Watched:
        """A process that notes whether others are kept from being started and awaited meanwhile."""

        def __init__(self, **words: Any) -> None:
            self.process = FORKS.Process(**words)

        def start(self) -> None:
            calls.append(("start", fuzzing._ENDS.locked()))
            self.process.start()

        def join(self) -> None:
            calls.append(("join", fuzzing._ENDS.locked()))
            self.process.join()

        @property
        def exitcode(self) -> int | None:
            return self.process.exitcode

    monkeypatch.setattr(fuzzing, "FORKS", SimpleNamespace(Pipe=FORKS.Pipe, Process=Watched))
    [finding] = fuzz(letters(b"gcg"), 3, seed=1).findings
    assert "ended the interpreter" in finding.what
    assert calls == [("start", True), ("join", True)] * 2


def test_what_is_raised_in_another_line_or_with_another_message_is_another_finding() -> None:
    outcome = fuzz(letters(b"g1o2vov1"), 8, seed=1)
    assert [(finding.number, finding.data) for finding in outcome.findings] == [(1, b"1"), (2, b"o"), (4, b"v")]
    assert outcome.tried == 8


def test_what_is_read_aside_has_others_before_it_and_more_time() -> None:
    outcome = fuzz(letters(b"gp"), 2, seed=1, aside=True)
    [finding] = outcome.findings
    assert f"of priority {min(19, os.nice(0) + 10)}" in finding.what
    # Longer than a second, of which it has ten.
    assert fuzz(letters(b"gwg"), 3, seed=1, aside=True).findings == []


def test_good_files_and_files_that_are_refused_in_one_line_are_no_findings() -> None:
    outcome = fuzz(letters(b"gdgd"), 4, seed=1)
    outcome.check()
    assert (outcome.tried, outcome.good) == (4, 2)


def test_a_seed_that_is_refused_is_a_finding_as_its_mutants_would_reach_nothing() -> None:
    outcome = fuzz(Target(name="refused", seeds=(b"g", b"d"), read=read_bravely), 10, seed=1)
    [finding] = outcome.findings
    assert finding.what.startswith("seed 1 is refused: ")


def test_inputs_from_a_number_on_have_the_numbers_of_all() -> None:
    outcome = fuzz(letters(b"vgggcggv"), 4, first=3, seed=1)
    assert [finding.number for finding in outcome.findings] == [4]
    assert (outcome.tried, outcome.good, outcome.next) == (4, 3, 7)


def test_the_time_that_is_given_ends_it_and_says_how_many_were_read() -> None:
    outcome = fuzz(Target(name="many", seeds=(b"g" * 50,), read=read_bravely), 10**9, seconds=0.5, seed=1)
    outcome.check()
    assert 0 < outcome.tried < 10**9


def test_a_mutant_follows_from_its_number() -> None:
    target = Target(name="x", seeds=(bytes(range(200)), b"12 34"), read=read_bravely, dictionary=(b"WORD",))
    numbers = range(2, 300)
    drawn = [target.mutant(7, number) for number in numbers]
    assert drawn == [target.mutant(7, number) for number in numbers]
    assert len(set(drawn)) > 250
    assert drawn != [target.mutant(8, number) for number in numbers]
    assert [target.mutant(7, number) for number in range(2)] == [*target.seeds]


def test_every_kind_of_change_is_drawn() -> None:
    seed, rng = bytes(100) + b"value 17", random.Random(0)
    drawn = [mutated(seed, rng, (b"WORD",), (b"\xaa" * 100,)) for _ in range(400)]
    assert {len(data) < len(seed) for data in drawn} == {len(data) > len(seed) for data in drawn} == {True, False}
    assert any(b"WORD" in data for data in drawn)
    assert any(b"\xaa" * 4 in data for data in drawn)
    assert any(struct.pack("<q", 2**63 - 1) in data for data in drawn)
    assert any(b"value 99999999999999999999" in data for data in drawn)


def test_a_mended_png_has_the_checksums_of_its_chunks() -> None:
    seed = targets_of("PNG")[0].seeds[0]
    assert png_mended(seed) == seed
    wider = bytearray(seed)
    wider[19] += 1
    mended = png_mended(bytes(wider))
    # The first chunk: 13 bytes behind its length and name, then the checksum of name and bytes.
    assert mended[:29] == wider[:29]
    assert mended[29:33] == zlib.crc32(mended[12:29]).to_bytes(4, "big") != seed[29:33]


TREE = {"a": [1, 2.5, "x"], "b": {"c": None, "d": [True, {"e": "y"}]}}


def test_changed_trees_are_other_trees_of_every_kind_and_the_first_stays_as_it_is() -> None:
    before = json.dumps(TREE)
    drawn = [changed_tree(TREE, random.Random(number)) for number in range(500)]
    assert json.dumps(TREE) == before
    texts = [json.dumps(tree) for tree in drawn]
    assert sum(text != before for text in texts) > 450
    assert any("NaN" in text for text in texts)
    assert any("Infinity" in text for text in texts)
    assert any(text.count("[") + text.count("{") > 60 for text in texts)
    assert any(len(tree) < 2 for tree in drawn if isinstance(tree, dict))
    assert any(str(2**64) in text for text in texts)


# Every format.


@pytest.mark.parametrize("name", list(FORMATS))
def test_mutants_of_every_format_are_read_or_refused_in_one_line(name: str) -> None:
    targets = targets_of(name)
    assert {target.name for target in targets} == {name}
    inputs = goals(INPUTS, targets)
    assert INPUTS <= sum(inputs) < INPUTS + len(targets)
    for target, number in zip(targets, inputs, strict=True):
        outcome = fuzz(target, len(target.seeds) + number, seed=SEED)
        outcome.check()
        assert outcome.good >= len(target.seeds), "every seed is good"
        assert outcome.tried == len(target.seeds) + number


def test_of_every_file_of_a_run_pages_are_made_of_mutants_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Path] = []
    monkeypatch.setattr(fuzz_documents, "build_report", lambda folder: pages.append(build_report(folder)))
    for name, target in enumerate(each for each in targets_of("run folder") if each.read is fuzz_documents.read_report):
        file, given = target.placed(tmp_path / str(name))
        before = len(pages)
        for number in range(1, 26):
            file.write_bytes(target.mutant(SEED, number))
            with suppress(MicrotomeError):
                target.read(given)
        assert len(pages) > before
    assert len(pages) >= 30


# Trees, as hypothesis draws them: it finds the smallest that fails.


def _refused_well(target: Target, folder: Path, content: bytes) -> None:
    """The content is read, or refused in one line that names the file or its folder."""
    file, given = target.placed(folder)
    file.write_bytes(content)
    said = given.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:
            target.read(given)
        except MicrotomeError as error:
            said = str(error)
    assert given.name in said
    assert "\n" not in said


def _json_text(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _yaml_bytes(tree: Any) -> bytes:
    return yaml_text(tree).encode("utf-8", "replace")


_STRUCTURED: list[tuple[str, int, int, Callable[[Any], bytes]]] = [
    *(("microtome.yaml", 0, seed, _yaml_bytes) for seed in range(len(fuzz_documents.DESCRIPTIONS))),
    *(("dataset.json", 0, seed, _json_text) for seed in range(len(fuzz_documents.DOCUMENTS))),
    ("plan.yaml", 0, 0, _yaml_bytes),
    *(("run folder", number, 0, _json_text) for number in (0, 1, 2, 3, 4, 8, 9)),
    *(("OME-Zarr", number, 0, _json_text) for number in (0, 1, 2, 4, 5)),
    ("N5", 0, 0, _json_text),
    ("precomputed", 0, 0, _json_text),
]


@pytest.mark.parametrize(("name", "number", "seed", "text"), _STRUCTURED, ids=[f"{name}-{i}-{j}" for name, i, j, _ in _STRUCTURED])
def test_whatever_stands_in_place_of_a_value_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, number: int, seed: int, text: Callable[[Any], bytes]
) -> None:
    target = targets_of(name)[number]
    tree = yaml.safe_load(target.seeds[seed])

    @given(tree=changed_trees(tree))
    @settings(max_examples=8, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
    def read(tree: Any) -> None:
        _refused_well(target, tmp_path_factory.mktemp("x"), text(tree))

    read()


# The soak itself.


def test_a_soak_counts_what_it_read_and_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_soak, "INPUTS", 300)
    rows = fuzz_soak.run(20, ["NPY", "BMP"], guided=False)
    assert [(row["part"], row["what"]) for row in rows] == [("fuzz", "NPY"), ("fuzz", "BMP")]
    assert all(row["tried"] == row["of"] == 300 and row["failed"] == 0 and row["seconds"] > 0 for row in rows)


def test_a_soak_that_finds_something_says_which_input_and_goes_on_with_the_other_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = {"bad letters": (lambda: letters(b"gdvgdg"),), "good letters": (lambda: letters(b"gdgdgd"),)}
    monkeypatch.setattr(fuzz_soak, "FORMATS", formats)
    monkeypatch.setattr(fuzz_soak, "INPUTS", 6)
    bad, good = fuzz_soak.run(20, guided=False)
    assert [(row["what"], row["tried"], row["failed"]) for row in (bad, good)] == [("bad letters", 6, 1), ("good letters", 6, 0)]
    assert good["findings"] == []
    [finding] = bad["findings"]
    # What repeats it: the seed, the number, the bytes.
    seed = int(finding.partition(",")[0].removeprefix("seed "))
    assert f"seed {seed}, input 2: raised ValueError" in finding
    assert gzip.decompress(bytes.fromhex(finding.rpartition(": ")[2])) == b"v" == letters(b"gdvgdg").mutant(seed, 2)


def test_a_soak_reads_other_mutants_of_one_seed_in_each_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    slices: list[tuple[Outcome, str]] = []

    def some(target: Target, inputs: int, **options: Any) -> Outcome:
        outcome = fuzz(target, min(inputs, 4), **options)
        slices.append((outcome, target.dictionary[0][outcome.first : outcome.next].decode()))
        return outcome

    # Two that end the process, the second as the last of a slice.
    monkeypatch.setattr(fuzz_soak, "FORMATS", {"letters": (lambda: letters(b"gcdgddgcgd"),)})
    monkeypatch.setattr(fuzz_soak, "INPUTS", 10)
    monkeypatch.setattr(fuzz_soak, "fuzz", some)
    [row] = fuzz_soak.run(20, guided=False)
    assert (row["tried"], row["failed"]) == (10, 1)
    assert [(outcome.first, outcome.next, read) for outcome, read in slices] == [(0, 4, "gcdg"), (4, 8, "ddgc"), (8, 10, "gd")]
    assert [outcome.good for outcome, _ in slices] == [2, 1, 1]
    assert len({outcome.seed for outcome, _ in slices}) == 1


def test_a_kind_of_finding_is_told_once_and_the_format_goes_on_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_soak, "FORMATS", {"findings": (lambda: letters(b"gvcvnc" * 2),)})
    monkeypatch.setattr(fuzz_soak, "INPUTS", 12)
    # Half of them at a time, in which each is met once more.
    monkeypatch.setattr(fuzz_soak, "fuzz", lambda target, inputs, **options: fuzz(target, min(inputs, 6), **options))
    [row] = fuzz_soak.run(20, guided=False)
    assert (row["tried"], row["of"], row["failed"]) == (12, 12, 3)
    assert [re.findall(r"input \d+: \w+ \w+ \w+", finding)[0] for finding in row["findings"]] == [
        "input 1: raised ValueError at",
        "input 2: ended the interpreter",
        "input 4: an error without",
    ]


def test_what_has_the_least_of_its_inputs_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def some(target: Target, inputs: int, **_: object) -> Outcome:
        """The slow one gets a tenth of the inputs in the same time."""
        read.append(target.name)
        return Outcome(target.name, 0, tried=min(inputs, 10 if target.name == "slow" else 100))

    targets = {name: Target(name=name, seeds=(b"g",), read=read_bravely) for name in ("fast", "slow")}
    monkeypatch.setattr(fuzz_soak, "FORMATS", {name: (lambda name=name: targets[name],) for name in targets})
    monkeypatch.setattr(fuzz_soak, "INPUTS", 100)
    monkeypatch.setattr(fuzz_soak, "fuzz", some)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    targets_of.cache_clear()
    rows = fuzz_soak.run(20, guided=False)
    targets_of.cache_clear()
    assert [row["tried"] for row in rows] == [100, 100]
    assert read == ["fast"] + ["slow"] * 10


def test_a_format_that_nobody_knows_is_no_soak() -> None:
    with pytest.raises(KeyError, match="XYZ"):
        fuzz_soak.run(1, ["XYZ"])
