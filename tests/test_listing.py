"""The list of predictions: what it holds while files are written, after a kill, and how seldom it is written."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from microtome.data import listing as module
from microtome.data.case import Case
from microtome.data.legend import Legend
from microtome.data.listing import LISTING, Entry, Listing, continued_listing, forget_empty, read_listing, recording, write_listing
from microtome.errors import DataError, RunError
from microtome.lock import in_use

LEGEND = Legend(names=("ground", "cell"), values=((0,), (7,)), background=0, reason="seen")
OTHER = Legend(names=("ground", "cell"), values=((0,), (9,)), background=0, reason="seen")


def case_of(name: str) -> Case:
    return Case(name=name, images=(Path(f"in/{name}.png"),))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_listing(tmp_path) is None
    listing = Listing(legend=LEGEND, entries={"a/b.png": Entry(case="a/b", image="in/a/b.png")}, writing=frozenset({"c"}))
    write_listing(tmp_path, listing)
    assert read_listing(tmp_path) == listing


def test_all_names_are_listed_before_the_first_file_and_none_after_the_last(tmp_path: Path) -> None:
    with recording(tmp_path, LEGEND, ["a", "b"]) as record:
        assert json.loads((tmp_path / LISTING).read_text())["writing"] == ["a", "b"]
        record.add(tmp_path / "a.png", case_of("a"))
    found = read_listing(tmp_path)
    assert found is not None
    assert (found.entries, found.writing) == ({"a.png": Entry(case="a", image="in/a.png")}, frozenset())


def test_the_list_is_written_once_for_fifty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(module, "write_listing", lambda folder, listing: written.append(len(listing.entries)))
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    with recording(tmp_path, LEGEND, []) as record:
        for number in range(120):
            record.add(tmp_path / f"{number}.png", case_of(str(number)))
    assert written == [0, 50, 100, 120]


def test_the_list_is_written_when_five_seconds_have_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    seconds = iter([0.0, 3.0, 6.0, 6.0, 8.0, 8.0])
    monkeypatch.setattr(module, "write_listing", lambda folder, listing: written.append(len(listing.entries)))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    with recording(tmp_path, LEGEND, []) as record:
        for name in "abc":
            record.add(tmp_path / f"{name}.png", case_of(name))
    assert written == [0, 2, 3]


def entries_of(folder: Path) -> set[str]:
    found = read_listing(folder)
    assert found is not None
    assert found.writing == frozenset()
    return set(found.entries)


def test_two_calls_into_one_folder_list_what_both_wrote(tmp_path: Path) -> None:
    write_listing(tmp_path, Listing(legend=LEGEND, entries={"0.png": Entry(case="0", image="in/0.png")}))
    with recording(tmp_path, LEGEND, ["a"]) as first:
        with recording(tmp_path, LEGEND, ["b"]) as second:
            assert json.loads((tmp_path / LISTING).read_text())["writing"] == ["a", "b"]
            first.add(tmp_path / "a.png", case_of("a"))
            second.add(tmp_path / "b.png", case_of("b"))
        # The one that still writes is not forgotten.
        assert json.loads((tmp_path / LISTING).read_text())["writing"] == ["a"]
    assert entries_of(tmp_path) == {"0.png", "a.png", "b.png"}


def write_entries(folder: Path, writer: int) -> None:
    """Fifteen entries, the list written with each."""
    module.FILES_BETWEEN = 1
    with recording(folder, LEGEND, []) as record:
        for number in range(15):
            record.add(folder / f"{writer}-{number}.png", case_of(str(number)))


# Says that it is there and waits for a line, so that it writes when the others do.
WRITER = """
import sys, pathlib
from tests.test_listing import write_entries
print("ready", flush=True)
sys.stdin.readline()
write_entries(pathlib.Path(sys.argv[1]), 2)
"""


def test_writers_at_the_same_time_lose_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_BETWEEN", 1)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(2) as pool:
            other.stdin.write("go\n")
            other.stdin.flush()
            list(pool.map(lambda writer: write_entries(tmp_path, writer), range(2)))
    assert other.returncode == 0
    assert entries_of(tmp_path) == {f"{writer}-{number}.png" for writer in range(3) for number in range(15)}
    assert [path.name for path in tmp_path.iterdir()] == [LISTING]


def test_a_turn_that_is_not_given_away_ends_no_prediction_and_is_waited_for_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, waits = [0.0], list[float]()

    @contextmanager
    def kept(folder: Path) -> Iterator[None]:
        waits.append(clock[0])
        raise in_use(folder / ".turn", None)
        yield

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with recording(tmp_path, LEGEND, []) as record, monkeypatch.context() as patch:
        patch.setattr(module, "taking_turns", kept)
        for second in (10, 20, 600, 611):
            clock[0] = second
            record.add(tmp_path / f"{second}.png", case_of(str(second)))
        assert waits == [10, 611]
        with pytest.raises(RunError, match="expected a folder that no other process uses"):
            record.close()
    assert entries_of(tmp_path) == {"10.png", "20.png", "600.png", "611.png"}


def test_a_list_that_cannot_be_written_ends_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_BETWEEN", 1)
    full = RunError(tmp_path, expected="room", got="none", do="free space", code="R102")

    def write(folder: Path, listing: Listing) -> None:
        if listing.entries:
            raise full

    monkeypatch.setattr(module, "write_listing", write)
    with pytest.raises(RunError, match="free space"), recording(tmp_path, LEGEND, []) as record:
        record.add(tmp_path / "a.png", case_of("a"))


def test_a_call_that_could_do_nothing_takes_away_its_own_list_alone(tmp_path: Path) -> None:
    with recording(tmp_path / "none", LEGEND, ["a"]):
        pass
    forget_empty(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with recording(tmp_path / "two", LEGEND, ["a"]):
        with recording(tmp_path / "two", LEGEND, ["b"]):
            pass
        forget_empty(tmp_path / "two")
        assert json.loads((tmp_path / "two" / LISTING).read_text())["writing"] == ["a"]


def test_a_list_goes_on_with_the_same_values_only(tmp_path: Path) -> None:
    assert continued_listing(tmp_path, LEGEND) == Listing(legend=LEGEND)
    with recording(tmp_path, LEGEND, ["a"]) as record:
        record.add(tmp_path / "a.png", case_of("a"))
    assert set(continued_listing(tmp_path, LEGEND).entries) == {"a.png"}
    expected = r"expected predictions of ground \(0\), cell \(9\), or none, got those of ground \(0\), cell \(7\)"
    with pytest.raises(DataError, match=expected):
        continued_listing(tmp_path, OTHER)


@pytest.mark.parametrize("text", ["[]", '{"cases": {}}', '{"legend": 1, "cases": {}}', '{"legend": {}, "cases": {"a.png": 3}}'])
def test_a_damaged_list_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / LISTING).write_text(text)
    with pytest.raises(DataError, match=r"predictions\.json: expected the list that `microtome predict` writes"):
        read_listing(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"legend": NaN}', "[" * 100_000, '{"legend": {}, "legend": {}}'])
def test_a_list_that_is_no_json_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / LISTING).write_text(text)
    with pytest.raises(DataError, match=r"predictions\.json: expected valid JSON"):
        read_listing(tmp_path)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b.png", "link.png", "x" * 300, "a\0b"])
def test_a_list_names_no_file_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    content = {"legend": LEGEND.to_json(), "cases": {name: {"case": "a", "input": "a.png"}}}
    (folder / LISTING).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"predictions\.json: expected names of files inside"):
        read_listing(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"values": [[0], [[1, 2]]]},
        {"values": [[0]]},
        {"names": ["a", ["b"]]},
        {"background": 7},
        {"values": [[0], [2**64 - 1]]},
        {"kind": "x"},
    ],
)
def test_a_legend_that_is_none_is_an_error_that_names_the_list(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / LISTING).write_text(json.dumps({"legend": LEGEND.to_json() | change, "cases": {}}))
    with pytest.raises(DataError, match=r"predictions\.json: expected the list that `microtome predict` writes"):
        read_listing(tmp_path)
