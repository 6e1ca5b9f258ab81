"""`moelab upcycle`: a dense checkpoint becomes one with experts."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config


@click.command("upcycle")
@click.argument(
    "arguments",
    nargs=-1,
    required=True,
    metavar="CONFIG...|SOURCE OUTPUT [KEY=VALUE...]",
    shell_complete=complete_config,
)
@click.option("--dry-run", is_flag=True, help="Print the plan: tensors, budget, what becomes of each source tensor.")
@click.option(
    "--sink", type=click.Choice(["files", "hash"]), default="files", help="hash: make and hash, keep nothing."
)
@click.option("--layers", metavar="A:B", help="Only layers A to B-1; the index waits for the rest.")
@click.option("--no-receipt", is_flag=True, help="Don't compare the result with its source on a probe batch.")
def command(arguments: tuple[str, ...], dry_run: bool, sink: str, layers: str | None, no_receipt: bool) -> None:
    """Turn a dense checkpoint into one with experts.

    SOURCE is a folder of Qwen2, Qwen2.5, Qwen3, Llama, Mistral or Phi-3, or a GGUF file (`moelab plugins
    dense_source`); with no config it gets the proportions of Qwen2-57B-A14B at its width. Writes Qwen2-MoE, Qwen3-MoE
    or Mixtral (target=...), a layer at a time. Killed at any moment, the same command goes on. What the source is goes
    along: token ids, generation_config.json, chat template, tokenizer, licence. A source that could be
    read in two ways, or a vocabulary below its tokenizer's largest id, is refused before anything is written.

    `moelab config --keys` lists every key with its type, default and meaning (--keys recipe: those of the recipe, with
    `moelab config --keys recipe.experts` the options of each initialiser).

    \b
    Example:
      moelab upcycle configs/upcycle/qwen2_57b_a14b.yaml source=Qwen2-7B \\
          output=Qwen2-57B-A14B-upcycled
      moelab upcycle SmolLM2-135M.gguf SmolLM2-MoE
    """
    from moelab_tools.upcycling import UpcycleRequest, run_upcycle

    run_upcycle(UpcycleRequest(arguments, dry_run, sink, layers, receipt=not no_receipt))
