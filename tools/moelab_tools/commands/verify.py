"""`moelab verify`: is an upcycled checkpoint, byte for byte, what its recipe makes of its source?"""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("verify")
@click.argument("output", type=USER_PATH)
@click.option(
    "--source", "sources", multiple=True, required=True, type=USER_PATH, metavar="DIR",
    help="The dense checkpoint that OUTPUT was made from; once for each, where several were mixed.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="All tensors; otherwise 1% of the experts and all that is no expert.")
@click.option("--layers", metavar="A:B", help="Only layers A to B-1.")
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that OUTPUT names; they run as you."
)
def command(output: Path, sources: tuple[Path, ...], full: bool, layers: str | None, trust: bool) -> None:
    """Recompute an upcycled checkpoint from its source and compare bytes.

    Source and output are read as every command reads them: what could be read in two ways is refused.

    \b
    Example:
      moelab verify Qwen2-57B-A14B-upcycled --source Qwen2-7B
    """
    from moelab_tools.upcycling import run_verify

    run_verify(output, sources, full, layers, trust=trust)
