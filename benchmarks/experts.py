"""Expert backends on the CPU: which is fastest where, what imbalance costs, and how cost grows.

    python benchmarks/experts.py --out benchmarks/results
    python benchmarks/experts.py --loads-of --growth 512:256:2          # growth alone, of another shape

Growth: cost is to be linear in tokens and flat in the number of experts at equal active width.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layer import LOADS, LayerShape, backends_for, bank_of, draw_routing, recorded
from moelab import ExpertBackend, Routing
from moelab.moe.experts import ExpertBank
from moelab.nn.allocator import keep_freed_memory
from report import machine, markdown_table, median, write_results

CPU = torch.device("cpu")
SHAPES = (
    LayerShape("32 x 128, top-4", 256, 32, 4, 128),
    LayerShape("128 x 64, top-8", 256, 128, 8, 64),
    LayerShape("8 x 512, top-2", 256, 8, 2, 512),
)
TOKENS = 4096
BLOCKS, WARM_UP = 3, 2
GROWTH_TOKENS = (4096, 16384, 65536)
GROWTH_EXPERTS = (8, 32, 128, 256)
GROWTH_SHAPE = (256, 128, 4)  # hidden, width, top-k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of a block; there are three")
    triple = lambda text: tuple(int(part) for part in text.split(":"))  # noqa: E731
    parser.add_argument("--growth", type=triple, nargs="+", default=[GROWTH_SHAPE], metavar="HIDDEN:WIDTH:TOP_K")
    dtypes = ("float32", "bfloat16")
    parser.add_argument(
        "--loads-of", nargs="*", choices=dtypes, default=dtypes, metavar="DTYPE", help="none: growth alone"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for experts.json and experts.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows, tables = [], []
    for dtype in (getattr(torch, name) for name in options.loads_of):
        part = _loads(dtype, options.repeats)
        rows += part
        tables.append(_load_table(part, dtype))
        print(tables[-1], flush=True)
    growth = []
    for hidden, width, top_k in options.growth:
        part = _growth(hidden, width, top_k, options.repeats)
        growth += part
        tables.append(_growth_table(part))
        print(tables[-1], flush=True)
    if options.out:
        facts = machine() | {"threads": options.threads}
        write_results(Path(options.out), "experts", facts, {"loads": rows, "growth": growth}, tables)


def _measure(shape: LayerShape, tokens: int, load: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """GFLOP/s of forward and backward for each backend, every call with a routing of its own, as in training.

    Backends take turns in blocks of calls: oneDNN keeps the 1024 kernels used last, and in turn one backend's ever new
    shapes would drive out those that another one uses again.
    """
    bank, x = bank_of(shape, CPU, dtype), torch.randn(tokens, shape.hidden, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, shape.hidden, dtype=dtype)
    backends = backends_for(shape, tokens, CPU, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(BLOCKS):
        for name, backend in backends.items():
            routings = [draw_routing(shape, tokens, load, CPU) for _ in range(WARM_UP + repeats)]
            seconds[name] += [_seconds(backend, bank, x, routing, upstream) for routing in routings][WARM_UP:]
    flops = shape.flops(tokens, backward=True)
    return {
        "shape": shape.name, "experts": shape.experts, "tokens": tokens, "load": load, "dtype": str(dtype),
        "gflops": {name: flops / median(taken) / 1e9 for name, taken in seconds.items()},
        "seconds": {name: median(taken) for name, taken in seconds.items()},
    }  # fmt: skip


def _seconds(backend: ExpertBackend, bank: ExpertBank, x: Tensor, routing: Routing, upstream: Tensor) -> float:
    """Of one forward and backward pass."""
    x.grad = bank.gate_up.grad = bank.down.grad = None  # adding to the last pass's gradients would be timed too
    started = time.perf_counter()
    backend(x, routing, bank).backward(upstream)
    return time.perf_counter() - started


def _loads(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    loads = LOADS if recorded() else LOADS[:2]
    return [_measure(shape, TOKENS, load, dtype, repeats) for shape in SHAPES for load in loads]


def _growth(hidden: int, width: int, top_k: int, repeats: int) -> list[dict[str, Any]]:
    """fp32, random load, `auto` alone, sizes in turn: tokens at one shape, and experts at equal active width."""
    shapes = {
        experts: LayerShape(f"{experts} x {width}, top-{top_k}", hidden, experts, top_k, width)
        for experts in GROWTH_EXPERTS
    }
    middle = GROWTH_TOKENS[1]
    cases = [(shape, middle) for shape in shapes.values()]
    # The largest last: what comes after it finds the caches emptied.
    cases += [(shapes[32], tokens) for tokens in GROWTH_TOKENS if tokens != middle]
    seconds: list[list[float]] = [[] for _ in cases]
    calls = [_auto_alone(shape, tokens) for shape, tokens in cases]
    for repeat in range(repeats + 1):
        for index, (_, tokens) in enumerate(cases):
            took = [calls[index]() for _ in range(max(1, middle // tokens))]  # small ones as often as they fit
            if repeat:
                seconds[index] += took
    return [
        {"shape": shape.name, "hidden": hidden, "experts": shape.experts, "tokens": tokens,
         "seconds": median(seconds[index])}
        for index, (shape, tokens) in enumerate(cases)
    ]  # fmt: skip


def _auto_alone(shape: LayerShape, tokens: int) -> Callable[[], float]:
    """A call that computes the layer forward and backward once -> its seconds."""
    bank, x = bank_of(shape, CPU, torch.float32), torch.randn(tokens, shape.hidden, requires_grad=True)
    routings = itertools.cycle([draw_routing(shape, tokens, "random", CPU) for _ in range(4)])
    backend, upstream = backends_for(shape, tokens, CPU, torch.float32)["auto"], torch.randn(tokens, shape.hidden)

    return lambda: _seconds(backend, bank, x, next(routings), upstream)


def _load_table(rows: list[dict[str, Any]], dtype: torch.dtype) -> str:
    """The price of imbalance: how much longer `auto` takes than under a balanced load."""
    names = sorted({name for row in rows for name in row["gflops"]})
    balanced = {row["shape"]: row["seconds"]["auto"] for row in rows if row["load"] == "balanced"}
    body = [
        [row["shape"], row["load"], *(f"{row['gflops'].get(n, float('nan')):.0f}" for n in names),
         f"{row['seconds']['auto'] / balanced[row['shape']]:.2f} x"]
        for row in rows
    ]  # fmt: skip
    title = f"{str(dtype).removeprefix('torch.')}, {TOKENS} tokens, forward and backward, GFLOP/s"
    head = ["experts", "load", *names, "auto's time, of balanced"]
    return f"\n{title}\n\n" + markdown_table(head, body) + "\n"


def _growth_table(rows: list[dict[str, Any]]) -> str:
    body = [
        [row["shape"], str(row["tokens"]), f"{1e3 * row['seconds']:.1f}",
         f"{1e6 * row['seconds'] / row['tokens']:.2f}"]
        for row in rows
    ]  # fmt: skip
    title = f"growth of cost, fp32, auto, hidden {rows[0]['hidden']}"
    return f"\n{title}\n\n" + markdown_table(["experts", "tokens", "ms", "µs a token"], body) + "\n"


if __name__ == "__main__":
    main()
