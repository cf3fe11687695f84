"""Locks of folders: who holds one, who is refused, and which holders are recognised as gone."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from microtome import lock
from microtome.errors import RunError
from microtome.lock import NAME, Holder, process_began, refuse_if_used, run_lock, taking_turns

HOLD = """
import sys
from pathlib import Path
from microtome.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder until its input is closed."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def document(folder: Path, **changes: Any) -> Path:
    """What somebody wrote into a lock; of a process of this machine that has ended, where nothing else is said."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        process = ended.pid
    holder = Holder(
        host=socket.gethostname(), boot=lock.boot(), process=process, began=7, thread=1, since="monday", command="microtome train"
    )
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps({**asdict(holder), **changes}))
    return folder / NAME


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_folder_is_held_once_and_afterwards_nothing_tells_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_lock(folder) as before:
        assert before is None
        assert json.loads((folder / NAME).read_text())["process"] == os.getpid()
    assert not folder.exists()
    with run_lock(folder):
        (folder / "plan.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["plan.yaml"]


def test_the_thread_that_holds_it_may_take_it_again_and_keeps_it(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with run_lock(tmp_path) as before:
            assert before is None
        refuse_if_used(tmp_path)
        assert (tmp_path / NAME).exists()


def test_another_process_is_refused_by_name_and_can_take_it_when_that_one_ended(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process:
        for take in (lambda: refuse_if_used(tmp_path), lambda: run_lock(tmp_path).__enter__()):
            with pytest.raises(RunError, match=rf"that no other process uses, got process {process.pid} on .* since .*; wait") as caught:
                take()
            assert caught.value.code == "R121"
        assert json.loads((tmp_path / NAME).read_text())["process"] == process.pid
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
        refuse_if_used(tmp_path)
        with run_lock(tmp_path) as before:
            assert before is None


def test_a_process_that_was_killed_is_recognised_and_named(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        refuse_if_used(tmp_path)
        with run_lock(tmp_path) as before:
            assert before is not None
            assert before.process == process.pid
            assert f"process {process.pid} on {socket.gethostname()} since " in before.words
        assert not (tmp_path / NAME).exists()


def test_another_thread_is_refused(tmp_path: Path) -> None:
    found: list[Exception] = []

    def take() -> None:
        try:
            with run_lock(tmp_path):
                pass
        except RunError as error:
            found.append(error)

    with run_lock(tmp_path):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(30)
        assert (tmp_path / NAME).exists()
    assert [f"process {os.getpid()} on" in str(error) for error in found] == [True]


def test_what_another_machine_wrote_is_believed_and_the_file_to_remove_is_named(tmp_path: Path) -> None:
    path = document(tmp_path, host="node17", boot="another", process=4711)
    for take in (lambda: refuse_if_used(tmp_path), lambda: run_lock(tmp_path).__enter__()):
        with pytest.raises(RunError, match=rf"process 4711 on node17 .*`ps -p 4711` on node17 shows nothing\), remove {path}"):
            take()
    assert json.loads(path.read_text())["host"] == "node17"
    path.unlink()
    with run_lock(tmp_path):
        pass


def test_what_this_machine_wrote_before_it_was_started_anew_counts_no_more(tmp_path: Path) -> None:
    document(tmp_path, boot="of yesterday", process=os.getpid())
    with run_lock(tmp_path) as before:
        assert before is not None


def test_a_file_that_says_nothing_is_no_lock(tmp_path: Path) -> None:
    for content in (b"", b"{", b'{"host": 3}', b"\xff\x00", b"[]"):
        (tmp_path / NAME).write_bytes(content)
        refuse_if_used(tmp_path)
        with run_lock(tmp_path) as before:
            assert before is None


# Where the file system knows no locks the document alone tells.


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_running_process_is_refused_and_one_that_ended_is_not(tmp_path: Path) -> None:
    document(tmp_path)
    with run_lock(tmp_path) as before:
        assert before is not None
    document(tmp_path, process=os.getppid(), began=process_began(os.getppid()))
    with pytest.raises(RunError, match=f"process {os.getppid()} on"):
        refuse_if_used(tmp_path)
    with pytest.raises(RunError, match=f"process {os.getppid()} on"), run_lock(tmp_path):
        pass
    assert (tmp_path / NAME).exists()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_number_that_another_program_was_given_since_is_recognised(tmp_path: Path) -> None:
    began = process_began(os.getppid())
    assert began is not None
    document(tmp_path, process=os.getppid(), began=began - 1)
    with run_lock(tmp_path) as before:
        assert before is not None
        assert before.began == began - 1


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_thread_that_holds_it_may_take_it_again(tmp_path: Path) -> None:
    with run_lock(tmp_path), run_lock(tmp_path) as before:
        assert before is None
    assert list(tmp_path.iterdir()) == []


def test_on_a_network_drive_which_locks_only_what_is_open_for_writing_a_killed_process_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = fcntl.flock

    def flock(handle: int, how: int) -> None:
        # As NFS has it, which makes a lock of bytes of it (flock(2), "NFS details").
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        local(handle, how)

    document(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    refuse_if_used(tmp_path)
    with run_lock(tmp_path) as before:
        assert before is not None


def test_a_lock_on_a_windows_share_which_nobody_else_may_read_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(*_: Any) -> bytes:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(lock, "_MOST_SECONDS", 0.05)
    with held_elsewhere(tmp_path):
        monkeypatch.setattr(os, "pread", pread)
        refuse_if_used(tmp_path)
        with pytest.raises(RunError, match="got a process that has not said which; wait until it ends"), run_lock(tmp_path):
            pass


def test_a_process_that_has_not_said_who_it_is_is_waited_for_and_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_MOST_SECONDS", 0.05)
    with (tmp_path / NAME).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="got a process that has not said which; wait until it ends"), run_lock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_line(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        RunError, match=rf"\.lock: expected a file that can be locked, got {os.strerror(number)}; check the rights"
    ) as caught:
        run_lock(tmp_path).__enter__()
    assert caught.value.code == "R001"


def test_a_disk_with_no_room_for_the_lock_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(RunError, match=r"\.lock: expected room for what is still to be written, got No space left on device"):
        run_lock(tmp_path).__enter__()


def test_a_lock_that_fails_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def broken(handle: int, *_: Any) -> None:
        opened.append(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    for take in (run_lock, taking_turns):
        with pytest.raises(RunError, match="Input/output error"):
            take(tmp_path).__enter__()
    assert len(opened) == 2
    for handle in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


@pytest.mark.parametrize("take", [run_lock, taking_turns])
def test_a_folder_that_is_removed_just_before_its_lock_is_made_is_made_again(
    take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain, times = tmp_path / "out", lock.make_folder, 0

    def made(path: Path) -> None:
        nonlocal times
        plain(path)
        times += 1
        if times == 1:
            path.rmdir()

    monkeypatch.setattr(lock, "make_folder", made)
    with take(folder):
        assert folder.is_dir()
    assert times == 2


def test_a_disk_that_is_full_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match="No space left on device"), run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
