"""`moelab train`: a config becomes a run folder."""

from __future__ import annotations

import click


@click.command("train")
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in run_dir (also: resume=true).")
@click.option("--force", is_flag=True, help="Delete the run that run_dir holds, and start anew.")
def command(config: tuple[str, ...], resume: bool, force: bool) -> None:
    """Train a model.

    CONFIG files merge left to right; KEY=VALUE overrides come last.

    \b
    Example:
      moelab train configs/train/tiny_moe.yaml
      moelab train configs/train/tiny_moe.yaml run_dir=runs/b model.moe.router.norm_topk_prob=true
      moelab train configs/train/tiny_moe.yaml --resume
    """
    from moelab.config.load import load_config
    from moelab.config.run import RunConfig
    from moelab.errors import ConfigError
    from moelab.train.trainer import train
    from moelab_tools.progress import TrainingProgress

    loaded = load_config(config, RunConfig)
    run = loaded.config
    run.resume = run.resume or resume
    if run.resume and force:
        raise ConfigError("--resume and --force: one goes on, the other deletes; give one of them")
    run.search_path = list(dict.fromkeys([*run.search_path, *(str(path.resolve()) for path in loaded.search_path)]))
    try:
        train(run, observers=[TrainingProgress(run.train.steps)], force=force)
    except ConfigError as error:
        raise loaded.blame(error) from error
