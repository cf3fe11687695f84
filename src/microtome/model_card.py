"""What a trained model is, for whoever finds one: network, classes, what it learned from, and whether all of it is as it was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microtome.bundle import Bundle, fault_of_copy, load_bundle
from microtome.errors import DataError, in_one_line
from microtome.geometry import format_shape
from microtome.words import listed

VERSIONS = ("microtome", "torch", "numpy", "scipy", "python")


def card(bundle: Bundle) -> dict[str, Any]:
    """All that is worth knowing of a model that was loaded; every byte of it is read, and held to its hash.

    Raises:
        DataError: something of it was changed since it was written.
    """
    plan, weights = bundle.plan, dict(bundle.weights)
    if bundle.samples is not None:
        list(bundle.samples.calibration)
    return {
        "folder": str(bundle.folder),
        "hash": bundle.hash,
        "network": plan.network.name,
        "dims": plan.dims,
        "channels": plan.channels,
        "classes": {name: list(values) for name, values in zip(bundle.legend.names, bundle.legend.values, strict=True)},
        "background": None if bundle.legend.background is None else bundle.legend.names[bundle.legend.background],
        "patch_vox": list(plan.patch_vox),
        "spacing_mm": list(plan.spacing_mm),
        "tensors": len(weights),
        "numbers": sum(array.size for array in weights.values()),
        "bytes": sum(array.nbytes for array in weights.values()),
        "samples": bundle.samples is not None,
        "temperature": bundle.temperature,
        "provenance": dict(bundle.provenance),
        "copy_for_people": fault_of_copy(bundle),
    }


def card_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A card in words, a row a fact; what the model does not say is left out."""
    # Of images whose files say none it is 1 in the plan, and no millimetre.
    known = found["provenance"].get("spacing_known") is not False
    spacing = f" of {' × '.join(f'{each:g}' for each in found['spacing_mm'])} mm" if known else ""
    channels = "1 channel" if found["channels"] == 1 else f"{found['channels']} channels"
    rows = [
        ("network", f"{found['dims']}D {found['network']}, {channels}, {found['numbers']:,} numbers in {found['tensors']} tensors"),
        ("classes", listed((f"{name} ({', '.join(map(str, values))})" for name, values in found["classes"].items()), "classes")),
        ("patch", f"{format_shape(found['patch_vox'])} voxels{spacing}"),
        *_origin(found["provenance"]),
        ("hash", f"{found['hash']}: {found['bytes']:,} bytes of weights, and the rest, are as they were written"),
        ("model.json", found["copy_for_people"] and f"{found['copy_for_people']}; nothing is read from it"),
        *(
            (name, f"{fault}; it is not used, and written anew when an engine needs it")
            for name, fault in found.get("graphs", {}).items()
            if fault
        ),
    ]
    return [(name, in_one_line(words)) for name, words in rows if words]


def origin_rows(run: Path) -> list[tuple[str, str]]:
    """Where the model of a run comes from, a row a fact; empty while there is none, or where it cannot be read."""
    try:
        return _origin(load_bundle(run).provenance)
    except DataError:
        return []


def _origin(origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a provenance says, in words; bundles of earlier forms and of other programs say less."""
    rows = [
        ("score", _score(origin)),
        ("learned from", _cases(origin, "training")),
        ("validated on", _cases(origin, "validation")),
        ("data changed", _changed(origin.get("data_changed_since"))),
        ("began with", _begun(origin.get("initial_weights"))),
        ("command", _command(origin)),
        ("date", str(origin.get("date", ""))),
        ("versions", ", ".join(f"{name} {origin[name]}" for name in VERSIONS if name in origin)),
    ]
    return [(name, words) for name, words in rows if words]


def _score(origin: Mapping[str, Any]) -> str:
    """The best validation of its training."""
    step, score = origin.get("step"), origin.get("score")
    if step is None:
        return ""
    return f"Dice {score:.4f} in the validation at step {step}" if isinstance(score, int | float) else f"none; of step {step}"


def _command(origin: Mapping[str, Any]) -> str:
    """The words that started its training; earlier bundles name the file that `python -m microtome` runs."""
    program, space, words = str(origin.get("command", "")).partition(" ")
    return ("microtome" if program == "__main__.py" else program) + space + words


def _begun(initial: object) -> str:
    """Whose weights it began its training with."""
    return f"{initial.get('words')}, hash {initial.get('hash')}" if isinstance(initial, Mapping) else ""


def _changed(before: object) -> str:
    """That a run was resumed with other files under the same names, and by which hashes those of before are known."""
    if not isinstance(before, Mapping):
        return ""
    return "since the run began: " + ", ".join(f"{part} had fingerprint {fingerprint}" for part, fingerprint in before.items())


def _cases(origin: Mapping[str, Any], part: str) -> str:
    """How many cases, where they lay, and by which hash they are known again."""
    count, data = origin.get(f"{part}_cases"), origin.get(f"{part}_data")
    if count is None:
        return ""
    cases = f"{count} {'case' if count == 1 else 'cases'} of {origin.get('data')}"
    if not isinstance(data, Mapping) or not count:
        return cases
    return f"{cases}: {data.get('files')} files of {data.get('bytes')} bytes, fingerprint {data.get('fingerprint')}"
