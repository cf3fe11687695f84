"""The map is the flow: one order of modules, imports run one way, and nothing heavy is loaded before it is needed."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from tools.layers import LATE, LAYERS, SOURCE, modules_on_disk, path_of

# What `pip install "microtome[extra]"` brings; only these may be imported late outside the command line.
EXTRA_IMPORTS = {"SimpleITK", "dask", "distributed", "h5py", "mlflow", "onnx", "onnxruntime", "openvino", "pooch"}
# Read late, because most files need neither and a prediction begins sooner without.
EXTRA_IMPORTS |= {"nibabel", "tifffile"}
EXTRA_IMPORTS |= {"highdicom", "nncf", "pydicom", "starlette", "tensorboard", "torch.utils.tensorboard", "uvicorn"}
TORCH_FREE = ("errors", "files", "machine", "config", "geometry", "tiling", "images.", "data.", "preprocess", "evaluation.", "bundle")


def imports(text: str, package: str = "") -> Iterator[tuple[str, bool]]:
    """Every module a text imports, and whether it does so inside a function; `import_module("name")` counts too."""
    tree = ast.parse(text)
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        for name in _imported(node, package):
            yield name, id(node) in late


def _imported(node: ast.AST, package: str) -> list[str]:
    """The modules that one node imports; `from a import b` is `a.b` where that is a module of ours."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join(filter(None, [*parents, node.module]))
        return [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def is_module(name: str) -> bool:
    return name.partition(".")[0] == "microtome" and name.partition(".")[2] in LAYERS


@cache
def imports_of(module: str) -> list[tuple[str, bool]]:
    package = f"microtome.{module}".rpartition(".")[0]
    return list(imports(path_of(module).read_text(encoding="utf-8"), package))


def inner_imports(module: str) -> set[str]:
    return {name.partition(".")[2] for name, _ in imports_of(module) if name.partition(".")[0] == "microtome"}


def closure(module: str) -> set[str]:
    """A module and all that it needs, by way of others."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo.extend(inner_imports(name) & set(LAYERS))
    return found


def test_list_of_layers_is_the_list_of_files() -> None:
    assert len(set(LAYERS)) == len(LAYERS)
    assert set(LAYERS) - modules_on_disk() == set(), "in LAYERS but not in src"
    assert modules_on_disk() - set(LAYERS) == set(), "in src but not in LAYERS (tools/layers.py)"


@pytest.mark.parametrize("module", [module for module in LAYERS if path_of(module).exists()])
def test_module_imports_only_earlier_ones(module: str) -> None:
    later = inner_imports(module) - set(LAYERS[: LAYERS.index(module)])
    # The command line may ask the package for its version.
    later -= {""} if module == "cli" else set()
    assert later == set()


def test_no_circles() -> None:
    graph = {module: inner_imports(module) for module in modules_on_disk()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= modules_on_disk()


def test_imports_inside_functions_are_extras_or_in_the_command_line() -> None:
    # The choice of an engine must not load torch before torch is chosen: a prediction begins in a third of the time without it.
    modules = {name for name in modules_on_disk() if name.partition("_")[0] != "cli"} - {"options", "inference.engines"}
    late = {(module, name) for module in modules for name, inside in imports_of(module) if inside}
    allowed = EXTRA_IMPORTS | {f"microtome.{name}" for name in LATE}
    assert {(module, name) for module, name in late if not {name, name.partition(".")[0]} & allowed} == set()


def test_packages_hold_a_docstring_and_nothing_else() -> None:
    packages = [file for file in SOURCE.rglob("__init__.py") if file.parent != SOURCE]
    assert len(packages) >= 6
    for file in packages:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), file
        assert len(tree.body) == 1, file


@pytest.mark.parametrize("leaf", ["tiling", "evaluation.metrics", "training.losses"])
def test_leaf_needs_at_most_three_modules(leaf: str) -> None:
    assert len(closure(leaf)) <= 3, closure(leaf)


def test_rooms_without_torch_need_no_torch() -> None:
    rooms = [module for module in modules_on_disk() if module.startswith(TORCH_FREE)]
    users = {m for room in rooms for m in closure(room) if any(name.partition(".")[0] == "torch" for name, _ in imports_of(m))}
    assert users == set()


def loaded_after(code: str) -> set[str]:
    """The modules a fresh interpreter has loaded after running some code."""
    report = "import sys; sys.stderr.write('LOADED ' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stderr.rpartition("LOADED ")[2].split())


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_after("import microtome.cli")
    assert "microtome.cli" in loaded
    assert loaded & {"torch", "numpy", "scipy", "pydantic", "matplotlib", "nibabel", "PIL"} == set()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    # typer itself brings pydantic when it shows help.
    asked = f"import sys\nfrom microtome.cli import main\nsys.argv = {['microtome', *words]}"
    run = f"{asked}\ntry: main()\nexcept SystemExit as end: assert not end.code"
    loaded = loaded_after(run)
    assert "microtome.cli" in loaded
    assert loaded & {"torch", "numpy", "scipy", "matplotlib", "nibabel", "PIL"} == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import microtome.tiling", [("microtome.tiling", False)]),
        ("from microtome import tiling", [("microtome.tiling", False)]),
        ("from microtome.images import raster", [("microtome.images.raster", False)]),
        ("from microtome.tiling import Tile", [("microtome.tiling", False)]),
        ("from . import image", [("microtome.images.image", False)]),
        ("from .image import Image", [("microtome.images.image", False)]),
        ("from ..tiling import Tile", [("microtome.tiling", False)]),
        ("def f():\n    import microtome.plan", [("microtome.plan", True)]),
        ("importlib.import_module('microtome.plan')", [("microtome.plan", False)]),
    ],
)
def test_every_way_to_import_is_seen(text: str, expected: list[tuple[str, bool]]) -> None:
    assert list(imports(text, package="microtome.images")) == expected


def test_following_a_network_for_its_shapes_loads_no_compiler() -> None:
    # Torch's own shapes of a normal draw, a concatenation or a batch norm bring its compiler, which takes longer than the plan.
    code = "from microtome.config import NetworkConfig\nfrom microtome.step_memory import patch_bytes\n"
    code += "assert patch_bytes((64, 64), NetworkConfig(widths=(8, 16), strides=((1, 1), (2, 2)), kernels=((3, 3), (3, 3))), 'fp32', 2) > 0"
    assert not {name for name in loaded_after(code) if name.startswith("torch._dynamo")}
