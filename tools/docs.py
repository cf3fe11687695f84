"""Writes what the documentation takes from the code: README's map of files, docs/cli.md, settings.md, networks, errors, guarantees.md.

`python -m tools.docs` writes them, `python -m tools.docs --check` says which of them are not current.
"""

import ast
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from tools.layers import LAYERS, REPOSITORY, SOURCE, path_of

MAP_START, MAP_END = "<!-- map of files: made by `make docs` -->\n", "<!-- end of the map -->\n"
MADE_BY = "<!-- made by `make docs` from the code; change the code, not this page -->\n"


@cache
def purpose(file: Path) -> str:
    """The first line of a module's docstring."""
    words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return words.partition("\n")[0]


def map_of_files() -> str:
    """The modules in the order of LAYERS, a folder's own line before its first file."""
    rows, folder = [("src/microtome/", purpose(SOURCE / "__init__.py"))], ""
    for module in LAYERS:
        parent, _, name = module.rpartition(".")
        if parent and parent != folder:
            rows.append((f"  {parent}/", purpose(SOURCE / parent / "__init__.py")))
        folder = parent
        rows.append((f"  {'  ' if parent else ''}{name}{path_of(module).suffix}", purpose(path_of(module))))
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{words}".rstrip() for name, words in rows]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def with_map(readme: str) -> str:
    """A README with its map of files replaced by the current one."""
    before, start, rest = readme.partition(MAP_START)
    _, end, after = rest.partition(MAP_END)
    if not (start and end):
        raise ValueError(f"README.md has no lines {MAP_START.strip()!r} and {MAP_END.strip()!r} around its map of files")
    return before + start + map_of_files() + end + after


def cli_page(app: Any) -> str:
    """Every command of a typer app with its arguments and options, in the order in which they are registered."""
    from typer.main import get_command

    group: Any = get_command(app)
    parts = [MADE_BY, "# The command line\n", _help_words(group), _table([p for p in group.params if not p.hidden], {})]
    for name, command in _commands(group, "microtome"):
        shown = [param for param in command.params if not param.hidden]
        parts += [f"## `{_usage(name, shown)}`\n", _help_words(command), _table(shown, _hints(command.callback))]
    return "\n".join(part for part in parts if part)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The commands below a group with the words that call them, groups inside it included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def _help_words(command: Any) -> str:
    """A command's help as a paragraph or more; typer's mark for a new line without a new paragraph is dropped."""
    return inspect.cleandoc(command.help or "").replace("\b\n", "").strip() + "\n" if command.help else ""


def _usage(name: str, params: list[Any]) -> str:
    """The line that calls a command: its words and its arguments."""
    words = [_argument(param) for param in params if param.param_type_name == "argument"]
    return " ".join([name, *words, *(["[OPTIONS]"] if len(words) < len(params) else [])])


def _argument(param: Any) -> str:
    """An argument as it is written in a usage line: NAME, [NAME], NAME..."""
    word = (param.metavar or param.name).strip("[].{}").upper() + ("..." if param.nargs == -1 else "")
    return word if param.required else f"[{word}]"


def _hints(callback: Callable[..., object] | None) -> dict[str, Any]:
    """The types of a command's parameters."""
    return typing.get_type_hints(callback) if callback else {}


def _table(params: list[Any], hints: dict[str, Any]) -> str:
    """The arguments and options of one command as a Markdown table."""
    if not params:
        return ""
    rows = [f"| {_word(param, hints.get(param.name))} | {_default(param)} | {_cell(param.help or '')} |" for param in params]
    return "\n".join(["| word | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _word(param: Any, hint: Any) -> str:
    """How a parameter is typed: `--minutes NUMBER`, `--device cpu|cuda`, `DATA`."""
    if param.param_type_name == "argument":
        return f"`{_cell(_argument(param))}`"
    names = ", ".join(param.opts) + ("".join(f" / {name}" for name in param.secondary_opts))
    value = "" if param.is_flag else f" {param.metavar or _kind(hint, param.name)}"
    return f"`{_cell(names + value)}`"


def _kind(hint: Any, name: str) -> str:
    """A word for the values of a type; the option's own name in capitals where the type says nothing better."""
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(part) for part in inner)
    if typing.get_origin(hint) in {typing.Union, types.UnionType, list, tuple} and inner:
        return _kind(inner[0], name)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(str(member.value) for member in hint)
    words = ((Path, "PATH"), (int, "WHOLE NUMBER"), (float, "NUMBER"))
    return next((word for kind, word in words if hint is kind), name.upper())


def _default(param: Any) -> str:
    """What holds when the word is left out."""
    if param.required:
        return "must be given"
    if param.default in (None, "", (), []) or callable(param.default):
        return ""
    if isinstance(param.default, bool):
        return "on" if param.default else "off"
    value = param.default.value if isinstance(param.default, Enum) else param.default
    return f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    """Text that keeps a Markdown table whole."""
    return " ".join(text.split()).replace("|", "\\|")


def settings_page(*modules: types.ModuleType) -> str:
    """Every config of some modules, in the order of the files, field by field."""
    values = [(module.__name__, value) for module in modules for value in vars(module).values() if isinstance(value, type)]
    kinds: list[Any] = [kind for name, kind in values if getattr(kind, "model_fields", None) and kind.__module__ == name]
    parts = [MADE_BY, "# Settings\n", "What a plan (`plan.yaml`) and a folder's `microtome.yaml` may say; an unknown name is an error.\n"]
    for kind in kinds:
        parts += [f"## {kind.__name__}\n", inspect.cleandoc(kind.__doc__ or "") + "\n", _settings_table(kind)]
    return "\n".join(parts)


def _settings_table(kind: Any) -> str:
    """The fields of one config as a Markdown table."""
    rows = [
        f"| `{name}` | {_field_type(field)} | {_field_default(field)} | {_cell(field.description or '')} |"
        for name, field in kind.model_fields.items()
    ]
    return "\n".join(["| name | values | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _field_type(field: Any) -> str:
    """The type of a field as it is written in the code, without the names of modules."""
    hint = field.annotation
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    for prefix in ("typing.", "collections.abc.", "microtome.config.", "pathlib._local.", "pathlib."):
        text = text.replace(prefix, "")
    return f"`{_cell(text)}`"


def _field_default(field: Any) -> str:
    """What holds when a field is left out; a group of settings refers to its own table."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    return f"see {type(value).__name__}" if hasattr(type(value), "model_fields") else f"`{_cell(repr(value))}`"


def pages() -> dict[Path, str]:
    """Each generated page with the text that it should have."""
    from microtome import cli, config
    from microtome.data import description

    readme = REPOSITORY / "README.md"
    return {
        readme: with_map(readme.read_text(encoding="utf-8")),
        REPOSITORY / "docs" / "cli.md": cli_page(cli.app),
        REPOSITORY / "docs" / "settings.md": settings_page(config, description),
    }


def main(words: list[str]) -> int:
    """Write the pages, or with `--check` name those that are not current; 1 when there are any."""
    from tools import errors, guarantees
    from tools.gallery import network_pages

    made = pages() | network_pages() | errors.pages() | guarantees.pages()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(REPOSITORY)}: {'not current; run `make docs`' if '--check' in words else 'written'}")
    if "--check" in words:
        return int(bool(stale))
    for path, text in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
