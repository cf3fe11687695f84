"""The legend of a dataset: which value of a label file is which class, in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from microtome.config import Config
from microtome.data.case import NOT_ANNOTATED, LabelValue
from microtome.data.names import some
from microtome.errors import DataError
from microtome.images.image import Image, Palette

# A range of codes this wide, that of all colours, is looked up in a table; a wider one is sorted.
TABLE_SIZE = 1 << 24
_Byte = Annotated[int, Field(strict=True, ge=0, le=255)]
_Value = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | tuple[_Byte, _Byte, _Byte]


class LegendForm(Config):
    """A legend as JSON holds it."""

    names: tuple[StrictStr, ...] = Field(min_length=1)
    values: tuple[tuple[_Value, ...], ...]
    ignored: tuple[_Value, ...]
    kind: Literal["values", "colours", "instances"]
    background: StrictInt | None
    reason: StrictStr
    snap: StrictBool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.values) != len(self.names) or len(set(self.names)) < len(self.names) or not all(self.values):
            raise ValueError(f"{len(self.names)} names of {len(self.values)} classes: each has a name of its own and a value")
        if self.background is not None and not 0 <= self.background < len(self.names):
            raise ValueError(f"a background of number {self.background} of {len(self.names)} classes")
        return self


@dataclass(frozen=True, kw_only=True)
class Legend:
    """Class names, and the values that stand for them in files.

    Attributes:
        names: the classes' names; a class is its index here.
        values: the source values of each class, the first of which is written; of instances, 0 and 255.
        ignored: source values that become NOT_ANNOTATED.
        kind: values: a number is a class; colours: an RGB colour is a class; instances: a number is an object,
            and whatever is neither 0 nor ignored is class 1.
        background: the class that is not foreground: as stated, else that of this name or of value 0 or black; None if none is.
        reason: in words, how all this was found.
        snap: whether values that are not listed are taken as the nearest that is (JPEG ringing, blurred edges).
    """

    names: tuple[str, ...]
    values: tuple[tuple[LabelValue, ...], ...]
    ignored: tuple[LabelValue, ...] = ()
    kind: Literal["values", "colours", "instances"] = "values"
    background: int | None = None
    reason: str = ""
    snap: bool = False

    @property
    def foreground(self) -> tuple[int, ...]:
        """The classes other than the background."""
        return tuple(index for index in range(len(self.names)) if index != self.background)

    @property
    def palette(self) -> Palette:
        """How palette files of this legend are read: their numbers are the classes, unless their colours are."""
        return "colours" if self.kind == "colours" else "indices"

    @property
    def words(self) -> str:
        """The classes and their values for people: `ground (0), cell (1, 2)`."""
        return ", ".join(f"{name} ({some(map(format_value, values))})" for name, values in zip(self.names, self.values, strict=True))

    def decode(self, label_image: Image) -> np.ndarray:
        """The label map (*S) int16 of a label file; values that the legend does not know become NOT_ANNOTATED.

        Raises:
            DataError: values are no whole numbers, or the file has channels that are no colours.
        """
        codes, colour = label_codes(label_image)
        return self.lookup(codes, colour=colour)

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Source values of a label map (*S), for `write_labels`: integers (*S), of colours (3, *S) uint8.

        NOT_ANNOTATED becomes the first ignored value, or 0 (black) where there is none.
        """
        missing = self.ignored[0] if self.ignored else 0
        firsts = [_channels(value, self.kind == "colours") for value in (*(values[0] for values in self.values), missing)]
        # The entry of NOT_ANNOTATED is the last, where index -1 finds it.
        table = np.asarray(firsts)
        source = table.astype(_smallest_type(table))[labels]
        return np.ascontiguousarray(np.moveaxis(source, -1, 0)) if self.kind == "colours" else source[..., 0]

    def lookup(self, codes: np.ndarray, *, colour: bool) -> np.ndarray:
        """The class, int16, of each code that `label_codes` gives."""
        if self.kind == "instances":
            return self._objects(codes, colour)
        if not codes.size:
            return np.zeros(codes.shape, np.int16)
        low, high = int(codes.min()), int(codes.max())
        if self.snap or high - low >= TABLE_SIZE:
            unique, inverse = np.unique(codes, return_inverse=True)
            return np.asarray(self._classes_of(unique.astype(np.int64), colour)[inverse].reshape(codes.shape))
        table = np.full(high - low + 1, NOT_ANNOTATED, np.int16)
        for code, index in self._entries(colour).items():
            if low <= code <= high:
                table[code - low] = index
        return np.asarray(table[codes if low == 0 else codes.astype(np.int64) - low])

    def knows(self, code: int, *, colour: bool) -> bool:
        """Whether a code is of a class or of an ignored value."""
        return self.kind == "instances" or self.snap or code in self._entries(colour)

    def to_json(self) -> dict[str, Any]:
        """The legend as JSON holds it."""
        return {
            "names": list(self.names),
            "values": [[_plain(value) for value in values] for values in self.values],
            "ignored": [_plain(value) for value in self.ignored],
            "kind": self.kind,
            "background": self.background,
            "reason": self.reason,
            "snap": self.snap,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The legend that `to_json` wrote.

        Raises:
            ValueError: it is none.
        """
        return cls(**dict(LegendForm.model_validate(document)))

    def _entries(self, colour: bool) -> dict[int, int]:
        """Code -> class."""
        found = {code_of(value, colour): index for index, values in enumerate(self.values) for value in values}
        found |= {code_of(value, colour): NOT_ANNOTATED for value in self.ignored}
        return {code: index for code, index in found.items() if code is not None}

    def _objects(self, codes: np.ndarray, colour: bool) -> np.ndarray:
        """Class 1 wherever there is an object."""
        classes: np.ndarray = (codes != 0).astype(np.int16)
        for value in self.ignored:
            classes[codes == code_of(value, colour)] = NOT_ANNOTATED
        return classes

    def _classes_of(self, codes: np.ndarray, colour: bool) -> np.ndarray:
        """Classes (n,) int16 of codes (n,)."""
        entries = self._entries(colour)
        keys = np.array(sorted(entries), np.int64)
        known = np.array([entries[key] for key in sorted(entries)], np.int16)
        if self.snap:
            return np.asarray(known[_nearest(codes, keys, colour)])
        place = np.searchsorted(keys, codes).clip(0, len(keys) - 1)
        return np.where(keys[place] == codes, known[place], np.int16(NOT_ANNOTATED))


def label_codes(image: Image) -> tuple[np.ndarray, bool]:
    """The values of a label file as one integer a voxel (*S), and whether they are colours (0xRRGGBB).

    Colours that are all grey are numbers: many programs save every picture as RGB.

    Raises:
        DataError: values are no whole numbers, or the file has channels that are no colours; names file and value.
    """
    if image.channels == 1:
        return _whole_numbers(image), False
    if image.channels == 3 and image.array.dtype == np.uint8:
        if np.array_equal(image.array[0], image.array[1]) and np.array_equal(image.array[0], image.array[2]):
            return image.array[0], False
        red, green, blue = image.array.astype(np.int32)
        return (red << 16) | (green << 8) | blue, True
    raise DataError(
        image.path,
        expected="a label map of one channel, or of red, green and blue in 8 bits",
        got=f"{image.channels} channels of {image.array.dtype}",
        do="export the classes as numbers in one channel",
        code="D039",
    )


def code_of(value: LabelValue, colour: bool) -> int | None:
    """The code of a value in a file of colours or of numbers; None if such a file cannot hold it."""
    if isinstance(value, tuple):
        if colour:
            return (value[0] << 16) | (value[1] << 8) | value[2]
        return value[0] if value[0] == value[1] == value[2] else None
    if colour:
        return value * 0x010101 if 0 <= value <= 255 else None
    return value


def value_of(code: int, colour: bool) -> LabelValue:
    """The value that a code stands for."""
    return (code >> 16, code >> 8 & 255, code & 255) if colour else code


def format_value(value: LabelValue) -> str:
    """A value for people: `7`, `#ff8800`."""
    return "#" + bytes(value).hex() if isinstance(value, tuple) else str(value)


def _whole_numbers(image: Image) -> np.ndarray:
    """The only channel, (*S) of an integer type."""
    values: np.ndarray = image.array[0]
    if np.issubdtype(values.dtype, np.integer):
        # NumPy takes no uint64 as an index.
        return values.astype(np.int64) if values.dtype == np.uint64 else values
    if values.dtype == bool:
        return values.astype(np.uint8)
    # Written so that NaN and infinity, which equal their own rounding or nothing, are caught too.
    wrong = ~(np.isfinite(values) & (values == np.rint(values)))
    if wrong.any():
        raise DataError(
            image.path,
            expected="whole numbers, one a class",
            got=f"{values[wrong][0]:g} ({int(wrong.sum())} such voxels)",
            do="export the labels as integers, without interpolation",
            code="D039",
        )
    return values.astype(np.int64)


def _nearest(codes: np.ndarray, keys: np.ndarray, colour: bool) -> np.ndarray:
    """Index of the nearest key of each code, by value or by distance in RGB."""
    points, centres = _points(codes, colour), _points(keys, colour)
    best = np.full(len(codes), np.inf)
    nearest = np.zeros(len(codes), np.int64)
    for index, centre in enumerate(centres):
        distance = ((points - centre) ** 2).sum(axis=1)
        nearest[distance < best] = index
        np.minimum(best, distance, out=best)
    return nearest


def _points(codes: np.ndarray, colour: bool) -> np.ndarray:
    """Codes as points (n, 1 or 3)."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1) if colour else codes[:, None]


def _channels(value: LabelValue, colours: bool) -> tuple[int, ...]:
    """The value as it stands in a voxel's channels."""
    if isinstance(value, tuple):
        return value if colours else value[:1]
    return (value,) * 3 if colours else (value,)


def _smallest_type(values: np.ndarray) -> np.dtype[Any]:
    """The smallest integer type that holds all values."""
    low, high = int(values.min()), int(values.max())
    types = (np.uint8, np.uint16, np.int16, np.int32)
    return np.dtype(next((t for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max), np.int64))


def _plain(value: LabelValue) -> int | list[int]:
    """A value as JSON holds it."""
    return list(value) if isinstance(value, tuple) else value
