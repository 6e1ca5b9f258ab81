"""A folder of JSON lines and their account, in place whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moelab.atomic import partial
from moelab.errors import ConfigError

ACCOUNT = "synthesis.json"


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line of JSON each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def account(content: Mapping[str, Any]) -> str:
    """As a file's text."""
    return json.dumps(content, indent=1) + "\n"


def write_folder(out: Path, files: Mapping[str, str]) -> None:
    """{name: text} as a folder that is not there yet. Raises ConfigError for what the system refuses."""
    beside = partial(out)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, content in files.items():
            (beside / name).write_text(content, encoding="utf-8", errors="replace")
        beside.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
