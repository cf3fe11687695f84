"""`microtome inspect` says what is wrong with data that cannot be split, instead of stopping there."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import nifti, png, text

from microtome import cli
from microtome.data.dataset import open_dataset
from microtome.data.quality import inspect_dataset, inspect_fold
from microtome.errors import ConfigError


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Call the entry point with these words; its exit code."""
    monkeypatch.setattr(sys, "argv", ["microtome", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def pair(root: Path, name: str, label_shape: tuple[int, int] = (24, 24)) -> None:
    """A picture of 24 x 24 with a mask of two values."""
    png(root / "images" / f"{name}.png", np.random.default_rng(len(name)).integers(0, 255, (24, 24)))
    png(root / "masks" / f"{name}.png", 255 * (np.indices(label_shape).sum(axis=0) % 9 < 4))


def one_mismatch(root: Path) -> None:
    pair(root, "cell", (20, 24))


def one_section(root: Path) -> None:
    label = np.full((5, 8, 8), 255, np.uint8)
    label[2] = np.arange(64).reshape(8, 8) % 2
    text(root / "microtome.yaml", "not_annotated: 255")
    nifti(root / "images" / "stack.nii", np.arange(320, dtype=np.float32).reshape(5, 8, 8))
    nifti(root / "labels" / "stack.nii", label)


def one_group(root: Path) -> None:
    for name in ("a", "bb"):
        pair(root, name)
    text(root / "microtome.yaml", yaml.safe_dump({"groups": {"mouse": ["a", "bb"]}}))


@pytest.mark.parametrize(
    ("fault", "said", "code"),
    [
        (one_mismatch, "expected the shape of images/cell.png, 24×24, got 20×24 in masks/cell.png", 2),
        (one_section, "expected two annotated sections or rows at least, got 1 of 5", 0),
        (one_group, "expected two groups at least, got one group, 'mouse', of 2 cases", 0),
    ],
)
def test_data_that_cannot_be_split_is_inspected_all_the_same(
    fault: object, said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    fault(root)  # type: ignore[operator]
    name = open_dataset(root).cases[0].name
    assert run(monkeypatch, "inspect", root, "--html", tmp_path / "page.html") == code
    table = capsys.readouterr().out
    assert f"\n{name} " in table
    assert said in table.replace("\n", " ")
    assert said.split(",")[0] in (tmp_path / "page.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert run(monkeypatch, "inspect", root, "--json") == code
    document = json.loads(capsys.readouterr().out)
    [finding] = [finding for finding in document["findings"] if finding["code"] == "no-split"]
    assert finding["severity"] == "warning"
    assert said in finding["message"]
    assert str(root) + "/" not in finding["message"]
    assert len(document["cases"]) >= 1


def test_a_fold_that_is_none_is_still_refused(tmp_path: Path) -> None:
    for name in ("a", "bb"):
        pair(tmp_path, name)
    for fold in ("first", "3/5"):
        with pytest.raises(ConfigError, match="fold: expected"):
            inspect_fold(open_dataset(tmp_path), fold, 0)
    assert {row.part for row in inspect_fold(open_dataset(tmp_path), "1/5", 0).rows} == {"train", "validation"}


def test_findings_name_files_as_they_stand_in_the_folder(tmp_path: Path) -> None:
    for name in ("a", "bb", "ccc"):
        pair(tmp_path, name)
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks" / "bb.png").write_bytes(b"no picture")
    dataset = open_dataset(tmp_path)
    assert {finding.code for finding in dataset.findings} == {"assumed", "unreadable"}
    assert {finding.message.split(":")[0] for finding in dataset.findings} == {"images/a.jpg", "masks/bb.png"}
    assert all(str(tmp_path) not in finding.message for finding in inspect_dataset(dataset).findings)
