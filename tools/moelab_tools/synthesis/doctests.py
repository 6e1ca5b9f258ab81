"""Data repurposing: functions whose docstrings hold examples, as questions with answers that a program can check.

Qwen2's report repurposes existing text so (2407.10671 section 4.1, as the references tell it); these are Python's own
examples (`doctest`), whose expected output the author of the function wrote.
"""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moelab.errors import DataError
from moelab.safe_files import Reading, read_text
from moelab_plugins.data_sources._installed_text import READERS

READING = Reading(DataError, "give files or folders of Python")
LONGEST = 80  # characters of an answer
INSTALLED = "code_py"  # the domain of the embedded text


def installed(seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of the Python that is installed here, in seeded order."""
    yield from READERS[INSTALLED].texts(seed)


def of_paths(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of files, and of all .py files of folders. Raises DataError for what can't be read."""
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield str(file), read_text(file, READING)


def questions(sources: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """{prompt, answer, source}: a function, its docstring to the first example, what was typed, and what is printed.

    Examples that print nothing, more than a line, an error, or what stands for anything (...) are shown and not asked.
    """
    for name, text in sources:
        for function in _functions(text):
            examples = _examples(ast.get_docstring(function) or "")
            shown = _without_examples(function)
            session = ""
            for example in examples:
                typed = doctest_lines(example.source)
                if _may_be_asked(example):
                    source = {"step": "doctests", "file": name, "line": function.lineno, "function": function.name}
                    yield {"prompt": f"{shown}\n\n{session}{typed}", "answer": example.want.strip(), "source": source}
                session += typed + example.want


def doctest_lines(source: str) -> str:
    """As it is typed: the first line behind >>>, others behind dots."""
    first, *others = source.rstrip("\n").split("\n")
    return "".join([f">>> {first}\n", *(f"... {line}\n" for line in others)])


def _functions(text: str) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of another Python, or none
        return
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node))


def _examples(docstring: str) -> list[doctest.Example]:
    try:
        return doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # badly indented
        return []


def _without_examples(function: ast.FunctionDef) -> str:
    """Its text, with the docstring up to the first example."""
    docstring = ast.get_docstring(function) or ""
    kept = docstring.partition(">>>")[0].rstrip()
    first = function.body[0]
    body = [ast.Expr(ast.Constant(kept)), *function.body[1:]] if kept else function.body[1:] or [ast.Pass()]
    copy = ast.FunctionDef(**{name: getattr(function, name) for name in function._fields if name != "body"}, body=body)
    return ast.unparse(ast.fix_missing_locations(ast.copy_location(copy, first)))


def _may_be_asked(example: doctest.Example) -> bool:
    want = example.want.strip()
    plain = bool(want) and "\n" not in want and len(want) <= LONGEST and "..." not in want
    return plain and example.exc_msg is None and not example.options and "<BLANKLINE>" not in want
