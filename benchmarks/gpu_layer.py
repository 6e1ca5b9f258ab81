"""One layer of experts on a GPU: right, how fast beside the card's matmul and peers, and where its time goes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu_common import BF16, QWEN_57B, Bench, choose
from layer import Contender, LayerShape, Timing, backends_for, bank_of, draw_routing, recorded, time_in_turn
from moelab import ExpertBackend, Routing
from moelab.moe.activation import SwiGLU, activate
from moelab.moe.experts import ExpertBank
from moelab_plugins.expert_backends._megablocks_install import load as load_kernels
from moelab_plugins.expert_backends._megablocks_install import missing
from moelab_plugins.expert_backends._megablocks_topology import BLOCK, bins, topology
from moelab_plugins.expert_backends.megablocks import block_matrix
from report import markdown_table

LEFT_OUT = {"loop", "auto", "densemixer"}  # slow, another one again, or another computation
DENSE = "dense FFN"  # of equal active FLOPs
TOLERANCE = 2e-2  # relative to the largest output: bf16 keeps 8 bits, three products
Part = tuple[list[dict[str, Any]], str]


def correctness(bench: Bench) -> Part:
    """Output and every gradient of each backend in bf16 against `loop` in fp32, beyond 256 block rows and columns."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device, rows = bench.device, []
    shape, tokens = bench.sizes.check
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


def layer(shape: LayerShape, sizes: tuple[int, ...], bench: Bench) -> Part:
    """TFLOP/s and peak memory of every side, beside what the card's matmul and its memory allow."""
    rows, device = [], bench.device
    bank = bank_of(shape, device, BF16)
    for tokens in sizes:
        x = torch.randn(tokens, shape.hidden, device=device, dtype=BF16, requires_grad=True)
        upstream = torch.randn_like(x)
        for load in ("balanced", *(["replayed"] if recorded() else ["random"])):
            routing = draw_routing(shape, tokens, load, device)
            backends = {k: b for k, b in backends_for(shape, tokens, device, BF16).items() if k not in LEFT_OUT}
            sides = {name: _contender(backend, x, routing, bank) for name, backend in backends.items()}
            sides["grouped_mm, torch's passes"] = _contender(backends["grouped_mm"], x, routing, bank, ours=False)
            sides |= _peers(shape, x, routing)
            for name, timing in time_in_turn(sides, upstream, bench.sizes.repeats, device).items():
                rows.append(
                    {"side": name, "tokens": tokens, "load": load} | _figures(shape, name, tokens, timing, bench)
                )
            bench.release()
    head = ["side", "tokens", "load", "forward TFLOP/s", "forward + backward TFLOP/s", "of the matmul rate",
            "ms", "least ms by FLOPs", "least ms by bytes", "peak GB"]  # fmt: skip
    body = [
        [r["side"], str(r["tokens"]), r["load"], f"{r['forward_tflops']:.4g}", f"{r['total_tflops']:.4g}",
         f"{100 * r['of_matmul_rate']:.0f} %", f"{r['total_ms']:.2f}", f"{r['flops_ms']:.2f}", f"{r['bytes_ms']:.2f}",
         f"{r['peak_gb']:.1f}"]
        for r in rows
    ]  # fmt: skip
    title = f"{shape.name}: hidden {shape.hidden}, {shape.experts} x {shape.width}, top-{shape.top_k}, bf16"
    return rows, f"\n{title}\n\n" + markdown_table(head, body) + "\n"


def _figures(shape: LayerShape, side: str, tokens: int, timing: Timing, bench: Bench) -> dict[str, float]:
    """Rates, and the least time that the products' FLOPs and bytes take, forward and backward."""
    if side == DENSE:
        shape = replace(shape, experts=1, top_k=1, width=shape.top_k * shape.width)
    flops = shape.flops(tokens, backward=True)
    return {
        "forward_tflops": shape.flops(tokens, backward=False) / timing.forward / 1e12,
        "total_tflops": flops / timing.total / 1e12,
        "of_matmul_rate": flops / timing.total / bench.rate,
        "flops_ms": 1e3 * flops / bench.rate,
        "bytes_ms": 1e3 * shape.traffic(tokens, backward=True) / bench.bandwidth,
        "total_ms": 1e3 * timing.total,
        "peak_gb": timing.peak_bytes / 1e9,
    }


def _contender(backend: ExpertBackend, x: Tensor, routing: Routing, bank: ExpertBank, ours: bool = True) -> Contender:
    def run() -> Tensor:
        choose(ours)
        return backend(x, routing, bank)

    return Contender(run, [x, routing.weight, *bank.parameters()])


def _peers(shape: LayerShape, x: Tensor, routing: Routing) -> dict[str, Contender]:
    """transformers' grouped_mm experts where installed, and a dense FFN of equal active FLOPs."""
    width = shape.top_k * shape.width
    up = torch.nn.Parameter(0.02 * torch.randn(2 * width, shape.hidden, device=x.device, dtype=x.dtype))
    down = torch.nn.Parameter(0.02 * torch.randn(width, shape.hidden, device=x.device, dtype=x.dtype))
    peers = {DENSE: Contender(lambda: activate(SwiGLU(), (x @ up.t()).unflatten(-1, (2, -1))) @ down, [x, up, down])}
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


def profile(bench: Bench) -> Part:
    """What the device does in forward and backward of one layer, kernel by kernel, and how often the host waits."""
    shape, tokens = bench.sizes.shapes[0][0], bench.sizes.kernels
    routing = draw_routing(shape, tokens, "balanced", bench.device)
    bank, rows, tables = bank_of(shape, bench.device, BF16), [], []
    x = torch.randn(tokens, shape.hidden, device=bench.device, dtype=BF16, requires_grad=True)
    upstream = torch.randn_like(x)
    for name, backend in backends_for(shape, tokens, bench.device, BF16).items():
        if name in LEFT_OUT:
            continue

        def run(backend: ExpertBackend = backend) -> None:
            torch.autograd.grad(backend(x, routing, bank), [x, routing.weight, *bank.parameters()], upstream)

        found, table = kernels_of(run, bench, f"{name}, {shape.name}, {tokens} tokens, forward + backward")
        rows += [{"backend": name} | row for row in found]
        tables.append(table)
    return rows, "\n".join(tables)


def kernels_of(run: Callable[[], None], bench: Bench, title: str) -> Part:
    """The kernels of one call by their time on the device, the longest ones; on a CPU torch's operations."""
    bench.seconds(run, 1)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        run()
        bench.wait()
    events = seen.key_averages()
    if bench.device.type == "cuda":
        chosen = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    else:
        chosen = [e for e in events if e.key.startswith("aten::")]
    rows = [
        {"kernel": e.key, "ms": (e.self_device_time_total or e.self_cpu_time_total) / 1e3, "calls": e.count}
        for e in sorted(chosen, key=lambda e: -(e.self_device_time_total or e.self_cpu_time_total))
    ]
    total = sum(row["ms"] for row in rows)
    waits = sum(e.count for e in events if e.key == "cudaStreamSynchronize")
    body = [
        [
            row["kernel"][:140].replace("|", "/"),
            f"{row['ms']:.2f}",
            f"{100 * row['ms'] / total:.1f} %",
            str(row["calls"]),
        ]
        for row in rows[:20]
    ]
    table = markdown_table(["kernel", "ms", "share", "calls"], body)
    return rows[:40], f"\n{title}: {total:.2f} ms on the device, the host waits {waits} times\n\n{table}\n"


def kernels(bench: Bench) -> Part:
    """MegaBlocks' sdd and dsd alone at the 57B layer, for each pipelining depth that stk's one configuration hides."""
    reason = missing() or (None if bench.device.type == "cuda" else "needs a CUDA device")
    if reason is not None:
        return [], f"\nMegaBlocks' products alone: {reason}\n"
    found, shape, tokens, rows = load_kernels(), QWEN_57B, bench.sizes.kernels, []
    device = bench.device
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
            row[name] = flops[name] / bench.seconds(call) / 1e12
        rows.append(row)
    for kernel, configs in before.items():
        kernel.configs = configs
        kernel.cache.clear()
    body = [
        [str(r["stages"]), str(r["block_k"]), str(r["warps"]), f"{r['sdd']:.0f}", f"{r['dsd']:.0f}",
         f"{100e12 * max(r['sdd'], r['dsd']) / bench.rate:.0f} %"]
        for r in rows
    ]  # fmt: skip
    head = ["stages", "BLOCK_K", "warps", "sdd TFLOP/s", "dsd TFLOP/s", "better one, of the matmul rate"]
    return rows, "\nMegaBlocks' products alone (first row: as stk ships)\n\n" + markdown_table(head, body) + "\n"
