"""Does it help to put experts on ranks by their recorded loads? Judged on steps that the placement has not seen.

    python benchmarks/placement.py [--steps 240] [--seeds 2] [--output benchmarks/results]

configs/train/tiny_moe.yaml with 16 experts: with its balance loss, with none, with a bias instead. The loads of the
second quarter of each run's steps choose an order of the experts. It is measured on the second half, beside the order
as it is, one drawn at random, and one chosen by that half itself, which nobody can know. Measured is what sets a step's
time: the fullest rank over the mean rank, less one, of each step and layer on its own, then the mean.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools")]

import moelab  # noqa: E402
from moelab.parallel.placement import by_load, contiguous, violation  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

EXPERTS, RANKS = 16, (2, 4, 8)
KINDS = {
    "load_balance 0.01": [],
    "no loss": ["model.moe.balance_losses=[]"],
    "bias (sigmoid_topk)": ["model.moe.balance_losses=[]", "model.moe.router={name: sigmoid_topk}"],
}
Loads = list[dict[int, list[float]]]  # a step each: layer -> shares


class Record:
    """An observer that keeps the loads of each logged step."""

    def __init__(self) -> None:
        self.loads: Loads = []

    @moelab.hookimpl
    def on_log(self, loads: dict[int, list[float]]) -> None:
        self.loads.append(dict(loads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    for kind, overrides in KINDS.items():
        runs = [record(overrides, seed, asked.steps) for seed in range(asked.seeds)]
        for ranks in RANKS:
            found = [judged(loads, ranks) for loads in runs]
            means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
            results.append({"kind": kind, "ranks": ranks, **means})
            print(results[-1], flush=True)
    head = ["run", "ranks", "as they are", "at random", "by recorded load", "by the load to come"]
    rows = [
        [str(one["kind"]), str(one["ranks"]), *(f"{one[key]:.3f}" for key in ("contiguous", "random", "load", "best"))]
        for one in results
    ]
    told = (
        f"\ntiny_moe with {EXPERTS} experts, {asked.steps} steps, means over {asked.seeds} seeds: `rank_violation` of "
        "the second half of the steps, one by one; the order by load is chosen by the quarter before.\n"
    )
    write_results(asked.output, "placement", machine(), results, [told, markdown_table(head, rows), ""])


def record(overrides: list[str], seed: int, steps: int) -> Loads:
    """The loads of every step of one run."""
    recorder = Record()
    with tempfile.TemporaryDirectory() as folder:
        moelab.train(
            str(ROOT / "configs/train/tiny_moe.yaml"), f"run_dir={folder}/run", f"train.steps={steps}", f"seed={seed}",
            f"model.moe.layout.num_experts={EXPERTS}", "train.log_every=1", "train.gradient_shares_every=0",
            "train.probe_every=0", "observers=[]", "evaluation.sequences=2", "evaluation.sample_tokens=0",
            "train.batch_size=8", "train.sequence_length=128", *overrides, observers=[recorder], progress=False,
        )  # fmt: skip
    return recorder.loads


def judged(loads: Loads, ranks: int) -> dict[str, float]:
    """{order: mean rank violation over the steps of the second half, and over layers}."""
    half = len(loads) // 2
    seen, unseen = loads[half // 2 : half], loads[half:]
    draw = random.Random(0)
    found: dict[str, list[float]] = {"contiguous": [], "random": [], "load": [], "best": []}
    for layer in loads[0]:
        known, coming = (mean([step[layer] for step in part]) for part in (seen, unseen))
        orders = {
            "contiguous": contiguous(known, ranks),
            "random": draw.sample(range(EXPERTS), EXPERTS),
            "load": by_load(known, ranks),
            "best": by_load(coming, ranks),
        }
        for name, order in orders.items():
            found[name] += [violation(step[layer], order, ranks) for step in unseen]
    return {name: statistics.mean(values) for name, values in found.items()}


def mean(rows: list[list[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


if __name__ == "__main__":
    main()
