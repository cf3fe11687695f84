"""A network run by torch; in float32 the oracle that every other engine must agree with."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from microtome.bundle import Bundle
from microtome.geometry import Spacing
from microtome.inference.averaging import Pass, mirrored_mean, rotated_mean, with_entropy
from microtome.inference.cuda_graphs import RepeatedTiles
from microtome.inference.devices import arithmetic, has_bf16, to_device
from microtome.inference.mirroring import TTA
from microtome.inference.restore import restore
from microtome.models.network import Network


@dataclass(frozen=True, kw_only=True)
class TorchEngine:
    """A network in evaluation mode, ready to be given arrays.

    Attributes:
        network: built by `models.registry.build`; images are brought to the type of its weights.
        device: where it lies.
        precision: "fp32", or "bf16": float32 weights multiplied in bfloat16, as training does.
        tta: what the output is averaged over: "none", "mirror" (versions mirrored along `mirror_axes`), "rotations".
        mirror_axes: axes of S that may be mirrored.
        spacing_mm: voxel size of the network's grid, of which the last two count: what is turned is millimetres.
        forward: what is called in the network's place, and gives the same; None: the network.
        spread: whether the output has a last layer more, as `mirroring.with_spread` says.
    """

    network: Network
    device: torch.device
    precision: str = "fp32"
    tta: TTA = "none"
    mirror_axes: tuple[int, ...] = ()
    spacing_mm: Spacing = (1.0, 1.0)
    forward: Pass | None = None
    spread: bool = False

    @property
    def name(self) -> str:
        """`torch`, the oracle, or `torch-bf16`."""
        return "torch" if (self.precision, self._dtype()) == ("fp32", torch.float32) else "torch-bf16"

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S'), or with `spread` (K + 1, *S'), float32 of one tile (C, *S); S' is S less the network's border on both sides."""
        image_BCS = torch.from_numpy(image_CS).unsqueeze(0).to(self.device, self._dtype())
        forward = self.forward or self.network
        forward = with_entropy(forward) if self.spread else forward
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            if self.tta == "rotations":
                sizes, border = self.network.nearest_sizes, self.network.context_vox
                logits_BKS = rotated_mean(forward, image_BCS, sizes, border, spacing_mm=self.spacing_mm)
            else:
                logits_BKS = mirrored_mean(forward, image_BCS, self.mirror_axes if self.tta == "mirror" else ())
        logits_KS: np.ndarray = logits_BKS[0].cpu().numpy()
        return logits_KS

    def averaged(self, tta: TTA, mirror_axes: tuple[int, ...], spacing_mm: Spacing) -> "TorchEngine":
        """The same network, its output the mean over versions of the tile."""
        return replace(self, tta=tta, mirror_axes=mirror_axes, spacing_mm=spacing_mm)

    def with_spread(self) -> "TorchEngine":
        """The same network, its output with the mean entropy of the passes as a last layer."""
        return replace(self, spread=True)

    def _dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.network.parameters()).dtype


def open_torch(bundle: Bundle, name: str, device: torch.device, head: int | None = None) -> TorchEngine:
    """The bundle's network on a device, channels last, for the engine `torch` or `torch-bf16`.

    In bf16 the weights themselves are rounded: measured against float32 weights under autocast, in either memory layout, it was
    the fastest on every network (docs/decisions/0013), and as near to float32.

    Raises:
        ConfigError: the network has no such head.
        DataError: the weights are not of this network.
    """
    network = restore(bundle)
    network = to_device(network if head is None else network.pruned(head), device, bundle.plan.dims)
    network = network.to(torch.bfloat16) if name == "torch-bf16" else network
    return TorchEngine(network=network, device=device, forward=RepeatedTiles(network) if device.type == "cuda" else None)


def trained_engine(bundle: Bundle, device: torch.device) -> TorchEngine:
    """The network in the arithmetic of its training, which is what its scores are of, however much rounding changes its answers.

    In float32 for a model from a newer machine, whose bfloat16 would be emulated here.
    """
    network = to_device(restore(bundle), device, bundle.plan.dims)
    precision = bundle.plan.precision if has_bf16(device) else "fp32"
    return TorchEngine(network=network, device=device, precision=precision)


def gpu_name(device: str) -> str:
    """What a GPU calls itself."""
    return torch.cuda.get_device_name(torch.device(device))
