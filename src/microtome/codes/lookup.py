"""A code -> what it stands for and the lines that carry it; what `microtome explain` and docs/errors show."""

import ast
import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from microtome.codes import dataset, evaluation, images, models, networks, prediction, settings, stores, training
from microtome.codes.fault import Fault
from microtome.errors import PREFIX, ConfigError

AREAS: Mapping[str, Mapping[str, Fault]] = MappingProxyType(
    {module.AREA: module.FAULTS for module in (images, stores, dataset, settings, networks, models, training, prediction, evaluation)}
)
FAULTS: Mapping[str, Fault] = MappingProxyType({code: fault for faults in AREAS.values() for code, fault in sorted(faults.items())})
PACKAGE = Path(__file__).parents[1]
PARTS = ("expected", "got", "do")
BLANK = "..."


@dataclass(frozen=True)
class Line:
    """A place in the code that makes an error.

    Attributes:
        module: `images.tiff`.
        kind: the class of the error, `DataError`.
        code: D012; "" where it takes over that of another error.
        parts: expected, got, do in words, `...` for what is filled in; "" where nothing of it stands there.
    """

    module: str
    kind: str
    code: str
    parts: Mapping[str, str]

    @property
    def form(self) -> str:
        """The line as it is shown, without its beginning."""
        expected, got, do = (self.parts[name] for name in PARTS)
        return f"expected {expected}, got {got}; {do}"


def code_of(text: str) -> str:
    """The code that was typed, `MT-D012`, `D012` or `d012`.

    Raises:
        ConfigError: there is none; proposes the nearest.
    """
    code = text.strip().upper().removeprefix(PREFIX)
    if code in FAULTS:
        return code
    near = difflib.get_close_matches(code, FAULTS, n=1, cutoff=0.4)
    do = f"did you mean {PREFIX}{near[0]}?" if near else "see `microtome explain` for all"
    raise ConfigError("explain", expected="a code such as MT-D031", got=f"`{text}`", do=do, code="C001")


def explained(code: str) -> str:
    """What is told of a code on a terminal."""
    fault = FAULTS[code]
    modules = dict.fromkeys(line.module for line in lines_of(code))
    places = [_wrapped(f"{module}: {purpose(module)}", "  ") for module in modules]
    cause, cure = _wrapped(fault.cause), _wrapped(f"What to do: {fault.cure}")
    return "\n".join([f"{PREFIX}{code}: {fault.title}", "", cause, "", cure, "", "Comes from:", *places])


def listed() -> str:
    """All codes by area, a line each."""
    blocks = ["\n".join([area, *(f"  {PREFIX}{code}  {faults[code].title}" for code in sorted(faults))]) for area, faults in AREAS.items()]
    return "\n\n".join(blocks)


def _wrapped(text: str, indent: str = "") -> str:
    """A paragraph as wide as the terminal, 100 letters at most; commands stay whole, to be copied."""
    whole = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), text)
    width = min(100, shutil.get_terminal_size().columns)
    wrapper = textwrap.TextWrapper(
        width, initial_indent=indent, subsequent_indent=2 * indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(whole).replace("\0", " ")


def purpose(module: str) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(_sources()[module])) or "").partition("\n")[0]


def lines_of(code: str) -> tuple[Line, ...]:
    """The lines that carry a code, in the order of the files."""
    modules = [module for module, source in _sources().items() if f'"{code}"' in source]
    return tuple(line for module in modules for line in lines_in(module) if line.code == code)


def all_lines() -> tuple[Line, ...]:
    """Every place in the package that makes an error for people."""
    return tuple(line for module in _sources() for line in lines_in(module))


@cache
def _sources() -> Mapping[str, str]:
    """The modules of the package, without these pages."""
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if file.parent.name != "codes" or file.stem == "lookup")
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file.read_text(encoding="utf-8") for file in files}


@cache
def lines_in(module: str) -> tuple[Line, ...]:
    """The errors that a module makes, with the words that stand there."""
    return tuple(_lines(module, ast.parse(_sources()[module])))


def _lines(module: str, tree: ast.Module) -> Iterator[Line]:
    kinds = {"MicrotomeError", "DataError", "ConfigError", "RunError"}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for call in _own(function):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            # An error of a kind of its own gives its words to the class above it.
            if name in kinds or (name == "__init__" and any(word.arg == "expected" for word in call.keywords)):
                words = {word.arg: word.value for word in call.keywords if word.arg}
                parts = {part: said(words[part], function, call.lineno) if part in words else "" for part in PARTS}
                code = words.get("code")
                yield Line(module, name, str(code.value) if isinstance(code, ast.Constant) else "", parts)


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function in the order of its lines, without those of functions in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef):
            yield from _below(child)


def _below(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield from _below(child)


def said(node: ast.expr, function: ast.FunctionDef, line: int) -> str:
    """The text that an expression makes, `...` for each part that is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else BLANK for part in node.values)
    if isinstance(node, ast.IfExp):
        return " or ".join(dict.fromkeys((said(node.body, function, line), said(node.orelse, function, line))))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return said(node.left, function, line) + said(node.right, function, line)
    if isinstance(node, ast.Name) and (value := _assigned(node.id, function, line)) is not None:
        # What it is made of was assigned above.
        return said(value, function, value.lineno)
    return BLANK


def _assigned(name: str, function: ast.FunctionDef, line: int) -> ast.expr | None:
    """The value that a name was given last above a line of a function; None where that cannot be told."""
    found = None
    for node in _own(function):
        if isinstance(node, ast.Assign) and node.lineno <= line and len(node.targets) == 1:
            target = node.targets[0]
            pairs = (
                zip(target.elts, node.value.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else ((target, node.value),)
            )
            found = next((value for each, value in pairs if isinstance(each, ast.Name) and each.id == name), found)
    return found
