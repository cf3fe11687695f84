"""The plan for many workers follows from what was measured by the formulas that docs/cluster.md names."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.rows import FIELDS

# 1 s a tile.
MEASURED: dict[str, Any] = {
    "tiles": 64,
    "blocks": 2,
    "block_seconds": 4.0,
    "transitions": 4.0,
    "written_bytes_voxel": 0.25,
    "ratio_to_default": 1.0,
}
ROWS: list[dict[str, Any]] = [
    {"engine": "1 worker", "seconds": 64.0, "voxels": 64 * 65536, "read_bytes_voxel": 1.5, **MEASURED},
    {"engine": "2 workers", "seconds": 32.0, "voxels": 64 * 65536, "read_bytes_voxel": 1.5, **MEASURED, "ratio_to_default": 2.0},
    {"engine": "2 workers, no network", "seconds": 1.0, "voxels": 64 * 65536, **MEASURED, "block_seconds": 0.5},
    {"engine": "2 workers, nothing", "work": "a block in which nothing is missing", "seconds": 0.003},
    {"engine": "local disk", "work": "one mark of a listing", "seconds": 2e-6},
]
FACTS = {"command": scaling.COMMAND, "date": "2026-01-01", "machine": "a machine", "versions": {"dask": "1"}}


def number(figures: dict[str, str], name: str) -> float:
    (found,) = (value for key, value in figures.items() if key.startswith(name))
    return float(found.split()[-1 if "=" in found else 0].rstrip(","))


def test_figures_follow_from_the_measured_ones() -> None:
    figures = dict(scaling.on_paper(ROWS))
    voxels = 10_000 * 32_768 * 32_768
    assert number(figures, "voxels V") == pytest.approx(voxels, rel=1e-2)
    assert number(figures, "columns") == 1024 * 157
    # Tiles step by half of their sides: eight times what would just cover, and some more at the ends of blocks and columns.
    tiles = number(figures, "tiles T")
    assert 1 < tiles / (8 * voxels / (32 * 128 * 128)) < 1.5
    whole = tiles / 1000
    assert number(figures, "hours") == pytest.approx(whole / 3600, rel=1e-2)
    blocks = number(figures, "blocks N")
    assert number(figures, "seconds a block") == pytest.approx(tiles / blocks, rel=1e-2)
    assert figures["of it all but the network"] == "12.5%"
    assert number(figures, "scheduler: transitions") == pytest.approx(4 * blocks / whole, rel=1e-2)
    assert number(figures, "scheduler: share") == pytest.approx(0.003 * blocks / whole, rel=6e-2)
    assert number(figures, "store: read") == pytest.approx(1.5 * voxels / whole / 1e6, rel=1e-2)
    assert number(figures, "store: written") == pytest.approx(0.25 * voxels / whole / 1e6, rel=1e-2)
    assert number(figures, "listing all marks") == pytest.approx(1024 * 157 * 2e-6, rel=1e-2)


def test_only_what_stands_between_the_marks_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    monkeypatch.setattr(scaling, "read_results", lambda name: (ROWS, FACTS))
    scaling.write_page(page)
    text = page.read_text()
    assert text.startswith(f"before\n{scaling.BEGIN}\n\n`python -m benchmarks.scaling`, 2026-01-01; a machine; dask 1")
    assert text.endswith(f"{scaling.END}\nafter\n")
    assert "old" not in text
    assert "| 2 workers | 32 | 2 | 2 | 4 | 4 | 1.5, 0.25 |" in text
    scaling.write_page(page)
    assert page.read_text() == text


def test_the_page_holds_what_was_measured(tmp_path: Path) -> None:
    copy = tmp_path / "cluster.md"
    copy.write_text(scaling.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    if scaling.read_results("scaling")[0]:
        scaling.write_page(copy)
    assert copy.read_text(encoding="utf-8") == scaling.PAGE.read_text(encoding="utf-8"), "run `python -m benchmarks.scaling`"


def test_rows_have_the_promised_fields() -> None:
    runs = [
        {"labels": [1], "seconds": seconds, "voxels": 1, **{name: value for name, value in MEASURED.items() if name != "ratio_to_default"}}
        for seconds in (3.0, 1.0, 2.0)
    ]
    row = scaling.row_of("work", "2 workers", runs, 4.0)
    assert set(FIELDS) <= set(row)
    assert (row["seconds"], row["ratio_to_default"], row["low"], row["high"], row["rounds"]) == (2.0, 2.0, 1.0, 3.0, 3)
    with pytest.raises(AssertionError, match="the same bytes"):
        scaling.row_of("work", "2 workers", [*runs, {**runs[0], "labels": [2]}], 4.0)
