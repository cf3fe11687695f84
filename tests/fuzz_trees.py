"""Changes of what JSON and YAML hold: values become any others, names change, brackets nest; by chance, or as hypothesis draws them."""

import json
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import yaml
from hypothesis import strategies as st

# Where the C parser was built, it takes a tenth of the time.
SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Values of every type, at the ends of what they hold; what no number, name or path may be.
LEAVES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    255,
    256,
    65536,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    ".",
    "..",
    "../a",
    "/etc/passwd",
    "a/../../b",
    "a\0b",
    "a\nb",
    "\ud800",
    "\u202e",
    "x" * 300,
    "0",
    "1e5",
    "nan",
    "-1",
    "None",
    "*",
    "**/*",
    "[",
    "(",
    "(a+)+$",
    "\\",
    "#ff8800",
    "<script>",
    "{{7*7}}",
    "%s%n",
)
_CONTAINERS: tuple[Any, ...] = ([], {}, [[]], [None], {"": None}, [0, 0, 0], [1, 2], ["a", "b"], {"a": 1}, [[1, 2], [3]], {"0": {"0": 0}})
_DEEP = (3, 20, 70, 600)
# Python writes about a thousand: two nestings in each other, or copies of them, are more.
_MOST_DEEP = 800
# Of the ways down that come to brackets, as many end there.
_STOPS = 0.2


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a tree with 1 to 4 changes."""
    return tree_changed(_copied(tree), rng)


def tree_changed(tree: Any, rng: random.Random) -> Any:
    """A tree that nobody else has, with 1 to 4 changes, in place where that can be."""
    nested = False
    for _ in range(1 << rng.randrange(3)):
        change = rng.choice(_CHANGES)
        nested = nested or change is _nest
        tree = _changed(tree, change, rng)
    return tree if not nested or _depth(tree) < _MOST_DEEP else json.loads("[" * 100 + "]" * 100)


def _copied(tree: Any) -> Any:
    """A copy of a tree of plain values."""
    return json.loads(json.dumps(tree))


def _depth(tree: Any) -> int:
    """How many brackets are in brackets."""
    deepest, pending = 0, [(tree, 1)]
    while pending:
        node, depth = pending.pop()
        deepest = max(deepest, depth)
        pending += [(inner, depth + 1) for inner in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())]
    return deepest


def _changed(tree: Any, change: "_Change", rng: random.Random) -> Any:
    if not isinstance(tree, dict | list) or not tree:
        return rng.choice(LEAVES)
    change(*_place(tree, rng), tree, rng)
    return tree


def _place(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """Any place in a tree: one way down, a step at a time; each has its turn, however large the branches beside it are."""
    while True:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        inner = tree[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < _STOPS:
            return tree, key
        tree = inner


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree: what holds it, and the name or number there."""
    found, pending = [], [tree]
    while pending:
        node = pending.pop()
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            found.append((node, key))
            pending.append(node[key])
    return found


def _replace(holder: Any, key: Any, _: Any, rng: random.Random) -> None:
    holder[key] = rng.choice(LEAVES) if rng.random() < 0.75 else _copied(rng.choice(_CONTAINERS))


def _number(holder: Any, key: Any, tree: Any, rng: random.Random) -> None:
    """Another number where one is."""
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice(
            (-value, value + 1, value - 1, value * 2, value * 10**6, value * 10**12, value / 3, float(value), str(value))
        )
    else:
        _replace(holder, key, tree, rng)


def _remove(holder: Any, key: Any, _: Any, __: random.Random) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, _: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        holder[str(rng.choice(LEAVES))] = holder.pop(key)
    else:
        holder.insert(key, holder[key])


def _nest(holder: Any, key: Any, _: Any, rng: random.Random) -> None:
    """Brackets around a value, mostly few."""
    for _ in range(rng.choice(_DEEP[:2]) if rng.random() < 0.9 else rng.choice(_DEEP)):
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}


def _swap(holder: Any, key: Any, tree: Any, rng: random.Random) -> None:
    """A value from another place of the tree, copied."""
    other, name = _place(tree, rng)
    holder[key] = _copied(other[name]) if _depth(other[name]) < _MOST_DEEP else None


def _double(holder: Any, key: Any, _: Any, rng: random.Random) -> None:
    """A list or a text made longer."""
    value = holder[key]
    if isinstance(value, list | str):
        holder[key] = value * rng.choice((2, 2, 3, 50))


_Change = Callable[[Any, Any, Any, random.Random], None]
_CHANGES: tuple[_Change, ...] = (_replace, _replace, _replace, _number, _number, _remove, _rename, _nest, _swap, _double)


def json_changed(data: bytes, rng: random.Random) -> bytes:
    """A JSON text after a change of what it says; NaN and infinity are written as Python has them."""
    return json.dumps(tree_changed(json.loads(data), rng)).encode("utf-8", "surrogatepass")


@lru_cache(maxsize=64)
def _parsed(data: bytes) -> Any:
    """What a YAML text says; nobody changes it."""
    return yaml.load(data, SAFE_LOADER)


def yaml_changed(data: bytes, rng: random.Random) -> bytes:
    """The same of a YAML text, in block or in flow style."""
    tree = changed_tree(_parsed(data), rng)
    text = yaml_text(tree) if rng.random() < 0.5 else json.dumps(tree)
    return text.encode("utf-8", "replace")


def yaml_text(tree: Any) -> str:
    """YAML of a tree; JSON, which is YAML, where brackets are too many for a block of each."""
    try:
        return str(yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), allow_unicode=True))
    except (RecursionError, yaml.YAMLError, UnicodeError):
        return json.dumps(tree)


def changed_trees(tree: Any) -> st.SearchStrategy[Any]:
    """Copies of a tree in which one to three values, anywhere, became something else; hypothesis finds the smallest that fails."""
    values = st.recursive(
        st.sampled_from(LEAVES) | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    )
    places = len(_places(tree))
    changes = st.lists(st.tuples(st.integers(0, places - 1), st.sampled_from(("put", "drop", "name")), values), min_size=1, max_size=3)
    return changes.map(lambda drawn: _with(tree, drawn))


def _with(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    tree = _copied(tree)
    for number, kind, value in changes:
        places = _places(tree)
        if not places:
            return value
        holder, key = places[number % len(places)]
        if kind == "put":
            holder[key] = value
        elif kind == "name" and isinstance(holder, dict):
            holder[str(value)] = holder.pop(key)
        else:
            del holder[key]
    return tree


Change = Callable[[bytes, random.Random], bytes]
