"""A model that learned from preferences: a run of stage `reward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import MISSING

from moelab import Attempt, Component, Reward, RewardContext, component, hookimpl
from moelab.errors import CheckpointError, ConfigError
from moelab.hub import user_folder


@dataclass
class RewardModelOptions:
    run: str = MISSING  # the folder of a run of `moelab align`, stage reward


def reward_model(options: RewardModelOptions, context: RewardContext) -> Reward:
    """The scalar that a run of stage `reward` gives to the last token of prompt and answer.

    Source: Bradley and Terry's model of preferences, as in Qwen2's online preferences (2407.10671 section 4.3, as the
    references tell it).
    Use: where what is better can be shown and not be said.
    Cost: a forward pass of that model for every answer; what it likes beyond what it was shown is exploited.
    """
    if context.registry is None or context.tokenizer is None:
        raise ConfigError("is for `moelab align`, where the run's tokens are there to be read")
    import torch

    from moelab.adapter.registration import as_classifier
    from moelab.alignment.batches import padded
    from moelab.alignment.examples import Answer
    from moelab.checkpoint import TRAINING, is_moelab, resolve_checkpoint, stored_tensors
    from moelab.loading import load
    from moelab.origin import read_origin, same_tokenizer
    from moelab.training.checkpoint import HEAD

    score = f"{HEAD}/score.weight"
    try:
        folder = resolve_checkpoint(user_folder(options.run, f"{context.where}.run"))
    except CheckpointError as error:
        raise CheckpointError(f"{context.where}.run: {error}") from error
    tensors = stored_tensors(folder, TRAINING) if is_moelab(folder) else {}
    if score not in tensors:
        raise CheckpointError(
            f"{context.where}.run: {folder} has no head for rewards; name a run of `moelab align`, stage reward"
        )
    origin = read_origin(folder)
    if origin.own_tokenizer() is not None and not same_tokenizer(context.tokenizer, origin.folder):
        raise ConfigError(
            f"run: {folder} has another tokenizer than the policy, whose tokens it would read as others; name a reward "
            "model of the same one"
        )
    model = as_classifier(
        load(options.run, device=context.device, registry=context.registry), pad_token_id=context.pad_id
    )
    with torch.no_grad():
        model.score.weight.copy_(tensors[score].read())
    model.requires_grad_(False).eval()

    @torch.no_grad()
    def judge(attempts: Sequence[Attempt]) -> list[float]:
        rows = [Answer(attempt.ids, np.zeros(len(attempt.ids), bool)) for attempt in attempts]
        batch = padded(rows, 1, context.pad_id).to(context.device)
        found: list[float] = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, 0].tolist()
        return found

    return judge


@hookimpl
def moelab_rewards() -> list[Component[RewardContext, Reward]]:
    return [component("reward_model", RewardModelOptions, reward_model)]
