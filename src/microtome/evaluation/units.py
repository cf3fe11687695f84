"""What the numbers of a table of scores are in: millimetres, voxels, pixels."""

from collections.abc import Mapping
from itertools import compress
from typing import Any, NamedTuple, Self


class Units(NamedTuple):
    """The words for lengths and sizes of a table of scores.

    Attributes:
        length: "mm", "voxels" or both; of pictures "pixels".
        size: "mm³" or "mm²", or of how many voxels or pixels.
        content: "volume"; of pictures "area".
        side: what has no size in mm where none is known: "voxel" or "pixel".
    """

    length: str
    size: str
    content: str
    side: str

    @classmethod
    def of(cls, conventions: Mapping[str, Any]) -> Self:
        """Those of a `metrics.json`; one that does not say how many axes its images have is of volumes."""
        content, side, cubed = ("area", "pixel", "mm²") if conventions.get("axes") == 2 else ("volume", "voxel", "mm³")
        parts = {"mm": (True, False), "voxel": (False, True)}.get(conventions["unit"], (True, True))
        length, size = (" or ".join(compress((known, f"{side}s"), parts)) for known in ("mm", cubed))
        return cls(length, size, content, side)
