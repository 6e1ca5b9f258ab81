"""`moelab train`: a config becomes a run folder."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config
from moelab_tools.verify_option import NO_VERIFY


@click.command("train")
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]", shell_complete=complete_config)
@click.option(
    "--resume", is_flag=True, help="Go on from run_dir's newest checkpoint that is undamaged (also: resume=true)."
)
@click.option("--force", is_flag=True, help="Delete the run that run_dir holds, and start anew.")
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
@NO_VERIFY
def command(config: tuple[str, ...], resume: bool, force: bool, trust: bool, verify: bool) -> None:
    """Train a model.

    CONFIG files merge left to right; KEY=VALUE overrides come last. With train.init_from the run starts from a
    checkpoint: what the config doesn't say of model and data.tokenizer is the checkpoint's, and what it says otherwise
    is refused unless train.init_overrides names the key. With --resume, more train.steps than planned go on where the
    schedule says what that means (docs/checkpoints.md).

    `moelab config --keys` lists every key with its type, default and meaning (--keys optimizer: those of a section),
    `moelab config CONFIG... --resolved` prints what a run would store, and who set what.

    \b
    Example:
      moelab train configs/train/tiny_moe.yaml
      moelab train configs/train/tiny_moe.yaml run_dir=runs/b \\
          model.moe.router.norm_topk_prob=true
      moelab train configs/train/tiny_moe.yaml --resume
      moelab train configs/train/tiny_moe.yaml --resume \\
          train.steps=60 schedule.rewarm_steps=5
      moelab train data.yaml run_dir=runs/c train.init_from=upcycled \\
          train.init_overrides=[model.moe.router] model.moe.router.name=hash
    """
    from moelab.errors import ConfigError
    from moelab.in_shares import in_shares
    from moelab.training.interruption import Interruption
    from moelab.training.trainer import train
    from moelab_tools.checkpoints import load_run, take_up_plugins, tell_origin
    from moelab_tools.progress import TrainingProgress

    with Interruption().listening() as interruption:
        looking = in_shares(verify)
        loaded = load_run([*config, *(["resume=true"] if resume else [])], trust=trust, verify=looking)
        run = loaded.config
        tell_origin(loaded)
        if run.resume and force:
            raise ConfigError("--resume and --force: one goes on, the other deletes; give one of them")
        if trust:
            take_up_plugins(run, verify=looking)
        shown = [TrainingProgress(run.train.steps)]
        try:
            train(run, observers=shown, force=force, verify=verify, interruption=interruption)
        except ConfigError as error:
            raise loaded.blame(error) from error
