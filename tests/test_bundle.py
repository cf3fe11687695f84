import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from microtome import bundle as module
from microtome.bundle import Bundle, load_bundle, save_bundle
from microtome.config import NetworkConfig, Plan
from microtome.data.legend import Legend
from microtome.errors import DataError, MicrotomeError, RunError
from microtome.models.registry import build

LEGEND = Legend(names=("nothing", "Zelle é"), values=((0,), (7, 9)), ignored=(255,), background=0, reason="for the test")


def bundle_of(seed: int = 0, **changes: Any) -> Bundle:
    """A small network with fresh weights."""
    config = NetworkConfig(widths=(4, 8))
    values: dict[str, Any] = {"dims": 2, "patch_vox": (8, 8), "spacing_mm": (0.1, 1 / 3), "classes": LEGEND.names}
    plan = Plan(channels=1, network=config, batch=1, steps=1, **values | changes)
    torch.manual_seed(seed)
    network = build("modern_unet", dims=2, in_channels=1, classes=2, config=config)
    return Bundle(plan=plan, legend=LEGEND, weights=network.state_dict(), provenance={"step": 12, "score": 0.1 + 0.2})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run folder with a model."""
    save_bundle(tmp_path / "model", bundle_of())
    yield tmp_path
    assert not list(tmp_path.rglob(".part-*"))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_bundle(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600 + len(str(path))
    assert str(path) in line
    return line


def loaded(path: Path) -> tuple[Bundle | None, str]:
    """The bundle, or the line that refuses it."""
    try:
        return load_bundle(path), ""
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
    save_file(dict(bundle_of().weights), file, metadata={"microtome": json.dumps(document)})


def test_a_bundle_comes_back_as_it_was(run: Path) -> None:
    wanted = bundle_of()
    for path in (run, run / "model", run / "model" / "model.safetensors"):
        found = load_bundle(path)
        assert found.plan == wanted.plan
        assert found.legend == wanted.legend
        assert found.provenance == wanted.provenance
        assert found.weights.keys() == wanted.weights.keys()
        assert all(torch.equal(found.weights[name], tensor) for name, tensor in wanted.weights.items())


def test_the_network_is_in_evaluation_mode_and_computes_the_same(run: Path) -> None:
    network = load_bundle(run).network()
    assert not network.training
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 16, 16)).astype(np.float32))
    with torch.no_grad():
        assert torch.equal(network(image), bundle_of().network()(image))


def test_weights_in_another_memory_layout_are_the_same_bundle(tmp_path: Path) -> None:
    plain = bundle_of()
    turned = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in plain.weights.items()}
    save_bundle(tmp_path, Bundle(plan=plain.plan, legend=LEGEND, weights=turned))
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in load_bundle(tmp_path).weights.items())


def test_the_copy_for_people_says_what_the_weights_file_says(run: Path) -> None:
    document = json.loads((run / "model" / "model.json").read_text(encoding="utf-8"))
    assert document == json.loads(header_of(run / "model" / "model.safetensors")["__metadata__"]["microtome"])
    assert document["legend"]["names"] == ["nothing", "Zelle é"]
    assert document["schema"] == 1


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


@pytest.mark.parametrize("place", ["first weight", "middle", "last weight", "class name", "spacing"])
def test_one_changed_byte_is_noticed(run: Path, place: str) -> None:
    file = run / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    if place == "class name":
        index = data.index(b"nothing")
    elif place == "spacing":
        index = data.index(b"0.3333333333333333") + 5
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
    assert found is None or all(torch.equal(found.weights[name], tensor) for name, tensor in bundle_of().weights.items())


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
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "got weights without a description" in refusal(tmp_path)
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "got weights without a description" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"schema": null}', '{"schema": "new"}', "[" * 20_000])
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"microtome": text})
    assert "expected a description in JSON with its schema" in refusal(tmp_path)


def test_a_newer_schema_is_refused_before_its_content_is_looked_at(run: Path) -> None:
    rewrite(run / "model" / "model.safetensors", schema=2, plan=None, hash="")
    assert refusal(run).endswith("expected bundle schema 1 or older, got 2; update microtome")


def test_a_changed_plan_is_noticed(run: Path) -> None:
    plan = bundle_of(spacing_mm=(1.0, 1.0)).plan.model_dump(mode="json")
    rewrite(run / "model" / "model.safetensors", plan=plan)
    assert "expected content with hash" in refusal(run)


def test_weights_that_do_not_fit_the_network_are_one_line(tmp_path: Path) -> None:
    plain = bundle_of()
    weights = {("new." + name): tensor for name, tensor in plain.weights.items()}
    save_bundle(tmp_path, Bundle(plan=plain.plan, legend=LEGEND, weights=weights))
    with pytest.raises(DataError, match=r"expected weights of this network, got .*Missing key") as caught:
        load_bundle(tmp_path).network()
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
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in bundle_of(seed=1).weights.items())


def test_a_full_disk_leaves_the_old_bundle_and_is_a_run_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left"):
        save_bundle(run / "model", bundle_of(seed=1))
    assert all(torch.equal(load_bundle(run).weights[name], tensor) for name, tensor in bundle_of().weights.items())
