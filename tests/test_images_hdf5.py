"""Datasets of HDF5 files, written by h5py and by us."""

import json
import mmap
import os
import re
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import ConfigError, DataError, DataWarning
from microtome.geometry import affine_from_spacing
from microtome.images import hdf5
from microtome.images.files import label_suffix, open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.hdf5_heaps import WatchedFile
from microtome.images.image import Image, Limits
from tests.forked import ran
from tests.resident import grows_by_at_most, packed_zeros

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 60_000, (6, 20, 25)).astype(np.uint16)
UM = 1e-3


def written(path, datasets, **attributes):
    """A file with datasets by name; the attributes are the first one's."""
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file[name] = array
        file[next(iter(datasets))].attrs.update(attributes)
    return path


AXES = st.sampled_from(["yx", "xy", "zyx", "xyz", "cyx", "yxc", "czyx", "zcyx", "zyxc", "xyzc", "tzyxc", "tczyx", "ctyx"])


@settings(max_examples=60, deadline=None)
@given(
    names=AXES,
    dtype=st.sampled_from(["?", "u1", ">i2", "<u4", "i8", "f2", ">f4", "f8"]),
    chunked=st.booleans(),
    how=st.sampled_from(["axistags", "axes", "letters", "labels"]),
    data=st.data(),
)
def test_any_part_of_a_dataset_is_that_part_of_the_array(tmp_path_factory, names, dtype, chunked, how, data):
    path = tmp_path_factory.mktemp("h") / "a.h5"
    sizes = [1 if name == "t" else data.draw(st.integers(1, 7)) for name in names]
    array = np.random.default_rng(1).integers(0, 99, sizes).astype(dtype)
    with h5py.File(path, "w") as file:
        options = {"chunks": tuple(min(3, size) for size in sizes), "compression": "gzip"} if chunked else {}
        dataset = file.create_dataset("raw", data=array, **options)
        if how == "axistags":
            dataset.attrs["axistags"] = json.dumps({"axes": [{"key": name, "typeFlags": 2, "resolution": 0} for name in names]})
        elif how == "axes":
            dataset.attrs["axes"] = names.upper()
        elif how == "letters":
            dataset.attrs["axes"] = list(names)
        else:
            for dimension, name in zip(dataset.dims, names, strict=True):
                dimension.label = name
    wanted = [name for name in "tczyx" if name in names]
    expected = array.transpose([names.index(name) for name in wanted])
    expected = expected[0] if "t" in names else expected
    expected = expected if "c" in names else expected[None]
    volume = open_volume(path)
    assert (volume.pixels.shape, volume.channels) == (expected.shape, expected.shape[0])
    assert volume.pixels.dtype == (np.uint8 if dtype == "?" else np.dtype(dtype).newbyteorder("="))
    part = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in expected.shape)
    found = volume.pixels[part]
    assert found.dtype == volume.pixels.dtype
    np.testing.assert_array_equal(found, expected[part])
    np.testing.assert_array_equal(read_image(path).array, expected)


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [
        ((20, 25), (1, 20, 25)),
        ((6, 20, 25), (1, 6, 20, 25)),
        ((3, 4, 4), (1, 3, 4, 4)),
        ((20, 25, 3), (3, 20, 25)),
        ((2, 6, 20, 25), (2, 6, 20, 25)),
        ((6, 20, 25, 2), (2, 6, 20, 25)),
        ((2, 6, 20, 3), (2, 6, 20, 3)),
        ((1, 2, 6, 20, 25), (2, 6, 20, 25)),
        ((1, 6, 20, 25, 2), (2, 6, 20, 25)),
    ],
)
def test_axes_without_names_are_told_by_their_number(tmp_path, shape, image_shape):
    path = written(tmp_path / "a.h5", {"raw": np.zeros(shape, np.uint8)})
    assert open_volume(path).pixels.shape == image_shape


def test_names_of_axes_that_cannot_be_are_left_with_a_warning(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK}, axes="abc")
    with pytest.warns(DataWarning, match=r"a\.h5: the names of its axes, 'abc', are not used"):
        np.testing.assert_array_equal(read_image(path).array, STACK[None])


def test_time_points_are_refused(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK}, axes="tyx")
    with pytest.raises(DataError, match=r"a\.h5: expected one time point, got 6 of them \(axes TYX, 6×20×25\)"):
        open_volume(path)


@pytest.mark.parametrize(
    ("attributes", "spacing_mm"),
    [
        ({}, None),
        ({"element_size_um": [2.0, 0.5, 0.25]}, (2 * UM, 0.5 * UM, 0.25 * UM)),
        ({"element_size_um": [2.0, 0.5, 0.25], "resolution": [1, 1, 1]}, (2 * UM, 0.5 * UM, 0.25 * UM)),
        ({"resolution": [40, 4, 4]}, (40e-6, 4e-6, 4e-6)),
        ({"resolution": [40.0, 4.0, 4.0], "unit": "um"}, (40 * UM, 4 * UM, 4 * UM)),
        ({"resolution": [40.0, 4.0, 4.0], "units": ["mm", "mm", "mm"]}, (40, 4, 4)),
        ({"spacing": [3.0, 1.0, 1.0]}, (3, 1, 1)),
    ],
)
def test_the_voxel_size_is_what_programs_write(tmp_path, attributes, spacing_mm):
    volume = open_volume(written(tmp_path / "a.h5", {"raw": STACK}, **attributes))
    assert volume.spacing_known == (spacing_mm is not None)
    assert volume.spacing_mm == pytest.approx(spacing_mm or (1, 1, 1))
    np.testing.assert_allclose(volume.affine, affine_from_spacing(volume.spacing_mm))


@pytest.mark.parametrize("sizes", [[0.0, 1, 1], [np.nan, 1, 1], [-1.0, 1, 1], [1.0]])
def test_a_voxel_size_that_cannot_be_is_left_with_a_warning(tmp_path, sizes):
    path = written(tmp_path / "a.h5", {"raw": STACK}, element_size_um=sizes)
    with pytest.warns(DataWarning, match=r"a\.h5: its element_size_um .* is not used"):
        assert not open_volume(path).spacing_known


def test_the_only_dataset_that_may_be_an_image_is_taken(tmp_path):
    path = written(tmp_path / "a.h5", {"t/deep/one": STACK, "times": np.arange(9), "names": np.array([b"a", b"b"]), "scalar": 3})
    np.testing.assert_array_equal(read_image(path).array, STACK[None])
    assert hdf5.datasets(path) == {"t/deep/one": STACK.shape}


def test_of_several_datasets_the_one_with_the_name_of_an_image_is_taken(tmp_path):
    path = written(tmp_path / "a.h5", {"label": STACK * 0, "volumes/raw": STACK, "exported_data": STACK + 1})
    np.testing.assert_array_equal(read_image(path).array, STACK[None] + 1)
    np.testing.assert_array_equal(read_image(path / "volumes" / "raw").array, STACK[None])
    assert probe_image(path / "label").shape_vox == STACK.shape
    assert hdf5.datasets(path) == dict.fromkeys(("label", "volumes/raw", "exported_data"), STACK.shape)


def test_of_several_datasets_without_such_a_name_none_is_guessed(tmp_path):
    path = written(tmp_path / "a.h5", {"b": STACK, "c": STACK[0]})
    words = r"a\.h5: expected a dataset of 2 to 5 axes of numbers, got several: b \(6×20×25\), c \(20×25\); give its name as a\.h5/b"
    with pytest.raises(DataError, match=words):
        open_volume(path)
    for name in ("d", "b/c", "b/../b"):
        with pytest.raises(DataError, match=r"got only b \(6×20×25\), c \(20×25\)"):
            open_volume(path / name)


def test_a_file_without_an_image_is_refused(tmp_path):
    path = written(tmp_path / "a.h5", {"times": np.arange(9)})
    with pytest.raises(DataError, match="got none of them"):
        open_volume(path)
    with pytest.raises(DataError, match="got none of them"):
        open_volume(path / "times")


@pytest.mark.parametrize("array", [np.zeros((3, 4), complex), np.zeros((3, 4), [("a", "u1")])])
def test_datasets_of_no_plain_numbers_are_refused(tmp_path, array):
    with pytest.raises(DataError, match=r"a\.h5/x: expected real numbers"):
        open_volume(written(tmp_path / "a.h5", {"x": array}) / "x")


def hostile(path, kind, other):
    """A file whose dataset `raw` is somewhere else."""
    with h5py.File(path, "w") as file:
        if kind == "external link":
            file["raw"] = h5py.ExternalLink(str(other), "/secret")
        elif kind == "soft link to an external link":
            file["out"] = h5py.ExternalLink(str(other), "/")
            file["raw"] = h5py.SoftLink("/out/secret")
        elif kind == "external storage":
            file.create_dataset("raw", (4, 4), "u1", external=[(str(other), 0, 16)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((6, 20, 25), "u2")
            layout[:] = h5py.VirtualSource(str(other), "secret", (6, 20, 25))
            file.create_virtual_dataset("raw", layout)
        elif kind == "virtual through a link":
            file["out"] = h5py.ExternalLink(str(other), "/secret")
            layout = h5py.VirtualLayout((6, 20, 25), "u2")
            layout[:] = h5py.VirtualSource(".", "out", (6, 20, 25))
            file.create_virtual_dataset("raw", layout)
        elif kind == "circle":
            file["a"], file["raw"] = h5py.SoftLink("/raw"), h5py.SoftLink("/a")


@pytest.mark.parametrize(
    "kind",
    ["external link", "soft link to an external link", "external storage", "virtual", "virtual through a link", "circle"],
)
def test_a_dataset_in_another_file_is_refused(tmp_path, kind):
    secret = written(tmp_path / "secret.h5", {"secret": STACK})
    hostile(tmp_path / "a.h5", kind, secret)
    words = "links that end" if kind == "circle" else "expected a dataset whose values are in this file, got .*secret"
    with pytest.raises(DataError, match=words):
        open_volume(tmp_path / "a.h5" / "raw")


def test_links_and_virtual_datasets_within_the_file_are_followed(tmp_path):
    path = written(tmp_path / "a.h5", {"deep/real": STACK})
    with h5py.File(path, "a") as file:
        file["soft"] = h5py.SoftLink("deep/real")
        layout = h5py.VirtualLayout((2, *STACK.shape), "u2")
        layout[0] = layout[1] = h5py.VirtualSource(file["deep/real"])
        file.create_virtual_dataset("twice", layout)
        file["deep"]["circle"] = file["deep"]
    np.testing.assert_array_equal(read_image(path / "soft").array, STACK[None])
    np.testing.assert_array_equal(read_image(path / "twice").array, [STACK, STACK])
    assert hdf5.datasets(path).keys() == {"deep/real", "twice"}


def test_a_compression_that_is_not_here_is_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        packing = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        packing.set_chunk((4, 4))
        # An optional filter is left out where it is not there, so that the file can be written here.
        packing.set_filter(32013, h5py.h5z.FLAG_OPTIONAL, (1, 2))
        h5py.h5d.create(file.id, b"raw", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((8, 8)), packing)
    with pytest.raises(DataError, match=r"a\.h5: expected a compression that h5py has, got compression 32013"):
        open_volume(tmp_path / "a.h5")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_an_error(tmp_path, share):
    path = written(tmp_path / "a.h5", {"raw": STACK})
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=r"a\.h5: expected a whole HDF5 file"):
        open_volume(path)


def heap_of(path):
    """Where the first heap of texts in a file begins, and the bytes of the file."""
    whole = bytearray(path.read_bytes())
    return whole.index(b"GCOL"), whole


def test_a_text_without_a_length_is_refused_by_each_way_to_look_at_the_file(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK}, axes="zyx")
    at, whole = heap_of(path)
    # The head of the collection, one text of 3 letters with its head, and what is free: number 0, then its length.
    assert whole[at + 16 : at + 43] == b"\1\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0zyx\0\0\0\0\0\0\0\0"
    free = at + 40
    assert int.from_bytes(whole[free + 8 : free + 16], "little") == 4096 - 40
    whole[free + 8 : free + 16] = bytes(8)
    path.write_bytes(whole)
    for look in (open_volume, probe_image, read_image):
        with pytest.raises(DataError, match=rf"a\.h5: expected a whole HDF5 file, got .*the text at byte {free} has no length"):
            look(path)


# 16 and 2**64 - 16 are nought in 64 bits, 16 and 2**64 - 24 lead back; the text begins 16 bytes behind its heap of 4096.
@pytest.mark.parametrize("length", [2**64 - 16, 2**64 - 24, 2**63, 4096 - 24])
def test_a_text_that_leads_past_the_end_of_its_heap_is_refused(tmp_path, length):
    path = written(tmp_path / "a.h5", {"raw": STACK}, axes="zyx")
    at, whole = heap_of(path)
    whole[at + 24 : at + 32] = length.to_bytes(8, "little")
    path.write_bytes(whole)
    words = rf"a\.h5: expected a whole HDF5 file, got .*the text at byte {at + 16} leads {length + 16} bytes on, of which its heap has 4080"
    for look in (open_volume, probe_image, read_image):
        with pytest.raises(DataError, match=words):
            look(path)


def test_what_leads_to_thousands_of_chunks_is_not_kept(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=np.ones((200, 100), np.uint8), chunks=(2, 2)).attrs["axes"] = "yx"
    assert (tmp_path / "a.h5").stat().st_size > 250_000
    with WatchedFile(tmp_path / "a.h5", ("axes",)) as opened, h5py.File(opened, "r") as file:
        tracemalloc.start()
        found = file["raw"].id.get_num_chunks(), file["raw"].attrs["axes"]
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        opened.check_lengths("axes")
    assert found == (5000, "yx")
    assert kept < 50_000


@pytest.mark.parametrize("lengths", [2, 4, 8])
def test_texts_are_read_and_looked_at_whatever_the_size_of_lengths_in_the_file(tmp_path, lengths):
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_sizes(8, lengths)
    file = h5py.File(h5py.h5f.create(str(tmp_path / "a.h5").encode(), fcpl=creation))
    dataset = file.create_dataset("raw", data=STACK[:3, :4, :5])
    # More than one collection holds.
    dataset.attrs["texts"] = ["abc" * number for number in range(200 if lengths > 2 else 3)]
    dataset.attrs["axes"] = ["x", "y", "z"]
    file.close()
    np.testing.assert_array_equal(read_image(tmp_path / "a.h5").array[0], STACK[:3, :4, :5].transpose(2, 1, 0))
    at, whole = heap_of(tmp_path / "a.h5")
    whole[at + 16 : at + 32] = bytes(16)
    (tmp_path / "a.h5").write_bytes(whole)
    with pytest.raises(DataError, match=rf"the text at byte {at + 16} has no length"):
        open_volume(tmp_path / "a.h5")


@pytest.mark.parametrize(("axes", "number"), [("zyx", 0), (["z", "y", "x"], 1)])
def test_a_text_that_claims_gigabytes_is_refused_before_memory_is_taken(tmp_path, axes, number):
    path = written(tmp_path / "a.h5", {"raw": STACK}, axes=axes)
    at, whole = heap_of(path)
    # A text is kept as its length, the place of its heap, and its number there, from 1.
    texts = [len(axes if isinstance(axes, str) else axes[number]).to_bytes(4, "little"), at.to_bytes(8, "little")]
    place = whole.index(b"".join((*texts, (number + 1).to_bytes(4, "little"))))
    whole[place : place + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(whole)
    with grows_by_at_most(2**24), pytest.raises(DataError, match=r"a\.h5: expected .*a text of 2147483647 bytes as axes"):
        open_volume(path)


def test_an_attribute_of_megabytes_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_dataset("raw", data=STACK).attrs["element_size_um"] = np.ones(2**18)
    with pytest.raises(DataError, match=r"a\.h5: expected a whole HDF5 file, got .*2097152 bytes as element_size_um"):
        open_volume(tmp_path / "a.h5")


def test_labels_that_are_fewer_than_dimensions_are_none(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK}, DIMENSION_LABELS=["x"])
    np.testing.assert_array_equal(read_image(path).array[0], STACK)


def test_damaged_chunks_are_an_error_that_names_the_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("raw", data=STACK, chunks=(2, 20, 25), compression="gzip")
        place = dataset.id.get_chunk_info(1)
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[place.byte_offset : place.byte_offset + 20] = b"\xff" * 20
    (tmp_path / "a.h5").write_bytes(content)
    volume = open_volume(tmp_path / "a.h5")
    np.testing.assert_array_equal(volume.pixels[:, :2, :, :], STACK[None, :2])
    with pytest.raises(DataError, match=r"a\.h5: expected a whole HDF5 file, got damaged data"):
        volume.load()


def test_a_volume_that_is_not_there_takes_no_memory_until_it_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", (2**19, 2**19, 2**19), "f8", chunks=(16, 16, 16))
    volume = open_volume(tmp_path / "a.h5")
    assert volume.chunk_vox == (16, 16, 16)
    assert volume.pixels[:, 5:9, :4, -4:].shape == (1, 4, 4, 4)
    with pytest.raises(DataError, match=r"a\.h5: expected at most \d+ values \(max_voxels\)"):
        read_image(tmp_path / "a.h5")
    with pytest.raises(DataError, match="max_side"):
        open_volume(tmp_path / "a.h5", limits=Limits(max_side=2**18))


def bomb(path, **options):
    """A dataset `raw` of 4 chunks of 1024 bytes, of which one becomes a gigabyte."""
    with h5py.File(path, "w") as file:
        values = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
        dataset = file.create_dataset("raw", data=values, chunks=(32, 32), compression="gzip", **options)
        dataset.id.write_direct_chunk((0, 32), packed_zeros(1024))
    return values


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "fletcher32": True}])
def test_a_chunk_that_becomes_a_gigabyte_is_refused_before_it_does_and_the_others_are_read(tmp_path, options):
    values = bomb(tmp_path / "a.h5", **options)
    volume = open_volume(tmp_path / "a.h5")
    np.testing.assert_array_equal(volume.pixels[:, 32:, :][0], values[32:])
    with grows_by_at_most(2**26), pytest.raises(DataError, match=r"a\.h5: expected a chunk at \[0, 32\] of at most") as caught:
        volume.pixels[:, :, 20:40]
    assert "\n" not in str(caught.value)
    with grows_by_at_most(2**26), pytest.raises(DataError, match=r"a\.h5: expected a chunk at \[0, 32\]"):
        read_image(tmp_path / "a.h5")


def test_a_large_chunk_that_is_what_it_should_be_is_read(tmp_path):
    values = RNG.integers(0, 256, (1000, 1000)).astype(np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("raw", data=values, chunks=values.shape, compression="gzip", fletcher32=True)
        # So large that it is looked into: deflate could make half a gigabyte of it.
        assert dataset.id.get_chunk_info(0).size * 1032 > 2**29
    np.testing.assert_array_equal(read_image(tmp_path / "a.h5").array[0], values)


def packed_by(file, *, precision=16, setters=(), **options):
    """The dataset `raw`, STACK in chunks of 480 bytes, of which none fits evenly."""
    if not setters:
        return file.create_dataset("raw", data=STACK, chunks=CHUNK, **options)
    packing, kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5t.STD_U16LE.copy()
    packing.set_chunk(CHUNK)
    kind.set_precision(precision)
    for name, values in setters:
        getattr(packing, name)(*values)
    made = h5py.Dataset(h5py.h5d.create(file.id, b"raw", kind, h5py.h5s.create_simple(STACK.shape), packing))
    made[...] = STACK
    return made


CHUNK = (3, 8, 10)
NBIT = ("set_filter", (h5py.h5z.FILTER_NBIT, h5py.h5z.FLAG_OPTIONAL, ()))
WAYS = {
    "open": {},
    "deflate": {"compression": "gzip"},
    "deflate and more": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "deflate, then a checksum": {"setters": [("set_deflate", (1,)), ("set_fletcher32", ())]},
    "lzf": {"compression": "lzf", "shuffle": True, "fletcher32": True},
    "szip": {"compression": "szip"},
    "checksum": {"fletcher32": True},
    "shuffle": {"shuffle": True},
    "scale": {"scaleoffset": 0},
    "scale, then deflate": {"scaleoffset": 0, "compression": "gzip"},
    "n-bit": {"setters": [NBIT]},
    "n-bit of a type of 16": {"setters": [NBIT, ("set_deflate", (1,))], "precision": 16},
    "growing": {"maxshape": (None, 20, 25), "compression": "gzip"},
    "growing everywhere": {"maxshape": (None, None, None)},
}


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize("way", WAYS)
def test_chunks_of_each_way_to_pack_are_read(tmp_path, way, version):
    with h5py.File(tmp_path / "a.h5", "w", libver=version) as file:
        packed_by(file, **WAYS[way])
    np.testing.assert_array_equal(open_volume(tmp_path / "a.h5").pixels[:, 2:5, 3:9, 9:21], STACK[None, 2:5, 3:9, 9:21])
    np.testing.assert_array_equal(read_image(tmp_path / "a.h5").array[0], STACK)


def test_n_bit_of_twelve_bits_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        packed_by(file, setters=[NBIT], precision=12)
        wanted = np.minimum(STACK, 2**12 - 1)
        np.testing.assert_array_equal(file["raw"][:], wanted)
    np.testing.assert_array_equal(read_image(tmp_path / "a.h5").array[0], wanted)


def damage_key(path, corner, *, size=None, mask=None, to=None):
    """Let the list of chunks say another size, mask of filters or corner of a chunk."""
    with h5py.File(path) as file:
        chunk = file["raw"].id.get_chunk_info_by_coord(corner)
    key = struct.Struct("<II4Q")
    old = key.pack(chunk.size, chunk.filter_mask, *corner, 0)
    new = key.pack(chunk.size if size is None else size, chunk.filter_mask if mask is None else mask, *(to or corner), 0)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


LOOK = """
import sys
from pathlib import Path
from microtome.errors import DataError
from microtome.images.files import open_volume, read_image
for look in (read_image, lambda path: open_volume(path).pixels[:, 3:, 8:, 10:], lambda path: open_volume(path).pixels[:, :1, :1, :1]):
    try:
        print(look(Path(sys.argv[1])).shape)
    except DataError as error:
        print(error)
"""


def test_sequences_of_a_kind_that_is_none_are_not_read(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK}, axes="zyx", DIMENSION_LABELS=["z", "y", "x"])
    content = bytearray(path.read_bytes())
    for name in (b"axes\0\0\0\0", b"DIMENSION_LABELS\0\0\0\0\0\0\0\0"):
        # A sequence of any length, of the kind that texts are: the type behind the name, in the first version of the format.
        kind = content.index(name + b"\x19\x01") + len(name) + 1
        content[kind] = 3
    path.write_bytes(content)
    code = "import sys, pathlib\nfrom microtome.images.files import read_image\nprint(read_image(pathlib.Path(sys.argv[1])).array.shape)"
    done = ran(code, str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 6, 20, 25)\n", "")


def test_sequences_of_numbers_are_no_names_of_axes(tmp_path):
    rows = np.empty(2, object)
    rows[:] = [np.array([1, 2], np.int32), np.array([3], np.int32)]
    with h5py.File(written(tmp_path / "a.h5", {"raw": STACK}), "a") as file:
        file["raw"].attrs.create("axes", rows, dtype=h5py.vlen_dtype(np.int32))
    with pytest.warns(DataWarning, match=r"a\.h5: its axes is neither numbers nor text, and is not used"):
        np.testing.assert_array_equal(read_image(tmp_path / "a.h5").array[0], STACK)


def test_more_than_is_there_is_refused_before_it_is_filled_with_zeros(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK})
    with WatchedFile(path) as file:
        file.seek(path.stat().st_size - 3)
        piece = bytearray(b"x" * 99)
        assert file.readinto(piece) == 99
        assert bytes(piece) == path.read_bytes()[-3:] + bytes(96)
        file.seek(2000)
        # What is mapped, and never touched, takes no memory.
        words = rf"1073741824 bytes from byte 2000 on, {2**30 + 2000 - path.stat().st_size} of them"
        with mmap.mmap(-1, 2**30) as room, grows_by_at_most(2**24), pytest.raises(ValueError, match=words):
            file.readinto(room)


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        # The library subtracts the checksum's size from 0.
        ({"compression": "gzip", "fletcher32": True}, {"size": 0}, "of some bytes, got 0"),
        ({"fletcher32": True}, {"size": 2}, "of 484 bytes, got 2"),
        ({}, {"size": 479}, "of 480 bytes, got 479"),
        ({}, {"size": 481}, "of 480 bytes, got 481"),
        # As if it were not packed.
        ({"compression": "gzip", "shuffle": True}, {"mask": 2}, "of 480 bytes, got "),
        ({"compression": "gzip"}, {"size": 2**31}, None),
    ],
)
def test_a_chunk_of_another_length_is_refused_and_never_ends_the_process(tmp_path, options, damage, message):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("raw", data=STACK % 256, chunks=CHUNK, **options)
    damage_key(path, (3, 8, 10), **damage)
    done = ran(LOOK, str(path))
    assert (done.returncode, done.stderr) == (0, "")
    *lines, good = done.stdout.splitlines()
    # The first chunk is as it was.
    assert good == "(1, 1, 1, 1)"
    words = (
        rf"expected a chunk at \[3, 8, 10\] {message}"
        if message
        else rf"expected 2147483648 bytes, got {path.stat().st_size}: it was cut off"
    )
    assert [bool(re.match(rf"{path}: {words}", line)) for line in lines] == [True, True]


@pytest.mark.parametrize(("compression", "pack"), [("gzip", zlib.compress), ("lzf", imagecodecs.lzf_encode)])
@pytest.mark.parametrize("length", [10, 1023, 1025, 5000])
def test_a_chunk_that_becomes_more_or_less_than_a_chunk_is_refused(tmp_path, compression, pack, length):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("raw", data=np.ones((64, 64), np.uint8), chunks=(32, 32), compression=compression)
        dataset.id.write_direct_chunk((0, 32), bytes(pack(bytes(length))))
    volume = open_volume(tmp_path / "a.h5")
    assert volume.pixels[:, 32:, :].all()
    with pytest.raises(DataError, match=r"a\.h5: expected a (chunk at \[0, 32\] of |whole HDF5 file, got damaged data)"):
        volume.pixels[:, :1, 40:]


def test_two_chunks_at_one_place_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=STACK, chunks=CHUNK)
    damage_key(tmp_path / "a.h5", (3, 8, 10), to=(3, 8, 0))
    for look in (read_image, lambda path: open_volume(path).pixels[:, :1, :1, :1]):
        with pytest.raises(DataError, match=r"a\.h5: expected chunks at different places, got two at \[3, 8, 0\]"):
            look(tmp_path / "a.h5")


def test_a_filter_that_makes_less_than_a_chunk_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        packed_by(file, scaleoffset=0)
    content = (tmp_path / "a.h5").read_bytes()
    values = struct.pack("<5I", 2, 0, 240, 0, 2)
    assert content.count(values) == 1
    (tmp_path / "a.h5").write_bytes(content.replace(values, struct.pack("<5I", 2, 0, 24, 0, 2)))
    with pytest.raises(DataError, match=r"a\.h5: expected chunks of 480 bytes, got filter 6, which makes 48 of them"):
        open_volume(tmp_path / "a.h5")


def test_a_damaged_list_of_chunks_never_ends_the_process(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        packed_by(file, maxshape=(None, None, None))
    content = bytearray(path.read_bytes())
    # The size of its nodes: the checksum does not fit any more.
    content[content.index(b"BTHD") + 6] ^= 1
    path.write_bytes(content)
    done = ran(LOOK, str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(": ")[2][:48] for line in done.stdout.splitlines()] == ["expected a whole HDF5 file, got damaged data (Er"] * 3


def test_an_object_of_two_names_is_listed_once_and_circles_end(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/raw"] = STACK
        file["b"] = file["a/raw"]
        file["a/back"] = file["/"]
        file["c"] = h5py.SoftLink("/a/raw")
    assert list(hdf5.datasets(tmp_path / "a.h5").values()) == [STACK.shape]


def test_a_virtual_dataset_of_such_chunks_is_refused_too(tmp_path):
    bomb(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for name, source in (("twice", "raw"), ("again", "twice")):
            layout = h5py.VirtualLayout((2, *file[source].shape), "u1")
            layout[0] = layout[1] = h5py.VirtualSource(file[source])
            file.create_virtual_dataset(name, layout)
    with grows_by_at_most(2**26), pytest.raises(DataError, match=r"a\.h5/again: expected a chunk at \[0, 32\]"):
        open_volume(tmp_path / "a.h5" / "again").pixels[:, :1, :1, :1]


@pytest.mark.parametrize("packing", ["gzip", "lzf", None])
def test_chunks_that_claim_more_than_a_gigabyte_are_refused(tmp_path, packing):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", (2**15, 2**16), "u1", chunks=(2**15, 2**15 + 1), compression=packing)
    with pytest.raises(DataError, match=r"a\.h5: expected chunks of at most 1073741824 bytes, got 1073774592 bytes"):
        open_volume(tmp_path / "a.h5")


def test_chunks_that_are_packed_twice_are_refused(tmp_path):
    packing = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    packing.set_chunk((4, 4))
    packing.set_deflate(9)
    packing.set_deflate(9)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"raw", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((8, 8)), packing)
    with pytest.raises(DataError, match=r"a\.h5: expected chunks that are packed once, got 2 \(filters 1, 1\)"):
        open_volume(tmp_path / "a.h5")


def test_virtual_datasets_upon_each_other_are_each_looked_at_once(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["v0"] = np.arange(16, dtype=np.uint8).reshape(4, 4)
        # Each by four names: 4**14 ways lead down.
        for level in range(14):
            layout = h5py.VirtualLayout((4, 4), "u1")
            for row in range(4):
                file[f"v{level}_{row}"] = file[f"v{level}"]
                layout[row] = h5py.VirtualSource(".", f"v{level}_{row}", (4, 4))[row]
            file.create_virtual_dataset(f"v{level + 1}", layout)
    assert open_volume(tmp_path / "a.h5" / "v14").shape_vox == (4, 4)


def test_many_threads_read_one_dataset(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=STACK, chunks=(2, 5, 5), compression="gzip")
    volume = open_volume(tmp_path / "a.h5")
    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(lambda y: volume.pixels[:, :, y : y + 1, :], list(range(20)) * 5))
    np.testing.assert_array_equal(np.concatenate(parts[:20], axis=2), STACK[None])


@pytest.mark.parametrize("shape", [(1, 6, 20, 25), (2, 6, 20, 25), (1, 20, 25), (3, 20, 25), (1, 2, 2, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_an_image_that_is_written_comes_back(tmp_path, shape, known):
    spacing = (2e-3, 5e-4, 25e-5)[-len(shape) + 1 :]
    image = Image(
        array=RNG.integers(0, 9, shape).astype(np.uint8),
        spacing_mm=spacing,
        affine=affine_from_spacing(spacing),
        axes="CZYX" if len(shape) == 4 else "CYX",
        path=Path("a.tif"),
        format="tiff",
        spacing_known=known,
    )
    write_image(tmp_path / "a.h5", image)
    again = read_image(tmp_path / "a.h5")
    np.testing.assert_array_equal(again.array, image.array)
    assert (again.array.dtype, again.axes, again.spacing_known) == (image.array.dtype, image.axes, known)
    assert again.spacing_mm == pytest.approx(spacing if known else (1,) * len(spacing))
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["image"], image.array[0] if shape[0] == 1 else image.array)
        assert file["image"].attrs["axes"] == (image.axes if shape[0] > 1 else image.axes[1:]).lower()
        assert (file["image"].compression, file["image"].shuffle) == ("gzip", True)


def test_labels_of_a_dataset_have_its_voxel_size(tmp_path):
    path = written(tmp_path / "a.h5", {"raw": STACK}, element_size_um=[2.0, 0.5, 0.25])
    image = read_image(path)
    assert label_suffix(image) == ".h5"
    write_labels(tmp_path / "b.h5", (STACK[:] > 99) * 300, image)
    again = read_image(tmp_path / "b.h5")
    np.testing.assert_array_equal(again.array[0], (STACK > 99) * 300)
    assert again.spacing_mm == pytest.approx(image.spacing_mm)


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path / "a.h5", {"raw": STACK})
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ConfigError, match=r'a\.h5: expected the package h5py.*pip install "microtome\[hdf5\]"'):
        open_volume(path)
