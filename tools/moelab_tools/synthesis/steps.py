"""The steps of synthesis that ask a generator, each from a loaded config to a folder that lies in its place."""

from __future__ import annotations

import logging
from pathlib import Path

from moelab.config.load import Loaded
from moelab.paths import user_path
from moelab_tools.synthesis import constitution
from moelab_tools.synthesis.asking import Asker, asking
from moelab_tools.synthesis.conversations import read_asked
from moelab_tools.synthesis.declaration import CritiqueConfig
from moelab_tools.synthesis.folder import ACCOUNT, account, lines, write_folder

logger = logging.getLogger("moelab")


def critique(loaded: Loaded[CritiqueConfig], *, trust: bool = False) -> tuple[constitution.Made, Path]:
    """sft.jsonl, pairs.jsonl and the account. Raises UserError before anything is asked for what can't be."""
    config, output = loaded.config, user_path(loaded.config.output, "output")
    prompts, again = read_asked(config.data, loaded.places("data"))
    with asking(loaded, output, trust=trust) as ask:
        _tell_remembered(ask)
        made = constitution.make(config, prompts, ask)
        made.account.repeated = again
        files = {"sft.jsonl": lines(made.sft), "pairs.jsonl": lines(made.pairs)}
        write_folder(output, {**files, ACCOUNT: account(constitution.told(config, ask, made))})
    return made, output


def _tell_remembered(ask: Asker) -> None:
    if len(ask.memory):
        logger.warning(
            "%s: %d replies of a command that was stopped are there; what was asked then is not asked again",
            ask.memory.folder, len(ask.memory),
        )  # fmt: skip
