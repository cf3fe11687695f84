"""Chunked stores as targets of `fuzzing`: of each kind its documents and a chunk change, one at a time."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tensorstore as ts

from tests.chunked_stores import AXES, STACK, TRANSFORM, put_array, put_image, put_stack, write_json
from tests.fuzz_images import GROWTH_BYTES, read_store
from tests.fuzz_trees import json_changed
from tests.fuzzing import Target

_SMALL = STACK[:2, :4, :3]
_NAME = "case-x.zarr"
_CHUNK_WEIGHT = 0.2
_WORDS = tuple(
    word.encode()
    for word in (
        '"blosc"',
        '"zlib"',
        '"zstd"',
        '"gzip"',
        '"bz2"',
        '"lz4"',
        '"lzma"',
        '"sharding_indexed"',
        '"transpose"',
        '"crc32c"',
        '"bytes"',
        '">f8"',
        '"|O"',
        '"|S9"',
        '"../.."',
        '"/etc"',
        '"labels"',
        '"path"',
        '"plate"',
        '"well"',
        '"scale"',
        '"translation"',
        "[1073741824, 1073741824, 1073741824]",
        "null",
        "NaN",
        "Infinity",
        "[[[[[[[[",
        "{",
        "}",
    )
)


def _ome(version: str, store: Path) -> None:
    put_image(store, [_SMALL], AXES, [[TRANSFORM]], version)


def _pyramid(store: Path) -> None:
    put_stack(store)


def _zarr(zarr_format: int, store: Path) -> None:
    put_array(store, _SMALL, zarr_format=zarr_format, chunks=(1, 4, 3))


def _sharded(store: Path) -> None:
    put_array(store, _SMALL, zarr_format=3, chunks=(1, 2, 3), shards=(2, 4, 3))


def _n5(compression: str, store: Path) -> None:
    metadata = {"dimensions": [3, 4, 2], "blockSize": [3, 4, 2], "dataType": "uint16", "compression": {"type": compression}}
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{store}/"}, "metadata": metadata}
    ts.open(spec, create=True).result()[...].write(_SMALL.T).result()
    attributes = json.loads((store / "attributes.json").read_text())
    write_json(
        store / "attributes.json", attributes | {"resolution": [1.0, 2.0, 3.0], "units": ["nm", "nm", "nm"], "axes": ["x", "y", "z"]}
    )


def _precomputed(encoding: str, store: Path) -> None:
    scale = {"key": "1_1_1", "size": [3, 4, 2], "encoding": encoding, "chunk_size": [3, 4, 2], "resolution": [4, 4, 40]}
    scale |= {"compressed_segmentation_block_size": [2, 2, 2]} if encoding == "compressed_segmentation" else {}
    kind = (
        {"type": "segmentation", "data_type": "uint32"}
        if encoding == "compressed_segmentation"
        else {"type": "image", "data_type": "uint8"}
    )
    metadata = {"num_channels": 1, **kind}
    location = {"driver": "file", "path": f"{store}/"}
    spec = {"driver": "neuroglancer_precomputed", "kvstore": location, "multiscale_metadata": metadata, "scale_metadata": scale}
    array = (_SMALL.T[..., None] % 251).astype(kind["data_type"])
    ts.open(spec, create=True).result()[...].write(array).result()


def _put(write: Callable[[Path], None], folder: Path) -> None:
    """The whole store, of which then one file changes."""
    write(folder / _NAME)


def _target(name: str, file: str, write: Callable[[Path], None]) -> Target:
    """One file of a store that a function writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / _NAME)
        seed = (Path(folder) / _NAME / file).read_bytes()
    is_document = file.endswith("json") or file.rpartition("/")[2].startswith(".") or file == "info"
    return Target(
        name=name,
        seeds=(seed,),
        read=read_store,
        file=f"{_NAME}/{file}",
        given=_NAME,
        prepare=partial(_put, write),
        change=json_changed if is_document else None,
        dictionary=_WORDS if is_document else (b"BLSC", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"\x78\x9c", b"\xff" * 8, bytes(8)),
        growth_bytes=GROWTH_BYTES,
        # What is in a chunk is decoded, in threads; documents are where a format is rich.
        weight=1.0 if is_document else _CHUNK_WEIGHT,
    )


def ome_zarr_4() -> tuple[Target, ...]:
    """OME-Zarr 0.4: Zarr of version 2."""
    write, name = partial(_ome, "0.4"), "OME-Zarr"
    return (
        _target(name, ".zattrs", write),
        _target(name, ".zattrs", _pyramid),
        _target(name, "0/.zarray", write),
        _target(name, "0/0.0.0", write),
    )


def ome_zarr_5() -> tuple[Target, ...]:
    """OME-Zarr 0.5: Zarr of version 3."""
    write, name = partial(_ome, "0.5"), "OME-Zarr"
    return (_target(name, "zarr.json", write), _target(name, "0/zarr.json", write), _target(name, "0/c/0/0/0", write))


def zarr_2() -> tuple[Target, ...]:
    """Plain arrays of Zarr 2."""
    write = partial(_zarr, 2)
    return (_target("Zarr", ".zarray", write), _target("Zarr", "0.0.0", write))


def zarr_3() -> tuple[Target, ...]:
    """Plain arrays of Zarr 3, with shards too."""
    write = partial(_zarr, 3)
    shard = _target("Zarr", "c/0/0/0", _sharded)
    return (_target("Zarr", "zarr.json", write), _target("Zarr", "zarr.json", _sharded), _target("Zarr", "c/0/0/0", write), shard)


def n5() -> tuple[Target, ...]:
    """N5, open and packed."""
    writes = [partial(_n5, compression) for compression in ("gzip", "raw")]
    return tuple(_target("N5", file, write) for file in ("attributes.json", "0/0/0") for write in writes)


def precomputed() -> tuple[Target, ...]:
    """Neuroglancer's, open and as JPEG and in blocks of labels."""
    writes = [partial(_precomputed, encoding) for encoding in ("raw", "jpeg", "compressed_segmentation")]
    return tuple(_target("precomputed", file, write) for file in ("info", "1_1_1/0-3_0-4_0-2") for write in writes)
