"""`moelab export`: a moelab checkpoint as a Hugging Face one."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moelab_tools.user_path import CHECKPOINT, USER_PATH
from moelab_tools.verify_option import NO_VERIFY


@click.command("export")
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("output", type=USER_PATH)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    help="Default: as the checkpoint stores its weights.",
)
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--force", is_flag=True, help="Replace what OUTPUT holds.")
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
@NO_VERIFY
def command(
    checkpoint: Path, output: Path, dtype: str | None, max_shard_size: str, force: bool, trust: bool, verify: bool
) -> None:
    """Write a checkpoint as a Hugging Face folder, as transformers, vLLM and llama.cpp read it.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder. What the model was goes along: begin, end
    and pad ids, generation_config.json, chat template, tokenizer files, licence. The output says the dtype and why,
    whether transformers' AutoTokenizer gives the ids trained on (where transformers is installed), and whether
    llama.cpp's converter knows the tokenizer. A model whose plugins Qwen2 or Qwen2-MoE can't express is refused, with
    every reason.

    \b
    Example:
      moelab export runs/tiny_moe exported/tiny_moe
      moelab export runs/tiny_moe exported/tiny_moe_bf16 --dtype bfloat16
    """
    from moelab_tools.exporting import export
    from moelab_tools.terminal import wrapped

    lines = export(
        checkpoint, output, dtype=dtype, max_shard_size=max_shard_size, force=force, trust=trust, verify=verify
    )
    for line in lines:
        click.echo(wrapped(line, sys.stdout))
