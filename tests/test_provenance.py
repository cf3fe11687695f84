"""What a model says of where it comes from: the data by a fingerprint that travels with them, command, versions."""

import hashlib
import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from microtome.bundle import load_bundle
from microtome.config import Plan
from microtome.data.case import Case, Planes
from microtome.data.dataset import open_dataset
from microtome.data.split import split_dataset
from microtome.evaluation.report import build_report
from microtome.json_files import parse_json
from microtome.training import provenance
from microtome.training.provenance import COVERS, END_BYTES, command, fingerprint_of, origin
from microtome.training.run import train
from tests.small import one_thread, small_plan

__all__ = ["one_thread"]

# More than both ends of an image file that are read.
LARGE = 5 * END_BYTES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two cases whose images are larger than what is read of them; files need not be images to have a fingerprint."""
    root = tmp_path / "data"
    for name, seed in (("a", 1), ("b", 2)):
        rng = np.random.default_rng(seed)
        for kind, size in (("images", LARGE), ("labels", LARGE)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (root / kind / f"{name}.png").write_bytes(rng.bytes(size))
    return root


def cases_of(root: Path) -> list[Case]:
    return [Case(name=name, images=(root / "images" / f"{name}.png",), labels=(root / "labels" / f"{name}.png",)) for name in "ab"]


def print_of(root: Path) -> str:
    found = fingerprint_of(root, cases_of(root))["fingerprint"]
    assert isinstance(found, str)
    assert len(found) == 32
    return found


def change(path: Path, at: int) -> None:
    """Another byte at a place of a file, counted from its end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_same_data_elsewhere_and_in_another_order_have_the_same_fingerprint(data: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(data, tmp_path / "other" / "place")
    os.utime(elsewhere / "images" / "a.png", (0, 0))
    assert print_of(elsewhere) == print_of(data)
    assert fingerprint_of(data, reversed(cases_of(data))) == fingerprint_of(data, cases_of(data))


@pytest.mark.parametrize("at", [0, LARGE // 2, LARGE - 1])
def test_any_changed_byte_of_a_label_gives_another_fingerprint(data: Path, at: int) -> None:
    before = print_of(data)
    change(data / "labels" / "b.png", at)
    assert print_of(data) != before


@pytest.mark.parametrize("at", [0, END_BYTES - 1, LARGE - END_BYTES, LARGE - 1])
def test_a_changed_byte_at_an_end_of_an_image_gives_another_fingerprint(data: Path, at: int) -> None:
    before = print_of(data)
    change(data / "images" / "b.png", at)
    assert print_of(data) != before


@pytest.mark.parametrize("at", [END_BYTES, LARGE - END_BYTES - 1])
def test_the_middle_of_a_large_image_is_not_looked_at_and_that_is_said(data: Path, at: int) -> None:
    before = print_of(data)
    change(data / "images" / "b.png", at)
    assert print_of(data) == before
    assert fingerprint_of(data, cases_of(data))["covers"] == COVERS
    assert f"the first and the last {END_BYTES // 1024} KiB of image files" in COVERS
    assert "all bytes of label files" in COVERS


def test_a_longer_image_a_renamed_case_and_a_case_less_give_other_fingerprints(data: Path) -> None:
    found = {print_of(data)}
    cases = cases_of(data)
    found.add(fingerprint_of(data, cases[:1])["fingerprint"])
    renamed = [cases[0], Case(name="c", images=cases[1].images, labels=cases[1].labels)]
    found.add(fingerprint_of(data, renamed)["fingerprint"])
    content = (data / "images" / "b.png").read_bytes()
    # The same ends, and a byte more between them.
    (data / "images" / "b.png").write_bytes(content[: 2 * END_BYTES] + b"x" + content[2 * END_BYTES :])
    found.add(print_of(data))
    assert len(found) == 4


def test_images_and_labels_that_swap_their_bytes_are_other_data(data: Path) -> None:
    before = print_of(data)
    shutil.move(data / "images", data / "swapped")
    shutil.move(data / "labels", data / "images")
    shutil.move(data / "swapped", data / "labels")
    assert print_of(data) != before


def test_of_a_large_image_no_more_than_its_ends_is_read(data: Path) -> None:
    image = data / "images" / "huge.tif"
    with image.open("wb") as file:
        # It takes no room on the disk.
        file.truncate(1 << 26)
    before = bytes_read()
    found = fingerprint_of(data, [Case(name="huge", images=(image,))])
    assert 2 * END_BYTES <= bytes_read() - before < 8 * END_BYTES
    assert found["bytes"] == 1 << 26


def bytes_read() -> int:
    """What this process has read of files so far, as the kernel counts it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_a_store_is_known_by_the_names_and_sizes_of_what_lies_in_it(tmp_path: Path) -> None:
    store = tmp_path / "image.zarr"
    (store / "0").mkdir(parents=True)
    (store / "0" / "c0").write_bytes(b"abc")
    (store / "zarr.json").write_bytes(b"{}")
    case = Case(name="a", images=(store,))
    found = [fingerprint_of(tmp_path, [case])]
    (store / "0" / "c0").write_bytes(b"abcd")
    found.append(fingerprint_of(tmp_path, [case]))
    (store / "0" / "c1").write_bytes(b"")
    found.append(fingerprint_of(tmp_path, [case]))
    assert len({each["fingerprint"] for each in found}) == 3
    assert [each["bytes"] for each in found] == [5, 6, 6]


def test_a_file_that_is_gone_when_the_model_is_saved_does_not_cost_the_model(data: Path) -> None:
    whole = print_of(data)
    (data / "labels" / "b.png").unlink()
    without = print_of(data)
    assert without != whole
    shutil.rmtree(data)
    assert len({whole, without, print_of(data)}) == 3


def test_files_that_cannot_be_read_are_counted_beside_the_fingerprint(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, plain = cases_of(data), provenance._digest
    assert "unreadable" not in fingerprint_of(data, cases)

    def refused(path: Path, whole: bool) -> bytes:
        if path == data / "labels" / "b.png":
            raise PermissionError(13, "Permission denied")
        return plain(path, whole)

    monkeypatch.setattr(provenance, "_digest", refused)
    assert fingerprint_of(data, cases)["unreadable"] == 1


def test_what_is_hashed_of_planes_stays_when_their_class_gets_another_field(tmp_path: Path) -> None:
    case = Case(name="a", images=(), sections=(0, 4), planes=Planes(hidden=((0, 3),)))
    wanted = hashlib.blake2b(b"('a', (0, 4), Planes(shown=(), hidden=((0, 3),)))", digest_size=16).hexdigest()
    assert fingerprint_of(tmp_path, [case])["fingerprint"] == wanted


def test_the_command_is_said_without_the_folder_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/somebody/.venv/bin/microtome", "train", "cells", "--steps", "6"])
    assert command() == "microtome train cells --steps 6"


@pytest.mark.parametrize("file", ["__main__.py", "cli.py"])
def test_a_module_that_python_runs_is_said_as_the_command_that_people_type(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path(provenance.__file__).parents[1] / file), "train", "cells"])
    assert command() == "microtome train cells"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/python3/pytest/__main__.py", "-n", "0"])
    assert command() == "__main__.py -n 0"
    monkeypatch.setattr(sys, "argv", ["/home/me/microtome/run_all.py", "x"])
    assert command() == "run_all.py x"


def test_a_name_in_another_encoding_among_the_words_leaves_a_command_that_json_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["microtome", "train", "cells", "--plan", os.fsdecode(b"pl\xe4ne.yaml")])
    assert parse_json(json.dumps(command())) == r"microtome train cells --plan pl\udce4ne.yaml"


# ---- in a model ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few steps on four pictures, in `data` beside it."""
    root = tmp_path_factory.mktemp("provenance")
    rng = np.random.default_rng(0)
    for name in "abcd":
        for kind, values in (("images", rng.integers(0, 255, (40, 40))), ("masks", rng.integers(0, 2, (40, 40)))):
            (root / "data" / kind).mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(values.astype(np.uint8)).save(root / "data" / kind / f"{name}.png")
    dataset, made = open_dataset(root / "data"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "fingerprint_of", lambda root, cases: made.append(1) or fingerprint_of(root, cases))
        train(dataset, plan_of(dataset.legend.names), root / "run")
    # Of what trains and of what validates: label files are read once, however often the model is saved.
    assert len(made) == 2
    return root


def plan_of(classes: tuple[str, ...]) -> Plan:
    return small_plan(classes=classes, steps=4)


def test_a_trained_model_says_its_data_command_and_versions_in_both_files(trained: Path) -> None:
    said = dict(load_bundle(trained / "run").provenance)
    assert json.loads((trained / "run" / "model" / "model.json").read_text(encoding="utf-8"))["provenance"] == said
    dataset = open_dataset(trained / "data")
    split = split_dataset(dataset, "1/5", 3)
    assert said["data"] == str(trained / "data")
    assert (said["training_cases"], said["validation_cases"]) == (3, 1)
    assert said["training_data"] == fingerprint_of(dataset.root, split.train)
    assert said["validation_data"] == fingerprint_of(dataset.root, split.validation)
    assert said["training_data"]["files"] == 6
    for name in ("microtome", "torch", "numpy", "scipy"):
        assert said[name] == metadata.version(name)
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (said["command"], said["seed"], said["recipe"]) == (command(), 3, "default")
    assert said["step"] in (2, 4)
    assert 0 <= said["score"] <= 1


def test_the_same_data_in_another_folder_are_known_again_by_what_the_model_says(trained: Path, tmp_path: Path) -> None:
    moved = open_dataset(shutil.copytree(trained / "data", tmp_path / "moved"))
    again = origin(moved, split_dataset(moved, "1/5", 3), plan_of(moved.legend.names))
    said = load_bundle(trained / "run").provenance
    assert again["training_data"] == said["training_data"]
    assert again["data"] != said["data"]
    with (tmp_path / "moved" / "masks" / "a.png").open("ab") as file:
        file.write(b"x")
    changed = origin(moved, split_dataset(moved, "1/5", 3), plan_of(moved.legend.names))
    parts = ("training_data", "validation_data")
    assert [changed[part] == said[part] for part in parts].count(False) == 1


def test_the_report_shows_where_the_model_comes_from(trained: Path) -> None:
    page = build_report(trained / "run").read_text(encoding="utf-8")
    said = load_bundle(trained / "run").provenance
    _, _, section = page.partition('<section id="origin">')
    section, _, _ = section.partition("</section>")
    assert f"3 cases of {trained / 'data'}: 6 files" in section
    for words in (said["training_data"]["fingerprint"], said["validation_data"]["fingerprint"], said["date"], f"torch {said['torch']}"):
        assert words in section


def test_the_report_of_a_run_whose_model_is_damaged_has_no_such_part(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (run / "model" / "model.safetensors").write_bytes(b"damaged")
    assert '<section id="origin">' not in build_report(run).read_text(encoding="utf-8")
