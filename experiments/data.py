"""The data of an experiment, made on the spot: what is learned from, what is predicted, and what is true of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microtome.data.synthetic import TUBULE_SPACING_MM, cells, sparse_annotation, tubules
from microtome.files import write_text
from microtome.geometry import affine_from_spacing
from microtome.images.files import write_image, write_labels
from microtome.images.image import Image

# Images to be predicted are made from other seeds than those to learn from.
UNSEEN = 1000


@dataclass(frozen=True)
class Folders:
    """Where the data of a run lie.

    Attributes:
        train: a dataset.
        images: to be predicted.
        truth: their classes, under the same names.
        objects: their objects, numbered, under the same names; None where there are none.
    """

    train: Path
    images: Path
    truth: Path
    objects: Path | None = None


def write_data(described: dict[str, Any], out: Path, seed: int) -> Folders:
    """Pictures of cells, or volumes of tubules annotated in some slices."""
    return _cells(described, out, seed) if described["kind"] == "cells" else _tubules(described, out, seed)


def _cells(described: dict[str, Any], out: Path, seed: int) -> Folders:
    """`images` pictures to learn from, `unseen` ones to predict; with `objects: true` each cell's own number is known."""
    folders = Folders(out / "data", out / "unseen", out / "truth", out / "objects")
    shape, objects = tuple(described["shape"]), described.get("objects", False)
    for number in range(described["images"] + described["unseen"]):
        seen = number < described["images"]
        picture = cells(shape, seed=seed * 100 + number + (0 if seen else UNSEEN), count=described["count"])
        name = f"cells_{number:03d}.png"
        image = _image(picture.image, (1.0, 1.0), "png", (folders.train / "images" if seen else folders.images) / name)
        write_image(image.path, image)
        if seen:
            known = picture.instances.astype(np.uint16) if objects else picture.label.astype(np.uint8)
            write_labels(folders.train / "labels" / name, known, image)
        else:
            write_labels(folders.truth / name, picture.label.astype(np.uint8), image)
            assert folders.objects is not None
            write_labels(folders.objects / name, picture.instances.astype(np.uint16), image)
    words = "instances: true\n" if objects else "classes: {background: 0, cell: 1}\n"
    write_text(folders.train / "microtome.yaml", words)
    return folders


def _tubules(described: dict[str, Any], out: Path, seed: int) -> Folders:
    """`images` volumes annotated in `slices` across Z, Y, X; predicted are the same ones, or `unseen` others."""
    folders = Folders(out / "data", out / "unseen", out / "truth")
    shape, unseen = tuple(described["shape"]), described.get("unseen", 0)
    for number in range(described["images"] + unseen):
        seen = number < described["images"]
        volume = tubules(shape, seed=seed * 100 + number + (0 if seen else UNSEEN))
        name = f"tubules_{number:03d}.tif"
        image = _image(volume.image, TUBULE_SPACING_MM, "tiff", (folders.train / "images" if seen else folders.images) / name)
        write_image(image.path, image)
        if seen:
            sparse = sparse_annotation(volume.label, tuple(described["slices"]), seed=seed * 100 + number)
            write_labels(folders.train / "labels" / name, np.where(sparse < 0, 255, sparse).astype(np.uint8), image)
        if not seen or not unseen:
            write_labels(folders.truth / name, volume.label.astype(np.uint8), image)
        if not unseen:
            write_image(folders.images / name, image)
    spacing = list(TUBULE_SPACING_MM)
    write_text(folders.train / "microtome.yaml", f"not_annotated: 255\nclasses: {{background: 0, tubule: 1}}\nspacing_mm: {spacing}\n")
    return folders


def _image(array: np.ndarray, spacing_mm: tuple[float, ...], kind: str, path: Path) -> Image:
    """A one-channel image that is about to be written."""
    axes = "CZYX" if array.ndim == 3 else "CYX"
    affine = affine_from_spacing(spacing_mm)
    known = array.ndim == 3
    return Image(array=array[None], spacing_mm=spacing_mm, affine=affine, axes=axes, path=path, format=kind, spacing_known=known)
