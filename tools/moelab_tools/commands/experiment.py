"""`moelab experiment`: what an experiment.yaml declares, run and judged by its own rule."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("experiment")
@click.argument("experiment")
@click.argument("override", nargs=-1, metavar="[KEY=VALUE...]")
@click.option("--out", type=USER_PATH, help="Folder for its runs. Default: runs/experiments/NAME.")
@click.option("--results", type=USER_PATH, help="Folder for its findings. Default: results/ beside the "
              "declaration; of a shipped one of an installed moelab, in its runs' folder.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Runs at a time: 1, and all with --slurm.")
@click.option("--amend", metavar="WHY",
              help="Go on though the declaration was changed after the first run; told in the findings.")  # fmt: skip
@click.option("--force", is_flag=True, help="Delete and train again those runs whose config has changed.")
@click.option("--dry-run", is_flag=True, help="Check every run and print the plan; write nothing.")
@click.option("--slurm", is_flag=True, help="Submit each run as a Slurm job (needs the extra `slurm`).")
@click.option("--slurm-option", multiple=True, metavar="KEY=VALUE",
              help="Of submitit: timeout_min=60, slurm_partition=gpu.")  # fmt: skip
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
def command(
    experiment: str,
    override: tuple[str, ...],
    out: Path | None,
    results: Path | None,
    jobs: int | None,
    amend: str | None,
    force: bool,
    dry_run: bool,
    slurm: bool,
    slurm_option: tuple[str, ...],
    trust: bool,
) -> None:
    """Run a declared experiment and write what came of it.

    EXPERIMENT is a folder with an experiment.yaml (docs/experiments.md), or the name of a shipped one. The declaration
    is written down and hashed before the first run; changed after that it is refused, unless --amend says why. The
    same command again goes on where it was stopped. KEY=VALUE overrides are for trying it out: the findings then stay
    in --out.

    \b
    Example:
      moelab experiment configs/experiments/shared_expert --dry-run
      moelab experiment shared_expert train.steps=4 --out runs/tried
      moelab experiment configs/experiments/shared_expert --jobs 2

    Exit codes: 0 it came to its end, decided or not; 1 some runs failed; 2 the input is wrong; 130 stopped.
    """

    from moelab_tools.experiments.conduct import ExperimentRequest, folder_of, run_experiment
    from moelab_tools.sweep.slurm import worker_of
    from moelab_tools.terminal import make_console

    request = ExperimentRequest(experiment, out, results, jobs, amend, force, dry_run, trust, override)
    run_experiment(request, make_console(), worker_of(folder_of(request), slurm_option, slurm=slurm))
