"""The one option by which a command lets a folder's plugins run."""

from __future__ import annotations

import click

TRUST_PLUGINS = click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the folder names: their code runs with your rights.",
)
