"""Checkpoints of other programs: what is read from them, and that a hostile one ends in one line and runs nothing."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from microtome.bundle import load_bundle
from microtome.cli import main
from microtome.errors import DataError
from microtome.interop import checkpoints, unpickling
from microtome.interop.checkpoints import read_weights, save_weights
from tests.models import saved_model

STATE = {"first.weight": torch.arange(6.0).reshape(2, 3), "first.bias": torch.tensor([0.5, -1.0]), "last.weight": torch.ones(1, 2)}


class Forks:
    """Takes the place of `checkpoints._converted`: the same reader, in forks of one process."""

    def __init__(self) -> None:
        code = [sys.executable, "-P", str(Path(__file__).with_name("reader_forks.py"))]
        self.process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.attack = ""

    def __call__(self, source: Any, out: Any, said: Any, folder: Path, seconds: float) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        words = {"files": [source.name, out.name, said.name], "folder": str(folder), "attack": self.attack}
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    with forks.process:
        assert forks.process.stdin is not None
        forks.process.stdin.close()


@pytest.fixture
def forks(server: Forks, monkeypatch: pytest.MonkeyPatch) -> Forks:
    server.attack = ""
    monkeypatch.setattr(checkpoints, "_converted", server)
    return server


def saved(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_weights(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert len(line) < 700 + len(str(path))
    return line


def same(found: Any, wanted: Any) -> bool:
    return list(found) == list(wanted) and all(np.array_equal(found[name], wanted[name].numpy()) for name in wanted)


# ---- what is read ----


@pytest.mark.usefixtures("forks")
def test_a_state_dict_comes_back_in_its_order_of_zip_and_of_legacy_files(tmp_path: Path) -> None:
    for zipped in (True, False):
        found = read_weights(saved(tmp_path / f"{zipped}.pth", OrderedDict(STATE), zipped=zipped))
        assert same(found.arrays, STATE)
        assert (found.place, found.left_out, found.shared) == ("", (), 0)
        assert len(found.hash) == 32


@pytest.mark.usefixtures("forks")
def test_the_checkpoint_of_nnunet_is_read_with_the_numbers_of_numpy_beside_its_weights(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    weights = {"module.a.conv.weight": shared, "module.a.all_modules.0.weight": shared, "module.b.bias": torch.zeros(4)}
    content = {
        "network_weights": weights,
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(4, 3)}}},
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)]},
        "_best_ema": np.float64(0.75),
        "current_epoch": 3,
    }
    found = read_weights(saved(tmp_path / "checkpoint_final.pth", content))
    assert list(found.arrays) == ["a.conv.weight", "b.bias"]
    assert np.array_equal(found.arrays["a.conv.weight"], shared.numpy())
    assert found.place == "network_weights"
    assert found.left_out == ("optimizer_state", "logging", "_best_ema", "current_epoch")
    assert found.shared == 1


@pytest.mark.usefixtures("forks")
def test_dictionaries_in_dictionaries_types_and_parts_of_tensors_become_named_arrays(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    inner = {"net.up": {"weight": whole[4:8].reshape(2, 2).T, 0: torch.tensor(3)}, "net.half": torch.tensor([1.5], dtype=torch.bfloat16)}
    found = read_weights(saved(tmp_path / "last.ckpt", {"epoch": 1, "state_dict": inner})).arrays
    assert list(found) == ["up.weight", "up.0", "half"]
    assert found["up.weight"].tolist() == [[4, 6], [5, 7]]
    assert (found["up.0"].shape, found["up.0"].dtype) == ((), np.int64)
    assert (found["half"].tolist(), found["half"].dtype) == ([1.5], np.float32)


def test_safetensors_of_others_and_our_models_are_read_without_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_converted", None)
    save_file({**STATE, "half": torch.tensor([1.5], dtype=torch.bfloat16)}, tmp_path / "weights.safetensors")
    found = read_weights(tmp_path / "weights.safetensors").arrays
    assert found.keys() == {*STATE, "half"}
    assert found["half"].tolist() == [1.5]
    bundle = saved_model(tmp_path)
    for path in (tmp_path, tmp_path / "model" / "model.safetensors"):
        weights = read_weights(path)
        assert weights.hash == load_bundle(tmp_path).hash
        assert weights.arrays.keys() == bundle.weights.keys()


@pytest.mark.usefixtures("forks")
def test_what_was_imported_is_read_again_in_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    first = read_weights(saved(tmp_path / "a.pt", {"z": torch.zeros(1), "a": torch.ones(2)}))
    save_weights(tmp_path / "a.safetensors", first)
    again = read_weights(tmp_path / "a.safetensors")
    assert list(again.arrays) == ["z", "a"]
    assert all(np.array_equal(again.arrays[name], first.arrays[name]) for name in first.arrays)


@pytest.mark.usefixtures("forks")
def test_import_shows_what_is_there_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = saved(tmp_path / "a.pth", {"model": STATE, "epoch": 7}), tmp_path / "a.safetensors"
    monkeypatch.setattr(sys, "argv", ["microtome", "import", str(source), "--out", str(out), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"][0] == {"name": "first.weight", "shape": [2, 3], "type": "float32"}
    assert (found["place"], found["left_out"], len(found["tensors"])) == ("model", ["epoch"], 3)
    monkeypatch.setattr(sys, "argv", ["microtome", "import", str(out)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    shown = capsys.readouterr().out
    assert "first.weight" in shown
    assert f"3 tensors of {out}" in shown


# ---- what is refused ----


class Command:
    """Unpickled by pickle itself, it would call a function."""

    def __init__(self, function: Callable[..., object], *words: object) -> None:
        self.call = (function, words)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.usefixtures("forks")
def test_a_pickle_that_calls_a_program_is_refused_and_nothing_ran(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    # `torch.save` makes the file; only who unpickles it would run the command.
    line = refusal(saved(tmp_path / "evil.pth", {"a": torch.zeros(1), "b": Command(os.system, f"touch {mark}")}, zipped=zipped))
    assert "a pickled object (posix.system)" in line
    assert not mark.exists()
    raw = tmp_path / "raw.pkl"
    raw.write_bytes(pickle.dumps(Command(os.system, f"touch {mark}")))
    refusal(raw)
    assert not mark.exists()
    # It is a true command: pickle runs it.
    pickle.loads(raw.read_bytes())  # noqa: S301 - that is the proof
    assert mark.exists()


@pytest.mark.usefixtures("forks")
def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    line = refusal(saved(tmp_path / "module.pt", torch.nn.Linear(2, 2)))
    assert "a pickled object (torch.nn.modules.linear.Linear)" in line
    assert "torch.save(model.state_dict(), ...)" in line


def bomb(path: Path) -> Path:
    """A checkpoint whose one tensor of 64 MB of zeros is compressed to a thousandth of it."""
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as after:
        for name in before.namelist():
            if name.endswith("data/0"):
                with after.open(name, "w", force_zip64=True) as member:
                    for _ in range(64):
                        member.write(bytes(1 << 20))
            else:
                after.writestr(name, before.read(name))
    return path


def huge(path: Path) -> Path:
    """A legacy checkpoint of some hundred bytes whose storage is said to have 10^12 numbers."""
    memory = io.BytesIO()
    torch.save({"a": torch.zeros(77)}, memory, _use_new_zipfile_serialization=False)
    # 77 as pickle writes it in one byte; 10^12 takes six bytes of a long.
    path.write_bytes(memory.getvalue().replace(b"K\x4d", b"\x8a\x06" + (10**12).to_bytes(6, "little")))
    return path


def expanded(path: Path) -> Path:
    """A tensor of 10^12 numbers that are all the same one."""
    return saved(path, {"a": torch.zeros(1).expand(10**6, 10**6)})


def cyclic(path: Path) -> Path:
    """A dictionary that holds itself."""
    content: dict[str, Any] = {"a": torch.zeros(1)}
    content["b"] = content
    return saved(path, content)


def laughing(path: Path) -> Path:
    """A few dictionaries that hold each other so often that there are 10^14 names."""
    content: dict[str, Any] = {"a": torch.zeros(1)}
    for _ in range(7):
        content = {str(number): content for number in range(100)}
    return saved(path, content)


def cut(path: Path) -> Path:
    """The first half of a checkpoint."""
    saved(path, STATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def tape(path: Path) -> Path:
    """A tar, as torch wrote before 0.1.10, whose member would be written elsewhere."""
    with tarfile.open(path, "w") as archive:
        for name in ("../storages", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return path


def listed(path: Path) -> Path:
    """A list among the weights."""
    return saved(path, {"state_dict": {"a": torch.zeros(1), "b": [1, 2]}})


def nothing(path: Path) -> Path:
    """An empty file."""
    path.write_bytes(b"")
    return path


def eighths(path: Path) -> Path:
    """A safetensors file of numbers of 8 bits that NumPy does not have."""
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    return path


def words(path: Path) -> Path:
    """A text."""
    path.write_text("weights of a network\n" * 100)
    return path


def damaged(path: Path) -> Path:
    """A safetensors file whose header promises more than there is."""
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-4])
    return path


HOSTILE = {
    bomb: "compressed members, which torch does not write",
    huge: "larger than the file",
    expanded: "a tensor of [1000000, 1000000] that holds fewer numbers",
    cyclic: "without end",
    laughing: "more than 100000 names",
    cut: "cannot read",
    tape: "what torch cannot read",
    listed: "a list named `b` among the weights",
    nothing: "got an empty file (0 bytes)",
    words: "no checkpoint",
    damaged: "an unreadable file",
    eighths: "unreadable file (Got unsupported ScalarType",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
@pytest.mark.usefixtures("forks")
def test_a_hostile_or_broken_checkpoint_is_one_line(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "file.pth")
    line = refusal(path)
    assert HOSTILE[make] in line
    assert [each.name for each in tmp_path.iterdir()] == ["file.pth"]


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_converted", None)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(DataError, match=r"empty\.pth: expected a checkpoint .*, got an empty file \(0 bytes\); copy it again"):
        read_weights(tmp_path / "empty.pth")


def test_what_is_not_there_or_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "got no model" in refusal(tmp_path / "folder.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "got what is no plain file (prw" in refusal(tmp_path / "pipe.pth")


def test_a_file_that_notes_a_million_names_of_its_million_tensors_is_not_searched_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed(list[str]):
        def __contains__(self, name: object) -> bool:
            raise AssertionError(f"all names were gone through for {name}")

    class File:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework=framework)

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.__exit__(None, None, None)

        def __getattr__(self, name: str) -> Any:
            return (lambda: Listed(self.file.keys())) if name == "keys" else getattr(self.file, name)

    noted = json.dumps({"names": ["other", "last.weight", "first.bias"]})
    save_file(STATE, tmp_path / "a.safetensors", metadata={"found": noted})
    monkeypatch.setattr(checkpoints, "safe_open", File)
    assert list(read_weights(tmp_path / "a.safetensors").arrays) == ["last.weight", "first.bias", "first.weight"]


# ---- what holds the process that reads ----


def counts_threads() -> bool:
    """Whether the kernel holds a process of this account, or of nobody's where it is root's, to RLIMIT_NPROC."""
    code = (
        "import os, resource, _thread; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0)); os.getuid() or os.setuid(65534);"
        "_thread.start_new_thread(print, ())"
    )
    asked = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return "can't start new thread" in asked.stderr


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("import os; os.system('touch ran')", "os.system while a checkpoint is read"),
        ("import subprocess; subprocess.run(['touch', 'ran'])", "subprocess.Popen while a checkpoint is read"),
        ("open('ran', 'w')", "open while a checkpoint is read"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "while a checkpoint is read"),
        ("import pickle; pickle.loads(b'cos\\nsystem\\n.')", "pickle.find_class while a checkpoint is read"),
        ("torch.zeros(1 << 31)", "larger than the file"),
        ("import errno; raise OSError(errno.ENOSPC, 'No space')", "the disk of temporary files has no room"),
        ("import os; os._exit(0)", "one that nothing whole was made of"),
        # The hook sees no threads; the kernel does, and lets root have them.
        ("import os, _thread; os.getuid() or os.setuid(65534); _thread.start_new_thread(print, ())", "can't start new thread"),
        ("import faulthandler; faulthandler._sigsegv()", "ended the process that read it (SIGSEGV)"),
        ("import resource, signal; [signal.raise_signal(signal.SIGXCPU)]", "ended the process that read it (SIGXCPU)"),
    ],
)
def test_what_escaped_from_torch_would_still_be_held(attack: str, said: str, tmp_path: Path, forks: Forks) -> None:
    if "_thread" in attack and not counts_threads():
        pytest.skip("here this account may start threads beyond its limit, or may not become another")
    forks.attack = attack
    assert said in refusal(saved(tmp_path / "file.pth", STATE))
    assert not list(tmp_path.rglob("ran"))


def test_the_limits_are_set_before_the_file_is_read(tmp_path: Path, forks: Forks) -> None:
    path = saved(tmp_path / "file.pth", STATE)
    # Linux's numbers of RLIMIT_AS, CPU, FSIZE, CORE, NPROC.
    forks.attack = "raise ValueError([__import__('resource').getrlimit(number)[0] for number in (9, 0, 1, 4, 6)])"
    found = re.search(r"ValueError: \[(\d+), (\d+), (\d+), (\d+), (\d+)\]", refusal(path))
    assert found is not None
    memory, seconds, written, core, processes = map(int, found.groups())
    size = path.stat().st_size
    assert unpickling.SPARE_BYTES < memory < 64 * unpickling.SPARE_BYTES
    assert unpickling.SPARE_SECONDS <= seconds < unpickling.SPARE_SECONDS + 600
    assert (written, core, processes) == (2 * size + (1 << 24), 0, 0)


# ---- the process itself ----


def test_a_checkpoint_is_read_in_a_process_of_its_own_without_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    started: list[dict[str, Any]] = []
    run = subprocess.run

    def noted(command: list[str], **words: Any) -> Any:
        started.append({"command": command, "seen": os.listdir(words["cwd"]), **words})
        return run(command, **words)

    monkeypatch.setattr(subprocess, "run", noted)
    monkeypatch.setattr(torch, "load", None)
    assert same(read_weights(saved(tmp_path / "a.pth", STATE)).arrays, STATE)
    [words] = started
    assert words["command"] == [sys.executable, "-P", "-m", "microtome.interop.unpickling"]
    assert words["env"].keys() == {"PYTHONPATH", "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "HOME", "LD_LIBRARY_PATH"}
    assert words["env"]["HOME"] == str(words["cwd"])
    assert words["seen"] == []
    assert not Path(words["cwd"]).exists()


def test_a_reader_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", 0.05)
    assert "takes too long" in refusal(saved(tmp_path / "a.pth", STATE))
