"""No stranger's code runs: the package has no unpickling but in the one process that is made for it, and a whole road calls none."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from microtome.config import dump_yaml
from microtome.data.dataset import open_dataset
from tests.small import small_plan
from tools.layers import REPOSITORY, SOURCE

# The reader of foreign checkpoints, which is a process of its own; what else it may not do is tested in test_interop.
ALLOWED = {("interop/unpickling.py", "import pickle"), ("interop/unpickling.py", "torch.load")}
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle", "imp"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "pandas.read_pickle",
    "numpy.load",
    "np.load",
    "np.save",
    "np.savez",
    "np.savez_compressed",
    "np.fromregex",
    "runpy.run_path",
    "os.system",
    "os.popen",
}
METHODS = {"extractall", "extract", "unpack_archive", "read_pickle", "load_module", "exec_module"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression; empty where it is another."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def dangers(source: str) -> Iterator[str]:
    """What in a module could run what a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield f"import {node.module}"
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in CALLS)
        elif isinstance(node, ast.Call):
            yield from dangerous_call(node)


def dangerous_call(node: ast.Call) -> Iterator[str]:
    """The name of a call that is one."""
    name = dotted(node.func)
    words = {word.arg: word.value for word in node.keywords}
    if name in {"np.load", "np.save", "np.savez"} and isinstance(words.get("allow_pickle"), ast.Constant):
        if words["allow_pickle"].value is not False:  # type: ignore[attr-defined]
            yield f"{name}(allow_pickle=...)"
    elif any(word.arg == "shell" for word in node.keywords):
        yield f"{name}(shell=...)"
    elif name in CALLS | NAMES or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        yield name or f".{getattr(node.func, 'attr', '')}"


def test_no_module_can_run_what_a_file_holds() -> None:
    sources = {file.relative_to(SOURCE).as_posix(): file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py")}
    assert {(name, danger) for name, source in sources.items() for danger in dangers(source)} == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load\nfrom torch.hub import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "archive.extractall(folder)",
        "pandas.read_pickle(path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_of_these_would_be_found(source: str) -> None:
    assert list(dangers(source)) != []


def test_these_are_no_danger() -> None:
    assert list(dangers("np.load(path, allow_pickle=False)\nyaml.safe_load(text)\nnetwork.eval()\nre.compile(text)\njson.load(file)")) == []


# Every road that reads files, in one process in which each use of pickle is noted with the frame that asked for it.
ROAD = """
import json, pickle, _pickle, sys, traceback
from pathlib import Path

noted = []

def note(kind):
    frames = traceback.extract_stack()[:-2]
    noted.append([kind, [f"{f.filename}:{f.lineno}" for f in frames[-6:]]])

def watched(kind, plain):
    if isinstance(plain, type):
        return type(plain.__name__, (plain,), {"__init__": lambda self, *a, **k: (note(kind), plain.__init__(self, *a, **k))[1]})
    return lambda *a, **k: (note(kind), plain(*a, **k))[1]

for module in (pickle, _pickle):
    for name in ("load", "loads", "Unpickler"):
        setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))
pickle._Unpickler.load = watched("pickle._Unpickler", pickle._Unpickler.load)
sys.addaudithook(lambda event, _: note(event) if event == "pickle.find_class" else None)

import warnings
warnings.simplefilter("ignore")
from microtome import cli

def call(*words):
    sys.argv = ["microtome", *map(str, words)]
    try:
        cli.main()
    except SystemExit as done:
        assert not done.code, (words, done.code)

root = Path(sys.argv[1])
call("inspect", root / "data", "--json")
call("train", root / "data", "--plan", root / "plan.yaml", "--out", root / "run")
call("model", root / "run", "--json")
call("report", root / "run")
for engine in ("torch", "openvino", "onnxruntime"):
    call("predict", root / "run", root / "data" / "images", "--out", root / engine, "--engine", engine)
call("predict", root / "run", root / "data" / "images" / "a.png", "--out", root / "store", "--engine", "torch", "--ome-zarr")
call("predict", root / "run", *sorted((root / "store").glob("*.zarr")), "--out", root / "again", "--engine", "torch")
call("evaluate", root / "torch", root / "data" / "masks", "--html", root / "scores.html")
call("import", root / "run", "--out", root / "weights.safetensors", "--json")

# Of `compare` what it does itself: its trainings are calls of `train` in processes of their own.
import shutil
shutil.copytree(root / "run", root / "both" / "unet")
asked = {"data": str((root / "data").resolve()), "minutes": None, "steps": 2, "fold": None, "seed": 0, "networks": ["unet"]}
(root / "both" / "compare.json").write_text(json.dumps({"asked": asked, "rows": []}))
call("compare", root / "data", "--networks", "unet", "--steps", 2, "--out", root / "both", "--resume")

# Of `densify` all but its plan, which would take minutes.
from microtome.densify import DensifyOptions, densify, open_sketch
from microtome.training.folder import read_plan
words = (root / "data" / "images" / "a.png", root / "sparse.png", root / "dense.png")
sketch = open_sketch(*words, DensifyOptions())
densify(sketch, read_plan(root / "plan.yaml").model_copy(update={"classes": sketch.dataset.legend.names}))
assert (sketch.run / "filled.json").exists()
(root / "noted.json").write_text(json.dumps(noted))
"""


def test_a_whole_road_unpickles_nothing(tmp_path: Path) -> None:
    assert road(tmp_path) == []


def test_what_is_unpickled_would_be_noted() -> None:
    code = ROAD.partition("import warnings")[0] + "pickle.loads(pickle.dumps(Path)); print(sorted({kind for kind, _ in noted}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pickle.find_class', 'pickle.loads']"


def road(root: Path) -> list[object]:
    """What the whole road noted."""
    rng = np.random.default_rng(0)
    for name in "abcd":
        for kind, values in (("images", rng.integers(0, 255, (40, 40))), ("masks", rng.integers(0, 2, (40, 40)))):
            (root / "data" / kind).mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(values.astype(np.uint8)).save(root / "data" / kind / f"{name}.png")
    sparse = rng.integers(0, 2, (40, 40))
    sparse[:, 10:] = 255
    Pillow.fromarray(sparse.astype(np.uint8)).save(root / "sparse.png")
    write_plan(root)
    words = [sys.executable, "-c", ROAD, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[object] = json.loads((root / "noted.json").read_text())
    return found


def write_plan(root: Path) -> None:
    """A plan of two steps for the pictures."""
    plan = small_plan(classes=open_dataset(root / "data").legend.names, steps=2, validations=1)
    (root / "plan.yaml").write_text(dump_yaml(plan), encoding="utf-8")
