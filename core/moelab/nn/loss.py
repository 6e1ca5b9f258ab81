"""Cross-entropy of each token in chunks: the logits exist once, in the matmul's dtype, or not at all.

T tokens, D hidden size, V vocabulary. Up to KEEP_ELEMENTS logits are kept for the backward pass; more are
computed a second time there, chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moelab.derivatives import first_order
from moelab.kernels.onednn import onednn_is_wider, outer, prefers_onednn, product

IGNORE_INDEX = -100
KEEP_ELEMENTS = 1 << 27  # of logits: 512 MB in fp32
LOG2_E = 1 / math.log(2)
CHUNK_ROWS = 256  # at least: the head's gradient is read and written once a chunk
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}  # the CPU's chunk stays in its cache
TURNED_ELEMENTS = 1 << 22  # of the head; beyond, its gradient is too large to be held twice


def token_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, recompute: bool | None = None) -> Tensor:
    """hidden [B, S, D], head [V, D], targets [B, S] int64 -> nats [B, S] fp32; 0 where the target is -100.

    `recompute`: the logits are not kept for the backward pass; None: where they are more than KEEP_ELEMENTS.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        nats: Tensor = _TokenCrossEntropy.apply(flat.to(dtype), head.to(dtype), targets.reshape(-1), recompute)
    return nats.view(targets.shape)


def keeps_logits(elements: int, recompute: bool | None) -> bool:
    """Whether `token_cross_entropy` keeps so many logits, where it is asked to `recompute` them, or not."""
    return elements <= KEEP_ELEMENTS if recompute is None else not recompute


def logits_and_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same loss for who wants the logits too: -> logits [B, S, V] in the matmul's dtype, nats [B, S] fp32.

    They are computed once and kept whole, whatever their number; gradients flow through both.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        logits, nats = _LogitsAndCrossEntropy.apply(flat.to(dtype), head.to(dtype), targets.reshape(-1))
    return logits.view(*targets.shape, head.shape[0]), nats.view(targets.shape)


class _LogitsAndCrossEntropy(torch.autograd.Function):
    """z = hidden head^T, nats[t] = logsumexp(z[t]) - z[t, target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        labels = targets.clamp(min=0).unsqueeze(-1)  # [T, 1]
        logits = hidden.new_empty(hidden.shape[0], head.shape[0])
        nats = hidden.new_empty(hidden.shape[0], 1, dtype=_wide(hidden.dtype))
        for rows in _chunks(hidden, head):
            logits[rows] = _logits(hidden[rows], head)
            found = torch.log_softmax(logits[rows], -1, dtype=nats.dtype)  # one pass, where logsumexp takes three
            torch.neg(found.gather(-1, labels[rows]), out=nats[rows])
            del found
        spread = nats + logits.gather(-1, labels)  # logsumexp of each row
        nats = nats.squeeze(-1).masked_fill(targets == IGNORE_INDEX, 0.0)
        ctx.save_for_backward(hidden, head, targets, logits, spread)
        return logits, nats

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head, targets, logits, spread = ctx.saved_tensors
        by_logits, by_nats = grads
        scale = None if by_nats is None else by_nats.to(spread.dtype).masked_fill(targets == IGNORE_INDEX, 0.0)
        labels = targets.clamp(min=0).unsqueeze(-1)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = _no_gradient(hidden, head, spread.dtype) if needs_head else None
        for rows in _chunks(hidden, head):
            if scale is None:
                part = torch.zeros_like(logits[rows], dtype=spread.dtype)
            else:
                part = (logits[rows] - spread[rows]).exp_()  # softmax(z)
                part.scatter_add_(-1, labels[rows], part.new_full((part.shape[0], 1), -1.0))
                part.mul_(scale[rows].unsqueeze(-1))
            if by_logits is not None:
                part += by_logits[rows]
            part = part.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _logits(part, head.t())
            if grad_head is not None:
                _add_product(grad_head, part, hidden[rows])
            del part  # before the next one is made
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype).contiguous(), None


class _TokenCrossEntropy(torch.autograd.Function):
    """nats[t] = -log softmax(z[t])[target], z = hidden head^T; d nats / d z = softmax(z) - onehot(target)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, recompute: bool | None) -> Tensor:
        keep = any(ctx.needs_input_grad) and keeps_logits(hidden.shape[0] * head.shape[0], recompute)
        kept = hidden.new_empty(hidden.shape[0], head.shape[0]) if keep else None
        labels = targets.clamp(min=0).unsqueeze(-1)  # [T, 1]
        nats = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype))
        for rows in _chunks(hidden, head):
            logits = _logits(hidden[rows], head)
            if logits.dtype == nats.dtype:
                # What is kept are the log-probabilities: the backward pass needs only to exponentiate them.
                found = torch.log_softmax(logits, -1, out=None if kept is None else kept[rows])
            else:
                found = torch.log_softmax(logits, -1, dtype=nats.dtype)
                if kept is not None:
                    kept[rows] = logits  # log-probabilities would be rounded once more
            torch.neg(found.gather(-1, labels[rows]).squeeze(-1), out=nats[rows])
            del logits, found  # before the next ones are made
        ctx.save_for_backward(hidden, head, targets, kept)
        return nats.masked_fill_(targets == IGNORE_INDEX, 0.0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, head, targets, kept = ctx.saved_tensors
        wide = _wide(hidden.dtype)
        scale = grads[0].to(wide).masked_fill(targets == IGNORE_INDEX, 0.0).unsqueeze(-1)  # [T, 1]
        labels = targets.clamp(min=0).unsqueeze(-1)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = _no_gradient(hidden, head, wide) if needs_head else None
        for rows in _chunks(hidden, head):
            part = _probabilities(hidden[rows], head, None if kept is None else kept[rows], wide)  # [r, V]
            part.scatter_add_(-1, labels[rows], part.new_full((part.shape[0], 1), -1.0))
            part = part.mul_(scale[rows]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _logits(part, head.t())
            if grad_head is not None:
                _add_product(grad_head, part, hidden[rows])
            del part  # before the next one is made
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype).contiguous(), None, None


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [r, D], head [V, D] -> [r, V]."""
    return product(hidden, head) if prefers_onednn(hidden, head) else hidden @ head.t()


def _no_gradient(hidden: Tensor, head: Tensor, wide: torch.dtype) -> Tensor:
    """Zeros [V, D] that the head's gradient is added to; turned, as oneDNN's products come, where it computes them."""
    vocab, size = head.shape
    turned = size < vocab and head.numel() <= TURNED_ELEMENTS and prefers_onednn(hidden, head) and onednn_is_wider()
    return head.new_zeros(size, vocab, dtype=wide).t() if turned else head.new_zeros(vocab, size, dtype=wide)


def _add_product(total: Tensor, part: Tensor, hidden: Tensor) -> None:
    """total [V, D] += part [r, V]^T hidden [r, D]."""
    if not total.is_contiguous():
        total += outer(part, hidden)
    elif total.dtype == part.dtype:
        total.addmm_(part.t(), hidden)
    else:
        total += part.t() @ hidden


def _probabilities(hidden: Tensor, head: Tensor, kept: Tensor | None, wide: torch.dtype) -> Tensor:
    """softmax(z) [r, V] in `wide`, from what the forward pass kept or anew."""
    if kept is not None and kept.dtype == wide:
        return (kept * LOG2_E).exp2_()  # torch hands exp to MKL, which takes 2.6 times as long on an AMD EPYC
    return torch.softmax(_logits(hidden, head) if kept is None else kept, -1, dtype=wide)


def chunk_rows(vocab_size: int, device: str) -> int:
    """Tokens whose logits are computed at once on "cpu" or "cuda"."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // vocab_size)


def _chunks(hidden: Tensor, head: Tensor) -> Iterator[slice]:
    size = chunk_rows(head.shape[0], hidden.device.type)
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a softmax is summed in: fp32 for the half-width types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
