"""`predictions.json`: which case each prediction in a folder is of, and the legend of their values; several calls may add to one."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import StrictStr

from microtome.config import Config, parse_config
from microtome.data.case import Case
from microtome.data.description import inside
from microtome.data.legend import Legend, LegendForm
from microtome.errors import ConfigError, DataError, RunError
from microtome.files import write_json
from microtome.json_files import MOST_OWN_BYTES, load_json
from microtome.lock import taking_turns

LISTING = "predictions.json"
# The list is written anew after so many files or seconds: with every file, many files would cost the square of their number.
FILES_BETWEEN, SECONDS_BETWEEN = 50, 5.0
# Whoever waited in vain for its turn, a minute, writes files for so long before it waits again.
SECONDS_AFTER_WAITING = 600.0
# The code of the error that says so.
_IN_USE = "R121"
_DO = "predict again or remove it"


class _Of(Config):
    case: StrictStr
    input: StrictStr


class _Form(Config):
    """The list as JSON holds it."""

    legend: LegendForm
    cases: dict[str, _Of]
    writing: tuple[StrictStr, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a prediction is of: the case's name and its (first) image file."""

    case: str
    image: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The content of `predictions.json`.

    Attributes:
        legend: of the values in the files.
        entries: file, relative to the folder -> what it is a prediction of.
        writing: names without suffix of files that a call was about to write; empty once it ended.
    """

    legend: Legend
    entries: Mapping[str, Entry] = field(default_factory=dict)
    writing: frozenset[str] = frozenset()


def read_listing(folder: Path) -> Listing | None:
    """The list of a folder; None where there is none.

    Raises:
        DataError: the list is not one that `predict` wrote, or names files outside of the folder.
    """
    path = folder / LISTING
    try:
        if not path.is_file():
            return None
    except OSError as error:
        got, do = error.strerror or str(error), "give another --out, or the right to read it"
        raise DataError(path, expected="a folder that can be read", got=got, do=do, code="D001") from None
    try:
        form = parse_config(_Form, load_json(path, do=_DO, most_bytes=MOST_OWN_BYTES), path)
    except ConfigError as error:
        got = error.got[:300]
        raise DataError(
            path, expected=f"the list that `microtome predict` writes, {error.expected}", got=got, do=_DO, code="D065"
        ) from None
    for file in form.cases:
        inside(folder, file, path)
    return Listing(
        legend=Legend(**dict(form.legend)),
        entries={file: Entry(case=of.case, image=of.input) for file, of in form.cases.items()},
        writing=frozenset(form.writing),
    )


def write_listing(folder: Path, listing: Listing) -> None:
    """Write the list of a folder in one step."""
    content: dict[str, Any] = {
        "legend": listing.legend.to_json(),
        "cases": {file: {"case": entry.case, "input": entry.image} for file, entry in listing.entries.items()},
    }
    if listing.writing:
        content["writing"] = sorted(listing.writing)
    write_json(folder / LISTING, content)


def continued_listing(folder: Path, legend: Legend) -> Listing:
    """What a folder lists already, if predictions of this legend may be added to it; an empty list where there is none.

    Raises:
        DataError: it lists predictions with other values, beside which nobody could tell what a value means.
    """
    listing = read_listing(folder)
    if listing is None:
        return Listing(legend=legend)
    if _codes(listing.legend) != _codes(legend):
        expected = f"predictions of {legend.words}, or none"
        raise DataError(folder / LISTING, expected=expected, got=f"those of {listing.legend.words}", do="give another --out", code="D066")
    return listing


class Recorder:
    """Notes predictions as they are written; `recording` makes it."""

    def __init__(self, folder: Path, legend: Legend, names: Iterable[str]) -> None:
        self.folder, self.legend, self.own = folder, legend, frozenset(names)
        self.added: dict[str, Entry] = {}
        # As this call wrote it last, and the file by which it is seen that nobody else did since.
        self.known: tuple[Listing, tuple[int, ...] | None] | None = None
        self.not_before = -math.inf
        self._write(self.own)

    def add(self, path: Path, case: Case) -> None:
        """Note that `path`, a file in the folder that is complete, is a prediction of this case.

        A turn that another process does not give away ends no prediction: the entry is written with a later one, or at `close`.
        """
        self.added[path.relative_to(self.folder).as_posix()] = Entry(case=case.name, image=str(case.images[0]))
        self.waiting += 1
        now = time.monotonic()
        if now < self.not_before or (self.waiting < FILES_BETWEEN and now - self.written <= SECONDS_BETWEEN):
            return
        try:
            self._write(self.own)
        except RunError as error:
            if error.code != _IN_USE:
                raise
            self.not_before = time.monotonic() + SECONDS_AFTER_WAITING

    def close(self) -> None:
        """Write the whole list: nothing of this call is under way any more."""
        self._write(frozenset())

    def _write(self, own: frozenset[str]) -> None:
        """Add what this call wrote to what others did, in the list as it is now; `own` are names that this call is about to write."""
        with taking_turns(self.folder):
            if self.known is None or self.known[1] != _seen(self.folder):
                now = continued_listing(self.folder, self.legend)
            else:
                now = self.known[0]
            # What a kill left behind is ours for as long as nobody has written it anew.
            writing = (now.writing - self.own) | own
            listing = Listing(legend=self.legend, entries={**now.entries, **self.added}, writing=writing)
            write_listing(self.folder, listing)
            self.known = listing, _seen(self.folder)
        self.waiting, self.written = 0, time.monotonic()


@contextmanager
def recording(folder: Path, legend: Legend, names: Iterable[str]) -> Iterator[Recorder]:
    """A recorder of the predictions that the body writes into a folder; entries of other calls, earlier or at the same time, stay.

    All names are listed before the first file is written, so that what a kill leaves behind is known as ours.

    Args:
        folder: of the predictions.
        legend: of the values in them.
        names: of the files to come, relative to the folder, without suffix.

    Raises:
        DataError: the folder has a list that `predict` did not write, or of a legend with other values.
        RunError: the list cannot be written; or another process keeps its turn at the first or the last writing of it.
    """
    recorder = Recorder(folder, legend, names)
    yield recorder
    recorder.close()


def forget_empty(folder: Path) -> None:
    """Remove a list that lists nothing, and the folder if nothing else lies there: what is left of a call that could do nothing.

    Raises:
        DataError: the list is none that `predict` wrote.
    """
    if not (folder / LISTING).exists():
        return
    with taking_turns(folder):
        found = read_listing(folder)
        if found is not None and not found.entries and not found.writing:
            (folder / LISTING).unlink()
    with suppress(OSError):
        folder.rmdir()


def _seen(folder: Path) -> tuple[int, ...] | None:
    """What tells a list from another that was put in its place, also where times are coarse; None where there is none."""
    try:
        found = (folder / LISTING).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _codes(legend: Legend) -> tuple[Any, ...]:
    """What must be alike for a value to mean the same; how a legend was found need not be."""
    return legend.names, legend.values, legend.ignored, legend.kind
