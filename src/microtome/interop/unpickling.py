"""Reads one foreign checkpoint in a process of its own, which may do little and ends after it: `python -m microtome.interop.unpickling`.

The only place of the package that takes a pickle apart. `torch.load(weights_only=True)` builds tensors and containers and calls nothing
else, but it is no security boundary by itself: it was escaped (CVE-2025-32434), and the code in C++ below it trusts numbers in the
file. So it runs here, on a file that somebody else opened, without an environment, under limits of memory, time and size, and with a hook
that refuses files to write, processes and connections. What comes back is a safetensors file, which is bytes and no code.

    stdin    the checkpoint
    stdout   the safetensors file; its metadata hold `found`: place, names in order, what was left out
    stderr   where it is refused (exit code REFUSED): {"got": ..., "do": ...} in the last line
"""

import errno
import io
import json
import os
import pickle
import resource
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from safetensors.numpy import save

REFUSED = 3
# Where programs put the weights of a network, beside the rest of a checkpoint.
WRAPPERS = ("state_dict", "model_state_dict", "network_weights", "model_state", "weights", "model", "net", "network")
# Of DataParallel, torch.compile, and classes that hold the network.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
MOST_NAMES, MOST_LEVELS = 100_000, 8
# Beyond what the file itself needs: for torch's own work, and a processor that does something else too.
SPARE_BYTES, SPARE_SECONDS = 1 << 30, 30
BYTES_A_SECOND = 20_000_000
# What an import does is allowed.
HARMLESS = frozenset({"os.listdir", "os.scandir"})
FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "tempfile.", "urllib.", "pickle.", "marshal.dump")


class RefusedError(Exception):
    """What the checkpoint is instead, and what to do."""

    def __init__(self, got: str, do: str) -> None:
        super().__init__(got)
        self.got, self.do = got, do


def main() -> int:
    """Convert the checkpoint on standard input."""
    # Opened before files to write are refused.
    target = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not come among the bytes.
    os.dup2(2, 1)
    torch.set_num_threads(1)
    file = os.fdopen(0, "rb")
    _warm_up()
    _limit(os.fstat(0).st_size)
    sys.addaudithook(_refuse)
    try:
        target.write(_converted(file))
        target.close()
    except RefusedError as refused:
        return _say(refused.got, refused.do)
    except MemoryError:
        return _say("tensors that are larger than the file", "ask for the weights in another form")
    except pickle.UnpicklingError as error:
        return _say(_objects(str(error)), "where it was made, save only the weights: torch.save(model.state_dict(), ...)")
    except Exception as error:  # noqa: BLE001 - a stranger's bytes raise anything, and all of it means the same
        words = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _say("one that the disk of temporary files has no room for", "free space there, or set TMPDIR to a folder on another")
        if "memory" in words or "alloc" in words:
            return _say("tensors that are larger than the file", "ask for the weights in another form")
        return _say(f"what torch cannot read ({type(error).__name__}: {words[:150]})", "copy it again, or save it with a newer torch")
    return 0


def _say(got: str, do: str) -> int:
    sys.stderr.write("\n" + json.dumps({"got": got[:300], "do": do}) + "\n")
    return REFUSED


def _warm_up() -> None:
    """Load something, so that what torch imports when it first does is there before imports are watched."""
    for zipped in (True, False):
        memory = io.BytesIO()
        torch.save({"a": torch.zeros(1)}, memory, _use_new_zipfile_serialization=zipped)
        memory.seek(0)
        torch.load(memory, map_location="cpu", weights_only=True)
    save({"a": np.zeros(1)})


def _limit(size: int) -> None:
    """Let this process take what a file of so many bytes may need, and no more.

    New processes and threads the kernel refuses as well, but to root, who may always have more: there the audit hook alone does.
    """
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115 - this process ends soon
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        # The tensors, their copy in the file that is written, and its bytes.
        resource.RLIMIT_AS: pages * resource.getpagesize() + 4 * size + SPARE_BYTES,
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + SPARE_SECONDS + size // BYTES_A_SECOND,
        # bfloat16 becomes float32.
        resource.RLIMIT_FSIZE: 2 * size + (1 << 24),
        resource.RLIMIT_CORE: 0,
    }
    if hasattr(resource, "RLIMIT_NPROC"):
        limits[resource.RLIMIT_NPROC] = 0
    for which, most in limits.items():
        _, hard = resource.getrlimit(which)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def _refuse(event: str, values: tuple[Any, ...]) -> None:
    """An audit hook: nothing is written but what is open already, nothing is started, nobody is called."""
    writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        raise PermissionError(f"{event} while a checkpoint is read")


def _converted(file: IO[bytes]) -> bytes:
    """The weights in a checkpoint as the bytes of a safetensors file."""
    _check_zip(file)
    with torch.serialization.safe_globals(_numbers()):
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    weights, place, left_out = _weights_of(loaded)
    tensors = dict(_flat(weights, ""))
    if not tensors:
        raise RefusedError("no tensor in it", "give the file that holds the weights")
    names = _without_prefixes(list(tensors))
    arrays: dict[str, np.ndarray] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in zip(names, tensors.values(), strict=True):
        where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and where in seen:
            continue
        seen.add(where)
        arrays[name] = _array(name, tensor)
    found = {"place": ".".join(place), "names": list(arrays), "left_out": left_out, "shared": len(tensors) - len(arrays)}
    return bytes(save(arrays, metadata={"found": json.dumps(found)}))


def _numbers() -> list[Any]:
    """What numbers of NumPy are pickled with, under the names of all its versions: nnU-Net keeps some beside its weights."""
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
    kinds = {type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")}
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]


def _check_zip(file: IO[bytes]) -> None:
    """Refuse a zip file whose members are more than the file: torch compresses none."""
    if zipfile.is_zipfile(file):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        size = os.fstat(file.fileno()).st_size
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(each.file_size for each in members) > size:
            raise RefusedError("a zip file with compressed members, which torch does not write", "save it again with torch.save")
    file.seek(0)


def _weights_of(loaded: Any) -> tuple[Mapping[Any, Any], list[str], list[str]]:
    """The entry of a checkpoint that holds the weights, where it stands, and what stands beside it."""
    place: list[str] = []
    left_out: list[str] = []
    while isinstance(loaded, Mapping):
        name = next((each for each in WRAPPERS if isinstance(loaded.get(each), Mapping)), None)
        if name is None:
            return loaded, place, left_out
        if len(place) == MOST_LEVELS:
            raise RefusedError("dictionaries in dictionaries without end", "save only the weights")
        place.append(name)
        left_out += [str(key)[:100] for key in list(loaded)[:100] if key != name]
        loaded = loaded[name]
    raise RefusedError(f"a {type(loaded).__name__} instead of named tensors", "save the state dict: torch.save(model.state_dict(), ...)")


def _flat(values: Mapping[Any, Any], before: str, level: int = 0, count: list[int] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in dictionaries in dictionaries, by the names that lead to them."""
    count = [0] if count is None else count
    if level > MOST_LEVELS:
        raise RefusedError("dictionaries in dictionaries without end", "save only the weights")
    for key, value in values.items():
        name = f"{before}{key}"
        count[0] += 1
        if count[0] > MOST_NAMES or len(name) > 1000:
            raise RefusedError(f"more than {MOST_NAMES} names, or one without end", "save only the weights")
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{name}.", level + 1, count)
        else:
            raise RefusedError(
                f"a {type(value).__name__} named `{name[:100]}` among the weights", "save only tensors: torch.save(model.state_dict(), ...)"
            )


def _without_prefixes(names: list[str]) -> list[str]:
    """Names without what wrappers of networks put before all of them."""
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
    return names


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16, which NumPy has not, as float32."""
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_complex() or tensor.device.type != "cpu":
        raise RefusedError(f"`{name[:100]}`, a tensor of type {tensor.dtype} ({tensor.layout}, {tensor.device})", "save plain numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise RefusedError(f"`{name[:100]}`, a tensor of {list(tensor.shape)} that holds fewer numbers", "save it with .contiguous()")
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _objects(error: str) -> str:
    """What a checkpoint holds beside tensors, from torch's words."""
    _, found, rest = error.partition("GLOBAL ")
    name = rest.split()[0] if found and rest.split() else ""
    return f"a pickled object ({name[:100]})" if name else f"no checkpoint ({' '.join(error.split())[:150]})"


if __name__ == "__main__":
    sys.exit(main())
