"""The errors a user can meet; every one says what was expected, what was found and what to do."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

# Codes are written MT-D012 where people read them, and D012 in the code.
PREFIX = "MT-"

_E = TypeVar("_E", bound="MicrotomeError")


class MicrotomeError(Exception):
    """Base of all errors meant for a person. `exit_code` is what the command line returns.

    The four parts make the one line that is shown: `where: expected E, got G; do this`. `code` names the page that tells more
    (`codes`): a letter for the kind of error and three digits, which stand for one kind of fault for ever.
    """

    exit_code = 1

    def __init__(self, where: str | Path, *, expected: str, got: str, do: str, code: str = "") -> None:
        self.where, self.expected, self.got, self.do, self.code = str(where), expected, got, do, code
        super().__init__(in_one_line(f"{where}: expected {expected}, got {got}; {do}"))

    def __reduce__(self) -> tuple[Any, ...]:
        # As an exception is pickled otherwise, `__init__` would be called again without its keywords.
        return _as_it_was, (type(self), self.args, self.__dict__)

    @property
    def line(self) -> str:
        """What is shown: the words, and the code to look up (`microtome explain MT-D012`)."""
        return f"{self} [{PREFIX}{self.code}]" if self.code else str(self)

    def on(self, machine: str) -> Self:
        """The same error, found on another machine, which it names."""
        return self._with(got=f"{self.got} (on {machine})")

    def led_to_by(self, where: str | Path) -> Self:
        """The same error about a file that is part of another, which a user gave and which it names first."""
        return self._with(where=str(where), expected=f"{self.expected} in {Path(self.where).name}")

    def _with(self, **words: str) -> Self:
        """A copy with some of its parts changed."""
        parts = {**self.__dict__, **words}
        line = in_one_line(f"{parts['where']}: expected {parts['expected']}, got {parts['got']}; {parts['do']}")
        return _as_it_was(type(self), (line,), parts)


class DataError(MicrotomeError):
    """A file or folder is not what it has to be."""

    exit_code = 2


class ConfigError(MicrotomeError):
    """A plan, an option or a `microtome.yaml` says something that cannot be done."""

    exit_code = 2


class RunError(MicrotomeError):
    """Good data and good words, but the run could not go on (disk full, loss not finite, ...)."""


def in_one_line(text: str) -> str:
    """What every terminal can show in one line: names of files may hold line ends, and bytes that are no letters."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _as_it_was(kind: type[_E], args: tuple[Any, ...], parts: dict[str, Any]) -> _E:
    """An error with these parts, as it comes out of another process."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(parts)
    return error


class StoppedError(RunError):
    """Somebody asked a training to stop: it saved itself, and `--resume` goes on.

    Its exit code is EX_TEMPFAIL of sysexits.h, by which a job script knows that the job is to be started again.
    """

    exit_code = 75


class LeftAtOnceError(SystemExit):
    """Somebody asked a second time to stop: what was not saved is given up. Its code is the one of a process that the signal ended."""


class ShortOfMemoryError(RunError):
    """Memory was not enough in another process; whoever sent it the work may try with less at a time."""


class DataWarning(UserWarning):
    """Something about a file was assumed; the message names the file and the assumption."""


def unknown_choice(where: str, given: str, known: Iterable[str], most: int = 1) -> ConfigError:
    """The error for a word that is none of the known ones; it proposes the nearest, at most so many."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=most, cutoff=0.4)
    do = f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "choose one of them"
    return ConfigError(where, expected=f"one of {', '.join(names)}", got=f"`{given}`", do=do, code="C001")


def missing_extra(what: str, package: str, extra: str) -> ConfigError:
    """The error for something that needs a package which is not installed: `what` cannot be done until `extra` is."""
    return ConfigError(
        what, expected=f"the package {package}", got="it is not installed", do=f'run: pip install "microtome[{extra}]"', code="C002"
    )
