"""Arrays on disk: parts come back as they were written, from either kind; a write that failed leaves nothing."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from microtome.errors import RunError
from microtome.training import arrays as module
from microtome.training.arrays import IMAGE_TYPES, MAPPED, SHARDED, Arrays, Scale, packed_bytes, smallest, write_array

RNG_SEED = 0
KINDS = (MAPPED, SHARDED)
TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.float16, np.float32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and shards so small that a small array has many of both."""
    monkeypatch.setattr(module, "_CHUNKS", {2: (4, 8, 2), 3: (3, 6, 1)})


def written(folder: Path, array: np.ndarray, kind: str, dims: int) -> Any:
    write_array(folder / f"a.image{kind}", array, dims)
    return Arrays().find(folder / "a", "image", array.shape)


def volume(shape: tuple[int, ...], kind: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(RNG_SEED).normal(60, 20, shape).astype(kind)


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Whole numbers and slices of step 1, as many as the array has axes or fewer."""

    def one(size: int) -> int | slice:
        if draw(st.booleans()):
            return draw(st.integers(-size, size - 1))
        start, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        return slice(draw(st.sampled_from([None, start, start - size] if start else [None, 0])), draw(st.sampled_from([None, stop])))

    return tuple(one(size) for size in shape[: draw(st.integers(1, len(shape)))])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("shape", "dims"), [((2, 13, 17), 2), ((1, 5, 9, 11), 2), ((7, 9, 8), 2), ((2, 7, 8, 13), 3), ((6, 3, 7), 3)])
@pytest.mark.parametrize("kind", TYPES)
def test_any_part_is_the_same_from_either_kind(shape: tuple[int, ...], dims: int, kind: Any, tmp_path: Path) -> None:
    array = volume(shape, kind)
    mapped, sharded = (written(tmp_path / name, array, name, dims) for name in KINDS)

    @given(part=parts(shape))
    @settings(max_examples=15, deadline=None)
    def check(part: tuple[int | slice, ...]) -> None:
        for stored in (mapped, sharded):
            assert stored[part].dtype == array.dtype
            assert np.array_equal(stored[part], array[part])

    check()
    assert sharded.shape == mapped.shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_keeps_its_sign(kind: str, tmp_path: Path) -> None:
    stored = written(tmp_path, np.full((1, 40, 40), -0.0, np.float32), kind, 2)
    assert np.signbit(stored[:, 3:9]).all()


def test_chunks_are_packed_in_shards_with_a_checksum_of_their_index(tmp_path: Path) -> None:
    written(tmp_path, volume((2, 40, 300, 70), np.uint16), SHARDED, 3)
    metadata = json.loads((tmp_path / "a.image.zarr" / "zarr.json").read_text())
    # 256 along each axis, but no more than the array needs.
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [1, 64, 256, 96]
    (sharding,) = metadata["codecs"]
    assert sharding["configuration"]["chunk_shape"] == [1, 32, 32, 32]
    blosc = sharding["configuration"]["codecs"][1]["configuration"]
    assert (blosc["cname"], blosc["shuffle"], blosc["typesize"]) == ("lz4", "bitshuffle", 2)
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    # Two channels, two shards each along the longest axis, and the metadata: no folder in the folder.
    assert len([*(tmp_path / "a.image.zarr").iterdir()]) == 2 * 2 + 1


def test_sections_of_a_stack_are_chunks_of_their_own_for_a_2d_network(tmp_path: Path) -> None:
    written(tmp_path, volume((1, 6, 300, 70), np.uint8), SHARDED, 2)
    metadata = json.loads((tmp_path / "a.image.zarr" / "zarr.json").read_text())
    assert metadata["codecs"][0]["configuration"]["chunk_shape"] == [1, 1, 256, 256]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [1, 4, 512, 256]


def test_nothing_is_opened_before_a_part_is_read(tmp_path: Path) -> None:
    stored = Arrays().find(tmp_path / "not there", "image", (3, 4))
    assert stored.shape == (3, 4)
    with pytest.raises(FileNotFoundError):
        stored[0]


def files_open_in(folder: Path) -> list[str]:
    """The files there that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        # Other threads may close theirs meanwhile.
        with suppress(OSError):
            found.append(os.readlink(link))
    return [name for name in found if str(folder) in name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists a process's open files there")
def test_no_file_stays_open_of_a_chunked_array(tmp_path: Path) -> None:
    stored = written(tmp_path, volume((1, 64, 64)), SHARDED, 2)
    for _ in range(20):
        assert stored[:, :5].shape == (1, 5, 64)
    # The library's own threads close them, a moment after the values are there.
    deadline = time.monotonic() + 10
    while (left := files_open_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


def test_no_more_arrays_are_kept_open_than_asked(tmp_path: Path) -> None:
    for name in "ab":
        write_array(tmp_path / f"{name}.image.npy", volume((1, 4, 4)), 2)
    arrays = Arrays(most_open=1)
    first, second = (arrays.find(tmp_path / name, "image", (1, 4, 4)) for name in "ab")
    kept = first.opened(first.path)
    assert first.opened(first.path) is kept
    assert second[0, 0, 0] == kept[0, 0, 0]
    assert first.opened(first.path) is not kept


def test_a_damaged_shard_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    stored = written(tmp_path, volume((1, 64, 64)), SHARDED, 2)
    shard = next(path for path in stored.path.iterdir() if path.name != "zarr.json")
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"a\.image\.zarr: expected a whole stored array.*--resume"):
        stored[:, :5]


def test_what_lies_under_the_name_of_a_chunked_array_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.image.zarr").mkdir()
    (tmp_path / "a.image.zarr" / "0.0.0").write_bytes(b"of another day")
    array = volume((1, 64, 64))
    assert np.array_equal(written(tmp_path, array, SHARDED, 2)[:], array)


@pytest.mark.usefixtures("small_chunks")
def test_a_disk_that_fills_between_two_shards_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, open_store = [], tensorstore.open

    class Filling:
        """A store that holds one shard."""

        def __init__(self, store: Any) -> None:
            self.store = store

        def __getitem__(self, box: Any) -> Any:
            calls.append(box)
            if len(calls) == 2:
                raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']")
            return self.store[box]

    class Opened:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.store = open_store(*arguments, **options).result()

        def result(self) -> Any:
            return Filling(self.store)

    monkeypatch.setattr(module.ts, "open", Opened)
    with pytest.raises(RunError, match=r"a\.image\.zarr: .*No space left on device"):
        write_array(tmp_path / "a.image.zarr", volume((1, 20, 20)), 2)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_packed_size_is_told_from_the_middle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    array = volume((1, 64, 256, 64), np.uint8)
    written(tmp_path, array, SHARDED, 3)
    size = sum(path.stat().st_size for path in (tmp_path / "a.image.zarr").iterdir())
    assert packed_bytes(array, 3) == pytest.approx(size, rel=0.05)
    monkeypatch.setattr(module, "_SAMPLE_VALUES", array.size // 2)
    assert packed_bytes(array, 3) == pytest.approx(size, rel=0.05)
    # The edges of most images hold nothing: the middle promises no less than the whole takes.
    array[:, :, :64], array[:, :, -64:] = 0, 0
    assert packed_bytes(array, 3) > 1.8 * size / 2


# ---- smallest exact type ----


def exact_types(values: np.ndarray) -> list[type]:
    """By trying: the types that give back every byte."""
    found = []
    for kind in IMAGE_TYPES:
        with np.errstate(all="ignore"):
            back = values.astype(kind).astype(values.dtype)
        # Beyond a whole type's range a value can come back by going round.
        same = back.tobytes() == values.tobytes() and np.array_equal(values.astype(kind).astype(np.float64), values)
        if same and np.dtype(kind).itemsize < values.dtype.itemsize:
            found.append(kind)
    return found


VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, 127.0, 128.0, -128.0, -129.0, 255.0, 256.0, 32768.0, 65504.0, 65535.0, 65536.0, 0.1, 1e9]
)


@given(values=hnp.arrays(np.float32, st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3)), elements=VALUES))
@settings(max_examples=150, deadline=None)
def test_float_values_are_kept_in_the_first_type_that_gives_back_every_bit(values: np.ndarray) -> None:
    expected = next(iter(exact_types(values)), np.float32)
    found = smallest(values)
    assert found.dtype == expected
    assert found.astype(np.float32).tobytes() == values.tobytes()


@given(values=hnp.arrays(st.sampled_from([np.uint8, np.int16, np.uint16]), st.tuples(st.integers(1, 3), st.integers(1, 3))))
@settings(max_examples=100, deadline=None)
def test_whole_numbers_are_kept_in_the_first_type_that_holds_them(values: np.ndarray) -> None:
    found = smallest(values)
    assert found.dtype == next(iter(exact_types(values)), values.dtype)
    assert np.array_equal(found, values)


def test_truth_values_are_numbers() -> None:
    assert smallest(np.array([[True, False]])).tolist() == [[1, 0]]
    assert smallest(np.array([[True, False]])).dtype == np.uint8


def test_labels_take_one_byte_where_they_fit() -> None:
    assert smallest(np.array([[-1, 127]], np.int16), (np.int8,)).dtype == np.int8
    assert smallest(np.array([[-1, 128]], np.int16), (np.int8,)).dtype == np.int16


def test_a_scale_changes_each_channel_by_its_own_numbers() -> None:
    scale = Scale.of(np.array([[0, -np.inf], [10, np.inf], [5, 1], [2, 0]]))
    image = np.array([[[-3, 7, 99]], [[-3, 7, 99]]], np.float32)
    scale.apply(image)
    # The second channel is not clipped, and as its sd is 0 not divided either.
    assert image.tolist() == [[[-2.5, 1, 2.5]], [[-4, 6, 98]]]
