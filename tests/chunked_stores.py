"""Chunked stores as others write them."""

import json
from pathlib import Path

import numpy as np
import zarr

from microtome.images.volume import Volume

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 1000, (5, 12, 14)).astype(np.uint16)
TRANSFORM = {"type": "scale", "scale": [2.0, 0.5, 0.25]}
AXES = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]


def write_json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def put_array(path: Path, array, chunks=None, zarr_format=2, **more):
    """An array written by zarr-python."""
    stored = zarr.create_array(path, shape=array.shape, chunks=chunks or array.shape, dtype=array.dtype, zarr_format=zarr_format, **more)
    stored[...] = array


def put_image(path: Path, levels, axes, transforms, version="0.4", **more):
    """An OME-Zarr image: arrays by zarr-python, metadata by hand."""
    datasets = []
    for number, (array, steps) in enumerate(zip(levels, transforms, strict=True)):
        put_array(path / str(number), array, zarr_format=3 if version == "0.5" else 2)
        datasets.append({"path": str(number)} | ({} if steps is None else {"coordinateTransformations": steps}))
    multiscale = {"datasets": datasets} | ({} if axes is None else {"axes": axes})
    if version == "0.5":
        ome = {"version": version, "multiscales": [multiscale | more]}
        write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}})
    else:
        write_json(path / ".zgroup", {"zarr_format": 2})
        write_json(path / ".zattrs", {"multiscales": [multiscale | more | {"version": version}]})
    return path


def put_stack(path: Path, version="0.4", **more):
    """`STACK` as an OME-Zarr image with a coarser level."""
    coarse = {"type": "scale", "scale": [2.0, 1.0, 0.5]}
    return put_image(path, [STACK, STACK[:, ::2, ::2]], AXES, [[TRANSFORM], [coarse]], version, **more)


def everything(pixels):
    return pixels[(slice(None),) * len(pixels.shape)]


def like(shape_vox, spacing_mm, origin_mm=None, *, known=True) -> Volume:
    """The image that was segmented; only its geometry counts."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:-1, -1] = 0 if origin_mm is None else origin_mm
    return Volume(
        pixels=np.broadcast_to(np.uint8(0), (1, *shape_vox)),
        spacing_mm=spacing_mm,
        affine=affine,
        axes="CZYX"[-len(shape_vox) - 1 :] if len(shape_vox) == 3 else "CYX",
        path=Path("a.zarr"),
        format="zarr",
        chunk_vox=shape_vox,
        spacing_known=known,
    )
