"""Facts of a machine -> advice, exit codes and JSON of `microtome doctor`; packages, disks and groups as they are found."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from microtome import cgroups, cli
from microtome.cgroups import Limits, limits
from microtome.doctor import facts as facts_module
from microtome.doctor import probe as probe_module
from microtome.doctor.advice import lines
from microtome.doctor.disk import Disk, file_system, measure_disk
from microtome.doctor.facts import Facts, examine, instructions, memory, plain, unwritable
from microtome.doctor.findings import Check, Line, Result
from microtome.doctor.packages import CORE, EXTRAS, Package, Wanted, look_up
from microtome.doctor.probe import Probed, probe
from microtome.doctor.verdict import verdict
from microtome.doctor.view import as_document, print_diagnosis
from tools.layers import REPOSITORY, SOURCE

GB = 2**30
SEEN = {"threads": 4, "instructions": "AVX2", "cuda": "", "gpus": [], "compiled_warp": True, "patch_vox": 96}
GPU = {"name": "NVIDIA H200", "free_bytes": 138 * GB, "total_bytes": 140 * GB, "bf16": True}
DISK = Disk(
    folder=Path("/data"), kind="ext4", remote=False, in_memory=False, free_bytes=80 * GB, megabytes_per_second=400.0, small_file_ms=2.0
)
# `/proc/self/mountinfo` of a machine with a home on a server, a disk whose name has a space, and something mounted over it.
MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /home rw,relatime shared:2 - nfs4 server:/home rw
31 22 254:16 / /mnt/my\\040disk rw - xfs /dev/vdb rw
32 22 0:26 / /mnt/my\\040disk rw - tmpfs tmpfs rw
33 22 0:27 / /homework rw - btrfs /dev/vdc rw
"""


def installed(version: str = "1.0", problem: str = "") -> dict[str, tuple[Package, ...]]:
    return {extra.name: tuple(Package(*wanted, version, problem) for wanted in extra.packages) for extra in EXTRAS}


def made(**changes: Any) -> Facts:
    """A machine on which all is well."""
    values: dict[str, Any] = {
        "system": "Linux 6.1 (x86_64)",
        "python": "3.12.3",
        "microtome": "0.1.0",
        "processor": "A processor",
        "cores": 4,
        "cores_usable": 4,
        "threads": 4,
        "instructions": ("avx2",),
        "bf16": False,
        "memory_bytes": 16 * GB,
        "memory_free_bytes": 12 * GB,
        "torch": SEEN,
        "disk": DISK,
        "cache": Path("/cache"),
        "core": tuple(Package(*wanted, "1.0") for wanted in CORE),
        "extras": installed(),
    }
    return Facts(**{**values, **changes})


def line(facts: Facts, what: str) -> Line:
    [found] = [line for line in lines(facts) if line.what == what]
    return found


def test_where_all_is_well_nothing_is_to_be_done() -> None:
    assert {line.level for line in lines(made())} == {"good"}
    assert not any(line.do for line in lines(made()))


@pytest.mark.parametrize(
    ("changes", "what", "level", "said", "do"),
    [
        (
            {"threads": 16, "cores": 16, "cores_usable": 16, "cores_allowed": 2.0},
            "processor",
            "warning",
            "allows 2 at",
            "OMP_NUM_THREADS=2",
        ),
        ({"threads": 8}, "processor", "warning", "4 cores, 8 threads", "OMP_NUM_THREADS=4"),
        ({"threads": 1, "threads_asked": "1"}, "processor", "note", "1 thread (OMP_NUM_THREADS)", "unset OMP_NUM_THREADS"),
        ({"cores": 64}, "processor", "good", "4 of 64 cores usable", ""),
        ({"instructions": None}, "arithmetic", "note", "does not tell", ""),
        (
            {"instructions": ("avx512f", "avx512_vnni", "avx512_bf16"), "bf16": True},
            "arithmetic",
            "good",
            "bfloat16, 8-bit integers (VNNI)",
            "",
        ),
        ({"memory_free_bytes": 2 * GB}, "memory", "warning", "2.0 GB free of 16.0 GB", "--memory"),
        ({"memory_limit_bytes": 6 * GB}, "memory", "good", "a container or job allows 6.0 GB", ""),
        ({"memory_limit_bytes": 64 * GB}, "memory", "good", "12.0 GB free of 16.0 GB", ""),
        ({"torch": {**SEEN, "gpus": [GPU], "cuda": "12.8"}}, "GPU", "good", "NVIDIA H200, 138.0 GB of 140.0 GB free, bfloat16", ""),
        ({"gpu_marks": True}, "GPU", "warning", "torch was built for processors", 'pip install --force-reinstall "torch"'),
        ({"gpu_marks": True, "torch": {**SEEN, "cuda": "12.8"}}, "GPU", "warning", "finds no GPU", "nvidia-smi"),
        ({"torch": {**SEEN, "patch_vox": 0}}, "3D patch", "warning", "not even 32", "--dims 2"),
        ({"torch": {**SEEN, "compiled_warp": False}}, "augmentation", "note", "warped by torch", "C compiler"),
        (
            {"disk": replace(DISK, kind="nfs4", remote=True, small_file_ms=200.0)},
            "disk",
            "warning",
            "a network drive",
            "a network drive is slow",
        ),
        ({"disk": replace(DISK, megabytes_per_second=9.0)}, "disk", "warning", "writes 9 MB/s", "it is slow"),
        ({"disk": replace(DISK, free_bytes=GB)}, "disk", "warning", "1.0 GB free", "free space"),
        ({"disk": replace(DISK, kind="tmpfs", in_memory=True)}, "disk", "note", "in memory", "gone"),
        ({"disk": replace(DISK, problem="/x cannot be written (no)")}, "disk", "warning", "/x cannot be written", "--out"),
        ({"cache_problem": "Permission denied"}, "cache", "warning", "Permission denied", "MICROTOME_CACHE"),
    ],
)
def test_a_fact_becomes_a_line_that_says_what_to_do(changes: dict[str, Any], what: str, level: str, said: str, do: str) -> None:
    found = line(made(**changes), what)
    assert found.level == level
    assert said in found.finding
    assert do in found.do
    assert bool(found.do) == bool(do)


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_that_is_not_installed_is_told_with_the_line_that_brings_it(extra: Any) -> None:
    gone = tuple(Package(*wanted, "") for wanted in extra.packages)
    found = line(made(extras={**installed(), extra.name: gone}), f"[{extra.name}]")
    assert found == Line(f"[{extra.name}]", f"not installed: {extra.purpose}", f'pip install "microtome[{extra.name}]"', "note")


def test_a_part_of_an_extra_that_is_missing_is_named() -> None:
    fast = tuple(Package(*wanted, "" if wanted.module == "onnx" else "1.0") for wanted in EXTRAS[0].packages)
    found = line(made(extras={**installed(), "fast": fast}), "[fast]")
    assert found.finding.startswith("openvino 1.0, onnxruntime 1.0, but not onnx: ")
    assert found.do == 'pip install "microtome[fast]"'


def test_a_package_that_everything_needs_and_that_is_missing_or_broken_is_bad() -> None:
    core = (
        Package("torch", "torch", "2.13", "ends Python (SIGILL)"),
        Package("PyYAML", "yaml", ""),
        Package("scipy", "scipy", "1", "ImportError: x"),
    )
    facts = made(core=core, torch={})
    assert {line.what for line in lines(facts) if line.level == "bad"} == {"torch", "PyYAML", "scipy"}
    assert "lacks instructions" in line(facts, "torch").do
    assert line(facts, "PyYAML").do == 'pip install "PyYAML"'
    assert line(facts, "GPU").finding == "not known, as torch cannot be asked"
    assert verdict(facts, lines(facts), None) == "Something does not work here: torch, PyYAML, scipy; do what the lines marked so say."


@pytest.mark.parametrize(
    ("changes", "result", "said"),
    [
        ({}, Result(tile_seconds={"torch": 0.4, "openvino": 0.1}), "openvino predicts fastest, 4.0 times as fast as torch"),
        ({}, Result(tile_seconds={"torch": 0.1, "openvino": 0.4}), "torch predicts fastest of what is installed"),
        ({}, Result(step_seconds={"bf16": 0.5, "fp32": 1.0}), "bfloat16 trains 2.0 times as fast as float32"),
        ({}, Result(step_seconds={"bf16": 1.0, "fp32": 1.0}), "bfloat16 does not train faster here"),
        ({}, None, "as far as can be seen without the self-test"),
        ({}, None, "there is no bfloat16"),
        ({"bf16": True}, None, "bfloat16 is multiplied in hardware"),
        ({}, None, "3D patches up to 96 × 96 × 96 fit"),
        ({"extras": {**installed(), "fast": installed("")["fast"]}}, None, 'pip install "microtome[fast]"'),
    ],
)
def test_the_verdict_is_a_sentence_about_this_machine(changes: dict[str, Any], result: Result | None, said: str) -> None:
    facts = made(**changes)
    sentence = verdict(facts, lines(facts), result)
    assert said in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_every_extra_that_the_code_can_use_is_told_of_and_no_other() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    named = {line.partition(" = ")[0] for line in text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0].splitlines()}
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path.parent.name != "doctor")
    used = {name for name in named if f"microtome[{name}]" in source or f'", "{name}") from None' in source}
    assert {extra.name for extra in EXTRAS} == used
    assert {"fast", "medical", "hdf5"} <= used


def test_packages_that_are_hidden_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_up(Wanted("h5py", "h5py")).version
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert look_up(Wanted("h5py", "h5py")) == Package("h5py", "h5py", "")


def test_without_any_extra_each_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facts_module, "probe", lambda modules: Probed())
    for extra in EXTRAS:
        for wanted in extra.packages:
            monkeypatch.setitem(sys.modules, wanted.module, None)
    found = {line.what: line for line in lines(examine(tmp_path)) if line.what.startswith("[")}
    assert [found[f"[{extra.name}]"].do for extra in EXTRAS] == [f'pip install "microtome[{extra.name}]"' for extra in EXTRAS]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".part")]


def test_a_package_that_cannot_be_imported_or_ends_python_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises.py").write_text("print('microtome is great')\nimport no_such_module")
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    (tmp_path / "works.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{SOURCE.parent}")
    found = probe(["raises", "dies", "leaves", "works"])
    assert found.problems == {
        "raises": "ModuleNotFoundError: No module named 'no_such_module'",
        "dies": f"ends Python ({signal.SIGILL.name})",
        "leaves": "SystemExit: 3",
    }
    assert found.machine == {}


def test_a_package_that_never_comes_to_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{SOURCE.parent}")
    monkeypatch.setattr(probe_module, "MOST_SECONDS", 3)
    assert probe(["waits"]).problems == {"waits": "is not imported after 3 s"}


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/home/me", "nfs4"), ("/homework", "btrfs"), ("/mnt/my disk/a", "tmpfs"), ("/mnt", "ext4"), ("/", "ext4")],
)
def test_the_file_system_of_a_folder_is_that_of_the_innermost_and_last_mount(folder: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS, encoding="ascii")
    assert file_system(Path(folder), tmp_path / "mountinfo") == kind


def test_where_the_system_keeps_no_lists_nothing_is_made_up(tmp_path: Path) -> None:
    assert file_system(tmp_path, tmp_path / "none") == ""
    assert instructions(tmp_path / "none") is None
    assert limits(tmp_path / "none", tmp_path / "none") == Limits(None, None)
    # What is built in is known from elsewhere.
    assert (memory(tmp_path / "none") or 0) > GB / 4


def test_instructions_of_both_kinds_of_processors_are_read(tmp_path: Path) -> None:
    (tmp_path / "amd").write_text("model name\t: X\nflags\t\t: fpu avx2 avx512_vnni\n", encoding="ascii")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", encoding="ascii")
    assert instructions(tmp_path / "amd") == ("avx2", "avx512_vnni")
    assert instructions(tmp_path / "arm") == ("asimd", "asimddp", "i8mm")


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = measure_disk(tmp_path, megabytes=1, files=2)
    assert found.problem == ""
    assert (found.megabytes_per_second or 0) > 0
    assert (found.small_file_ms or 0) > 0
    assert found.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_cannot_be_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "file") == "File exists"
    assert unwritable(tmp_path / "new" / "cache") == ""
    assert list((tmp_path / "new" / "cache").iterdir()) == []


def test_limits_of_version_2_are_the_tightest_of_all_groups_above(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/job/step\n", encoding="ascii")
    for name, memory_max, cpu_max in (("", "", ""), ("job", "8000000000\n", "150000 100000\n"), ("job/step", "max\n", "max 100000\n")):
        (tmp_path / "groups" / name).mkdir(parents=True, exist_ok=True)
        if memory_max:
            (tmp_path / "groups" / name / "memory.max").write_text(memory_max, encoding="ascii")
            (tmp_path / "groups" / name / "cpu.max").write_text(cpu_max, encoding="ascii")
    assert limits(tmp_path / "groups", tmp_path / "own") == Limits(8_000_000_000, 1.5)


def test_limits_of_version_1_are_read_in_a_container_that_does_not_see_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n", encoding="ascii")
    for name in ("memory", "cpu"):
        (tmp_path / "groups" / name).mkdir(parents=True)
    (tmp_path / "groups" / "memory" / "memory.limit_in_bytes").write_text("4294967296\n", encoding="ascii")
    (tmp_path / "groups" / "cpu" / "cpu.cfs_quota_us").write_text("200000\n", encoding="ascii")
    (tmp_path / "groups" / "cpu" / "cpu.cfs_period_us").write_text("100000\n", encoding="ascii")
    assert limits(tmp_path / "groups", tmp_path / "own") == Limits(4 * GB, 2.0)
    (tmp_path / "groups" / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n", encoding="ascii")
    (tmp_path / "groups" / "cpu" / "cpu.cfs_quota_us").write_text("-1\n", encoding="ascii")
    assert limits(tmp_path / "groups", tmp_path / "own") == Limits(None, None)
    assert cgroups.limits().memory_bytes is None or cgroups.limits().memory_bytes > 0  # type: ignore[operator]


def test_what_is_pasted_does_not_name_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    home = Path("/home/somebody")
    facts = made(cache=home / ".cache" / "microtome", disk=replace(DISK, folder=home / "runs", problem=f"{home}/x cannot be written"))
    # Errors of the self-test name files, which lie below `--out`.
    failed = Check("train 2D", f"{home}/out/model: expected x", f"look into {home}/out", "bad")
    document = json.dumps(as_document(facts, [*lines(facts), failed], "well", Result(checks=[failed])))
    assert "somebody" not in document
    assert "~/.cache/microtome" in document
    assert plain(facts)["disk"]["folder"] == "~/runs"


def test_the_table_says_what_to_do_below_its_line_and_fits_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Line("disk", "slow " * 40, "move it", "warning"),
        Check("train 2D", "loss 1.2 → 0.8", "", "good", 2.25),
        Line("x", "no", "", "bad"),
    ]
    print_diagnosis(rows, "A verdict.")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("!  disk      slow slow")
    assert any(text.strip() == "→ move it" for text in shown)
    assert "✓  train 2D  loss 1.2 → 0.8 (2.2 s)" in shown
    assert shown[-1] == "A verdict."
    assert max(map(len, shown)) <= 110
    assert [text for text in shown if text != text.rstrip()] == []


SCHEMA = {
    "type": "object",
    "required": ["schema", "ok", "verdict", "lines", "facts", "self_test"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": 1},
        "ok": {"type": "boolean"},
        "verdict": {"type": "string"},
        "lines": {
            "type": "array",
            "minItems": 10,
            "items": {
                "type": "object",
                "required": ["what", "finding", "do", "level"],
                "additionalProperties": False,
                "properties": {
                    "what": {"type": "string"},
                    "finding": {"type": "string"},
                    "do": {"type": "string"},
                    "level": {"enum": ["good", "note", "warning", "bad"]},
                },
            },
        },
        "facts": {"type": "object", "required": ["microtome", "python", "processor", "disk", "core", "extras", "torch"]},
        "self_test": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["checks", "tile_seconds", "step_seconds"],
                    "properties": {"checks": {"type": "array", "items": {"type": "object", "required": ["what", "level", "seconds"]}}},
                },
            ]
        },
    },
}


def test_the_document_of_a_self_test_follows_its_schema() -> None:
    result = Result(checks=[Check("train 2D", "good", "", "good", 1.234)], tile_seconds={"torch": 0.1})
    rows = [*lines(made()), *result.checks]
    document = as_document(made(), rows, "well", result)
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)
    assert document["self_test"]["checks"][0]["seconds"] == 1.23
    assert document["ok"]
    assert not as_document(made(), [*rows, Line("x", "y", "", "bad")], "not well", result)["ok"]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["microtome", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_quick_looks_and_prints_json_that_follows_the_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # The others only take time here.
    monkeypatch.setattr(facts_module, "TRIED", ("torch",))
    monkeypatch.setattr(facts_module, "TRIED_EXTRAS", ())
    assert run(monkeypatch, "doctor", "--quick", "--json") == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    jsonschema.validate(document, SCHEMA)
    assert document["self_test"] is None
    assert document["facts"]["torch"]["patch_vox"] % 32 == 0
    assert document["facts"]["torch"]["threads"] >= 1
    assert shown.err == "looking at the machine and at what is installed ...\n"
    assert list(tmp_path.iterdir()) == []


def test_a_broken_torch_ends_with_code_1_and_without_a_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts_module, "probe", lambda modules: Probed({"torch": "ImportError: libgomp.so.1 is missing"}))
    assert run(monkeypatch, "doctor") == 1
    shown = capsys.readouterr().out
    assert "but ImportError: libgomp.so.1 is missing" in shown
    assert 'pip install --force-reinstall "torch"' in shown
    assert "not tried: what it needs does not work" in shown


def test_a_folder_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(monkeypatch, "doctor", "--out", tmp_path) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
