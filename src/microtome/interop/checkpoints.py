"""Weights of other programs -> named arrays: safetensors files read here, PyTorch checkpoints in a process of their own.

What a checkpoint is made of is a program for pickle's machine. It is never run in this process: `interop.unpickling` says what holds it.
"""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microtome.bundle import load_bundle
from microtome.errors import DataError
from microtome.files import atomic_path
from microtome.interop import nnunet, unpickling
from microtome.training.initial import Weights

# Beyond what a process that imports torch takes to start; of files a second for every so many bytes.
SECONDS = 120.0
# More says nothing: the last line is the answer.
MOST_WORDS = 100_000
MOST_HEADER_BYTES = 100_000_000
EXPECTED = "a checkpoint of PyTorch, or weights in safetensors"
DO = "copy it again, or give another file"


def read_weights(path: Path) -> Weights:
    """The weights in a file of another program, or of one of our models.

    Args:
        path: a run folder, a bundle, a .safetensors file of plain tensors, or a checkpoint (.pt, .pth, .ckpt, .bin) of PyTorch. What it
            is, is seen in its content.

    Raises:
        DataError: not there, none of these, damaged, or it holds what is no tensor.
    """
    if path.is_dir():
        return _of_bundle(path)
    try:
        # A pipe would wait for a writer for ever, and could not be read twice.
        if path.exists() and not path.is_file():
            got = f"what is no plain file ({stat.filemode(path.stat().st_mode)})"
            raise DataError(path, expected=EXPECTED, got=got, do="write it into one", code="D232")
        with path.open("rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(path, expected=EXPECTED, got=error.strerror or str(error), do="check the path", code="D232") from None
    if size == 0:
        raise DataError(path, expected=EXPECTED, got="an empty file (0 bytes)", do=DO, code="D232")
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and length <= size:
        return _of_safetensors(path, length)
    return _of_checkpoint(path, size)


def save_weights(path: Path, weights: Weights) -> None:
    """Write weights as a safetensors file that remembers their order, in one step.

    Raises:
        RunError: the disk is full.
    """
    document = json.dumps({"names": list(weights.arrays), "source": weights.source, "hash": weights.hash})
    with atomic_path(path) as part:
        part.write_bytes(save(dict(weights.arrays), metadata={"found": document}))


def in_our_names(weights: Weights) -> Weights:
    """Weights of a network that we build too, by our names of it; others as they are."""
    ours = nnunet.our_names(weights.arrays)
    arrays = {ours[name]: array for name, array in weights.arrays.items() if name in ours}
    return Weights(arrays=arrays, source=weights.source, hash=weights.hash) if arrays else weights


def _of_bundle(path: Path) -> Weights:
    """Those of one of our models."""
    bundle = load_bundle(path)
    return Weights(arrays=dict(bundle.weights), source=str(path), hash=bundle.hash)


def _of_safetensors(path: Path, header_bytes: int) -> Weights:
    """Those of a safetensors file, which is bytes and no code; in the order that its writer noted, if it did."""
    if header_bytes > MOST_HEADER_BYTES:
        raise DataError(path, expected=EXPECTED, got=f"a header of {header_bytes} bytes", do=DO, code="D232")
    try:
        # Torch's reader: NumPy has no bfloat16.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "microtome" in metadata:
                return _of_bundle(path)
            noted = json.loads(metadata.get("found", "{}"))
            # In a dictionary: a file may have a million names, and note a million others.
            names = dict.fromkeys(file.keys())
            order = [name for name in noted.get("names", []) if name in names]
            arrays = {name: _array(file.get_tensor(name)) for name in dict.fromkeys((*order, *names))}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        got = f"an unreadable file ({' '.join(str(error).split())[:200]})"
        raise DataError(path, expected=EXPECTED, got=got, do=DO, code="D232") from None
    if not arrays:
        raise DataError(path, expected=EXPECTED, got=f"{header_bytes} bytes that name no tensor", do=DO, code="D232")
    return Weights(arrays=arrays, source=str(path), hash=_hash(path))


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16, which NumPy has not, as float32.

    Raises:
        TypeError: numbers of 8 bits or fewer, of a kind that NumPy has not either.
    """
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _of_checkpoint(path: Path, size: int) -> Weights:
    """Those of a checkpoint, converted by a process that is gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="microtome-") as folder:
        empty, target, words = Path(folder) / "empty", Path(folder) / "weights.safetensors", Path(folder) / "words"
        empty.mkdir()
        with path.open("rb") as source, target.open("wb") as out, words.open("wb") as said:
            code = _converted(source, out, said, empty, SECONDS + size / unpickling.BYTES_A_SECOND)
        if code != 0:
            refused = _refusal(code, words)
            raise DataError(path, expected=EXPECTED, got=refused["got"], do=refused["do"], code="D232")
        try:
            with safe_open(target, framework="np") as file:
                found = json.loads(file.metadata()["found"])
                # Read, not mapped: the folder goes.
                arrays = {name: np.array(file.get_tensor(name)) for name in found["names"]}
            left_out, place, shared = tuple(map(str, found["left_out"])), str(found["place"]), int(found["shared"])
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            # Nor is the reader believed that a stranger's file may have taken over.
            got = f"one that nothing whole was made of ({type(error).__name__})"
            raise DataError(path, expected=EXPECTED, got=got, do=DO, code="D232") from None
    return Weights(arrays=arrays, source=str(path), hash=_hash(path), place=place, left_out=left_out, shared=shared)


def _converted(source: Any, out: Any, said: Any, folder: Path, seconds: float) -> int | None:
    """Run the reader on open files, in an empty folder, with nothing of our environment but where code lies; None: it took too long."""
    places = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
    environment = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)}
    # Without it Python itself does not start where a cluster's modules brought it.
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    command = [sys.executable, "-P", "-m", unpickling.__name__]
    try:
        done = subprocess.run(
            command, stdin=source, stdout=out, stderr=said, cwd=folder, env=environment, timeout=seconds, check=False, close_fds=True
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def _refusal(code: int | None, words: Path) -> Mapping[str, str]:
    """What the reader says of a file that it did not convert, or what ended it."""
    if code is None:
        return {"got": "one that takes too long to read", "do": DO}
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return {"got": f"one that ended the process that read it ({names.get(-code, -code)})", "do": DO}
    with words.open("rb") as file:
        file.seek(max(0, words.stat().st_size - MOST_WORDS))
        last = file.read().decode(errors="replace").strip().rpartition("\n")[2]
    try:
        said = json.loads(last)
        return {"got": str(said["got"]), "do": str(said["do"])}
    except (ValueError, KeyError, TypeError):
        return {"got": f"one that cannot be read ({last[:200]})", "do": DO}


def _hash(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
