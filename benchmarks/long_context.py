"""What long sequences cost: time of the attentions beside torch's own kernel, of decoding, and peak memory by length.

    python benchmarks/long_context.py time --threads 2          # forward, forward and backward, 4,096 to 16,384
    python benchmarks/long_context.py decode --threads 2
    python benchmarks/long_context.py memory                    # a process for each figure

Rounds are interleaved and the medians of ratios within a round are told, since a machine is seldom idle.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moelab
from moelab.builder import reposition
from moelab.config.model import ModelConfig
from moelab.hookspecs import ATTENTIONS
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs
from moelab.nn.full_attention import torch_attention
from moelab.nn.kv_cache import KVCache
from moelab.nn.rope import Rope, rotate

HEADS, WIDTH, TRAINED, VOCABULARY = 4, 64, 4096, 512
PARTS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "dual_chunk": {"name": "dual_chunk"},
    "sliding_window": {"name": "sliding_window", "window": 1024},
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}  # the second for busy machines, with one thread
CLOCK = "wall"
REGISTRY = moelab.Registry(entry_points=False)


def config() -> ModelConfig:
    """Four layers of width 256, dense."""
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * WIDTH, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=TRAINED,
    )  # fmt: skip


def attentions(length: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Each turns query and key [1, H, S, d] itself; `torch` is scaled_dot_product_attention of turned ones."""
    context = AttentionContext(WIDTH, HEADS, HEADS, 0, 1, TRAINED)
    rope, positions = Rope(WIDTH, 1e6), torch.arange(length)[None]

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cos, sin = rope.tables(positions, query.dtype)
        return torch_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, None)

    def run(part: dict[str, Any], **more: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        kernel = REGISTRY.build(ATTENTIONS, part, context, "attention")
        return lambda q, k, v: kernel(q, k, v, AttentionInputs(rope, positions, q.dtype, **more))

    found = {"torch": plain} | {name: run(part) for name, part in PARTS.items()}
    for size in (length, 512):
        documents = (torch.arange(length) // size)[None]
        found[f"full, documents of {size}"] = run(PARTS["full"], documents=documents)
    found["dual_chunk, documents of 512"] = run(PARTS["dual_chunk"], documents=documents)
    return found


def clock() -> float:
    return CLOCKS[CLOCK]()


def once(call: Callable[[Tensor, Tensor, Tensor], Tensor], heads: list[Tensor], backward: bool) -> float:
    started = clock()
    if backward:
        call(*heads).sum().backward()
    else:
        with torch.no_grad():
            call(*heads)
    return clock() - started


def told_time(rounds: int, lengths: list[int]) -> None:
    """Seconds of torch's kernel, and how many times as long each attention takes."""
    print("| positions | pass | attention | times torch's | seconds of torch's |\n|---|---|---|---|---|")
    for length in lengths:
        heads = [torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3)]
        calls = attentions(length)
        for backward in (False, True):
            ratios: dict[str, list[float]] = {name: [] for name in calls}
            base: list[float] = []
            for _ in range(rounds):
                seconds = {name: once(call, heads, backward) for name, call in calls.items()}
                base.append(seconds["torch"])
                for name, value in seconds.items():
                    ratios[name].append(value / seconds["torch"])
            what = "forward and backward" if backward else "forward"
            for name, found in ratios.items():
                if name != "torch":
                    median = statistics.median(found)
                    print(f"| {length} | {what} | {name} | {median:.2f} | {statistics.median(base):.3f} |", flush=True)


@torch.no_grad()
def told_decode(rounds: int, length: int) -> None:
    """Milliseconds a token of a model that continues `length` tokens, by attention."""
    model = moelab.build_model(config(), REGISTRY, seed=0).eval()
    ids = torch.randint(0, VOCABULARY, (1, length))
    caches: dict[str, KVCache] = {}
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    for name, part in PARTS.items():
        reposition(model, REGISTRY, attention=part)
        caches[name] = KVCache(4)
        model(ids, cache=caches[name], head=False)
    for _ in range(rounds):
        for name, part in PARTS.items():
            reposition(model, REGISTRY, attention=part)
            model(ids[:, :1], cache=caches[name])
            started = clock()
            for _ in range(8):
                model(ids[:, :1], cache=caches[name])
            seconds[name].append((clock() - started) / 8)
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds["full"], strict=True))
        print(f"| {name} | {length} tokens cached | {1000 * statistics.median(found):.2f} ms a token | {ratio:.2f} |")


def one_memory(name: str, length: int, backward: bool) -> None:
    """Peak memory of this process above what it had before, in MB."""
    part, documents = name.removesuffix(", packed"), None
    model = moelab.build_model(config(), REGISTRY, seed=0)
    reposition(model, REGISTRY, attention=PARTS[part])
    if name.endswith("packed"):
        documents = (torch.arange(length) // 512)[None]
    ids = torch.randint(0, VOCABULARY, (1, length))
    model(ids[:, :64], targets=ids[:, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.set_grad_enabled(backward):
        loss = model(ids, targets=ids, tokens=moelab.TokenContext(attention_id=documents)).token_loss.sum()
        if backward:
            loss.backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def told_memory(lengths: list[int]) -> None:
    """Of the 4-layer model of width 256; linear where twice the length takes at most twice the memory."""
    print("| pass | attention | " + " | ".join(map(str, lengths)) + " |\n|---|---|" + "---|" * len(lengths))
    for backward in (False, True):
        for name in (*PARTS, "full, packed", "dual_chunk, packed"):
            row = []
            for length in lengths:
                arguments = [sys.executable, __file__, "one", name, str(length), str(int(backward))]
                row.append(float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
            cells = " | ".join(f"{value:.0f} MB" for value in row)
            print(f"| {'forward and backward' if backward else 'forward'} | {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["time", "decode", "memory", "one"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a busy machine, --threads 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=lambda text: [int(piece) for piece in text.split(",")])
    given = parser.parse_args()
    globals()["CLOCK"] = given.clock
    torch.set_num_threads(given.threads)
    if given.what == "one":
        one_memory(given.rest[0], int(given.rest[1]), bool(int(given.rest[2])))
    elif given.what == "time":
        told_time(given.rounds, given.lengths or [4096, 8192, 16384])
    elif given.what == "decode":
        told_decode(given.rounds, (given.lengths or [8192])[0])
    else:
        told_memory(given.lengths or [4096, 8192, 16384, 32768])


if __name__ == "__main__":
    main()
