"""Measures the source against the budgets of the house style; `python -m tools.measure` prints them.

Each measure takes parsed files and returns numbers, or findings as `file:line: what`.
"""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.layers import REPOSITORY, SOURCE

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
UNPICKLING_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "os.system"}


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    name: str
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All that the tree is made of; walking it takes longer than parsing, and every measure asks."""
        return tuple(ast.walk(self.tree))

    def at(self, node: ast.stmt | ast.expr | ast.excepthandler, what: str) -> str:
        """A finding at a node."""
        return f"{self.name}:{node.lineno}: {what}"

    def line(self, number: int) -> str:
        """One line of the text, counted from 1."""
        return self.text.splitlines()[number - 1]


def parse(text: str, name: str = "example.py") -> Source:
    """Source text as a parsed file."""
    return Source(name, text, ast.parse(text))


def sources(root: Path = SOURCE) -> list[Source]:
    """Every Python file below a folder, parsed."""
    return [parse(file.read_text(encoding="utf-8"), str(file.relative_to(REPOSITORY))) for file in sorted(root.rglob("*.py"))]


def functions(source: Source) -> Iterator[Function]:
    """Every function of a file: methods and nested functions too."""
    return (node for node in source.nodes if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the end, comments and blank lines included."""
    start = 1 if ast.get_docstring(function) is not None else 0
    body = function.body[start:]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def nesting(function: Function) -> int:
    """Depth of blocks in a function; `elif` is on the level of its `if`, a nested function starts again."""
    return max((_depth(child) for child in function.body), default=0)


def _depth(node: ast.AST) -> int:
    """Depth of blocks from a statement inwards."""
    if isinstance(node, Definition):
        return 0
    inner = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    if not isinstance(node, BLOCKS):
        return inner
    chain = node.orelse[0] if isinstance(node, ast.If) and len(node.orelse) == 1 else None
    if isinstance(chain, ast.If) and isinstance(node, ast.If):
        inside = max((_depth(child) for child in [node.test, *node.body]), default=0)
        return max(1 + inside, _depth(chain))
    return inner + 1


def parameters(function: Function) -> tuple[int, int]:
    """Positional-or-keyword parameters, and all of them, without `self` and `cls`."""
    positional = [arg for arg in (*function.args.posonlyargs, *function.args.args) if arg.arg not in {"self", "cls"}]
    variadic = sum(arg is not None for arg in (function.args.vararg, function.args.kwarg))
    return len(positional), len(positional) + len(function.args.kwonlyargs) + variadic


def is_command(function: Function) -> bool:
    """Whether a function is a command's body, where a parameter is an option that a user may type."""
    names = (ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list)
    return any(name.endswith((".command", ".callback")) for name in names)


def untyped(source: Source) -> list[str]:
    """Parameters and returns without a type."""
    found = []
    for function in functions(source):
        spec = function.args
        args = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        names = [arg.arg for arg in args if arg.annotation is None and arg.arg not in {"self", "cls"}]
        names += ["return"] if function.returns is None else []
        found += [source.at(function, f"{function.name} does not type {name}") for name in names]
    return found


def undocumented(source: Source) -> list[str]:
    """Public modules, classes, functions and methods without a docstring."""
    found = [] if ast.get_docstring(source.tree) else [f"{source.name}:1: module"]
    return found + [source.at(node, node.name) for node in _public(source.tree) if not ast.get_docstring(node)]


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """The public classes and functions of a module or class, and those inside public classes."""
    for node in scope.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def raises(source: Source) -> tuple[int, list[str]]:
    """How many errors are made and raised, and those of them that do not carry the offending value.

    Passing on a caught error, an error made by a helper, and ways out of a command (`Exit`) do not count.
    """
    made = [node for node in source.nodes if isinstance(node, ast.Raise) and _makes_error(node.exc)]
    return len(made), [source.at(node, ast.unparse(node)) for node in made if not _carries_value(node.exc)]


def _makes_error(exc: ast.expr | None) -> bool:
    """Whether a `raise` names an error class, called or not."""
    name = ast.unparse(exc.func if isinstance(exc, ast.Call) else exc).rpartition(".")[2] if exc else ""
    return name[:1].isupper() and name not in {"Exit", "SystemExit", "Abort"}


def _carries_value(exc: ast.expr | None) -> bool:
    """Whether any argument of the error is more than fixed text."""
    if not isinstance(exc, ast.Call):
        return False
    parts = [*exc.args, *(keyword.value for keyword in exc.keywords)]
    return any(isinstance(node, (ast.Name, ast.Attribute, ast.Call)) for part in parts for node in ast.walk(part))


def unexplained_broad_excepts(source: Source) -> list[str]:
    """`except:`, `except Exception` and `except BaseException` without a reason of two words in their line."""
    handlers = [node for node in source.nodes if isinstance(node, ast.ExceptHandler)]
    broad = [node for node in handlers if node.type is None or {"Exception", "BaseException"} & _names(node.type)]
    return [source.at(node, source.line(node.lineno).strip()) for node in broad if not _has_reason(source.line(node.lineno))]


def _names(node: ast.expr) -> set[str]:
    """Every plain name in an expression."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _has_reason(line: str) -> bool:
    """Whether a line's comment says more than which rule it silences."""
    said = re.sub(r"(noqa|type):\s*\S+", "", line.partition("#")[2])
    return len(re.findall(r"\w+", said)) >= 2


def mutable_globals(source: Source) -> list[str]:
    """Module-level names bound to lists, dicts and sets, and every `global` statement."""
    found = [source.at(node, f"global {', '.join(node.names)}") for node in source.nodes if isinstance(node, ast.Global)]
    for node in source.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("__")]
        if names and isinstance(node, ast.Assign | ast.AnnAssign) and _is_mutable(node.value):
            found.append(source.at(node, f"{names[0]} can be changed in place"))
    return found


def _is_mutable(value: ast.expr | None) -> bool:
    """Whether an expression makes a list, dict or set."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS
    return isinstance(value, MUTABLE_DISPLAYS)


def prints(source: Source) -> list[str]:
    """Calls of `print`."""
    return [source.at(call, "print") for call in _calls(source) if ast.unparse(call.func) == "print"]


def unsafe(source: Source) -> list[str]:
    """Whatever could run code out of a file: unpickling, `eval`, `exec`, unsafe YAML, a shell."""
    found = [source.at(call, ast.unparse(call.func)) for call in _calls(source) if _is_unsafe(call)]
    return found + [f"{source.name}: import {name}" for name in imported(source) if name.partition(".")[0] in UNPICKLING_MODULES]


def imported(source: Source) -> list[str]:
    """The modules that a file imports, wherever in it."""
    plain = [alias.name for node in source.nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in source.nodes if isinstance(node, ast.ImportFrom) and node.module]


def _calls(source: Source) -> Iterator[ast.Call]:
    """Every call of a file."""
    return (node for node in source.nodes if isinstance(node, ast.Call))


def _is_unsafe(call: ast.Call) -> bool:
    """Whether one call can run code out of a file or a string."""
    on = {keyword.arg for keyword in call.keywords if isinstance(keyword.value, ast.Constant) and keyword.value.value is True}
    return ast.unparse(call.func) in UNSAFE_CALLS or bool({"allow_pickle", "shell"} & on)


def comments_and_code(source: Source) -> tuple[int, int]:
    """Comments, and lines with code on them; docstrings are neither."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source.text).readline))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {line for token in tokens if token.type not in skipped for line in range(token.start[0], token.end[0] + 1)}
    return sum(token.type == tokenize.COMMENT for token in tokens), len(code - _docstring_lines(source))


def code_lines(source: Source) -> int:
    """About the lines with code on them: no blank ones, comments or docstrings; ten times as fast as taking the text apart."""
    lines = {number for number, line in enumerate(source.text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")}
    return len(lines - _docstring_lines(source))


def _docstring_lines(source: Source) -> set[int]:
    """Lines that belong to docstrings."""
    lines: set[int] = set()
    for node in source.nodes:
        if isinstance(node, Definition | ast.Module) and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def comment_density(files: Iterable[Source]) -> float:
    """Comments in 100 lines of code."""
    counts = [comments_and_code(source) for source in files]
    return 100 * sum(comments for comments, _ in counts) / max(1, sum(code for _, code in counts))


def main() -> None:
    """Print the measures of the package."""
    files = sources()
    lengths = sorted(body_lines(function) for source in files for function in functions(source))
    made = sum(raises(source)[0] for source in files)
    bare = [finding for source in files for finding in raises(source)[1]]
    code = sum(map(code_lines, files))
    test_code = sum(map(code_lines, sources(REPOSITORY / "tests")))
    rows = (
        ("files", f"{len(files)}, longest {max(len(source.text.splitlines()) for source in files)} lines"),
        ("code lines", f"{code}; test lines per code line {test_code / code:.2f}"),
        ("functions", f"{len(lengths)}: median {statistics.median(lengths)}, p90 {percentile(lengths, 90)}, max {lengths[-1]} lines"),
        ("deepest nesting", max(nesting(function) for source in files for function in functions(source))),
        ("raises carrying the value", f"{100 * (made - len(bare)) / max(1, made):.0f} % of {made}"),
        ("comments in 100 code lines", f"{comment_density(files):.1f}"),
    )
    for name, value in rows:
        print(f"{name:<28}{value}")


def percentile(ordered: list[int], percent: int) -> int:
    """The value at a percentile of sorted numbers, by nearest rank."""
    return ordered[min(len(ordered) - 1, -(-percent * len(ordered) // 100) - 1)]


if __name__ == "__main__":
    main()
