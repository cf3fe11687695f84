"""The compiled warp is the tensor code's to rounding, the same bytes on any level and thread, and reads nothing it should not."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.training import warp as module
from microtome.training.warp import Patch, Warp, compiled, resample_patch, warp_patch
from tests.test_warp import KINDS, movement

_warp = pytest.importorskip("microtome.training._warp", reason="the warp was not compiled here (no C compiler at installation)")
pytestmark = pytest.mark.skipif(not compiled(), reason="the compiled warp is switched off or of another version")


def crop_of(rng: np.random.Generator, shape: tuple[int, ...], channels: int = 1, weighted: bool = False) -> Patch:
    """Noise in every voxel, the hardest image to sample."""
    image = torch.from_numpy(rng.uniform(-1, 1, (channels, *shape)).astype(np.float32))
    label = torch.from_numpy(rng.integers(-1, 4, shape).astype(np.int16))
    return Patch(image, label, torch.from_numpy(rng.uniform(0, 9, shape).astype(np.float32)) if weighted else None)


@st.composite
def problems(draw: st.DrawFn, most: int = 40) -> tuple[Patch, Warp, np.ndarray, tuple[int, ...]]:
    """A crop, a movement, the middle in voxels of the crop (seldom far outside of it), and the shape of the patch."""
    dims = draw(st.integers(2, 3))
    # Axes of one voxel are a case of their own.
    sizes = st.one_of(st.integers(1, most if dims == 2 else most // 2), st.just(1))
    shape, patch = (tuple(draw(sizes) for _ in range(dims)) for _ in range(2))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    crop = crop_of(rng, shape, draw(st.integers(1, 3)), draw(st.booleans()))
    warp = movement(seed, patch, draw(st.sampled_from(KINDS)))
    centre = (np.array(shape) - 1) / 2 + rng.normal(size=dims) * draw(st.sampled_from([0, 3, 10, 300]))
    return crop, warp, centre, patch


def arguments_of(crop: Patch, warp: Warp, centre: np.ndarray, patch: tuple[int, ...]) -> tuple[Any, tuple[Any, Any]]:
    """What the compiled function takes: the crop; affine and bend."""
    affine = np.column_stack([warp.matrix, centre - warp.matrix @ ((np.array(patch) - 1) / 2)])
    bend = None
    if warp.bend is not None:
        turned = np.tensordot(warp.matrix, warp.bend.control, 1).astype(np.float32)
        bend = (turned, *module._bases(warp.bend, patch))
    return module._arrays(crop), (affine, bend)


def filled(crop: Patch, patch: tuple[int, ...], value: int = 99) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    weight = None if crop.weight is None else np.full(patch, value, np.float32)
    return np.full((len(crop.image), *patch), value, np.float32), np.full(patch, value, np.int16), weight


def clear(source_DS: np.ndarray) -> np.ndarray:
    """Where no coordinate is so near to the middle between two voxels that rounding decides which is the nearest."""
    found: np.ndarray = (np.abs(source_DS - np.floor(source_DS) - 0.5) > 1e-3).all(0)
    return found


def assert_same(one: Patch, other: Patch, source_DS: np.ndarray, tolerance: float = 3e-3) -> None:
    sure = torch.from_numpy(clear(source_DS))
    assert (one.image - other.image).abs().max() < tolerance
    assert torch.equal(one.label[sure], other.label[sure])
    assert (one.weight is None) == (other.weight is None)
    if one.weight is not None and other.weight is not None:
        # Beyond half a voxel of an axis of one voxel the weight jumps to 1, as the label does to -1.
        assert (one.weight - other.weight).abs()[sure].numpy().max(initial=0) < 5 * tolerance


@given(problem=problems())
@settings(max_examples=300, deadline=None)
def test_the_compiled_warp_is_the_tensor_code_s(problem: tuple[Patch, Warp, np.ndarray, tuple[int, ...]]) -> None:
    crop, warp, centre, patch = problem
    source = warp.coordinates(centre, patch)
    assert_same(warp_patch(crop, warp, centre, patch), resample_patch(crop, source), source)


@given(problem=problems(most=24))
@settings(max_examples=60, deadline=None)
def test_every_instruction_set_gives_the_same_bytes(problem: tuple[Patch, Warp, np.ndarray, tuple[int, ...]]) -> None:
    crop, warp, centre, patch = problem
    given_arrays, taken = arguments_of(crop, warp, centre, patch)
    results = []
    for level in (0, *range(1, _warp.levels() + 1)):
        result = filled(crop, patch)
        _warp.resample(given_arrays, result, *taken, level)
        results.append([array.tobytes() for array in result if array is not None])
    assert all(result == results[0] for result in results)
    moved = warp_patch(crop, warp, centre, patch)
    assert [tensor.numpy().tobytes() for tensor in moved if tensor is not None] == results[0]


@pytest.mark.parametrize("shape", [(9, 700), (5, 6, 300), (1, 7, 1), (4, 4)])
def test_what_is_not_moved_comes_back_bit_for_bit(shape: tuple[int, ...]) -> None:
    crop = crop_of(np.random.default_rng(0), shape, 2, weighted=True)
    moved = warp_patch(crop, Warp(np.eye(len(shape))), (np.array(shape) - 1) / 2, shape)
    assert torch.equal(moved.image, crop.image)
    assert torch.equal(moved.label, crop.label)
    assert torch.equal(moved.weight, crop.weight) if moved.weight is not None and crop.weight is not None else False
    flipped = warp_patch(crop, Warp(-np.eye(len(shape))), (np.array(shape) - 1) / 2, shape)
    axes = list(range(len(shape)))
    assert torch.equal(flipped.image, crop.image.flip([axis + 1 for axis in axes]))
    assert torch.equal(flipped.label, crop.label.flip(axes))


def test_rows_longer_than_a_piece_are_one_line() -> None:
    rng = np.random.default_rng(1)
    crop, patch, centre = crop_of(rng, (40, 800), weighted=True), (13, 1027), np.array([20.3, 401.7])
    warp = movement(1, patch, "bspline")
    source = warp.coordinates(centre, patch)
    assert_same(warp_patch(crop, warp, centre, patch), resample_patch(crop, source), source, 2e-2)


def test_outside_are_a_mirror_no_label_and_a_weight_of_1() -> None:
    crop = Patch(torch.arange(6.0).repeat(4, 1)[None], torch.ones(4, 6, dtype=torch.int16), torch.full((4, 6), 5.0))
    moved = warp_patch(crop, Warp(np.eye(2)), np.array([1.5, 2.0]), (4, 13))
    assert moved.image[0, 0].tolist() == [4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2]
    assert moved.label[0].tolist() == [-1] * 4 + [1] * 6 + [-1] * 3
    assert moved.weight is not None
    assert moved.weight[0].tolist() == [1] * 4 + [5] * 6 + [1] * 3
    # Half a voxel beyond the outermost centre it is half of the way to 1.
    half = warp_patch(crop, Warp(np.eye(2)), np.array([1.5, 2.5]), (4, 13)).weight
    assert half is not None
    assert half[0, 3:10].tolist() == [3, 5, 5, 5, 5, 5, 3]


def test_one_sample_is_the_same_on_any_thread_and_every_time() -> None:
    rng = np.random.default_rng(3)
    crop, patch = crop_of(rng, (60, 50, 40), 2, weighted=True), (40, 40, 40)
    warps = [movement(seed, patch, "bspline") for seed in range(6)]
    one_by_one = [warp_patch(crop, warp, np.array([30.0, 25.0, 20.0]), patch) for warp in warps]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda warp: warp_patch(crop, warp, np.array([30.0, 25.0, 20.0]), patch), warps * 3))
    for number, moved in enumerate(together):
        for one, other in zip(moved, one_by_one[number % 6], strict=True):
            assert one is not None
            assert torch.equal(one, other)


def test_other_layouts_are_read_as_what_they_show() -> None:
    crop = crop_of(np.random.default_rng(4), (12, 10), 3, weighted=True)
    assert crop.weight is not None
    turned = Patch(*(tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (crop.image, crop.label, crop.weight)))
    assert not turned.image.is_contiguous()
    warp, centre = Warp(np.array([[0.9, 0.3], [-0.2, 1.1]])), np.array([5.0, 5.0])
    for one, other in zip(warp_patch(crop, warp, centre, (8, 8)), warp_patch(turned, warp, centre, (8, 8)), strict=True):
        assert one is not None
        assert torch.equal(one, other)


# ---- when it is not used ----


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled()
    crop, warp, centre = crop_of(np.random.default_rng(5), (12, 10)), Warp(np.array([[0.9, 0.3], [-0.2, 1.1]])), np.array([5.0, 5.0])
    monkeypatch.setattr(_warp, "resample", None)
    with pytest.raises(TypeError, match="not callable"):
        warp_patch(crop, warp, centre, (8, 8))
    monkeypatch.setenv("MICROTOME_COMPILED", "0")
    assert not compiled()
    moved = warp_patch(crop, warp, centre, (8, 8))
    assert torch.equal(moved.image, resample_patch(crop, warp.coordinates(centre, (8, 8))).image)


def test_a_build_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERFACE", _warp.INTERFACE + 1)
    assert not compiled()


def test_other_types_take_the_tensor_code() -> None:
    crop, warp = crop_of(np.random.default_rng(6), (12, 10)), Warp(np.array([[0.9, 0.3], [-0.2, 1.1]]))
    wide = crop._replace(label=crop.label.to(torch.int32))
    moved = warp_patch(wide, warp, np.array([5.0, 5.0]), (8, 8))
    assert_same(warp_patch(crop, warp, np.array([5.0, 5.0]), (8, 8)), moved, warp.coordinates(np.array([5.0, 5.0]), (8, 8)))


# ---- what is wrong ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e300, 3e9, -3e9])
@pytest.mark.parametrize("where", ["matrix", "origin", "control"])
@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7), (1, 1, 1)])
def test_no_coordinate_leads_out_of_the_crop(value: float, where: str, shape: tuple[int, ...]) -> None:
    dims, size = len(shape), int(np.prod(shape))
    # What lies before and behind the crop in memory is not what may be seen.
    around = np.full(3 * size, 1e9, np.float32)
    around[size : 2 * size] = 1
    crop = (around[size : 2 * size].reshape(1, *shape), np.ones(shape, np.int16), around[size : 2 * size].reshape(shape))
    affine, control = np.eye(dims, dims + 1), np.zeros((dims, *(5,) * dims), np.float32)
    with np.errstate(over="ignore"):
        {"matrix": affine[:, :dims], "origin": affine[:, dims], "control": control}[where][...] = value
    bases = [np.full((5, n), 0.2, np.float32) for n in shape]
    for level in range(1, _warp.levels() + 1):
        result = np.full((1, *shape), 99, np.float32), np.full(shape, 99, np.int16), np.full(shape, 99, np.float32)
        _warp.resample(crop, result, affine, (control, *bases), level)
        assert set(np.unique(result[0])) <= {1.0}
        assert set(np.unique(result[1])) <= {-1, 1}
        assert set(np.unique(result[2])) <= {1.0}


def good() -> dict[str, Any]:
    """Arguments that fit."""
    crop = np.zeros((2, 6, 7), np.float32), np.zeros((6, 7), np.int16), None
    patch = np.full((2, 3, 4), 99, np.float32), np.full((3, 4), 99, np.int16), None
    bend = np.zeros((2, 5, 5), np.float32), np.zeros((5, 3), np.float32), np.zeros((5, 4), np.float32)
    return {"crop": crop, "patch": patch, "affine": np.eye(2, 3), "bend": bend, "level": 0}


def with_part(name: str, place: int, value: object) -> dict[str, Any]:
    changed = list(good()[name])
    changed[place] = value
    return {name: tuple(changed)}


READ_ONLY = np.frombuffer(bytes(24), np.int16).reshape(3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_part("crop", 0, np.zeros((2, 6, 7))), "image must be of format 'f'"),
        (with_part("crop", 0, np.zeros((2, 6, 7), ">f4")), "image must be of format 'f'"),
        (with_part("crop", 0, np.zeros((6, 7), np.float32)), "with 3 axes"),
        (with_part("crop", 0, np.zeros((2, 7, 6), np.float32)), "image and label must have the same shape"),
        (with_part("crop", 0, np.zeros((2, 6, 14), np.float32)[:, :, ::2]), "image must be a contiguous array"),
        (with_part("crop", 0, None), "image must be a contiguous array"),
        (with_part("crop", 0, b"bytes"), "image must be of format 'f'"),
        (with_part("crop", 1, np.zeros((6, 7), np.int32)), "label must be of format 'h'"),
        (with_part("crop", 2, np.zeros((6, 8), np.float32)), "label and weight must have the same shape"),
        (with_part("crop", 2, np.zeros((6, 7), np.float32)), "both or none a weight"),
        (with_part("patch", 0, np.zeros((1, 3, 4), np.float32)), "as many channels"),
        (with_part("patch", 1, READ_ONLY), "label must be a contiguous array that may be written"),
        (with_part("patch", 2, np.zeros((3, 4), np.float32)), "both or none a weight"),
        (with_part("bend", 0, np.zeros((2, 5, 6), np.float32)), "basis 1 must be"),
        (with_part("bend", 0, np.zeros((3, 5, 5), np.float32)), "basis 0 must be"),
        (with_part("bend", 0, np.zeros((2, 0, 5), np.float32)), "basis 0 must be"),
        (with_part("bend", 1, np.zeros((5, 4), np.float32)), "basis 0 must be"),
        (with_part("bend", 2, np.zeros((5, 4))), "basis must be of format 'f'"),
        ({"bend": good()["bend"][:2]}, "bend must be None or a tuple"),
        ({"bend": [1]}, "bend must be None or a tuple"),
        ({"crop": list(good()["crop"])}, "must be tuples of image, label and weight"),
        ({"crop": (np.zeros((2, 0, 7), np.float32), np.zeros((0, 7), np.int16), None)}, "sizes must be 1 to"),
        ({"patch": (np.zeros((2, 3, 0), np.float32), np.zeros((3, 0), np.int16), None)}, "sizes must be 1 to"),
        ({"affine": np.eye(3)}, "affine must be"),
        ({"affine": np.eye(3, 4)}, "with 4 axes"),
        ({"affine": np.eye(2, 3, dtype=np.float32)}, "affine must be of format 'd'"),
        ({"level": 9}, "level must be 0 to"),
        ({"level": -1}, "level must be 0 to"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(change: dict[str, Any], words: str) -> None:
    arguments = good() | change
    with pytest.raises(ValueError, match=words):
        _warp.resample(*arguments.values())
    written = [array for array in arguments["patch"] if isinstance(array, np.ndarray) and (array == 99).any()]
    assert all((array == 99).all() for array in written)
    _warp.resample(*good().values())


def test_an_axis_that_is_too_long_is_refused() -> None:
    long = np.zeros((1, _warp.MOST_ALONG_AXIS + 1), np.int16)
    arguments = good() | {"crop": (np.zeros((1, 1, _warp.MOST_ALONG_AXIS + 1), np.float32), long, None)}
    with pytest.raises(ValueError, match="sizes must be 1 to 4194304"):
        _warp.resample(*arguments.values())
