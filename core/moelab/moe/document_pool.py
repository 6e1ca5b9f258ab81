"""Routing in two levels: a document chooses a pool of experts, and its tokens choose within it.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.dispatch import sum_rows
from moelab.moe.gate import noise_generator
from moelab.moe.routing import TokenInfo


@dataclass
class DocumentPool:
    """How many experts a document may use. EMO (2605.06663, not opened), as OLMo-core has it (nn/moe/v2/emo_router.py).

    OLMo-core evaluates with a pool too, (smallest + largest) // 2 unless told; here without one unless `evaluation` is
    set, since a token alone, which is what generation sees, can't know its document's.
    """

    smallest: int  # in training each document draws how many, uniformly from here
    largest: int  # to here
    evaluation: int | None = None  # of each document in evaluation, which then sees the future; null: all experts

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest:
            raise ValueError(f"document_pool: 0 < smallest <= largest, not {self.smallest} and {self.largest}")

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ConfigError for a pool that holds fewer than K experts, or more than there are."""
        for key in ("smallest", "largest", "evaluation"):
            size = getattr(self, key)
            if size is not None and not top_k <= size <= num_experts:
                raise ConfigError(
                    f"document_pool.{key}: {size} experts; it must be in num_experts_per_tok {top_k} .. num_experts "
                    f"{num_experts}"
                )

    def limit(self, scores: Tensor, chosen_by: Tensor, info: TokenInfo, layer_id: int) -> Tensor:
        """chosen_by [T, E] with -inf outside the pool of each token's document: the experts of largest summed scores.

        scores [T, E]; padding adds nothing to a sum. Equal sums at the edge are all in.
        """
        most = self.largest if info.training else self.evaluation
        if most is None:
            return chosen_by
        tokens = torch.arange(len(scores), device=scores.device)
        document = document_numbers(info)
        starts = torch.searchsorted(document, tokens)  # of as many documents as tokens: the last ones are empty
        real = scores.detach() * info.valid().unsqueeze(-1)
        mass = sum_rows(real, tokens, starts)
        best = mass.topk(most, dim=-1).values[document]
        edge = best.gather(1, self._sizes(document, info, layer_id, most).unsqueeze(-1) - 1)
        return chosen_by.masked_fill(mass[document] < edge, float("-inf"))

    def _sizes(self, document: Tensor, info: TokenInfo, layer_id: int, most: int) -> Tensor:
        """[T] int64, the same for the tokens of a document."""
        if not info.training or self.smallest == self.largest:
            return torch.full_like(document, most)
        drawn = torch.empty(document.shape, device=document.device)
        drawn.uniform_(generator=noise_generator(info, layer_id, document.device))
        sizes = self.smallest + (drawn * (self.largest - self.smallest + 1)).long()
        return sizes.clamp_max(self.largest)[document]


def document_numbers(info: TokenInfo) -> Tensor:
    """[T] int64, counting up from 0 where a document or a sequence begins."""
    begins = torch.zeros_like(info.document_id)
    begins[1:] = (info.document_id[1:] != info.document_id[:-1]) | (info.sequence_id[1:] != info.sequence_id[:-1])
    return begins.cumsum(0)
