"""The benchmarks: their files have the promised rows, the page is made from them, and each kind of work runs on something tiny."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from benchmarks import accuracy, bench, cases, child, limits, rows, timing, works
from benchmarks.peers import bench as peers_bench
from benchmarks.peers import child as peers_child
from benchmarks.startup import help_words
from microtome.models.blocks import InstanceNorm
from tests.small import one_thread  # noqa: F401 - a fixture
from tools import performance, soak

TINY = cases.SETTINGS["tiny 32x32"]
RATES = {"matrix product fp32": 100e9, "fma_avx512": 250e9, "matrix product bf16": 400e9, "memory copy": 50e9}
# The soak's file has its rows and what they rest on in one.
RESULTS = sorted(path for path in rows.RESULTS.glob("*.json") if not path.name.endswith(".about.json") and path.stem != "soak")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_rows_of_results_have_the_promised_fields(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found
    if path.stem == "memory":
        assert all({"shape", "classes", "peak_bytes", "seconds"} <= set(row) for row in found)
        found = []
    for row in found:
        assert set(rows.FIELDS) <= set(row)
        assert row["seconds"] is None or row["seconds"] > 0
        assert row["labels_equal"] is None or 0 <= row["labels_equal"] <= 1
        assert row["seconds"] is not None or row["error"]
    about = json.loads(path.with_name(f"{path.stem}.about.json").read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions"} <= set(about)


def test_the_soak_says_what_each_part_tried_and_every_finding() -> None:
    found = json.loads((rows.RESULTS / "soak.json").read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions", "seconds"} <= set(found)
    assert {row["part"] for row in found["rows"]} == {part.name for part in soak.PARTS}
    for row in found["rows"]:
        assert row["tried"] > 0
        assert row["failed"] == len(row["findings"])


def test_the_page_is_made_from_the_results() -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(), "run `python -m tools.performance`"


def test_every_target_names_a_work_and_engine_that_are_timed() -> None:
    known = {
        (work.name, engine) for work in (*works.works(), *peers_bench.quick_works(), *peers_bench.slow_works()) for engine in work.engines
    }
    for target in yaml.safe_load(performance.TARGETS.read_text(encoding="utf-8")):
        assert (target["work"], target["engine"]) in known
        assert ("at_least" in target) != ("at_most" in target)


def test_a_target_that_is_missed_says_no() -> None:
    assert performance.reached({"at_least": 4.0}, 3.9) == "3.9: no"
    assert performance.reached({"at_least": 4.0}, 4.25) == "4.25"
    assert performance.reached({"at_most": 0.3}, 0.31) == "0.31: no"
    assert performance.reached({"at_most": 0.3}, None) == "not measured"


def test_a_row_is_the_median_of_its_rounds_beside_the_default() -> None:
    runs = [
        {"seconds": seconds, "operations": 200e9, "precision": "bf16", "labels_equal": 0.75, "peak_mb": 9} for seconds in (3.0, 1.0, 2.0)
    ]
    row = rows.row_of("work", "fast", runs, [{"seconds": 5.0}, {"seconds": 3.0}], RATES)
    assert (row["seconds"], row["low"], row["high"], row["rounds"]) == (2.0, 1.0, 3.0, 3)
    assert row["ratio_to_default"] == 2.0
    assert row["labels_equal"] == 0.75
    # 200 billion in 2 s are a quarter of 400 billion a second.
    assert (row["limit_ratio"], row["limit"]) == (0.25, "matrix product bf16")


def test_a_row_of_something_that_failed_says_why_and_has_no_numbers() -> None:
    row = rows.row_of("work", "broken", [{"error": "no such engine"}], [{"seconds": 1.0}], RATES)
    assert row == {"work": "work", "engine": "broken", **dict.fromkeys(rows.FIELDS[2:]), "error": "no such engine"}


def test_a_precision_is_held_to_its_best_rate() -> None:
    assert limits.limit_of(RATES, "fp32") == ("fma_avx512", 250e9)
    assert limits.limit_of(RATES, "int8") is None
    assert limits.limit_of({}, "") is None


def test_results_are_written_with_four_digits_and_read_again(tmp_path: Path) -> None:
    rows.write_results("some", [{"work": "a", "seconds": 1.23456, "labels_equal": 0.9999871, "labels": None}], {"date": "today"}, tmp_path)
    assert rows.read_results("some", tmp_path) == (
        [{"work": "a", "seconds": 1.235, "labels_equal": 0.999987, "labels": None}],
        {"date": "today"},
    )
    assert rows.read_results("others", tmp_path) == ([], {})


def test_limits_are_positive_or_say_why_they_are_missing() -> None:
    measured = limits.measure_limits(threads=1, side=64, copied=1 << 20, rounds=1000)
    assert all(rate > 0 for rate in measured["rates"].values())
    assert {"matrix product fp32", "memory copy", "fresh memory"} <= set(measured["rates"])
    loops = {loop.function for loop in limits.MICROLOOPS}
    assert loops <= set(measured["rates"]) | set(measured["skipped"])


def test_microloops_of_a_processor_without_their_instructions_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "processor_flags", lambda: set())
    rates, skipped = limits.microloop_rates(1)
    assert rates == {}
    assert set(skipped) == {loop.function for loop in limits.MICROLOOPS}


def test_the_higher_of_two_measurements_is_the_limit() -> None:
    both = bench.best_limits({"rates": {"a": 1.0, "b": 5.0}, "threads": 2}, {"rates": {"a": 3.0}, "threads": 2})
    assert both == {"rates": {"a": 3.0, "b": 5.0}, "threads": 2}


def test_rounds_take_turns_and_a_failure_is_not_tried_again() -> None:
    called: list[str] = []

    def run(work: timing.Work, engine: str) -> dict[str, Any]:
        called.append(f"{work.name} {engine}")
        return {"error": "broken"} if engine == "bad" else {"seconds": 1.0}

    found = timing.run_rounds([timing.Work("a", {}, ("good", "bad")), timing.Work("b", {}, ("good",))], 3, run)
    assert called == ["a good", "a bad", "b good", "a good", "b good", "a good", "b good"]
    assert {key: len(runs) for key, runs in found.items()} == {("a", "good"): 3, ("a", "bad"): 1, ("b", "good"): 3}


def test_what_takes_long_has_two_rounds() -> None:
    found = timing.run_rounds([timing.Work("a", {}, ("slow",))], 5, lambda work, engine: {"seconds": 1.0}, slow_seconds=-1)
    assert len(found["a", "slow"]) == 2


def test_a_child_that_fails_is_a_row_with_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "KeyError" in timing.run_child({"kind": "nothing of this name"}, module="benchmarks.child")["error"]


def test_every_kind_of_work_names_a_function() -> None:
    for place in child.KINDS.values():
        module, _, function = place.partition(":")
        source = (rows.REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert f"def {function}(" in source
    kinds = {work.request["kind"] for work in (*works.works(), *works.works(tiny=True))}
    assert kinds <= set(child.KINDS)
    assert {work.request["kind"] for work in (*peers_bench.quick_works(), *peers_bench.slow_works())} <= set(peers_child.KINDS)


def run(kind: str, **words: Any) -> dict[str, Any]:
    """A kind of work in this process, with its arguments as JSON carries them."""
    module, _, function = child.KINDS[kind].partition(":")
    __import__(module)
    answer: dict[str, Any] = getattr(sys.modules[module], function)(**json.loads(json.dumps(words)))
    return answer


def test_torch_as_shipped_answers_as_ours_does() -> None:
    ours = nn.Sequential(nn.Conv3d(1, 4, 3), InstanceNorm(4), nn.ReLU())
    image_BCS = torch.randn(1, 1, 6, 6, 6)
    before = ours(image_BCS)
    shipped = cases.as_shipped(ours)
    assert isinstance(shipped[1], nn.InstanceNorm3d)  # type: ignore[index]
    torch.testing.assert_close(shipped(image_BCS), before)


def test_weights_are_learned_once_and_are_the_same_ever_after(folder: Path) -> None:
    first = cases.trained(TINY, folder)
    image_CS, label = cases.case(TINY)
    assert image_CS.shape == (1, 32, 32)
    assert set(np.unique(label)) == {0, 1, 2}
    second = cases.trained(TINY, folder)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    with torch.inference_mode():
        labels = first(torch.from_numpy(image_CS)[None])[0].argmax(0).numpy()
    # A guess gets 0.6 at most.
    assert np.mean(labels == label) > 0.8


def test_a_forward_pass_of_each_kind_writes_labels_to_compare(folder: Path) -> None:
    answers = {engine: run("forward", setting=TINY.name, engine=engine, folder=str(folder)) for engine in ("default", "torch")}
    work = timing.Work("forward", {}, tuple(answers))
    found = {("forward", engine): [answer] for engine, answer in answers.items()}
    bench.compare_labels([work], found)
    assert answers["default"]["labels_equal"] == 1
    assert answers["torch"]["labels_equal"] > 0.99
    assert all(answer["seconds"] > 0 and answer["operations"] > 0 for answer in answers.values())


@pytest.mark.parametrize("engine", ["default", "microtome-bf16"])
def test_a_training_step_is_timed(engine: str) -> None:
    answer = run("train", setting=TINY.name, engine=engine)
    assert answer["seconds"] > 0
    assert answer["precision"] == ("bf16" if engine.endswith("bf16") else "fp32")


@pytest.mark.parametrize(
    "work",
    [work for work in works.works(tiny=True) if work.request["kind"] in ("resample_image", "store")],
    ids=lambda work: work.name,
)
def test_the_other_parts_are_timed_by_every_engine(work: timing.Work) -> None:
    for engine in work.engines:
        answer = run(**work.request, engine=engine)
        assert answer["seconds"] > 0
        assert answer["operations"] > 0


def test_logits_become_the_same_labels_by_both_ways(folder: Path) -> None:
    words = {**works.labels(3, (6, 12, 12), (8, 16, 16)), "folder": str(folder)}
    default, ours = (np.load(run(**words, engine=engine)["labels"]) for engine in ("default", "microtome"))
    assert np.mean(default == ours) > 0.99


def test_an_augmentation_is_timed_in_a_process_of_its_own() -> None:
    answer = timing.run_child({"kind": "augment", "shape_vox": (32, 32), "engine": "microtome"}, threads=1)
    assert answer.get("error") is None
    assert answer["seconds"] > 0


def test_help_is_asked_of_torch_and_of_us() -> None:
    assert "torch" in help_words("default")[-1]
    assert help_words("microtome")[-1] == "--help"


def test_accuracy_of_engines_on_held_out_images_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    held_out = folder / "run_of_tiny" / "held_out"
    image_CS, label = cases.case(TINY)
    for name, array in (("images", np.clip(image_CS[0] * 40 + 128, 0, 255)), ("labels", label)):
        (held_out / name).mkdir(parents=True)
        Image.fromarray(array.astype(np.uint8)).save(held_out / name / "case.png")
    cases.bundle_of(TINY, folder).rename(folder / "run_of_tiny" / "run")
    monkeypatch.setenv("MICROTOME_CACHE", str(folder / "cache"))
    found = accuracy.scores(folder / "run_of_tiny", ("torch", "nonsense"))
    assert found[0]["dice"] > 0.6
    assert (found[0]["difference"], found[0]["labels_equal"]) == (0, 1)
    assert "nonsense" in found[1]["error"]
    assert set(rows.FIELDS) <= set(found[1])


def test_a_page_is_made_of_rows_with_and_without_numbers(tmp_path: Path) -> None:
    made = [
        rows.row_of("work a", "default", [{"seconds": 2.0}], [{"seconds": 2.0}], RATES),
        rows.row_of("work a", "fast | new", [{"error": "a | b"}], [{"seconds": 2.0}], RATES),
    ]
    rows.write_results(
        "latest", made, {"command": "make bench", "limits": {"threads": 2, "rates": RATES, "skipped": {"x": "why"}}}, tmp_path
    )
    rows.write_results("accuracy", [{"work": "d", "engine": "torch", "dice": 0.9, "difference": 0.0}], {}, tmp_path)
    page = performance.page(tmp_path)
    assert "### work a" in page
    assert "failed: a \\| b" in page
    assert "| memory copy | 50 GB/s (read + written) |" in page
    assert "| d | torch | 0.9000 | +0.0000 |  |" in page
    assert "not measured" in page


def test_the_program_says_which_works_there_are() -> None:
    command = [sys.executable, "-m", "benchmarks.bench", "--only", "no such work"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=rows.REPOSITORY, check=False)
    assert done.returncode == 1
    assert "forward unet_same 512x512" in done.stderr
