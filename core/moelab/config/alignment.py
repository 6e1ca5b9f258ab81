"""Post-training: what a stage of `moelab align` learns from, and how its router is treated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from omegaconf import MISSING

from moelab.config.files import Layer
from moelab.config.model import Part
from moelab.errors import ConfigError

KEY = "alignment"
NO_WEIGHTS = f"train.init_from: has no value, and {KEY} begins with weights that were trained on text"
STAGES = ("sft", "reward", "dpo", "online_dpo")
PAIRED = ("dpo", "online_dpo")  # whose loss compares log-probabilities with a reference's
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_on": ("assistant", "all"),
    "too_long": ("cut", "drop", "refuse"),
    "template": ("own", "chatml"),
    "replay": ("none", "reference", "sampled"),
    "router": ("train", "freeze", "lr_scale"),
}
LOSSES = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "apo_zero", "apo_down")  # TRL's, of pairs alone


@dataclass
class AlignmentConfig:
    """A stage; of several each starts where the one before it ended. null: the run's own."""

    stage: str = MISSING  # sft, reward, dpo or online_dpo
    # JSON lines: messages, or prompt and completion, for sft; prompt, chosen and rejected for reward and dpo; prompt
    # for online_dpo. Prompts and answers are texts or lists of {role, content}.
    data: str = MISSING
    # What is held out, and judged by TRL's own measures at each evaluation: JSON lines as data holds them, preferences
    # for online_dpo; or about this share of data's own prompts.
    validation: str | None = None
    validation_share: float | None = None
    epochs: float | None = None  # times that the data is read; it decides train.steps in place of what that says
    steps: int | None = None  # of train
    lr: float | None = None  # of optimizer
    batch_size: int | None = None  # of train: conversations, pairs or prompts in an optimizer step
    micro_batch_size: int | None = None  # of train
    # The most tokens of a conversation; null: train.sequence_length, that of the held-out text on which it is judged.
    sequence_length: int | None = None
    template: str = "own"  # how conversations are written: own, as the tokenizer's files say, or chatml
    loss_on: str = "assistant"  # of sft: assistant, its turns and what ends them, or all tokens
    too_long: str = "cut"  # what is longer than sequence_length: cut at its end, drop, or refuse
    router: str = "train"  # train; freeze, parameters and after_step alike; lr_scale, at a rate of its own
    # Of lr_scale: the learning rate of the router's parameters over that of the others; `bias_update_rate` is apart.
    router_lr_scale: float = 0.1
    balance: bool = True  # the model's balance losses count; TRL's own pooled one never does
    beta: float = 0.1  # of dpo and online_dpo: how close the policy is held to its reference
    loss: str = "sigmoid"  # of dpo and online_dpo, by TRL's names: sigmoid, hinge, ipo, sigmoid_norm, robust, ...
    label_smoothing: float = 0.0  # of the loss robust: the share of pairs that are labelled the wrong way round
    # The weights whose log-probabilities and routes the policy is compared with; null: those that it starts from, and
    # of sft and reward none, since only the look at routes needs them there.
    reference: str | None = None
    # Experts that were recorded stand in place of those that the policy's routers choose while it is trained, and the
    # routers learn by the weights they give them: none; reference, those of its pass; sampled, of online_dpo, those
    # with which the answers were written.
    replay: str = "none"
    # Of online_dpo, what answers are worth: {name: reward_model, run: RUN}, or a list of rewards whose sum counts, each
    # times its `weight`. They read the other keys of a prompt's line, such as its answer.
    reward: Part | list[Part] | None = None
    samples: int = 4  # of online_dpo: answers to each prompt, of which the best and the worst are a pair
    max_new_tokens: int = 64  # of an answer that is sampled
    temperature: float = 1.0  # of the same
    top_p: float = 1.0  # of the same


class Aligned(Protocol):
    """A run's config, as far as its alignment goes."""

    alignment: list[AlignmentConfig]
    stages: list[Any]
    model: Any
    train: Any
    optimizer: Any
    parallel: Any


PLACES = {  # key of a stage -> the section that it stands in for
    "steps": "train", "batch_size": "train", "micro_batch_size": "train", "lr": "optimizer",
}  # fmt: skip
AlignedT = TypeVar("AlignedT", bound=Aligned)


def stand_in(config: Aligned, stage: AlignmentConfig) -> None:
    """Give the run what the stage has otherwise, in place; the stage leaves it to the run from then on."""
    for key, section in PLACES.items():
        if getattr(stage, key) is not None:
            setattr(getattr(config, section), key, getattr(stage, key))
            setattr(stage, key, None)


def below_stages(layer: Layer, config: Mapping[str, Any]) -> Layer:
    """`layer`, which lies below a config, and train.steps where every stage of that says how long it is."""
    stages = config.get(KEY) or []
    if isinstance(stages, Mapping):
        raise ConfigError(f"{KEY}: is a list of stages, [{{stage: ..., data: ...}}]; put brackets around the one")
    if stages and all(isinstance(stage, Mapping) and (stage.get("epochs") or stage.get("steps")) for stage in stages):
        train = {**layer.tree.get("train", {}), "steps": 1}  # each stage says its own
        return replace(layer, tree=layer.tree | {"train": train})
    return layer


def check_alignment(config: Aligned) -> None:
    """Raise ConfigError for stages that are none, naming the key."""
    if not config.alignment:
        return
    for number, stage in enumerate(config.alignment):
        _check_stage(f"{KEY}.{number}", stage)
        length, most = stage.sequence_length, config.model.max_position_embeddings
        if length is not None and not 2 <= length <= most:
            raise ConfigError(
                f"{KEY}.{number}.sequence_length: must be in 2 .. model.max_position_embeddings {most}, not {length}"
            )
    if config.stages:
        raise ConfigError(f"stages: are of text, and a run of {KEY} has none; leave one of them out")
    if config.train.init_from is None:
        raise ConfigError(NO_WEIGHTS)
    if config.parallel.world > 1:
        raise ConfigError(f"{KEY}: is for one process, and parallel asks for {config.parallel.world}")
    if config.train.adapters and any(stage.stage == "reward" for stage in config.alignment):
        raise ConfigError(
            f"train.adapters: {KEY} trains the head of a reward beside the model's own parameters; leave "
            "them out of that stage's run"
        )
    if config.train.memory_budget is not None:
        raise ConfigError(
            f"train.memory_budget: plans a step on text, and not the answers, whole logits and reference of {KEY}; "
            "leave it out, and say train.micro_batch_size and train.activation_checkpointing"
        )
    for key in ("keep_best", "patience"):
        if getattr(config.train, key):
            raise ConfigError(
                f"train.{key}: looks at the loss on held-out text, which {KEY} does not lower; leave it out"
            )


def _check_stage(where: str, stage: AlignmentConfig) -> None:
    if stage.stage not in STAGES:
        raise ConfigError(f"{where}.stage: must be one of {', '.join(STAGES)}, not '{stage.stage}'")
    if not stage.data:
        raise ConfigError(f"{where}.data: names no file; give JSON lines")
    for key, allowed in {**CHOICES, "loss": LOSSES}.items():
        if getattr(stage, key) not in allowed:
            raise ConfigError(f"{where}.{key}: must be one of {', '.join(allowed)}, not '{getattr(stage, key)}'")
    for key in ("epochs", "steps", "lr", "beta", "router_lr_scale", "temperature"):
        value = getattr(stage, key)
        if value is not None and value <= 0:
            raise ConfigError(f"{where}.{key}: must be positive, not {value}")
    if stage.epochs is not None and stage.steps is not None:
        raise ConfigError(f"{where}.steps: epochs decide them already; give one of the two")
    share = stage.validation_share
    if share is not None:
        if not 0 < share < 1:
            raise ConfigError(f"{where}.validation_share: must be in 0 .. 1, both excluded, not {share}")
        if stage.validation is not None:
            raise ConfigError(f"{where}.validation_share: validation names a file already; give one of the two")
        if stage.stage == "online_dpo":
            raise ConfigError(
                f"{where}.validation_share: the prompts of online_dpo hold no preferences; name a file of some as "
                "validation"
            )
    _check_sampling(where, stage)


def _check_sampling(where: str, stage: AlignmentConfig) -> None:
    for key, least in (("samples", 2), ("max_new_tokens", 1)):
        if getattr(stage, key) < least:
            raise ConfigError(f"{where}.{key}: must be at least {least}, not {getattr(stage, key)}")
    if stage.replay == "sampled" and stage.stage != "online_dpo":
        raise ConfigError(f"{where}.replay: sampled is of online_dpo, whose answers the policy writes itself")
    if stage.replay == "reference" and stage.stage not in PAIRED and stage.reference is None:
        raise ConfigError(f"{where}.replay: reference, and {stage.stage} has none; name one as reference")
    if not 0 < stage.top_p <= 1:
        raise ConfigError(f"{where}.top_p: must be in 0 .. 1, 0 excluded, not {stage.top_p}")
    if not 0 <= stage.label_smoothing < 0.5:
        raise ConfigError(f"{where}.label_smoothing: must be in 0 .. 0.5, 0.5 excluded, not {stage.label_smoothing}")
    if (stage.reward is None) == (stage.stage == "online_dpo"):
        rule = "has no value, and nothing says what an answer is worth" if stage.reward is None else "is of online_dpo"
        raise ConfigError(f"{where}.reward: {rule}")
