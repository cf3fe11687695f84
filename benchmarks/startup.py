"""How long a command takes from nothing: a fresh process each time, files warm."""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.cases import SETTINGS, bundle_of, case, network_config, trained, weights_file
from benchmarks.rows import CACHE
from benchmarks.timing import timed

# What a script with torch at its top does before it can say how it is called.
PLAIN_HELP = "import argparse, torch; argparse.ArgumentParser().parse_args(['--help'])"
# A picture, labelled as people write it: build, load, read, normalise, forward, write.
PLAIN_PREDICT = """
import json, sys
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file
from microtome.config import NetworkConfig
from microtome.models.registry import build
about = json.loads(sys.argv[1])
network = build(about["name"], dims=2, in_channels=1, classes=about["classes"], config=NetworkConfig(**about["config"]))
network.load_state_dict(load_file(about["weights"]))
network.eval()
image = np.asarray(Image.open(about["image"]), np.float32)
image = (image - image.mean()) / image.std()
with torch.inference_mode():
    labels = network(torch.from_numpy(image)[None, None])[0].argmax(0)
Image.fromarray(labels.numpy().astype(np.uint8)).save(about["out"])
"""


def microtome(*words: object) -> list[str]:
    """The command line of the environment that runs this."""
    return [str(Path(sys.executable).with_name("microtome")), *map(str, words)]


def command(what: str, engine: str, setting: str = "modern_unet 512x512", folder: str = str(CACHE)) -> dict[str, Any]:
    """Time `what`: "help", or "predict": one PNG of the setting's size. Engines of predict: default and those of --engine."""
    with tempfile.TemporaryDirectory() as place:
        words = help_words(engine) if what == "help" else predict_words(engine, setting, Path(folder), Path(place))
        # A file written by the call before would be refused, or continued.
        number = iter(range(100))

        def call() -> None:
            filled = [word.replace("OUT", f"{place}/{next(number)}") for word in words] if what == "predict" else words
            done = subprocess.run(filled, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(words[:3])} ...: {done.stderr.strip()[-200:]}")

        answer: dict[str, Any] = timed(call, budget_seconds=1.0, most=3)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return answer | {"peak_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def help_words(engine: str) -> list[str]:
    """The words that ask for help."""
    return [sys.executable, "-c", PLAIN_HELP] if engine == "default" else microtome("--help")


def predict_words(engine: str, setting: str, folder: Path, place: Path) -> list[str]:
    """The words that label one PNG; OUT stands for where to."""
    chosen = SETTINGS[setting]
    image_CS, _ = case(chosen)
    picture = place / "picture.png"
    Image.fromarray(np.clip(image_CS[0] * 40 + 128, 0, 255).astype(np.uint8)).save(picture)
    bundle = bundle_of(chosen, folder)
    if engine != "default":
        return microtome("predict", bundle, picture, "--out", "OUT", "--engine", engine)
    config = network_config(chosen).model_dump(mode="json")
    about = {"name": chosen.network, "classes": chosen.classes, "config": config, "image": str(picture), "out": "OUT.png"}
    trained(chosen, folder)
    about["weights"] = str(weights_file(chosen, folder))
    return [sys.executable, "-c", PLAIN_PREDICT, json.dumps(about)]
