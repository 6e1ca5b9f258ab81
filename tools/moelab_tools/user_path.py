"""The types of what stands on the command line: paths, whose leading `~` no shell expanded; finite numbers."""

from __future__ import annotations

import math
from pathlib import Path

import click

from moelab.errors import CheckpointError, ConfigError
from moelab.hub import HF, user_folder
from moelab.paths import user_path


class UserPath(click.ParamType):
    """A path, whether it is there or not."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return user_path(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class CheckpointPath(UserPath):
    """A folder with weights, or hf://ORG/NAME, fetched or from the cache.

    Not a bare name, as keys of a config may have it: runs/NAME, typed in the wrong folder, would be asked of the hub.
    """

    name = "checkpoint"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not str(value).startswith(HF):
            return super().convert(value, param, ctx)
        try:
            found = user_folder(value)
        except CheckpointError as error:
            self.fail(str(error), param, ctx)
        if not found.exists():
            self.fail(
                f"'{value}' is not to be had; a model's name is hf://ORG/NAME or hf://ORG/NAME@REVISION", param, ctx
            )
        return found


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """The callback of a number: nan is in every range of click's."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number.", ctx, param)
    return value


USER_PATH = UserPath()
CHECKPOINT = CheckpointPath()
