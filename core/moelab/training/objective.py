"""What a step learns of a micro-batch: by default to foretell its text; post-training puts another in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moelab.moe.routing import LayerRecord
from moelab.nn.transformer import TokenContext, Transformer
from moelab.training.precision import Precision

LM_LOSS = "lm_loss"
Found = tuple[dict[str, tuple[Tensor, float]], list[LayerRecord]]  # {term: (unweighted scalar, coefficient)}, records


@dataclass(frozen=True)
class Place:
    """Where a micro-batch stands in its batch."""

    step: int
    index: int
    share: float  # of the batch's unmasked tokens
    targets: int  # of the whole batch, as its objective counts them


class Objective(Protocol):
    """`batch` and `part` are what the run's batches give, whole and in micro-batches."""

    def begin(self, batch: Any, observed: bool) -> int:
        """Before each step -> what the terms are means over, of the whole batch; `observed`: its numbers are logged."""

    def terms(self, model: Transformer, part: Any, tokens: TokenContext, place: Place) -> Found:
        """The micro-batch's contribution to the mean over the whole batch, and the records of its forward pass."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the step that was just observed, by tag. Waits for the device."""

    def evaluate(self, precision: Precision) -> Mapping[str, float]:
        """Numbers of what is held out beside the run's text, by tag."""

    def state(self) -> Mapping[str, Any]:
        """What state.json keeps for `check`."""

    def check(self, state: Mapping[str, Any], checkpoint: Any) -> None:
        """Raise UserError where a run that goes on from this state would learn from something else."""

    def facts(self) -> Mapping[str, Any]:
        """What summary.json tells of it."""


class Text:
    """The next token of text."""

    def begin(self, batch: Any, observed: bool) -> int:
        """Tokens to foretell."""
        return int((batch.targets >= 0).sum())

    def terms(self, model: Transformer, part: Any, tokens: TokenContext, place: Place) -> Found:
        """The cross-entropy, nats a target of the whole batch."""
        output = model(part.input_ids, part.attention_mask, targets=part.targets, tokens=tokens)
        assert output.token_loss is not None
        return {LM_LOSS: (output.token_loss.sum() / place.targets, 1.0)}, output.records

    def metrics(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def evaluate(self, precision: Precision) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def check(self, state: Mapping[str, Any], checkpoint: Any) -> None:
        """The corpus is compared elsewhere."""

    def facts(self) -> Mapping[str, Any]:
        """None."""
        return {}


TEXT = Text()
