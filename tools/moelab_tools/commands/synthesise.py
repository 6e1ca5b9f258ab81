"""`moelab synthesise`: answers that a model gave -> conversations to learn from, and preferences."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH, finite


@click.command("synthesise")
@click.argument("answers", nargs=-1, required=True, type=USER_PATH, metavar="ANSWERS...")
@click.option("--reward", required=True, metavar="PART", help="A name, or {name: ..., options}, or a list of these.")
@click.option("--out", required=True, type=USER_PATH, metavar="FOLDER", help="Written whole, over nothing.")
@click.option(
    "--right",
    metavar="N",
    callback=finite,
    default=1.0,
    show_default=True,
    help="An answer worth at least so much is right.",
)
@click.option(
    "--wrong",
    metavar="N",
    type=float,
    callback=finite,
    help="One worth at most so much is wrong.  [default: any that isn't right]",
)
@click.option(
    "--answers-per-prompt",
    metavar="N",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Right ones to keep.",
)
@click.option(
    "--pairs-per-prompt", metavar="N", default=1, show_default=True, type=click.IntRange(0), help="Preferences to keep."
)
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="With a reward of your own.")
def command(
    answers: tuple[Path, ...],
    reward: str,
    out: Path,
    right: float,
    wrong: float | None,
    answers_per_prompt: int,
    pairs_per_prompt: int,
    plugins: tuple[str, ...],
) -> None:
    """Judge answers: right ones become lines for stage sft, right against wrong ones pairs for stages dpo and reward.

    ANSWERS are what `moelab generate --prompts FILE --samples N --out ANSWERS` wrote; other keys of a prompt's line are
    the reward's to read. FOLDER holds sft.jsonl, pairs.jsonl and synthesis.json, the account. Each line says where it
    is from: file and line of its answers, checkpoint, reward, worth. Answers that were cut off are never right.

    \b
    Example:
      moelab generate runs/tiny_moe --prompts sums.jsonl --samples 8 \\
          --out said.jsonl
      moelab synthesise said.jsonl --out synthetic \\
          --reward "{name: exact_answer, take: last_number}"
    """
    from moelab_tools.synthesis.command import Asking, synthesise
    from moelab_tools.synthesis.rejection import Rule

    rule = Rule(right, wrong, answers_per_prompt, pairs_per_prompt)
    made = synthesise(Asking(answers, reward, plugins), rule, out)
    click.echo(made.account.told())
    click.echo(str(out))
