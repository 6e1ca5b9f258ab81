"""The steps of synthesis that ask a generator, each from a loaded config to a folder that lies in its place."""

from __future__ import annotations

import logging
from pathlib import Path

from moelab.config.load import Loaded
from moelab_tools.synthesis import constitution, evolution, tags
from moelab_tools.synthesis.asking import Asker, asking, free
from moelab_tools.synthesis.conversations import found_file, read_asked
from moelab_tools.synthesis.declaration import CritiqueConfig, EvolveConfig, TagConfig
from moelab_tools.synthesis.folder import ACCOUNT, account, lines, write_folder

logger = logging.getLogger("moelab")


def critique(loaded: Loaded[CritiqueConfig], *, trust: bool = False) -> tuple[constitution.Made, Path]:
    """sft.jsonl, pairs.jsonl and the account. Raises UserError before anything is asked for what can't be."""
    config, output = loaded.config, free(loaded)
    prompts, again = read_asked(config.data, loaded.places("data"))
    with asking(loaded, output, trust=trust) as ask:
        _tell_remembered(ask)
        made = constitution.make(config, prompts, ask)
        made.account.repeated = again
        files = {"sft.jsonl": lines(made.sft), "pairs.jsonl": lines(made.pairs)}
        write_folder(output, {**files, ACCOUNT: account(constitution.told(config, ask, made))})
    return made, output


def evolve(loaded: Loaded[EvolveConfig], *, trust: bool = False) -> tuple[evolution.Made, Path]:
    """prompts.jsonl, sft.jsonl where they are answered, and the account. Raises as `critique` does."""
    config, output = loaded.config, free(loaded)
    prompts, again = read_asked(config.data, loaded.places("data"))
    with asking(loaded, output, trust=trust) as ask:
        _tell_remembered(ask)
        made = evolution.make(config, prompts, ask)
        made.account.repeated = again
        files = {"prompts.jsonl": lines(made.prompts)} | ({"sft.jsonl": lines(made.sft)} if config.answers else {})
        write_folder(output, {**files, ACCOUNT: account(evolution.told(config, ask, made))})
    return made, output


def tag(loaded: Loaded[TagConfig], *, trust: bool = False) -> tuple[tags.Made, Path]:
    """tagged.jsonl, tags.json and the account. Raises as `critique` does."""
    config, output = loaded.config, free(loaded)
    conversations = tags.read_conversations([found_file(said, loaded.places("data")) for said in config.data])
    with asking(loaded, output, trust=trust) as ask:
        _tell_remembered(ask)
        made = tags.make(config, conversations, ask)
        if made.account.shortened:
            logger.warning(
                "%d of %d conversations: the first %d characters of their instructions were shown (longest)",
                made.account.shortened, made.account.lines, config.longest,
            )  # fmt: skip
        files = {"tagged.jsonl": lines(made.rows), "tags.json": account(made.counts)}
        write_folder(output, {**files, ACCOUNT: account(tags.told(config, ask, made))})
    return made, output


def _tell_remembered(ask: Asker) -> None:
    if len(ask.memory):
        logger.warning(
            "%s: %d replies of a command that was stopped are there; what was asked then is not asked again",
            ask.memory.folder, len(ask.memory),
        )  # fmt: skip
