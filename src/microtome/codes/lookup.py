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
from typing import NamedTuple

from microtome.codes import dataset, evaluation, images, models, networks, prediction, settings, stores, training
from microtome.codes.fault import Fault
from microtome.codes.findings import BY_FINDING
from microtome.errors import PREFIX, ConfigError

AREAS: Mapping[str, Mapping[str, Fault]] = MappingProxyType(
    {module.AREA: module.FAULTS for module in (images, stores, dataset, settings, networks, models, training, prediction, evaluation)}
)
FAULTS: Mapping[str, Fault] = MappingProxyType({code: fault for faults in AREAS.values() for code, fault in sorted(faults.items())})
PACKAGE = Path(__file__).parents[1]
PARTS = ("expected", "got", "do")
BLANK = "…"


@dataclass(frozen=True)
class Line:
    """A place in the code that makes an error.

    Attributes:
        module: `images.tiff`.
        kind: the class of the error, DataError, ConfigError or RunError, also where it is made of a class below one of these.
        code: D012; "" where it takes over that of another error.
        parts: expected, got, do in words, `…` for what is filled in; "" where nothing of it stands there.
    """

    module: str
    kind: str
    code: str
    parts: Mapping[str, str]

    @property
    def form(self) -> str:
        """The line as it is shown, without its beginning."""
        expected, got, do = (self.parts[name] for name in PARTS)
        return re.sub(f"{BLANK}{{2,}}", BLANK, f"expected {expected}, got {got}; {do}")


class Scope(NamedTuple):
    """Where a name is looked up: a function, and its module."""

    tree: ast.Module
    function: ast.FunctionDef


def code_of(text: str) -> str:
    """The code that was typed, `MT-D012`, `[MT-D012]`, `D012`, `d012`, `mt-d12`, `MT D012`, or its number where one code alone has it.

    Raises:
        ConfigError: there is none; proposes the nearest.
    """
    typed = text.strip(" []").upper()
    code = typed.removeprefix(PREFIX).removeprefix(PREFIX.replace("-", " "))
    if found := re.fullmatch(r"([A-Z]?)[- ]?0*([0-9]{1,3})", code, re.ASCII):
        letter, number = found[1], int(found[2])
        alike = [each for each in FAULTS if each.startswith(letter) and int(each[1:]) == number]
        if len(alike) == 1:
            return alike[0]
        code = f"{letter}{number:03}"
    near = difflib.get_close_matches(code, FAULTS, n=1, cutoff=0.4)
    do = f"did you mean {PREFIX}{near[0]}?" if near else "see `microtome explain` for all"
    raise ConfigError("explain", expected="a code such as MT-D031", got=f"`{text}`", do=do, code="C001")


def explained(code: str) -> str:
    """What is told of a code on a terminal."""
    fault = FAULTS[code]
    modules = dict.fromkeys(line.module for line in lines_of(code))
    places = [_wrapped(f"{module}: {purpose(module)}", "  ") for module in modules]
    places += [_wrapped(f"microtome inspect, as `{word}`", "  ") for word in findings_of(code)]
    cause, cure = _wrapped(fault.cause), _wrapped(f"What to do: {fault.cure}")
    return "\n".join([f"{PREFIX}{code}: {fault.title}", "", cause, "", cure, "", "Comes from:", *places])


def document(code: str) -> dict[str, object]:
    """What is told of a code, for programs."""
    area = next(area for area, faults in AREAS.items() if code in faults)
    fault = FAULTS[code]
    modules = list(dict.fromkeys(line.module for line in lines_of(code)))
    words = {"code": f"{PREFIX}{code}", "area": area, "title": fault.title, "cause": fault.cause, "cure": fault.cure}
    return {**words, "forms": list(forms_of(code)), "modules": modules, "findings": list(findings_of(code))}


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


def forms_of(code: str) -> tuple[str, ...]:
    """The lines that carry a code, as they are shown, each once."""
    return tuple(dict.fromkeys(line.form for line in lines_of(code)))


def findings_of(code: str) -> tuple[str, ...]:
    """The words by which programs know what `microtome inspect` finds and gives this code."""
    return tuple(word for word, each in BY_FINDING.items() if each == code)


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
    source = _sources()[module]
    return tuple(_lines(module, ast.parse(source))) if "expected=" in source else ()


@cache
def kinds() -> Mapping[str, str]:
    """The classes of errors for people that the package has -> the one of the three kinds that each is of."""
    found = {name: name for name in ("MicrotomeError", "DataError", "ConfigError", "RunError")}
    for source in _sources().values():
        if "Error):" in source:
            classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name not in found)
            found |= {node.name: found[base] for node in classes for base in map(ast.unparse, node.bases) if base in found}
    return MappingProxyType(found)


def _lines(module: str, tree: ast.Module) -> Iterator[Line]:
    # An error of a kind of its own gives its words to the class above it.
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in kinds()]
    own = {method: node.name for node in classes for method in node.body if isinstance(method, ast.FunctionDef)}
    for function, call in sorted(_worded(tree), key=lambda found: found[1].lineno):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        name = own.get(function, "") if name == "__init__" else name
        if name in kinds():
            words = {word.arg: word.value for word in call.keywords if word.arg}
            parts = {part: said(words[part], Scope(tree, function), call.lineno) if part in words else "" for part in PARTS}
            code = words.get("code")
            yield Line(module, kinds()[name], str(code.value) if isinstance(code, ast.Constant) else "", parts)


def _worded(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """Every call that says what was expected, with the innermost function that it stands in."""
    todo: list[tuple[ast.AST, ast.FunctionDef | None]] = [(tree, None)]
    while todo:
        node, function = todo.pop()
        function = node if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call) and function and any(word.arg == "expected" for word in node.keywords):
            yield function, node
        todo += [(child, function) for child in ast.iter_child_nodes(node)]


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


def said(node: ast.expr, scope: Scope, line: int) -> str:
    """The text that an expression makes at a line, `…` for each part that is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else BLANK for part in node.values)
    if isinstance(node, ast.IfExp):
        return " or ".join(dict.fromkeys((said(node.body, scope, line), said(node.orelse, scope, line))))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return said(node.left, scope, line) + said(node.right, scope, line)
    if isinstance(node, ast.Name) and (value := _assigned(node.id, scope, line)) is not None:
        # What it is made of was assigned above.
        return said(value, scope, value.lineno)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and (made := _returned(node.func.id, scope)) is not None:
        return made
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return said(node.func.value, scope, line).replace("{}", BLANK)
    return BLANK


def _assigned(name: str, scope: Scope, line: int) -> ast.expr | None:
    """The value that a name was given last above a line of a function, else of its module; None where that cannot be told."""
    found = None
    for node in (*scope.tree.body, *_own(scope.function)):
        if isinstance(node, ast.Assign) and node.lineno <= line and len(node.targets) == 1:
            target = node.targets[0]
            pairs = (
                zip(target.elts, node.value.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else ((target, node.value),)
            )
            found = next((value for each, value in pairs if isinstance(each, ast.Name) and each.id == name), found)
    return found


def _returned(name: str, scope: Scope) -> str | None:
    """The words that a function of the module returns, if it is one line of them."""
    for function in scope.tree.body:
        if isinstance(function, ast.FunctionDef) and function.name == name:
            ends = [node for node in _own(function) if isinstance(node, ast.Return)]
            if len(ends) == 1 and isinstance(ends[0].value, ast.Constant | ast.JoinedStr | ast.Call):
                return said(ends[0].value, Scope(scope.tree, function), ends[0].lineno)
    return None
