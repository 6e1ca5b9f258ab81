"""`${key}` and `${oc.env:NAME}` of the files that a user passes, resolved as OmegaConf does; and their escapes.

What only points at other keys is resolved for good. What asks for more, above all the environment, is resolved for the
run, and remembered as it was written: that is what is stored, so that no secret and no machine's path lies in a run
folder unasked. In a stored file a text holding `${` is escaped (`\\${`), so that it means the same to every reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moelab.config.scalars import MISSING_TEXT, Literal, quoted
from moelab.errors import ConfigError

KeyPath = tuple[str, ...]
_MARK = re.compile(r"(\\*)\$\{")


def resolve(tree: dict[str, Any], below: Mapping[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """-> (the tree without interpolations, {key path: expression} of what does not follow from other keys alone).

    `below` holds the schema's defaults under the tree, which an interpolation may name. Raises ConfigError naming the
    key.
    """
    marked = [(path, text) for path, text in leaves(tree) if isinstance(text, str) and "${" in text]
    asking = [(path, text) for path, text in marked if not isinstance(text, Literal)]
    if not asking:
        return tree, {}
    below = replace_leaves(below, {path: escape(text) for path, text in marked if isinstance(text, Literal)})
    whole = _container(below, asking)
    without = _container(replace_leaves(below, {path: MISSING_TEXT for path, text in asking if calls(text)}), asking)
    found: dict[KeyPath, Any] = {}
    outside: dict[KeyPath, str] = {}
    for path, text in asking:
        found[path] = _value(whole, path, text)
        try:
            if _value(without, path, text) != found[path]:
                outside[path] = str(text)
        except ConfigError:
            outside[path] = str(text)
    return replace_leaves(tree, found), outside


def escape(text: str) -> str:
    """The text as a file writes it, so that `${` in it is no interpolation: OmegaConf's rule for backslashes."""
    return _MARK.sub(lambda match: match[1] * 2 + "\\${", text)


def unescape(text: str) -> str:
    """The inverse of `escape`; a `${` that is not escaped stays these characters."""
    return _MARK.sub(lambda match: match[1][: len(match[1]) // 2] + "${" if len(match[1]) % 2 else match[0], text)


def calls(text: str) -> bool:
    """Whether an interpolation in it asks more than the value of a key: `${oc.env:HOME}`, not `a:${train.steps}`."""
    depth = 0
    for position, character in enumerate(text):
        if character == "{" and text[position - 1 : position] == "$":
            depth += 1
        elif character == "}" and depth:
            depth -= 1
        elif character == ":" and depth:
            return True
    return False


def leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(key path, scalar) of a plain tree; an item of a list has its index as key."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, str(index)))
    else:
        yield path, tree


def replace_leaves(tree: Any, change: Mapping[KeyPath, Any], path: KeyPath = ()) -> Any:
    """The tree with other values at some key paths."""
    if path in change:
        return change[path]
    if isinstance(tree, Mapping):
        return {key: replace_leaves(value, change, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_leaves(value, change, (*path, str(i))) for i, value in enumerate(tree)]
    return tree


def _container(tree: Any, asking: list[tuple[KeyPath, str]]) -> Any:
    try:
        return OmegaConf.create(tree, flags={"allow_objects": True})
    except (OmegaConfBaseException, RecursionError):
        for path, text in asking:
            try:
                OmegaConf.create({"text": str(text)})
            except (OmegaConfBaseException, RecursionError) as error:
                raise _problem(path, text, error) from error
        raise


def _value(container: Any, path: KeyPath, text: str) -> Any:
    try:
        node = container
        for key in path:
            node = node[int(key)] if OmegaConf.is_list(node) else node[key]
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise _problem(path, text, error) from error


def _problem(path: KeyPath, text: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split("full_key:")[0].split())[:200]
    if isinstance(error, RecursionError):
        reason = "it is nested without end"
    return ConfigError(
        f"{'.'.join(path)}: can't resolve {quoted(str(text))}: {reason}; for these characters as a text write \\${{"
    )
