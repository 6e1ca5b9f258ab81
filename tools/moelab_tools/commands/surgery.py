"""`moelab surgery`: grow, split, merge, prune or revive the experts of a trained checkpoint, or change K."""

from __future__ import annotations

import click

from moelab_tools.trust_option import TRUST_PLUGINS
from moelab_tools.user_path import CHECKPOINT, USER_PATH
from moelab_tools.verify_option import NO_VERIFY


@click.command("surgery")
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("output", type=USER_PATH)
@click.argument("name", metavar="SURGERY")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE...]")
@click.option("--layers", metavar="WHICH", help="As in a config: 3, 0-5, 20-, 0-27/2. Default: all with experts.")
@click.option("--data", type=click.Choice(["train", "held-out"]), default="train", show_default=True,
              help="The text that experts are scored on; the receipt's is held out.")  # fmt: skip
@click.option("--trace", type=USER_PATH, help="Score by the routes of a `moelab trace` instead: loads, coactivation.")
@click.option("--tokens", type=click.IntRange(1), default=8192, show_default=True, metavar="N",
              help="About so many are scored on, and as many held-out ones judge.")  # fmt: skip
@click.option(
    "--over", multiple=True, metavar="KEY=VALUE", help="Over the run's own config: data.*, plugins=[my_lab.surgery]."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn by chance.")
@click.option("--no-receipt", is_flag=True, help="Don't compare the result with the checkpoint on held-out text.")
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@TRUST_PLUGINS
@NO_VERIFY
def command(no_receipt: bool, **options: object) -> None:
    """Operate on the experts of a trained checkpoint: grow, split, merge, prune, revive, or another K (top_k).

    CHECKPOINT is a run folder or one of its checkpoints; OUTPUT, which must not be there yet, becomes a run folder that
    `moelab train OUTPUT/config.yaml --resume` goes on with at the same step: weights, moments, the router's rows and
    biases are carried along. `moelab plugins surgery` lists each with its options, and says when the function stays
    as it is; a plugin of your own is one more (docs/surgery.md).

    \b
    Example:
      moelab surgery runs/tiny_moe runs/split split parts=2
      moelab surgery runs/tiny_moe runs/pruned prune num_experts=12 by=reap
      moelab surgery runs/tiny_moe runs/grown grow num_experts=24 row_noise=0.1
    """
    from moelab_tools.surgery.operating import Asked, operate

    for line in operate(Asked(receipt=not no_receipt, **options)):  # type: ignore[arg-type]
        click.echo(line)
