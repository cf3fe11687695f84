"""NumPy's own files, written by NumPy and by us."""

import io
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from microtome.errors import DataError
from microtome.images.files import label_suffix, open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.image import Limits

ARRAY = np.random.default_rng(0).integers(0, 60_000, (5, 12, 14)).astype(np.uint16)


@settings(max_examples=60, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from(["?", "u1", "<i2", ">i2", ">u4", "<i8", "<u8", "<f2", ">f4", "<f8"]),
        hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6),
        fill=st.nothing(),
    ),
    order=st.sampled_from("CF"),
    data=st.data(),
)
def test_any_part_of_an_array_is_that_part_of_the_image(tmp_path_factory, array, order, data):
    path = tmp_path_factory.mktemp("n") / "a.npy"
    np.save(path, np.asarray(array, order=order))
    short = [axis for axis, size in enumerate(array.shape) if size <= 4]
    expected = np.moveaxis(array, -1, 0) if array.ndim > 2 and short == [array.ndim - 1] else array if array.ndim == 4 else array[None]
    volume = open_volume(path)
    assert volume.pixels.shape == expected.shape
    assert volume.pixels.dtype == (np.uint8 if array.dtype == bool else array.dtype.newbyteorder("="))
    assert (volume.axes, volume.spacing_mm, volume.spacing_known) == (
        "CZYX" if expected.ndim == 4 else "CYX",
        (1.0,) * (expected.ndim - 1),
        False,
    )
    part = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in expected.shape)
    found = volume.pixels[part]
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, expected[part])
    whole = read_image(path)
    np.testing.assert_array_equal(whole.array, expected)
    assert whole.array.flags.writeable
    header = probe_image(path)
    assert (header.channels, *header.shape_vox, header.dtype) == (*whole.array.shape, whole.array.dtype.name)


def test_what_is_read_at_once_is_a_plane_of_the_slowest_axis(tmp_path):
    for order, chunk in (("C", (1, 12, 14)), ("F", (5, 12, 1))):
        np.save(tmp_path / "a.npy", np.asarray(ARRAY, order=order))
        assert open_volume(tmp_path / "a.npy").chunk_vox == chunk


def test_an_image_is_written_for_numpy_to_read(tmp_path):
    np.save(tmp_path / "a.npy", ARRAY)
    image = read_image(tmp_path / "a.npy")
    assert label_suffix(image) == ".npy"
    write_image(tmp_path / "b.npy", image)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), ARRAY)
    labels = np.where(ARRAY > 30_000, -1, 7)
    write_labels(tmp_path / "c.npy", labels, image)
    again = np.load(tmp_path / "c.npy", allow_pickle=False)
    np.testing.assert_array_equal(again, labels)
    assert again.dtype == np.int16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", "c.npy"]


def test_several_channels_keep_their_axis(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([ARRAY, ARRAY + 1]))
    write_image(tmp_path / "b.npy", read_image(tmp_path / "a.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), [ARRAY, ARRAY + 1])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 4), [("a", "u1"), ("b", "u1")]), "expected real numbers, got .*'a'"),
        (np.zeros((3, 4), complex), "expected real numbers, got complex128"),
        (np.full((3, 4), "a"), "expected real numbers, got <U1"),
        (np.zeros((3, 4), "M8[s]"), "expected real numbers, got datetime64"),
        (np.full((3, 4), None), "expected real numbers, got object values"),
        (np.zeros(5), r"expected the axes YX, ZYX or CZYX, got an array of 1 axes \(5,\)"),
        (np.zeros((1, 1, 1, 2, 2)), "expected the axes YX, ZYX or CZYX, got an array of 5 axes"),
        (np.zeros((0, 4)), "a.npy: expected"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    for read in (open_volume, read_image, probe_image):
        with pytest.raises(DataError, match=words) as caught:
            read(tmp_path / "a.npy")
        assert caught.value.where.endswith("a.npy")


def test_an_object_that_would_run_code_is_not_loaded(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "a.npy", np.array([[Hostile()]]), allow_pickle=True)
    with pytest.raises(DataError, match="got object values"):
        read_image(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_an_error(tmp_path, share):
    np.save(tmp_path / "a.npy", ARRAY)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"a\.npy: expected"):
        open_volume(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62, 4), (-1, 5), (2**31, 2**33, 2)])
def test_a_header_that_claims_more_than_the_file_has_is_an_error(tmp_path, shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    (tmp_path / "a.npy").write_bytes(stream.getvalue() + bytes(1000))
    with pytest.raises(DataError, match=r"a\.npy"):
        open_volume(tmp_path / "a.npy")


def test_a_header_whose_length_is_a_claim_of_gigabytes_takes_no_memory(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"{'descr'")
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.npy: expected a whole NPY file"):
        open_volume(tmp_path / "a.npy")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_limits_are_for_sides_by_part_and_for_voxels_of_the_whole(tmp_path):
    np.save(tmp_path / "a.npy", ARRAY)
    assert open_volume(tmp_path / "a.npy", limits=Limits(max_voxels=9)).shape_vox == ARRAY.shape
    with pytest.raises(DataError, match="max_side"):
        open_volume(tmp_path / "a.npy", limits=Limits(max_side=13))
    with pytest.raises(DataError, match="max_voxels"):
        read_image(tmp_path / "a.npy", limits=Limits(max_voxels=9))


def test_colours_of_a_picture_are_channels_and_come_back_so(tmp_path):
    colours = np.random.default_rng(3).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", colours)
    image = read_image(tmp_path / "a.npy")
    np.testing.assert_array_equal(image.array, colours.transpose(2, 0, 1))
    np.testing.assert_array_equal(open_volume(tmp_path / "a.npy").pixels[1:, 2:5, 1:], colours[2:5, 1:, 1:].transpose(2, 0, 1))
    write_image(tmp_path / "b.npy", image)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), colours)
    # Four sections of few columns are not.
    np.save(tmp_path / "c.npy", np.zeros((4, 9, 3), np.uint8))
    assert open_volume(tmp_path / "c.npy").shape_vox == (4, 9, 3)
