"""Which engine a job gets, told by engines whose seconds are made up."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microtome.bundle import Samples
from microtome.errors import ConfigError, RunError
from microtome.geometry import Spacing
from microtome.inference.agreement import BOUNDS, Agreement, agreement
from microtome.inference.measurements import Measured, Measurements
from microtome.inference.mirroring import TTA, Engine
from microtome.inference.search import Candidate, Choice, Job, Search, tile_like

GOLDEN_CS = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)
SAMPLES = Samples(GOLDEN_CS, np.concatenate([GOLDEN_CS, -GOLDEN_CS]))
MACHINE = "this processor, 2 threads"


@dataclass
class World:
    """A clock that only engines move, and a record of what they did."""

    now: float = 0.0
    opened: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now


@dataclass
class Fake:
    """An engine that takes so many seconds for 64 voxels, and is wrong by so much."""

    name: str
    world: World
    seconds: float
    error: float

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        self.world.calls.append(self.name)
        self.world.now += self.seconds * image_CS[0].size / 64
        return np.concatenate([image_CS, -image_CS]) + np.array([self.error, 0], np.float32)[:, None, None]

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> Engine:
        return self


def candidate(
    world: World,
    name: str,
    *,
    startup: float = 0.5,
    seconds: float = 1.0,
    precision: str = "fp32",
    error: float = 0.0,
    broken: bool = False,
) -> Candidate:
    def opened() -> Engine:
        world.opened.append(name)
        world.now += startup
        if broken:
            raise RunError("graph.onnx", expected="a graph that runs", got="none", do="use another")
        return Fake(name, world, seconds, error)

    return Candidate(name=name, version="1.0", precision=precision, open=opened, startup_seconds=startup)


def search(world: World, *candidates: Candidate, path: Path | None = None) -> Search:
    return Search(candidates, SAMPLES, Measurements.read(path, MACHINE), world.clock)


def best(world: World, tiles: int, *candidates: Candidate, path: Path | None = None) -> Choice:
    return search(world, *candidates, path=path).best(Job(tile_vox=(8, 8), tiles=tiles))


def two(world: World) -> tuple[Candidate, Candidate]:
    """One that starts at once and is slow, and one that starts late and is fast."""
    return candidate(world, "torch", startup=0.2, precision=""), candidate(world, "graph", startup=3.0, seconds=0.25)


def test_a_tiny_job_opens_the_engine_that_starts_soonest_and_times_nothing() -> None:
    world = World()
    choice = best(world, 1, *two(world))
    assert choice.engine.name == "torch"
    assert world.opened == ["torch"]
    # The golden input once, and no tile.
    assert world.calls == ["torch"]
    assert choice.reason == "torch: starts soonest, and the job is small"


def test_a_long_job_measures_and_takes_the_fastest() -> None:
    world = World()
    choice = best(world, 1000, *two(world))
    assert choice.engine.name == "graph"
    assert world.opened == ["torch", "graph"]
    assert choice.reason == "graph: 0.25 s a tile against 1 (torch); labels as torch 100 %"


def test_a_long_job_stays_with_the_first_where_others_are_slower() -> None:
    world = World()
    slow = candidate(world, "slow", startup=3.0, seconds=4.0)
    assert best(world, 1000, two(world)[0], slow).engine.name == "torch"
    assert world.opened == ["torch", "slow"]


@given(tiles=st.integers(1, 3000))
def test_looking_for_a_better_engine_never_costs_much_of_the_job(tiles: int) -> None:
    world = World()
    others = [candidate(world, f"slow {number}", startup=1.0 + number, seconds=1.5) for number in range(5)]
    best(world, tiles, two(world)[0], *others)
    # Beside the first engine's start and golden input; its price was guessed at the first engine's pace, and these take half more.
    assert world.now - 1.2 <= 0.375 * tiles


def test_measurements_are_used_the_second_time_and_nothing_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "measured.json"
    world = World()
    best(world, 1000, *two(world), path=path)
    world = World()
    choice = best(world, 1000, *two(world), path=path)
    assert choice.engine.name == "graph"
    assert world.opened == ["graph"]
    assert world.calls == []


def test_measurements_not_choices_are_kept_so_a_small_job_is_chosen_for_anew(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    world = World()
    best(world, 1000, *two(world), path=path)
    world = World()
    # 0.2 + 1 s against 3 + 0.25 s.
    assert best(world, 1, *two(world), path=path).engine.name == "torch"
    assert best(world, 40, *two(world), path=path).engine.name == "graph"
    assert world.calls == []


def test_another_version_of_a_library_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    world = World()
    first, graph = two(world)
    best(world, 1000, first, graph, path=path)
    world.calls.clear()
    newer = Candidate(name="graph", version="2.0", precision="fp32", open=graph.open, startup_seconds=3.0)
    best(world, 1000, first, newer, path=path)
    assert world.calls == ["graph"] * 3


def test_a_graph_that_was_made_anew_is_compared_anew(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    world = World()
    good = candidate(world, "graph")
    # Its mark is known when it is open, as it is written then.
    search(world, replace(good, source=lambda: "a1" if world.opened else ""), path=path).named()
    world.calls.clear()
    search(world, replace(good, source=lambda: "a1"), path=path).named()
    assert world.calls == []
    wrong = replace(candidate(world, "graph", error=3.0), source=lambda: "b2")
    with pytest.raises(ConfigError, match="--engine graph"):
        search(world, wrong, path=path).named()
    assert set(Measurements.read(path, MACHINE).engines) == {"graph 1.0 a1", "graph 1.0 b2"}


def test_a_tile_of_another_size_is_judged_by_the_nearest_that_was_measured() -> None:
    known = Measured(tiles={(10, 10): 1.0, (100, 100): 50.0})
    assert known.tile_seconds((10, 10)) == 1.0
    assert known.tile_seconds((20, 10)) == pytest.approx(2.0)
    assert known.tile_seconds((100, 80)) == pytest.approx(40.0)
    # Five times as many voxels may not fit into a cache that one fits into.
    assert known.tile_seconds((50, 10)) is None


def test_an_engine_that_disagrees_is_not_used_and_that_is_said_each_time(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    world = World()
    wrong = candidate(world, "wrong", startup=0.1, seconds=0.1, precision="bf16", error=3.0)
    for expected in (["wrong", "torch"], ["torch"]):
        world.opened.clear()
        choice = best(world, 1, wrong, two(world)[0], path=path)
        assert choice.engine.name == "torch"
        assert "; not used: wrong (" in choice.reason
        assert "equal labels)" in choice.reason
        # Once it is known to be wrong it is not even opened.
        assert world.opened == expected


def test_an_engine_that_disagrees_is_refused_by_its_name_with_the_numbers() -> None:
    world = World()
    wrong = search(world, candidate(world, "openvino-bf16", precision="bf16", error=0.9))
    with pytest.raises(
        ConfigError, match=r"--engine openvino-bf16: .* equal labels, probabilities off by .*needed: 99.9 % and 0.05.*--engine torch"
    ):
        wrong.named()


def test_a_named_engine_is_checked_once(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    world = World()
    for expected in (["graph"], []):
        world.calls.clear()
        choice = search(world, candidate(world, "graph"), path=path).named()
        assert choice.reason == "graph: as asked; labels as torch 100 %"
        assert world.calls == expected


def test_an_engine_that_cannot_be_opened_leaves_the_job_to_the_next() -> None:
    world = World()
    choice = best(world, 1, candidate(world, "broken", startup=0.1, broken=True), two(world)[0])
    assert choice.engine.name == "torch"
    assert "not used: broken (expected a graph that runs, got none)" in choice.reason


def test_an_engine_that_fails_at_the_jobs_own_tile_leaves_the_job_to_the_first() -> None:
    world = World()
    first, graph = two(world)

    @dataclass
    class Small(Fake):
        def __call__(self, image_CS: np.ndarray) -> np.ndarray:
            if image_CS[0].size > 64:
                raise RunError("graph.onnx", expected="a graph that runs", got="no memory", do="use another")
            return super().__call__(image_CS)

    small = replace(graph, open=lambda: Small("graph", world, 0.25, 0.0))
    choice = search(world, first, small).best(Job(tile_vox=(16, 8), tiles=1000))
    assert choice.engine.name == "torch"
    assert "not used: graph (expected a graph that runs, got no memory)" in choice.reason


def test_without_any_engine_left_the_reasons_are_told() -> None:
    world = World()
    with pytest.raises(ConfigError, match=r"--engine auto: .*broken: expected a graph that runs"):
        best(world, 1, candidate(world, "broken", broken=True))


def test_a_long_job_after_a_tiny_one_measures_though_agreement_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    world = World()
    best(world, 1, *two(world), path=path)
    assert best(world, 1000, *two(world), path=path).engine.name == "graph"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"x": 1}',
        '{"x": NaN}',
        '{"x": 1e999}',
        json.dumps({MACHINE: 3}),
        json.dumps({MACHINE: {"torch 1.0": {"tiles": []}}}),
    ],
)
def test_a_broken_file_of_measurements_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "measured.json"
    path.write_text(text)
    assert Measurements.read(path, MACHINE).engines == {}
    world = World()
    best(world, 1000, *two(world), path=path)
    assert set(Measurements.read(path, MACHINE).engines) == {"torch 1.0", "graph 1.0"}


@pytest.mark.parametrize(
    "changes",
    [
        {"startup_seconds": -1},
        {"startup_seconds": "soon"},
        {"tiles": {"axb": 1}},
        {"tiles": {"0x8": 1}},
        {"labels": "all"},
        {"startup_seconds": 10**400},
    ],
)
def test_numbers_that_cannot_be_measurements_are_left_out(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "measured.json"
    measurements = Measurements.read(path, MACHINE)
    measurements.note("torch 1.0", startup_seconds=1.0, tiles={(8, 8): 1.0})
    measurements.write()
    document = json.loads(path.read_text())
    document[MACHINE]["torch 1.0"] |= changes
    path.write_text(json.dumps(document))
    assert Measurements.read(path, MACHINE).engines == {}


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    world = World()
    assert best(world, 1, *two(world), path=tmp_path / "file" / "measured.json").engine.name == "torch"


def test_two_processes_keep_each_others_measurements(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    first, second, elsewhere = Measurements.read(path, MACHINE), Measurements.read(path, MACHINE), Measurements.read(path, "another")
    first.note("a 1", tiles={(8, 8): 1.0}, agreement=Agreement(1.0, 0.001))
    second.note("b 1", voxel_seconds=2.0)
    elsewhere.note("a 1", startup_seconds=3.0)
    for measurements in (first, second, elsewhere):
        measurements.write()
    found = Measurements.read(path, MACHINE)
    assert found.engines == {**first.engines, **second.engines}
    assert Measurements.read(path, "another").engines == elsewhere.engines


def test_equal_logits_agree_fully_and_other_shapes_or_no_numbers_not_at_all() -> None:
    logits_KS = SAMPLES.logits_KS
    assert agreement(logits_KS, logits_KS) == Agreement(1.0, 0.0)
    assert agreement(logits_KS[:, 1:], logits_KS) == Agreement(0.0, 1.0)
    holed = logits_KS.copy()
    holed[0, 0, 0] = np.nan
    assert agreement(holed, logits_KS) == Agreement(0.0, 1.0)
    assert agreement(logits_KS, holed) == Agreement(0.0, 1.0)
    assert not any(Agreement(0.0, 1.0).holds(precision) for precision in BOUNDS)


def test_agreement_is_counted_by_hand() -> None:
    oracle = np.array([[[0.0, 2.0, 0.0, 5.0]], [[1.0, 0.0, 3.0, 0.0]]])
    other = oracle.copy()
    other[0, 0, 0] = 2.0  # from 1 : e to e : 1
    found = agreement(other, oracle)
    assert found.labels == 0.75
    assert found.probability == pytest.approx(2 * np.e / (1 + np.e) - 1)
    assert str(found) == "labels as torch 75 %"


def test_one_voxel_in_a_thousand_may_turn_over() -> None:
    oracle = np.zeros((2, 2000))
    oracle[0] = 1.0
    for turned, probability in ((1, 0.0), (2, 0.0), (3, 2 * np.e / (1 + np.e) - 1)):
        other = oracle.copy()
        other[:, :turned] = other[::-1, :turned]
        found = agreement(other, oracle)
        assert found.labels == pytest.approx(1 - turned / 2000)
        assert found.probability == pytest.approx(probability)


def test_a_share_is_never_rounded_up_to_all() -> None:
    assert str(Agreement(0.999999, 0.0)) == "labels as torch 99.99 %"
    assert Agreement(0.9989, 0.0).failure("fp32") == "99.89 % equal labels, probabilities off by up to 0 (needed: 99.9 % and 0.001)"


@pytest.mark.parametrize(
    ("labels", "probability", "held"),
    [
        (0.999, 1e-3, {"fp32", "bf16", "int8"}),
        (0.999, 0.05, {"bf16", "int8"}),
        (0.998, 0.2, {"int8"}),
        (0.9979, 0.0, set()),
        (1.0, 0.36, set()),
    ],
)
def test_each_arithmetic_is_held_to_its_own_bound(labels: float, probability: float, held: set[str]) -> None:
    assert {precision for precision in BOUNDS if Agreement(labels, probability).holds(precision)} == held


@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_an_engine_is_timed_on_the_golden_image_repeated_or_cut(size: tuple[int, int]) -> None:
    tile_CS = tile_like(GOLDEN_CS, size)
    assert tile_CS.shape == (1, *size)
    assert tile_CS.flags.c_contiguous
    y, x = np.indices(size)
    np.testing.assert_array_equal(tile_CS[0], GOLDEN_CS[0][y % 8, x % 8])
