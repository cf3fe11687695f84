"""The graph of a network: multiply-adds and receptive fields by hand, real shapes, nothing left behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.geometry import Sizes
from microtome.models import trace as trace_module
from microtome.models.network import Network, NetworkSpec
from microtome.models.registry import build
from microtome.models.trace import Trace, trace
from tests.traced import FORMS, traced

SPEC = NetworkSpec(name="tiny", dims=2, in_channels=1, classes=2)


class Tiny(Network):
    """Pads, pools, dilates, comes up again, concatenates."""

    def __init__(self) -> None:
        super().__init__(SPEC, Sizes((16, 16), (2, 2)))
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)
        self.spare = nn.Linear(3, 5)

    def forward(self, image_BCS: Tensor) -> Tensor:
        self.check_image(image_BCS)
        skip_BCS = self.first(image_BCS)
        logits_BKS: Tensor = self.head(torch.cat([self.up(self.wide(self.pool(skip_BCS))), skip_BCS], dim=1))
        return logits_BKS


class Steps(Network):
    """Whatever steps a test gives it, on one convolution of 3x3 with stride 2."""

    def __init__(self, steps: Callable[[Tensor], Tensor]) -> None:
        super().__init__(SPEC, Sizes((1, 1), (1, 1)))
        self.conv, self.steps = nn.Conv2d(1, 4, 3, stride=2, padding=1), steps

    def forward(self, image_BCS: Tensor) -> Tensor:
        return self.steps(self.conv(image_BCS))


class Recurrent(Network):
    """One convolution, three times."""

    def __init__(self) -> None:
        super().__init__(SPEC, Sizes((1, 1), (1, 1)))
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, image_BCS: Tensor) -> Tensor:
        result_BCS: Tensor = self.conv(self.conv(self.conv(image_BCS)))
        return result_BCS


def last(steps: Callable[[Tensor], Tensor], size: int = 16) -> tuple[str, tuple[int, ...], int, float]:
    operation = trace(Steps(steps), (1, size, size)).operations[-1]
    return operation.kind, operation.shape, operation.field_vox[0], float(operation.jump_vox[0])


def named(found: Trace, name: str) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(o.parameters, o.multiply_adds, o.field_vox) for o in found.operations if o.name == name]


def test_a_tiny_network_has_the_numbers_that_a_hand_computes() -> None:
    found = trace(Tiny(), (1, 16, 16))
    assert [o.kind for o in found.operations] == [
        *("input", "convolution", "norm", "activation", "pool", "convolution", "transposed", "concat", "convolution")
    ]
    # 4 maps of 256 voxels, 9 products each, and 36 weights with 4 biases; sees 3.
    assert named(found, "first.0") == [(40, 4 * 256 * 9, (3, 3))]
    assert named(found, "pool") == [(0, 0, (4, 4))]
    # 8 maps of 64 voxels from 2 of 4 channels each; the dilated kernel spans 5 voxels of size 2: 4 + 4 * 2.
    assert named(found, "wide") == [(8 * 2 * 9 + 8, 8 * 64 * 2 * 9, (12, 12))]
    # From 64 voxels of 8 channels to 4 in 2 x 2; jump 1 again: 12 + 1.
    assert named(found, "up") == [(8 * 4 * 4 + 4, 64 * 8 * 4 * 4, (13, 13))]
    assert named(found, "cat") == [(0, 0, (13, 13))]
    assert named(found, "head") == [(18, 256 * 8 * 2, (13, 13))]
    assert found.multiply_adds == 9216 + 9216 + 8192 + 4096


def test_a_concat_knows_what_it_takes_and_the_result_is_the_head() -> None:
    found = trace(Tiny(), (1, 16, 16))
    cat = next(o for o in found.operations if o.kind == "concat")
    assert [found.operations[place].name for place in cat.inputs] == ["up", "first.2"]
    assert cat.taken == ((4, 16, 16), (4, 16, 16))
    assert [found.operations[place].name for place in found.outputs] == ["head"]


def test_weights_that_no_operation_used_are_told() -> None:
    found = trace(Tiny(), (1, 16, 16))
    assert found.unused == (("spare.weight", 15), ("spare.bias", 5))
    assert sum(o.parameters for o in found.operations) + 20 == found.parameters


def test_a_shared_weight_counts_once_and_its_work_every_time() -> None:
    found = trace(Recurrent(), (1, 8, 8))
    assert [(o.parameters, o.shared, o.multiply_adds) for o in found.operations[1:]] == [(10, 0, 576), (0, 10, 576), (0, 10, 576)]
    assert found.operations[-1].field_vox == (7, 7)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (lambda x: x, ("convolution", (4, 8, 8), 3, 2)),
        (lambda x: interpolate(x, scale_factor=2, mode="nearest"), ("resize", (4, 16, 16), 3, 1)),
        (lambda x: interpolate(x, scale_factor=2, mode="bilinear"), ("resize", (4, 16, 16), 5, 1)),
        (lambda x: interpolate(x, size=(4, 4), mode="bilinear"), ("resize", (4, 4, 4), 5, 4)),
        (lambda x: adaptive_avg_pool2d(x, 1), ("pool", (4, 1, 1), 17, 16)),
        (lambda x: x.mean((2, 3), keepdim=True), ("pool", (4, 1, 1), 17, 16)),
        (lambda x: x.flatten(2).mean(2), ("pool", (4,), 17, 16)),
        (lambda x: nn.functional.avg_pool2d(x, 3, 1, 1), ("pool", (4, 8, 8), 7, 2)),
        (lambda x: nn.functional.max_pool2d(x, 2, stride=1, dilation=2), ("pool", (4, 6, 6), 7, 2)),
        (lambda x: x * torch.sigmoid(x), ("product", (4, 8, 8), 3, 2)),
        (lambda x: x[:, 1:3].contiguous() * 2 + 1, ("convolution", (4, 8, 8), 3, 2)),
    ],
)
def test_each_step_has_its_rule(steps: Callable[[Tensor], Tensor], expected: tuple[object, ...]) -> None:
    assert last(steps) == expected


def test_a_global_pooling_sees_the_whole_image() -> None:
    assert last(lambda x: adaptive_avg_pool2d(x, 1), size=64)[2] >= 64


def test_vnet_sees_what_its_paper_says() -> None:
    """Table 1 of arXiv 1606.04797: the receptive field after each of its nine stages."""
    sums = [o.field_vox for o in traced("vnet", 3).operations if o.kind == "sum"]
    assert sums == [(n, n, n) for n in (5, 22, 72, 172, 372, 476, 528, 546, 551)]


def test_the_unet_makes_what_its_figure_shows() -> None:
    found = traced("unet", 2, "paper")
    assert [o.shape[1] for o in found.operations if o.kind == "pool"] == [284, 140, 68, 32]
    assert [o.shape for o in found.operations if o.kind == "concat"] == [(1024, 56, 56), (512, 104, 104), (256, 200, 200), (128, 392, 392)]
    assert found.operations[found.outputs[0]].shape == (2, 388, 388)


@pytest.mark.parametrize(
    "form", {name: (name, dims, variant) for name, dims, variant in reversed(FORMS)}.values(), ids=lambda form: form[0]
)
def test_what_is_known_of_shapes_is_what_torch_says(form: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "_plain_shape", lambda *_: None)
    assert traced.__wrapped__(*form) == traced(*form)


def test_a_function_that_works_in_place_gives_what_it_was_given() -> None:
    def steps(features_BCS: Tensor) -> Tensor:
        torch.sigmoid_(features_BCS)
        other_BCS = torch.relu(features_BCS)
        features_BCS += other_BCS
        return torch.cat([features_BCS, other_BCS], axis=-1)  # type: ignore[call-overload, no-any-return]

    # Whoever uses the map afterwards uses what was made of it.
    found = trace(Steps(steps), (1, 16, 16)).operations
    assert [o.kind for o in found] == ["input", "convolution", "activation", "activation", "sum", "concat"]
    assert [o.inputs for o in found] == [(), (0,), (1,), (2,), (2, 3), (4, 3)]
    assert found[-1].shape == (4, 8, 16)


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_every_parameter_is_counted_once(name: str, dims: int, variant: str) -> None:
    found = traced(name, dims, variant)
    shape = found.operations[0].shape
    with torch.device("meta"):
        network = build(name, dims=dims, in_channels=shape[0], classes=2, variant=variant)
    assert sum(o.parameters for o in found.operations) + sum(n for _, n in found.unused) == found.parameters
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "dims", "config"),
    [
        ("unet", 2, {"widths": (2, 4, 4)}),
        ("modern_unet", 3, {"widths": (2, 4, 4), "norm": "instance", "supervised_levels": 2, "residual": True}),
    ],
)
def test_shapes_are_those_of_a_run_on_real_values(name: str, dims: int, config: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = build(name, dims=dims, in_channels=1, classes=2, config=NetworkConfig(**config))
    image_BCS = torch.randn(2, 1, *(network.nearest_sizes(8, axis)[1] for axis in range(dims)))
    found = trace(network, image_BCS.shape[1:])
    shapes: list[tuple[int, ...]] = []
    layers = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    for module in network.modules():
        if isinstance(module, layers):
            module.register_forward_hook(lambda _module, _args, result: shapes.append(tuple(result.shape[1:])))
    logits = network(image_BCS)
    assert [o.shape for o in found.operations if o.kind in ("convolution", "transposed")] == shapes
    results = logits if isinstance(logits, list) else [logits]
    assert [found.operations[place].shape for place in found.outputs] == [tuple(result.shape[1:]) for result in results]


@pytest.mark.parametrize("shape", [(1, 10**9 - 16, 10**9 - 16), (10**9, 10**9 - 16, 16)])
def test_an_image_whose_bytes_torch_cannot_count_is_refused(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = build("unet_same", dims=2, in_channels=1, classes=2)
    with pytest.raises(ConfigError, match=r"^unet_same: expected an image of at most [0-9,]+ voxels, got .*; choose a smaller one"):
        trace(network, shape)


def test_the_network_is_left_as_it_was() -> None:
    network = Tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trace(network, (1, 16, 16))
    with pytest.raises(ConfigError, match="got 17×16"):
        trace(network, (1, 17, 16))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
