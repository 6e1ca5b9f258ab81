"""The comments of a dataclass's fields, read from its source: the one place where a key or an option is explained.

A field's comment stands behind it, or in whole lines above it. What is told of keys anywhere (`moelab config --keys`,
`moelab plugins`, the pages of docs/, the schema for editors) comes from there.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize

_YAML = {"None": "null", "True": "true", "False": "false"}
_PYTHON = re.compile(rf"\b({'|'.join(_YAML)})\b")
_FOR_TOOLS = re.compile(r"(fmt|noqa|type|ruff|pragma)\b\s*:?")


def field_comments(schema: type) -> dict[str, str]:
    """{field: its comment}, base classes included; nothing where there is no source or no comment.

    What they say of None, True and False stands there as a config spells it: null, true, false.
    """
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError):  # built-in, or made in a session without files
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        behind, above = _comments(source)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                words = [behind[line] for line in lines if line in behind] or _upwards(above, node.lineno)
                if words:
                    found[node.target.id] = _PYTHON.sub(lambda match: _YAML[match[0]], " ".join(words))
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """{line: comment}: those behind code, and those that have a line of their own."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        words = token.string.lstrip("#").strip()
        if token.type == tokenize.COMMENT and words and not _FOR_TOOLS.match(words):
            own = not token.line[: token.start[1]].strip()
            (alone if own else behind)[token.start[0]] = words
    return behind, alone


def _upwards(comments: dict[int, str], line: int) -> list[str]:
    """The lines directly above, first one first."""
    first = line
    while first - 1 in comments:
        first -= 1
    return [comments[number] for number in range(first, line)]
