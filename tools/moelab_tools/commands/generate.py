"""`moelab generate`: continue a prompt with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("generate")
@click.argument("checkpoint", type=USER_PATH)
@click.option("--prompt", default="def ", show_default=True)
@click.option("--tokens", default=200, show_default=True, help="At most so many new tokens.")
@click.option("--temperature", default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--tokenizer", default=None, help='"bytes" or a tokenizer.json; default: the checkpoint\'s own.')
def command(
    checkpoint: Path, prompt: str, tokens: int, temperature: float, top_p: float, seed: int, tokenizer: str | None
) -> None:
    """Continue a prompt.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder.

    \b
    Example:
      moelab generate runs/tiny_moe --prompt "import "
    """
    import moelab
    from moelab.generate import Sampling, generate
    from moelab_tools.checkpoints import tokenizer_of

    chosen = tokenizer_of(checkpoint, tokenizer)
    model = moelab.load(checkpoint)
    sampling = Sampling(tokens, temperature, top_p, seed, chosen.eos_token_id)
    ids = chosen.encode(prompt).tolist() or [chosen.eos_token_id]
    continuation = list(generate(model, ids, sampling))
    click.echo(prompt + chosen.decode(continuation))
