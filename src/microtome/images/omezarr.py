"""What prediction writes as OME-Zarr, block by block and by any number of workers: label maps, and images such as probabilities.

    PLACE/                    the group that viewers open; an image may be in it already
      labels/NAME/0, 1, ...   a label map and its pyramid: `create_labels`, then blocks are written, then `finish`
      NAME/0, 1, ...          an image of its own, such as probabilities: `create_image`, then the same

Groups get their metadata last, in `finish`: what was not finished is no OME-Zarr. Version 0.4 is written as Zarr 2, 0.5 as Zarr 3
(https://ngff.openmicroscopy.org).
"""

import colorsys
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorstore as ts

from microtome.errors import DataError
from microtome.files import atomic_folder
from microtome.geometry import Shape, Spacing, format_shape
from microtome.images import stores
from microtome.images.chunked import ChunkedArray
from microtome.images.image import Image
from microtome.images.stores import name_of, read_json, reading, write_json, writing
from microtome.images.volume import Pixels, Volume, url_of, volume_of
from microtome.tiling import blocks_of

Version = Literal["0.4", "0.5"]
# A level of so many voxels along y and x is shown as a whole: the last one.
_LAST_SIDE = 256
# The golden ratio's share of a turn: hues of successive values are far apart, however many there are.
_TURN = (math.sqrt(5) - 1) / 2
_COMPRESSOR = MappingProxyType({"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1})


class Level(NamedTuple):
    """One level of a pyramid.

    Attributes:
        shape_vox: (*S); an odd size is rounded up.
        factors: voxels of the finest level along each side of one of this level.
    """

    shape_vox: Shape
    factors: Shape


def create_labels(
    place: Path, name: str, shape_vox: Shape, dtype: np.dtype[Any], chunk_vox: Shape, *, version: Version = "0.4", layers: int | None = None
) -> ChunkedArray:
    """Open the finest level of a label map for writing; create it if it is not there.

    Blocks of whole chunks may be written by several processes at once. A chunk that was written is in the store even if it is
    all 0; one that was not reads as 0.

    Args:
        place: the store: a folder, or a URL kept in a path.
        name: of the label map.
        shape_vox: (*S).
        dtype: of whole numbers.
        chunk_vox: (*S).
        version: of OME-Zarr.
        layers: for label maps that overlap: how many, as an axis before S.

    Raises:
        DataError: another array is there, or a store of another version.
        RunError: it cannot be written.
    """
    if np.dtype(dtype).kind not in "iu":
        raise DataError(
            name_of(place), expected="labels of whole numbers", got=f"{np.dtype(dtype)}", do="write it by create_image", code="D007"
        )
    return _created(place, f"labels/{name}", _metadata(shape_vox, np.dtype(dtype), chunk_vox, version, layers), version)


def create_image(
    place: Path, name: str, shape_vox: Shape, dtype: np.dtype[Any], chunk_vox: Shape, *, version: Version = "0.4", layers: int | None = None
) -> ChunkedArray:
    """Open the finest level of an image, such as probabilities, for writing; create it if it is not there. Otherwise as `create_labels`.

    Args:
        place: the store.
        name: of the image in it.
        shape_vox: (*S).
        dtype: of numbers.
        chunk_vox: (*S).
        version: of OME-Zarr.
        layers: channels, as an axis before S, one in a chunk; None for an image without this axis.

    Raises:
        DataError: another array is there, or a store of another version.
        RunError: it cannot be written.
    """
    return _created(place, name, _metadata(shape_vox, np.dtype(dtype), chunk_vox, version, layers), version)


def finish(place: Path, name: str, *, like: Volume, values: Mapping[int, str] | None, source: str, version: Version = "0.4") -> None:
    """Build the pyramid of a label map or image whose finest level is written, then the metadata of its groups.

    Memory holds a few chunks. After a kill it is called again and makes everything anew. Axes are halved as `levels_of` says. A voxel
    of a label map gets the most frequent value of those it stands for (of equally frequent ones the smallest but 0), one of an image
    their mean.

    Args:
        place: the store.
        name: as it was given to `create_labels` or `create_image`.
        like: the image that was segmented: spacing and origin. Another direction of axes than the array's has no place in OME-Zarr.
        values: names of a label map's values, or of an image's layers from 0; None for none.
        source: of a label map: the image that was segmented, as a path from the label map's group (`../..` in the same store) or a URL;
            "" for none.
        version: as when it was created.

    Raises:
        DataError: the finest level is not there, or is not of the shape of `like`.
        RunError: it cannot be written.
    """
    group, is_label = _group_of(place, name)
    finest = _opened(group / "0", version)
    shape_vox = finest.shape[-len(like.shape_vox) :]
    if shape_vox != like.shape_vox:
        expected, got = f"an array of {format_shape(like.shape_vox)}", format_shape(finest.shape)
        raise DataError(name_of(group), expected=expected, got=got, do="remove it and predict again", code="D028")
    levels = levels_of(like.shape_vox, like.spacing_mm)
    layers = finest.shape[0] if len(finest.shape) > len(shape_vox) else None
    finer: Pixels = finest
    for number, level in enumerate(levels[1:], 1):
        path = str((group / str(number)).relative_to(place))
        chunk_vox = finest.chunks[-len(shape_vox) :]
        coarser = _created(place, path, _metadata(level.shape_vox, finest.dtype, chunk_vox, version, layers), version, array="")
        halve(finer, coarser, vote=is_label)
        finer = coarser
    multiscale = ({"version": version} if version == "0.4" else {}) | _multiscale(name, levels, like, layers, is_label)
    described: dict[str, Any] = {"multiscales": [multiscale]}
    described |= (
        {"image-label": ({"version": version} if version == "0.4" else {}) | _image_label(values, source)}
        if is_label
        else _omero(values, finest.dtype, layers)
    )
    _write_group(group, described, version)
    if is_label:
        _list_label(place / "labels", name, version)
    if _root_version(place) is None:
        _write_group(place, {}, version)


def write_omezarr(path: Path, image: Image) -> None:
    """Write an image that is in memory as a store of its own, in one step: whole numbers of one channel as the label map `labels/image`.

    Raises:
        RunError: it cannot be written.
        DataError: the path is a URL, where nothing appears in one step.
    """
    if url_of(path) is not None:
        raise DataError(name_of(path), expected="a folder of this machine", got="a URL", do="write it here and copy it", code="D029")
    like, name, shape = volume_of(image), "image", image.shape_vox
    chunk = (64, 128, 128) if len(shape) == 3 else (1024, 1024)
    label = image.channels == 1 and image.array.dtype.kind in "iu"
    with atomic_folder(path) as part:
        if label:
            create_labels(part, name, shape, image.array.dtype, chunk)[(slice(None),) * len(shape)] = image.array[0]
        else:
            target = create_image(part, name, shape, image.array.dtype, chunk, layers=image.channels)
            target[(slice(None),) * (len(shape) + 1)] = image.array
        finish(part, name, like=like, values=None, source=source_of(image.path, path))


def source_of(image: Path, place: Path) -> str:
    """Where the image of a label map is, as `finish` takes it: the path from the map's group; a URL as it is; "" of a file from a URL."""
    if (url := url_of(image)) is not None:
        return url
    return "" if url_of(place) is not None else Path(os.path.relpath(image, place / "labels" / "name")).as_posix()


def levels_of(shape_vox: Shape, spacing_mm: Spacing) -> list[Level]:
    """The levels of a pyramid, until one has at most 256 voxels along y and x.

    From one to the next an axis is halved if its voxels are less than sqrt(2) times as long as the shortest side: so that they become
    cubes, and stay it. An axis of one voxel is left alone.
    """
    shape, factors = shape_vox, (1,) * len(shape_vox)
    levels = [Level(shape, factors)]
    while max(shape[-2:]) > _LAST_SIDE:
        sides = [spacing * factor for spacing, factor in zip(spacing_mm, factors, strict=True)]
        shortest = min(side for side, size in zip(sides, shape, strict=True) if size > 1)
        steps = [2 if size > 1 and side < math.sqrt(2) * shortest else 1 for side, size in zip(sides, shape, strict=True)]
        shape = tuple(-(-size // step) for size, step in zip(shape, steps, strict=True))
        factors = tuple(factor * step for factor, step in zip(factors, steps, strict=True))
        levels.append(Level(shape, factors))
    return levels


def halve(finer: Pixels, coarser: ChunkedArray, *, vote: bool) -> None:
    """Fill a level of a pyramid from the one before, a chunk at a time. Both (*S) or (layers, *S); sides are equal or halved."""
    steps = [-(-big // small) for big, small in zip(finer.shape, coarser.shape, strict=True)]
    # What becomes a chunk comes from one chunk along an axis, or from two; one after another they take less memory.
    sides = tuple(-(-side // step) for side, step in zip(coarser.chunks, steps, strict=True))
    for block in blocks_of(coarser.shape, coarser.chunks):
        values = np.empty([span.stop - span.start for span in block], coarser.dtype)
        for part in blocks_of(values.shape, sides):
            offsets = zip(block, part, steps, strict=True)
            read = tuple(slice((span.start + p.start) * step, (span.start + p.stop) * step) for span, p, step in offsets)
            members = _members(finer[read], steps)
            values[part] = most_frequent(members) if vote else _mean(members)
        coarser[block] = values


def most_frequent(members: np.ndarray) -> np.ndarray:
    """Of (n, *S) values the most frequent along the first axis; of equally frequent ones the smallest other than 0."""
    result: np.ndarray = members[0].copy()
    mixed_S = (members != result).any(axis=0)
    votes = members[:, mixed_S]
    best = votes[0].copy()
    most = (votes == best).sum(axis=0)
    for candidate in votes[1:]:
        count = (votes == candidate).sum(axis=0)
        preferred = (candidate != 0) & ((best == 0) | (candidate < best))
        better = (count > most) | ((count == most) & preferred)
        best[better], most[better] = candidate[better], count[better]
    result[mixed_S] = best
    return result


def _mean(members: np.ndarray) -> np.ndarray:
    """The mean of (n, *S) values along the first axis, rounded to the type."""
    mean = members.mean(axis=0, dtype=np.float64 if members.dtype.itemsize > 2 else np.float32)
    rounded: np.ndarray = (mean if members.dtype.kind == "f" else np.rint(mean)).astype(members.dtype)
    return rounded


def _members(values: np.ndarray, steps: list[int]) -> np.ndarray:
    """Values (*S) that become one voxel, side by side: (n, *S of the coarser level).

    The last of an odd number stands for two, which changes neither what is most frequent nor the mean.
    """
    padded = np.pad(values, [(0, -size % step) for size, step in zip(values.shape, steps, strict=True)], mode="edge")
    return np.stack([padded[tuple(slice(i, None, step) for i, step in zip(first, steps, strict=True))] for first in np.ndindex(*steps)])


# Arrays.


def _metadata(shape_vox: Shape, dtype: np.dtype[Any], chunk_vox: Shape, version: Version, layers: int | None) -> dict[str, Any]:
    """What makes an array: as Zarr 2 or 3 have it, in a form that can be compared."""
    shape = [*([] if layers is None else [layers]), *shape_vox]
    chunks = [*([] if layers is None else [1]), *(min(side, size) for side, size in zip(chunk_vox, shape_vox, strict=True))]
    if version == "0.4":
        kind = dtype.newbyteorder("<").str
        common = {"shape": shape, "chunks": chunks, "dtype": kind, "fill_value": 0}
        return common | {"compressor": dict(_COMPRESSOR), "order": "C", "dimension_separator": "/", "filters": None}
    codec = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": dtype.itemsize}
    return {
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "data_type": dtype.name,
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "blosc", "configuration": codec}],
        "dimension_names": [*([] if layers is None else ["c"]), *"zyx"[-len(shape_vox) :]],
    }


def _spec(place: Path, version: Version) -> dict[str, Any]:
    """What tensorstore needs to open an array for reading and writing; chunks of zeros are stored, so that they tell of being done."""
    driver = "zarr" if version == "0.4" else "zarr3"
    return {"driver": driver, "kvstore": stores.kvstore_of(place), "store_data_equal_to_fill_value": True}


def _created(place: Path, path: str, metadata: dict[str, Any], version: Version, array: str = "/0") -> ChunkedArray:
    """The array with these metadata at a path of a store, new or as it is."""
    where = place / f"{path}{array}"
    for group in (place, where.parent):
        if _root_version(group) not in {None, version}:
            do = f"write version {_root_version(group)}, or choose another place"
            raise DataError(
                name_of(group), expected=f"no store, or one of OME-Zarr {version}", got=f"one of {_root_version(group)}", do=do, code="D027"
            )
    document = read_json(where, ".zarray" if version == "0.4" else "zarr.json")
    if document is None:
        with writing(where):
            spec = _spec(where, version) | {"metadata": metadata}
            # Another worker may be first.
            return ChunkedArray(ts.open(spec, create=True, open=True, context=stores.context()).result(), where)
    wanted = {key: metadata[key] for key in ("shape", "chunks", "dtype", "chunk_grid", "data_type") if key in metadata}
    if found := {key: document.get(key) for key, value in wanted.items() if document.get(key) != value}:
        expected = ", ".join(f"{key} {wanted[key]}" for key in found)
        got = ", ".join(f"{key} {value}" for key, value in found.items())
        raise DataError(name_of(where), expected=expected, got=got, do="remove it, or choose another --out", code="D027")
    return _opened(where, version)


def _opened(where: Path, version: Version) -> ChunkedArray:
    """An array that is there, for reading and writing."""
    with reading(where):
        return ChunkedArray(ts.open(_spec(where, version), open=True, context=stores.context()).result(), where)


def _group_of(place: Path, name: str) -> tuple[Path, bool]:
    """The group of what was created under a name, and whether it is a label map."""
    for group, is_label in ((place / "labels" / name, True), (place / name, False)):
        if any(read_json(group / "0", document) is not None for document in (".zarray", "zarr.json")):
            return group, is_label
    raise DataError(name_of(place), expected=f"an array that was created as `{name}`", got="none", do="predict first", code="D028")


# Groups and their metadata.


def _root_version(place: Path) -> Version | None:
    """The version that the group at a place is of; None where there is none."""
    if read_json(place, "zarr.json") is not None:
        return "0.5"
    return "0.4" if read_json(place, ".zgroup") is not None else None


def _attributes(place: Path, version: Version) -> dict[str, Any]:
    """OME's metadata of a group; empty where there is none."""
    if version == "0.4":
        return read_json(place, ".zattrs") or {}
    found = (read_json(place, "zarr.json") or {}).get("attributes", {}).get("ome", {})
    return found if isinstance(found, dict) else {}


def _write_group(place: Path, ome: dict[str, Any], version: Version) -> None:
    """Write a group with its metadata; in Zarr 2 the mark of a group comes last."""
    if version == "0.4":
        write_json(place, ".zattrs", ome)
        write_json(place, ".zgroup", {"zarr_format": 2})
    else:
        write_json(place, "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": version, **ome}}})


def _list_label(place: Path, name: str, version: Version) -> None:
    """Add a label map to the list of the group of label maps."""
    attributes = _attributes(place, version)
    listed = attributes.get("labels")
    names = listed if isinstance(listed, list) else []
    if name not in names:
        _write_group(place, attributes | {"labels": [*names, name]}, version)


def _multiscale(name: str, levels: list[Level], like: Volume, layers: int | None, is_label: bool) -> dict[str, Any]:
    """Axes, scales and places of a pyramid; lengths in micrometres, or in millimetres where voxels are of a tenth or more."""
    millimetres = min(like.spacing_mm) >= 0.1 or not like.spacing_known
    unit = {} if not like.spacing_known else {"unit": "millimeter" if millimetres else "micrometer"}
    factor = 1.0 if millimetres else 1e3
    channel = [] if layers is None else [{"name": "c", "type": "channel"}]
    first = [] if layers is None else [1.0]
    datasets = []
    for number, level in enumerate(levels):
        scale = [spacing * side * factor for spacing, side in zip(like.spacing_mm, level.factors, strict=True)]
        # The centre of the voxels that one stands for.
        origin = [
            (start + (side - 1) / 2 * spacing) * factor
            for start, side, spacing in zip(_origin_mm(like), level.factors, like.spacing_mm, strict=True)
        ]
        steps = [{"type": "scale", "scale": [*first, *scale]}, {"type": "translation", "translation": [*(0.0 for _ in first), *origin]}]
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    axes = [*channel, *({"name": axis, "type": "space", **unit} for axis in "zyx"[-len(like.shape_vox) :])]
    return {"name": name, "axes": axes, "datasets": datasets, "type": "mode" if is_label else "mean"}


def _origin_mm(like: Volume) -> Spacing:
    """The place of the first voxel; 0 where the axes are turned or mirrored, which scale and translation cannot say."""
    straight = np.allclose(like.affine[:-1, :-1], np.diag(like.spacing_mm), rtol=1e-4, atol=1e-6 * min(like.spacing_mm))
    return tuple(float(value) for value in like.affine[:-1, -1]) if straight else (0.0,) * len(like.spacing_mm)


def _image_label(values: Mapping[int, str] | None, source: str) -> dict[str, Any]:
    """Colours and names of a label map's values, and where its image is; 0 is not shown."""
    label: dict[str, Any] = {}
    named = sorted((values or {}).items())
    if named:
        label["colors"] = [{"label-value": value, "rgba": [*_colour(value), 255 if value else 0]} for value, _ in named]
        label["properties"] = [{"label-value": value, "class": name} for value, name in named]
    return label | ({"source": {"image": source}} if source else {})


def _omero(values: Mapping[int, str] | None, dtype: np.dtype[Any], layers: int | None) -> dict[str, Any]:
    """Names and colours of an image's layers, as viewers take them; nothing where they have no names."""
    if not values or layers is None:
        return {}
    end = float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0
    window = {"min": 0.0, "max": end, "start": 0.0, "end": end}
    shades = ["".join(f"{part:02X}" for part in _colour(layer)) for layer in range(layers)]
    named = [values.get(layer, str(layer)) for layer in range(layers)]
    return {"omero": {"channels": [{"label": n, "color": s, "active": True, "window": window} for n, s in zip(named, shades, strict=True)]}}


def _colour(value: int) -> tuple[int, ...]:
    """A bright colour (R, G, B), 0 to 255, that differs from those of the values near by."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(value * _TURN % 1, 0.75, 1.0))
