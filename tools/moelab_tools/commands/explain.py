"""`moelab explain`: what each layer of a config is built from, and what it costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moelab.printable import ranges
from moelab_tools.completion import complete_config

if TYPE_CHECKING:
    from moelab.config.load import Loaded
    from moelab.config.run import RunConfig
    from moelab.registry import Registry

# What a run needs and an explanation does not; overrides, so that a bare model file can be explained.
UNUSED = ("run_dir=unused", "train.steps=1", "schedule.warmup_steps=0")


@click.command("explain")
@click.argument(
    "config", nargs=-1, required=True, metavar="[FOLDER] [CONFIG...] [KEY=VALUE...]", shell_complete=complete_config
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--match", "baseline", metavar="CONFIG", help="Find the layout that costs what this model does.")
@click.option("--measure", default="active", show_default=True, help="What to match: total, active or flops.")
@click.option("--vary", default="moe_intermediate_size", show_default=True, help="The layout's option to change.")
@click.option("--multiple-of", default=1, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
def command(
    config: tuple[str, ...], as_json: bool, baseline: str | None, measure: str, vary: str, multiple_of: int, trust: bool
) -> None:
    """Print every layer with each resolved part, its owner, parameters and FLOPs.

    FOLDER is a run folder, a moelab checkpoint or a Hugging Face folder: what the configs and overrides don't say of
    the model is that one's. Active parameters and FLOPs are those that the routers declare they will serve; a run
    counts what it served (`flops` in metrics.jsonl). --match compares declared with declared.

    \b
    Example:
      moelab explain configs/train/tiny_moe.yaml
      moelab explain runs/tiny_moe
      moelab explain model/qwen2-7b moe/deepseek_moe \\
          model.moe.layers.0.router.name=hash
      moelab explain model/qwen2-7b moe/mixtral --match model/qwen2-7b \\
          --multiple-of 128
    """
    from moelab.errors import ConfigError
    from moelab.registry import Registry
    from moelab_tools.checkpoints import load_run, plugin_places, tell_origin, tell_stage

    loaded = load_run(config, UNUSED, trust=trust)
    tell_origin(loaded)
    tell_stage(loaded.config)
    registry = Registry(loaded.config.plugins, loaded.config.entry_points, plugin_places(loaded, trust=trust))
    try:
        table = explain(loaded.config, registry)
        if baseline is not None:
            table["match"] = _match(loaded, baseline, registry, (measure, vary, multiple_of))
    except ConfigError as error:
        raise loaded.blame(error) from error
    if as_json:
        click.echo(json.dumps(table, indent=2))
    else:
        _print(table)


def explain(config: RunConfig, registry: Registry) -> dict[str, Any]:
    """Layers, parts, losses and totals of a run's model, as plain data. Active and FLOPs: as declared."""
    from dataclasses import asdict

    from moelab.builder import build_balance_losses, build_model
    from moelab.hookspecs import BALANCE_LOSSES
    from moelab.moe.block import MoEBlock
    from moelab.nn.count import (
        cached_numbers,
        count_parameters,
        expected_assignments,
        flops_per_token,
        layer_forward_flops,
        layer_parameters,
    )

    model = build_model(config.model, registry, device="meta", seed=None)
    losses = build_balance_losses(config.model, registry)
    length, counted = config.train.sequence_length, count_parameters(model)
    layers = []
    for layer_id, layer in enumerate(model.layers):
        total, active = layer_parameters(layer)
        flops = layer_forward_flops(layer, length)
        costs: dict[str, Any] = {"parameters": total, "active_parameters": active, "forward_flops_per_token": flops}
        if isinstance(layer.mlp, MoEBlock):
            costs["expected_assignments"] = asdict(expected_assignments(layer.mlp))
        layers.append({"layer": layer_id, **costs, "parts": _parts(config, registry, layer_id)})
    nodes = config.model.moe.balance_losses if config.model.moe else []
    return {
        "layers": layers,
        "balance_losses": [
            {
                "name": loss.name,
                "owner": loss.owner,
                "layers": sorted(loss.layers or ()),
                "options": registry.resolve(
                    BALANCE_LOSSES, {k: v for k, v in node.items() if k not in ("layers", "schedule")}, loss.where
                ),
            }
            for loss, node in zip(losses, nodes, strict=True)
        ],
        "parameters": counted.total,
        "active_parameters": counted.active,
        "embedding_parameters": counted.embedding,
        "sequence_length": length,
        "training_flops_per_token": flops_per_token(model, length),
        "cached_numbers_per_token": cached_numbers(model),
    }


def _parts(config: RunConfig, registry: Registry, layer_id: int) -> dict[str, Any]:
    """{part: name, owner, resolved options} of a sparse layer; what the layout says; {} for a dense one."""
    from dataclasses import asdict

    from moelab.hookspecs import ACTIVATIONS, EXPERT_BACKENDS, EXPERT_LAYOUTS, ROUTERS, SHARED_EXPERTS
    from moelab.layouts import build_layouts
    from moelab.moe.per_layer import layer_parts

    moe = config.model.moe
    layout = build_layouts(config.model, registry).get(layer_id)
    if moe is None or layout is None:
        return {}
    points: dict[str, Any] = {
        "layout": EXPERT_LAYOUTS, "router": ROUTERS, "shared_expert": SHARED_EXPERTS, "backend": EXPERT_BACKENDS
    }  # fmt: skip
    parts = layer_parts(moe, config.model.num_hidden_layers)[layer_id]
    found: dict[str, Any] = {"experts": asdict(layout) | {"moe_latent_size": moe.moe_latent_size}}
    act, options = registry.select(ACTIVATIONS, config.model.activation, ACTIVATIONS.key)
    found["activation"] = {"name": act.name, "owner": act.owner, "pattern": None, "options": asdict(options)}
    for key, point in points.items():
        chosen, options = registry.select(point, getattr(parts, key), parts.where(key))
        found[key] = {"name": chosen.name, "owner": chosen.owner, "pattern": parts.pattern, "options": asdict(options)}
    return found


def _match(loaded: Loaded[RunConfig], baseline: str, registry: Registry, how: tuple[str, str, int]) -> dict[str, Any]:
    from dataclasses import asdict

    from moelab.planning.match import match_layout
    from moelab_tools.checkpoints import load_run

    measure, vary, multiple_of = how
    other = load_run([baseline], UNUSED).config.model
    found = match_layout(
        loaded.config.model, other, registry, measure=measure, option=vary, multiple_of=multiple_of,
        sequence_length=loaded.config.train.sequence_length,
    )  # fmt: skip
    return asdict(found) | {"error": found.error}


def _print(table: dict[str, Any]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from moelab_tools.terminal import make_console

    console = make_console(160)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "experts", "router · shared expert\n· backend"):
        shown.add_column(column, overflow="fold")
    for column in ("parameters\nof a layer", "declared\nactive", "declared\nMFLOP/token"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row, layers in _rows(table).items():
        shown.add_row(ranges(layers), *row)
    console.print(shown)
    for line in _part_lines(table):
        console.print(escape(line), soft_wrap=not console.is_terminal)
    console.print(
        f"total {table['parameters']:,} parameters, {table['active_parameters']:,} active, of them "
        f"{table['embedding_parameters']:,} embeddings; {table['training_flops_per_token'] / 1e6:,.3f} MFLOP a token "
        f"forward and backward at {table['sequence_length']} tokens"
    )
    cached = table["cached_numbers_per_token"]
    console.print(f"generation keeps {cached:,} numbers of each token, {2 * cached:,} bytes in bfloat16")
    if table["active_parameters"] < table["parameters"]:
        console.print("active and FLOP are as the routers declare; a run counts what it served", soft_wrap=True)
    if "match" in table:
        m = table["match"]
        console.print(
            f"model.moe.layout.{m['option']}={m['value']} gives {m['found']:,.0f} {m['measure']} for the baseline's "
            f"{m['wanted']:,.0f} ({m['error']:+.3%})" + ("" if m["measure"] == "total" else ", as the routers declare")
        )


def _rows(table: dict[str, Any]) -> dict[tuple[str, ...], list[int]]:
    """{what one layer has and costs: the layers of which that holds}, so that 28 equal layers are one row."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for layer in table["layers"]:
        parts = layer["parts"]
        names = ["dense", ""]
        if parts:
            e = parts["experts"]
            latent = f" in {e['moe_latent_size']}" if e["moe_latent_size"] else ""
            names = [f"{e['num_experts_per_tok']} of {e['num_experts']} x {e['moe_intermediate_size']}{latent}"]
            names.append(" · ".join(parts[key]["name"] for key in ("router", "shared_expert", "backend")))
        costs = [f"{layer['parameters']:,}", f"{layer['active_parameters']:,}"]
        row = (*names, *costs, f"{layer['forward_flops_per_token'] / 1e6:,.3f}")
        rows.setdefault(row, []).append(layer["layer"])
    return rows


def _part_lines(table: dict[str, Any]) -> list[str]:
    """Each distinct part once: its owner, its resolved options, its layers."""
    found: dict[str, list[int]] = {}
    for layer in table["layers"]:
        for key, part in layer["parts"].items():
            if key != "experts":
                options = ", ".join(f"{name}: {value}" for name, value in part["options"].items())
                found.setdefault(f"{key} {part['name']} ({part['owner']}) {{{options}}}", []).append(layer["layer"])
    for layer in table["layers"]:
        if expected := layer.get("expected_assignments"):
            unsettled = "" if expected["settled"] else "; training decides"
            text = f"expects {expected['per_token']:.4g} experts a token in training ({expected['because']}{unsettled})"
            found.setdefault(text, []).append(layer["layer"])
    lines = [f"{text}  layers {ranges(layers)}" for text, layers in found.items()]
    for loss in table["balance_losses"]:
        options = ", ".join(f"{name}: {value}" for name, value in loss["options"].items() if name != "name")
        lines.append(f"loss {loss['name']} ({loss['owner']}) {{{options}}}  layers {ranges(loss['layers'])}")
    return lines
