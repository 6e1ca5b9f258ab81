"""`--temperature` and its kin, of commands that draw text; what isn't given, generation_config.json says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
SHOWN: dict[str, tuple[type, str]] = {
    "--temperature": (float, "0 is greedy."),
    "--top-k": (int, "Draw from so many of the likeliest tokens; 0: from all."),
    "--top-p": (float, "Draw from the likeliest tokens with this probability together."),
    "--min-p": (float, "Draw from tokens at least this times as likely as the likeliest."),
    "--repetition-penalty": (float, "Above 1: tokens that were there already are less likely."),
}
AUTOTUNE = "Measure once which way this machine reads weights fastest, or not.  [default: where it isn't known]"


def sampling_options(command: CommandT) -> CommandT:
    """The options, each as the field of `nn.sampling.Sampling` that it is; None where it isn't given."""
    command = click.option("--seed", default=0, show_default=True)(command)
    command = click.option("--autotune/--no-autotune", default=None, help=AUTOTUNE)(command)
    command = click.option("--stop", multiple=True, help="A text that ends the text before it. Several: one each.")(
        command
    )
    for option, (kind, help_text) in reversed(SHOWN.items()):
        command = click.option(option, type=kind, default=None, help=help_text)(command)
    return command
