import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from microtome import bundle as module
from microtome.bundle import CHANGED, OF_ANOTHER, Bundle, Samples, check_weights, fault_of_copy, load_bundle, save_bundle
from microtome.config import NetworkConfig, Plan
from microtome.data.legend import Legend
from microtome.errors import DataError, DataWarning, MicrotomeError, RunError
from microtome.geometry import Sizes
from microtome.inference.restore import arrays_of, restore
from microtome.models.registry import build

SCHEMA_1 = Path(__file__).parent / "data" / "bundles" / "schema1"
LEGEND = Legend(names=("nothing", "Zelle é"), values=((0,), (7, 9)), ignored=(255,), background=0, reason="for the test")


def bundle_of(seed: int = 0, **changes: Any) -> Bundle:
    """A small network with fresh weights, and samples that are no answers of it."""
    config = NetworkConfig(widths=(4, 8))
    values: dict[str, Any] = {"dims": 2, "patch_vox": (8, 8), "spacing_mm": (0.1, 1 / 3), "classes": LEGEND.names}
    plan = Plan(channels=1, network=config, batch=1, steps=1, **values | changes)
    torch.manual_seed(seed)
    network = build("modern_unet", dims=2, in_channels=1, classes=2, config=config)
    return Bundle(
        plan=plan,
        legend=LEGEND,
        weights=arrays_of(network.state_dict()),
        samples=samples_of(seed),
        sizes=network.sizes,
        context_vox=network.context_vox,
        provenance={"step": 12, "score": 0.1 + 0.2},
    )


def samples_of(seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    golden = rng.normal(size=(1, 8, 8)).astype(np.float16).astype(np.float32)
    patches = tuple(rng.normal(size=(1, 8, 6)).astype(np.float16) for _ in range(11))
    return Samples(golden, rng.normal(size=(2, 8, 8)).astype(np.float32), patches)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether names, types, shapes and bytes are equal."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and np.array_equal(a[name], b[name]) for name in a
    )


def touch(bundle: Bundle) -> None:
    """Read all that is read when it is touched."""
    dict(bundle.weights)
    if bundle.samples is not None:
        list(bundle.samples.calibration)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run folder with a model."""
    save_bundle(tmp_path / "model", bundle_of())
    yield tmp_path
    assert not list(tmp_path.rglob(".part-*"))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        touch(load_bundle(path))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600 + len(str(path))
    assert str(path) in line
    return line


def loaded(path: Path) -> tuple[Bundle | None, str]:
    """The bundle, or the line that refuses it."""
    try:
        bundle = load_bundle(path)
        touch(bundle)
        return bundle, ""
    except MicrotomeError as error:
        return None, str(error)


def header_of(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, read by hand."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def rewrite(file: Path, **changes: Any) -> None:
    """The same weights with another document."""
    document = json.loads(header_of(file)["__metadata__"]["microtome"]) | changes
    with safe_open(file, framework="np") as before:
        tensors = {name: before.get_tensor(name) for name in before.keys()}  # noqa: SIM118 - not a mapping
    save_file(tensors, file, metadata={"microtome": json.dumps(document)})


def test_a_bundle_comes_back_as_it_was(run: Path) -> None:
    wanted = bundle_of()
    for path in (run, run / "model", run / "model" / "model.safetensors"):
        found = load_bundle(path)
        assert found.plan == wanted.plan
        assert found.legend == wanted.legend
        assert found.provenance == wanted.provenance
        assert same(found.weights, wanted.weights)
        assert found.sizes == Sizes((2, 2), (2, 2))
        assert found.context_vox == 0
        assert found.folder == run / "model"


def test_samples_come_back_as_they_were(run: Path) -> None:
    wanted, found = samples_of(0), load_bundle(run).samples
    assert found is not None
    assert found.golden_CS.dtype == np.float32
    assert np.array_equal(found.golden_CS, wanted.golden_CS)
    assert np.array_equal(found.logits_KS, wanted.logits_KS)
    assert len(found.calibration) == 11
    for ours, theirs in zip(found.calibration, wanted.calibration, strict=True):
        assert ours.dtype == np.float16
        assert np.array_equal(ours, theirs)
    assert np.array_equal(found.calibration[-1], wanted.calibration[-1])
    assert [len(part) for part in found.calibration[8:]] == [1, 1, 1]


def test_a_bundle_without_samples_has_none(tmp_path: Path) -> None:
    save_bundle(tmp_path, replace(bundle_of(), samples=None, sizes=None, context_vox=None))
    found = load_bundle(tmp_path)
    assert (found.samples, found.sizes, found.context_vox) == (None, None, None)
    assert same(found.weights, bundle_of().weights)


def test_what_was_saved_has_the_hash_and_the_folder_that_it_is_loaded_with(tmp_path: Path) -> None:
    saved = save_bundle(tmp_path, bundle_of())
    assert (saved.hash, saved.folder) == (load_bundle(tmp_path).hash, tmp_path)
    assert len(saved.hash) == 32
    assert save_bundle(tmp_path, bundle_of()).hash == saved.hash
    assert save_bundle(tmp_path, load_bundle(tmp_path)).hash == saved.hash


@pytest.mark.parametrize("part", ["weights", "samples", "calibration", "provenance", "sizes", "context_vox", "temperature"])
def test_another_content_has_another_hash(tmp_path: Path, part: str) -> None:
    plain, other = bundle_of(), bundle_of(seed=1)
    assert plain.samples is not None
    changed: dict[str, Any] = {
        "weights": other.weights,
        "samples": other.samples,
        "calibration": plain.samples._replace(calibration=plain.samples.calibration[1:]),
        "provenance": {"step": 13},
        "sizes": Sizes((2, 2), (4, 2)),
        "context_vox": 4,
        "temperature": 1.5,
    }
    name = "samples" if part == "calibration" else part
    assert save_bundle(tmp_path, replace(plain, **{name: changed[part]})).hash != save_bundle(tmp_path, plain).hash


def test_a_temperature_comes_back_and_is_1_where_none_is_named(run: Path) -> None:
    saved = save_bundle(run / "model", replace(bundle_of(), temperature=1.625))
    assert load_bundle(run).temperature == saved.temperature == 1.625
    file = run / "model" / "model.safetensors"
    document = json.loads(header_of(file)["__metadata__"]["microtome"])
    del document["temperature"], document["hash"]
    with safe_open(file, framework="np") as before:
        tensors = {name: before.get_tensor(name) for name in before.keys()}  # noqa: SIM118 - not a mapping
    save_file(tensors, file, metadata={"microtome": json.dumps({**document, "hash": module._hash({}, document)})})
    assert load_bundle(run).temperature == load_bundle(SCHEMA_1).temperature == 1.0
    for value in (0, -1, "2", True, None):
        wrong = {**document, "temperature": value}
        save_file(tensors, file, metadata={"microtome": json.dumps({**wrong, "hash": module._hash({}, wrong)})})
        assert "expected a temperature above 0" in refusal(run)


def test_a_bundle_of_schema_1_loads_and_says_what_it_said() -> None:
    bundle = load_bundle(SCHEMA_1)
    golden = np.load(SCHEMA_1 / "golden.npz")
    with torch.inference_mode():
        logits_KS = restore(bundle)(torch.from_numpy(golden["image"])[None])[0].numpy()
    # Another torch may add in another order.
    np.testing.assert_allclose(logits_KS, golden["logits"], rtol=0, atol=1e-5)
    assert (bundle.samples, bundle.sizes, bundle.context_vox) == (None, None, None)
    assert bundle.hash == json.loads((SCHEMA_1 / "model.json").read_text(encoding="utf-8"))["hash"]
    assert bundle.weights["encoder.0.0.1.num_batches_tracked"].shape == ()


def test_a_changed_weight_of_schema_1_is_noticed_at_once(tmp_path: Path) -> None:
    data = bytearray((SCHEMA_1 / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="expected content with hash"):
        load_bundle(tmp_path)


def test_it_needs_no_torch(run: Path) -> None:
    code = "import sys; from microtome.bundle import load_bundle; dict(load_bundle(sys.argv[1]).weights); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, check=False).returncode == 0


def test_the_description_is_checked_before_weights_are_touched(run: Path) -> None:
    rewrite(run / "model" / "model.safetensors", context_vox=3)
    with pytest.raises(DataError, match="expected content with hash"):
        load_bundle(run)


def test_damaged_weights_do_not_hinder_reading_the_description_and_the_golden_sample(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = header_of(file)
    (length,) = struct.unpack("<Q", data[:8])
    data[8 + length + header["heads.0.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    found = load_bundle(run)
    assert found.samples is not None
    assert found.samples.logits_KS.shape == (2, 8, 8)
    with pytest.raises(DataError, match="expected content with hash"):
        found.weights["stem.missing"]


def test_a_bundle_keeps_its_weights_where_another_takes_its_place_before_they_are_touched(run: Path) -> None:
    found = load_bundle(run)
    save_bundle(run / "model", bundle_of(seed=1))
    assert same(found.weights, bundle_of().weights)
    assert same(load_bundle(run).weights, bundle_of(seed=1).weights)


def test_the_network_is_in_evaluation_mode_and_computes_the_same(run: Path) -> None:
    network = restore(load_bundle(run))
    assert not network.training
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 16, 16)).astype(np.float32))
    with torch.no_grad():
        assert torch.equal(network(image), restore(bundle_of())(image))


def test_weights_in_another_memory_layout_are_the_same_bundle(tmp_path: Path) -> None:
    plain = bundle_of()
    turned = arrays_of(restore(plain).to(memory_format=torch.channels_last).state_dict())
    transposed = {name: np.asarray(array, order="F") for name, array in plain.weights.items()}
    hashes = {save_bundle(tmp_path, replace(plain, weights=weights)).hash for weights in (plain.weights, turned, transposed)}
    assert len(hashes) == 1
    assert same(load_bundle(tmp_path).weights, plain.weights)


def test_the_copy_for_people_says_what_the_weights_file_says(run: Path) -> None:
    document = json.loads((run / "model" / "model.json").read_text(encoding="utf-8"))
    assert document == json.loads(header_of(run / "model" / "model.safetensors")["__metadata__"]["microtome"])
    assert document["legend"]["names"] == ["nothing", "Zelle é"]
    assert document["schema"] == 2


def test_no_file_of_a_bundle_is_a_pickle(run: Path) -> None:
    assert sorted(path.name for path in (run / "model").iterdir()) == ["model.json", "model.safetensors"]
    # Length, then JSON: neither a pickle nor the ZIP file that torch.save writes.
    assert header_of(run / "model" / "model.safetensors").keys() > {"__metadata__"}


def test_files_of_a_bundle_are_as_readable_as_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_bundle(tmp_path, bundle_of())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


# damage


@pytest.mark.parametrize("place", ["first weight", "middle", "last weight", "golden", "calibration", "class name", "spacing"])
def test_one_changed_byte_is_noticed(run: Path, place: str) -> None:
    file = run / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    if place == "class name":
        index = data.index(b"nothing")
    elif place == "spacing":
        index = data.index(b"0.3333333333333333") + 5
    elif place in ("golden", "calibration"):
        name = {"golden": "sample:golden.logits", "calibration": "sample:calibration.03"}[place]
        index = 8 + length + header_of(file)[name]["data_offsets"][0]
    else:
        index = {"first weight": 8 + length, "middle": (8 + length + len(data)) // 2, "last weight": len(data) - 1}[place]
    data[index] ^= 1
    file.write_bytes(data)
    assert "expected content with hash" in refusal(run)


@pytest.mark.parametrize("seed", range(30))
def test_a_changed_byte_anywhere_gives_the_same_bundle_or_one_line(run: Path, seed: int) -> None:
    file = run / "model" / "model.safetensors"
    rng = np.random.default_rng(seed)
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    # The header is where damage has many faces.
    data[rng.integers(0, 8 + length) if seed % 3 else rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    found, line = loaded(run)
    assert "\n" not in line
    # Only the spaces that fill the header up may change without being noticed.
    assert found is None or found.plan == bundle_of().plan
    assert found is None or same(found.weights, bundle_of().weights)


def test_every_67th_byte_of_the_weights_file_changed_is_noticed(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    whole = file.read_bytes()
    # What fills the header up to a multiple of 8 says nothing.
    (length,) = struct.unpack("<Q", whole[:8])
    end = len(whole[: 8 + length].rstrip(b" "))
    unnoticed = []
    for index in (each for each in range(0, len(whole), 67) if not end <= each < 8 + length):
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        found, line = loaded(run)
        if found is not None or "expected" not in line:
            unnoticed.append(index)
    assert unnoticed == []


def test_weights_changed_after_they_were_checked_are_noticed_when_they_are_read(run: Path) -> None:
    file, bundle = run / "model" / "model.safetensors", load_bundle(run)
    check_weights(bundle)
    weight = np.asarray(load_bundle(run).weights[next(iter(bundle.weights))]).tobytes()
    with file.open("r+b") as same:
        same.seek(file.read_bytes().index(weight))
        same.write(bytes([weight[0] ^ 1]))
    with pytest.raises(DataError, match="expected content with hash"):
        dict(bundle.weights)


def test_every_7th_byte_of_the_copy_for_people_changed_is_noticed_and_changes_nothing(run: Path) -> None:
    file = run / "model" / "model.json"
    whole = file.read_bytes()
    bundle = load_bundle(run)
    unnoticed = []
    for index in range(0, len(whole), 7):
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        if fault_of_copy(bundle) != CHANGED:
            unnoticed.append(index)
    assert unnoticed == []
    with pytest.warns(DataWarning, match=r"model.json: changed since it was written, to no effect: what counts is model.safetensors"):
        assert load_bundle(run).plan == bundle_of().plan


def test_a_class_renamed_in_the_copy_for_people_is_said_when_the_model_is_loaded(run: Path) -> None:
    file = run / "model" / "model.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["legend"]["names"][0] = "something"
    # As an editor writes it, with letters of its own.
    file.write_text(json.dumps(document, ensure_ascii=False, indent=4), encoding="utf-8")
    with pytest.warns(DataWarning, match="to no effect"):
        assert load_bundle(run).legend.names == ("nothing", "Zelle é")


def test_a_copy_for_people_that_is_only_laid_out_anew_or_gone_is_no_fault(run: Path) -> None:
    file = run / "model" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")), ensure_ascii=False), encoding="utf-8")
    assert fault_of_copy(load_bundle(run)) == ""
    file.unlink()
    assert fault_of_copy(load_bundle(run)) == ""


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", "[" * 20_000, '{"schema": 1}', '{"hash": "0"}', "\0"])
def test_a_copy_for_people_that_is_none_is_changed(run: Path, text: str) -> None:
    bundle = load_bundle(run)
    (run / "model" / "model.json").write_text(text, encoding="utf-8")
    assert fault_of_copy(bundle) == CHANGED


def test_a_copy_for_people_of_more_bytes_than_any_has_is_changed_and_not_read_to_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(run)
    with (run / "model" / "model.json").open("a") as file:
        file.write(" " * 50_000)
    monkeypatch.setattr(module, "MOST_HEADER_BYTES", 50_000)
    # Spaces behind it change nothing of what it says.
    assert fault_of_copy(bundle) == CHANGED
    monkeypatch.setattr(module, "MOST_HEADER_BYTES", 500_000)
    assert fault_of_copy(bundle) == ""


def test_a_model_that_may_not_be_read_is_refused_in_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match="Permission denied"):
        load_bundle(run)


def test_the_copy_of_schema_1_is_held_to_its_hash_too(tmp_path: Path) -> None:
    for file in SCHEMA_1.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert fault_of_copy(load_bundle(tmp_path)) == ""
    copy = tmp_path / "model.json"
    copy.write_bytes(copy.read_bytes().replace(b"nothing", b"nothinG"))
    with pytest.warns(DataWarning, match="to no effect"):
        assert fault_of_copy(load_bundle(tmp_path)) == CHANGED


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_a_file_that_was_cut_off_is_refused(run: Path, keep: int) -> None:
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "expected a model bundle, got an unreadable file" in refusal(run)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "got no model" in refusal(tmp_path)
    assert "got no model" in refusal(tmp_path / "nowhere")
    (tmp_path / "plan.yaml").write_text("steps: 1\n")
    assert "an interrupted run without a model yet" in refusal(tmp_path)
    assert "unreadable" in refusal(tmp_path / "plan.yaml")
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    assert "unreadable" in refusal(tmp_path / "weights.pt")


def test_weights_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "model.safetensors")
    assert "got weights without a description (1 tensors)" in refusal(tmp_path)
    save_file({"a": np.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "got weights without a description (1 tensors)" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"schema": null}', '{"schema": "new"}', "[" * 20_000])
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "model.safetensors", metadata={"microtome": text})
    assert "expected a description in JSON with its schema" in refusal(tmp_path)


def test_a_newer_schema_is_refused_before_its_content_is_looked_at_and_names_what_it_needs(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    rewrite(file, schema=99, needs="microtome >= 7.25", plan=None, hash="")
    assert refusal(run).endswith("expected bundle schema 2 or older, got 99, which needs microtome 7.25; update microtome to 7.25 or newer")
    # What nobody would write is not repeated, and a version that is older than this one is no help.
    for needs in ("microtome >= 0.0.1", "microtome >= 7; rm -r /", "torch >= 99", 7, None):
        rewrite(file, schema=99, needs=needs, plan=None, hash="")
        assert refusal(run).endswith("expected bundle schema 2 or older, got 99; update microtome")


def test_a_known_schema_that_needs_a_newer_version_is_refused_by_that(run: Path) -> None:
    rewrite(run / "model" / "model.safetensors", needs="microtome >= 99.1")
    assert refusal(run).endswith("got 2, which needs microtome 99.1; update microtome to 99.1 or newer")


def test_what_is_written_names_a_version_that_reads_it(run: Path) -> None:
    document = json.loads(header_of(run / "model" / "model.safetensors")["__metadata__"]["microtome"])
    needed = tuple(map(int, document["needs"].removeprefix("microtome >= ").split(".")))
    assert (0, 1) <= needed <= tuple(map(int, metadata.version("microtome").split(".")[:3]))


def test_a_changed_plan_is_noticed(run: Path) -> None:
    plan = bundle_of(spacing_mm=(1.0, 1.0)).plan.model_dump(mode="json")
    rewrite(run / "model" / "model.safetensors", plan=plan)
    assert "expected content with hash" in refusal(run)


def test_weights_that_do_not_fit_the_network_are_one_line(tmp_path: Path) -> None:
    plain = bundle_of()
    save_bundle(tmp_path, replace(plain, weights={("new." + name): array for name, array in plain.weights.items()}))
    with pytest.raises(DataError, match=r"expected weights of the network \w+, got .*Missing key") as caught:
        restore(load_bundle(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# interruptions


def test_a_kill_between_the_two_files_leaves_a_bundle_that_loads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(run / "model", bundle_of(seed=1))
    # The new weights with the old copy for people: the weights file alone counts.
    found = load_bundle(run)
    assert same(found.weights, bundle_of(seed=1).weights)
    # It is no change that somebody made: nobody is warned, and who asks is told.
    assert fault_of_copy(found) == OF_ANOTHER


def test_a_full_disk_leaves_the_old_bundle_and_is_a_run_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left"):
        save_bundle(run / "model", bundle_of(seed=1))
    assert same(load_bundle(run).weights, bundle_of().weights)
