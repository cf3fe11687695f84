"""Specks, largest components and holes against the slow road over the whole volume, in any blocks; and what a user may type wrong."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.morphology import remove_small_objects

from microtome.errors import ConfigError
from microtome.inference.asked import CleanUp, least_voxels, parse_size
from microtome.inference.cleanup import clean

CHOICES = st.one_of(st.booleans(), st.sets(st.sampled_from([1, 3])).map(lambda chosen: tuple(sorted(chosen))))
RULES = st.builds(CleanUp, keep_largest=CHOICES, fill_holes=CHOICES, min_size_vox=st.integers(0, 6))


def cleaned(labels: np.ndarray, rules: CleanUp, block: tuple[int, ...] | None = None, **changes: Any) -> np.ndarray:
    """A new array; classes 0, 1, 3 with 0 as the background, voxels of 1 mm and one block unless told otherwise."""
    out = np.full_like(labels, 55)
    options: dict[str, Any] = {"classes": (0, 1, 3), "background": 0, "spacing_mm": (1.0,) * labels.ndim, "scratch": np.zeros}
    clean(labels, out, rules, block_vox=block or labels.shape, **{**options, **changes})
    return out


def chosen(asked: bool | tuple[int, ...], foreground: list[int]) -> list[int]:
    if asked is True:
        return foreground
    return list(asked or ())


def slowly(labels: np.ndarray, rules: CleanUp, foreground: list[int], background: int) -> np.ndarray:
    """The definition, one component at a time on the whole volume."""
    out = labels.copy()
    for number in foreground:
        parts, count = ndimage.label(labels == number)
        sizes = [int((parts == part).sum()) for part in range(1, count + 1)]
        for part, size in enumerate(sizes, 1):
            beaten = number in chosen(rules.keep_largest, foreground) and part != sizes.index(max(sizes)) + 1
            if beaten or size < rules.min_size_vox:
                out[parts == part] = background
    holes, count = ndimage.label(out == background)
    before = out.copy()
    inner = tuple(slice(1, -1) if size > 1 else slice(None) for size in out.shape)
    outer = np.ones(out.shape, bool)
    outer[inner] = False
    for part in range(1, count + 1):
        hole = holes == part
        around = set(before[ndimage.binary_dilation(hole) & ~hole].tolist())
        if not (hole & outer).any() and len(around) == 1 and around <= set(chosen(rules.fill_holes, foreground)):
            out[hole] = around.pop()
    return out


@st.composite
def volumes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """Blobs of classes with specks and holes, unannotated voxels among them, and the sides of blocks."""
    shape = draw(st.one_of(hnp.array_shapes(min_dims=2, max_dims=2, max_side=16), hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), draw(st.sampled_from([0.0, 0.7, 1.2])))
    cuts = np.quantile(smooth, sorted(draw(st.lists(st.floats(0, 1), min_size=3, max_size=3))))
    # The classes lie inside of each other like shells, which makes holes.
    labels = np.array(draw(st.permutations([0, 1, 3, 0])), np.int16)[np.digitize(smooth, cuts)]
    labels[rng.random(shape) < draw(st.sampled_from([0.0, 0.02, 0.1]))] = draw(st.sampled_from([-1, 0, 7]))
    return labels, tuple(draw(st.integers(1, size + 1)) for size in shape)


@given(volumes(), RULES)
@settings(max_examples=200, deadline=None)
def test_any_blocks_give_what_the_definition_gives_on_the_whole(volume: tuple[np.ndarray, tuple[int, ...]], rules: CleanUp) -> None:
    labels, block = volume
    expected = slowly(labels, rules, [1, 3], 0)
    np.testing.assert_array_equal(cleaned(labels, rules, block), expected)
    np.testing.assert_array_equal(cleaned(labels, rules), expected)


@given(volumes(), RULES)
@settings(max_examples=60, deadline=None)
def test_any_class_may_be_the_background_and_the_labels_may_be_written_over(
    volume: tuple[np.ndarray, tuple[int, ...]], rules: CleanUp
) -> None:
    labels, block = volume
    # The classes 0 and 3 change places.
    labels = np.select([labels == 0, labels == 3], [3, 0], labels).astype(np.int16)
    rules = CleanUp(keep_largest=bool(rules.keep_largest), fill_holes=(0,) if rules.fill_holes else False, min_size_vox=rules.min_size_vox)
    expected = slowly(labels, rules, [0, 1], 3)
    clean(labels, labels, rules, classes=(0, 1, 3), background=3, spacing_mm=(1.0,) * labels.ndim, block_vox=block, scratch=np.zeros)
    np.testing.assert_array_equal(labels, expected)


@given(volumes())
@settings(max_examples=60, deadline=None)
def test_holes_of_one_class_alone_are_those_of_scipy(volume: tuple[np.ndarray, tuple[int, ...]]) -> None:
    mask, block = volume[0] == 1, volume[1]
    found = cleaned(mask.astype(np.uint8), CleanUp(fill_holes=True), block, classes=(0, 1))
    # SciPy takes what is outside of the image as open along an axis with one voxel too.
    expected = np.squeeze(mask)
    expected = ndimage.binary_fill_holes(expected) if expected.ndim else expected
    np.testing.assert_array_equal(np.squeeze(found), expected)


@given(volumes(), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_small_objects_go_as_in_scikit_image(volume: tuple[np.ndarray, tuple[int, ...]], least: int) -> None:
    mask, block = volume[0] == 1, volume[1]
    found = cleaned(mask.astype(np.int16), CleanUp(min_size_vox=least), block, classes=(0, 1))
    np.testing.assert_array_equal(found, remove_small_objects(mask, max_size=least - 1))


def picture(text: str) -> np.ndarray:
    return np.array([[int(letter) for letter in line] for line in text.split()], np.int16)


def test_a_hole_is_what_one_class_alone_encloses() -> None:
    labels = picture("""
        1111111110
        1000101310
        1011101110
        1010111111
        1110100001
        1111133001
        1011133331
        1111111111
    """)
    # Not filled: what 1 and 3 enclose together. Filled: four pockets of 1, one of them joined to another only by a corner.
    found = cleaned(labels, CleanUp(fill_holes=True))
    np.testing.assert_array_equal(
        found,
        picture("""
            1111111110
            1111111310
            1111111110
            1111111111
            1111100001
            1111133001
            1111133331
            1111111111
        """),
    )
    np.testing.assert_array_equal(cleaned(labels, CleanUp(fill_holes=(3,))), labels)


def test_a_speck_inside_goes_first_and_leaves_a_hole_that_is_filled() -> None:
    labels = picture("11111 11311 10111 11111")
    assert (cleaned(labels, CleanUp(fill_holes=True, min_size_vox=2)) == 1).all()
    # The speck is a neighbour of the hole: of two classes around it none is alone.
    assert (cleaned(picture("1111 1301 1111"), CleanUp(fill_holes=True)) == picture("1111 1301 1111")).all()


def test_of_equally_large_components_the_first_stays() -> None:
    labels = picture("0110 0000 1100 0000 3033")
    np.testing.assert_array_equal(cleaned(labels, CleanUp(keep_largest=True)), picture("0110 0000 0000 0000 0033"))
    np.testing.assert_array_equal(cleaned(labels, CleanUp(keep_largest=(1,)), (1, 1)), picture("0110 0000 0000 0000 3033"))


def test_the_largest_goes_too_where_it_is_too_small() -> None:
    assert not cleaned(picture("0110 0000 1000"), CleanUp(keep_largest=True, min_size_vox=3)).any()


@pytest.mark.parametrize(
    ("size_mm", "spacing", "least"),
    [(2.1, (0.3, 1.0), 7), (0.5, (0.1, 0.1, 0.1), 500), (0.5, (1.0, 0.5, 0.5), 2), (0.51, (1.0, 0.5, 0.5), 3), (0, (2.0, 2.0), 0)],
)
def test_millimetres_are_volumes_and_areas(size_mm: float, spacing: tuple[float, ...], least: int) -> None:
    assert least_voxels(CleanUp(min_size_mm=size_mm), spacing) == least


def test_the_larger_of_two_least_sizes_counts() -> None:
    labels = picture("110111011110")
    found = cleaned(labels, CleanUp(min_size_vox=3, min_size_mm=0.4), spacing_mm=(0.1, 1.0))
    np.testing.assert_array_equal(found, picture("000000011110"))


def test_nothing_asked_for_is_a_copy_that_takes_no_store() -> None:
    labels = picture("0110 0003")

    def no_store(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        raise AssertionError(shape, dtype)

    np.testing.assert_array_equal(cleaned(labels, CleanUp(), (1, 3), scratch=no_store), labels)
    np.testing.assert_array_equal(cleaned(labels, CleanUp(min_size_vox=1), scratch=no_store), labels)
    assert not CleanUp()
    assert CleanUp(fill_holes=(1,))


def test_a_store_on_disk_is_enough(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    smooth = ndimage.gaussian_filter(rng.normal(size=(40, 30, 20)), 1)
    labels = np.digitize(smooth, np.quantile(smooth, [0.3, 0.6])).astype(np.uint8)
    out = np.memmap(tmp_path / "out", np.uint8, "w+", shape=labels.shape)
    stores: list[np.ndarray] = []

    def scratch(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        stores.append(np.memmap(tmp_path / f"scratch{len(stores)}", dtype, "w+", shape=shape))
        return stores[-1]

    rules = CleanUp(keep_largest=(2,), fill_holes=True, min_size_vox=20)
    spacing = (1.0, 1.0, 1.0)
    clean(labels, out, rules, classes=(0, 1, 2), background=0, spacing_mm=spacing, block_vox=(16, 16, 16), scratch=scratch)
    assert len(stores) == 1
    np.testing.assert_array_equal(out, slowly(labels, rules, [1, 2], 0))
    assert (out != labels).any()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50", (50.0, "vox")),
        ("0.5mm", (0.5, "mm")),
        (" 3 mm ", (3.0, "mm")),
        (".5mm", (0.5, "mm")),
        ("2.", (2.0, "vox")),
        ("0", (0.0, "vox")),
    ],
)
def test_sizes_are_read(text: str, size: tuple[float, str]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "mm", "-5", "1e3", "5 cm", "5mm3", "5,5", "nan", "inf", "0x10", "5 5", "٣ km", "9" * 400])
def test_other_words_for_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--min-size: expected a number of voxels"):
        parse_size(text)


@pytest.mark.parametrize("size", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["min_size_vox", "min_size_mm"])
def test_sizes_that_are_none_are_refused(name: str, size: float) -> None:
    with pytest.raises(ConfigError, match=f"clean-up: {name}: expected a size"):
        CleanUp(**{name: size})


@pytest.mark.parametrize("rules", [CleanUp(keep_largest=(2,)), CleanUp(fill_holes=(0,)), CleanUp(keep_largest=(1, -1))])
def test_classes_that_are_none_and_the_background_are_refused(rules: CleanUp) -> None:
    with pytest.raises(ConfigError, match=r"expected classes other than the background \(1, 3\)"):
        cleaned(picture("0110"), rules)
