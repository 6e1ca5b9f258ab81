"""Each part of a training step on the CPU beside its limit, by what the machine gives in the same run.

The limit is FLOPs over the rate of a large matmul in the dtype that the part is computed in, or bytes over the
bandwidth of a large copy, whichever is more.

    python benchmarks/step_parts.py --out benchmarks/results

A part is a module of the model that `cpu_step.py` trains, given what it was given in a real forward pass, timed forward
and backward by itself, times how often it occurs. Bytes are the least: what it reads and writes once, forward and
backward, of parameters and of rows. What the parts don't add up to of the whole step is residual sums, embedding and
autograd between them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moelab
from cpu_step import MATMUL, Shape, Trained, _adamw, _batch, _config, _our_loss, _step
from moelab.kernels.onednn import onednn_is_wider, prefers_onednn, product
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.loss import token_cross_entropy
from moelab.nn.transformer import DecoderLayer, Transformer
from report import machine, markdown_table, median, write_results

SHAPES = (Shape(), Shape(128, 8, 64))
COPIED = 1 << 25  # numbers of the copy that the bandwidth is measured by
Call = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """`run` computes it once, forward and backward."""

    name: str
    times: int  # in a step
    run: Call
    flops: float  # of one
    numbers: float  # fp32 numbers that one reads and writes at least
    wide: bool = False  # in fp32 under autocast, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for step_parts.json and step_parts.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows, tables = [], []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            rows.append(_measure(shape, dtype, options.rounds))
            tables.append(_table(rows[-1]))
            print(tables[-1], flush=True)
    if options.out:
        write_results(Path(options.out), "step_parts", machine() | {"threads": options.threads}, rows, tables)


def _measure(shape: Shape, dtype: str, rounds: int) -> dict[str, Any]:
    """All parts, the whole step, the matmul and the copy in turns; medians."""
    model = moelab.build(_config(shape, "auto"), seed=0)
    trained = Trained(model, _adamw(model), lambda ids: _our_loss(model, ids))
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    for turn in range(2):
        _step(trained, _batch(shape, turn), dtype)
    parts = _parts(model, trained.optimizer, shape, narrow)
    seconds: dict[str, list[float]] = {part.name: [] for part in parts} | {"step": []}
    rates: dict[bool, list[float]] = {True: [], False: []}  # of a matmul in fp32, in the step's dtype
    speeds = []
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    for turn in range(rounds + 2):
        seconds["step"].append(_step(trained, _batch(shape, turn), dtype))
        for part in parts:
            seconds[part.name].append(_seconds(part.run))
        for wide, found in rates.items():
            found.append(_rate(torch.float32 if wide else getattr(torch, dtype)))
        speeds.append(2 * 4 * COPIED / _seconds(lambda: target.copy_(source)))
    rate, speed = {wide: median(found[2:]) for wide, found in rates.items()}, median(speeds[2:])
    return {
        "title": shape.title, "dtype": dtype, "matmul_gflops": rate[False] / 1e9,
        "fp32_matmul_gflops": rate[True] / 1e9, "copy_gb_per_second": speed / 1e9,
        "step": median(seconds["step"][2:]),
        "parts": [
            {"part": part.name, "seconds": part.times * median(seconds[part.name][2:]),
             "by_flops": part.times * part.flops / rate[part.wide], "by_bytes": part.times * 4 * part.numbers / speed}
            for part in parts
        ],
    }  # fmt: skip


def _rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large matmul, by the way that the layers compute theirs."""
    a = torch.ones(MATMUL, MATMUL, dtype=dtype)
    if prefers_onednn(a, a) and onednn_is_wider():
        return float(2 * MATMUL**3 / _seconds(lambda: product(a, a)))
    out = torch.empty_like(a)
    return float(2 * MATMUL**3 / _seconds(lambda: torch.mm(a, a, out=out)))


def _seconds(run: Call) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _parts(model: Transformer, optimizer: torch.optim.Optimizer, shape: Shape, narrow: Any) -> list[Part]:
    layer, given = model.layers[0], _given(model, shape, narrow)
    assert isinstance(layer, DecoderLayer)
    tokens, layers, width = shape.batch * shape.sequence, shape.layers, shape.hidden
    parameters = list(model.parameters())
    total = sum(each.numel() for each in parameters)

    def part(name: str, times: int, module: nn.Module, flops: float, numbers: float, wide: bool = False) -> Part:
        """FLOPs and numbers of the forward pass: backward is twice as much."""
        return Part(name, times, _both(module, given[id(module)], narrow), 3 * flops, 3 * numbers, wide)

    def linear(name: str, module: nn.Linear) -> Part:
        size = module.weight.numel()
        rows = tokens * (module.in_features + module.out_features)
        return part(name, layers, module, 2 * tokens * size, rows + size)

    attention, moe = layer.self_attn, layer.mlp
    heads = attention.o_proj.in_features
    chosen, experts = shape.num_experts_per_tok, moe.experts.gate_up.numel() + moe.experts.down.numel()
    routed = 6 * tokens * chosen * width * shape.moe_intermediate_size
    shared = moe.shared_expert
    of_shared = sum(each.numel() for each in shared.parameters())
    head = model.lm_head.weight
    return [
        part("norms", 2 * layers + 1, layer.input_layernorm, 0, 2 * tokens * width),
        *(linear(f"{name}_proj", getattr(attention, f"{name}_proj")) for name in "qkvo"),
        Part("attention and RoPE", layers, _both(*given["kernel"], narrow), 6 * shape.sequence * tokens * heads,
             6 * tokens * (heads + attention.k_proj.out_features), wide=True),
        part("router", layers, moe.router, 2 * tokens * width * shape.num_experts,
             tokens * (width + shape.num_experts), wide=True),
        part("routed experts", layers, moe.experts, routed, 2 * tokens * width + experts),
        part("shared expert", layers, shared, 2 * tokens * of_shared, 2 * tokens * width + of_shared),
        Part("head and loss", 1, _both(_Loss(head, _batch(shape, 0)), given[id(model.lm_head)], narrow),
             6 * tokens * head.numel(), 3 * (tokens * width + head.numel())),
        Part("gradient norm, clipping", 1, lambda: nn.utils.clip_grad_norm_(parameters, 1.0), 0, 3 * total),
        Part("AdamW", 1, optimizer.step, 0, 7 * total),
    ]  # fmt: skip


class _Loss(nn.Module):
    """hidden [B, S, D] -> its loss a token."""

    def __init__(self, head: nn.Parameter, targets: Tensor) -> None:
        super().__init__()
        self.head, self.targets = head, targets

    def forward(self, hidden: Tensor) -> Tensor:
        return token_cross_entropy(hidden, self.head, self.targets)


def _given(model: Transformer, shape: Shape, narrow: Any) -> dict[Any, Any]:
    """What each module of the first layer gets in a forward pass, by identity; the kernel with its; the head's rows."""
    layer, given, kernel = model.layers[0], {}, model.layers[0].self_attn.kernel
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: given.setdefault(id(module), inputs))
        for module in layer.modules()
    ]

    def seen(*inputs: Any) -> Any:
        given["kernel"] = (kernel, inputs)
        return kernel(*inputs)

    layer.self_attn.kernel = seen
    with torch.no_grad(), narrow:
        hidden, _ = model.hidden_states(_batch(shape, 0))
    layer.self_attn.kernel = kernel
    for hook in hooks:
        hook.remove()
    given[id(model.lm_head)] = (hidden,)
    return given


def _both(module: Callable[..., Any], inputs: tuple[Any, ...], narrow: Any) -> Call:
    """A call of the module forward and backward, every tensor of its inputs and its parameters with a gradient."""
    leaves = [each.detach().clone().requires_grad_() if _real(each) else each for each in inputs]
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    upstream: list[Tensor] = []

    def run() -> None:
        for each in (*leaves, *parameters):
            if isinstance(each, Tensor):
                each.grad = None
        with narrow:
            out = module(*leaves)
        y = out if isinstance(out, Tensor) else out.weight
        if not upstream:
            upstream.append(torch.randn_like(y))
        y.backward(upstream[0])

    return run


def _real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _table(row: dict[str, Any]) -> str:
    body = []
    for part in row["parts"]:
        limit = max(part["by_flops"], part["by_bytes"])
        by = "FLOPs" if part["by_flops"] >= part["by_bytes"] else "bytes"
        body.append([part["part"], f"{1e3 * part['seconds']:.1f}", f"{100 * part['seconds'] / row['step']:.0f} %",
                     f"{1e3 * limit:.1f}", by, f"{part['seconds'] / limit:.2f}"])  # fmt: skip
    total = sum(part["seconds"] for part in row["parts"])
    limit = sum(max(part["by_flops"], part["by_bytes"]) for part in row["parts"])
    body.append(["sum", f"{1e3 * total:.1f}", f"{100 * total / row['step']:.0f} %", f"{1e3 * limit:.1f}", "",
                 f"{total / limit:.2f}"])  # fmt: skip
    head = ["part", "ms", "of the step", "limit ms", "by", "time / limit"]
    rates = f"matmul {row['matmul_gflops']:.0f} GFLOP/s, in fp32 {row['fp32_matmul_gflops']:.0f}"
    title = (
        f"{row['title']}; {row['dtype']}; step {1e3 * row['step']:.0f} ms; {rates}, "
        f"copy {row['copy_gb_per_second']:.0f} GB/s"
    )
    return f"\n{title}\n\n" + markdown_table(head, body) + "\n"


if __name__ == "__main__":
    main()
