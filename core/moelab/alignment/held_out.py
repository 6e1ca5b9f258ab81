"""What a stage learns from nowhere: examples held out, and what TRL says of them at each evaluation.

Means over examples (sft: over learned tokens), whatever the batches: of TRL's numbers, those that are such means.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moelab.alignment.batches import AnswerBatch, padded
from moelab.alignment.examples import Example, Examples, Shaping, fingerprint
from moelab.config.alignment import KEY
from moelab.errors import DataError
from moelab.seeds import derive_seed
from moelab.training.precision import Precision

if TYPE_CHECKING:
    from moelab.adapter.base import MoelabPreTrainedModel

TAG = "eval_align"
_OF_PAIRS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins"))
MEANS = {  # of a stage, by TRL's names
    "sft": ("mean_token_accuracy", "entropy"),
    "reward": ("accuracy", "margin", "mean_reward"),
    "dpo": (*_OF_PAIRS, "logps/chosen", "logps/rejected"),
    "online_dpo": (*_OF_PAIRS, "logps/chosen", "logps/rejected"),
}


def apart(examples: Examples, shaping: Shaping, share: float, seed: int) -> tuple[Examples, list[Example]]:
    """(what is learned, what is held out): about `share` of the prompts, drawn by each one's own text.

    Lines of one prompt stay together, so that none is foretold by its neighbour; another order of lines changes
    nothing. Raises DataError where nothing is left on one side.
    """
    drawn = {True: [], False: []}  # type: dict[bool, list[Example]]
    for row in examples.rows:
        text = json.dumps(row.prompt, sort_keys=True)
        drawn[derive_seed(seed, "held-out examples", text) < share * 2.0**63].append(row)
    if not drawn[True] or not drawn[False]:
        lost = "for learning" if drawn[True] else "to be held out"
        raise DataError(
            f"{examples.account.path}: {KEY}.0.validation_share {share} of its {len(examples.rows)} lines leaves none "
            f"{lost}; give more lines, another share, or a file of its own as validation"
        )
    learned = replace(examples, rows=drawn[False], fingerprint=fingerprint(drawn[False], shaping))
    return learned, drawn[True]


def also_learned(held_out: Sequence[Example], learned: Sequence[Example]) -> int:
    """How many of what is held out are learned too, answer for answer."""
    known = {_tokens(row) for row in learned}
    return sum(_tokens(row) in known for row in held_out)


def _tokens(row: Example) -> tuple[bytes, ...]:
    return tuple(answer.ids.tobytes() for answer in row.answers)


@dataclass(frozen=True)
class HeldOut:
    """Examples, in batches of their own order."""

    stage: str
    rows: Sequence[Example]
    batch_size: int
    pad_id: int

    def batches(self) -> list[AnswerBatch]:
        """At most `batch_size` examples each, chosen before rejected."""
        found = []
        for begin in range(0, len(self.rows), self.batch_size):
            some = self.rows[begin : begin + self.batch_size]
            sides = range(len(some[0].answers))
            found.append(padded([row.answers[side] for side in sides for row in some], len(sides), self.pad_id))
        return found

    @torch.no_grad()
    def evaluate(
        self, trainer: Any, policy: MoelabPreTrainedModel, inputs: Any, precision: Precision
    ) -> dict[str, float]:
        """`eval_align/loss` and TRL's means, by its names. `inputs`: of a batch, as the trainer wants them."""
        sums: dict[str, float] = defaultdict(float)
        count = 0
        modes = [(module, module.training) for module in policy.modules()]
        policy.eval()
        try:
            for batch in self.batches():
                part = batch.to(precision.device)
                weight = batch.targets if self.stage == "sft" else batch.examples
                trainer._metrics["eval"].clear()
                with precision.autocast():
                    loss = trainer.compute_loss(policy, dict(inputs(part)), num_items_in_batch=batch.targets)
                for name, value in self._means(loss, trainer._metrics["eval"]).items():
                    sums[name] += weight * value
                count += weight
        finally:
            trainer._metrics["eval"].clear()
            for module, training in modes:
                module.training = training
        return {f"{TAG}/{name}": total / count for name, total in sums.items()}

    def _means(self, loss: torch.Tensor, told: Mapping[str, list[float]]) -> dict[str, float]:
        found = {name: told[name][-1] for name in MEANS[self.stage] if told.get(name)}
        return {"loss": float(loss), **found}
