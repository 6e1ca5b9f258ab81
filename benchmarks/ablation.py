"""What it saves to compute the layers below a changed one once: removing every expert in turn, both ways.

    python benchmarks/ablation.py --layers 2 8 16

A model of random weights, uniform layout, 8 experts a layer, width 64; both ways are timed in turns within one process,
and the ratio of their minima is told.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.moe.overrides import ByLayer, Remove
from moelab.nn.transformer import TokenContext, Transformer
from moelab.routes.counterfactuals import losses, removal
from moelab.training.precision import Precision

EXPERTS, WIDTH, SEQUENCES, LENGTH, VOCABULARY = 8, 64, 8, 128, 257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for layers in options.layers:
        model, batch = make(layers)
        times = [[timed(way, model, batch) for way in (from_the_start, from_the_layer)] for _ in range(options.repeats)]
        whole, kept = (min(column) for column in zip(*times, strict=True))
        print(
            f"{layers:>3} layers, {layers * EXPERTS} removals: {whole:.2f} s and {kept:.2f} s, ratio {kept / whole:.2f}"
        )


def make(layers: int) -> tuple[Transformer, Batch]:
    layout = {"name": "uniform", "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, moe=MoEConfig(layout=layout, router={"name": "softmax_topk"}),
    )  # fmt: skip
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros_like(ids)
    return moelab.build(config).eval(), Batch(ids, ids, zeros, zeros, target_document_id=zeros)


def timed(way: Callable[[Transformer, Batch], None], model: Transformer, batch: Batch) -> float:
    began = time.perf_counter()
    way(model, batch)
    return time.perf_counter() - began


def pairs(model: Transformer) -> list[tuple[int, int]]:
    return [(layer, expert) for layer in range(len(model.layers)) for expert in range(EXPERTS)]


@torch.no_grad()
def from_the_start(model: Transformer, batch: Batch) -> None:
    for layer, expert in pairs(model):
        context = TokenContext(batch.document_id, routing_override=ByLayer({layer: Remove({expert})}))
        model(batch.input_ids, targets=batch.targets, tokens=context)


def from_the_layer(model: Transformer, batch: Batch) -> None:
    asked = [removal({layer: [expert]}) for layer, expert in pairs(model)]
    for _ in losses(model, [batch], Precision(torch.device("cpu"), torch.float32), asked):
        pass


if __name__ == "__main__":
    main()
