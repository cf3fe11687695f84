"""Ten minutes of training on each real dataset, then `predict` and `evaluate` on the cases kept aside, all by the command line.

    python benchmarks/ten_minutes.py [hippocampus isbi2012 oxford_pets dsb2018] [--minutes 10] [--out runs/ten_minutes]

The data are those of MICROTOME_DATA (default ../shared/data); the splits are fixed, so that numbers compare: ISBI sections 20-24
validate; of hippocampus every fifth case, of pets and nuclei every fourth, in the order of their names.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile
import yaml

DATA = Path(os.environ.get("MICROTOME_DATA", Path(__file__).parents[2] / "shared" / "data"))
EVERY = {"hippocampus": 5, "oxford_pets": 4, "dsb2018": 4}


def main() -> None:
    """Run the datasets that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["hippocampus", "isbi2012", "oxford_pets", "dsb2018"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/ten_minutes"))
    options = parser.parse_args()
    for name in options.names:
        run(name, options.minutes, options.out / name)


def run(name: str, minutes: float, out: Path) -> None:
    """One dataset: lay it out, train, predict, evaluate, print a line."""
    shutil.rmtree(out, ignore_errors=True)
    everything, images, truth = (isbi if name == "isbi2012" else folders)(name, out)
    started = time.perf_counter()
    microtome("train", everything, "--out", out / "run", "--minutes", minutes)
    seconds = time.perf_counter() - started
    microtome("predict", out / "run", images, "--out", out / "predictions")
    microtome("evaluate", out / "predictions", truth, "--json", out / "scores.json", "--html", out / "scores.html")
    scores = json.loads((out / "scores.json").read_text())
    end = json.loads((out / "run" / "log.jsonl").read_text().splitlines()[-1])
    classes = {key: round(value["iou"]["mean"], 4) for key, value in scores["classes"].items()}
    summary = {key: round(scores["summary"][key]["mean"], 4) for key in ("dice", "iou", "pixel_accuracy")}
    row = {"data": name, "train_s": round(seconds), "steps": end["step"], "network_share": end["network_share"]}
    print(json.dumps({**row, **summary, "class_iou": classes}), flush=True)


def folders(name: str, out: Path) -> tuple[Path, Path, Path]:
    """A copy of a dataset of many files with its fixed split, and the validation images and labels by themselves."""
    everything, images, truth = out / "data", out / "held_out" / "images", out / "held_out" / "labels"
    shutil.copytree(DATA / name, everything, copy_function=shutil.copyfile)
    os.chmod(everything, 0o755)
    cases = sorted(case_files(name, everything).items())
    chosen = cases[:: EVERY[name]]
    images.mkdir(parents=True)
    truth.mkdir(parents=True)
    for case, (image, label) in chosen:
        shutil.copyfile(image, images / (case + "".join(image.suffixes)))
        if label.is_dir():
            # One mask a nucleus: the truth keeps that layout, which needs the image beside the masks.
            shutil.copytree(label.parent, truth / case, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(label, truth / (case + "".join(label.suffixes)))
    (everything / "microtome.yaml").write_text(yaml.safe_dump({"validation": [case for case, _ in chosen]}))
    return everything, images, truth


def case_files(name: str, root: Path) -> dict[str, tuple[Path, Path]]:
    """Case -> its image file and its label file or folder of masks."""
    if name == "dsb2018":
        return {p.name: (p / "images" / f"{p.name}.png", p / "masks") for p in (root / "stage1_train").iterdir()}
    labels = root / ("labels" if name == "hippocampus" else "annotations/trimaps")
    suffix = ".nii.gz" if name == "hippocampus" else ".png"
    return {p.name.split(".")[0]: (p, labels / (p.name.split(".")[0] + suffix)) for p in (root / "images").iterdir()}


def isbi(name: str, out: Path) -> tuple[Path, Path, Path]:
    """The stack with its last five sections to validate on, and those by themselves."""
    everything, images, truth = out / "data", out / "held_out" / "image", out / "held_out" / "label"
    for folder in (everything, images, truth):
        folder.mkdir(parents=True)
    for file, place in (("train-volume.tif", images), ("train-labels.tif", truth)):
        shutil.copyfile(DATA / name / file, everything / file)
        tifffile.imwrite(place / file, np.ascontiguousarray(tifffile.imread(DATA / name / file)[20:]), photometric="minisblack")
    (everything / "microtome.yaml").write_text(yaml.safe_dump({"validation_sections": [20, 25]}))
    return everything, images, truth


def microtome(*words: object) -> None:
    """Call the command line, as a user does."""
    command = [str(Path(sys.executable).with_name("microtome")), *map(str, words)]
    print("$ microtome", *words, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
