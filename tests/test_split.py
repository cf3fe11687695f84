"""Folds: a partition, never through a group, with every class on the side that learns, the same from the same seed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import text, tiff
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.data.case import Case, Plane, Planes
from microtome.data.dataset import Dataset, DatasetConfig, open_dataset
from microtome.data.legend import Legend
from microtome.data.split import Split, cut_case, leaks, split_dataset
from microtome.errors import ConfigError, DataError, DataWarning


def dataset_of(classes: Mapping[str, tuple[int, ...]], groups: Mapping[str, str] | None = None, **config: object) -> Dataset:
    """A dataset without files: case -> voxels of each class, the last count being of what is not annotated."""
    cases = tuple(Case(name=n, images=(), labels=(Path(n),), group=(groups or {}).get(n, n)) for n in classes)
    legend = Legend(names=("a", "b", "c"), values=((0,), (1,), (2,)))
    return Dataset(
        root=Path("data"), layout="", cases=cases, legend=legend, config=DatasetConfig.model_validate(config), class_counts=dict(classes)
    )


def names(cases: tuple[Case, ...]) -> list[str]:
    return [case.name for case in cases]


def folds_of(dataset: Dataset, parts: int, seed: int = 0) -> list[Split]:
    return [split_dataset(dataset, f"{part}/{parts}", seed) for part in range(1, parts + 1)]


counts = st.dictionaries(st.text("abcdefgh0123", min_size=1, max_size=3), st.tuples(*[st.integers(0, 2)] * 4), min_size=5, max_size=14)


@settings(max_examples=60, deadline=None)
@given(classes=counts, seed=st.integers(0, 3), data=st.data())
def test_folds_partition_the_cases_whatever_their_order(classes: dict[str, tuple[int, ...]], seed: int, data: st.DataObject) -> None:
    dataset = dataset_of(classes)
    folds = folds_of(dataset, 3, seed)
    assert sorted(name for fold in folds for name in names(fold.validation)) == sorted(classes)
    for fold in folds:
        assert fold.validation
        assert sorted(names(fold.train) + names(fold.validation)) == sorted(classes)
    shuffled = dataset_of({name: classes[name] for name in data.draw(st.permutations(list(classes)))})
    assert folds_of(shuffled, 3, seed) == folds


@settings(max_examples=60, deadline=None)
@given(classes=counts, data=st.data())
def test_groups_stay_whole(classes: dict[str, tuple[int, ...]], data: st.DataObject) -> None:
    groups = {name: data.draw(st.sampled_from("PQRS")) for name in classes}
    if len(set(groups.values())) < 3:
        return
    for fold in folds_of(dataset_of(classes, groups), 3):
        assert not {case.group for case in fold.train} & {case.group for case in fold.validation}


def test_rare_class_of_two_cases_is_always_learned() -> None:
    classes = {f"c{n}": (9, 1, 0, 0) for n in range(20)} | {"r1": (9, 0, 1, 0), "r2": (9, 0, 1, 0)}
    for seed in range(10):
        for fold in folds_of(dataset_of(classes), 5, seed):
            assert {"r1", "r2"} & set(names(fold.train))


def test_class_of_a_single_case_is_learned_in_the_first_fold() -> None:
    classes = {f"c{n}": (9, 1, 0, 0) for n in range(20)} | {"only": (9, 0, 1, 0)}
    for seed in range(10):
        assert "only" in names(split_dataset(dataset_of(classes), "1/5", seed).train)


def test_each_fold_has_its_share_of_a_class() -> None:
    classes = {f"c{n}": (9, int(n % 4 == 0), 0, 0) for n in range(40)}
    for fold in folds_of(dataset_of(classes), 5):
        assert len(fold.validation) == 8
        assert sum(classes[name][1] for name in names(fold.validation)) == 2


def test_what_is_not_annotated_is_no_class() -> None:
    # Stratified by class b, of which each fold has one case; all cases have voxels that are not annotated.
    classes = {"a1": (0, 0, 0, 5), "a2": (0, 0, 0, 5), "b1": (0, 3, 0, 5), "b2": (0, 3, 0, 5)}
    for fold in folds_of(dataset_of(classes), 2):
        assert sorted(name[0] for name in names(fold.validation)) == ["a", "b"]


def test_seeds_give_different_folds() -> None:
    dataset = dataset_of({f"c{n}": (9, 1, 0, 0) for n in range(30)})
    assert len({tuple(names(split_dataset(dataset, "1/5", seed).validation)) for seed in range(5)}) == 5


def test_all_trains_on_all() -> None:
    split = split_dataset(dataset_of({"b10": (1, 1, 0, 0), "b9": (1, 1, 0, 0)}, validation=("b9",)), "all")
    assert (names(split.train), split.validation) == (["b9", "b10"], ())


def test_few_groups_make_few_folds() -> None:
    dataset = dataset_of({"a": (1, 0, 0, 0), "b": (1, 0, 0, 0)})
    assert [len(split_dataset(dataset, fold).validation) for fold in ("1/5", "2/5")] == [1, 1]
    with pytest.raises(ConfigError, match="expected a part of at most 2, got 3/5, and there are 2 groups"):
        split_dataset(dataset, "3/5")


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "5", "1/5/9", "-1/5", "half", "", "1/0"])
def test_fold_that_is_none_is_named(fold: str) -> None:
    with pytest.raises(ConfigError, match=f"fold: .*got '{fold}'"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0), "b": (1, 0, 0, 0)}), fold)


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="one group, 'P', of 2 cases"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0), "b": (1, 0, 0, 0)}, {"a": "P", "b": "P"}))


def test_no_labelled_case_is_an_error() -> None:
    dataset = dataset_of({})
    with pytest.raises(DataError, match="got 0 cases"):
        split_dataset(dataset)


# Stated validation.


def test_stated_validation_comes_before_the_fold() -> None:
    dataset = dataset_of(dict.fromkeys("abcd", (1, 0, 0, 0)), validation=("d", "b"))
    split = split_dataset(dataset, "1/2")
    assert (names(split.train), names(split.validation)) == (["a", "c"], ["b", "d"])


def test_stated_validation_that_tears_a_group_is_refused() -> None:
    dataset = dataset_of(dict.fromkeys("abc", (1, 0, 0, 0)), {"a": "P", "b": "P"}, validation=("b",))
    with pytest.raises(ConfigError, match="group 'P' in both parts"):
        split_dataset(dataset)


def test_stated_validation_leaves_something_to_learn_and_is_labelled() -> None:
    with pytest.raises(ConfigError, match="every case in `validation`"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0)}, validation=("a",)))
    with pytest.raises(ConfigError, match="labelled cases in `validation`, got z"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0)}, validation=("z",)))


# A single stack.


def stack(root: Path, label_ZYX: np.ndarray, document: str = "") -> Dataset:
    tiff(root / "volume.tif", np.zeros(label_ZYX.shape, np.uint8))
    tiff(root / "labels.tif", label_ZYX.astype(np.uint8))
    spacing = "[1, 1, 1]" if label_ZYX.ndim == 3 else "[1, 1]"
    text(root / "microtome.yaml", f"spacing_mm: {spacing}\nclasses: {{background: 0, membrane: 1}}\nnot_annotated: 255\n{document}")
    return open_dataset(root)


def sections(split: Split) -> tuple[list[tuple[int, int] | None], list[tuple[int, int] | None]]:
    return [case.sections for case in split.train], [case.sections for case in split.validation]


@pytest.mark.parametrize(
    ("fold", "train", "validation"),
    [
        ("1/5", [(0, 20)], [(20, 25)]),
        ("2/5", [(0, 15), (20, 25)], [(15, 20)]),
        ("5/5", [(5, 25)], [(0, 5)]),
        ("1/2", [(0, 13)], [(13, 25)]),
        ("2/2", [(13, 25)], [(0, 13)]),
    ],
)
def test_single_stack_is_cut_into_blocks_from_the_end(
    tmp_path: Path, fold: str, train: list[tuple[int, int]], validation: list[tuple[int, int]]
) -> None:
    # Python rounds 12.5 to the even 12, and the 13 sections that are left train.
    split = split_dataset(stack(tmp_path, np.zeros((25, 4, 4)) + np.eye(4)), fold)
    assert sections(split) == (train, validation)
    assert [case.name for case in split.validation] == [f"volume[{validation[0][0]}:{validation[0][1]}]"]
    assert {case.group for case in (*split.train, *split.validation)} == {"volume"}


def test_rows_of_a_single_picture_are_cut_the_same_way(tmp_path: Path) -> None:
    dataset = stack(tmp_path, np.eye(20))
    split = split_dataset(dataset, "1/4")
    assert sections(split) == ([(0, 15)], [(15, 20)])
    assert dataset.read_label(split.validation[0]).shape == (5, 20)
    [note] = cut_case(split, dataset)
    assert note.severity == "note"
    assert "one labelled image for both parts: sections (of a picture: rows) 15 to 19 validate, the others train" in note.message
    assert cut_case(split_dataset(dataset, "all"), dataset) == []


def test_sparse_stack_is_cut_half_way_between_annotated_sections(tmp_path: Path) -> None:
    label = np.full((50, 2, 2), 255)
    label[[0, 10, 20, 30, 40]] = np.eye(2)
    dataset = stack(tmp_path, label)
    assert sections(split_dataset(dataset, "1/5")) == ([(0, 35)], [(35, 50)])
    assert sections(split_dataset(dataset, "3/5")) == ([(0, 15), (25, 50)], [(15, 25)])
    # Ten folds of five annotated sections are five folds.
    assert sections(split_dataset(dataset, "5/10")) == ([(5, 50)], [(0, 5)])
    for part in range(1, 6):
        split = split_dataset(dataset, f"{part}/5")
        annotated = [
            sum((dataset.read_label(case) != -1).any(axis=(1, 2)).sum() for case in side) for side in (split.train, split.validation)
        ]
        assert annotated == [4, 1]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 30), parts=st.integers(2, 8))
def test_blocks_partition_the_sections(tmp_path_factory: pytest.TempPathFactory, size: int, parts: int) -> None:
    dataset = stack(tmp_path_factory.mktemp("stack"), np.zeros((size, 2, 2)) + np.eye(2))
    folds = [split_dataset(dataset, f"{part}/{parts}") for part in range(1, min(parts, size) + 1)]
    covered = [section for fold in folds for case in fold.validation for section in range(*(case.sections or ()))]
    assert sorted(covered) == list(range(size))
    for fold in folds:
        trained = [section for case in fold.train for section in range(*(case.sections or ()))]
        assert sorted(trained + list(range(*(fold.validation[0].sections or ())))) == list(range(size))


def test_one_annotated_section_cannot_be_split(tmp_path: Path) -> None:
    label = np.full((12, 2, 2), 255)
    label[4] = np.eye(2)
    dataset = stack(tmp_path, label)
    with pytest.raises(ConfigError, match="two annotated sections or rows at least, got 1 of 12; train with --fold all"):
        split_dataset(dataset)
    assert names(split_dataset(dataset, "all").train) == ["volume"]


def test_stated_sections_come_before_the_fold(tmp_path: Path) -> None:
    label = np.zeros((12, 2, 2)) + np.eye(2)
    assert sections(split_dataset(stack(tmp_path, label, "validation_sections: [3, 6]"), "1/2")) == ([(0, 3), (6, 12)], [(3, 6)])
    for wrong in ([3, 13], [0, 12]):
        with pytest.raises(ConfigError, match="within the 12 sections of volume"):
            split_dataset(stack(tmp_path, label, f"validation_sections: {wrong}"))
    with pytest.raises(ConfigError, match="a single stack for `validation_sections`, got 2 labelled cases"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0), "b": (1, 0, 0, 0)}, validation_sections=(0, 1)))


# Real data.


def test_last_five_sections_of_isbi_validate(data_folder: Callable[[str], Path]) -> None:
    with pytest.warns(DataWarning):
        dataset = open_dataset(data_folder("isbi2012"))
    assert sections(split_dataset(dataset)) == ([(0, 20)], [(20, 25)])


def test_fifth_of_hippocampus_validates(data_folder: Callable[[str], Path]) -> None:
    split = split_dataset(open_dataset(data_folder("hippocampus")))
    assert (len(split.train), len(split.validation)) == (160, 40)


# Annotated planes of sparse volumes.

SHAPE = (20, 24, 28)
PAINTED: tuple[Plane, ...] = tuple((axis, index) for axis in range(3) for index in (4, 9, 15))


def sparse_volumes(root: Path, planes: Mapping[str, tuple[Plane, ...]], document: str = "") -> Dataset:
    """Volumes with some planes painted in full; a volume without any is annotated all over."""
    for name, painted in planes.items():
        tiff(root / "images" / f"{name}.tif", np.zeros(SHAPE, np.uint8))
        label = np.full(SHAPE, 255 if painted else 0, np.uint8)
        for axis, index in painted:
            np.moveaxis(label, axis, 0)[index] = np.eye(*np.moveaxis(label, axis, 0)[index].shape)
        tiff(root / "labels" / f"{name}.tif", label)
    text(root / "microtome.yaml", f"spacing_mm: [1, 1, 1]\nclasses: {{background: 0, membrane: 1}}\nnot_annotated: 255\n{document}")
    return open_dataset(root)


def annotated(dataset: Dataset, case: Case) -> np.ndarray:
    found: np.ndarray = dataset.read_label(case) != -1
    return found


@pytest.mark.parametrize("parts", [2, 3, 5, 9, 12])
def test_slices_partition_the_annotated_planes_and_no_voxel_is_in_both_parts(tmp_path: Path, parts: int) -> None:
    dataset = sparse_volumes(tmp_path, {"volume": PAINTED})
    whole = annotated(dataset, dataset.cases[0])
    held: list[Plane] = []
    for part in range(1, min(parts, 9) + 1):
        split = split_dataset(dataset, f"{part}/{parts}", holdout="slices")
        (train,), (validation,) = split.train, split.validation
        assert train.planes is not None
        assert validation.planes is not None
        assert (train.planes.shown, validation.planes.hidden, train.planes.hidden) == ((), (), validation.planes.shown)
        learned, scored = annotated(dataset, train), annotated(dataset, validation)
        assert learned.any()
        # Crossings of a plane that trains and one that validates only validate.
        assert not (learned & scored).any()
        assert np.array_equal(learned | scored, whole)
        held += validation.planes.shown
        assert dataset.read_image(train).shape_vox == dataset.read_image(validation).shape_vox == SHAPE
    assert sorted(held) == list(PAINTED)


def test_every_third_plane_is_one_of_each_orientation(tmp_path: Path) -> None:
    split = split_dataset(sparse_volumes(tmp_path, {"volume": PAINTED}), "2/3", holdout="slices")
    assert (names(split.train), names(split.validation)) == (["volume"], ["volume[z9+y9+x9]"])
    assert {case.group for case in (*split.train, *split.validation)} == {"volume"}


def test_volumes_take_turns_and_dense_ones_train_whole(tmp_path: Path) -> None:
    dataset = sparse_volumes(tmp_path, {"a": PAINTED[:3], "b": (), "c": PAINTED[:1], "d": PAINTED[3:]})
    # Nine planes of a and d; the only one of c must stay.
    folds = [split_dataset(dataset, f"{part}/5", holdout="slices") for part in range(1, 6)]
    assert [names(fold.validation) for fold in folds] == [
        ["a[z4]", "d[y15]"],
        ["a[z9]", "d[x4]"],
        ["a[z15]", "d[x9]"],
        ["d[y4+x15]"],
        ["d[y9]"],
    ]
    for fold in folds:
        assert names(fold.train) == ["a", "b", "c", "d"]
        assert fold.train[1].planes is fold.train[2].planes is None
    assert split_dataset(dataset, "all", holdout="slices").validation == ()


def test_name_of_many_planes_stays_short(tmp_path: Path) -> None:
    dataset = sparse_volumes(tmp_path, {"volume": tuple((0, z) for z in range(0, 20, 2))})
    assert names(split_dataset(dataset, "1/2", holdout="slices").validation) == ["volume[z0+z4+z8+2more]"]


def test_planes_that_are_shown_already_are_those_that_are_dealt(tmp_path: Path) -> None:
    dataset = sparse_volumes(tmp_path, {"volume": ()})
    shown = replace(dataset.cases[0], planes=Planes(shown=PAINTED[:4]))
    split = split_dataset(replace(dataset, cases=(shown,)), "1/2", holdout="slices")
    assert split.train[0].planes == Planes(shown=PAINTED[:4], hidden=(PAINTED[0], PAINTED[2]))
    learned, scored = annotated(dataset, split.train[0]), annotated(dataset, split.validation[0])
    assert (int(learned.sum()), int(scored.sum())) == ((20 * 28 + 24 * 28 - 28) - 2 * 28, 2 * 24 * 28)


def test_without_a_sparse_volume_there_are_no_slices_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a volume with two annotated planes at least.*got none among dense, one; hold out cases"):
        split_dataset(sparse_volumes(tmp_path / "v", {"dense": (), "one": PAINTED[:1]}), holdout="slices")
    with pytest.raises(ConfigError, match="got none among volume"):
        split_dataset(stack(tmp_path / "p", np.where(np.eye(20) > 0, 1, 255)), holdout="slices")


def test_slices_beside_stated_validation_or_another_word_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing stated beside slices, got `validation`"):
        split_dataset(sparse_volumes(tmp_path, {"a": PAINTED, "b": PAINTED}, "validation: [a]"), holdout="slices")
    with pytest.raises(ConfigError, match="expected cases or slices, got 'planes'"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0)}), holdout="planes")
    with pytest.raises(ConfigError, match="expected cases or slices, got 'planes'"):
        split_dataset(dataset_of({"a": (1, 0, 0, 0)}), "all", holdout="planes")
    with pytest.raises(ConfigError, match="expected a part of at most 3, got 4/5, and there are 3 annotated planes"):
        split_dataset(sparse_volumes(tmp_path / "few", {"a": PAINTED[:3]}), "4/5", holdout="slices")


def case_of(path: Path, content: bytes) -> Case:
    path.write_bytes(content)
    return Case(name=path.stem, images=(path,))


def test_an_image_that_trains_and_validates_under_two_names_is_found(tmp_path: Path) -> None:
    train = [case_of(tmp_path / f"a{n}.png", b"picture %d" % n) for n in range(3)]
    fine = case_of(tmp_path / "b.png", b"picture 9")
    copy = case_of(tmp_path / "c.png", b"picture 1")
    assert leaks(Split(train=tuple(train), validation=(fine,))) == []
    (finding,) = leaks(Split(train=tuple(train), validation=(fine, copy)))
    assert finding.code == "leak"
    assert "a1.png trains and c.png validates, and they are the same file: the score will be too good" in finding.message
    assert finding.files == (train[1].images[0], copy.images[0])


def test_parts_of_one_file_are_no_copies_of_each_other(tmp_path: Path) -> None:
    whole = case_of(tmp_path / "stack.tif", b"sections")
    first, last = replace(whole, name="stack[0:4]", sections=(0, 4)), replace(whole, name="stack[4:5]", sections=(4, 5))
    assert leaks(Split(train=(first,), validation=(last,))) == []
