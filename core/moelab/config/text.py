"""YAML text <-> plain trees of dict, list and scalars: the one reader and the one writer of config files.

Mappings have text as keys, each once. Unquoted scalars keep their characters (`scalars.Plain`). Only YAML's own tags
are known, so that reading runs nothing; what is nested or repeated by aliases without end is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar

import yaml

from moelab.config.scalars import MISSING_TEXT, Plain, meaning, scalar, spelled
from moelab.errors import ConfigError

DEEPEST, MOST_NODES, LARGEST_FILE = 60, 200_000, 2**22
_TAG = "tag:yaml.org,2002:"
_HALF = re.compile("[\ud800-\udfff]")  # an escape may spell one; no file takes it
SHALLOW = 500  # levels; libyaml's Python side recurses in C, and a stack of 8 MB takes more than 5,000
_FAR_IN = re.compile(rf"^[ ?-]{{{SHALLOW}}}", re.MULTILINE)
_UNQUOTED, _MERGE = "!unquoted", _TAG + "merge"


def read_tree(text: str, origin: str, *, quick: bool = False) -> Any:
    """The tree that YAML `text` spells; None for an empty one. Raises ConfigError naming `origin` and the line.

    `quick`: with libyaml, ten times as fast, for files that moelab's own writer made. What it does not take, or what
    is nested so deeply that it could run out of stack, goes the other way, which says what is wrong.
    """
    _check_characters(text, origin)
    if quick and _QuickLoader is not None and _is_shallow(text):
        loader = _QuickLoader(text)
        try:
            return _Copy(origin).of(loader.get_single_data(), 0)
        except (yaml.YAMLError, RecursionError):
            pass
        finally:
            loader.dispose()
    return _Copy(origin).of(_patiently(text, origin), 0)


def _patiently(text: str, origin: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{origin}: can't be read as YAML{_place(error)}: {_problem(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: can't be read as YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: is nested too deeply, more than {DEEPEST} levels") from error
    finally:
        loader.dispose()


def write_tree(tree: Any) -> str:
    """YAML that `read_tree` reads back as the same tree: texts that look like numbers are quoted."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def leaf_lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """(key path, line from 0) of each value that `write_tree` put on a line of its own, or behind its key."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    finally:
        loader.dispose()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)] if root is not None else []
    while waiting:
        path, node = waiting.pop(0)
        if isinstance(node, yaml.MappingNode) and node.value:
            waiting += [((*path, key.value), value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode) and node.value:
            waiting += [((*path, str(index)), value) for index, value in enumerate(node.value)]
        elif node.start_mark.line == node.end_mark.line:
            yield path, node.start_mark.line


class _Characters:
    """Over a loader of PyYAML's: scalars are their characters; the type is asked later."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {}  # filled below: none is inherited

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _UNQUOTED
        plain = (False, implicit[1]) if kind is yaml.ScalarNode else implicit
        return super().resolve(kind, value, plain)  # type: ignore[misc]

    def construct_mapping(self: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "a mapping is wanted here", node.start_mark)
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen and key.tag != _MERGE:
                problem = f"the key '{key.value}' stands twice, first in line {seen[key.value].line + 1}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = key.start_mark
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


class _Loader(_Characters, yaml.SafeLoader):
    """In Python, whose complaints name what and where."""


if hasattr(yaml, "CSafeLoader"):  # PyYAML was built with libyaml

    class _WithLibyaml(_Characters, yaml.CSafeLoader):
        """In C."""

    _QuickLoader: type[Any] | None = _WithLibyaml
else:
    _QuickLoader = None


def _is_shallow(text: str) -> bool:
    """Whether it can't be nested deeper than `SHALLOW`: a level takes a bracket, or a column before the first word."""
    return text.count("[") + text.count("{") < SHALLOW and not _FAR_IN.search(text)


def _unknown_tag(loader: Any, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, f"no such type here: {node.tag}", node.start_mark)


_CONSTRUCTORS: dict[str | None, Callable[[Any, Any], Any]] = {
    _UNQUOTED: lambda loader, node: scalar(node.value),
    **dict.fromkeys(
        (_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null"), lambda loader, node: scalar(node.value)
    ),
    _TAG + "str": lambda loader, node: loader.construct_scalar(node),
    _TAG + "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    _TAG + "map": lambda loader, node: loader.construct_mapping(node),
    None: _unknown_tag,
}
for _tag, _constructor in _CONSTRUCTORS.items():
    _Characters.yaml_constructors[_tag] = _constructor


class _Copy:
    """A tree without shared parts, so that aliases can't grow into billions of nodes when it is walked."""

    def __init__(self, origin: str) -> None:
        self.origin, self.nodes = origin, 0

    def of(self, tree: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > DEEPEST:
            raise ConfigError(f"{self.origin}: is nested too deeply, more than {DEEPEST} levels")
        if self.nodes > MOST_NODES:
            raise ConfigError(f"{self.origin}: holds more than {MOST_NODES} values once its aliases are written out")
        texts = tree if isinstance(tree, dict) else [tree] if isinstance(tree, str) else []
        if any(map(_HALF.search, texts)):
            raise ConfigError(f"{self.origin}: holds half of a surrogate pair (\\ud800 ...), which is no character")
        if isinstance(tree, dict):
            return {key: self.of(value, depth + 1) for key, value in tree.items()}
        return [self.of(value, depth + 1) for value in tree] if isinstance(tree, list) else tree


class _Dumper(yaml.SafeDumper):
    """Quotes what would read back as something else, for YAML 1.1 readers and for ours."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    looks_else = not isinstance(meaning(text), str) or text in (MISSING_TEXT, "<<", "=")
    breaks = any(character in text for character in "\x85\u2028\u2029")  # PyYAML folds them in other styles
    return dumper.represent_scalar(_TAG + "str", text, style='"' if looks_else or breaks else None)


def _unquoted_node(dumper: _Dumper, text: Plain) -> yaml.ScalarNode:
    tag = dumper.resolve(yaml.ScalarNode, str(text), (True, False))  # whatever keeps it unquoted
    return dumper.represent_scalar(tag, str(text))


def _float_node(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + "float", spelled(value))


_Dumper.add_representer(str, _text_node)
_Dumper.add_representer(Plain, _unquoted_node)
_Dumper.add_representer(float, _float_node)
_Dumper.add_multi_representer(str, lambda dumper, text: _text_node(dumper, str(text)))
_Dumper.add_multi_representer(tuple, lambda dumper, items: dumper.represent_list(list(items)))


def _check_characters(text: str, origin: str) -> None:
    """PyYAML names a forbidden character by its offset; a line is easier to find."""
    match = _Loader.NON_PRINTABLE.search(text)
    if match:
        line = text.count("\n", 0, match.start()) + 1
        raise ConfigError(f"{origin}: line {line} holds the character U+{ord(match[0]):04X}, which YAML does not allow")


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    words = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in words:
        return "a tab stands where spaces are wanted: YAML indents with spaces"
    return " ".join(words.split())[:300]
