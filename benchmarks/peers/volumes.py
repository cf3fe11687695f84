"""A volume file to a label file on disk, by a process of each program: wall time and memory of all of its processes."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch

from benchmarks.cases import SETTINGS, Setting, bundle_of, case, trained
from benchmarks.forward import write_graphs
from benchmarks.peers.nnunet import largest_difference, their_network, with_our_weights, write_model_folder
from benchmarks.rows import CACHE, REPOSITORY

FOLDER = CACHE / "peers"
# X, Y, Z, of voxels of 0.8 mm; the networks' grid is 1 mm: 205 x 205 x 128.
VOLUME, SPACING_MM = (256, 256, 160), 0.8
# A patch as it is: what lies around a smaller one, zeros or its mirror, changes every value through the instance norms.
TINY = (80, 80, 80)
# nnU-Net and ours resample and normalise alike, so that only rounding may differ.
MOST_DIFFERENCE = 1e-3
SECONDS_BETWEEN_LOOKS = 0.25


def setting_of(classes: int, *, tiny: bool) -> Setting:
    """The network for so many classes, and its patch."""
    base = SETTINGS["nnunet_plain 64x128x128"]
    patch = (64, 64, 64) if tiny else base.shape_vox
    return base._replace(name=f"peers {classes} classes {'x'.join(map(str, patch))}", classes=classes, shape_vox=patch)


def prepare(classes: int, tiny: bool = False) -> dict[str, Any]:
    """The volume, our bundle, nnU-Net's model folder and MONAI's weights, all of the same weights; checks that they answer alike."""
    setting = setting_of(classes, tiny=tiny)
    place = place_of(setting)
    ours = trained(setting)
    theirs = with_our_weights(their_network(classes, deep_supervision=False), ours)
    difference = largest_difference(theirs, ours, (64, 64, 64))
    if difference > MOST_DIFFERENCE:
        raise ValueError(f"with the same weights nnU-Net's network answers {difference:g} away from ours")
    write_model_folder(place / "nnunet", theirs, classes, setting.shape_vox)
    torch.save(theirs.state_dict(), place / "monai.pt")
    with_cubic(bundle_of(setting))
    graphs = write_graphs(bundle_of(setting))
    image = volume_of(setting, tiny=tiny)
    if not image.exists():
        image.parent.mkdir(parents=True, exist_ok=True)
        array, _ = case(setting, TINY if tiny else VOLUME, seed=7)
        values = (array[0] * 200 + 1000).astype(np.float32)
        header = nib.Nifti1Image(values, np.diag([SPACING_MM] * 3 + [1.0]))
        header.header.set_xyzt_units("mm")
        nib.save(header, image)
    return {"seconds": 0.0, "note": f"logits differ by at most {difference:.1e}; graphs: {graphs}"}


def with_cubic(folder: Path) -> None:
    """Let the plan of a bundle bring images to its grid by cubic splines, as nnU-Net does."""
    from microtome.bundle import load_bundle, save_bundle

    bundle = load_bundle(folder)
    if bundle.plan.interpolation != "cubic":
        from dataclasses import replace

        weights = {name: np.array(array) for name, array in bundle.weights.items()}
        save_bundle(folder, replace(bundle, plan=bundle.plan.model_copy(update={"interpolation": "cubic"}), weights=weights))


def place_of(setting: Setting) -> Path:
    """Where a setting's files lie."""
    return FOLDER / setting.name.replace(" ", "-")


def volume_of(setting: Setting, *, tiny: bool) -> Path:
    """The volume's file; nnU-Net wants _0000 at the end of its name."""
    return place_of(setting) / "images" / f"{'tiny' if tiny else 'volume'}_0000.nii.gz"


def predict(classes: int, engine: str, tiny: bool = False) -> dict[str, Any]:
    """Run one program from file to file; engines: nnU-Net, MONAI, and those of `microtome predict --engine`."""
    setting = setting_of(classes, tiny=tiny)
    place, image = place_of(setting), volume_of(setting, tiny=tiny)
    with tempfile.TemporaryDirectory(dir=place) as out:
        words = words_of(engine, setting, image, Path(out))
        seconds, peak_mb, tree_mb = watched(words)
        made = [file for file in Path(out).rglob("*.nii*") if file.is_file()]
        if len(made) != 1:
            raise RuntimeError(f"{engine} wrote {[file.name for file in made]} instead of one label file")
        labels = np.asarray(nib.load(made[0]).dataobj)
        kept = place / "labels" / f"{engine}.npy"
        kept.parent.mkdir(exist_ok=True)
        np.save(kept, np.squeeze(labels).astype(np.int16))
    return {"seconds": seconds, "peak_mb": peak_mb, "tree_mb": tree_mb, "labels": str(kept)}


def words_of(engine: str, setting: Setting, image: Path, out: Path) -> list[str]:
    """The command of a program."""
    place, programs = place_of(setting), Path(sys.executable).parent
    if engine == "nnU-Net":
        folder = ["-i", str(image.parent), "-o", str(out), "-m", str(place / "nnunet"), "-f", "0", "-device", "cpu", "--disable_tta"]
        return [str(programs / "nnUNetv2_predict_from_modelfolder"), *folder]
    if engine == "MONAI":
        patch = str(list(setting.shape_vox))
        script = [sys.executable, "-m", "benchmarks.peers.monai_predict", str(place / "monai.pt")]
        return [*script, str(setting.classes), patch, str(image), str(out)]
    words = ["predict", str(bundle_of(setting)), str(image), "--out", str(out), "--engine", engine]
    return [str(programs / "microtome"), *words]


def watched(words: list[str]) -> tuple[float, float, float]:
    """Run a command: seconds, MB of its largest process, MB of all its processes together (shared pages counted once).

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    environment = {**os.environ, "nnUNet_raw": "/nowhere", "nnUNet_preprocessed": "/nowhere", "nnUNet_results": "/nowhere"}
    environment.pop("MICROTOME_RECYCLE_MEMORY", None)
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment)
        seen: list[tuple[float, float]] = [(0.0, 0.0)]
        watcher = threading.Thread(target=_watch, args=(process.pid, seen), daemon=True)
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        watcher.join()
        if code:
            said.seek(0)
            raise RuntimeError(f"{Path(words[0]).name} ended with {code}: {' '.join(said.read().split())[-600:]}")
    return seconds, max(one for one, _ in seen), max(total for _, total in seen)


def _watch(pid: int, seen: list[tuple[float, float]]) -> None:
    """Note largest and total memory of a process and its descendants until it is gone."""
    while psutil.pid_exists(pid):
        sizes = []
        try:
            root = psutil.Process(pid)
            if root.status() == psutil.STATUS_ZOMBIE:
                return
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            return
        for one in family:
            try:
                memory = one.memory_full_info()
            except psutil.Error:
                continue
            sizes.append((memory.rss / 2**20, getattr(memory, "pss", memory.rss) / 2**20))
        if sizes:
            seen.append((max(rss for rss, _ in sizes), sum(pss for _, pss in sizes)))
        time.sleep(SECONDS_BETWEEN_LOOKS)


def clean() -> None:
    """Remove all that was made for the comparison."""
    shutil.rmtree(FOLDER, ignore_errors=True)
