"""`moelab train` on a GPU beside its bare step: what logs, checks, data and the loop itself cost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import moelab
from gpu_common import Bench
from gpu_layer import Part
from moelab.training.step import train_step
from report import markdown_table


def whole_run(bench: Bench) -> Part:
    """Tokens/s of the step alone and of the last logged steps of a run; same model, same batches."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(bench.device.type == "cuda", folder)
        bare = config.train.batch_size * config.train.sequence_length / _step_seconds(bench, config)
        bench.release()
        moelab.train(config, progress=False)
        peak = bench.peak_gb()
        lines = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "perf/tokens_per_second" in line][-1]
    rows = [
        {"side": "the step alone", "tokens_per_second": bare},
        {"side": "moelab train", "tokens_per_second": found["perf/tokens_per_second"], "peak_gb": peak},
    ]
    body = [[str(r["side"]), f"{r['tokens_per_second']:.0f}"] for r in rows]
    return rows, "\nmoelab train, 4 layers of 16 x 1024, hidden 2048\n\n" + markdown_table(
        ["side", "tokens/s"], body
    ) + "\n"


def _config(real: bool, folder: str) -> moelab.RunConfig:
    hidden, layers, experts, width, sequences, positions = (
        (2048, 4, 16, 1024, 8, 2048) if real else (64, 2, 8, 64, 2, 64)
    )
    return moelab.load_config(
        "train/tiny_moe", f"run_dir={folder}/run", f"model.hidden_size={hidden}", f"model.num_hidden_layers={layers}",
        f"model.num_attention_heads={hidden // 32}", f"model.num_key_value_heads={hidden // 64}",
        f"model.intermediate_size={hidden}", f"model.moe.layout.num_experts={experts}",
        f"model.moe.layout.moe_intermediate_size={width}", f"model.moe.shared_expert.intermediate_size={hidden}",
        f"model.max_position_embeddings={positions}", f"train.batch_size={sequences}",
        f"train.sequence_length={positions}", "train.steps=24", "train.log_every=8", "train.dtype=bfloat16",
        "evaluation.sequences=4", "evaluation.sample_tokens=4",
    )  # fmt: skip


def _step_seconds(bench: Bench, config: moelab.RunConfig) -> float:
    run = moelab.prepare(config)

    def step() -> None:
        train_step(run.model, run.optimizer, run.balance_losses, run.batches.batch(0), 0, run.step_settings)

    return bench.seconds(step)
