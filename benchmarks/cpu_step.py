"""The training step on the CPU beside transformers' Qwen2-MoE: same weights, data and optimizer.

    python benchmarks/cpu_step.py --out benchmarks/results
    python benchmarks/cpu_step.py --shape 64:6:96 --hidden 384 --dtype float32

Each side lives in a process of its own, since one process has one allocator: moelab keeps freed memory, as its
trainer does; transformers runs as its users run it, and once more with memory kept. All are warmed up and take
turns, step by step, and so does a large matmul, which says what the machine gives at that moment. A step is
forward, backward, clipping and fused AdamW. FLOPs are the model's (moelab.nn.count), the same for all sides.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hf.names import pieces
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.count import flops_per_token
from report import machine, markdown_table, median, spread, write_results

MATMUL = 2048  # rows and columns of the matmul that everything is measured against
WARM_UP = 2  # rounds


@dataclass(frozen=True)
class Shape:
    """One model and batch."""

    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    hidden: int = 256
    layers: int = 4
    shared: int = 512
    vocab: int = 4096
    batch: int = 8
    sequence: int = 512
    tied: bool = False  # the head is the embedding

    @property
    def title(self) -> str:
        return (
            f"{self.num_experts} experts, top-{self.num_experts_per_tok}, width {self.moe_intermediate_size}; hidden "
            f"{self.hidden}, {self.layers} layers, shared {self.shared}, vocabulary {self.vocab}"
            f"{', tied' if self.tied else ''}, {self.batch} x {self.sequence} tokens"
        )


@dataclass(frozen=True)
class Side:
    """One implementation under one allocator."""

    name: str
    peer: str | None  # transformers' experts_implementation; None: moelab
    keep_memory: bool


@dataclass(frozen=True)
class Trained:
    """A side's model, its optimizer, and how its loss is computed."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor], Tensor]


SIDES = (
    Side("moelab", None, True),
    Side("transformers eager", "eager", False),
    Side("transformers grouped_mm", "grouped_mm", False),
    Side("transformers eager, memory kept", "eager", True),
    Side("transformers grouped_mm, memory kept", "grouped_mm", True),
)
HOPELESS = 1.5  # a side this many times slower than the best of its kind is left out after warming up


def main() -> None:
    options = _options()
    if int(transformers.__version__.split(".")[0]) < 5:
        print(
            f"transformers {transformers.__version__} computes experts in one way; the sides need 5.0 or later; "
            "nothing was measured and nothing written"
        )
        sys.exit(2)
    torch.set_num_threads(options.threads)
    results = []
    for experts, top_k, width in options.shape:
        shape = Shape(experts, top_k, width, options.hidden, options.layers, options.shared, options.vocab,
                      options.batch, options.sequence, options.tied)  # fmt: skip
        for result in _measure(shape, options):
            results.append(result)
            print(_table(result), flush=True)
    if options.out:
        facts = machine() | {"threads": options.threads}
        write_results(Path(options.out), "cpu_step", facts, results, [_table(r) for r in results])


def _measure(shape: Shape, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All sides in turn, one dtype after the other."""
    context = get_context("spawn")
    pipes, processes = {}, []
    for side in (side for side in SIDES if side.name in options.sides):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(side, shape, options.backend, options.threads, theirs), daemon=True
        )
        process.start()
        theirs.close()  # else a side that dies leaves us waiting for it
        processes.append(process)
        pipes[side.name] = ours
    ready = {name: pipe.recv() for name, pipe in pipes.items()}
    for dtype in options.dtype:
        yield _take_turns(shape, dtype, dict(pipes), ready, options.rounds)
    for process in processes:
        process.terminate()
        process.join()


def _take_turns(
    shape: Shape, dtype: str, pipes: dict[str, Any], ready: dict[str, tuple[float, float]], rounds: int
) -> dict[str, Any]:
    """A step of each side and a matmul, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    rates = []
    for turn in range(rounds + WARM_UP):
        if turn == WARM_UP:
            _drop_hopeless(pipes, seconds)
        for name, pipe in pipes.items():
            pipe.send((turn, dtype))
            seconds[name].append(pipe.recv())
        rates.append(_matmul_rate())
        print(f"{dtype}, round {turn + 1} of {rounds + WARM_UP}", file=sys.stderr, flush=True)
    pipes["moelab"].send(None)
    chosen = [line for line in pipes["moelab"].recv() if dtype in line or "cpu " not in line]
    result = _summary(shape, {name: seconds[name][WARM_UP:] for name in pipes}, median(rates[WARM_UP:]), ready)
    return result | {"dtype": dtype, "backend": chosen, "rounds": rounds}


def _drop_hopeless(pipes: dict[str, Any], seconds: dict[str, list[float]]) -> None:
    for keep in (False, True):
        peers = [side.name for side in SIDES if side.peer and side.keep_memory == keep and side.name in pipes]
        best = min((seconds[name][-1] for name in peers), default=0.0)
        for name in peers:
            if seconds[name][-1] > HOPELESS * best:
                del pipes[name]


def _summary(
    shape: Shape, seconds: dict[str, list[float]], rate: float, ready: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    tokens, flops = shape.batch * shape.sequence, ready["moelab"][1]
    sides = {
        name: {
            "tokens_per_second": tokens / median(values),
            "spread": [tokens / value for value in spread(values)],
            "of_matmul_rate": tokens / median(values) * flops / rate,
            "first_loss": ready[name][0],
        }
        for name, values in seconds.items()
    }
    speedups = {}
    for keep, label in ((False, "as shipped"), (True, "memory kept")):
        peers = [side.name for side in SIDES if side.peer and side.keep_memory == keep and side.name in seconds]
        if not peers:
            continue
        best = min(peers, key=lambda name: median(seconds[name]))
        pairs = zip(seconds[best], seconds["moelab"], strict=True)
        speedups[label] = {"peer": best, "speedup": median([theirs / ours for theirs, ours in pairs])}
    return {
        "shape": asdict(shape), "title": shape.title, "mflop_per_token": flops / 1e6, "matmul_gflops": rate / 1e9,
        "sides": sides, "speedups": speedups, "left_out": [name for name in ready if name not in seconds],
    }  # fmt: skip


def _serve(side: Side, shape: Shape, backend: str, threads: int, pipe: Any) -> None:
    """A side's process: its first loss, then for each (batch, dtype) a step's seconds, for None its backends."""
    torch.set_num_threads(threads)
    if side.keep_memory:
        keep_freed_memory()
    ours = moelab.build(_config(shape, backend), seed=0)
    flops = flops_per_token(ours, shape.sequence)
    trained = _trained(ours, shape, side.peer)
    with torch.no_grad():
        first = float(trained.loss(_batch(shape, 0)))  # fp32, before any update
    pipe.send((first, flops))
    while True:
        asked = pipe.recv()
        pipe.send(_backends(ours) if asked is None else _step(trained, _batch(shape, asked[0]), asked[1]))


def _batch(shape: Shape, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, shape.vocab, (shape.batch, shape.sequence), generator=generator)


def _trained(ours: torch.nn.Module, shape: Shape, peer: str | None) -> Trained:
    if peer is None:
        return Trained(ours, _adamw(ours), lambda ids: _our_loss(ours, ids))
    theirs = _peer(shape, peer, ours)
    return Trained(theirs, _adamw(theirs), lambda ids: theirs(ids, labels=ids).loss)


def _config(shape: Shape, backend: str) -> ModelConfig:
    layout = {
        "name": "uniform",
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "moe_intermediate_size": shape.moe_intermediate_size,
    }
    moe = MoEConfig(
        layout=layout, shared_expert={"name": "gated", "intermediate_size": shape.shared}, backend={"name": backend}
    )
    return ModelConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=shape.tied, moe=moe,
    )  # fmt: skip


def _peer(shape: Shape, experts: str, ours: torch.nn.Module) -> torch.nn.Module:
    """transformers' model with our weights."""
    config = Qwen2MoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2, num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok, moe_intermediate_size=shape.moe_intermediate_size,
        shared_expert_intermediate_size=shape.shared, norm_topk_prob=False, rope_theta=1e6, use_cache=False,
        tie_word_embeddings=shape.tied, attn_implementation="sdpa", experts_implementation=experts,
    )  # fmt: skip
    theirs = Qwen2MoeForCausalLM(config)
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            for piece in pieces(name, tuple(tensor.shape), fused=True):
                state.pop(piece.name).copy_(piece.view(tensor))
    assert not state, f"transformers has tensors that we lack: {sorted(state)}"
    return theirs.train()


def _our_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The mean over all but the first token of each sequence, as transformers computes it."""
    ignored = ids.new_full((ids.shape[0], 1), -100)
    targets = torch.cat([ids[:, 1:], ignored], 1)
    return model(ids, targets=targets).token_loss.sum() / (targets >= 0).sum()


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def _step(trained: Trained, ids: Tensor, dtype: str) -> float:
    started = time.perf_counter()
    trained.optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = trained.loss(ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.model.parameters(), 1.0)
    trained.optimizer.step()
    return time.perf_counter() - started


def _matmul_rate() -> float:
    """FLOP/s of one large fp32 matmul."""
    a = torch.ones(MATMUL, MATMUL)
    out = torch.empty_like(a)
    started = time.perf_counter()
    torch.mm(a, a, out=out)
    return 2 * MATMUL**3 / (time.perf_counter() - started)


def _backends(model: torch.nn.Module) -> list[str]:
    backend = model.layers[0].mlp.backend
    return [f"{key}: {value}" for key, value in getattr(backend, "choices", {}).items()] or [backend.name]


def _table(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{side['tokens_per_second']:.0f}",
            " .. ".join(f"{value:.0f}" for value in side["spread"]),
            f"{100 * side['of_matmul_rate']:.0f} %",
            f"{side['first_loss']:.6f}",
        ]
        for name, side in result["sides"].items()
    ]
    head = ["", "tokens/s (median)", "quartiles", "model FLOP/s of the fp32 matmul rate", "first loss (fp32)"]
    lines = [
        f"moelab / {found['peer']} ({label}), median of {result['rounds']} rounds: {found['speedup']:.2f} x"
        for label, found in result["speedups"].items()
    ]
    if result["left_out"]:
        lines.append(f"left out after warming up, {HOPELESS:g} times slower or more: {', '.join(result['left_out'])}")
    return (
        f"\n{result['title']}; {result['dtype']}; {result['mflop_per_token']:.1f} MFLOP a token; fp32 matmul "
        f"{result['matmul_gflops']:.0f} GFLOP/s; {', '.join(result['backend'])}\n\n"
        + markdown_table(head, rows)
        + "\n\n"
        + "\n\n".join(lines)
        + "\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    triple = lambda text: tuple(int(part) for part in text.split(":"))  # noqa: E731
    parser.add_argument("--shape", type=triple, nargs="+", default=[(32, 4, 128), (128, 8, 64)],
                        help="EXPERTS:TOP_K:WIDTH")  # fmt: skip
    for name, value in {"hidden": 256, "layers": 4, "shared": 512, "vocab": 4096, "batch": 8, "sequence": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    names = [side.name for side in SIDES]
    parser.add_argument("--sides", nargs="+", choices=names, default=names, metavar="SIDE", help=", ".join(names[1:]))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for cpu_step.json and cpu_step.md")
    options = parser.parse_args()
    options.sides = list(dict.fromkeys(["moelab", *options.sides]))
    return options


if __name__ == "__main__":
    main()
