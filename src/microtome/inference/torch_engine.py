"""A network run by torch; in float32 the oracle that every other engine must agree with."""

from dataclasses import dataclass

import numpy as np
import torch

from microtome.geometry import Spacing
from microtome.inference.averaging import TTA, mirrored_mean, rotated_mean
from microtome.inference.devices import arithmetic
from microtome.models.network import Network


@dataclass(frozen=True, kw_only=True)
class TorchEngine:
    """A network in evaluation mode, ready to be given arrays.

    Attributes:
        network: built by `models.registry.build`.
        device: where it lies.
        precision: "fp32" or "bf16".
        tta: what the output is averaged over: "none", "mirror" (versions mirrored along `mirror_axes`), "rotations".
        mirror_axes: axes of S that may be mirrored.
        spacing_mm: voxel size of the network's grid, of which the last two count: what is turned is millimetres.
    """

    network: Network
    device: torch.device
    precision: str = "fp32"
    tta: TTA = "none"
    mirror_axes: tuple[int, ...] = ()
    spacing_mm: Spacing = (1.0, 1.0)

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        """Logits (K, *S') float32 of one tile (C, *S); S' is S less the network's border on both sides."""
        image_BCS = torch.from_numpy(image_CS).unsqueeze(0).to(self.device)
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            if self.tta == "rotations":
                sizes, border = self.network.nearest_sizes, self.network.context_vox
                logits_BKS = rotated_mean(self.network, image_BCS, sizes, border, spacing_mm=self.spacing_mm)
            else:
                logits_BKS = mirrored_mean(self.network, image_BCS, self.mirror_axes if self.tta == "mirror" else ())
        logits_KS: np.ndarray = logits_BKS[0].cpu().numpy()
        return logits_KS
