"""The one option by which a command reads a checkpoint without comparing it with its checksums."""

from __future__ import annotations

import click

NO_VERIFY = click.option(
    "--verify/--no-verify",
    default=True,
    help="Compare a checkpoint with its checksums before it is read, or read it as it is. Default: compare.",
)
