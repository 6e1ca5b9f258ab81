"""`moelab repurpose`: functions with examples in their docstrings -> questions with answers that can be checked."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("repurpose")
@click.argument("paths", nargs=-1, type=USER_PATH, metavar="[PATH...]")
@click.option("--out", required=True, type=USER_PATH, metavar="FILE", help="Lines of JSON: prompt, answer, source.")
@click.option("--most", type=click.IntRange(1), metavar="N", help="At most so many.  [default: all]")
@click.option(
    "--seed", metavar="N", default=0, show_default=True, help="Of the order in which installed files are read."
)
def command(paths: tuple[Path, ...], out: Path, most: int | None, seed: int) -> None:
    """Make questions of doctests: a function and what was typed; the answer is what its author says is printed.

    PATH: files or folders of Python; none: Python's library and torch, as they are installed here. Nothing is run. The
    lines are for `moelab generate --prompts`, `moelab synthesise` and stage online_dpo, with the reward exact_answer.

    \b
    Example:
      moelab repurpose --out questions.jsonl
      moelab repurpose src/ --out questions.jsonl --most 1000
    """
    import json
    import sys
    from itertools import islice

    from moelab.atomic import check_output, write_output
    from moelab.errors import DataError
    from moelab_tools.synthesis.doctests import installed, of_paths, questions

    check_output(out, "--out", file=True, read=paths)
    found = list(
        islice(
            questions(of_paths(paths) if paths else installed(seed)), None if most is None else min(most, sys.maxsize)
        )
    )
    if not found:
        where = ", ".join(map(str, paths)) or "installed text"
        raise DataError(f"{where}: no function has an example in its docstring; give other files")
    write_output(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "--out")
    functions = len({(row["source"]["file"], row["source"]["line"]) for row in found})
    click.echo(f"{out}: {len(found)} questions of {functions} functions")
