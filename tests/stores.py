"""Small models and chunked volumes for the tests of prediction."""

from pathlib import Path

import numpy as np
import tensorstore as ts
import torch

from microtome.bundle import Bundle, save_bundle
from microtome.config import NetworkConfig, NormalisationConfig, Plan
from microtome.data.legend import Legend
from microtome.files import write_json
from microtome.geometry import Shape
from microtome.inference.restore import arrays_of
from microtome.models.registry import build
from tests.small import small_plan, small_plan_3d


def small_bundle(
    folder: Path,
    *,
    dims: int,
    normalisation: NormalisationConfig | None = None,
    background: int | None = 0,
    patch_vox: tuple[int, ...] | None = None,
    sizes: NetworkConfig | None = None,
    overlap: float | None = None,
) -> Path:
    """A run folder with a network of random weights that calls about half of a noisy image an object; the folder."""
    plan: Plan = small_plan() if dims == 2 else small_plan_3d(patch_vox=(8, 16, 16), spacing_mm=(1.0, 1.0, 1.0), batch=1)
    plan = plan.model_copy(
        update={
            "normalisation": normalisation or NormalisationConfig(kind="image"),
            "patch_vox": patch_vox or plan.patch_vox,
            "network": sizes or plan.network,
            "overlap": plan.overlap if overlap is None else overlap,
        }
    )
    torch.manual_seed(0)
    network = build(plan.network.name, dims=dims, in_channels=1, classes=2, config=plan.network).eval()
    with torch.inference_mode():
        logits_KS = network(torch.randn(1, 1, *plan.patch_vox))[0]
        head = [parameter for parameter in network.parameters() if parameter.shape == (2,)][-1]
        head += torch.tensor([0.0, float((logits_KS[0] - logits_KS[1]).median())])
    legend = Legend(names=("background", "cell"), values=((0,), (3,)), background=background)
    weights = arrays_of(network.state_dict())
    bundle = Bundle(plan=plan, legend=legend, weights=weights, sizes=network.sizes, context_vox=network.context_vox)
    save_bundle(folder / "model", bundle)
    return folder


def write_volume_store(path: Path, array: np.ndarray, *, chunk: Shape, spacing_um: float = 1000.0) -> Path:
    """An OME-Zarr 0.4 of one level with an image (*S), its voxels `spacing_um` a side; the path."""
    metadata = {"shape": array.shape, "chunks": chunk, "dtype": array.dtype.str, "dimension_separator": "/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/0/"}, "metadata": metadata}
    ts.open(spec, create=True).result()[...].write(array).result()
    write_json(path / ".zgroup", {"zarr_format": 2})
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"[-array.ndim :]]
    scale = [{"type": "scale", "scale": [spacing_um] * array.ndim}]
    write_json(
        path / ".zattrs",
        {"multiscales": [{"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]},
    )
    return path
