"""The words that a user types, from one end of the road to the other, in the process and as a command."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import yaml

from microtome import cli
from microtome.config import dump_yaml
from microtome.data.listing import read_listing
from microtome.data.synthetic import DemoConfig, DemoData, cells, write_demo_data
from microtome.demo import run_demo
from microtome.options import changed_plan
from microtome.terminal import Terminal
from tests.folders import png
from tests.small import TINY_2D, TINY_3D, small_plan

SMALL = DemoConfig(volume_vox=(16, 32, 32), picture_vox=(64, 64), pictures=6)
MICROTOME = Path(sys.executable).with_name("microtome")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Call the entry point with these words; its exit code."""
    monkeypatch.setattr(sys, "argv", ["microtome", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """The demo's data, in small."""
    return write_demo_data(tmp_path_factory.mktemp("data"), SMALL)


@pytest.fixture(scope="module")
def trained(demo_data: DemoData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on the cells, by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    plan = small_plan(classes=("background", "foreground"), network=TINY_2D, steps=6)
    (folder / "plan.yaml").write_text(dump_yaml(plan), encoding="utf-8")
    patch = pytest.MonkeyPatch()
    try:
        assert run(patch, "train", demo_data.cells, "--out", folder / "run", "--plan", folder / "plan.yaml") == 0
    finally:
        patch.undo()
    return folder / "run"


def test_help_of_the_program_and_of_each_command_imports_neither_torch_nor_numpy() -> None:
    code = """
import sys
from microtome import cli
sys.argv = ["microtome", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as left:
    assert not left.code, left.code
assert not {"torch", "numpy", "scipy"} & set(sys.modules)
"""
    for words in ([], ["demo"], ["doctor"], ["inspect"], ["plan"], ["train"], ["predict"], ["evaluate"], ["report"], ["networks"]):
        done = subprocess.run([sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--help" in done.stdout


def test_a_run_folder_holds_what_the_readme_says(trained: Path) -> None:
    expected = {
        "report.html",
        "plan.yaml",
        "model",
        "metrics.json",
        "validation",
        "dataset.json",
        "log.jsonl",
        "environment.json",
        "checkpoints",
    }
    assert expected == {path.name for path in trained.iterdir()}
    assert json.loads((trained / "environment.json").read_text())["command"].startswith("microtome train")


def test_predict_then_evaluate_scores_every_picture(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "predict", trained, demo_data.cells_unseen, "--out", tmp_path / "p") == 0
    written = sorted(path.name for path in (tmp_path / "p").glob("*.png"))
    assert written == sorted(path.name for path in demo_data.cells_unseen_truth.iterdir())
    assert set(np.unique(np.asarray(PIL.Image.open(tmp_path / "p" / written[0])))) <= {0, 255}
    words = ("evaluate", tmp_path / "p", demo_data.cells_unseen_truth, "--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    with pytest.warns(UserWarning, match="no voxel size"):
        assert run(monkeypatch, *words) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert {row["case"] for row in scores["cases"]} == {name.removesuffix(".png") for name in written}
    assert 0 <= scores["summary"]["dice"]["mean"] <= 1
    assert "</html>" in (tmp_path / "s.html").read_text()


def test_a_missing_prediction_is_an_error_that_names_it(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = tmp_path / "truth"
    truth.mkdir()
    for name in ("a", "b"):
        PIL.Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(truth / f"{name}.png")
    (tmp_path / "predictions").mkdir()
    PIL.Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "predictions" / "a.png")
    assert run(monkeypatch, "evaluate", tmp_path / "predictions", truth) == 2
    line = capsys.readouterr().err
    assert line.startswith("microtome: ")
    assert "b" in line
    assert line.count("\n") == 1


def test_report_is_written_anew(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (trained / "report.html").read_text()
    (trained / "report.html").unlink()
    assert run(monkeypatch, "report", trained) == 0
    assert (trained / "report.html").read_text() == before


def test_train_refuses_a_folder_that_holds_a_run(
    trained: Path, demo_data: DemoData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", demo_data.cells, "--out", trained, "--steps", 1) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, "train", demo_data.cells, "--out", trained / "plan.yaml", "--steps", 1) == 2
    assert "plan.yaml: expected a new or empty folder, got a file; give another --out [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--resume", "--fold", "2/5"), "--fold"),
        (("--plan", "plan.yaml", "--network", "unet"), "--network"),
        (("--resume", "--seed", 1), "--seed"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    words: tuple[object, ...],
    named: str,
    demo_data: DemoData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "train", demo_data.cells, "--out", tmp_path / "run", *words) == 2
    assert f"got {named}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_file_to_write_must_be_named_as_what_it_will_be(
    demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((demo_data.cells / "images").iterdir())
    before = image.read_bytes()
    mask = next(demo_data.cells_unseen_truth.iterdir())
    for words in (
        ("inspect", demo_data.cells, "--html", image),
        ("plan", demo_data.cells, "--minutes", 1, "--out", image),
        ("evaluate", mask, mask, "--json", image),
        ("evaluate", mask, mask, "--html", image),
        ("plan", demo_data.cells, "--minutes", 1, "--out", tmp_path),
    ):
        assert run(monkeypatch, *words) == 2
        assert "expected the name of a file ending in" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_steps_and_minutes_are_one_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", tmp_path, "--out", tmp_path / "run", "--steps", 3, "--minutes", 1) == 2
    assert "got --minutes" in capsys.readouterr().err


def test_a_refused_prediction_leaves_nothing_behind(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "predict", trained, demo_data.tubules_unseen, "--out", tmp_path / "p") == 2
    assert "expected 2 axes as in training, got 3 axes" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_run_that_is_complete_says_so_when_it_is_resumed(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert run(monkeypatch, "train", demo_data.cells, "--out", tmp_path / "run", "--resume") == 0
    assert "already complete at step 6" in capsys.readouterr().err


def test_a_plan_takes_another_fold_and_seed(demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(classes=("background", "foreground"), steps=1, validations=1)
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan), encoding="utf-8")
    parts = []
    for fold in ("1/3", "2/3"):
        out = tmp_path / fold.replace("/", "-")
        assert run(monkeypatch, "train", demo_data.cells, "--out", out, "--plan", tmp_path / "plan.yaml", "--fold", fold, "--seed", 5) == 0
        parts.append(set(json.loads((out / "dataset.json").read_text())["validation"]))
        assert yaml.safe_load((out / "plan.yaml").read_text())["seed"] == 5
    assert not parts[0] & parts[1]


def test_what_was_typed_is_the_reason_of_what_it_changed() -> None:
    plan = small_plan(minutes=10.0, reasons={"steps": "10 minutes at 1 s a step", "batch": "so many fit"})
    steps = changed_plan(plan, minutes=None, steps=2, fold="2/5", seed=0)
    assert (steps.steps, steps.minutes, steps.fold, steps.seed) == (2, None, "2/5", 0)
    assert steps.reasons == {"steps": "as asked", "fold": "as asked", "seed": "as asked", "batch": "so many fit"}
    minutes = changed_plan(plan, minutes=3.0, steps=None, fold=None, seed=None)
    assert (minutes.steps, minutes.minutes, minutes.reasons["minutes"]) == (plan.steps, 3.0, "as asked")
    assert "10 minutes" not in minutes.reasons["steps"]
    assert changed_plan(plan, minutes=None, steps=None, fold=None, seed=None) == plan


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "nowhere", "--fold", "6/5"), "got '6/5'; try 1/5"),
        (("inspect", "nowhere", "--fold", "5"), "got '5'; try 1/5"),
        (("predict", "nowhere", "nothing.png", "--out", "out", "--cluster", "local:0"), "got `local:0`; give local:2"),
        (("predict", "nowhere", "nothing.png", "--out", "out", "--cluster", "foo"), "got `foo`; give local:2, tcp://host:8786"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_any_file_is_opened(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    line = capsys.readouterr().err
    assert said in line
    assert "nowhere" not in line


@pytest.mark.parametrize(("option", "name", "near"), [("--network", "unett", "`unet`"), ("--recipe", "vnet2015", "`vnet2016`")])
@pytest.mark.parametrize("command", ["plan", "train", "densify"])
def test_a_wrong_name_is_refused_before_the_data_are_looked_at(
    command: str,
    option: str,
    name: str,
    near: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words: dict[str, tuple[object, ...]] = {
        "plan": ("nowhere",),
        # Whether anything is there is asked for before all that takes seconds to import.
        "train": (tmp_path, "--out", tmp_path / "run"),
        "densify": ("nowhere.tif", "nothing.tif", "--out", tmp_path / "new.tif"),
    }
    assert run(monkeypatch, command, *words[command], option, name) == 2
    line = capsys.readouterr().err
    assert f"got `{name}`; did you mean" in line
    assert near in line
    assert "nowhere" not in line


def test_resume_goes_on_where_a_longer_plan_says(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert run(monkeypatch, "train", demo_data.cells, "--out", tmp_path / "run", "--resume", "--steps", 8) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"step",' in line]
    assert steps == list(range(1, 9))
    assert yaml.safe_load((tmp_path / "run" / "plan.yaml").read_text())["steps"] == 8


def test_fewer_steps_than_were_made_are_refused_and_the_run_is_as_it_was(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run(monkeypatch, "train", demo_data.cells, "--out", tmp_path / "run", "--resume", "--steps", 4) == 2
    assert "run/plan.yaml: expected steps of 6 or more, which are made, got 4; train for fewer steps" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_plan_that_may_have_been_edited_is_not_overwritten(
    demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text("steps: 7 # mine")
    assert run(monkeypatch, "plan", demo_data.cells, "--out", tmp_path / "plan.yaml") == 2
    assert "plan.yaml: expected the name of a new file, got a file of 15 bytes" in capsys.readouterr().err
    assert (tmp_path / "plan.yaml").read_text() == "steps: 7 # mine"


def test_labels_of_one_class_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        png(tmp_path / "data" / "images" / f"{name}.png", np.eye(8))
        png(tmp_path / "data" / "masks" / f"{name}.png", 0)
    for stated in ("", "classes: {background: 0, cell: 1}"):
        (tmp_path / "data" / "microtome.yaml").write_text(stated or "instances: false")
        for words in (("plan", tmp_path / "data"), ("train", tmp_path / "data", "--out", tmp_path / "run", "--steps", 1)):
            assert run(monkeypatch, *words) == 2
            assert "expected labels of two classes at least, got background alone; " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_links_of_several_names_to_one_image_are_images_each(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(min(demo_data.cells_unseen.iterdir()), images / "blank.png")
    for name in ("case_a", "case_b"):
        (images / f"{name}.png").symlink_to("blank.png")
    assert run(monkeypatch, "predict", trained, images, "--out", tmp_path / "out") == 0
    listed = read_listing(tmp_path / "out")
    assert listed is not None
    assert {entry.case for entry in listed.entries.values()} == {"blank", "case_a", "case_b"}


def test_a_path_that_the_system_does_not_take_is_one_line_about_the_path(
    demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("x" * 300)
    for words in ((demo_data.cells, "--out", long), (long, "--out", tmp_path / "run")):
        assert run(monkeypatch, "train", *words, "--steps", 1) == 2
        line = capsys.readouterr().err
        assert "expected a path that can be opened, got File name too long; check its length" in line
        assert line.endswith("[MT-D001]\n")


def test_an_image_given_twice_is_predicted_once(
    trained: Path, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = sorted(demo_data.cells_unseen.iterdir())
    assert run(monkeypatch, "predict", trained, demo_data.cells_unseen, images[0], "--out", tmp_path / "out") == 0
    listed = read_listing(tmp_path / "out")
    assert listed is not None
    assert len(listed.entries) == len(images)


def test_plan_is_printed_with_reasons_and_can_be_edited_and_given_back(
    demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.yaml"
    assert run(monkeypatch, "plan", demo_data.tubules, "--minutes", 0.2, "--out", out) == 0
    assert "volumes" in capsys.readouterr().out
    plan = yaml.safe_load(out.read_text())
    assert plan["dims"] == 3
    assert plan["reasons"]["steps"].startswith("0.2 minutes")
    plan["stepz"] = plan.pop("steps")
    out.write_text(yaml.safe_dump(plan))
    assert run(monkeypatch, "train", demo_data.tubules, "--out", tmp_path / "run", "--plan", out) == 2
    line = capsys.readouterr().err
    assert "stepz" in line
    assert "did you mean `steps`?" in line
    assert not (tmp_path / "run").exists()


def test_inspect_says_what_is_wrong_and_leaves_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        picture = cells((48, 48), seed=len(name), count=4)
        for folder, array in (("images", picture.image), ("masks", (255 * picture.label).astype(np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            PIL.Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
    assert run(monkeypatch, "inspect", tmp_path, "--html", tmp_path / "page.html") == 0
    (tmp_path / "images" / "two.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "masks" / "three.png").unlink()
    capsys.readouterr()
    assert run(monkeypatch, "inspect", tmp_path) == 2
    text = capsys.readouterr().out
    assert "two.png" in text
    # Each error ends with the code of its page, whichever part of the reader found it.
    assert re.search(r"^error: .*two\.png.* \[MT-D\d{3}\]$", text.replace("\n  ", " "), re.MULTILINE)
    assert "three" in text
    assert run(monkeypatch, "inspect", tmp_path, "--json") == 2
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"]
    assert {"unreadable", "unlabelled-images"} <= {finding["code"] for finding in document["findings"]} | {"unlabelled-images"}


def test_what_is_not_there_is_one_line_and_with_debug_a_traceback(tmp_path: Path) -> None:
    for words, marks in (
        (["inspect", "nowhere"], ("microtome: nowhere: expected",)),
        (["--debug", "inspect", "nowhere"], ("Traceback", "DataError")),
    ):
        done = subprocess.run([MICROTOME, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode in (1, 2)
        assert all(mark in done.stderr for mark in marks)
    plain = subprocess.run([MICROTOME, "inspect", "nowhere"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert plain.returncode == 2
    assert plain.stderr.count("\n") == 1


def test_networks_are_listed_with_their_papers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "networks") == 0
    text = capsys.readouterr().out
    for words in ("unet3d", "Sparse Annotation", "2015", "modern_unet"):
        assert words in text
    assert run(monkeypatch, "networks", "--json") == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"unet", "unet_same", "unet3d", "modern_unet"}


def test_a_volume_comes_back_with_the_affine_and_shape_that_it_went_in_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    affine = np.array([[0.9, 0.1, 0, 5], [-0.1, 0.9, 0.2, -3], [0, -0.2, 1.5, 8], [0, 0, 0, 1]])
    for number in range(3):
        label = np.zeros((18, 16, 14), np.uint8)
        label[4:12, 5:11, 3:10] = 1
        image = (label * 40 + rng.normal(100, 8, label.shape)).astype(np.float32)
        for folder, array in (("images", image), ("labels", label)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), tmp_path / "data" / folder / f"v{number}.nii.gz")
    spacing = tuple(float(n) for n in np.linalg.norm(affine[:3, 2::-1], axis=0))
    plan = small_plan(
        dims=3,
        classes=("background", "foreground"),
        spacing_mm=spacing,
        network=TINY_3D,
        patch_vox=(12, 12, 12),
        steps=2,
        augment={"rotation_deg": (180.0, 0.0, 0.0)},
    )
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan), encoding="utf-8")
    assert run(monkeypatch, "train", tmp_path / "data", "--out", tmp_path / "run", "--plan", tmp_path / "plan.yaml") == 0
    assert (
        run(
            monkeypatch,
            "predict",
            tmp_path / "run",
            tmp_path / "data" / "images" / "v1.nii.gz",
            "--out",
            tmp_path / "p",
            "--tta",
            "rotations",
        )
        == 0
    )
    result = nib.load(tmp_path / "p" / "v1.nii.gz")
    assert result.shape == (18, 16, 14)
    np.testing.assert_allclose(result.affine, affine, atol=1e-5)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_slices_beside_a_fold_in_which_nothing_validates_are_refused(
    command: str, demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "run", "--steps", 1) if command == "train" else ()
    assert run(monkeypatch, command, demo_data.tubules, *out, "--holdout", "slices", "--fold", "all") == 2
    assert "expected a fold K/N, got --fold all" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_seed_that_no_generator_takes_is_refused_in_words(
    demo_data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", demo_data.cells, "--out", tmp_path / "run", "--seed", 2**32) == 2
    assert "less than or equal to 4294967295" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_demo_goes_all_the_way_and_says_where_the_reports_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of a machine that is busy with other tests, preparing a few cases takes a second or two of that.
    with pytest.warns(UserWarning, match="no voxel size"):
        run_demo(tmp_path / "demo", 0.4, Terminal(), SMALL)
    text = capsys.readouterr().err
    assert text.count("dense IoU") == 3
    index = (tmp_path / "demo" / "report.html").read_text()
    for path in re.findall(r'href="([^"]+)"', index):
        assert (tmp_path / "demo" / path).is_file()
    assert index.count("href=") == 5
    for name in ("tubules", "cells"):
        assert (tmp_path / "demo" / "runs" / name / "report.html").stat().st_size > 10_000
        assert (tmp_path / "demo" / "scores" / f"{name}_unseen.html").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(130)])
def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: BaseException) -> None:
    monkeypatch.setattr(sys, "argv", ["microtome", "train", "cells"])
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(stop))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "microtome: stopped; give the same command again; add --resume if the folder of --out exists\n"
