"""CANet: the chain of context flows as the paper wires it, its encoder, and the tutorial's small form."""

import pytest
import torch
from torch import Tensor, nn

from microtome.config import NetworkConfig
from microtome.errors import ConfigError
from microtome.models.canet import CANet, Gate, LargeKernel
from microtome.models.network import NetworkSpec

Shape = tuple[int, ...]
VARIANTS = ("paper", "small")


def canet(variant: str = "", *, in_channels: int = 3, classes: int = 21, **config: object) -> CANet:
    sizes = NetworkConfig(**config)
    return CANet(NetworkSpec(name="canet", dims=2, in_channels=in_channels, classes=classes, config=sizes, variant=variant))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def statistics(network: nn.Module) -> int:
    return sum(buffer.numel() for name, buffer in network.named_buffers() if "running" in name)


@pytest.mark.parametrize(("variant", "flows"), [("paper", 4), ("small", 3)])
def test_every_flow_depends_on_c4_and_on_all_flows_before_it_and_on_none_after(variant: str, flows: int) -> None:
    """The tutorial feeds flow 2 what flow 1 was fed, and flow 3 the first: there, most of these gradients are zero."""
    torch.manual_seed(0)
    network = canet(variant, widths=(4, 8, 16, 32)).eval()
    outputs: list[Tensor] = []
    network.global_flow.register_forward_hook(lambda *args: outputs.append(args[-1]))
    for context_flow in network.context_flows:
        context_flow.register_forward_hook(lambda *args: outputs.append(args[-1]))
    c4_BCS = torch.randn(1, 32, 16, 16, requires_grad=True)
    network.gather(c4_BCS)
    assert len(outputs) == 1 + flows
    for k, flow in enumerate(outputs):
        gradients = torch.autograd.grad(flow.square().sum(), [c4_BCS, *outputs], retain_graph=True, allow_unused=True)
        reaches = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert reaches == [True] + [j <= k for j in range(1 + flows)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_flow_is_fed_c4_and_the_very_output_of_the_flow_before(variant: str) -> None:
    torch.manual_seed(0)
    network = canet(variant, widths=(4, 8, 16, 32)).eval()
    inputs: list[tuple[Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    for context_flow in network.context_flows:
        context_flow.register_forward_pre_hook(lambda _, args: inputs.append(args))
        context_flow.register_forward_hook(lambda *args: outputs.append(args[-1]))
    c4_BCS = torch.randn(2, 32, 8, 8)
    sum_BCS = network.gather(c4_BCS)
    assert all(args[0] is c4_BCS for args in inputs)
    assert all(args[1] is before for args, before in zip(inputs[1:], outputs, strict=False))
    global_BCS = network.global_flow(c4_BCS).expand(-1, -1, 8, 8)
    assert torch.equal(inputs[0][1], global_BCS)
    torch.testing.assert_close(sum_BCS, global_BCS + torch.stack(outputs).sum(0))


def test_the_flows_of_the_paper_pool_by_2_4_8_and_16() -> None:
    network = canet(widths=(4, 8, 16, 32)).eval()
    pooled: list[Shape] = []
    for context_flow in network.context_flows:
        context_flow.layers.register_forward_pre_hook(lambda _, args: pooled.append(tuple(args[0].shape[1:])))
    network.gather(torch.randn(1, 32, 32, 24))
    assert pooled == [(40, 16, 12), (40, 8, 6), (40, 4, 3), (40, 2, 1)]


def test_the_small_form_has_the_tutorials_count_and_that_of_the_unit_which_is_dead_there() -> None:
    with torch.device("meta"):
        network = canet("small")
    dead = network.stages[3][3]
    assert (parameters(network), statistics(network)) == (525_469, 2_608)
    assert (parameters(network) - parameters(dead), statistics(network) - statistics(dead)) == (511_773, 2_352)
    assert 511_773 + 2_352 == 514_125


def test_the_encoder_of_the_paper_has_the_parameters_of_a_resnet_50_with_a_deep_stem() -> None:
    def unit(channels: int, width: int) -> int:
        inner = width // 4
        return channels * inner + 9 * inner**2 + inner * width + 2 * (2 * inner + width)

    stem = 9 * (3 * 64 + 64 * 64 + 64 * 128) + 2 * (64 + 64 + 128)
    stages = sum(
        unit(channels, width) + channels * width + 2 * width + (units - 1) * unit(width, width)
        for channels, width, units in [(128, 256, 3), (256, 512, 4), (512, 1024, 6), (1024, 2048, 3)]
    )
    with torch.device("meta"):
        network = canet()
    assert parameters(network.stem) + parameters(network.stages) == stem + stages == 23_631_808
    assert parameters(network) == 33_769_781


def shapes(variant: str, size: int) -> dict[str, Shape]:
    """Channels and sides of each part's output for a square image."""
    seen: dict[str, Shape] = {}
    with torch.device("meta"):
        network = canet(variant)
        parts = {f"C{level}": stage for level, stage in enumerate(network.stages, start=1)}
        parts |= {f"flow {k}": flow for k, flow in enumerate(network.context_flows, start=1)}
        parts |= {"stem": network.stem, "gate": network.gate, "detail": network.detail, "head": network.head}
        for name, part in parts.items():
            part.register_forward_hook(lambda *args, name=name: seen.update({name: tuple(args[-1].shape[1:])}))
        seen["logits"] = tuple(network(torch.empty(2, 3, size, size)).shape[1:])
    return seen


def test_the_paper_form_has_c1_at_a_quarter_and_the_rest_at_an_eighth() -> None:
    stages = {"stem": (128, 64, 64), "C1": (256, 64, 64), "C2": (512, 32, 32), "C3": (1024, 32, 32), "C4": (2048, 32, 32)}
    flows = {f"flow {k}": (512, 32, 32) for k in (1, 2, 3, 4)}
    rest = {"gate": (256, 32, 32), "detail": (48, 64, 64), "head": (21, 64, 64), "logits": (21, 256, 256)}
    assert shapes("paper", 256) == stages | flows | rest


def test_the_small_form_has_the_tutorials_shapes() -> None:
    stages = {"stem": (64, 256, 256), "C1": (8, 128, 128), "C2": (16, 64, 64), "C3": (32, 64, 64), "C4": (64, 64, 64)}
    flows = {f"flow {k}": (64, 64, 64) for k in (1, 2, 3)}
    rest = {"gate": (32, 64, 64), "detail": (32, 128, 128), "head": (21, 128, 128), "logits": (21, 512, 512)}
    assert shapes("small", 512) == stages | flows | rest


def test_dilation_stands_in_for_the_last_two_strides() -> None:
    with torch.device("meta"):
        network = canet()
    middle = [[unit.layers[1][0] for unit in stage] for stage in network.stages]
    assert [[convolution.dilation[0] for convolution in stage] for stage in middle] == [[1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]]
    assert [stage[0].stride[0] for stage in middle] == [1, 2, 1, 1]


def test_a_gate_is_x_times_the_sigmoid_of_its_score_and_plus_x_where_residual() -> None:
    features_BCS = torch.tensor([[[[2.0]], [[-4.0]]]])
    for residual, expected in ((False, [0.5 * 2, -0.5 * 4]), (True, [1.5 * 2, -1.5 * 4])):
        gate = Gate(nn.Conv2d(2, 2, 1), residual=residual)
        nn.init.zeros_(gate.score.weight)
        nn.init.zeros_(gate.score.bias)
        assert gate(features_BCS).flatten().tolist() == pytest.approx(expected)


def test_the_tutorials_last_gate_alone_is_not_residual() -> None:
    paper, small = canet("paper", widths=(4, 8)), canet("small", widths=(4, 8))
    assert [module.residual for module in paper.modules() if isinstance(module, Gate)] == [True]
    assert [flow.layers[2].residual for flow in small.context_flows] == [True] * 3
    assert small.gate[1].residual is False


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_context_comes_before_the_detail_of_c1_and_is_enlarged_to_its_size(variant: str) -> None:
    torch.manual_seed(0)
    network = canet(variant, widths=(8, 16))
    seen: dict[str, Tensor] = {}
    network.gate.register_forward_hook(lambda *args: seen.update(context=args[-1]))
    network.detail.register_forward_hook(lambda *args: seen.update(detail=args[-1]))
    network.head.register_forward_pre_hook(lambda _, inputs: seen.update(joined=inputs[0]))
    network(torch.randn(2, 3, 32, 48))
    context_BCS = nn.functional.interpolate(seen["context"], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(seen["joined"], torch.cat([context_BCS, seen["detail"]], 1))


def test_the_large_kernel_reaches_three_pixels_along_both_axes_and_one_further_with_its_refinement() -> None:
    torch.manual_seed(0)
    image_BCS = torch.zeros(1, 1, 13, 13, requires_grad=True)
    LargeKernel(1, 2)(image_BCS)[0, :, 6, 6].sum().backward()
    reached = image_BCS.grad[0, 0].abs() > 0
    assert reached.nonzero().amin(0).tolist() == [2, 2]
    assert reached.nonzero().amax(0).tolist() == [10, 10]


@pytest.mark.parametrize(("variant", "widths"), [("paper", (6, 8, 8)), ("small", (6, 8, 8)), ("paper", (8, 8)), ("small", (4, 4, 4, 4, 4))])
def test_narrow_forms_of_any_depth_train_every_weight(variant: str, widths: Shape) -> None:
    torch.manual_seed(0)
    network = canet(variant, in_channels=2, classes=3, widths=widths)
    logits_BKS = network(torch.randn(3, 2, 32, 48))
    assert logits_BKS.shape == (3, 3, 32, 48)
    (logits_BKS * torch.randn_like(logits_BKS)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in network.named_parameters() if name.endswith("weight") and not parameter.grad.any()] == []


def test_with_two_supervised_levels_c3_has_a_head_that_answers_in_training_only() -> None:
    torch.manual_seed(0)
    network = canet(classes=2, widths=(4, 8, 8, 8), supervised_levels=2, dropout=0)
    image_BCS = torch.randn(2, 3, 32, 32)
    logits = network(image_BCS)
    assert [tuple(each.shape) for each in logits] == [(2, 2, 32, 32)] * 2
    c4_weights = [parameter for parameter in network.stages[3].parameters() if parameter.ndim == 4]
    gradients = torch.autograd.grad(logits[1].sum(), c4_weights, allow_unused=True)
    assert gradients == (None,) * len(c4_weights)
    assert isinstance(network.eval()(image_BCS), Tensor)


@pytest.mark.parametrize(("dropout", "share"), [(None, 0.1), (0.0, 0.0)])
def test_dropout_is_that_of_the_authors_code_or_of_the_config(dropout: float | None, share: float) -> None:
    network = canet(widths=(4, 8), supervised_levels=2, dropout=dropout)
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [share] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_one_is_predicted_but_not_trained(variant: str) -> None:
    network = canet(variant, widths=(4, 8))
    image_BCS = torch.randn(1, 3, 32, 16)
    with pytest.raises(ConfigError, match="canet: expected 2 images or more in training, got 1; train with a batch of 2"):
        network(image_BCS)
    assert network.eval()(image_BCS).shape == (1, 21, 32, 16)


@pytest.mark.parametrize(("variant", "size", "message"), [("paper", 20, "X 16 or 24"), ("small", 24, "X 16 or 32"), ("paper", 8, "X 16,")])
def test_a_side_that_does_not_fit_is_refused(variant: str, size: int, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        canet(variant, widths=(4, 8))(torch.empty(2, 3, 32, size))


@pytest.mark.parametrize(
    ("variant", "config", "message"),
    [
        ("paper", {"widths": (8,)}, r"at least 2 levels, got \(8,\)"),
        ("paper", {"supervised_levels": 3}, "at most 2 supervised levels, got 3"),
        ("small", {"supervised_levels": 2}, "at most 1 supervised levels, got 2"),
        ("small", {"dropout": 0.1}, "no dropout in `small`, got 0.1"),
    ],
)
def test_what_a_variant_does_not_have_is_refused(variant: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"canet: expected {message}"):
        canet(variant, **config)
