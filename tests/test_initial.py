"""A training that begins with given weights: which are taken, what is said, and that a resumed run begins with the same."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from microtome.bundle import load_bundle
from microtome.config import NetworkConfig
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.synthetic import DemoConfig, write_demo_data
from microtome.errors import ConfigError, DataError
from microtome.inference.restore import arrays_of
from microtome.interop.checkpoints import in_our_names, read_weights
from microtome.models.network import Network
from microtome.models.registry import build
from microtome.training.folder import check_folder
from microtome.training.initial import FILE, Start, Weights, begin_with, fit, keep_initial, kept_initial
from microtome.training.run import train
from tests.small import one_thread, small_plan

__all__ = ["one_thread"]


def arrays(*shapes: tuple[int, ...], names: str = "abcdefgh") -> dict[str, np.ndarray]:
    return {name: np.full(shape, number, np.float32) for number, (name, shape) in enumerate(zip(names, shapes, strict=False), start=1)}


def given(values: Mapping[str, np.ndarray]) -> Weights:
    return Weights(arrays=values, source="theirs.pth", hash="0" * 32)


def network_of(classes: int = 2, name: str = "modern_unet", dims: int = 2, **config: Any) -> Network:
    torch.manual_seed(1)
    config = {"widths": (4, 8, 12), **config}
    return build(name, dims=dims, in_channels=1, classes=classes, config=NetworkConfig(name=name, **config))


# ---- what fits ----


def test_tensors_of_the_same_name_and_shape_are_taken_and_the_others_are_named() -> None:
    found = fit(arrays((2, 3), (4,), (5,)), {**arrays((2, 3), (9,)), "x": np.zeros(1, np.float32)})
    assert found.taken == {"a": "a"}
    assert found.left == {"b": "9 there, 4 here", "c": "not in the file"}
    assert found.unused == ("b", "x")
    assert not found.by_order


def test_where_no_name_fits_the_same_shapes_in_the_same_order_do() -> None:
    found = fit(arrays((2, 3), (2,), (2, 3)), arrays((2, 3), (2,), (2, 3), names="zyx"))
    assert found.by_order
    assert found.taken == {"a": "z", "b": "y", "c": "x"}
    # Another order, or one more, is a guess, which nobody makes.
    assert fit(arrays((2, 3), (2,)), arrays((2,), (2, 3), names="zy")).taken == {}
    assert fit(arrays((2, 3), (2,)), arrays((2, 3), (2,), (2,), names="zyx")).taken == {}


def test_counters_of_batch_norm_are_no_part_of_what_fits() -> None:
    ours = {"n.weight": np.ones(3, np.float32), "n.num_batches_tracked": np.array(0)}
    assert fit(ours, {"m.weight": np.ones(3, np.float32)}).taken == {"n.weight": "m.weight"}
    assert fit(ours, {"n.num_batches_tracked": np.array(7)}).taken == {}


def test_a_head_of_other_classes_stays_as_it_was_initialised_and_the_rest_is_taken() -> None:
    theirs, ours = network_of(classes=5), network_of(classes=2)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.fill_(0.25)
    before = arrays_of(network_of(classes=2).state_dict())
    initial = begin_with(ours, given(arrays_of(theirs.state_dict())))
    assert initial is not None
    left = {name for name in before if name.startswith("heads.")}
    assert set(initial.record["as_initialised"]) == left
    after = arrays_of(ours.state_dict())
    for name, array in after.items():
        if name in left:
            assert np.array_equal(array, before[name])
        elif name in dict(ours.named_parameters()):
            assert (array == 0.25).all()
    words = initial.record["words"]
    assert f"{len(initial.names)} of {len(initial.names) + 2} tensors from theirs.pth, by name" in words
    assert "2 stay as initialised (heads.0.weight: 5×4×1×1 there, 2×4×1×1 here" in words


def test_weights_that_fit_nowhere_are_one_line_and_change_nothing() -> None:
    network = network_of()
    before = arrays_of(network_of().state_dict())
    with pytest.raises(
        DataError, match=r"theirs.pth: expected weights of modern_unet: .* got 2 of other names and shapes: a 3, b 4"
    ) as caught:
        begin_with(network, given(arrays((3,), (4,))))
    assert caught.value.code == "D230"
    assert all(np.array_equal(array, before[name]) for name, array in arrays_of(network.state_dict()).items())


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    network = network_of()
    values = {name: np.array(array) for name, array in arrays_of(network.state_dict()).items()}
    values["heads.0.bias"][1] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinity in `heads\.0\.bias`"):
        begin_with(network, given(values))


def test_half_precision_is_taken_as_the_type_of_the_network() -> None:
    network = network_of()
    values = {name: array.astype(np.float16) for name, array in arrays_of(network.state_dict()).items() if array.dtype == np.float32}
    begin_with(network, given(values))
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}


def test_what_is_kept_gives_another_network_the_same_weights_and_record(tmp_path: Path) -> None:
    first = network_of()
    theirs = {name: array + 1 for name, array in arrays_of(network_of().state_dict()).items() if "heads" not in name}
    initial = begin_with(first, given(theirs))
    assert initial is not None
    keep_initial(tmp_path / FILE, first, initial)
    second = network_of()
    kept = kept_initial(tmp_path / FILE)
    assert kept is not None
    again = begin_with(second, kept)
    assert again is not None
    assert again.record == initial.record
    state = arrays_of(second.state_dict())
    assert all(np.array_equal(array, state[name]) for name, array in arrays_of(first.state_dict()).items())
    keep_initial(tmp_path / FILE, first, None)
    assert kept_initial(tmp_path / FILE) is None
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(DataError, match="expected the weights that this run began with"):
        kept_initial(tmp_path / FILE)


# ---- nnU-Net's networks, as its checkpoints name their parts ----


class TheirConvolution(nn.Module):
    """Convolution, norm, and the activation; all of it a second time under another name."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, *, bias: bool = True, activation: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm2d(after, eps=1e-5, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, *([nn.LeakyReLU(0.01)] if activation else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.all_modules(x)
        return y


class TheirConvolutions(nn.Module):
    """Some of them in a row."""

    def __init__(self, before: int, after: int, count: int, stride: int) -> None:
        super().__init__()
        strides = (stride, *(1,) * (count - 1))
        self.convs = nn.Sequential(*(TheirConvolution(after if i else before, after, 3, strides[i]) for i in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.convs(x)
        return y


class TheirUnit(nn.Module):
    """A residual unit of the kind D: pooling before the 1x1 convolution of the shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = TheirConvolution(before, after, 3, stride)
        self.conv2 = TheirConvolution(after, after, 3, 1, activation=False)
        skip: list[nn.Module] = [nn.AvgPool2d(stride, stride)] if stride > 1 else []
        if before != after:
            skip.append(TheirConvolution(before, after, 1, 1, bias=False, activation=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x), 0.01)


class TheirUnits(nn.Module):
    """Some of them in a row."""

    def __init__(self, before: int, after: int, count: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(TheirUnit(after if i else before, after, 1 if i else stride) for i in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.blocks(x)
        return y


class TheirEncoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], counts: tuple[int, ...], residual: bool) -> None:
        super().__init__()
        befores = (widths[0] if residual else 1, *widths[:-1])
        strides = (1, *(2,) * (len(widths) - 1))
        parts = list(zip(befores, widths, counts, strides, strict=True))
        if residual:
            self.stem = TheirConvolutions(1, widths[0], 1, 1)
            self.stages = nn.Sequential(*(TheirUnits(*part) for part in parts))
        else:
            self.stages = nn.Sequential(*(nn.Sequential(TheirConvolutions(*part)) for part in parts))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features, x = [], self.stem(x) if hasattr(self, "stem") else x
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class TheirDecoder(nn.Module):
    """Deepest level first; it holds the encoder too, so that its tensors have further names."""

    def __init__(self, encoder: TheirEncoder, widths: tuple[int, ...], count: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        up = widths[::-1]
        pairs = list(pairwise(up))
        self.stages = nn.ModuleList(TheirConvolutions(2 * above, above, count, 1) for _, above in pairs)
        self.transpconvs = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, 2) for below, above in pairs)
        self.seg_layers = nn.ModuleList(nn.Conv2d(above, classes, 1) for _, above in pairs)


class TheirNetwork(nn.Module):
    def __init__(self, *, residual: bool, classes: int = 3, widths: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        counts = (1, 3, 4) if residual else (2, 2, 2)
        self.encoder = TheirEncoder(widths, counts, residual)
        self.decoder = TheirDecoder(self.encoder, widths, 1 if residual else 2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *skips, x = self.encoder(x)
        for up, stage, skip in zip(self.decoder.transpconvs, self.decoder.stages, reversed(skips), strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
        y: torch.Tensor = self.decoder.seg_layers[-1](x)
        return y


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "resenc"])
def test_weights_of_nnunet_give_our_network_the_same_answers(residual: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = TheirNetwork(residual=residual)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.normal_(std=0.3)
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    found = read_weights(tmp_path / "theirs.safetensors")
    # Each tensor of a convolution and of a norm stands there twice at least.
    assert len(found.arrays) > 2 * len(list(theirs.parameters()))
    weights = in_our_names(found)
    ours = network_of(classes=3, name="nnunet_resenc" if residual else "nnunet_plain", widths=(4, 6, 8))
    initial = begin_with(ours, weights)
    assert initial is not None
    assert (initial.record["as_initialised"], initial.record["unused"]) == ([], 0)
    image = torch.randn(2, 1, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(image), theirs.eval()(image), rtol=1e-4, atol=1e-4)


def test_names_of_other_programs_are_left_as_they_are() -> None:
    weights = given({"encoder.stages.0.weight": np.zeros(1, np.float32)})
    assert in_our_names(weights) is weights


# ---- runs ----


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DemoConfig(picture_vox=(48, 56), volume_vox=(18, 24, 32), pictures=5)
    return open_dataset(write_demo_data(tmp_path_factory.mktemp("data"), config).cells)


class Killed(BaseException):
    """What a kill does: nothing of ours runs after it."""


def kill_at(step: int) -> Any:
    def on_event(seen: Mapping[str, Any]) -> None:
        if seen["event"] == "step" and seen["step"] == step:
            raise Killed

    return on_event


def test_a_run_that_begins_with_weights_says_so_and_a_kill_before_any_checkpoint_costs_nothing(cells: Dataset, tmp_path: Path) -> None:
    plan = small_plan(classes=cells.legend.names, steps=2, validations=1)
    network = build("modern_unet", dims=2, in_channels=1, classes=5, config=plan.network)
    save_file(network.state_dict(), tmp_path / "theirs.safetensors")
    weights = read_weights(tmp_path / "theirs.safetensors")
    events: list[Mapping[str, Any]] = []
    whole = train(cells, plan, tmp_path / "whole", start=Start(weights=weights), on_event=events.append)
    said = load_bundle(whole).provenance["initial_weights"]
    assert said["hash"] == weights.hash
    assert said["file"] == str(tmp_path / "theirs.safetensors")
    assert all(name.startswith("heads.") for name in said["as_initialised"])
    assert [event["message"] for event in events if event["event"] == "finding"] == [f"begins with {said['words']}"]
    with pytest.raises(Killed):
        train(cells, plan, tmp_path / "killed", start=Start(weights=weights), on_event=kill_at(1))
    assert not (tmp_path / "killed" / "checkpoints").exists()
    (tmp_path / "theirs.safetensors").unlink()
    again = load_bundle(train(cells, plan, tmp_path / "killed", resume=True))
    assert {name: array.tobytes() for name, array in again.weights.items()} == {
        name: array.tobytes() for name, array in load_bundle(whole).weights.items()
    }
    assert again.provenance["initial_weights"] == said
    with pytest.raises(DataError, match="expected weights of"):
        train(cells, plan, tmp_path / "new", start=Start(weights=given(arrays((3,)))))
    assert not (tmp_path / "new").exists()


def test_a_run_killed_between_its_weights_and_its_plan_leaves_a_folder_that_a_new_one_takes(tmp_path: Path) -> None:
    keep_initial(tmp_path / FILE, network_of(), begin_with(network_of(), given(arrays_of(network_of().state_dict()))))
    check_folder(tmp_path, resume=False)
    with pytest.raises(ConfigError, match=r"expected a run folder with plan\.yaml"):
        check_folder(tmp_path, resume=True)
    (tmp_path / "plan.yaml").write_text("steps: 1\n")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        check_folder(tmp_path, resume=False)
