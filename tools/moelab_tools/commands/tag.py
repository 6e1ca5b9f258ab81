"""`moelab tag`: what the instructions of conversations are about, in words that a model finds."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config
from moelab_tools.trust_option import TRUST_PLUGINS


@click.command("tag")
@click.argument("config", nargs=-1, required=True, metavar="[CONFIG...] KEY=VALUE...", shell_complete=complete_config)
@TRUST_PLUGINS
def command(config: tuple[str, ...], trust: bool) -> None:
    """Let a model tag the instructions of conversations, and make one tag of its spellings (InsTag).

    `data` are JSON lines with messages or a prompt, `generator` is who tags: a checkpoint, or a plugin of yours.
    output/tagged.jsonl holds the lines with `tags`, lower-case and without those of fewer than `least` conversations,
    output/tags.json how often each stands, synthesis.json the account. What a selection by tags needs is there. The
    same seed gives the same bytes. Stopped at any moment, the same command goes on.

    \b
    Example:
      moelab tag data=[chats.jsonl] output=tagged least=2 \\
          generator.name=checkpoint generator.path=InsTagger
    """
    from moelab.config.load import load_config
    from moelab_tools.synthesis.declaration import TagConfig
    from moelab_tools.synthesis.steps import tag

    made, output = tag(load_config(config, TagConfig, trust=trust), trust=trust)
    click.echo(made.account.told())
    click.echo(str(output))
