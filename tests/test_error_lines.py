"""Faults that people make, by the real command line: one line with the code of that fault, the exit code of its kind, and no traceback."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from microtome import cli
from microtome.codes.lookup import FAULTS
from microtome.config import dump_yaml
from tests.folders import png, tiff
from tests.golden_bundles import FOLDER
from tests.small import small_plan
from tests.test_cli import run

EXIT_CODES = {"D": 2, "C": 2, "R": 1}
SQUARE = np.pad(np.full((8, 8), 255, np.uint8), 4)


def cells(folder: Path, described: str = "") -> Path:
    """Four pictures with their masks, and what `microtome.yaml` says of them."""
    for number in range(4):
        png(folder / "images" / f"{number}.png", SQUARE // 2 + number)
        png(folder / "masks" / f"{number}.png", np.roll(SQUARE, number, 0))
    if described:
        (folder / "microtome.yaml").write_text(described, encoding="utf-8")
    return folder


def plan(folder: Path, text: str = "") -> Path:
    """A plan, or a file that has its name."""
    (folder / "plan.yaml").write_text(text or dump_yaml(small_plan(classes=("background", "foreground"))), encoding="utf-8")
    return folder / "plan.yaml"


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def model(folder: Path) -> Path:
    """A trained model of pictures."""
    return shutil.copytree(FOLDER / "schema2-needs-2d", folder / "run" / "model").parent


def damaged_model(folder: Path) -> Path:
    file = model(folder) / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    return written(file, bytes(content)).parents[1]


def foreign_model(folder: Path) -> Path:
    (folder / "run" / "model").mkdir(parents=True)
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, folder / "run" / "model" / "model.safetensors")
    return folder / "run"


def two_labels(folder: Path) -> Path:
    for word in ("", "_mask", "_label"):
        png(folder / f"a{word}.png", SQUARE)
    return folder


def volume(folder: Path, values: tuple[int, ...] = (0, 1)) -> tuple[Path, Path]:
    """A volume, and an annotation of its first planes, one value each."""
    label = np.full((6, 16, 16), 255, np.uint8)
    for z, value in enumerate(values):
        label[z] = value
    return tiff(folder / "v.tif", np.arange(6 * 256).reshape(6, 16, 16).astype(np.uint8)), tiff(folder / "l.tif", label)


def cut_off(path: Path) -> Path:
    whole = png(path, np.random.default_rng(0).integers(0, 255, (64, 64)))
    return written(path, whole.read_bytes()[:-900])


Words = tuple[object, ...]
# What is done wrong -> the code, and a function of an empty folder that makes the files and gives the words.
FAULTY: dict[str, tuple[str, Callable[[Path], Words]]] = {
    "a network's name misspelt": ("C001", lambda p: ("plan", cells(p), "--network", "unett")),
    "a recipe's name misspelt": ("C001", lambda p: ("plan", cells(p), "--recipe", "unet2016")),
    "steps and minutes": ("C003", lambda p: ("train", p, "--out", p / "r", "--steps", 1, "--minutes", 1)),
    "a page named as an image": ("C004", lambda p: ("inspect", cells(p), "--html", p / "images" / "0.png")),
    "a run folder that is taken": ("C005", lambda p: ("train", cells(p), "--out", p / "images")),
    "resumed where nothing began": ("C006", lambda p: ("train", cells(p), "--out", p / "r", "--resume")),
    "a report of no run": ("C006", lambda p: ("report", p)),
    "a plan that is not there": ("C008", lambda p: ("train", cells(p), "--out", p / "r", "--plan", p / "none.yaml")),
    "tabs in a plan": ("C009", lambda p: ("train", cells(p), "--out", p / "r", "--plan", plan(p, "steps:\n\t- 1"))),
    "an unknown word in microtome.yaml": ("C010", lambda p: ("inspect", cells(p, "imags: a"))),
    "a plan that lacks nearly all": ("C011", lambda p: ("train", cells(p), "--out", p / "r", "--plan", plan(p, "steps: 3"))),
    "text for a number": ("C012", lambda p: ("inspect", cells(p, "spacing_mm: small"))),
    "patches of other axes": (
        "C013",
        lambda p: ("train", cells(p), "--out", p / "r", "--plan", plan(p, plan(p).read_text().replace("dims: 2", "dims: 3"))),
    ),
    "a fold that cannot be": ("C014", lambda p: ("inspect", cells(p), "--fold", "6/5")),
    "a background of no class": ("C018", lambda p: ("inspect", cells(p, "background: sky"))),
    "a case of no name": ("C017", lambda p: ("inspect", cells(p, "validation: [nobody]"))),
    "planes outside of the volume": ("C020", lambda p: ("densify", *volume(p), "--out", p / "d.tif", "--planes", "z99")),
    "a negative tolerance": ("C022", lambda p: ("evaluate", *volume(p), "--tolerance", -1)),
    "a size that is none": ("C022", lambda p: ("predict", model(p), p, "--out", p / "o", "--min-size", "big")),
    "a device of no name": ("C024", lambda p: ("plan", cells(p), "--device", "gpu")),
    "an engine of no name": ("C001", lambda p: ("predict", model(p), png(p / "a.png"), "--out", p / "o", "--engine", "onyx")),
    "a cluster of no address": ("C030", lambda p: ("predict", p, p, "--out", p / "o", "--cluster", "foo")),
    "an input that is no size": ("C037", lambda p: ("networks", "unet", "--input", "big")),
    "a picture for a network of volumes": ("C043", lambda p: ("networks", "unet3d", "--input", "1x64x64")),
    "a plan for other classes": (
        "C041",
        lambda p: ("train", cells(p, "classes: {sky: 0, cell: 255}"), "--out", p / "r", "--plan", plan(p)),
    ),
    "a code that is none": ("C001", lambda p: ("explain", "D9999")),
    "a folder that is not there": ("D001", lambda p: ("inspect", p / "nowhere")),
    "an image that is not there": ("D001", lambda p: ("predict", model(p), p / "nothing.png", "--out", p / "o")),
    "a picture that was cut off": ("D002", lambda p: ("evaluate", cut_off(p / "a.png"), png(p / "t" / "a.png"))),
    "a text that is called a picture": ("D005", lambda p: ("evaluate", written(p / "a.png", "no picture" * 9), png(p / "t" / "a.png"))),
    "two labels for one image": ("D031", lambda p: ("inspect", two_labels(p))),
    "an empty folder": ("D031", lambda p: ("inspect", p)),
    "a label of another shape": ("D077", lambda p: ("evaluate", png(p / "a.png"), png(p / "t" / "a.png", SQUARE))),
    "labels with fractions": ("D039", lambda p: ("evaluate", tiff(p / "a.tif", SQUARE / 7), tiff(p / "t" / "a.tif", SQUARE))),
    "a dataset.json that is no JSON": ("D240", lambda p: ("inspect", written(p / "dataset.json", "{,}").parent)),
    "a name that leads out of the folder": ("D042", lambda p: ("inspect", cells(p, "pairs: {../a.png: masks/0.png}"))),
    "a file that is named and not there": ("D043", lambda p: ("inspect", cells(p, "pairs: {images/9.png: masks/0.png}"))),
    "one class alone": ("D044", lambda p: ("densify", *volume(p, (1,)), "--out", p / "d.tif", "--not-annotated", 255)),
    "no model": ("D051", lambda p: ("predict", p, png(p / "a.png"), "--out", p / "o")),
    "weights of another program": ("D052", lambda p: ("predict", foreign_model(p), png(p / "a.png"), "--out", p / "o")),
    "a model with a changed byte": ("D054", lambda p: ("predict", damaged_model(p), png(p / "a.png"), "--out", p / "o")),
    "a volume for a model of pictures": ("D058", lambda p: ("predict", model(p), volume(p)[0], "--out", p / "o", "--engine", "torch")),
    "predictions among the images": (
        "D063",
        lambda p: ("predict", model(p), png(p / "i" / "a.png"), "--out", p / "i", "--engine", "torch"),
    ),
    "a prediction that is missing": (
        "D071",
        lambda p: ("evaluate", png(p / "p" / "a.png").parent, png(png(p / "t" / "a.png").with_name("b.png")).parent),
    ),
    "a prediction too many": (
        "D072",
        lambda p: ("evaluate", png(png(p / "p" / "a.png").with_name("b.png")).parent, png(p / "t" / "a.png").parent),
    ),
    "a file where a folder would be": ("R001", lambda p: ("inspect", cells(p), "--html", written(p / "file", "") / "page.html")),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_fault_is_one_line_with_its_code(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, make = FAULTY[fault]
    words = make(tmp_path)
    capsys.readouterr()
    assert run(monkeypatch, *words) == EXIT_CODES[code[0]]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("microtome: ")]
    assert len(said) == 1, said
    assert re.fullmatch(r"microtome: .+: expected .+, got .+; \S.+[^.] \[MT-([DCR]\d{3})\]", said[0]), said
    assert said[0].endswith(f"[MT-{code}]"), said


def test_many_kinds_of_fault_are_provoked() -> None:
    assert len(FAULTY) >= 40
    assert len({code for code, _ in FAULTY.values()} & FAULTS.keys()) >= 30


# From here on: errors that nobody foresaw, words that the parser refuses, and warnings.


def test_what_nobody_foresaw_is_one_line_that_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(cli, "app", broken)
    assert run(monkeypatch, "inspect") == 1
    said = capsys.readouterr().err
    assert said.startswith("microtome: ZeroDivisionError: a b; ")
    assert said.count("\n") == 1
    assert "report" in said
    assert "--debug" in said
    monkeypatch.setattr("sys.argv", ["microtome", "inspect", "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    "words", [("inspcet", "x"), ("inspect",), ("inspect", "x", "--no-such"), ("train", "x", "--out", "y", "--steps", "two")]
)
def test_words_that_cannot_be_parsed_end_with_2(words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("Usage: ")
    assert "Traceback" not in said


def test_a_warning_is_one_line_with_the_name_of_the_file(tmp_path: Path) -> None:
    shutil.copy(png(tmp_path / "strange\nname.png"), tmp_path / "strange\nname.tif")
    code = "import sys; from microtome import cli; cli.main()"
    words = ["evaluate", "strange\nname.tif", "strange\nname.png", "--html", "page.html"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    suffix, spacing = done.stderr.splitlines()
    assert suffix == "warning: strange name.tif: the suffix says tiff but the file is png; it is read as png"
    assert spacing.startswith("warning: strange name.png: the one case has no voxel size")
    # Labels of background alone have no score, and that is no reason to stop.
    assert "no class beside the background" in done.stdout
