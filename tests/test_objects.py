"""Numbers of objects are told from numbers of classes, what remains open is said, and any class may be the background."""

from pathlib import Path

import numpy as np
import pytest
from folders import png, text, tiff

from microtome.data import labels as module
from microtome.data.case import Case
from microtome.data.classes import LegendRules, doubts, make_legend
from microtome.data.dataset import Dataset, open_dataset
from microtome.data.labels import LabelScan, counted_anew, scan_labels
from microtome.data.synthetic import cells
from microtome.errors import ConfigError
from microtome.evaluation.evaluate import evaluate

in_voxels = pytest.mark.filterwarnings("ignore:.*voxel size:microtome.errors.DataWarning")


def folder(root: Path, *labels: np.ndarray) -> Path:
    """images/ and masks/ of these labels."""
    for number, label in enumerate(labels):
        png(root / "images" / f"c{number}.png", np.arange(label.size).reshape(label.shape) % 251)
        png(root / "masks" / f"c{number}.png", label)
    return root


def dots(*values: int, times: int = 1) -> np.ndarray:
    """A map of 5 x 5 squares on 0, each value in `times` of them that lie far apart."""
    label = np.zeros((16 * times, 8 * len(values)), np.uint8)
    for number, value in enumerate(values):
        for time in range(times):
            label[16 * time + 2 : 16 * time + 7, 8 * number + 2 : 8 * number + 7] = value
    return label


def warnings_of(dataset: Dataset) -> list[str]:
    return [finding.message for finding in dataset.findings if finding.code == "classes-or-objects"]


def scan_of(*values: int, name: str = "a", whole: float | None = None) -> LabelScan:
    counts = dict.fromkeys((0, *values), 100)
    return LabelScan(
        case=name,
        files=(Path(f"{name}.png"),),
        counts=counts,
        colour=False,
        eight_bit=False,
        format="png",
        shape_vox=(len(counts), 100),
        whole=whole,
    )


def test_cells_numbered_from_1_in_every_mask_are_objects(tmp_path: Path) -> None:
    masks = [cells((128, 128), seed=seed, count=count).instances for seed, count in enumerate((6, 9, 12, 16, 20, 24))]
    assert 12 < max(mask.max() for mask in masks) <= 32
    dataset = open_dataset(folder(tmp_path, *masks))
    assert (dataset.legend.kind, dataset.legend.names, dataset.legend.background) == ("instances", ("background", "object"), 0)
    assert "counted anew in every image" in dataset.legend.reason
    [message] = warnings_of(dataset)
    assert "`instances: true`" in message
    assert "`instances: false`" in message
    for case, mask in zip(dataset.cases, masks, strict=True):
        assert np.array_equal(dataset.read_label(case), mask > 0)
        assert np.array_equal(dataset.read_instances(case), mask)


@pytest.mark.parametrize(("line", "kind"), [("instances: true", "instances"), ("instances: false", "values")])
def test_what_microtome_yaml_says_is_no_doubt(tmp_path: Path, line: str, kind: str) -> None:
    text(folder(tmp_path, dots(1, 2, 3), dots(1, 2, 3, 4, 5)) / "microtome.yaml", line)
    dataset = open_dataset(tmp_path)
    assert (dataset.legend.kind, warnings_of(dataset)) == (kind, [])


def test_classes_stay_classes_where_a_value_lies_in_pieces(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path, dots(1, 2, 3, times=2), dots(1, 2, 3, 4, 5, times=3)))
    assert (dataset.legend.kind, len(dataset.legend.names), warnings_of(dataset)) == ("values", 6, [])


def test_classes_stay_classes_where_most_files_have_all_of_them(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path, dots(1, 2, 3), dots(1, 2, 3), dots(1, 2, 3), dots(1, 2)))
    assert (dataset.legend.kind, len(dataset.legend.names), warnings_of(dataset)) == ("values", 4, [])


def test_a_name_for_each_value_says_that_they_are_classes(tmp_path: Path) -> None:
    described = folder(tmp_path, dots(1, 2), dots(1, 2, 3))
    text(described / "microtome.yaml", "classes: [ground, red, green, blue]")
    dataset = open_dataset(described)
    assert (dataset.legend.names, warnings_of(dataset)) == (("ground", "red", "green", "blue"), [])


def test_specks_beside_an_object_leave_it_one(tmp_path: Path) -> None:
    label = dots(1, 2, 3)
    label[15, 0] = 1
    assert open_dataset(folder(tmp_path, label, dots(1, 2))).legend.kind == "instances"


def test_values_of_which_only_some_lie_in_pieces_are_classes_with_a_warning(tmp_path: Path) -> None:
    label = dots(1, 2, 3, 4)
    label[9:14, 26:31] = 1
    dataset = open_dataset(folder(tmp_path, label, dots(1, 2, 3)))
    assert dataset.legend.kind == "values"
    [message] = warnings_of(dataset)
    assert "86% of those looked at are one piece: each is taken as a class" in message
    assert "state `instances: true` in microtome.yaml if each is an object" in message


def test_more_than_eight_unnamed_values_are_classes_with_a_warning(tmp_path: Path) -> None:
    label = dots(*range(10, 100, 10))
    dataset = open_dataset(folder(tmp_path, label, label))
    assert (dataset.legend.kind, len(warnings_of(dataset))) == ("values", 1)
    assert warnings_of(open_dataset(folder(tmp_path / "fewer", dots(*range(10, 90, 10))))) == []


def test_more_than_32_values_that_are_the_same_in_all_files_are_objects_with_a_warning(tmp_path: Path) -> None:
    label = dots(*range(1, 41))
    dataset = open_dataset(folder(tmp_path, label, label))
    assert dataset.legend.kind == "instances"
    [message] = warnings_of(dataset)
    assert message.startswith("the labels hold 40 values beside 0, and 100% of those looked at are one piece: each is taken as an object")


def test_more_than_32_values_counted_anew_in_every_file_leave_no_doubt(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path, dots(*range(1, 41)), dots(*range(1, 36))))
    assert (dataset.legend.kind, warnings_of(dataset)) == ("instances", [])


def test_more_than_32_values_in_pieces_are_classes_with_a_warning(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path, dots(*range(1, 41), times=2)))
    assert (dataset.legend.kind, len(dataset.legend.names), len(warnings_of(dataset))) == ("values", 41, 1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([(1, 2, 3), (1, 2)], True),
        ([(1, 2, 3), (1, 2), ()], True),
        ([(1, 2), (1,)], False),
        ([(1, 2, 3), (1, 3)], False),
        ([(2, 3, 4), (2, 3)], False),
        ([(1, 2, 3), (1, 2, 3)], False),
        ([tuple(range(1, 9))], True),
        ([tuple(range(1, 8))], False),
        ([()], False),
    ],
)
def test_counted_anew_means_1_to_n_with_another_n_in_other_files(files: list[tuple[int, ...]], expected: bool) -> None:
    assert counted_anew([scan_of(*values, name=str(number)) for number, values in enumerate(files)]) == expected


def test_few_files_are_looked_at_for_pieces_and_none_where_values_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = module.read_image
    monkeypatch.setattr(module, "read_image", lambda path, **options: (read.append(path), real(path, **options))[1])
    for root, masks, more in (
        (tmp_path / "plain", [dots(1, 2)] * 9, 0),
        (tmp_path / "objects", [dots(*range(1, n)) for n in range(3, 12)], 4),
    ):
        folder(root, *masks)
        cases = [Case(name=path.stem, images=(), labels=(path,)) for path in sorted((root / "masks").iterdir())]
        read.clear()
        scans, _ = scan_labels(cases, palette="indices", per_instance=False)
        assert len(read) == len(masks) + more
        assert sum(scan.whole is not None for scan in scans) == more


def test_numbers_beyond_any_table_are_looked_at_too(tmp_path: Path) -> None:
    label = np.zeros((40, 400), np.uint32)
    for number in range(35):
        label[2:8, 10 * number + 1 : 10 * number + 6] = 100_000_000 * (number + 1)
    scans, _ = scan_labels([Case(name="a", images=(), labels=(tiff(tmp_path / "a.tif", label),))], palette="indices", per_instance=False)
    assert [scan.whole for scan in scans] == [1]
    assert make_legend(scans, LegendRules()).kind == "instances"
    assert len(doubts(scans, LegendRules())) == 1


def test_large_values_are_looked_at_coarsely_with_the_same_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKED_AT_VOX", 8)
    for times, kind in ((1, "instances"), (2, "values")):
        assert open_dataset(folder(tmp_path / kind, dots(1, 2, 3, times=times), dots(1, 2, times=times))).legend.kind == kind


# The background.

MEMBRANE = np.array([[0, 255, 255], [0, 255, 255]])


def membranes(root: Path, described: str) -> Dataset:
    """Pictures in which 0 is what is looked for."""
    text(folder(root, MEMBRANE, MEMBRANE) / "microtome.yaml", described)
    return open_dataset(root)


@pytest.mark.parametrize(
    ("described", "background", "foreground"),
    [
        ("classes: {membrane: 0, inside: 255}", None, (0, 1)),
        ("classes: [membrane, inside]", None, (0, 1)),
        ("classes: {membrane: 0, inside: 255}\nbackground: inside", 1, (0,)),
        ("classes: {membrane: 0, inside: 255}\nbackground: membrane", 0, (1,)),
        ("classes: {membrane: 0, background: 255}", 1, (0,)),
        ("classes: {membrane: 0, Background: 255}\nbackground: null", None, (0, 1)),
        ("classes: {background: 0, inside: 255}", 0, (1,)),
        ("classes: {dark: 0, grey: 7, inside: 255}", 0, (1, 2)),
        ("background: foreground", 1, (0,)),
        ("background:", None, (0, 1)),
        ("not_annotated: 7", 0, (1,)),
    ],
)
def test_the_background_is_as_stated_or_the_one_of_that_name_or_of_0(
    tmp_path: Path, described: str, background: int | None, foreground: tuple[int, ...]
) -> None:
    legend = membranes(tmp_path, described).legend
    assert (legend.background, legend.foreground) == (background, foreground)
    assert legend.values[0] == (0,)


def test_two_named_classes_say_that_none_is_background(tmp_path: Path) -> None:
    assert "both count as foreground" in membranes(tmp_path, "classes: {membrane: 0, inside: 255}").legend.reason


def test_a_background_that_is_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"microtome\.yaml: expected `background` out of membrane, inside, got 'outside'"):
        membranes(tmp_path, "classes: {membrane: 0, inside: 255}\nbackground: outside")


@in_voxels
def test_scores_are_those_of_the_class_that_is_not_background(tmp_path: Path) -> None:
    membranes(tmp_path / "data", "classes: {membrane: 0, inside: 255}\nbackground: inside")
    for name in ("c0", "c1"):
        png(tmp_path / "out" / f"{name}.png", np.array([[0, 255, 255], [255, 255, 255]]))
    result = evaluate(tmp_path / "out", tmp_path / "data")
    assert result["conventions"]["foreground"] == ["membrane"]
    # One of the two pixels of the membrane is found: 2 * 1 / (2 + 1).
    assert result["summary"]["dice"]["mean"] == pytest.approx(2 / 3)
