"""Activations and latent experts on the CPU: at what rate a layer computes its own FLOPs, beside SwiGLU's.

    python benchmarks/activations.py --out benchmarks/results

One thread, and seconds of the processor that this process took, so that others on the machine count little. In each
round every contender computes once, in turn; the ratio to SwiGLU is taken within the round, and its median told.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layer import LayerShape, draw_routing
from moelab import BackendContext, Registry
from moelab.hookspecs import ACTIVATIONS, EXPERT_BACKENDS
from moelab.moe.activation import ActivationContext, num_matrices
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.latent import LatentProjection
from report import machine, markdown_table, median, write_results

SHAPE, TOKENS = LayerShape("16 x 512, top-4", 512, 16, 4, 512), 2048
CPU = torch.device("cpu")
REFERENCE = "swiglu"
REGISTRY = Registry(entry_points=False)
# name -> (activation, biases, latent width or none)
CONTENDERS: dict[str, tuple[str, bool, int | None]] = {
    **{name: (name, False, None) for name in sorted(REGISTRY.components(ACTIVATIONS))},
    "clamped_swiglu, biases": ("clamped_swiglu", True, None),
    "swiglu, latent 256 and norm": ("swiglu", False, 256),
    "relu2, latent 256 and norm": ("relu2", False, 256),
}


@dataclass(frozen=True)
class Contender:
    flops: int  # of one forward and backward pass
    run: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", help="folder for activations.json and activations.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        for backend in ("batched", "grouped_mm"):
            part = _measure(backend, dtype, options.tokens, options.rounds)
            rows += part
            tables.append(_table(part, backend, dtype, options.tokens))
            print(tables[-1], flush=True)
    if options.out:
        write_results(Path(options.out), "activations", machine() | {"threads": 1}, {"rates": rows}, tables)


def _measure(backend: str, dtype: torch.dtype, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """{name, GFLOP/s, ratio to the reference} of each contender."""
    contenders = {name: _contender(backend, dtype, tokens, *what) for name, what in CONTENDERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):  # two to warm up
        for name, contender in contenders.items():
            started = time.process_time()
            contender.run()
            if number > 1:
                rates[name].append(contender.flops / (time.process_time() - started) / 1e9)
    ratios = {
        name: [mine / other for mine, other in zip(found, rates[REFERENCE], strict=True)]
        for name, found in rates.items()
    }
    return [
        {
            "name": name, "backend": backend, "dtype": str(dtype), "gflops": median(rates[name]),
            "ratio": median(ratios[name]),
        }
        for name in contenders
    ]  # fmt: skip


def _contender(backend: str, dtype: torch.dtype, tokens: int, name: str, bias: bool, latent: int | None) -> Contender:
    hidden, width = SHAPE.hidden, latent or SHAPE.hidden
    act = REGISTRY.build(ACTIVATIONS, {"name": name}, ActivationContext(hidden, 0, 1), "activation")
    layout = ExpertLayout(SHAPE.experts, SHAPE.top_k, SHAPE.width)
    compute = REGISTRY.build(EXPERT_BACKENDS, {"name": backend}, BackendContext(layout, width, 0, dict), "backend")
    bank = ExpertBank(layout, width, act, bias=bias)
    around = LatentProjection(hidden, latent, 1e-6) if latent else None
    parts = torch.nn.ModuleList(part for part in (bank, around) if part is not None).to(dtype)
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    routing = draw_routing(SHAPE, tokens, "random", CPU)
    x, upstream = torch.randn(2, tokens, hidden, dtype=dtype).unbind(0)
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        parts.zero_grad()  # adding to the last pass's gradients would be timed too
        y = bank(x if around is None else around.down(x), routing, compute)
        (y if around is None else around.up(y)).backward(upstream)

    weights = SHAPE.top_k * num_matrices(act) * width * SHAPE.width + (2 * hidden * latent if latent else 0)
    return Contender(3 * 2 * tokens * weights, run)


def _table(rows: list[dict[str, Any]], backend: str, dtype: torch.dtype, tokens: int) -> str:
    body = [[row["name"], f"{row['gflops']:.0f}", f"{row['ratio']:.2f} x"] for row in rows]
    kind = str(dtype).removeprefix("torch.")
    title = f"{backend}, {kind}, {SHAPE.name}, hidden {SHAPE.hidden}, {tokens} tokens, forward and backward"
    return f"\n{title}\n\n" + markdown_table(["activation", "GFLOP/s", "of swiglu's"], body) + "\n"


if __name__ == "__main__":
    main()
