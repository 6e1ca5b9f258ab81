"""`moelab demo`: dense Qwen2 -> upcycle -> train MoE variants -> compare, on text that is installed already."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("demo")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE...]")
@click.option("--out", type=USER_PATH, default=Path("runs/demo"), show_default=True,
              help="Folder for runs and reports; a demo that is there is replaced.")  # fmt: skip
@click.option("--seeds", default="0..2", show_default=True,
              help="How often all of it is done, as 0..2 or 0,1,2: a verdict takes three.")  # fmt: skip
def command(overrides: tuple[str, ...], out: Path, seeds: str) -> None:
    """Show the whole line on real text; nothing is downloaded.

    From each seed a small dense Qwen2 is trained, upcycled into the shape of 57B-A14B scaled down, and trained on four
    ways; then they are compared at equal tokens and at equal FLOPs. It prints each command before it runs it.
    KEY=VALUE overrides go to every training run.

    \b
    Example:
      moelab demo                # three seeds, about ten minutes on two cores
      moelab demo --seeds 0      # a third as long, and no verdict
      moelab demo --seeds 0 train.steps=4 --out runs/tiny_demo
    """
    from moelab_tools.demo import run_demo
    from moelab_tools.sweep.axes import whole_numbers

    run_demo(out, whole_numbers(",".join(seeds.replace(",", " ").split()), "--seeds"), overrides)
