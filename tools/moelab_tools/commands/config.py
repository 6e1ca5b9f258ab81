"""`moelab config`: what a config comes to and who said so, every key there is, and a schema for editors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moelab_tools.completion import complete_config, complete_key

if TYPE_CHECKING:
    from moelab.registry import Registry
    from moelab_tools.config_listing import Line

ALL = ""  # the prefix of every key


@click.command("config")
@click.argument("config", nargs=-1, metavar="[FOLDER] [CONFIG...] [KEY=VALUE...]", shell_complete=complete_config)
@click.option("--resolved", is_flag=True, help="With every default, those of plugins too, as a run stores it.")
@click.option(
    "--keys", metavar="[PREFIX]", is_flag=False, flag_value=ALL, help="List keys: type, default, meaning.",
    shell_complete=complete_key,
)  # fmt: skip
@click.option(
    "--schema",
    metavar="[train|upcycle|data|merge]",
    is_flag=False,
    flag_value="train",
    help="Write a JSON Schema for editors.",
)
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
def command(config: tuple[str, ...], resolved: bool, keys: str | None, schema: str | None, trust: bool) -> None:
    """Print what configs and overrides come to, with the file or override that set each value.

    Only what is set, else (--resolved) all there is; what has no comment is a default. --keys explains every key, or
    those under PREFIX; under a key that selects plugins (model.moe.router, data.source) their options too. --schema
    writes to the standard output; plugins=[my_router] puts your own into either.

    \b
    Example:
      moelab config configs/train/tiny_moe.yaml configs/moe/switch.yaml \\
          optimizer.lr=1e-3
      moelab config configs/train/tiny_moe.yaml --resolved
      moelab config --keys optimizer
      moelab config --keys model.moe.router
      moelab config --schema train > moelab.schema.json
    """
    if keys is not None and "=" in keys:  # `--keys plugins=[mine]`: no prefix
        config, keys = (*config, keys), ALL
    if schema is not None and "=" in schema:
        config, schema = (*config, schema), "train"
    asked = [name for name, value in (("--keys", keys), ("--schema", schema)) if value is not None]
    if len(asked) + resolved > 1:
        raise click.UsageError(f"{' and '.join([*asked, *['--resolved'] * resolved])}: one at a time")
    if keys is not None:
        _print_lines(keys, config)
    elif schema is not None:
        _print_schema(schema, config)
    elif not config:
        raise click.UsageError("name a config file, or ask for --keys or --schema")
    else:
        from moelab_tools.resolving import resolved_text, said_text

        click.echo(resolved_text(config, trust=trust) if resolved else said_text(config), nl=False)


def _registry(overrides: tuple[str, ...]) -> Registry:
    """All plugins that are installed, and those that the overrides name, which may lie in the current folder."""
    from moelab.config.load import load_config
    from moelab.registry import Registry
    from moelab_tools.commands.plugins import PluginSelection

    loaded = load_config(overrides, PluginSelection)
    return Registry(loaded.config.plugins, loaded.config.entry_points, loaded.places("plugins"))


def _print_lines(prefix: str, overrides: tuple[str, ...]) -> None:
    from moelab_tools.config_listing import key_lines, part_above

    registry = _registry(overrides) if part_above(prefix) else None
    show_lines(list(key_lines(prefix, registry)))


def show_lines(lines: list[Line]) -> None:
    """Folded to the terminal's width; in a pipe a line each, for grep."""
    from rich.text import Text

    from moelab_tools.terminal import fold, make_console

    console = make_console()
    for line in lines:
        heading = not line.doc and not line.indent and ":" not in line.text
        whole = f"{line.text}  # {line.doc}" if line.doc else line.text
        start = " " * line.indent
        shown = fold(whole, console.width, start, f"{start}    ") if console.is_terminal else start + whole
        console.print(Text(shown, style="bold" if heading else ""), soft_wrap=True)


def _print_schema(name: str, overrides: tuple[str, ...]) -> None:
    from moelab.errors import ConfigError
    from moelab_tools.config_listing import COMMANDS
    from moelab_tools.config_schema import config_schema

    if name not in COMMANDS:
        raise ConfigError(f"--schema: must be {' or '.join(COMMANDS)}, not '{name}'")
    found: dict[str, Any] = config_schema(COMMANDS[name], _registry(overrides), f"A config of moelab {name}")
    click.echo(json.dumps(found, indent=1))
