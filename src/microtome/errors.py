"""The errors a user can meet; every one says what was expected, what was found and what to do."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class MicrotomeError(Exception):
    """Base of all errors meant for a person. `exit_code` is what the command line returns.

    The four parts make the one line that is shown: `where: expected E, got G; do this`. `code` names the page that tells more.
    """

    exit_code = 1

    def __init__(self, where: str | Path, *, expected: str, got: str, do: str, code: str = "") -> None:
        self.where, self.expected, self.got, self.do, self.code = str(where), expected, got, do, code
        super().__init__(f"{where}: expected {expected}, got {got}; {do}")


class DataError(MicrotomeError):
    """A file or folder is not what it has to be."""

    exit_code = 2


class ConfigError(MicrotomeError):
    """A plan, an option or a `microtome.yaml` says something that cannot be done."""

    exit_code = 2


class RunError(MicrotomeError):
    """Good data and good words, but the run could not go on (disk full, loss not finite, ...)."""


class DataWarning(UserWarning):
    """Something about a file was assumed; the message names the file and the assumption."""


def unknown_choice(where: str, given: str, known: Iterable[str], most: int = 1) -> ConfigError:
    """The error for a word that is none of the known ones; it proposes the nearest, at most so many."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=most, cutoff=0.4)
    do = f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "choose one of them"
    return ConfigError(where, expected=f"one of {', '.join(names)}", got=f"`{given}`", do=do)


def missing_extra(what: str, package: str, extra: str) -> ConfigError:
    """The error for something that needs a package which is not installed: `what` cannot be done until `extra` is."""
    return ConfigError(what, expected=f"the package {package}", got="it is not installed", do=f'run: pip install "microtome[{extra}]"')
