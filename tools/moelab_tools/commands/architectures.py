"""`moelab architectures`: the shipped model configs as the Qwen2 report tabulates them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from moelab.config.model import ModelConfig

WIDE = 1000  # columns: more than any table needs
# The rows of Table 1 of the Qwen2 report (2407.10671) that config.json knows, and what follows from them.
ROWS = {
    "hidden_size": "Hidden size",
    "num_hidden_layers": "Layers",
    "num_attention_heads": "Query heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "Head size",
    "intermediate_size": "Dense FFN width",
    "num_experts": "Routed experts",
    "num_experts_per_tok": "Experts per token",
    "moe_intermediate_size": "Expert width",
    "shared_expert_intermediate_size": "Shared expert width",
    "vocab_size": "Vocabulary",
    "tie_word_embeddings": "Tied embeddings",
    "parameters": "Parameters",
    "active_parameters": "Active parameters",
    "non_embedding_parameters": "Non-embedding",
    "cached_numbers": "Cached per token",
}


@dataclass
class ModelFile:
    """A file of configs/model/."""

    model: ModelConfig = field(default_factory=ModelConfig)


@click.command("architectures")
@click.argument("config", nargs=-1, metavar="[CONFIG...]")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(config: tuple[str, ...], as_json: bool) -> None:
    """Dimensions and exact parameter counts of the shipped model configs, or of the CONFIGs given.

    The counts are taken from models built on the meta device, which holds no weights. Active parameters are as the
    routers declare.

    \b
    Example:
      moelab architectures
      moelab architectures model/qwen2-7b configs/model/qwen2-57b-a14b.yaml --json
    """
    from moelab.config.files import config_folder

    chosen = list(config) or [str(path) for path in (config_folder() / "model").glob("*.yaml")]
    table = {Path(name).stem: _describe(name) for name in chosen}
    if not config:
        table = dict(sorted(table.items(), key=lambda item: item[1]["parameters"]))
    if as_json:
        click.echo(json.dumps(table, indent=2))
    else:
        _print(table)


def _describe(name: str) -> dict[str, Any]:
    """The values of ROWS for one config; None where a dense model has none."""
    from moelab.builder import build_model
    from moelab.config.load import load_config
    from moelab.moe.block import MoEBlock
    from moelab.nn.count import cached_numbers, count_parameters

    model_config = load_config([name], ModelFile).config.model
    model = build_model(model_config, device="meta", seed=None)
    counts = count_parameters(model)
    row: dict[str, Any] = dict.fromkeys(ROWS)
    row |= {key: getattr(model_config, key) for key in ROWS if hasattr(model_config, key)}
    row |= {"head_dim": model_config.attention_head_dim, "parameters": counts.total}
    row |= {"active_parameters": counts.active, "non_embedding_parameters": counts.non_embedding}
    row["cached_numbers"] = cached_numbers(model)
    block = next((layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock)), None)
    if block is not None:
        row |= {key: getattr(block.layout, key) for key in ROWS if hasattr(block.layout, key)}
        row["shared_expert_intermediate_size"] = getattr(block.shared_expert, "intermediate_size", None)
    return row


def _print(table: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table

    from moelab_tools.terminal import make_console

    def grid_of(names: list[str]) -> Table:
        grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        grid.add_column("", no_wrap=True)
        for name in names:
            grid.add_column(name, justify="right", no_wrap=True)
        for key, label in ROWS.items():
            grid.add_row(label, *(_cell(table[name][key]) for name in names))
        return grid

    def show(names: list[str]) -> None:
        """In one table, or in two below each other where a terminal is too narrow: no exact count is cut short."""
        grid = grid_of(names)
        needed = Measurement.get(console, console.options.update_width(WIDE), grid).maximum
        if console.is_terminal and needed > console.width and len(names) > 1:
            half = (len(names) + 1) // 2
            show(names[:half])
            show(names[half:])
        else:
            console.width = max(needed, console.width)
            console.print(grid)

    console = make_console()
    show(list(table))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}"
