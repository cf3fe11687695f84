"""What every test may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """A folder of the real data by name; the test is skipped, with the reason, where there is none."""
    root = Path(os.environ.get("MICROTOME_DATA", REPOSITORY.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no real data: {root / name} is not there (set MICROTOME_DATA)")
        return root / name

    return find


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of engines stays in the test: not in the user's cache, nor in the next test."""
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path_factory.mktemp("cache")))
