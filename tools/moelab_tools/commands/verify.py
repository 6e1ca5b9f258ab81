"""`moelab verify`: are checkpoints as they were written; is an upcycled one what its recipe makes of its source?"""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("verify")
@click.argument("folder", type=USER_PATH)
@click.option(
    "--source", "sources", multiple=True, type=USER_PATH, metavar="DIR",
    help="Of an upcycled checkpoint: the dense one that it was made from; once for each, where several were mixed.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="Upcycled: all tensors; else 1% of the experts and all that is no expert.")
@click.option("--layers", metavar="A:B", help="Upcycled: only layers A to B-1.")
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that FOLDER names; they run as you."
)
def command(folder: Path, sources: tuple[Path, ...], full: bool, layers: str | None, trust: bool) -> None:
    """Compare checkpoints with their checksums, or an upcycled one with its source.

    Of a run folder every checkpoint, of a checkpoint every file and tensor is hashed and compared with its
    manifest.json; what differs is named. An upcycled checkpoint is computed again from its --source, and its bytes
    compared; both are read as every command reads them: what could be read in two ways is refused. A merged one is
    compared with the checksums of its merge.json. Exit code 1: damaged; 2: there is nothing to compare with.

    \b
    Example:
      moelab verify runs/tiny_moe
      moelab verify runs/tiny_moe/checkpoints/step_00000200
      moelab verify Qwen2-57B-A14B-upcycled --source Qwen2-7B
    """
    from moelab.atomic import where_it_may_be
    from moelab.errors import CheckpointError, ConfigError
    from moelab_tools.merging.report import REPORT, verify_merged
    from moelab_tools.upcycling import run_verify
    from moelab_tools.verifying import verify_checkpoints
    from moelab_upcycling.output import PLAN_FILE

    if not folder.exists():
        hint = where_it_may_be(folder) or "; give a run folder, a checkpoint, or what `upcycle` or `merge` wrote"
        raise CheckpointError(f"{folder}: no such folder{hint}")
    if (folder / PLAN_FILE).is_file():
        if not sources:
            raise ConfigError(f"--source: {folder} is an upcycled checkpoint; name the dense one that it was made from")
        run_verify(folder, sources, full, layers, trust=trust)
        return
    given = [name for name, value in (("--source", sources), ("--full", full), ("--layers", layers)) if value]
    if given:
        raise ConfigError(f"{given[0]}: is for an upcycled checkpoint, which has {PLAN_FILE}; {folder} has none")
    if (folder / REPORT).is_file():
        click.echo(verify_merged(folder))
        return
    verify_checkpoints(folder)
