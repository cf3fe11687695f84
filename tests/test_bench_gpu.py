"""The GPU's benchmark, as far as it runs without one: with the processor in the GPU's place, and a network of seconds."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Job, Work, jobs, row_of
from microtome.config import NetworkConfig
from tests.small import one_thread

__all__ = ["one_thread"]

TINY = (
    Work("nnunet_plain", (64, 64), 2),
    Work("unet_same", (32, 32), 2),
    Work("nnunet_plain", (64, 64), 2),
    Work("unet_same", (16, 16, 16), 1),
)


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor does what the GPU would."""
    monkeypatch.setattr(gpu, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu, "WORKS", TINY)
    monkeypatch.setattr(gpu, "config_of", lambda work: NetworkConfig(name=work.network, widths=(4, 8)))
    monkeypatch.setattr(gpu, "SIDE", 64)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(gpu, "timed", lambda call, **_: (call(), {"seconds": 0.5, "first_seconds": 1.0})[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_succeeds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "no GPU here" in said[0]


@pytest.mark.usefixtures("on_processor")
def test_every_row_that_needs_no_gpu_gives_numbers() -> None:
    found = {}
    for job in jobs():
        if " unet_same 32x32" in job.work and not job.work.startswith("run") and "compiled" not in job.engine and job.engine != "graph":
            found[job.work.split()[0], job.engine] = gpu.measured(job.work, job.measure)
    assert len(found) == 6
    assert not [values for values in found.values() if "error" in values]
    step, tile = found["train", "bf16"], found["predict", "bf16, channels last"]
    # Three forward passes for each of two samples.
    assert step["operations"] == 6 * tile["operations"] > 0
    assert step["samples_per_second"] == 4
    assert step["peak_mb"] == 3
    assert tile["labels_equal"] > 0.95
    assert found["predict", "fp32 exact"]["labels_equal"] == 1


@pytest.mark.usefixtures("on_processor")
def test_a_row_that_fails_says_why() -> None:
    def fails() -> dict[str, Any]:
        raise torch.OutOfMemoryError("too large")

    assert gpu.measured("a", fails) == {"error": "OutOfMemoryError: too large"}


def test_rows_are_compared_with_the_default_and_the_limit() -> None:
    default = row_of(Job("a", "default", dict), {"seconds": 4.0}, [], 8e12)
    row = row_of(Job("a", "bf16", dict), {"seconds": 2.0, "operations": 4e12, "samples_per_second": 3.0}, [default], 8e12)
    assert row["ratio_to_default"] == 2
    assert row["tflops"] == 2
    assert row["limit_ratio"] == 0.25
    assert row["samples_per_second"] == 3
    assert "operations" not in row
    assert default["ratio_to_default"] == 1
    failed = row_of(Job("a", "graph", dict), {"error": "no"}, [default], None)
    assert (failed["seconds"], failed["ratio_to_default"], failed["error"]) == (None, None, "no")


def test_what_compiles_comes_last_and_every_work_has_its_default_first() -> None:
    order = jobs()
    slow = ["compiled" in job.engine for job in order]
    assert slow == sorted(slow)
    assert all(job.seconds == gpu.COMPILING_SECONDS for job, is_slow in zip(order, slow, strict=True) if is_slow)
    for work in {job.work for job in order if not job.work.startswith("run")}:
        assert next(job.engine for job in order if job.work == work) == "default"
    assert len({(job.work, job.engine) for job in order}) == len(order)


@pytest.mark.usefixtures("on_processor")
def test_samples_and_the_whole_run_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FEEDING_SECONDS", 0.05)
    work = Work("unet_same", (32, 32), 2)
    for engine in gpu.FEEDING:
        assert gpu.feed(work, engine)["samples_per_second"] > 0
    whole = gpu.run(work)
    assert whole["samples_per_second"] == pytest.approx(2 / whole["seconds"])


@pytest.mark.usefixtures("on_processor")
def test_rows_are_written_one_by_one_and_none_is_begun_that_may_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept: list[Any] = []
    ready = [Job("a", "default", lambda: {"seconds": 1.0}), Job("a", "bf16", lambda: {"seconds": 0.5}, seconds=1e9)]
    monkeypatch.setattr(gpu, "jobs", lambda: ready)
    monkeypatch.setattr(gpu, "write_results", lambda name, rows, facts: kept.append((name, json.loads(json.dumps(rows)), facts)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"name": "a card", "total_memory": 2**34}))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "elsewhere"])
    gpu.main()
    assert [len(rows) for _, rows, _ in kept] == [1, 2]
    name, rows, facts = kept[-1]
    assert name == "elsewhere"
    assert rows[0]["seconds"] == 1
    assert "not begun" in rows[1]["error"]
    assert "a card, 16 GB" in facts["machine"]
    assert facts["limits"]["bf16"] == 2 * 64**3 / 0.5
