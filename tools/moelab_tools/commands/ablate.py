"""`moelab ablate`: what experts and routes are worth, by taking them away."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.trust_option import TRUST_PLUGINS
from moelab_tools.user_path import CHECKPOINT, USER_PATH


@click.command("ablate")
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("config", nargs=-1, metavar="[CONFIG...] [KEY=VALUE...]")
@click.option("--remove", multiple=True, metavar="WHAT",
              help="all (the default): every expert, and every layer's whole routing, one at a time; 3: layer 3's "
              "routing; 3:7: one expert; 3:7,3:9: both together, and each alone.")  # fmt: skip
@click.option("--rest", type=click.Choice(["renormalise", "drop", "both"]), default="renormalise", show_default=True,
              help="The other weights of a token that loses an expert: scaled to the old sum, or kept.")  # fmt: skip
@click.option("--swap", multiple=True, metavar="WHAT",
              help="Other experts at equal compute: nearest (the last choice gives way to the next best), next-best "
              "(all do), random, or the folder of a trace, whose text is then the text.")  # fmt: skip
@click.option("--study", type=click.Choice(["rare", "alternatives"]),
              help="rare: can seldom chosen experts go? alternatives: does the router know better?")  # fmt: skip
@click.option("--data", multiple=True, metavar="WHICH", default=("held-out",), show_default=True,
              help="held-out, train, or a file of UTF-8 text; files may be several, each is a document.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), metavar="N",
              help="About so many. Default: what `moelab evaluate` reads (evaluation.sequences).")  # fmt: skip
@click.option("--top", type=click.IntRange(4), default=20, show_default=True, help="Rows of the table.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn by chance.")
@click.option("--out", type=USER_PATH, help="A folder for ablation.json with all numbers; one there is replaced.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@TRUST_PLUGINS
def command(checkpoint: Path, config: tuple[str, ...], out: Path | None, as_json: bool, **options: object) -> None:
    """Remove experts or change routes of a frozen model, and say what that costs in held-out loss.

    Each change is measured on the same tokens as the untouched model; intervals are over documents, p values are
    corrected for the number of changes (Holm). All is about this one trained model: another seed is another model.
    The two studies re-do published ones, see docs/traces.md.

    \b
    Example:
      moelab ablate runs/tiny_moe --tokens 16384
      moelab ablate runs/tiny_moe --remove 1:3,1:5 --rest both
      moelab ablate runs/tiny_moe --swap next-best --swap random --out routes
      moelab ablate runs/tiny_moe --study rare
    """
    import json
    import textwrap

    from moelab.atomic import check_output
    from moelab_tools.routes.ablating import NUMBERS, ablate

    if out is not None:
        check_output(out, "--out")
        check_output(out / NUMBERS, "--out", file=True)
    told = ablate(checkpoint, config, **options)  # type: ignore[arg-type]
    if out is not None:
        told.write(out)
    if as_json:
        click.echo(json.dumps(told.json, indent=2))
        return
    for line in told.lines:  # tables fit; sentences are wrapped
        whole = textwrap.wrap(line, 80, break_long_words=False, break_on_hyphens=False) if len(line) > 80 else [line]
        click.echo("\n".join(whole))
    if out is not None:
        click.echo(f"numbers: {out / 'ablation.json'}")
