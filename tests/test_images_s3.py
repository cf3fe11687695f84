"""Stores in a bucket: read, written by blocks, finished and remembered, on a server of S3 in this process."""

import logging
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from microtome.errors import DataError, RunError
from microtome.images import omezarr
from microtome.images.chunked import kind_of_url
from microtome.images.files import open_volume, probe_image, read_image
from microtome.images.stores import Documents, kvstore_of
from tests.chunked_stores import STACK, everything, like, put_stack

BUCKET = Path("s3://bucket-of-tests")


@pytest.fixture(scope="module")
def server():
    """The address of a server that starts empty."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """A client of a bucket, for which the environment is set as a user sets it."""
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_NO_SIGN_REQUEST"):
        monkeypatch.delenv(name, raising=False)
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET.name)
    return client


def upload(client, folder: Path, prefix: str):
    """All files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET.name, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def keys(client, prefix):
    return {entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET.name, Prefix=prefix).get("Contents", ())}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_store_in_a_bucket_is_read(tmp_path, bucket, version):
    upload(bucket, put_stack(tmp_path / "a", version), f"in{version}/a.ome.zarr")
    path = BUCKET / f"in{version}" / "a.ome.zarr"
    assert kind_of_url(f"s3://bucket-of-tests/in{version}/a.ome.zarr") == "zarr"
    volume = open_volume(path)
    assert volume.extra["url"] == f"s3://bucket-of-tests/in{version}/a.ome.zarr"
    np.testing.assert_array_equal(everything(volume.pixels)[0], STACK)
    np.testing.assert_allclose(volume.spacing_mm, (2e-3, 5e-4, 2.5e-4))
    assert probe_image(path / "1").shape_vox == (5, 6, 7)


def test_public_data_are_read_without_keys(tmp_path, bucket, monkeypatch):
    upload(bucket, put_stack(tmp_path / "a"), "public/a.zarr")
    bucket.put_bucket_acl(Bucket=BUCKET.name, ACL="public-read-write")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    for key in keys(bucket, "public/"):
        bucket.put_object_acl(Bucket=BUCKET.name, Key=key, ACL="public-read")
    assert kvstore_of(BUCKET / "a")["aws_credentials"] == {"type": "anonymous"}
    np.testing.assert_array_equal(read_image(BUCKET / "public" / "a.zarr").array[0], STACK)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_label_map_is_written_to_a_bucket_by_blocks(bucket, version):
    place = BUCKET / f"out{version}.ome.zarr"
    labels = np.random.default_rng(0).integers(0, 4, (4, 300, 270)).astype(np.uint16)
    array = omezarr.create_labels(place, "cells", labels.shape, labels.dtype, (4, 150, 270), version=version)
    documents = Documents(place)
    documents.write("plan", {"bricks": 2})
    for row in (0, 1):
        array[0:4, row * 150 : (row + 1) * 150, 0:270] = labels[:, row * 150 : (row + 1) * 150]
        documents.mark(f"cells/{row}")
    with pytest.raises(DataError, match=rf"^s3://bucket-of-tests/out{version}\.ome\.zarr: expected an OME-Zarr"):
        open_volume(place)
    again = omezarr.create_labels(place, "cells", labels.shape, labels.dtype, (4, 150, 270), version=version)
    np.testing.assert_array_equal(everything(again), labels)
    assert (documents.read("plan"), documents.marked()) == ({"bricks": 2}, {"cells/0", "cells/1"})
    geometry = like(labels.shape, (2.0, 0.5, 0.5))
    omezarr.finish(place, "cells", like=geometry, values={1: "one"}, source="", version=version)
    documents.remove()
    assert not [key for key in keys(bucket, place.name) if ".microtome" in key]
    image = read_image(place)
    np.testing.assert_array_equal(image.array[0], labels)
    assert image.spacing_mm == (2.0, 0.5, 0.5)
    assert read_image(place / "labels" / "cells" / "1").array.shape == (1, 4, 150, 135)


def test_chunks_of_zeros_are_objects_in_a_bucket(bucket):
    array = omezarr.create_labels(BUCKET / "zeros", "a", (4, 4), np.dtype(np.uint8), (2, 2))
    array[0:2, 0:2] = np.zeros((2, 2))
    assert keys(bucket, "zeros/") == {"zeros/labels/a/0/.zarray", "zeros/labels/a/0/0/0"}


def test_what_is_damaged_or_not_there_is_named_by_its_url(tmp_path, bucket):
    path = put_stack(tmp_path / "a")
    (path / "0" / "0.0.0").write_bytes(b"no chunk")
    upload(bucket, path, "damaged/a.zarr")
    with pytest.raises(DataError, match=r"^s3://bucket-of-tests/damaged/a\.zarr: expected a whole chunked store"):
        read_image(BUCKET / "damaged" / "a.zarr")
    bucket.put_object(Bucket=BUCKET.name, Key="damaged/a.zarr/.zattrs", Body=b"{")
    with pytest.raises(DataError, match=r"^s3://bucket-of-tests/damaged/a\.zarr/\.zattrs: expected JSON"):
        open_volume(BUCKET / "damaged" / "a.zarr")
    with pytest.raises(DataError, match=r"^s3://bucket-of-tests/none\.zarr: expected an OME-Zarr"):
        open_volume(BUCKET / "none.zarr")
    with pytest.raises(RunError, match=r"^s3://no-such-bucket/a/\.microtome/marks: .*bucket does not exist"):
        Documents(Path("s3://no-such-bucket/a")).mark("b")
