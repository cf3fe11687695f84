"""What describes data, plans, models and runs, as targets of `fuzzing`: folders and files that strangers may give."""

import hashlib
import itertools
import json
import os
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save

from microtome.bundle import load_bundle
from microtome.compare import asked_before
from microtome.config import AugmentConfig, NetworkConfig, Plan, dump_yaml
from microtome.data.dataset import open_dataset
from microtome.data.legend import Legend
from microtome.data.listing import Entry, Listing, read_listing, write_listing
from microtome.errors import DataError
from microtome.evaluation.comparison import Outcome, compare_runs
from microtome.evaluation.report import build_report, read_run
from microtome.evaluation.scores import score_case, summarise
from microtome.files import write_json
from microtome.inference.restore import arrays_of, restore
from microtome.interop.checkpoints import EXPECTED, in_our_names, read_weights, save_weights
from microtome.model_card import card, card_rows
from microtome.models.registry import build
from microtome.training.checkpoint import TrainState, load_checkpoint, new_state, save_checkpoint
from microtome.training.folder import read_plan
from microtome.training.initial import begin_with
from tests.folders import nifti, png
from tests.fuzz_trees import SAFE_LOADER, json_changed, tree_changed, yaml_changed
from tests.fuzzing import Target
from tests.small import small_plan
from tests.stores import small_bundle

_FOLDER = "case-x"
_CLASSES = ("background", "cell")
GROWTH_BYTES = 2**28


def _target(name: str, seeds: tuple[bytes, ...], **values: Any) -> Target:
    return Target(**{"name": name, "seeds": seeds, "growth_bytes": GROWTH_BYTES, **values})


# Datasets.

DESCRIPTIONS = (
    {"images": "images", "labels": "masks", "classes": {"background": 0, "cell": [1, 2]}, "not_annotated": 255, "spacing_mm": [0.5, 0.5]},
    {"classes": ["ground", "cell"], "group_by": "(.)", "validation": ["b"], "background": "ground"},
    {"pairs": {"images/a.png": "masks/a.png", "images/b.png": ["masks/b.png"]}, "groups": {"g": ["a", "b"]}, "instances": True},
    {"images": "images/*.png", "labels": "masks/*.png", "classes": {"ground": "#000000", "cell": "#010101"}, "not_annotated": []},
    {"validation_sections": [0, 1], "classes": {"ground": 0, "cell": 1}},
)


def put_pictures(folder: Path) -> None:
    """Two pictures and their masks."""
    for name in "ab":
        png(folder / _FOLDER / "images" / f"{name}.png", 7)
        png(folder / _FOLDER / "masks" / f"{name}.png", np.eye(4))


def microtome_yamls() -> tuple[Target, ...]:
    """`microtome.yaml` beside two pictures."""
    seeds = tuple(yaml.safe_dump(description).encode() for description in DESCRIPTIONS)
    words = (b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"!!binary ", b"? ", b"- ", b"1:1:1", b"2020-01-01", b"0x1F", b"---\n")
    values: dict[str, Any] = {"file": f"{_FOLDER}/microtome.yaml", "given": _FOLDER, "prepare": put_pictures, "read": open_dataset}
    return (_target("microtome.yaml", seeds, change=yaml_changed, dictionary=(*words, b"../", b"/etc/passwd", b"**/*"), **values),)


DOCUMENTS: tuple[dict[str, Any], ...] = (
    {
        "name": "h",
        "modality": {"0": "MR"},
        "labels": {"0": "background", "1": "organ"},
        "training": [
            {"image": "./imagesTr/a.nii", "label": "./labelsTr/a.nii"},
            {"image": "./imagesTr/b.nii", "label": "./labelsTr/b.nii"},
        ],
        "test": ["./imagesTs/c.nii"],
    },
    {
        "modality": {"0": "CT", "1": "PET"},
        "labels": {"0": "background", "1": "organ"},
        "training": [{"image": "./imagesTr/d.nii", "label": "./labelsTr/d.nii"}],
    },
    {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "organ": 1, "ignore": 2}, "file_ending": ".nii"},
    {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": [1]},
        "dataset": {"one": {"images": ["imagesTr/a.nii"], "label": "labelsTr/a.nii"}},
    },
)


def put_volumes(folder: Path) -> None:
    """Volumes of one channel, and one of two, as the documents name them."""
    label = np.zeros((2, 3, 4), np.uint8)
    label[0] = 1
    for name in ("a", "b", "d_0000", "d_0001"):
        nifti(folder / _FOLDER / "imagesTr" / f"{name}.nii", 7)
    for name in "abd":
        nifti(folder / _FOLDER / "labelsTr" / f"{name}.nii", label)
    nifti(folder / _FOLDER / "imagesTs" / "c.nii", 7)


def dataset_jsons() -> tuple[Target, ...]:
    """`dataset.json` of the Decathlon and of nnU-Net, versions 1 and 2."""
    seeds = tuple(json.dumps(document).encode() for document in DOCUMENTS)
    values: dict[str, Any] = {"file": f"{_FOLDER}/dataset.json", "given": _FOLDER, "prepare": put_volumes, "read": open_dataset}
    words = (b'"../', b'"/etc/passwd"', b"NaN", b"null", b"[[[[[[", b'"ignore"', b'"\\ud800"', b'"\\u0000"', b"1e400")
    return (_target("dataset.json", seeds, change=json_changed, dictionary=words, **values),)


# Plans and models.


# Of so many good plans one is written and read again, which takes the time of ten that are only read; and how many there were.
_PLANS_A_COPY, _GOOD_PLANS = 8, itertools.count()


def put_plan(path: Path) -> None:
    """A plan is read, and some are read again as they are written."""
    plan = read_plan(path)
    if next(_GOOD_PLANS) % _PLANS_A_COPY == 0:
        assert Plan(**yaml.load(dump_yaml(plan), SAFE_LOADER)) == plan


def _plan(**changes: Any) -> Plan:
    # The fewest tensors that a network with every kind of them can have.
    network = NetworkConfig(widths=(2, 4), strides=((1, 1), (2, 2)), kernels=((3, 3),) * 2, convolutions=1)
    return small_plan(**{"network": network, "patch_vox": (8, 8), "augment": AugmentConfig(), "reasons": {"batch": "it fits"}} | changes)


SHORT_PLAN = {
    "dims": 2,
    "channels": 1,
    "classes": list(_CLASSES),
    "spacing_mm": [1, 1],
    "patch_vox": [8, 8],
    "batch": 2,
    "steps": 9,
    "network": {"name": "unet", "widths": [4, 8]},
}


def plans() -> tuple[Target, ...]:
    """`plan.yaml`."""
    seeds = (dump_yaml(_plan()).encode(), yaml.safe_dump(SHORT_PLAN).encode())
    words = (b"&a ", b"*a", b"<<: ", b"!!python/name:os ", b".nan", b".inf", b"1e999", b"unet3d", b"sgd")
    return (_target("plan.yaml", seeds, file="case-x.yaml", change=yaml_changed, dictionary=words, read=put_plan),)


def read_bundle(path: Path) -> None:
    """The description, the samples, the network with its weights, and what `microtome model` shows."""
    bundle = load_bundle(path)
    assert all("\n" not in words for row in card_rows(card(bundle)) for words in row)
    if bundle.samples is not None:
        list(bundle.samples.calibration)
    try:
        restore(bundle)
    finally:
        dict(bundle.weights)


def read_foreign(path: Path) -> None:
    """Weights of another program, by our names of them, and into a network of ours. What is no safetensors goes to another process."""
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] != b"{" or int.from_bytes(start[:8], "little") > path.stat().st_size:
            raise DataError(path, expected=EXPECTED, got="what another process reads", do="", code="D232")
    weights = in_our_names(read_weights(path))
    begin_with(_state().network, weights)
    save_weights(path.with_name("kept"), weights)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and what follows."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def bundle_changed(data: bytes, rng: random.Random) -> bytes:
    """Another description of a bundle, mostly with the hash that it deserves, or another header of its file."""
    header, rest = _split(data)
    if rng.random() < 0.25:
        return _joined(tree_changed(header, rng), rest)
    document = tree_changed(json.loads(header["__metadata__"]["microtome"]), rng)
    if isinstance(document, dict) and "hash" in document and rng.random() < 0.8:
        document.pop("hash")
        document["hash"] = hashlib.blake2b(_json(document).encode(), digest_size=16).hexdigest()
    header["__metadata__"]["microtome"] = json.dumps(document)
    return _joined(header, rest)


def _json(document: Any) -> str:
    try:
        return json.dumps(document, sort_keys=True)
    except RecursionError:
        return ""


@cache
def _bundle() -> bytes:
    """A small bundle with samples."""
    with tempfile.TemporaryDirectory() as folder:
        run = small_bundle(Path(folder), dims=2, sizes=_plan().network)
        return (run / "model" / "model.safetensors").read_bytes()


def bundles() -> tuple[Target, ...]:
    """`model.safetensors`: the header, the description in it, and tensors."""
    words = (b'"F32"', b'"F8_E4M3"', b'"BF16"', b'"I64"', b'"data_offsets"', b'"shape":[', b"\xff" * 8, b"__metadata__", b'\\"hash\\"')
    values: dict[str, Any] = {"file": f"{_FOLDER}/model.safetensors", "given": _FOLDER, "read": read_bundle}
    return (_target("model bundle", (_bundle(),), change=bundle_changed, dictionary=words, **values),)


def foreign_weights() -> tuple[Target, ...]:
    """Weights in safetensors, as other programs and `microtome import` write them, by names of ours and of nnU-Net."""
    own = {name: np.asarray(array) for name, array in arrays_of(_state().network.state_dict()).items()}
    names = ("encoder.stages.0.0.convs.0.conv.weight", "encoder.stages.0.0.convs.0.norm.bias", "decoder.seg_layers.0.bias")
    theirs = {name: np.ones((2, 1, 3, 3)[: 4 if name.endswith("conv.weight") else 1], np.float16) for name in names}
    noted = {"found": json.dumps({"names": list(own)[::-1], "source": "a.pth", "hash": "0" * 32})}
    words = (
        b'"F16"',
        b'"BF16"',
        b'"F8_E4M3"',
        b'"I64"',
        b'"BOOL"',
        b'"data_offsets"',
        b'"shape":[',
        b"\xff" * 8,
        b"__metadata__",
        b'"names"',
    )
    return (
        _target(
            "foreign weights",
            (save(own, metadata=noted), save(theirs | own)),
            file="case-x.safetensors",
            change=foreign_changed,
            dictionary=words,
            read=read_foreign,
        ),
    )


def foreign_changed(data: bytes, rng: random.Random) -> bytes:
    """Another header, or another list of names in it."""
    header, rest = _split(data)
    if "__metadata__" not in header or rng.random() < 0.6:
        return _joined(tree_changed(header, rng), rest)
    header["__metadata__"]["found"] = json.dumps(tree_changed(json.loads(header["__metadata__"]["found"]), rng))
    return _joined(header, rest)


@cache
def _state() -> TrainState:
    plan = _plan()
    torch.manual_seed(0)
    network = build(plan.network.name, dims=2, in_channels=1, classes=2, config=plan.network)
    return new_state(network, plan)


def _checkpoint() -> bytes:
    state = _state()
    for parameter in state.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimiser.step()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last.safetensors", state)
        return (Path(folder) / "last.safetensors").read_bytes()


def read_checkpoint(path: Path) -> None:
    """Into a state that is there."""
    load_checkpoint(path, _state())


def checkpoint_changed(data: bytes, rng: random.Random) -> bytes:
    """Another description of a checkpoint, held to no hash as those of the first version, or another header of its file."""
    header, rest = _split(data)
    if rng.random() < 0.4:
        return _joined(tree_changed(header, rng), rest)
    document = json.loads(header["__metadata__"]["microtome"])
    document.pop("hash", None)
    header["__metadata__"]["microtome"] = json.dumps(tree_changed(document, rng))
    return _joined(header, rest)


def checkpoints() -> tuple[Target, ...]:
    """Checkpoints: header, description, tensors."""
    words = (b'"F32"', b'"F16"', b'"I64"', b"network/", b"optimiser/", b"average/", b'"data_offsets"', b"\xff" * 8)
    return (
        _target(
            "checkpoint", (_checkpoint(),), file="case-x.safetensors", change=checkpoint_changed, dictionary=words, read=read_checkpoint
        ),
    )


# Runs.


def _legend() -> Legend:
    return Legend(names=_CLASSES, values=((0,), (1,)))


def listings() -> tuple[Target, ...]:
    """`predictions.json`."""
    with tempfile.TemporaryDirectory() as folder:
        entries = {"a.png": Entry(case="a", image="images/a.png"), "b/c.png": Entry(case="c", image="images/c.png")}
        write_listing(Path(folder), Listing(legend=_legend(), entries=entries, writing=frozenset({"d"})))
        seed = (Path(folder) / "predictions.json").read_bytes()
    values: dict[str, Any] = {"file": f"{_FOLDER}/predictions.json", "given": _FOLDER, "read": read_listing}
    return (_target("run folder", (seed,), change=json_changed, dictionary=(b'"../', b'"/etc/', b"NaN", b"[[["), **values),)


LOG = "\n".join(
    json.dumps(line)
    for line in (
        {"event": "schedule", "steps": 6, "seconds": 0.5},
        {"event": "step", "step": 1, "loss": 1.5, "learning_rate": 0.01, "samples_per_second": 3.0, "seconds": 1},
        {"event": "validation", "step": 2, "dice": 0.5, "classes": {"background": 0.9, "cell": 0.5}, "seconds": 2},
        {"event": "step", "step": 6, "loss": 0.5, "learning_rate": 0.001, "samples_per_second": 3.0, "seconds": 5},
        {"event": "end", "reason": "all steps are done", "step": 6, "seconds": 9},
    )
)


def run_files() -> dict[str, Any]:
    """The JSON files of a run that validated one picture."""
    truth, prediction = np.eye(4, dtype=np.int16), np.fliplr(np.eye(4, dtype=np.int16)).copy()
    legend = _legend()
    finding = {"severity": "warning", "code": "assumed", "case": "", "message": "something", "files": []}
    return {
        "dataset.json": {
            "root": "nowhere",
            "layout": "pairs",
            "legend": legend.to_json(),
            "train": ["a"],
            "validation": ["b"],
            "findings": [finding],
        },
        "environment.json": {"python": "3.11.9", "device": "cpu", "threads": 2, "started": "2026-03-04T05:06:07+00:00"},
        "filled.json": {
            "annotated": "3 of 9 planes",
            "sections": [{"title": "plane z4", "width": 4, "height": 4, "panels": ["data:image/png;base64,AAAA", ""]}],
            "shares": [["cell", "12 %", "11.5 %"]],
        },
        "metrics.json": summarise(score_case(truth, prediction, (1.0, 1.0), legend, case="b"), legend),
    }


def put_run(folder: Path) -> None:
    """A small run that is complete; its data were moved away."""
    run = folder / _FOLDER
    run.mkdir(exist_ok=True)
    (run / "plan.yaml").write_text(yaml.safe_dump(SHORT_PLAN))
    for name, document in run_files().items():
        write_json(run / name, document)
    (run / "log.jsonl").write_text(LOG)
    png(run / "validation" / "b.png", np.eye(4))
    write_listing(run / "validation", Listing(legend=_legend(), entries={"b.png": Entry(case="b", image="images/b.png")}))


# Of so many runs one is made a page of, which takes the time of four that are only read; in a soak, tools.soak makes it many. And how
# many there were.
_RUNS_A_PAGE, _RUNS = int(os.environ.get("RUNS_A_PAGE", "1")), itertools.count()


def read_report(folder: Path) -> None:
    """What is read of a run, and the page of it; of some alone in a soak: much of what is read is alike."""
    if next(_RUNS) % _RUNS_A_PAGE == 0:
        build_report(folder)
    else:
        read_run(folder)


def read_comparison(folder: Path) -> None:
    """The table of this run beside one that failed early."""
    compare_runs([Outcome(network="unet", folder=folder), Outcome(network="vnet", folder=folder / "none", failure="it stopped")])


def lines_changed(data: bytes, rng: random.Random) -> bytes:
    """A line of a log, changed."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_changed(lines[at], rng)
    return b"\n".join(lines)


def runs() -> tuple[Target, ...]:
    """What `report` and `compare` read of a run."""
    files = {name: json.dumps(document).encode() for name, document in run_files().items()}
    files["validation/predictions.json"] = json.dumps(
        {"legend": _legend().to_json(), "cases": {"b.png": {"case": "b", "input": "images/b.png"}}}
    ).encode()
    targets = [_run_file(name, seed, json_changed, read_report) for name, seed in files.items()]
    targets.append(_run_file("log.jsonl", LOG.encode(), lines_changed, read_report))
    return (*targets, *(_run_file(name, files[name], json_changed, read_comparison) for name in ("metrics.json", "dataset.json")))


def comparisons() -> tuple[Target, ...]:
    """`compare.json`, as `compare --resume` reads it."""
    asked = {"data": "cells", "minutes": 2.0, "steps": None, "fold": None, "seed": 4, "networks": ["unet", "vnet"]}
    rows = [{"network": "unet", "peak_bytes": 10**9, "dice": {"mean": 0.5}}, {"network": "vnet", "peak_bytes": None}]
    seed = json.dumps({"asked": asked, "rows": rows, "environment": {"python": "3.11.9"}}).encode()
    return (
        _target("run folder", (seed,), file="case-x/compare.json", change=json_changed, dictionary=(b"NaN", b"[[["), read=asked_before),
    )


def _run_file(name: str, seed: bytes, change: Any, read: Any) -> Target:
    values: dict[str, Any] = {"file": f"{_FOLDER}/{name}", "given": _FOLDER, "prepare": put_run}
    return _target("run folder", (seed,), change=change, read=read, dictionary=(b"NaN", b"null", b"[[[", b"1e999"), **values)
