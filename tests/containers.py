"""HDF5 files and Zarr stores for tests, made by their own libraries; each function writes one file or store, making its folder."""

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import zarr


def hdf5(path: Path, datasets: Mapping[str, np.ndarray]) -> Path:
    """An HDF5 file of chunked datasets by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array, chunks=_chunks(array))
    return path


def zarr_array(path: Path, array: np.ndarray) -> Path:
    """A plain Zarr array, version 2."""
    made = zarr.create_array(str(path), shape=array.shape, chunks=_chunks(array), dtype=array.dtype, zarr_format=2)
    made[...] = array
    return path


def ome_zarr(path: Path, array: np.ndarray, labels: Mapping[str, np.ndarray] | None = None, spacing_um: float = 2.0) -> Path:
    """An OME-Zarr 0.4 of one size, with the label images that are given."""
    _pyramid(path, array, spacing_um)
    if labels:
        zarr.open_group(str(path / "labels"), mode="w", zarr_format=2).attrs["labels"] = list(labels)
    for name, values in (labels or {}).items():
        _pyramid(path / "labels" / name, values, spacing_um).attrs["image-label"] = {"version": "0.4"}
    return path


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    """Sides of a chunk."""
    return tuple(min(side, size) for side, size in zip((1, 4, 16, 16)[-array.ndim :], array.shape, strict=True))


def _pyramid(path: Path, array: np.ndarray, spacing_um: float) -> zarr.Group:
    """A group of one level with its metadata."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    zarr_array(path / "0", array)
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"[-array.ndim :]]
    scale = {"coordinateTransformations": [{"type": "scale", "scale": [spacing_um] * array.ndim}], "path": "0"}
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [scale]}]
    return group
