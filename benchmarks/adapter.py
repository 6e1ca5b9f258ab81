"""What `moelab.as_transformers` adds to a training step: pairs of steps, with and without it, on the same batch.

    python benchmarks/adapter.py [PAIRS]

Prints the median of the pairs' ratios with its 95 % interval by bootstrap. Without: our forward pass and loss, as
`training/step.py` calls them. With: the adapter's forward with labels and a mask of ones, whose logits and loss are
transformers'; and the adapter with our loss, which is what the wrapping alone costs.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.nn.loss import token_cross_entropy
from moelab.nn.transformer import Transformer

BATCH, SEQ, VOCABULARY = 4, 256, 8192


def main(pairs: int) -> None:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    model = moelab.build(ModelConfig(**sizes | heads, moe=MoEConfig(layout=layout))).train()
    adapted = moelab.as_transformers(model)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    targets = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], 1)

    def plain() -> Tensor:
        loss = model(ids, targets=targets).token_loss
        assert loss is not None
        return loss.sum() / (targets != -100).sum()

    def with_labels() -> Tensor:
        return adapted(ids, attention_mask=mask, labels=ids).loss

    def wrapping() -> Tensor:
        states = adapted(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return token_cross_entropy(states, model.lm_head.weight, targets).sum() / (targets != -100).sum()

    for name, other in (("adapter, transformers' loss", with_labels), ("adapter, our loss", wrapping)):
        ratios = [step(other, model) / step(plain, model) for _ in range(pairs + 2)][2:]
        draws = sorted(statistics.median(random.choices(ratios, k=pairs)) for _ in range(2000))
        print(f"{name}: {statistics.median(ratios):.3f} [{draws[50]:.3f}, {draws[1949]:.3f}] of a plain step")


def step(loss: Callable[[], Tensor], model: Transformer) -> float:
    """Processor seconds of a forward and a backward pass: others on the machine don't count."""
    model.zero_grad(set_to_none=True)
    begin = time.process_time()
    loss().backward()
    return time.process_time() - begin


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
