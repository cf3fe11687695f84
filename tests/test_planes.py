"""Which planes were painted: orthogonal ones, parts of planes, strokes, everything; and labels cut down to some of them."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from folders import text, tiff
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.data.case import NOT_ANNOTATED, Case, Plane, Planes
from microtome.data.dataset import open_dataset
from microtome.data.planes import annotated_planes, in_planes, keep_planes, parse_planes, plane_name
from microtome.data.synthetic import sparse_annotation
from microtome.errors import ConfigError

STANDARD: tuple[Plane, ...] = tuple(
    (axis, index) for axis, places in enumerate([(3, 11, 20), (4, 15, 26), (2, 18, 33)]) for index in places
)


def painted(shape: tuple[int, int, int], planes: tuple[Plane, ...]) -> np.ndarray:
    """Planes painted in full, by the definition: a voxel is annotated if its index along some axis is that of a plane."""
    label = np.full(shape, NOT_ANNOTATED, np.int16)
    for voxel in product(*map(range, shape)):
        if any((axis, index) in planes for axis, index in enumerate(voxel)):
            label[voxel] = sum(voxel) % 2
    return label


@pytest.mark.parametrize(
    "planes",
    [
        STANDARD,
        STANDARD[:3],
        STANDARD[3:6],
        STANDARD[6:],
        ((0, 11), (1, 15), (2, 18)),
        ((0, 0),),
        ((0, 5), (0, 6), (0, 7), (1, 0), (2, 35)),
        # More sections than not: the sections across Y are then fuller than half as well.
        (*((0, z) for z in range(15)), (1, 4), (2, 9)),
        tuple((0, z) for z in range(0, 24, 2)),
    ],
)
def test_planes_painted_in_full_are_found_and_no_others(planes: tuple[Plane, ...]) -> None:
    assert annotated_planes(painted((24, 32, 36), planes)) == planes


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_planes_painted_in_part_are_found_and_no_others(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(20, 40)] * 3))
    planes = tuple((axis, i) for axis, size in enumerate(shape) for i in sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=3))))
    label = np.full(shape, NOT_ANNOTATED, np.int16)
    for axis, index in planes:
        # A rectangle of 60 % or more of the plane.
        plane = np.moveaxis(label, axis, 0)[index]
        high, wide = (data.draw(st.integers(-(-4 * size // 5), size)) for size in plane.shape)
        plane[:high, :wide] = 1
    assert annotated_planes(label) == planes


def test_slices_of_made_data_are_found() -> None:
    label = sparse_annotation(np.zeros((32, 40, 48), np.int16), (3, 3, 2))
    found = annotated_planes(label)
    assert found is not None
    assert [sum(axis == each for each, _ in found) for axis in range(3)] == [3, 3, 2]
    assert np.array_equal(in_planes(label.shape, found), label != NOT_ANNOTATED)


def test_sections_of_strokes_are_found() -> None:
    label = np.full((24, 40, 40), NOT_ANNOTATED, np.int16)
    for z in (4, 12, 19):
        label[z, z, 5:30] = 0
        label[z, 20:32, 40 - z] = 1
    assert annotated_planes(label) == ((0, 4), (0, 12), (0, 19))


def test_every_second_section_of_a_tall_narrow_volume_is_found() -> None:
    label = np.full((80, 10, 60), NOT_ANNOTATED, np.int16)
    label[::2] = 1
    assert annotated_planes(label) == tuple((0, z) for z in range(0, 80, 2))


def test_a_volume_annotated_all_over_has_no_planes_of_its_own() -> None:
    label = np.zeros((12, 14, 16), np.int16)
    assert annotated_planes(label) is None
    # Whoever leaves out the rim, or some voxels, has still annotated the volume.
    label[0], label[:, 0], label[:, :, -1] = NOT_ANNOTATED, NOT_ANNOTATED, NOT_ANNOTATED
    label[np.random.default_rng(0).random(label.shape) < 0.3] = NOT_ANNOTATED
    assert annotated_planes(label) is None


def test_a_label_without_annotation_has_no_planes() -> None:
    label = np.full((5, 6, 7), NOT_ANNOTATED, np.int16)
    assert annotated_planes(label) == ()
    label[1] = 0
    before = label.copy()
    assert annotated_planes(label) == ((0, 1),)
    assert np.array_equal(label, before)


# ---- labels cut down ----


def case_of(planes: Planes | None, sections: tuple[int, int] | None = None) -> Case:
    return Case(name="v", images=(Path("v.tif"),), planes=planes, sections=sections)


def test_shown_and_hidden_planes_by_hand() -> None:
    label = np.arange(27, dtype=np.int16).reshape(3, 3, 3)
    assert keep_planes(label, case_of(None)) is label
    shown = keep_planes(label, case_of(Planes(shown=((0, 1),))))
    assert shown[1].tolist() == [[9, 10, 11], [12, 13, 14], [15, 16, 17]]
    assert (shown[[0, 2]] == NOT_ANNOTATED).all()
    hidden = keep_planes(label, case_of(Planes(hidden=((0, 1), (2, 0)))))
    assert hidden.tolist() == [[[-1, 1, 2], [-1, 4, 5], [-1, 7, 8]], [[-1] * 3] * 3, [[-1, 19, 20], [-1, 22, 23], [-1, 25, 26]]]
    # A crossing of a plane that counts and one that does not, does not.
    both = keep_planes(label, case_of(Planes(shown=((0, 1),), hidden=((1, 2),))))
    assert both[1].tolist() == [[9, 10, 11], [12, 13, 14], [-1, -1, -1]]
    assert label.min() == 0
    assert both.dtype == np.int16


def test_planes_are_counted_in_the_whole_stack_where_sections_are_cut() -> None:
    label = np.ones((10, 4, 4), np.int16)
    planes = Planes(hidden=((0, 6), (1, 2), (0, 9)))
    whole = keep_planes(label, case_of(planes))
    assert np.array_equal(keep_planes(label[5:8], case_of(planes, (5, 8))), whole[5:8])


def test_a_dataset_reads_classes_and_objects_of_the_planes_only(tmp_path: Path) -> None:
    objects = np.zeros((6, 8, 8), np.uint16)
    objects[1:5, 2:6, 2:4], objects[1:5, 2:6, 5:7] = 7, 9
    tiff(tmp_path / "images" / "v.tif", np.zeros(objects.shape, np.uint8))
    tiff(tmp_path / "labels" / "v.tif", objects)
    text(tmp_path / "microtome.yaml", "spacing_mm: [1, 1, 1]\ninstances: true\n")
    dataset = open_dataset(tmp_path)
    case = replace(dataset.cases[0], planes=Planes(shown=((0, 2),)))
    found = dataset.read_instances(case)
    assert found is not None
    assert np.array_equal(found[2], objects[2])
    assert (found[[0, 1, 3, 4, 5]] == NOT_ANNOTATED).all()
    assert np.array_equal(dataset.read_label(case)[2], objects[2] > 0)


# ---- names ----


def test_planes_as_a_person_writes_them() -> None:
    assert parse_planes("y40, z10,Z2,z10", (20, 50, 50)) == ((0, 2), (0, 10), (1, 40))
    assert [plane_name(plane) for plane in ((0, 2), (1, 40), (2, 7))] == ["z2", "y40", "x7"]


@pytest.mark.parametrize("text", ["z20", "q3", "z", "10", "z-1", "z1,,z2", "", "z1.5"])
def test_a_word_that_names_no_plane_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"planes out of z0 to z19, y0 to y49, x0 to x49, got '.*'; write them as z10"):
        parse_planes(text, (20, 50, 50))


def test_a_picture_has_no_planes() -> None:
    with pytest.raises(ConfigError, match="expected a volume, got an image of 20×50"):
        parse_planes("y3", (20, 50))
