"""Everything that needs a GPU, in one run of under eight minutes on one H200; without one it says so and stops.

    python benchmarks/gpu.py --out benchmarks/results

Correctness in bf16 against `loop` in fp32; every backend forward and forward + backward at three models' layers,
balanced and with a recorded run's load, beside the card's own matmul rate, transformers' grouped_mm experts and a
dense FFN of equal active FLOPs; the MegaBlocks products stand-alone; then whole training steps with MFU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moelab
from layer import Contender, LayerShape, backends_for, bank_of, draw_routing, recorded, time_in_turn
from moelab import ExpertBackend, Routing
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe.activation import SwiGLU
from moelab.moe.experts import ExpertBank
from moelab.nn.count import count_parameters, flops_per_token
from moelab_plugins.expert_backends._megablocks_install import load as load_kernels
from moelab_plugins.expert_backends._megablocks_install import missing
from moelab_plugins.expert_backends._megablocks_topology import BLOCK, bins, topology
from moelab_plugins.expert_backends.megablocks import block_matrix
from report import machine, markdown_table, median, write_results

NO_GPU = 2  # exit code
QWEN_57B = LayerShape("Qwen2-57B-A14B", 3584, 64, 8, 2560, shared=20480)
SHAPES = (
    (QWEN_57B, (4096, 16384, 32768)),
    (LayerShape("Qwen1.5-MoE-A2.7B", 2048, 60, 4, 1408), (4096, 32768)),
    (LayerShape("OLMoE-1B-7B", 2048, 64, 8, 1024), (4096, 32768)),
)
BF16, TOLERANCE = torch.bfloat16, 2e-2  # relative to the largest output: bf16 keeps 8 bits, three products
REPEATS = 5
PROBE = 8192  # rows and columns of the matmul that is the card's rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=480, help="seconds, after which no further part is begun")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA device; nothing was measured and nothing written")
        return NO_GPU
    device, began = torch.device("cuda"), time.perf_counter()
    rate = matmul_rate(device)
    results: dict[str, Any] = {"matmul_tflops": rate / 1e12, "skipped": []}
    tables = [f"\nbf16 matmul of {PROBE}: {rate / 1e12:.0f} TFLOP/s\n"]
    parts: list[tuple[str, Callable[[], tuple[Any, str]]]] = [
        ("correctness", lambda: correctness(device)),
        ("step", lambda: training_steps(device, rate)),
        ("kernels", lambda: kernels(device, rate)),
        *((f"layer {shape.name}", lambda s=shape, t=tokens: layer(s, t, device, rate)) for shape, tokens in SHAPES),
    ]
    for name, part in parts:
        if time.perf_counter() - began > options.budget:
            results["skipped"].append(name)
            continue
        results[name], table = part()
        tables.append(table)
        print(table, flush=True)
    results["seconds"] = time.perf_counter() - began
    if options.out:
        write_results(Path(options.out), "gpu", machine(), results, tables)
    wrong = [row for row in results.get("correctness", []) if not row["correct"]]
    return 1 if wrong else 0


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of one large bf16 product."""
    a = torch.randn(PROBE, PROBE, device=device, dtype=BF16)
    seconds = _time(lambda: a @ a, REPEATS * 2)
    return 2 * PROBE**3 / seconds


def correctness(device: torch.device) -> tuple[list[dict[str, Any]], str]:
    """Output and every gradient of each backend in bf16 against `loop` in fp32, beyond 256 block rows and columns."""
    torch.backends.cuda.matmul.allow_tf32 = False
    shape, tokens, rows = LayerShape("check", 512, 64, 8, 768), 4096, []
    for load in ("balanced", "random", *(["replayed"] if recorded() else [])):
        routing = draw_routing(shape, tokens, load, device)
        bank, x = bank_of(shape, device, BF16), torch.randn(tokens, shape.hidden, device=device, dtype=BF16)
        upstream = torch.randn_like(x)
        backends = backends_for(shape, tokens, device, BF16)
        wanted = _gradients(backends["loop"], x.float(), routing, bank_like(bank, torch.float32), upstream.float())
        for name, backend in backends.items():
            found = _gradients(backend, x, routing, bank, upstream)
            error = max(
                float((ours.float() - theirs).abs().max() / theirs.abs().max())
                for ours, theirs in zip(found, wanted, strict=True)
            )
            rows.append({"backend": name, "load": load, "error": error, "correct": error < TOLERANCE})
    body = [[r["backend"], r["load"], f"{r['error']:.1e}", "yes" if r["correct"] else "NO"] for r in rows]
    head = ["backend", "load", "largest relative error", f"below {TOLERANCE:g}"]
    return rows, "\nbf16 against fp32 loop, output and all gradients\n\n" + markdown_table(head, body) + "\n"


def bank_like(bank: ExpertBank, dtype: torch.dtype) -> ExpertBank:
    """The same weights in another dtype."""
    return copy.deepcopy(bank).to(dtype)


def _gradients(backend: ExpertBackend, x: Tensor, routing: Routing, bank: ExpertBank, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = backend(x, routing, bank)
    return [y.detach(), *torch.autograd.grad(y, [x, routing.weight, *bank.parameters()], upstream)]


def layer(shape: LayerShape, sizes: tuple[int, ...], device: torch.device, rate: float) -> tuple[list[Any], str]:
    """TFLOP/s and peak memory of every side."""
    rows = []
    bank = bank_of(shape, device, BF16)
    for tokens in sizes:
        x = torch.randn(tokens, shape.hidden, device=device, dtype=BF16, requires_grad=True)
        upstream = torch.randn_like(x)
        for load in ("balanced", *(["replayed"] if recorded() else ["random"])):
            routing = draw_routing(shape, tokens, load, device)
            backends = {k: b for k, b in backends_for(shape, tokens, device, BF16).items() if k != "loop"}
            sides = {name: _contender(backend, x, routing, bank) for name, backend in backends.items()}
            sides |= _peers(shape, x, routing)
            for name, timing in time_in_turn(sides, upstream, REPEATS, device).items():
                rows.append(
                    {
                        "side": name, "tokens": tokens, "load": load,
                        "forward_tflops": shape.flops(tokens, backward=False) / timing.forward / 1e12,
                        "total_tflops": shape.flops(tokens, backward=True) / timing.total / 1e12,
                        "of_matmul_rate": shape.flops(tokens, backward=True) / timing.total / rate,
                        "peak_gb": timing.peak_bytes / 1e9,
                    }
                )  # fmt: skip
            torch.cuda.empty_cache()
    head = ["side", "tokens", "load", "forward TFLOP/s", "forward + backward TFLOP/s", "of the matmul rate", "peak GB"]
    body = [
        [r["side"], str(r["tokens"]), r["load"], f"{r['forward_tflops']:.0f}", f"{r['total_tflops']:.0f}",
         f"{100 * r['of_matmul_rate']:.0f} %", f"{r['peak_gb']:.1f}"]
        for r in rows
    ]  # fmt: skip
    title = f"{shape.name}: hidden {shape.hidden}, {shape.experts} x {shape.width}, top-{shape.top_k}, bf16"
    return rows, f"\n{title}\n\n" + markdown_table(head, body) + "\n"


def _contender(backend: ExpertBackend, x: Tensor, routing: Routing, bank: ExpertBank) -> Contender:
    return Contender(lambda: backend(x, routing, bank), [x, routing.weight, *bank.parameters()])


def _peers(shape: LayerShape, x: Tensor, routing: Routing) -> dict[str, Contender]:
    """transformers' grouped_mm experts where installed, and a dense FFN of equal active FLOPs."""
    width = shape.top_k * shape.width
    up = torch.nn.Parameter(0.02 * torch.randn(2 * width, shape.hidden, device=x.device, dtype=x.dtype))
    down = torch.nn.Parameter(0.02 * torch.randn(width, shape.hidden, device=x.device, dtype=x.dtype))
    peers = {"dense FFN": Contender(lambda: SwiGLU()(*(x @ up.t()).chunk(2, -1)) @ down, [x, up, down])}
    if importlib.util.find_spec("transformers") is None:
        return peers
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    config = Qwen2MoeConfig(
        hidden_size=shape.hidden, num_experts=shape.experts, moe_intermediate_size=shape.width,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    experts = Qwen2MoeExperts(config).to(x.device, x.dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    index, weight = routing.expert.view(-1, shape.top_k), routing.weight.view(-1, shape.top_k)
    run = lambda: experts(x, index, weight.to(x.dtype))  # noqa: E731
    return peers | {"transformers grouped_mm": Contender(run, [x, routing.weight, *experts.parameters()])}


def kernels(device: torch.device, rate: float) -> tuple[list[dict[str, Any]], str]:
    """MegaBlocks' sdd and dsd alone at the 57B layer, for each pipelining depth that stk's one configuration hides."""
    reason = missing()
    if reason is not None:
        return [], f"\nMegaBlocks' products alone: {reason}\n"
    found, shape, tokens, rows = load_kernels(), QWEN_57B, 16384, []
    import triton
    from stk.backend import triton_kernels

    counts = torch.full((shape.experts,), tokens * shape.top_k // shape.experts, device=device)
    bound, padded = bins(counts), tokens * shape.top_k
    x = torch.randn(padded, shape.hidden, device=device, dtype=BF16)
    bank = bank_of(shape, device, BF16)
    gate_up, down = bank.gate_up.detach().flatten(0, 1), bank.down.detach().flatten(0, 1)
    wide = block_matrix(found, topology(bound.padded_rows, padded, 2 * shape.width), None, BF16)
    narrow = topology(bound.padded_rows, padded, shape.width)
    act = block_matrix(found, narrow, torch.randn(narrow.column.numel(), BLOCK, BLOCK, device=device, dtype=BF16), BF16)
    flops = {"sdd": 2 * padded * shape.hidden * 2 * shape.width, "dsd": 2 * padded * shape.hidden * shape.width}
    before = {kernel: list(kernel.configs) for kernel in (triton_kernels._sdd_kernel, triton_kernels._dsd_kernel)}
    for depth, inner, warps in ((4, 32, 4), (7, 32, 4), (3, 64, 4), (3, 64, 8), (4, 64, 8)):
        blocks = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_K": inner, "BLOCK_SIZE": BLOCK}
        for kernel in before:
            kernel.configs = [triton.Config(blocks, num_stages=depth, num_warps=warps)]
            kernel.cache.clear()
        row: dict[str, Any] = {"stages": depth, "block_k": inner, "warps": warps}
        for name, call in {"sdd": lambda: found.sdd(x, gate_up.t(), wide), "dsd": lambda: found.dsd(act, down)}.items():
            row[name] = flops[name] / _time(call, REPEATS) / 1e12
        rows.append(row)
    for kernel, configs in before.items():
        kernel.configs = configs
        kernel.cache.clear()
    body = [
        [str(r["stages"]), str(r["block_k"]), str(r["warps"]), f"{r['sdd']:.0f}", f"{r['dsd']:.0f}",
         f"{100e12 * max(r['sdd'], r['dsd']) / rate:.0f} %"]
        for r in rows
    ]  # fmt: skip
    head = ["stages", "BLOCK_K", "warps", "sdd TFLOP/s", "dsd TFLOP/s", "better one, of the matmul rate"]
    return rows, "\nMegaBlocks' products alone (first row: as stk ships)\n\n" + markdown_table(head, body) + "\n"


def training_steps(device: torch.device, rate: float) -> tuple[list[dict[str, Any]], str]:
    """Four full-width layers of 57B-A14B: forward, backward, clipping, fused AdamW; bf16 matmuls, fp32 state."""
    rows = []
    names = [name for name in backends_for(QWEN_57B, 8192, device, BF16) if name != "loop"]
    for name in names:
        model = moelab.build(_four_layers(name), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        ids = torch.randint(0, 32000, (2, 4096), device=device)

        def step(model: Any = model, optimizer: Any = optimizer, ids: Tensor = ids) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", BF16):
                loss = model(ids, targets=ids).token_loss.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        torch.cuda.reset_peak_memory_stats()
        seconds = _time(step, REPEATS)
        speed = ids.numel() / seconds
        rows.append(
            {
                "backend": name, "tokens_per_second": speed, "parameters": count_parameters(model).total,
                "mfu_of_matmul_rate": speed * flops_per_token(model, 4096) / rate,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        )  # fmt: skip
        del model, optimizer, step
        torch.cuda.empty_cache()
    body = [
        [r["backend"], f"{r['tokens_per_second']:.0f}", f"{100 * r['mfu_of_matmul_rate']:.0f} %", f"{r['peak_gb']:.0f}"]
        for r in rows
    ]
    head = ["backend", "tokens/s", "model FLOP/s of the matmul rate", "peak GB"]
    return rows, "\ntraining step, 4 layers of full width, 2 x 4096 tokens\n\n" + markdown_table(head, body) + "\n"


def _four_layers(backend: str) -> ModelConfig:
    """57B-A14B's layer with 24 of its 64 experts, so that four layers and their fp32 state (62 GB) fit one card."""
    layout = {"name": "uniform", "num_experts": 24, "num_experts_per_tok": 8, "moe_intermediate_size": 2560}
    moe = MoEConfig(
        layout=layout, shared_expert={"name": "gated", "intermediate_size": 20480}, backend={"name": backend}
    )
    return ModelConfig(
        vocab_size=32000, hidden_size=3584, intermediate_size=18944, num_hidden_layers=4, num_attention_heads=28,
        num_key_value_heads=4, moe=moe,
    )  # fmt: skip


def _time(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds after two warm-up calls."""
    seconds = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


if __name__ == "__main__":
    raise SystemExit(main())
