"""`moelab trace`: who went where."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.trust_option import TRUST_PLUGINS
from moelab_tools.user_path import CHECKPOINT, USER_PATH


@click.command("trace")
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("config", nargs=-1, metavar="[CONFIG...] [KEY=VALUE...]")
@click.option("--out", type=USER_PATH, required=True, help="The folder to write; must not be there yet.")
@click.option("--data", multiple=True, metavar="WHICH", default=("held-out",), show_default=True,
              help="held-out, train, or a file of UTF-8 text; files may be several, each is a document.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), metavar="N",
              help="About so many, in windows spread evenly over the text and its domains. Default: what `moelab "
              "evaluate` reads (evaluation.sequences).")  # fmt: skip
@click.option("--all", "whole", is_flag=True, help="The whole text. All routes are held in memory.")
@click.option("--untrained", is_flag=True, help="The same model with the random weights of its seed, to compare with.")
@TRUST_PLUGINS
def command(
    checkpoint: Path,
    config: tuple[str, ...],
    out: Path,
    data: tuple[str, ...],
    tokens: int | None,
    whole: bool,
    untrained: bool,
    trust: bool,
) -> None:
    """Write which experts every token went to, with which weights, in every MoE layer.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder; CONFIG and KEY=VALUE lie over its own
    config, as in `moelab evaluate`: train.dtype=bfloat16 or evaluation.batch_size=1 trace the same text otherwise.
    The format is in docs/traces.md. Look at a trace with `moelab view`, force it on a model with `moelab replay`,
    compare two with `moelab agreement`.

    \b
    Example:
      moelab trace runs/tiny_moe --out traces/tiny_moe
      moelab trace runs/tiny_moe --tokens 100000 --data train --out traces/read
      moelab trace runs/tiny_moe train.dtype=bfloat16 --out traces/bf16
    """
    from moelab.atomic import check_place
    from moelab.routes.files import write_trace
    from moelab.routes.record import record_routes
    from moelab_tools.routes.source import subject_of
    from moelab_tools.waiting import Waiting

    check_place(out, "--out")
    if whole and tokens is not None:
        raise click.UsageError("--all and --tokens contradict each other")
    subject = subject_of(checkpoint, config, data, trust=trust, untrained=untrained)
    source = subject.read(1 << 60 if whole else tokens)
    with Waiting("tracing, batches", len(source.batches)) as waiting:
        trace = record_routes(
            source.model,
            source.batches,
            source.stream,
            source.domains,
            source.precision,
            source.facts,
            seen=waiting.step,
        )
    write_trace(trace, out)
    facts = source.facts["data"]
    part = "all" if facts["windows"] == facts["windows_of_the_text"] else f"{facts['windows']} of"
    click.echo(
        f"{trace.tokens:,} tokens ({part} {facts['windows_of_the_text']} windows, {len(trace.documents)} documents, "
        f"{facts['split']})"
    )
    for layer in trace.layers:
        loads = layer.loads()
        line = f"layer {layer.layer_id}: {len(layer.expert) / trace.tokens:.3g} experts a token, "
        line += f"fullest {loads.max() / max(loads.mean(), 1e-9):.2f} x the mean"
        line += f", {int((loads == 0).sum())} of {layer.num_experts} unused" if (loads == 0).any() else ""
        line += f", {layer.dropped:,} dropped" if layer.dropped else ""
        line += f"; {layer.other_choices} choices that are no experts are not recorded" if layer.other_choices else ""
        click.echo(line)
    click.echo(f"trace: {out}")
