"""Which way a case takes to the network: prepared at once, read from where it is, or prepared slab by slab on disk."""

import math
from typing import Literal

import numpy as np

from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import Dataset
from microtome.data.reading import PARTED
from microtome.errors import DataError
from microtome.images.files import open_volume, probe_image
from microtome.images.parts import Lazy
from microtome.machine import free_memory_bytes
from microtome.training.preparing import grids_of, working_bytes

# Share of the free memory that image and label take before no copy of them is made.
DIRECT_SHARE = 0.25
# Share of the free memory that preparing may take; the rest is for what the estimate does not know, and for other programs.
MEMORY_SHARE = 0.6
# Formats some files of which are read by part: those that are not packed, or packed tile by tile.
_SOME_PARTED = PARTED | {"tiff", "nifti", "nrrd", "metaimage"}

Road = Literal["whole", "direct", "slabs"]


def road_of(dataset: Dataset, case: Case, plan: Plan, wanted: Road | None = None) -> Road:
    """How a case comes to the network.

    "whole": prepared in memory, and kept on disk; where image and label take no more than a quarter of the free memory, and preparing
    them no more than `MEMORY_SHARE` of it. Else "direct": patches are read from its own store. Where that cannot be, "slabs": prepared
    slab by slab on disk.

    Args:
        dataset: that the case is of.
        case: a labelled one.
        plan: its grid and its weights decide what is possible.
        wanted: decides whatever the size; it does not make possible what is not.

    Raises:
        DataError: neither road is open, and the memory does not hold the case; says why.
    """
    if wanted == "whole":
        return "whole"
    if wanted == "direct":
        return "direct" if _is_direct(dataset, case, plan) else "whole"
    grids, free = grids_of(dataset, case, plan), free_memory_bytes()
    # The label is held as int16.
    needed = math.prod(grids.old) * (dataset.header(case).channels * grids.value_bytes + 2)
    if wanted is None:
        if needed <= DIRECT_SHARE * free and working_bytes(dataset, case, plan) <= MEMORY_SHARE * free:
            return "whole"
        if _is_direct(dataset, case, plan):
            return "direct"
    obstacle = _obstacle(dataset, case, plan)
    if not obstacle:
        return "slabs"
    if needed > free:
        got = f"{needed} bytes ({needed / 1e9:.1f} GB), and {obstacle}"
        expected = f"a case that fits in the free memory ({free} bytes), or one that can be read part by part"
        raise DataError(case.images[0], expected=expected, got=got, do="change that, or cut the case into parts", code="D049")
    return "whole"


def _is_direct(dataset: Dataset, case: Case, plan: Plan) -> bool:
    """Whether patches can be read from a case's own store: they are on the plan's grid, and need no weight map."""
    grids = grids_of(dataset, case, plan)
    return not plan.loss.border_weight and grids.old == grids.new and dataset.is_parted(case)


def _obstacle(dataset: Dataset, case: Case, plan: Plan) -> str:
    """Why a case cannot be prepared slab by slab, in words; empty where it can."""
    if plan.loss.border_weight:
        return "its border weights need all of the label at once"
    if dataset.per_instance or len(case.labels) != 1:
        return "its label is in several files"
    files = (*case.images, *case.labels)
    formats = [probe_image(path).format for path in files]
    for path, kind in zip(files, formats, strict=True):
        if kind not in _SOME_PARTED or isinstance(open_volume(path).pixels, Lazy | np.ndarray):
            return f"{path.name} can be read only as a whole ({kind}; store it as OME-Zarr or HDF5)"
    return "" if probe_image(case.labels[0]).channels == 1 else "its label has several channels"
