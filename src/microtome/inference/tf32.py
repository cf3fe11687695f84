"""Whether a GPU may round the numbers of a float32 convolution to TF32, stated where it is decided."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether convolutions of float32 are computed in TF32 on a GPU, inside of the body: 10 bits of mantissa instead of 23, much faster.

    torch allows it to convolutions, and not to products of matrices, unless told otherwise. Here training in float32 allows
    it: weights and gradients are rounded less than the noise of a batch. Prediction in float32 does not: it is the oracle
    that other engines are held to. Who wants speed has bf16. Products of matrices stay exact in both: the samples'
    displacements are such products, and no network here spends its time in them.

    The setting is the process's. Only the one for convolutions is touched: torch.compile still asks for the other by its old
    name, and torch refuses to answer where both names were used (pytorch issue 166387).
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@contextmanager
def without_advice() -> Iterator[None]:
    """Inside of the body torch.compile does not advise TF32 for products of matrices, which are kept exact on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield
