"""NIfTI <-> Image: volumes with their place in the scanner's world.

A NIfTI file stores X fastest, so its bytes are already (C, Z, Y, X) in C order: nothing is transposed, and
`Image.affine` is the file's affine with the columns of X and Z exchanged.
"""

import gzip
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.errors import DataError, DataWarning
from microtome.files import atomic_path
from microtome.geometry import Shape, Spacing, same_grid, spacing_of
from microtome.images.image import Header, Image, Limits, decoding, native

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
GZIP_MAGIC = b"\x1f\x8b"
_PAIR_MAGICS = (b"ni1\0", b"ni2\0")
_SET_SPACING = "export it again, or set its spacing"
_MM_PER_UNIT = MappingProxyType({1: 1000.0, 2: 1.0, 3: 0.001})  # the low 3 bits of xyzt_units: metre, mm, micron
_MAX_OFFSET = 2**27  # header extensions of more than 128 MiB are damage, or a way to make us inflate zeros
_CHUNK_BYTES = 2**24
# Formats whose volumes lie in a patient: the millimetres of their affines are x to the right, y to the front, z upwards.
PATIENT_FORMATS = frozenset({"nifti", "nrrd", "metaimage", "dicom"})
_SAME_PLACE_VOX = 0.01  # a header holds single precision
_Unpacked = gzip.GzipFile | io.BufferedReader


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a header puts its voxels: affine (4, 4) from (z, y, x) to mm, and what is wrong with it."""

    affine: np.ndarray
    spacing_mm: Spacing
    known: bool
    faults: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a header says.

    Attributes:
        header: of the image that comes of the file.
        place: where it is.
        dtype, values: what type of values the file has, and how many.
        slope, intercept: values of the file times slope plus intercept are the image's.
        block: the header's bytes.
        offset: where it says that the voxels begin.
        compressed: whether the file is packed with gzip.
    """

    header: Header
    place: Place
    dtype: np.dtype[Any]
    values: int
    slope: float
    intercept: float
    block: bytes
    offset: float
    compressed: bool

    @property
    def extra(self) -> dict[str, Any]:
        """What `write_nifti` needs to give back the same kind of file."""
        return {"header": self.block, "compressed": self.compressed}


def is_nifti(head: bytes) -> bool:
    """Whether a file that begins (unpacked) with `head`, 348 bytes or more, is a NIfTI file."""
    return head[344:348] in (b"n+1\0", _PAIR_MAGICS[0]) or head[4:8] in (b"n+2\0", _PAIR_MAGICS[1])


def probe_nifti(path: Path) -> Header:
    """What `read_nifti` will give, from the first 540 bytes of the file."""
    with decoding(path, "NIfTI"), _opened(path) as file:
        return _describe(path, _read_header(path, file)).header


def inspect_nifti(path: Path, limits: Limits) -> Found:
    """What a file's header says, before a voxel is decoded; warns of what had to be assumed.

    Raises:
        DataError: as `read_nifti`, but for damage behind the header.
    """
    with decoding(path, "NIfTI"), _opened(path) as file:
        found = _describe(path, _read_header(path, file))
    limits.check(path, found.header)
    for fault in found.place.faults:
        warnings.warn(f"{path}: {fault}", DataWarning, stacklevel=3)
    return found


def decode_nifti(path: Path, found: Found) -> np.ndarray:
    """All voxels (C, Z, Y, X) of a file with that header.

    Raises:
        DataError: damaged or cut off.
    """
    with decoding(path, "NIfTI"), _opened(path) as file:
        file.seek(data_offset(path, found))
        values = _read_values(path, file, found.dtype, found.values)
        return scaled(_channels_first(values, found.header.shape_vox), found)


def read_nifti(path: Path, limits: Limits) -> Image:
    """A volume (C, Z, Y, X) in the file's type, or float32 where the file scales its values.

    The affine is the one nibabel chooses: sform, else qform, else voxel sizes alone; in mm, whatever unit the
    file has. A picture of two axes has Z = 1, so that it keeps its place in the world. Axes 4 and 5 become
    channels, one of them at most longer than 1. RGB values give 3 channels; alpha is dropped.
    `extra["header"]` keeps the header's bytes for `write_nifti`; header extensions are not kept.

    Raises:
        DataError: damaged, complex-valued, without a usable affine, or beyond `limits`.
    """
    found = inspect_nifti(path, limits)
    return Image(
        array=decode_nifti(path, found),
        spacing_mm=found.place.spacing_mm,
        affine=found.place.affine,
        axes="CZYX",
        path=path,
        format="nifti",
        spacing_known=found.place.known,
        extra=found.extra,
    )


def data_offset(path: Path, found: Found) -> int:
    """Where the first voxel begins, in the file unpacked."""
    # The standard lets 0 stand for right behind the header and its 4 bytes of flags.
    first, offset = len(found.block) + 4, found.offset
    if not (offset == 0 or first - 4 <= offset <= _MAX_OFFSET):
        raise DataError(path, expected=f"vox_offset from {first} to {_MAX_OFFSET}", got=f"{offset:g}", do="export it again", code="D011")
    return int(offset) or first


def scaled(array: np.ndarray, found: Found) -> np.ndarray:
    """Values times slope plus intercept, in the type that the header promised."""
    if (found.slope, found.intercept) != (1.0, 0.0) and not found.dtype.names:
        # Single precision holds every value of 16 bits; wider ones are rounded once, at the end.
        work = np.float32 if array.dtype.itemsize <= 2 else np.float64
        array = array.astype(work)
        array *= work(found.slope)
        array += work(found.intercept)
    return native(array.astype(found.header.dtype, copy=False))


def write_nifti(path: Path, image: Image) -> None:
    """Write an image as single-file NIfTI, packed where the name ends in `.gz`, in one step.

    An image that was read from NIfTI gets its header back: units, codes, qform and sform stay as they were
    where they still describe `image.affine`, and a picture or a volume keeps its number of axes.
    """
    array = _storable(image.array if image.array.ndim == 4 else image.array[:, None])
    with decoding(path, "NIfTI"):
        header = _header_for(image, array)
    start = header.binaryblock + b"\0" * (int(header["vox_offset"]) - len(header.binaryblock))
    with atomic_path(path) as part, part.open("wb") as raw:
        if path.name.lower().endswith(".gz"):
            # No name and no time inside: the same labels give the same bytes. Level 1 as nibabel's.
            with gzip.GzipFile("", "wb", 1, raw, 0) as packed:
                _write_all(packed, start, array)
        else:
            _write_all(raw, start, array)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


def _opened(path: Path) -> _Unpacked:
    """The file unpacked, by its content: `.nii` files that are packed are common."""
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")


def _read_header(path: Path, file: _Unpacked) -> Any:
    """The header as nibabel's object, in the file's byte order; not nibabel's checks, which log and mend in silence."""
    block = file.read(NIFTI2_BYTES)
    if block[344:348] == _PAIR_MAGICS[0] or block[4:8] == _PAIR_MAGICS[1]:
        raise DataError(path, expected="a single NIfTI file", got="half of a .hdr/.img pair", do="convert the pair to .nii.gz", code="D012")
    return _parse_header(block)


def _parse_header(block: bytes) -> Any:
    """NIfTI-1 or NIfTI-2 by the magic words."""
    if block[4:8] == b"n+2\0":
        return _new_header(2, block[:NIFTI2_BYTES])
    return _new_header(1, block[:NIFTI1_BYTES])


def _new_header(version: int, block: bytes | None = None) -> Any:
    """The header of a NIfTI version as nibabel's object, made from its bytes, or empty."""
    # Late, because a picture needs none of it and it takes a tenth of a second.
    import nibabel

    kind: Any = nibabel.Nifti2Header if version == 2 else nibabel.Nifti1Header
    return kind(block, check=False)


def _describe(path: Path, nifti: Any) -> Found:
    """Shape, type, scale and place of what a header describes."""
    file_shape = tuple(int(n) for n in nifti.get_data_shape())
    if not 1 <= len(file_shape) <= 7 or min(file_shape) < 1:
        raise DataError(path, expected="1 to 7 axes of at least one voxel", got=f"shape {file_shape}", do="export it again", code="D009")
    if sum(n > 1 for n in file_shape[3:]) > 1:
        got = f"shape {file_shape}, both time points and channels"
        raise DataError(path, expected="one axis beside X, Y, Z", got=got, do="save one time point a file", code="D009")
    dtype, place = nifti.get_data_dtype(), _place(path, nifti)
    slope, intercept = nifti.get_slope_inter()
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    header = Header(
        shape_vox=(*file_shape[:3], 1, 1)[:3][::-1],
        channels=math.prod(file_shape[3:]) * (3 if dtype.names else 1),
        dtype=_result_type(path, dtype, scaled=(slope, intercept) != (1.0, 0.0)).name,
        spacing_mm=place.spacing_mm,
        spacing_known=place.known,
        format="nifti",
        affine=place.affine,
    )
    return Found(
        header=header,
        place=place,
        dtype=dtype,
        values=math.prod(file_shape),
        slope=slope,
        intercept=intercept,
        block=bytes(nifti.binaryblock),
        offset=float(nifti["vox_offset"]),
        compressed=_is_gzip(path),
    )


def _result_type(path: Path, dtype: np.dtype[Any], *, scaled: bool) -> np.dtype[Any]:
    """The type of `Image.array` for a file's type."""
    if dtype.names:
        return np.dtype(np.uint8)
    if dtype.kind not in "iuf":
        raise DataError(
            path, expected="real numbers or RGB", got=f"{dtype.name} values", do="save the magnitude, or real part", code="D008"
        )
    if scaled:
        return np.dtype(np.float32)
    return np.dtype(np.float64) if dtype.itemsize > 8 else dtype.newbyteorder("=")


def _place(path: Path, nifti: Any) -> Place:
    """The best affine of a header, in mm and for the order Z, Y, X.

    Raises:
        DataError: the affine or the voxel sizes are not finite.
    """
    sound, missing = _with_sound_pixdim(path, nifti)
    turned = [f"voxel size {size:g} along {axis} is taken without its sign" for axis, size in _sizes(nifti) if size < 0]
    affine, unusable = sound.get_base_affine(), []
    for name, read in (("sform", sound.get_sform), ("qform", sound.get_qform)):
        if int(nifti[f"{name}_code"]) == 0:
            continue
        candidate = read()
        if not np.isfinite(candidate).all():
            raise DataError(
                path, expected=f"a finite {name}", got="NaN or infinity in it", do="export it again, or set its affine", code="D010"
            )
        if np.linalg.matrix_rank(candidate[:3, :3]) == 3:
            # The sform does not need the voxel sizes that are missing.
            affine, missing, turned = (candidate, missing, turned) if name == "qform" else (candidate, [], [])
            break
        unusable.append(f"its {name} puts all voxels into a plane and is not used")
    affine = np.array(affine, float)[:, [2, 1, 0, 3]]
    affine[:3] *= _mm_per_unit(nifti)
    spacing = spacing_of(affine)
    # Numbers may be so small or large that their squares are 0 or infinite.
    if not all(0 < size < math.inf for size in spacing):
        raise DataError(path, expected="finite voxel sizes above 0", got=f"{spacing} mm", do=_SET_SPACING, code="D010")
    return Place(affine=affine, spacing_mm=spacing, known=not missing, faults=(*unusable, *missing, *turned))


def _sizes(nifti: Any) -> list[tuple[str, float]]:
    """The voxel size along each axis that the file has, as it stands there."""
    return list(zip("XYZ"[: max(0, int(nifti["dim"][0]))], map(float, nifti["pixdim"][1:4]), strict=False))


def _mm_per_unit(nifti: Any) -> float:
    """The file's unit of length in mm; mm where it names none."""
    return _MM_PER_UNIT.get(int(nifti["xyzt_units"]) % 8, 1.0)


def _with_sound_pixdim(path: Path, nifti: Any) -> tuple[Any, list[str]]:
    """A copy of the header whose voxel sizes are above 0, and what had to be assumed for that."""
    sound, sizes = nifti.copy(), np.abs(nifti["pixdim"][1:4])
    if not np.isfinite(sizes).all():
        raise DataError(path, expected="finite voxel sizes", got=f"pixdim {sizes.tolist()}", do=_SET_SPACING, code="D010")
    sound["pixdim"][1:4] = np.where(sizes == 0, 1, sizes)
    sound["pixdim"][0] = -1 if nifti["pixdim"][0] == -1 else 1
    # Axes that the file does not have need no voxel size.
    real = [axis for axis, size in _sizes(nifti) if size == 0]
    return sound, [f"voxel size 0 along {', '.join(real)}; a size of 1 is assumed"] if real else []


def _read_values(path: Path, file: _Unpacked, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """`count` values from here on, flat, in the file's byte order."""
    wanted = count * dtype.itemsize
    if not isinstance(file, gzip.GzipFile) and (left := path.stat().st_size - file.tell()) < wanted:
        raise _cut_off(path, wanted, left)
    raw = np.empty(wanted, np.uint8)
    done = 0
    while done < wanted:
        step = file.readinto(raw.data[done : done + _CHUNK_BYTES])
        if not step:
            raise _cut_off(path, wanted, done)
        done += step
    # One byte more: at the end of the file this makes gzip compare its checksum.
    file.read(1)
    return raw.view(dtype)


def _cut_off(path: Path, wanted: int, got: int) -> DataError:
    return DataError(
        path, expected=f"{wanted} bytes of voxels", got=f"only {got}: it was cut off", do="copy or download it again", code="D002"
    )


def _channels_first(values: np.ndarray, shape_vox: Shape) -> np.ndarray:
    """Flat values as (C, Z, Y, X); RGB records as three channels, alpha dropped."""
    if values.dtype.names is None:
        return values.reshape(-1, *shape_vox)
    records = values.view(np.uint8).reshape(-1, *shape_vox, len(values.dtype.names))[..., :3]
    return np.moveaxis(records, -1, 1).reshape(-1, *shape_vox)


def _storable(array: np.ndarray) -> np.ndarray:
    """The array in a little-endian type that NIfTI knows."""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _header_for(image: Image, array: np.ndarray) -> Any:
    """The header of the image's file, or a new one, made to describe `array` (C, Z, Y, X) at `image.affine`."""
    original = image.extra.get("header")
    # NIfTI-1 counts voxels along an axis in 16 bits.
    fresh = 1 if max(array.shape) < 2**15 else 2
    header = (_parse_header(original) if original else _new_header(fresh)).as_byteswapped("<")
    pixdim = header["pixdim"].copy()
    if not original:
        header.set_xyzt_units("mm")
    old_shape = header.get_data_shape() if original else ()
    header.set_data_shape(_file_shape(old_shape, array.shape[:0:-1], array.shape[0]))
    header["pixdim"][:] = pixdim
    header.set_data_dtype(array.dtype)
    header["vox_offset"] = len(header.binaryblock) + 4
    for name, value in (("scl_slope", 1), ("scl_inter", 0), ("cal_max", 0), ("cal_min", 0), ("intent_code", 0)):
        header[name] = value
    affine = world_affine(image)
    if not original or not same_grid(_place(image.path, header).affine, affine, array.shape[1:], _SAME_PLACE_VOX):
        _set_affine(header, affine)
    return header


def _file_shape(old: Shape, xyz: Shape, channels: int) -> Shape:
    """The file's shape: with the axes of length 1 that the old one had, or had not, where it holds as many voxels."""
    if channels == 1 and (*old, 1, 1)[:3] == xyz and math.prod(old[3:]) == 1:
        return old
    return xyz if channels == 1 else (*xyz, channels)


def world_affine(image: Image) -> np.ndarray:
    """(z, y, x) -> (x, y, z) in mm, (4, 4). A picture becomes one section, 1 mm thick."""
    affine = np.eye(4)
    affine[-len(image.affine) :, -len(image.affine) :] = image.affine
    # What comes from formats without a patient has its millimetres in the order of the axes, Z first.
    return affine if image.format in PATIENT_FORMATS and len(image.affine) == 4 else affine[[2, 1, 0, 3]]


def _set_affine(header: Any, affine: np.ndarray) -> None:
    """Write an affine (z, y, x) -> mm into both forms, in the unit of the header."""
    world = affine[:, [2, 1, 0, 3]].copy()
    world[:3] /= _mm_per_unit(header)
    header.set_qform(world, code=int(header["qform_code"]) or 1)
    header.set_sform(world, code=int(header["sform_code"]) or 1)


def _write_all(file: Any, start: bytes, array: np.ndarray) -> None:
    """The header, then the voxels in pieces, so that packing needs no second copy of them."""
    file.write(start)
    flat = array.reshape(-1).view(np.uint8).data
    for first in range(0, len(flat), _CHUNK_BYTES):
        file.write(flat[first : first + _CHUNK_BYTES])
