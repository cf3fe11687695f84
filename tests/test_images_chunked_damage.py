"""Stores that are damaged, hostile, too large or not what they say."""

import gc
import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tensorstore as ts
import zarr

from microtome.errors import DataError
from microtome.images.chunked import open_chunked
from microtome.images.files import open_volume
from microtome.images.image import Limits
from microtome.images.stores import read_json
from tests.chunked_stores import AXES, STACK, everything, put_array, put_stack, write_json
from tests.resident import grows_by_at_most, packed_zeros


def test_a_part_is_limited_and_the_store_is_not(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(2**18, 2**18, 2**18), chunks=(64, 64, 64), dtype="u1", zarr_format=2)
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.header.claimed_bytes == 2**54
    assert volume.pixels[0:1, 2**17 : 2**17 + 3, 0:2, 0:2].tolist() == np.zeros((1, 3, 2, 2)).tolist()
    with pytest.raises(DataError, match=r"at most 8589934592 values at a time \(max_voxels\).*read it in parts"):
        volume.load()
    for limits, words in ((Limits(max_side=100), "max_side"), (Limits(max_channels=0), "max_channels")):
        with pytest.raises(DataError, match=words):
            open_volume(tmp_path / "a.zarr", limits=limits)


@pytest.mark.parametrize(
    ("shape", "chunks", "dtype", "words"),
    [
        ([8, 8], [2**20, 2**20], "|u1", "chunks of at most 1073741824 bytes, got 1099511627776 bytes"),
        ([8, 0], [8, 8], "|u1", "at least one voxel"),
        ([8, 8], [8, 8], "<c8", "whole or real numbers, got complex64"),
        ([8], [8], "|u1", "axes without names of 8"),
        ([1, 1, 1, 1, 8, 8], [1, 1, 1, 1, 8, 8], "|u1", "axes without names"),
        ([2, 1, 1, 8, 8], [1, 1, 1, 8, 8], "|u1", "got 2 time points; export one of 0 to 1"),
        ([8, 8], [0, 8], "|u1", "what cannot be read"),
        ([8, -8], [8, 8], "|u1", "what cannot be read"),
        ([8, 8], [8, 8], "|S3", "got axes yx of 8×8×3"),
        ("8", [8, 8], "|u1", "what cannot be read"),
    ],
)
def test_hostile_metadata_of_arrays_are_refused(tmp_path, shape, chunks, dtype, words):
    document = {
        "shape": shape,
        "chunks": chunks,
        "dtype": dtype,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "zarr_format": 2,
    }
    write_json(tmp_path / "a.zarr" / ".zarray", document)
    with pytest.raises(DataError, match=words) as caught:
        open_volume(tmp_path / "a.zarr")
    assert "a.zarr" in str(caught.value)
    assert "\n" not in str(caught.value)


def made(path: Path, driver: str, metadata) -> Path:
    """An empty array written by tensorstore."""
    ts.open({"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}, create=True).result()
    return path


def zarr3(chunk: list[int], *codecs):
    """An array of float64 of format 3."""
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"shape": [2**15, 2**15], "data_type": "float64", "chunk_grid": grid, "codecs": list(codecs)}


def sharding(inner: list[int], *codecs):
    """The codec of shards."""
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    return {"name": "sharding_indexed", "configuration": {"chunk_shape": inner, "codecs": list(codecs or (plain,))}}


LARGE, SMALL = [2**14, 2**14], [64, 64]
PLAIN = {"name": "bytes", "configuration": {"endian": "little"}}
SHAPE = [2**15, 2**15]
TOO_LARGE = {
    "zarr 2": ("zarr", {"shape": SHAPE, "chunks": LARGE, "dtype": "<f8"}),
    "zarr 3": ("zarr3", zarr3(LARGE, PLAIN)),
    "inner chunk": ("zarr3", zarr3(LARGE, sharding(LARGE))),
    "inner chunk of an inner shard": ("zarr3", zarr3(SHAPE, sharding(LARGE, sharding(LARGE)))),
    "n5": ("n5", {"dimensions": SHAPE, "blockSize": LARGE, "dataType": "float64", "compression": {"type": "gzip"}}),
}
SMALL_ENOUGH = {
    "shard": ("zarr3", zarr3(LARGE, sharding(SMALL))),
    "shard of shards": ("zarr3", zarr3(SHAPE, sharding(LARGE, sharding(SMALL)))),
    "a gigabyte": ("zarr", {"shape": SHAPE, "chunks": [2**13, 2**14], "dtype": "<f8"}),
}


@pytest.mark.parametrize(("driver", "metadata"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_chunk_that_decodes_to_more_than_a_gigabyte_is_refused(tmp_path, driver, metadata):
    path = made(tmp_path / "a.store", driver, metadata)
    with pytest.raises(DataError, match=r"a\.store: expected chunks of at most 1073741824 bytes, got 2147483648 bytes"):
        open_volume(path)


@pytest.mark.parametrize(("driver", "metadata"), SMALL_ENOUGH.values(), ids=SMALL_ENOUGH)
def test_what_is_decoded_at_once_counts_and_not_the_shard(tmp_path, driver, metadata):
    assert open_volume(made(tmp_path / "a.store", driver, metadata)).shape_vox == tuple(SHAPE)


@pytest.mark.parametrize("packing", ["zlib", "zstd", "n5"])
def test_a_chunk_file_that_becomes_a_quarter_of_a_gigabyte_is_refused_before_it_does(tmp_path, packing):
    path = tmp_path / "a.store"
    if packing == "n5":
        made(path, "n5", {"dimensions": SMALL, "blockSize": SMALL, "dataType": "uint8", "compression": {"type": "gzip"}})
        (path / "0").mkdir()
        (path / "0" / "0").write_bytes(struct.pack(">HHII", 0, 2, *SMALL) + packed_zeros(256, 31))
    else:
        compressor = {"id": packing, "level": 1}
        made(path, "zarr", {"shape": SMALL, "chunks": SMALL, "dtype": "|u1", "compressor": compressor})
        (path / "0.0").write_bytes(packed_zeros(256) if packing == "zlib" else imagecodecs.zstd_encode(bytes(2**28)))
    with grows_by_at_most(2**26), pytest.raises(DataError, match=r"a\.store: expected a whole chunked store") as caught:
        everything(open_volume(path).pixels)
    assert "\n" not in str(caught.value)


def test_a_block_of_n5_that_claims_to_be_larger_than_the_blocks_is_refused(tmp_path):
    path = made(tmp_path / "a.n5", "n5", {"dimensions": SMALL, "blockSize": SMALL, "dataType": "uint8", "compression": {"type": "gzip"}})
    (path / "0").mkdir()
    (path / "0" / "0").write_bytes(struct.pack(">HHII", 0, 2, 2**31 - 1, 2**31 - 1) + gzip.compress(bytes(64)))
    with grows_by_at_most(2**26), pytest.raises(DataError, match=r"a\.n5: .* exceeds blockSize of \{64, 64\}"):
        everything(open_volume(path).pixels)


def test_the_folder_of_all_folders_is_looked_at_like_any_other():
    # Groups above a store are asked for its name, up to there.
    assert read_json(Path("/"), "there-is-no-such-document.json") is None


def test_a_shard_of_too_many_chunks_is_refused(tmp_path):
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/a.zarr/"},
        "metadata": {
            "shape": [2**17, 2**17],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**17, 2**17]}},
            "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [16, 16]}}],
        },
    }
    ts.open(spec, create=True).result()
    with pytest.raises(DataError, match="shards of at most 16777216 chunks"):
        open_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "change",
    [
        {"multiscales": 3},
        {"multiscales": [3]},
        {"multiscales": [{"datasets": []}]},
        {"multiscales": [{"datasets": [{"path": "../../b"}]}]},
        {"multiscales": [{"datasets": [{"path": "7"}]}]},
        {"multiscales": [{"axes": ["z"], "datasets": [{"path": "0"}]}]},
        {"multiscales": [{"axes": ["y", "y", "x"], "datasets": [{"path": "0"}]}]},
        {"multiscales": [{"axes": [{"type": "space"}] * 3, "datasets": [{"path": "0"}]}]},
        {
            "multiscales": [
                {"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [0, 1, 1]}]}]}
            ]
        },
        {
            "multiscales": [
                {"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": ["a", 1, 1]}]}]}
            ]
        },
        {"multiscales": [{"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1]}]}]}]},
        {"multiscales": [{"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "path": "s"}]}]}]},
        {"multiscales": [{"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": [{"type": "affine"}]}]}]},
        {"multiscales": [{"axes": AXES, "datasets": [{"path": "0", "coordinateTransformations": 7}]}]},
        {"well": {"images": [{"path": "."}]}, "multiscales": None},
        {"plate": 5, "multiscales": None},
        {"labels": ["a"], "multiscales": None, "bioformats2raw.layout": 3},
    ],
)
def test_damaged_metadata_are_refused_with_the_path(tmp_path, change):
    path = put_stack(tmp_path / "a.zarr")
    shutil.rmtree(path / "1")
    if "multiscales" in change and change["multiscales"] is None:
        shutil.rmtree(path / "0")
    attributes = json.loads((path / ".zattrs").read_text())
    write_json(path / ".zattrs", attributes | change)
    with pytest.raises(DataError, match=r"a\.zarr") as caught:
        open_volume(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100000, "\x00", '{"a": NaN'])
@pytest.mark.parametrize("name", [".zattrs", ".zarray", "zarr.json", "attributes.json", "info"])
def test_json_that_is_none_is_refused(tmp_path, name, text):
    path = tmp_path / "a"
    path.mkdir()
    (path / name).write_text(text)
    with pytest.raises(DataError, match="JSON"):
        open_chunked(path, Limits())


@pytest.mark.parametrize(
    "document",
    [{"zarr_format": 3}, {"scales": [{}]}, {"scales": 3}, {"dimensions": 7}, {"dimensions": [8, 8]}, {"n5": "2"}, {"@type": "mesh"}],
)
@pytest.mark.parametrize("name", ["zarr.json", "attributes.json", "info"])
def test_documents_of_another_shape_are_refused(tmp_path, name, document):
    write_json(tmp_path / "a" / name, document)
    with pytest.raises(DataError, match=f"^{tmp_path}/a"):
        open_chunked(tmp_path / "a", Limits())


def test_damaged_chunks_and_unknown_codecs_are_named(tmp_path):
    path = tmp_path / "a.zarr"
    put_array(path, STACK, chunks=(5, 6, 7))
    (path / "0.1.1").write_bytes(b"not zstd")
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.pixels[0:1, 0:5, 0:6, 0:7][0], STACK[:, :6, :7])
    with pytest.raises(DataError, match=r"a\.zarr: expected a whole chunked store, got what cannot be read \(Error reading local file"):
        everything(volume.pixels)
    (path / "0.1.1").unlink()
    assert not open_volume(path).pixels[0:1, 0:5, 6:12, 7:14].any()
    document = json.loads((path / ".zarray").read_text())
    write_json(path / ".zarray", document | {"compressor": {"id": "lossless9000"}})
    with pytest.raises(DataError, match="lossless9000"):
        open_volume(path)


@pytest.mark.parametrize("url", ["s3://b/a.zarr", "s3://a!b/c.zarr", "gs://x/a.zarr"])
def test_urls_that_cannot_be_are_refused(url):
    with pytest.raises(DataError, match="the URL of a store"):
        open_volume(Path(url))


@pytest.mark.parametrize("name", ["zarr.json", ".zattrs"])
def test_a_pipe_in_place_of_a_document_is_refused_and_not_waited_for(tmp_path, name):
    store = tmp_path / "a.zarr"
    put_array(store, STACK, zarr_format=2, chunks=(2, 4, 3))
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)
    with pytest.raises(DataError, match=rf"a\.zarr/{name}: expected JSON, got damaged metadata"):
        open_volume(store)


def test_a_folder_in_place_of_a_document_is_refused(tmp_path):
    store = tmp_path / "a.zarr"
    put_array(store, STACK, zarr_format=2, chunks=(2, 4, 3))
    (store / "zarr.json").mkdir()
    words = r"a\.zarr: expected a whole chunked store, got what cannot be read \(.*zarr\.json is a folder"
    with pytest.raises(DataError, match=words):
        open_volume(store)
    gc.collect()
    handles = len(os.listdir("/proc/self/fd"))
    # A handle that is left to the collector is a warning, and warnings are errors.
    for _ in range(10):
        with pytest.raises(DataError, match=words):
            open_volume(store)
    assert len(os.listdir("/proc/self/fd")) == handles
