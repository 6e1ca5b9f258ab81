"""Questions made of docstrings: the answer is not in the prompt, and running the example says it is right."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from moelab.alignment.execution import run_program
from moelab.errors import DataError
from moelab_tools.cli import moelab as program
from moelab_tools.synthesis.doctests import questions

MODULE = '''
def twice(x: int) -> int:
    """Two times x.

    >>> y = 3
    >>> twice(y)
    6
    >>> twice(
    ...     7)
    14
    >>> twice("a", "b")
    Traceback (most recent call last):
    TypeError: ...
    >>> print("a\\\\nb")
    a
    b
    >>> object() # doctest: +ELLIPSIS
    <object ...>
    """
    return 2 * x


class Holder:
    def bare(self):
        """>>> 40 + 2
        42
        """


def none():
    """No example."""
'''


def test_each_example_that_prints_a_line_is_asked_after_what_was_typed_before_it() -> None:
    first, second, third = questions([("m.py", MODULE)])
    assert first["prompt"].endswith('"""Two times x."""\n    return 2 * x\n\n>>> y = 3\n>>> twice(y)\n')
    assert first["answer"] == "6"
    assert second["prompt"] == first["prompt"] + "6\n>>> twice(\n...     7)\n" and second["answer"] == "14"
    assert third["answer"] == "42" and "42" not in third["prompt"] and "pass" in third["prompt"]
    assert first["source"] == {"step": "doctests", "file": "m.py", "line": 2, "function": "twice"}


def test_what_is_no_python_of_this_version_is_passed_over() -> None:
    assert not list(questions([("old.py", "print 'x'"), ("null.py", "\x00"), ("deep.py", "(" * 5000)]))


def test_answers_are_what_python_prints() -> None:
    for row in questions([("m.py", MODULE)]):
        function, _, session = row["prompt"].partition("\n\n>>> ")
        lines = [line[4:] for line in f">>> {session}".split("\n") if line.startswith((">>> ", "... "))]
        source = "\n".join([function, *lines]).replace("\n7)", "\n    7)")
        last = source.rpartition("\n" + lines[-1])[0] if "twice(\n" not in source else source.partition("\ntwice(\n")[0]
        asked = source[len(last) + 1 :]
        found = run_program(f"{last}\nprint(repr({asked}))")
        assert found.output.strip() == row["answer"]


def test_the_command_writes_lines_of_the_users_files_or_of_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "m.py").write_text(MODULE)
    out = tmp_path / "q.jsonl"
    found = CliRunner().invoke(program, ["repurpose", str(tmp_path / "src"), "--out", str(out), "--most", "2"])
    assert "2 questions of 1 functions" in found.output
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == ["6", "14"]
    (tmp_path / "src" / "m.py").write_text("x = 1")
    found = CliRunner().invoke(program, ["repurpose", str(tmp_path / "src"), "--out", str(tmp_path / "none.jsonl")])
    assert isinstance(found.exception, DataError) and not (tmp_path / "none.jsonl").exists()


def test_installed_python_has_some(tmp_path: Path) -> None:
    out = tmp_path / "q.jsonl"
    found = CliRunner().invoke(program, ["repurpose", "--out", str(out), "--most", "5"])
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all(row["answer"] and row["prompt"].endswith("\n") for row in rows)
