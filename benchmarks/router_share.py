"""Each router's share of a training step on the CPU, and what the whole step takes beside the plain one's.

    python benchmarks/router_share.py --out benchmarks/results
    python benchmarks/router_share.py --only softmax_topk,top_p --rounds 3

A step is forward, backward, clipping, AdamW and `after_step`; the router's part is its own forward and backward pass in
every layer, and `after_step`. Rounds go through all variants; in each, a step of the baseline, one of the variant and
its router alone take turns, in processor seconds of this one-threaded process, which others on the machine stretch less
than wall time. Shares and ratios are those of one turn, then the median over rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.hookspecs import ROUTERS
from moelab.moe.batch_statistics import BatchStatistics
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.count import moe_blocks
from moelab.testing.tensors import make_info
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step
from report import machine, markdown_table, median, spread, write_results

HIDDEN, EXPERTS, TOP_K, WIDTH, LAYERS, VOCABULARY = 512, 64, 8, 256, 2, 1024
BASELINE = "softmax_topk"
REGISTRY = moelab.Registry(entry_points=False)
# Options of routers that are ways of routing of their own: {title: router}. None has a balance loss.
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax_topk, quantile": {"name": "softmax_topk", "balance": "quantile"},
    "softmax_topk, topk_first, gate_bias (gpt-oss)": {"name": "softmax_topk", "topk_first": True, "gate_bias": True},
    "softmax_topk, cosine gate (X-MoE)": {"name": "softmax_topk", "gate": "cosine"},
    "softmax_topk, document_pool (EMO)": {"name": "softmax_topk", "document_pool": {"smallest": 8, "largest": 64}},
    "softmax_topk, capacity_factor 1.25": {"name": "softmax_topk", "capacity_factor": 1.25},
    "sigmoid_topk, 8 groups (DeepSeek-V3)": {"name": "sigmoid_topk", "n_group": 8, "topk_group": 4},
    "sigmoid_topk, weights_on input (Llama 4)": {
        "name": "sigmoid_topk", "norm_topk_prob": False, "balance": "none", "weights_on": "input",
    },
    "sqrtsoftplus_topk, token_table (DeepSeek-V4)": {"name": "sqrtsoftplus_topk", "balance": "none", "token_table": {}},
    "null_experts, copy, proportional (LongCat)": {
        "name": "null_experts", "num_null_experts": 32, "null_output": "copy", "norm_topk_prob": False,
        "balance": "proportional",
    },
}  # fmt: skip


@dataclass
class Variant:
    """A model with one router, and what is timed of it."""

    step: Callable[[], Any]
    route: Callable[[], Any]


def build(router: dict[str, Any], tokens: int) -> Variant:
    top_k = {"switch": 1, "base": 1, "gshard": 2}.get(router["name"], TOP_K)
    layout = {
        "name": "uniform", "num_experts": EXPERTS, "num_experts_per_tok": top_k, "moe_intermediate_size": WIDTH,
    }  # fmt: skip
    moe = MoEConfig(layout=layout, router=router, allow_noncausal=True)
    config = ModelConfig(VOCABULARY, HIDDEN, 1024, LAYERS, 8, 8, moe=moe)
    model, losses = moelab.build_model(config, REGISTRY).train(), build_balance_losses(config, REGISTRY)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    settings = StepSettings(4, 1.0, 0, Precision(torch.device("cpu"), torch.float32))
    ids = torch.randint(0, VOCABULARY, (4, tokens // 4 + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(tokens).view(4, -1) // 100
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents, torch.zeros_like(documents), None)
    blocks = list(moe_blocks(model))
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    info = make_info(4, tokens // 4, VOCABULARY, training=True)
    upstream = torch.linspace(-1, 1, tokens * EXPERTS)  # of the weights: a plain sum of normalised ones has none

    def route() -> None:
        seen = BatchStatistics([])
        for block in blocks:
            routing: Any = block.router(x, info)
            parts = (
                [(routing.weight * upstream[: routing.weight.numel()]).sum()] if routing.weight.requires_grad else []
            )
            if routing.bypass is not None and routing.bypass.requires_grad:
                parts.append(routing.bypass.sum())
            if parts:
                torch.stack(parts).sum().backward()
            seen.wanted[block.layer_id] = routing.demand()
            if routing.statistics is not None:
                seen._statistics[block.layer_id] = routing.statistics.double() * tokens
        seen.tokens = torch.tensor(tokens)
        seen.after_step(blocks)

    return Variant(lambda: train_step(model, optimizer, losses, batch, 0, settings), route)


def seconds(call: Callable[[], Any]) -> float:
    """Of this process' processor time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for router_share.json and router_share.md")
    parser.add_argument("--only", help="names of routers, with commas between")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    routers = {name: {"name": name} for name in REGISTRY.components(ROUTERS)} | OPTIONS
    if arguments.only:
        routers = {title: router for title, router in routers.items() if router["name"] in arguments.only.split(",")}
    baseline = build({"name": BASELINE}, arguments.tokens)
    seconds(baseline.step)
    turns: dict[str, list[tuple[float, float, float]]] = {title: [] for title in routers}
    for index in range(arguments.rounds):
        for title, router in routers.items():
            variant = build(router, arguments.tokens)  # built each time: thirty of them would not fit into memory
            seconds(variant.step), seconds(variant.route)
            turn = (seconds(baseline.step), seconds(variant.step), seconds(variant.route))
            turns[title].append(turn)
        print(f"round {index + 1} of {arguments.rounds}", flush=True)
        report(turns, arguments)


def report(turns: dict[str, list[tuple[float, float, float]]], arguments: argparse.Namespace) -> None:
    """After each round, so that one that is stopped leaves those it had."""
    results = {title: summary(found) for title, found in turns.items()}
    rows = [
        [
            title, f"{r['router_ms']:.1f}", f"{r['step_ms']:.0f}", f"{r['share']:.1%}",
            f"{min(r['share_spread']):.1%} .. {max(r['share_spread']):.1%}", f"{r['step_ratio']:.2f}",
        ]
        for title, r in sorted(results.items(), key=lambda item: item[1]["share"])
    ]  # fmt: skip
    head = ["router", "its ms a step", "step ms", "share of the step", "quartiles", f"step, of {BASELINE}'s"]
    rounds = len(next(iter(turns.values())))
    table = (
        f"\n{arguments.tokens} tokens, {LAYERS} layers, hidden {HIDDEN}, {TOP_K} of {EXPERTS} experts of width {WIDTH} "
        f"(switch and base 1, gshard 2), no balance loss, float32, one thread; medians of {rounds} turns, "
        f"processor time, on a machine with other work (load_average)\n\n{markdown_table(head, rows)}\n"
    )
    print(table, flush=True)
    if arguments.out is not None:
        write_results(arguments.out, "router_share", machine(), results, [table])


def summary(turns: list[tuple[float, float, float]]) -> dict[str, Any]:
    shares = [route / step for _, step, route in turns]
    return {
        "router_ms": 1e3 * median([route for _, _, route in turns]),
        "step_ms": 1e3 * median([step for _, step, _ in turns]),
        "share": median(shares),
        "share_spread": spread(shares) if len(shares) > 1 else shares * 2,
        "step_ratio": median([step / plain for plain, step, _ in turns]),
    }


if __name__ == "__main__":
    main()
