"""`moelab view`: a trace as text coloured by expert."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("view")
@click.argument("trace", type=USER_PATH)
@click.option("--out", type=USER_PATH, required=True, help="The HTML file to write; an older one there is replaced.")
@click.option("--tokenizer", metavar="SPEC",
              help="What the trace was recorded with: bytes, a run, or a tokenizer.json. Default: bytes.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True,
              help="About so many are shown as text; the tables count all.")  # fmt: skip
@click.option("--against", type=USER_PATH, metavar="TRACE",
              help="A second trace whose numbers stand beside: one of `moelab trace --untrained`, say.")  # fmt: skip
def command(trace: Path, out: Path, tokenizer: str | None, tokens: int, against: Path | None) -> None:
    """Write a page that shows a trace: text coloured by expert, layer by layer, and what the colours mean.

    One file, no network. The tables say how much of the choice follows from the token alone, how much the domain is
    known by it, and how much of that is left once the token is known; beside each what chance gives, with domains
    moved between documents.

    \b
    Example:
      moelab view traces/tiny_moe --out traces/tiny_moe.html
      moelab trace runs/tiny_moe --untrained --out traces/untrained
      moelab view traces/tiny_moe --against traces/untrained --out routes.html
    """
    from moelab_tools.routes.view import write_view

    for line in write_view(trace, out, tokenizer=tokenizer, tokens=tokens, against=against):
        click.echo(line)
    click.echo(f"page: {out}")
