"""`train.autotune` on this machine: what it chooses otherwise than constants do, what it costs, and what a step gains.

    python benchmarks/autotune.py --out benchmarks/results
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/autotune.py --shape 16:2:256:384 --dtype float32 --threads 1

One process, one model: steps by the constants' ways and by the measured ones take turns.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import moelab
from moelab.registry import Registry
from moelab.training.autotune import measure_ways
from moelab.training.setup import Setup, prepare
from moelab.training.step import train_step
from moelab.ways import Measuring, Ways, using
from report import machine, markdown_table, median, write_results

SHAPES = ("32:4:128:256", "128:8:64:256", "16:2:256:384", "8:2:512:512", "64:8:32:128")


@dataclass(frozen=True)
class Shape:
    """Experts, top-K, expert width, hidden size; then what all shapes share."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    hidden: int
    batch: int = 8
    sequence: int = 512

    @property
    def title(self) -> str:
        return (
            f"{self.num_experts} x {self.moe_intermediate_size} top-{self.num_experts_per_tok}, hidden {self.hidden}, "
            f"{self.batch} x {self.sequence}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="EXPERTS:TOPK:WIDTH:HIDDEN")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="folder for autotune.json and autotune.md")
    options = parser.parse_args()
    logging.getLogger("moelab").setLevel(logging.ERROR)
    results = []
    for text in options.shape:
        shape = Shape(*map(int, text.split(":")), options.batch, options.sequence)
        for dtype in options.dtype:
            results.append(_measured(shape, dtype, options.threads, options.rounds))
            print(_table(results[-1:]), file=sys.stderr, flush=True)
    tables = [_table(results), "", *_choices(results)]
    print("\n".join(tables))
    if options.out:
        write_results(Path(options.out), "autotune", machine() | {"threads": options.threads}, results, tables)


def _setup(shape: Shape, dtype: str, threads: int, folder: str) -> Setup:
    config = moelab.load_config(
        f"run_dir={folder}/run", "train.steps=1000", f"train.batch_size={shape.batch}", f"train.dtype={dtype}",
        f"train.sequence_length={shape.sequence}", f"train.threads={threads}", "model.vocab_size=4096",
        f"model.hidden_size={shape.hidden}", "model.intermediate_size=512", "model.num_hidden_layers=4",
        f"model.num_attention_heads={shape.hidden // 64}", f"model.num_key_value_heads={max(shape.hidden // 128, 1)}",
        f"model.max_position_embeddings={shape.sequence}", f"model.moe.layout.num_experts={shape.num_experts}",
        f"model.moe.layout.num_experts_per_tok={shape.num_experts_per_tok}",
        f"model.moe.layout.moe_intermediate_size={shape.moe_intermediate_size}",
        "model.moe.shared_expert.name=gated", "model.moe.shared_expert.intermediate_size=512",
    )  # fmt: skip
    return prepare(config, Registry(config.plugins, config.entry_points, config.places("plugins")))


def _measured(shape: Shape, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        setup = _setup(shape, dtype, threads, folder)
    began = time.perf_counter()
    table = measure_ways(setup, {})
    cost, ways = time.perf_counter() - began, Ways(table.chosen)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 2):
        for tuned in (False, True) if turn % 2 else (True, False):
            with using(ways if tuned else None):
                seconds[tuned].append(_step(setup, turn))
    plain, tuned = (seconds[each][2:] for each in (False, True))
    others = {problem: _other(table, problem) for problem, found in table.found.items() if found.step is not None}
    return {
        "shape": asdict(shape), "title": shape.title, "dtype": dtype, "measuring": cost, "choices": len(table.chosen),
        "others": others, "taken": sum(table.usual[one] != way for one, way in table.chosen.items()),
        "step": median(plain), "ratios": sorted(b / a for a, b in zip(plain, tuned, strict=True)),
    }  # fmt: skip


def _other(table: Measuring, problem: str) -> dict[str, Any]:
    """A way that was faster alone than the usual one."""
    found, usual = table.found[problem], table.usual[problem]
    best = min(found.seconds, key=found.seconds.__getitem__)
    return {"way": best, "usual": usual, "of": found.seconds[best] / found.seconds[usual], "step": found.step}


def _step(setup: Setup, step: int) -> float:
    batch = setup.batches.batch(step)
    began = time.perf_counter()
    train_step(setup.model, setup.optimizer, setup.balance_losses, batch, step, setup.step_settings)
    return time.perf_counter() - began


def _table(results: list[dict[str, Any]]) -> str:
    head = [
        "shape",
        "dtype",
        "measuring, s",
        "choices",
        "faster alone",
        "in passes",
        "a step, s",
        "of it by measured ways",
        "middle half",
    ]
    rows = []
    for each in results:
        ratios, quarter = each["ratios"], len(each["ratios"]) // 4
        rows.append([
            each["title"], each["dtype"], f"{each['measuring']:.1f}", str(each["choices"]), str(len(each["others"])),
            str(each["taken"]), f"{each['step']:.3f}", f"{median(ratios):.3f}",
            f"{ratios[quarter]:.3f} .. {ratios[-1 - quarter]:.3f}",
        ])  # fmt: skip
    return markdown_table(head, rows)


def _choices(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"- {each['title']}, {each['dtype']}: {problem}: {other['way']}, {other['of']:.2f} of {other['usual']}'s time "
        f"alone, {other['step']:.3f} of a step's"
        for each in results
        for problem, other in each["others"].items()
    ]


if __name__ == "__main__":
    main()
