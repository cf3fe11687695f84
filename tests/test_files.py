import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from microtome.errors import DataError, RunError
from microtome.files import atomic_path, is_leftover, make_folder, scratch_folder, write_json, write_text


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=[True, False], ids=["over an old file", "where nothing was"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "a.nii.gz"
    path.parent.mkdir()
    if request.param:
        path.write_text("old")
    return path


def state(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.parent.iterdir()}


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), ValueError("bad"), KeyboardInterrupt(), MemoryError()])
def test_whatever_the_body_raises_the_folder_stays_as_it_was(target: Path, fault: BaseException) -> None:
    before = state(target)

    def write() -> None:
        with atomic_path(target) as part:
            part.write_text("half")
            raise fault

    with pytest.raises(RunError if isinstance(fault, OSError) else type(fault)):
        write()
    assert state(target) == before


def test_a_drive_that_cannot_flush_folders_is_written_to_and_a_file_that_cannot_be_flushed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, refused = os.fsync, [stat.S_IFDIR]

    def fsync(handle: int) -> None:
        if stat.S_IFMT(os.fstat(handle).st_mode) in refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "new" / "a.txt", "kept")
    assert (tmp_path / "new" / "a.txt").read_text() == "kept"
    refused.append(stat.S_IFREG)
    with pytest.raises(RunError, match="got Invalid argument"):
        write_text(tmp_path / "new" / "a.txt", "lost")
    assert (tmp_path / "new" / "a.txt").read_text() == "kept"


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.touch"])
def test_a_disk_that_is_full_leaves_the_folder_as_it_was_and_is_named(target: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(target)
    monkeypatch.setattr(call, full_disk)
    with pytest.raises(RunError) as caught:
        write_text(target, "new")
    assert state(target) == before
    assert str(caught.value).startswith(f"{target}: ")
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_folder_that_cannot_be_flushed_holds_the_new_file_whole(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: Iterator[Callable[..., None]] = iter([lambda handle: None, full_disk])
    monkeypatch.setattr(os, "fsync", lambda handle: next(outcomes)(handle))
    with pytest.raises(RunError):
        write_text(target, "new")
    assert state(target) == {target.name: "new"}


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "file"))
    monkeypatch.setattr(Path, "replace", lambda self, path: (events.append("rename"), replace(self, path))[1])
    write_text(tmp_path / "a.txt", "new")
    assert events == ["file", "rename", "folder"]


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from microtome.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as part: part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    # What a kill leaves is hidden, so that no reader takes it for an image.
    assert all(file.name.startswith(".part-") for file in tmp_path.iterdir() if file != path)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_umask_of_other_threads_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", full_disk)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("name", ["a.nii.gz", "b.ome.tif", "plain", "c" * 251 + ".png", "é" * 125 + ".tif"])
def test_the_temporary_file_lies_beside_the_target_and_ends_like_it(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / name) as part:
        assert part.parent == tmp_path
        assert part.name.startswith(".part-")
        assert part.name.endswith(name[-12:])
        part.write_text("new")
    assert state(tmp_path / name) == {name: "new"}


def test_two_writers_of_one_file_have_two_temporary_files(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "a") as second:
            assert first != second
            second.write_text("second")
    assert state(tmp_path / "a") == {"a": "first"}


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "ä\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"\xc3\xa4\n"


def test_a_folder_with_a_name_in_another_encoding_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run\\udce4: expected a name in UTF-8"):
        make_folder(Path(os.fsdecode(os.fsencode(tmp_path / "run") + b"\xe4")))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_a_run_error_that_names_the_target(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(RunError, match=r"a/b\.txt: expected a folder that can be written, got "):
        write_text(tmp_path / "a" / "b.txt", "new")
    assert (tmp_path / "a").read_text() == "a file"


def test_a_target_that_is_a_folder_is_a_run_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a" / "inner").mkdir(parents=True)
    with pytest.raises(RunError, match="directory"):
        write_text(tmp_path / "a", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_json_is_readable_and_read_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"é": True}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.count("\n") > 5
    assert text.endswith("}\n")


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ({1, 2}, TypeError)])
def test_what_is_not_json_leaves_the_old_file(target: Path, value: object, error: type[Exception]) -> None:
    before = state(target)
    with pytest.raises(error):
        write_json(target, {"a": value})
    assert state(target) == before


def test_a_file_that_the_disk_has_no_room_for_is_not_begun_and_what_is_missing_is_told_in_bytes(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(target)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**6, used=10**6 - 700, free=700))
    with pytest.raises(RunError) as caught, atomic_path(target, 1000):
        pytest.fail("it was begun")
    assert str(caught.value).startswith(f"{target}: expected 1000 free bytes, got 700, 300 too few; free space (")
    assert (caught.value.code, caught.value.exit_code) == ("R102", 1)
    assert state(target) == before
    with atomic_path(target, 700) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_a_disk_that_becomes_full_tells_what_the_file_needs_what_it_got_and_what_is_free(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with atomic_path(target, 1000) as part:
            part.write_bytes(b"half")
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=9999, used=9999, free=0))
            full_disk()

    with pytest.raises(RunError) as caught:
        write()
    words = "expected room for 1000 bytes, got No space left on device after 4 bytes, with 0 bytes free; free space"
    assert words in str(caught.value)
    assert caught.value.code == "R102"


def test_a_file_system_that_does_not_say_what_is_free_is_written_to(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=0, used=0, free=0))
    write_text(target, "new")
    assert state(target) == {target.name: "new"}


def test_a_quota_is_a_full_disk_and_a_broken_one_is_not(target: Path) -> None:
    for number, code in ((errno.EDQUOT, "R102"), (errno.EIO, "R001"), (errno.EROFS, "R001")):
        with pytest.raises(RunError) as caught, atomic_path(target):
            raise OSError(number, os.strerror(number))
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("number", "do"),
    [
        (errno.EACCES, "get the right to write there, or choose another --out"),
        (errno.EROFS, "get the right to write there, or choose another --out"),
        (errno.ENOTDIR, "choose another --out: a file is where a folder has to be"),
        (errno.ENAMETOOLONG, "choose a shorter --out"),
        (errno.EIO, "check the disk, or choose another --out"),
    ],
)
def test_what_to_do_is_what_the_systems_error_means(target: Path, number: int, do: str) -> None:
    with pytest.raises(RunError) as caught, atomic_path(target):
        raise OSError(number, os.strerror(number))
    assert caught.value.do == do


def test_a_scratch_folder_goes_with_its_content_and_is_a_leftover_where_a_kill_came(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "cache") as folder:
        (folder / "a.txt").write_text("a")
        assert folder.parent == tmp_path / "cache"
        assert is_leftover(folder)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("a file")
    with pytest.raises(RunError, match="expected a folder that can be made"), scratch_folder(tmp_path / "file"):
        pytest.fail("it was made")
