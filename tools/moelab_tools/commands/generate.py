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
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
def command(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    tokenizer: str | None,
    trust: bool,
) -> None:
    """Continue a prompt.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder. The text ends at any of the end tokens
    that its generation_config.json names, else its config.json, else at the token that ended documents in training;
    which one ended it is said on stderr.

    \b
    Example:
      moelab generate runs/tiny_moe --prompt "import "
    """
    import moelab
    from moelab.generate import Sampling, generate
    from moelab.origin import check_vocabulary, end_token_ids, read_origin
    from moelab_tools.checkpoints import tokenizer_of

    origin = read_origin(checkpoint)
    chosen = tokenizer_of(checkpoint, tokenizer)
    check_vocabulary(origin.model.vocab_size, chosen, tokenizer or str(origin.tokenizer))
    model = moelab.load(origin.folder, trust=trust)
    ends = (
        end_token_ids(origin.folder) if tokenizer is None else None
    )  # ids mean something to their own tokenizer alone
    end_ids, said_by = ends or ((chosen.eos_token_id,), "the tokenizer")
    sampling = Sampling(tokens, temperature, top_p, seed, end_ids)
    ids = chosen.encode(prompt).tolist() or [chosen.eos_token_id]
    continuation = list(generate(model, ids, sampling))
    ended = continuation[-1:] if continuation[-1:] and continuation[-1] in end_ids else []
    click.echo(prompt + chosen.decode(continuation[: len(continuation) - len(ended)]))
    names = ", ".join(f"{chosen.decode([i])} ({i})" for i in (ended or end_ids))
    click.echo(
        f"ended at {names}, as {said_by} says" if ended else f"{tokens} tokens without {names} of {said_by}", err=True
    )
