"""`moelab sweep`: variants times seeds, run and compared."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH, finite


@click.command("sweep")
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE,VALUE...]")
@click.option("--out", type=USER_PATH, default=Path("runs/sweep"), show_default=True,
              help="Folder for runs/, configs/, logs/ and report/.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), metavar="N",
              help="Runs at a time: 1, and all with --slurm. They share the machine's threads, unless OMP_NUM_THREADS "
              "is set.")  # fmt: skip
@click.option("--baseline", metavar="VARIANT", help="What the others are compared with, and matched to.")
@click.option("--match", "measure", type=click.Choice(["active", "total", "flops"]),
              help="Give every variant the baseline's (else the first one's) parameters or FLOPs.")  # fmt: skip
@click.option("--vary", default="moe_intermediate_size", show_default=True, help="The layout's option --match solves.")
@click.option("--multiple-of", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--practical", type=click.FloatRange(0, 100), callback=finite, default=0.1, show_default=True,
              metavar="PERCENT", help="Of the loss: a smaller difference is called negligible.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check every run and print the plan; write nothing.")
@click.option("--force", is_flag=True, help="Delete and train again those runs whose config has changed.")
@click.option("--slurm", is_flag=True, help="Submit each run as a Slurm job (needs the extra `slurm`).")
@click.option(
    "--slurm-option", multiple=True, metavar="KEY=VALUE", help="Of submitit: timeout_min=60, slurm_partition=gpu."
)
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
def command(
    config: tuple[str, ...],
    out: Path,
    jobs: int | None,
    baseline: str | None,
    measure: str | None,
    vary: str,
    multiple_of: int,
    practical: float,
    dry_run: bool,
    force: bool,
    slurm: bool,
    slurm_option: tuple[str, ...],
    trust: bool,
) -> None:
    """Train every combination of values and seeds, then compare.

    A KEY=VALUE with several values is an axis: a comma between values, a..b for whole numbers; a value that holds a
    comma stands in quotes or brackets. Every run is built and checked before the first one starts. The same command
    again skips runs that are finished and goes on with those that are not; runs whose config has changed are refused,
    unless --force. A run that fails is told at the end, and the others go on.

    \b
    Example:
      moelab sweep configs/train/tiny_moe.yaml seed=0..4 \\
          model.moe.router.name=softmax_topk,sigmoid_topk
      moelab sweep configs/train/tiny_moe.yaml --match active seed=0..2 \\
          model.moe.layout.num_experts=8,16,32 \\
          model.moe.layout.num_experts_per_tok=2
      moelab sweep configs/train/tiny_moe.yaml seed=0..2 --jobs 2 \\
          'model.moe.balance_losses=[],[{name: load_balance, weight: 0.01}]'

    Exit codes: 0 all runs ended well, 1 some did not, 2 the input is wrong, 130 stopped.
    """

    from moelab_tools.sweep.matching import Matching
    from moelab_tools.sweep.run import SweepRequest, run_sweep
    from moelab_tools.sweep.slurm import worker_of
    from moelab_tools.terminal import make_console

    request = SweepRequest(
        arguments=config,
        out=out,
        jobs=jobs,
        matching=Matching(measure, vary, multiple_of) if measure else None,
        baseline=baseline,
        practical=practical / 100,
        dry_run=dry_run,
        force=force,
        trust=trust,
    )
    run_sweep(request, make_console(), worker_of(out, slurm_option, slurm=slurm))
