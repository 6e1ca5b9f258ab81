"""`moelab export`: a moelab checkpoint as a Hugging Face one."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("export")
@click.argument("checkpoint", type=USER_PATH)
@click.argument("output", type=USER_PATH)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--force", is_flag=True, help="Replace what OUTPUT holds.")
def command(checkpoint: Path, output: Path, dtype: str, max_shard_size: str, force: bool) -> None:
    """Write a checkpoint that transformers, vLLM and llama.cpp read.

    CHECKPOINT is a run folder or a moelab checkpoint. A model whose plugins Qwen2 or Qwen2-MoE can't express is
    refused, with every reason.

    \b
    Example:
      moelab export runs/tiny_moe exported/tiny_moe
    """
    import torch

    import moelab
    from moelab.checkpoint import resolve_checkpoint
    from moelab.data.lineage import carried_lineage
    from moelab.data.seen import carried_record
    from moelab.hf.save import save_hf
    from moelab_tools.checkpoints import tokenizer_of

    tokenizer, folder = tokenizer_of(checkpoint, None), resolve_checkpoint(checkpoint)
    model = moelab.load(checkpoint)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    save_hf(
        model,
        output,
        dtype=getattr(torch, dtype),
        max_shard_size=max_shard_size,
        extra_files=tokenizer.files() | carried_record([folder]) | carried_lineage(folder),
        config_extra=ids,
        force=force,
    )
    click.echo(f"written: {output}")
