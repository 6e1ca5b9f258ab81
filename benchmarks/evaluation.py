"""How fast held-out loss is measured, by the sequences in a forward pass, and what its batch size does to the numbers.

    python benchmarks/evaluation.py [CONFIG... KEY=VALUE...] [--sizes 1 2 4 ...] [--rounds 3] [--output FOLDER]

Times are processor seconds of this process, which another process on the same core stretches less than wall time;
sizes take turns, and the median of the rounds counts. Weights are random. `default` is what a run without
`evaluation.batch_size` takes. The last column is the largest relative change of any document's nats against size 1.
Below: tokens of the default beside those of a training step of the same run (forward, backward, clipping, optimizer),
and what the routers' statistics take of an evaluation: the same without them, in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.data.batches import ValidationBatches
from moelab.moe.block import MoEBlock
from moelab.moe.routing import LayerRecord
from moelab.registry import Registry
from moelab.training.evaluate import evaluate
from moelab.training.setup import prepare
from moelab.training.step import train_step
from report import machine, markdown_table, median, write_results

DEMO = "configs/experiments/demo/upcycled.yaml"
CONFIGS = [DEMO, "train.init_from=null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", default=CONFIGS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 96])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    loaded = load_config([*options.config, "train.threads=1", "evaluation.batch_size=null"], RunConfig)
    config = loaded.config
    setup = prepare(config, Registry(config.plugins))
    default = setup.validation.batch_size
    rows = measure(setup, sorted({*options.sizes, default}), options.rounds)
    for row in rows:
        row["default"] = row["sequences"] == default
    beside = beside_training(setup, default, options.rounds)
    tables = [_table(rows), _beside(beside)]
    print("\n".join(tables))
    if options.output:
        facts = machine() | {
            "threads": 1,
            "config": " ".join(options.config),
            "sequence_length": config.train.sequence_length,
        }
        write_results(options.output, "evaluation", facts | beside, rows, tables)


def measure(setup: Any, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row a batch size: processor seconds of an evaluation, tokens a second, and how far documents moved."""
    old, precision = setup.validation, setup.step_settings.precision
    batches = {size: ValidationBatches(old.stream, len(old.windows), old.sequence_length, size) for size in sizes}
    nats, seconds = {}, {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes:
            begun = time.process_time()
            nats[size] = evaluate(setup.model, batches[size], precision).nats
            if turn:  # the first warms up
                seconds[size].append(time.process_time() - begun)
    tokens = len(old.windows) * old.sequence_length
    first = nats[sizes[0]]
    read = first > 0
    return [
        {"sequences": size, "seconds": median(seconds[size]), "tokens_per_second": tokens / median(seconds[size]),
         "moved": float(np.max(np.abs(nats[size][read] / first[read] - 1)))}
        for size in sizes
    ]  # fmt: skip


def beside_training(setup: Any, size: int, rounds: int) -> dict[str, float]:
    """Tokens a processor second of a training step and of an evaluation, and the share of the routers' statistics."""
    batches = ValidationBatches(
        setup.validation.stream, len(setup.validation.windows), setup.validation.sequence_length, size
    )
    record = MoEBlock._record
    seconds: dict[str, list[float]] = {"step": [], "evaluation": [], "without": []}
    for turn in range(rounds + 1):
        batch = setup.batches.batch(turn)
        times = {}
        begun = time.process_time()
        train_step(setup.model, setup.optimizer, setup.balance_losses, batch, turn, setup.step_settings)
        times["step"] = time.process_time() - begun
        for name in ("evaluation", "without"):
            MoEBlock._record = record if name == "evaluation" else _no_statistics
            begun = time.process_time()
            evaluate(setup.model, batches, setup.step_settings.precision)
            times[name] = time.process_time() - begun
        MoEBlock._record = record
        for name, value in times.items():
            seconds[name] += [value] if turn else []  # the first warms up
    tokens = len(setup.validation.windows) * setup.validation.sequence_length
    step, evaluation, without = (median(seconds[name]) for name in ("step", "evaluation", "without"))
    return {
        "training_tokens_per_second": batch.token_count / step,
        "evaluation_tokens_per_second": tokens / evaluation,
        "statistics_share": 1 - without / evaluation,
    }


def _no_statistics(block: MoEBlock, routing: Any, *rest: Any) -> LayerRecord:
    return LayerRecord(block.layer_id, routing, routing.expert[:0])


def _beside(found: dict[str, float]) -> str:
    ours, step = found["evaluation_tokens_per_second"], found["training_tokens_per_second"]
    return (
        f"evaluation {ours:,.0f} tokens/s, training step {step:,.0f}: {ours / step:.2f} x; routers' statistics "
        f"{100 * found['statistics_share']:.1f} % of an evaluation"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    best = max(row["tokens_per_second"] for row in rows)
    body = [
        [f"{row['sequences']}{' (default)' if row['default'] else ''}", f"{row['seconds']:.2f}",
         f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / best:.2f}", f"{row['moved']:.1e}"]
        for row in rows
    ]  # fmt: skip
    return markdown_table(["sequences at once", "seconds", "tokens/s", "of the best", "documents moved"], body)


if __name__ == "__main__":
    main()
