"""An image of any size that is read part by part: what prediction and training take, from a picture to a store of many terabytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from microtome.geometry import Shape, Spacing
from microtome.images.image import Header, Image

# Stores that are not folders of this machine; Path turns the two slashes of a URL into one.
_URL = re.compile(r"(?P<scheme>s3|gs|https?|memory):/+(?P<rest>.+)", re.DOTALL)


@runtime_checkable
class Pixels(Protocol):
    """Values `(C, *S)` of which parts are read: an array in memory or mapped into it, a file, a chunked store.

    May be read by several threads at once.
    """

    @property
    def shape(self) -> Shape:
        """`(C, *S)`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of what is read, in this machine's byte order."""

    def __getitem__(self, part: Any, /) -> np.ndarray:
        """A part, of as many slices of step 1 as there are axes (`...` is not understood by all): an array in memory, not to be written to.

        Raises:
            DataError: the data of the part are damaged or gone; names the file.
        """


@dataclass(frozen=True, kw_only=True)
class Volume:
    """An image that is not read yet, and where it is. The fields that `Image` has too mean the same.

    Attributes:
        pixels: (C, *S), read when a part is asked for.
        chunk_vox: sides (*S) of what is read and decoded at once; a reader of parts that are no multiples of it works twice.
        extra: what a writer needs to give back the same kind of file.
    """

    pixels: Pixels
    spacing_mm: Spacing
    affine: np.ndarray
    axes: str
    path: Path
    format: str
    chunk_vox: Shape
    spacing_known: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape_vox(self) -> Shape:
        """The spatial shape S."""
        return tuple(self.pixels.shape[1:])

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return int(self.pixels.shape[0])

    @property
    def header(self) -> Header:
        """What is known before a pixel is read."""
        return Header(
            shape_vox=self.shape_vox,
            channels=self.channels,
            dtype=self.pixels.dtype.name,
            spacing_mm=self.spacing_mm,
            spacing_known=self.spacing_known,
            format=self.format,
            affine=self.affine,
        )

    def load(self) -> Image:
        """All of it in memory."""
        return self.with_array(np.require(self.pixels[(slice(None),) * len(self.pixels.shape)], requirements=["C", "W"]))

    def with_array(self, array: np.ndarray) -> Image:
        """Another array (C, *S) on the same grid, such as a label map, as an image of the same place and format."""
        return Image(
            array=array,
            spacing_mm=self.spacing_mm,
            affine=self.affine,
            axes=self.axes,
            path=self.path,
            format=self.format,
            spacing_known=self.spacing_known,
            extra=dict(self.extra),
        )


@dataclass(frozen=True)
class Stacked:
    """The channels of several pixels, one after the other.

    Attributes:
        parts: each (C, *S) with the same S.
    """

    parts: tuple[Pixels, ...]

    @property
    def shape(self) -> Shape:
        """Of all channels together."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest that holds the values of all."""
        return np.result_type(*(part.dtype for part in self.parts))

    def __getitem__(self, part: Any, /) -> np.ndarray:
        found: np.ndarray = np.concatenate([pixels[(slice(None), *part[1:])] for pixels in self.parts])[part[0]]
        return found


@dataclass(frozen=True)
class Sections:
    """Some successive sections of pixels, along the first axis of S.

    Attributes:
        pixels: all of them.
        first: the first that counts.
        past: the one after the last.
    """

    pixels: Pixels
    first: int
    past: int

    @property
    def shape(self) -> Shape:
        """Of what counts."""
        return (self.pixels.shape[0], self.past - self.first, *self.pixels.shape[2:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of all."""
        return self.pixels.dtype

    def __getitem__(self, part: Any, /) -> np.ndarray:
        start, stop, _ = part[1].indices(self.past - self.first)
        return self.pixels[(part[0], slice(self.first + start, self.first + stop), *part[2:])]


def volume_of(image: Image) -> Volume:
    """An image in memory as a volume, whose parts are views of it."""
    return Volume(
        pixels=image.array,
        spacing_mm=image.spacing_mm,
        affine=image.affine,
        axes=image.axes,
        path=image.path,
        format=image.format,
        chunk_vox=(1, *image.shape_vox[1:]),
        spacing_known=image.spacing_known,
        extra=image.extra,
    )


def url_of(path: Path | str) -> str | None:
    """The URL that a path was typed as (`s3://bucket/key`), its two slashes put back; None for a path of this machine.

    >>> url_of(Path("s3://bucket/a.zarr"))
    's3://bucket/a.zarr'
    """
    match = _URL.fullmatch(str(path))
    return f"{match['scheme']}://{match['rest']}" if match else None
