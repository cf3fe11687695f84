"""A volume with a few painted planes becomes a dense label file; what cannot be told or done is refused before any work."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import tifffile
from folders import nifti, png, text, tiff

from microtome.config import Plan
from microtome.data.case import NOT_ANNOTATED
from microtome.data.synthetic import sparse_annotation, tubules
from microtome.densify import DensifyOptions, Sketch, densify, open_sketch
from microtome.errors import ConfigError, DataError, DataWarning, RunError
from microtome.images.files import read_image
from microtome.inference.predictor import load
from tests.small import one_thread, small_plan, small_plan_3d
from tests.stores import write_volume_store

__all__ = ["one_thread"]

SHAPE = (18, 24, 32)
SPACING = (0.002, 0.00176, 0.00176)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return tubules(SHAPE, seed=1).label


@pytest.fixture(scope="module")
def sparse(truth: np.ndarray) -> np.ndarray:
    """Background 0, tubule 1, NOT_ANNOTATED off three xy, three xz and two yz sections."""
    return sparse_annotation(truth, (3, 3, 2))


def pair(folder: Path, annotation: np.ndarray) -> tuple[Path, Path]:
    """A volume as NIfTI, so that its voxel size is known, and its annotation in another folder under another name."""
    image = tubules(SHAPE, seed=1).image
    return nifti(folder / "in" / "kidney.nii.gz", image, spacing_mm=SPACING), nifti(
        folder / "drawn" / "by anna.nii.gz", annotation, spacing_mm=SPACING
    )


def sketch_of(folder: Path, annotation: np.ndarray, **options: Any) -> Sketch:
    return open_sketch(*pair(folder, annotation), folder / "dense.nii.gz", DensifyOptions(**options))


def run(sketch: Sketch, **changes: Any) -> np.ndarray:
    """The values in the file that a training of three steps leads to."""
    plan = small_plan_3d(classes=sketch.dataset.legend.names, **{"fold": "all", "steps": 3, "validations": 1, **changes})
    assert densify(sketch, plan) == sketch.out
    values: np.ndarray = read_image(sketch.out).array[0]
    return values


def annotated_of(sketch: Sketch) -> np.ndarray:
    found: np.ndarray = sketch.dataset.read_label(sketch.dataset.cases[0]) != NOT_ANNOTATED
    return found


# ---- the whole road ----


def test_values_geometry_and_annotation_are_kept(sparse: np.ndarray, tmp_path: Path) -> None:
    # As ilastik and napari paint: classes 3 and 7, and 0 where nobody looked.
    painted = np.choose(sparse + 1, [0, 3, 7]).astype(np.uint8)
    sketch = sketch_of(tmp_path, painted)
    assert sketch.reason.startswith("0 means not annotated: 68% of the voxels have it, and 3, 7 stand beside it")
    dense = run(sketch)
    assert set(np.unique(dense)) <= {3, 7}
    assert np.array_equal(dense[painted > 0], painted[painted > 0])
    original, written = nib.load(tmp_path / "in" / "kidney.nii.gz"), nib.load(sketch.out)
    assert np.array_equal(original.affine, written.affine)
    assert written.shape == original.shape == SHAPE[::-1]
    assert written.get_data_dtype() == np.uint8
    assert all((sketch.run / name).is_file() for name in ("report.html", "model/model.safetensors"))
    assert sketch.run == tmp_path / "dense.run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.nii.gz", "dense.run", "drawn", "in"]


def test_the_rest_is_what_the_trained_network_says(sparse: np.ndarray, tmp_path: Path) -> None:
    sketch = sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8))
    dense, said = run(sketch), load(sketch.run)(tmp_path / "in" / "kidney.nii.gz")
    assert np.array_equal(dense[sparse < 0], said[sparse < 0])
    assert np.array_equal(dense[sparse >= 0], sparse[sparse >= 0])
    # The report says the same in shares, with three sections of three pictures.
    page = (sketch.run / "report.html").read_text(encoding="utf-8")
    shares = [f"{100 * part:.1f}\N{NO-BREAK SPACE}%" for part in ((sparse == 1).sum() / (sparse >= 0).sum(), (dense == 1).mean())]
    assert f'<th scope="row">foreground</th><td>{shares[0]}</td><td>{shares[1]}</td>' in page
    assert page.count("data:image/jpeg") == 9


@pytest.mark.parametrize(("steps", "reason"), [(3, "only 3 of 3 planned steps were made, too few"), (10, "all steps are done")])
def test_an_end_after_a_handful_of_steps_is_a_warning(sparse: np.ndarray, tmp_path: Path, steps: int, reason: str) -> None:
    sketch, seen = sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8)), list[Any]()
    plan = small_plan_3d(classes=sketch.dataset.legend.names, fold="all", steps=steps, validations=1)
    densify(sketch, plan, on_event=seen.append)
    (end,) = [event for event in seen if event["event"] == "end"]
    # What a terminal shows as a warning has these two words.
    assert ("planned steps" in end["reason"]) == (steps < 10)
    assert end["reason"].startswith(reason)


def test_slices_held_out_are_scored_and_stay_as_they_were_painted(sparse: np.ndarray, tmp_path: Path) -> None:
    sketch = sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8), holdout=True, steps=3)
    dense = run(sketch, fold="1/5", holdout="slices")
    assert np.array_equal(dense[sparse >= 0], sparse[sparse >= 0])
    split = json.loads((sketch.run / "dataset.json").read_text())
    assert split["train"] == ["kidney"]
    (name,) = split["validation"]
    assert name.startswith("kidney[z")
    rows = json.loads((sketch.run / "metrics.json").read_text())["cases"]
    assert {row["case"] for row in rows} == {name}
    assert (sketch.run / "validation" / f"{name.replace('[', '_').replace(']', '')}.nii.gz").is_file()


def test_planes_that_were_painted_in_full_are_all_that_is_annotated(truth: np.ndarray, tmp_path: Path) -> None:
    # 0 is background in the planes and nothing elsewhere.
    painted = np.zeros(SHAPE, np.uint8)
    painted[4], painted[:, 11] = truth[4], truth[:, 11]
    sketch = sketch_of(tmp_path, painted, planes="z4,y11")
    assert sketch.reason == "annotated in z4, y11 as asked"
    assert sketch.dataset.legend.names == ("background", "foreground")
    expected = np.zeros(SHAPE, bool)
    expected[4], expected[:, 11] = True, True
    assert np.array_equal(annotated_of(sketch), expected)
    counts = sketch.dataset.class_counts["kidney"]
    assert counts == (int((truth[expected] == 0).sum()), int((truth[expected] == 1).sum()), int((~expected).sum()))
    dense = run(sketch)
    assert np.array_equal(dense[expected], truth[expected])
    assert set(np.unique(dense)) <= {0, 1}


def test_a_picture_is_densified_too(tmp_path: Path) -> None:
    image = png(tmp_path / "cells.png", np.random.default_rng(0).integers(0, 255, (40, 40)))
    painted = np.zeros((40, 40), np.uint8)
    painted[5:9, 4:20], painted[20:30, 22:25] = 1, 2
    sketch = open_sketch(image, png(tmp_path / "cells_strokes.png", painted), tmp_path / "out.png", DensifyOptions())
    densify(sketch, small_plan(classes=sketch.dataset.legend.names, fold="all", steps=2, validations=1))
    dense = read_image(sketch.out).array[0]
    assert np.array_equal(dense[painted > 0], painted[painted > 0])
    assert set(np.unique(dense)) <= {1, 2}


def test_the_plan_trains_on_all_or_holds_slices_out(sparse: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def planned(_: object, **words: Any) -> Plan:
        seen.append(words)
        return small_plan_3d()

    monkeypatch.setattr("microtome.densify.make_plan", planned)
    labels = np.where(sparse < 0, 255, sparse).astype(np.uint8)
    sketch_of(tmp_path / "a", labels, minutes=2.0, seed=5).plan()
    sketch_of(tmp_path / "b", labels, holdout=True, steps=9, network="unet3d", recipe="unet3d2016").plan()
    assert (seen[0]["fold"], seen[0]["minutes"], seen[0]["seed"], "holdout" in seen[0]) == ("all", 2.0, 5, False)
    assert (seen[1]["fold"], seen[1]["holdout"], seen[1]["steps"]) == ("1/5", "slices", 9)
    assert (seen[1]["network"], seen[1]["recipe"]) == ("unet3d", "unet3d2016")


# ---- what is not annotated ----


def test_what_is_not_annotated_by_custom_by_word_or_by_document(sparse: np.ndarray, tmp_path: Path) -> None:
    for name, value, options, document, words in (
        ("minus", -1, {}, "", "-1 means not annotated by custom"),
        ("void", 255, {}, "", "255 means not annotated by custom"),
        ("asked", 9, {"not_annotated": 9}, "", "9 means not annotated, as asked"),
        ("stated", 9, {}, "not_annotated: 9", "9 means not annotated, says microtome.yaml"),
    ):
        if document:
            text(tmp_path / name / "in" / "microtome.yaml", document)
        sketch = sketch_of(tmp_path / name, np.where(sparse < 0, value, sparse).astype(np.int16), **options)
        assert sketch.reason.startswith(words)
        assert np.array_equal(annotated_of(sketch), sparse >= 0)
        assert sketch.dataset.cases[0].planes is None


def test_names_and_voxel_size_of_a_document_beside_the_image_hold(sparse: np.ndarray, tmp_path: Path) -> None:
    document = "classes: {ground: 0, tubule: 1}\nnot_annotated: 255\nspacing_mm: [2, 1, 1]\nvalidation_sections: [0, 5]\n"
    text(tmp_path / "in" / "microtome.yaml", document)
    dataset = sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8)).dataset
    assert dataset.legend.names == ("ground", "tubule")
    assert dataset.read_image(dataset.cases[0]).spacing_mm == (2, 1, 1)
    assert dataset.config.validation_sections is None


@pytest.mark.parametrize("foreground", [1, 255])
def test_zero_beside_a_single_value_is_refused_with_three_ways_out(sparse: np.ndarray, tmp_path: Path, foreground: int) -> None:
    painted = np.where(sparse > 0, foreground, 0).astype(np.uint8)
    with pytest.raises(ConfigError, match="0 may be background or unseen") as error:
        sketch_of(tmp_path, painted)
    assert f"% of the voxels) beside {foreground}," in str(error.value)
    assert all(words in error.value.do for words in ("--planes", "a value of its own", "--not-annotated"))


def test_the_refusal_proposes_the_planes_that_hold_something(tmp_path: Path) -> None:
    painted = np.zeros(SHAPE, np.uint8)
    painted[4, 3:20, 5:30], painted[2:16, 11, 5:30] = 1, 1
    with pytest.raises(ConfigError, match=r"\(--planes z4,y11\)"):
        sketch_of(tmp_path, painted)


def test_zero_that_is_not_most_of_the_volume_is_not_guessed_about(tmp_path: Path) -> None:
    dense = np.zeros(SHAPE, np.uint8)
    dense[:6], dense[6:12] = 1, 2
    with pytest.raises(ConfigError, match=r"got 0 \(33% of the voxels\) beside 1, 2"):
        sketch_of(tmp_path, dense)


def test_too_little_or_all_of_it_annotated_is_refused(sparse: np.ndarray, tmp_path: Path) -> None:
    every = np.ones(SHAPE, np.uint8)
    every[3:9] = 2
    cases: list[tuple[np.ndarray, dict[str, Any], str]] = [
        (every, {}, "to fill them, got label 1, label 2 everywhere"),
        (np.where(sparse > 0, 1, 0), {"not_annotated": 0}, "two classes at least, got only label 1"),
        (np.where(sparse < 0, 255, 0), {"not_annotated": 255}, "two classes at least, got only background"),
        (np.arange(18).repeat(24 * 32).reshape(SHAPE).clip(0, 1), {"planes": "z0"}, "two classes at least, got only background"),
        (np.where(sparse < 0, 255, 255), {"not_annotated": 255}, "got nothing is annotated: 255 everywhere; paint a few planes"),
        (np.zeros(SHAPE), {}, "got nothing is annotated: 0 everywhere; paint a few planes"),
        (np.zeros(SHAPE), {"planes": "z3"}, "got nothing is annotated: 0 everywhere"),
        (np.ones(SHAPE), {}, "two classes at least, got 1 everywhere"),
    ]
    for number, (annotation, options, words) in enumerate(cases):
        with pytest.raises(DataError, match=words):
            sketch_of(tmp_path / str(number), annotation.astype(np.uint8), **options)


@pytest.mark.parametrize(
    ("unseen", "extra", "words"),
    [
        (
            0,
            {"z": 11},
            "outside of z4, y11, got 736 painted voxels there, most of them in z11; name these planes too, or leave out --planes",
        ),
        (255, {"z": 11, "x": 20}, "got 1,104 painted voxels there, most of them in z11, x20;"),
        (9, {"at": (0, 0, 0)}, "got 1 painted voxel there"),
    ],
)
def test_what_was_painted_outside_of_the_named_planes_is_not_thrown_away(
    tmp_path: Path, unseen: int, extra: dict[str, Any], words: str
) -> None:
    # Class 1 in the planes, above background 5; class 3 in others: 23 × 32 voxels of z11 off y11, 16 × 23 more of x20.
    painted = np.full(SHAPE, unseen, np.uint8)
    painted[(extra.get("at") or (slice(0), 0, 0))] = 3
    painted[extra.get("z", slice(0))] = 3
    painted[:, :, extra.get("x", slice(0))] = 3
    painted[4], painted[:, 11] = 5, 5
    painted[4, 3:20, 5:30], painted[2:16, 11, 5:30] = 1, 1
    with pytest.raises(DataError, match=words):
        sketch_of(tmp_path, painted, planes="z4,y11")
    assert not (tmp_path / "dense.run").exists()


@pytest.mark.parametrize("unseen", [0, 255, 9])
def test_what_fills_the_rest_of_the_volume_was_not_painted(truth: np.ndarray, tmp_path: Path, unseen: int) -> None:
    painted = np.full(SHAPE, unseen, np.uint8)
    painted[4] = truth[4]
    assert np.count_nonzero(annotated_of(sketch_of(tmp_path, painted, planes="z4"))) == 24 * 32


def test_planes_are_held_out_only_where_there_are_two(truth: np.ndarray, tmp_path: Path) -> None:
    painted = np.zeros(SHAPE, np.uint8)
    painted[4] = truth[4]
    with pytest.raises(ConfigError, match="got one, z4; annotate another plane, or leave out --holdout slices"):
        sketch_of(tmp_path / "named", painted, planes="z4", holdout=True)
    unseen = np.full(SHAPE, 255, np.uint8)
    unseen[4] = truth[4]
    with pytest.raises(ConfigError, match="got one, z4; annotate another plane"):
        sketch_of(tmp_path / "found", unseen, holdout=True)


def test_no_message_about_a_picture_speaks_of_planes(tmp_path: Path) -> None:
    image = png(tmp_path / "cells.png", np.random.default_rng(0).integers(0, 255, (40, 40)))
    blank, one, two = (np.zeros((40, 40), np.uint8) for _ in range(3))
    one[5:9, 4:20] = 1
    two[5:9, 4:20], two[20:30, 22:25] = 1, 2
    for number, (painted, asked, error) in enumerate([(blank, None, DataError), (one, None, ConfigError), (one, 0, DataError)]):
        annotation = png(tmp_path / f"strokes_{number}.png", painted)
        with pytest.raises(error) as caught:
            open_sketch(image, annotation, tmp_path / "out.png", DensifyOptions(not_annotated=asked))
        assert "plane" not in str(caught.value)
    annotation = png(tmp_path / "strokes.png", two)
    assert "plane" not in open_sketch(image, annotation, tmp_path / "out.png", DensifyOptions()).reason
    with pytest.raises(ConfigError, match="got a picture, which has no planes; leave out --holdout slices"):
        open_sketch(image, annotation, tmp_path / "out.png", DensifyOptions(holdout=True))


def test_objects_are_no_classes(tmp_path: Path) -> None:
    painted = np.zeros(SHAPE, np.uint8)
    painted[4] = np.arange(24 * 32).reshape(24, 32) % 40 + 1
    with pytest.raises(DataError, match="classes, 32 at most, got 40 values"):
        sketch_of(tmp_path, painted)


def test_a_value_that_occurs_nowhere_is_a_slip(sparse: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a value of by anna.nii.gz \(0, 1, 255\), got 7"):
        sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8), not_annotated=7)
    with pytest.raises(ConfigError, match="planes out of z0 to z17, y0 to y23, x0 to x31, got 'z18'"):
        sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8), planes="z18")


# ---- files ----


@pytest.mark.parametrize(
    ("name", "before", "words"),
    [
        ("dense.tif", None, "a name ending in .nii.gz or .nii, got `dense.tif`"),
        ("dense", None, "a name ending in .nii.gz or .nii"),
        ("dense.nii.gz", lambda folder: text(folder / "dense.nii.gz", "mine"), "a file that is not there yet"),
        ("dense.nii.gz", lambda folder: text(folder / "dense.run" / "log.jsonl", "mine"), "a new or empty folder for the run"),
        ("in/kidney.nii.gz", None, "a file that is not there yet"),
    ],
)
def test_a_name_that_is_taken_or_does_not_fit_is_refused_before_any_work(
    sparse: np.ndarray, tmp_path: Path, name: str, before: Callable[[Path], Path] | None, words: str
) -> None:
    files = pair(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8))
    if before:
        before(tmp_path)
    found = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=words):
        open_sketch(*files, tmp_path / name, DensifyOptions())
    assert sorted(path for path in tmp_path.rglob("*")) == found


def test_an_annotation_of_another_grid_is_refused(sparse: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the shape of \S+/kidney\.nii\.gz, 18×24×32, got 17×24×32"):
        sketch_of(tmp_path, sparse[1:])


def test_a_stack_without_a_voxel_size_is_taken_with_a_warning_and_gives_a_stack(sparse: np.ndarray, tmp_path: Path) -> None:
    image = tiff(tmp_path / "volume.tif", tubules(SHAPE, seed=1).image)
    annotation = tiff(tmp_path / "annotation.tif", np.where(sparse < 0, 255, sparse).astype(np.uint8))
    with pytest.warns(DataWarning, match="no voxel size in the file, 1 mm is assumed"):
        sketch = open_sketch(image, annotation, tmp_path / "dense.ome.tif", DensifyOptions(run=tmp_path / "kept"))
    assert sketch.run == tmp_path / "kept"
    plan = small_plan_3d(
        classes=sketch.dataset.legend.names, fold="all", steps=2, validations=1, spacing_mm=(1, 1, 1), assumed_spacing_mm=(1, 1, 1)
    )
    with pytest.warns(DataWarning, match="no voxel size in the file; 1 × 1 × 1 mm is assumed, as in training"):
        densify(sketch, plan)
    assert tifffile.imread(sketch.out).shape == SHAPE


def test_a_training_that_ends_early_says_what_can_be_done_here(sparse: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*words: object, **more: object) -> Path:
        raise RunError("step 5", expected="9 steps", got="a request to stop", do="continue with --resume")

    sketch = sketch_of(tmp_path, np.where(sparse < 0, 255, sparse).astype(np.uint8), steps=9)
    monkeypatch.setattr("microtome.densify.train", stopped)
    with pytest.raises(RunError, match=r"step 5: expected 9 steps, got a request to stop; densify again with another --run") as caught:
        run(sketch)
    assert "--resume" not in str(caught.value)
    assert not sketch.out.exists()


@pytest.mark.parametrize("suffix", [".nrrd", ".npy", ".h5", ".ome.zarr"])
def test_other_formats_are_densified_into_their_own(sparse: np.ndarray, tmp_path: Path, suffix: str) -> None:
    painted = np.where(sparse < 0, 255, sparse).astype(np.uint8)
    grey = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    for name, array in (("image", grey), ("drawn", painted)):
        if suffix == ".ome.zarr":
            write_volume_store(tmp_path / f"{name}{suffix}", array, chunk=(8, 16, 16))
        elif suffix == ".npy":
            np.save(tmp_path / f"{name}{suffix}", array)
        elif suffix == ".h5":
            with h5py.File(tmp_path / f"{name}{suffix}", "w") as file:
                file["raw" if name == "image" else "label"] = array
        else:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), tmp_path / f"{name}{suffix}")
    options = DensifyOptions(not_annotated=255, run=tmp_path / "run")
    with warnings.catch_warnings():
        # NPY and HDF5 name no voxel size.
        warnings.simplefilter("ignore", DataWarning)
        sketch = open_sketch(tmp_path / f"image{suffix}", tmp_path / f"drawn{suffix}", tmp_path / f"dense{suffix}", options)
        header = sketch.dataset.headers[sketch.dataset.cases[0].name]
        dense = run(sketch, spacing_mm=header.spacing_mm)
    assert set(np.unique(dense)) <= {0, 1}
    assert np.array_equal(dense[sparse >= 0], painted[sparse >= 0])
