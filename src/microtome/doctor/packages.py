"""The packages that microtome stands on and those of its extras: which are here, which can be used, what each extra is for. No torch."""

from dataclasses import dataclass
from importlib import metadata, util
from typing import NamedTuple


class Wanted(NamedTuple):
    """A package: the name that pip knows it by, the module that is imported."""

    distribution: str
    module: str


class Extra(NamedTuple):
    """What `pip install "microtome[name]"` brings, and what it is for."""

    name: str
    purpose: str
    packages: tuple[Wanted, ...]


CORE = (
    *map(Wanted, *[("torch", "numpy", "scipy", "pydantic", "typer", "rich", "tifffile", "imagecodecs", "nibabel")] * 2),
    *map(Wanted, *[("safetensors", "tensorstore", "jinja2")] * 2),
    Wanted("PyYAML", "yaml"),
    Wanted("pillow", "PIL"),
)
EXTRAS = (
    Extra(
        "fast",
        "predicts several times faster, and starts in half a second",
        (Wanted("openvino", "openvino"), Wanted("onnxruntime", "onnxruntime"), Wanted("onnx", "onnx")),
    ),
    Extra("int8", "predicts in 8-bit integers (--engine openvino-int8)", (Wanted("nncf", "nncf"),)),
    Extra(
        "medical",
        "NRRD, MetaImage, DICOM series and segmentations",
        (
            *(Wanted(name, name) for name in ("SimpleITK", "pydicom", "highdicom", "pylibjpeg")),
            Wanted("pylibjpeg-openjpeg", "openjpeg"),
        ),
    ),
    Extra("hdf5", "HDF5 files, also as ilastik writes them", (Wanted("h5py", "h5py"),)),
    Extra("cluster", "many processes or machines share one volume", (Wanted("distributed", "distributed"), Wanted("bokeh", "bokeh"))),
)
# Imported to see whether they can be: compiled code of others, which fails where a library of the system is missing or of another age.
# Of the rest the versions are read; nncf alone would take longer than all of these.
TRIED = ("torch", "numpy", "scipy", "PIL", "tifffile", "imagecodecs", "nibabel", "tensorstore", "safetensors")
TRIED_EXTRAS = ("openvino", "onnxruntime", "onnx", "SimpleITK", "pydicom", "h5py")


@dataclass(frozen=True)
class Package:
    """What is known of one package here.

    Attributes:
        name: that pip knows it by.
        module: that is imported.
        version: "" where it is not installed.
        problem: why it cannot be imported; "" where it can, or was not tried.
    """

    name: str
    module: str
    version: str
    problem: str = ""


def look_up(wanted: Wanted) -> Package:
    """A package as it is installed here, without importing it."""
    if util.find_spec(wanted.module) is None:
        return Package(wanted.distribution, wanted.module, "")
    try:
        version = metadata.version(wanted.distribution)
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return Package(wanted.distribution, wanted.module, version)
