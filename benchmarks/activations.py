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

SHAPES = {hidden: LayerShape("16 x 512, top-4", hidden, 16, 4, 512) for hidden in (512, 1024)}
# (hidden size, dtype, backend): what an activation costs falls with the width that the products around it have.
CASES = (
    (512, torch.float32, "batched"),
    *((1024, dtype, backend) for dtype in (torch.float32, torch.bfloat16) for backend in ("batched", "grouped_mm")),
)
TOKENS = 1024
CPU = torch.device("cpu")
REFERENCE = "swiglu"
REGISTRY = Registry(entry_points=False)
# name -> (activation, biases, whether in a space of half the hidden size, with a norm)
CONTENDERS: dict[str, tuple[str, bool, bool]] = {
    **{name: (name, False, False) for name in sorted(REGISTRY.components(ACTIVATIONS))},
    "clamped_swiglu, biases": ("clamped_swiglu", True, False),
    "swiglu, latent": ("swiglu", False, True),
    "relu2, latent": ("relu2", False, True),
}


@dataclass(frozen=True)
class Contender:
    flops: int  # of one forward and backward pass
    run: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", help="folder for activations.json and activations.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    tables = []
    for hidden, dtype, backend in CASES:
        part = _measure(SHAPES[hidden], backend, dtype, options)
        rows += part
        tables.append(_table(part, SHAPES[hidden], options.tokens))
        print(tables[-1], flush=True)
    if options.out:
        write_results(Path(options.out), "activations", machine() | {"threads": 1}, {"rates": rows}, tables)


def _measure(shape: LayerShape, backend: str, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """{name, GFLOP/s, ratio to the reference} of each contender."""
    contenders = {name: _contender(shape, backend, dtype, options.tokens, *what) for name, what in CONTENDERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 2):  # two to warm up
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
            "name": name, "backend": backend, "dtype": str(dtype).removeprefix("torch."), "hidden": shape.hidden,
            "gflops": median(rates[name]), "ratio": median(ratios[name]),
        }
        for name in contenders
    ]  # fmt: skip


def _contender(
    shape: LayerShape, backend: str, dtype: torch.dtype, tokens: int, name: str, bias: bool, latent: bool
) -> Contender:
    hidden, width = shape.hidden, shape.hidden // 2 if latent else shape.hidden
    act = REGISTRY.build(ACTIVATIONS, {"name": name}, ActivationContext(hidden, 0, 1), "activation")
    layout = ExpertLayout(shape.experts, shape.top_k, shape.width)
    compute = REGISTRY.build(EXPERT_BACKENDS, {"name": backend}, BackendContext(layout, width, 0, dict), "backend")
    bank = ExpertBank(layout, width, act, bias=bias)
    around = LatentProjection(hidden, width, 1e-6) if latent else None
    parts = torch.nn.ModuleList(part for part in (bank, around) if part is not None).to(dtype)
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    routing = draw_routing(shape, tokens, "random", CPU)
    x, upstream = torch.randn(2, tokens, hidden, dtype=dtype).unbind(0)
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        parts.zero_grad()  # adding to the last pass's gradients would be timed too
        y = bank(x if around is None else around.down(x), routing, compute)
        (y if around is None else around.up(y)).backward(upstream)

    weights = shape.top_k * num_matrices(act) * width * shape.width + (2 * hidden * width if latent else 0)
    return Contender(3 * 2 * tokens * weights, run)


def _table(rows: list[dict[str, Any]], shape: LayerShape, tokens: int) -> str:
    body = [[row["name"], f"{row['gflops']:.0f}", f"{row['ratio']:.2f} x"] for row in rows]
    what = f"{rows[0]['backend']}, {rows[0]['dtype']}, hidden {shape.hidden}, {shape.name}"
    title = f"{what}, {tokens} tokens, forward and backward"
    return f"\n{title}\n\n" + markdown_table(["activation", "GFLOP/s", "of swiglu's"], body) + "\n"


if __name__ == "__main__":
    main()
