"""The text at the start of NRRD and MetaImage files: checked line by line before a library sees it, as it may name any file."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType

from microtome.errors import DataError
from microtome.geometry import Shape

_MAX_HEADER_BYTES = 2**22  # Slicer writes a few hundred bytes a segment
_PACKINGS = MappingProxyType({"raw": "raw", "gzip": "deflate", "gz": "deflate"})
_MM_PER_UNIT = MappingProxyType({"nm": 1e-6, "um": 1e-3, "µm": 1e-3, "microns": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3})
# How MetaImage packs its voxels if the text does not say: CompressedData, BinaryData.
_META_DEFAULTS = (("compresseddata", "false"), ("binarydata", "true"))
_META_AT_END = -1  # as HeaderSize
# MetaIO trusts the number of axes, writes as many numbers as follow from it into fields of fixed length, and ends the process
# where that was too many. What is here is checked: numbers for each axis, and for each pair of axes.
_META_AXES = range(1, 5)
_META_PER_AXIS = ("dimsize", "elementspacing", "elementsize", "offset", "position", "origin", "centerofrotation")
_META_PER_PAIR = ("transformmatrix", "rotation", "orientation")
_META_COUNTS = ("elementnumberofchannels", "headersize", "compresseddatasize")
# What decides where voxels are and how they are read.
_META_VITAL = (
    *("ndims", "objecttype", "elementtype", "elementdatafile", "binarydata", "compresseddata", "binarydatabyteordermsb"),
    *("elementbyteordermsb", *_META_PER_AXIS, *_META_PER_PAIR, *_META_COUNTS),
)
_META_LONGEST = 2000  # letters of a line; MetaIO has room for 4096
# What a NRRD says of its place -> what its numbers have to be beside finite, in words and of the smallest and the largest of an axis.
# A direction may point backwards; of a size, programs that read it drop the sign or turn the axis.
_MEASURES: Mapping[str, tuple[str, Callable[[float, float], bool]]] = MappingProxyType(
    {
        "spacings": (" above 0", lambda least, _: least > 0),
        "space directions": (", not 0", lambda least, most: least < 0 or most > 0),
        "space origin": ("", lambda *_: True),
    }
)
# The kinds of a NRRD's axes whose places its library takes for voxels; the last two stand for a kind that is not known.
_MEASURED_KINDS = ("domain", "space", "time", "none", "???")
_META_NUMBER = r"[-+]?(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][-+]?\d{1,3})?"
_PLAIN_TEXT = re.compile(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*")


@dataclass(frozen=True, kw_only=True)
class Text:
    """What the text at the start of a file says.

    Attributes:
        fields: values by name in small letters; of NRRD also the pairs `name:=value`.
        data: the file that holds the voxels.
        offset: where they begin in it; -1: so that they end where it ends.
        packing: "raw", "deflate", or "" of what SimpleITK alone unpacks.
        big: whether values have their highest byte first.
        sizes: of all axes, the fastest first; empty where the format leaves no doubt.
        spacing_known: whether it says the voxel size.
        mm: millimetres of its unit of length.
    """

    fields: dict[str, str]
    data: Path
    offset: int
    packing: str
    big: bool
    sizes: Shape
    spacing_known: bool
    mm: float


def nrrd_text(path: Path) -> Text:
    """The lines of a NRRD file up to the empty one.

    Raises:
        DataError: they lead to voxels in a list of files, or outside of the folder, or may be read in two ways.
    """
    lines, offset = _lines(path, lambda line: not line)
    fields, seen = {}, Counter[str]()
    for line in lines[1:]:
        # A pair may hold a colon itself, and a field never ":=".
        name, separator, value = line.partition(":=") if ":=" in line else line.partition(":")
        if separator and not line.startswith("#"):
            fields[" ".join(name.lower().split())] = value.strip()
            seen["".join(name.lower().split()) if separator == ":" else ""] += 1
    _check_once(path, seen)
    _check_measures(path, fields)
    names = [name for name in fields if name.replace(" ", "") == "datafile"]
    data = _beside(path, fields[names[0]]) if names else path
    skips = [fields.get(name, "0") for name in ("byte skip", "byteskip", "line skip", "lineskip")]
    packing = _PACKINGS.get(fields.get("encoding", "").lower(), "") if set(skips) == {"0"} else ""
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    return Text(
        fields=fields,
        data=data,
        offset=0 if names else offset,
        packing=packing,
        big=fields.get("endian", "").lower() == "big",
        sizes=tuple(int(size) for size in fields.get("sizes", "").split()),
        spacing_known="space directions" in fields or "spacings" in fields,
        mm=_MM_PER_UNIT.get(units.pop(), 1.0) if len(units) == 1 else 1.0,
    )


def meta_text(path: Path) -> Text:
    """The lines of a MetaImage file up to that which names the file of the voxels.

    Raises:
        DataError: they are in a list of files, or outside of the folder, or numbers are missing or too many.
    """
    lines, offset = _lines(path, lambda line: line.replace(" ", "").lower().startswith("elementdatafile"))
    pairs = _pairs(path, lines)
    # As MetaIO has it, a name ends at a space.
    names = [next(iter(name.lower().split()), "") for name, _ in pairs]
    fields = {name: value.strip() for name, (_, value) in zip(names, pairs, strict=True)}
    _check_once(path, Counter(names))
    _check_meta(path, lines, fields)
    if "elementdatafile" not in fields:
        raise DataError(path, expected="a line ElementDataFile = NAME", got=repr(lines[-1][:80]), do="export it again", code="D011")
    here = fields["elementdatafile"].lower() == "local"
    data = path if here else _beside(path, fields["elementdatafile"])
    packed, binary = (fields.get(name, default).lower().startswith("t") for name, default in _META_DEFAULTS)
    skipped, channels = (int(fields.get(name, default)) for name, default in (("headersize", 0), ("elementnumberofchannels", 1)))
    _check_readable(path, packed=packed, binary=binary, skipped=skipped, channels=channels)
    return Text(
        fields={},
        data=data,
        # From the start of the file, its text included.
        offset=skipped if skipped > 0 or skipped == _META_AT_END else offset if here else 0,
        packing="" if not binary else "deflate" if packed else "raw",
        big=any(fields.get(name, "").lower().startswith("t") for name in ("binarydatabyteordermsb", "elementbyteordermsb")),
        sizes=(),
        spacing_known="elementspacing" in fields or "elementsize" in fields,
        mm=1.0,
    )


def _pairs(path: Path, lines: Sequence[str]) -> list[list[str]]:
    """Names and values of the lines of a MetaImage.

    Raises:
        DataError: a line without a value, for which MetaIO takes that of the next, or with further words behind a name that counts.
    """
    pairs = [re.split(r"\s*[=:]\s*", line, maxsplit=1) for line in lines if line]
    for pair, line in zip(pairs, filter(None, lines), strict=True):
        words = pair[0].lower().split()
        if len(pair) == 1 or (len(words) > 1 and words[0] in _META_VITAL):
            raise _unclear(path, f"the line {line[:40]!r}")
    return pairs


def _lines(path: Path, is_last: Callable[[str], bool]) -> tuple[list[str], int]:
    """The lines of text at the start of a file, and where the bytes behind them begin."""
    lines: list[str] = []
    with path.open("rb") as file:
        while file.tell() < _MAX_HEADER_BYTES and (raw := file.readline(_MAX_HEADER_BYTES)):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if line and not line.isspace():
                _check_plain(path, line)
            elif line:
                raise _unclear(path, "a line of spaces")
            lines.append(line.strip())
            if is_last(lines[-1]):
                break
        return lines, file.tell()


def _unclear(path: Path, got: str) -> DataError:
    """The error for what two readers would understand in two ways."""
    return DataError(path, expected="a header of plain lines, each field once", got=got, do="export it again", code="D220")


def _check_plain(path: Path, line: str) -> None:
    """Refuse bytes that are no text, at which one reader may stop and another go on."""
    if not _PLAIN_TEXT.fullmatch(line):
        raise _unclear(path, f"the line {line[:40]!r}")


def _check_once(path: Path, seen: Counter[str]) -> None:
    """Refuse a field that is there twice, of which one reader takes the first and another the last."""
    twice = [name for name, count in seen.items() if name and count > 1]
    if twice:
        raise _unclear(path, f"`{twice[0][:40]}` {seen[twice[0]]} times")


def _check_measures(path: Path, fields: dict[str, str]) -> None:
    """Refuse voxel sizes, directions and an origin of a NRRD that cannot be; some of them its library takes for none given.

    Raises:
        DataError: names the field and its value.
    """
    kinds = fields.get("kinds", "").lower().split()
    for name, (words, is_sound) in _MEASURES.items():
        vectors = re.findall(r"\(([^)]*)\)", fields.get(name, "")) if name != "spacings" else fields.get(name, "").split()
        for axis, vector in enumerate(vectors):
            try:
                numbers = [float(number) for number in re.split(r"[\s,]+", vector.strip())]
            except ValueError:
                # Its library says what is wrong with it.
                continue
            sound = all(map(math.isfinite, numbers)) and is_sound(min(numbers), max(numbers))
            # An axis of channels has no voxel size.
            unmeasured = name == "spacings" and axis < len(kinds) and kinds[axis] not in _MEASURED_KINDS
            if not unmeasured and not sound:
                expected, do = f"finite {name}{words}", "set its spacing, and export it again"
                raise DataError(path, expected=expected, got=f"`{fields[name][:80]}`", do=do, code="D010")


def _check_meta(path: Path, lines: list[str], fields: dict[str, str]) -> None:
    """Refuse numbers of a MetaImage that are missing, too many, or none."""
    if max(map(len, lines), default=0) > _META_LONGEST:
        raise _unclear(path, f"a line of {max(map(len, lines))} letters")
    axes = int(fields["ndims"]) if re.fullmatch(r"\d", fields.get("ndims", "")) else 0
    names = list(fields)
    if axes not in _META_AXES:
        got = f"NDims {fields.get('ndims', 'missing')[:40]}"
        raise DataError(path, expected=f"{_META_AXES[1]} to {_META_AXES[-1]} axes", got=got, do="save one time point a file", code="D221")
    lengths = {"ndims": 1} | dict.fromkeys(_META_PER_AXIS, axes) | dict.fromkeys(_META_PER_PAIR, axes**2) | dict.fromkeys(_META_COUNTS, 1)
    for name in lengths.keys() & fields.keys():
        whole = name in ("dimsize", *_META_COUNTS)
        numbers = re.findall(r"-?\d{1,18}" if whole else _META_NUMBER, fields[name])
        finite = all(math.isfinite(float(number)) for number in numbers)
        if name in ("elementspacing", "elementsize") and any(float(number) <= 0 for number in numbers):
            do = "set its spacing, and export it again"
            raise DataError(path, expected=f"finite voxel sizes above 0 as {name}", got=f"`{fields[name][:80]}`", do=do, code="D010")
        early = names.index(name) < names.index("ndims")
        if len(numbers) != lengths[name] or fields[name].split() != numbers or early or not finite:
            expected = f"NDims first, then {lengths[name]} {'whole' if whole else 'finite'} numbers as {name}"
            raise DataError(path, expected=expected, got=f"`{fields[name][:80]}`", do="export it again", code="D221")


def _check_readable(path: Path, *, packed: bool, binary: bool, skipped: int, channels: int) -> None:
    """Refuse voxels of which MetaIO reads a part, and gives the memory as it was for the rest."""
    if not binary and channels > 1:
        expected, got = "binary voxels of several channels", f"BinaryData = False, ElementNumberOfChannels = {channels}"
    elif packed and not binary:
        # What it cannot unpack it takes for numbers in letters, and says nothing.
        expected, got = "binary voxels where they are packed", "BinaryData = False, CompressedData = True"
    elif packed and skipped == _META_AT_END:
        expected, got = "voxels that are packed behind a header of known size", f"CompressedData = True, HeaderSize = {skipped}"
    else:
        return
    raise DataError(path, expected=expected, got=got, do="export it again", code="D221")


def _beside(path: Path, name: str) -> Path:
    """The file of the voxels, in the folder of that which names it.

    Raises:
        DataError: it is elsewhere, by its name or by a link that leads out of the folder, not there, or not one.
    """
    pure = PurePath(name)
    plain = not (pure.is_absolute() or ".." in pure.parts or name.split()[:1] == ["LIST"] or "%" in name or "\\" in name)
    if not plain or not (path.parent / pure).resolve().is_relative_to(path.parent.resolve()):
        got = f"`{name[:200]}`{', a link to another folder' if plain else ''}"
        raise DataError(path, expected="voxels in one file beside it", got=got, do="export it as one .nrrd or .mha file", code="D012")
    if not (path.parent / pure).is_file():
        raise DataError(path, expected=f"its voxels in {name[:200]}", got="no such file beside it", do="copy both files", code="D012")
    return path.parent / pure
