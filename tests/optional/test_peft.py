"""PEFT's LoRA on the same matrices, of a model that transformers knows: equal gradients, steps and merged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelab.config.adapters import AdapterConfig
from moelab.training.adapters import attach

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft accelerate")

EXPERTS, WIDTH, HIDDEN, RANK, ALPHA = 4, 6, 10, 3, 7.0


class Bank(nn.Module):
    """E matrices, stored as [in, out]."""

    INPUT_FIRST = ("down",)  # our word for it
    is_transposed = True  # and PEFT's, for all parameters of a module

    def __init__(self) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN).normal_(generator=stream))

    def forward(self, x: Tensor) -> Tensor:
        """x [E, n, F] -> [E, n, D]."""
        return torch.tanh(x) @ self.down


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.experts = Bank()
        nn.init.normal_(self.inner.weight, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, D] -> [E, n, D]."""
        return self.experts(self.inner(x).expand(EXPERTS, -1, -1))


def _theirs(wrapped: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(lora_A, lora_B) of PEFT that belong to one of our matrices."""
    found = {n: p for n, p in wrapped.named_parameters() if "lora_" in n and name in n}
    (a,) = (p for n, p in found.items() if "lora_A" in n)
    (b,) = (p for n, p in found.items() if "lora_B" in n)
    return a, b


def test_gradients_steps_and_merged_weights_are_pefts() -> None:
    ours, base = Model().double(), Model().double()
    adapters = attach(ours, [AdapterConfig("*", r=RANK, alpha=ALPHA)], 0)
    assert adapters is not None
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["inner"], target_parameters=["experts.down"], lora_dropout=0.0
    )
    wrapped = peft.get_peft_model(base, config)
    pairs: list[tuple[Tensor, Tensor]] = []
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, own in (("inner", adapters.inner.weight), ("experts", adapters.experts.down)):
            own.lora_b.copy_(torch.empty(own.lora_b.shape).normal_(generator=stream))
            a, b = _theirs(wrapped, name)
            if name == "inner":
                a.copy_(own.lora_a)
                b.copy_(own.lora_b)
            else:  # theirs: A [E r, F], expert after expert; B [D, r E], the experts innermost
                a.copy_(own.lora_a.mT.reshape(EXPERTS * RANK, WIDTH))
                b.copy_(own.lora_b.permute(2, 1, 0).reshape(HIDDEN, RANK * EXPERTS))
            pairs += [(own.lora_a, a), (own.lora_b, b)]
    adapters.merge()
    optimizers = [
        torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([theirs for _, theirs in pairs], lr=1e-2, weight_decay=0.1),
    ]
    for step in range(3):
        x = torch.empty(5, HIDDEN, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(10 + step))
        values = [ours(x), wrapped(x)]
        torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-10)
        for value, optimizer in zip(values, optimizers, strict=True):
            optimizer.zero_grad()
            value.square().mean().backward()
            optimizer.step()
        adapters.merge()
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(ours.inner.weight, merged.inner.weight, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.experts.down, merged.experts.down, rtol=1e-9, atol=1e-10)
