"""Weights and tokenizers by their name on the Hugging Face hub: `org/name`, or `org/name@revision`.

A folder of that name wins. Fetched are configs, tokenizers and safetensors, never code, nothing pickled; what lies in
the cache already is used without a network, and so is everything where HF_HUB_OFFLINE is set. The folder that comes
back is that of one commit (.../snapshots/COMMIT, huggingface_hub: "Understand caching"), which is what a receipt, a
lineage and a log then name.
"""

from __future__ import annotations

import logging
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from moelab.errors import CheckpointError
from moelab.paths import user_path

logger = logging.getLogger("moelab")
ALLOWED = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "LICENSE*", "NOTICE*")
REFUSED = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*/*")  # folders within hold other formats of the same weights
_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-]{1,100}))?")


def user_folder(text: str | Path, key: str | None = None) -> Path:
    """What a user names as a folder: a path, or where none is there a name on the hub, fetched or from the cache.

    Raises CheckpointError, saying how to fetch it, where it is a name that can't be had.
    """
    path = user_path(text, key) if key is not None else user_path(text)
    match = _NAME.fullmatch(str(text)) if isinstance(text, str) else None
    if match is None or path.parent.exists():  # runs/nothing is a path that was mistyped, and no name
        return path
    found = _snapshot(match[1], match[2])
    if found is None:
        return path  # whoever reads it says that it isn't there
    logger.warning("%s: from the Hugging Face hub, commit %s", text, found.name)
    return found


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the cache holds (models--ORG--NAME/snapshots/COMMIT); None of any other folder."""
    repository = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return folder.name if repository.startswith("models--") else None


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a commit; None where the package is missing and nothing says that a hub is meant."""
    try:
        hub: Any = import_module("huggingface_hub")
        errors: Any = import_module("huggingface_hub.errors")
    except ImportError:
        logger.warning("%s: no such folder; to take it from the Hugging Face hub: pip install 'moelab[hub]'", name)
        return None
    wanted = {"allow_patterns": list(ALLOWED), "ignore_patterns": list(REFUSED), "revision": revision}
    try:
        return Path(hub.snapshot_download(name, **wanted))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" --revision {revision}" if revision else ""
        reason = type(error).__name__
        raise CheckpointError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub ({reason}); with a network: "
            f"hf download {name}{at}"
        ) from error
