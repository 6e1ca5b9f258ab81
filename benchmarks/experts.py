"""Expert backends on the CPU: which is fastest where, what imbalance costs, and how cost grows.

    python benchmarks/experts.py --out benchmarks/results

Growth: cost is to be linear in tokens and flat in the number of experts at equal active width.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from layer import LOADS, Contender, LayerShape, backends_for, bank_of, draw_routing, recorded, time_in_turn
from moelab import ExpertBackend
from moelab.nn.allocator import keep_freed_memory
from report import machine, markdown_table, write_results

CPU = torch.device("cpu")
SHAPES = (
    LayerShape("32 x 128, top-4", 256, 32, 4, 128),
    LayerShape("128 x 64, top-8", 256, 128, 8, 64),
    LayerShape("8 x 512, top-2", 256, 8, 2, 512),
)
TOKENS = 4096
GROWTH_TOKENS = (4096, 16384, 65536)
GROWTH_EXPERTS = (8, 32, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for experts.json and experts.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows, tables = [], []
    for dtype in (torch.float32, torch.bfloat16):
        part = _loads(dtype, options.repeats)
        rows += part
        tables.append(_load_table(part, dtype))
        print(tables[-1], flush=True)
    growth = _growth(options.repeats)
    tables.append(_growth_table(growth))
    print(tables[-1])
    if options.out:
        facts = machine() | {"threads": options.threads}
        write_results(Path(options.out), "experts", facts, {"loads": rows, "growth": growth}, tables)


def _measure(shape: LayerShape, tokens: int, load: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """GFLOP/s of forward and backward for each backend; the routing is drawn anew for each repeat, as in training."""
    bank = bank_of(shape, CPU, dtype)
    x = torch.randn(tokens, shape.hidden, dtype=dtype, requires_grad=True)
    routings = [draw_routing(shape, tokens, load, CPU) for _ in range(8)]
    backends = backends_for(shape, tokens, CPU, dtype)
    calls = dict.fromkeys(backends, 0)

    def contender(name: str, backend: ExpertBackend) -> Contender:
        def run() -> torch.Tensor:
            calls[name] += 1
            return backend(x, routings[calls[name] % len(routings)], bank)

        return Contender(run, [x, *bank.parameters(), *(routing.weight for routing in routings)])

    sides = {name: contender(name, backend) for name, backend in backends.items()}
    timings = time_in_turn(sides, torch.randn(tokens, shape.hidden, dtype=dtype), repeats, CPU)
    flops = shape.flops(tokens, backward=True)
    return {
        "shape": shape.name, "experts": shape.experts, "tokens": tokens, "load": load, "dtype": str(dtype),
        "gflops": {name: flops / timing.total / 1e9 for name, timing in timings.items()},
        "seconds": {name: timing.total for name, timing in timings.items()},
    }  # fmt: skip


def _loads(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    loads = LOADS if recorded() else LOADS[:2]
    return [_measure(shape, TOKENS, load, dtype, repeats) for shape in SHAPES for load in loads]


def _growth(repeats: int) -> list[dict[str, Any]]:
    """fp32, random load: tokens at one shape, and experts at 8 x 64 active neurons."""
    shape = LayerShape("32 x 128, top-4", 256, 32, 4, 128)
    by_tokens = [_measure(shape, tokens, "random", torch.float32, repeats) for tokens in GROWTH_TOKENS]
    by_experts = [
        _measure(
            LayerShape(f"{experts} x 128, top-4", 256, experts, 4, 128), 4 * TOKENS, "random", torch.float32, repeats
        )
        for experts in GROWTH_EXPERTS
    ]
    return [*by_tokens, *by_experts]


def _load_table(rows: list[dict[str, Any]], dtype: torch.dtype) -> str:
    names = sorted({name for row in rows for name in row["gflops"]})
    body = [[row["shape"], row["load"], *(f"{row['gflops'].get(n, float('nan')):.0f}" for n in names)] for row in rows]
    title = f"{str(dtype).removeprefix('torch.')}, {TOKENS} tokens, forward and backward, GFLOP/s"
    return f"\n{title}\n\n" + markdown_table(["experts", "load", *names], body) + "\n"


def _growth_table(rows: list[dict[str, Any]]) -> str:
    body = [
        [row["shape"], str(row["tokens"]), f"{1e3 * row['seconds']['auto']:.1f}",
         f"{1e6 * row['seconds']['auto'] / row['tokens']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return "\ngrowth of cost, fp32, auto\n\n" + markdown_table(["experts", "tokens", "ms", "µs a token"], body) + "\n"


if __name__ == "__main__":
    main()
