"""OME-Zarr, Zarr, N5 and precomputed, written by zarr-python, ome-zarr and tensorstore, read by us."""

import http.server
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError, DataWarning
from microtome.images.chunked import ChunkedArray, kind_of_url, open_chunked
from microtome.images.files import open_volume, probe_image, read_image
from microtome.images.image import Limits
from microtome.images.metadata import MM_PER_UNIT
from microtome.images.volume import Pixels
from tests.chunked_stores import AXES, RNG, STACK, TRANSFORM, everything, put_array, put_image, put_stack, write_json


def put_n5(path: Path, array_xyz, **attributes):
    """A dataset of N5 with further attributes; `array_xyz` has the fastest axis first."""
    metadata = {
        "dimensions": array_xyz.shape,
        "blockSize": [4] * array_xyz.ndim,
        "dataType": array_xyz.dtype.name,
        "compression": {"type": "gzip"},
    }
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
    ts.open(spec, create=True).result().write(array_xyz).result()
    write_json(path / "attributes.json", json.loads((path / "attributes.json").read_text()) | attributes)
    return path


def put_precomputed(path: Path, array_xyzc, resolution, offset, scale_index=0):
    """One scale of a Neuroglancer volume."""
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "multiscale_metadata": {"type": "image", "data_type": array_xyzc.dtype.name, "num_channels": array_xyzc.shape[3]},
        "scale_metadata": {
            "size": array_xyzc.shape[:3],
            "resolution": resolution,
            "voxel_offset": offset,
            "chunk_size": [8, 8, 8],
            "encoding": "raw",
        },
        "scale_index": scale_index,
    }
    ts.open(spec, create=True).result().write(array_xyzc).result()
    return path


@st.composite
def stores(draw):
    """An OME-Zarr image of any axes in any order, and what it holds as (C, *S)."""
    space = draw(st.sampled_from(["yx", "zyx"]))
    names = draw(st.permutations(list(space) + draw(st.sampled_from([[], ["c"], ["t"], ["t", "c"]]))))
    sizes = {name: 1 if name == "t" else draw(st.integers(1, 6)) for name in names}
    dtype = draw(st.sampled_from(["u1", "<u2", ">u2", "i4", ">f4", "f8", "u8", "?"]))
    version = draw(st.sampled_from(["0.4", "0.5"]))
    array = RNG.integers(0, 2 if dtype == "?" else 100, [sizes[name] for name in names]).astype(
        dtype if version == "0.4" else dtype.strip("<>")
    )
    kinds = {"t": "time", "c": "channel"}
    units = {name: draw(st.sampled_from(sorted(MM_PER_UNIT)[:30])) for name in space}
    axes = [{"name": name, "type": kinds.get(name, "space")} | ({"unit": units[name]} if name in units else {}) for name in names]
    scale = {name: draw(st.floats(0.01, 100)) for name in names}
    shift = {name: draw(st.floats(-100, 100)) for name in names}
    steps = [{"type": "scale", "scale": [*scale.values()]}, {"type": "translation", "translation": [*shift.values()]}]
    kept = [name for name in ("c", *space) if name in names]
    expected = array.squeeze(names.index("t")) if "t" in names else array
    rest = [name for name in names if name != "t"]
    expected = expected.transpose([rest.index(name) for name in kept])
    expected = expected if "c" in names else expected[None]
    spacing_mm = [scale[name] * MM_PER_UNIT[units[name]] for name in space]
    origin_mm = [shift[name] * MM_PER_UNIT[units[name]] for name in space]
    return (array, axes, steps, version), expected, spacing_mm, origin_mm


@settings(max_examples=60, deadline=None)
@given(stores())
def test_an_ome_zarr_of_any_axes_is_read(tmp_path_factory, store):
    (array, axes, steps, version), expected, spacing_mm, origin_mm = store
    path = put_image(tmp_path_factory.mktemp("z") / "a.ome.zarr", [array], axes, [steps], version)
    volume = open_volume(path)
    assert isinstance(volume.pixels, Pixels)
    assert (volume.format, volume.axes) == ("zarr", "CZYX" if expected.ndim == 4 else "CYX")
    assert volume.extra["version"] == version
    np.testing.assert_allclose(volume.spacing_mm, spacing_mm, rtol=1e-12)
    np.testing.assert_allclose(volume.affine[:-1, -1], origin_mm, rtol=1e-12)
    read = everything(volume.pixels)
    assert volume.pixels.dtype == read.dtype == expected.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read, expected)
    part = tuple(slice(size // 3, max(1, size - 1)) for size in expected.shape)
    np.testing.assert_array_equal(volume.pixels[part], expected[part])
    assert all(1 <= side <= size for side, size in zip(volume.chunk_vox, volume.shape_vox, strict=True))
    assert volume.header == probe_image(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dimension . is too small:UserWarning")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_what_ome_zarr_writes_is_read(tmp_path, version):
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image, write_labels

    image, path = STACK[None].repeat(2, 0), tmp_path / "a.ome.zarr"
    fmt = FormatV04() if version == "0.4" else FormatV05()
    group = zarr.open_group(path, mode="w", zarr_format=fmt.zarr_format)
    units = dict.fromkeys("zyx", "micrometer")
    write_image(image, group, scale_factors=[2], axes="czyx", fmt=fmt, scale={"c": 1, "z": 2.0, "y": 0.5, "x": 0.25}, axes_units=units)
    write_labels(STACK % 5, group, "cells", scale_factors=[2], axes="zyx", fmt=fmt)
    read = read_image(path)
    np.testing.assert_array_equal(read.array, image)
    np.testing.assert_allclose(read.spacing_mm, (2e-3, 5e-4, 2.5e-4))
    assert read.spacing_known
    np.testing.assert_array_equal(read_image(path / "labels" / "cells").array[0], STACK % 5)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_and_a_label_map_are_reached_by_their_paths(tmp_path, version):
    path = put_stack(tmp_path / "a.ome.zarr", version, coordinateTransformations=[{"type": "scale", "scale": [3.0, 1.0, 1.0]}])
    put_image(path / "labels" / "cells", [STACK % 3], AXES, [[TRANSFORM]], version)
    level = open_volume(path / "1")
    assert level.shape_vox == (5, 6, 7)
    assert level.extra["level"] == "1"
    np.testing.assert_allclose(level.spacing_mm, (6e-3, 1e-3, 5e-4))
    np.testing.assert_array_equal(everything(open_volume(path / "labels" / "cells").pixels)[0], STACK % 3)
    assert open_volume(path).shape_vox == STACK.shape


@pytest.mark.parametrize(("version", "axes"), [("0.1", None), ("0.2", None), ("0.3", list("tczyx"))])
def test_versions_without_scales_are_read_with_unknown_spacing(tmp_path, version, axes):
    volume = open_volume(put_image(tmp_path / "a.zarr", [STACK[None, None]], axes, [None], version))
    np.testing.assert_array_equal(everything(volume.pixels)[0], STACK)
    assert (volume.spacing_mm, volume.spacing_known, volume.extra["version"]) == ((1.0, 1.0, 1.0), False, version)


def test_a_scale_without_a_unit_is_kept_and_said(tmp_path):
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    path = put_image(tmp_path / "a.zarr", [STACK], axes, [[TRANSFORM]])
    with pytest.warns(DataWarning, match=r"a\.zarr: its scale has no unit of length \(found none\)"):
        volume = open_volume(path)
    assert (volume.spacing_mm, volume.spacing_known) == ((2.0, 0.5, 0.25), False)


def test_free_names_of_space_keep_the_order_of_the_array(tmp_path):
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in ("depth", "row", "column")]
    volume = open_volume(put_image(tmp_path / "a.zarr", [STACK], axes, [[TRANSFORM]]))
    np.testing.assert_array_equal(everything(volume.pixels)[0], STACK)
    assert volume.spacing_mm == (2.0, 0.5, 0.25)


def test_a_store_leads_to_its_only_image(tmp_path):
    labelled = tmp_path / "labelled.zarr"
    put_stack(labelled / "labels" / "cells")
    write_json(labelled / "labels" / ".zattrs", {"labels": ["cells"]})
    write_json(labelled / ".zgroup", {"zarr_format": 2})
    series = tmp_path / "series.zarr"
    put_stack(series / "0")
    write_json(series / ".zattrs", {"bioformats2raw.layout": 3})
    write_json(series / ".zgroup", {"zarr_format": 2})
    plain = tmp_path / "plain.zarr"
    zarr.open_group(plain, mode="w", zarr_format=3)
    put_array(plain / "deep" / "raw", STACK, zarr_format=3)
    zarr.open_group(plain / "deep", mode="a", zarr_format=3)
    consolidated = tmp_path / "consolidated.zarr"
    put_array(consolidated / "raw", STACK)
    write_json(consolidated / ".zgroup", {"zarr_format": 2})
    write_json(consolidated / ".zmetadata", {"metadata": {".zgroup": {"zarr_format": 2}, "raw/.zarray": {}}, "zarr_consolidated_format": 1})
    for path in (labelled, series, plain, consolidated):
        np.testing.assert_array_equal(everything(open_volume(path).pixels)[0], STACK)


def test_several_images_are_listed_and_none_is_chosen(tmp_path):
    series = tmp_path / "series.zarr"
    for name in "012":
        put_stack(series / name)
    write_json(series / ".zgroup", {"zarr_format": 2})
    write_json(series / ".zattrs", {"bioformats2raw.layout": 3})
    write_json(series / "OME" / ".zattrs", {"series": ["0", "1", "2"]})
    with pytest.raises(DataError, match=r"got images 0, 1, 2; give one of them, such as .*series\.zarr/0"):
        open_volume(series)
    plain = tmp_path / "plain.zarr"
    for name in ("raw", "more"):
        put_array(plain / name, STACK)
    write_json(plain / ".zgroup", {"zarr_format": 2})
    with pytest.raises(DataError, match=r"got arrays more, raw; give one of them"):
        open_volume(plain)
    plate = tmp_path / "plate.zarr"
    write_json(plate / ".zgroup", {"zarr_format": 2})
    write_json(plate / ".zattrs", {"plate": {"wells": [{"path": "A/1"}, {"path": "A/2"}]}})
    with pytest.raises(DataError, match=r"got a plate of 2 wells; give a field of one of them, such as .*plate\.zarr/A/1/0"):
        open_volume(plate)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_plain_arrays_take_their_axes_by_number_or_by_name(tmp_path, zarr_format):
    more = {"dimension_names": list("xyz")} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": list("xyz")}}
    for array, expected, names in (
        (STACK[0], STACK[:1], {}),
        (STACK, STACK[None], {}),
        (STACK[None], STACK[None], {}),
        (STACK.T, STACK[None], more),
    ):
        shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
        put_array(tmp_path / "a.zarr", array, chunks=tuple(-(-n // 2) for n in array.shape), zarr_format=zarr_format, **names)
        volume = open_volume(tmp_path / "a.zarr")
        np.testing.assert_array_equal(everything(volume.pixels), expected)
        assert (volume.spacing_mm, volume.spacing_known) == ((1.0,) * len(volume.shape_vox), False)


def test_a_sharded_array_is_read_by_its_inner_chunks(tmp_path):
    put_array(tmp_path / "a.zarr", np.pad(STACK, ((0, 3), (0, 4), (0, 2))), chunks=(2, 4, 4), shards=(8, 16, 16), zarr_format=3)
    volume = open_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(everything(volume.pixels)[0, :5, :12, :14], STACK)
    assert volume.chunk_vox == (2, 4, 4)
    assert volume.pixels.shards == (1, 8, 16, 16)


@pytest.mark.parametrize(
    "attributes",
    [
        {"resolution": [0.25, 0.5, 2.0], "units": ["um", "um", "um"]},
        {"pixelResolution": {"dimensions": [250, 500, 2000], "unit": "nm"}},
        {"pixelResolution": [0.125, 0.25, 1.0], "units": ["µm"] * 3, "downsamplingFactors": [2, 2, 2]},
    ],
)
def test_n5_is_turned_round_with_its_scale(tmp_path, attributes):
    volume = open_volume(put_n5(tmp_path / "a.n5", STACK.T, **attributes))
    np.testing.assert_array_equal(everything(volume.pixels)[0], STACK)
    np.testing.assert_allclose(volume.spacing_mm, (2e-3, 5e-4, 2.5e-4))
    assert (volume.format, volume.chunk_vox) == ("n5", (4, 4, 4))


def test_n5_with_channels_and_groups(tmp_path):
    root = tmp_path / "a.n5"
    write_json(root / "attributes.json", {"n5": "2.0.0"})
    put_n5(root / "volumes" / "raw" / "s0", np.stack([STACK.T, STACK.T + 1], axis=-1))
    put_n5(root / "volumes" / "raw" / "s1", STACK.T[::2, ::2, ::2, None])
    np.testing.assert_array_equal(everything(open_volume(root).pixels), np.stack([STACK, STACK + 1]))
    assert open_chunked(root / "volumes" / "raw" / "s1", Limits()).shape_vox == (3, 6, 7)
    put_n5(root / "volumes" / "labels", STACK.T)
    with pytest.raises(DataError, match="got datasets volumes/labels, volumes/raw/s0, volumes/raw/s1; give one of them"):
        open_volume(root)


@pytest.mark.parametrize("channels", [1, 2])
def test_precomputed_has_its_channels_and_its_place(tmp_path, channels):
    array_xyzc = np.stack([STACK.T + i for i in range(channels)], axis=-1)
    path = put_precomputed(tmp_path / "a.precomputed", array_xyzc, [4, 4, 40], [5, 6, 7])
    put_precomputed(path, array_xyzc[::2, ::2], [8, 8, 40], [2, 3, 7], scale_index=1)
    volume = open_volume(path)
    np.testing.assert_array_equal(everything(volume.pixels), array_xyzc.T)
    np.testing.assert_allclose(volume.spacing_mm, (40e-6, 4e-6, 4e-6))
    np.testing.assert_allclose(volume.affine[:-1, -1], (7 * 40e-6, 6 * 4e-6, 5 * 4e-6))
    assert open_chunked(path / "8_8_40", Limits()).shape_vox == (5, 6, 7)
    with pytest.raises(DataError, match="one of its scales 4_4_40, 8_8_40, got `9`"):
        open_chunked(path / "9", Limits())


def test_slices_are_those_of_numpy(tmp_path):
    put_array(tmp_path / "a.zarr", STACK, chunks=(2, 5, 5))
    pixels = open_volume(tmp_path / "a.zarr").pixels
    for part in (
        (slice(-2, None), slice(3, 99), slice(None)),
        (slice(4, 2), slice(None), slice(None)),
        (slice(7, 9), slice(0, 1), slice(0, 1)),
    ):
        np.testing.assert_array_equal(pixels[(slice(None), *part)][0], STACK[part])


def test_threads_read_the_same_store_at_once(tmp_path):
    put_array(tmp_path / "a.zarr", STACK, chunks=(1, 3, 3))
    pixels, wrong = open_volume(tmp_path / "a.zarr").pixels, []

    def read(seed):
        for z in np.random.default_rng(seed).integers(0, 5, 20):
            if not np.array_equal(pixels[0:1, z : z + 1, 0:12, 0:14][0, 0], STACK[z]):
                wrong.append(z)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_http_is_read_and_what_is_not_there_is_said(tmp_path):
    put_stack(tmp_path / "a.ome.zarr", "0.5")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.ome.zarr"
        assert kind_of_url(url) == "zarr"
        volume = open_volume(Path(url))
        assert volume.extra["url"] == url
        np.testing.assert_array_equal(everything(volume.pixels)[0], STACK)
        assert open_volume(Path(f"{url}/1")).shape_vox == (5, 6, 7)
        with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:\d+/b\.zarr: expected an OME-Zarr"):
            open_volume(Path(f"http://127.0.0.1:{server.server_port}/b.zarr"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_writing_is_seen_by_reading(tmp_path):
    spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/a.zarr/", "metadata": {"shape": [9, 9], "chunks": [4, 4], "dtype": "<i2"}}
    array = ChunkedArray(ts.open(spec, create=True).result(), tmp_path / "a.zarr")
    array[2:7, 3:9] = np.full((5, 6), 3)
    expected = np.zeros((9, 9), np.int16)
    expected[2:7, 3:9] = 3
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a.zarr", mode="r")[...], expected)
    np.testing.assert_array_equal(everything(array), expected)
