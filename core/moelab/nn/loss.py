"""Cross-entropy of each token in chunks: the logits exist once, in the matmul's dtype, or not at all.

T tokens, D hidden size, V vocabulary. Up to KEEP_ELEMENTS logits are kept for the backward pass; more are
computed a second time there, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
KEEP_ELEMENTS = 1 << 27  # of logits: 512 MB in fp32
CHUNK_ROWS = 256  # at least: the head's gradient is read and written once a chunk
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}  # the CPU's chunk stays in its cache


def token_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """hidden [B, S, D], head [V, D], targets [B, S] int64 -> nats [B, S] fp32; 0 where the target is -100."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    flat = hidden.reshape(-1, hidden.shape[-1])
    nats: Tensor = _TokenCrossEntropy.apply(flat.to(dtype), head.to(dtype), targets.reshape(-1))
    return nats.view(targets.shape)


class _TokenCrossEntropy(torch.autograd.Function):
    """nats[t] = logsumexp(z[t]) - z[t, target], z = hidden head^T; d nats / d z = softmax(z) - onehot(target)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        keep = any(ctx.needs_input_grad) and hidden.shape[0] * head.shape[0] <= KEEP_ELEMENTS
        kept = hidden.new_empty(hidden.shape[0], head.shape[0]) if keep else None
        labels = targets.clamp(min=0).unsqueeze(-1)  # [T, 1]
        lse = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype))
        picked = torch.empty_like(lse)
        for rows in _chunks(hidden, head):
            logits = torch.mm(hidden[rows], head.t(), out=None if kept is None else kept[rows])
            wide = logits.to(lse.dtype)
            torch.logsumexp(wide, -1, out=lse[rows])
            picked[rows] = wide.gather(-1, labels[rows]).squeeze(-1)
        ctx.save_for_backward(hidden, head, targets, lse, kept)
        return (lse - picked).masked_fill_(targets == IGNORE_INDEX, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head, targets, lse, kept = ctx.saved_tensors
        scale = grads[0].to(lse.dtype).masked_fill(targets == IGNORE_INDEX, 0.0).unsqueeze(-1)  # [T, 1]
        labels = targets.clamp(min=0).unsqueeze(-1)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = head.new_zeros(head.shape, dtype=lse.dtype) if needs_head else None
        for rows in _chunks(hidden, head):
            logits = torch.mm(hidden[rows], head.t()) if kept is None else kept[rows]
            part = torch.sub(logits, lse[rows].unsqueeze(-1)).exp_().mul_(scale[rows])  # [r, V]
            part.scatter_add_(-1, labels[rows], -scale[rows])
            part = part.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(part, head, out=grad_hidden[rows])
            if grad_head is None:
                continue
            if grad_head.dtype == part.dtype:
                grad_head.addmm_(part.t(), hidden[rows])
            else:
                grad_head += part.t() @ hidden[rows]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None


def _chunks(hidden: Tensor, head: Tensor) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    size = max(CHUNK_ROWS, elements // head.shape[0])
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a softmax is summed in: fp32 for the half-width types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
