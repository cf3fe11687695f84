"""Small YAML files, read without anything that runs, swells or stands for something else."""

import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer, ComposerError
from yaml.constructor import ConstructorError

from microtome.errors import ConfigError

# A second's work for the parser. A plan has 5 kilobytes, a `microtome.yaml` that pairs 10,000 files by hand a million.
MOST_YAML_BYTES = 1_000_000
# Of one number: 64 bits in base 2 with its sign.
_MOST_DIGITS = 67


def load_yaml(path: Path, limit_bytes: int = MOST_YAML_BYTES) -> Any:
    """The content of a small YAML file, safely loaded.

    Raises:
        ConfigError: not there, too large, not YAML.
    """
    try:
        found = path.stat()
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            # A pipe would be waited for without end.
            got = "Is a directory" if path.is_dir() else "a pipe or a device"
            raise ConfigError(path, expected="a readable file", got=got, do="check the path", code="C008")
        if size > limit_bytes:
            raise ConfigError(
                path, expected=f"at most {limit_bytes} bytes", got=f"{size}", do="check that this is the right file", code="C008"
            )
        return _PlainLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(path, expected="a readable file", got=str(error.strerror), do="check the path", code="C008") from None
    except RecursionError:
        raise ConfigError(path, expected="valid YAML", got="brackets in brackets without end", do="check the file", code="C009") from None
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        # Besides its own errors, PyYAML lets through what int(), float() and date() raise on malformed values.
        line = " ".join(str(error).replace(' in "<unicode string>",', " at").split())[:400]
        raise ConfigError(path, expected="valid YAML", got=line, do="mend that line", code="C009") from None


# Where the C parser was built, which takes a tenth of the time; values are made by the same code either way.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _PlainLoader(_Parser):  # type: ignore[misc]
    """Safe YAML in which nothing stands for more than it is: no aliases, no name twice, no endless numbers."""

    # The C parser has these of its own, which look for no override.
    get_single_node, compose_document = Composer.get_single_node, Composer.compose_document
    compose_scalar_node, compose_sequence_node = Composer.compose_scalar_node, Composer.compose_sequence_node
    compose_mapping_node = Composer.compose_mapping_node

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.anchors: dict[str, yaml.Node] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node; an alias is refused, as a few lines of them can stand for more values than memory holds."""
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name): write its value out", self.peek_event().start_mark)
        return Composer.compose_node(self, parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Names with values, each name once: of two the last would count, in silence."""
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = ", ".join(str(name) for name, count in names.items() if count > 1)[:80]
            raise ConstructorError(None, None, f"a name twice ({twice})", node.start_mark)
        return found

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of 64 bits; long ones in base 60 (1:1:1) would take hours."""
        if len(node.value) <= _MOST_DIGITS and -(2**63) <= (value := int(super().construct_yaml_int(node))) < 2**63:
            return value
        raise ConstructorError(None, None, f"a whole number beyond 64 bits ({node.value[:40]})", node.start_mark)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number, in as many digits as a computer has use for."""
        if len(node.value) <= _MOST_DIGITS:
            return float(super().construct_yaml_float(node))
        raise ConstructorError(None, None, f"a number of {len(node.value)} digits", node.start_mark)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)
