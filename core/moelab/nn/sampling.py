"""How the next token is chosen from scores: greedily, or drawn, with random numbers that hang on nothing but the text.

The rules and their order are those of transformers 5.23 (`generation/utils.py: _get_logits_processor`, formulas in
`generation/logits_process.py`): repetition penalty, then, where tokens are drawn, temperature, top-k, top-p, min-p.
B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.seeds import generator

DRAWN_AT_ONCE = 64  # random numbers of a row; it decides which they are


@dataclass(frozen=True)
class Sampling:
    """How a text goes on, and where it ends. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave all tokens."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 1.0  # the likeliest tokens that together have this probability (Holtzman et al. 2020)
    seed: int = 0
    end_token_ids: tuple[int, ...] = ()  # any of them ends the text
    top_k: int = 0  # so many of the likeliest tokens
    min_p: float = 0.0  # tokens at least this times as likely as the likeliest (Nguyen et al. 2407.01082)
    repetition_penalty: float = 1.0  # on scores of tokens that are in prompt or text (Keskar et al. 1909.05858)
    stop: tuple[str, ...] = ()  # any of these texts ends the text, which is cut before it
    autotune: bool | None = None  # read weights the way measured fastest here; None: where moelab has no constants

    def __post_init__(self) -> None:
        for name, legal, right in (
            ("max_new_tokens", 0 <= self.max_new_tokens < 2**31, "0 or more, and less than 2^31"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),  # NaN is neither
            ("top_p", 0 < self.top_p <= 1, "in 0 .. 1, 0 excluded"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p <= 1, "in 0 .. 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0; 1 is none"),
        ):
            if not legal:
                raise ConfigError(f"sampling: {name} must be {right}, not {getattr(self, name)}")
        if not all(self.stop):
            raise ConfigError("sampling: a stop text must have at least one character")


class Draws:
    """A row's random numbers: by seed, prompt and sample alone, number n for its n-th new token."""

    def __init__(self, seed: int, prompt: int, sample: int) -> None:
        self._key = (seed, "generate", prompt, sample)
        self._block, self._drawn = -1, torch.empty(0)

    def number(self, position: int) -> float:
        """In 0 .. 1, 1 excluded."""
        block, at = divmod(position, DRAWN_AT_ONCE)
        if block != self._block:
            stream = generator(*self._key, block)
            self._block, self._drawn = block, torch.rand(DRAWN_AT_ONCE, generator=stream, dtype=torch.float64)
        return float(self._drawn[at])


def choose(scores: Tensor, sampling: Sampling, seen: Tensor | None, draws: Sequence[Draws], position: int) -> Tensor:
    """scores [B, V] -> the `position`-th new token of each row, [B] int64; -1 where no score is finite.

    seen [B, V] bool: the tokens of prompt and text, where there is a penalty on them. Waits for no device.
    """
    scores = scores.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    values, token = largest(scores)
    if sampling.temperature > 0:
        numbers = torch.tensor([draw.number(position) for draw in draws], dtype=torch.float64).to(scores.device)
        token = _drawn(limited(scores - values.unsqueeze(-1), sampling), numbers)
    return torch.where(values.abs() < math.inf, token, -1)


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores [B, V] -> the largest of each row and the first place where it stands, [B] both; NaN is the largest.

    By numpy on a CPU, which finds a place in 0.3 to 0.6 of the time of torch's fastest way, the maxima of tiles first
    (1 to 16 rows of 4,096 to 151,936, AMD Zen 5, measured once).
    """
    if scores.device.type != "cpu":
        best = scores.max(-1)
        return best.values, best.indices
    token = torch.from_numpy(scores.detach().numpy().argmax(-1))
    return scores.gather(1, token.unsqueeze(1)).squeeze(1), token


def limited(scores: Tensor, sampling: Sampling) -> Tensor:
    """scores [B, V] under temperature, -inf for tokens that top-k, top-p and min-p leave out. One is left at least.

    The best score must be 0 for temperatures near 0, which would make others infinite.
    """
    scores = scores / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, index, out), -math.inf)
    if sampling.min_p > 0:
        probability = scores.softmax(-1)
        scores = scores.masked_fill(probability < sampling.min_p * probability.amax(-1, keepdim=True), -math.inf)
    return scores


def _drawn(scores: Tensor, numbers: Tensor) -> Tensor:
    """scores [B, V], numbers [B] in 0 .. 1 -> [B]: the token in which each number falls, laid out by probability."""
    edges = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(edges, (numbers * edges[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
