"""`moelab evolve`: prompts -> harder ones, and more of them, by a model."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config
from moelab_tools.trust_option import TRUST_PLUGINS


@click.command("evolve")
@click.argument("config", nargs=-1, required=True, metavar="[CONFIG...] KEY=VALUE...", shell_complete=complete_config)
@TRUST_PLUGINS
def command(config: tuple[str, ...], trust: bool) -> None:
    """Let a model make prompts harder, or more of them, and leave out what came to nothing (self-evolution).

    `data` are files of prompts, `generator` is who evolves them: a checkpoint, or a plugin of yours. An operation is
    drawn for each prompt and round: a constraint more, deeper, more concrete, steps of reasoning, or another prompt of
    the field. output/prompts.jsonl holds what stays, output/sft.jsonl the same with answers, synthesis.json the
    account: what was left out, and why. Each line names its parent, operation, round, generator and seed. The same seed
    gives the same bytes. Stopped at any moment, the same command goes on.

    \b
    Example:
      moelab evolve data=[asked.jsonl] output=evolved \\
          generator.name=checkpoint generator.path=runs/chat
      moelab evolve data=[asked.jsonl] output=evolved rounds=4 \\
          operations=[constraints] \\
          generator.name=checkpoint generator.path=runs/chat
    """
    from moelab.config.load import load_config
    from moelab_tools.synthesis.declaration import EvolveConfig
    from moelab_tools.synthesis.steps import evolve

    made, output = evolve(load_config(config, EvolveConfig, trust=trust), trust=trust)
    click.echo(made.account.told())
    click.echo(str(output))
