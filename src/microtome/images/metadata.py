"""The metadata of a chunked store -> which of its arrays is the image, and a name, a scale and a unit for each axis.

OME-Zarr 0.1 to 0.5 (https://ngff.openmicroscopy.org), plain Zarr, N5 with the attributes of its viewers, and precomputed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from microtome.errors import DataError
from microtome.images.stores import folders, name_of, read_json

_LARGE = ("deca", "hecto", "kilo", "mega", "giga", "tera", "peta", "exa", "zetta", "yotta")
_SMALL = ("deci", "centi", "milli", "micro", "nano", "pico", "femto", "atto", "zepto", "yocto")
_POWERS = (1, 2, 3, 6, 9, 12, 15, 18, 21, 24)
_PREFIXES = (("", 0), *zip(_LARGE, _POWERS, strict=True), *((prefix, -power) for prefix, power in zip(_SMALL, _POWERS, strict=True)))
# The units of length of OME-Zarr, and what N5 and others write for them.
MM_PER_UNIT: Mapping[str, float] = MappingProxyType(
    {f"{prefix}{metre}": float(f"1e{power + 3}") for prefix, power in _PREFIXES for metre in ("meter", "metre")}
    | {"angstrom": 1e-7, "foot": 304.8, "inch": 25.4, "mile": 1609344.0, "parsec": 3.0856775814913673e19, "yard": 914.4}
    | {"å": 1e-7, "pm": 1e-9, "nm": 1e-6, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3, "micron": 1e-3, "microns": 1e-3}
    | {"mm": 1.0, "cm": 10.0, "m": 1e3, "km": 1e6}
)
# Documents by which a kind is known.
_MARKERS = (
    (".zgroup", "zarr"),
    (".zarray", "zarr"),
    ("zarr.json", "zarr"),
    (".zattrs", "zarr"),
    ("attributes.json", "n5"),
    ("info", "precomputed"),
)
_DRIVERS = MappingProxyType({2: "zarr", 3: "zarr3"})
# The axes of arrays that do not name them, by their number.
_USUAL_NAMES = MappingProxyType({2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"})
# Folders that are looked through for arrays: how deep, and how many arrays are enough to be refused.
_DEPTH, _MOST_LISTED = 4, 12
# Groups above an array in which a multiscale image may name it.
_LEVELS_ABOVE = 3
# What an axis of no meaning to us is called.
_OTHER = "?"


@dataclass(frozen=True, kw_only=True)
class Found:
    """An array and what the metadata say of its axes, in the store's order.

    Attributes:
        place: of the array, or for a precomputed scale of the store.
        spec: what tensorstore needs beside the place.
        names: a letter for each axis: t, c, z, y, x, or `?` for one of no meaning to us.
        scale: size of a voxel in `units`; empty where nothing is said.
        origin: place of the first voxel in `units`; empty where nothing is said.
        units: "" where none is given.
        extra: for `Volume.extra`.
    """

    place: Path
    spec: Mapping[str, Any]
    names: str
    scale: tuple[float, ...] = ()
    origin: tuple[float, ...] = ()
    units: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class _Node(NamedTuple):
    """A group or an array of Zarr.

    Attributes:
        format: 2 or 3.
        document: `.zarray`, or `zarr.json`; empty for a group of format 2.
    """

    place: Path
    is_array: bool
    format: int
    attributes: dict[str, Any]
    document: dict[str, Any]

    @property
    def ome(self) -> dict[str, Any]:
        """OME's metadata: in version 0.5 under a name of their own."""
        within = self.attributes.get("ome", self.attributes)
        return within if isinstance(within, dict) else {}


def kind_of(path: Path) -> str:
    """The kind of store by its documents, "zarr", "n5" or "precomputed"; of a scale of a precomputed one by those above.

    Raises:
        DataError: none of them, or no answer.
    """
    for name, kind in _MARKERS:
        if read_json(path, name) is not None:
            return kind
    if (read_json(path.parent, "info") or {}).get("scales"):
        return "precomputed"
    expected, got = "an OME-Zarr, Zarr, N5 or precomputed store", "none of their documents that may be read"
    raise DataError(name_of(path), expected=expected, got=got, do="check the address and your rights", code="D021")


# Zarr, with OME's metadata and without.


def _find_zarr(place: Path) -> Found:
    """The image that a node of a Zarr store is or leads to."""
    node = _node(place)
    if node is None:
        got = "neither .zgroup, .zarray nor zarr.json"
        raise DataError(name_of(place), expected="a Zarr group or array", got=got, do="copy it again", code="D021")
    if node.is_array:
        return _level_found(node) or _plain(node)
    if node.ome.get("multiscales"):
        return _image(node)
    for choices, what in ((_series(node), "images"), (_labels(place), "label maps"), (_arrays(node), "arrays")):
        if len(choices) > 1:
            raise _several(place, choices, what)
        if choices:
            return _find_zarr(_inside(place, choices[0]))
    do = "give the array itself, as in STORE/name"
    raise DataError(name_of(place), expected="an image in a Zarr group", got="a group that lists none", do=do, code="D021")


def _node(place: Path) -> _Node | None:
    """The node at a place; None where there is none."""
    if (document := read_json(place, "zarr.json")) is not None:
        attributes = document.get("attributes")
        return _Node(place, document.get("node_type") == "array", 3, attributes if isinstance(attributes, dict) else {}, document)
    document, attributes = read_json(place, ".zarray"), read_json(place, ".zattrs")
    if document is None and attributes is None and read_json(place, ".zgroup") is None:
        return None
    return _Node(place, document is not None, 2, attributes or {}, document or {})


def _image(node: _Node, level: str | None = None) -> Found:
    """The finest level of a group's first multiscale image, or the one of that path."""
    multiscale = node.ome["multiscales"][0]
    datasets = {str(dataset["path"]): dataset for dataset in multiscale["datasets"]}
    path = next(iter(datasets)) if level is None else level
    place = _inside(node.place, path)
    array = _node(place)
    if array is None or not array.is_array:
        do = "copy or export the store again"
        raise DataError(name_of(place), expected="the array that its group names", got="none", do=do, code="D021")
    names, units = _axes(multiscale.get("axes"), _rank(array))
    scale, origin = np.ones(len(names)), np.zeros(len(names))
    for transformed in (datasets[path], multiscale):
        for step in transformed.get("coordinateTransformations") or ():
            scale, origin = _transformed(scale, origin, step, array.place)
    extra = {"version": str(node.ome.get("version", multiscale.get("version", "0.1"))), "level": path}
    extra |= {"image-label": node.ome["image-label"]} if "image-label" in node.ome else {}
    return Found(
        place=place,
        spec={"driver": _DRIVERS[array.format]},
        names=names,
        # Versions before 0.4 have no scales.
        scale=tuple(scale.tolist()),
        origin=tuple(origin.tolist()),
        units=units,
        extra=extra,
    )


def _axes(axes: Any, rank: int) -> tuple[str, tuple[str, ...]]:
    """Letters and units of a multiscale image's axes: objects since version 0.4, names in 0.3, and none before."""
    entries = [{"name": axis} if isinstance(axis, str) else axis for axis in axes or "tczyx"[-rank:]]
    types = {"time": "t", "channel": "c"}
    names = [types.get(entry.get("type", ""), str(entry["name"]).lower()) for entry in entries]
    space = [i for i, entry in enumerate(entries) if entry.get("type") == "space"]
    if space and not {names[i] for i in space} <= set("zyx"):
        # Names of space are free; their order is then that of the array.
        for i, letter in zip(space, "zyx"[-len(space) :], strict=True):
            names[i] = letter
    letters = "".join(name if name in tuple("tczyx") else _OTHER for name in names)
    return letters, tuple(str(entry.get("unit") or "") for entry in entries)


def _transformed(scale: np.ndarray, origin: np.ndarray, step: Mapping[str, Any], place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scale and origin after one more transformation."""
    kind = step["type"]
    if kind == "identity":
        return scale, origin
    if kind not in {"scale", "translation"} or kind not in step:
        got, do = f"a transformation `{kind}` of {sorted(step)}", "write scale and translation as lists"
        raise DataError(name_of(place), expected="scale and translation", got=got, do=do, code="D023")
    values = np.asarray(step[kind], np.float64)
    if values.shape != scale.shape or not np.isfinite(values).all():
        expected, got = f"{len(scale)} finite numbers in {kind}", f"{step[kind]}"[:80]
        raise DataError(name_of(place), expected=expected, got=got, do="correct its metadata", code="D023")
    return (scale * values, origin * values) if kind == "scale" else (scale, origin + values)


def _level_found(array: _Node) -> Found | None:
    """A level as the image above names it; None for an array that no image above names."""
    above, names = array.place.parent, [array.place.name]
    for _ in range(_LEVELS_ABOVE):
        node = _node(above)
        if node is not None and (multiscales := node.ome.get("multiscales")):
            path = "/".join(names)
            return _image(node, path) if any(str(dataset["path"]) == path for dataset in multiscales[0]["datasets"]) else None
        above, names = above.parent, [above.name, *names]
    return None


def _plain(array: _Node) -> Found:
    """An array of which only its own metadata are known: names of axes as xarray writes them or as Zarr 3 has them."""
    rank = _rank(array)
    named = array.attributes.get("_ARRAY_DIMENSIONS") or array.document.get("dimension_names") or ()
    names = "".join(str(name).lower() for name in named)
    if len(names) != rank or len(set(names)) != rank or not set(names) <= set("tczyx"):
        names = _USUAL_NAMES.get(rank, "")
    return Found(place=array.place, spec={"driver": _DRIVERS[array.format]}, names=names, extra={"version": f"zarr {array.format}"})


def _rank(array: _Node) -> int:
    """The number of an array's axes."""
    return len(array.document["shape"])


def _series(node: _Node) -> list[str]:
    """Images of a group that Bio-Formats wrote, or fields of a well.

    Raises:
        DataError: it is a plate.
    """
    if wells := node.ome.get("plate", {}).get("wells"):
        do = f"give a field of one of them, such as {name_of(node.place)}/{wells[0]['path']}/0"
        raise DataError(name_of(node.place), expected="one image", got=f"a plate of {len(wells)} wells", do=do, code="D022")
    if fields := node.ome.get("well", {}).get("images"):
        return [str(field["path"]) for field in fields]
    if "bioformats2raw.layout" not in node.ome:
        return []
    listed = _node(node.place / "OME")
    if listed is not None and listed.ome.get("series"):
        return [str(name) for name in listed.ome["series"]]
    return [name for name in ("0", "1") if _node(node.place / name) is not None]


def _labels(place: Path) -> list[str]:
    """Label maps that a group lists, as paths within it."""
    node = _node(place / "labels")
    return [] if node is None else [f"labels/{name}" for name in node.ome.get("labels") or ()]


def _arrays(node: _Node) -> list[str]:
    """Arrays in a group: from consolidated metadata, or by looking."""
    if node.format == 3:
        within = (node.document.get("consolidated_metadata") or {}).get("metadata") or {}
        listed = [name for name, document in within.items() if document.get("node_type") == "array"]
    else:
        within = (read_json(node.place, ".zmetadata") or {}).get("metadata") or {}
        listed = [name.removesuffix("/.zarray") for name in within if name.endswith("/.zarray")]

    def looked(place: Path) -> bool | None:
        found = _node(place)
        return None if found is None else found.is_array

    return sorted(listed) or _walked(node.place, looked)


# N5.


def _find_n5(place: Path) -> Found:
    """The dataset that a place is or leads to."""
    attributes = read_json(place, "attributes.json") or {}
    if "dimensions" in attributes:
        return _dataset(place, attributes)
    if "dimensions" in (read_json(place / "s0", "attributes.json") or {}):
        return _find_n5(place / "s0")

    def looked(below: Path) -> bool | None:
        found = read_json(below, "attributes.json")
        # Groups without attributes have no document.
        return found is not None and "dimensions" in found

    datasets = _walked(place, looked)
    finest = [name for name in datasets if PurePosixPath(name).name == "s0"]
    if len(datasets) == 1 or (len(finest) == 1 and all(PurePosixPath(name).parent == PurePosixPath(finest[0]).parent for name in datasets)):
        return _find_n5(_inside(place, (finest or datasets)[0]))
    if datasets:
        raise _several(place, datasets, "datasets")
    do = "give the dataset itself, as in STORE/name"
    raise DataError(name_of(place), expected="a dataset of N5", got="a group that lists none", do=do, code="D021")


def _dataset(place: Path, attributes: dict[str, Any]) -> Found:
    """A dataset, with the scale that it or the group of its levels gives, along axes of which the first is the fastest."""
    rank = len(attributes["dimensions"])
    names = "".join(str(name).lower() for name in attributes.get("axes") or ())
    if len(names) != rank or not set(names) <= set("tczyx"):
        names = _USUAL_NAMES.get(rank, "")[::-1]
    if rank == 5 and not attributes.get("axes"):
        names = "xyzct"
    above = (read_json(place.parent, "attributes.json") or {}) if place.name.startswith("s") else {}
    scale, units = _n5_scale(above | attributes)
    space = [axis for axis, name in enumerate(names) if name in "zyx"]
    # Some give numbers of space only, others one for each axis.
    full = len(scale) == rank
    scale_of = dict(zip(range(rank) if full else space, scale, strict=bool(scale)))
    unit_of = dict(zip(range(rank) if len(units) == rank else space, units, strict=bool(units)))
    return Found(
        place=place,
        spec={"driver": "n5"},
        names=names,
        scale=tuple(scale_of.get(axis, 1.0) for axis in range(rank)) if scale else (),
        units=tuple(unit_of.get(axis, "") for axis in range(rank)) if units else (),
        extra={"version": "n5"},
    )


def _n5_scale(attributes: Mapping[str, Any]) -> tuple[list[float], list[str]]:
    """Size of a voxel and its unit along the axes, the fastest first; both empty where nothing is said."""
    scale, unit = attributes.get("resolution"), attributes.get("units")
    if scale is None:
        pixel = attributes.get("pixelResolution")
        scale, unit = (pixel.get("dimensions"), pixel.get("unit")) if isinstance(pixel, dict) else (pixel, unit)
    if not scale:
        return [], []
    factors = attributes.get("downsamplingFactors") or [1] * len(scale)
    # What N5 calls resolution is the finest level's.
    sides = [float(value) * float(factor) for value, factor in zip(scale, factors[: len(scale)], strict=True)]
    return sides, [unit] * len(sides) if isinstance(unit, str) else [str(name) for name in unit or ()]


# Precomputed.


def _find_precomputed(place: Path) -> Found:
    """The finest scale of a store, or the one whose key ends the path."""
    info = read_json(place, "info")
    if info is not None and not info.get("scales"):
        got = f"`{info.get('@type', 'no type')}` without scales"
        do = "give the image's own store"
        raise DataError(name_of(place), expected="a precomputed image or segmentation", got=got, do=do, code="D021")
    root = place if info is not None else place.parent
    scales = (info if info is not None else read_json(root, "info") or {})["scales"]
    keys = [str(scale["key"]) for scale in scales]
    if info is None and place.name not in keys:
        expected = f"one of its scales {', '.join(keys)}"
        raise DataError(name_of(place), expected=expected, got=f"`{place.name}`", do="correct the path", code="D021")
    index = 0 if info is not None else keys.index(place.name)
    scale = [float(value) for value in scales[index]["resolution"]]
    offset = [float(value) for value in scales[index].get("voxel_offset", (0, 0, 0))]
    return Found(
        place=root,
        spec={"driver": "neuroglancer_precomputed", "scale_index": index},
        names="xyzc",
        scale=(*scale, 1.0),
        origin=(*(side * number for side, number in zip(scale, offset, strict=True)), 0.0),
        units=("nm", "nm", "nm", ""),
        extra={"version": "precomputed", "level": keys[index]},
    )


# Paths within a store.


def _inside(place: Path, name: str) -> Path:
    """The place of that name below another.

    Raises:
        DataError: it would lead out of the store.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        got = f"`{name}` in its metadata"
        raise DataError(name_of(place), expected="paths within the store", got=got, do="do not trust this store", code="D024")
    return place / path


def _walked(place: Path, is_array: Callable[[Path], bool | None], depth: int = _DEPTH) -> list[str]:
    """The arrays below a folder, by paths within it; `is_array` gives None for what is neither group nor array."""
    arrays: list[str] = []
    for name in folders(place):
        kind = is_array(place / name)
        if kind:
            arrays.append(name)
        elif kind is not None and depth > 1:
            arrays += [f"{name}/{below}" for below in _walked(place / name, is_array, depth - 1)]
        if len(arrays) > _MOST_LISTED:
            break
    return arrays


def _several(place: Path, names: list[str], what: str) -> DataError:
    """The error for a store of which one image must be named."""
    shown = ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
    do = f"give one of them, such as {name_of(place)}/{names[0]}"
    return DataError(name_of(place), expected="one image", got=f"{what} {shown}", do=do, code="D022")


FINDERS: Mapping[str, Callable[[Path], Found]] = MappingProxyType({"zarr": _find_zarr, "n5": _find_n5, "precomputed": _find_precomputed})
