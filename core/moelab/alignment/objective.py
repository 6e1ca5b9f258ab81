"""What a step of post-training learns: TRL's loss of a micro-batch, and how its routes stand to the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelab.adapter.base import MoelabPreTrainedModel
from moelab.alignment.batches import AnswerBatch
from moelab.alignment.examples import Account
from moelab.alignment.held_out import HeldOut
from moelab.alignment.measures import PREFIX, RouteMeasures
from moelab.alignment.replay import Replayed, recorded, weighers
from moelab.config.alignment import KEY, AlignmentConfig
from moelab.errors import ConfigError
from moelab.moe.routing import LayerRecord
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import TokenContext, Transformer
from moelab.training.objective import LM_LOSS, Found, Place
from moelab.training.precision import Precision

LOSSES = {"sft": LM_LOSS, "reward": "reward_loss", "dpo": "dpo_loss", "online_dpo": "dpo_loss"}
UNTOLD = ("num_tokens",)  # of TRL's own numbers: a run has its own


class Headed(nn.Module):
    """A decoder's parameters under their own names, and the scalar head's, `score.weight`, beside them."""

    def __init__(self, decoder: Transformer, score: nn.Module) -> None:
        super().__init__()
        for name, child in decoder.named_children():
            self.add_module(name, child)
        self.score = score


class Alignment:
    """The objective of a stage; its batches are `AnswerBatch`es."""

    def __init__(
        self,
        stage: AlignmentConfig,
        trainer: Any,
        policy: MoelabPreTrainedModel,
        reference: MoelabPreTrainedModel | None,
        fingerprint: str,
    ) -> None:
        """`trainer`: TRL's, over `policy` and, where its loss has one, `reference`."""
        self.stage, self.trainer, self.policy, self.reference = stage, trainer, policy, reference
        self.fingerprint = fingerprint
        self.account: Account | None = None
        self.held_out: HeldOut | None = None
        self.held_out_fingerprint = ""
        self.sampled: Callable[[], dict[str, float]] = dict  # numbers of the step's draws, where it draws
        self._records: list[LayerRecord] = []
        self._theirs: list[LayerRecord] = []
        self._measures = RouteMeasures()
        self._observed = False
        policy.on_records = self._take
        if reference is not None:
            reference.requires_grad_(False).eval()
            reference.on_records = self._hear

    def _take(self, records: Any) -> None:
        if torch.is_grad_enabled():  # and not what is sampled
            self._records[:] = records

    def _hear(self, records: Any) -> None:
        self._theirs[:] = records

    def begin(self, batch: AnswerBatch, observed: bool) -> int:
        """-> learned tokens of SFT, examples of the others."""
        self._observed, self._measures = observed, RouteMeasures()
        self.trainer._metrics["train"].clear()
        return batch.targets if self.stage.stage == "sft" else batch.examples

    def terms(self, model: Transformer, part: AnswerBatch, tokens: TokenContext, place: Place) -> Found:
        """TRL's loss, and the records of the policy's pass."""
        self._theirs.clear()
        self.policy.noise = tokens.generator
        inputs = self._inputs(part)
        self.policy.override = replayed = self._replayed(part, inputs)
        try:
            loss: Tensor = self.trainer.compute_loss(self.policy, dict(inputs), num_items_in_batch=place.targets)
        finally:
            self.policy.override = None
        if self.stage.stage != "sft":  # a mean over the micro-batch's examples
            loss = loss * (part.examples / place.targets)
        records = list(self._records)
        if self._observed:
            self._look(records if replayed is None else replayed.owned(records), part, inputs)
        return {LOSSES[self.stage.stage]: (loss, 1.0)}, records

    def _replayed(self, part: AnswerBatch, inputs: Mapping[str, Any]) -> Replayed | None:
        """The experts that stand in place of the policy's own; None: its own do."""
        if self.stage.replay == "none":
            return None
        weigh = weighers(self.policy.model)
        if self.stage.replay == "sampled":
            assert part.routed is not None
            return Replayed(weigh, {layer: e.flatten(0, 1) for layer, e in part.routes.items()}, part.routed.flatten())
        self._ask_reference(inputs)
        return Replayed(weigh, recorded(self._theirs))

    @torch.no_grad()
    def _ask_reference(self, inputs: Mapping[str, Any]) -> None:
        """A pass without the head, for its records alone."""
        assert self.reference is not None
        self._theirs.clear()
        self.reference.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def _inputs(self, part: AnswerBatch) -> dict[str, Any]:
        found: dict[str, Any] = {"input_ids": part.input_ids, "attention_mask": part.attention_mask.long()}
        if self.stage.stage == "sft":
            found["labels"] = part.labels
        elif self.stage.stage != "reward":
            found["completion_mask"] = part.learned.long()
        return found

    @torch.no_grad()
    def _look(self, records: list[LayerRecord], part: AnswerBatch, inputs: Mapping[str, Any]) -> None:
        if self.reference is not None and not self._theirs:  # the loss itself asks nothing of it
            self._ask_reference(inputs)
        if self._theirs:
            self._measures.add_reference(records, self._theirs)
        if part.answers == 2:
            self._measures.add_pairs(records, part.learned)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """TRL's numbers as `align/...`, and the routes'."""
        values = {name: found for name, found in self.trainer._metrics["train"].items() if name not in UNTOLD}
        theirs = {f"align/{name}": sum(found) / len(found) for name, found in values.items() if found}
        return theirs | self._measures.metrics() | self._drift() | self.sampled()

    def evaluate(self, precision: Precision) -> dict[str, float]:
        """TRL's numbers of what is held out, as `eval_align/...`."""
        if self.held_out is None:
            return {}
        try:
            return self.held_out.evaluate(self.trainer, self.policy, self._inputs, precision)
        finally:
            self._theirs.clear()

    def _drift(self) -> dict[str, float]:
        """How far each router's matrix has moved from the reference's, over that one's L2 norm."""
        found: dict[str, float] = {}
        if self.reference is None:
            return found
        others = {block.layer_id: block.router for block in moe_blocks(self.reference.model)}
        for block in moe_blocks(self.policy.model):
            mine = getattr(block.router, "weight", None)
            other = getattr(others.get(block.layer_id), "weight", None)
            if mine is not None and other is not None and mine.shape == other.shape:
                moved = (mine.float() - other.float()).norm() / other.float().norm().clamp_min(1e-20)
                found[PREFIX.format(block.layer_id) + "router_drift"] = float(moved)
        return found

    def state(self) -> dict[str, Any]:
        """What it learns from, and is judged by."""
        held_out = {"held_out": self.held_out_fingerprint} if self.held_out is not None else {}
        return {KEY: {"stage": self.stage.stage, "fingerprint": self.fingerprint, **held_out}}

    def check(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ConfigError where the data is not what the checkpoint was trained on."""
        then = state.get(KEY)
        if then != self.state()[KEY]:
            raise ConfigError(
                f"{KEY}.0.data: {checkpoint} was trained on other examples than {self.stage.data} makes now: the file, "
                "the tokenizer or the template changed; restore them, or start anew from its weights with "
                "train.init_from"
            )

    def facts(self) -> dict[str, Any]:
        """For summary.json."""
        stage, account = self.stage, self.account
        told: dict[str, Any] = {key: getattr(stage, key) for key in ("stage", "data", "router", "balance")}
        told["fingerprint"] = self.fingerprint
        if self.held_out is not None:
            told["held_out"] = {"lines": len(self.held_out.rows), "fingerprint": self.held_out_fingerprint}
        if account is not None:
            told |= {key: getattr(account, key) for key in ("lines", "cut", "dropped", "alike")}
        return {KEY: told}
