"""NIfTI against nibabel, which is the independent reader and writer here."""

import dataclasses
import gzip
import time
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError, DataWarning
from microtome.geometry import affine_from_spacing
from microtome.images.files import open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.image import Image, Limits

MM = {"mm": 1.0, "micron": 1e-3, "meter": 1e3, "unknown": 1.0}


@st.composite
def nifti_files(draw):
    """A nibabel image with random axes, type, scale, units, byte order and oblique place; and its suffix."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(5, 4, 3), (5, 4), (5, 4, 1), (1, 4, 3), (5, 4, 3, 1), (5, 4, 3, 2), (5, 4, 1, 3), (5, 4, 3, 1, 2)]))
    dtype = draw(st.sampled_from(["u1", "i2", "u2", "i4", "f4", "f8", "i1", "i8"]))
    data = rng.integers(0, 100, shape).astype(dtype)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    sizes = 10.0 ** rng.uniform(-2, 1, 3)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * sizes, rng.normal(size=3) * 100
    kind = draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    header = kind.header_class(endianness=draw(st.sampled_from("<>")))
    image = kind(data, None, header, dtype=dtype)
    image.header.set_data_shape(shape)
    image.header.set_zooms((*sizes, 1, 1)[: len(shape)])
    image.set_qform(affine, code=draw(st.sampled_from([0, 1, 3])))
    image.header.set_sform(affine, code=draw(st.sampled_from([0, 2, 4])))
    image.header.set_xyzt_units(draw(st.sampled_from(list(MM))), "sec")
    if draw(st.booleans()):
        image.header.set_slope_inter(0.25, -7)
    return image, draw(st.sampled_from([".nii", ".nii.gz"]))


def save_raw(image, path):
    """Write a nibabel image with exactly its header (nibabel itself resets the scale when it saves)."""
    header = image.header.copy()
    header["vox_offset"] = len(header.binaryblock) + 4
    data = np.asarray(image.dataobj).astype(header.get_data_dtype())
    content = header.binaryblock + bytes(4) + data.tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def nibabel_channels_first(path):
    """What nibabel reads, as (C, Z, Y, X)."""
    data = nib.load(path).get_fdata()
    return data.reshape(*(*data.shape, 1, 1)[:3], -1, order="F").transpose(3, 2, 1, 0)


@settings(max_examples=60, deadline=None)
@given(nifti_files())
def test_array_and_place_of_a_nifti_are_those_that_nibabel_reads(tmp_path_factory, file):
    nifti, suffix = file
    path = tmp_path_factory.mktemp("n") / f"a{suffix}"
    save_raw(nifti, path)
    image, reference = read_image(path), nib.load(path)
    np.testing.assert_allclose(image.array, nibabel_channels_first(path), rtol=1e-6)
    unit = MM[reference.header.get_xyzt_units()[0]]
    for x, y, z in ((0, 0, 0), (4, 1, 0), (2, 3, 2)):
        expected = (reference.affine @ (x, y, z, 1))[:3] * unit
        np.testing.assert_allclose((image.affine @ (z, y, x, 1))[:3], expected, rtol=1e-12)
    zooms = np.array([*reference.header.get_zooms()[:3], 1.0])[:3] * unit
    if reference.ndim > 2:
        np.testing.assert_allclose(image.spacing_mm[::-1], zooms, rtol=1e-5)
    assert image.array.dtype.isnative
    assert image.array.flags.writeable


@settings(max_examples=60, deadline=None)
@given(nifti_files())
def test_labels_come_back_with_the_shape_affine_and_codes_of_their_image(tmp_path_factory, file):
    nifti, suffix = file
    folder = tmp_path_factory.mktemp("n")
    save_raw(nifti, folder / f"a{suffix}")
    image = read_image(folder / f"a{suffix}")
    labels = np.arange(np.prod(image.shape_vox)).reshape(image.shape_vox) * 7
    write_labels(folder / f"b{suffix}", labels, image)
    before, after = nib.load(folder / f"a{suffix}"), nib.load(folder / f"b{suffix}")
    assert after.shape == (before.shape if image.channels == 1 else before.shape[:3])
    np.testing.assert_array_equal(np.asanyarray(after.dataobj).ravel(order="F"), labels.ravel())
    assert after.get_data_dtype() == ("uint8" if labels.max() < 256 else "uint16")
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(after.header.get_qform(), before.header.get_qform())
    np.testing.assert_array_equal(after.header.get_sform(), before.header.get_sform())
    for name in ("qform_code", "sform_code", "xyzt_units", "descrip"):
        assert after.header[name] == before.header[name]
    assert (after.dataobj.slope, after.dataobj.inter) == (1, 0)
    again = read_image(folder / f"b{suffix}")
    np.testing.assert_array_equal(again.affine, image.affine)
    assert again.shape_vox == image.shape_vox


@settings(max_examples=40, deadline=None)
@given(nifti_files())
def test_the_header_alone_foretells_what_is_read(tmp_path_factory, file):
    nifti, suffix = file
    path = tmp_path_factory.mktemp("n") / f"a{suffix}"
    save_raw(nifti, path)
    header, image = probe_image(path), read_image(path)
    assert header.shape_vox == image.shape_vox
    assert header.channels == image.channels
    assert header.dtype == image.array.dtype.name
    assert (header.spacing_mm, header.spacing_known, header.format) == (image.spacing_mm, image.spacing_known, "nifti")
    np.testing.assert_array_equal(header.affine, image.affine)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_an_image_of_probabilities_keeps_values_and_oblique_place(tmp_path, suffix):
    rng = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * (0.5, 2, 3)
    nib.Nifti1Image(np.zeros((5, 4, 3), "i2"), affine).to_filename(tmp_path / "a.nii")
    like = read_image(tmp_path / "a.nii")
    probabilities = rng.random((2, 3, 4, 5), dtype=np.float32)
    write_image(tmp_path / f"p{suffix}", dataclasses.replace(like, array=probabilities))
    again = read_image(tmp_path / f"p{suffix}")
    np.testing.assert_array_equal(again.array, probabilities)
    np.testing.assert_array_equal(again.affine, like.affine)
    assert nib.load(tmp_path / f"p{suffix}").shape == (5, 4, 3, 2)


def test_a_moved_affine_is_what_is_written(tmp_path):
    nib.Nifti1Image(np.zeros((5, 4, 3), "u1"), np.diag([1, 2, 3, 1])).to_filename(tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    # The second and third section of the volume: Z starts 3 mm higher.
    affine = image.affine.copy()
    affine[:3, 3] = (image.affine @ (1, 0, 0, 1))[:3]
    write_image(tmp_path / "b.nii", dataclasses.replace(image, array=image.array[:, 1:], affine=affine))
    written = nib.load(tmp_path / "b.nii")
    assert written.shape == (5, 4, 2)
    np.testing.assert_allclose(written.affine, [[1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 3], [0, 0, 0, 1]])
    np.testing.assert_allclose(read_image(tmp_path / "b.nii").affine, affine)


def test_a_volume_from_another_format_gets_an_axis_aligned_header_in_mm(tmp_path):
    image = Image(
        array=np.zeros((1, 3, 4, 5), np.uint8),
        spacing_mm=(3.0, 2.0, 0.5),
        affine=affine_from_spacing((3.0, 2.0, 0.5)),
        axes="CZYX",
        path=Path("stack.tif"),
        format="tiff",
    )
    write_image(tmp_path / "b.nii.gz", image)
    written = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_allclose(written.affine, np.diag([0.5, 2, 3, 1]))
    assert written.header.get_xyzt_units()[0] == "mm"
    assert read_image(tmp_path / "b.nii.gz").spacing_mm == (3.0, 2.0, 0.5)


def test_a_picture_becomes_one_section_of_a_nifti(tmp_path):
    image = Image(
        array=np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
        spacing_mm=(2.0, 0.5),
        affine=affine_from_spacing((2.0, 0.5)),
        axes="CYX",
        path=Path("a.png"),
        format="png",
    )
    write_image(tmp_path / "b.nii", image)
    again = read_image(tmp_path / "b.nii")
    np.testing.assert_array_equal(again.array[:, 0], image.array)
    assert again.spacing_mm == (1.0, 2.0, 0.5)


def test_negative_labels_are_signed_and_large_ones_wide(tmp_path):
    nib.Nifti1Image(np.zeros((2, 2, 1), "u1"), np.eye(4)).to_filename(tmp_path / "a.nii")
    like = read_image(tmp_path / "a.nii")
    for low, high, dtype in ((-1, 2, "int16"), (0, 70_000, "uint32"), (-1, 40_000, "int32"), (0, 2**40, "uint64")):
        labels = np.array([[[low, high], [0, 0]]])
        write_labels(tmp_path / "b.nii", labels, like)
        again = read_image(tmp_path / "b.nii").array[0]
        assert again.dtype == dtype
        np.testing.assert_array_equal(again, labels)


def test_the_same_labels_give_the_same_bytes(tmp_path):
    nib.Nifti1Image(np.zeros((2, 2, 1), "u1"), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    like = read_image(tmp_path / "a.nii.gz")
    for name in ("b.nii.gz", "c.nii.gz"):
        write_labels(tmp_path / name, np.ones((1, 2, 2), int), like)
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()


def test_a_side_that_nifti_1_cannot_count_makes_a_nifti_2(tmp_path):
    image = Image(
        array=np.ones((1, 1, 1, 40_000), np.uint8), spacing_mm=(1.0,) * 3, affine=np.eye(4), axes="CZYX", path=Path("a"), format="zarr"
    )
    write_image(tmp_path / "a.nii", image)
    assert isinstance(nib.load(tmp_path / "a.nii"), nib.Nifti2Image)
    assert read_image(tmp_path / "a.nii").shape_vox == (1, 1, 40_000)


def test_colour_records_give_three_channels(tmp_path):
    rgba = np.zeros((2, 1, 1), [(name, "u1") for name in "RGBA"])
    rgba[1, 0, 0] = (1, 2, 3, 255)
    nib.Nifti1Image(rgba, np.eye(4)).to_filename(tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    assert image.array[:, 0, 0].tolist() == [[0, 1], [0, 2], [0, 3]]
    assert probe_image(tmp_path / "a.nii").channels == 3


def test_complex_values_are_refused(tmp_path):
    nib.Nifti1Image(np.zeros((2, 2, 2), "c8"), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a\.nii.*complex64.*magnitude"):
        read_image(tmp_path / "a.nii")


def test_time_points_with_channels_are_refused(tmp_path):
    nib.Nifti1Image(np.zeros((2, 2, 2, 3, 4), "u1"), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a\.nii.*time points.*one time point a file"):
        read_image(tmp_path / "a.nii")


def header_with(folder, shape=(3, 3, 3), **fields):
    """A NIfTI file of zeros whose header fields are set by hand."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype("u1")
    header["vox_offset"], header["magic"] = 352, b"n+1"
    for name, value in fields.items():
        header[name] = value
    path = folder / "case_07.nii"
    path.write_bytes(header.binaryblock + bytes(4 + int(np.prod(shape))))
    return path


def test_a_voxel_size_of_zero_is_assumed_to_be_one_with_a_warning(tmp_path):
    path = header_with(tmp_path, pixdim=[1, 0.5, 0, 2, 0, 0, 0, 0])
    with pytest.warns(DataWarning, match=r"case_07\.nii: voxel size 0 along Y"):
        image = read_image(path)
    assert (image.spacing_mm, image.spacing_known) == ((2.0, 1.0, 0.5), False)
    write_labels(tmp_path / "b.nii", np.zeros((3, 3, 3), int), image)
    assert nib.Nifti1Header((tmp_path / "b.nii").read_bytes()[:348], check=False)["pixdim"][2] == 0


def test_a_flat_sform_falls_back_to_the_qform_with_a_warning(tmp_path):
    path = header_with(tmp_path, sform_code=1, qform_code=1, pixdim=[1, 0.5, 0.5, 2, 0, 0, 0, 0], qoffset_x=9)
    with pytest.warns(DataWarning, match=r"case_07\.nii: its sform puts all voxels into a plane"):
        image = read_image(path)
    np.testing.assert_allclose(image.affine, [[0, 0, 0.5, 9], [0, 0.5, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]])
    assert image.spacing_known


def test_a_sound_sform_needs_no_voxel_sizes_and_no_sound_qform(tmp_path):
    path = header_with(
        tmp_path,
        sform_code=1,
        qform_code=1,
        quatern_b=5,  # no rotation has such a quaternion
        pixdim=[0, 0, 0, 0, 0, 0, 0, 0],
        srow_x=[2, 0, 0, 0],
        srow_y=[0, 3, 0, 0],
        srow_z=[0, 0, 4, 0],
    )
    image = read_image(path)
    assert (image.spacing_mm, image.spacing_known) == ((4.0, 3.0, 2.0), True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sform_code": 1, "srow_x": [np.nan, 0, 0, 0]}, "a finite sform"),
        ({"pixdim": [1, np.inf, 1, 1, 0, 0, 0, 0]}, "finite voxel sizes"),
        ({"qform_code": 1, "quatern_b": 5}, "a whole NIfTI file"),
        ({"vox_offset": 1e30}, "vox_offset from 352"),
        ({"vox_offset": np.nan}, "vox_offset from 352"),
        ({"datatype": 77}, "a whole NIfTI file"),
        ({"dim": [3, -3, 3, 3, 1, 1, 1, 1]}, "at least one voxel"),
        ({"dim": [3, 3, 3, 4, 1, 1, 1, 1]}, "36 bytes of voxels, got only 27"),
    ],
)
def test_a_header_that_cannot_be_is_an_error_with_the_files_name(tmp_path, fields, message):
    path = header_with(tmp_path, **fields)
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"sform_code": 1, "srow_x": [np.nan, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0]},
        {"sform_code": 1, "srow_x": [1, 0, 0, 0], "srow_y": [0, np.inf, 0, 0], "srow_z": [0, 0, 1, 0]},
        {"sform_code": 1, "srow_x": [1, 0, 0, -np.inf], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0]},
        {"qform_code": 1, "quatern_b": np.nan},
        {"qform_code": 1, "qoffset_z": np.inf},
        {"pixdim": [1, 1, np.nan, 1, 0, 0, 0, 0]},
        {"pixdim": [1, 1, 1, -np.inf, 0, 0, 0, 0]},
    ],
)
def test_a_place_that_is_not_finite_is_refused_by_each_way_to_look_at_the_file(tmp_path, fields, packed):
    path = header_with(tmp_path, **fields)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    for read in (probe_image, open_volume, read_image):
        with pytest.raises(DataError, match=r"case_07\.nii: expected (a finite [sq]form|finite voxel sizes)") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [True, False])
def test_a_claim_of_a_million_million_voxels_is_refused_before_memory_is_taken(tmp_path, packed):
    path = header_with(tmp_path, dim=[3, 10_000, 10_000, 10_000, 1, 1, 1, 1])
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(DataError, match=r"case_07\.nii: expected at most 8589934592 values.*10000×10000×10000"):
        read_image(path)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert seconds < 2


def test_a_tiny_packed_file_that_claims_a_gigabyte_is_refused(tmp_path):
    path = header_with(tmp_path, dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="max_expansion"):
        read_image(path)


def test_limits_hold_for_channels_and_sides(tmp_path):
    path = header_with(tmp_path, shape=(5, 1, 1, 4))
    with pytest.raises(DataError, match="max_side"):
        read_image(path, limits=Limits(max_side=4))
    with pytest.raises(DataError, match="max_channels"):
        read_image(path, limits=Limits(max_channels=3))
    assert read_image(path, limits=Limits(max_side=5, max_channels=4)).channels == 4


@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_that_was_cut_off_is_an_error_with_its_name(tmp_path, suffix, share):
    data = np.random.default_rng(0).integers(0, 255, (9, 9, 9)).astype("u1")
    nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"b\.nii"):
        read_image(tmp_path / f"b{suffix}")


def test_a_wrong_checksum_is_an_error(tmp_path):
    nib.Nifti1Image(np.zeros((3, 3, 3), "u1"), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    whole = bytearray((tmp_path / "a.nii.gz").read_bytes())
    whole[-6] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(whole)
    with pytest.raises(DataError, match="CRC"):
        read_image(tmp_path / "a.nii.gz")


def test_half_of_a_pair_is_refused_by_name(tmp_path):
    path = header_with(tmp_path, magic=b"ni1")
    with pytest.raises(DataError, match=r"half of a \.hdr/\.img pair"):
        read_image(path)


def test_a_packed_file_named_nii_is_read_and_written_as_it_is_named(tmp_path):
    nib.Nifti1Image(np.ones((3, 3, 3), "u1"), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").array.sum() == 27


def test_the_hippocampus_volumes_are_read_in_their_own_type_within_seconds(data_folder):
    images = sorted(data_folder("hippocampus").glob("images/*.nii.gz"))
    begin = time.perf_counter()
    dtypes = {read_image(path).array.dtype.name for path in images}
    assert dtypes == {"float32", "uint8"}
    assert time.perf_counter() - begin < 8


def test_hippocampus_images_and_labels_share_grid_with_nibabel(data_folder, tmp_path):
    folder = data_folder("hippocampus")
    for path in sorted(folder.glob("labels/*.nii.gz"))[:20]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image, label = read_image(folder / "images" / path.name), read_image(path)
        assert image.shape_vox == label.shape_vox
        reference = nib.load(path)
        np.testing.assert_array_equal(label.array[0], np.asanyarray(reference.dataobj).T)
        np.testing.assert_array_equal(image.affine[:, [2, 1, 0, 3]], reference.affine)
        write_labels(tmp_path / path.name, label.array[0].astype(np.int16), image)
        again = nib.load(tmp_path / path.name)
        np.testing.assert_array_equal(again.affine, reference.affine)
        np.testing.assert_array_equal(np.asanyarray(again.dataobj), np.asanyarray(reference.dataobj))
