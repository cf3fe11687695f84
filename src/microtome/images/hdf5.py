"""HDF5 <-> Volume, Image: a dataset in a file, read chunk by chunk; what ilastik, ImageJ, PlantSeg and CREMI write.

A path leads into the file: `cells.h5/volumes/raw` is the dataset `volumes/raw` of `cells.h5`.
"""

import json
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.errors import DataError, DataWarning, missing_extra
from microtome.files import atomic_path
from microtome.geometry import Shape, Spacing, affine_from_spacing, format_shape
from microtome.images.hdf5_chunks import Chunks, check_claims
from microtome.images.hdf5_heaps import WatchedFile
from microtome.images.image import Header, Image, Limits, decoding
from microtome.images.npy import image_type, samples_last
from microtome.images.parts import bounds, limits_of_parts
from microtome.images.volume import Volume

# Which of several datasets is the image, if no name is given.
_IMAGE_NAMES = ("raw", "image", "volume", "data", "exported_data", "volumes/raw")
# Attributes that hold the voxel size along S, and the millimetres of a unit where the file names none: ImageJ's and
# ilastik's are micrometres, those of electron microscopy (CREMI, N5) nanometres.
_SPACINGS = (("element_size_um", 1e-3), ("resolution", 1e-6), ("spacing", 1.0))
_MM_PER_UNIT = MappingProxyType({"nm": 1e-6, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "micron": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3})
_LEAST_AXES, _MOST_AXES = 2, 5
_MOST_LINKS = 16  # soft links that lead to each other are a circle
_CHUNK_VOX = 64
_TEXTS = frozenset({"axistags", "axes", "unit", "units", "DIMENSION_LABELS"})  # attributes
# Classes of types (HDF5 file format, IV.A.2.d): whole numbers, real ones, text, bits, words for numbers; and an array of them.
_PLAIN_CLASSES, _ARRAY_CLASS = (0, 1, 3, 4, 8), 10
_MOST_ATTRIBUTE_BYTES = 2**20  # ilastik's JSON of axes takes some hundred


def open_hdf5(path: Path, limits: Limits) -> Volume:
    """A dataset of 2 to 5 axes of numbers.

    Args:
        path: of a file, or one that leads into it. Of a file, its only such dataset is taken, or that named raw, image, volume,
            data, exported_data or volumes/raw.
        limits: of sides and channels; only the parts that are asked for are read.

    Returns:
        The volume. Its axes are named by the attribute `axistags` (ilastik's JSON) or `axes`, or by labels of dimensions;
        without names they are YX, ZYX or CZYX, and with T of length 1 before these; an axis that is the only one of 4
        or less, and the last, is C. The voxel size comes from the attributes `element_size_um`, `resolution` (nanometres,
        unless `unit` or `units` names another), or `spacing` (millimetres).

    Raises:
        DataError: damaged, no such dataset or several, values in other files, or a compression that is not here.
    """
    h5py = _h5py(path)
    file_path, name = split(path)
    with decoding(path, "HDF5"):
        with WatchedFile(file_path, _TEXTS) as opened, h5py.File(opened, "r") as watched:
            described = _dataset(path, watched, name)
            _sources(path, described)
            for attribute in _TEXTS & described.attrs.keys():
                opened.check_lengths(attribute)
            dtype = image_type(path, described.dtype)
            axes = _arranged(path, described)
            sizes = tuple(1 if axis is None else int(described.shape[axis]) for axis in axes)
            spacing, known = _spacing(path, described, len(sizes) - 1)
            name = described.name
        # Its values are read by the library itself, which has now come through all that leads to them once.
        dataset = _dataset(path, h5py.File(file_path, "r", locking="best-effort"), name)
        sources = _sources(path, dataset)
    header = Header(shape_vox=sizes[1:], channels=sizes[0], dtype=dtype.name, spacing_mm=spacing, spacing_known=known, format="hdf5")
    limits_of_parts(limits).check(file_path, header)
    plane = (*(1,) * (len(sizes) - 3), *sizes[-2:])
    return Volume(
        pixels=_Dataset(path, dataset, axes, shape=sizes, dtype=dtype, sources=sources),
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes="CZYX" if len(sizes) == 4 else "CYX",
        path=path,
        format="hdf5",
        chunk_vox=tuple(int(dataset.chunks[axis]) for axis in axes[1:] if axis is not None) if dataset.chunks else plane,
        spacing_known=known,
    )


def write_hdf5(path: Path, image: Image) -> None:
    """Write an image as the one dataset `image`, or `extra["dataset"]`, of a file, packed in chunks, in one step.

    Its attributes `axes` and, where the spacing is known, `element_size_um` are what `open_hdf5` reads.
    """
    h5py = _h5py(path)
    array = image.array[0] if image.channels == 1 else image.array
    side = _CHUNK_VOX if len(image.shape_vox) == 3 else _CHUNK_VOX * 8
    sides = (1,) * (array.ndim - len(image.shape_vox)) + (side,) * len(image.shape_vox)
    chunks = tuple(min(side, size) for side, size in zip(sides, array.shape, strict=True))
    with atomic_path(path) as part, h5py.File(part, "w") as file:
        name = image.extra.get("dataset", "image")
        dataset = file.create_dataset(name, data=array, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True)
        dataset.attrs["axes"] = image.axes[-array.ndim :].lower()
        if image.spacing_known:
            dataset.attrs["element_size_um"] = [1e3 * size for size in image.spacing_mm]


def datasets(path: Path) -> dict[str, Shape]:
    """Shapes by name, `volumes/raw`, of all datasets of 2 to 5 axes of numbers in a file, links aside.

    Raises:
        DataError: damaged, or no HDF5 file.
    """
    h5py = _h5py(path)
    with decoding(path, "HDF5"), WatchedFile(path) as opened, h5py.File(opened, "r") as file:
        return _listed(file)


def split(path: Path) -> tuple[Path, str]:
    """The file of a path that may lead into it, and the rest: `(cells.h5, "volumes/raw")`."""
    file = next((above for above in (path, *path.parents) if above.is_file()), path)
    return file, path.relative_to(file).as_posix() if file != path else ""


class _Dataset:
    """Pixels of a dataset; the library reads for one thread at a time.

    Args:
        path: for errors.
        dataset: of an open file.
        axes: its axes in the order of the image's; None for channels that it has no axis of. All others are of length 1.
        shape, dtype: of the image, (C, *S).
        sources: the datasets that hold its values.
    """

    def __init__(
        self, path: Path, dataset: Any, axes: tuple[int | None, ...], *, shape: Shape, dtype: np.dtype[Any], sources: list[Any]
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        # The dataset is open as long as its file is.
        self._dataset, self._file, self._axes = dataset, dataset.file, axes
        self._lock = threading.Lock()
        self._chunks = [Chunks(path, one) for one in sources]

    def __getitem__(self, part: Any) -> np.ndarray:
        limits = bounds(part, self.shape)
        sizes = [high - low for low, high in limits]
        if 0 in sizes:
            return np.empty(sizes, self.dtype)
        ours = [(axis, slice(*ends)) for axis, ends in zip(self._axes, limits, strict=True) if axis is not None]
        theirs = tuple(dict(ours).get(axis, slice(0, 1)) for axis in range(self._dataset.ndim))
        with decoding(self.path, "HDF5"), self._lock:
            for chunks in self._chunks:
                chunks.check(None if self._dataset.is_virtual else theirs)
            array = np.asarray(self._dataset[theirs])
        order = [axis for axis, _ in ours]
        single = [axis for axis in range(array.ndim) if axis not in order]
        return np.ascontiguousarray(array.transpose(*single, *order).reshape(sizes), self.dtype)


def _h5py(path: Path) -> Any:
    """The library, which few need."""
    try:
        import h5py
    except ImportError:
        raise missing_extra(str(path), "h5py", "hdf5") from None
    return h5py


def _listed(file: Any) -> dict[str, Shape]:
    """Datasets that may be images, each once; no link is followed."""
    found: dict[str, Shape] = {}
    seen = set()

    def visit(name: str, link: Any) -> None:
        if hasattr(link, "path"):
            return
        item = file[name]
        if item.id in seen or not (hasattr(item, "dtype") and hasattr(item, "chunks")):
            return
        seen.add(item.id)
        if _LEAST_AXES <= item.ndim <= _MOST_AXES and item.dtype.kind in "biuf":
            found[name] = tuple(item.shape)

    # By links: a visit of objects asks of each how much room its list of chunks takes, and where that list is damaged the library
    # does not come back.
    file.visititems_links(visit)
    return found


def _dataset(path: Path, file: Any, name: str) -> Any:
    """The dataset that is meant.

    Raises:
        DataError: there is none, or there are several.
    """
    if not name:
        found = _listed(file)
        names = list(found) if len(found) == 1 else [wanted for wanted in _IMAGE_NAMES if wanted in found]
        if not names:
            raise _no_choice(path, found)
        name = names[0]
    item = _follow(path, file, name)
    if not hasattr(item, "chunks") or not _LEAST_AXES <= item.ndim <= _MOST_AXES:
        raise _no_choice(path, _listed(file))
    return item


def _no_choice(path: Path, found: dict[str, Shape]) -> DataError:
    """The error that lists what a file has."""
    file, _ = split(path)
    listed = ", ".join(f"{name} ({format_shape(shape)})" for name, shape in found.items())
    do = f"give its name as {file.name}/{next(iter(found))}" if found else "export it with an image"
    got = f"several: {listed}" if found and file == path else f"only {listed}" if found else "none of them"
    return DataError(path, expected=f"a dataset of {_LEAST_AXES} to {_MOST_AXES} axes of numbers", got=got, do=do, code="D020")


def _follow(path: Path, file: Any, name: str) -> Any:
    """What is under a name; links within the file are followed, those into other files refused."""
    node, hops = file, 0
    pending = list(PurePosixPath("/", name).parts)
    while pending:
        part = pending.pop(0)
        if part == "/":
            node = file
            continue
        link = node.get(part, getlink=True) if hasattr(node, "visititems") else None
        if link is None:
            raise _no_choice(path, _listed(file))
        if hasattr(link, "filename"):
            raise _elsewhere(path, f"a link to the file {link.filename}")
        if hasattr(link, "path"):
            hops += 1
            if hops > _MOST_LINKS:
                raise DataError(
                    path, expected="links that end", got=f"{part} and {hops} links in a circle", do="write the file again", code="D011"
                )
            pending = [*PurePosixPath(link.path).parts, *pending]
        else:
            node = node[part]
    return node


def _sources(path: Path, dataset: Any) -> list[Any]:
    """The datasets that hold the values: itself, or those of which a virtual one is made.

    Raises:
        DataError: values would be read from other files, or unpacked by what is not here or to more than they should be.
    """
    checked: dict[Any, tuple[int, Any]] = {}
    _check_inside(path, dataset, _MOST_LINKS, checked)
    return [one for _, one in checked.values() if not one.is_virtual]


def _check_inside(path: Path, dataset: Any, depth: int, checked: dict[Any, tuple[int, Any]]) -> None:
    """Check a dataset and, each once, those of which it is made; `checked` has the depth that was left at each, and the dataset."""
    from h5py.h5z import filter_avail

    if dataset.id in checked and checked[dataset.id][0] <= depth:
        return
    if dataset.external:
        raise _elsewhere(path, f"values in the file {dataset.external[0][0]}")
    check_claims(path, dataset)
    for source in dataset.virtual_sources() if dataset.is_virtual else ():
        if source.file_name != "." or depth == 0:
            raise _elsewhere(path, f"values in the file {source.file_name}")
        _check_inside(path, _follow(path, dataset.file, source.dset_name), depth - 1, checked)
    packing = dataset.id.get_create_plist()
    for number, _, _, name in (packing.get_filter(i) for i in range(packing.get_nfilters())):
        if not filter_avail(number):
            got = f"compression {number} ({name.decode(errors='replace')})"
            raise DataError(
                path, expected="a compression that h5py has", got=got, do="repack it: h5repack -f GZIP=1 OLD.h5 NEW.h5", code="D014"
            )
    checked[dataset.id] = depth, dataset


def _elsewhere(path: Path, got: str) -> DataError:
    return DataError(
        path, expected="a dataset whose values are in this file", got=got, do="copy them into one file: h5copy, h5repack", code="D012"
    )


def _axis_names(path: Path, dataset: Any) -> str:
    """A letter of TCZYX for each axis of a dataset, as it says or by their number."""
    for name in (*_written_names(path, dataset), _labels(path, dataset)):
        letters = name.upper()
        if len(set(letters)) == len(letters) == dataset.ndim and {"Y", "X"} <= set(letters) <= set("TCZYX"):
            return letters
        if letters:
            warnings.warn(f"{path}: the names of its axes, {name[:20]!r}, are not used", DataWarning, stacklevel=5)
    return _guessed_names(tuple(dataset.shape))


def _written_names(path: Path, dataset: Any) -> Iterator[str]:
    """What attributes say of the axes: ilastik's JSON, a word, or a list of letters."""
    tags, axes = _text(_attribute(path, dataset, "axistags")), _text(_attribute(path, dataset, "axes"))
    if tags:
        yield "".join(str(tag["key"]) for tag in json.loads(tags)["axes"])
    if axes:
        yield axes


def _labels(path: Path, dataset: Any) -> str:
    """The first letters of the labels of the dimensions; the library takes for granted that there are as many as dimensions."""
    found = dataset.attrs.get_id("DIMENSION_LABELS") if "DIMENSION_LABELS" in dataset.attrs else None
    if found is None or found.shape != (dataset.ndim,) or not _is_plain(path, "DIMENSION_LABELS", found):
        return ""
    return "".join(dimension.label[:1] for dimension in dataset.dims)


def _attribute(path: Path, dataset: Any, name: str) -> Any:
    """The value of an attribute; None where there is none, or, with a warning, none of numbers or text.

    Raises:
        ValueError: it claims more than any program writes, for which the library would take the memory.
    """
    if name not in dataset.attrs:
        return None
    found = dataset.attrs.get_id(name)
    if not _is_plain(path, name, found):
        return None
    if (size := math.prod(found.shape) * found.dtype.itemsize) > _MOST_ATTRIBUTE_BYTES:
        raise ValueError(f"{size} bytes as {name}")
    return dataset.attrs[name]


def _is_plain(path: Path, name: str, found: Any) -> bool:
    """Whether an attribute holds numbers or text; of a sequence of any length, the library believes the kind, and may end the process."""
    kind = found.get_type()
    plain = (kind.get_super() if kind.get_class() == _ARRAY_CLASS else kind).get_class() in _PLAIN_CLASSES
    if not plain:
        warnings.warn(f"{path}: its {name} is neither numbers nor text, and is not used", DataWarning, stacklevel=6)
    return bool(plain)


def _text(value: Any) -> str:
    """A text, bytes, or a list of them, in one."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "".join(map(_text, value)) if isinstance(value, np.ndarray) else "" if value is None else str(value)


def _guessed_names(shape: Shape) -> str:
    """Axes of a shape without names."""
    if len(shape) == _MOST_AXES:
        return "T" + _guessed_names(shape[1:])
    last = samples_last(shape)
    return {2: "YX", 3: "YXC" if last else "ZYX", 4: "ZYXC" if last else "CZYX"}[len(shape)]


def _arranged(path: Path, dataset: Any) -> tuple[int | None, ...]:
    """The dataset's axes in the order of the image's: channels, None where it has none, then S.

    Raises:
        DataError: several time points.
    """
    letters = _axis_names(path, dataset)
    if "T" in letters and (times := dataset.shape[letters.index("T")]) > 1:
        got = f"{times} of them (axes {letters}, {format_shape(dataset.shape)})"
        raise DataError(path, expected="one time point", got=got, do="save one time point a dataset", code="D009")
    return letters.index("C") if "C" in letters else None, *(letters.index(letter) for letter in "ZYX" if letter in letters)


def _spacing(path: Path, dataset: Any, dims: int) -> tuple[Spacing, bool]:
    """The voxel size along S in mm, and whether the dataset says it."""
    for name, mm in _SPACINGS:
        if (written := _attribute(path, dataset, name)) is None:
            continue
        # Numbers that are none raise, as all damage does.
        values = np.asarray(written, np.float64).reshape(-1)
        unit = _text(_attribute(path, dataset, "unit" if "unit" in dataset.attrs else "units")) if name != "element_size_um" else ""
        if len(values) >= dims and np.isfinite(values).all() and (values > 0).all():
            return tuple(float(value) * _mm(unit, mm) for value in values[-dims:]), True
        warnings.warn(f"{path}: its {name} {values.tolist()} is not used; the voxel size is not known", DataWarning, stacklevel=4)
    return (1.0,) * dims, False


def _mm(unit: str, default: float) -> float:
    """Millimetres of a unit; the same unit may be named once for each axis."""
    return next((mm for name, mm in _MM_PER_UNIT.items() if unit and unit == name * (len(unit) // len(name))), default)
