"""TIFF, ImageJ's TIFF and OME-TIFF <-> Image: pictures and stacks, with a scale where the file has one."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import numpy as np

from microtome.errors import DataError, DataWarning
from microtome.files import atomic_path
from microtome.geometry import Shape, Spacing, affine_from_spacing, format_shape
from microtome.images.image import Header, Image, Limits, Palette, decoding, native
from microtome.images.tiff_checks import check_companions, check_pages, check_whole

_MM_PER_UNIT = MappingProxyType(
    {"pm": 1e-9, "å": 1e-7, "angstrom": 1e-7, "nm": 1e-6, "nanometer": 1e-6, "nanometre": 1e-6}
    | dict.fromkeys(("um", "\u00b5m", "\u03bcm", "\\u00b5m", "micron", "microns", "micrometer", "micrometre"), 1e-3)
    | {"mm": 1.0, "millimeter": 1.0, "millimetre": 1.0, "cm": 10.0, "centimeter": 10.0, "m": 1e3, "in": 25.4, "inch": 25.4}
)
_TAG_UNITS_MM = MappingProxyType({2: 25.4, 3: 10.0})
# Resolutions that programs write when they know none, or that say how large to print.
_PRINT_DPI = (1, 72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 220, 240, 300, 350, 360, 400, 600, 720, 1200, 2400)
_ALPHA = (1, 2)  # ExtraSamples: associated and unassociated alpha
_CMYK, _PALETTE = 5, 3  # PhotometricInterpretation
_X_RESOLUTION, _Y_RESOLUTION = 282, 283  # tags
_MOST_SAMPLES = 4
_IMAGEJ_TYPES = ("uint8", "uint16", "float32")
_IMAGEJ_MAX_BYTES = 2**31  # ImageJ's own TIFF has 32-bit offsets


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a file's first series becomes an image.

    Attributes:
        series: tifffile's series, which decodes.
        file_shape, order: its axes without those of length 1, and where each goes: channels first, then S.
        kept: channels that are not alpha.
        palette: (n, 3) uint8 if the file has one; `coloured` if it is to be applied.
        extra: what `write_tiff` needs to give back the same kind of file: "ome", "imagej" or "plain", and the palette.
        faults: what had to be assumed, for warnings.
    """

    header: Header
    series: Any
    file_shape: Shape
    order: tuple[int, ...]
    kept: int
    palette: np.ndarray | None
    coloured: bool
    cmyk: bool
    extra: dict[str, Any]
    faults: tuple[str, ...]


def probe_tiff(path: Path) -> Header:
    """What `read_tiff` will give, from the tags and metadata alone."""
    with opened_tiff(path) as tiff:
        return describe_tiff(path, tiff, "colours").header


def read_tiff(path: Path, palette: Palette, limits: Limits) -> Image:
    """The first image of a file: (C, Y, X), or a stack (C, Z, Y, X), in the file's own type.

    Pages without a meaning of their own are sections. Alpha is dropped, CMYK becomes RGB, bits become 0 and 1.
    A palette gives colours, or indices if asked; ImageJ's and OME's are look-up tables for the screen, so their
    indices are the image. "White is zero" changes nothing: ImageJ shows masks so whose 255 is the object.
    The voxel size comes from OME-XML, from ImageJ's metadata, or from the resolution tags, unless these hold a
    printer's resolution. The orientation tag is not applied, as no microscopy program does.

    Raises:
        DataError: damaged, a time series, more than one axis beside C, Y, X, complex, or beyond `limits`.
    """
    with opened_tiff(path) as tiff:
        plan = describe_tiff(path, tiff, palette)
        limits.check(path, plan.header)
        check_whole(path, plan.series, limits)
        for fault in plan.faults:
            warnings.warn(f"{path}: {fault}", DataWarning, stacklevel=3)
        array = decode_tiff(plan)
    return Image(
        array=array,
        spacing_mm=plan.header.spacing_mm,
        affine=affine_from_spacing(plan.header.spacing_mm),
        axes="CZYX" if array.ndim == 4 else "CYX",
        path=path,
        format="tiff",
        spacing_known=plan.header.spacing_known,
        extra=plan.extra,
    )


def decode_tiff(plan: Plan) -> np.ndarray:
    """All of the image (C, *S), while its file is open."""
    array = np.asarray(plan.series.asarray()).reshape(plan.file_shape).transpose(plan.order)
    return native(_coloured(array.reshape(-1, *plan.header.shape_vox)[: plan.kept], plan))


def write_tiff(path: Path, image: Image) -> None:
    """Write an image as ImageJ's TIFF, or as OME-TIFF where it was one or ImageJ has no such type, in one step.

    Both keep the voxel size. Three channels of uint8 become RGB. A stack of one section is read back as a picture.

    Raises:
        DataError: a type that neither knows (64-bit integers).
    """
    import tifffile

    array = _storable(path, image.array)
    ome = image.extra.get("tiff_kind") == "ome" or array.dtype.name not in _IMAGEJ_TYPES or array.nbytes > _IMAGEJ_MAX_BYTES
    pixels, axes = _writing_order(array)
    metadata, resolution = _scale_metadata(image, ome=ome)
    with atomic_path(path) as part:
        tifffile.imwrite(
            part,
            pixels,
            imagej=not ome,
            ome=ome,
            bigtiff=ome and array.nbytes > _IMAGEJ_MAX_BYTES,
            photometric="rgb" if axes.endswith("S") else "minisblack",
            metadata={"axes": axes} | metadata,
            resolution=resolution,
            # Label maps shrink a hundredfold; floats hardly, and cost seconds.
            compression="zlib" if array.dtype.kind in "iu" else None,
        )


@contextmanager
def opened_tiff(path: Path) -> Iterator[Any]:
    """The file with its chain of pages walked, so that a file cut between pages is not read as a shorter stack."""
    # Late, here and for writing: other formats need none of it, and it takes a twentieth of a second.
    import tifffile

    with decoding(path, "TIFF"):
        with path.open("rb") as file:
            check_pages(path, file)
        with tifffile.TiffFile(path) as tiff:
            yield tiff


def describe_tiff(path: Path, tiff: Any, palette: Palette) -> Plan:
    """What the first series of a file holds and how to arrange it."""
    # Before tifffile looks for the series, as it opens each file that the metadata name.
    check_companions(path, tiff)
    series = tiff.series[0]
    page = series.keyframe
    dtype = _result_type(path, series.dtype)
    _check_complete(path, tiff, series)
    names, thin = _axis_names(series)
    shape, order, channels = _arrange(path, names, series.shape)
    colours = _colours(page)
    # What ImageJ and OME call a palette is how the image was shown, not what was recorded.
    coloured = colours is not None and palette == "colours" and not (tiff.is_imagej or tiff.is_ome)
    cmyk = int(page.photometric) == _CMYK and channels >= _MOST_SAMPLES and dtype == np.uint8
    kept = 4 if cmyk else channels - _alpha_channels(page, names, channels)
    sizes, unusable = _scale(tiff, page)
    spacing, known, assumed = _spacing(sizes, len(shape))
    kind = "ome" if tiff.is_ome else "imagej" if tiff.is_imagej else "plain"
    faults = [*thin, *unusable, *assumed, *_oddities(tiff, page, len(shape))]
    header = Header(
        shape_vox=shape,
        channels=3 * channels if coloured else 3 if cmyk else kept,
        dtype=dtype.name,
        spacing_mm=spacing,
        spacing_known=known,
        format="tiff",
    )
    return Plan(
        header=header,
        series=series,
        file_shape=tuple(series.shape),
        order=order,
        kept=kept,
        palette=colours,
        coloured=coloured,
        cmyk=cmyk,
        extra={"tiff_kind": kind} | ({} if colours is None else {"palette": colours}),
        faults=tuple(faults),
    )


def _result_type(path: Path, dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    """The type of `Image.array` for a file's type."""
    if dtype is None or dtype.kind not in "biuf":
        got = "a sample format that is unknown" if dtype is None else f"{dtype.name} values"
        raise DataError(path, expected="real numbers", got=got, do="convert it to 8, 16 or 32 bits", code="D008")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def _check_complete(path: Path, tiff: Any, series: Any) -> None:
    """Refuse a file whose metadata promise more planes than it has; tifffile then reads the first one alone."""
    promised = int((tiff.imagej_metadata or {}).get("images", 1)) if tiff.is_imagej else 1
    if series.kind != "imagej" and promised > len(tiff.pages):
        got = f"{len(tiff.pages)} of the {promised} that its ImageJ metadata name"
        raise DataError(path, expected="all planes", got=got, do="copy or export it again: it was cut off", code="D002")


def _axis_names(series: Any) -> tuple[str, list[str]]:
    """The letters that tifffile gives the axes, mended where a row of samples was taken for a row of pixels, and a remark if so.

    An array (Y, X, 3) that was saved without saying RGB comes as Y pages of X rows with 3 columns.
    """
    names, shape = str(series.axes), series.shape
    if names == "QYX" and series.kind == "shaped" and shape[2] <= _MOST_SAMPLES < min(shape[:2]) // 4:
        return "YXS", [f"its last axis of {shape[2]} is taken for channels of a picture of {format_shape(shape[:2])}"]
    return names, []


def _arrange(path: Path, names: str, sizes: Shape) -> tuple[Shape, tuple[int, ...], int]:
    """The spatial shape S, the order of the file's axes that puts channels first, and the number of channels."""
    axes = dict(enumerate(names))
    channels = [i for i, name in axes.items() if name in "CS"]
    plane = [names.index("Y"), names.index("X")]
    single = [i for i, name in axes.items() if name not in "CSYX" and sizes[i] == 1]
    sections = [i for i in axes if i not in (*channels, *plane, *single)]
    if any(names[i] == "T" for i in sections):
        got = f"{sizes[names.index('T')]} time points (axes {names}, {format_shape(sizes)})"
        do = "save one time point a file, or, if they are sections, set its axes to ZYX (ImageJ: Image > Properties)"
        raise DataError(path, expected="one time point", got=got, do=do, code="D009")
    if len(sections) > 1:
        got, do = f"axes {names} of {format_shape(sizes)}", "save one stack a file, or set its axes to ZYX or CZYX"
        raise DataError(path, expected="one stack of sections", got=got, do=do, code="D009")
    spatial = [*sections, *plane]
    return tuple(int(sizes[i]) for i in spatial), (*single, *channels, *spatial), math.prod(sizes[i] for i in channels)


def _alpha_channels(page: Any, names: str, channels: int) -> int:
    """How many of the last channels are declared to be alpha."""
    extra = tuple(int(kind) for kind in page.extrasamples or ())
    declared = bool(extra) and all(kind in _ALPHA for kind in extra)
    return len(extra) if declared and "S" in names and "C" not in names and channels > len(extra) else 0


def _colours(page: Any) -> np.ndarray | None:
    """The palette, (n, 3) uint8, of an image that has one; TIFF stores it with 16 bits a colour."""
    if int(page.photometric) != _PALETTE or page.colormap is None:
        return None
    return (np.asarray(page.colormap, np.uint16).T >> 8).astype(np.uint8)


def _oddities(tiff: Any, page: Any, dims: int) -> Iterator[str]:
    """What is in the file and not in the image, or the other way round."""
    metadata = tiff.imagej_metadata or {}
    if dims == 3 and "unit" in metadata and "spacing" not in metadata:
        yield f"does not say the distance of its sections; 1 {metadata['unit']} is assumed, as in ImageJ"
    if dims == 3 and _section_distance(metadata) < 0:
        yield f"its distance of sections, {metadata['spacing']}, is taken without its sign, as in ImageJ"
    if len(tiff.series) > 1:
        yield f"holds {len(tiff.series)} images of different shapes; only the first is read"
    orientation = page.tags.get("Orientation")
    if orientation is not None and orientation.value not in (0, 1):
        yield f"its orientation tag {orientation.value} is not applied"


def _coloured(array: np.ndarray, plan: Plan) -> np.ndarray:
    """(C, *S) with the palette applied, CMYK turned into RGB, and bits as 0 and 1."""
    if plan.coloured and plan.palette is not None:
        table = np.zeros((np.iinfo(array.dtype).max + 1, 3), np.uint8)
        table[: len(plan.palette)] = plan.palette
        array = np.moveaxis(table[array], -1, 1).reshape(-1, *array.shape[1:])
    if plan.cmyk:
        ink = 255 - array.astype(np.uint16)
        array = (ink[:3] * ink[3] + 127) // 255
    return array.astype(plan.header.dtype, copy=False)


def _scale(tiff: Any, page: Any) -> tuple[dict[str, float], list[str]]:
    """Voxel size in mm by axis letter, for the axes where the file knows it; and what it says that cannot be."""
    sizes: dict[str, float] = {}
    if tiff.is_ome:
        sizes = _ome_scale(tiff.ome_metadata or "")
    elif tiff.is_imagej:
        sizes = _imagej_scale(tiff.imagej_metadata or {}, page)
    sizes = sizes or _tag_scale(page)
    sound = {axis: size for axis, size in sizes.items() if math.isfinite(size) and size > 0}
    wrong = sizes.keys() - sound.keys()
    return sound, [f"its voxel size along {axis}, {sizes[axis]:g} mm, cannot be and is not used" for axis in "XYZ" if axis in wrong]


def _ome_scale(xml: str) -> dict[str, float]:
    """PhysicalSizeX, Y, Z of the first image; its unit is the micrometre unless it names another."""
    pixels = next((element for element in ElementTree.fromstring(xml).iter() if element.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return {}
    units = {axis: _MM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "um").lower()) for axis in "XYZ"}
    return {axis: float(value) * mm for axis, mm in units.items() if mm and (value := pixels.get(f"PhysicalSize{axis}"))}


def _imagej_scale(metadata: dict[str, Any], page: Any) -> dict[str, float]:
    """Pixels a unit in the resolution tags; the unit, and the distance of sections, in the description."""
    unit = str(metadata.get("unit", ""))
    if unit.lower() not in _MM_PER_UNIT:
        return {}
    units = {"X": unit, "Y": str(metadata.get("yunit", unit)), "Z": str(metadata.get("zunit", unit))}
    mm = {axis: _MM_PER_UNIT[name.lower()] for axis, name in units.items() if name.lower() in _MM_PER_UNIT}
    x, y = _resolution(page)
    of_unit = {"X": 1 / x, "Y": 1 / y, "Z": abs(_section_distance(metadata))}
    return {axis: of_unit[axis] * each for axis, each in mm.items()}


def _section_distance(metadata: dict[str, Any]) -> float:
    """The distance of sections of an ImageJ stack in its unit, with its sign; NaN of one that is no number."""
    try:
        return float(metadata.get("spacing", 1))
    except (TypeError, ValueError):
        return math.nan


def _resolution(page: Any) -> tuple[float, float]:
    """Pixels a unit of length along X and Y; NaN of fractions of or by 0, which tifffile takes for whole numbers."""
    fractions = (page.tags.valueof(code, default=(1, 1)) for code in (_X_RESOLUTION, _Y_RESOLUTION))
    pairs = zip(page.resolution, fractions, strict=True)
    x, y = (math.nan if isinstance(fraction, tuple) and 0 in fraction else float(value) for value, fraction in pairs)
    return x or math.nan, y or math.nan


def _tag_scale(page: Any) -> dict[str, float]:
    """The resolution tags, unless they hold a printer's resolution or none."""
    unit_mm = _TAG_UNITS_MM.get(int(page.resolutionunit), 0.0)
    resolution = _resolution(page)
    if not unit_mm or resolution == (1, 1):
        return {}
    dots_per_inch = [value * 25.4 / unit_mm for value in resolution]
    if any(abs(dpi - printed) < 0.5 for dpi in dots_per_inch for printed in _PRINT_DPI):
        return {}
    return {"X": unit_mm / resolution[0], "Y": unit_mm / resolution[1]}


def _spacing(sizes: dict[str, float], dims: int) -> tuple[Spacing, bool, list[str]]:
    """The spacing along S, whether the file knows it, and what was assumed where it knows only a part."""
    wanted = "ZYX"[-dims:]
    if not {"X", "Y"} & set(sizes):
        return (1.0,) * dims, False, []
    missing = [axis for axis in wanted if axis not in sizes]
    pixel = sizes.get("X", sizes.get("Y", 1.0))
    remark = [f"does not say its voxel size along {', '.join(missing)}; {pixel:g} mm is assumed, as along X or Y"] if missing else []
    return tuple(sizes.get(axis, pixel) for axis in wanted), True, remark


def _storable(path: Path, array: np.ndarray) -> np.ndarray:
    """The array in a type that OME or ImageJ knows."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype.kind not in "iuf" or (array.dtype.kind in "iu" and array.dtype.itemsize > 4):
        raise DataError(path, expected="real numbers of at most 32 bits, or float64", got=array.dtype.name, do="convert them", code="D007")
    return array


def _writing_order(array: np.ndarray) -> tuple[np.ndarray, str]:
    """(C, *S) as TIFF has it: RGB samples last, other channels behind the sections, one channel without an axis."""
    spatial = "ZYX"[-(array.ndim - 1) :]
    if array.shape[0] == 1:
        return array[0], spatial
    if array.shape[0] == 3 and array.dtype == np.uint8:
        return np.ascontiguousarray(np.moveaxis(array, 0, -1)), spatial + "S"
    return np.ascontiguousarray(np.moveaxis(array, 0, -3)), spatial[:-2] + "CYX"


def _scale_metadata(image: Image, *, ome: bool) -> tuple[dict[str, Any], tuple[float, float] | None]:
    """The metadata and resolution that give an image's voxel size, in micrometres as microscopes do."""
    if not image.spacing_known:
        return {}, None
    sizes = dict(zip("ZYX"[-len(image.spacing_mm) :], (1e3 * size for size in image.spacing_mm), strict=True))
    resolution = (1 / sizes["X"], 1 / sizes["Y"])
    if ome:
        units = {f"PhysicalSize{axis}Unit": "\u00b5m" for axis in sizes}
        return {f"PhysicalSize{axis}": size for axis, size in sizes.items()} | units, None
    return {"unit": "micron"} | ({"spacing": sizes["Z"]} if "Z" in sizes else {}), resolution
