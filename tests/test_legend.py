"""Which value is which class: what is decided from the values alone, what is declared, and both directions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import nifti, png
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from microtome.data.case import Case, Declared, LabelValue
from microtome.data.classes import LegendRules, make_legend, void_doubts
from microtome.data.labels import LabelScan, class_counts, count_codes, label_findings, read_label_image, scan_labels
from microtome.data.legend import Legend, code_of, label_codes, value_of
from microtome.errors import ConfigError, DataError
from microtome.geometry import affine_from_spacing
from microtome.images.files import read_image
from microtome.images.image import Image

RED, BLACK, ORANGE = 0xFF0000, 0, 0xFF8800


def image_of(array: object, format: str = "png") -> Image:
    """A label image of (Y, X) or (C, Y, X)."""
    values = np.asarray(array)
    values = values if values.ndim == 3 else values[None]
    return Image(array=values, spacing_mm=(1, 1), affine=affine_from_spacing((1, 1)), axes="CYX", path=Path("a.png"), format=format)


def scan_of(counts: Mapping[int, int], *, colour: bool = False, format: str = "png", name: str = "a") -> LabelScan:
    return LabelScan(
        case=name,
        files=(Path(f"{name}.png"),),
        counts=counts,
        colour=colour,
        eight_bit=True,
        format=format,
        shape_vox=(sum(counts.values()), 1),
    )


def legend_of(*values: int, **rules: object) -> Legend:
    return make_legend([scan_of(dict.fromkeys(values, 100))], LegendRules(**rules))  # type: ignore[arg-type]


def named(ignored: tuple[LabelValue, ...] | None = None, **classes: object) -> Declared:
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in classes.items()}
    return Declared(classes=values, ignored=ignored, source="microtome.yaml")  # type: ignore[arg-type]


# What the values alone decide.


@pytest.mark.parametrize(
    ("values", "names", "ignored", "background"),
    [
        ((0, 255), ("background", "foreground"), (), 0),
        ((0, 1), ("background", "foreground"), (), 0),
        ((0, 7), ("background", "foreground"), (), 0),
        ((0, 1, 2), ("background", "label 1", "label 2"), (), 0),
        ((1, 2, 3), ("label 1", "label 2", "label 3"), (), None),
        ((0, 128, 255), ("background", "label 128", "label 255"), (), 0),
        ((0, 1, 255), ("background", "foreground"), (255,), 0),
        ((0, 1, 2, 255), ("background", "label 1", "label 2"), (255,), 0),
        # A subset of Pascal VOC: the void border is there, most classes are not.
        ((0, 15, 255), ("background", "foreground"), (255,), 0),
        ((1, 255), ("label 1", "label 255"), (), None),
        ((0, 50, 255), ("background", "label 50", "label 255"), (), 0),
        ((-1, 0, 1), ("background", "foreground"), (-1,), 0),
        ((0,), ("background",), (), 0),
    ],
)
def test_values_become_classes_in_ascending_order(
    values: tuple[int, ...], names: tuple[str, ...], ignored: tuple[int, ...], background: int | None
) -> None:
    legend = legend_of(*values)
    assert (legend.names, legend.ignored, legend.background, legend.kind) == (names, ignored, background, "values")
    assert legend.values == tuple((value,) for value in values if value not in ignored)
    assert ("not annotated" in legend.reason) == bool(ignored)


def test_void_is_a_class_where_it_is_said() -> None:
    assert legend_of(0, 1, 2, 255, declared=Declared(ignored=())).names == ("background", "label 1", "label 2", "label 255")


def test_masks_of_0_and_255_among_masks_of_0_and_1_are_an_error_that_says_what_to_state() -> None:
    scans = [scan_of({0: 60, 1: 40}, name="a"), scan_of({0: 60, 255: 40}, name="b"), scan_of({0: 100}, name="c")]
    [found] = void_doubts(scans, make_legend(scans, LegendRules()), Declared())
    assert (found.severity, found.files) == ("error", (Path("b.png"),))
    assert found.message.startswith("b.png: masks of 0 and 255 among masks of other values; 255 is taken as not annotated")
    assert "`classes: {background: 0, foreground: [1, 255]}`" in found.message
    declared = named(background=0, foreground=(1, 255))
    assert void_doubts(scans, make_legend(scans, LegendRules(declared=declared)), declared) == []


def test_what_to_state_of_masks_of_0_and_255_is_made_of_the_classes_that_there_are() -> None:
    beside = scan_of({0: 60, 255: 40}, name="b")
    one, several = [scan_of({0: 60, 7: 40}), beside], [scan_of({0: 60, 1: 20, 2: 20}), beside]
    [found] = void_doubts(one, make_legend(one, LegendRules()), Declared())
    assert "`classes: {background: 0, foreground: [7, 255]}`" in found.message
    [found] = void_doubts(several, make_legend(several, LegendRules()), Declared())
    assert found.message.endswith("; state `not_annotated: []` in microtome.yaml if it is a class, else `not_annotated: 255`")


@pytest.mark.parametrize(("void", "warned"), [(49, False), (50, True)])
def test_255_on_half_of_all_pixels_is_a_warning_unless_it_is_stated(void: int, warned: bool) -> None:
    scans = [scan_of({0: 90 - void, 1: 10, 255: void}), scan_of({0: 90 - void, 1: 10, 255: void}, name="b")]
    found = void_doubts(scans, make_legend(scans, LegendRules()), Declared())
    assert [(each.severity, each.message.startswith("a.png and 1 more: 50% of the labels' pixels are 255")) for each in found] == (
        [("warning", True)] * warned
    )
    stated = Declared(ignored=(255,), source="microtome.yaml")
    assert void_doubts(scans, make_legend(scans, LegendRules(declared=stated)), stated) == []


def test_volumes_of_which_little_is_annotated_and_masks_of_0_and_255_alone_are_no_doubt() -> None:
    sparse = replace(scan_of({0: 5, 1: 5, 255: 90}), shape_vox=(10, 5, 2))
    assert void_doubts([sparse], make_legend([sparse], LegendRules()), Declared()) == []
    binary = scan_of({0: 5, 255: 95})
    assert void_doubts([binary], make_legend([binary], LegendRules()), Declared()) == []


def test_hundreds_of_values_are_told_by_their_ends() -> None:
    legend = legend_of(*range(255), instances=False)
    assert legend.reason == "the labels hold the values 0, 1, 2, ... 254 (255 values)"
    assert len(legend.names) == 255


def test_more_than_32_values_are_objects() -> None:
    assert legend_of(*range(33)).kind == "values"
    legend = legend_of(*range(34))
    assert (legend.kind, legend.names, legend.background) == ("instances", ("background", "object"), 0)
    assert "33 different values" in legend.reason
    assert legend_of(*range(34), instances=False).kind == "values"
    assert legend_of(*range(3), instances=True).kind == "instances"
    assert legend_of(0, 1, per_instance=True, object_name="nucleus").names == ("background", "nucleus")


def test_colours_become_classes_named_by_their_code() -> None:
    legend = make_legend([scan_of({BLACK: 9, ORANGE: 3, RED: 1}, colour=True)], LegendRules())
    assert (legend.kind, legend.background) == ("colours", 0)
    assert legend.names == ("background", "#ff0000", "#ff8800")
    assert legend.values == (((0, 0, 0),), ((255, 0, 0),), ((255, 136, 0),))


def test_grey_files_among_colours_are_greys() -> None:
    legend = make_legend([scan_of({BLACK: 9, RED: 1}, colour=True), scan_of({0: 5, 255: 5})], LegendRules())
    assert legend.values == (((0, 0, 0),), ((255, 0, 0),), ((255, 255, 255),))
    assert legend.decode(image_of([[0, 255]])).tolist() == [[0, 2]]
    with pytest.raises(DataError, match="the number 300"):
        make_legend([scan_of({RED: 1}, colour=True), scan_of({300: 5})], LegendRules())


# What is declared.


def test_declared_names_are_sorted_by_value_and_may_join_values() -> None:
    legend = legend_of(0, 1, 2, declared=named(tumour=(2, 1), background=0))
    assert (legend.names, legend.values, legend.background) == (("background", "tumour"), ((0,), (2, 1)), 0)
    assert legend.decode(image_of(np.array([[0, 1, 2]], np.uint8))).tolist() == [[0, 1, 1]]
    assert legend.encode(np.array([[0, 1]])).tolist() == [[0, 2]]
    assert "named in microtome.yaml: background 0, tumour 2+1" in legend.reason


def test_declared_not_annotated_value_is_no_class() -> None:
    legend = legend_of(0, 1, 2, declared=named((0,), background=0, a=1, b=2))
    assert (legend.names, legend.ignored, legend.background) == (("a", "b"), (0,), None)
    assert legend.decode(image_of(np.array([[0, 1, 2]], np.uint8))).tolist() == [[-1, 0, 1]]


def test_names_alone_go_to_the_values_in_ascending_order() -> None:
    assert legend_of(0, 255, declared=Declared(classes={"dark": (), "light": ()}, source="m")).names == ("dark", "light")
    with pytest.raises(ConfigError, match="2 names for 3 values: 0, 128, 255"):
        legend_of(0, 128, 255, declared=Declared(classes={"dark": (), "light": ()}, source="m"))


def test_three_names_for_objects_are_refused() -> None:
    assert legend_of(*range(40), declared=Declared(classes={"cell": ()}, source="m")).names == ("background", "cell")
    with pytest.raises(ConfigError, match="3 names: a, b, c"):
        legend_of(*range(40), declared=Declared(classes={"a": (), "b": (), "c": ()}, source="m"))


def test_nothing_annotated_is_refused() -> None:
    with pytest.raises(DataError, match="none in any label"):
        legend_of(0, declared=Declared(ignored=(0,), source="m"))
    with pytest.raises(ConfigError, match="not_annotated"):
        legend_of(0, declared=named((0,), background=0))


def test_value_that_nobody_declared_is_an_error_that_names_file_and_value() -> None:
    scans = [scan_of({0: 10, 1: 5, 9: 2}), scan_of({0: 10, 1: 5}, name="b")]
    legend = make_legend(scans, LegendRules(declared=named(background=0, organ=1)))
    [finding] = label_findings(scans, legend, "dataset.json")
    assert (finding.severity, finding.code, finding.case) == ("error", "label-not-in-legend", "a")
    assert finding.message == "a.png: value 9 is not in the legend of dataset.json; its 2 voxels count as not annotated"
    assert class_counts(scans[0], legend) == (10, 5, 2)
    assert legend.decode(image_of(np.array([[1, 9]], np.uint8))).tolist() == [[1, -1]]


def test_single_class_is_an_error() -> None:
    scans = [scan_of({0: 10})]
    [finding] = label_findings(scans, make_legend(scans, LegendRules()), "")
    assert (finding.severity, finding.code) == ("error", "one-class")


# Smeared masks.


def disc(radius: int = 20) -> np.ndarray:
    y, x = np.ogrid[:64, :64]
    return ((y - 32) ** 2 + (x - 32) ** 2 < radius**2).astype(np.uint8)


def scans_of(path: Path, *, palette: str = "indices") -> list[LabelScan]:
    scans, faults = scan_labels([Case(name="a", images=(), labels=(path,))], palette=palette, per_instance=False)  # type: ignore[arg-type]
    assert faults == {}
    return scans


def test_jpeg_mask_of_two_values_keeps_two_classes(tmp_path: Path) -> None:
    scans = scans_of(png(tmp_path / "a.jpg", 255 * disc()))
    assert len(scans[0].counts) > 4
    legend = make_legend(scans, LegendRules())
    assert (legend.values, legend.names, legend.snap) == (((0,), (255,)), ("background", "foreground"), True)
    assert np.array_equal(legend.decode(read_image(tmp_path / "a.jpg")), disc())
    [finding] = label_findings(scans, legend, "")
    assert (finding.severity, finding.code) == ("warning", "jpeg-ringed-mask")
    assert "a.jpg" in finding.message
    assert sum(class_counts(scans[0], legend)) == 64 * 64


def test_jpeg_mask_of_three_greys_keeps_three_classes(tmp_path: Path) -> None:
    truth = disc() + disc(10)
    scans = scans_of(png(tmp_path / "a.jpg", 127 * truth))
    legend = make_legend(scans, LegendRules())
    assert len(legend.names) == 3
    wrong = legend.decode(read_image(tmp_path / "a.jpg")) != truth
    assert wrong.mean() < 0.02


def test_blurred_png_mask_keeps_two_classes() -> None:
    counts = {0: 700, 255: 250} | dict.fromkeys(range(10, 250, 5), 1)
    scans = [scan_of(counts)]
    legend = make_legend(scans, LegendRules())
    assert (legend.values, legend.snap) == (((0,), (255,)), True)
    assert [finding.code for finding in label_findings(scans, legend, "")] == ["blurred-mask"]
    # 10 to 125 are nearer to 0: 24 values; 130 to 245 to 255: 24 values.
    assert class_counts(scans[0], legend) == (724, 274, 0)


@pytest.mark.parametrize(
    "counts",
    [
        {0: 800} | dict.fromkeys(range(1, 256), 2),
        {0: 800, 51: 50, 102: 50, 153: 50, 204: 50, 255: 500},
        dict.fromkeys(range(21), 10) | {0: 800, 255: 90},
    ],
)
def test_objects_and_classes_are_not_taken_for_blur(counts: dict[int, int]) -> None:
    assert not make_legend([scan_of(counts)], LegendRules()).snap


# Both directions.


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_encoded_labels_decode_to_themselves(data: st.DataObject) -> None:
    colours = data.draw(st.booleans())
    value = st.tuples(*[st.integers(0, 255)] * 3) if colours else st.integers(-5, 70_000)
    values = data.draw(st.lists(value, min_size=2, max_size=6, unique=True))
    *classes, missing = values
    legend = Legend(
        names=tuple(f"class {n}" for n in range(len(classes))),
        values=tuple((v,) for v in classes),
        ignored=(missing,),
        kind="colours" if colours else "values",
    )
    labels = data.draw(hnp.arrays(np.int16, (2, 3), elements=st.integers(-1, len(classes) - 1)))
    written = legend.encode(labels)
    assert written.shape == ((3, 2, 3) if colours else (2, 3))
    assert np.array_equal(legend.decode(image_of(written)), labels)
    assert legend.decode(image_of(written)).dtype == np.int16
    assert Legend.from_json(legend.to_json()) == legend


def test_foreground_is_written_as_it_was_read() -> None:
    legend = legend_of(0, 255)
    assert legend.encode(np.array([[0, 1, -1]])).tolist() == [[0, 255, 0]]
    assert legend.encode(np.array([[0, 1]])).dtype == np.uint8
    assert legend.foreground == (1,)
    assert legend_of(1, 2, 3).foreground == (0, 1, 2)


def test_objects_decode_to_one_class_and_are_written_as_a_mask() -> None:
    legend = legend_of(*range(40), declared=Declared(ignored=(7,)))
    assert legend.decode(image_of(np.array([[0, 7, 12, 900]], np.uint16))).tolist() == [[0, -1, 1, 1]]
    assert legend.encode(np.array([[0, 1]])).tolist() == [[0, 255]]


def test_values_far_apart_are_looked_up_too() -> None:
    legend = legend_of(0, 1, 2**31)
    assert legend.decode(image_of(np.array([[0, 2**31, 5]], np.int64))).tolist() == [[0, 2, -1]]
    assert legend.decode(image_of(np.array([[0, 2**31, 1]], np.uint64))).tolist() == [[0, 2, 1]]


def test_file_of_rgb_greys_is_a_file_of_numbers(tmp_path: Path) -> None:
    grey = np.repeat(np.array([[0, 3], [3, 0]], np.uint8)[..., None], 3, axis=-1)
    image = read_image(png(tmp_path / "a.png", grey))
    assert image.channels == 3
    codes, colour = label_codes(image)
    assert (codes.tolist(), colour) == ([[0, 3], [3, 0]], False)


def test_palette_numbers_are_the_values(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", np.array([[0, 1], [2, 1]]), palette=[0, 0, 0, 255, 0, 0, 0, 0, 255])
    assert dict(scans_of(path)[0].counts) == {0: 1, 1: 2, 2: 1}
    assert dict(scans_of(path, palette="colours")[0].counts) == {0x000000: 1, 0xFF0000: 2, 0x0000FF: 1}


def test_whole_floats_are_values_and_others_are_named(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.array([[[0.0, 2.0, 2.0]]], np.float32))
    assert dict(scans_of(path)[0].counts) == {0: 1, 2: 2}
    for wrong in (0.5, np.nan, np.inf):
        path = nifti(tmp_path / "b.nii", np.array([[[0.0, wrong]]], np.float32))
        _, faults = scan_labels([Case(name="b", images=(), labels=(path,))], palette="indices", per_instance=False)
        assert f"b.nii: expected whole numbers, one a class, got {wrong:g} (1 such voxels)" in str(faults["b"])


def test_channels_that_are_no_colours_are_refused() -> None:
    with pytest.raises(DataError, match=r"a\.png: expected a label map of one channel.*got 5 channels of uint8"):
        label_codes(image_of(np.zeros((5, 2, 2), np.uint8)))
    with pytest.raises(DataError, match="got 3 channels of float32"):
        label_codes(image_of(np.zeros((3, 2, 2), np.float32)))


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_codes_give_their_colours_back(colour: tuple[int, int, int]) -> None:
    code = code_of(colour, True)
    assert code is not None
    assert value_of(code, True) == colour


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(st.sampled_from([np.uint8, np.int16, np.uint32, np.int64]), hnp.array_shapes(max_dims=3, max_side=6)))
def test_codes_are_counted_like_the_slow_way(codes: np.ndarray) -> None:
    slow: dict[int, int] = {}
    for value in codes.ravel().tolist():
        slow[value] = slow.get(value, 0) + 1
    assert count_codes(codes) == slow


# One mask an object.


def masks_case(tmp_path: Path, *masks: list[list[int]]) -> Case:
    paths = tuple(png(tmp_path / f"{number}.png", np.array(mask)) for number, mask in enumerate(masks))
    return Case(name="a", images=(), labels=paths)


def test_masks_become_numbers_and_the_first_keeps_what_two_claim(tmp_path: Path) -> None:
    case = masks_case(tmp_path, [[255, 255, 0]], [[0, 255, 255]])
    image, overlap_vox = read_label_image(case, per_instance=True)
    assert image.array.tolist() == [[[1, 1, 2]]]
    assert overlap_vox == 1
    scans, _ = scan_labels([case], palette="indices", per_instance=True)
    assert (dict(scans[0].counts), scans[0].objects) == ({1: 3}, 2)
    [finding] = label_findings(scans, make_legend(scans, LegendRules(per_instance=True)), "")
    assert (finding.severity, finding.code) == ("note", "overlapping-masks")
    assert "1 voxels" in finding.message


def test_masks_of_two_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1\.png: expected masks of one shape.*got 1×2 and 1×3 of 0\.png"):
        read_label_image(masks_case(tmp_path, [[255, 255, 0]], [[0, 255]]), per_instance=True)
