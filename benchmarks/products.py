"""Single fp32 products on a CPU, by MKL and by oneDNN: what `moelab.kernels.onednn` and `batched` choose between.

    python benchmarks/products.py --out benchmarks/results

Milliseconds, medians of rounds in which all ways take turns, warm (always the same matrices) and cold (each turn takes
others, of 128 MiB in all, as a layer takes those of one expert after the other). `rows x columns to outputs` are
products of rows with weights. Their weights' gradient [outputs, columns] by oneDNN comes as it is, or turned. oneDNN's
result is copied to where MKL's is written at once, as `batched` does. Then what a shape costs at first sight, and what
a right operand with gaps does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from moelab.kernels.onednn import pointwise, product
from moelab.nn.allocator import keep_freed_memory
from report import machine, markdown_table, median, write_results

SIZES = (  # rows, columns, outputs
    (32, 256, 256), (64, 256, 256), (128, 256, 256), (256, 256, 256), (512, 256, 256),
    (64, 256, 512), (128, 256, 512), (512, 256, 512), (4096, 256, 512), (512, 512, 256), (128, 64, 256), (512, 64, 256),
    (128, 768, 512), (2048, 768, 2048),
)  # fmt: skip
COLD = 1 << 25  # numbers of all that cold turns read and write
FRESH, LEAST = 24, 40  # shapes that are seen for the first time; their fewest rows
Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for products.json and products.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    with torch.no_grad():
        rows = [found for size in SIZES for found in _both(*size, options.rounds)]
        first, gaps = _first_sight(), _gaps()
    table = markdown_table(
        ["product", "MKL ms", "oneDNN", "turned", "cold: MKL ms", "oneDNN", "turned"],
        [[row["what"], *_cells(row["warm"]), *_cells(row["cold"])] for row in rows],
    )
    notes = (
        f"A shape costs {1e3 * first:.2f} ms at first sight ({FRESH} shapes of 256 to 256, one product each).\n"
        f"A right operand with gaps: {gaps:.0f} times as long (128 x 256 to 256).\n"
    )
    print(f"\n{table}\n\n{notes}")
    if options.out:
        results = {"products": rows, "first_sight_seconds": first, "gaps_ratio": gaps}
        facts = machine() | {"threads": options.threads}
        write_results(Path(options.out), "products", facts, results, [f"\n{table}\n", notes])


def _both(rows: int, columns: int, outputs: int, rounds: int) -> list[dict[str, Any]]:
    """A product with weights, and the gradient of these weights."""
    size = rows * columns + 2 * outputs * columns + 2 * rows * outputs
    sets = [Matrices(rows, columns, outputs) for _ in range(2 + COLD // size)]
    found = []
    for what, calls in (
        (f"{rows} x {columns} to {outputs}", {"mkl": Matrices.mkl, "onednn": Matrices.onednn}),
        (
            f"its weights' gradient, {rows} rows",
            {"mkl": Matrices.back_mkl, "onednn": Matrices.back, "turned": Matrices.back_turned},
        ),
    ):
        found.append({"what": what, "warm": _in_turn(calls, sets[:1], rounds), "cold": _in_turn(calls, sets, rounds)})
        print(what, *(f"{way} {1e3 * took:.3f}" for way, took in found[-1]["warm"].items()), flush=True)
    return found


class Matrices:
    """What one product reads and writes, and its weights' gradient."""

    def __init__(self, rows: int, columns: int, outputs: int) -> None:
        self.x, self.weight, self.grad = (
            torch.randn(*size) for size in ((rows, columns), (outputs, columns), (rows, outputs))
        )
        self.y, self.grad_weight = torch.zeros(rows, outputs), torch.zeros(outputs, columns)

    def mkl(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)

    def onednn(self) -> None:
        self.y.copy_(product(self.x, self.weight))

    def back_mkl(self) -> None:
        torch.mm(self.grad.t(), self.x, out=self.grad_weight)

    def back(self) -> None:
        self.grad_weight.copy_(product(self.grad.t(), self.x.t()))

    def back_turned(self) -> None:
        self.grad_weight.copy_(product(self.x.t(), self.grad.t()).t())


def _in_turn(
    calls: Mapping[str, Callable[[Matrices], None]], sets: Sequence[Matrices], rounds: int
) -> dict[str, float]:
    """way -> median seconds; each turn takes the next set."""
    taken: dict[str, list[float]] = {way: [] for way in calls}
    coming = cycle(sets)
    for done in range(rounds + 2):
        for way, call in calls.items():
            one = next(coming)
            took = _seconds(lambda: call(one))  # noqa: B023 (called here)
            if done >= 2:
                taken[way].append(took)
    return {way: median(times) for way, times in taken.items()}


def _seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _first_sight() -> float:
    """Seconds that oneDNN takes beyond the product's own, at numbers of rows that come for the first time."""
    weight = torch.randn(256, 256)
    inputs = [torch.randn(LEAST + 7 * number, 256) for number in range(FRESH)]
    first, again = ([_seconds(lambda x=x: product(x, weight)) for x in inputs] for _ in range(2))  # type: ignore[misc]
    return median([one - two for one, two in zip(first, again, strict=True)])


def _gaps(repeats: int = 5) -> float:
    """How many times as long a product takes whose right operand is a part of wider rows."""
    x, wide = torch.randn(128, 256), torch.randn(256, 512)
    raw = pointwise().default
    took = {}
    for name, weight in (("dense", wide[:, :256].contiguous()), ("gaps", wide[:, :256])):
        times = [_seconds(lambda: raw(x, weight, None, "none", [], "")) for _ in range(repeats)]  # noqa: B023
        took[name] = median(times[1:])
    return took["gaps"] / took["dense"]


def _cells(seconds: Mapping[str, float]) -> list[str]:
    return [f"{1e3 * seconds[way]:.3f}" if way in seconds else "" for way in ("mkl", "onednn", "turned")]


if __name__ == "__main__":
    main()
