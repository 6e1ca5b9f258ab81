"""`moelab align`: stages of post-training, one run folder each, in the loop that trains on text.

A single stage's run is `run_dir`; of several, each lies in a folder of it, 01_sft, 02_dpo, and starts where the one
before it ended.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from moelab.alignment.examples import Examples, Shaping, fingerprint, read_examples
from moelab.alignment.held_out import also_learned, apart
from moelab.alignment.judge import resolve_rewards
from moelab.builder import build_model
from moelab.checkpoint import CONFIG
from moelab.config.alignment import KEY, NO_WEIGHTS, PAIRED, below_stages, stand_in
from moelab.config.files import Layer
from moelab.config.run import RunConfig
from moelab.config.stored import read_stored_tree
from moelab.data.chat import ChatTemplate
from moelab.data.reading import resolve_path
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import ConfigError, DataError, RunFailure, UserError
from moelab.integrity import Verify
from moelab.loading import chat_template_of
from moelab.moe.promises import batch_invariant
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import Transformer
from moelab.origin import origin_layer, read_origin
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.training.interruption import Interruption
from moelab.training.trainer import train

logger = logging.getLogger("moelab")
ROUTERS = "*.router.*"  # their parameters
MISSING_EXTRA = f"{KEY}: TRL is not installed; pip install 'moelab[align]'"


def check_installed() -> None:
    """Raise ConfigError where TRL, or what it needs, is not there."""
    if any(find_spec(name) is None for name in ("trl", "datasets", "transformers", "accelerate")):
        raise ConfigError(MISSING_EXTRA)


def lowest_layer(config: Mapping[str, Any], *, verify: Verify = True) -> Layer | None:
    """For `load_config(below=...)`: what `train.init_from` says; of a run its text too, on which loss may be lost.

    A stage that says how long it is needs no train.steps.
    """
    layer = origin_layer(config, verify=verify)
    if layer is None:
        if config.get(KEY) and "vocab_size" not in (config.get("model") or {}):  # else checked with all other keys
            raise ConfigError(NO_WEIGHTS)
        return None
    source = (config.get("train") or {}).get("init_from")
    origin = read_origin(source) if source else None
    if origin is not None and origin.is_run:
        stored = read_stored_tree(origin.folder / CONFIG)
        layer.tree["data"] = {**(stored.get("data") or {}), **layer.tree.get("data", {})}
        # The same windows of it, so that `moelab compare` pairs the run with the one that it starts from.
        layer.tree["train"] = _said(stored, "train", "sequence_length")
        layer.tree["evaluation"] = _said(stored, "evaluation", "sequences")
    return below_stages(layer, config)


def _said(stored: Mapping[str, Any], section: str, key: str) -> dict[str, Any]:
    values = stored.get(section) or {}
    return {key: values[key]} if key in values else {}


def align(
    config: RunConfig,
    *,
    observers: Callable[[RunConfig], Sequence[object]] = lambda config: (),
    force: bool = False,
    verify: bool = True,
    interruption: Interruption | None = None,
) -> list[Path]:
    """Run every stage of `config.alignment` to its end; -> their run folders.

    `observers`: of a stage, by its config. With `resume`, stages that are finished are passed over, and the one that
    was interrupted goes on exactly. Raises UserError before anything of a stage is written, RunFailure where one fails.
    """
    if not config.alignment:
        raise ConfigError(f"{KEY}: has no stage; give [{{stage: sft, data: chats.jsonl}}], or run `moelab train`")
    check_installed()
    from moelab.alignment.setup import Preparing  # noqa: PLC0415  (imports TRL)

    staged = stage_configs(config)
    prepared, done = [], []
    for number, own in enumerate(staged):  # the files of the last stage are read before the first one trains
        with _told_of(number):
            prepared.append(ready(own))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl")  # of each other
        for number, (own, examples) in enumerate(zip(staged, prepared, strict=True)):
            stage, count = own.alignment[0].stage, len(examples.rows)
            logger.info("%s: stage %s: %d examples, %d steps", own.run_dir, stage, count, own.train.steps)
            with _told_of(number):
                folder = train(
                    own, observers=observers(own), force=force, verify=verify, interruption=interruption,
                    preparing=Preparing(examples),
                )  # fmt: skip
            done.append(folder)
    return done


@contextmanager
def _told_of(number: int) -> Iterator[None]:
    """Within it a stage is the one of its config; what is wrong with it is told of its place in the list."""
    try:
        yield
    except (UserError, RunFailure) as error:
        error.args = tuple(
            text.replace(f"{KEY}.0", f"{KEY}.{number}") if isinstance(text, str) else text for text in error.args
        )
        raise


def stage_configs(config: RunConfig) -> list[RunConfig]:
    """A config for each stage: its own keys in the run's places, its folder, and where it starts."""
    found: list[RunConfig] = []
    for number, stage in enumerate(config.alignment, 1):
        own = copy.deepcopy(config)
        own.alignment = [copy.deepcopy(stage)]
        stand_in(own, own.alignment[0])
        if len(config.alignment) > 1:
            own.run_dir = str(user_path(config.run_dir, "run_dir") / f"{number:02d}_{stage.stage}")
            own.name = f"{config.name} {stage.stage}" if config.name else None
            if found:
                own.train.init_from = found[-1].run_dir
                own.train.init_overrides = []
        found.append(own)
    return found


def ready(config: RunConfig) -> Examples:
    """Read one stage's file, and write into its config what follows from it: steps, and what its router may learn."""
    (stage,) = config.alignment
    tokenizer = load_tokenizer(config.data.tokenizer)
    template = ChatTemplate.chatml(tokenizer) if stage.template == "chatml" else _own_template(config)
    longest = stage.sequence_length or config.train.sequence_length
    if stage.reward is not None:
        if stage.max_new_tokens >= longest:
            raise ConfigError(
                f"{KEY}.0.max_new_tokens: {stage.max_new_tokens} leave no room for a prompt in the {longest} tokens of "
                "sequence_length"
            )
        longest -= stage.max_new_tokens
    shaping = Shaping(stage.stage, template, longest, stage.too_long, stage.loss_on)
    examples = _with_held_out(_read(config, stage.data, "data", shaping), config, shaping)
    if stage.epochs is not None:
        config.train.steps = ceil(stage.epochs * len(examples.rows) / config.train.batch_size)
    registry = Registry(config.plugins, config.entry_points, config.places("plugins"))
    if stage.reward is not None:
        stage.reward = resolve_rewards(stage.reward, registry, f"{KEY}.0.reward")
    model = build_model(config.model, registry, device="meta", seed=None)
    if stage.stage in PAIRED:
        refuse_batch_dependent(model, stage.stage)
    _apply_policy(config, model)
    config.check()
    return examples


def _read(config: RunConfig, named: str, key: str, shaping: Shaping) -> Examples:
    """A file that `key` of the stage names; what was cut or left out is told."""
    try:
        path = resolve_path(named, config.places(KEY))
    except DataError as error:
        raise DataError(str(error).replace("data.source:", f"{KEY}.0.{key}:", 1)) from error
    examples = read_examples(path, shaping)
    for line in examples.account.told(shaping.longest):
        logger.warning("%s", line)
    return examples


def _with_held_out(examples: Examples, config: RunConfig, shaping: Shaping) -> Examples:
    """The same, with what the stage holds out of them or beside them."""
    (stage,) = config.alignment
    if stage.validation_share is not None:
        seed = config.data.split_seed
        examples, rows = apart(examples, shaping, stage.validation_share, seed)
        logger.info("%s: %d lines are held out of %d", stage.data, len(rows), len(rows) + len(examples.rows))
        return replace(examples, held_out=rows, held_out_fingerprint=fingerprint(rows, shaping))
    if stage.validation is None:
        return examples
    longest = stage.sequence_length or config.train.sequence_length
    shaping = replace(shaping, stage="dpo" if stage.stage == "online_dpo" else stage.stage, longest=longest)
    held_out = _read(config, stage.validation, "validation", shaping)
    learned = also_learned(held_out.rows, examples.rows)
    if learned:
        logger.warning(
            "%s: %d of %d lines are in %s too, and are learned: what is said of them is not of what is held out",
            stage.validation, learned, len(held_out.rows), stage.data,
        )  # fmt: skip
    return replace(examples, held_out=held_out.rows, held_out_fingerprint=held_out.fingerprint)


def _own_template(config: RunConfig) -> ChatTemplate:
    """That of the tokenizer's files, or of the weights' own folder where it is theirs."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.data.tokenizer == "bytes":
        return ChatTemplate.from_tokenizer(tokenizer)
    path = user_path(config.data.tokenizer, "data.tokenizer")
    return chat_template_of(path if path.is_dir() else path.parent)


def refuse_batch_dependent(model: Transformer, stage: str) -> None:
    """Raise ConfigError, naming the router, where a token's experts hang on what else is in the batch, or on noise.

    Then the same answer has another log-probability beside other answers, and a policy equal to its reference has a
    margin: preferences would be learned from that.
    """
    for block in moe_blocks(model):
        if not batch_invariant(block.router):
            raise ConfigError(
                f"{block.parts['router'].title}: which experts a token goes to in training hangs on the rest of the "
                "batch, or on noise (capacity, experts that choose, a plan over all tokens), so log-probabilities do "
                f"too, and {stage} compares these; take a router or options without, such as capacity_factor=null, "
                "with train.init_overrides=[model.moe.router]"
            )


def _apply_policy(config: RunConfig, model: Transformer) -> None:
    """The router's policy in the words of a run: frozen parameters, or a rate of their own."""
    (stage,) = config.alignment
    if stage.router == "train":
        return
    if not any(".router." in name for name, _ in model.named_parameters()):
        raise ConfigError(f"{KEY}.0.router: {stage.router}, and no router of this model has a parameter; write train")
    if stage.router == "freeze":
        if ROUTERS not in config.train.freeze:
            config.train.freeze = [*config.train.freeze, ROUTERS]
    else:
        config.optimizer.learning_rates = {**config.optimizer.learning_rates, ROUTERS: stage.router_lr_scale}
