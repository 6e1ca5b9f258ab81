"""What text costs: tokenising beside `tokenizers` itself, and the share of a step in which training waits for data.

    python benchmarks/data_rates.py --work DIR [--mb 20] [--steps 1000] [--out benchmarks/results]

Tokenising: a byte-level BPE of 8,000 tokens, trained here on the installed text; ids and bytes of each document as
`moelab data` makes them, beside `encode_batch` and `encode_batch_fast` of the library, in turn, each on one core.
Waiting: eight domains in eight Megatron files of uneven sizes, mixed by weights that are no round numbers; a real run,
with its own `perf/data_share`; shares are recounted from the domains of the batches' tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from report import machine, markdown_table, median, write_results

DOMAINS = 8
WEIGHTS = {f"domain_{n}": 1 / (n + 1.3) for n in range(DOMAINS)}
ROUNDS = 5
# As benchmarks/cpu_step.py's smallest cell: a step that somebody would wait for.
LARGER = ["model.hidden_size=256", "model.intermediate_size=512", "model.num_hidden_layers=4",
          "model.moe.layout.num_experts=32", "model.moe.layout.num_experts_per_tok=4", "train.sequence_length=512",
          "model.moe.layout.moe_intermediate_size=128", "train.log_every=2", "train.steps=40"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--config", default="train/tiny_moe")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options.work.mkdir(parents=True, exist_ok=True)
    result = tokenising(options.work, options.mb * 1e6) | waiting(options.work, options.config, options.steps)
    table = markdown_table(["figure", "value"], [[key, f"{value:.4g}"] for key, value in result.items()])
    print(table)
    if options.out:
        write_results(options.out, "data_rates", machine(), result, [table])


def tokenising(folder: Path, size: float) -> dict[str, float]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from moelab.data.corpus import encoded
    from moelab.data.tokenizer import load_tokenizer
    from moelab_plugins.data_sources.embedded import READERS, read_domain

    documents = [one for domain in READERS for one in read_domain(domain, 0, int(size / len(READERS)))]
    texts = [document.text for document in documents]
    library: Any = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=8000, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    library.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(str(folder / "tokenizer.json"))
    ways: dict[str, Callable[[], Any]] = {
        "moelab": lambda: list(encoded(documents, ours)),
        "encode_batch": lambda: library.encode_batch(texts, add_special_tokens=False),
        "encode_batch_fast": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            way()
            seconds[name].append(time.process_time() - began)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates = {f"{name}, MB/s": megabytes / min(taken) for name, taken in seconds.items()}  # others only add to it
    return rates | {"moelab / encode_batch": min(seconds["encode_batch"]) / min(seconds["moelab"])}


def waiting(folder: Path, config: str, steps: int) -> dict[str, float]:
    import moelab

    files = {f"domain_{n}": [str(write_megatron(folder / f"domain_{n}", 40_000 * (n + 1), n))] for n in range(DOMAINS)}
    arguments = [
        config, f"data.source={{name: tokens, domains: {spelled(files)}}}", f"train.steps={steps}",
        f"data.mixer={{name: weights, weights: {spelled(WEIGHTS)}}}", f"run_dir={folder / 'run'}", "observers=[]",
        "evaluation.prompts=[]", "evaluation.sequences=8", "train.log_every=10", "train.gradient_shares_every=0",
    ]  # fmt: skip
    run = moelab.load_config(*arguments)
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.rmtree(folder / "larger", ignore_errors=True)
    batches = moelab.prepare(run).batches
    counted, took = np.zeros(DOMAINS, np.int64), []
    for step in range(steps):
        began = time.perf_counter()
        batch = batches.batch(step)
        took.append(time.perf_counter() - began)
        counted += np.bincount(batch.domain_id.numpy().reshape(-1), minlength=DOMAINS)
    asked = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    shares, of_larger = (
        [row["perf/data_share"] for row in moelab.train(one).metrics if "perf/data_share" in row]
        for one in (run, moelab.load_config(*arguments, *LARGER, f"run_dir={folder / 'larger'}"))
    )
    return {
        "batch of 8 domains, ms": 1e3 * median(took),
        "perf/data_share, median": median(shares),
        "perf/data_share, largest": max(shares),
        "perf/data_share of a larger model, median": median(of_larger),
        "steps": steps,
        "largest difference of a share": float(np.abs(counted / counted.sum() - asked).max()),
    }


def write_megatron(base: Path, tokens: int, seed: int) -> Path:
    """Documents of some hundred random bytes, each ended, as Megatron-LM keeps them."""
    chance = np.random.default_rng(seed)
    lengths = chance.integers(50, 900, tokens // 400).astype("<i4")
    ids = chance.integers(0, 256, int(lengths.sum())).astype("<u2")
    ids[np.cumsum(lengths) - 1] = 256
    base.with_suffix(".bin").write_bytes(ids.tobytes())
    pointers = (np.concatenate([[0], np.cumsum(lengths.astype(np.int64))[:-1]]) * 2).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    first = np.arange(len(lengths) + 1).astype("<i8")
    base.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + first.tobytes())
    return base.with_suffix(".bin")


def spelled(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


if __name__ == "__main__":
    main()
