"""`--deterministic`: what it sets is put back, what has no fixed order is refused by name, and nothing is timed or compiled beside it."""

import os
from pathlib import Path

import pytest
import torch

from microtome.errors import ConfigError
from microtome.training.compiled import fast_kernels, training_call
from microtome.training.deterministic import WORKSPACE, same_bits
from microtome.training.loop import train_steps
from tests.small import one_thread, small_plan, squares  # noqa: F401 - a fixture
from tests.test_checkpoint import fresh
from tests.test_gpu import hooks_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def state() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def test_on_a_gpu_it_is_set_inside_and_put_back_whatever_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = state()
    with same_bits(GPU):
        assert state() == (True, False)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert state() == before
    with pytest.raises(ZeroDivisionError), same_bits(GPU):
        raise ZeroDivisionError
    assert state() == before
    monkeypatch.delenv(WORKSPACE)


def test_a_processor_and_who_does_not_ask_see_no_change() -> None:
    before = state()
    with same_bits(CPU):
        assert state() == before
    with same_bits(GPU, wanted=False):
        assert state() == before


def test_an_operation_without_a_fixed_order_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    # Torch refuses this one on a processor too.
    with (
        pytest.raises(ConfigError, match=r"--deterministic: expected operations that add in a fixed order, got put_, which") as caught,
        same_bits(GPU),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert caught.value.code == "C052"
    with pytest.raises(RuntimeError, match="another"), same_bits(GPU):
        raise RuntimeError("another fault")


def test_an_environment_that_asks_for_other_forms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match="expected :4096:8 or :16:8, got :0:0"), same_bits(GPU):
        pass


def test_nothing_is_timed_or_compiled_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.training.compiled.compiling_pays", lambda device, seconds: True)
    monkeypatch.setattr("microtome.training.compiled.compiled", lambda *words: "compiled")
    monkeypatch.setenv(WORKSPACE, ":16:8")
    plan, network = small_plan(batch=2), fresh(small_plan()).network
    assert training_call(network, plan, CPU, None) == "compiled"  # type: ignore[comparison-overlap]
    with same_bits(GPU), fast_kernels(GPU):
        assert not torch.backends.cudnn.benchmark
        assert training_call(network, plan, CPU, None) is network
    with fast_kernels(GPU):
        assert torch.backends.cudnn.benchmark


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here that torch can use")
def test_two_trainings_on_a_gpu_have_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        plan = small_plan(batch=4, steps=8)
        run = fresh(plan)
        run.network.to(GPU)
        run.average.to(GPU)
        with same_bits(GPU):
            train_steps(run, [squares(seed) for seed in range(3)], plan, GPU, hooks_of([]))
        weights.append({name: values.cpu() for name, values in run.network.state_dict().items()})
    assert all(torch.equal(values, weights[1][name]) for name, values in weights[0].items())
