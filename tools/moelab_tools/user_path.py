"""The type of every path on the command line: a leading `~` that no shell expanded is the home folder."""

from __future__ import annotations

from pathlib import Path

import click

from moelab.errors import ConfigError
from moelab.paths import user_path


class UserPath(click.ParamType):
    """A path, whether it is there or not."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return user_path(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


USER_PATH = UserPath()
