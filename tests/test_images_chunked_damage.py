"""Stores that are damaged, hostile, too large or not what they say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr

from microtome.errors import DataError
from microtome.images.chunked import open_chunked
from microtome.images.files import open_volume
from microtome.images.image import Limits
from tests.chunked_stores import AXES, STACK, everything, put_array, put_stack, write_json


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
        ([8, 8], [2**20, 2**20], "|u1", "chunks of at most 2147483648 values, got 1099511627776 values"),
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
