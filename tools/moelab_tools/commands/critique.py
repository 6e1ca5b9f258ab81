"""`moelab critique`: answers held against written principles -> conversations to learn from, and preferences."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config
from moelab_tools.trust_option import TRUST_PLUGINS


@click.command("critique")
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]", shell_complete=complete_config)
@TRUST_PLUGINS
def command(config: tuple[str, ...], trust: bool) -> None:
    """Let a model answer prompts, criticise its answers by principles and revise them (constitutional feedback).

    `principles` are sentences in a config, `data` files of prompts, `generator` is who answers: a checkpoint, or a
    plugin of yours. output/sft.jsonl holds revisions for stage sft, output/pairs.jsonl the last revision against the
    first answer for stages dpo and reward; with method=contrast an answer that keeps to a principle against one that is
    told to break it. synthesis.json is the account. Each line says where it is from: prompt, principles, critiques,
    generator, seed. The same seed gives the same bytes. Stopped at any moment, the same command goes on.

    \b
    Example:
      moelab critique configs/synthesis/principles.yaml data=[asked.jsonl] \\
          generator.name=checkpoint generator.path=runs/chat output=made
    """
    from moelab.config.load import load_config
    from moelab_tools.synthesis.declaration import CritiqueConfig
    from moelab_tools.synthesis.steps import critique

    made, output = critique(load_config(config, CritiqueConfig, trust=trust), trust=trust)
    click.echo(made.account.told())
    click.echo(str(output))
