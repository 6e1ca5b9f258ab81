"""`moelab plugins`: every plugin that a config could name here, with its options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import click

from moelab_tools.completion import complete_plugin

if TYPE_CHECKING:
    from moelab_tools.describe_plugins import PluginEntry

WIDTH = 100  # where there is no terminal


@dataclass
class PluginSelection:
    """Which plugins to load beside the built-in ones."""

    plugins: list[str] = field(default_factory=list)
    entry_points: bool = True


@click.command("plugins")
@click.argument("arguments", nargs=-1, metavar="[NAME|KIND...] [KEY=VALUE...]", shell_complete=complete_plugin)
@click.option("--all", "whole", is_flag=True, help="With every option and whose it is; so are plugins named by NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(arguments: tuple[str, ...], whole: bool, as_json: bool) -> None:
    """List every plugin by kind: its name and what it does, in a line.

    A KIND (routers, balance_losses, or its key: model.moe.router) lists that kind alone; a NAME shows all of one
    plugin: options with types, defaults and meaning, source, when to use it.

    \b
    Example:
      moelab plugins
      moelab plugins routers
      moelab plugins sigmoid_topk
      moelab plugins plugins=[my_lab] --json
    """
    from moelab.config.files import is_override
    from moelab.config.load import load_config
    from moelab.registry import Registry
    from moelab_tools.describe_plugins import choose, describe_plugins
    from moelab_tools.described import described

    overrides = [argument for argument in arguments if is_override(argument)]
    loaded = load_config(overrides, PluginSelection)
    chosen = loaded.config
    entries = described(chosen.plugins, chosen.entry_points)
    if entries is None:
        entries = describe_plugins(Registry(chosen.plugins, chosen.entry_points, loaded.places("plugins")))
    kinds, named = choose(entries, [argument for argument in arguments if not is_override(argument)])
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in [*kinds, *named]], indent=2))
        return
    _print_kinds(kinds, whole)
    for entry in named:
        _print_whole(entry)
    if kinds and not whole:
        click.echo("\nAll of one: moelab plugins NAME; options of all: moelab plugins --all")


def _print_kinds(entries: list[PluginEntry], whole: bool) -> None:
    """A heading for each kind, and a line for each plugin; with `whole` all of it."""
    from rich.text import Text

    from moelab.hookspecs import EXTENSION_POINTS
    from moelab_tools.describe_plugins import plural
    from moelab_tools.terminal import fold, make_console

    console = make_console(WIDTH)
    for point in EXTENSION_POINTS:
        mine = [entry for entry in entries if entry.key == point.key]
        if mine:
            console.print(Text(f"\n{plural(point)}  ({point.key})", style="bold"), soft_wrap=True)
        longest = max((len(entry.name) for entry in mine), default=0)
        for entry in mine:
            if whole:
                _print_whole(entry)
                continue
            begin = f"  {entry.name.ljust(longest)}  "
            console.print(Text(fold(entry.summary, console.width, begin, " " * len(begin))), soft_wrap=True)


def _print_whole(entry: PluginEntry) -> None:
    """All that a plugin says of itself."""
    from rich.text import Text

    from moelab_tools.config_listing import plugin_lines
    from moelab_tools.plugin_pages import TITLES
    from moelab_tools.terminal import fold, make_console

    console = make_console(WIDTH)
    title = Text(f"\n{entry.name}", style="bold").append(f"  {entry.key}  ({entry.owner})", style="dim")
    console.print(title, soft_wrap=True)
    sections = [f"{TITLES[name]}: {text}" for name, text in entry.sections.items() if name]
    for text in filter(None, (entry.summary, entry.sections.get("", ""), *sections)):
        console.print(Text(fold(text, console.width, "  ", "  ")), soft_wrap=True)
    for line in list(plugin_lines(entry))[1:]:
        option = f"{line.text}  # {line.doc}" if line.doc else line.text
        console.print(Text(fold(option, console.width, "    ", "        ")), soft_wrap=True)
