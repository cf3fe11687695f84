"""OME-Zarr written by us, block by block, read by zarr-python, ome-zarr and ome-zarr-models."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError, RunError
from microtome.images import omezarr
from microtome.images.files import open_volume, read_image
from microtome.images.stores import Documents, read_json, remove_store, write_json
from tests.chunked_stores import everything, like, put_stack
from tests.forked import FORKS

VERSIONS = pytest.mark.parametrize("version", ["0.4", "0.5"])
RNG = np.random.default_rng(0)


def put_labels(place, labels, chunk_vox, spacing_mm, version="0.4", *, values=None, origin_mm=None, known=True):
    """A finished label map."""
    array = omezarr.create_labels(place, "cells", labels.shape, labels.dtype, chunk_vox, version=version)
    array[(slice(None),) * labels.ndim] = labels
    omezarr.finish(
        place, "cells", like=like(labels.shape, spacing_mm, origin_mm, known=known), values=values, source="../..", version=version
    )


def slow_halved(values, shape, vote):
    """One voxel of the coarser level after another, in plain words."""
    steps = [-(-a // b) for a, b in zip(values.shape, shape, strict=True)]
    result = np.empty(shape, values.dtype)
    for place in np.ndindex(*shape):
        members = values[tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, steps, strict=True))].ravel().tolist()
        if vote:
            result[place] = min(members, key=lambda value: (-members.count(value), value == 0, value))
        else:
            mean = float(np.mean(np.array(members, np.float64)))
            result[place] = mean if values.dtype.kind == "f" else round(mean)
    return result


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_level_is_what_the_slow_words_say(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))
    steps = [data.draw(st.sampled_from([1, 2] if size > 1 else [1])) for size in shape]
    coarse = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
    chunks = tuple(data.draw(st.integers(1, size)) for size in coarse)
    vote = data.draw(st.booleans())
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "i2", "u8"] if vote else ["u1", "u2", "f4", "f8"])))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-2 if dtype.kind == "i" else 0, 4, shape).astype(dtype)
    place = tmp_path_factory.mktemp("z")
    level = omezarr.create_image(place, "level", tuple(coarse), dtype, chunks)
    omezarr.halve(values, level, vote=vote)
    np.testing.assert_allclose(everything(level), slow_halved(values, coarse, vote), rtol=1e-6)


@pytest.mark.parametrize(
    ("members", "winner"),
    [
        ([0, 0, 0, 5], 0),
        ([0, 0, 5, 5], 5),
        ([0, 5, 7, 0], 0),
        ([9, 5, 7, 0], 5),
        ([9, 9, 5, 5], 5),
        ([-1, -1, 3, 3], -1),
        ([0, 0, 9, 9], 9),
    ],
)
def test_the_most_frequent_value_wins_and_the_smallest_but_0_of_equals(members, winner):
    for order in (members, members[::-1]):
        assert omezarr.most_frequent(np.array(order)[:, None]).tolist() == [winner]


@pytest.mark.parametrize(
    ("shape_vox", "spacing_mm", "expected"),
    [
        ((200, 256, 256), (1, 1, 1), [(1, 1, 1)]),
        ((1000, 1000), (1, 1), [(1, 1), (2, 2), (4, 4)]),
        # Sections four times as thick as pixels: the plane is halved twice, then all.
        ((40, 4096, 4096), (4, 1, 1), [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16)]),
        # 1.5 is more than the square root of 2: one halving of the plane first.
        ((40, 1000, 1000), (1.5, 1, 1), [(1, 1, 1), (1, 2, 2), (2, 4, 4)]),
        ((40, 1000, 1000), (1.4, 1, 1), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((1, 1000, 1000), (0.1, 1, 1), [(1, 1, 1), (1, 2, 2), (1, 4, 4)]),
        ((4, 1000, 300), (0.25, 1, 1), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (4, 2, 2), (4, 4, 4)]),
    ],
)
def test_axes_are_halved_until_voxels_are_cubes(shape_vox, spacing_mm, expected):
    levels = omezarr.levels_of(shape_vox, spacing_mm)
    assert [level.factors for level in levels] == expected
    for level in levels:
        assert level.shape_vox == tuple(-(-size // factor) for size, factor in zip(shape_vox, level.factors, strict=True))


@VERSIONS
def test_a_label_map_comes_back_with_its_place_and_names(tmp_path, version):
    labels = RNG.integers(0, 4, (6, 300, 270)).astype(np.uint16)
    put_labels(
        tmp_path / "a.ome.zarr",
        labels,
        (4, 128, 128),
        (2e-3, 5e-4, 5e-4),
        version,
        values={0: "background", 3: "cell"},
        origin_mm=(1, 2, 3),
    )
    # The root has no image of its own, so it opens as its only label map.
    image = read_image(tmp_path / "a.ome.zarr")
    np.testing.assert_array_equal(image.array[0], labels)
    np.testing.assert_allclose(image.spacing_mm, (2e-3, 5e-4, 5e-4))
    np.testing.assert_allclose(image.affine[:-1, -1], (1, 2, 3))
    assert image.spacing_known
    assert image.extra["image-label"]["properties"] == [{"label-value": 0, "class": "background"}, {"label-value": 3, "class": "cell"}]
    coarse = read_image(tmp_path / "a.ome.zarr" / "labels" / "cells" / "1")
    np.testing.assert_array_equal(coarse.array[0][:, :3, :4], slow_halved(labels[:, :6, :8], (6, 3, 4), vote=True))
    # The first coarse voxel lies between the first two fine ones.
    np.testing.assert_allclose(coarse.affine[:-1, -1], (1, 2 + 2.5e-4, 3 + 2.5e-4))


@VERSIONS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ome_zarr_reads_what_we_write(tmp_path, version):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    path = put_stack(tmp_path / "a.ome.zarr", version)
    shape = (5, 600, 520)
    labels = RNG.integers(0, 4, shape).astype(np.uint8)
    put_labels(path, labels, (2, 256, 256), (2e-3, 5e-4, 5e-4), version, values={1: "one"})
    # From the label map, which names its image, and from the image, which lists its label map.
    for start in (path / "labels" / "cells", path):
        nodes = [node for node in Reader(parse_url(start))() if node.data and node.data[0].shape == shape]
        levels = [np.asarray(level) for level in nodes[0].data]
        assert [level.shape for level in levels] == [(5, 600, 520), (5, 300, 260), (5, 150, 130)]
        np.testing.assert_array_equal(levels[0], labels)
        assert [axis["unit"] for axis in nodes[0].metadata["axes"]] == ["micrometer"] * 3


@VERSIONS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_metadata_are_valid_by_the_models_of_the_specification(tmp_path, version):
    from ome_zarr_models import v04, v05

    models = v04 if version == "0.4" else v05
    path = put_stack(tmp_path / "a.ome.zarr", version)
    put_labels(path, np.ones((5, 300, 270), np.uint8), (2, 256, 256), (2.0, 0.5, 0.5), version, values={0: "background", 1: "one"})
    probabilities = omezarr.create_image(path, "probabilities", (5, 300, 270), np.dtype(np.uint8), (2, 256, 256), version=version, layers=2)
    probabilities[0:2, 0:5, 0:300, 0:270] = np.full((2, 5, 300, 270), 255)
    geometry = like((5, 300, 270), (2.0, 0.5, 0.5))
    omezarr.finish(path, "probabilities", like=geometry, values={0: "background", 1: "one"}, source="", version=version)
    label = models.ImageLabel.from_zarr(zarr.open_group(path / "labels" / "cells", mode="r"))
    image = models.Image.from_zarr(zarr.open_group(path / "probabilities", mode="r"))
    attributes = [model.attributes if version == "0.4" else model.ome_attributes for model in (label, image)]
    assert attributes[0].image_label.colors[1].label_value == 1
    assert [axis.name for axis in attributes[1].multiscales[0].axes] == list("czyx")
    assert [axis.unit for axis in attributes[1].multiscales[0].axes] == [None, *["millimeter"] * 3]
    ome = json.loads((path / "probabilities" / (".zattrs" if version == "0.4" else "zarr.json")).read_text())
    omero = (ome if version == "0.4" else ome["attributes"]["ome"])["omero"]
    assert [v04.omero.Channel.model_validate(channel).model_extra["label"] for channel in omero["channels"]] == ["background", "one"]
    listed = models.Labels.from_zarr(zarr.open_group(path / "labels", mode="r"))
    assert (listed.attributes if version == "0.4" else listed.ome_attributes).labels == ["cells"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_probabilities_come_back(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    layers = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    version = data.draw(st.sampled_from(["0.4", "0.5"]))
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "f2", "f4"])))
    chunk = tuple(data.draw(st.integers(1, 12)) for _ in shape)
    values = RNG.integers(0, 255, shape if layers is None else (layers, *shape)).astype(dtype)
    known = data.draw(st.booleans())
    place = tmp_path_factory.mktemp("z") / "a.ome.zarr"
    array = omezarr.create_image(place, "p", shape, dtype, chunk, version=version, layers=layers)
    array[tuple(slice(None) for _ in values.shape)] = values
    assert not (place / ".zgroup").exists()
    omezarr.finish(place, "p", like=like(shape, (1.0,) * len(shape), known=known), values=None, source="", version=version)
    image = read_image(place / "p")
    np.testing.assert_array_equal(image.array, values if layers is not None else values[None])
    assert (image.array.dtype, image.spacing_known) == (dtype, known)


@VERSIONS
def test_a_chunk_of_zeros_is_written(tmp_path, version):
    array = omezarr.create_labels(tmp_path, "cells", (4, 4), np.dtype(np.uint8), (2, 2), version=version)
    array[0:2, 2:4] = np.zeros((2, 2), np.uint8)
    files = [
        path for path in (tmp_path / "labels" / "cells" / "0").rglob("*") if path.is_file() and not path.suffix and path.name[0] != "."
    ]
    assert [path.name for path in files] == ["1"]
    assert files[0].parent.name == "0"


@VERSIONS
def test_it_is_reopened_with_the_same_words_and_refused_with_others(tmp_path, version):
    create = omezarr.create_labels
    create(tmp_path, "cells", (8, 9), np.dtype(np.uint8), (4, 4), version=version)[0:4, 0:4] = np.ones((4, 4))
    assert everything(create(tmp_path, "cells", (8, 9), np.dtype(np.uint8), (4, 4), version=version)).sum() == 16
    for shape, dtype, chunk in (((8, 8), np.uint8, (4, 4)), ((8, 9), np.uint16, (4, 4)), ((8, 9), np.uint8, (4, 2))):
        with pytest.raises(DataError, match=r"labels/cells/0: expected .*, got .*; remove it"):
            create(tmp_path, "cells", shape, np.dtype(dtype), chunk, version=version)
    with pytest.raises(DataError, match="labels of whole numbers, got float32"):
        create(tmp_path, "more", (8, 9), np.dtype(np.float32), (4, 4), version=version)


def test_versions_are_not_mixed(tmp_path):
    path = put_stack(tmp_path / "a.zarr", "0.4")
    with pytest.raises(DataError, match=r"no store, or one of OME-Zarr 0\.5, got one of 0\.4"):
        omezarr.create_labels(path, "cells", (8, 9), np.dtype(np.uint8), (4, 4), version="0.5")


def test_what_was_not_predicted_is_not_finished(tmp_path):
    with pytest.raises(DataError, match="an array that was created as `cells`, got none"):
        omezarr.finish(tmp_path, "cells", like=like((4, 4), (1.0, 1.0)), values=None, source="")
    omezarr.create_labels(tmp_path, "cells", (4, 5), np.dtype(np.uint8), (4, 4))
    with pytest.raises(DataError, match="an array of 4×4, got 4×5"):
        omezarr.finish(tmp_path, "cells", like=like((4, 4), (1.0, 1.0)), values=None, source="")


@VERSIONS
@pytest.mark.parametrize("killed_at", range(0, 14, 2))
def test_finish_is_completed_after_a_kill_and_shows_nothing_before(tmp_path, monkeypatch, version, killed_at):
    labels = RNG.integers(0, 3, (520, 300)).astype(np.uint8)
    omezarr.create_labels(tmp_path / "a.zarr", "cells", labels.shape, labels.dtype, (256, 256), version=version)[0:520, 0:300] = labels
    ask = {"like": like(labels.shape, (1.0, 1.0)), "values": {1: "one"}, "source": "", "version": version}
    left = [killed_at]

    def dying(function):
        def counted(*arguments):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*arguments)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(omezarr, "write_json", dying(write_json))
        patch.setattr(omezarr.ChunkedArray, "__setitem__", dying(omezarr.ChunkedArray.__setitem__))
        try:
            omezarr.finish(tmp_path / "a.zarr", "cells", **ask)
        except KeyboardInterrupt:
            with pytest.raises(DataError):
                read_image(tmp_path / "a.zarr")
    omezarr.finish(tmp_path / "a.zarr", "cells", **ask)
    once = {path: path.read_bytes() for path in (tmp_path / "a.zarr").rglob("*") if path.is_file()}
    np.testing.assert_array_equal(read_image(tmp_path / "a.zarr").array[0], labels)
    level = read_image(tmp_path / "a.zarr" / "labels" / "cells" / "1").array[0]
    np.testing.assert_array_equal(level[:, :3], slow_halved(labels[:, :6], (260, 3), vote=True))
    omezarr.finish(tmp_path / "a.zarr", "cells", **ask)
    assert {path: path.read_bytes() for path in (tmp_path / "a.zarr").rglob("*") if path.is_file()} == once


def test_a_second_label_map_is_listed_beside_the_first(tmp_path):
    path = put_stack(tmp_path / "a.zarr")
    before = (path / ".zattrs").read_text()
    for name in ("one", "two", "one"):
        omezarr.create_labels(path, name, (4, 4), np.dtype(np.uint8), (4, 4))
        omezarr.finish(path, name, like=like((4, 4), (1.0, 1.0)), values=None, source="../..")
    assert json.loads((path / "labels" / ".zattrs").read_text()) == {"labels": ["one", "two"]}
    assert (path / ".zattrs").read_text() == before
    assert open_volume(path).shape_vox == (5, 12, 14)


def test_a_level_is_made_from_a_chunk_at_a_time(tmp_path):
    class Counted:
        """Labels (*S) that remember the most that was asked for at once."""

        shape, dtype, largest = (64, 512, 512), np.dtype(np.uint8), 0

        def __getitem__(self, part):
            size = [min(span.stop, n) - span.start for span, n in zip(part, self.shape, strict=True)]
            self.largest = max(self.largest, int(np.prod(size)))
            return np.ones(size, np.uint8)

    finer = Counted()
    coarser = omezarr.create_labels(tmp_path, "a", (32, 256, 256), np.dtype(np.uint8), (16, 32, 32))
    omezarr.halve(finer, coarser, vote=True)
    assert finer.largest == 16 * 32 * 32
    assert everything(coarser).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_axes_that_are_mirrored_keep_their_spacing_and_lose_their_origin(tmp_path, mirrored):
    geometry = like((4, 6), (0.5, 0.25), (7.0, 8.0))
    if mirrored:
        geometry.affine[0, 0] *= -1
    omezarr.create_labels(tmp_path, "a", (4, 6), np.dtype(np.uint8), (4, 4))
    omezarr.finish(tmp_path, "a", like=geometry, values=None, source="")
    image = read_image(tmp_path)
    assert image.spacing_mm == (0.5, 0.25)
    assert image.affine[:-1, -1].tolist() == ([0.0, 0.0] if mirrored else [7.0, 8.0])


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((RunError, DataError), match=r"file/a\.zarr"):
        omezarr.create_labels(tmp_path / "file" / "a.zarr", "cells", (4, 4), np.dtype(np.uint8), (4, 4))
    array = omezarr.create_labels(tmp_path / "b.zarr", "cells", (4, 4), np.dtype(np.uint8), (4, 4))
    (tmp_path / "b.zarr" / "labels" / "cells" / "0" / "0").write_text("in the way")
    with pytest.raises(RunError, match=r"b\.zarr/labels/cells/0: expected a store that can be written"):
        array[0:4, 0:4] = np.ones((4, 4))


def fill(place: str, row: int) -> None:
    """What a worker does: opens or creates the array, writes its row of chunks, marks it."""
    array = omezarr.create_labels(Path(place), "cells", (16, 16), np.dtype(np.uint8), (4, 4))
    array[row * 4 : row * 4 + 4, 0:16] = np.full((4, 16), row + 1)
    Documents(Path(place)).mark(f"cells/{row}")


def test_many_processes_write_one_label_map(tmp_path):
    workers = [FORKS.Process(target=fill, args=(str(tmp_path), row)) for row in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert Documents(tmp_path).marked("cells/") == {f"cells/{row}" for row in range(4)}
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / "labels" / "cells" / "0", mode="r")[...], np.arange(16)[:, None] // 4 + np.ones((16, 16))
    )


@pytest.mark.parametrize("place", ["folder", "memory://documents"])
def test_documents_and_marks_are_remembered_and_removed(tmp_path, place):
    documents = Documents(tmp_path / "new" if place == "folder" else Path(place))
    assert documents.read("plan") is None
    assert documents.marked() == set()
    documents.write("plan", {"a": [1, 2.5, None]})
    documents.write("plan", {"a": 1})
    for key in ("b/0,1", "b/0,2", "c"):
        documents.mark(key)
        documents.mark(key)
    again = Documents(tmp_path / "new" if place == "folder" else Path(place))
    assert again.read("plan") == {"a": 1}
    assert again.marked() == {"b/0,1", "b/0,2", "c"}
    assert again.marked("b/") == {"b/0,1", "b/0,2"}
    again.remove("marks/b")
    assert again.marked() == {"c"}
    again.remove()
    assert (again.read("plan"), again.marked()) == (None, set())
    assert not (tmp_path / "new" / ".microtome").exists()


def test_a_damaged_document_is_refused(tmp_path):
    Documents(tmp_path).write("plan", {"a": 1})
    (tmp_path / ".microtome" / "plan.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"\.microtome/plan\.json: expected JSON, got damaged metadata"):
        Documents(tmp_path).read("plan")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/\.microtome/marks: expected a store that can be written"):
        Documents(tmp_path / "file").mark("a")


@pytest.mark.parametrize("place", ["folder", "memory://removed"])
def test_a_store_is_removed_and_can_be_made_anew(tmp_path, place):
    place = tmp_path / "a" if place == "folder" else Path(place)
    for shape in ((4, 4), (3, 5)):
        array = omezarr.create_labels(place, "cells", shape, np.dtype(np.uint8), (2, 2))
        assert not everything(array).any()
        array[0:2, 0:2] = np.ones((2, 2))
        remove_store(place)
        assert read_json(place / "labels" / "cells" / "0", ".zarray") is None
    assert not (tmp_path / "a").exists()


def test_a_label_map_leads_to_its_image_from_wherever_it_was_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert omezarr.source_of(Path("data/a.tif"), Path("out/a.ome.zarr")) == "../../../../data/a.tif"
    assert omezarr.source_of(tmp_path / "out" / "a.ome.zarr", Path("out/a.ome.zarr")) == "../.."
    assert omezarr.source_of(Path("s3://b/a.zarr"), Path("out/a.ome.zarr")) == "s3://b/a.zarr"
    assert omezarr.source_of(Path("a.tif"), Path("s3://b/a.zarr")) == ""
