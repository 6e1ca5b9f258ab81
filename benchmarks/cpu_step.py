"""The training step on the CPU beside transformers' Qwen2-MoE: same weights, data and optimizer, one process.

    python benchmarks/cpu_step.py --out benchmarks/results
    python benchmarks/cpu_step.py --shape 64:6:96 --hidden 384 --dtype float32

All sides are warmed up and take turns, step by step, and so does a large matmul, which says what the machine
gives at that moment. A step is forward, backward, clipping and fused AdamW. FLOPs are the model's
(moelab.nn.count), the same for all sides.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hf.names import pieces
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.count import flops_per_token
from report import machine, markdown_table, median, spread, write_results

MATMUL = 2048  # rows and columns of the matmul that everything is measured against
PEERS = ("eager", "grouped_mm")  # transformers' experts_implementation


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

    @property
    def title(self) -> str:
        return (
            f"{self.num_experts} experts, top-{self.num_experts_per_tok}, width {self.moe_intermediate_size}; hidden "
            f"{self.hidden}, {self.layers} layers, shared {self.shared}, vocabulary {self.vocab}, "
            f"{self.batch} x {self.sequence} tokens"
        )


@dataclass(frozen=True)
class Side:
    """One implementation: its model, its optimizer, and how its loss is computed."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor], Tensor]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if not options.default_allocator:
        keep_freed_memory()
    results = []
    for experts, top_k, width in options.shape:
        shape = Shape(experts, top_k, width, options.hidden, options.layers, options.shared, options.vocab,
                      options.batch, options.sequence)  # fmt: skip
        for dtype in options.dtype:
            results.append(_measure(shape, dtype, options.backend, options.rounds))
            print(_table(results[-1]), flush=True)
    if options.out:
        facts = machine() | {"threads": options.threads, "memory_kept": not options.default_allocator}
        write_results(Path(options.out), "cpu_step", facts, results, [_table(r) for r in results])


def _measure(shape: Shape, dtype: str, backend: str, rounds: int) -> dict:
    sides, flops = _sides(shape, backend)
    batches = [torch.randint(0, shape.vocab, (shape.batch, shape.sequence)) for _ in range(rounds + 2)]
    with torch.no_grad():
        first = {side.name: float(side.loss(batches[0])) for side in sides}  # fp32, before any update
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    rates: list[float] = []
    for batch in batches:
        for side in sides:
            seconds[side.name].append(_step(side, batch, dtype))
        rates.append(_matmul_rate())
    tokens = shape.batch * shape.sequence
    warm = {name: values[2:] for name, values in seconds.items()}
    rate = median(rates[2:])
    rows = {
        name: {
            "tokens_per_second": tokens / median(values),
            "spread": [tokens / value for value in spread(values)],
            "of_matmul_rate": tokens / median(values) * flops / rate,
            "first_loss": first[name],
        }
        for name, values in warm.items()
    }
    best = min(PEERS, key=lambda name: median(warm[f"transformers {name}"]))
    pairs = zip(warm[f"transformers {best}"], warm["moelab"], strict=True)
    return {
        "shape": asdict(shape), "title": shape.title, "dtype": dtype, "mflop_per_token": flops / 1e6,
        "matmul_gflops": rate / 1e9, "sides": rows, "best_peer": best, "rounds": rounds,
        "speedup": median([theirs / ours for theirs, ours in pairs]),
        "backend": _backends(sides[0].model),
    }  # fmt: skip


def _sides(shape: Shape, backend: str) -> tuple[list[Side], float]:
    ours = moelab.build(_config(shape, backend), seed=0)
    sides = [Side("moelab", ours, _adamw(ours), lambda ids: _our_loss(ours, ids))]
    for peer in PEERS:
        theirs = _peer(shape, peer, ours)
        sides.append(
            Side(f"transformers {peer}", theirs, _adamw(theirs), lambda ids, m=theirs: m(ids, labels=ids).loss)
        )
    return sides, flops_per_token(ours, shape.sequence)


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
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2, moe=moe,
    )  # fmt: skip


def _peer(shape: Shape, experts: str, ours: torch.nn.Module) -> torch.nn.Module:
    """transformers' model with our weights."""
    config = Qwen2MoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2, num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok, moe_intermediate_size=shape.moe_intermediate_size,
        shared_expert_intermediate_size=shape.shared, norm_topk_prob=False, rope_theta=1e6, use_cache=False,
        tie_word_embeddings=False, attn_implementation="sdpa", experts_implementation=experts,
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


def _step(side: Side, ids: Tensor, dtype: str) -> float:
    started = time.perf_counter()
    side.optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = side.loss(ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
    side.optimizer.step()
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


def _table(result: dict) -> str:
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
    return (
        f"\n{result['title']}; {result['dtype']}; {result['mflop_per_token']:.1f} MFLOP a token; fp32 matmul "
        f"{result['matmul_gflops']:.0f} GFLOP/s; {', '.join(result['backend'])}\n\n"
        + markdown_table(head, rows)
        + f"\n\nmoelab / transformers {result['best_peer']}, median of {result['rounds']} rounds: "
        f"{result['speedup']:.2f} x\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    triple = lambda text: tuple(int(part) for part in text.split(":"))  # noqa: E731
    parser.add_argument("--shape", type=triple, nargs="+", default=[(32, 4, 128), (128, 8, 64)],
                        help="EXPERTS:TOP_K:WIDTH")  # fmt: skip
    for name, value in {"hidden": 256, "layers": 4, "shared": 512, "vocab": 4096, "batch": 8, "sequence": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--default-allocator", action="store_true", help="let malloc return memory after each use")
    parser.add_argument("--out", help="folder for cpu_step.json and cpu_step.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
