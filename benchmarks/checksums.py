"""What the checksums of a checkpoint cost: a save with and without them, in pairs, in one process.

    python benchmarks/checksums.py                          # 1 GB into the temporary folder, results/ is rewritten
    python benchmarks/checksums.py --folder /dev/shm        # without a disk, where nothing hides them

A pair saves the same model, moments and state twice, once with xxh3-128 of every byte and once with a hash that does
nothing; which comes first alternates. The figure is the median over pairs of (with - without) / without, beside the
middle half of the pairs: of the whole save, and of the save without its syncs, since what a disk takes for these varies
far more than what is measured. Then what it takes to verify such a checkpoint, beside reading its weights.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moelab import tensor_file
from moelab.builder import build_model, resolve_model
from moelab.checkpoint import load_model_tensors
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.integrity import Finding, inspect
from moelab.nn.transformer import Transformer
from moelab.registry import Registry
from moelab.training import checkpoint
from moelab.training.checkpoint import TrainingState, save_checkpoint
from moelab.training.optimizer import build_adamw
from report import machine, markdown_table, median, write_results

HERE = Path(__file__).resolve().parent
HIDDEN, EXPERTS, WIDTH = 512, 64, 128


class NoHash:
    """Takes the bytes and does nothing."""

    def update(self, data: object) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


def model_of(nbytes: float) -> Transformer:
    """Whose checkpoint, float32 with two moments, has about `nbytes`."""
    of_a_layer = EXPERTS * 3 * HIDDEN * WIDTH + 4 * HIDDEN * HIDDEN
    layers = round(nbytes / 12 / of_a_layer) or 1
    config = ModelConfig(
        vocab_size=2048, hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
        moe=MoEConfig(
            layout={
                "name": "uniform", "num_experts": EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": WIDTH
            },
            router={"name": "softmax_topk"},
        ),
    )  # fmt: skip
    registry = Registry(entry_points=False)
    resolve_model(config, registry)
    return build_model(config, registry, seed=0)


def save(folder: Path, model: Transformer, training: TrainingState, *, hashed: bool) -> tuple[float, float]:
    """(seconds of a save, of these in syncs)."""
    running, sync, waited = tensor_file.running, checkpoint.sync, [0.0]

    def timed_sync(path: Path) -> None:
        began = time.perf_counter()
        sync(path)
        waited[0] += time.perf_counter() - began

    checkpoint.sync = timed_sync
    tensor_file.running = running if hashed else NoHash  # type: ignore[assignment]
    began = time.perf_counter()
    try:
        save_checkpoint(folder, model, training, {"step": 1}, {"config.yaml": b"{}\n"})
    finally:
        tensor_file.running, checkpoint.sync = running, sync
    return time.perf_counter() - began, waited[0]


def in_pairs(folder: Path, model: Transformer, training: TrainingState, pairs: int) -> list[dict[str, Any]]:
    rows = []
    for pair in range(-1, pairs):  # the first warms memory and page cache up
        found = {}
        for hashed in (True, False) if pair % 2 else (False, True):
            shutil.rmtree(folder, ignore_errors=True)
            found["with" if hashed else "without"] = save(folder, model, training, hashed=hashed)
        rows.append(found)
    return rows[1:]


def reading(folder: Path, model: Transformer) -> tuple[Finding, float, float]:
    """(what was found, seconds to verify, seconds to read the weights), from the page cache."""
    verifying, loading = [], []
    for _ in range(5):
        began = time.perf_counter()
        finding = inspect(folder)
        verifying.append(time.perf_counter() - began)
        assert not finding.problems, finding
        began = time.perf_counter()
        load_model_tensors(folder, model)
        loading.append(time.perf_counter() - began)
    return finding, median(verifying), median(loading)


def in_percent(values: list[float]) -> str:
    """Median and middle half."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(options.gigabytes * 1e9)
    optimizer = build_adamw(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    training = TrainingState(optimizer, [])
    place = Path(tempfile.mkdtemp(prefix="checksums-", dir=options.folder))
    try:
        rows = in_pairs(place / "step", model, training, options.pairs)
        save(place / "step", model, training, hashed=True)
        finding, verifying, loading = reading(place / "step", model)
    finally:
        shutil.rmtree(place)
    whole = [row["with"][0] / row["without"][0] - 1 for row in rows]
    unsynced = [(row["with"][0] - row["with"][1]) / (row["without"][0] - row["without"][1]) - 1 for row in rows]
    table = [
        ["size", f"{finding.nbytes / 1e9:.3f} GB, {finding.tensors} tensors"],
        ["a save without checksums", f"{median([row['without'][0] for row in rows]):.2f} s"],
        ["checksums, of the whole save", in_percent(whole)],
        ["checksums, of the save without its syncs", in_percent(unsynced)],
        ["verifying, from the page cache", f"{verifying:.2f} s, {finding.nbytes / verifying / 1e9:.1f} GB/s"],
        ["reading the weights, a third of it", f"{loading:.2f} s"],
    ]
    facts = machine() | {"folder": str(options.folder), "pairs": len(rows)}
    results = {"bytes": finding.nbytes, "pairs": rows, "verifying": verifying, "loading": loading}
    text = markdown_table(["what", "median (middle half)"], table)
    print(text)
    write_results(options.out, "checksums", facts, results, ["", text])


if __name__ == "__main__":
    main()
