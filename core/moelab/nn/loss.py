"""Cross-entropy of each token, without holding all logits at once.

T tokens, D hidden size, V vocabulary. Chunks of tokens bound the size of one matmul's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 1 << 24


def token_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """hidden [B, S, D], head [V, D], targets [B, S] int64 -> nats [B, S] fp32; 0 where the target is -100."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = max(1, CHUNK_ELEMENTS // head.shape[0])
    losses = [
        torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(part, head).float(), labels, ignore_index=IGNORE_INDEX, reduction="none"
        )
        for part, labels in zip(flat.split(chunk), targets.reshape(-1).split(chunk), strict=True)
    ]
    return torch.cat(losses).view(targets.shape)
