"""What every test may use."""

import gc
import os
from collections.abc import Callable, Generator, Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).parents[1]
# The same examples each time, so that a commit is not refused for what was there before it. To look for more:
# `pytest --hypothesis-profile random`; hostile files have their own half an hour, `make soak`.
settings.register_profile("random", settings.default)
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without looking for garbage: all that is imported stays, and going through it again and again takes half of the time.

    What is there at the end is not looked through later either, when tests leave garbage of their own.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """A folder of the real data by name; the test is skipped, with the reason, where there is none."""
    root = Path(os.environ.get("MICROTOME_DATA", REPOSITORY.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no real data: {root / name} is not there (set MICROTOME_DATA)")
        return root / name

    return find


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where no folder is yet, one after the other: pytest's own numbering looks at all folders there are for each new one."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in count())


@pytest.fixture(autouse=True)
def own_cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of engines stays in the test: not in the user's cache, nor in the next test."""
    monkeypatch.setenv("MICROTOME_CACHE", str(next(caches)))
