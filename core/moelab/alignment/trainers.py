"""The door to TRL: its trainers, built to compute the losses of our steps. What loops, logs and saves is ours.

They are handed tokens, so nothing of a dataset is prepared, and they send no telemetry.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from moelab.adapter.registration import transformers_tokenizer
from moelab.config.alignment import AlignmentConfig
from moelab.data.tokenizer import Tokenizer


class _Ours:
    """What is left out of a trainer of TRL."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        """Nobody is called."""


class Sft(_Ours, SFTTrainer):
    """Cross-entropy of the labels."""


class Dpo(_Ours, DPOTrainer):
    """Of pairs, the policy against its reference."""


class Reward(_Ours, RewardTrainer):
    """Bradley and Terry's, of a scalar head."""


@dataclass(frozen=True)
class Kind:
    """A stage's trainer, its arguments, and a row of tokens as it wants them."""

    trainer: Any
    arguments: Any
    row: dict[str, Any]


PAIR = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}
KINDS = {
    "sft": Kind(Sft, SFTConfig, {"input_ids": [0, 0], "labels": [0, 0]}),
    "dpo": Kind(Dpo, DPOConfig, {"prompt": "", **PAIR}),
    "online_dpo": Kind(Dpo, DPOConfig, {"prompt": "", **PAIR}),
    "reward": Kind(Reward, RewardConfig, {key: PAIR[key] for key in ("chosen_ids", "rejected_ids")}),
}


def build_trainer(
    stage: AlignmentConfig, policy: Any, reference: Any, tokenizer: Tokenizer, seed: int, *, on_cpu: bool
) -> Any:
    """TRL's trainer of the stage over adapters; `reference` None where the loss has none."""
    kind, paired = KINDS[stage.stage], "dpo" in stage.stage
    more: dict[str, Any] = {}
    if paired:
        more = {"beta": stage.beta, "loss_type": [stage.loss], "label_smoothing": stage.label_smoothing}
    with tempfile.TemporaryDirectory() as scratch:  # which it makes, and never writes to
        arguments = kind.arguments(
            output_dir=scratch, report_to=[], save_strategy="no", use_cpu=on_cpu, bf16=False, seed=seed,
            max_length=None, gradient_checkpointing=False, **more,
        )  # fmt: skip
        handed = {"args": arguments, "train_dataset": Dataset.from_list([kind.row])}
        handed["processing_class"] = transformers_tokenizer(tokenizer)
        return kind.trainer(policy, reference, **handed) if paired else kind.trainer(policy, **handed)
