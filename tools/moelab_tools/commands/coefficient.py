"""`moelab coefficient`: one load-balance coefficient in another program's convention."""

from __future__ import annotations

import json
from typing import Any

import click

from moelab_tools.commands.explain import UNUSED
from moelab_tools.completion import complete_config
from moelab_tools.user_path import finite


@click.command("coefficient")
@click.argument("value", type=click.FloatRange(min=0), callback=finite)
@click.option("--from", "source", default="moelab", show_default=True, help="Whose coefficient VALUE is.")
@click.option("--to", "target", help="Whose is asked for. Default: all that are known.")
@click.option("--model", "config", multiple=True, metavar="CONFIG|KEY=VALUE", shell_complete=complete_config,
              help="The model that gives K and the number of MoE layers; may be given again.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(1), help="Experts a token goes to, instead of --model's.")
@click.option("--layers", type=click.IntRange(1), help="MoE layers, instead of --model's.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    value: float,
    source: str,
    target: str | None,
    config: tuple[str, ...],
    top_k: int | None,
    layers: int | None,
    as_json: bool,
) -> None:
    """Print what VALUE is called elsewhere: the coefficient that adds the same to the loss.

    Programs differ in what perfect balance costs at a coefficient of one, and in whether layers are summed. Says where
    a conversion is exact at every load and where it is not. Losses with another formula (z-loss, sequence-wise,
    device-wise) don't convert.

    \b
    Example:
      moelab coefficient 0.01 --from megatron --to t5x \\
          --model model/qwen2-57b-a14b
      moelab coefficient 0.001 --from huggingface --top-k 8 --layers 28
    """
    from moelab.moe.coefficients import CONVENTIONS, convert_coefficient, find_convention, inexact

    for name in (source, *([target] if target else [])):
        find_convention(name)
    top_k, layers = _sizes(config, top_k, layers)
    rows: list[dict[str, Any]] = [
        {
            "convention": name,
            "coefficient": convert_coefficient(value, source, name, top_k=top_k, num_layers=layers),
            "says": CONVENTIONS[name].says,
            "inexact": inexact(source, name, top_k),
        }
        for name in ([target] if target else CONVENTIONS)
    ]
    if as_json:
        click.echo(json.dumps({"value": value, "from": source, "top_k": top_k, "layers": layers, "to": rows}, indent=2))
        return
    click.echo(f"{value:g} in {source}'s convention, K = {top_k}, L = {layers} MoE layers. {CONVENTIONS[source].says}")
    for row in rows:
        click.echo(f"  {row['convention']:<12} {row['coefficient']:<12.6g} {row['says']}")
        for told in row["inexact"]:
            click.echo(f"{'':>15}{told}")


def _sizes(config: tuple[str, ...], top_k: int | None, layers: int | None) -> tuple[int, int]:
    """K and the number of MoE layers. Raises ConfigError where the model's layers differ in K or none is known."""
    from moelab.errors import ConfigError

    if not config:
        if top_k is None or layers is None:
            raise ConfigError("K and the number of layers are needed: --model CONFIG, or --top-k and --layers")
        return top_k, layers
    from moelab.layouts import build_layouts
    from moelab.registry import Registry
    from moelab_tools.checkpoints import load_run, plugin_places

    loaded = load_run(config, UNUSED)
    try:
        layouts = build_layouts(
            loaded.config.model, Registry(loaded.config.plugins, loaded.config.entry_points, plugin_places(loaded))
        )
    except ConfigError as error:
        raise loaded.blame(error) from error
    found = sorted({layout.num_experts_per_tok for layout in layouts.values()})
    if not found:
        raise ConfigError("--model: is dense: there is no layer to balance")
    if top_k is None and len(found) > 1:
        raise ConfigError(f"--model: its layers have num_experts_per_tok {found}; say which with --top-k")
    return top_k or found[0], layers or len(layouts)
