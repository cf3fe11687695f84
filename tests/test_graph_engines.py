"""Engines that read a network's graph, and what of them a request may have."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import microtome
from microtome.bundle import Bundle, Samples, load_bundle
from microtome.errors import ConfigError, DataError, RunError
from microtome.inference import openvino_engine
from microtome.inference.engines import ENGINES, NAMES, Engines
from microtome.inference.export import write_graph
from microtome.inference.graphs import find_graph, graph_mark
from microtome.inference.mirroring import Mirrored, passes, versions
from microtome.inference.onnxruntime_engine import OnnxRuntimeEngine
from microtome.inference.openvino_engine import MOST_SHAPES, OpenVinoEngine
from microtome.inference.predictor import Predictor, job_of, load
from microtome.inference.processor import may_have_gpu, processor_name, threads
from microtome.inference.search import Job
from microtome.inference.torch_engine import open_torch, trained_engine
from tests.models import saved_model

CPU = torch.device("cpu")
FLIPS = {"augment": {"flip_axes": (0, 1)}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model with its graph; nobody changes it."""
    pytest.importorskip("onnx")
    made = saved_model(tmp_path_factory.mktemp("run"))
    write_graph(made)
    return made


def graph_of(bundle: Bundle) -> Path:
    found = find_graph(bundle, "onnx")
    assert found is not None
    return found


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_graph_says_what_torch_says_at_any_size(bundle: Bundle, name: str) -> None:
    pytest.importorskip(name)
    engine = OpenVinoEngine(graph_of(bundle), name) if name == "openvino" else OnnxRuntimeEngine(graph_of(bundle))
    oracle = open_torch(bundle, "torch", CPU)
    assert engine.name == name
    for shape in ((1, 16, 16), (1, 32, 20), (1, 16, 16)):
        logits = engine(noise(*shape))
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, oracle(noise(*shape)), atol=1e-4)


def test_the_answer_to_one_tile_outlives_the_next_tile(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    engine = OpenVinoEngine(graph_of(bundle), "openvino")
    first = engine(noise(1, 16, 16))
    kept = first.copy()
    engine(2 * noise(1, 16, 16))
    np.testing.assert_array_equal(first, kept)


HELD = """
import gc, signal, sys, threading
from pathlib import Path
import numpy as np
from microtome.inference.openvino_engine import OpenVinoEngine
held = [OpenVinoEngine(Path(sys.argv[1]), "openvino")]
held[0](np.zeros((1, 32, 32), np.float32))
thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda number, frame: print("heard"))
signal.raise_signal(signal.SIGINT)
"""


def test_signals_are_heard_after_another_thread_let_the_engine_go(bundle: Bundle) -> None:
    # OpenVINO's plugin replaces the stack that signals are handled on, and frees it with the last core.
    done = subprocess.run([sys.executable, "-c", HELD, str(graph_of(bundle))], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_a_few_shapes_stay_compiled_and_the_oldest_goes(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    engine = OpenVinoEngine(graph_of(bundle), "openvino")
    sizes = [16 + 2 * number for number in range(MOST_SHAPES)]
    for size in (*sizes, sizes[0], 64):
        engine(noise(1, size, 16))
    assert [shape[1] for shape in engine._requests] == [*sizes[2:], sizes[0], 64]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(RunError, match=r"graph\.onnx: expected a graph that .* can run") as caught:
        OpenVinoEngine(path, name) if name == "openvino" else OnnxRuntimeEngine(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_tile_of_other_channels_is_refused_in_one_line(bundle: Bundle, name: str) -> None:
    pytest.importorskip(name)
    engine = OpenVinoEngine(graph_of(bundle), name) if name == "openvino" else OnnxRuntimeEngine(graph_of(bundle))
    with pytest.raises(RunError, match="expected a graph that"):
        engine(noise(2, 16, 16))


@pytest.mark.parametrize(("name", "module"), [("openvino", "openvino"), ("onnxruntime", "onnxruntime")])
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    # As in a process that has not used it yet.
    monkeypatch.setattr(openvino_engine, "openvino_core", openvino_engine.openvino_core.__wrapped__)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        ConfigError, match=rf'--engine {name}: expected the package {module}, got none installed; run: pip install "microtome\[fast\]"'
    ):
        OpenVinoEngine(Path("graph.onnx"), name) if name == "openvino" else OnnxRuntimeEngine(Path("graph.onnx"))


class Ramp:
    """An engine that answers with where it looks: different for every mirrored version."""

    name = "ramp"

    def __call__(self, image_CS: np.ndarray) -> np.ndarray:
        ramp = np.arange(image_CS[0].size, dtype=np.float32).reshape(image_CS.shape[1:])
        return np.stack([image_CS[0] * ramp, image_CS[0] + ramp])

    def averaged(self, *_: Any) -> "Ramp":
        return self


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1), (0, 1, 2)])
def test_the_mirrored_mean_is_that_computed_by_hand(axes: tuple[int, ...]) -> None:
    image_CS = noise(1, 3, 4, 5)
    expected = []
    for flips in itertools.product(*[(False, True)] * len(axes)):
        along = tuple(axis + 1 for axis, flip in zip(axes, flips, strict=True) if flip)
        expected.append(np.flip(Ramp()(np.flip(image_CS, along)), along))
    assert len(expected) == len(versions(axes)) == passes("mirror", axes)
    result = Mirrored(Ramp(), axes)(image_CS)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, np.mean(expected, axis=0), rtol=1e-5)


def test_mirrored_by_numpy_or_by_torch_it_is_the_same(bundle: Bundle) -> None:
    oracle = open_torch(bundle, "torch", CPU)
    by_torch = oracle.averaged("mirror", (0, 1), (1.0, 1.0))
    np.testing.assert_allclose(Mirrored(oracle, (0, 1))(noise(1, 16, 20)), by_torch(noise(1, 16, 20)), atol=1e-6)


def test_rotations_are_seven_passes() -> None:
    assert (passes("none", (0,)), passes("rotations", ())) == (1, 7)


# what a request may have


def test_every_engine_has_its_word_and_every_word_its_engine() -> None:
    assert set(NAMES) == {"auto", *ENGINES}


def test_a_word_that_is_no_engine_is_refused_with_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="did you mean `openvino`"):
        Engines(bundle, engine="openvin", device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tta": "rotations"}, "no --tta rotations"),
        ({"head": 1}, "no --head, as graphs hold the whole network, got --head 1"),
    ],
)
def test_what_only_torch_can_do_is_refused_beside_another_engine(bundle: Bundle, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine onnxruntime: expected {message}"):
        Engines(bundle, engine="onnxruntime", device="cpu", **words)
    assert {candidate.name for candidate in Engines(bundle, device="cpu", **words).candidates} <= {"torch", "torch-bf16"}


def test_a_graph_is_refused_on_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--engine openvino: expected --device cpu, got --device cuda"):
        Engines(bundle, engine="openvino", device="cuda")


def test_bfloat16_is_refused_where_it_would_be_emulated(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.inference.engines.processor_has_bf16", lambda: False)
    with pytest.raises(ConfigError, match="--engine openvino-bf16: expected a processor that multiplies bfloat16"):
        Engines(bundle, engine="openvino-bf16", device="cpu")
    assert not any("bf16" in candidate.name for candidate in Engines(bundle, device="cpu").candidates)


def test_a_model_without_samples_is_for_torch_in_float32_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.inference.engines.processor_has_bf16", lambda: True)
    old = saved_model(tmp_path, samples=False, precision="bf16")
    with pytest.raises(
        ConfigError, match=r"--engine openvino: expected a model with a golden input.*train --resume.*or use --engine torch"
    ):
        Engines(old, engine="openvino", device="cpu")
    engines = Engines(old, device="cpu")
    assert [candidate.name for candidate in engines.candidates] == ["torch"]
    assert engines.named().reason == "torch: the only one to use, as the model has no golden input to hold others to"
    assert Engines(old, engine="torch-bf16", device="cpu").named().reason == "torch-bf16: as asked"


def test_a_bundle_of_the_first_schema_still_predicts() -> None:
    folder = Path(__file__).parent / "data" / "bundles" / "schema1"
    predictor = load(folder, device="cpu")
    with np.load(folder / "golden.npz") as golden:
        assert predictor.engine is not None
        found = predictor.engine(golden["image"])
        np.testing.assert_allclose(found, golden["logits"], atol=1e-5)


def test_int8_is_a_candidate_once_its_graph_is_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    assert "openvino-int8" not in {candidate.name for candidate in Engines(bundle, device="cpu").candidates}
    monkeypatch.setattr("microtome.inference.engines.find_graph", lambda bundle, kind: Path(f"{kind}.graph"))
    assert Engines(bundle, device="cpu").candidates[0].name == "openvino-int8"


def test_without_torch_there_are_the_graphs_that_are_there(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saved_model(tmp_path)
    found = {"openvino", "onnxruntime", "onnx"}
    monkeypatch.setattr("microtome.inference.engines.util.find_spec", lambda name: object() if name in found else None)
    monkeypatch.setattr("microtome.inference.engines.processor_has_bf16", lambda: False)
    monkeypatch.setattr("microtome.inference.engines.may_have_gpu", lambda: True)
    assert [candidate.name for candidate in Engines(bundle).candidates] == ["openvino", "onnxruntime"]
    assert Engines(plain).candidates == ()


def test_a_measurement_is_of_these_bytes_of_a_graph_and_of_this_version_of_our_networks(bundle: Bundle) -> None:
    keys = {candidate.name: candidate.key for candidate in Engines(bundle, device="cpu").candidates}
    assert keys["openvino"].endswith(f" {graph_mark(graph_of(bundle), 'onnx')}")
    assert keys["torch"].endswith(f" microtome {microtome.__version__}")


@pytest.mark.parametrize("words", ["cpu", "cpu:0"])
def test_a_cpu_by_any_name_runs_a_graph(bundle: Bundle, words: str) -> None:
    assert Engines(bundle, engine="openvino", device=words).device == "cpu"


def test_without_a_graph_and_what_writes_it_there_is_torch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saved_model(tmp_path)
    monkeypatch.setattr("microtome.inference.engines.util.find_spec", lambda name: None if name == "onnx" else object())
    assert {candidate.name for candidate in Engines(plain, device="cpu").candidates} <= {"torch", "torch-bf16"}


def test_a_missing_graph_is_written_when_its_engine_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    plain = saved_model(tmp_path)
    choice = Engines(plain, engine="openvino", device="cpu").named()
    assert find_graph(plain, "onnx") is not None
    assert choice.reason.startswith("openvino: as asked; labels as torch ")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "auto"])
def test_weights_that_were_changed_are_noticed_by_engines_that_do_not_read_them(tmp_path: Path, engine: str) -> None:
    pytest.importorskip("onnxruntime" if engine == "auto" else engine)
    write_graph(saved_model(tmp_path))
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    with safe_open(file, framework="np") as whole:
        weight = next(name for name in whole.keys() if not name.startswith("sample:"))  # noqa: SIM118 - no mapping
        at = content.index(whole.get_tensor(weight).tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    engines = Engines(load_bundle(tmp_path), engine=engine, device="cpu")
    with pytest.raises(DataError, match=r"model\.safetensors: expected content with hash \w+, got \w+; copy it again"):
        engines.best(Job(tile_vox=(16, 16), tiles=1)) if engine == "auto" else engines.named()


def test_a_graph_of_another_network_is_found_out_by_the_golden_output(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    assert bundle.samples is not None
    # The graph is this bundle's by its hash; what the bundle says of its own answers is not what the graph says.
    other = replace(bundle, samples=Samples(bundle.samples.golden_CS, -bundle.samples.logits_KS))
    with pytest.raises(ConfigError, match=r"--engine openvino: expected the answers of the trained network, got .*% equal labels"):
        Engines(other, engine="openvino", device="cpu").named()


# the predictor


def test_the_engine_is_chosen_at_the_first_image_and_told(bundle: Bundle) -> None:
    told: list[str] = []
    predictor = load(str(bundle.folder), device="cpu", on_choice=told.append)
    assert (predictor.engine, told) == (None, [])
    image = noise(1, 24, 24)
    labels = predictor(as_image(image), images=2)
    assert predictor.engine is not None
    assert len(told) == 1
    assert told[0].startswith(f"{predictor.engine.name}: ")
    predictor(as_image(image))
    assert len(told) == 1
    # The golden input, on which the engine had to agree, is small here, and the network was not trained.
    assert (labels == load(str(bundle.folder), device="cpu", engine="torch")(as_image(image))).mean() > 0.98


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_graph_labels_as_torch_does_mirrored_too(tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    made = saved_model(tmp_path, **FLIPS)
    write_graph(made)
    image = as_image(noise(1, 40, 33))
    labels = [Predictor(made, device="cpu", engine=name, tta="mirror")(image) for name in ("torch", engine)]
    assert (labels[0] == labels[1]).mean() > 0.999


def test_tiles_of_a_job_are_counted_for_all_sections(tmp_path: Path) -> None:
    plan = saved_model(tmp_path, spacing_mm=(1.0, 1.0, 1.0)).plan
    sizes = open_torch(load_bundle(tmp_path), "torch", CPU).network
    assert job_of((16, 16), (1.0, 1.0), plan.model_copy(update={"spacing_mm": (1.0, 1.0)}), sizes) == Job(tile_vox=(16, 16), tiles=1)
    # Three sections of 2 x 1 tiles: 16 + 12 of 28 rows, with an overlap of a quarter.
    assert job_of((3, 28, 16), (1.0, 1.0, 1.0), plan, sizes) == Job(tile_vox=(16, 16), tiles=6)


def as_image(array: np.ndarray) -> Any:
    from microtome.geometry import affine_from_spacing
    from microtome.images.image import Image

    size = (1.0,) * (array.ndim - 1)
    return Image(array=array, spacing_mm=size, affine=affine_from_spacing(size), axes="CYX", path=Path("a.tif"), format="tiff")


# the machine


@pytest.mark.parametrize(("words", "count"), [("3", 3), ("2,1", 2)])
def test_threads_are_those_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, words: str, count: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", words)
    assert threads() == count


@pytest.mark.parametrize("words", ["", "0", "many"])
def test_threads_are_the_cores_where_the_environment_names_none(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", words)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert threads() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert threads() == 7


def test_a_processor_has_a_name() -> None:
    assert processor_name().strip()


def test_a_gpu_is_asked_for_where_a_driver_left_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    for marks, may in (((), False), (("/dev/nvidia0",), True), (("/dev/dxg",), True), (("/dev/null",), False)):
        monkeypatch.setattr("pathlib.Path.exists", lambda self, marks=marks: str(self) in marks)
        assert may_have_gpu() is may
    monkeypatch.setattr("sys.platform", "win32")
    assert may_have_gpu()


def test_the_engine_of_a_training_is_of_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = saved_model(tmp_path)
    rounded = replace(bundle, plan=bundle.plan.model_copy(update={"precision": "bf16"}))
    for has, name in ((True, "torch-bf16"), (False, "torch")):
        monkeypatch.setattr("microtome.inference.torch_engine.has_bf16", lambda device, has=has: has)
        assert trained_engine(rounded, CPU).name == name
        assert trained_engine(bundle, CPU).name == "torch"
    # The weights themselves are not rounded: the answers are those that the last validation gave.
    assert {weight.dtype for weight in trained_engine(rounded, CPU).network.parameters()} == {torch.float32}


def test_an_unsaved_model_is_for_torch(bundle: Bundle) -> None:
    in_memory = replace(bundle, folder=None, hash="")
    assert {candidate.name for candidate in Engines(in_memory, device="cpu").candidates} <= {"torch", "torch-bf16"}


def test_auto_says_that_a_graph_is_damaged_and_a_named_engine_writes_it_anew(tmp_path: Path) -> None:
    bundle = saved_model(tmp_path)
    path = write_graph(bundle)
    assert "damaged" not in Engines(bundle, device="cpu").best(Job(tile_vox=(16, 16), tiles=1)).reason
    path.write_bytes(path.read_bytes()[:-100])
    said = Engines(bundle, device="cpu").best(Job(tile_vox=(16, 16), tiles=1))
    assert f"{path} is damaged, or of another model" in said.reason
    assert "torch" in said.engine.name
    Engines(bundle, engine="onnxruntime", device="cpu").named()
    assert find_graph(bundle, "onnx") == path
