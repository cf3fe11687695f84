"""The compiled network of training: the same numbers, the same names, and the plain network where compiling fails."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from microtome.inference.cuda_graphs import COMPILE_SECONDS, LEAST_TIMES_COMPILING, compiling_pays
from microtome.inference.tf32 import tensor_float32
from microtome.models.registry import build
from microtome.training import compiled as module
from microtome.training.checkpoint import new_state, save_checkpoint
from microtome.training.compiled import compiled, fast_kernels, training_call
from tests.small import TINY_2D, one_thread, small_plan, small_plan_3d

__all__ = ["one_thread"]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = 2 * LEAST_TIMES_COMPILING * COMPILE_SECONDS


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build("modern_unet", dims=2, in_channels=1, classes=2, config=TINY_2D).train()


def picture(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def gradients(network: nn.Module, call: Callable[[Tensor], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a batch, and the gradients of their squares' sum."""
    network.zero_grad(set_to_none=True)
    outputs = call(picture())
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return [output.detach() for output in outputs], [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_a_compiled_network_gives_the_outputs_and_gradients_of_the_plain_one(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    call = compiled(network, picture(1), "fp32", backend="eager")
    assert call is not network
    for ours, theirs in zip(gradients(network, call), gradients(plain, plain), strict=True):
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # The running statistics too.
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), plain.state_dict().values(), strict=True))


def test_compiling_leaves_weights_statistics_and_gradients_as_they_were(network: nn.Module) -> None:
    before = {name: values.clone() for name, values in network.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    compiled(network, picture(1) + 5, "fp32", backend="eager")
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_checkpoint_of_a_compiled_run_has_the_plain_names(network: nn.Module, tmp_path: Path) -> None:
    state = new_state(network, small_plan())  # type: ignore[arg-type]
    call = compiled(network, picture(1), "fp32", backend="eager")
    gradients(network, call)
    state.optimiser.step()
    save_checkpoint(tmp_path / "a.safetensors", state)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        names = {name.removeprefix("network/") for name in file.keys() if name.startswith("network/")}  # noqa: SIM118
    assert names == set(network.state_dict())
    assert not any("_orig_mod" in name for name in names)


def test_where_compiling_fails_training_goes_on_with_the_plain_network(network: nn.Module) -> None:
    def failing(*_: object) -> Any:
        raise RuntimeError("no compiler here")

    before = {name: values.clone() for name, values in network.state_dict().items()}
    with pytest.warns(UserWarning, match="goes on without it: .*no compiler here"):
        assert compiled(network, picture(1), "fp32", backend=failing) is network  # type: ignore[arg-type]
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


def test_a_failure_of_the_backward_pass_is_met_before_the_first_step(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(_: Tensor) -> None:
        raise RuntimeError("no kernel for this gradient")

    monkeypatch.setattr(Tensor, "backward", backward)
    with pytest.warns(UserWarning, match="no kernel for this gradient"):
        assert compiled(network, picture(1), "fp32", backend="eager") is network


def test_a_lack_of_memory_is_not_mistaken_for_a_failure_to_compile(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(_: Tensor) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(Tensor, "backward", backward)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(network, picture(1), "fp32", backend="eager")


@pytest.mark.parametrize(
    ("device", "seconds", "expected"),
    [
        (GPU, LONG, True),
        (GPU, LEAST_TIMES_COMPILING * COMPILE_SECONDS, False),
        (GPU, 30.0, False),
        (GPU, None, False),
        (CPU, LONG, False),
    ],
)
def test_compiling_pays_on_a_gpu_for_a_long_job(device: torch.device, seconds: float | None, expected: bool) -> None:
    assert compiling_pays(device, seconds) is expected


def test_a_job_for_which_it_does_not_pay_is_trained_as_it_is(network: nn.Module) -> None:
    assert training_call(network, small_plan(), CPU, LONG) is network
    assert training_call(network, small_plan(), GPU, 60.0) is network


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"batch": 5, "micro_batch": 2}])
def test_what_would_be_compiled_anew_is_not_compiled(network: nn.Module, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compiling_pays", lambda *_: True)
    assert training_call(network, small_plan(**changes), CPU, LONG) is network


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        (small_plan(batch=6), (6, 1, 32, 32)),
        (small_plan(batch=6, micro_batch=2), (2, 1, 32, 32)),
        (small_plan_3d(batch=3, precision="bf16"), (3, 1, 16, 16, 16)),
    ],
)
def test_a_long_job_is_compiled_for_the_batches_it_will_see(
    network: nn.Module, plan: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "compiling_pays", lambda *_: True)
    monkeypatch.setattr(module, "compiled", lambda *values: seen.extend(values) or "compiled")
    assert training_call(network, plan, CPU, LONG) == "compiled"  # type: ignore[comparison-overlap]
    assert seen[0] is network
    assert tuple(seen[1].shape) == shape
    assert seen[1].is_contiguous(memory_format=torch.channels_last if plan.dims == 2 else torch.channels_last_3d)
    assert seen[2] == plan.precision


def test_fast_kernels_are_for_gpus_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]

    with tensor_float32(False):
        with fast_kernels(CPU):
            assert settings() == (False, "ieee")
        with fast_kernels(GPU):
            assert settings() == (True, "tf32")
        assert settings() == (False, "ieee")
