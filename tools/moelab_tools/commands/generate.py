"""`moelab generate`: continue prompts with one checkpoint, or with several side by side."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.positions import Positions, position_options
from moelab_tools.user_path import USER_PATH
from moelab_tools.verify_option import NO_VERIFY


@click.command("generate")
@click.argument("checkpoint", nargs=-1, required=True, type=USER_PATH, metavar="CHECKPOINT...")
@click.option("--prompt", multiple=True, default=["def "], show_default=True, help="Several: one --prompt each.")
@click.option("--tokens", default=200, show_default=True, help="At most so many new tokens.")
@click.option("--temperature", default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--tokenizer", default=None, help='"bytes" or a tokenizer.json; default: the checkpoint\'s own.')
@click.option("--json", "as_json", is_flag=True, help="Print the texts as JSON, to the last character.")
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
@position_options
@NO_VERIFY
def command(
    checkpoint: tuple[Path, ...],
    prompt: tuple[str, ...],
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    tokenizer: str | None,
    as_json: bool,
    trust: bool,
    verify: bool,
    attention: str | None,
    rope_scaling: str | None,
) -> None:
    """Continue a prompt; with several checkpoints, the same prompts side by side, drawn with the same random numbers.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder. The text ends at any of the end tokens
    that its generation_config.json names, else its config.json, else at the token that ended documents in training;
    which one ended it is said on stderr. Control characters are spelled out; --json gives the texts as they are.

    --attention and --rope-scaling reach beyond the trained length; the factor of yarn and linear is that of prompt and
    new tokens, where it is not given.

    \b
    Example:
      moelab generate runs/tiny_moe --prompt "import "
      moelab generate runs/dense runs/moe --prompt "def " --temperature 0
    """
    import json
    import shutil
    from dataclasses import asdict

    from moelab.nn.generate import Sampling
    from moelab.printable import printable
    from moelab_tools.samples import continue_prompts, show

    sampling = Sampling(tokens, temperature, top_p, seed)
    samples = [
        sample
        for folder in checkpoint
        for sample in continue_prompts(
            folder,
            prompt,
            sampling,
            Positions(attention, rope_scaling),
            tokenizer=tokenizer,
            trust=trust,
            verify=verify,
        )
    ]
    samples.sort(key=lambda sample: prompt.index(sample.prompt))  # stable: checkpoints stay in the order given
    if as_json:
        click.echo(json.dumps([asdict(sample) for sample in samples], indent=2))
    else:
        show(samples, shutil.get_terminal_size().columns)
    for sample in samples:
        whose = printable(f"{sample.checkpoint}, {sample.prompt!r}: ") if len(samples) > 1 else ""
        click.echo(f"{whose}{printable(sample.ended)}", err=True)
