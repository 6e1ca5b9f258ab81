"""`moelab chat`: talk with a checkpoint in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moelab_tools.sampling_options import sampling_options
from moelab_tools.user_path import CHECKPOINT
from moelab_tools.verify_option import NO_VERIFY


@click.command("chat")
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--system", default=None, help="What the system says first.  [default: as the template has it]")
@click.option(
    "--tokens", type=click.IntRange(1), default=512, show_default=True, help="At most so many new tokens a turn."
)
@sampling_options
@click.option("--tokenizer", default=None, help='"bytes" or a tokenizer.json; default: the checkpoint\'s own.')
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
@NO_VERIFY
def command(
    checkpoint: Path,
    system: str | None,
    tokens: int,
    tokenizer: str | None,
    trust: bool,
    verify: bool,
    **settings: Any,
) -> None:
    """Talk with a model: a line is your turn, then it answers. An empty line, or the end of the input, ends it.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder. Turns are put together by its tokenizer's
    chat template, run in a sandbox; where it has none, as ChatML. A control token that you type is text to the model.
    /new begins a new conversation. How tokens are drawn is as generation_config.json says, where no option says it.

    \b
    Example:
      moelab chat runs/tiny_moe
      echo "What is a router?" | moelab chat runs/tiny_moe --temperature 0
    """
    from moelab_tools.talking import Talk, talk

    settings["max_new_tokens"] = tokens
    talk(Talk.open(checkpoint, settings, tokenizer=tokenizer, system=system, trust=trust, verify=verify))
