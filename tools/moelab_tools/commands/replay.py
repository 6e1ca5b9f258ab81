"""`moelab replay`: recorded routes forced on a model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moelab_tools.trust_option import TRUST_PLUGINS
from moelab_tools.user_path import CHECKPOINT, USER_PATH


@click.command("replay")
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("trace", type=USER_PATH)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the matmuls. Default: the trace's.")
@click.option("--batch-size", type=click.IntRange(1), help="Windows read together. Default: the trace's.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@TRUST_PLUGINS
def command(
    checkpoint: Path, trace: Path, dtype: str | None, batch_size: int | None, device: str, as_json: bool, trust: bool
) -> None:
    """Send a trace's text through CHECKPOINT along the trace's routes, and along its own, and compare.

    With the weights, precision and batches that the trace was recorded with the logits are equal to the bit. With
    another run of the same shape this says what the other's routes are worth to these experts. In a router with copy
    or constant experts (MoE++) what these add stays the model's own.

    \b
    Example:
      moelab replay runs/tiny_moe traces/tiny_moe
      moelab replay runs/seed1 traces/seed0 --dtype bfloat16
    """
    from moelab_tools.routes.replaying import replay

    told = replay(checkpoint, trace, dtype=dtype, batch_size=batch_size, device=device, trust=trust)
    click.echo(json.dumps(told.to_json(), indent=2) if as_json else told.text(checkpoint, trace))
