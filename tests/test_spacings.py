"""Voxel sizes that cannot be: each reader refuses them or warns, and names the file; none takes them in silence."""

import json
import math
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import tifffile

from microtome.errors import DataError, DataWarning
from microtome.images.files import read_image
from tests.dicom_series import series

ARRAY = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
BAD = (0.0, -2.0, math.nan, math.inf)
# By one of these words it is seen that the size is what is said; JSON has no NaN and no infinity, of which its reader says no more.
ABOUT_SIZES = re.compile("size|spacing|sides|scale|pixdim|thickness|distance of sections|Invalid JSON")


def nifti(path: Path, size: float, qform: int = 0) -> None:
    """With one size in pixdim, and at most a qform to use it."""
    nib.save(nib.Nifti1Image(ARRAY.T, None), path)
    content = bytearray(path.read_bytes())
    content[80:84] = struct.pack("<f", size)
    content[252:256] = struct.pack("<2h", qform, 0)
    path.write_bytes(content)


def nifti_qform(path: Path, size: float) -> None:
    nifti(path, size, qform=1)


def imagej(path: Path, size: float) -> None:
    tifffile.imwrite(path, ARRAY, imagej=True, resolution=(10, 10), metadata={"unit": "um", "spacing": size, "axes": "ZYX"})


def tags(path: Path, size: float) -> None:
    """A resolution tag whose fraction has a 0 above or below; fractions hold no signs."""
    tifffile.imwrite(path, ARRAY[0], resolution=(1000, 1000), resolutionunit="CENTIMETER")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["XResolution"].overwrite((1, 0) if size == 0 else (0, 1))


def ome(path: Path, size: float, axes: str = "X") -> None:
    tifffile.imwrite(path, ARRAY, ome=True, metadata={"axes": "ZYX"} | {f"PhysicalSize{axis}": 2.0 for axis in "XYZ"})
    content = path.read_bytes()
    for axis in axes:
        # As long as what stood there: everything behind it is found by its place.
        before, after = (f'PhysicalSize{axis}="{number}"'.encode() for number in ("2.0", str(size)[:3]))
        assert (before in content, len(after)) == (True, len(before))
        content = content.replace(before, after)
    path.write_bytes(content)


def ome_everywhere(path: Path, size: float) -> None:
    ome(path, size, "XYZ")


def hdf5(path: Path, size: float) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("raw", data=ARRAY).attrs["element_size_um"] = [1, size, 1]


def nrrd(path: Path, size: float, more: str = "") -> None:
    text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 5 4 3\nspacings: {size} 1 1\n{more}encoding: raw\n\n"
    path.write_bytes(text.encode() + ARRAY.tobytes())


def nrrd_of_no_kinds(path: Path, size: float) -> None:
    nrrd(path, size, "kinds: none none none\n")


def nrrd_of_unknown_kinds(path: Path, size: float) -> None:
    nrrd(path, size, "kinds: ??? ??? ???\n")


def nrrd_of_one_unknown_kind(path: Path, size: float) -> None:
    nrrd(path, size, "kinds: ??? domain domain\n")


def metaimage(path: Path, size: float) -> None:
    text = f"NDims = 3\nDimSize = 5 4 3\nElementSpacing = {size} 1 1\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    path.write_bytes(text.encode() + ARRAY.tobytes())


def dicom_pixels(path: Path, size: float) -> None:
    series(path, PixelSpacing=[str(size), "1"] if math.isfinite(size) else ["1e400", "1"])


def dicom_thickness(path: Path, size: float) -> None:
    """Of a single slice, of which nothing else says how thick it is."""
    series(path, np.arange(20, dtype=np.int16).reshape(1, 4, 5), names=[0], SliceThickness=str(size) if math.isfinite(size) else "1e400")


def ome_zarr(path: Path, size: float) -> None:
    scale = {"type": "scale", "scale": [1, size, 1]}
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    image = {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
    array = {"zarr_format": 2, "shape": [3, 4, 5], "chunks": [3, 4, 5], "dtype": "|u1", "order": "C"}
    (path / "0").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    (path / ".zattrs").write_text(json.dumps({"multiscales": [image]}))
    (path / "0" / ".zarray").write_text(json.dumps(array | {"compressor": None, "filters": None, "fill_value": 0}))


def n5(path: Path, size: float) -> None:
    path.mkdir()
    shape = {"dimensions": [5, 4, 3], "blockSize": [5, 4, 3], "dataType": "uint8", "compression": {"type": "raw"}}
    (path / "attributes.json").write_text(json.dumps({"n5": "2.0.0", **shape, "resolution": [1, size, 1], "units": ["um"] * 3}))


def precomputed(path: Path, size: float) -> None:
    path.mkdir()
    scale = {"key": "0", "size": [5, 4, 3], "resolution": [8, size, 8], "chunk_sizes": [[5, 4, 3]], "encoding": "raw"}
    kind = {"@type": "neuroglancer_multiscale_volume", "type": "image", "data_type": "uint8", "num_channels": 1}
    (path / "info").write_text(json.dumps(kind | {"scales": [scale | {"voxel_offset": [0, 0, 0]}]}))


MAKERS: dict[Callable[[Path, float], None], str] = {
    nifti: "a.nii",
    nifti_qform: "a.nii",
    imagej: "a.tif",
    tags: "a.tif",
    ome: "a.ome.tif",
    ome_everywhere: "a.ome.tif",
    hdf5: "a.h5",
    nrrd: "a.nrrd",
    nrrd_of_no_kinds: "a.nrrd",
    nrrd_of_unknown_kinds: "a.nrrd",
    nrrd_of_one_unknown_kind: "a.nrrd",
    metaimage: "a.mha",
    dicom_pixels: "a",
    dicom_thickness: "a",
    ome_zarr: "a.ome.zarr",
    n5: "a.n5",
    precomputed: "a.precomputed",
}


@pytest.mark.parametrize("size", BAD)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_voxel_size_that_cannot_be_is_refused_or_a_warning_with_the_name_of_the_file(
    make: Callable[[Path, float], None], size: float, tmp_path: Path
) -> None:
    path = tmp_path / MAKERS[make]
    with warnings.catch_warnings():
        # Of what writes such a file.
        warnings.simplefilter("ignore")
        make(path, size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            said, sides = [], read_image(path).spacing_mm
        except DataError as error:
            said, sides = [error.line], ()
    said += [str(each.message) for each in caught]
    assert [line for line in said if line.startswith(str(path)) and ABOUT_SIZES.search(line.removeprefix(str(path)))] != []
    assert all(0 < side < math.inf for side in sides)


@pytest.mark.parametrize(("kinds", "first"), [("vector domain domain", "nan"), ("RGB-color space space", "-2")])
def test_an_axis_of_channels_of_a_nrrd_has_no_voxel_size(tmp_path: Path, kinds: str, first: str) -> None:
    text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 3 5 4\nkinds: {kinds}\nspacings: {first} 2 3\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(text.encode() + ARRAY.tobytes())
    assert read_image(tmp_path / "a.nrrd").spacing_mm[-2:] == (3.0, 2.0)


@pytest.mark.parametrize(("unit", "said"), [({}, []), ({"unit": "um"}, ["its voxel size along Z, nan mm, cannot be and is not used"])])
def test_a_distance_of_imagej_that_is_no_number_matters_where_it_has_a_unit(tmp_path: Path, unit: dict[str, str], said: list[str]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, ARRAY, imagej=True, resolution=(10, 10), metadata={**unit, "spacing": "abc", "axes": "ZYX"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        assert read_image(path).array.shape == (1, *ARRAY.shape)
    assert [str(each.message) for each in caught][: len(said)] == [f"{path}: {words}" for words in said]
    assert len(caught) >= len(said)
