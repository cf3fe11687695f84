"""A trained model on disk: `model.safetensors` (weights and all that describes them) and `model.json` (the same for people).

No pickle anywhere, and no torch: what predicts with another engine does not load it. The safetensors file alone is complete,
so that it can be replaced in one rename; `model.json` is a readable copy of its header, of which nothing is taken: that somebody
edited it, to no effect, is said when the model is loaded.

    header    schema, the microtome that it needs, plan, legend, provenance, sizes, a hash of each group of tensors; and a hash of
              all that, the bundle's identity
    weights   the network's parameters and buffers, by their names            -- read, and held to their hash, when touched
    sample:golden.*        an input, and what the float32 network answers     -- read at once: an engine is held to it
    sample:calibration.*   inputs to choose an int8 network's scales by       -- read when touched
"""

import hashlib
import json
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microtome.bundle_form import NEEDS, SCHEMA, parse_form, read_document, temperature_of
from microtome.config import Plan
from microtome.data.legend import Legend
from microtome.errors import DataError, DataWarning
from microtome.files import atomic_path, write_json
from microtome.geometry import Sizes
from microtome.json_files import parse_json, read_limited

FILE = "model.safetensors"
COPY = "model.json"
CHANGED, OF_ANOTHER = "changed since it was written", "of another model than the weights"
INCOMPLETE = "not complete: its writing was broken off"
# Real ones have 20 to 200 kB.
MOST_HEADER_BYTES = 16_000_000

# No parameter's name holds a colon.
SAMPLE = "sample:"
GOLDEN_IMAGE, GOLDEN_LOGITS, CALIBRATION = f"{SAMPLE}golden.image", f"{SAMPLE}golden.logits", f"{SAMPLE}calibration."
GROUPS = ("weights", "golden", "calibration")

Arrays = Mapping[str, np.ndarray]


class Samples(NamedTuple):
    """What other engines are checked against, and fitted with.

    Attributes:
        golden_CS: (C, *S) float32, a network input whose values are exact in float16.
        logits_KS: (K, *S') float32, what torch's float32 network answers to it; S' is S less the network's border.
        calibration: network inputs, (C, *S) float16 each.
    """

    golden_CS: np.ndarray  # noqa: N815 - the suffix names the axes
    logits_KS: np.ndarray  # noqa: N815
    calibration: Sequence[np.ndarray] = ()


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A trained model as read from disk.

    Attributes:
        plan: the plan that it was trained with.
        legend: what the classes are called and how they stand in files.
        weights: name -> array; one that was loaded is read from the file when it is first touched, all of it at once.
        samples: inputs and answers of the trained network; None before the end of its training, and in bundles of schema 1.
        sizes: the image sizes that the network takes; None in bundles of schema 1.
        context_vox: border that its output lacks on each side of each axis; None in bundles of schema 1.
        temperature: that logits are divided by before they become probabilities (`evaluation.calibration`); 1.0 where it was not
            fitted, as in bundles that do not name it. Labels do not depend on it.
        provenance: where it comes from (versions, data, score), for people.
        folder: where it lies; None until it is saved.
        hash: of all of it but the folder; empty until it is saved.
    """

    plan: Plan
    legend: Legend
    weights: Arrays = field(repr=False)
    samples: Samples | None = field(default=None, repr=False)
    sizes: Sizes | None = None
    context_vox: int | None = None
    temperature: float = 1.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    hash: str = ""


def save_bundle(folder: Path, bundle: Bundle) -> Bundle:
    """Write a bundle into `folder`, replacing the one that is there in one step; returns it with its folder and its hash."""
    # Not `ascontiguousarray`: it makes a vector of a number.
    arrays = {name: np.asarray(array, order="C") for name, array in (*bundle.weights.items(), *_sample_arrays(bundle.samples).items())}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "needs": NEEDS,
        "plan": bundle.plan.model_dump(mode="json"),
        "legend": bundle.legend.to_json(),
        "provenance": dict(bundle.provenance),
        "sizes": asdict(bundle.sizes) if bundle.sizes else None,
        "context_vox": bundle.context_vox,
        "temperature": bundle.temperature,
        "tensors": {group: _hash({name: arrays[name] for name in arrays if _group(name) == group}) for group in GROUPS},
    }
    document["hash"] = _hash({}, document)
    # Not `save_file`: it renames a private file of its own over `part`, and hides a full disk from `atomic_path`.
    content = save(arrays, metadata={"microtome": json.dumps(document)})
    with atomic_path(folder / FILE, len(content)) as part:
        part.write_bytes(content)
    write_json(folder / COPY, document)
    return replace(bundle, folder=folder, hash=document["hash"])


def load_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`: a run folder, its `model/`, or the .safetensors file itself.

    Its description is read and checked now, its weights and calibration samples when they are touched, from the file that
    was there now. What touches them may raise the same DataError. Where the copy for people was changed a DataWarning says so.

    Raises:
        DataError: no bundle there, not readable, changed since it was written, or written by a newer version.
    """
    path = _find(Path(folder))
    bundle = _loaded(path)
    if fault_of_copy(bundle) == CHANGED:
        # A copy of another model is no fault of anybody: a kill between the two files leaves it.
        copy = path.with_name(COPY)
        warnings.warn(DataWarning(f"{copy}: {CHANGED}, to no effect: what counts is {path.name}"), stacklevel=2)
    return bundle


def fault_of_copy(bundle: Bundle) -> str:
    """What is wrong with `model.json` beside a bundle that was loaded: CHANGED or OF_ANOTHER.

    Returns:
        "" where it says what the weights' file says, by the hash of both, and where there is none.
    """
    path = (bundle.folder or Path()) / COPY
    if not path.is_file():
        return ""
    try:
        document = parse_json(read_limited(path, MOST_HEADER_BYTES))
        recorded = document.pop("hash", None)
        if "weights_hash" in document:
            # Of the first bundles of all, whose description nothing held.
            return "" if document["weights_hash"] == bundle.hash else OF_ANOTHER
        arrays = bundle.weights if document["schema"] == 1 else {}
        found = _hash(arrays, document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return CHANGED
    if recorded != found:
        return CHANGED
    return "" if recorded == bundle.hash else OF_ANOTHER


def check_weights(bundle: Bundle) -> None:
    """Hold the weights of a bundle that was loaded to their hash, a tensor at a time: for whoever does not touch them.

    Raises:
        DataError: they were changed since they were written.
    """
    if isinstance(bundle.weights, _Group):
        bundle.weights.check()


def _loaded(path: Path) -> Bundle:
    """The bundle in a weights file."""
    tensors = _Tensors(path)
    header = tensors.read(lambda file: (file.metadata() or {}).get("microtome"))
    if header is None:
        raise DataError(
            path,
            expected="a bundle written by microtome",
            got=f"weights without a description ({len(tensors.names)} tensors)",
            do="use a run folder of `microtome train`",
            code="D052",
        )
    document = read_document(path, header)
    recorded = document.pop("hash", "")
    if document["schema"] == 1:
        arrays = tensors.arrays(tensors.names)
        if "weights_hash" in document:
            # The first bundles of all, whose description nothing held.
            recorded = document.pop("weights_hash")
            _check(path, _hash(arrays), recorded)
        else:
            _check(path, _hash(arrays, document), recorded)
        form = parse_form(path, document)
        return Bundle(
            plan=form.plan, legend=form.as_legend(), weights=arrays, provenance=form.provenance, folder=path.parent, hash=recorded
        )
    _check(path, _hash({}, document), recorded)
    form = parse_form(path, document)
    groups = {group: _Group(tensors, group, form.tensors.get(group, "")) for group in GROUPS}
    return Bundle(
        plan=form.plan,
        legend=form.as_legend(),
        weights=groups["weights"],
        samples=_samples(groups["golden"], groups["calibration"], form.plan),
        sizes=Sizes(form.sizes.minimum, form.sizes.step) if form.sizes else None,
        context_vox=form.context_vox,
        temperature=temperature_of(path, document.get("temperature", 1.0)),
        provenance=form.provenance,
        folder=path.parent,
        hash=recorded,
    )


class _Tensors:
    """The tensors in a safetensors file; it stays the same file where another is put in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._readable(lambda: _check_header(path))
        self.file = self._readable(lambda: safe_open(path, framework="np"))
        self.names = tuple(self.read(lambda file: file.keys()))

    def read(self, what: Callable[[Any], Any]) -> Any:
        """What a function reads from the open file."""
        return self._readable(lambda: what(self.file))

    def arrays(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The tensors of these names, read."""
        found: dict[str, np.ndarray] = self.read(lambda file: {name: file.get_tensor(name) for name in names})
        return found

    def _readable(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (SafetensorError, OSError, TypeError) as error:
            # TypeError: damage made a type of numbers of it that NumPy does not have.
            got = f"an unreadable file ({error})"
            raise DataError(self.path, expected="a model bundle", got=got, do="train again or copy it again", code="D054") from None


class _Group(Mapping[str, np.ndarray]):
    """The tensors of one group, read and held to their hash when the first of them is touched."""

    def __init__(self, tensors: _Tensors, group: str, recorded: str) -> None:
        self.tensors, self.recorded, self.checked = tensors, recorded, False
        self.names = tuple(sorted(name for name in tensors.names if _group(name) == group))

    @cached_property
    def arrays(self) -> Arrays:
        """All of them."""
        arrays = self.tensors.arrays(self.names)
        # Though `check` may have held them to it: the file may have been changed since.
        _check(self.tensors.path, _hash(arrays), self.recorded)
        self.checked = True
        return arrays

    def check(self) -> None:
        """Hold them to their hash, once, and keep none."""
        if not self.checked:
            _check(self.tensors.path, _hash_of((name, self.tensors.arrays((name,))[name]) for name in self.names), self.recorded)
        self.checked = True

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Patches(Sequence[np.ndarray]):
    """The calibration patches in their order."""

    def __init__(self, group: _Group) -> None:
        self.group = group

    def __getitem__(self, index: Any) -> Any:
        names = self.group.names[index]
        return tuple(self.group[name] for name in names) if isinstance(index, slice) else self.group[names]

    def __len__(self) -> int:
        return len(self.group)


def _check_header(path: Path) -> None:
    """Refuse a header that nobody writes, before it is read; the length stands in the first eight bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and struct.unpack("<Q", start)[0] > MOST_HEADER_BYTES:
        got, do = f"an unreadable file (a header of {struct.unpack('<Q', start)[0]} bytes)", "train again or copy it again"
        raise DataError(path, expected="a model bundle", got=got, do=do, code="D054")


def _samples(golden: _Group, calibration: _Group, plan: Plan) -> Samples | None:
    """The samples of a bundle, if it has any."""
    if not golden:
        # Nothing is there, and nothing may be: an empty group has a hash too.
        _check(golden.tensors.path, _hash(golden.arrays), golden.recorded)
        return None
    shapes = {name: (array.dtype.kind, array.ndim, len(array) if array.ndim else 0) for name, array in golden.items()}
    wanted = {GOLDEN_IMAGE: ("f", plan.dims + 1, plan.channels), GOLDEN_LOGITS: ("f", plan.dims + 1, len(plan.classes))}
    if shapes != wanted or not all(np.isfinite(array).all() and array.size for array in golden.values()):
        expected = f"a golden input of {plan.channels} channels and logits of {len(plan.classes)} classes, finite"
        got = f"{', '.join(f'{name} {golden[name].dtype} {golden[name].shape}' for name in golden)}"[:300]
        raise DataError(golden.tensors.path, expected=expected, got=got, do="use the microtome that wrote it", code="D200")
    return Samples(golden[GOLDEN_IMAGE].astype(np.float32), golden[GOLDEN_LOGITS].astype(np.float32), _Patches(calibration))


def _sample_arrays(samples: Samples | None) -> dict[str, np.ndarray]:
    """The tensors that hold samples, by name."""
    if samples is None:
        return {}
    image = samples.golden_CS.astype(np.float16)
    assert np.array_equal(image.astype(np.float32), samples.golden_CS), "a golden input is exact in float16"
    patches = {f"{CALIBRATION}{number:02d}": patch.astype(np.float16) for number, patch in enumerate(samples.calibration)}
    return {GOLDEN_IMAGE: image, GOLDEN_LOGITS: samples.logits_KS.astype(np.float32), **patches}


def _group(name: str) -> str:
    """The group that a tensor belongs to."""
    if name.startswith(CALIBRATION):
        return "calibration"
    return "golden" if name.startswith(SAMPLE) else "weights"


def _find(folder: Path) -> Path:
    """The weights file that a path means."""
    candidates = [folder, folder / FILE, folder / "model" / FILE]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    what = "an interrupted run without a model yet" if (folder / "plan.yaml").exists() else "no model"
    raise DataError(
        folder, expected="a run folder with model/model.safetensors", got=what, do="give the --out folder of `microtome train`", code="D051"
    )


def _check(path: Path, found: str, recorded: object) -> None:
    """Refuse content that is not what was written."""
    if found != recorded:
        raise DataError(
            path, expected=f"content with hash {str(recorded)[:64]}", got=found, do="copy it again: the file was damaged", code="D054"
        )


def _hash(arrays: Arrays, document: Mapping[str, Any] | None = None) -> str:
    """A hash of a description, if there is one, and of names, types, shapes and bytes of arrays."""
    return _hash_of(((name, arrays[name]) for name in sorted(arrays)), document)


def _hash_of(arrays: Iterable[tuple[str, np.ndarray]], document: Mapping[str, Any] | None = None) -> str:
    """`_hash` of arrays that come one at a time, in the order of their names."""
    digest = hashlib.blake2b(b"" if document is None else json.dumps(document, sort_keys=True).encode(), digest_size=16)
    for name, each in arrays:
        array = np.asarray(each, order="C")
        # Types in torch's words, by which schema 1 was written.
        digest.update(f"{name} torch.{array.dtype} {array.shape};".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
