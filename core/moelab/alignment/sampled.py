"""Pairs that the policy itself has written: n answers to each prompt, of which a reward takes the best and the worst.

Qwen2's online preferences (2407.10671 section 4.3, as the references tell it): sampled from the current policy, judged
by a reward model; here by any reward. Prompts whose answers are all worth the same teach nothing: they are left out,
and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from moelab.adapter.base import MoelabPreTrainedModel
from moelab.alignment.batches import AnswerBatch, ExampleBatches, padded
from moelab.alignment.examples import Answer, Example
from moelab.alignment.judge import Judge
from moelab.config.alignment import AlignmentConfig
from moelab.data.rewards import Attempt
from moelab.errors import RunFailure
from moelab.nn.generate import generate_batch
from moelab.nn.sampling import Sampling
from moelab.seeds import derive_seed

TRIES = 8  # draws for a batch before nothing is found to prefer


@dataclass
class Counts:
    """What a step's draws came to."""

    prompts: int = 0
    pairs: int = 0
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)  # of several rewards, what each said
    ended: int = 0  # answers that the policy ended itself
    distinct: int = 0  # of the answers to each prompt
    longer: float = 0.0  # tokens of chosen less rejected, summed over pairs

    def metrics(self) -> dict[str, float]:
        """By tag."""
        answers = max(len(self.rewards), 1)
        mean = sum(self.rewards) / answers
        parts = {f"align/sampled/{name}_mean": sum(said) / len(said) for name, said in self.parts.items() if said}
        return parts | {
            "align/sampled/reward_mean": mean,
            "align/sampled/reward_std": math.sqrt(sum((value - mean) ** 2 for value in self.rewards) / answers),
            "align/sampled/tied_share": 1 - self.pairs / max(self.prompts, 1),
            "align/sampled/ended_share": self.ended / answers,
            "align/sampled/distinct_share": self.distinct / answers,
            "align/sampled/length_difference": self.longer / max(self.pairs, 1),
        }


@dataclass
class SampledBatches:
    """`batch(step)` draws anew from the policy as it is: the same weights give the same pairs, so resuming is exact."""

    prompts: ExampleBatches
    policy: MoelabPreTrainedModel
    judge: Judge
    stage: AlignmentConfig
    decode: Callable[[np.ndarray], str]  # token ids -> text
    ends: tuple[int, ...]  # token ids that end an answer
    seed: int
    counts: Counts = field(default_factory=Counts)  # of the last batch
    _routes: list[dict[int, Tensor] | None] = field(default_factory=list)  # of each answer; None: not replayed

    def batch(self, step: int) -> AnswerBatch:
        """Pairs of at most `batch_size` prompts. Raises RunFailure for rewards that are NaN, or always the same."""
        self.counts, pairs = Counts(), []
        for attempt in range(TRIES):
            drawn = self._drawn(step, attempt)
            for number, (example, answers) in enumerate(zip(self._chosen(step, attempt), drawn, strict=True)):
                pairs += self._pair(example, answers, number * self.stage.samples)
            if pairs:
                rows = [pair[side] for side in (0, 1) for pair in pairs]
                return padded(rows, 2, self.prompts.pad_id)
        raise RunFailure(
            f"alignment.0.reward: at step {step} all answers to each of {self.counts.prompts} prompts are worth the "
            f"same, in {TRIES} draws; raise temperature or samples, or give a reward that tells them apart"
        )

    def metrics(self) -> dict[str, float]:
        """Of the last batch, by tag."""
        return self.counts.metrics()

    def _chosen(self, step: int, attempt: int) -> list[Example]:
        """Of a batch that came to nothing, those that stand in the next places of the order."""
        return self.prompts.chosen(step + attempt)

    def _drawn(self, step: int, attempt: int) -> list[list[np.ndarray]]:
        """Answers [samples] of each prompt: the new token ids, with the one that ended them."""
        stage = self.stage
        prompts = [example.answers[0].ids.tolist() for example in self._chosen(step, attempt)]
        sampling = Sampling(
            stage.max_new_tokens, stage.temperature, stage.top_p,
            seed=derive_seed(self.seed, "answers", step, attempt), end_token_ids=self.ends,
            autotune=False,  # a run that goes on elsewhere draws the same
        )  # fmt: skip
        replays = stage.replay == "sampled"
        found = generate_batch(self.policy.model, prompts, sampling, samples=stage.samples, routes=replays)
        self._routes = [one.routes for one in found]
        new = [np.array(one.ids, np.int32) for one in found]
        return [new[at : at + stage.samples] for at in range(0, len(new), stage.samples)]

    def _pair(self, example: Example, answers: Sequence[np.ndarray], row: int) -> list[tuple[Answer, Answer]]:
        """(best, worst) of a prompt's answers, drawn from `row` on, or nothing where all are worth the same."""
        prompt = example.answers[0].ids
        whole = [np.concatenate([prompt, answer]).astype(np.int32) for answer in answers]
        rewards, parts = self.judge([self._attempt(example, answer) for answer in answers])
        self.counts.prompts += 1
        self.counts.rewards += rewards
        if len(parts) > 1:
            for name, said in parts.items():
                self.counts.parts.setdefault(name, []).extend(said)
        self.counts.ended += sum(int(answer[-1]) in self.ends for answer in answers if len(answer))
        self.counts.distinct += len({answer.tobytes() for answer in answers})
        best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
        if rewards[best] == rewards[worst] or np.array_equal(whole[best], whole[worst]):
            return []
        self.counts.pairs += 1
        self.counts.longer += len(answers[best]) - len(answers[worst])
        own = [self._answer(whole[which], len(prompt), row + which) for which in (best, worst)]
        return [(own[0], own[1])]

    def _attempt(self, example: Example, answer: np.ndarray) -> Attempt:
        ended = len(answer) > 0 and int(answer[-1]) in self.ends
        text = self.decode(answer[:-1] if ended else answer)
        ids = np.concatenate([example.answers[0].ids, answer]).astype(np.int32)
        return Attempt(example.prompt, text, example.fields, example.where, ids, len(answer), ended)

    def _answer(self, ids: np.ndarray, prompt: int, row: int) -> Answer:
        routes = self._routes[row]
        experts = None if routes is None else {layer: expert.numpy() for layer, expert in routes.items()}
        return Answer(ids, np.arange(len(ids)) >= prompt, experts)

    def documents_read(self, steps: int) -> np.ndarray:
        """[n] bool: none of the training text."""
        return self.prompts.documents_read(steps)
