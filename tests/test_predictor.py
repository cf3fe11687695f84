import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import tifffile
import torch

from microtome.bundle import Bundle, save_bundle
from microtome.config import AugmentConfig, NetworkConfig, Plan
from microtome.data.dataset import open_dataset
from microtome.data.legend import Legend
from microtome.data.listing import LISTING
from microtome.errors import ConfigError, DataError, DataWarning, RunError
from microtome.evaluation.evaluate import evaluate
from microtome.images.files import read_image
from microtome.inference.asked import Options
from microtome.inference.mirroring import TTA
from microtome.inference.predict import predict_labels
from microtome.inference.predict_files import predict_files, safe_name
from microtome.inference.predictor import Predictor, load
from microtome.inference.restore import arrays_of
from microtome.inference.torch_engine import TorchEngine
from microtome.models.network import Network
from microtome.models.registry import build
from tests import folders

VALUES = Legend(names=("nothing", "cell", "wall"), values=((0,), (7,), (200, 201)), ignored=(255,), background=0)
COLOURS = Legend(names=("black", "red"), values=(((0, 0, 0),), ((250, 10, 20),)), kind="colours", background=0)
OBJECTS = Legend(names=("background", "object"), values=((0,), (255,)), kind="instances", background=0)


def predictor_of(
    legend: Legend = VALUES, *, dims: int = 2, channels: int = 1, tta: TTA = "none", head: int | None = None, **changes: Any
) -> Predictor:
    """A model that was trained for no step: its labels are arbitrary, but neither constant nor random. It has no samples: torch it is."""
    torch.manual_seed(5)
    config = NetworkConfig(widths=(4, 8))
    network = build("modern_unet", dims=dims, in_channels=channels, classes=len(legend.names), config=config)
    values: dict[str, Any] = {"dims": dims, "patch_vox": (16,) * dims, "spacing_mm": (1.0,) * dims, "classes": legend.names}
    plan = Plan(channels=channels, network=config, batch=1, steps=1, overlap=0.25, **values | changes)
    return Predictor(Bundle(plan=plan, legend=legend, weights=arrays_of(network.state_dict())), device="cpu", tta=tta, head=head)


def network_of(predictor: Predictor) -> Network:
    """The network of a predictor that torch computes for."""
    assert isinstance(predictor.engine, TorchEngine)
    return predictor.engine.network


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def expected(predictor: Predictor, path: Path) -> np.ndarray:
    """What stands in the label file of an image, by the pure functions behind."""
    return predictor.bundle.legend.encode(predictor(path))


def pixels_of(path: Path) -> np.ndarray:
    """The pixels as Pillow reads them, (Y, X) or (Y, X, 3)."""
    with PIL.Image.open(path) as picture:
        return np.asarray(picture)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != LISTING}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# formats and geometry


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_gets_a_png_of_the_training_labels_values(tmp_path: Path, suffix: str) -> None:
    predictor = predictor_of()
    path = folders.png(tmp_path / "in" / f"a{suffix}", noise(21, 34))
    (written,) = predict_files(predictor, [path], tmp_path / "out")
    assert written == tmp_path / "out" / "a.png"
    assert read_image(written).format == "png"
    pixels = pixels_of(written)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (21, 34)
    assert set(np.unique(pixels)) == {0, 7, 200}
    np.testing.assert_array_equal(pixels, expected(predictor, path))


def test_classes_of_colours_are_written_in_their_colours(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "in" / "a.png", noise(16, 20, 3))
    (written,) = predict_files(predictor_of(COLOURS, channels=3), [path], tmp_path / "out")
    pixels = pixels_of(written)
    assert {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()} == {(0, 0, 0), (250, 10, 20)}


def test_objects_are_written_as_0_and_255(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "in" / "a.png", noise(16, 20))
    (written,) = predict_files(predictor_of(OBJECTS), [path], tmp_path / "out")
    assert set(np.unique(pixels_of(written))) == {0, 255}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_an_oblique_nifti_keeps_its_place_and_header(tmp_path: Path, suffix: str) -> None:
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, -0.9, 2.5])
    affine[:3, 3] = [-12.5, 33.0, 7.25]
    source = nib.Nifti1Image(noise(12, 11, 9).astype(np.int16), affine)
    source.header["descrip"] = b"scanner 7"
    source.set_qform(affine, code=1)
    source.set_sform(affine, code=2)
    path = tmp_path / "in" / f"a{suffix}"
    path.parent.mkdir()
    nib.save(source, path)
    predictor = predictor_of(dims=3, spacing_mm=(2.0, 1.0, 1.0))
    (written,) = predict_files(predictor, [path], tmp_path / "out")
    assert written.name == f"a{suffix}"
    result = nib.load(written)
    assert result.shape == (12, 11, 9)
    np.testing.assert_allclose(result.affine, source.affine, atol=1e-5)
    np.testing.assert_allclose(result.header.get_zooms(), source.header.get_zooms())
    assert bytes(result.header["descrip"]).rstrip(b"\0") == b"scanner 7"
    assert (int(result.header["qform_code"]), int(result.header["sform_code"])) == (1, 2)
    values = np.asarray(result.dataobj)
    assert set(np.unique(values)) <= {0, 7, 200}
    assert len(np.unique(values)) > 1
    np.testing.assert_array_equal(values.transpose(2, 1, 0), expected(predictor, path))


def test_a_tiff_stack_keeps_its_voxel_size(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, noise(6, 17, 15), imagej=True, resolution=(4.0, 2.0), metadata={"axes": "ZYX", "spacing": 3.0, "unit": "mm"})
    predictor = predictor_of(spacing_mm=(1.0, 0.5, 0.5))
    (written,) = predict_files(predictor, [path], tmp_path / "out")
    before, after = read_image(path), read_image(written)
    assert before.spacing_mm == pytest.approx((3.0, 0.5, 0.25))
    assert after.spacing_known
    assert after.spacing_mm == pytest.approx(before.spacing_mm)
    assert after.shape_vox == (6, 17, 15)
    np.testing.assert_array_equal(after.array[0], expected(predictor, path))


def test_a_network_of_sections_labels_each_section_by_itself(tmp_path: Path) -> None:
    predictor = predictor_of(spacing_mm=(1.0, 1.0, 1.0))
    volume = read_image(folders.nifti(tmp_path / "a.nii.gz", noise(3, 18, 20), spacing_mm=(5, 1, 1)))
    alone = np.stack(
        [
            predict_labels(
                section[None, None].astype(float),
                (5.0, 1.0, 1.0),
                plan=predictor.bundle.plan,
                network=network_of(predictor),
                engine=predictor.engine,
            )[0]  # type: ignore[arg-type]
            for section in volume.array[0]
        ]
    )
    # Grey values are those of the whole volume, which are nearly those of each section of noise.
    assert (predictor(volume) == alone).mean() > 0.97


def test_an_image_without_a_voxel_size_is_taken_as_the_training_images_were(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "a.png", noise(32, 32))
    image = read_image(path)
    assert not image.spacing_known
    wide, same = predictor_of(spacing_mm=(1.0, 1.0), assumed_spacing_mm=(0.5, 0.5)), predictor_of(spacing_mm=(2.0, 2.0))
    with pytest.warns(DataWarning, match=r"a\.png: no voxel size in the file; 0.5 × 0.5 mm is assumed"):
        labels = wide(path)
    np.testing.assert_array_equal(labels, same(path))
    assert (labels != predictor_of()(path)).any()


def test_a_picture_that_is_resized_whatever_its_voxel_size_is_not_said_to_be_assumed_one(tmp_path: Path) -> None:
    # A warning would be an error here.
    labels = predictor_of(resize_vox=(16, 16), assumed_spacing_mm=(0.5, 0.5))(folders.png(tmp_path / "a.png", noise(24, 20)))
    assert labels.shape == (24, 20)


def test_averaging_over_mirrored_versions_uses_the_axes_of_training() -> None:
    augment = AugmentConfig(flip_axes=(1,))
    assert predictor_of(augment=augment).engine.mirror_axes == ()
    assert predictor_of(augment=augment, tta="mirror").engine.mirror_axes == (1,)


def test_a_model_that_saw_no_mirrored_image_is_not_averaged_over_them() -> None:
    with pytest.raises(ConfigError, match="expected a model trained on mirrored images"):
        predictor_of(augment=AugmentConfig(), tta="mirror")


def test_averaging_over_turned_versions_turns_the_millimetres_of_the_plan() -> None:
    engine = predictor_of(augment=AugmentConfig(rotation_deg=(180.0,)), spacing_mm=(2.0, 1.0), tta="rotations").engine
    assert (engine.tta, engine.spacing_mm) == ("rotations", (2.0, 1.0))


@pytest.mark.parametrize("changes", [{}, {"rotation_deg": (20.0,)}, {"rotation_deg": (180.0,), "rotation_p": 0.0}])
def test_a_model_that_saw_no_image_turned_by_any_angle_is_not_averaged_over_them(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected a model trained on images turned by any angle"):
        predictor_of(augment=AugmentConfig(**changes), tta="rotations")


def test_a_shallower_head_is_for_networks_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"modern_unet: expected a network of nested U-Nets \(unetpp\), got head 1"):
        predictor_of(head=1)


def test_a_shallower_head_answers_with_fewer_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = NetworkConfig(name="unetpp", widths=(4, 8, 8), supervised_levels=2)
    network = build("unetpp", dims=2, in_channels=1, classes=len(VALUES.names), config=config).eval()
    plan = Plan(dims=2, channels=1, classes=VALUES.names, spacing_mm=(1.0, 1.0), network=config, patch_vox=(16, 16), batch=1, steps=1)
    bundle = Bundle(plan=plan, legend=VALUES, weights=arrays_of(network.state_dict()))
    whole, shallow = (Predictor(bundle, device="cpu", head=head) for head in (None, 1))
    assert sum(p.numel() for p in network_of(shallow).parameters()) < sum(p.numel() for p in network_of(whole).parameters())
    picture = folders.png(tmp_path / "a.png", noise(24, 24))
    assert shallow(picture).shape == whole(picture).shape == (24, 24)


def test_a_run_folder_is_loaded_by_its_path(tmp_path: Path) -> None:
    plain = predictor_of()
    save_bundle(tmp_path / "run" / "model", plain.bundle)
    path = folders.png(tmp_path / "a.png", noise(16, 16))
    np.testing.assert_array_equal(load(str(tmp_path / "run"), device="cpu")(str(path)), plain(path))


# inputs


def test_a_folder_is_searched_with_its_subfolders(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "y.jpg"):
        folders.png(tmp_path / "in" / name, noise(8, 8))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    done: list[tuple[str, int, int]] = []
    written = predict_files(predictor_of(), [tmp_path / "in"], tmp_path / "out", on_done=lambda *what: done.append(what))
    assert names_in(tmp_path / "out") == {"a/x.png", "b/x.png", "y.png"}
    assert {path.relative_to(tmp_path / "out").as_posix() for path in written} == names_in(tmp_path / "out")
    assert done == [("a/x", 1, 3), ("b/x", 2, 3), ("y", 3, 3)]


def test_of_a_dataset_the_images_are_labelled_and_not_its_masks(tmp_path: Path) -> None:
    for name in "ab":
        folders.png(tmp_path / "in" / "images" / f"{name}.png", noise(8, 8))
        folders.png(tmp_path / "in" / "masks" / f"{name}.png", 7)
    predict_files(predictor_of(), [tmp_path / "in"], tmp_path / "out")
    assert names_in(tmp_path / "out") == {"a.png", "b.png"}


def test_files_of_channels_are_one_case(tmp_path: Path) -> None:
    for number in range(2):
        folders.nifti(tmp_path / "in" / f"case_{number:04d}.nii.gz", noise(4, 8, 8, seed=number))
    predictor = predictor_of(dims=3, channels=2)
    predict_files(predictor, [tmp_path / "in"], tmp_path / "out")
    assert names_in(tmp_path / "out") == {"case.nii.gz"}
    listing = json.loads((tmp_path / "out" / LISTING).read_text())
    assert listing["cases"]["case.nii.gz"]["case"] == "case"


@pytest.mark.parametrize(("name", "file"), [("stack[20:25]", "stack_20-25"), ("a/b", "a/b"), ("plain", "plain")])
def test_names_of_cases_become_names_of_files(name: str, file: str) -> None:
    assert safe_name(name) == file


# refusals


def test_other_channels_than_in_training_are_refused_with_the_files_name(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "a.png", noise(8, 8, 3))
    line = refusal(lambda: predict_files(predictor_of(), [path], tmp_path / "out"))
    assert line.startswith(f"{path}: expected 1 channel")
    assert "got 3" in line


def test_grey_is_taken_as_colour_where_training_had_colour(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "a.png", noise(8, 8))
    with pytest.warns(DataWarning, match=r"a\.png: grey, and the model learned from colours"):
        assert predictor_of(channels=3)(path).shape == (8, 8)


def test_other_axes_than_in_training_are_refused_with_the_files_name(tmp_path: Path) -> None:
    path = folders.nifti(tmp_path / "a.nii.gz", noise(4, 8, 8))
    assert refusal(lambda: predictor_of()(path)).startswith(f"{path}: expected 2 axes as in training, got 3 axes")


def test_two_images_of_one_name_are_refused_before_any_work(tmp_path: Path) -> None:
    first = folders.png(tmp_path / "1" / "a.png")
    second = folders.png(tmp_path / "2" / "a.png")
    line = refusal(lambda: predict_files(predictor_of(), [first, second], tmp_path / "out"))
    assert line.startswith(f"{second}: ")
    assert str(first) in line
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_predictions(tmp_path: Path) -> None:
    path, out = folders.png(tmp_path / "a.png", noise(8, 8)), folders.text(tmp_path / "out", "mine")
    with pytest.raises(ConfigError, match="expected a folder for the label files, got a file; give another --out"):
        predict_files(predictor_of(), [path], out)
    assert out.read_text() == "mine"


def test_maps_that_somebody_else_wrote_are_not_overwritten(tmp_path: Path) -> None:
    path, out = folders.png(tmp_path / "a.png", noise(8, 8)), tmp_path / "out"
    foreign = folders.tiff(out / "probabilities" / "a.tif", noise(8, 8))
    before = foreign.read_bytes()
    options = Options(probabilities="uint8")
    assert refusal(lambda: predict_files(predictor_of(), [path], out, options=options)).startswith(
        f"{foreign}: expected no file of that name"
    )
    assert foreign.read_bytes() == before
    foreign.unlink()
    for _ in range(2):
        # Its own it replaces.
        predict_files(predictor_of(), [path], out, options=options)


def inputs_and_out(tmp_path: Path) -> dict[str, tuple[Sequence[Path], Path]]:
    folder = tmp_path / "in"
    return {
        "folder itself": ([folder], folder),
        "folder of a file": ([folder / "sub" / "a.png"], folder / "sub"),
        "folder above, one name each": ([folder], folder / "sub" / ".."),
        "subfolder": ([folder], folder / "predictions"),
    }


@pytest.mark.parametrize("which", ["folder itself", "folder of a file", "folder above, one name each", "subfolder"])
def test_results_among_the_images_are_refused_before_any_work(tmp_path: Path, which: str) -> None:
    folders.png(tmp_path / "in" / "sub" / "a.png")
    folders.png(tmp_path / "in" / "b.png")
    before = names_in(tmp_path)
    inputs, out = inputs_and_out(tmp_path)[which]
    assert "give another --out" in refusal(lambda: predict_files(predictor_of(), inputs, out))
    assert names_in(tmp_path) == before


def test_a_mask_that_somebody_drew_is_never_overwritten(tmp_path: Path) -> None:
    folders.png(tmp_path / "images" / "a.png", noise(8, 8))
    mask = folders.png(tmp_path / "masks" / "a.png", 7)
    before = mask.read_bytes()
    line = refusal(lambda: predict_files(predictor_of(), [tmp_path / "images"], tmp_path / "masks"))
    assert line.startswith(f"{mask}: expected no file of that name, got one that `predict` did not write")
    assert mask.read_bytes() == before
    assert names_in(tmp_path / "masks") == {"a.png"}


def test_earlier_predictions_are_replaced(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "in" / "a.png", noise(16, 16))
    predict_files(predictor_of(), [path], tmp_path / "out")
    folders.png(tmp_path / "out" / "a.png", 7)
    predict_files(predictor_of(), [path], tmp_path / "out")
    np.testing.assert_array_equal(pixels_of(tmp_path / "out" / "a.png"), expected(predictor_of(), path))


def test_predictions_of_other_classes_are_not_added_to_a_folder(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "in" / "a.png", noise(16, 16))
    predict_files(predictor_of(OBJECTS), [path], tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    line = refusal(lambda: predict_files(predictor_of(), [path], tmp_path / "out"))
    assert line.startswith(f"{tmp_path / 'out' / LISTING}: expected predictions of ")
    assert "got those of background (0), object (255)" in line
    assert line.endswith("give another --out")
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_predictions_of_the_same_values_found_in_another_way_are_added(tmp_path: Path) -> None:
    for name, legend in (("a", VALUES), ("b", replace(VALUES, reason="said otherwise"))):
        predict_files(predictor_of(legend), [folders.png(tmp_path / "in" / f"{name}.png", noise(8, 8))], tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / LISTING).read_text())["cases"]) == {"a.png", "b.png"}


@pytest.mark.parametrize("name", ["write_labels", "Recorder.add", "Recorder.close"])
def test_a_prediction_that_a_kill_left_out_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    paths = [folders.png(tmp_path / "in" / f"{stem}.png", noise(16, 16)) for stem in "ab"]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"microtome.inference.predict_files.{name}" if name == "write_labels" else f"microtome.data.listing.{name}", killed)
        with pytest.raises(KeyboardInterrupt):
            predict_files(predictor_of(), paths, tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / LISTING).read_text())["writing"]) == {"a", "b"}
    # Another image in between does not make what was left behind somebody else's.
    other = folders.png(tmp_path / "in" / "c.png", noise(16, 16))
    predict_files(predictor_of(), [other], tmp_path / "out")
    assert len(predict_files(predictor_of(), paths, tmp_path / "out")) == 2
    content = json.loads((tmp_path / "out" / LISTING).read_text())
    assert (set(content["cases"]), "writing" in content) == ({"a.png", "b.png", "c.png"}, False)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.png"])
def test_what_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    assert "got nothing there" in refusal(lambda: predict_files(predictor_of(), [tmp_path / name], tmp_path / "out"))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "got no image in it" in refusal(lambda: predict_files(predictor_of(), [tmp_path / "in"], tmp_path / "out"))


@pytest.mark.parametrize("text", ["{", "[]", '{"legend": 1}', '{"legend": {}, "cases": 5}'])
def test_a_damaged_list_of_predictions_is_refused_before_any_work(tmp_path: Path, text: str) -> None:
    path = folders.png(tmp_path / "in" / "a.png", noise(8, 8))
    folders.text(tmp_path / "out" / LISTING, text)
    assert str(tmp_path / "out" / LISTING) in refusal(lambda: predict_files(predictor_of(), [path], tmp_path / "out"))
    assert names_in(tmp_path / "out") == set()


# one bad file among good ones


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    for name in "ac":
        folders.png(tmp_path / "in" / f"{name}.png", noise(8, 8))
    bad = tmp_path / "in" / "b.png"
    bad.write_bytes((tmp_path / "in" / "a.png").read_bytes()[:60])
    done: list[str] = []
    line = refusal(lambda: predict_files(predictor_of(), [tmp_path / "in"], tmp_path / "out", on_done=lambda name, *_: done.append(name)))
    assert line.startswith(f"{bad}: ")
    assert line.endswith(f"the other 2 are in {tmp_path / 'out'}")
    assert names_in(tmp_path / "out") == {"a.png", "c.png"}
    assert set(json.loads((tmp_path / "out" / LISTING).read_text())["cases"]) == {"a.png", "c.png"}
    assert done == ["a", "b", "c"]


def test_of_several_bad_files_the_first_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    folders.png(tmp_path / "in" / "a.png", noise(8, 8))
    for name in "bcd":
        folders.text(tmp_path / "in" / f"{name}.png", "no picture")
    line = refusal(lambda: predict_files(predictor_of(), [tmp_path / "in"], tmp_path / "out"))
    assert line.startswith(f"{tmp_path / 'in' / 'b.png'}: ")
    assert "(and 2 more)" in line


def test_a_full_disk_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = folders.png(tmp_path / "in" / "a.png", noise(8, 8))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        predict_files(predictor_of(), [path], tmp_path / "out")
    assert names_in(tmp_path / "out") == set()


# predictions are scored


@pytest.mark.filterwarnings("ignore:.*no voxel size:microtome.errors.DataWarning")
def test_predictions_are_scored_against_the_dataset_by_their_list(tmp_path: Path) -> None:
    for number, name in enumerate(("x_1", "x_2", "x_3")):
        folders.png(tmp_path / "data" / "images" / f"{name}.png", noise(20, 24, seed=number))
        labels = np.array([0, 7, 200], np.uint8)[noise(20, 24, seed=number + 9) % 3]
        folders.png(tmp_path / "data" / "masks" / f"{name}_mask.png", labels)
    dataset = open_dataset(tmp_path / "data")
    predictor = predictor_of(dataset.legend)
    predict_files(predictor, [tmp_path / "data"], tmp_path / "out")
    result = evaluate(tmp_path / "out", tmp_path / "data")
    assert {row["case"] for row in result["cases"]} == {case.name for case in dataset.cases}
    for case in dataset.labelled:
        truth, labels = dataset.read_label(case), predictor(dataset.read_image(case))
        row = next(row for row in result["cases"] if row["case"] == case.name and row["class"] == dataset.legend.names[1])
        overlap = 2 * ((truth == 1) & (labels == 1)).sum() / ((truth == 1).sum() + (labels == 1).sum())
        assert row["dice"] == pytest.approx(overlap)


def test_the_list_says_of_each_file_which_image_it_is_of(tmp_path: Path) -> None:
    path = folders.png(tmp_path / "in" / "a.jpg", noise(8, 8))
    predict_files(predictor_of(), [path], tmp_path / "out")
    content = json.loads((tmp_path / "out" / LISTING).read_text())
    assert content == {"legend": VALUES.to_json(), "cases": {"a.png": {"case": "a", "input": str(path)}}}
