"""What a network does, operation by operation: shapes, parameters, multiply-adds, receptive field; run on no data.

The network runs once on tensors of torch's `meta` device, which have shapes but no values, so any size takes no memory
and milliseconds. Every call of a torch function is seen (`TorchFunctionMode`), those of `forward` itself (cat, add,
interpolate) as well as those inside modules; hooks tell in which module it happened.

Conventions, for one image (batch of 1):

    multiply-adds   convolution: output voxels x output channels x kernel x input channels / groups; transposed
                    convolution: the same from its input voxels; linear: inputs x outputs. Biases, norms, activations,
                    pooling, resizing and sums count 0. Padding counts as if it were image. 1 multiply-add = 2 FLOP.
    receptive field r, in voxels of the image along each axis; j is the distance of two neighbouring voxels of the map.
                    convolution and pooling: r += (k - 1) * dilation * j, then j *= stride; transposed convolution:
                    j /= stride, then r += (k - 1) * j; a join (concat, sum, product): the largest; resizing: linear adds one
                    voxel of the map it reads, nearest none; global pooling and flattening: at least the whole image.
                    It is an upper bound, and what V-Net's Table 1 counts (arXiv 1606.04797).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from microtome.errors import ConfigError
from microtome.geometry import format_shape
from microtome.models.network import Network

# A batch norm in training mode refuses one value a channel, which the deepest map of a small image may have.
BATCH = 2

_KINDS: Mapping[str, str] = MappingProxyType(
    {
        **{f"conv{n}d": "convolution" for n in (1, 2, 3)},
        **{f"conv_transpose{n}d": "transposed" for n in (1, 2, 3)},
        **{f"{pool}_pool{n}d{end}": "pool" for pool in ("max", "avg") for n in (1, 2, 3) for end in ("", "_with_indices")},
        **{f"adaptive_{pool}_pool{n}d": "shrink" for pool in ("max", "avg") for n in (1, 2, 3)},
        **dict.fromkeys(("mean", "amax"), "shrink"),
        **dict.fromkeys(("interpolate", "upsample"), "resize"),
        **{f"{norm}_norm": "norm" for norm in ("batch", "instance", "group", "layer")},
        **dict.fromkeys(("relu", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "sigmoid", "tanh", "softmax"), "activation"),
        **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"), "dropout"),
        **dict.fromkeys(("cat", "concat", "stack"), "concat"),
        **dict.fromkeys(("add", "iadd", "radd", "sub", "isub", "rsub"), "sum"),
        **dict.fromkeys(("mul", "imul", "rmul"), "product"),
        "linear": "linear",
    }
)
_JOINS = frozenset({"concat", "sum", "product"})


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step of the forward pass.

    Attributes:
        name: dotted name of the module; of a function called by a module with parts: that module's name and the function's.
        kind: input, convolution, transposed, pool, resize, linear, norm, activation, dropout, concat, sum, product, or other.
        function: torch's name of it, without underscores around it.
        inputs: places in `Trace.operations` of those whose results it takes, each once.
        taken: shapes (C, *S) that it takes from each of them: less than their result where that was cropped or split.
        shape: of the result, (C, *S); (C,) of a vector.
        kernel, stride, dilation: along S of a convolution, transposed convolution or pooling, else empty; a global
            pooling has the size of its map.
        mode: of a resizing, `nearest`, `bilinear`, ...
        parameters: used here for the first time.
        shared: parameters used here that an operation before has used too.
        multiply_adds: of one image.
        field_vox: receptive field along S of the image.
        jump_vox: distance of two voxels of the result along S, in voxels of the image.
    """

    name: str
    kind: str
    function: str
    inputs: tuple[int, ...]
    taken: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    mode: str = ""
    parameters: int = 0
    shared: int = 0
    multiply_adds: int = 0
    field_vox: tuple[int, ...]
    jump_vox: tuple[Fraction, ...]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The forward pass of a network as a graph.

    Attributes:
        network, variant: as the network's spec names them.
        operations: in the order in which they ran; the first is the image.
        outputs: places in `operations` of the results, finest first where there is deep supervision.
        parameters: of the whole network, each counted once.
        unused: name and number of elements of each parameter that this pass did not use (heads that only training uses).
    """

    network: str
    variant: str
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]
    parameters: int
    unused: tuple[tuple[str, int], ...] = ()

    @property
    def multiply_adds(self) -> int:
        """Of the whole pass, for one image."""
        return sum(operation.multiply_adds for operation in self.operations)

    @property
    def values(self) -> int:
        """Values that all operations put out for one image, but for activations, which mostly work in place."""
        return sum(math.prod(operation.shape) for operation in self.operations if operation.kind != "activation")


def trace(network: Network, shape: Sequence[int]) -> Trace:
    """Run a network on an image without values.

    Args:
        network: on whatever device, `meta` too; in training mode (as it is built) its auxiliary heads run. It is left as it is.
        shape: of the image, (C, *S).

    Raises:
        ConfigError: the network does not take an image of that shape, or torch cannot count the bytes of its maps.
    """
    _check_size(network, shape)
    tensors = {name: tensor.detach().to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    weights = {id(tensors[name]): (name, tensor.numel()) for name, tensor in network.named_parameters()}
    image_BCS = torch.empty((BATCH, *shape), device="meta")
    recorder = _Recorder(image_BCS, weights)
    with torch.no_grad(), recorder.following(network), recorder:
        result = functional_call(network, tensors, (image_BCS,))
    outputs = result if isinstance(result, list | tuple) else [result]
    return Trace(
        network=network.spec.name,
        variant=network.spec.variant,
        operations=tuple(recorder.operations),
        outputs=tuple(recorder.made[id(output)][1] for output in outputs),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        unused=tuple(weight for key, weight in weights.items() if key not in recorder.used),
    )


def _check_size(network: Network, shape: Sequence[int]) -> None:
    """Refuse an image whose maps, as wide as the widest layer, would have more than torch's 2^63 bytes."""
    widest = max(max(parameter.shape, default=1) for parameter in network.parameters())
    most = (1 << 63) // (BATCH * torch.float32.itemsize * max(widest, shape[0])) - 1
    if math.prod(shape[1:]) > most:
        expected = f"an image of at most {most:,} voxels"
        raise ConfigError(network.spec.name, expected=expected, got=format_shape(tuple(shape[1:])), do="choose a smaller one", code="C034")


def _shaped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a function puts out, without values.

    Where the shape is plain it is not left to torch, whose own way takes ten times as long and loads its compiler, seconds of it.
    """
    shape = _plain_shape(func, args, kwargs)
    if shape is None:
        return func(*args, **kwargs)
    first = args[0][0] if func is torch.cat else args[0]
    # `add_` and `__iadd__` change what they are given.
    name = func.__name__
    in_place = kwargs.get("inplace") or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return first if in_place else torch.empty(shape, dtype=first.dtype, device="meta")


def _plain_shape(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of what some functions put out that are given maps without values and do nothing else; None: torch has to say."""
    if func is torch.cat:
        if not args or kwargs.keys() - {"dim"}:
            return None
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return _joined([part.shape for part in args[0]], axis) if all(part.is_meta for part in args[0]) else None
    maps = [value for value in args if isinstance(value, Tensor)]
    if not maps or not maps[0].is_meta or maps[0] is not args[0]:
        return None
    kind, shape = _KINDS.get(func.__name__.strip("_")), tuple(maps[0].shape)
    # Torch refuses the instance norm of a single voxel.
    normed = func is functional.batch_norm or (func is functional.instance_norm and math.prod(shape[2:]) > 1)
    alike = all(value.is_meta and value.shape == maps[0].shape and value.dtype == maps[0].dtype for value in maps)
    summed = kind in ("sum", "product") and len(maps) == len(args) and alike and not kwargs
    return shape if normed or summed or kind in ("activation", "dropout") else None


def _joined(shapes: Sequence[Sequence[int]], axis: int) -> tuple[int, ...] | None:
    """Of maps that are put behind each other along an axis; None where they do not fit."""
    axis %= len(shapes[0])
    others = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    return None if len(others) > 1 else (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


class _Recorder(TorchFunctionMode):
    """Sees every torch function that is called while it is active."""

    def __init__(self, image_BCS: Tensor, weights: Mapping[int, tuple[str, int]]) -> None:
        super().__init__()
        self.weights, self.used, self.modules = weights, set[int](), list[tuple[str, bool]]()
        size = tuple(image_BCS.shape[2:])
        self.image_vox = size
        one = (1,) * len(size)
        start = Operation(
            name="image",
            kind="input",
            function="",
            inputs=(),
            taken=(),
            shape=tuple(image_BCS.shape[1:]),
            field_vox=one,
            jump_vox=tuple(map(Fraction, one)),
        )
        self.operations = [start]
        # Tensors are kept, so that no later one can have the id of one that is gone.
        self.made: dict[int, tuple[Tensor, int]] = {id(image_BCS): (image_BCS, 0)}

    @contextmanager
    def following(self, network: nn.Module) -> Iterator[None]:
        """Know which module is at work, by hooks that are gone afterwards."""
        with ExitStack() as hooks:
            for name, module in network.named_modules():
                leaf = next(module.children(), None) is None
                for handle in (
                    module.register_forward_pre_hook(lambda _module, _args, at=(name, leaf): self.modules.append(at)),
                    module.register_forward_hook(lambda _module, _args, _result: _drop_last(self.modules), always_call=True),
                ):
                    hooks.callback(handle.remove)
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = _shaped(func, args, kwargs or {})
        results = [value for value in (result if isinstance(result, list | tuple) else (result,)) if isinstance(value, Tensor)]
        sources = [tensor for tensor in _tensors((*args, *(kwargs or {}).values())) if id(tensor) in self.made]
        if results and sources:
            self._note(_Call(func.__name__.strip("_"), args, kwargs or {}), sources, results)
        return result

    def _note(self, call: "_Call", sources: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Record the call, or where it only looks at a tensor in another way, who made that tensor."""
        places = list(dict.fromkeys(self.made[id(tensor)][1] for tensor in sources))
        weights = [id(tensor) for tensor in _tensors((*call.args, *call.kwargs.values())) if id(tensor) in self.weights]
        kind = _KINDS.get(call.function, "other")
        alone = kind == "other" or (kind in _JOINS and call.function != "stack")
        shrinks = kind == "shrink" and self._voxels(results[0]) < self._voxels(sources[0])
        if not weights and ((alone and len(places) == 1) or (kind == "shrink" and not shrinks)):
            place = places[0]
        else:
            place = len(self.operations)
            self.operations.append(self._operation(call, kind, sources, results[0], weights))
        for tensor in results:
            self.made[id(tensor)] = (tensor, place)

    def _operation(self, call: "_Call", kind: str, sources: Sequence[Tensor], result: Tensor, weights: Sequence[int]) -> Operation:
        dims = len(self.image_vox)
        geometry = self._shrinking(sources[0], result) if kind == "shrink" else _geometry(call, kind, sources[0].ndim - 2)
        mode = str(call.value("mode", 3, "nearest")) if kind == "resize" else ""
        extents = [self._along(axis, kind, sources, result, {**geometry, "mode": mode}) for axis in range(dims)]
        new = [key for key in dict.fromkeys(weights) if key not in self.used]
        self.used.update(new)
        places = {self.made[id(tensor)][1]: tensor for tensor in reversed(sources)}
        name, leaf = self.modules[-1]
        return Operation(
            name=name if leaf else ".".join(filter(None, (name, call.function))),
            kind="pool" if kind == "shrink" else kind,
            function=call.function,
            inputs=tuple(reversed(places)),
            taken=tuple(tuple(tensor.shape[1:]) for tensor in reversed(places.values())),
            shape=tuple(result.shape[1:]),
            mode=mode,
            parameters=sum(self.weights[key][1] for key in new),
            shared=sum(self.weights[key][1] for key in dict.fromkeys(weights) if key not in new),
            multiply_adds=_multiply_adds(call, kind, sources[0], result),
            field_vox=tuple(field for field, _ in extents),
            jump_vox=tuple(jump for _, jump in extents),
            **geometry,
        )

    def _along(self, axis: int, kind: str, sources: Sequence[Tensor], result: Tensor, geometry: Mapping[str, Any]) -> tuple[int, Fraction]:
        """Receptive field and jump along an axis of the image; the rules are in the header."""
        seen = [self._seen(tensor, axis) for tensor in sources]
        field, jump = max(field for field, _ in seen), min(jump for _, jump in seen)
        if kind == "resize":
            before, after = sources[0].shape[2 + axis], result.shape[2 + axis]
            linear = before > 1 and before != after and "nearest" not in geometry["mode"]
            return math.ceil(field + jump * linear), jump * Fraction(before, after)
        if "kernel" not in geometry:
            return field, jump
        kernel, stride = geometry["kernel"][axis], geometry["stride"][axis]
        reach = (kernel - 1) * geometry["dilation"][axis]
        if kind == "transposed":
            return math.ceil(field + reach * jump / stride), jump / stride
        return math.ceil(field + reach * jump), jump * stride

    def _shrinking(self, source: Tensor, result: Tensor) -> dict[str, tuple[int, ...]]:
        """What a pooling to a given size, or a mean over S, does; the map may have been flattened before."""
        dims = len(self.image_vox)
        before = self.operations[self.made[id(source)][1]].shape[1:]
        after = tuple(result.shape[2:]) if result.ndim == dims + 2 else (1,) * dims
        kernel = tuple(-(-n // small) for n, small in zip(before, after, strict=True))
        return {"kernel": kernel, "stride": kernel, "dilation": (1,) * dims}

    def _seen(self, tensor: Tensor, axis: int) -> tuple[int, Fraction]:
        """What the tensor sees of the image; a flattened one all that there is."""
        operation = self.operations[self.made[id(tensor)][1]]
        field, jump = operation.field_vox[axis], operation.jump_vox[axis]
        whole = tensor.ndim == 2
        return (max(field, self.image_vox[axis]), max(jump, Fraction(self.image_vox[axis]))) if whole else (field, jump)

    def _voxels(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape[-len(self.image_vox) :]) if tensor.ndim > len(self.image_vox) else 1


@dataclass(frozen=True)
class _Call:
    """A torch function with its arguments, which may come by place or by name."""

    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def value(self, name: str, place: int, default: Any) -> Any:
        found = self.kwargs.get(name, self.args[place] if place < len(self.args) else None)
        return default if found is None or found == () or found == [] else found


def _geometry(call: _Call, kind: str, dims: int) -> dict[str, tuple[int, ...]]:
    """Kernel, stride and dilation along S; empty where there are none."""
    if kind in ("convolution", "transposed"):
        weight = call.value("weight", 1, None)
        kernel = tuple(weight.shape[2:])
        stride, dilation = call.value("stride", 3, 1), call.value("dilation", 7 if kind == "transposed" else 5, 1)
    elif kind == "pool":
        kernel = _each(call.value("kernel_size", 1, 1), dims)
        stride, dilation = call.value("stride", 2, kernel), call.value("dilation", 4, 1) if call.function.startswith("max") else 1
    else:
        return {}
    return {"kernel": kernel, "stride": _each(stride, dims), "dilation": _each(dilation, dims)}


def _multiply_adds(call: _Call, kind: str, source: Tensor, result: Tensor) -> int:
    if kind not in ("convolution", "transposed", "linear"):
        return 0
    weight = call.value("weight", 1, None)
    if kind == "transposed":
        return math.prod(source.shape[2:]) * int(weight.numel())
    return math.prod(result.shape[1:]) * int(weight[0].numel())


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number an axis."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, also those in a list."""
    found = [each for value in values for each in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in found if isinstance(value, Tensor)]


def _drop_last(modules: list[tuple[str, bool]]) -> None:
    modules.pop()
