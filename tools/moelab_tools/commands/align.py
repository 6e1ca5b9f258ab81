"""`moelab align`: post-training, stage after stage, through TRL."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config
from moelab_tools.verify_option import NO_VERIFY


@click.command("align")
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]", shell_complete=complete_config)
@click.option(
    "--resume", is_flag=True, help="Go on where run_dir was left; stages that are finished stay (also: resume=true)."
)
@click.option("--force", is_flag=True, help="Delete the runs that run_dir holds, and start anew.")
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
@NO_VERIFY
def command(config: tuple[str, ...], resume: bool, force: bool, trust: bool, verify: bool) -> None:
    """Fine-tune, learn rewards, or prefer one answer to another (docs/alignment.md).

    `alignment` lists the stages: sft, reward, dpo or online_dpo, each with its data, JSON lines of conversations. The
    run begins with train.init_from, whose model, tokenizer and held-out text are the run's too. Losses are TRL's
    (pip install 'moelab[align]'); balance losses, run folder, observers and resuming are those of `moelab train`.

    \b
    Example:
      moelab align configs/align/tiny_sft_dpo.yaml run_dir=runs/chat \\
          alignment.0.data=chats.jsonl alignment.1.data=pairs.jsonl
      moelab align configs/align/tiny_sft_dpo.yaml run_dir=runs/chat --resume
    """
    from moelab.alignment.run import align, check_installed, lowest_layer
    from moelab.config.load import load_config
    from moelab.config.run import RunConfig
    from moelab.errors import ConfigError
    from moelab.in_shares import in_shares
    from moelab.training.interruption import Interruption
    from moelab_tools.checkpoints import take_up_plugins, tell_origin
    from moelab_tools.progress import TrainingProgress

    check_installed()
    with Interruption().listening() as interruption:
        looking = in_shares(verify)
        loaded = load_config(
            [*config, *(["resume=true"] if resume else [])],
            RunConfig,
            below=lambda said: lowest_layer(said, verify=looking),
            trust=trust,
        )
        run = loaded.config
        tell_origin(loaded)
        if run.resume and force:
            raise ConfigError("--resume and --force: one goes on, the other deletes; give one of them")
        if trust:
            take_up_plugins(run, verify=looking)
        try:
            align(
                run, observers=lambda own: [TrainingProgress(own.train.steps)], force=force, verify=verify,
                interruption=interruption,
            )  # fmt: skip
        except ConfigError as error:
            raise loaded.blame(error) from error
