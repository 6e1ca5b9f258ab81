"""`moelab plugins`: every plugin that a config could name here, with its options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import click


@dataclass
class PluginSelection:
    """Which plugins to load beside the built-in ones."""

    plugins: list[str] = field(default_factory=list)
    entry_points: bool = True


@click.command("plugins")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE...]")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(overrides: tuple[str, ...], as_json: bool) -> None:
    """List every plugin: extension point, name, owner, options with types and defaults, one line of doc.

    \b
    Example:
      moelab plugins
      moelab plugins plugins=[my_lab] --json
    """
    from moelab.config.load import load_config
    from moelab.registry import Registry
    from moelab_tools.describe_plugins import describe_plugins

    loaded = load_config(overrides, PluginSelection)
    registry = Registry(loaded.config.plugins, loaded.config.entry_points, loaded.places("plugins"))
    entries = describe_plugins(registry)
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from moelab_tools.terminal import make_console

    console = make_console(160)
    for key in dict.fromkeys(entry.key for entry in entries):
        mine = [entry for entry in entries if entry.key == key]
        table = Table(
            title=f"{mine[0].extension_point}s  ({key})", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for column in ("name", "in short", "options", "owner"):
            table.add_column(column, overflow="fold")
        for entry in mine:
            options = "\n".join(f"{o.name}: {o.type} = {o.default}" for o in entry.options)
            table.add_row(escape(entry.name), escape(entry.summary), escape(options), escape(entry.owner))
        console.print(table)
